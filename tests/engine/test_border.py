"""Posteriors near a border of zeros by products on the matrix unit, against the oracle."""

import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

from els.engine.backends.backend import ESTIMATE_LOGIT_ERROR
from els.engine.backends.native import NativeBackend
from els.engine.backends.native_border import border_states, is_precise
from els.engine.backends.native_kernels import kernel_module
from els.engine.kinds import ELS, LS
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, merge_all

needs_tiles = pytest.mark.amx


def images_of(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def query_of(
    shape: tuple[int, int, int], patch_size: int, alpha: float, sigma: float
) -> PosteriorQuery:
    rng = np.random.default_rng(1)
    clean = rng.uniform(-1, 1, (1, *shape))
    x = torch.from_numpy(alpha * clean + sigma * rng.standard_normal(clean.shape)).float()
    return PosteriorQuery(
        x,
        torch.tensor([alpha], dtype=torch.float64),
        torch.tensor([sigma], dtype=torch.float64),
        ELS,
        "zeros",
        patch_size,
        entropy=True,
        pixels=border_of(shape, patch_size),
        logit_error=ESTIMATE_LOGIT_ERROR,
    )


def states_of(
    images: np.ndarray, query: PosteriorQuery, groups: list[np.ndarray], threads: int = 2
) -> list[PosteriorState]:
    return border_states(kernel_module(), images, query, groups, threads=threads)


def border_of(shape: tuple[int, int, int], patch_size: int) -> np.ndarray:
    _, height, width = shape
    r = patch_size // 2
    border = np.ones((height, width), dtype=bool)
    border[r : height - r, r : width - r] = False
    return border


@needs_tiles
@pytest.mark.parametrize(
    ("shape", "patch_size"),
    [
        pytest.param((1, 7, 9), 3, id="small"),
        pytest.param((1, 8, 8), 7, id="two places along an edge"),
        pytest.param((1, 9, 9), 9, id="nothing but border"),
        pytest.param((3, 10, 7), 5, id="colour"),
        pytest.param((2, 6, 20), 5, id="two channels, wide"),
        pytest.param((4, 19, 6), 3, id="four channels, high"),
        pytest.param((1, 24, 21), 19, id="strips deeper than a vector"),
        pytest.param((3, 34, 34), 33, id="largest radius"),
        pytest.param((1, 40, 20), 3, id="several tiles along an edge"),
    ],
)
@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0, 1e3])
def test_agrees_with_the_oracle(shape: tuple[int, int, int], patch_size: int, sigma: float) -> None:
    count, alpha = 19, 0.9
    images = images_of(count, shape)
    query = query_of(shape, patch_size, alpha, sigma)
    # One full block of images and a partial one, and groups of one image.
    groups = [np.arange(0, 1), np.arange(1, 18), np.arange(18, 19)]
    state = merge_all(states_of(images, query, groups))
    truth = oracle.posterior(
        images,
        query.x[0].double().numpy(),
        alpha=alpha,
        sigma=sigma,
        kind="ELS",
        boundary="zeros",
        patch_size=patch_size,
    )
    border = border_of(shape, patch_size)
    mean = state.mean[0].numpy()
    evidence = (state.reference + state.mass.log())[0].numpy()
    effective = state.effective[0].numpy()
    # Logits are sums of float32 numbers as large as the patches' norms over sigma^2, of queries
    # rounded to 1 / 65024 of their largest value (see tests/engine/test_lists.py).
    largest = np.abs(truth.log_evidence[border]).max()
    step = float((query.x + alpha).abs().max()) / 32512 / math.sqrt(12)
    rounding = 1e-5 + 3e-8 * 4 * shape[0] * patch_size**2 / sigma**2
    rounding += step / sigma * math.sqrt(2 * largest)
    np.testing.assert_allclose(
        mean[:, border], truth.mean[:, border], atol=5 * rounding, err_msg="mean"
    )
    np.testing.assert_allclose(
        evidence[border], truth.log_evidence[border], rtol=1e-5, atol=5 * rounding
    )
    np.testing.assert_allclose(
        effective[border], truth.effective_patches[border], rtol=20 * rounding
    )


@needs_tiles
def test_without_a_signal_all_patches_weigh_the_same() -> None:
    images = images_of(20, (1, 8, 8))
    query = query_of((1, 8, 8), 5, 0.0, 1.0)
    state = merge_all(states_of(images, query, [np.arange(20)]))
    corner = images[:, 0, 0, 0].mean() / 127.5 - 1
    assert state.centre[0, 0, 0, 0] / state.mass[0, 0, 0] == pytest.approx(corner, abs=1e-5)
    # Two pixels from the left, the patches that slide along the edge.
    edge = images[:, 0, 2:6, 0].mean() / 127.5 - 1
    assert state.centre[0, 0, 3, 0] / state.mass[0, 3, 0] == pytest.approx(edge, abs=1e-5)


@needs_tiles
def test_groups_are_those_of_the_exact_kernel() -> None:
    """A subset's groups, one by one: what the error of a subset is made of."""
    images = images_of(100, (3, 12, 10))
    query = query_of((3, 12, 10), 5, 0.8, 0.6)
    groups = [np.arange(first, 100, 7) for first in range(7)]
    backend = NativeBackend()
    border = torch.from_numpy(border_of((3, 12, 10), 5))
    for members, state in zip(groups, states_of(images, query, groups), strict=True):
        (exact,) = backend.states(images, replace(query, logit_error=0.0), [members])
        for ours, theirs in ((state.mass, exact.mass), (state.centre, exact.centre)):
            ours, theirs = (
                (values * (each.reference - exact.reference).exp())[..., border]
                for values, each in ((ours, state), (theirs, exact))
            )
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * float(exact.mass.max()))


@needs_tiles
@pytest.mark.parametrize("patch_size", [3, 7, 11])
@pytest.mark.parametrize("share", [0.03, 0.5])
def test_only_the_pixels_that_are_wanted(patch_size: int, share: float) -> None:
    shape = (2, 15, 12)
    images = images_of(70, shape)
    query = query_of(shape, patch_size, 0.8, 0.6)
    groups = np.array_split(np.arange(70), 3)
    wanted = np.random.default_rng(2).random(shape[1:]) < share
    chosen = wanted & border_of(shape, patch_size)
    assert chosen.any()
    for all_of_it, some in zip(
        states_of(images, query, groups),
        states_of(images, replace(query, pixels=wanted), groups),
        strict=True,
    ):
        # Lanes share what their sums are relative to, and other lanes share them now.
        evidence = ((state.reference + state.mass.log())[0, chosen] for state in (all_of_it, some))
        torch.testing.assert_close(*evidence, rtol=0, atol=1e-4)
        means = ((state.centre / state.mass)[0, :, chosen] for state in (all_of_it, some))
        torch.testing.assert_close(*means, rtol=0, atol=1e-4)


@needs_tiles
def test_no_pixel_need_be_wanted() -> None:
    images = images_of(4, (1, 8, 8))
    query = query_of((1, 8, 8), 5, 0.8, 0.6)
    nothing = replace(query, pixels=np.zeros((8, 8), dtype=np.bool_))
    (state,) = states_of(images, nothing, [np.arange(4)])
    assert torch.isfinite(state.mass).all()


@needs_tiles
def test_threads_change_no_bit() -> None:
    images = images_of(300, (1, 14, 11))
    query = query_of((1, 14, 11), 5, 0.8, 0.6)
    groups = np.array_split(np.arange(300), 16)
    one, two, five = (
        merge_all(states_of(images, query, groups, threads=threads)) for threads in (1, 2, 5)
    )
    for other in (two, five):
        assert torch.equal(one.mass, other.mass)
        assert torch.equal(one.centre, other.centre)
        assert torch.equal(one.reference, other.reference)


@needs_tiles
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"boundary": "circular"}, id="no border"),
        pytest.param({"kind": LS}, id="local machine"),
        pytest.param({"patch_size": 1}, id="single pixels"),
        pytest.param({"sigma": torch.tensor([1e-3], dtype=torch.float64)}, id="too little noise"),
    ],
)
def test_knows_what_it_cannot_do(change: dict[str, object]) -> None:
    query = query_of((1, 8, 8), 5, 0.9, 0.5)
    assert is_precise(query)
    assert not is_precise(replace(query, **change))  # type: ignore[arg-type]


@needs_tiles
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"patch_size": 4}, "patch_size must be odd", id="even patch"),
        pytest.param({"patch_size": 9}, "patch_size must be odd", id="patch beyond the image"),
        pytest.param({"members": np.array([0, 4])}, "members names an image", id="no such image"),
        pytest.param({"starts": np.array([0, 3])}, "starts must ascend", id="bad groups"),
        pytest.param(
            {"wanted": np.ones((8, 7), dtype=np.uint8)},
            "wanted has the wrong shape",
            id="bad pixels",
        ),
    ],
)
def test_the_kernel_refuses_what_would_read_elsewhere(
    change: dict[str, object], message: str
) -> None:
    given: dict[str, object] = {
        "images": images_of(4, (1, 8, 8)),
        "members": np.arange(2),
        "starts": np.array([0, 2]),
        "x": np.zeros((1, 8, 8), dtype=np.float32),
        "wanted": np.ones((8, 8), dtype=np.uint8),
        "alpha": 0.9,
        "sigma": 0.5,
        "patch_size": 3,
        "threads": 1,
        "reference": np.zeros((1, 8, 8)),
        "mass": np.zeros((1, 8, 8)),
        "centre": np.zeros((1, 1, 8, 8)),
        "logit_sum": np.zeros((1, 8, 8)),
    }
    with pytest.raises(ValueError, match=message):
        kernel_module().border(**{**given, **change})
