"""The Triton kernels: configurations, float64, given candidates, streams, top-k, compilation.

What every backend must answer is in test_conformance.py. Without a GPU all of this is interpreted.
"""

import contextvars
import copy
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backends import FLOAT64, TRITON, triton_backend
from numpy.typing import NDArray
from questions import (
    LOCAL_MACHINES,
    MACHINES,
    assert_matches,
    fields,
    geometry,
    make_question,
    noise,
)

from els.engine import ScoreMachine
from els.engine.backends import device_images
from els.engine.backends import triton as gpu
from els.engine.backends.triton import TritonBackend
from els.engine.kinds import ELS
from els.engine.query import PosteriorQuery
from els.engine.result import finish
from els.engine.state import merge_all
from els.index import PatchDatabase

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from els.triton_kernels import queries
from els.triton_kernels.attention import attention_kernel
from els.triton_kernels.configurations import CANDIDATES, SHIPPED
from els.triton_kernels.truncated import truncated

pytestmark = pytest.mark.triton

every_local_machine = pytest.mark.parametrize(("kind", "boundary"), LOCAL_MACHINES)


def machine_with(backend: TritonBackend, images: NDArray[np.uint8], kind: str, boundary: str):
    return ScoreMachine(PatchDatabase.from_arrays(images), kind, boundary, backend)


@pytest.mark.parametrize("configuration", [SHIPPED.plain, *CANDIDATES], ids=str)
@pytest.mark.parametrize(
    ("kind", "boundary", "patch_size"),
    [("ELS", "zeros", 3), ("ELS", "circular", 9)],
    ids=["resident-rows", "long-rows"],
)
def test_every_configuration(configuration, kind: str, boundary: str, patch_size: int) -> None:
    question = make_question(
        (3, 10, 9), 3, patch_size, alpha=[0.8], sigma=[0.6 * patch_size], seed=7
    )
    machine = machine_with(
        TritonBackend(configurations=replace(SHIPPED, plain=configuration)),
        question.images,
        kind,
        boundary,
    )
    for entropy in (False, True):
        answer = question.ask(machine, torch.float32, entropy=entropy)
        assert_matches(answer, question, question.expected(kind, boundary), TRITON)


@pytest.mark.parametrize("boundary", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("shape", "patch_size"),
    [((3, 13, 12), 11), ((4, 12, 15), 9), ((1, 19, 18), 17), ((3, 11, 13), 11), ((2, 13, 13), 13)],
    ids=["C3", "C4", "C1", "P=H", "P=H=W"],
)
def test_long_patches_slide(
    boundary: str,
    shape: tuple[int, int, int],
    patch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Noisy training images need no other method for pixels whose patches may be anywhere."""
    monkeypatch.setattr(gpu, "_BANK_BYTES", 1 << 16)
    question = make_question(shape, 4, patch_size, alpha=[0.6, 0.4], sigma=[0.9, 1.4], seed=26)
    question.x[:] = near_images(question)
    machine = machine_with(triton_backend(1), question.images, "ELS", boundary)
    asked = methods_asked(monkeypatch)
    answer = question.ask(machine, torch.float32)
    assert_matches(answer, question, question.expected("ELS", boundary), TRITON)
    interior = query_for(question, machine).interior
    assert asked[0][0] == "sliding"
    # Where patches are as high as images, rows off the middle have no candidate near them.
    if patch_size < shape[1]:
        assert not any(pixels[:, interior].any() for _, pixels in asked[1:])


def near_images(question) -> NDArray[np.float64]:
    """The first training images at the question's noise."""
    alpha, sigma = (values[:, None, None, None] for values in (question.alpha, question.sigma))
    noise = np.random.default_rng(27).standard_normal(question.x.shape)
    return alpha * (question.images[: len(alpha)] / 127.5 - 1) + sigma * noise


def methods_asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, NDArray[np.bool_]]]:
    """What a backend will be asked by, and for which pixels."""
    asked = []
    attended = TritonBackend._attended

    def spy(backend, images, query, groups, wanted, method):
        asked.append((method, wanted))
        return attended(backend, images, query, groups, wanted, method)

    monkeypatch.setattr(TritonBackend, "_attended", spy)
    return asked


@pytest.mark.parametrize("boundary", ["zeros", "circular"])
@pytest.mark.parametrize("far", [300.0, 2e4], ids=["scaled", "not-held"])
@pytest.mark.parametrize("row", [0, 15])
def test_a_far_pixel_among_long_patches(boundary: str, far: float, row: int) -> None:
    """Rows that it reaches share their columns, and hence sums, with rows that it does not."""
    question = make_question((3, 16, 12), 2, 11, alpha=[0.8], sigma=[1.0], seed=30)
    question.x[:] = near_images(question)
    question.x[0, 1, row, 0] = far
    machine = machine_with(triton_backend(1), question.images, "ELS", boundary)
    answer = question.ask(machine, torch.float32)
    assert_matches(answer, question, question.expected("ELS", boundary), TRITON)


@pytest.mark.parametrize(("channels", "patch_size"), [(1, 253), (2, 127), (3, 85), (4, 63)])
def test_rows_longer_than_a_segment_do_not_slide(channels: int, patch_size: int) -> None:
    x = torch.zeros(1, channels, patch_size, patch_size)
    one = torch.ones(1, dtype=torch.float64)
    query = PosteriorQuery(x, one, one, ELS, "circular", patch_size)
    assert not triton_backend(1)._slides(query)
    x = torch.zeros(1, channels, patch_size - 2, patch_size - 2)
    assert triton_backend(1)._slides(replace(query, x=x, patch_size=patch_size - 2))


def test_the_nearest_of_patches_that_float16_holds_by_rows_alone() -> None:
    question = make_question((3, 12, 11), 3, 11, alpha=[0.8], sigma=[1.0], seed=31)
    question.x[:] = near_images(question) + 150.0
    ours, theirs = (
        question.ask(machine, torch.float64, top=3)
        for machine in (
            machine_with(triton_backend(1), question.images, "ELS", "circular"),
            FLOAT64.machine(question.images, "ELS", "circular"),
        )
    )
    assert torch.equal(ours.top_addresses, theirs.top_addresses)
    assert (ours.top_weights - theirs.top_weights).abs().max() <= 1e-6
    assert (ours.mean - theirs.mean).abs().max() <= 1e-5


def test_sums_that_slide_beyond_what_is_exact_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Black images and white ones, of which a third matters: the others' sums are not exact."""
    shape = (4, 20, 20)
    question = make_question(shape, 3, 19, alpha=[0.8], sigma=[1.0], seed=28)
    question.images[0], question.images[1] = 0, 255
    question.images[1, :, 16:] = 0
    question.x[:] = near_images(question)
    machine = machine_with(triton_backend(1), question.images, "ELS", "circular")
    asked = methods_asked(monkeypatch)
    answer = question.ask(machine, torch.float32)
    assert_matches(answer, question, question.expected("ELS", "circular"), TRITON)
    assert [method for method, _ in asked] == ["sliding", "fine products"]


@every_local_machine
def test_float64_kernels(kind: str, boundary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take over where float32 does not know a distance; here, everywhere."""
    monkeypatch.setattr(queries, "MOST_ERROR", 0.0)
    question = make_question((2, 7, 6), 5, 3, alpha=[0.8] * 2, sigma=[0.1] * 2, seed=8)
    machine = machine_with(TritonBackend(), question.images, kind, boundary)
    answer = question.ask(machine, torch.float64)
    # Sums inside a program are float32 even so.
    assert_matches(
        answer,
        question,
        question.expected(kind, boundary),
        replace(FLOAT64, logit_error=1e-6, relative=1e-6),
    )


@every_local_machine
def test_few_unsure_pixels_are_computed_alone(
    kind: str, boundary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pixel of one image is far off, and so are the windows that contain it."""
    question = make_question((1, 12, 12), 3, 3, alpha=[0.9] * 2, sigma=[0.5] * 2, seed=18)
    question.x[:] = near_images(question)
    question.x[1, 0, 6, 7] = 40.0
    asked = methods_asked(monkeypatch)
    answer = question.ask(
        machine_with(triton_backend(1), question.images, kind, boundary), torch.float32
    )
    assert_matches(answer, question, question.expected(kind, boundary), TRITON)
    methods = ["products", "fine products", "differences"]
    assert [method for method, _ in asked] == methods
    pixels = np.argwhere(asked[2][1])
    assert pixels.min(0).tolist() == [1, 5, 6]
    assert pixels.max(0).tolist() == [1, 7, 8]


@every_local_machine
def test_scores_are_near_zero_where_candidates_are_heavy(
    kind: str, boundary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far from every candidate, scores would round too much; some images tell how far it is."""
    question = make_question((2, 9, 8), 7, 3, alpha=[0.9] * 2, sigma=[0.05] * 2, seed=33)
    question.images[:] = question.images[:1] // 2 + question.images // 128
    question.x[:] = near_images(question) + 0.8
    expected = question.expected(kind, boundary)
    machine = machine_with(triton_backend(1), question.images, kind, boundary)
    asked = methods_asked(monkeypatch)
    assert_matches(question.ask(machine, torch.float32), question, expected, TRITON)
    assert len(asked) > 1
    asked.clear()
    monkeypatch.setattr(gpu, "_CENTRED_KEYS", 1)
    assert_matches(question.ask(machine, torch.float32), question, expected, TRITON)
    assert [method for method, _ in asked] == ["products"]


@pytest.mark.parametrize("sigma", [0.02, 1e-6])
def test_border_pixels_in_float64(sigma: float) -> None:
    """Only some of them, or all."""
    question = make_question((1, 9, 8), 3, 3, alpha=[0.9] * 2, sigma=[sigma] * 2, seed=24)
    machine = machine_with(triton_backend(1), question.images, "ELS", "zeros")
    query = query_for(question, machine)
    border = ~query.interior
    whole, part = (
        machine.backend_object.states(
            question.images, replace(query, pixels=pixels), [np.arange(3)]
        )[0]
        for pixels in (None, border)
    )
    errors = (whole.mean - part.mean).abs()[:, 0, torch.from_numpy(border)]
    assert errors.max() <= 2 * TRITON.logit_error


# In both, float32 logits would overflow or be known to no digit.
little_noise = pytest.mark.parametrize("sigma", [1e-6, 1e-30])


@every_local_machine
@little_noise
@pytest.mark.parametrize("patch_size", [1, 5])
def test_hardly_any_noise(kind: str, boundary: str, patch_size: int, sigma: float) -> None:
    """As the torch backend, which is float64 throughout: the nearest patch wins."""
    question = make_question(
        (3, 5, 5), 3, patch_size, alpha=[1.0, 1.0, 0.5, 0.0], sigma=[sigma] * 4, seed=19
    )
    question.x[1] *= 1e4
    question.x[3] *= 1e4
    ours, theirs = (
        question.ask(machine, torch.float64, top=3)
        for machine in (
            machine_with(triton_backend(1), question.images, kind, boundary),
            FLOAT64.machine(question.images, kind, boundary),
        )
    )
    for value in fields(ours):
        assert torch.isfinite(value).all()
    assert (ours.mean - theirs.mean).abs().max() <= 1e-6
    assert (ours.effective_patches / theirs.effective_patches - 1).abs().max() <= 1e-6
    assert torch.equal(ours.top_addresses, theirs.top_addresses)
    assert (ours.top_weights - theirs.top_weights).abs().max() <= 1e-6


@little_noise
def test_weighed_candidates_at_hardly_any_noise(sigma: float) -> None:
    question = make_question((2, 6, 6), 4, 3, alpha=[1.0] * 2, sigma=[sigma] * 2, seed=20)
    question.x[1] *= 1e4
    theirs = FLOAT64.machine(question.images, "ELS", "circular")
    machines = [machine_with(triton_backend(1), question.images, "ELS", "circular"), theirs]
    addresses = question.ask(theirs, torch.float64, top=20).top_addresses
    addresses[..., 3] = -1
    answers = []
    for machine in machines:
        query = query_for(question, machine)
        state, logits = machine.backend_object.weigh(question.images, query, addresses.cpu())
        answers.append((state.mean, state.logit_sum / state.mass, logits))
    for ours, expected in zip(*answers, strict=True):
        # A difference of x and a patch, known to 16 digits, has fewer where the two are near.
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-6)


@every_local_machine
def test_where_the_images_are_shows_in_no_bit(
    kind: str, boundary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = make_question((3, 6, 7), 11, 3, alpha=[0.7], sigma=[1.0], seed=9)
    monkeypatch.setattr(device_images, "_UPLOAD_BYTES", 4 * 4 * 6 * 7)
    monkeypatch.setattr(gpu, "_BANK_BYTES", 4 * 80 * 6 * 7)
    answers = []
    for resident_bytes in (None, 0):
        backend = triton_backend(1)
        backend._images._resident_bytes = resident_bytes
        machine = machine_with(backend, question.images, kind, boundary)
        answers.append(question.ask(machine, torch.float32, top=3))
        assert (backend._images._resident is None) == (resident_bytes == 0)
    for first, second in zip(*map(fields, answers), strict=True):
        assert torch.equal(first, second)
    assert_matches(answers[0], question, question.expected(kind, boundary), TRITON)


def test_rows_that_do_not_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    question = make_question((1, 7, 8), 3, 3, alpha=[0.7] * 3, sigma=[1.0] * 3, seed=10)
    monkeypatch.setattr(gpu, "_ROW_BYTES", 1)
    machine = machine_with(triton_backend(1), question.images, "ELS", "zeros")
    answer = question.ask(machine, torch.float32)
    assert_matches(answer, question, question.expected("ELS", "zeros"), TRITON)


def test_noise_of_two_kinds_in_one_batch() -> None:
    """Little noise needs a third part; each image gets the bits that it gets alone."""
    question = make_question((1, 7, 8), 3, 3, alpha=[0.7] * 2, sigma=[0.04, 1.0], seed=25)
    machine = machine_with(triton_backend(1), question.images, "ELS", "circular")
    both = question.ask(machine, torch.float32)
    for b in range(2):
        alone = question.of([b]).ask(machine, torch.float32)
        assert torch.equal(alone.mean[0], both.mean[b])


def test_repeated_calls_give_the_same_bits() -> None:
    question = geometry("17-images")
    machine = TRITON.machine(question.images, "ELS", "zeros")
    answers = [question.ask(machine, torch.float32, top=5) for _ in range(2)]
    for first, second in zip(*map(fields, answers), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("kind", "boundary"), MACHINES)
@pytest.mark.parametrize("count", [1, 5, 200], ids="k{}".format)
def test_given_candidates(kind: str, boundary: str, count: int) -> None:
    """States and logits of a random choice of each pixel's candidates, some places free."""
    question = make_question((3, 5, 6), 4, 3, alpha=[0.7, 0.9], sigma=[1.5, 0.7], seed=11)
    rng = np.random.default_rng(count)
    expected = question.expected(kind, boundary)
    addresses = np.full((2, 30, count), -1)
    for b, truth in enumerate(expected):
        for (y, x), logits in truth.logits.items():
            chosen = rng.permutation(list(logits))[: max(1, count - 1)]
            addresses[b, y * 6 + x, rng.permutation(count)[: len(chosen)]] = chosen
    device = triton_backend(1).device
    totals, logits = truncated(
        device_images.packed(torch.from_numpy(question.images).to(device)),
        torch.from_numpy(question.x).double().to(device),
        torch.from_numpy(question.alpha).to(device),
        torch.from_numpy(question.sigma).to(device),
        torch.from_numpy(addresses).to(device),
        patch_size=None if kind in ("IS", "ES") else 3,
        circular=boundary == "circular",
    )
    logits = np.log(2) * logits.cpu().numpy()
    means = totals.centre / (127.5 * totals.mass.unsqueeze(1)) - 1
    for b, truth in enumerate(expected):
        for (y, x), of_pixel in truth.logits.items():
            pixel = y * 6 + x
            given = addresses[b, pixel]
            kept = given[given >= 0]
            wanted = np.array([of_pixel[address] for address in kept])
            np.testing.assert_allclose(logits[b, pixel][given >= 0], wanted, rtol=1e-12)
            assert (logits[b, pixel][given < 0] == -np.inf).all()
            weights = np.exp(wanted - wanted.max())
            n, place = np.divmod(kept, 30)
            clean = question.images[n, :, place // 6, place % 6] / 127.5 - 1
            mean = (weights[:, None] * clean).sum(0) / weights.sum()
            np.testing.assert_allclose(means[b, :, pixel].cpu(), mean, atol=1e-12)
            evidence = np.log(2) * (totals.reference + totals.mass.log2())[b, pixel].item()
            assert evidence == pytest.approx(wanted.max() + np.log(weights.sum()), rel=1e-12)
            entropy = -(np.log(weights / weights.sum()) * weights / weights.sum()).sum()
            mass, logit_sum = (
                values[b, pixel].item() for values in (totals.mass, totals.logit_sum)
            )
            assert np.log(mass) - np.log(2) * logit_sum / mass == pytest.approx(entropy, abs=1e-9)


def test_no_candidate_at_all() -> None:
    x = torch.zeros(1, 1, 2, 2, device=triton_backend(1).device, dtype=torch.float64)
    totals, logits = truncated(
        torch.zeros(1, 4, dtype=torch.int32, device=x.device),
        x,
        x.new_ones(1),
        x.new_ones(1),
        torch.full((1, 4, 3), -1, device=x.device),
        patch_size=1,
        circular=False,
    )
    assert (totals.mass == 0).all()
    assert torch.isneginf(logits).all()


@pytest.mark.parametrize("shade", [0, 77], ids=["black", "grey"])
def test_top_k_among_thousands_of_equal_patches(
    shade: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blank patches overflow the room for candidates; the lowest addresses must be found."""
    monkeypatch.setattr(gpu, "_LEAST_ROOM", 1)
    monkeypatch.setattr(gpu, "_ROOM", 1)
    rng = np.random.default_rng(12)
    images = np.full((24, 1, 6, 6), shade, dtype=np.uint8)
    images[5:, :, 3:, 3:] = rng.integers(0, 256, (19, 1, 3, 3))
    question = replace(
        make_question((1, 6, 6), 24, 3, alpha=[0.9], sigma=[0.2], seed=13),
        images=images,
        x=(0.1 * rng.standard_normal((1, 1, 6, 6)) - 0.5).astype(np.float32),
    )
    answers = [
        question.ask(backend.machine(images, "ELS", "zeros"), backend.dtype, top=7)
        for backend in (TRITON, FLOAT64)
    ]
    assert torch.equal(answers[0].top_addresses, answers[1].top_addresses)


@every_local_machine
@pytest.mark.parametrize("sigma", [0.03, 0.3, 3.0])
def test_the_error_of_logits_is_as_predicted(kind: str, boundary: str, sigma: float) -> None:
    """Of one image, so that references are logits of the same candidate."""
    question = make_question((3, 9, 8), 1, 5, alpha=[0.9] * 4, sigma=[sigma] * 4, seed=15)
    machine = TRITON.machine(question.images, kind, boundary)
    query = query_for(question, machine)
    everything = np.ones((4, 9, 8), dtype=np.bool_)
    ((rough, predicted),), ((precise, _),) = (
        machine.backend_object._attended(question.images, query, [np.arange(1)], everything, method)
        for method in ("products", "differences")
    )
    # All logits of a pixel share the rounding of their slope, which changes no weight.
    shared = 2.0**-24 * precise.reference.abs()
    ratio = (rough.reference - precise.reference) / (np.log(2) * predicted + shared)
    assert torch.isfinite(ratio).all()
    assert ratio.square().mean().sqrt() < 1.0
    assert ratio.abs().max() < gpu._SAFETY / 2


def query_for(question, machine: ScoreMachine) -> PosteriorQuery:
    return PosteriorQuery(
        x=torch.from_numpy(question.x).to(machine.device),
        alpha=torch.from_numpy(question.alpha),
        sigma=torch.from_numpy(question.sigma),
        kind=machine.definition,
        boundary=machine.boundary,
        patch_size=question.patch_size,
    )


def test_half_precision_is_rounded_once() -> None:
    question = noise(0.3)
    half = torch.from_numpy(question.x).half()
    rounded = replace(question, x=half.float().numpy())
    machine = TRITON.machine(question.images, "LS", "zeros")
    answer = rounded.ask(machine, torch.float16)
    for b, truth in enumerate(rounded.expected("LS", "zeros")):
        error = np.abs(answer.mean[b].float().numpy() - truth.mean).max()
        assert error <= torch.finfo(torch.float16).eps


def test_a_larger_database_after_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend for both; the larger has larger images, and more of them a block."""
    monkeypatch.setattr(device_images, "_UPLOAD_BYTES", 8 * 4 * 6 * 7)
    backend = triton_backend(1)
    for shape, count in (((1, 4, 4), 2), ((3, 6, 7), 9), ((2, 3, 3), 4)):
        question = make_question(shape, count, 3, alpha=[0.7], sigma=[1.0], seed=21)
        machine = machine_with(backend, question.images, "LS", "zeros")
        answer = question.ask(machine, torch.float32)
        assert_matches(answer, question, question.expected("LS", "zeros"), TRITON)


def test_states_of_groups_of_images() -> None:
    question = make_question((1, 5, 5), 6, 3, alpha=[0.7], sigma=[1.0], seed=22)
    machine = TRITON.machine(question.images, "ELS", "zeros")
    query = replace(query_for(question, machine), entropy=True)
    groups = [np.array([0, 2, 3]), np.array([], dtype=np.int64), np.array([1, 4, 5])]
    states = machine.backend_object.states(question.images, query, groups)
    assert (states[1].mass == 0).all()
    whole = finish(merge_all(states), torch.float64)
    assert_matches(whole, question, question.expected("ELS", "zeros"), TRITON)


def test_a_copy_answers_the_same() -> None:
    question = geometry("wide")
    backend = triton_backend(1)
    answers = [
        question.ask(machine_with(each, question.images, "ELS", "zeros"), torch.float32)
        for each in (backend, pickle.loads(pickle.dumps(backend)), copy.deepcopy(backend))
    ]
    for answer in answers[1:]:
        assert torch.equal(answer.mean, answers[0].mean)


@pytest.mark.parametrize(("kind", "boundary"), MACHINES)
def test_everything_runs_on_the_backends_device(
    kind: str, boundary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, which is not the backend's in a new thread."""
    inside = contextvars.ContextVar("inside", default=False)

    @contextmanager
    def on_device() -> Iterator[None]:
        token = inside.set(True)
        yield
        inside.reset(token)

    launches = []

    def run(kernel, *arguments, **options) -> None:
        assert inside.get()
        assert "enable_fp_fusion" in options
        launches.append(kernel)
        plain_run(kernel, *arguments, **options)

    kernel_type = type(attention_kernel)
    plain_run = kernel_type.run
    monkeypatch.setattr(kernel_type, "run", run)
    question = make_question((1, 5, 5), 3, 3, alpha=[0.7], sigma=[1.0], seed=23)
    backend = triton_backend(1)
    monkeypatch.setattr(backend, "_on_device", on_device)
    image_state = gpu.image_state

    def checked(images, query, members):
        assert inside.get()
        return image_state(images, query, members)

    monkeypatch.setattr(gpu, "image_state", checked)
    machine = machine_with(backend, question.images, kind, boundary)
    answer = question.ask(machine, torch.float32, top=3)
    query = query_for(question, machine)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(backend.states, question.images, query, [np.arange(3)]).result()
        pool.submit(backend.weigh, question.images, query, answer.top_addresses.cpu()).result()
    assert launches
    assert not inside.get()


@pytest.fixture
def pretended_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs, of which the second is the current one; the devices that were made current."""
    import triton

    made_current = []

    def device(which: torch.device) -> AbstractContextManager[None]:
        made_current.append(which)
        return nullcontext()

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 1,
        "get_device_name": lambda which: f"card {which.index}",
        "get_device_capability": lambda which: (9, 0),
        "device": device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        triton.runtime.driver,
        "_active",
        SimpleNamespace(
            get_current_target=lambda: None,
            utils=SimpleNamespace(get_device_properties=lambda which: {"max_shared_mem": 99 << 10}),
        ),
    )
    return made_current


@pytest.mark.parametrize(("device", "index"), [(None, 1), ("cuda", 1), ("cuda:0", 0)])
def test_a_device_without_an_index_is_the_current_one(
    pretended_gpus: list[torch.device], device: str | None, index: int
) -> None:
    backend = TritonBackend(device)
    assert backend.device == torch.device("cuda", index)
    assert backend.name == f"triton (card {index})"
    pretended_gpus.clear()
    with backend._on_device():
        assert pretended_gpus == [backend.device]


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        ("triton", "__version__", "3.5.1", r"Triton 3\.6 or later, but 3\.5\.1 is installed"),
        ("torch.cuda", "get_device_capability", lambda which: (7, 5), r"7\.5.*needs 8\.0"),
        ("torch.cuda", "device_count", lambda: 1, r"cuda:1.*1 devices here.*backend='native'"),
        ("torch.cuda", "is_available", lambda: False, r"0 devices here.*backend='native'"),
        ("triton.runtime.driver", "_active", None, r"C compiler.*backend='torch'"),
    ],
    ids=["old-triton", "old-card", "no-such-card", "no-driver", "no-compiler"],
)
def test_what_cannot_run_is_refused_at_construction(
    pretended_gpus: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    value: object,
    message: str,
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.7.0")
    TritonBackend("cuda:1")
    if name == "_active":
        value = SimpleNamespace()
    monkeypatch.setattr(f"{module}.{name}", value)
    db = PatchDatabase.from_arrays(np.zeros((1, 1, 2, 2), np.uint8))
    with pytest.raises(RuntimeError, match=message):
        ScoreMachine(db, backend="triton", device="cuda:1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    db = PatchDatabase.from_arrays(np.zeros((1, 1, 2, 2), np.uint8))
    with pytest.raises(RuntimeError, match="kernels run on the CPU, not on cuda"):
        ScoreMachine(db, backend="triton", device="cuda")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match=r"needs a CUDA or ROCm device.*backend='native'"):
        ScoreMachine(db, backend="triton")


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    db = PatchDatabase.from_arrays(np.zeros((1, 1, 2, 2), np.uint8))
    with pytest.raises(RuntimeError, match=r"pip install 'els-machine\[gpu\]'"):
        ScoreMachine(db, backend="triton")


def compiled_by(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What Python says where kernels are compiled, not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_no_kernel_is_compiled_anew_for_another_number() -> None:
    """Integers of 1, or divisible by 16, would each make a variant."""
    program = """
from els.bench.ahead_of_time import kernels, signature
for name, kernel in kernels().items():
    types = signature(name, precise=False)
    for parameter in kernel.params:
        whole = types.get(parameter.name) == "i32"
        assert parameter.do_not_specialize == whole, (name, parameter.name)
print("checked")
"""
    done = compiled_by(["-c", program])
    assert done.stdout == "checked\n", done.stderr[-4000:]


@pytest.mark.slow
def test_every_kernel_compiles_without_a_gpu_and_does_not_spill() -> None:
    done = compiled_by(["-m", "els.bench.ahead_of_time", "--channels", "3"])
    # What an older Triton cannot do, it says.
    print("\n".join(line for line in done.stdout.splitlines() if "with Triton" in line))
    assert done.returncode == 0, done.stderr[-4000:]
