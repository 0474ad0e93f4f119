"""Pictures in front of a prompt: features kept for pictures that come again, and many pictures in bounded memory.

Both stand in `LlavaModel.get_image_features`, through which `generate()`, pipelines and `forward` get features, and
both are off until `fast_prefill` is called.
"""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mra_kernels.dispatch import preference
from mra_model.configuration_mra import MraVisionConfig

# Maps of the first ConvNeXt stage that are alive at once: 8 are the hidden layer before and after its GELU.
LIVE_MAPS = 12

# A picture's bytes are hashed as integers of its elements' size, or as pairs of them.
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}

# Of all caches: it is held for microseconds, and a lock of each one's own would keep models from being deep-copied.
_LOCK = threading.Lock()

# A picture's tokens after the tower, [L, C], and after the projector, [L, D].
Features = tuple[Tensor, Tensor]


def fast_prefill(
    model: LlavaForConditionalGeneration, *, cache_bytes: int = 0, activation_bytes: int | None = None
) -> "PictureFeatures":
    """Keeps pictures' features between calls, and sends many pictures through the tower in chunks.

    A picture is recognized by its content: in a chat of several turns each picture passes the tower once, and equal
    pictures of a batch pass together once. Results are those of the plain model, up to the rounding that a batch of
    another size brings. Under autograd, in training, inside `torch.compile` and in calls with options of their own
    (`vision_feature_layer`, `image_sizes`, ...) both are off.

    A second call for the same model replaces the first.

    Args:
        model: with the tower of LLaVA-HR.
        cache_bytes: what kept features may take on the model's device; the least recently used go first. 0 keeps none.
        activation_bytes: what one chunk's activations may take, by `activation_bytes_per_picture`; a chunk has one
            picture at least. None sends all pictures at once.

    Returns:
        Its counts of hits and misses, `clear()`, and `undo()`.

    Raises:
        ValueError: another tower, a negative size, or features to be kept of weights that were made under
            `torch.inference_mode()`, whose changes PyTorch does not count.
    """
    if not isinstance(model.config.vision_config, MraVisionConfig):
        raise ValueError(f"the tower is of type {model.config.vision_config.model_type!r}, not LLaVA-HR's")
    if cache_bytes < 0 or (activation_bytes is not None and activation_bytes < 0):
        raise ValueError(f"sizes in bytes cannot be negative: {cache_bytes=}, {activation_bytes=}")
    if cache_bytes and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "changes of weights made under torch.inference_mode() are not counted; build the model outside"
        )
    previous = model.model.__dict__.get("get_image_features")
    if isinstance(getattr(previous, "__self__", None), PictureFeatures):
        previous.__self__.undo()
    return PictureFeatures(model, cache_bytes, activation_bytes)


def activation_bytes_per_picture(config: MraVisionConfig, side: int, dtype: torch.dtype) -> int:
    """What the tower's activations take at most for one picture of side x side pixels, without gradients.

    That is in the first stage of ConvNeXt, whose maps are the largest: `LIVE_MAPS` maps of [S / 4, S / 4, C]. Weights,
    results and libraries' workspaces come on top.
    """
    high = config.high_config
    return LIVE_MAPS * high.hidden_sizes[0] * (side // high.patch_size) ** 2 * dtype.itemsize


class PictureFeatures:
    """Stands in for `get_image_features` of one model; made by `fast_prefill`.

    Kept features are dropped when a weight of the tower or of the projector has changed: by an optimizer, a loaded
    checkpoint, another dtype or device, an adapter added or merged. A change that PyTorch does not count, one written
    through `.data`, or an adapter switched off, needs `clear()`.

    Attributes:
        hits: pictures whose features were at hand.
        misses: pictures that passed the tower.
    """

    def __init__(self, model: LlavaForConditionalGeneration, cache_bytes: int, activation_bytes: int | None) -> None:
        self.cache_bytes = cache_bytes
        self.activation_bytes = activation_bytes
        self.hits = self.misses = 0
        self._model = model.model
        self._replaced = model.model.__dict__.get("get_image_features")
        self._compute = model.model.get_image_features
        # Nobody can make up pictures of equal hash without this number.
        self._seed = secrets.randbits(63)
        self._kept: OrderedDict[tuple, Features] = OrderedDict()
        self._weights: list[tuple[StorageWeakRef, int]] = []
        model.model.get_image_features = self.get_image_features

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model starts with nothing kept: its weights are others, and a weak reference has one owner."""
        return self.__dict__ | {"_kept": OrderedDict(), "_weights": []}

    @property
    def kept_bytes(self) -> int:
        """What the kept features take."""
        with _LOCK:
            return sum(map(_size, self._kept.values()))

    def clear(self) -> None:
        """Drops all features."""
        with _LOCK:
            self._kept.clear()

    def undo(self) -> None:
        """Gives the model its own `get_image_features` back, and drops all features; a second time does nothing."""
        installed = self._model.__dict__.get("get_image_features")
        if getattr(installed, "__self__", None) is self:
            del self._model.get_image_features
            if self._replaced is not None:
                self._model.get_image_features = self._replaced
        self.clear()

    # The names are those of transformers, whose `generate` reads them to see what it may pass.
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        """What `LlavaModel.get_image_features` gives for pixel_values [N, 3, S, S]; `pooler_output` is N of [L, D]."""
        options = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            **kwargs,
        }
        chunk = self._chunk(pixel_values, options)
        if chunk is None or (self.cache_bytes == 0 and len(pixel_values) <= chunk):
            return self._compute(pixel_values, **options)
        keys = self._keys(pixel_values) if self.cache_bytes else list(range(len(pixel_values)))
        features = self._features(pixel_values, keys, chunk)
        tokens, projected = (torch.stack([features[key][part] for key in keys]) for part in range(2))
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=list(projected), hidden_states=(tokens,)
        )

    def _chunk(self, pixels: Tensor, options: dict[str, Any]) -> int | None:
        """How many pictures may pass the tower at once, or None for a call that is not ours."""
        own = any(value is not None for name, value in options.items() if name != "return_dict")
        if own or options.get("return_dict") is False or not self._model.config.return_dict:
            return None
        if torch.is_grad_enabled() or self._model.training or torch.compiler.is_compiling():
            return None
        # What is no batch of pictures is the tower's to refuse.
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or len(pixels) == 0:
            return None
        if self.activation_bytes is None:
            return len(pixels)
        tower = self._model.vision_tower
        each = activation_bytes_per_picture(tower.config, pixels.shape[-1], tower.dtype)
        return max(1, self.activation_bytes // each)

    def _features(self, pixels: Tensor, keys: Sequence, chunk: int) -> dict[Any, Features]:
        """By key, the features of the pictures; those that are not kept are computed, once for each key."""
        found = self._take(keys) if self.cache_bytes else {}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        for start in range(0, len(missing), chunk):
            part = missing[start : start + chunk]
            output = self._compute(pixels[[keys.index(key) for key in part]], return_dict=True)
            computed = dict(zip(part, zip(output.last_hidden_state, output.pooler_output, strict=True), strict=True))
            if self.cache_bytes:
                # A row by itself, because a view of it would keep its whole chunk.
                computed = {key: (tokens.clone(), projected.clone()) for key, (tokens, projected) in computed.items()}
                self._keep(computed)
            found |= computed
        return found

    def _take(self, keys: Sequence[tuple]) -> dict[tuple, Features]:
        """What is kept of these pictures under the present weights."""
        weights = self._fingerprint()
        with _LOCK:
            if weights != self._weights:
                self._kept.clear()
                self._weights = weights
            for key in keys:
                if key in self._kept:
                    self._kept.move_to_end(key)
            return {key: self._kept[key] for key in keys if key in self._kept}

    def _keep(self, features: dict[tuple, Features]) -> None:
        with _LOCK:
            self._kept |= features
            total = sum(map(_size, self._kept.values()))
            while total > self.cache_bytes:
                total -= _size(self._kept.popitem(last=False)[1])

    def _fingerprint(self) -> list[tuple[StorageWeakRef, int]]:
        """Which memory the weights are in and how often each was written to.

        A weak reference keeps the identity of its storage from being used again, but not the memory.
        """
        parts = (self._model.vision_tower, self._model.multi_modal_projector)
        weights = (tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))
        return [(StorageWeakRef(weight.untyped_storage()), weight._version) for weight in weights]

    def _keys(self, pixels: Tensor) -> list[tuple]:
        """What the features of each picture depend on, the weights apart."""
        device = pixels.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shared = (pixels.dtype, pixels.shape[1:], preference(), autocast)
        # One transfer for all pictures.
        hashes = torch.stack([self._hash(picture) for picture in pixels]).tolist()
        return [(*hash, *shared) for hash in hashes]

    def _hash(self, picture: Tensor) -> Tensor:
        """picture: [3, S, S] -> [2]: two sums of its words times secret random factors, modulo 2^64.

        On the picture's own device, where hashing costs less than moving it. Factors belong to a word's row and column,
        [rows] and [columns]. Evenly drawn ones give two different pictures equal sums with a probability below 2^-55.
        """
        rows = picture.contiguous().view(_WORDS[picture.itemsize]).flatten(0, 1).long()
        generator = torch.Generator(picture.device).manual_seed(self._seed)
        sums = []
        for _ in range(2):
            down, across = (torch.empty_like(rows[:, 0]), torch.empty_like(rows[0]))
            down.random_(generator=generator)
            across.random_(generator=generator)
            sums.append(((rows * across).sum(1) * down).sum())
        return torch.stack(sums)


def _size(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features)


__all__ = ["LIVE_MAPS", "PictureFeatures", "activation_bytes_per_picture", "fast_prefill"]
