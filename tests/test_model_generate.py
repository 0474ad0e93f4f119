"""`generate` on a tiny random model: batches, several pictures, text only, caches, searches, and the image token."""

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import mra_kernels

IMAGE = 640
STEPS = 8


def pictures(count: int, seed: int = 0) -> Tensor:
    """[count, 3, 128, 128], about as a processor would normalise them."""
    return torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(seed))


def prompt(*parts: int, seed: int = 0) -> Tensor:
    """[T]: for each part that many random words, with a picture of 16 tokens between two parts."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.tensor([1])]
    for index, words in enumerate(parts):
        pieces += [torch.full((16,), IMAGE)] if index else []
        pieces += [torch.randint(3, IMAGE, (words,), generator=generator)]
    return torch.cat(pieces)


def batch(*prompts: Tensor) -> dict[str, Tensor]:
    """Prompts padded on the left, as a processor does for generation."""
    length = max(len(ids) for ids in prompts)
    rows = [torch.cat([torch.zeros(length - len(ids), dtype=torch.long), ids]) for ids in prompts]
    masks = [torch.cat([torch.zeros(length - len(ids), dtype=torch.long), torch.ones_like(ids)]) for ids in prompts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def generate(model: LlavaForConditionalGeneration, *prompts: Tensor, pixels: Tensor | None = None, **kwargs) -> Tensor:
    """[B, STEPS]: the new tokens, greedily unless asked otherwise, past any end of sequence."""
    options = {"do_sample": False, "min_new_tokens": STEPS, "max_new_tokens": STEPS} | kwargs
    inputs = batch(*prompts) | ({} if pixels is None else {"pixel_values": pixels})
    output = model.generate(**inputs, **options)
    return output[:, inputs["input_ids"].shape[1] :]


def naive(model: LlavaForConditionalGeneration, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
    """[1, STEPS]: greedy decoding without any cache, one whole forward a token."""
    ids = ids[None]
    start = ids.shape[1]
    for _ in range(STEPS):
        with torch.no_grad():
            logits = model(ids, pixel_values=pixels, use_cache=False).logits[:, -1]
        logits[:, [IMAGE, model.generation_config.eos_token_id]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, start:]


class Lowered(torch.nn.Module):
    """A head whose logits are lowered by 20, but for the image token's."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head
        self.weight = head.weight

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x) - 20
        logits[..., IMAGE] += 20
        return logits


@pytest.mark.parametrize("parts", [(5,), (5, 4), (0, 6), (3, 2, 4)], ids=["text", "picture", "first", "two"])
def test_greedy_equals_decoding_without_a_cache(tiny_model, parts: tuple) -> None:
    pixels = pictures(len(parts) - 1) if len(parts) > 1 else None
    ids = prompt(*parts)
    assert torch.equal(generate(tiny_model, ids, pixels=pixels), naive(tiny_model, ids, pixels))


def test_pictures_matter(tiny_model) -> None:
    ids = prompt(3, 2, 4)
    first = generate(tiny_model, ids, pixels=pictures(2))
    swapped = generate(tiny_model, ids, pixels=pictures(2).flip(0))
    assert not torch.equal(first, swapped)


def test_a_padded_batch_equals_single_prompts(tiny_model) -> None:
    """One prompt with two pictures, one with one, one with none."""
    prompts = [prompt(4, 3, 2, seed=1), prompt(6, 2, seed=2), prompt(9, seed=3)]
    pixels = pictures(3)
    together = generate(tiny_model, *prompts, pixels=pixels)
    alone = [
        generate(tiny_model, prompts[0], pixels=pixels[:2]),
        generate(tiny_model, prompts[1], pixels=pixels[2:]),
        generate(tiny_model, prompts[2]),
    ]
    assert torch.equal(together, torch.cat(alone))


def test_static_cache_equals_dynamic(tiny_model) -> None:
    prompts, pixels = [prompt(4, 3, seed=1), prompt(6, 2, seed=2)], pictures(2)
    expected = generate(tiny_model, *prompts, pixels=pixels)
    static = generate(tiny_model, *prompts, pixels=pixels, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


def test_reference_backend_gives_the_same_tokens(tiny_model) -> None:
    ids, pixels = prompt(4, 3), pictures(1)
    expected = generate(tiny_model, ids, pixels=pixels)
    with mra_kernels.use_backend("reference"):
        assert torch.equal(generate(tiny_model, ids, pixels=pixels), expected)


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 0},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["greedy", "beams", "sampling", "static"],
)
def test_the_image_token_is_never_generated(tiny_model, search: dict) -> None:
    """Every other logit is made negative, so that the image token's zero row would win each step."""
    ids, pixels = prompt(4, 3), pictures(1)
    torch.manual_seed(0)
    tiny_model.lm_head = Lowered(tiny_model.lm_head)
    assert not (generate(tiny_model, ids, pixels=pixels, **search) == IMAGE).any()
    tiny_model.generation_config.suppress_tokens = None
    assert (generate(tiny_model, ids, pixels=pixels, **search) == IMAGE).any()


def test_too_many_image_tokens_are_refused(tiny_model) -> None:
    with pytest.raises(ValueError, match="do not match"):
        tiny_model(prompt(2, 2, 2)[None], pixel_values=pictures(1))
