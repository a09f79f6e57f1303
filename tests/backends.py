"""The backends that the conformance suite runs, and machines that use them."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

from els.engine import ScoreMachine
from els.engine.backends import Backend
from els.engine.backends.native import NativeBackend
from els.engine.backends.native_kernels import instruction_sets, kernel_module
from els.engine.backends.pytorch import TorchBackend
from els.index import PatchDatabase

# Without a GPU the Triton kernels are interpreted; the switch is read when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tensors of tests are tiny: on a busy machine threads would mostly wait for each other.
torch.set_num_threads(1)
settings.register_profile("busy-machine", deadline=None)
settings.load_profile("busy-machine")
# A shell that starts the tests in the background has Ctrl-C ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What the tests with a marker need and this machine lacks: marker, reason.
MISSING: dict[str, str] = {}
try:
    INSTRUCTION_SETS = instruction_sets()
except RuntimeError as error:
    INSTRUCTION_SETS = ()
    MISSING["native"] = str(error)
if not INSTRUCTION_SETS or not kernel_module().can_use_tiles():
    MISSING["amx"] = "the native backend finds no matrix unit (AMX)"
if not importlib.util.find_spec("triton"):
    MISSING["triton"] = "Triton is not installed"
if not torch.cuda.is_available():
    MISSING["gpu"] = "torch finds no GPU"


def product_in_float64(builder: Any, a: Any, b: Any, d: Any, *_: object) -> Any:
    """``a @ b + d`` of the interpreter: float16 products add up exactly in float64.

    What BLAS returns in float32 depends on the tile's shape and on the processor, which on a GPU
    it does not.
    """
    product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
    return type(d)(product.astype(d.data.dtype), d.dtype.scalar)


if "triton" not in MISSING and os.environ.get("TRITON_INTERPRET"):
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot = product_in_float64


@dataclass(frozen=True)
class BackendUnderTest:
    """A backend, the dtype to ask it in, and the error budget it has (see test_conformance).

    Attributes:
        make: the backend with so many threads, where it counts its own.
        dtype: of the queries.
        logit_error: most error of the difference of two logits that carry weight.
        relative: most relative error of a log evidence.
        difference_error: most error of a difference of pixels, where it is not float64.
        has_threads: whether the number of threads could show.
        is_interpreted: whether every operation of a kernel takes long.
    """

    make: Callable[[int], Backend]
    dtype: torch.dtype
    logit_error: float
    relative: float
    difference_error: float = 0.0
    has_threads: bool = True
    is_interpreted: bool = False

    def machine(
        self,
        images: NDArray[np.uint8],
        kind: str,
        boundary: str,
        labels: NDArray[np.int64] | None = None,
        threads: int = 2,
    ) -> ScoreMachine:
        db = PatchDatabase.from_arrays(images, labels)
        return ScoreMachine(db, kind, boundary, self.make(threads))


FLOAT32 = BackendUnderTest(lambda threads: TorchBackend("cpu"), torch.float32, 1e-5, 2e-6)
FLOAT64 = replace(FLOAT32, dtype=torch.float64, logit_error=5e-10, relative=1e-13)
# Decoding, times alpha, minus: three roundings of numbers below 2.
DIFFERENCE_ERROR = 3 * 2.0**-24


def triton_backend(threads: int) -> Backend:
    """On the GPU as shipped; interpreted with few large tiles: every operation costs alike."""
    from els.engine.backends.triton import TritonBackend
    from els.triton_kernels.configurations import SHIPPED, Configuration, Configurations

    large = Configuration(64, 1024, warps=4, stages=1)
    interpreted = Configurations(large, large, replace(large, rows=16), large, large, large)
    return TritonBackend(configurations=SHIPPED if torch.cuda.is_available() else interpreted)


# Two float16 hold 22 bits of a distance, where a float32 has 24.
TRITON = replace(
    FLOAT32,
    make=triton_backend,
    logit_error=4e-5,
    difference_error=DIFFERENCE_ERROR,
    has_threads=False,
    is_interpreted=not torch.cuda.is_available(),
)


def backends() -> Iterator[object]:
    yield pytest.param(FLOAT32, id="torch-float32")
    yield pytest.param(FLOAT64, id="torch-float64")
    if not INSTRUCTION_SETS:
        yield pytest.param(None, id="native", marks=pytest.mark.native)
    for name in INSTRUCTION_SETS:
        native = replace(
            FLOAT32,
            make=lambda threads, name=name: NativeBackend(threads, name),
            difference_error=DIFFERENCE_ERROR,
        )
        yield pytest.param(native, id=f"native-{name}")
    yield pytest.param(TRITON, id="triton", marks=pytest.mark.triton)
