"""Decoding with transformers' static cache: golden tokens, batches, streams, pipelines, and the compiled step."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from checkpoints import DATA, GOLDEN, arch_of
from conftest import make_tiny_config
from golden_model import PROMPT_LENGTH, Golden, golden_pixels
from test_model_generate import STEPS, batch, generate, pictures, prompt
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CompileConfig,
    DynamicCache,
    LlavaForConditionalGeneration,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from mra_model import build_model, build_processor, decoding, fast_decode, fast_prefill, load_image, load_tokenizer
from mra_model.convert import convert
from mra_model.generation import chat_inputs

QUESTION = "What is this?"


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU passes for a device on which a static cache pays."""
    monkeypatch.setattr(decoding, "why_not", lambda model: None)


class Tokens(BaseStreamer):
    """Keeps what it is given, prompt included, and how often it was given something."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.reshape(-1).cpu())

    def end(self) -> None:
        self.ended = True


class Graphs:
    """A compiler that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

        # A function, because transformers deep-copies the config and would count elsewhere.
        def compile_graph(graph: torch.fx.GraphModule, inputs: list) -> Callable:
            self.count += 1
            return graph.forward

        # For `generate`: fail at a graph break, and compile on a CPU too.
        self.config = CompileConfig(backend=compile_graph, fullgraph=True, mode=None)
        self.config._compile_all_devices = True


class Checkpoint:
    """One golden checkpoint: the model, the authors' greedy tokens, and prompts of its vocabulary."""

    def __init__(self, name: str, folder: Path, device: str = "cpu") -> None:
        convert(DATA / name, folder, arch=arch_of(name))
        self.model = AutoModelForImageTextToText.from_pretrained(folder).to(device).eval()
        # Golden decoding goes on after an end of sequence.
        self.model.generation_config.eos_token_id = None
        config, golden = self.model.config, Golden(name)
        self.pixels = golden_pixels(config.vision_config.image_size).to(device)
        self.expected = golden.expected["generated"]
        ids = golden.expand("input_ids", config.image_token_index, config.image_seq_length)
        self.prompt = ids[0, : PROMPT_LENGTH - 1 + config.image_seq_length]
        self.picture = torch.full((config.image_seq_length,), config.image_token_index)

    def ragged(self) -> tuple[list[Tensor], Tensor]:
        """The golden prompt with one picture, another with two, and one of text only; and their pictures."""
        words = torch.arange(3, 12)
        two = torch.cat([words[:4], self.picture, words[4:6], self.picture, words[6:]])
        return [self.prompt, two, words], self.pixels[[0, 1, 0]]

    def generate(self, *prompts: Tensor, pixels: Tensor | None = None, **kwargs) -> Tensor:
        inputs = {name: value.to(self.model.device) for name, value in batch(*prompts).items()}
        if pixels is not None:
            inputs["pixel_values"] = pixels
        output = self.model.generate(**inputs, max_new_tokens=len(self.expected), do_sample=False, **kwargs)
        return output[:, inputs["input_ids"].shape[1] :].cpu()

    def alone(self) -> Tensor:
        """The ragged prompts one by one with the default cache."""
        (one, two, text), pixels = self.ragged()
        return torch.cat(
            [self.generate(one, pixels=pixels[:1]), self.generate(two, pixels=pixels[1:]), self.generate(text)]
        )


@pytest.fixture(scope="module", params=GOLDEN)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(request.param, tmp_path_factory.mktemp("converted") / request.param)


@pytest.fixture
def decoding_fast(checkpoint: Checkpoint, anywhere: None) -> Iterator[Checkpoint]:
    fast = fast_decode(checkpoint.model)
    yield checkpoint
    fast.undo()


class TestGolden:
    def test_one_prompt(self, decoding_fast: Checkpoint) -> None:
        golden = decoding_fast
        tokens = golden.generate(golden.prompt, pixels=golden.pixels[:1])
        assert tokens[0].tolist() == golden.expected.tolist()

    def test_ragged_prompts_padded_on_the_left(self, checkpoint: Checkpoint, anywhere: None) -> None:
        expected = checkpoint.alone()
        assert expected[0].tolist() == checkpoint.expected.tolist()
        fast = fast_decode(checkpoint.model)
        prompts, pixels = checkpoint.ragged()
        assert torch.equal(checkpoint.generate(*prompts, pixels=pixels), expected)
        fast.undo()

    def test_streaming(self, decoding_fast: Checkpoint) -> None:
        golden, streamer = decoding_fast, Tokens()
        golden.generate(golden.prompt, pixels=golden.pixels[:1], streamer=streamer)
        assert torch.cat(streamer.parts[1:]).tolist() == golden.expected.tolist()
        assert len(streamer.parts) == 1 + len(golden.expected)
        assert streamer.ended

    def test_kept_pictures_in_chunks(self, decoding_fast: Checkpoint) -> None:
        golden = decoding_fast
        expected = golden.alone()
        assert expected[0].tolist() == golden.expected.tolist()
        kept = fast_prefill(golden.model, cache_bytes=1 << 24, activation_bytes=0)
        prompts, pixels = golden.ragged()
        for _ in range(2):
            assert torch.equal(golden.generate(*prompts, pixels=pixels), expected)
        kept.undo()
        assert (kept.hits, kept.misses) == (4, 2)

    def test_the_compiled_step(self, checkpoint: Checkpoint) -> None:
        graphs = Graphs()
        tokens = checkpoint.generate(
            checkpoint.prompt,
            pixels=checkpoint.pixels[:1],
            cache_implementation="static",
            compile_config=graphs.config,
        )
        assert tokens[0].tolist() == checkpoint.expected.tolist()
        assert graphs.count == 1


class TestFastDecode:
    def test_generate_gets_a_static_cache_with_room(self, tiny_model, anywhere: None) -> None:
        fast = fast_decode(tiny_model)
        assert fast.reason is None
        output = tiny_model.generate(prompt(4)[None], max_new_tokens=3, return_dict_in_generate=True)
        assert isinstance(output.past_key_values, StaticCache)
        # One picture of 16 tokens and 1024 more would pass the model's positions.
        assert output.past_key_values.get_max_length() == 1024

    def test_a_call_may_choose_otherwise(self, tiny_model, anywhere: None) -> None:
        fast_decode(tiny_model, max_cache_len=64)
        options = {"max_new_tokens": 3, "return_dict_in_generate": True}
        output = tiny_model.generate(prompt(4)[None], cache_implementation="dynamic", **options)
        assert isinstance(output.past_key_values, DynamicCache)
        longer = tiny_model.generate(prompt(80)[None], **options)
        assert longer.past_key_values.get_max_length() == 80 + 3

    def test_a_call_with_a_cache_of_its_own(self, tiny_model, anywhere: None) -> None:
        expected = generate(tiny_model, prompt(6))
        fast_decode(tiny_model)
        cache = DynamicCache(config=tiny_model.config.get_text_config())
        assert torch.equal(generate(tiny_model, prompt(6), past_key_values=cache, cache_implementation=None), expected)
        assert cache.get_seq_length() == len(prompt(6)) + STEPS - 1

    def test_assisted_decoding(self, tiny_model, anywhere: None) -> None:
        expected = generate(tiny_model, prompt(4, 3), pixels=pictures(1))
        fast_decode(tiny_model)
        options = {"pixels": pictures(1), "prompt_lookup_num_tokens": 2}
        assert torch.equal(generate(tiny_model, prompt(4, 3), cache_implementation="dynamic", **options), expected)

    def test_undo_puts_back_what_was_there(self, tiny_model, anywhere: None) -> None:
        tiny_model.generation_config.cache_implementation = "offloaded"
        before = tiny_model.generation_config.to_dict()
        first = fast_decode(tiny_model)
        second = fast_decode(tiny_model, max_cache_len=7)
        assert tiny_model.generation_config.max_cache_len == 7
        second.undo()
        assert tiny_model.generation_config.max_cache_len == 1024
        for _ in range(2):
            first.undo()
        assert tiny_model.generation_config.to_dict() == before

    def test_saved_while_it_is_on_and_after_undo(self, tiny_model, anywhere: None, tmp_path: Path) -> None:
        expected = generate(tiny_model, prompt(4, 3), pixels=pictures(1))
        fast = fast_decode(tiny_model)
        for name, implementation in (("on", "static"), ("undone", None)):
            tiny_model.save_pretrained(tmp_path / name)
            again = LlavaForConditionalGeneration.from_pretrained(tmp_path / name)
            assert again.generation_config.cache_implementation == implementation
            assert torch.equal(generate(again, prompt(4, 3), pixels=pictures(1)), expected)
            fast.undo()

    def test_a_cpu_is_left_alone(self, tiny_model) -> None:
        before = tiny_model.generation_config.to_dict()
        fast = fast_decode(tiny_model)
        assert fast.reason is not None
        assert "cpu" in fast.reason
        fast.undo()
        assert tiny_model.generation_config.to_dict() == before

    def test_reasons(self) -> None:
        """Of models that are on a GPU as far as they say."""
        cuda = torch.device("cuda")
        assert decoding.why_not(SimpleNamespace(device=cuda)) is None
        assert decoding.why_not(SimpleNamespace(device=cuda, hf_device_map={"": 0})) is None
        parts = {"model": 0, "lm_head": "disk"}
        assert "disk" in decoding.why_not(SimpleNamespace(device=cuda, hf_device_map=parts))
        quantizer = SimpleNamespace(is_compileable=False)
        assert "compilation" in decoding.why_not(SimpleNamespace(device=cuda, hf_quantizer=quantizer))

    @pytest.mark.parametrize("length", [0, -1])
    def test_wrong_lengths_are_refused(self, tiny_model, length: int) -> None:
        with pytest.raises(ValueError, match=str(length)):
            fast_decode(tiny_model, max_cache_len=length)


class TestCompiled:
    """The step of one token as one graph, by a compiler that only counts."""

    def test_prompts_of_any_length_share_one_graph(self, tiny_model, anywhere: None) -> None:
        prompts = [prompt(4, 3), prompt(9), prompt(2, 2, 12)]
        shown = [pictures(1), None, pictures(2)]
        expected = [generate(tiny_model, *[ids], pixels=pixels) for ids, pixels in zip(prompts, shown, strict=True)]
        fast_decode(tiny_model, max_cache_len=128)
        graphs = Graphs()
        for ids, pixels, tokens in zip(prompts, shown, expected, strict=True):
            assert torch.equal(generate(tiny_model, ids, pixels=pixels, compile_config=graphs.config), tokens)
        assert graphs.count == 1

    def test_a_padded_batch(self, tiny_model, anywhere: None) -> None:
        prompts = [prompt(4, 3, 2, seed=1), prompt(6, 2, seed=2), prompt(9, seed=3)]
        expected = generate(tiny_model, *prompts, pixels=pictures(3))
        fast_decode(tiny_model, max_cache_len=128)
        graphs = Graphs()
        for _ in range(2):
            tokens = generate(tiny_model, *prompts, pixels=pictures(3), compile_config=graphs.config)
            assert torch.equal(tokens, expected)
        assert graphs.count == 1

    def test_the_prompt_is_not_compiled(self, tiny_model, anywhere: None) -> None:
        fast_decode(tiny_model)
        graphs = Graphs()
        options = {"min_new_tokens": 1, "max_new_tokens": 1, "compile_config": graphs.config}
        generate(tiny_model, prompt(4, 3), pixels=pictures(1), **options)
        assert graphs.count == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, saved with processor and tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    build_model(make_tiny_config()).save_pretrained(folder)
    build_processor(load_tokenizer(DATA / "llava_data"), 128, grid=4).save_pretrained(folder)
    return folder


class TestText:
    """Streams and pipelines of a model with a tokenizer, about two photos."""

    photos = tuple(str(DATA / "llava_data" / name) for name in ("chelsea.png", "rocket.jpg"))

    def messages(self, count: int = 2, question: str = QUESTION) -> list[dict]:
        content = [{"type": "image", "url": photo} for photo in self.photos[:count]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]

    def answer(self, folder: Path) -> str:
        """What plain `generate` says."""
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        inputs = chat_inputs(processor, QUESTION, [load_image(photo) for photo in self.photos])
        output = model.generate(**inputs, min_new_tokens=STEPS, max_new_tokens=STEPS)
        return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def test_streamers(self, folder: Path, anywhere: None, capsys: pytest.CaptureFixture[str]) -> None:
        expected = self.answer(folder)
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        fast_decode(model)
        inputs = chat_inputs(processor, QUESTION, [load_image(photo) for photo in self.photos])
        options = {"min_new_tokens": STEPS, "max_new_tokens": STEPS}
        capsys.readouterr()
        printing = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**inputs, **options, streamer=printing)
        assert capsys.readouterr().out.removesuffix("\n") == expected
        pieces = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
        thread = Thread(target=model.generate, kwargs=inputs | options | {"streamer": pieces})
        thread.start()
        parts = list(pieces)
        thread.join()
        assert "".join(parts) == expected
        assert len(parts) > 2

    def test_pipeline(self, folder: Path, anywhere: None) -> None:
        ask = pipeline("image-text-to-text", model=folder)
        options = {"min_new_tokens": STEPS, "max_new_tokens": STEPS}
        expected = ask(text=self.messages(), generate_kwargs=dict(options), return_full_text=False)
        assert expected[0]["generated_text"].strip() == self.answer(folder).strip()
        fast_decode(ask.model)
        ask = pipeline("image-text-to-text", model=ask.model, processor=ask.processor)
        streamer = Tokens()
        actual = ask(text=self.messages(), generate_kwargs=options | {"streamer": streamer}, return_full_text=False)
        assert actual == expected
        assert len(streamer.parts) == 1 + STEPS
        assert ask.model._previous_max_cache_length == 1024

    def test_pipeline_in_batches(self, folder: Path, anywhere: None) -> None:
        """Chats of unlike length and number of pictures, padded on the left by the processor."""
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        chats = [self.messages(), self.messages(1, "And this one, what may it be?"), self.messages(1)]
        options = {"generate_kwargs": {"min_new_tokens": STEPS, "max_new_tokens": STEPS}, "return_full_text": False}
        expected = pipeline("image-text-to-text", model=model, processor=processor)(text=chats, **options)
        fast_decode(model)
        ask = pipeline("image-text-to-text", model=model, processor=processor)
        actual = ask(text=chats, batch_size=3, **options)
        assert actual == expected
        assert model._previous_max_cache_length == 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_tokens_from_cuda_graphs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up, recording and replays: three answers, streamed and in a padded batch, are each the eager one."""
    # cuDNN takes TF32 for float32 by default, whose rounding could turn a token.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    golden = Checkpoint(name, tmp_path / name, "cuda")
    expected = golden.alone()
    assert expected[0].tolist() == golden.expected.tolist()
    # What earlier tests compiled would count against the limit of compilations, beyond which torch runs eagerly.
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert fast_decode(golden.model).reason is None
    prompts, pixels = golden.ragged()
    for _ in range(3):
        streamer = Tokens()
        tokens = golden.generate(golden.prompt, pixels=golden.pixels[:1], streamer=streamer)
        assert torch.equal(tokens, expected[:1])
        assert torch.equal(torch.cat(streamer.parts[1:]), expected[0])
        assert torch.equal(golden.generate(*prompts, pixels=pixels), expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
