"""Results for readers: one table a step, times beside errors, and what was not measured said so."""

from typing import Any

# Microseconds from which on a unit is used, the largest first.
_UNITS = ((1e6, "s"), (1e3, "ms"), (1.0, "us"))


def summary(data: dict[str, Any]) -> str:
    """The text of summary.md for the contents of results.json."""
    machine, cpu = data["machine"], data["machine"]["cpu"]
    names = list(dict.fromkeys([*data["steps"], *(result["step"] for result in data["results"])]))
    lines = [
        f"# {machine['device']}, commit {data['commit'][:12]}",
        "",
        f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {machine['system']}; "
        + ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value is not None),
        "",
        *(f"`{run['command']}` at {run['date']}  " for run in data["runs"]),
        "",
        "Times are medians with the 20th and 80th percentile. warm, cold: a kernel's time with its inputs in the cache "
        "and out of it, on a GPU by graph replay. call: what a caller waits, launch gaps included. gain: the first "
        "variant's median over this one's. error: against float64. others: share of the processor that other programs "
        "used meanwhile.",
        "",
        "| step | state | seconds | others | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, step in data["steps"].items():
        why = str(step.get("why") or "").strip().splitlines()
        others = step.get("others")
        shown = "" if others is None else f"{others:.0%}"
        lines.append(f"| {name} | {step['state']} | {step.get('seconds', '')} | {shown} | {why[-1] if why else ''} |")
    for name in names:
        lines += _table(name, [result for result in data["results"] if result["step"] == name])
    return "\n".join(lines) + "\n"


def line(result: dict[str, Any], baseline: dict[str, Any]) -> str:
    """One result in one line of plain text."""
    return f"{result['case']} | {result['variant']}: {' '.join(filter(None, _cells(result, baseline)))}"


def duration(microseconds: float) -> str:
    """In the unit that suits it: `12.3 us`, `8.12 s`."""
    scale, unit = next((scale, unit) for scale, unit in _UNITS if microseconds >= scale or scale == 1.0)
    return f"{microseconds / scale:.4g} {unit}"


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
    parts = [f"- {r['case']}, {r['variant']}: {_parts(r)}" for r in results if r["parts"]]
    names = [f"- {r['case']}, {r['variant']}: {r['launches']} launches: {_kernels(r)}" for r in results if r["kernels"]]
    lines += ["", "Parts:", "", *parts] if parts else []
    return lines + (["", "Kernels, slowest first:", "", *names] if names else [])


def _cells(result: dict[str, Any], baseline: dict[str, Any]) -> tuple[str, str, str, str]:
    """Times, gain, rate and error; what failed has its reason in place of times."""
    if result["failure"]:
        return f"no times: {result['failure']}", "", "", _errors(result)
    if not result["times"]:
        launches = [f"{result['launches']} launches"] if result["launches"] else []
        facts = [f"{name}: {value}" for name, value in result["facts"].items()]
        return ", ".join(launches + facts), "", "", _errors(result)
    times = ", ".join(
        f"{name} {duration(of['median'])} ({duration(of['p20'])} - {duration(of['p80'])})"
        for name, of in result["times"].items()
    )
    return times, _gain(result, baseline), _rate(result), _errors(result)


def _gain(result: dict[str, Any], baseline: dict[str, Any]) -> str:
    if result is baseline:
        return ""
    pairs = (
        (name, baseline["times"][name]["median"], of["median"])
        for name, of in result["times"].items()
        if name in baseline["times"]
    )
    return ", ".join(f"{name} x{theirs / ours:.2f}" for name, theirs, ours in pairs)


def _rate(result: dict[str, Any]) -> str:
    """TB/s and TFLOP/s in the first condition, from the least bytes and operations that the case allows.

    Of a backbone, images/s.
    """
    seconds = next(iter(result["times"].values()))["median"] * 1e-6
    if result["labels"].get("suite") == "backbones":
        return f"{result['labels']['batch'] / seconds:.3g} images/s"
    rates = ((result["bytes"], "TB/s"), (result["flops"], "TFLOP/s"))
    return ", ".join(f"{amount / seconds / 1e12:.3g} {unit}" for amount, unit in rates if amount)


def _errors(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in result["errors"].items())


def _parts(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {duration(part)}" for name, part in result["parts"].items())


def _kernels(result: dict[str, Any]) -> str:
    return "; ".join(f"{kernel['calls']}x `{kernel['name'][:90]}`" for kernel in result["kernels"][:4])
