"""The shapes inside LLaVA-HR's towers: ConvNeXt-L or -XXL and CLIP ViT-L/14, a picture of 1024 x 1024 unless said."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tower:
    """Sizes that everything else follows from.

    Args:
        name: of the ConvNeXt.
        channels, depths: of its stages.
        eps: of its LayerNorms.
        width, layers, heads: of the ViT; its MLP is four times as wide.
        side: of the picture, in pixels.
        language: width of the language model, which the projector writes.
    """

    name: str = "ConvNeXt-L"
    channels: tuple[int, int, int, int] = (192, 384, 768, 1536)
    depths: tuple[int, int, int, int] = (3, 3, 27, 3)
    eps: float = 1e-6
    width: int = 1024
    layers: int = 24
    heads: int = 16
    side: int = 1024
    language: int = 4096

    @property
    def grid(self) -> int:
        """Side of the ViT's grid: the last ConvNeXt map's, and at least the 24 that CLIP was trained with."""
        return max(self.side // 32, 24)

    def stages(self) -> list[tuple[int, int]]:
        """Side and channels of each stage's map."""
        return [(self.side // (4 << i), channels) for i, channels in enumerate(self.channels)]

    def modes(self) -> dict[str, tuple[int, int]]:
        """How an MR-Adapter brings one grid to the other: sides of the low and of the high grid.

        The same grid at this tower's side; interpolated, for a picture of 384; pooled, for a picture of 1536 beside a
        ViT of 336.
        """
        return {"same grid": (self.grid, self.grid), "bilinear": (24, 12), "pooled": (24, 48)}


VIT = "ViT-L"
LARGE = Tower()
XXLARGE = Tower("ConvNeXt-XXL", (384, 768, 1536, 3072), (3, 4, 30, 3), 1e-5, language=5120)
TINY = Tower("tiny", (8, 8, 16, 16), (1, 1, 1, 1), width=32, layers=4, heads=2, side=64, language=32)
TINY_WIDE = Tower("tiny, wide", (16, 16, 24, 24), (1, 1, 1, 1), 1e-5, width=32, layers=4, heads=2, side=64, language=32)


@dataclass(frozen=True)
class Gemm:
    """`calls` products of [rows, inputs] by [outputs, inputs]^T in one forward of the tower."""

    name: str
    calls: int
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """Of one call."""
        return 2 * self.rows * self.inputs * self.outputs


def gemms(tower: Tower, batch: int) -> list[Gemm]:
    """Every matrix product of one forward of tower and projector, but the gate's, which has one row a picture."""
    found = []
    previous = 0
    for index, ((side, channels), depth) in enumerate(zip(tower.stages(), tower.depths, strict=True)):
        rows = batch * side * side
        if index == 0:
            found.append(Gemm("stem", 1, rows, 48, channels))
        else:
            found.append(Gemm(f"downsample {index + 1}", 1, rows, 4 * previous, channels))
        found.append(Gemm(f"stage {index + 1} up", depth, rows, channels, 4 * channels))
        found.append(Gemm(f"stage {index + 1} down", depth, rows, 4 * channels, channels))
        previous = channels
    width, rows = tower.width, batch * tower.grid**2
    high_rows = batch * (tower.side // 32) ** 2
    return [
        *found,
        Gemm("ViT patch embedding", 1, rows, 3 * 14 * 14, width),
        Gemm("ViT q, k, v, out", 4 * tower.layers, rows, width, width),
        Gemm("ViT up", tower.layers, rows, width, 4 * width),
        Gemm("ViT down", tower.layers, rows, 4 * width, width),
        Gemm("adapter high 1", 3, high_rows, previous, previous),
        Gemm("adapter high 2", 3, high_rows, previous, width),
        Gemm("adapter low", 3, rows, width, width),
        Gemm("merge low", 1, rows, width, width),
        Gemm("merge high", 1, high_rows, previous, width),
        Gemm("projector 1", 1, rows, width, tower.language),
        Gemm("projector 2", 1, rows, tower.language, tower.language),
    ]


def fused_gemms(tower: Tower, batch: int) -> list[Gemm]:
    """Products that fusion would do instead of several of `gemms`; no part of their sum."""
    width, rows = tower.width, batch * tower.grid**2
    return [
        Gemm("ViT qkv as one", tower.layers, rows, width, 3 * width),
        Gemm("adapter projections as one", 3, rows, width + tower.channels[-1], width),
    ]
