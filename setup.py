"""Builds inr_kernels._C through CMake; everything declarative stands in pyproject.toml."""

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
    """Configures and builds, then puts the library where setuptools asks: a wheel or the tree."""

    def build_extension(self, ext):
        sanitize = os.environ.get("INR_KERNELS_SANITIZE", "")
        # Not self.build_temp: an editable install throws that away, this folder is incremental.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}{sanitize and '-sanitize'}"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-UCMAKE_MAKE_PROGRAM",  # the ninja of the last isolated build is gone
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
        # Not self.copy_file, which keeps a younger file there, of other settings.
        shutil.copy(build / target.name, target)


setup(
    packages=[
        *find_packages(include=["inr_kernels*"]),
        "inr_kernels.models",
        *(f"inr_kernels.models.{name}" for name in find_packages("models")),
    ],
    package_dir={"inr_kernels.models": "models"},
    # depends: what an sdist needs beside the Python files
    ext_modules=[
        Extension(
            "inr_kernels._C",
            sources=[],
            depends=["CMakeLists.txt", *map(str, Path("csrc").rglob("*.*"))],
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
