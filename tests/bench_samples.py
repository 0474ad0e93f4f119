"""Made-up results for the tests of the report: plausible, about 150 on a machine, the same at every call."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from bench.shapes import LARGE, XXLARGE
from bench.step import Result, Times

COMMIT, TREE = "c0ffee" * 6 + "c0ff", "beef" * 10
DATE = "2026-11-25T10:20:30+00:00"
CPU_NAME = "AMD EPYC 9R45"

# By op: the shapes, the gain of our kernel over eager forward and backward, and what the dispatcher chooses.
_OPS: dict[str, tuple[Sequence[str], float, float, str]] = {
    "depthwise_conv_norm": ([f"{side}x{side}x{channels}" for side, channels in LARGE.stages()], 2.4, 1.8, "native"),
    "linear_gelu": ([f"{side}x{side}x{channels}" for side, channels in LARGE.stages()], 1.12, 1.08, "native"),
    "norm_patchify": ([f"{side}x{side}x{channels}" for side, channels in LARGE.stages()[:-1]], 3.1, 2.0, "native"),
    "gated_resample_add": (["32x32x1024", "24x24x1024"], 4.6, 3.3, "native"),
    "adapter_gate": (["1024"], 0.9, 0.85, "reference"),
    "patch_conv_norm": (["1024x1024x3 to 256x256x192"], 0.0, 0.0, "reference"),
}
_PARTS = {"stem": 52, "stage 1": 470, "stage 2": 440, "stage 3": 3290, "stage 4": 350, "ViT": 2850, "adapters": 110}
_TOKENS = {"LLaVA-1.5": {336: 576, 448: 1024, 672: 2304, 1022: 5329}, "LLaVA-HR": {384: 144, 768: 576, 1024: 1024}}


def times(median: float, spread: float = 0.03) -> Times:
    """median: microseconds; `spread` is how far the percentiles are from it."""
    low, high = round(median * (1 - spread), 3), round(median * (1 + spread), 3)
    return Times(round(median, 3), low, high, [low, round(median, 3), high])


def kernel(
    op: str, variant: str, median: float | None, *, shape: str = "64x64x768", cold: float | None = None, **more: Any
) -> dict[str, Any]:
    """A result of the suite `kernels`, float32 forward at B=1 unless said; `more` are labels, or fields of a result."""
    labels = {"suite": "kernels", "op": op, "shape": shape, "model": "ConvNeXt-L", "place": "stage 3", "batch": 1}
    labels |= {"dtype": "float32", "direction": "forward", "compiled": False}
    names = ("model", "place", "batch", "dtype", "direction", "compiled")
    labels |= {name: more.pop(name) for name in names if name in more}
    found = {} if median is None else {"warm": times(median)} | ({} if cold is None else {"cold": times(cold)})
    case = f"{op} {shape}, {labels['model']} {labels['place']}, B={labels['batch']} {labels['dtype']}"
    case += f" {labels['direction']}{', compiled' if labels['compiled'] else ''}"
    step = f"kernels/{op}/b{labels['batch']}/{labels['dtype']}{'/compiled' if labels['compiled'] else ''}"
    defaults: dict[str, Any] = {"errors": {"y": 2.1e-7}, "bytes": 25_165_824, "flops": 308_281_344, "memory": 12 << 20}
    defaults |= {"kernels": [{"name": "aten::convolution", "calls": 1, "us": median or 0.0}], "launches": 1}
    return {"step": step, **asdict(Result(case, variant, labels, found, **(defaults | more)))}


def kernels(random: Random, models: Sequence[str] = ("ConvNeXt-L",), own: str = "native") -> list[dict[str, Any]]:
    """Every op of the samples, with routes of the library, torch.compile, and a kernel that is not chosen."""
    found = []
    for model in models:
        wide = model != "ConvNeXt-L"
        for op, (shapes, forward, backward, auto) in _OPS.items():
            for index, shape in enumerate(shapes):
                if wide and op == "depthwise_conv_norm":
                    side, channels = XXLARGE.stages()[index]
                    shape = f"{side}x{side}x{channels}"
                for dtype in ("float32", "bfloat16"):
                    for direction, gain in (("forward", forward), ("backward", backward)):
                        place = {"model": model, "place": f"stage {index + 1}", "dtype": dtype, "direction": direction}
                        found += _case(random, op, shape, gain, own if auto == "native" else auto, own, place)
    return found


def _case(
    random: Random, op: str, shape: str, gain: float, auto: str, own: str, place: dict[str, Any]
) -> list[dict[str, Any]]:
    sizes = [int(size) for size in shape.split(" ")[-1].split("x")]
    elements = prod(sizes)
    bytes_ = 2 * elements * (4 if place["dtype"] == "float32" else 2)
    products = {"depthwise_conv_norm": 98, "linear_gelu": 8 * sizes[-1], "patch_conv_norm": 96}.get(op)
    work: dict[str, Any] = {"bytes": bytes_, "flops": None if products is None else products * elements}
    eager = bytes_ / 2e4 / random.uniform(0.3, 0.6) + (work["flops"] or 0) / 1.2e5
    eager *= 2.2 if place["direction"] == "backward" else 1
    facts = {"auto": auto, "refused": {} if auto == own else {own: "slower than eager on this device"}}
    of = place | work | {"shape": shape}
    found = [kernel(op, "eager", eager, cold=eager * 1.08, facts=facts, **of)]
    if gain:
        ours = eager / (gain * random.uniform(0.75, 1.35))
        found.append(kernel(op, own, ours, cold=ours * 1.25, memory=6 << 20, **of))
    if op == "depthwise_conv_norm":
        nchw = eager * random.uniform(1.05, 1.9)
        found.append(kernel(op, "library: NCHW with copies", nchw, cold=nchw * 1.1, **of))
    if op == "depthwise_conv_norm" and place["direction"] == "forward":
        of |= {"compiled": True}
        found.append(kernel(op, "eager", eager * 1.01, facts=facts, **of))
        found.append(kernel(op, own, eager / gain, **of))
        found.append(kernel(op, "torch.compile", eager * 0.93, **of))
    return found


def vision(scale: float = 1.0) -> list[dict[str, Any]]:
    """The tower's forward, by torch.compile too, and its training step; `scale` is against a CPU's times."""
    labels = {"suite": "vision", "model": "tower", "direction": "forward", "batch": 1, "side": 1024}
    labels |= {"dtype": "bfloat16", "checkpointing": False, "compiled": False}
    found = []
    for variant, factor, launches in (("eager", 1.0, 1480), ("fused", 0.82, 905)):
        parts = {name: 1e3 * scale * value * (factor if name != "ViT" else 0.99) for name, value in _PARTS.items()}
        parts["merge"] = 1e3 * scale * 17
        whole = times(sum(parts.values()) * 1.01)
        fields: dict[str, Any] = {"errors": {"features": 1.1e-2}, "memory": 512 << 20, "launches": launches}
        found.append(_result("vision/forward/b1", "tower 1024x1024 B=1 forward", variant, labels, whole, parts, fields))
    compiled = labels | {"compiled": True, "mode": "default"}
    case = "tower 1024x1024 B=1 forward, torch.compile mode default"
    for variant, seconds in (("eager", 7.6), ("fused", 6.3), ("torch.compile", 6.1)):
        fields = {"errors": {"features": 1.1e-2}, "memory": 600 << 20, "launches": 700}
        time = times(1e6 * scale * seconds)
        found.append(_result("vision/compiled/b1", case, variant, compiled, time, {}, fields))
    traced = {"suite": "vision", "model": "tower", "direction": "launches", "batch": 1, "dtype": "bfloat16"}
    for variant, launches in (("eager", 681), ("fused", 546), ("optimized", 439)):
        fields = {"launches": launches, "facts": {"counted": "traced", "operators": {"aten::addmm": launches}}}
        case = "tower launches B=1, traced"
        found.append({"step": "vision/launches/b1", **asdict(Result(case, variant, traced, **fields))})
    for checkpointing in (False, True):
        for variant, factor in (("eager", 1.0), ("fused", 0.84)):
            parts = {
                "forward": 7.6e6 * scale * factor,
                "backward": (15e6 + 7e6 * checkpointing) * scale * factor,
            }
            fields = {"errors": {"grad of high.stem.weight": 2e-2}, "memory": (9 - 5 * checkpointing) << 30}
            of = labels | {"direction": "training", "checkpointing": checkpointing}
            case = f"tower training step, {'with' if checkpointing else 'without'} checkpointing"
            found.append(_result("vision/training", case, variant, of, times(sum(parts.values())), parts, fields))
    return found


def answers(language: str = "small", scale: float = 1.0) -> list[dict[str, Any]]:
    """The paper's table; LLaVA-HR at 1536 is missing."""
    found = []
    for model, sides in _TOKENS.items():
        for side, tokens in sides.items():
            labels = {"suite": "e2e", "model": model, "language": language, "side": side, "dtype": "bfloat16"}
            for variant in ("eager", "fused") if model == "LLaVA-HR" else ("eager",):
                tower = (7.4e6 * (side / 1024) ** 2 if model == "LLaVA-HR" else 2.9e3 * tokens) * scale
                tower *= 0.83 if variant == "fused" else 1
                parts = {"tower": tower, "projector": 30 * tokens * scale, "language model": 900 * tokens * scale}
                first = sum(parts.values()) * 1.01
                waits = {"first token": first, "10 tokens": first + 9 * 4e4, "64 tokens": first + 63 * 4e4}
                facts: dict[str, Any] = {"visual tokens": tokens, "prompt tokens": tokens + 64}
                facts |= {"peak bytes": 3 << 30, "weights bytes": 2 << 30}
                if tokens > 4096:
                    facts["positions"] = "beyond the 4096 that it was trained with"
                case = f"answer of {model} {language} at {side}, bfloat16"
                kept = Result(case, variant, labels, {n: times(t) for n, t in waits.items()}, parts, facts=facts)
                found.append({"step": f"e2e/{model.lower()}-{language}/{side}", **asdict(kept)})
    return found


def training(scale: float = 1.0) -> list[dict[str, Any]]:
    """Steps of stage 2, eager and fused; stage 1's fused is wrong."""
    found = []
    for stage, side in ((1, 384), (2, 1024)):
        for variant, factor in (("eager", 1.0), ("fused", 0.85)):
            labels = {"suite": "train", "stage": stage, "batch": 1, "checkpointing": False, "language": "small"}
            labels |= {"side": side, "dtype": "bfloat16"}
            wrong = stage == 1 and variant == "fused"
            forward, backward = 9e6 * scale * factor, 21e6 * scale * factor
            facts = {"peak bytes": 11 << 30, "hours are": "an estimate: 665000 samples on 8 such devices at this rate"}
            if not wrong:
                facts["hours estimate"] = round(665_000 * (forward + backward) / 8 / 3.6e9, 1)
            kept = Result(
                f"training step of stage {stage}, LLaVA-HR small at {side}",
                variant,
                labels,
                {} if wrong else {"step": times(forward + backward)},
                {} if wrong else {"forward": forward, "backward": backward},
                failure="wrong: the loss differs by 3.00e-01, more than 5e-02" if wrong else None,
                facts=facts,
            )
            found.append({"step": f"train/stage{stage}", **asdict(kept)})
    return found


def ceilings(bandwidth: float = 2.1e10, product: float = 7.4e11) -> list[dict[str, Any]]:
    """A copy and products; bytes and operations a second."""
    found = []
    for what, dtype, rate in (
        ("copy", "bfloat16", bandwidth),
        ("product", "bfloat16", product),
        ("product", "float32", product / 4),
    ):
        labels = {"suite": "ceilings", "what": what, "dtype": dtype}
        amounts = {"bytes": 1 << 30} if what == "copy" else {"bytes": 1 << 25, "flops": 1 << 37}
        median = 1e6 * amounts["bytes" if what == "copy" else "flops"] / rate
        kept = Result(f"{what} {dtype}", "library", labels, {"warm": times(median)}, **amounts)
        found.append({"step": "ceilings", **asdict(kept)})
    return found


def profiles() -> list[dict[str, Any]]:
    """The slowest operators of the tower, eager and fused."""
    lists = {
        "eager": [("aten::addmm", 96, 4.1e6), ("aten::gelu", 39, 1.2e6), ("aten::mkldnn_convolution", 44, 7.5e5)],
        "fused": [("aten::addmm", 60, 4.0e6), ("mra::linear_gelu", 36, 6.1e5), ("mra::depthwise_conv_norm", 36, 3e5)],
    }
    found = []
    for variant, of in lists.items():
        labels = {"suite": "profile", "what": "vision", "language": "small", "side": 1024, "dtype": "bfloat16"}
        names = [{"name": name, "calls": calls, "us": us} for name, calls, us in of]
        facts = {"trace": "trace-vision.json.gz"}
        kept = Result("profile of vision", variant, labels, kernels=names, launches=900, facts=facts)
        found.append({"step": "profile/vision", **asdict(kept)})
    return found


def refused() -> list[dict[str, Any]]:
    """A kernel that is wrong, beside an eager that is right."""
    failure = "wrong: y has error 5.00e-01, the baseline 2.10e-07"
    return [
        kernel("depthwise_conv_norm", "eager", 150.0, shape="17x31x24", facts={"auto": "native", "refused": {}}),
        kernel("depthwise_conv_norm", "native", None, shape="17x31x24", errors={"y": 0.5}, failure=failure),
    ]


def file(results: list[dict[str, Any]], device: str = CPU_NAME, gpu: bool = False, date: str = DATE) -> dict[str, Any]:
    """What a results.json holds."""
    steps: dict[str, dict[str, Any]] = {
        result["step"]: {"state": "done", "date": date, "seconds": 41.5, "others": 0.02} for result in results
    }
    steps["e2e/llava-hr-small/1536"] = {"state": "not measured", "date": date, "why": "12 s were left, it takes 200 s"}
    steps["train/stage2/checkpointing"] = {"state": "failed", "date": date, "seconds": 3.0, "why": "Traceback\nplanted"}
    return {
        "schema": 2,
        "commit": COMMIT,
        "tree": TREE,
        "dirty": False,
        "machine": machine(device, gpu),
        "runs": [{"date": date, "command": "python -m bench all --minutes 60"}],
        "steps": steps,
        "results": results,
    }


def machine(device: str, gpu: bool) -> dict[str, Any]:
    """A machine as results describe it."""
    card = {"name": device, "capability": "9.0", "memory_bytes": 150 << 30, "driver": "580.12", "multiprocessors": 132}
    card |= {"l2_bytes": 60 << 20, "state_at_start": {"clocks.sm": "1980"}}
    cpu = {"name": CPU_NAME, "cores": 2, "threads": 2, "instruction_sets": ["AVX2", "AVX-512", "AMX"]}
    return {
        "device": device,
        "type": "cuda" if gpu else "cpu",
        "cpu": cpu | {"last_level_cache_bytes": 32 << 20},
        "gpu": card if gpu else None,
        "memory_bytes": 16 << 30,
        "system": "Linux-6.1-x86_64",
        "release": "Debian GNU/Linux 12 (bookworm)",
        "allocator": {"name": "glibc 2.36", "keeps_freed_memory": not gpu},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "triton": None},
    }


def cpu() -> dict[str, Any]:
    """A CPU on which everything was measured."""
    found = [*ceilings(), *kernels(Random(0)), *refused(), *vision(), *answers(), *training(), *profiles()]
    return file(found)


def gpu() -> dict[str, Any]:
    """A GPU on which everything was measured, at two batches and for both towers."""
    random, towers = Random(1), ("ConvNeXt-L", "ConvNeXt-XXL")
    found = [*ceilings(4.3e12, 7.8e14), *_faster(kernels(random, towers, own="triton"), 1), *vision(1e-3)]
    found += [*_faster(kernels(random, towers, own="triton"), 8), *answers("7B", 1e-2), *training(1e-2), *profiles()]
    return file(found, "NVIDIA H200", gpu=True, date="2026-11-26T08:00:00+00:00")


def _faster(results: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """The same on a device a thousand times as fast, with a batch."""
    for result in results:
        result["labels"]["batch"] = batch
        result["case"] = result["case"].replace("B=1 ", f"B={batch} ")
        result["step"] = result["step"].replace("/b1/", f"/b{batch}/")
        for of in result["times"].values():
            scaled = [value * batch / 1000 for value in of["samples"]]
            of |= {"samples": scaled, "median": scaled[1], "p20": scaled[0], "p80": scaled[2]}
    return results


def save(root: Path, data: dict[str, Any], folder: str = "amd-epyc-9r45-2-cores", name: str | None = None) -> Path:
    """Writes a results.json where the report looks for it; returns its path."""
    path = root / folder / (name or f"{data['runs'][-1]['date'][:10]}-{data['commit'][:12]}") / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def _result(
    step: str,
    case: str,
    variant: str,
    labels: dict[str, Any],
    time: Times,
    parts: dict[str, float],
    fields: dict[str, Any],
) -> dict[str, Any]:
    return {"step": step, **asdict(Result(case, variant, labels, {"call": time}, parts, **fields))}
