"""`apply_mra_kernels`: this package's kernels in models that others made.

`recognition.py` finds modules, `children.py` tells what a kernel may read in place of calling it, `blocks.py`,
`patch_convs.py` and `llava_hr.py` are the forwards, `fused.py` gives them to modules, `report.py` says what was done.
"""

from collections.abc import Collection

from torch import nn

from mra_kernels.dispatch import parse_preference
from mra_kernels.patching.fused import Fused, fused_class
from mra_kernels.patching.recognition import OPS, candidates, why_not
from mra_kernels.patching.report import PatchReport, Replacement


def apply_mra_kernels(
    model: nn.Module, *, backend: str | None = None, ops: Collection[str] | None = None
) -> PatchReport:
    """Makes the ConvNeXts and MR-Adapters of a model faster, in place, until `undo()` of what it returns.

    Recognised are ConvNeXt (V1, and V2 but for its GRN) of timm and transformers, DINOv3's ConvNeXt of transformers,
    the adapters, merge and ConvNeXt of LLaVA-HR's authors, and every model that contains these.

    Parameters, modules and keys stay what they are, so that checkpoints, optimizers, DDP, FSDP and `torch.compile` work
    as before; patch before sharding. Maps keep their shape [B, C, H, W] and lie channels last in memory, which
    `.view(B, -1)` does not take and `.flatten(1)` does. Copies of the model, by `deepcopy` or pickle, are patched too.

    What a kernel cannot compute exactly is left alone, op by op: the report says what and why. Whatever comes later,
    such as hooks, LoRA or another dtype, is noticed at the call. Where stochastic depth drops paths in training, and
    under autocast, a block's last sum is PyTorch's own, in the dtype that it has without this function; under autocast
    the stem, the adapters and the merge are, too.

    Args:
        model: any module.
        backend: for every call, as `use_backend` takes it; None leaves it to the caller.
        ops: the only ones to use, by name; None for all.

    Returns:
        What was replaced, what was left alone and why. A model that is patched already stays as it is.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: an unknown backend or op, or others than the model is patched with.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but must be a torch.nn.Module")
    if backend is not None and backend != "auto":
        parse_preference(backend, "backend")
    allowed = frozenset(OPS) if ops is None else frozenset((ops,) if isinstance(ops, str) else ops)
    for op in sorted(allowed):
        if op not in OPS:
            raise ValueError(f"ops has {op!r}, which no module uses; choose from {', '.join(OPS)}")
    found = list(candidates(model))
    for path, module, *_ in found:
        if isinstance(module, Fused) and (module.ops, module.backend) != (allowed, backend):
            raise ValueError(
                f"{path or 'the model'} is patched with backend={module.backend!r} and ops={sorted(module.ops)}; "
                f"call undo() of its report first, or of what apply_mra_kernels returns for these"
            )
    report = PatchReport(type(model).__name__)
    for path, module, kind, detail in found:
        used = _note(report, path, kind, why_not(module, kind, detail), allowed)
        if used:
            report._modules.append(module)
            if not isinstance(module, Fused):
                own = type(module)
                module.__class__ = fused_class(kind, own, allowed, backend, detail)  # type: ignore[arg-type]
    return report


def _note(report: PatchReport, path: str, kind: type[Fused], reasons: dict[str, str], allowed: frozenset[str]) -> bool:
    """Writes what becomes of a module into the report; whether anything does."""
    missing = [op for op in kind.uses if op not in allowed]
    stays = "" in reasons or (not kind.separable and (reasons or missing))
    used = () if stays else tuple(op for op in kind.uses if op not in reasons and op not in missing)
    if not used and missing:
        reasons[", ".join(missing)] = "not among ops"
    if reasons:
        report.left[path] = reasons
    if used:
        report.replaced[path] = Replacement(kind.kind, used)
    return bool(used)


__all__ = ["PatchReport", "Replacement", "apply_mra_kernels"]
