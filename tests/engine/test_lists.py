"""Posteriors from inverted lists: all of them against the oracle, parts of them against all."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from backends import INSTRUCTION_SETS

from els.engine import ScoreMachine
from els.engine.approximate.estimate import Estimate
from els.engine.approximate.lists import effective_blocks, standard_error
from els.engine.approximate.lists import sampled as estimated
from els.engine.backends.backend import ListQuery
from els.engine.backends.native import LIST_COSTS, NativeBackend
from els.engine.backends.native_kernels import kernel_module
from els.engine.backends.native_lists import least_beta, obstacle
from els.engine.state import PosteriorState
from els.index import DatabaseError, PatchDatabase, PatchIndex
from els.index.patches.lists import InvertedLists
from els.storage.manifests import sealed

ALPHA = 0.9
UNITS = [(name, tiles) for name in INSTRUCTION_SETS for tiles in (False, True)]
pytestmark = pytest.mark.native


def smooth_images(count: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Images whose neighbouring pixels are alike, uint8 ``[count, C, H, W]``."""
    channels, height, width = shape
    rng = np.random.default_rng(seed)
    field = rng.standard_normal((count, channels, height + 2, width + 2)).cumsum(2).cumsum(3)
    field = field[..., 2:, 2:] - field[..., 2:, :-2].mean((2, 3), keepdims=True)
    return np.clip(128 + 30 * field, 0, 255).astype(np.uint8)


def indexed(
    folder: Path, shape: tuple[int, int, int], patch_size: int, factory: str, count: int = 60
) -> tuple[PatchDatabase, PatchIndex]:
    labels = np.arange(count) % 3
    db = PatchDatabase.build(smooth_images(count, shape, 0), labels, path=folder / "db")
    return db, db.build_index(patch_size, factory=factory)


def noisy(db: PatchDatabase, sigma: float, seed: int = 1) -> np.ndarray:
    """One held-out image with noise, float64 ``[C, H, W]``."""
    clean = smooth_images(1, db.shape, 99)[0] / 127.5 - 1
    return ALPHA * clean + sigma * np.random.default_rng(seed).standard_normal(clean.shape)


def query_patches(x: np.ndarray, patch_size: int) -> np.ndarray:
    """Patches inside the image, over alpha, float32 ``[Q, C, P, P]``."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (patch_size, patch_size), axis=(1, 2))
    moved = windows.transpose(1, 2, 0, 3, 4)
    return (moved / ALPHA).reshape(-1, *moved.shape[2:]).astype(np.float32)


@dataclass
class Sums:
    """A state of Q pixels as arrays, ``[Q]`` and ``[Q, C]``."""

    reference: np.ndarray
    mass: np.ndarray
    centre: np.ndarray
    logit_sum: np.ndarray
    effective: np.ndarray
    seen: np.ndarray
    deviation: np.ndarray
    blocks: np.ndarray

    @classmethod
    def of(cls, state: PosteriorState) -> "Sums":
        assert state.logit_sum is not None
        assert state.sampling is not None
        values = (
            *(state.reference, state.mass, state.centre, state.logit_sum, state.effective),
            *(state.sampling.seen, standard_error(state), effective_blocks(state)),
        )
        return cls(*(each[0].squeeze(-2).numpy().T for each in values))


def sampled(
    lists: InvertedLists,
    y: np.ndarray,
    rest: np.ndarray,
    sigma: float,
    share: float | np.ndarray,
    *,
    seed: int = 3,
    threads: int | None = None,
    instruction_set: str | None = None,
    tiles: bool | None = None,
    **options: object,
) -> Sums:
    backend = NativeBackend(threads, instruction_set)
    backend.tiles = tiles
    query = ListQuery(lists, y, rest, ALPHA, sigma, share, seed, **options)  # type: ignore[arg-type]
    state = backend.sample_lists(query)
    return Sums.of(state)


def read(
    index: PatchIndex, x: np.ndarray, sigma: float, share: float | np.ndarray, **options: object
) -> Sums:
    assert index.inverted is not None
    y, rest = index.components(query_patches(x, index.patch_size))
    return sampled(index.inverted, y, rest, sigma, share, **options)


def inside(values: np.ndarray, patch_size: int) -> np.ndarray:
    """Of a map ``[..., H, W]``, the pixels whose patches are inside, ``[Q, ...]``."""
    r = patch_size // 2
    middle = values[..., r : values.shape[-2] - r, r : values.shape[-1] - r]
    return np.moveaxis(middle.reshape(*middle.shape[:-2], -1), -1, 0)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit[0]}{'-tiles' * unit[1]}")
@pytest.mark.parametrize(
    ("shape", "patch_size", "factory"),
    [
        pytest.param((1, 9, 12), 3, "IVF8,SQ8_direct", id="9 bytes"),
        pytest.param((1, 8, 8), 1, "IVF4,SQ8_direct", id="1 byte"),
        pytest.param((3, 10, 9), 3, "Pad40,IVF8_HNSW8,SQ8_direct", id="padded colour"),
        pytest.param((3, 9, 9), 5, "Pad88,IVF6,SQ8_direct", id="two tiles"),
        pytest.param((3, 9, 9), 7, "Pad152,IVF3,SQ8_direct", id="three tiles"),
    ],
)
@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.0, 1e3])
@pytest.mark.thinned
def test_all_of_the_lists_are_the_posterior(
    tmp_path: Path,
    shape: tuple[int, int, int],
    patch_size: int,
    factory: str,
    sigma: float,
    unit: tuple[str, bool],
) -> None:
    name, tiles = unit
    if tiles and not kernel_module(name).can_use_tiles():
        pytest.skip("this processor has no matrix unit")
    db, index = indexed(tmp_path, shape, patch_size, factory, count=12)
    x = noisy(db, sigma)
    sums = read(index, x, sigma, 1.0, instruction_set=name, tiles=tiles)
    truth = oracle.posterior(
        db.images,
        x,
        alpha=ALPHA,
        sigma=sigma,
        kind="ELS",
        boundary="zeros",
        patch_size=patch_size,
    )
    mean = sums.centre / sums.mass[:, None]
    # Logits are sums of float32 numbers as large as the patches' norms over sigma^2.
    rounding = 1e-5 + 3e-8 * 4 * shape[0] * patch_size**2 / sigma**2
    expected = inside(truth.log_evidence, patch_size)
    # Queries are rounded to 1 / 65024 of their largest value, which moves a logit by
    # alpha^2 / sigma^2 times the rounding error times what is left of the distance.
    step = np.abs(query_patches(x, patch_size) + 1).max() / 32512 / math.sqrt(12)
    rounding += ALPHA / sigma * step * math.sqrt(2 * np.abs(expected).max())
    np.testing.assert_allclose(mean, inside(truth.mean, patch_size), atol=5 * rounding)
    evidence = sums.reference + np.log(sums.mass)
    np.testing.assert_allclose(evidence, expected, rtol=1e-5, atol=5 * rounding)
    effective = inside(truth.effective_patches, patch_size)
    np.testing.assert_allclose(sums.effective, effective, rtol=20 * rounding)
    np.testing.assert_array_equal(sums.deviation, 0.0)
    np.testing.assert_allclose(sums.seen, sums.mass, rtol=1e-6)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[PatchDatabase, PatchIndex]:
    folder = tmp_path_factory.mktemp("scan")
    return indexed(folder, (1, 12, 11), 5, "Pad40,IVF64,SQ8_direct", count=900)


@pytest.fixture(scope="module")
def many_lists(tmp_path_factory: pytest.TempPathFactory) -> PatchDatabase:
    folder = tmp_path_factory.mktemp("many")
    return indexed(folder, (1, 12, 11), 5, "Pad40,IVF1024,SQ8_direct", count=900)[0]


@pytest.mark.parametrize("sigma", [0.2, 0.5, 2.0])
def test_parts_estimate_the_whole_without_bias(
    large: tuple[PatchDatabase, PatchIndex], sigma: float
) -> None:
    db, index = large
    x = noisy(db, sigma)
    whole = read(index, x, sigma, 1.0)
    evidence = whole.reference + np.log(whole.mass)
    ratios = []
    for seed in range(60):
        part = read(index, x, sigma, 0.1, seed=seed)
        ratios.append(np.exp(part.reference + np.log(part.mass) - evidence))
    # The mass is unbiased pixel by pixel; over seeds its mean is off by its standard error.
    means, errors = np.mean(ratios, 0), np.std(ratios, 0) / math.sqrt(len(ratios))
    assert np.abs(means - 1).max() <= 5 * errors.max()
    assert np.mean(np.abs(means - 1) <= 2 * errors + 1e-6) >= 0.85


@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("sigma", [0.5, 0.8, 2.0])
def test_errors_are_what_they_claim(
    large: tuple[PatchDatabase, PatchIndex], sigma: float, share: float
) -> None:
    """Also where many evenly spread blocks of a list are read."""
    db, index = large
    x = noisy(db, sigma)
    whole = read(index, x, sigma, 1.0)
    shared = whole.effective > 200
    errors, claims = [], []
    for seed in range(20):
        part = read(index, x, sigma, share, seed=seed)
        error = part.centre / part.mass[:, None] - whole.centre / whole.mass[:, None]
        errors.append(error[shared])
        claims.append(part.deviation[shared])
    assert shared.mean() > 0.2
    assert np.abs(errors).mean() > 1e-4
    ratio = math.sqrt(np.square(errors).mean() / np.square(claims).mean())
    assert 0.6 <= ratio <= 1.4


def test_more_is_nearer(large: tuple[PatchDatabase, PatchIndex]) -> None:
    db, index = large
    x = noisy(db, 0.5)
    whole = read(index, x, 0.5, 1.0)
    errors = []
    for share in (0.02, 0.1, 0.5):
        part = read(index, x, 0.5, share)
        means = part.centre / part.mass[:, None], whole.centre / whole.mass[:, None]
        errors.append(np.abs(means[0] - means[1]).mean())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_each_pixel_has_its_share(large: tuple[PatchDatabase, PatchIndex]) -> None:
    db, index = large
    x = noisy(db, 0.5)
    count = len(query_patches(x, index.patch_size))
    little, alike = read(index, x, 0.5, 0.02), read(index, x, 0.5, np.full(count, 0.02))
    np.testing.assert_array_equal(little.mass, alike.mass)
    more = np.arange(count) < count // 2
    mixed = read(index, x, 0.5, np.where(more, 0.5, 0.02))
    assert mixed.deviation[more].mean() < little.deviation[more].mean() / 2
    # Pixels that are weighed together share what the one that reads most does; with whom depends
    # on the processor's vectors.
    apart = np.arange(count) >= count // 2 + 16
    assert 0.5 < mixed.deviation[apart].mean() / little.deviation[apart].mean() <= 1.5


def test_everything_is_everything_beside_a_part(
    large: tuple[PatchDatabase, PatchIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    db, index = large
    monkeypatch.setattr("els.engine.backends.native_lists._MOST_READ", 64)
    x = noisy(db, 0.5)
    count = len(query_patches(x, index.patch_size))
    whole = read(index, x, 0.5, 1.0)
    all_of_it = np.arange(count) % 3 > 0
    mixed = read(index, x, 0.5, np.where(all_of_it, 1.0, 0.05))
    np.testing.assert_allclose(whole.seen, whole.mass, rtol=1e-6)
    np.testing.assert_allclose(mixed.seen[all_of_it], mixed.mass[all_of_it], rtol=1e-6)
    means = (sums.centre / sums.mass[:, None] for sums in (mixed, whole))
    mixed_mean, whole_mean = means
    np.testing.assert_allclose(mixed_mean[all_of_it], whole_mean[all_of_it], atol=1e-4)
    assert (mixed.seen[~all_of_it] < 0.9 * mixed.mass[~all_of_it]).all()


def test_everything_is_read_of_many_lists() -> None:
    """What lists hold is counted on some of them where they are many; everything is everything."""
    rng = np.random.default_rng(4)
    count, size = 40_000, 9
    sizes = rng.integers(1, 40, count)
    codes = rng.integers(0, 256, (int(sizes.sum()), size), dtype=np.uint8)
    lists = lists_of(codes, sizes)
    y = rng.uniform(0, 255, (20, size)).astype(np.float32)
    for sigma in (2.0, 20.0):
        sums = sampled(lists, y, np.zeros(20), sigma, 1.0, seed=1)
        np.testing.assert_allclose(sums.seen, sums.mass, rtol=1e-6)
        assert (sums.deviation == 0).all()


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit[0]}{'-tiles' * unit[1]}")
def test_the_largest_products_are_added_up(unit: tuple[str, bool]) -> None:
    """Products of 600 bytes of 255 with queries of the largest integers, beyond 2^31."""
    name, tiles = unit
    if tiles and not kernel_module(name).can_use_tiles():
        pytest.skip("this processor has no matrix unit")
    rng = np.random.default_rng(5)
    size, sigma = 601, 4.0
    codes = rng.integers(250, 256, (90, size), dtype=np.uint8)
    codes[0] = 255
    y = np.stack([np.full(size, 255.0), np.full(size, 252.0)]).astype(np.float32)
    lists = lists_of(codes, np.array([40, 1, 49]))
    sums = sampled(lists, y, np.zeros(2), sigma, 1.0, instruction_set=name, tiles=tiles)
    levels = codes.astype(np.float64)
    logits = -np.square((y[:, None] - levels) / 127.5).sum(-1) * (ALPHA / sigma) ** 2 / 2
    expected = np.log(np.exp(logits).sum(1))
    # Logits are differences of float32 numbers as large as the patches' norms.
    rounding = 4 * size * (ALPHA / sigma * 2) ** 2 * 2.0**-24
    np.testing.assert_allclose(sums.reference + np.log(sums.mass), expected, atol=rounding)


def lists_of(codes: np.ndarray, sizes: np.ndarray) -> InvertedLists:
    """Codes ``[count, D]`` as lists of some sizes; the middle component is the patch's centre."""
    offsets = np.cumsum(sizes) - sizes
    ids = np.arange(len(codes), dtype="<i8").view(np.uint8).reshape(-1, 8)
    parts = [
        part
        for begin, size in zip(offsets, sizes, strict=True)
        for part in (codes[begin : begin + size].ravel(), ids[begin : begin + size].ravel())
    ]
    count, size = len(sizes), codes.shape[1]
    return InvertedLists(
        data=np.concatenate(parts),
        sizes=sizes,
        offsets=offsets,
        centroids=codes[offsets].astype(np.float32),
        norms=np.square(codes.astype(np.float32)).sum(1),
        centres=codes[:, size // 2 : size // 2 + 1].copy(),
        misfits=np.zeros(count, np.float32),
        spread=np.full(count, 100.0, np.float32),
        unit=np.ones(size, np.float32),
        zero=np.zeros(size, np.float32),
        residual=False,
        is_lossless=True,
        _transforms=(),
    )


@pytest.mark.parametrize("share", [0.03, 1.0])
def test_threads_change_no_bit(large: tuple[PatchDatabase, PatchIndex], share: float) -> None:
    db, index = large
    x = noisy(db, 0.4)
    one, three = (read(index, x, 0.4, share, threads=threads) for threads in (1, 3))
    for name in ("reference", "mass", "centre", "logit_sum", "seen", "deviation"):
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name))


@pytest.mark.parametrize("factory", ["PCA60,IVF8,SQ8", "IVF8,SQ8"])
def test_codes_that_lose_little_err_little(tmp_path: Path, factory: str) -> None:
    sigma = 1.5
    db, index = indexed(tmp_path, (3, 10, 10), 5, factory, count=80)
    x = noisy(db, sigma)
    lists = index.inverted
    assert lists is not None
    assert not lists.is_lossless
    assert obstacle(lists, ALPHA, sigma) is None
    sums = read(index, x, sigma, 1.0)
    machine = ScoreMachine(db, "ELS", "zeros")
    exact = machine.posterior(
        torch.from_numpy(x)[None].float(), alpha=ALPHA, sigma=sigma, patch_size=5
    )
    error = sums.centre / sums.mass[:, None] - inside(exact.mean[0].numpy(), 5)
    assert np.sqrt(np.square(error).mean()) <= 1.5 * np.sqrt(np.square(sums.deviation).mean())
    evidence = inside(exact.log_evidence[0].double().numpy(), 5)
    np.testing.assert_allclose(sums.reference + np.log(sums.mass), evidence, atol=0.25)


@pytest.mark.parametrize("factory", ["PCA20,IVF8,SQ8", "Pad88,IVF8,SQ8_direct"])
def test_the_least_beta_is_where_lists_begin_to_serve(tmp_path: Path, factory: str) -> None:
    """By what codes lose, and by float32 where they lose nothing."""
    _, index = indexed(tmp_path, (3, 10, 10), 5, factory, count=80)
    lists = index.inverted
    assert lists is not None
    beta = least_beta(lists)
    assert 0 < beta < 1
    for factor, serves in ((1 - 1e-6, False), (1 + 1e-6, True)):
        noise = beta * factor
        found = obstacle(lists, math.sqrt(1 - noise), math.sqrt(noise))
        assert (found is None) == serves


def test_tables_are_of_the_codes(tmp_path: Path) -> None:
    db, index = indexed(tmp_path, (3, 8, 9), 3, "Pad40,IVF8,SQ8_direct")
    lists = index.inverted
    assert lists is not None
    _, found = index.search(np.zeros((1, 3, 3, 3), np.float32), index.count, effort=8)
    assert sorted(found[0]) == sorted({*found[0]})
    patches = np.lib.stride_tricks.sliding_window_view(db.images, (3, 3), axis=(2, 3))
    levels = patches.transpose(0, 2, 3, 1, 4, 5).reshape(index.count, -1).astype(np.float64)
    assert np.sort(lists.norms) == pytest.approx(np.sort(np.square(levels).sum(1)))
    for c in range(3):
        middle = db.images[:, c, 1:-1, 1:-1].ravel()
        np.testing.assert_array_equal(np.sort(lists.centres[:, c]), np.sort(middle))
    assert lists.sizes.sum() == index.count
    assert (lists.misfits == 0).all()
    nearest = np.square(levels[:, None] - lists.centroids[None, :, :27]).sum(2).min(1)
    within = np.average(lists.spread, weights=lists.sizes)
    assert within == pytest.approx(nearest.mean(), rel=1e-3)


def machine_of(large: tuple[PatchDatabase, PatchIndex], boundary: str = "zeros") -> ScoreMachine:
    return ScoreMachine(large[0], "ELS", boundary)  # type: ignore[arg-type]


@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_the_mode(large: tuple[PatchDatabase, PatchIndex], boundary: str) -> None:
    db, _ = large
    machine = machine_of(large, boundary)
    x = torch.from_numpy(noisy(db, 0.5))[None].float()
    arguments = {"alpha": ALPHA, "sigma": 0.5, "patch_size": 5}
    exact = machine.posterior(x, **arguments)
    some = machine.posterior(x, **arguments, mode="lists", share=0.03)
    assert some.modes == ("lists",)
    assert some.error_kinds == ("estimate",)
    assert 0.01 < some.omitted_mass[0, 5, 5] < 1
    error = (some.mean - exact.mean).abs()
    assert error.mean() <= 2 * some.mean_error.mean()
    whole = machine.posterior(x, **arguments, mode="lists", share=1)
    torch.testing.assert_close(whole.mean, exact.mean, rtol=0, atol=2e-4)
    torch.testing.assert_close(whole.log_evidence, exact.log_evidence, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        whole.effective_patches, exact.effective_patches, rtol=2e-3, atol=1e-3
    )
    if boundary == "zeros":
        border = torch.ones(x.shape[2:], dtype=torch.bool)
        border[2:-2, 2:-2] = False
        assert (some.mean_error[0][border] == 0).all()
        torch.testing.assert_close(
            some.mean[0, 0][border], exact.mean[0, 0][border], rtol=0, atol=2e-4
        )


def test_a_class_is_read_from_its_own_images(large: tuple[PatchDatabase, PatchIndex]) -> None:
    machine = machine_of(large)
    x = torch.from_numpy(noisy(large[0], 0.5))[None].float()
    arguments = {"alpha": ALPHA, "sigma": 0.5, "patch_size": 5, "labels": 1}
    exact = machine.posterior(x, **arguments)
    whole = machine.posterior(x, **arguments, mode="lists", share=1)
    torch.testing.assert_close(whole.mean, exact.mean, rtol=0, atol=2e-4)
    some = machine.posterior(x, **arguments, mode="lists", share=0.3)
    assert (some.mean - exact.mean).abs().mean() <= 2 * some.mean_error.mean()


@pytest.mark.parametrize("label", [None, 0])
@pytest.mark.parametrize("share", [1e-6, 1 / 128, 0.2])
def test_a_pixel_that_reads_nothing_is_computed(
    tmp_path: Path, label: int | None, share: float
) -> None:
    """Of a few images a small share is no block at all."""
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    db = PatchDatabase.build(images, np.arange(40) % 2, path=tmp_path / "db")
    db.build_index(3, factory="IVF4,SQ8_direct")
    machine = ScoreMachine(db, "ELS", "zeros")
    x = torch.zeros(1, 1, 8, 8)
    arguments = {"alpha": 0.7, "sigma": 0.5, "patch_size": 3, "labels": label}
    exact = machine.posterior(x, **arguments)
    for seed in range(5):
        some = machine.posterior(x, **arguments, mode="lists", share=share, seed=seed)
        for value in (some.mean, some.log_evidence, some.effective_patches, some.mean_error):
            assert torch.isfinite(value).all()
        unknown = some.omitted_mass > 1e-3
        assert (some.mean_error[unknown] > 0).all()
        if some.modes == ("exact",):
            assert torch.equal(some.mean, exact.mean)
        else:
            # All interior pixels are one draw of few blocks.
            assert (some.mean - exact.mean).abs().mean() <= 6 * some.mean_error.mean() + 1e-4


def test_one_block_does_not_tell_its_error(large: tuple[PatchDatabase, PatchIndex]) -> None:
    """A mean of one block does not vary; how much it stands for is what it may be off by."""
    db, index = large
    x = noisy(db, 2.0)
    few = read(index, x, 2.0, 1e-6)
    many = read(index, x, 2.0, 0.3)
    assert few.blocks[few.mass > 0].min() < 2
    assert many.blocks.min() > 20
    whole = read(index, x, 2.0, 1.0)
    assert np.isinf(whole.blocks).all()


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.3])
def test_few_blocks_miss_what_is_no_further(
    large: tuple[PatchDatabase, PatchIndex], sigma: float
) -> None:
    """What was not read is no further from the noisy patch: claims are of the errors' size."""
    db, _ = large
    machine = machine_of(large, "circular")
    x = torch.from_numpy(np.stack([noisy(db, sigma, seed) for seed in range(6)]))
    exact = machine.posterior(x, alpha=ALPHA, sigma=sigma, patch_size=5).mean
    part = machine.posterior(x, alpha=ALPHA, sigma=sigma, patch_size=5, mode="lists", share=0.02)
    assert part.expected_error is not None
    error, claim = float((part.mean - exact).abs().mean()), float(part.expected_error.mean())
    assert error <= claim <= 2 * error


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_a_clean_patch_has_an_error_that_is_a_number(
    large: tuple[PatchDatabase, PatchIndex], share: float
) -> None:
    """Rounding can put the nearest patch at a squared distance below zero."""
    machine = machine_of(large, "circular")
    x = ALPHA * (torch.from_numpy(np.array(large[0].images[:40])) / 127.5 - 1)
    for sigma in (0.05, 0.1):
        part = machine.posterior(
            x, alpha=ALPHA, sigma=sigma, patch_size=5, mode="lists", share=share
        )
        assert part.expected_error is not None
        assert bool(torch.isfinite(part.expected_error).all())


def test_queries_beyond_float32_are_computed(large: tuple[PatchDatabase, PatchIndex]) -> None:
    machine = machine_of(large, "circular")
    x = 1e6 * torch.from_numpy(noisy(large[0], 0.5))[None].float()
    arguments = {"alpha": ALPHA, "sigma": 0.5, "patch_size": 5}
    answer = machine.posterior(x, **arguments, mode="lists")
    assert answer.modes == ("exact",)
    assert torch.equal(answer.mean, machine.posterior(x, **arguments).mean)


def test_lists_must_be_within_what_there_is(large: tuple[PatchDatabase, PatchIndex]) -> None:
    db, index = large
    x = noisy(db, 0.5)
    lists = index.inverted
    assert lists is not None
    few = np.ones(len(db) - 1, dtype=np.uint8)
    with pytest.raises(IndexError, match="names a patch at"):
        read(index, x, 0.5, 1.0, allowed=few, pixels=12 * 11)
    y, rest = index.components(query_patches(x, 5))
    for wrong in (
        {"sizes": lists.sizes[::-1].copy()},
        {"offsets": lists.offsets + 1},
        {"sizes": lists.sizes * -1},
    ):
        with pytest.raises(ValueError, match="sizes"):
            sampled(replace(lists, **wrong), y, rest, 0.5, 1.0)


def test_results_repeat_and_the_batch_does_not_show(
    large: tuple[PatchDatabase, PatchIndex],
) -> None:
    machine = machine_of(large)
    x = torch.from_numpy(np.stack([noisy(large[0], 0.5, seed) for seed in (1, 2)])).float()
    arguments = {"alpha": ALPHA, "sigma": 0.5, "patch_size": 5, "mode": "lists", "share": 0.05}
    both = machine.posterior(x, **arguments, seed=[4, 5])
    again = machine.posterior(x[1:], **arguments, seed=[5])
    other = machine.posterior(x[1:], **arguments, seed=[6])
    assert torch.equal(both.mean[1:], again.mean)
    assert not torch.equal(both.mean[1:], other.mean)


@pytest.mark.parametrize("boundary", ["zeros", "circular"])
@pytest.mark.parametrize("sigma", [0.2, 0.4, 0.8])
def test_auto_reads_lists_where_they_are_cheapest(
    many_lists: PatchDatabase, boundary: str, sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On so few images everything is cheaper than many short lists, but that is not the point here.
    costs = replace(LIST_COSTS, list_ranked=1.0)
    monkeypatch.setattr(NativeBackend, "costs", lambda *_: costs)
    monkeypatch.setattr("els.engine.approximate.auto.LEAST_PAIRS", 0)
    machine = ScoreMachine(many_lists, "ELS", boundary)  # type: ignore[arg-type]
    x = torch.from_numpy(noisy(many_lists, sigma))[None].float()
    arguments = {"alpha": ALPHA, "sigma": sigma, "patch_size": 5}
    exact = machine.posterior(x, **arguments)
    errors, claims = [], []
    for seed in range(6):
        near = machine.posterior(x, **arguments, mode="auto", tolerance=0.03, seed=seed)
        assert near.modes == ("lists",)
        errors.append(float((near.mean - exact.mean).abs().mean()))
        claims.append(0.8 * float(near.mean_error.mean()))
    assert np.mean(errors) <= 0.03
    # Claims are of what was not read; queries of 16 bits and float32 sums err besides.
    assert np.mean(errors) <= 2.5 * np.mean(claims) + 2e-5
    nothing = machine.posterior(x, **arguments, mode="auto", tolerance=1e-9)
    assert nothing.modes == ("exact",)


def test_no_pixel_is_left_without_an_answer(
    many_lists: PatchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pixel nothing was read, and the error of all others is well below the tolerance."""

    def sampled_but_for_one(*arguments: object, **options: object) -> Estimate:
        estimate = estimated(*arguments, **options)
        estimate.state.mass[0, 6, 5] = 0.0
        return estimate

    costs = replace(LIST_COSTS, list_ranked=1.0)
    monkeypatch.setattr(NativeBackend, "costs", lambda *_: costs)
    monkeypatch.setattr("els.engine.approximate.auto.LEAST_PAIRS", 0)
    monkeypatch.setattr("els.engine.approximate.lists.sampled", sampled_but_for_one)
    machine = ScoreMachine(many_lists, "ELS", "circular")
    x = torch.from_numpy(noisy(many_lists, 0.4))[None].float()
    arguments = {"alpha": ALPHA, "sigma": 0.4, "patch_size": 5}
    answer = machine.posterior(x, **arguments, mode="auto", tolerance=0.5)
    assert torch.isfinite(answer.mean).all()
    assert answer.modes != ("lists",)


def test_what_is_wrong_is_said(
    large: tuple[PatchDatabase, PatchIndex],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = machine_of(large)
    x = torch.from_numpy(noisy(large[0], 0.5))[None].float()
    arguments = {"alpha": ALPHA, "sigma": 0.5, "patch_size": 5, "mode": "lists"}
    for share in (0, -1, 1.5, math.nan, "much"):
        with pytest.raises(ValueError, match="share="):
            machine.posterior(x, **arguments, share=share)
    with pytest.raises(DatabaseError, match="no index of patch size 3"):
        machine.posterior(x, **{**arguments, "patch_size": 3})
    with pytest.raises(ValueError, match=r"sigma=0\.0001"):
        machine.posterior(x, **{**arguments, "sigma": 1e-4})
    with pytest.raises(ValueError, match="alpha=0"):
        machine.posterior(x, **{**arguments, "alpha": 0.0})
    with pytest.raises(ValueError, match="needs kind='ELS'"):
        ScoreMachine(large[0], "LS").posterior(x, **arguments)
    coded, _ = indexed(tmp_path, (1, 12, 11), 5, "PCA8,IVF4,PQ4x4", count=60)
    with pytest.raises(ValueError, match="one byte per component"):
        ScoreMachine(coded, "ELS").posterior(x, **arguments)
    monkeypatch.setattr(NativeBackend, "_kernels", lambda _: None)
    with pytest.raises(ValueError, match="compiled extension"):
        machine.posterior(x, **arguments)


def test_damaged_tables_are_found(tmp_path: Path) -> None:
    db, index = indexed(tmp_path, (1, 8, 8), 3, "IVF4,SQ8_direct")
    index.verify()
    norms = index.path / "norms.npy"
    sound = norms.read_bytes()
    norms.write_bytes(sound[:-4])
    with pytest.raises(DatabaseError, match=r"norms\.npy has"):
        db.open_index(3)
    norms.write_bytes(sound[:-4] + b"\0\0\0\1")
    with pytest.raises(DatabaseError, match=r"SHA-256 of norms\.npy"):
        db.open_index(3).verify()
    norms.unlink()
    with pytest.raises(DatabaseError, match="cannot be read"):
        db.open_index(3)
    manifest = json.loads((index.path / "manifest.json").read_text())
    del manifest["files"]["norms.npy"], manifest["checksum"]
    (index.path / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(DatabaseError, match="fields"):
        db.open_index(3)
