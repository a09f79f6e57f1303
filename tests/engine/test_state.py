"""The partial state: a monoid under merge, whatever the candidates."""

import math
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from els.engine.kinds import ELS
from els.engine.query import PosteriorQuery
from els.engine.result import finish
from els.engine.state import PosteriorState, TopPatches, best, empty, merge, merge_all, merge_into

TOP = 3
# One rounding of exp and a few of sums, each relative to numbers that merge may cancel.
ROUNDING = 1e-12

Candidate = tuple[float, float]  # logit, centre

logits = st.floats(-1e9, 1e3) | st.floats(-5, 5) | st.sampled_from([0.0, -1e9, 1e3])
candidates = st.lists(st.tuples(logits, st.floats(-1, 1)), max_size=6)
three_sets = st.tuples(candidates, candidates, candidates)


def query(top: int = TOP, entropy: bool = True) -> PosteriorQuery:
    one = torch.ones(1, dtype=torch.float64)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    return PosteriorQuery(x, one, one, ELS, "zeros", 1, entropy, top)


def state_of(given: list[Candidate], first_address: int = 0) -> PosteriorState:
    """One pixel's state, from the definition."""
    if not given:
        return empty(query())
    values = torch.tensor([logit for logit, _ in given], dtype=torch.float64)
    centres = torch.tensor([centre for _, centre in given], dtype=torch.float64)
    addresses = torch.arange(first_address, first_address + len(given))
    shifted = values - values.max()
    weights = shifted.exp()

    def pixel(value: torch.Tensor) -> torch.Tensor:
        return value.reshape(1, 1, 1)

    return PosteriorState(
        reference=pixel(values.max()),
        mass=pixel(weights.sum()),
        centre=(weights * centres).sum().reshape(1, 1, 1, 1),
        logit_sum=pixel((weights * shifted).sum()),
        top=best(values.reshape(1, 1, 1, -1), addresses.reshape(1, 1, 1, -1), TOP),
    )


def states_of(sets: tuple[list[Candidate], ...]) -> list[PosteriorState]:
    return [state_of(given, 100 * place) for place, given in enumerate(sets)]


def assert_close(first: PosteriorState, second: PosteriorState) -> None:
    assert torch.equal(first.reference, second.reference)
    for name in ("mass", "centre", "logit_sum"):
        values = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(*values, rtol=ROUNDING, atol=ROUNDING)
    assert torch.equal(first.top.logits, second.top.logits)
    assert torch.equal(first.top.addresses, second.top.addresses)


@given(three_sets)
def test_merge_is_associative(sets: tuple[list[Candidate], ...]) -> None:
    a, b, c = states_of(sets)
    assert_close(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(three_sets)
def test_merge_is_commutative(sets: tuple[list[Candidate], ...]) -> None:
    a, b, _ = states_of(sets)
    assert_close(merge(a, b), merge(b, a))


@given(candidates)
def test_the_empty_state_is_the_identity(given: list[Candidate]) -> None:
    state = state_of(given)
    for merged in (merge(state, empty(query())), merge(empty(query()), state)):
        for name in ("reference", "mass", "centre", "logit_sum"):
            assert torch.equal(getattr(merged, name), getattr(state, name))
        assert torch.equal(merged.top.addresses, state.top.addresses)


@given(three_sets)
def test_merged_parts_are_the_state_of_the_whole(sets: tuple[list[Candidate], ...]) -> None:
    whole = state_of([candidate for given in sets for candidate in given])
    merged = merge_all(states_of(sets))
    for name in ("reference", "mass", "centre", "logit_sum"):
        values = getattr(merged, name), getattr(whole, name)
        torch.testing.assert_close(*values, rtol=ROUNDING, atol=ROUNDING)
    # Addresses differ, but not their order.
    assert torch.equal(merged.top.logits, whole.top.logits)


@given(three_sets)
def test_finished_posteriors_stay_in_bounds(sets: tuple[list[Candidate], ...]) -> None:
    given = [candidate for part in sets for candidate in part]
    if not given:
        return
    answer = finish(merge_all(states_of(sets)), torch.float64)
    assert abs(answer.mean.item()) <= 1 + ROUNDING
    assert 1 - ROUNDING <= answer.effective_patches.item() <= len(given) * (1 + ROUNDING)
    assert answer.top_weights.sum().item() <= 1 + 1e-6
    largest = max(logit for logit, _ in given)
    slack = 1e-6
    assert largest - slack <= answer.log_evidence.item() <= largest + math.log(len(given)) + slack


def test_a_reference_below_the_largest_logit_is_fine() -> None:
    """Backends may keep a reference logit that a later candidate beats by a margin."""
    given = [(1.0, 0.5), (3.0, -0.5)]
    largest = state_of(given)
    shift = 2.5
    lowered = PosteriorState(
        reference=largest.reference - shift,
        mass=largest.mass * math.exp(shift),
        centre=largest.centre * math.exp(shift),
        logit_sum=(largest.logit_sum + shift * largest.mass) * math.exp(shift),
        top=largest.top,
    )
    other = state_of([(2.0, 0.1)], 100)
    expected, answer = (finish(merge(state, other), torch.float64) for state in (largest, lowered))
    for name in ("mean", "log_evidence", "effective_patches", "top_weights"):
        torch.testing.assert_close(
            getattr(answer, name), getattr(expected, name), rtol=ROUNDING, atol=ROUNDING
        )


def test_optional_sums_stay_away_when_not_asked_for() -> None:
    bare = empty(query(top=0, entropy=False))
    merged = reduce(merge, [bare, bare])
    assert merged.logit_sum is None
    assert merged.top is None
    assert torch.isneginf(merged.reference).all()
    assert not merged.mass.any()


def test_merge_into_touches_its_pixels_only() -> None:
    wide = PosteriorQuery(
        torch.zeros(2, 1, 3, 4),
        *[torch.ones(2, dtype=torch.float64)] * 2,
        ELS,
        "zeros",
        1,
        entropy=True,
        top=TOP,
    )
    total = empty(wide)
    merge_into(total, state_of([(0.5, 0.25)], 7), slice(1, 2), slice(2, 3), slice(0, 1))
    assert total.reference[1, 2, 0] == 0.5
    assert total.centre[1, 0, 2, 0] == 0.25
    assert total.top.addresses[1, 2, 0].tolist() == [7, -1, -1]
    assert torch.isfinite(total.reference).sum() == 1
    assert total.mass.sum() == 1


@pytest.mark.parametrize(
    ("values", "addresses", "expected"),
    [
        pytest.param([1.0, 3.0, 2.0], [5, 6, 7], [6, 7], id="by-logit"),
        pytest.param([1.0, 1.0, 1.0], [9, 4, 6], [4, 6], id="ties-by-address"),
        pytest.param([2.0], [3], [3, -1], id="padded"),
        pytest.param([-math.inf, 2.0], [-1, 8], [8, -1], id="none-is-last"),
        pytest.param([], [], [-1, -1], id="nothing"),
    ],
)
def test_best(values: list[float], addresses: list[int], expected: list[int]) -> None:
    chosen = best(
        torch.tensor(values, dtype=torch.float64), torch.tensor(addresses, dtype=torch.int64), 2
    )
    assert isinstance(chosen, TopPatches)
    assert chosen.addresses.tolist() == expected
    assert (torch.isneginf(chosen.logits) == (chosen.addresses == -1)).all()
