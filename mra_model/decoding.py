"""Fast decoding from plain `generate()` and from pipelines, by transformers' own static cache and compiled step.

What transformers 5.17 to 5.23 does with `cache_implementation="static"`, and what follows for a Llava:

- The prompt runs as ever. On a CUDA device the step of one token is compiled with `torch.compile`, mode
  "reduce-overhead", and so replayed as CUDA graphs; the whole step is one graph, unless flash attention breaks it.
- The mask over the whole cache is made outside the compiled step. Prompts of any length, padded or not, with any number
  of pictures, recompile nothing.
- The step is compiled for a batch of one, and once or twice more for all other sizes. It is compiled again where a call
  needs a longer cache than every call before it, which `max_cache_len` prevents, and apart for
  `torch.inference_mode()`; `generate` itself runs under `torch.no_grad()`.
- Each call allocates a cache of its own, so that no call sees another's; a graph is recorded again where the cache lies
  at another address.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import LlavaForConditionalGeneration

# Beyond one picture, the tokens of question and answer for which the cache has room without being asked.
TEXT_TOKENS = 1024


@dataclass(frozen=True)
class FastDecoding:
    """What `fast_decode` did.

    Args:
        reason: why it left the model alone; None where it did not.
        undo: puts back the generation config's values that it found.
    """

    reason: str | None
    undo: Callable[[], None]


def fast_decode(model: LlavaForConditionalGeneration, max_cache_len: int | None = None) -> FastDecoding:
    """Makes a static cache the model's default, under which transformers compiles decoding.

    Greedy tokens are those of the default cache, but where rounding decides between two: in half precision a compiled
    step rounds less often.

    It sets `cache_implementation` and `max_cache_len` in `model.generation_config` and nothing else: `generate()`,
    streamers and pipelines use it as they are. Call it before a pipeline is made, which in transformers 5.17 copies the
    config. Like any default of generation, both are stored by `save_pretrained` until `undo`.

    A call may choose another cache: `cache_implementation="dynamic"`, without which transformers refuses assisted
    decoding, or `cache_implementation=None` beside `past_key_values` of its own.

    The first answer waits for the compiler, once in a process. Every step reads the whole cache, so that room which
    nobody uses costs time.

    On a CPU it leaves the model alone: transformers compiles nothing there, and a static cache is as fast as the
    default one where it is exactly filled, slower wherever it has room.

    Args:
        model: on its device already.
        max_cache_len: tokens of prompt and answer, pictures' included, for which the cache has room; a longer call
            enlarges it, for later calls too, and compiles again. None is one picture and 1024 tokens more, at most the
            model's positions.

    Raises:
        ValueError: `max_cache_len` is not positive.
    """
    if max_cache_len is not None and max_cache_len < 1:
        raise ValueError(f"max_cache_len must be at least 1, not {max_cache_len}")
    reason = why_not(model)
    if reason is not None:
        return FastDecoding(reason, lambda: None)
    config = model.generation_config
    found = config.cache_implementation, config.max_cache_len

    def undo() -> None:
        config.cache_implementation, config.max_cache_len = found

    config.cache_implementation, config.max_cache_len = "static", max_cache_len or _room(model)
    return FastDecoding(None, undo)


def why_not(model: LlavaForConditionalGeneration) -> str | None:
    """Why transformers would not compile this model's decoding, or None."""
    if model.device.type != "cuda":
        return f"transformers compiles decoding on CUDA devices, and the model is on {model.device.type}"
    offloaded = {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if offloaded:
        return f"transformers compiles no decoding of a model that is partly on {' and '.join(sorted(offloaded))}"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return f"{type(quantizer).__name__} does not support compilation"
    return None


def _room(model: LlavaForConditionalGeneration) -> int:
    config = model.config
    return min(config.image_seq_length + TEXT_TOKENS, config.text_config.max_position_embeddings)


__all__ = ["TEXT_TOKENS", "FastDecoding", "fast_decode", "why_not"]
