"""Subsets in groups: sums without each, sizes that pixels need, orders that are stratified."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from els.engine.approximate.costs import GROUPS
from els.engine.approximate.estimate import stratified
from els.engine.approximate.growth import Samples, larger_sizes
from els.engine.approximate.subset import counts_of
from els.engine.state import PosteriorState, merge, only_where, rescaled, where, without_each


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 100),
    share=st.floats(0, 1),
)
def test_every_beginning_has_its_share_of_every_class(
    counts: list[int], seed: int, share: float
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    members = np.arange(len(labels))
    order = stratified(members, labels, np.random.default_rng(seed))
    assert sorted(order) == members.tolist()
    taken = order[: round(share * len(order))]
    for label, count in enumerate(counts):
        # Each class is off by less than one, and so is where the beginning ends, per class.
        expected = len(taken) * count / len(order)
        assert abs((labels[taken] == label).sum() - expected) <= 1 + len(counts)


def groups_of(seed: int, reference: float = 0.0) -> PosteriorState:
    rng = np.random.default_rng(seed)
    shape = (GROUPS, 2, 3)
    sums = (
        reference + rng.standard_normal(shape),
        rng.random(shape),
        rng.standard_normal((GROUPS, 3, 2, 3)),
        rng.standard_normal(shape),
    )
    return PosteriorState(*map(torch.from_numpy, sums))


def test_groups_of_no_candidates() -> None:
    groups = groups_of(1, reference=-1e12)
    some = (torch.arange(GROUPS) % 2 == 0).reshape(-1, 1, 1)
    reference = torch.full((2, 3), -1e12, dtype=torch.float64)
    left = rescaled(only_where(some, groups), reference)
    expected = rescaled(groups, reference)
    for name in ("mass", "centre", "logit_sum"):
        ours, theirs = getattr(left, name), getattr(expected, name)
        assert torch.equal(ours[0::2], theirs[0::2])
        assert (ours[1::2] == 0).all()


def test_states_without_each_do_not_cancel() -> None:
    """Also without one that outweighs the others beyond what a float64 holds."""
    groups = groups_of(0)
    groups.reference[3] += 1e3
    found = without_each(groups)
    for g in range(GROUPS):
        others = [each for each in range(GROUPS) if each != g]
        reference = groups.reference[others].amax(0)
        weights = (groups.reference[others] - reference).exp()
        mass = (weights * groups.mass[others]).sum(0)
        centre = (weights.unsqueeze(1) * groups.centre[others]).sum(0)
        torch.testing.assert_close(found.centre[g] / found.mass[g], centre / mass)
        evidence = found.reference[g] + found.mass[g].log()
        torch.testing.assert_close(evidence, reference + mass.log())


@given(sizes=st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_counts_are_of_images_dealt_in_turn(sizes: list[int]) -> None:
    counts = counts_of(np.array([sizes], dtype=np.float64))
    for size, of_groups in zip(sizes, counts[:, 0].T, strict=True):
        np.testing.assert_array_equal(
            of_groups, np.bincount(np.arange(size) % GROUPS, None, GROUPS)
        )


def test_groups_merge_at_some_pixels() -> None:
    first, second = groups_of(0), groups_of(1, reference=5.0)
    pixels = torch.tensor([[True, False, True], [False, True, False]])
    merged = where(pixels, merge(first, second), first)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    sums = [rescaled(each, zero) for each in (first, second, merged)]
    for field in ("mass", "centre", "logit_sum"):
        of_first, of_second, of_merged = (getattr(each, field) for each in sums)
        expected = of_first + torch.where(pixels, of_second, 0.0)
        torch.testing.assert_close(of_merged, expected, rtol=1e-12, atol=1e-12)


def samples_of(
    errors: list[float],
    sizes: list[float],
    *,
    costs: float = 1.0,
    pixels: float = 1.0,
    most: float = 10_000.0,
    population: float = 10_000.0,
) -> Samples:
    one = np.ones(len(errors))
    return Samples(
        pixels * one, np.array(errors), np.array(sizes), costs * one, most * one, population * one
    )


def grown(aim: float, *samples: Samples) -> list[np.ndarray]:
    return larger_sizes([SimpleNamespace(samples=each) for each in samples], aim)


def expected_error(samples: Samples, sizes: np.ndarray) -> np.ndarray:
    left = (1 / sizes - 1 / samples.population) / (1 / samples.sizes - 1 / samples.population)
    return samples.errors * np.sqrt(left)


def test_the_size_of_a_subset_for_an_error() -> None:
    (sizes,) = grown(0.01, samples_of([0.02], [100.0]))
    assert 380 < sizes[0] < 400
    # No further than an error tells of another, and the next step then.
    (sizes,) = grown(0.004, samples_of([0.02], [100.0]))
    assert sizes[0] == 800
    # Nearly everything is everything, and no step is too short to be worth it.
    for aim in (1e-9, 0.001):
        (sizes,) = grown(aim, samples_of([0.02], [100.0]))
        assert sizes[0] == 10_000
    (sizes,) = grown(0.0199, samples_of([0.02], [100.0]))
    assert sizes[0] == pytest.approx(150)


@given(
    errors=st.lists(st.floats(1e-4, 1), min_size=2, max_size=20),
    share=st.floats(0.4, 0.95),
    costs=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)
def test_samples_grow_where_errors_fall_most_for_the_work(
    errors: list[float], share: float, costs: tuple[float, float]
) -> None:
    half = len(errors) // 2
    samples = [
        samples_of(part, [64.0] * len(part), costs=cost)
        for part, cost in zip((errors[:half], errors[half:]), costs, strict=True)
    ]
    aim = share * float(np.mean(errors))
    sizes = grown(aim, *samples)
    left, worth, limits = [], [], []
    for each, larger in zip(samples, sizes, strict=True):
        assert (larger >= each.sizes).all()
        assert ((larger <= 8 * 64 * (1 + 1e-12)) | (larger == 10_000)).all()
        # In one part, what errs more grows no less.
        order = np.argsort(each.errors, kind="stable")
        assert (np.diff(larger[order]) >= -1e-9 * larger.max()).all()
        left.append(expected_error(each, larger))
        worth.append(each.errors * np.sqrt(each.sizes) / larger**1.5 / each.costs)
        limits.append((larger > 1.6 * each.sizes) & (larger < 7.9 * each.sizes))
    is_limited = any((s == 8 * 64).any() for s in sizes)
    assert is_limited or np.concatenate(left).mean() <= aim * (1 + 1e-9)
    free = np.concatenate(worth)[np.concatenate(limits)]
    assert len(free) == 0 or free.max() <= free.min() * (1 + 1e-6)


@pytest.mark.parametrize("size", [300.0, 700.0, 999.0])
def test_what_is_nearly_everything_still_grows(size: float) -> None:
    (sizes,) = grown(1e-9, samples_of([0.02], [size], most=1000.0, population=1000.0))
    assert sizes[0] == 1000


def test_a_sample_that_many_pixels_share_counts_for_all_of_them() -> None:
    alone, shared = samples_of([0.1], [64.0]), samples_of([0.001], [64.0], pixels=99.0)
    first, second = grown(0.0016, alone, shared)
    assert first[0] > 64
    assert second[0] == 64


def test_lists_never_tell_everything() -> None:
    lists = samples_of([0.1, 0.1, 1e-4], [0.2, 0.9, 0.01], most=1.0, population=np.inf)
    (shares,) = grown(1e-6, lists)
    assert shares[:2].tolist() == [1, 1]
    assert shares[2] == pytest.approx(0.08)
