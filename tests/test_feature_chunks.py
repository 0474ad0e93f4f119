"""`fast_prefill` in chunks: as many pictures pass the tower at once as fit, and the bound is one."""

import pytest
import torch
import torch.nn.functional as F
from test_features import PLENTY, Tower, features, plain
from test_model_generate import generate, pictures, prompt
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel

from mra_kernels.testing import relative_error
from mra_model import fast_prefill, preset_config
from mra_model.features import activation_bytes_per_picture


class Live(TorchDispatchMode):
    """The most bytes that were alive at once of tensors other than the known ones."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {StorageWeakRef(tensor.untyped_storage()) for tensor in known}
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            if StorageWeakRef(storage) not in self.known:
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        self.most = max(self.most, sum(self.sizes.values()))
        return output


class TestChunks:
    @pytest.mark.parametrize(("fit", "expected"), [(0, [1] * 5), (1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
    def test_as_many_pictures_as_fit(self, tiny_model, fit: int, expected: list[int]) -> None:
        each = activation_bytes_per_picture(tiny_model.config.vision_config, 128, torch.float32)
        tokens = generate(tiny_model, prompt(*[2] * 6), pixels=pictures(5))
        fast_prefill(tiny_model, activation_bytes=fit * each)
        tower = Tower(tiny_model)
        assert relative_error(features(tiny_model, pictures(5)), plain(tiny_model, pictures(5))) < 1e-6
        assert tower.batches == [*expected, 5]
        assert torch.equal(generate(tiny_model, prompt(*[2] * 6), pixels=pictures(5)), tokens)

    def test_with_kept_pictures(self, tiny_model) -> None:
        fast_prefill(tiny_model, cache_bytes=PLENTY, activation_bytes=0)
        tower = Tower(tiny_model)
        features(tiny_model, pictures(2))
        assert relative_error(features(tiny_model, pictures(4)), plain(tiny_model, pictures(4))) < 1e-6
        assert tower.batches == [1, 1, 1, 1, 4]

    @pytest.mark.parametrize("side", [384, 1024])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_bound_is_one(self, side: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counted on the meta device, where attention would make the matrix that no kernel for it makes."""
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
        config = preset_config("llava-hr-7b", side).vision_config
        with torch.device("meta"):
            tower = AutoModel.from_config(config, dtype=dtype).eval()
            pixels = torch.empty(2, 3, side, side)
        with torch.no_grad(), Live([pixels, *tower.parameters()]) as live:
            tower(pixels)
        bound = 2 * activation_bytes_per_picture(config, side, dtype)
        assert 0.8 * bound < live.most <= bound
