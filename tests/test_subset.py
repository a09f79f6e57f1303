"""Subsets in groups: sums without each, sizes that pixels need, orders that are stratified."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from els.engine.approximate.subset import (
    GROUPS,
    Groups,
    counts_of,
    images_needed,
    share_allotments,
    stratified,
    subset_allotments,
    sums_without_each,
)


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


def groups_of(seed: int, maximum: float = 0.0) -> Groups:
    rng = np.random.default_rng(seed)
    shape = (GROUPS, 2, 3)
    return Groups(
        maximum + rng.standard_normal(shape),
        rng.random(shape),
        rng.standard_normal((GROUPS, 3, 2, 3)),
        rng.standard_normal(shape),
    )


def test_groups_of_no_candidates() -> None:
    groups = groups_of(1, maximum=-1e12)
    some = np.arange(GROUPS)[:, None, None] % 2 == np.zeros((2, 3))
    left = groups.where(some).on(np.full((2, 3), -1e12))
    expected = groups.on(np.full((2, 3), -1e12))
    for name in ("mass", "centre", "tilt"):
        ours, theirs = getattr(left, name), getattr(expected, name)
        np.testing.assert_array_equal(ours[0::2], theirs[0::2])
        assert (ours[1::2] == 0).all()
    nothing = groups.first().where(np.zeros((1, 2, 3), dtype=bool))
    merged = nothing.merged(groups.first(), np.ones((2, 3), dtype=bool))
    np.testing.assert_allclose(merged.mass, groups.mass[:1])


def test_sums_without_each_do_not_cancel() -> None:
    values = np.random.default_rng(0).random((GROUPS, 2, 3))
    values[3] *= 1e20
    expected = np.stack([np.delete(values, g, axis=0).sum(0) for g in range(GROUPS)])
    np.testing.assert_allclose(sums_without_each(values), expected, rtol=1e-14)


@given(sizes=st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_counts_are_of_images_dealt_in_turn(sizes: list[int]) -> None:
    counts = counts_of(np.array([sizes], dtype=np.float64))
    for size, of_groups in zip(sizes, counts[:, 0].T, strict=True):
        np.testing.assert_array_equal(
            of_groups, np.bincount(np.arange(size) % GROUPS, None, GROUPS)
        )


def test_groups_merge_where_they_are_told_to() -> None:
    first, second = groups_of(0), groups_of(1, maximum=5.0)
    where = np.array([[True, False, True], [False, True, False]])
    merged = first.merged(second, where)
    for field in ("mass", "centre"):
        scaled = [
            getattr(each, field)
            * np.exp(each.maximum)[(slice(None), None)[: 1 + (field != "mass")]]
            for each in (first, second, merged)
        ]
        np.testing.assert_allclose(scaled[2], scaled[0] + where * scaled[1], rtol=1e-12, atol=1e-12)
    # Of weights w, the tilt is the sum of w log w, in whatever units the weights are.
    tilts = [
        (each.tilt + each.maximum * each.mass) * np.exp(each.maximum)
        for each in (first, second, merged)
    ]
    np.testing.assert_allclose(tilts[2], tilts[0] + where * tilts[1], rtol=1e-12, atol=1e-12)


def test_a_group_of_none_adds_nothing() -> None:
    some = groups_of(0)
    none = Groups(
        np.full_like(some.mass, -np.inf),
        np.zeros_like(some.mass),
        np.zeros_like(some.centre),
        np.zeros_like(some.tilt),
    )
    everywhere = np.ones((2, 3), dtype=np.bool_)
    for merged in (some.merged(none, everywhere), none.merged(some, everywhere)):
        np.testing.assert_array_equal(merged.mass, some.mass)
        np.testing.assert_array_equal(merged.tilt, some.tilt)
    both = none.merged(none, everywhere)
    assert (both.mass == 0).all()
    assert np.isneginf(both.maximum).all()


@given(
    errors=st.lists(st.floats(1e-6, 1), min_size=2, max_size=20),
    power=st.floats(0.2, 0.5),
)
def test_more_images_go_to_the_pixels_that_err_most(errors: list[float], power: float) -> None:
    error, sizes = np.array(errors), np.full(len(errors), 64.0)
    ways = subset_allotments(error, sizes, 64, 10_000, power, passing=0.0)
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
    ways = subset_allotments(error, sizes, 64, 10_000, 0.5, passing=0.5)
    assert ways.costs[0] == 0
    assert ways.costs[ways.cheapest(1.0)] > 0
    assert ways.errors[ways.cheapest(0.0)] == 0
    ways = share_allotments(np.array([0.5]), np.array([0.01]), 0.8, 1.5, 8.0, (1.0, 1.0))
    assert ways.cheapest(0.0) == len(ways.errors) - 1


def test_few_pixels_are_not_worth_many_images() -> None:
    error, sizes = np.array([1.0, *[0.02] * 19]), np.full(20, 64.0)
    largest = []
    for passing in (0.0, 2.0):
        ways = subset_allotments(error, sizes, 64, 10_000, 0.5, passing)
        chosen = ways.cheapest(0.035)
        assert ways.errors[chosen] <= 0.035
        largest.append(ways.sizes[chosen].max())
        images = largest[-1] - 64
        assert ways.costs[chosen] == pytest.approx(
            (ways.sizes[chosen] - 64).mean() + passing * images
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
