"""The machine and what is installed on it; read only. `mra doctor` shows it, and every file of results carries it."""

import ctypes
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("mra-kernels", "torch", "triton", "transformers", "safetensors", "numpy", "pillow")

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# What matters to kernels, of the many flags that a processor has.
_INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "asimd", "bf16", "sve", "i8mm"),
)
_BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})

# Of the process's own control group, as a container sees it.
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

# How sysfs writes the size of a cache.
_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` or `"bf16"` -> `torch.bfloat16`.

    Raises:
        ValueError: no such dtype.
    """
    full = _SHORT_NAMES.get(name, name)
    if full not in DTYPES:
        raise ValueError(f"no dtype is called {name!r}; choose from {', '.join([*DTYPES, *_SHORT_NAMES])}")
    return DTYPES[full]


def parse_device(name: str) -> torch.device:
    """`"auto"` (a GPU where there is one, otherwise the CPU), `"cpu"`, `"cuda"` or `"cuda:1"` -> a device.

    Raises:
        ValueError: no such device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise ValueError(f"no device is called {name!r}; choose auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    problem = gpu_problem()
    if problem is not None:
        raise ValueError(f"device {name} was asked for, but {problem}; use --device cpu")
    if int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} was asked for, but there are {torch.cuda.device_count()} GPUs, from cuda:0 on")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed, for the rest of the process; whether it did.

    By default it hands large tensors back to the system, and the next ones fault their pages in again: 150,000 faults
    in one stage of ConvNeXt-L at 1024, more or fewer as the heap happens to lie, and half a second with them.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    largest = 2**31 - 1
    return bool(library.mallopt(_M_MMAP_THRESHOLD, 2**30) and library.mallopt(_M_TRIM_THRESHOLD, largest))


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and on a CPU with instructions for it, otherwise float32."""
    if device.type == "cuda" or _BF16_INSTRUCTIONS & set(instruction_sets()):
        return torch.bfloat16
    return torch.float32


def gpu_problem() -> str | None:
    """None where PyTorch sees a GPU, otherwise why it does not."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch sees no NVIDIA GPU"


def versions() -> dict[str, str | None]:
    """Version of Python, of each of `PACKAGES`, and of CUDA and cuDNN as torch has them; None for what is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: _package_version(name) for name in PACKAGES}
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return found | {"cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}


def hardware() -> dict[str, Any]:
    """Processor, memory and GPUs."""
    return {
        "system": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_sets": instruction_sets(),
        },
        "gpus": gpus(),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability, memory in bytes and driver of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "driver": driver,
            }
        )
    return found


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the processor's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name as it gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """The processor's vector instruction sets that matter to kernels; empty where the system does not tell."""
    # x86 calls them flags, Arm features.
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return [name for name in _INSTRUCTION_SETS if name in flags]


def usable_cpus() -> int:
    """How many CPUs this process can keep busy: those it may run on, within the quota of its container.

    PyTorch starts a thread for each of the former and does not look at the latter. Threads above the quota wait for
    each other at the end of every layer, of which decoding has hundreds a token.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not _CPU_QUOTA.is_file():
        return cpus
    # Microseconds of all CPUs together in each period, or "max".
    quota, period = _CPU_QUOTA.read_text().split()
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def last_level_cache() -> int | None:
    """Bytes of the largest cache that the first core reaches; None where the system does not tell."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * _SIZES[size[-1]] for size in sizes), default=None)


def nvcc() -> dict[str, str] | None:
    """Path and version of the CUDA compiler on the PATH, in CUDA_HOME or in /usr/local/cuda; None without one."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if path is None:
        return None
    text = _output(path, "--version") or "unknown"
    release = next((line for line in text.splitlines() if "release" in line), text)
    return {"path": path, "version": release.strip()}


def busy_seconds() -> float | None:
    """CPU seconds that all programs together have used since the system started; None where it does not tell."""
    file = Path("/proc/stat")
    if not file.is_file():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; what a hypervisor took counts as used by others.
    fields = [int(field) for field in file.read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def checkout() -> Path | None:
    """The root of the repository that this package runs from; None where it was installed from a wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "csrc").is_dir() and (root / "pyproject.toml").is_file() else None


def commit() -> str | None:
    """The commit of `checkout()`, with `-dirty` where files differ from it; None outside a repository."""
    root = checkout()
    return None if root is None else _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40")


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str | None:
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _output(*command: str) -> str | None:
    """What a program prints; None where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
