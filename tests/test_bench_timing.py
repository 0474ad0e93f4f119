"""The benchmarks' timing on a pretended GPU and a pretended CPU, whose clocks move only when work is done."""

from functools import partial

import pytest
import torch

from bench import timing
from mra_model.environment import last_level_cache

CPU = torch.device("cpu")


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
        monkeypatch.setattr(timing, "_flusher", lambda device, tiny: partial(self.work, "flush", 1e-3))

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
        times = timing.kernel_times(calls, self.device)
        cold = fake.order[-6 * len(times["a"]["cold"].samples) :]
        assert set(cold[::2]) == {"flush"}
        assert cold[1:7:2] == ["a", "b", "c"]
        assert cold[7:13:2] == ["b", "c", "a"]
        warm = fake.order[: fake.order.index("flush")]
        assert warm[-6:] not in (["a", "b", "c"] * 2, ["a"] * 6)
        assert warm[-1] != warm[-2]

    def test_small_kernels_repeat_inside_a_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeGpu(monkeypatch)
        timing.kernel_times({"tiny": partial(fake.work, "tiny", 1e-6)}, self.device)
        before = fake.order.index("flush")
        assert before >= timing.MAX_REPEATS * timing.ROUNDS[0]

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


class FakeCpu:
    """A clock in place of a CPU's: calls advance it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        self.monkeypatch = monkeypatch

    def work(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.order.append(name)

    def flush_takes(self, seconds: float | None) -> None:
        flush = None if seconds is None else partial(self.work, "flush", seconds)
        self.monkeypatch.setattr(timing, "_flusher", lambda device, tiny: flush)


class TestCpu:
    def test_times_are_those_of_one_call_warm_and_cold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeCpu(monkeypatch)
        fake.flush_takes(1e-2)
        calls = {"fast": partial(fake.work, "fast", 5e-6), "slow": partial(fake.work, "slow", 2e-3)}
        times = timing.kernel_times(calls, CPU)
        for name, microseconds in (("fast", 5.0), ("slow", 2000.0)):
            assert set(times[name]) == {"warm", "cold"}
            for found in times[name].values():
                assert (found.p20, found.median, found.p80) == pytest.approx((microseconds,) * 3)
                assert timing.ROUNDS[0] <= len(found.samples) <= timing.ROUNDS[1]

    def test_variants_take_turns_and_cold_ones_follow_a_flush(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeCpu(monkeypatch)
        fake.flush_takes(1e-2)
        times = timing.kernel_times({name: partial(fake.work, name, 1e-3) for name in "abc"}, CPU)
        cold = fake.order[-6 * len(times["a"]["cold"].samples) :]
        assert set(cold[::2]) == {"flush"}
        turns = "".join(cold[1::2])
        assert {turns[i : i + 3] for i in range(0, len(turns), 3)} == {"abc", "bca", "cab"}

    def test_small_kernels_repeat_in_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeCpu(monkeypatch)
        fake.flush_takes(None)
        times = timing.kernel_times({"tiny": partial(fake.work, "tiny", 1e-6)}, CPU)
        assert len(fake.order) >= timing.MAX_REPEATS * timing.ROUNDS[1]
        assert times["tiny"]["warm"].median == pytest.approx(1.0)

    def test_without_the_size_of_the_cache_nothing_is_called_cold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "last_level_cache", lambda: None)
        assert set(timing.kernel_times({"a": lambda: None}, CPU)["a"]) == {"warm"}

    @pytest.mark.parametrize(("one", "rounds"), [(0.001, 50), (0.1, 20), (0.4, 7), (4.0, 5), (8.0, 3), (60.0, 3)])
    def test_long_calls_have_fewer_rounds(self, one: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeCpu(monkeypatch)
        times = timing.call_times({"a": partial(fake.work, "a", one)}, CPU, seconds=2.0)
        assert len(times["a"]["call"].samples) == rounds
        # One call to know how long it takes, where it takes long.
        assert one < timing.LONG or len(fake.order) == rounds + 1

    def test_once_is_one_round(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeCpu(monkeypatch)
        fake.flush_takes(1e-2)
        calls = {name: partial(fake.work, name, 1e-3) for name in "ab"}
        timing.kernel_times(calls, CPU, once=True)
        assert fake.order == ["a", "b", "flush", "a", "flush", "b"]
        timing.call_times(calls, CPU, once=True)
        assert fake.order[6:] == ["a", "b"]

    def test_a_flush_reads_four_times_the_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "last_level_cache", lambda: 1 << 20)
        flush = timing._flusher(CPU)
        assert flush is not None
        # Every element was written, or its pages would all be the same one.
        assert flush().item() == 1 << 20
        assert flush.__self__.nbytes == 4 << 20

    def test_this_machine_s_cache_is_of_a_plausible_size(self) -> None:
        size = last_level_cache()
        if size is None:
            pytest.skip("the system does not tell the size of its caches")
        assert 1 << 18 <= size <= 1 << 32
