"""`optimize` on tiny random models and the golden checkpoints: the report, the features, and the weights."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, GOLDEN, arch_of
from conftest import make_tiny_config
from golden_model import Golden, golden_pixels
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from mra_kernels.testing import relative_error, ulp
from mra_model import MraVisionModel, build_model, optimize
from mra_model.convert import convert

ONE = "model.vision_tower.low.layers.0.self_attn.q_proj.weight"
PACKED = ("low.layers.0.self_attn.q_proj.weight", "adapters.1.high_conv_bias")


def pictures(count: int, side: int = 160, seed: int = 0) -> Tensor:
    """[count, 3, side, side], about as a processor would normalise them. At 160 the ViT's grid is a resized one."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def look(tower: nn.Module, pixels: Tensor) -> Tensor:
    """[B, L, C], at inference."""
    with torch.no_grad():
        return tower(pixels).last_hidden_state


def plainly(tower: nn.Module, pixels: Tensor) -> Tensor:
    """The features by the plain forward of a copy, whose parameters share nothing."""
    plain = copy.deepcopy(tower)
    assert plain.route is None
    return look(plain, pixels)


class TestReport:
    def test_twice_equals_once(self, tiny_model: LlavaForConditionalGeneration, tower: MraVisionModel) -> None:
        report = optimize(tiny_model)
        route, pointers = tower.route, [p.data_ptr() for p in tower.parameters()]
        assert optimize(tiny_model) is optimize(tower) is report
        assert tower.route is route
        assert [p.data_ptr() for p in tower.parameters()] == pointers

    def test_a_pause_takes_the_plain_forward(self, tower: MraVisionModel) -> None:
        pixels = pictures(1)
        with torch.no_grad():
            plain = tower(pixels).last_hidden_state
            report = optimize(tower)
            report.paused = True
            assert torch.equal(tower(pixels).last_hidden_state, plain)
            assert report.plain == {"the optimization is paused": 1}
            report.paused = False
            tower(pixels)
        assert report.plain.total() == 1

    def test_undo_is_bit_equal(self, tower: MraVisionModel) -> None:
        pixels = pictures(2)
        before = look(tower, pixels)
        report = optimize(tower)
        look(tower, pixels)
        packed = {name: tower.get_parameter(name).data_ptr() for name in PACKED}
        with torch.inference_mode():
            report.undo()
        assert tower.route is None
        assert torch.equal(look(tower, pixels), before)
        assert all(tower.get_parameter(name).data_ptr() != pointer for name, pointer in packed.items())
        tower(pixels).last_hidden_state.sum().backward()
        again = optimize(tower)
        report.undo()
        assert tower.route is not None
        assert again is not report

    def test_says_what_and_why_not(self, tower: MraVisionModel) -> None:
        report = optimize(tower, max_graphs=0)
        tower(pictures(1))
        look(tower, pictures(1))
        assert "4 of 4 layers" in report.faster["ViT"]
        assert report.plain.total() == report.ungraphed.total() == 1
        text = str(report)
        assert "plain      1 call: autograd records" in text
        assert "no graph   1 call: max_graphs is 0" in text

    def test_what_cannot_be_optimized(self, tiny_model: LlavaForConditionalGeneration, tower: MraVisionModel) -> None:
        with pytest.raises(TypeError, match="LlamaModel has 0 modules of type MraVisionModel"):
            optimize(tiny_model.model.language_model)
        with pytest.raises(ValueError, match="max_graphs is -1"):
            optimize(tower, max_graphs=-1)
        optimize(tower)
        with pytest.raises(ValueError, match="max_graphs=4, not 2; call undo"):
            optimize(tower, max_graphs=2)


class TestSameResults:
    @pytest.mark.parametrize("name", GOLDEN)
    def test_golden(self, name: str, tmp_path: Path) -> None:
        """In float32 within 1e-5, in bfloat16 within what two ways of rounding may differ by."""
        convert(DATA / name, tmp_path / name, arch=arch_of(name))
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name).eval()
        tower, pixels = model.model.vision_tower, golden_pixels(model.config.vision_config.image_size)
        plain = look(tower, pixels)
        optimize(model)
        with torch.no_grad():
            projected = model.get_image_features(pixels).pooler_output
        assert relative_error(look(tower, pixels), plain) < 1e-5
        assert relative_error(torch.stack(list(projected)), Golden(name).expected["projected"]) < 1e-4
        narrow = plainly(tower.bfloat16(), pixels)
        own = relative_error(narrow, plain)
        assert relative_error(look(tower, pixels), plain) < 2 * own + ulp(torch.bfloat16)
        assert tower.route.report.plain.total() == 0

    @pytest.mark.parametrize("side", [64, 128, 160, 256])
    @pytest.mark.parametrize("options", [{}, {"adapters": False}, {"low_resolution_size": 56}])
    def test_every_resampling(self, side: int, options: dict[str, Any]) -> None:
        if side == 160 and "low_resolution_size" in options:
            side = 384
        tower = build_model(make_tiny_config(**options), seed=1).model.vision_tower
        plain = look(tower, pictures(2, side))
        report = optimize(tower)
        assert relative_error(look(tower, pictures(2, side)), plain) < 1e-5
        assert report.plain.total() == 0

    @pytest.mark.parametrize("attention", ["eager", "sdpa", "mra_sdpa"])
    @pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
    def test_attention_and_activation(self, attention: str, activation: str) -> None:
        config = make_tiny_config()
        config.vision_config.low_config.hidden_act = activation
        tower = build_model(config).model.vision_tower
        tower.set_attn_implementation(attention)
        tower.config.low_config._attn_implementation = attention
        plain = look(tower, pictures(1))
        optimize(tower)
        assert relative_error(look(tower, pictures(1)), plain) < 1e-5

    def test_generate(self, tiny_model: LlavaForConditionalGeneration) -> None:
        ids = torch.cat([torch.tensor([1, 7]), torch.full((16,), 640), torch.tensor([9])])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures(1, 128)}
        options = {"do_sample": False, "max_new_tokens": 6}
        plain = tiny_model.generate(**inputs, **options)
        report = optimize(tiny_model)
        assert torch.equal(tiny_model.generate(**inputs, **options), plain)
        assert report.ungraphed.total() == 1

    def test_any_number_of_threads(self, tower: MraVisionModel) -> None:
        """Chosen at any time, as for PyTorch's own operators."""
        optimize(tower)
        before, expected = torch.get_num_threads(), plainly(tower, pictures(2))
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert relative_error(look(tower, pictures(2)), expected) < 1e-5
        finally:
            torch.set_num_threads(before)

    def test_inference_mode_and_back(self, tower: MraVisionModel) -> None:
        """What is made at the first call must serve later ones outside, and training."""
        optimize(tower)
        tower.double().float()
        with torch.inference_mode():
            inside = tower(pictures(1)).last_hidden_state
        assert torch.equal(look(tower, pictures(1)), inside)
        tower(pictures(1)).last_hidden_state.sum().backward()


class TestWeights:
    def test_saved_weights_are_the_plain_ones(self, tiny_model: LlavaForConditionalGeneration, tmp_path: Path) -> None:
        """Every file is the same, byte for byte, however it is saved, and safetensors finds no shared memory."""
        savers: dict[str, Callable[[nn.Module, Path], None]] = {
            "transformers": lambda model, folder: model.save_pretrained(folder),
            "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="50KB"),
            "torch": lambda model, folder: torch.save(model.state_dict(), folder / "weights.bin"),
            "one parameter": lambda model, folder: torch.save(model.get_parameter(ONE), folder / "one.bin"),
            "tensors": lambda model, folder: save_file(model.state_dict(), folder / "weights.safetensors"),
            "model": lambda model, folder: save_model(model, str(folder / "model.safetensors")),
        }
        written = []
        for _ in range(2):
            files = {}
            for name, save in savers.items():
                folder = tmp_path / name
                folder.mkdir(exist_ok=True)
                save(tiny_model, folder)
                files |= {path: path.read_bytes() for path in sorted(folder.iterdir())}
            written.append(files)
            optimize(tiny_model)
            look(tiny_model.model.vision_tower, pictures(1))
        plain, optimized = written
        assert plain.keys() == optimized.keys()
        assert len(plain) > len(savers)
        for path, content in plain.items():
            assert optimized[path] == content, path
        load_model(tiny_model, tmp_path / "model" / "model.safetensors")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "transformers")
        assert loaded.model.vision_tower.route is None
        assert all(map(torch.equal, loaded.parameters(), tiny_model.parameters()))

    def test_a_copy_is_plain_and_apart(self, tower: MraVisionModel) -> None:
        optimize(tower)
        twin = copy.deepcopy(tower)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert twin.route is None
        assert look(tower, pictures(1)).abs().sum() > 0
        file = io.BytesIO()
        torch.save(tower, file)
        file.seek(0)
        assert torch.load(file, weights_only=False).route is None

    @pytest.mark.parametrize("assign", [False, True])
    def test_load_state_dict(self, tower: MraVisionModel, assign: bool) -> None:
        other = build_model(make_tiny_config(), seed=5).model.vision_tower
        optimize(tower)
        before = look(tower, pictures(1))
        tower.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        after = look(tower, pictures(1))
        assert relative_error(after, look(other, pictures(1))) < 1e-5
        assert relative_error(after, before) > 0.1

    @pytest.mark.parametrize("name", [*PACKED, "low.position_embedding", "high.stages.0.blocks.0.layer_scale"])
    @pytest.mark.parametrize("how", ["in place", "data", "parameter"])
    def test_one_parameter_changes(self, tower: MraVisionModel, name: str, how: str) -> None:
        optimize(tower)
        before = look(tower, pictures(1))
        owner, _, attribute = name.rpartition(".")
        module, parameter = tower.get_submodule(owner), tower.get_parameter(name)
        if how == "in place":
            with torch.no_grad():
                parameter.mul_(1.5)
        elif how == "data":
            parameter.data = 1.5 * parameter.data
        else:
            setattr(module, attribute, nn.Parameter(1.5 * parameter.detach()))
        after = look(tower, pictures(1))
        assert relative_error(after, plainly(tower, pictures(1))) < 1e-5
        assert relative_error(after, before) > 1e-5

    def test_another_position_embedding_never_gets_the_address_of_the_kept_one(self, tower: MraVisionModel) -> None:
        optimize(tower)
        look(tower, pictures(1))
        positions = tower.low.position_embedding
        address, version = positions.data_ptr(), positions._version
        positions.data = positions.detach().clone()
        tries = [torch.randn(positions.shape) for _ in range(100)]
        positions.data = next((found for found in tries if found.data_ptr() == address), tries[0])
        assert positions._version == version
        assert relative_error(look(tower, pictures(1)), plainly(tower, pictures(1))) < 1e-5

    def test_another_dtype(self, tower: MraVisionModel) -> None:
        optimize(tower)
        look(tower, pictures(1))
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            tower.to(dtype)
            found = look(tower, pictures(1))
            assert found.dtype == dtype
            assert relative_error(found, plainly(tower, pictures(1))) < 4 * ulp(dtype) ** 0.9

    def test_gradients_after_train(self, tower: MraVisionModel) -> None:
        plain = copy.deepcopy(tower).train()
        optimize(tower)
        look(tower, pictures(2))
        for mode in (True, False):
            for model in (tower, plain):
                model.train(mode).zero_grad()
                model(pictures(2)).last_hidden_state.square().sum().backward()
            for (name, parameter), other in zip(tower.named_parameters(), plain.parameters(), strict=True):
                assert torch.equal(parameter.grad, other.grad), name
        assert sorted(tower.route.report.plain.values()) == [1, 1]

    def test_training_steps_take_effect(self, tower: MraVisionModel) -> None:
        optimize(tower)
        before = look(tower, pictures(1))
        optimizer = torch.optim.AdamW(tower.train().parameters(), lr=1e-2)
        tower(pictures(1)).last_hidden_state.square().sum().backward()
        optimizer.step()
        after = look(tower.eval(), pictures(1))
        assert relative_error(after, plainly(tower, pictures(1))) < 1e-5
        assert relative_error(after, before) > 1e-3
