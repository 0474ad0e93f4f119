"""The authors' parameter names and ours, with the changes of layout: one table, read in both directions.

The authors call the low-resolution pathway fast and the high-resolution one slow.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TOWER = "model.vision_tower."
LOW = TOWER + "fast_vision_tower.vision_tower.vision_model."
HIGH = TOWER + "slow_vision_tower.vision_tower."
ADAPTERS = TOWER + "align_stages_latent."
MERGE = TOWER + "align_stages."
POSITIONS = LOW + "embeddings.position_embedding.weight"
CLASS_TOKEN = LOW + "embeddings.class_embedding"
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# The two matrices with a row for each token.
VOCABULARY = (EMBEDDING, LM_HEAD)


@dataclass(frozen=True)
class Layout:
    """How a tensor's layout changes, from the authors' to ours and back."""

    to_ours: Callable[[Tensor], Tensor]
    to_authors: Callable[[Tensor], Tensor]


def _without_class_row(x: Tensor) -> Tensor:
    """[1 + L, C] -> [L, C]; the class token is dropped before the first layer, so its row has no effect."""
    return x[1:]


def _with_class_row(x: Tensor) -> Tensor:
    """[L, C] -> [1 + L, C], the class token's row zero."""
    return torch.cat([torch.zeros_like(x[:1]), x])


SAME = Layout(lambda x: x, lambda x: x)
# A 1x1 convolution [N, K, 1, 1] is a linear layer [N, K].
ONE_BY_ONE = Layout(lambda x: x.flatten(1), lambda x: x[:, :, None, None])
# A 2x2 convolution [N, C, dy, dx] in the order of a channels-last patch: [N, dy, dx, C].
PATCH = Layout(lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2))
CLASS_ROW = Layout(_without_class_row, _with_class_row)

PLACEHOLDERS = {"{i}": r"(?P<i>\d+)", "{j}": r"(?P<j>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Rule:
    """One row of the table. `{i}` and `{j}` stand for numbers, `{p}` for weight or bias, `{rest}` for anything."""

    authors: str
    ours: str
    layout: Layout = SAME

    @cached_property
    def authors_pattern(self) -> re.Pattern[str]:
        """Matches the authors' keys."""
        return _pattern(self.authors)

    @cached_property
    def our_pattern(self) -> re.Pattern[str]:
        """Matches our keys."""
        return _pattern(self.ours)


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for placeholder, pattern in PLACEHOLDERS.items():
        text = text.replace(placeholder, pattern)
    return re.compile(text)


_STAGE = HIGH + "stages.{i}."
_OUR_STAGE = TOWER + "high.stages.{i}."
_BLOCK = _STAGE + "blocks.{j}."
_OUR_BLOCK = _OUR_STAGE + "blocks.{j}."
_ADAPTER = ADAPTERS + "{i}."
_OUR_ADAPTER = TOWER + "adapters.{i}."

RULES = (
    Rule(LOW + "embeddings.patch_embedding.weight", TOWER + "low.patch_embedding.weight"),
    Rule(POSITIONS, TOWER + "low.position_embedding", CLASS_ROW),
    Rule(LOW + "pre_layrnorm.{p}", TOWER + "low.pre_layernorm.{p}"),
    Rule(LOW + "encoder.layers.{i}.{rest}", TOWER + "low.layers.{i}.{rest}"),
    Rule(HIGH + "stem.0.{p}", TOWER + "high.stem.{p}"),
    Rule(HIGH + "stem.1.{p}", TOWER + "high.stem.norm_{p}"),
    Rule(_STAGE + "downsample.0.{p}", _OUR_STAGE + "downsample.norm_{p}"),
    Rule(_STAGE + "downsample.1.weight", _OUR_STAGE + "downsample.weight", PATCH),
    Rule(_STAGE + "downsample.1.bias", _OUR_STAGE + "downsample.bias"),
    Rule(_BLOCK + "conv_dw.{p}", _OUR_BLOCK + "conv_{p}"),
    Rule(_BLOCK + "norm.{p}", _OUR_BLOCK + "norm_{p}"),
    Rule(_BLOCK + "mlp.fc1.{p}", _OUR_BLOCK + "up_{p}"),
    Rule(_BLOCK + "mlp.fc2.{p}", _OUR_BLOCK + "down_{p}"),
    Rule(_BLOCK + "weight", _OUR_BLOCK + "layer_scale"),
    # timm's own name of the layer scale, in files that transformers never loaded and saved.
    Rule(_BLOCK + "gamma", _OUR_BLOCK + "layer_scale"),
    Rule(_ADAPTER + "fast_conv.{p}", _OUR_ADAPTER + "low_conv_{p}"),
    Rule(_ADAPTER + "fast_proj.weight", _OUR_ADAPTER + "low_proj_weight", ONE_BY_ONE),
    Rule(_ADAPTER + "fast_proj.bias", _OUR_ADAPTER + "low_proj_bias"),
    Rule(_ADAPTER + "slow_conv.weight", _OUR_ADAPTER + "high_conv_weight", ONE_BY_ONE),
    Rule(_ADAPTER + "slow_conv.bias", _OUR_ADAPTER + "high_conv_bias"),
    Rule(_ADAPTER + "slow_proj.weight", _OUR_ADAPTER + "high_proj_weight", ONE_BY_ONE),
    Rule(_ADAPTER + "slow_proj.bias", _OUR_ADAPTER + "high_proj_bias"),
    Rule(_ADAPTER + "gate.0.{p}", _OUR_ADAPTER + "gate_up_{p}"),
    Rule(_ADAPTER + "gate.2.{p}", _OUR_ADAPTER + "gate_down_{p}"),
    Rule(MERGE + "0.fast_proj.{p}", TOWER + "merge.low_{p}"),
    Rule(MERGE + "0.slow_proj.{p}", TOWER + "merge.high_{p}"),
    Rule("model.mm_projector.0.{p}", "model.multi_modal_projector.linear_1.{p}"),
    Rule("model.mm_projector.2.{p}", "model.multi_modal_projector.linear_2.{p}"),
    Rule(EMBEDDING, "model.language_model.embed_tokens.weight"),
    Rule("model.norm.weight", "model.language_model.norm.weight"),
    Rule("model.layers.{i}.{rest}", "model.language_model.layers.{i}.{rest}"),
    Rule(LM_HEAD, LM_HEAD),
)

UNUSED = tuple(
    (re.compile(pattern), why)
    for pattern, why in (
        (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the config"),
        (re.escape(HIGH) + r"(head|norm_pre)\..+", "the ConvNeXt head: only the last map is used"),
        (re.escape(LOW) + r"post_layernorm\.(weight|bias)", "only the pooled class token would pass through it"),
        (re.escape(CLASS_TOKEN), "the class token is dropped before the first layer"),
        (re.escape(LOW) + r"embeddings\.position_ids", "a constant: 0, 1, 2, ..."),
    )
)

# What `save_pretrained` writes in front of a LLaVA's parts, and the name of the module itself.
_SAVED_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


@dataclass(frozen=True)
class Renamed:
    """A key in the other vocabulary, and the function that brings its tensor into the other layout."""

    key: str
    layout: Callable[[Tensor], Tensor]


def to_ours(key: str) -> Renamed | None:
    """Our name and layout of the authors' `key`; None where it is no parameter of LLaVA-HR."""
    for rule in RULES:
        match = rule.authors_pattern.fullmatch(key)
        if match:
            return Renamed(rule.ours.format(**match.groupdict()), rule.layout.to_ours)
    return None


def to_authors(key: str) -> Renamed | None:
    """The authors' name and layout of our `key`; None where it is no parameter of LLaVA-HR."""
    for rule in RULES:
        match = rule.our_pattern.fullmatch(key)
        if match:
            return Renamed(rule.authors.format(**match.groupdict()), rule.layout.to_authors)
    return None


def why_unused(key: str) -> str | None:
    """Why the authors' model holds `key` but never reads it; None where it reads it."""
    return next((why for pattern, why in UNUSED if pattern.fullmatch(key)), None)


def module_key(key: str) -> str:
    """The parameter's name inside the model, from a name that `save_pretrained` wrote."""
    for saved, module in _SAVED_PREFIXES:
        if key.startswith(saved):
            return module + key.removeprefix(saved)
    return key
