"""Packaging of els-machine: folder ``X/`` is installed as the package ``els.X``."""

import copy
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup

FOLDERS = [
    "storage",
    "index",
    "triton_kernels",
    "engine",
    "runs",
    "explain",
    "networks",
    "cli",
    "bench",
]

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
    name="els-machine",
    version="0.1.0",
    description="Exact and approximate equivariant local score (ELS) machines, fast",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "index/data/LICENSE-fashion-mnist"],
    python_requires=">=3.11",
    package_dir={f"els.{folder}": folder for folder in FOLDERS},
    packages=[
        ".".join(("els", *path.parent.parts))
        for folder in FOLDERS
        for path in sorted(Path(folder).rglob("__init__.py"))
    ],
    package_data={
        "els.storage": ["py.typed"],
        "els.index": ["py.typed", "data/*"],
        "els.engine": ["py.typed", "csrc/*"],
        "els.runs": ["py.typed"],
        "els.explain": ["py.typed", "web/*"],
        "els.cli": ["py.typed"],
        "els.triton_kernels": ["py.typed"],
        "els.networks": ["py.typed", "checkpoints/*/*"],
        "els.bench": ["py.typed"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildInParallel},
    options={"build_ext": {"parallel": True}},  # as many at once as there are cores
    install_requires=[
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10",
        "rich>=13",
        "torch>=2.6",
        "typer>=0.12",
    ],
    extras_require={
        "cpu": ["faiss-cpu>=1.9"],
        "diffusers": ["diffusers>=0.35"],
        "gpu": ["faiss-gpu-cu12>=1.9", "triton>=3.6"],
        "hf": ["datasets>=3"],
        "networks": ["diffusers>=0.35", "safetensors>=0.4"],
        "dev": [
            "clang-format",
            "diffusers>=0.35",
            "faiss-cpu>=1.9",
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist>=3.2",
            "ruff",
            "safetensors>=0.4",
            # Drives a Chromium, where there is one, through the page of els explain --html.
            "selenium>=4.20",
            # To interpret and compile the GPU kernels; there are wheels for Linux only.
            "triton>=3.6; sys_platform == 'linux'",
        ],
        "bench": ["faiss-cpu", "pykeops", "pytest-benchmark"],
    },
    entry_points={
        "console_scripts": ["els = els.cli.app:main"],
        # Further commands of `els`: each is called with the typer app.
        "els.commands": ["networks = els.cli.networks:register"],
    },
)
