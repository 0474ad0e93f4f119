"""Configuration of the dual-resolution tower: two stock transformers configs and the sizes that follow from them."""

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import CLIPVisionConfig, ConvNextConfig, PreTrainedConfig

# A ConvNeXt halves its input five times: 4x in the stem, 2x in front of each of three stages.
HIGH_STRIDE = 32

# The MR-Adapters follow the first three quarters of the ViT, the merge follows the last one.
QUARTERS = 4


def clip_large() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels, the low-resolution pathway of every released LLaVA-HR."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def convnext_large() -> ConvNextConfig:
    """ConvNeXt-Large, the high-resolution pathway of LLaVA-HR."""
    return ConvNextConfig(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3], layer_norm_eps=1e-6)


def convnext_xxlarge() -> ConvNextConfig:
    """ConvNeXt-XXLarge, the high-resolution pathway of LLaVA-HR-X; its LayerNorms use eps 1e-5."""
    return ConvNextConfig(hidden_sizes=[384, 768, 1536, 3072], depths=[3, 4, 30, 3], layer_norm_eps=1e-5)


class MraVisionConfig(PreTrainedConfig):
    """Sizes of the dual-resolution tower (LLaVA-HR, arXiv 2403.03003).

    Args:
        image_size: side S of the square picture, in pixels; see `check_side` for the valid ones.
        low_resolution_size: side in pixels that the ViT sees, a multiple of its patch. None is the authors' rule,
            max(S / 32 * patch, the side CLIP was trained at). 336 at S = 1536 pools the high-resolution map to
            24 x 24 and gives 576 tokens instead of 2304; no released checkpoint was trained so.
        adapters: whether the MR-Adapters exist; checkpoints of the first training stage have none.
        low_config: of the low-resolution pathway, a `CLIPVisionConfig` or its dict; None is CLIP ViT-L/14 at 336.
        high_config: of the high-resolution pathway, a `ConvNextConfig` or its dict (`hidden_sizes`, `depths`,
            `layer_norm_eps`, `layer_scale_init_value`); None is ConvNeXt-Large.
        initializer_range: standard deviation of fresh weights.

    Raises:
        ValueError: an invalid `image_size`, `low_resolution_size` or number of layers.
    """

    model_type = "mra_vision"
    base_config_key = "vision_config"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "low_config": CLIPVisionConfig,
        "high_config": ConvNextConfig,
    }

    image_size: int = 1024
    low_resolution_size: int | None = None
    adapters: bool = True
    # Arguments may be None or a dict; from __post_init__ on they are configs.
    low_config: CLIPVisionConfig = None
    high_config: ConvNextConfig = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.low_config = _sub_config(self.low_config, CLIPVisionConfig, clip_large)
        self.high_config = _sub_config(self.high_config, ConvNextConfig, convnext_large)
        super().__post_init__(**kwargs)
        self._check()

    @property
    def hidden_size(self) -> int:
        """Channels of a visual token, which the projector reads."""
        return self.low_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the ViT."""
        return self.low_config.num_hidden_layers

    @property
    def stored_grid(self) -> int:
        """Side of the grid that the stored position embedding belongs to: 24 for CLIP ViT-L/14 at 336."""
        return self.low_config.image_size // self.low_config.patch_size

    @property
    def grid(self) -> int:
        """Side of the ViT's grid at `image_size`."""
        return self.grid_at(self.image_size)

    @property
    def low_resolution(self) -> int:
        """Side in pixels of what the ViT sees at `image_size`."""
        return self.grid * self.low_config.patch_size

    @property
    def high_grid(self) -> int:
        """Side of the last ConvNeXt map at `image_size`."""
        return self.image_size // HIGH_STRIDE

    @property
    def num_image_tokens(self) -> int:
        """Tokens of a picture of side `image_size`."""
        return self.grid**2

    @property
    def patch_size(self) -> int:
        """Pixels of the picture for each token along one side: `image_size` // `grid`."""
        return self.image_size // self.grid

    def grid_at(self, side: int) -> int:
        """Side of the ViT's grid for a picture of `side` pixels."""
        if self.low_resolution_size is not None:
            return self.low_resolution_size // self.low_config.patch_size
        return max(side // HIGH_STRIDE, self.stored_grid)

    def is_valid_side(self, side: int) -> bool:
        """Whether the two grids of a picture of `side` pixels fit each other: one divides the other."""
        if side < HIGH_STRIDE or side % HIGH_STRIDE != 0:
            return False
        high, low = side // HIGH_STRIDE, self.grid_at(side)
        return low % high == 0 or high % low == 0

    def check_side(self, side: int) -> None:
        """Raises unless a square picture of `side` pixels is valid.

        Valid are multiples of 32 from 32 times the stored grid (768) on, and those whose 32nd part divides that grid.
        With `low_resolution_size` one of the two grids must divide the other.

        Raises:
            ValueError: names the nearest valid sides.
        """
        if self.is_valid_side(side):
            return
        raise ValueError(
            f"a picture of {side} x {side} pixels does not fit this model; the nearest valid sides are "
            f"{' and '.join(str(valid) for valid in self.nearest_sides(side))}"
        )

    def nearest_sides(self, side: int) -> list[int]:
        """The next valid side below `side`, where there is one, and the next one above, in pixels."""
        below = range(side // HIGH_STRIDE * HIGH_STRIDE, 0, -HIGH_STRIDE)
        start = max(side, 0) // HIGH_STRIDE * HIGH_STRIDE + HIGH_STRIDE
        # Both rules repeat: the first multiple of 32 times the grid past `side` is valid.
        last = start + HIGH_STRIDE * self.grid_at(start)
        above = range(start, last + 1, HIGH_STRIDE)
        found = (next((s for s in sides if self.is_valid_side(s)), None) for sides in (below, above))
        return [side for side in found if side is not None]

    def _check(self) -> None:
        layers, trained, patch = self.num_hidden_layers, self.low_config.image_size, self.low_config.patch_size
        if layers < QUARTERS or layers % QUARTERS != 0:
            raise ValueError(
                f"low_config.num_hidden_layers is {layers}, but must be a multiple of {QUARTERS}: "
                f"the MR-Adapters follow its first three quarters"
            )
        if trained % patch != 0:
            raise ValueError(f"low_config.image_size is {trained}, but must be a multiple of its patch_size {patch}")
        stem, widths, depths = self.high_config.patch_size, self.high_config.hidden_sizes, self.high_config.depths
        if stem != 4 or len(widths) != 4 or len(depths) != 4:
            raise ValueError(
                f"high_config has patch_size {stem}, hidden_sizes {widths} and depths {depths}, but must have a stem "
                f"of 4 and four stages, so that its map is {HIGH_STRIDE} times smaller than the picture"
            )
        size = self.low_resolution_size
        if size is not None and (size < patch or size % patch != 0):
            raise ValueError(
                f"low_resolution_size is {size}, but must be a multiple of {patch}, the ViT's patch; "
                f"the nearest are {max(size // patch, 1) * patch} and {max(size // patch + 1, 1) * patch}"
            )
        self.check_side(self.image_size)


def _sub_config(value: Any, kind: type[PreTrainedConfig], default: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    if value is None:
        return default()
    if isinstance(value, dict):
        return kind(**{key: item for key, item in value.items() if key != "model_type"})
    return value
