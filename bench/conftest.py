"""Options of the benchmarks: where the real images are."""

import numpy as np
import numpy.typing as npt
import pytest

from els.bench.workloads import load_images


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cifar", help="CIFAR-10 training images, any source that els build takes")
    parser.addoption("--fashion-mnist", help="all of Fashion-MNIST's training images, likewise")
    for data in ("fashion", "cifar"):
        parser.addoption(f"--{data}-database", help="a database of all its training images")
        parser.addoption(f"--{data}-test", help="its test images, any source")


@pytest.fixture(scope="session")
def cifar(request: pytest.FixtureRequest) -> npt.NDArray[np.uint8]:
    spec = request.config.getoption("--cifar")
    if spec is None:
        pytest.skip("needs --cifar SOURCE")
    return load_images(spec, 1024)


@pytest.fixture(scope="session")
def fashion() -> npt.NDArray[np.uint8]:
    return load_images("embedded:fashion-mnist", 1024)
