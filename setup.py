"""Builds `mra_kernels._C` with CMake and Ninja. Neither torch nor a GPU is needed to build.

Environment:
    MRA_CUDA: auto (default: CUDA kernels where nvcc is found), on (fails without nvcc) or off.
    MRA_CUDA_ARCHS: semicolon-separated architectures, default "80;90a"; PTX for compute_80 is always embedded.
    MRA_CUDA_FLAGS: further flags for nvcc, semicolon-separated.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mra_kernels/__init__.py").read_text())[1]


def find_nvcc() -> str | None:
    """The CUDA compiler from CUDACXX, CUDA_HOME or the path."""
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def cuda_arguments() -> list[str]:
    """CMake's arguments for CUDA; says aloud what was decided."""
    wish = os.environ.get("MRA_CUDA", "auto")
    if wish not in ("auto", "on", "off"):
        sys.exit(f"MRA_CUDA={wish!r} is not one of auto, on, off")
    nvcc = None if wish == "off" else find_nvcc()
    if nvcc is None:
        if wish == "on":
            sys.exit("MRA_CUDA=on, but no nvcc was found: install the CUDA toolkit, or set CUDA_HOME or CUDACXX")
        print(f"mra_kernels: building without CUDA ({'MRA_CUDA=off' if wish == 'off' else 'nvcc not found'})")
        return ["-DMRA_CUDA=OFF"]
    archs = os.environ.get("MRA_CUDA_ARCHS", "80;90a")
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs.split(";")]
    gencode.append("-gencode=arch=compute_80,code=compute_80")
    print(f"mra_kernels: building with CUDA ({nvcc}, architectures {archs})")
    return [
        "-DMRA_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DMRA_CUDA_ARCHS={archs.replace(';', ',')}",
        f"-DMRA_CUDA_GENCODE={';'.join(gencode)}",
        f"-DMRA_CUDA_FLAGS={os.environ.get('MRA_CUDA_FLAGS', '')}",
    ]


class CMakeBuild(build_ext):
    """Configures, builds and places one CMake project."""

    def build_extension(self, extension: Extension) -> None:
        """Leaves the module where setuptools expects it."""
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-G",
            "Ninja",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMRA_VERSION={VERSION}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            *cuda_arguments(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)


setup(version=VERSION, ext_modules=[Extension("mra_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
