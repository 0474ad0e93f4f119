"""`optimize` leaves alone what it cannot take over: hooks, LoRA, ties, shards, other layers; and says why."""

import pytest
import torch
import torch.distributed as distributed
from test_optimize import look, pictures, plainly
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlavaForConditionalGeneration

import mra_kernels
from mra_kernels.testing import relative_error
from mra_model import MraVisionModel, optimize

# A hook on it leaves this part alone.
HOOKED = {
    "low.layers.2.mlp.fc1": "ViT layer 2",
    "low.layers.2": None,
    "adapters.0": "MR-Adapters",
    "high.stem": None,
    "merge": None,
}


class OtherLayer(nn.Module):
    """A layer around a layer, which knows nothing of routes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.layer(hidden_states, attention_mask)


class TestLeftAlone:
    """What does not apply keeps the plain computation of its part, with the reason."""

    def test_lora(self, tiny_model: LlavaForConditionalGeneration) -> None:
        peft = pytest.importorskip("peft")
        report = optimize(tiny_model)
        config = peft.LoraConfig(target_modules=r".*vision_tower\.low\.layers\.1\.self_attn\.q_proj", r=2)
        model = peft.get_peft_model(tiny_model, config).eval()
        tower = tiny_model.model.vision_tower
        nn.init.normal_(tower.low.layers[1].self_attn.q_proj.lora_B["default"].weight)
        expected = plainly(tower, pictures(1))
        assert relative_error(look(tower, pictures(1)), expected) < 1e-5
        assert "q_proj is peft" in report.left["ViT layer 1"]
        assert "3 of 4" in report.faster["ViT"]
        model.merge_and_unload()
        assert relative_error(look(tower, pictures(1)), expected) < 1e-5
        assert "ViT layer 1" not in report.left

    @pytest.mark.parametrize("name", HOOKED)
    def test_hooks_run(self, tower: MraVisionModel, name: str) -> None:
        report = optimize(tower)
        look(tower, pictures(1))
        calls = []
        handle = tower.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
        look(tower, pictures(1))
        assert calls == [1]
        assert list(report.left) == ([HOOKED[name]] if HOOKED[name] else [])
        handle.remove()
        look(tower, pictures(1))
        assert not report.left

    def test_a_hook_that_changes_what_an_adapter_reads(self, tower: MraVisionModel) -> None:
        optimize(tower)
        tower.adapters[0].register_forward_pre_hook(lambda _, inputs: (inputs[0], 2 * inputs[1]))
        assert relative_error(look(tower, pictures(1)), plainly(tower, pictures(1))) < 1e-5

    def test_another_layer(self, tower: MraVisionModel) -> None:
        report = optimize(tower)
        tower.low.layers[1] = OtherLayer(tower.low.layers[1])
        assert relative_error(look(tower, pictures(1)), plainly(tower, pictures(1))) < 1e-5
        assert report.left["ViT layer 1"].endswith("OtherLayer, not MraEncoderLayer")

    @pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj"])
    def test_tied(self, tower: MraVisionModel, name: str) -> None:
        """With another layer's query, or within a layer."""
        tower.low.layers[2].get_submodule(name).weight = tower.low.layers[
            2 if "k" in name else 0
        ].self_attn.q_proj.weight
        report = optimize(tower)
        look(tower, pictures(1))
        with torch.no_grad():
            tower.low.layers[2].self_attn.q_proj.weight.mul_(1.5)
        assert relative_error(look(tower, pictures(1)), plainly(tower, pictures(1))) < 1e-5
        assert "shares a parameter" in next(iter(report.left.values()))

    def test_one_adapter_in_another_dtype(self, tower: MraVisionModel) -> None:
        tower.adapters[1].double()
        report = optimize(tower)
        assert tower.adapters[0].high_conv_weight.dtype == torch.float32
        assert "differ in dtype" in report.left["MR-Adapters"]

    def test_sharded(self, tiny_model: LlavaForConditionalGeneration) -> None:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            fully_shard(tiny_model, mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(ValueError, match="sharded by FSDP"):
                optimize(tiny_model)
        finally:
            distributed.destroy_process_group()

    def test_parametrized(self, tower: MraVisionModel) -> None:
        nn.utils.parametrizations.weight_norm(tower.low.layers[0].self_attn.k_proj)
        report = optimize(tower)
        assert relative_error(look(tower, pictures(1)), plainly(tower, pictures(1))) < 1e-5
        assert "k_proj is torch.nn.utils.parametrize.ParametrizedLinear" in report.left["ViT layer 0"]

    def test_reference_autocast_and_compile(self, tower: MraVisionModel) -> None:
        plain = look(tower, pictures(1))
        report = optimize(tower)
        with mra_kernels.use_backend("reference"):
            assert relative_error(look(tower, pictures(1)), plain) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            look(tower, pictures(1))
        assert [why.split()[0] for why in report.plain] == ["the", "autocast"]
        compiled = torch.compile(tower, backend="eager", fullgraph=True)
        assert relative_error(look(compiled, pictures(1)), plain) < 1e-5
        assert report.plain.total() == 2
        assert not report.ungraphed

    def test_no_picture_and_bad_pixels(self, tower: MraVisionModel) -> None:
        """What the plain forward refuses is refused in the same words."""
        with pytest.raises(RuntimeError) as plain:
            look(tower, pictures(0))
        report = optimize(tower)
        with pytest.raises(RuntimeError) as found:
            look(tower, pictures(0))
        assert str(found.value) == str(plain.value)
        assert list(report.plain) == ["there is no picture"]
        with pytest.raises(ValueError, match="nearest valid"):
            look(tower, pictures(1, 100))
