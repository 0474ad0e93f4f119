"""`fast_prefill`: kept features are those that would be computed, never stale, in bounded memory."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_model_generate import generate, pictures, prompt
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import mra_kernels
from bench.models import LLAVA_15, TINY, Subject
from mra_kernels.testing import relative_error
from mra_model import build_model, fast_prefill

# Of a tiny picture in float32: 16 tokens of the tower, 32 channels, and as many of the projector.
EACH = 2 * 16 * 32 * 4
PLENTY = 1 << 20


class Tower:
    """Counts the pictures that pass a model's tower, call by call."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.batches: list[int] = []
        model.model.vision_tower.register_forward_pre_hook(lambda _, args: self.batches.append(len(args[0])))


@torch.no_grad()
def features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the language model sees: [N, L, D]."""
    return torch.stack(model.get_image_features(pixels).pooler_output)


def plain(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The same by the model's class, whatever stands in for it."""
    with torch.no_grad():
        return torch.stack(type(model.model).get_image_features(model.model, pixels).pooler_output)


class TestKept:
    def test_a_picture_passes_the_tower_once(self, tiny_model) -> None:
        expected = plain(tiny_model, pictures(1))
        kept, tower = fast_prefill(tiny_model, cache_bytes=PLENTY), Tower(tiny_model)
        for _ in range(3):
            assert torch.equal(features(tiny_model, pictures(1)), expected)
        assert tower.batches == [1]
        assert (kept.hits, kept.misses, kept.kept_bytes) == (2, 1, EACH)

    def test_the_whole_output_is_the_models_own(self, tiny_model) -> None:
        pixels = pictures(2)
        with torch.no_grad():
            expected = tiny_model.get_image_features(pixels)
            fast_prefill(tiny_model, cache_bytes=PLENTY)
            for _ in range(2):
                actual = tiny_model.get_image_features(pixels)
                assert actual.keys() == expected.keys()
                assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
                assert torch.equal(actual.hidden_states[-1], expected.hidden_states[-1])
                assert all(map(torch.equal, actual.pooler_output, expected.pooler_output))

    def test_a_chat_of_three_turns(self, tiny_model) -> None:
        """The second turn repeats the picture, the third adds another in front of it."""
        turns = [(prompt(3, 4), [0]), (prompt(3, 9), [0]), (prompt(3, 2, 12), [1, 0])]
        expected = [generate(tiny_model, ids, pixels=pictures(2)[shown]) for ids, shown in turns]
        fast_prefill(tiny_model, cache_bytes=PLENTY)
        tower = Tower(tiny_model)
        actual = [generate(tiny_model, ids, pixels=pictures(2)[shown]) for ids, shown in turns]
        assert all(map(torch.equal, actual, expected))
        assert tower.batches == [1, 1]

    def test_a_padded_batch_with_a_picture_twice(self, tiny_model) -> None:
        prompts = [prompt(4, 3, 2, seed=1), prompt(6, 2, seed=2), prompt(9, seed=3)]
        pixels = pictures(2)[[0, 1, 0]]
        expected = generate(tiny_model, *prompts, pixels=pixels)
        kept, tower = fast_prefill(tiny_model, cache_bytes=PLENTY), Tower(tiny_model)
        assert torch.equal(generate(tiny_model, *prompts, pixels=pixels), expected)
        assert tower.batches == [2]
        assert (kept.hits, kept.misses) == (1, 2)

    def test_beams(self, tiny_model) -> None:
        expected = generate(tiny_model, prompt(4, 3), pixels=pictures(1), num_beams=3)
        fast_prefill(tiny_model, cache_bytes=PLENTY)
        for _ in range(2):
            assert torch.equal(generate(tiny_model, prompt(4, 3), pixels=pictures(1), num_beams=3), expected)

    def test_from_inference_mode_and_outside(self, tiny_model) -> None:
        expected = plain(tiny_model, pictures(1))
        fast_prefill(tiny_model, cache_bytes=PLENTY)
        with torch.inference_mode():
            assert torch.equal(features(tiny_model, pictures(1)), expected)
        assert torch.equal(features(tiny_model, pictures(1)), expected)
        assert len(generate(tiny_model, prompt(3, 2), pixels=pictures(1))) == 1

    def test_a_result_that_is_written_to_changes_no_later_one(self, tiny_model) -> None:
        fast_prefill(tiny_model, cache_bytes=PLENTY)
        expected = features(tiny_model, pictures(1))
        for _ in range(2):
            with torch.no_grad():
                output = tiny_model.get_image_features(pictures(1))
                output.pooler_output[0].zero_()
                output.last_hidden_state.zero_()
            assert torch.equal(features(tiny_model, pictures(1)), expected)


class TestBounded:
    def test_the_least_recently_used_go_first(self, tiny_model) -> None:
        kept, tower = fast_prefill(tiny_model, cache_bytes=2 * EACH + 1), Tower(tiny_model)
        a, b, c = pictures(3).split(1)
        for pixels in (a, b, a, c, a):
            features(tiny_model, pixels)
            assert kept.kept_bytes <= 2 * EACH
        assert tower.batches == [1, 1, 1]
        features(tiny_model, b)
        assert tower.batches == [1, 1, 1, 1]

    def test_more_pictures_at_once_than_there_is_room_for(self, tiny_model) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=2 * EACH)
        assert relative_error(features(tiny_model, pictures(5)), plain(tiny_model, pictures(5))) < 1e-6
        assert kept.kept_bytes == 2 * EACH

    def test_no_room_for_one(self, tiny_model) -> None:
        kept, tower = fast_prefill(tiny_model, cache_bytes=EACH - 1), Tower(tiny_model)
        for _ in range(2):
            assert torch.equal(features(tiny_model, pictures(1)), plain(tiny_model, pictures(1)))
        assert kept.kept_bytes == 0
        assert tower.batches == [1] * 4

    def test_a_kept_picture_holds_nothing_of_its_batch(self, tiny_model) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=EACH)
        features(tiny_model, pictures(3))
        (entry,) = kept._kept.values()
        assert sum(tensor.untyped_storage().nbytes() for tensor in entry) == EACH

    def test_clear(self, tiny_model) -> None:
        kept, tower = fast_prefill(tiny_model, cache_bytes=PLENTY), Tower(tiny_model)
        features(tiny_model, pictures(1))
        kept.clear()
        assert kept.kept_bytes == 0
        features(tiny_model, pictures(1))
        assert tower.batches == [1, 1]


def one_bit(pixels: Tensor) -> Tensor:
    changed = pixels.clone()
    changed.view(torch.int32)[0, -1, -1, -1] ^= 1
    return changed


def one_sign(pixels: Tensor) -> Tensor:
    changed = pixels.clone()
    changed[0, 0, 0, 0].neg_()
    return changed


def two_swapped(pixels: Tensor) -> Tensor:
    changed = pixels.clone()
    changed[0, 0, 0, :2] = pixels[0, 0, 0, :2].flip(0)
    return changed


class TestContent:
    @pytest.mark.parametrize(
        "change",
        [
            one_bit,
            one_sign,
            two_swapped,
            lambda pixels: pixels.flip(-1),
            lambda pixels: pixels.flip(-2),
            lambda pixels: pixels.flip(1),
            lambda pixels: pixels.mT,
            lambda pixels: pixels.roll(1, -2),
            torch.zeros_like,
            lambda pixels: pixels.double(),
            lambda pixels: F.interpolate(pixels, size=(64, 64)),
        ],
        ids=["bit", "sign", "swap", "mirror", "upside", "channels", "transpose", "roll", "zero", "dtype", "side"],
    )
    def test_another_picture_is_another(self, tiny_model, change: Callable[[Tensor], Tensor]) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY)
        features(tiny_model, pictures(1))
        changed = change(pictures(1))
        assert torch.equal(features(tiny_model, changed), plain(tiny_model, changed))
        assert (kept.hits, kept.misses) == (0, 2)

    def test_the_same_bits_in_another_dtype_are_another(self, tiny_model) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY)
        pixels = pictures(1).bfloat16()
        features(tiny_model, pixels)
        changed = pixels.view(torch.float16)
        assert torch.equal(features(tiny_model, changed), plain(tiny_model, changed))
        assert (kept.hits, kept.misses) == (0, 2)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
    def test_the_same_content_in_other_memory_is_the_same(self, tiny_model, dtype: torch.dtype) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY)
        pixels = (30 * pictures(1)).abs().to(dtype)
        features(tiny_model, pixels)
        features(tiny_model, pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        features(tiny_model, F.pad(pixels, (1, 2))[..., 1:-2])
        assert (kept.hits, kept.misses) == (2, 1)


def step(model: nn.Module) -> None:
    tower = model.model.vision_tower
    optimizer = torch.optim.SGD(tower.parameters(), 0.1)
    for parameter in tower.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load(model: nn.Module, assign: bool = False) -> None:
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()}, assign=assign)


def replace_projector(model: nn.Module) -> None:
    layer = model.model.multi_modal_projector.linear_2
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def add_layer(model: nn.Module) -> None:
    projector = model.model.multi_modal_projector
    projector.linear_2 = nn.Sequential(projector.linear_2, nn.LayerNorm(32))


CHANGES: dict[str, Callable] = {
    "step": step,
    "load": load,
    "assign": lambda model: load(model, assign=True),
    "inference": torch.inference_mode()(lambda model: model.model.multi_modal_projector.linear_1.bias.add_(1)),
    "projector": replace_projector,
    "layer": add_layer,
    "dtype": lambda model: model.bfloat16(),
    "rounded": lambda model: model.bfloat16().float(),
}


class TestNeverStale:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
    def test_changed_weights(self, tiny_model, change: Callable) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY)
        before = features(tiny_model, pictures(1))
        change(tiny_model)
        after = features(tiny_model, pictures(1))
        assert kept.hits == 0
        assert not torch.equal(after, before)
        assert torch.equal(after, plain(tiny_model, pictures(1)))

    def test_new_weights_where_the_old_ones_lay(self, tiny_model) -> None:
        layer = tiny_model.model.multi_modal_projector.linear_2
        memory = layer.bias.detach().numpy().copy()
        layer.bias = nn.Parameter(torch.from_numpy(memory))
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY)
        before = features(tiny_model, pictures(1))
        memory += 1
        layer.bias = nn.Parameter(torch.from_numpy(memory))
        assert not torch.equal(features(tiny_model, pictures(1)), before)
        assert kept.hits == 0

    def test_another_backend(self, tiny_model) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY)
        features(tiny_model, pictures(1))
        with mra_kernels.use_backend("reference"):
            assert torch.equal(features(tiny_model, pictures(1)), plain(tiny_model, pictures(1)))
        assert (kept.hits, kept.misses) == (0, 2)

    def test_autocast(self, tiny_model) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY)
        features(tiny_model, pictures(1))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(features(tiny_model, pictures(1)), plain(tiny_model, pictures(1)))
        assert (kept.hits, kept.misses) == (0, 2)

    def test_a_copy_of_the_model_has_features_of_its_own(self, tiny_model) -> None:
        fast_prefill(tiny_model, cache_bytes=PLENTY)
        before = features(tiny_model, pictures(1))
        other = copy.deepcopy(tiny_model)
        load(other)
        assert not torch.equal(features(other, pictures(1)), before)
        assert torch.equal(features(other, pictures(1)), plain(other, pictures(1)))
        assert torch.equal(features(tiny_model, pictures(1)), before)


class TestOff:
    @pytest.mark.parametrize("training", [False, True], ids=["grad", "train"])
    def test_gradients_flow(self, tiny_model, training: bool) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY, activation_bytes=0)
        features(tiny_model, pictures(2))
        tower = Tower(tiny_model.train(training))
        for _ in range(2):
            tiny_model.zero_grad()
            torch.stack(tiny_model.get_image_features(pictures(2)).pooler_output).sum().backward()
            assert all(p.grad is not None and p.grad.any() for p in tiny_model.model.vision_tower.merge.parameters())
        assert tower.batches == [2, 2]
        assert (kept.hits, kept.misses) == (0, 2)

    def test_train_mode_without_gradients(self, tiny_model) -> None:
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY)
        features(tiny_model.train(), pictures(1))
        assert kept.kept_bytes == kept.misses == 0

    def test_options_of_a_call(self, tiny_model) -> None:
        fast_prefill(tiny_model, cache_bytes=PLENTY)
        features(tiny_model, pictures(1))
        with torch.no_grad():
            as_tuple = tiny_model.model.get_image_features(pictures(1), return_dict=False)
            doubled = tiny_model.model.get_image_features(pictures(1), vision_feature_layer=-1)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(doubled.pooler_output[0], plain(tiny_model, pictures(1))[0])

    def test_inside_compile(self, tiny_model) -> None:
        ids = prompt(2, 2, 2)[None]
        with torch.no_grad():
            expected = tiny_model(ids, pixel_values=pictures(2)).logits
            kept = fast_prefill(tiny_model, cache_bytes=PLENTY, activation_bytes=0)
            compiled = torch.compile(tiny_model, backend="eager", fullgraph=True)
            assert torch.equal(compiled(ids, pixel_values=pictures(2)).logits, expected)
        assert kept.misses == 0

    def test_wrong_pixels_are_refused_as_before(self, tiny_model) -> None:
        fast_prefill(tiny_model, cache_bytes=PLENTY, activation_bytes=0)
        for pixels, message in ((pictures(1)[0], "must be"), (pictures(1)[..., 1:], "not square")):
            with pytest.raises(ValueError, match=message):
                features(tiny_model, pixels)


class TestUndo:
    def test_bit_equal_and_nothing_left(self, tiny_model) -> None:
        before, names = plain(tiny_model, pictures(3)), set(vars(tiny_model.model))
        kept = fast_prefill(tiny_model, cache_bytes=PLENTY, activation_bytes=0)
        features(tiny_model, pictures(3))
        for _ in range(2):
            kept.undo()
        assert set(vars(tiny_model.model)) == names
        assert kept.kept_bytes == 0
        assert torch.equal(features(tiny_model, pictures(3)), before)

    def test_a_second_call_replaces_the_first(self, tiny_model) -> None:
        first = fast_prefill(tiny_model, cache_bytes=PLENTY)
        second = fast_prefill(tiny_model, cache_bytes=PLENTY)
        features(tiny_model, pictures(1))
        assert (first.misses, second.misses) == (0, 1)
        first.undo()
        features(tiny_model, pictures(1))
        assert second.hits == 1
        second.undo()
        assert "get_image_features" not in vars(tiny_model.model)

    def test_what_was_there_before_comes_back(self, tiny_model) -> None:
        own = tiny_model.model.get_image_features
        tiny_model.model.get_image_features = own
        fast_prefill(tiny_model, cache_bytes=PLENTY).undo()
        assert vars(tiny_model.model)["get_image_features"] is own

    def test_saved_weights_are_the_models(self, tiny_model, tmp_path) -> None:
        fast_prefill(tiny_model, cache_bytes=PLENTY)
        features(tiny_model, pictures(1))
        tiny_model.save_pretrained(tmp_path)
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
        assert all(map(torch.equal, again.state_dict().values(), tiny_model.state_dict().values()))


class TestRefused:
    def test_sizes(self, tiny_model) -> None:
        with pytest.raises(ValueError, match="cache_bytes=-1"):
            fast_prefill(tiny_model, cache_bytes=-1)
        with pytest.raises(ValueError, match="activation_bytes=-2"):
            fast_prefill(tiny_model, activation_bytes=-2)

    def test_another_tower(self) -> None:
        model = build_model(Subject(LLAVA_15, TINY, 56, torch.float32).config(), device="meta")
        with pytest.raises(ValueError, match="clip_vision_model"):
            fast_prefill(model, cache_bytes=PLENTY)

    def test_weights_that_count_no_changes(self, tiny_config) -> None:
        with torch.inference_mode():
            model = LlavaForConditionalGeneration(tiny_config)
        with pytest.raises(ValueError, match="inference_mode"):
            fast_prefill(model, cache_bytes=PLENTY)
