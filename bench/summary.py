"""Results for readers: one table a step, times beside errors, and what was not measured said so."""

from typing import Any


def summary(data: dict[str, Any]) -> str:
    """The text of summary.md for the contents of results.json."""
    machine, versions = data["machine"], data["machine"]["versions"]
    lines = [
        f"# {machine['device']}, commit {data['commit'][:12]}" + (" with local changes" if data["dirty"] else ""),
        "",
        ", ".join(f"{name} {value}" for name, value in versions.items() if value is not None),
        "",
        *(f"`{run['command']}` at {run['date']}  " for run in data["runs"]),
        "",
        "Times are medians in microseconds with the 20th and 80th percentile. warm, cold: kernel time by graph replay "
        "with a warm and a cold L2. call: what a caller waits, launch gaps included. gain: the first variant's median "
        "over this one's. error: against float64.",
        "",
        "| step | state | seconds | |",
        "| --- | --- | --- | --- |",
    ]
    for name, step in data["steps"].items():
        why = str(step.get("why") or "").strip().splitlines()
        lines.append(f"| {name} | {step['state']} | {step.get('seconds', '')} | {why[-1] if why else ''} |")
    for name in data["steps"]:
        lines += _table(name, [result for result in data["results"] if result["step"] == name])
    return "\n".join(lines) + "\n"


def line(result: dict[str, Any], baseline: dict[str, Any]) -> str:
    """One result in one line of plain text."""
    return f"{result['case']} | {result['variant']}: {' '.join(filter(None, _cells(result, baseline)))}"


def _table(step: str, results: list[dict[str, Any]]) -> list[str]:
    if not results:
        return []
    lines = [
        "",
        f"## {step}",
        "",
        "| case | variant | times | gain | rate | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    first: dict[str, dict[str, Any]] = {}
    for result in results:
        baseline = first.setdefault(result["case"], result)
        lines.append(f"| {result['case']} | {result['variant']} | {' | '.join(_cells(result, baseline))} |")
    names = [f"- {r['case']}, {r['variant']}: {r['launches']} launches: {_kernels(r)}" for r in results if r["kernels"]]
    return lines + (["", "Kernels, slowest first:", "", *names] if names else [])


def _cells(result: dict[str, Any], baseline: dict[str, Any]) -> tuple[str, str, str, str]:
    """Times, gain, rate and error; what failed has its reason in place of times."""
    if result["failure"]:
        return f"no times: {result['failure']}", "", "", _errors(result)
    if not result["times"]:
        return ", ".join(f"{name}: {value}" for name, value in result["facts"].items()), "", "", ""
    times = ", ".join(
        f"{name} {of['median']:.1f} ({of['p20']:.1f}-{of['p80']:.1f})" for name, of in result["times"].items()
    )
    return times, _gain(result, baseline), _rate(result), _errors(result)


def _gain(result: dict[str, Any], baseline: dict[str, Any]) -> str:
    if result is baseline or baseline["failure"]:
        return ""
    pairs = (
        (name, baseline["times"][name]["median"], of["median"])
        for name, of in result["times"].items()
        if name in baseline["times"]
    )
    return ", ".join(f"{name} x{theirs / ours:.2f}" for name, theirs, ours in pairs)


def _rate(result: dict[str, Any]) -> str:
    """TB/s and TFLOP/s in the first condition, from the least bytes and operations that the case allows."""
    seconds = next(iter(result["times"].values()))["median"] * 1e-6
    rates = ((result["bytes"], "TB/s"), (result["flops"], "TFLOP/s"))
    return ", ".join(f"{amount / seconds / 1e12:.3g} {unit}" for amount, unit in rates if amount)


def _errors(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in result["errors"].items())


def _kernels(result: dict[str, Any]) -> str:
    return "; ".join(f"{kernel['calls']}x `{kernel['name'][:90]}`" for kernel in result["kernels"][:4])
