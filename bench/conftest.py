"""pytest-benchmark for `pytest bench/`: where the baseline lies, and what a saved file tells of the machine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mra_model.environment import device_name

BASELINE = Path(__file__).parent / "baseline"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# pytest-benchmark's own default, which gives way to `BASELINE`.
_DEFAULT_STORAGE = "file://./.benchmarks"
_KEPT = ("machine", "python_implementation", "python_version", "system")
_KEPT_OF_CPU = ("arch", "brand_raw", "count")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Saves to the committed baseline's folder, and compares with it, unless another one was named."""
    if config.getoption("benchmark_storage", None) == _DEFAULT_STORAGE:
        config.option.benchmark_storage = BASELINE.as_uri()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keeps what times depend on, and nothing that names the host."""
    cpu = machine_info.get("cpu", {})
    kept = {name: machine_info[name] for name in _KEPT if name in machine_info}
    kept["cpu"] = {name: cpu[name] for name in _KEPT_OF_CPU if name in cpu}
    kept |= {"device": device_name(DEVICE), "torch": torch.__version__, "threads": torch.get_num_threads()}
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """The project's name rather than the folder's."""
    commit_info["project"] = "mra-kernels"
