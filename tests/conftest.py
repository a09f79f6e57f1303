"""The backends that the conformance suite runs, and which tests run where."""

import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from backends import MISSING, TRITON, BackendUnderTest, backends


@pytest.fixture(params=backends(), scope="session")
def backend(request: pytest.FixtureRequest) -> BackendUnderTest:
    return request.param


# Of the cases of a test one in so many is in the fast tier, the others are slow: where Triton
# kernels are interpreted, a second or more each, and where a test is marked thinned. Primes that do
# not divide the number of machines, so that all of them come up.
INTERPRETED_STRIDE = 11
THINNED_STRIDE = 5


def stride_of(item: pytest.Item) -> int:
    if TRITON.is_interpreted and item.get_closest_marker("triton"):
        return INTERPRETED_STRIDE
    return THINNED_STRIDE if item.get_closest_marker("thinned") else 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine lacks, and leave most cases of large products to the slow tier."""
    tests = defaultdict(list)
    for item in items:
        for marker, reason in MISSING.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        tests[item.function, stride_of(item)].append(item)
    for (_, stride), cases in tests.items():
        # From the last: where there are only machines, that is ELS with a border.
        for i, item in enumerate(reversed(cases)):
            if i % stride:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
