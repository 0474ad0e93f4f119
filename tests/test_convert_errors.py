"""Conversions that must fail: with a message that names the file, the value and the remedy, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    DATA,
    GOLDEN,
    Tensors,
    add_tokenizer,
    read_checkpoint,
    store_bin,
    store_bin_shards,
    store_safetensors_shards,
    with_vocabulary,
    write_checkpoint,
)
from refusals import ARCH, refuse, source, source_of_tensors

from mra_model.convert import convert, keys


class TestSource:
    """What is no original checkpoint."""

    def test_absent(self, tmp_path: Path) -> None:
        refuse("source does not exist", tmp_path / "source")

    def test_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        refuse(r"source holds no weights: expected one of model\.safetensors", tmp_path / "source")

    def test_no_config(self, tmp_path: Path) -> None:
        (source(tmp_path) / "config.json").unlink()
        refuse(r"config\.json does not exist", tmp_path / "source")

    @pytest.mark.parametrize(
        ("text", "says"),
        [("{", "not readable as JSON"), ("[1]", "holds a list"), ("[" * 100000, "JSON")],
        ids=["cut", "list", "deep"],
    )
    def test_broken_config(self, text: str, says: str, tmp_path: Path) -> None:
        (source(tmp_path) / "config.json").write_text(text)
        refuse(rf"config\.json.*{says}", tmp_path / "source")

    def test_already_converted(self, tmp_path: Path) -> None:
        convert(DATA / GOLDEN[0], tmp_path / "source", arch=ARCH)
        refuse("in the transformers format already", tmp_path / "source")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"vision_config": {"model_type": "clip_vision_model"}}, "no original LLaVA-HR config .*nested"),
            ({"is_multipath_encoder": False}, "one tower"),
            ({"lavin_enable": True}, "LaVIN"),
            ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; only 'mlp2x_gelu'"),
            ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
            ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad'"),
            ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ],
    )
    def test_another_model(self, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
        refuse(rf"config\.json.*{says}", source(tmp_path, **changes))

    def test_a_plain_language_model(self, tmp_path: Path) -> None:
        config, tensors = read_checkpoint(GOLDEN[0])
        del config["mm_vision_tower"]
        refuse("no mm_vision_tower", write_checkpoint(tmp_path / "source", config | {"model_type": "llama"}, tensors))

    @pytest.mark.parametrize("option", ["llm", "clip", "convnext"])
    def test_options_without_effect(self, option: str, tmp_path: Path) -> None:
        refuse(f"--{option} would have no effect", source(tmp_path), **{option: tmp_path})

    def test_unknown_dtype(self, tmp_path: Path) -> None:
        refuse("dtype is 'int4'; choose from float32, bfloat16, float16", source(tmp_path), dtype="int4")


class TestSizes:
    """Configs that do not fit their weights, or no model at all."""

    @pytest.mark.parametrize("field", ["mm_vision_tower", "vision_tower_slow"])
    @pytest.mark.parametrize("name", ["google/siglip-so400m", None])
    def test_unknown_tower(self, field: str, name: str | None, tmp_path: Path) -> None:
        refuse(rf"config\.json: {field} is {name!r}.*--arch", source(tmp_path, **{field: name}), arch=None)

    def test_sizes_of_the_tower_names_without_arch(self, tmp_path: Path) -> None:
        refuse(
            r"CLIP's hidden_size by the config or the tower names: 1024, by the weights: 32.*--arch",
            source(tmp_path),
            arch=None,
        )

    @pytest.mark.parametrize(
        ("side", "says"),
        [
            (400, "nearest valid sides are 384 and 768"),
            (1000, "nearest valid sides are 992 and 1024"),
            (-32, "nearest valid sides are 32"),
            ("1024", "input_image_size is '1024'"),
            (None, "input_image_size is None"),
        ],
    )
    def test_invalid_side(self, side: object, says: str, tmp_path: Path) -> None:
        refuse(rf"config\.json: .*{says}", source(tmp_path, input_image_size=side))

    @pytest.mark.parametrize(
        ("field", "value", "says"),
        [
            ("num_hidden_layers", 10**9, "num_hidden_layers .* 1000000000, by the weights: 2"),
            ("hidden_size", 10**12, "hidden_size .* 1000000000000, by the weights: 48"),
            ("intermediate_size", 2**62, "intermediate_size .* by the weights: 96"),
            ("vocab_size", 10**15, "vocab_size .* by the weights: 128"),
            ("num_hidden_layers", "many", "num_hidden_layers"),
            ("num_attention_heads", 5, "5"),
            ("num_key_value_heads", 2, "k_proj.weight has shape .48, 48., .* .24, 48."),
            ("head_dim", 2**60, "overflow|head_dim|invalid|shape"),
            ("hidden_act", "no such function", "no such function"),
        ],
    )
    def test_language_model(self, field: str, value: object, says: str, tmp_path: Path) -> None:
        """Sizes that no machine could hold are refused before anything is built."""
        refuse(says, source(tmp_path, **{field: value}))

    @pytest.mark.parametrize(
        ("section", "field", "value", "says"),
        [
            ("vision", "num_hidden_layers", 8, "CLIP's num_hidden_layers .* 8, by the weights: 4"),
            ("vision", "num_hidden_layers", 10**9, "CLIP's num_hidden_layers .* by the weights: 4"),
            ("vision", "hidden_size", "wide", "hidden_size"),
            ("vision", "num_attention_heads", 5, "5"),
            ("vision", "image_size", 224, "image_size 224 and patch_size 14; LLaVA-HR uses one of 336 and 14"),
            ("convnext", "depths", [1, 2, 10**9, 1], "depths .* by the weights: .1, 2, 1, 1."),
            ("convnext", "dims", [16, 24, 32, 41], "dims .* by the weights: .16, 24, 32, 40."),
            ("convnext", "dims", ["a", "b", "c", "d"], "dims|hidden_sizes"),
            ("convnext", "dims", 40, r"convnext\.dims is 40"),
            ("convnext", "depths", None, r"convnext\.depths is None"),
            ("convnext", "norm_eps", "tiny", "layer_norm_eps"),
            ("vision", "layer_norm_eps", "tiny", "layer_norm_eps"),
            ("vision", "hidden_act", "no such function", "no such function"),
        ],
    )
    def test_arch(self, section: str, field: str, value: object, says: str, tmp_path: Path) -> None:
        arch = json.loads(ARCH.read_text())
        arch[section][field] = value
        (tmp_path / "arch.json").write_text(json.dumps(arch))
        refuse(says, source(tmp_path), arch=tmp_path / "arch.json")

    @pytest.mark.parametrize("section", ["vision", "convnext"])
    def test_arch_without_a_section(self, section: str, tmp_path: Path) -> None:
        arch = json.loads(ARCH.read_text())
        del arch[section]
        (tmp_path / "arch.json").write_text(json.dumps(arch))
        refuse(rf"arch\.json has no '{section}' object", source(tmp_path), arch=tmp_path / "arch.json")


class TestWeights:
    """Files that are damaged, hostile or incomplete."""

    @pytest.mark.parametrize("kept", [0, 4, 5000, -1])
    def test_truncated_safetensors(self, kept: int, tmp_path: Path) -> None:
        file = source(tmp_path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        refuse(r"model\.safetensors is no readable safetensors file .*download it again", tmp_path / "source")

    @pytest.mark.parametrize("kept", [0, 4, 5000, -1])
    def test_truncated_bin(self, kept: int, tmp_path: Path) -> None:
        file = source(tmp_path, store_bin) / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:kept])
        refuse(r"pytorch_model\.bin is no readable file of tensors .*truncated", tmp_path / "source")

    @pytest.mark.parametrize("old", [False, True])
    def test_pickle_with_code(self, old: bool, tmp_path: Path) -> None:
        file = source(tmp_path, store_bin) / "pytorch_model.bin"
        torch.save({"a": Touch(str(tmp_path / "ran"))}, file, _use_new_zipfile_serialization=not old)
        refuse("code, which is never run", tmp_path / "source")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ([1, 2], "holds a list"),
            ({}, "no tensors"),
            ({"a": torch.ones(2), "epoch": 3}, "no tensors: epoch"),
            ({"a": torch.ones(1).expand(10**6, 10**6)}, "claims shape"),
            ({"a": torch.eye(3).to_sparse()}, "plain, unquantized"),
        ],
    )
    def test_bin_of_something_else(self, content: object, says: str, tmp_path: Path) -> None:
        torch.save(content, source(tmp_path, store_bin) / "pytorch_model.bin")
        refuse(rf"pytorch_model\.bin.*{says}", tmp_path / "source")

    @pytest.mark.parametrize("store", [store_safetensors_shards, store_bin_shards])
    def test_missing_shard(self, store: Callable[[Path, Tensors], None], tmp_path: Path) -> None:
        next(source(tmp_path, store).glob("*model-2-of-3.*")).unlink()
        refuse(r"lacks 1 shard\(s\): .*model-2-of-3", tmp_path / "source")

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ""])
    def test_shard_outside_the_folder(self, name: str, tmp_path: Path) -> None:
        folder = source(tmp_path, store_safetensors_shards)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        refuse("names files outside its folder", folder)

    @pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {"lm_head.weight": 3}}])
    def test_broken_index(self, index: object, tmp_path: Path) -> None:
        folder = source(tmp_path, store_safetensors_shards)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refuse("has no weight_map", folder)

    def test_index_lists_more_than_the_shards_hold(self, tmp_path: Path) -> None:
        index = source(tmp_path, store_safetensors_shards) / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["lost.weight"] = "model-1-of-3.safetensors"
        index.write_text(json.dumps(content))
        refuse("keys that no shard holds: lost.weight", tmp_path / "source")

    @pytest.mark.parametrize(
        "key",
        [
            keys.EMBEDDING,
            keys.LM_HEAD,
            "model.layers.1.self_attn.o_proj.weight",
            keys.LOW + "pre_layrnorm.bias",
            keys.HIGH + "stages.1.downsample.1.weight",
            keys.ADAPTERS + "2.gate.0.bias",
            keys.MERGE + "0.slow_proj.weight",
            "model.mm_projector.2.bias",
        ],
    )
    def test_missing_tensor(self, key: str, tmp_path: Path) -> None:
        refuse(f"lack.*{key}", source_of_tensors(tmp_path, lambda tensors: tensors.pop(key)))

    @pytest.mark.parametrize(
        "key",
        ["model.image_newline", "model.layers.0.adapter.weight", keys.ADAPTERS + "3.gate.0.bias", "model.layers.x.y"],
    )
    def test_unknown_tensor(self, key: str, tmp_path: Path) -> None:
        refuse(
            f"1 keys are not a part of LLaVA-HR: {key}",
            source_of_tensors(tmp_path, lambda tensors: tensors.update({key: torch.ones(2, 2)})),
        )

    @pytest.mark.parametrize(
        ("key", "shape"),
        [
            ("model.mm_projector.0.weight", (48, 31)),
            (keys.ADAPTERS + "0.slow_conv.weight", (40, 40, 3, 3)),
            (keys.HIGH + "stages.1.downsample.1.weight", (24, 16)),
            (keys.POSITIONS, (576, 32)),
            (keys.LM_HEAD, (129, 48)),
            (keys.EMBEDDING, (128,)),
        ],
    )
    def test_wrong_shape(self, key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
        folder = source_of_tensors(tmp_path, lambda tensors: tensors.update({key: torch.ones(shape)}))
        refuse(f"{key} has shape .*{shape[0]}", folder)

    def test_quantized_weights(self, tmp_path: Path) -> None:
        key = "model.layers.0.mlp.up_proj.weight"
        folder = source_of_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
        refuse(f"{key} is no floating-point tensor", folder)

    def test_values_too_large_for_float16(self, tmp_path: Path) -> None:
        folder = source_of_tensors(tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
        refuse(r"language_model\.norm\.weight has values too large for float16; use --dtype", folder, dtype="float16")


class Touch:
    """Pickles to code that makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.path, "w")


class TestTokenizer:
    """Tokenizers that cannot be used."""

    def test_of_another_vocabulary(self, tmp_path: Path) -> None:
        tokenizer = add_tokenizer(tmp_path / "tokenizer")
        refuse("has 640 tokens, but the weights have rows for 128", source(tmp_path), tokenizer=tokenizer)

    def test_absent(self, tmp_path: Path) -> None:
        refuse("has neither tokenizer.json nor tokenizer.model", source(tmp_path), tokenizer=tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100], ids=["empty", "object", "bytes"])
    def test_damaged(self, name: str, content: bytes, tmp_path: Path) -> None:
        config, tensors = with_vocabulary(*read_checkpoint(GOLDEN[0]), 640)
        folder = write_checkpoint(tmp_path / "source", config, tensors)
        (folder / name).write_bytes(content)
        # An empty tokenizer.model is a valid one, without tokens.
        refuse("source: the tokenizer is not readable|source: the tokenizer has 3 tokens", folder)
