"""The tower in its stock Llava model, on tiny random weights; parity with the authors is tested in test_convert.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_config
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import mra_kernels
from mra_model import LANGUAGE_MODEL_LORA, MraVisionModel, attention, build_model
from mra_model.modeling_mra import MraAdapterLayer, MraConvNeXtBlock

IMAGE = 640


def pictures(count: int, side: int = 128, seed: int = 0) -> Tensor:
    """[count, 3, side, side], about as a processor would normalise them."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def prompt(*parts: int, seed: int = 0) -> Tensor:
    """[1, T]: for each part that many random words, with a picture of 16 tokens between two parts."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.tensor([1])]
    for index, words in enumerate(parts):
        pieces += [torch.full((16,), IMAGE)] if index else []
        pieces += [torch.randint(3, IMAGE, (words,), generator=generator)]
    return torch.cat(pieces)[None]


def relative(actual: Tensor, expected: Tensor) -> float:
    """Error of `actual` as a part of the size of `expected`."""
    return ((actual - expected).norm() / expected.norm()).item()


def features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[B, L, C]: what the tower makes of the pixels."""
    return model.model.vision_tower(pixels).last_hidden_state


def tower_gradients(model: LlavaForConditionalGeneration, pixels: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter of the tower for a loss over its output."""
    tower = model.model.vision_tower
    tower.zero_grad()
    weights = torch.linspace(-1, 1, tower.config.hidden_size)
    (features(model, pixels) * weights).square().mean().backward()
    return {name: parameter.grad for name, parameter in tower.named_parameters()}


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, gradient in expected.items():
        assert gradient is not None, name
        # The softmax takes a key's bias back out: its gradient is rounding alone.
        if not name.endswith("k_proj.bias"):
            assert relative(actual[name], gradient) <= tolerance, name


class TestTower:
    def test_output(self, tiny_model) -> None:
        output = tiny_model.model.vision_tower(pictures(2))
        assert output.last_hidden_state.shape == (2, 16, 32)
        assert len(output.hidden_states) == 1
        assert output.hidden_states[0] is output.last_hidden_state

    def test_pictures_of_a_batch_do_not_mix(self, tiny_model) -> None:
        pixels = pictures(3)
        with torch.no_grad():
            together = features(tiny_model, pixels)
            alone = torch.cat([features(tiny_model, picture[None]) for picture in pixels])
        assert relative(together, alone) < 1e-5

    @pytest.mark.parametrize("side", [32, 64, 128, 192, 256])
    @pytest.mark.parametrize("adapters", [True, False])
    def test_fused_equals_reference(self, side: int, adapters: bool) -> None:
        """Sides cover a smaller, an equal and a larger grid than the stored one, and both kinds of resampling."""
        model = build_model(make_tiny_config(adapters=adapters))
        pixels = pictures(2, side)
        grid = max(side // 32, 4)
        fused, fused_grads = features(model, pixels).detach(), tower_gradients(model, pixels)
        with mra_kernels.use_backend("reference"):
            expected, expected_grads = features(model, pixels).detach(), tower_gradients(model, pixels)
        assert fused.shape == (2, grid * grid, 32)
        assert relative(fused, expected) < 1e-5
        assert_gradients_close(fused_grads, expected_grads, 1e-4)

    def test_low_resolution_size_pools_the_high_resolution_map(self) -> None:
        pooled = build_model(make_tiny_config(image_size=256, low_resolution_size=56))
        plain = build_model(make_tiny_config(image_size=256))
        pixels = pictures(2, 256)
        fused, fused_grads = features(pooled, pixels).detach(), tower_gradients(pooled, pixels)
        with mra_kernels.use_backend("reference"):
            expected, expected_grads = features(pooled, pixels).detach(), tower_gradients(pooled, pixels)
        assert fused.shape == (2, 16, 32)
        assert features(plain, pixels).shape == (2, 64, 32)
        assert relative(fused, expected) < 1e-5
        assert_gradients_close(fused_grads, expected_grads, 1e-4)

    def test_adapters_change_the_result(self, tiny_model) -> None:
        """Without its weights set to zero an adapter is no identity: a test on default weights would see nothing."""
        without = build_model(make_tiny_config(adapters=False))
        assert not any("adapters" in name for name, _ in without.named_parameters())
        missing = without.model.vision_tower.load_state_dict(tiny_model.model.vision_tower.state_dict(), strict=False)
        assert missing.missing_keys == []
        with torch.no_grad():
            assert relative(features(without, pictures(1)), features(tiny_model, pictures(1))) > 0.05

    def test_every_parameter_is_used(self, tiny_model) -> None:
        for name, gradient in tower_gradients(tiny_model, pictures(2)).items():
            assert gradient is not None, name
            assert gradient.abs().max() > 0, name

    def test_position_embedding_is_resized_with_antialias(self) -> None:
        """From 4 to 2, plain bicubic reads columns 0 to 2 for the first token, antialiased also the last."""
        model = build_model(make_tiny_config(image_size=128, low_resolution_size=28))
        low = model.model.vision_tower.low
        with torch.no_grad():
            low.position_embedding.zero_()
            before = low.embed(pictures(1), 2)
            low.position_embedding.view(4, 4, 32)[:, 3] = torch.linspace(-50, 50, 32)
            after = low.embed(pictures(1), 2)
        assert before.shape == (1, 4, 32)
        assert relative(after[:, 0], before[:, 0]) > 0.1

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((1, 3, 160, 128), "160 x 128 are not square.*160 or 192"),
            ((1, 3, 100, 100), "100 x 100 .* 64 and 128"),
            ((1, 3, 96, 96), "96 x 96 .* 64 and 128"),
            ((3, 128, 128), r"\[B, 3, S, S\].*\(3, 128, 128\)"),
            ((1, 1, 128, 128), r"\[B, 3, S, S\]"),
        ],
    )
    def test_wrong_pixels_are_refused(self, tiny_model, shape: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            features(tiny_model, torch.zeros(shape))

    def test_bytes(self, tiny_model) -> None:
        """uint8 pixels are normalized in float32, whatever the tower's dtype; other integers are no pixels."""
        raw = torch.randint(0, 256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        mean, std = (torch.tensor(of).view(3, 1, 1) for of in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        pixels = (raw.float() / 255 - mean) / std
        assert relative(features(tiny_model, raw), features(tiny_model, pixels)) < 1e-6
        assert torch.equal(features(tiny_model.bfloat16(), raw), features(tiny_model, pixels))
        with pytest.raises(TypeError, match="int64, but must be normalized floating point, or uint8"):
            features(tiny_model, raw.long())

    def test_no_pixels_are_refused(self, tiny_model) -> None:
        with pytest.raises(ValueError, match="leave the argument out"):
            tiny_model.model.vision_tower(None)


class TestPrecision:
    def test_bfloat16_and_autocast_stay_close(self, tiny_model) -> None:
        pixels = pictures(2)
        with torch.no_grad():
            expected = features(tiny_model, pixels)
            with torch.autocast("cpu", torch.bfloat16):
                autocast = features(tiny_model, pixels)
            narrow = features(tiny_model.to(torch.bfloat16), pixels)
        assert narrow.dtype == torch.bfloat16
        assert relative(narrow.float(), expected) < 3e-2
        assert relative(autocast.float(), expected) < 3e-2

    def test_autocast_gives_gradients_in_float32(self, tiny_model) -> None:
        pixels = pictures(2)
        expected = tower_gradients(tiny_model, pixels)
        with torch.autocast("cpu", torch.bfloat16):
            actual = tower_gradients(tiny_model, pixels)
        assert all(gradient.dtype == torch.float32 for gradient in actual.values())
        assert_gradients_close(actual, expected, 0.2)

    def test_the_picture_is_resized_in_float32(self, tiny_model) -> None:
        """bfloat16 weights read a picture that was resized before it was rounded."""
        pixels = pictures(1)
        tower = tiny_model.to(torch.bfloat16).model.vision_tower
        wide = torch.nn.functional.interpolate(pixels, size=(56, 56), mode="bilinear", align_corners=True)
        with torch.no_grad():
            rows = tower.low.patch_embedding(wide.bfloat16())
            expected = tower.low.pre_layernorm(rows + tower.low.position_embedding)
            assert torch.equal(tower.low.embed(pixels, 4), expected)


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradients_are_equal(self, tiny_model, reentrant: bool) -> None:
        pixels = pictures(2)
        expected = tower_gradients(tiny_model.train(), pixels)
        checkpointed = copy.deepcopy(tiny_model).train()
        checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_gradients_close(tower_gradients(checkpointed, pixels), expected, 1e-6)

    def test_blocks_and_adapters_are_recomputed(self, tiny_model) -> None:
        tiny_model.train().gradient_checkpointing_enable()
        calls: dict[str, int] = {}
        for module in tiny_model.model.vision_tower.modules():
            if isinstance(module, MraConvNeXtBlock | MraAdapterLayer):
                self._count(module, calls)
        features(tiny_model, pictures(1)).sum().backward()
        assert set(calls.values()) == {2}
        assert len(calls) == 5 + 3

    @staticmethod
    def _count(module: torch.nn.Module, calls: dict) -> None:
        original = module._gradient_checkpointing_func

        def counted(function, *args):
            def once_more(*inner):
                calls[id(module)] = calls.get(id(module), 0) + 1
                return function(*inner)

            return original(once_more, *args)

        module._gradient_checkpointing_func = counted


class TestCompile:
    def test_fullgraph(self, tiny_model) -> None:
        pixels = pictures(2)
        expected, expected_grads = features(tiny_model, pixels).detach(), tower_gradients(tiny_model, pixels)
        torch._dynamo.reset()
        tiny_model.model.vision_tower.compile(backend="aot_eager", fullgraph=True)
        assert relative(features(tiny_model, pixels).detach(), expected) < 1e-5
        assert_gradients_close(tower_gradients(tiny_model, pixels), expected_grads, 1e-4)

    def test_dynamic_batch(self, tiny_model) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(tiny_model.model.vision_tower, backend="aot_eager", fullgraph=True)
        for count in (2, 3, 5):
            pixels = pictures(count)
            torch._dynamo.mark_dynamic(pixels, 0)
            with torch.no_grad():
                actual = compiled(pixels).last_hidden_state
                assert relative(actual, features(tiny_model, pixels)) < 1e-5

    def test_export_with_a_dynamic_batch(self, tiny_model) -> None:
        tower = tiny_model.model.vision_tower
        program = torch.export.export(tower, (pictures(2),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
        pixels = pictures(3)
        with torch.no_grad():
            assert relative(program.module()(pixels).last_hidden_state, features(tiny_model, pixels)) < 1e-5

    def test_whole_model_fullgraph(self, tiny_model) -> None:
        inputs = {"input_ids": prompt(5, 4), "pixel_values": pictures(1)}
        with torch.no_grad():
            expected = tiny_model(**inputs).logits
            torch._dynamo.reset()
            compiled = torch.compile(tiny_model, backend="aot_eager", fullgraph=True)
            assert relative(compiled(**inputs).logits, expected) < 1e-5


class TestSaving:
    def test_reload_is_bit_equal(self, tiny_model, tmp_path) -> None:
        tiny_model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert isinstance(loaded, LlavaForConditionalGeneration)
        expected = tiny_model.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, expected[name]), name
        inputs = {"input_ids": prompt(5, 4), "pixel_values": pictures(1)}
        # Loaded weights lie in the file's mapping; the library's products round differently on unaligned memory.
        loaded = copy.deepcopy(loaded)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, tiny_model(**inputs).logits)
        assert loaded.generation_config.suppress_tokens == [IMAGE]

    def test_the_tower_alone_reloads(self, tiny_model, tmp_path) -> None:
        tiny_model.model.vision_tower.save_pretrained(tmp_path)
        loaded = copy.deepcopy(AutoModel.from_pretrained(tmp_path))
        assert isinstance(loaded, MraVisionModel)
        with torch.no_grad():
            assert torch.equal(loaded(pictures(1)).last_hidden_state, features(tiny_model, pictures(1)))

    def test_missing_weights_are_initialised_and_loaded_ones_stay(self, tiny_model, tmp_path) -> None:
        """A stage-1 checkpoint starts training with fresh adapters, whose projections are zero."""
        kept = {k: v for k, v in tiny_model.state_dict().items() if "adapters.1" not in k and "up_weight" not in k}
        tiny_model.save_pretrained(tmp_path, state_dict=kept)
        loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        assert set(report["missing_keys"]) == tiny_model.state_dict().keys() - kept.keys()
        values = loaded.state_dict()
        for name, value in kept.items():
            assert torch.equal(values[name], value), name
        fresh = loaded.model.vision_tower.adapters[1]
        assert not fresh.low_proj_weight.any()
        assert not fresh.high_proj_weight.any()
        assert 0.01 < fresh.high_conv_weight.std() < 0.04
        assert 0.01 < values["model.vision_tower.high.stages.3.blocks.0.up_weight"].std() < 0.04

    @pytest.mark.parametrize("name", ["eager", "sdpa"])
    def test_attention_choice_reaches_the_vit(self, tiny_model, tmp_path, name: str) -> None:
        tiny_model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=name)
        attention = loaded.model.vision_tower.low.layers[0].self_attn
        assert attention.config._attn_implementation == {"sdpa": "mra_sdpa"}.get(name, name)
        with torch.no_grad():
            assert relative(features(loaded, pictures(1)), features(tiny_model, pictures(1))) < 1e-5


def test_a_tower_built_directly_uses_the_fast_attention(tiny_config) -> None:
    tower = MraVisionModel(tiny_config.vision_config)
    assert tower.config._attn_implementation == "sdpa"
    assert tower.low.layers[0].self_attn.config._attn_implementation == "mra_sdpa"


def test_the_vit_attends_by_our_op(tiny_model, monkeypatch) -> None:
    """Once a layer, without a mask; with one, and with dropout, by PyTorch's."""
    calls = []
    monkeypatch.setattr(attention, "attention", lambda *given: calls.append(given) or mra_kernels.attention(*given))
    features(tiny_model, pictures(1))
    assert len(calls) == len(tiny_model.model.vision_tower.low.layers)
    module = tiny_model.model.vision_tower.low.layers[0].self_attn
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = torch.rand(2, 1, 9, 9) < 0.7
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(attention.attend(module, query, key, value, mask, scaling=0.3)[0], expected)
    assert attention.attend(module, query, key, value, None, dropout=1.0)[0].abs().max() == 0
    assert len(calls) == len(tiny_model.model.vision_tower.low.layers)
    plain = F.scaled_dot_product_attention(query, key, value, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(attention.attend(module, query, key, value, None, scaling=0.3)[0], plain)


def test_lora_matches_only_the_language_model(tiny_model) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    wrapped = peft.get_peft_model(tiny_model, peft.LoraConfig(r=2, target_modules=LANGUAGE_MODEL_LORA))
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7
    assert all("language_model.layers." in name for name in trained)
    wrapped(input_ids=prompt(5, 4), pixel_values=pictures(1), labels=prompt(5, 4)).loss.backward()
    gradients = [parameter.grad for parameter in wrapped.parameters() if parameter.requires_grad]
    # B starts at zero, so only it has a gradient in the first step.
    assert sum(bool(gradient.any()) for gradient in gradients) == len(trained) // 2
