"""Subsets in groups: sums without each, sizes that pixels need, orders that are stratified."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from els.engine.approximate.allotments import (
    images_needed,
    share_allotments,
    subset_allotments,
)
from els.engine.approximate.costs import GROUPS
from els.engine.approximate.estimate import stratified
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


def test_the_size_of_a_subset_for_an_error() -> None:
    assert images_needed(0.02, 0.02, 100, 10_000, 0.5) == 100
    assert 380 < images_needed(0.02, 0.01, 100, 10_000, 0.5) <= 400
    assert 1350 < images_needed(0.02, 0.01, 100, 10_000, 0.25) < 1400
    assert images_needed(0.02, 1e-9, 100, 1000, 0.5) == 1000


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


@given(
    errors=st.lists(st.floats(1e-6, 1), min_size=2, max_size=20),
    power=st.floats(0.2, 0.5),
)
def test_more_images_go_to_the_pixels_that_err_most(errors: list[float], power: float) -> None:
    error, sizes = np.array(errors), np.full(len(errors), 64.0)
    ways = subset_allotments(error, sizes, 64, 10_000, power, image_cost=0.0)
    assert (np.diff(ways.costs) >= 0).all()
    assert (np.diff(ways.errors) <= 1e-12).all()
    assert ways.errors[-1] == 0
    assert (ways.sizes[-1] == 10_000).all()
    steps = np.log2(ways.sizes / 64)
    assert ((ways.sizes == 10_000) | (steps == np.rint(steps))).all()
    order = np.argsort(error)
    assert (np.diff(ways.sizes[:, order], axis=1) >= 0).all()
    # Never worse than to serve all pixels alike, but for sizes that are powers of two.
    for size in (128, 256, 512, 1024, 2048):
        alike = float(np.mean(error * ((1 / size - 1e-4) / (1 / 64 - 1e-4)) ** power))
        chosen = ways.cheapest(alike)
        assert ways.errors[chosen] <= alike
        assert ways.costs[chosen] <= 2 * size


def test_the_cheapest_costs_something() -> None:
    error, sizes = np.array([0.5, 0.1]), np.array([64.0, 64.0])
    ways = subset_allotments(error, sizes, 64, 10_000, 0.5, image_cost=0.5)
    assert ways.costs[0] == 0
    assert ways.costs[ways.cheapest(1.0)] > 0
    assert ways.errors[ways.cheapest(0.0)] == 0
    ways = share_allotments(np.array([0.5]), np.array([0.01]), 0.8, 1.5, 8.0, (1.0, 1.0))
    assert ways.cheapest(0.0) == len(ways.errors) - 1


def test_few_pixels_are_not_worth_many_images() -> None:
    error, sizes = np.array([1.0, *[0.02] * 19]), np.full(20, 64.0)
    largest = []
    for image_cost in (0.0, 2.0):
        ways = subset_allotments(error, sizes, 64, 10_000, 0.5, image_cost)
        chosen = ways.cheapest(0.035)
        assert ways.errors[chosen] <= 0.035
        largest.append(ways.sizes[chosen].max())
        images = largest[-1] - 64
        assert ways.costs[chosen] == pytest.approx(
            (ways.sizes[chosen] - 64).mean() + image_cost * images
        )
    assert largest[1] < largest[0]


def test_pixels_that_err_little_are_not_read_anew() -> None:
    error, shares = np.array([0.1, 0.1, 1e-4, 1e-4]), np.full(4, 0.01)
    ways = share_allotments(error, shares, 0.8, 1.5, 8.0, (10.0, 1000.0))
    chosen = ways.cheapest(0.03)
    growth = ways.sizes[chosen] / shares
    assert growth[2:].tolist() == [1, 1]
    assert (growth[:2] >= 1.5).all()
    assert ways.errors[chosen] == pytest.approx(np.mean(error * growth**-0.8))
    assert ways.costs[chosen] == pytest.approx(np.mean([10 + 1000 * 0.01 * growth[0]] * 2 + [0, 0]))
    assert ways.costs[0] == 0
    np.testing.assert_allclose(ways.sizes[-1], 8 * shares)


def test_no_pixel_reads_more_than_everything() -> None:
    error, shares = np.array([0.1, 0.1, 0.1]), np.array([0.2, 0.9, 1.0])
    ways = share_allotments(error, shares, 0.8, 1.5, 8.0, (10.0, 1000.0))
    chosen = ways.cheapest(1e-6)
    assert (ways.sizes[chosen] == 1.0).all()
    assert ways.sizes.max() == 1.0
