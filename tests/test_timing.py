"""Times of a model's parts and of an answer's tokens."""

import time

import torch
from torch import nn

from mra_model import timing
from mra_model.compare import measure


def test_the_clock_counts_no_pause() -> None:
    clock = measure._Clock(lambda: time.sleep(0.2))
    for token in range(4):
        clock.put(torch.tensor([token]))
    assert len(clock.moments) == 3
    assert clock.moments == sorted(clock.moments)
    assert clock.moments[-1] - clock.moments[0] < 0.1


def test_timed_parts_add_repeated_calls_and_start_again() -> None:
    layer = nn.Linear(4, 4)
    with timing.timed_parts({"layer": [layer], "other": [nn.Linear(4, 4)]}, torch.device("cpu")) as take:
        assert take() == {"layer": 0, "other": 0}
        layer(torch.ones(1, 4))
        once = take()
        assert once["layer"] > 0
        assert once["other"] == 0
        assert take()["layer"] == 0


def test_spread() -> None:
    assert timing.spread([3.0]) == timing.Spread(3.0, 3.0, 3.0)
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == timing.Spread(3.5, 2.0, 5.0)
