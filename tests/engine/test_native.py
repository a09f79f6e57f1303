"""What only the native backend promises: bits, instruction sets, interruption."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from els.engine import ScoreMachine
from els.engine.backends import native
from els.engine.backends.native import NativeBackend
from els.engine.backends.native_kernels import instruction_sets
from els.index import PatchDatabase

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def db() -> PatchDatabase:
    rng = np.random.default_rng(0)
    return PatchDatabase.from_arrays(rng.integers(0, 256, (150, 3, 9, 8), dtype=np.uint8))


def posterior(machine: ScoreMachine, x: torch.Tensor) -> torch.Tensor:
    return machine.posterior(x, alpha=0.8, sigma=0.6, patch_size=5, top=3).mean


@pytest.mark.parametrize("kind", ["LS", "ELS"])
def test_the_batch_changes_no_bit_even_where_memory_splits_it(
    db: PatchDatabase, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(7, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    machine = ScoreMachine(db, kind, "zeros", backend="native")
    # Room for the states of two images with four groups each.
    monkeypatch.setattr(native, "_STATES_BYTES", 8 * 9 * 8 * (8 * 6 + 16 * 3))
    monkeypatch.setattr(native, "_MOST_GROUPS", 4)
    together = posterior(machine, x)
    alone = torch.cat([posterior(machine, image[None]) for image in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("threads", [1, 2, 3, 16], ids="threads{}".format)
def test_threads_change_no_bit(db: PatchDatabase, threads: int) -> None:
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    results = [
        posterior(ScoreMachine(db, "ELS", "circular", backend="native", threads=n), x)
        for n in (1, threads)
    ]
    assert torch.equal(*results)


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match="'avx9000' cannot run here; available: baseline"):
        NativeBackend(instruction_set="avx9000")


def test_the_best_instruction_set_is_taken() -> None:
    assert instruction_sets()[-1] in NativeBackend(threads=1).name


def test_ctrl_c_ends_a_long_posterior() -> None:
    program = textwrap.dedent(
        """
        import os, signal, threading
        import numpy as np, torch
        from els.engine import ScoreMachine
        from els.index import PatchDatabase

        images = np.random.default_rng(0).integers(0, 256, (20000, 3, 32, 32), dtype=np.uint8)
        machine = ScoreMachine(PatchDatabase.from_arrays(images), backend="native")
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            machine.posterior(torch.zeros(64, 3, 32, 32), alpha=0.5, sigma=0.8, patch_size=5)
        except KeyboardInterrupt:
            print("interrupted")
        """
    )
    # Uninterrupted it would take minutes; the limit is only there to end a hung test.
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "interrupted", done.stderr
