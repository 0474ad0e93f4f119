"""The inputs and expected results of the golden checkpoints, made by the authors' code."""

import json
from dataclasses import dataclass
from functools import cached_property

import torch
from checkpoints import DATA
from safetensors.torch import load_file
from torch import Tensor

# What the authors' token ids hold in place of a picture.
PICTURE = -200
IGNORED = -100

# Tokens in front of what the golden greedy decoding continues.
PROMPT_LENGTH = 7


def golden_pixels(side: int) -> Tensor:
    """The golden picture batch, [2, 3, side, side]: a formula evaluated in float64 and rounded to float32."""
    b, c, y, x = torch.meshgrid(
        *(torch.arange(size, dtype=torch.float64) for size in (2, 3, side, side)), indexing="ij"
    )
    waves = torch.sin((c + 1) * 0.011 * x + (b + 1) * 0.017 * y)
    return (waves + 0.5 * torch.cos(0.23 * x * (b + 1) - 0.19 * y * (c + 1))).float()


@dataclass(frozen=True)
class Golden:
    """What the authors' code made of one checkpoint."""

    name: str

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """Inputs and results by name."""
        return load_file(DATA / self.name / "expected.safetensors")

    @cached_property
    def grad_norms(self) -> dict[str, float]:
        """The norm of each parameter's gradient of the loss, by the authors' key."""
        return json.loads((DATA / self.name / "grad_norms.json").read_text())

    def expand(self, name: str, fill: int, tokens: int) -> Tensor:
        """The rows of `expected[name]` with `tokens` times `fill` in place of the picture: [2, L]."""
        rows = []
        for ids, row in zip(self.expected["input_ids"], self.expected[name], strict=True):
            at = int((ids == PICTURE).nonzero())
            rows.append(torch.cat([row[:at], row.new_full((tokens,), fill), row[at + 1 :]]))
        return torch.stack(rows)
