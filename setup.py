"""The compiled extension of els-machine; everything else about the package is in pyproject.toml."""

import copy
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup

# One source, compiled once per instruction set; engine/backends/native.py picks at run time. The
# one that takes longest to compile comes first, so that the cores finish at about the same time.
INSTRUCTION_SETS: dict[str, list[str]] = {}
if platform.machine().lower() in {"x86_64", "amd64"}:
    INSTRUCTION_SETS["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
    ]
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
INSTRUCTION_SETS["baseline"] = []

COMPILE_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]


class BuildInParallel(build_ext):
    """Compiles the instruction sets side by side."""

    def build_extension(self, ext: Extension) -> None:
        """Compile one, in a folder of its own: all have the same source, so the same object."""
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp, ext.name))
        super(BuildInParallel, own).build_extension(ext)


extensions = [
    Pybind11Extension(
        f"els.engine._native_{name}",
        ["engine/csrc/bindings.cpp"],
        depends=sorted(map(str, Path("engine/csrc").glob("*.h"))),
        define_macros=[("ELS_MODULE", f"_native_{name}")],
        extra_compile_args=COMPILE_FLAGS + flags,
        extra_link_args=[] if sys.platform == "darwin" else ["-pthread"],
        cxx_std=17,
        # Without a compiler the package still installs; the torch backend takes over.
        optional=True,
    )
    for name, flags in INSTRUCTION_SETS.items()
]

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildInParallel},
    options={"build_ext": {"parallel": True}},  # as many at once as there are cores
)
