"""Builds inr_kernels._C with CMake and lists the packages; all other metadata is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake, then copies the library to the path that setuptools requests (in a wheel or in the source tree)."""

    def build_extension(self, ext: Extension) -> None:
        """Builds and copies one extension."""
        sanitize = os.environ.get("INR_KERNELS_SANITIZE", "")
        # Not self.build_temp, which an editable install deletes: this folder keeps incremental builds. It serves every
        # Python, because only the bindings depend on its version.
        build = ROOT / "build" / f"native{sanitize and '-sanitize'}"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            # The cached paths are those of the last build's Python and of its isolated environment.
            *("-UCMAKE_MAKE_PROGRAM", "-U_Python*", "-UPython_*", "-UPYTHON_*"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DINR_CUDA={os.environ.get('INR_KERNELS_CUDA', 'AUTO')}",
            f"-DINR_SANITIZE={sanitize}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not self.copy_file, which keeps a newer file at the target, though its settings may differ.
        shutil.copy(build / target.name, target)


setup(
    packages=[
        *find_packages(include=["inr_kernels*"]),
        "inr_kernels.models",
        *(f"inr_kernels.models.{name}" for name in find_packages("models")),
    ],
    package_dir={"inr_kernels.models": "models"},
    # depends: files that an sdist needs in addition to the Python files
    ext_modules=[
        Extension(
            "inr_kernels._C",
            sources=[],
            depends=["CMakeLists.txt", *map(str, Path("csrc").rglob("*.*"))],
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
