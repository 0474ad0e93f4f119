"""`optimize` on a GPU, with CUDA graphs and two streams: right, never stale, and results that stay."""

import copy

import pytest
import torch
from conftest import make_tiny_config
from test_optimize import look, pictures, plainly
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mra_kernels.testing import relative_error, ulp
from mra_model import MraVisionModel, build_model, optimize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_tower(dtype: torch.dtype = torch.float32, seed: int = 0) -> MraVisionModel:
    """Two layers a quarter, so that there are sums and norms on both sides of a layer's end."""
    config = make_tiny_config()
    config.vision_config.low_config.num_hidden_layers = 8
    return build_model(config, dtype=dtype, device="cuda", seed=seed).model.vision_tower


def photos(count: int, side: int = 160, seed: int = 0) -> Tensor:
    """[count, 3, side, side] on the GPU."""
    return pictures(count, side, seed).cuda()


def assert_plain(tower: MraVisionModel, pixels: Tensor, found: Tensor) -> None:
    """As close to float64 as the plain forward, which rounds otherwise."""
    exact = plainly(copy.deepcopy(tower).double(), pixels if pixels.dtype == torch.uint8 else pixels.double())
    own = relative_error(plainly(tower, pixels), exact)
    assert relative_error(found, exact) < 2 * own + 2 * ulp(found.dtype)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 would make PyTorch's own float32 results a thousand times worse."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [128, 160, 256])
def test_same_results_by_one_graph(dtype: torch.dtype, side: int) -> None:
    tower = make_tower(dtype)
    report = optimize(tower)
    for seed in range(3):
        assert_plain(tower, photos(2, side, seed), look(tower, photos(2, side, seed)))
    assert (len(report.graphs), report.ungraphed.total(), report.plain.total()) == (1, 0, 0)


def test_one_launch() -> None:
    tower, pixels = make_tower(), photos(1)
    optimize(tower)
    look(tower, pixels)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        look(tower, pixels)
        torch.cuda.synchronize()
    launches = [event for event in trace.events() if event.device_type == DeviceType.CPU and "Launch" in event.name]
    assert sum("GraphLaunch" in event.name for event in launches) == 1
    # Beside it the pixels' copy in, and the features' out.
    assert len(launches) <= 3


def test_a_later_call_leaves_earlier_features_alone() -> None:
    tower = make_tower()
    optimize(tower)
    first = look(tower, photos(1))
    kept = first.clone()
    for seed in range(1, 4):
        look(tower, photos(1, seed=seed))
    assert torch.equal(first, kept)


def test_sizes_batches_and_bytes_have_their_own_graphs() -> None:
    """They share memory for what is between input and output."""
    tower = make_tower(torch.bfloat16)
    report = optimize(tower, max_graphs=3)
    raw = (255 * torch.rand(1, 3, 160, 160, device="cuda")).to(torch.uint8)
    every = [photos(1), photos(2), photos(1, 128), raw]
    for pixels in every + every[::-1] + every:
        assert_plain(tower, pixels, look(tower, pixels))
        assert len(report.graphs) <= 3
    assert report.ungraphed.total() == 0


@pytest.mark.parametrize("change", ["load", "assign", "dtype", "positions", "training step", "device"])
def test_no_stale_graph(change: str) -> None:
    tower = make_tower()
    optimize(tower)
    before = look(tower, photos(1))
    if change in ("load", "assign"):
        tower.load_state_dict(make_tower(seed=5).state_dict(), assign=change == "assign")
    elif change == "dtype":
        tower.half().double()
    elif change == "positions":
        with torch.no_grad():
            tower.low.position_embedding.mul_(2)
    elif change == "device":
        tower.cpu()
        look(tower, pictures(1))
        tower.cuda()
    else:
        optimizer = torch.optim.AdamW(tower.train().parameters(), lr=1e-2)
        tower(photos(1)).last_hidden_state.square().sum().backward()
        optimizer.step()
        tower.eval()
    after = look(tower, photos(1))
    assert_plain(tower, photos(1), after)
    if change not in ("dtype", "device"):
        assert relative_error(after, before) > 1e-4


def test_pixels_that_arrive_late_on_other_streams() -> None:
    """Work that does not wait for them on the caller's stream, or for the last turn, computes with NaN."""
    tower = make_tower()
    optimize(tower)
    expected = [look(tower, photos(1, seed=seed)) for seed in range(4)]
    late = [torch.full_like(photos(1), float("nan")) for _ in expected]
    sources = [photos(1, seed=seed) for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for index, (pixels, source) in enumerate(zip(late, sources, strict=True)):
        with torch.cuda.stream(streams[index % 2]):
            torch.cuda._sleep(20_000_000)
            pixels.copy_(source)
            found.append(look(tower, pixels))
    torch.cuda.synchronize()
    for actual, e in zip(found, expected, strict=True):
        assert torch.equal(actual, e)


def test_100_repeats_are_bitwise_equal() -> None:
    """A missing join of the two streams would show as a race."""
    tower = make_tower(torch.bfloat16)
    optimize(tower)
    first = look(tower, photos(2))
    assert all(torch.equal(look(tower, photos(2)), first) for _ in range(100))


def test_inference_mode_and_back() -> None:
    tower = make_tower()
    report = optimize(tower)
    with torch.inference_mode():
        inside = tower(photos(1)).last_hidden_state
    assert torch.equal(look(tower, photos(1)), inside)
    assert len(report.graphs) == 1
    tower(photos(1)).last_hidden_state.sum().backward()


def test_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    tower, pixels = make_tower().to("cuda:1"), photos(1).to("cuda:1")
    with torch.cuda.device(0):
        report = optimize(tower)
        found = look(tower, pixels)
    assert_plain(tower, pixels, found)
    assert len(report.graphs) == 1


def test_train_and_undo_free_graphs() -> None:
    tower, pixels = make_tower(torch.bfloat16), photos(4, 256)
    report = optimize(tower)

    def allocated(training: bool) -> int:
        look(tower.train(training), pixels)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    # The first capture also allocates the libraries' workspaces, which stay.
    allocated(training=False)
    freed = allocated(training=True)
    assert allocated(training=False) > freed
    assert allocated(training=True) <= freed
    assert allocated(training=False) > freed
    report.undo()
    assert allocated(training=False) <= freed + 512 * len(list(tower.parameters()))
