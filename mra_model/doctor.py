"""`mra doctor`: what is installed, and which backend serves which op, with the reasons of those that do not."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.table import Table

import mra_kernels
from mra_kernels.dispatch import Choice
from mra_model.environment import DTYPES, gpu_problem, hardware, nvcc, usable_cpus, versions

DEVICES = ("cpu", "cuda")


def diagnose() -> dict[str, Any]:
    """Everything that `mra doctor` shows, ready for JSON.

    Returns:
        `versions`, `cpu`, `usable_cpus`, `gpus`, `gpu_problem`, `nvcc`, `extension` and `triton` (each with a `state`:
        present, absent or broken) and `backends`: for each device, dtype and op the automatic choice, whether it was
        ever measured, and why other backends cannot serve.
    """
    machine = hardware()
    return {
        "versions": versions(),
        "system": machine["system"],
        "cpu": machine["cpu"],
        "usable_cpus": usable_cpus(),
        "gpus": machine["gpus"],
        "gpu_problem": gpu_problem(),
        "nvcc": nvcc(),
        "extension": extension_state(),
        "triton": triton_state(),
        "backends": [
            _choice_record(device, dtype, choice)
            for device in DEVICES
            for dtype in DTYPES
            for choice in mra_kernels.backend_report(device, DTYPES[dtype])
        ],
    }


def extension_state() -> dict[str, Any]:
    """Whether the compiled extension is present, absent (never built) or broken (built, but it does not load)."""
    if find_spec("mra_kernels._C") is None:
        return {"state": "absent", "problem": "it was never built: pip install ."}
    try:
        return {"state": "present", "info": mra_kernels.build_info()}
    except ImportError as error:
        return {"state": "broken", "problem": f"{error}; rebuild it with pip install --force-reinstall ."}


def triton_state() -> dict[str, Any]:
    """Whether Triton is present, absent or broken."""
    if find_spec("triton") is None:
        return {"state": "absent", "problem": "it is optional: pip install triton"}
    try:
        return {"state": "present", "info": {"version": import_module("triton").__version__}}
    except (ImportError, OSError, RuntimeError) as error:
        # Its compiled part fails in these ways where it does not fit the system's libraries.
        return {"state": "broken", "problem": f"{type(error).__name__}: {error}"}


def is_broken(report: dict[str, Any]) -> bool:
    """Whether something is installed that does not load."""
    return any(report[part]["state"] == "broken" for part in ("extension", "triton"))


def print_report(report: dict[str, Any], console: Console) -> None:
    """Writes the report as tables."""
    console.print(_parts_table(report))
    console.print(_backends_table(report["backends"]))
    for line in _reasons(report["backends"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _choice_record(device: str, dtype: str, choice: Choice) -> dict[str, Any]:
    return {
        "device": device,
        "dtype": dtype,
        "op": choice.op,
        "chosen": choice.chosen,
        "measured": choice.measured,
        "reasons": choice.reasons,
    }


def _parts_table(report: dict[str, Any]) -> Table:
    table = Table(title="Installed", show_header=False, title_justify="left")
    for name, value in report["versions"].items():
        if name != "triton":
            table.add_row(name, value or "absent")
    cpu = report["cpu"]
    table.add_row("CPU", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads")
    if cpu["threads"] > report["usable_cpus"]:
        usable = report["usable_cpus"]
        table.add_row("threads", f"more than the {usable} CPUs that this process gets: set OMP_NUM_THREADS={usable}")
    table.add_row("instruction sets", " ".join(cpu["instruction_sets"]) or "unknown")
    for gpu in report["gpus"]:
        memory = gpu["memory_bytes"] / 2**30
        table.add_row("GPU", f"{gpu['name']}, {memory:.0f} GiB, sm {gpu['capability']}, driver {gpu['driver']}")
    if report["gpu_problem"]:
        table.add_row("GPU", f"none: {report['gpu_problem']}")
    compiler = report["nvcc"]
    table.add_row("nvcc", f"{compiler['path']}: {compiler['version']}" if compiler else "absent")
    table.add_row("extension", _state(report["extension"]))
    table.add_row("triton", _state(report["triton"]))
    return table


def _state(part: dict[str, Any]) -> str:
    if part["state"] == "present":
        return ", ".join(f"{name} {value}" for name, value in part["info"].items())
    return f"{part['state'].upper() if part['state'] == 'broken' else part['state']}: {part['problem']}"


def _backends_table(records: list[dict[str, Any]]) -> Table:
    table = Table("op", *DEVICES, title="Which backend serves which op", title_justify="left")
    for op in dict.fromkeys(record["op"] for record in records):
        cells = [[r for r in records if r["op"] == op and r["device"] == device] for device in DEVICES]
        table.add_row(op, *map(_cell, cells))
    return table


def _cell(records: list[dict[str, Any]]) -> str:
    """One op on one device: the backend, with its dtypes where not all have the same one."""
    by_backend: dict[str, list[str]] = {}
    for record in records:
        name = record["chosen"] + ("" if record["measured"] else " (unmeasured)")
        by_backend.setdefault(name, []).append(record["dtype"])
    if len(by_backend) == 1:
        return next(iter(by_backend))
    return "\n".join(f"{name} in {', '.join(dtypes)}" for name, dtypes in by_backend.items())


def _reasons(records: list[dict[str, Any]]) -> list[str]:
    """One line for each reason, with the ops and dtypes that it keeps from a backend."""
    grouped: dict[tuple[str, str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for record in records:
        for backend, reason in record["reasons"].items():
            ops, dtypes = grouped.setdefault((record["device"], backend, reason), ({}, {}))
            ops[record["op"]] = None
            dtypes[record["dtype"]] = None
    every = len({record["op"] for record in records})
    lines = ["Why not the others:"] if grouped else []
    for (device, backend, reason), (ops, dtypes) in grouped.items():
        who = "every op" if len(ops) == every else ", ".join(ops)
        what = "" if len(dtypes) == len(DTYPES) else f" in {', '.join(dtypes)}"
        lines.append(f"  {backend} on {device}: {reason} ({who}{what})")
    return lines


__all__ = ["diagnose", "extension_state", "is_broken", "print_report", "triton_state"]
