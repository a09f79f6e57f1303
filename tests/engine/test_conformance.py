"""One suite for every backend: what it answers, against the float64 oracle.

The tolerances follow from one figure, the backend's budget d for the error of a difference of two
logits that carry weight (`BackendUnderTest.logit_error`). Weights are then off by a factor within
1 +- 2 d, so a mean of values in [-1, 1] is off by at most 2 d, and an entropy by at most 2 d log M
with M candidates.

Float64 is not exact either, which shows at small sigma: a sum of squares is known to about 16 ulp,
and that of a whole image, |x|^2 - 2 alpha x.k + alpha^2 |k|^2, to 16 ulp of its parts. Both are
added to d. A log evidence is a number, not a difference: it has besides a relative error, and
where pixels are subtracted in float32 with error e, one of e / sigma * sqrt(2 |logit| terms)
(Cauchy-Schwarz: the differences of the heaviest candidates have the norm sigma sqrt(2 |logit|)).
A reported weight is exp(logit - log evidence), of which the logit may be exact: it bears the error
of the log evidence.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from backends import FLOAT64, BackendUnderTest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OraclePosterior
from questions import (
    FLOAT64_ERROR,
    GEOMETRIES,
    LOCAL_MACHINES,
    Question,
    assert_matches,
    assert_within,
    every_machine,
    fields,
    geometry,
    make_question,
    noise,
    on_cpu,
)

from els.engine import ScoreMachine
from els.engine.backends import image_machines as whole_image
from els.engine.backends import pytorch as reference
from els.engine.query import PosteriorQuery
from els.engine.result import LocalPosterior, finish
from els.engine.state import merge_all

TOP = 4
every_local_machine = pytest.mark.parametrize(("kind", "boundary"), LOCAL_MACHINES)


def nearest_wins(
    answer: LocalPosterior, question: Question, expected: list[OraclePosterior]
) -> int:
    """Whether the mean is the nearest patch's pixel where all others are much further away.

    Returns:
        At how many pixels this is so.
    """
    decided = 0
    _, height, width = question.images.shape[1:]
    for b, truth in enumerate(expected):
        parts = np.square(question.x[b], dtype=np.float64).sum() + truth.terms
        error = FLOAT64_ERROR * parts / (2 * question.sigma[b] ** 2)
        for pixel, logits in truth.logits.items():
            ranked = sorted(logits, key=logits.get)[-2:]
            if len(ranked) == 2 and logits[ranked[1]] - logits[ranked[0]] < 40 + 4 * error:
                continue
            decided += 1
            image, place = divmod(ranked[-1], height * width)
            clean = question.images[image, :, place // width, place % width] / 127.5 - 1
            np.testing.assert_allclose(answer.mean[b, :, *pixel], clean, atol=1e-6)
    return decided


@cache
def far_ties(sigma: float) -> Question:
    """Patches that differ in the order of their pixels tie, far from the query."""
    question = make_question((3, 6, 5), 9, 3, alpha=[1.0], sigma=[sigma], levels=2, seed=4)
    images = np.where(question.images > 0, 155, 100).astype(np.uint8)
    return replace(question, images=images, x=np.full_like(question.x, 1.5))


@cache
def far_away(size: float) -> Question:
    """Noisy pixels as large as ``size``, at little noise: distances beyond float32's precision."""
    question = make_question((2, 7, 6), 35, 5, alpha=[1.0] * 2, sigma=[1e-6, 1e-2], seed=7)
    return replace(question, x=(question.x * size).astype(np.float32))


@cache
def conditional() -> Question:
    plain = make_question((2, 6, 5), 19, 3, alpha=[0.9] * 4, sigma=[0.9] * 4, seed=5)
    rng = np.random.default_rng(6)
    image_labels = np.concatenate([[0, 3, 7], rng.choice([0, 3, 7], 16)])
    return replace(plain, image_labels=image_labels, labels=np.array([3, 0, 3, 7]))


@cache
def truth_of(make: object, argument: object, kind: str, boundary: str) -> list[OraclePosterior]:
    """Brute force, once for all backends."""
    question = make() if argument is None else make(argument)
    return question.expected(kind, boundary)


@every_machine
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry(backend: BackendUnderTest, kind: str, boundary: str, name: str) -> None:
    question = geometry(name)
    machine = backend.machine(question.images, kind, boundary)
    truth = truth_of(geometry, name, kind, boundary)
    assert_matches(question.ask(machine, backend.dtype), question, truth, backend)
    assert_matches(
        question.ask(machine, backend.dtype, entropy=False, top=TOP), question, truth, backend
    )


@every_machine
@pytest.mark.parametrize("sigma", [1e-6, 1e-5, 1e-4, 1e-3, 0.03, 0.3, 0.8, 1e3, 1e6, 1e16, 1e20])
def test_every_noise_level(
    backend: BackendUnderTest, kind: str, boundary: str, sigma: float
) -> None:
    question = noise(sigma)
    machine = backend.machine(question.images, kind, boundary)
    truth = truth_of(noise, sigma, kind, boundary)
    assert_matches(question.ask(machine, backend.dtype), question, truth, backend)
    assert_matches(question.ask(machine, backend.dtype, top=TOP), question, truth, backend)


@every_machine
@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.03, 0.3])
def test_near_ties_far_off_the_manifold(
    backend: BackendUnderTest, kind: str, boundary: str, sigma: float
) -> None:
    """Here a float32 distance is off by more than the differences that decide."""
    question = far_ties(sigma)
    machine = backend.machine(question.images, kind, boundary)
    truth = truth_of(far_ties, sigma, kind, boundary)
    assert_matches(question.ask(machine, backend.dtype, top=TOP), question, truth, backend)


@every_machine
@pytest.mark.parametrize("size", [1e2, 1e4, 1e12, 1e30])
def test_queries_of_any_size(
    backend: BackendUnderTest, kind: str, boundary: str, size: float
) -> None:
    question = far_away(size)
    machine = backend.machine(question.images, kind, boundary)
    truth = truth_of(far_away, size, kind, boundary)
    answer = question.ask(machine, torch.float64, top=TOP)
    assert_matches(answer, question, truth, backend)
    assert nearest_wins(answer, question, truth) > 0 or size > 1e4


@every_machine
def test_one_label_per_query(backend: BackendUnderTest, kind: str, boundary: str) -> None:
    question = conditional()
    machine = backend.machine(question.images, kind, boundary, question.image_labels)
    truth = truth_of(conditional, None, kind, boundary)
    assert_matches(question.ask(machine, backend.dtype, top=TOP), question, truth, backend)


@every_machine
def test_one_label_for_all(backend: BackendUnderTest, kind: str, boundary: str) -> None:
    question = conditional()
    machine = backend.machine(question.images, kind, boundary, question.image_labels)
    some = question.of([0, 2])
    together = on_cpu(
        machine.posterior(
            torch.from_numpy(some.x).to(machine.device, backend.dtype),
            alpha=0.9,
            sigma=0.9,
            patch_size=3,
            labels=3,
        )
    )
    truth = truth_of(conditional, None, kind, boundary)[::2]
    assert_matches(together, some, truth, backend)


@every_machine
def test_more_wanted_than_there_are(backend: BackendUnderTest, kind: str, boundary: str) -> None:
    question = geometry("17-images")
    machine = backend.machine(question.images, kind, boundary)
    answer = question.ask(machine, backend.dtype, top=1000)
    assert_matches(answer, question, truth_of(geometry, "17-images", kind, boundary), backend)
    counted = answer.top_weights.double().sum(-1)
    assert (counted - 1).abs().max() <= 2 * backend.logit_error + 1e-5


@every_machine
def test_ties_go_to_the_lower_address(backend: BackendUnderTest, kind: str, boundary: str) -> None:
    """Three times the same flat images: ties between images, and between places and shifts."""
    flat = np.repeat(np.array([30, 200, 90], dtype=np.uint8), 25).reshape(3, 1, 5, 5)
    images = np.concatenate([flat, flat, flat])
    question = Question(
        images, np.full((1, 1, 5, 5), 0.3, np.float32), np.array([1.0]), np.array([0.5]), 3
    )
    top = 60
    answer = question.ask(backend.machine(images, kind, boundary), backend.dtype, top=top)
    for pixel, logits in question.expected(kind, boundary)[0].logits.items():
        # Where the distance is a sum in another order, equal logits differ in the last digits.
        order = sorted(logits, key=lambda address: (-round(logits[address], 6), address))[:top]
        assert answer.top_addresses[0][pixel].tolist()[: len(order)] == order


@every_machine
def test_the_batch_does_not_show(backend: BackendUnderTest, kind: str, boundary: str) -> None:
    question = geometry("17-images" if backend.is_interpreted else "33-images")
    machine = backend.machine(question.images, kind, boundary)
    together = question.ask(machine, backend.dtype, top=TOP)
    for b in range(len(question.x)):
        alone = question.of([b]).ask(machine, backend.dtype, top=TOP)
        for value, single in zip(fields(together), fields(alone), strict=True):
            assert torch.equal(value[b : b + 1], single)


@every_machine
@pytest.mark.thinned
def test_the_number_of_threads_does_not_show(
    backend: BackendUnderTest, kind: str, boundary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not backend.has_threads:
        pytest.skip("no threads of its own")
    # Several blocks of images even for few images.
    monkeypatch.setattr(whole_image, "_BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 1 << 20)
    question = make_question((3, 8, 9), 150, 5, alpha=[0.7] * 3, sigma=[2.0] * 3)
    answers = []
    threads_before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            machine = backend.machine(question.images, kind, boundary, threads=threads)
            answers.append(question.ask(machine, backend.dtype, top=TOP))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads_before)
    for first, second in zip(*map(fields, answers), strict=True):
        assert torch.equal(first, second)


@every_machine
def test_many_blocks_are_one(kind: str, boundary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend cut into single images, and its answer whole."""
    question = geometry("17-images")
    machine = FLOAT64.machine(question.images, kind, boundary)
    monkeypatch.setattr(whole_image, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 1)
    answer = question.ask(machine, torch.float64, top=TOP)
    assert_matches(answer, question, truth_of(geometry, "17-images", kind, boundary), FLOAT64)


@every_machine
def test_strides_do_not_matter(backend: BackendUnderTest, kind: str, boundary: str) -> None:
    question = geometry("large-patch")
    machine = backend.machine(question.images, kind, boundary)
    x = torch.from_numpy(question.x).to(machine.device, backend.dtype)
    spread = torch.zeros(9, 18, 3, 2, dtype=backend.dtype, device=machine.device)
    spread[:, ::2] = x.permute(2, 3, 1, 0)
    strided = spread[:, ::2].permute(3, 2, 0, 1)
    assert not strided.is_contiguous()
    means = [
        machine.posterior(given, alpha=0.6, sigma=2.0, patch_size=7).mean for given in (x, strided)
    ]
    assert torch.equal(*means)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_machine
def test_half_precision_queries(kind: str, boundary: str, dtype: torch.dtype) -> None:
    """Computed in float64 from the numbers that were given; only the mean is rounded again."""
    question = noise(0.03)
    half = torch.from_numpy(question.x).to(dtype)
    rounded = replace(question, x=half.float().numpy())
    answer = rounded.ask(FLOAT64.machine(question.images, kind, boundary), dtype)
    assert answer.mean.dtype == dtype
    assert answer.log_evidence.dtype == torch.float32
    for b, truth in enumerate(rounded.expected(kind, boundary)):
        assert_within(answer.mean[b].float(), truth.mean, torch.finfo(dtype).eps, "mean")
        assert_within(
            answer.log_evidence[b],
            truth.log_evidence,
            1e-6 * (1 + np.abs(truth.log_evidence)),
            "log_evidence",
        )


@pytest.mark.parametrize("patch_size", [1, 3, 5])
def test_circular_els_is_equivariant(backend: BackendUnderTest, patch_size: int) -> None:
    question = make_question((1, 6, 7), 5, patch_size, alpha=[0.8] * 2, sigma=[1.0] * 2)
    machine = backend.machine(question.images, "ELS", "circular")
    x = torch.from_numpy(question.x).to(machine.device, backend.dtype)
    options = {"alpha": 0.8, "sigma": 1.0, "patch_size": patch_size}
    mean = machine.posterior(x, **options).mean
    for shift in [(1, 0), (0, 1), (4, 5)]:
        shifted = machine.posterior(x.roll(shift, (2, 3)), **options).mean
        assert (shifted - mean.roll(shift, (2, 3))).abs().max() <= 4 * backend.logit_error


def test_els_is_ls_where_the_patch_is_the_image(backend: BackendUnderTest) -> None:
    question = geometry("patch-is-the-image")
    els, ls = (
        question.ask(backend.machine(question.images, kind, "zeros"), backend.dtype)
        for kind in ("ELS", "LS")
    )
    assert (els.mean - ls.mean).abs().max() <= 4 * backend.logit_error


@every_machine
def test_the_order_of_the_images_does_not_matter(
    backend: BackendUnderTest, kind: str, boundary: str
) -> None:
    question = geometry("17-images")
    order = np.random.default_rng(1).permutation(len(question.images))
    machine = backend.machine(question.images[order], kind, boundary)
    answer = question.ask(machine, backend.dtype)
    assert_matches(answer, question, truth_of(geometry, "17-images", kind, boundary), backend)


@every_machine
@settings(max_examples=10)
@given(data=st.data())
def test_states_of_parts_merge_to_the_whole(
    backend: BackendUnderTest, kind: str, boundary: str, data: st.DataObject
) -> None:
    question = data.draw(questions())
    machine = backend.machine(question.images, kind, boundary)
    count = len(question.images)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    parts = [np.flatnonzero(chosen), np.flatnonzero(~chosen)]
    states = [
        machine.backend_object.states(
            machine.db.images, query_of(question, machine, backend), [part]
        )[0]
        for part in parts
    ]
    whole = merge_all(states)
    answer = on_cpu(finish(whole, backend.dtype))
    assert_matches(answer, question, question.expected(kind, boundary), backend)


@every_machine
@settings(max_examples=10)
@given(data=st.data())
def test_any_question(
    backend: BackendUnderTest, kind: str, boundary: str, data: st.DataObject
) -> None:
    question = data.draw(questions())
    machine = backend.machine(question.images, kind, boundary)
    answer = question.ask(machine, backend.dtype, top=data.draw(st.sampled_from([0, 1, 5])))
    assert_matches(answer, question, question.expected(kind, boundary), backend)


@every_local_machine
@pytest.mark.parametrize("count", [1, 6], ids="k{}".format)
def test_weighed_candidates(
    backend: BackendUnderTest, kind: str, boundary: str, count: int
) -> None:
    """A random choice of each pixel's candidates, with free places among them."""
    question = make_question((3, 5, 6), 4, 3, alpha=[0.7, 0.9], sigma=[1.5, 0.2], seed=11)
    rng = np.random.default_rng(count)
    expected = question.expected(kind, boundary)
    addresses = np.full((2, 5, 6, count), -1)
    for b, truth in enumerate(expected):
        for pixel, logits in truth.logits.items():
            chosen = rng.permutation(list(logits))[: max(1, count - 1)]
            addresses[b, *pixel, rng.permutation(count)[: len(chosen)]] = chosen
    machine = backend.machine(question.images, kind, boundary)
    query = query_of(question, machine, backend)
    state, logits = machine.backend_object.weigh(
        machine.db.images, query, torch.from_numpy(addresses)
    )
    answer = on_cpu(finish(state, torch.float64))
    for b, truth in enumerate(expected):
        for pixel, of_pixel in truth.logits.items():
            at = (b, *pixel)
            is_there = addresses[at] >= 0
            kept = addresses[at][is_there]
            wanted = np.array([of_pixel[address] for address in kept])
            found = logits[at].numpy()
            np.testing.assert_allclose(found[is_there], wanted, rtol=1e-12)
            assert (found[~is_there] == -np.inf).all()
            weights = np.exp(wanted - wanted.max())
            share = weights / weights.sum()
            n, place = np.divmod(kept, 30)
            clean = question.images[n, :, place // 6, place % 6] / 127.5 - 1
            mean = (share[:, None] * clean).sum(0)
            np.testing.assert_allclose(answer.mean[b, :, *pixel], mean, atol=1e-12)
            evidence = wanted.max() + np.log(weights.sum())
            assert answer.log_evidence[at].item() == pytest.approx(evidence, rel=1e-12)
            effective = np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())
            assert answer.effective_patches[at].item() == pytest.approx(effective, rel=1e-9)


def test_no_candidate_to_weigh(backend: BackendUnderTest) -> None:
    question = make_question((1, 3, 3), 2, 3, alpha=[0.7], sigma=[1.0])
    machine = backend.machine(question.images, "ELS", "zeros")
    query = query_of(question, machine, backend)
    none = torch.full((1, 3, 3, 2), -1)
    state, logits = machine.backend_object.weigh(machine.db.images, query, none)
    assert torch.isneginf(logits).all()
    assert torch.isneginf(state.reference).all()
    assert (state.mass == 0).all()


@pytest.mark.parametrize(("side", "patch_size"), [((8, 9), 5), ((7, 7), 7), ((6, 8), 1)])
def test_only_the_border(backend: BackendUnderTest, side: tuple[int, int], patch_size: int) -> None:
    question = make_question(
        (2, *side), 5, patch_size, alpha=[0.7], sigma=[0.4 * patch_size], seed=12
    )
    machine = backend.machine(question.images, "ELS", "zeros")
    query = query_of(question, machine, backend)
    is_border = ~query.interior
    border = replace(query, pixels=is_border)
    (state,) = machine.backend_object.states(machine.db.images, border, [np.arange(5)])
    mean = finish(state, torch.float64).mean[0].numpy()
    truth = question.expected("ELS", "zeros")[0].mean
    assert np.abs(mean - truth)[:, is_border].max(initial=0) <= 2 * backend.logit_error


@st.composite
def questions(draw: st.DrawFn) -> Question:
    channels, height, width = (draw(st.integers(1, most)) for most in (4, 6, 6))
    radius = draw(st.integers(0, (min(height, width) - 1) // 2))
    sigma = 10.0 ** draw(st.floats(-6, 3))
    return make_question(
        (channels, height, width),
        draw(st.integers(1, 20)),
        2 * radius + 1,
        alpha=[draw(st.floats(0, 1))] * 2,
        sigma=[sigma, 2 * sigma],
        levels=draw(st.sampled_from([2, 4, 256])),
        seed=draw(st.integers(0, 1000)),
    )


def query_of(
    question: Question,
    machine: ScoreMachine,
    backend: BackendUnderTest,
) -> PosteriorQuery:
    return PosteriorQuery(
        x=torch.from_numpy(question.x).to(machine.device, backend.dtype),
        alpha=torch.from_numpy(question.alpha),
        sigma=torch.from_numpy(question.sigma),
        kind=machine.definition,
        boundary=machine.boundary,
        patch_size=question.patch_size,
    )


def drop_the_border_mask(patch: pytest.MonkeyPatch) -> None:
    def every_shift(_query, length):
        return [
            reference._Alignment(max(0, -shift), shift, length - abs(shift))
            for shift in range(1 - length, length)
        ]

    patch.setattr(reference, "_alignments", every_shift)


def flip_the_shift(patch: pytest.MonkeyPatch) -> None:
    """Centres from the wrong side: right distances, wrong pixels."""
    honest = reference._block_state

    def flipped(query, logits, clean, numbers, rows, columns):
        return honest(query, logits, clean.flip(-1), numbers, rows, columns)

    patch.setattr(reference, "_block_state", flipped)


def flip_the_sign(patch: pytest.MonkeyPatch) -> None:
    honest = whole_image._logits
    patch.setattr(
        whole_image,
        "_logits",
        lambda energy, product, *others: honest(energy, -product, *others),
    )


def forget_the_factor_two(patch: pytest.MonkeyPatch) -> None:
    honest = reference.patch_distances
    patch.setattr(reference, "patch_distances", lambda *given: 2 * honest(*given))


def forget_a_displacement(patch: pytest.MonkeyPatch) -> None:
    honest = reference._alignments
    patch.setattr(reference, "_alignments", lambda *given: honest(*given)[:-1])


def forget_to_rescale(patch: pytest.MonkeyPatch) -> None:
    """Merge masses without regard to their maxima."""

    def careless(total, part, images, rows, columns):
        total.reference[images, rows, columns] = part.reference
        total.mass[images, rows, columns] += part.mass
        total.centre[images, :, rows, columns] += part.centre

    patch.setattr(reference, "merge_into", careless)


def reverse_the_shifts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "conj", lambda tensor: tensor)


MUTANTS = [
    pytest.param(drop_the_border_mask, "ELS", "zeros", id="border-mask-dropped"),
    pytest.param(flip_the_shift, "ELS", "circular", id="shift-flipped"),
    pytest.param(flip_the_sign, "IS", "zeros", id="sign-flipped"),
    pytest.param(forget_the_factor_two, "LS", "zeros", id="factor-two-forgotten"),
    pytest.param(forget_a_displacement, "ELS", "zeros", id="displacement-forgotten"),
    pytest.param(forget_to_rescale, "ELS", "circular", id="rescaling-forgotten"),
    pytest.param(reverse_the_shifts, "ES", "zeros", id="shifts-reversed"),
]


@pytest.mark.parametrize(("mutate", "kind", "boundary"), MUTANTS)
def test_the_suite_can_fail(
    mutate: object, kind: str, boundary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong engine is rejected, and the same engine unharmed is not."""
    question = geometry("17-images")
    truth = truth_of(geometry, "17-images", kind, boundary)
    machine = FLOAT64.machine(question.images, kind, boundary)
    assert_matches(question.ask(machine, torch.float64, entropy=False), question, truth, FLOAT64)
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"mean|log_evidence"):
        assert_matches(
            question.ask(machine, torch.float64, entropy=False), question, truth, FLOAT64
        )


def test_a_wrong_top_is_rejected() -> None:
    question = geometry("17-images")
    truth = truth_of(geometry, "17-images", "ELS", "zeros")
    answer = question.ask(FLOAT64.machine(question.images, "ELS", "zeros"), torch.float64, top=TOP)
    second_best = replace(answer, top_addresses=answer.top_addresses.flip(-1))
    with pytest.raises(AssertionError, match="top"):
        assert_matches(second_best, question, truth, FLOAT64)
