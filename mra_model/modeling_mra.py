"""The dual-resolution vision tower: CLIP ViT and ConvNeXt, joined by MR-Adapters (LLaVA-HR, arXiv 2403.03003).

It is the `vision_config` of a stock `LlavaForConditionalGeneration`. Maps are channels last, [B, H, W, C], which is the
memory of tokens [B, H * W, C], so that nothing is transposed between the two.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, PreTrainedModel
from transformers import initialization as init
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.utils import can_return_tuple

from mra_kernels.modules import ConvNeXt, ConvNeXtBlock, Downsample, Merge, MRAdapter, Stem
from mra_model import attention
from mra_model.configuration_mra import QUARTERS, MraVisionConfig


class MraConvNeXtBlock(GradientCheckpointingLayer, ConvNeXtBlock):
    """A ConvNeXt block that `gradient_checkpointing_enable` recomputes in backward. [B, H, W, C] -> the same."""


class MraConvNeXt(ConvNeXt):
    """The high-resolution pathway. [B, 3, S, S] -> [B, S // 32, S // 32, C_h]."""

    block_class = MraConvNeXtBlock


class MraAdapterLayer(GradientCheckpointingLayer, MRAdapter):
    """An MR-Adapter that `gradient_checkpointing_enable` recomputes in backward. -> [B, H, W, C_l]."""


class MraEncoderLayer(CLIPEncoderLayer):
    """CLIP's encoder layer, which can be told another way to compute the same; its own hooks run either way."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        route: Callable[[Tensor], Tensor] | None = None,
        **kwargs: object,
    ) -> Tensor:
        """hidden_states: [B, L, C] -> the same, by `route` where there is one."""
        return super().forward(hidden_states, attention_mask, **kwargs) if route is None else route(hidden_states)


class MraPatchEmbedding(nn.Module):
    """CLIP's patch embedding, a convolution whose kernel is its stride, as one matrix product into token order."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_channels, patch, patch))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, R, R] of any dtype -> tokens [B, (R // patch) ** 2, C] in the weight's."""
        batch, channels, side, _ = pixels.shape
        patch = self.weight.shape[-1]
        grid = side // patch
        rows = pixels.view(batch, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        # One copy converts and permutes.
        rows = rows.to(self.weight.dtype, memory_format=torch.contiguous_format)
        return F.linear(rows.reshape(batch, grid * grid, channels * patch * patch), self.weight.flatten(1))


class MraLowResolution(nn.Module):
    """The low-resolution pathway: CLIP ViT without its class token, which is dropped before `pre_layernorm`."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        grid = config.image_size // config.patch_size
        self.patch_size = config.patch_size
        self.patch_embedding = MraPatchEmbedding(config)
        self.position_embedding = nn.Parameter(torch.empty(grid * grid, config.hidden_size))
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(MraEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def embed(self, pixel_values: Tensor, grid: int, positions: Tensor | None = None) -> Tensor:
        """pixel_values: [B, 3, S, S] -> what the first layer reads: [B, grid * grid, C_l].

        `positions`, [grid * grid, C_l], is what `positions_at(grid)` gave, where it was kept.
        """
        pixels = _resize_picture(pixel_values, grid * self.patch_size)
        positions = self.positions_at(grid) if positions is None else positions
        return self.pre_layernorm(self.patch_embedding(pixels) + positions)

    def positions_at(self, grid: int) -> Tensor:
        """The position embedding of a grid: [grid * grid, C_l]."""
        return _resize_positions(self.position_embedding, grid)


class MraVisionPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the tower: how to initialise, load, place and checkpoint it."""

    config: MraVisionConfig
    config_class = MraVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The pathways exchange maps at four points, so the tower stays on one device.
    _no_split_modules: ClassVar[list[str]] = ["MraVisionModel"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh values for one module. transformers guards `torch.nn.init` here, so that loaded weights stay."""
        super()._init_weights(module)
        if isinstance(module, Stem | ConvNeXtBlock | Downsample | MRAdapter | Merge):
            module.reset_parameters()
        elif isinstance(module, MraPatchEmbedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, MraLowResolution):
            init.normal_(module.position_embedding, std=self.config.initializer_range)


class MraVisionModel(MraVisionPreTrainedModel):
    """The dual-resolution tower: one square picture in, the tokens for the projector out.

    Attributes:
        route: another way to compute the same, which `mra_model.optimize` sets: pixels and the side of the grid ->
            tokens, or None where it leaves the call to the plain forward.
    """

    route: Callable[[Tensor, int], Tensor | None] | None = None

    def __init__(self, config: MraVisionConfig) -> None:
        super().__init__(config)
        low, high = config.low_config, config.high_config
        # transformers sets the attention on the tower's config only, and CLIP's layers read it from their own.
        fast = config._attn_implementation == "sdpa"
        low._attn_implementation = attention.NAME if fast else config._attn_implementation
        self.low = MraLowResolution(low)
        self.high = MraConvNeXt(
            high.hidden_sizes,
            high.depths,
            eps=high.layer_norm_eps,
            layer_scale_init=high.layer_scale_init_value,
            in_channels=high.num_channels,
            patch_size=high.patch_size,
        )
        width = high.hidden_sizes[-1]
        count = QUARTERS - 1 if config.adapters else 0
        self.adapters = nn.ModuleList(MraAdapterLayer(low.hidden_size, width) for _ in range(count))
        self.merge = Merge(low.hidden_size, width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding, the first module to read the picture at low resolution."""
        return self.low.patch_embedding

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutputWithPooling:
        """Looks at a picture twice (arXiv 2403.03003, section 3).

        Args:
            pixel_values: [B, 3, S, S], normalized with CLIP's mean and standard deviation, or uint8 from 0 to 255,
                which is normalized here; S is any valid side, not only `config.image_size`.
            kwargs: what transformers passes to vision towers (`output_hidden_states`, ...); they change nothing here.

        Returns:
            `last_hidden_state`: [B, L, C_l], L = `config.grid_at(S)` ** 2, and `hidden_states`: a tuple of only that.

        Raises:
            ValueError: pixels that are not [B, 3, S, S], or an invalid side; names the nearest valid ones.
            TypeError: pixels that are neither floating point nor uint8.
        """
        grid = self._check_pixels(pixel_values)
        # Tracing wants one graph of the plain forward; torch.compile finds its own fusions.
        tokens = None if self.route is None or torch.compiler.is_compiling() else self.route(pixel_values, grid)
        if tokens is None:
            tokens = self._look(self.normalize(pixel_values), grid)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))

    def _look(self, pixels: Tensor, grid: int) -> Tensor:
        """pixels: [B, 3, S, S], normalized -> [B, grid * grid, C_l]."""
        high = self.high(pixels.to(self.low.position_embedding.dtype))
        tokens = self.low.embed(pixels, grid)
        quarter = len(self.low.layers) // QUARTERS
        for index, layer in enumerate(self.low.layers, start=1):
            tokens = layer(tokens, None)
            if index % quarter == 0 and index // quarter <= len(self.adapters):
                adapter = self.adapters[index // quarter - 1]
                tokens = adapter(tokens.unflatten(1, (grid, grid)), high).flatten(1, 2)
        return self.merge(tokens.unflatten(1, (grid, grid)), high).flatten(1, 2)

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """uint8 pixels [B, 3, S, S] in float32 with CLIP's mean and standard deviation; others as they are."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        pixels = pixel_values.to(torch.promote_types(self.low.position_embedding.dtype, torch.float32)) / 255
        # Numbers, since a tensor of them would be a copy from the host, which no CUDA graph may hold.
        channels = zip(pixels.unbind(1), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)

    def _check_pixels(self, pixel_values: Tensor | None) -> int:
        """The side of the ViT's grid for these pixels."""
        if pixel_values is None:
            raise ValueError("pixel_values is None; for text alone, leave the argument out")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.high_config.num_channels:
            raise ValueError(f"pixel_values must be [B, 3, S, S], but have shape {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point() and pixel_values.dtype != torch.uint8:
            raise TypeError(
                f"pixel_values are {pixel_values.dtype}, but must be normalized floating point, or uint8 from 0 to 255"
            )
        height, width = pixel_values.shape[2:]
        if height != width:
            valid = " or ".join(str(side) for side in self.config.nearest_sides(max(height, width)))
            raise ValueError(
                f"pixel_values of {height} x {width} are not square; pad and resize the picture to a side of {valid}"
            )
        self.config.check_side(height)
        return self.config.grid_at(height)


def _resize_picture(pixels: Tensor, side: int) -> Tensor:
    """pixels: [B, 3, S, S] -> [B, 3, side, side], bilinear with aligned corners, in float32 at least."""
    wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    if pixels.shape[-1] == side:
        return wide
    return F.interpolate(wide, size=(side, side), mode="bilinear", align_corners=True)


def _resize_positions(positions: Tensor, grid: int) -> Tensor:
    """positions: [N * N, C] -> [grid * grid, C], bicubic with antialias in float32 where the grids differ."""
    count, channels = positions.shape
    if count == grid * grid:
        return positions
    stored = round(count**0.5)
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    maps = wide.view(1, stored, stored, channels).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", align_corners=False, antialias=True)
    return maps.permute(0, 2, 3, 1).reshape(grid * grid, channels).to(positions.dtype)
