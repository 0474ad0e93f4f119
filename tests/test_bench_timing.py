"""The benchmarks' timing on a pretended GPU, whose clock moves only when work is done."""

from functools import partial

import pytest
import torch

from bench import timing


class FakeGpu:
    """A clock in place of a GPU: events read it, calls advance it, a graph replays what was called inside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.recording: list | None = None
        self.order: list[str] = []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def elapsed_time(self, end: "Event") -> float:
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self) -> None:
                for call in self.calls:
                    call()

        class Capture:
            def __init__(self, graph: Graph) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                fake.recording = []

            def __exit__(self, *error: object) -> None:
                self.graph.calls, fake.recording = fake.recording, None

        class Stream:
            def wait_stream(self, other: object) -> None:
                """Nothing to wait for."""

            def __enter__(self) -> None:
                """Nothing to switch."""

            def __exit__(self, *error: object) -> None:
                """Nothing to switch."""

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": Capture,
            "Stream": Stream,
            "stream": lambda stream: stream,
            "current_stream": Stream,
            "synchronize": lambda device=None: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "_flusher", lambda device: partial(self.work, "flush", 1e-3))

    def work(self, name: str, seconds: float) -> str:
        call = partial(self._advance, name, seconds)
        if self.recording is None:
            call()
        else:
            self.recording.append(call)
        return name

    def _advance(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.order.append(name)


class TestTiming:
    device = torch.device("cuda")

    def test_times_are_those_of_one_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeGpu(monkeypatch)
        calls = {"fast": partial(fake.work, "fast", 5e-6), "slow": partial(fake.work, "slow", 2e-3)}
        times = timing.kernel_times(calls, self.device)
        for name, microseconds in (("fast", 5.0), ("slow", 2000.0)):
            for condition in ("warm", "cold"):
                found = times[name][condition]
                assert (found.p20, found.median, found.p80) == pytest.approx((microseconds,) * 3)
                assert len(found.samples) >= timing.ROUNDS[0]

    def test_variants_take_turns_and_cold_ones_follow_a_flush(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeGpu(monkeypatch)
        calls = {name: partial(fake.work, name, 1e-3) for name in "abc"}
        timing.kernel_times(calls, self.device)
        first = fake.order.index("flush")
        cold = fake.order[first:]
        assert set(cold[::2]) == {"flush"}
        assert cold[1:7:2] == ["a", "b", "c"]
        assert cold[7:13:2] == ["b", "c", "a"]
        warm = fake.order[:first]
        assert warm[-6:] not in (["a", "b", "c"] * 2, ["a"] * 6)
        assert warm[-1] != warm[-2]

    def test_small_kernels_repeat_inside_a_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeGpu(monkeypatch)
        timing.kernel_times({"tiny": partial(fake.work, "tiny", 1e-6)}, self.device)
        before = fake.order.index("flush")
        rounds = fake.order.count("flush")
        assert before >= timing.MAX_REPEATS * rounds

    def test_calls_are_timed_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeGpu(monkeypatch)
        times = timing.call_times({"a": partial(fake.work, "a", 3e-3)}, self.device)
        assert times["a"]["call"].median == pytest.approx(3000.0)

    def test_a_replayed_call_is_captured_once_and_returns_its_outputs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeGpu(monkeypatch)
        replay = timing.replayed(partial(fake.work, "a", 1e-3))
        assert fake.order == []
        assert [replay(), replay()] == ["a", "a"]
        assert fake.order == ["a"] * 5

    def test_percentiles(self) -> None:
        times = timing.summarize([float(n) for n in range(101)])
        assert (times.p20, times.median, times.p80) == (20.0, 50.0, 80.0)
