"""Blocks in threads: the same bits, torch's setting untouched, and an end when it is wanted."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from els.engine import ScoreMachine
from els.engine.backends.image_blocks import blocks, merged_in_order
from els.index import PatchDatabase

CPU = torch.device("cpu")
MEMBERS = np.arange(20, dtype=np.int64)
PLENTY = 100  # seconds, for what would otherwise never end


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"threads-{count}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def several() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def of_new_thread() -> int:
    """Torch's threads in a thread that has just started."""
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def ended() -> bool:
    """Whether all threads of blocks end; those that nobody stopped never do."""
    until = time.monotonic() + PLENTY
    while any(thread.name == "els-block" for thread in threading.enumerate()):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_results_are_merged_in_order(threads: int) -> None:
    def pieces(members: np.ndarray) -> Iterator[list[int]]:
        found: list[int] = []
        for member in members.tolist():
            # The later a block, the sooner it is done.
            time.sleep(0.002 / (member + 1))
            found.append(member)
            yield found

    def joined(first: list[int], second: list[int]) -> list[int]:
        return first + second

    assert merged_in_order(pieces, blocks(MEMBERS, 3), joined, CPU) == list(range(20))


def test_a_block_has_one_thread_and_others_what_they_had(several: None) -> None:
    def pieces(_: np.ndarray) -> Iterator[set[tuple[int, int]]]:
        yield {(torch.get_num_threads(), of_new_thread())}

    assert merged_in_order(pieces, blocks(MEMBERS, 3), set.union, CPU) == {(1, 3)}
    assert torch.get_num_threads() == of_new_thread() == 3


@pytest.mark.parametrize("kind", ["IS", "ES", "LS", "ELS"])
def test_calls_in_many_threads_leave_torchs_setting(several: None, kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (600, 1, 16, 16), dtype=np.uint8)
    machine = ScoreMachine(PatchDatabase.from_arrays(images), kind, backend="torch")
    x = torch.zeros(1, 1, 16, 16)
    size = 15 if kind == "ELS" else 3

    def ask() -> None:
        for _ in range(3):
            machine.posterior(x, alpha=0.8, sigma=0.6, patch_size=size)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    seen = set()
    while any(asker.is_alive() for asker in askers):
        seen |= {of_new_thread(), torch.get_num_threads()}
    assert seen | {of_new_thread()} == {3}


def test_an_error_in_a_block_stops_the_others(several: None) -> None:
    def pieces(members: np.ndarray) -> Iterator[int]:
        if 3 in members:
            raise MemoryError("test")
        while True:
            time.sleep(0.001)
            yield 0

    with pytest.raises(MemoryError, match="test"):
        merged_in_order(pieces, blocks(MEMBERS, 3), int.__add__, CPU)
    assert ended()
    assert torch.get_num_threads() == of_new_thread() == 3


def test_ctrl_c_stops_the_blocks_at_work_and_those_that_wait(several: None) -> None:
    begun: set[int] = set()

    def pieces(members: np.ndarray) -> Iterator[int]:
        begun.add(int(members[0]))
        if len(begun) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while True:
            time.sleep(0.001)
            yield 0

    with pytest.raises(KeyboardInterrupt):
        merged_in_order(pieces, blocks(MEMBERS, 3), int.__add__, CPU)
    assert ended()
    assert begun == {0, 3, 6}
    assert torch.get_num_threads() == of_new_thread() == 3


SCRIPT = """
import os, signal, threading, time
import numpy as np, torch
from els.engine.backends.image_blocks import blocks, merged_in_order
torch.set_num_threads(2)
# Both threads: Python does not wait for one that is just being started.
begun = threading.Barrier(3)

def pieces(members):
    begun.wait()
    while True:
        torch.ones(10_000).exp()
        yield 0

def call():
    merged_in_order(pieces, blocks(np.arange(8), 1), int.__add__, torch.device("cpu"))

thread = threading.Thread(target=call, daemon=True)
thread.start()
begun.wait()
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        pytest.param("", 0, id="end-of-program"),
        pytest.param("raise SystemExit(3)", 3, id="exit"),
        pytest.param("os.kill(os.getpid(), signal.SIGINT); thread.join()", -2, id="ctrl-c"),
    ],
)
def test_the_end_of_the_program_ends_the_blocks_of_other_threads(end: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + end], capture_output=True, text=True, timeout=PLENTY
    )
    assert done.returncode == status, done.stderr
    assert "terminate" not in done.stderr
