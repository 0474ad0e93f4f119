"""Which backend serves a call, and why the others do not.

A call names no backend: the automatic order of its device applies, and a backend that cannot serve is passed over.
`use_backend` or the environment variable `MRA_BACKEND` makes the choice explicit: then a backend that cannot serve
raises with its reason. A comma-separated list, `native,reference`, is an explicit order of preference.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

BACKENDS = ("reference", "native", "triton")

# The order of speed for every op, as measured on an AMD EPYC and, in bfloat16, on an H200: see bench/results.
AUTOMATIC = ("native", "triton", "reference")


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot serve this op on this device and dtype."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `forward` and `backward` take the arguments of the op's two schemas less the backend's name. `supports` returns
    None where the backend can serve a device and dtype, and otherwise the reason why it cannot.
    """

    forward: Callable
    backward: Callable
    supports: Callable[[torch.device, torch.dtype], str | None]


def parse_preference(text: str, source: str) -> tuple[str, ...]:
    """`"native,reference"` -> `("native", "reference")`.

    Raises:
        ValueError: a name is no backend.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"{source}={text!r}: {name!r} is no backend; choose from {', '.join(BACKENDS)}")
    return names


def _from_environment() -> tuple[tuple[str, ...] | None, str | None]:
    """What `MRA_BACKEND` chooses, or what is wrong with it: the first call says so, not the import."""
    text = os.environ.get("MRA_BACKEND")
    try:
        return (parse_preference(text, "MRA_BACKEND") if text else None), None
    except ValueError as error:
        return None, str(error)


# A plain global, because torch.compile guards on it and so recompiles when it changes.
_preference, _wrong_environment = _from_environment()


def preference() -> tuple[str, ...] | None:
    """The backends chosen explicitly, in order; None for the automatic choice.

    Raises:
        ValueError: `MRA_BACKEND` names no backend.
    """
    if _wrong_environment is not None:
        raise ValueError(_wrong_environment)
    return _preference


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serves every op inside the block with backend `name`, process-wide; `"auto"` restores the automatic choice.

    Raises:
        ValueError: `name` is no backend.
        BackendUnavailable: from the op itself, when the backend cannot serve it.
    """
    global _preference
    previous = preference()
    _preference = None if name == "auto" else parse_preference(name, "backend")
    try:
        yield
    finally:
        _preference = previous


def is_reference() -> bool:
    """True where the reference is chosen for everything: modules then compute as the paper writes it."""
    return preference() == ("reference",)


def choose(op: str, backends: Mapping[str, Backend | str], device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that serves `op`; `backends` maps a name to a backend, or to the reason it is missing.

    Raises:
        BackendUnavailable: none of the explicitly chosen backends can serve.
    """
    chosen = preference()
    reasons = []
    for name in chosen or AUTOMATIC:
        reason = why_not(backends, name, device, dtype)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailable(
        f"{op} cannot run on the chosen backend ({'; '.join(reasons)}). "
        f"Choose another, or allow a second one: MRA_BACKEND={','.join(chosen or ())},reference"
    )


def why_not(backends: Mapping[str, Backend | str], name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when backend `name` serves this device and dtype, otherwise the reason why not."""
    if name == "reference":
        return None
    backend = backends[name]
    return backend if isinstance(backend, str) else backend.supports(device, dtype)


def has_kernel(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a call would be served by a kernel: for whoever has a better way without one than the reference."""
    from mra_kernels.ops import OPS

    names = preference() or AUTOMATIC
    first = next((name for name in names if why_not(OPS[op].backends, name, device, dtype) is None), "reference")
    return first != "reference"


@dataclass(frozen=True)
class Choice:
    """Who serves one op on one device and dtype: the automatic choice, and each other backend's reason."""

    op: str
    chosen: str
    reasons: dict[str, str]
    measured: bool


def backend_report(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[Choice]:
    """For every op, the backend chosen automatically for `device` and `dtype`, and why others cannot serve."""
    from mra_kernels.ops import OPS

    device = torch.device(device)
    report = []
    for op in OPS.values():
        reasons = {name: why_not(op.backends, name, device, dtype) for name in AUTOMATIC}
        chosen = next(name for name in AUTOMATIC if reasons[name] is None)
        refused = {name: reason for name, reason in reasons.items() if reason is not None}
        report.append(Choice(op.name, chosen, refused, measured=device.type == "cpu" or dtype == torch.bfloat16))
    return report
