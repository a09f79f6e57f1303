"""Groups of pixels, keys and query rows: which numbers the kernels multiply, bit for bit."""

import importlib.util
import math

import numpy as np
import oracle
import pytest
import torch
from backends import triton_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from els.triton_kernels.bank import CONSTANT, NORM_BASE, Bank, bank_of
from els.triton_kernels.configurations import CHUNK, SHIPPED, Configuration
from els.triton_kernels.pixel_groups import Layout, PixelGroups, pixel_groups, row_groups
from els.triton_kernels.queries import MOST_ERROR, Rows, parts_needed, rows_of
from els.triton_kernels.sliding import Sliding

pytestmark = pytest.mark.triton


def make_groups(
    shape: tuple[int, int, int], patch_size: int, kind: str = "ELS", boundary: str = "circular"
) -> list[PixelGroups]:
    channels, height, width = shape
    window = np.ones((patch_size, patch_size), dtype=np.bool_)
    return list(
        pixel_groups(
            height,
            width,
            channels,
            window,
            equivariant=kind == "ELS",
            circular=boundary == "circular",
        )
    )


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["LS", "ELS"]),
    boundary=st.sampled_from(["zeros", "circular"]),
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    radius=st.integers(0, 4),
)
def test_groups_hold_every_pair_once_with_its_window(
    kind: str, boundary: str, height: int, width: int, radius: int
) -> None:
    patch_size = 2 * min(radius, (min(height, width) - 1) // 2) + 1
    found: dict[int, list[int]] = {}
    for groups in make_groups((2, height, width), patch_size, kind, boundary):
        for pixels, candidates in zip(
            groups.queries.tolist(), groups.candidates.tolist(), strict=True
        ):
            for pixel in pixels:
                assert pixel not in found
                found[pixel] = candidates
        for pixels, windows in (
            (groups.queries, groups.query_windows),
            (groups.candidates, groups.candidate_windows),
        ):
            assert windows.is_contiguous()
            assert pixels.is_contiguous()
            for pixel, window in zip(pixels.flatten(), windows.flatten(0, 1), strict=True):
                assert window.tolist() == addresses(
                    int(pixel), height, width, radius=patch_size // 2, boundary=boundary
                )
    for y in range(height):
        for x in range(width):
            expected = oracle.candidates(kind, boundary, height, width, patch_size, y, x)
            assert found.pop(y * width + x) == sorted(
                row * width + column for row, column in expected
            )
    assert not found


def addresses(pixel: int, height: int, width: int, *, radius: int, boundary: str) -> list[int]:
    """Of the bytes of a window of two channels, one by one."""
    y, x = divmod(pixel, width)
    found = []
    for row in range(y - radius, y + radius + 1):
        for column in range(x - radius, x + radius + 1):
            inside = 0 <= row < height and 0 <= column < width
            place = row % height * width + column % width
            known = inside or boundary == "circular"
            found += [4 * place + c if known else -1 for c in range(2)]
    return found


def packed(images: NDArray[np.uint8]) -> torch.Tensor:
    """Four bytes a pixel, of which the last ones are not read."""
    n, channels, height, width = images.shape
    words = np.full((n, height, width, 4), 99, dtype=np.uint8)
    words[..., :channels] = np.moveaxis(images, 1, -1)
    return torch.from_numpy(words).view(torch.int32).reshape(n, -1).to(triton_backend(1).device)


# D of 3, 27, 196 and 484: short, with digits, the longest segment, and several.
shapes = pytest.mark.parametrize(
    ("shape", "patch_size"),
    [((3, 4, 5), 1), ((3, 6, 5), 3), ((4, 9, 8), 7), ((4, 12, 11), 11)],
    ids=["P1", "P3", "P7", "P11"],
)


@shapes
@pytest.mark.parametrize("shade", [None, 0, 255], ids=["random", "black", "white"])
def test_keys_hold_patches_and_their_norms(
    shape: tuple[int, int, int], patch_size: int, shade: int | None
) -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, *shape), dtype=np.uint8)
    if shade is not None:
        images[:] = shade
    for groups in make_groups(shape, patch_size, boundary="zeros"):
        bank = bank_of(packed(images), on_device(groups), shape[0], 16)
        check_bank(bank, groups, images)


def on_device(groups: PixelGroups) -> PixelGroups:
    return groups.to(triton_backend(1).device)


def check_bank(bank: Bank, groups: PixelGroups, images: NDArray[np.uint8]) -> None:
    group_count, candidates, coordinates = groups.candidate_windows.shape
    layout = Layout.of(coordinates)
    assert bank.count == len(images) * candidates
    assert bank.keys.shape[1] % 16 == 0
    keys = bank.keys.cpu().double().unflatten(2, (layout.segments, layout.width))
    values = bank.values.cpu().double().transpose(2, 3).flatten(1, 2)
    flat = np.moveaxis(images, 1, -1).reshape(len(images), -1).astype(np.int64) - 128
    for g in range(group_count):
        for key in range(bank.keys.shape[1]):
            image, candidate = divmod(min(key, bank.count - 1), candidates)
            window = groups.candidate_windows[g, candidate].numpy()
            pixel, channel = window // 4, window % 4
            patch = np.where(window < 0, 0, flat[image, pixel * images.shape[1] + channel])
            for i, segment in enumerate(keys[g, key].numpy()):
                part = patch[i * layout.segment : (i + 1) * layout.segment]
                assert segment[: len(part)].tolist() == part.tolist()
                assert (segment[len(part) : layout.segment] == 0).all()
                extras = segment[layout.segment : layout.segment + 5]
                low, high, constant, one, bit = extras
                assert extras.max() <= 4096
                assert bit + 2 * (low + NORM_BASE.value * high) == np.square(part).sum()
                inside = window[i * layout.segment : (i + 1) * layout.segment].max() >= 0
                assert (constant, one) == ((CONSTANT.value, 1) if inside else (0, 0))
                assert (segment[layout.segment + 5 :] == 0).all()
            centre = int(groups.candidates[g, candidate])
            expected = [*images[image].reshape(len(images[0]), -1)[:, centre].astype(int) - 128, 1]
            expected += [0] * (8 - len(expected))
            assert values[g, key].tolist() == (expected if key < bank.count else [0] * 8)


@pytest.mark.parametrize("circular", [True, False], ids=["circular", "zeros"])
def test_windows_of_a_row_are_those_of_patches(circular: bool) -> None:
    """P rows of them, one below the other, hold the coordinates of a patch."""
    channels, height, width, patch_size = 3, 9, 8, 5
    rows = row_groups(height, width, channels, patch_size, circular=circular)
    boundary = "circular" if circular else "zeros"
    whole = next(
        groups
        for groups in make_groups((channels, height, width), patch_size, boundary=boundary)
        if len(groups.queries) == 1
    )
    own, above = rows.candidate_windows.chunk(2, dim=2)
    assert (above[:patch_size] == -1).all()
    assert torch.equal(above[patch_size:], own[:-patch_size])
    radius = patch_size // 2
    for tables, windows, wanted, reached in (
        (rows.candidates, own, whole.candidates[0], whole.candidate_windows[0]),
        (rows.queries, rows.query_windows, whole.queries[0], whole.query_windows[0]),
    ):
        for pixel, expected in zip(wanted.tolist(), reached, strict=True):
            column = tables[0].tolist().index(pixel % width)
            y = pixel // width
            found = [windows[row % height, column] for row in range(y - radius, y + radius + 1)]
            assert torch.equal(torch.cat(found), expected)


@given(
    columns=st.integers(1, 64).map(lambda n: 16 * n),
    parts=st.sampled_from([0, 2, 3]),
    rows=st.integers(1, 2000),
    keys=st.integers(1, 10**6),
    shared=st.sampled_from([64 << 10, 99 << 10, 163 << 10, 227 << 10]),
    detailed=st.booleans(),
)
def test_tiles_fit_the_shared_memory(
    columns: int, parts: int, rows: int, keys: int, shared: int, detailed: bool
) -> None:
    chosen = SHIPPED.chosen(
        rows, keys, columns=columns, parts=parts, detailed=detailed, shared=shared
    )
    assert chosen.keys >= 16
    assert chosen.rows >= 16
    assert not chosen.resident or parts > 0
    if parts:
        loaded = columns if chosen.resident else min(columns, CHUNK)
        assert chosen.shared_bytes(loaded, parts) <= shared


@shapes
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("sigma", [0.02, 0.5, 300.0])
def test_rows_hold_queries(
    shape: tuple[int, int, int], patch_size: int, parts: int, sigma: float
) -> None:
    """Their parts, digits and constants add up to the logits' definition."""
    rng = np.random.default_rng(2)
    alpha = np.array([0.9, 0.3])
    x = torch.from_numpy(alpha[:, None, None, None] * rng.uniform(-1, 1, (2, *shape)))
    x += sigma * torch.from_numpy(rng.standard_normal(x.shape))
    groups = make_groups(shape, patch_size)[0]
    layout = groups.layout
    rows = make_rows(x, alpha, sigma, groups, parts)
    patches = torch.from_numpy(rng.integers(-128, 128, (5, layout.coordinates))).double()
    keys = layout.arranged(patches, key_extras(patches, layout))
    coordinates = rows.coordinates.double()
    whole, *fractions = coordinates
    assert torch.equal(whole[..., : layout.segment], whole[..., : layout.segment].round())
    assert whole[..., : layout.segment].abs().max() <= 2048
    assert all(part.abs().max() <= 0.5 for part in fractions)
    logits = rows.logits((coordinates.sum(0) @ keys.T).movedim(-1, 0))
    windows = groups.query_windows[0]
    flat = torch.nn.functional.pad(x.flatten(2).movedim(1, 2), (0, 4 - shape[0])).flatten(1)
    noisy = flat[:, windows.long()].flatten(0, 1)
    for i, patch in enumerate(patches):
        clean = torch.from_numpy(np.repeat(alpha, len(windows)))[:, None] * (
            (patch + 128) / 127.5 - 1
        )
        exact = -(noisy - clean).square().sum(1) / (2 * sigma**2 * math.log(2))
        error = (logits[i, 0] - exact).abs()
        # A rounded slope, and the last part's rounding along the difference of two patches.
        claimed = 2.0**-23 * exact.abs() + 6 * rows.errors(rows.scores(logits[i]))[0]
        assert (error <= claimed).all()


def make_rows(
    x: torch.Tensor,
    alpha: NDArray[np.float64],
    sigma: float,
    groups: PixelGroups,
    parts: int,
) -> Rows:
    return rows_of(
        x,
        torch.from_numpy(alpha),
        torch.full((len(alpha),), sigma, dtype=torch.float64),
        groups,
        torch.arange(len(x) * groups.queries.shape[1]).unsqueeze(0),
        parts,
    )


def key_extras(patches: torch.Tensor, layout: Layout) -> torch.Tensor:
    missing = layout.segments * layout.segment - layout.coordinates
    cut = torch.nn.functional.pad(patches, (0, missing))
    norm = cut.unflatten(-1, (layout.segments, layout.segment)).square().sum(-1)
    half = norm // 2
    digits = [half % NORM_BASE.value, half // NORM_BASE.value]
    constants = [torch.full_like(norm, CONSTANT.value), torch.ones_like(norm)]
    return torch.stack([*digits, *constants, norm % 2], dim=-1)


@pytest.mark.parametrize(
    ("alpha", "sigma", "size"),
    [(0.0, 1.0, 1.0), (1.0, 1e-6, 1.0), (1.0, 1e-30, 1.0), (1.0, 1.0, 1e30), (1e-30, 1e-30, 1.0)],
)
def test_rows_that_float16_cannot_hold_say_so(alpha: float, sigma: float, size: float) -> None:
    groups = make_groups((1, 5, 5), 3)[0]
    x = size * torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(1, 1, 5, 5)
    rows = make_rows(x, np.array([alpha]), sigma, groups, 3)
    assert torch.isfinite(rows.coordinates).all()
    errors = rows.errors(torch.zeros_like(rows.constant))
    assert not (errors <= 3e-5).any()


def test_a_third_part_where_two_are_too_coarse() -> None:
    sigma = torch.tensor([1e-3, 0.05, 0.5, 5.0], dtype=torch.float64)
    assert parts_needed(27, torch.ones_like(sigma), sigma).tolist() == [3, 3, 2, 2]
    assert parts_needed(27, torch.zeros(1), torch.ones(1)).tolist() == [2]


def multiplied(rows: torch.Tensor, keys: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """A matrix unit at its worst: eight products at a time, addends cut to 24 bits of the largest.

    Args:
        rows: float64 ``[M, K]``.
        keys: float64 ``[n, K]``.
        sums: what is added to, ``[M, n]``.
    """

    def cut(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        unit = torch.exp2(largest.clamp(min=1e-30).log2().floor() - 23)
        return (values / unit).trunc() * unit

    for k in range(0, rows.shape[1], 8):
        products = rows[:, None, k : k + 8] * keys[None, :, k : k + 8]
        largest = torch.maximum(products.abs().amax(2), sums.abs())
        total = cut(sums, largest) + cut(products, largest.unsqueeze(2)).sum(2)
        sums = cut(total, total.abs())
    return sums


@pytest.mark.parametrize(
    ("patch_size", "beta"),
    [(3, 0.006), (3, 0.05), (5, 0.1), (5, 0.3), (7, 0.3), (9, 0.5), (9, 0.8), (11, 0.7)],
)
@pytest.mark.parametrize("brightness", [0, 120], ids=["plain", "bright"])
@pytest.mark.parametrize("is_centred", [False, True], ids=["", "centred"])
def test_matrix_units_err_as_claimed(
    patch_size: int, beta: float, brightness: int, is_centred: bool
) -> None:
    """Weighted errors of logits that an emulated unit computes, by pixel."""
    side, channels = 16, 3
    shape = (channels, side, side)
    images = smooth(6, shape) // (1 if brightness == 0 else 2) + brightness
    alpha, sigma = math.sqrt(1 - beta), math.sqrt(beta)
    rng = np.random.default_rng(patch_size)
    x = alpha * (images[:1] / 127.5 - 1) + sigma * rng.standard_normal((1, *shape))
    groups = make_groups(shape, patch_size)[0]
    layout = groups.layout
    parts = int(parts_needed(layout.coordinates, torch.tensor(alpha), torch.tensor(sigma)))
    rows = make_rows(torch.from_numpy(x), np.array([alpha]), sigma, groups, parts)
    chosen = torch.from_numpy(rng.permutation(side**2)[:24])
    windows = groups.candidate_windows[0].long()
    patches = torch.from_numpy(padded_channels(images - 128.0))[:, windows].flatten(0, 1)
    keys = layout.arranged(patches, key_extras(patches, layout))
    noisy = torch.from_numpy(padded_channels(x))[0, groups.query_windows[0].long()]
    clean = alpha * ((patches + 128) / 127.5 - 1)
    if is_centred and layout.segments == 1:
        exact = exact_logits(noisy, clean, sigma)
        heavy = (torch.softmax(exact * math.log(2), dim=1) * exact).sum(1)
        before, rows = rows, rows.centred(heavy.unsqueeze(0), layout)
        assert rows.scores(heavy.unsqueeze(0)).abs().max() <= 0.5 / float(rows.power.min()) + 1
        assert (before.errors(before.scores(heavy)) >= rows.errors(rows.scores(heavy))).all()
    whole, *fractions = rows.coordinates[:, 0, chosen].double()
    zero = torch.zeros(len(chosen), len(keys), dtype=torch.float64)
    if layout.segments == 1:
        scores = multiplied(whole, keys, zero)
        for part in fractions:
            scores = multiplied(part, keys, scores)
    else:
        rest = zero
        for part in fractions:
            rest = multiplied(part, keys, rest)
        scores = multiplied(whole, keys, zero) + rest
    logits = rows.slopes[0, chosen].double()[:, None] * scores + rows.constant[0, chosen][:, None]
    found = weighted_errors(logits, noisy[chosen], clean, sigma)
    all_scores = torch.zeros_like(rows.constant)
    all_scores[0, chosen] = scores.amax(1)
    check_claims(found, rows.errors(all_scores)[0, chosen])


@pytest.mark.parametrize("beta", [0.4, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("brightness", [0, 120], ids=["plain", "bright"])
def test_sums_that_slide_err_as_claimed(beta: float, brightness: int) -> None:
    """The recurrence of the kernel on the emulated unit, for every displacement down."""
    side, channels, patch_size, radius = 16, 3, 11, 5
    images = smooth(6, (channels, side, side)) // (1 if brightness == 0 else 2) + brightness
    alpha, sigma = math.sqrt(1 - beta), math.sqrt(beta)
    x = alpha * (images[:1] / 127.5 - 1)
    x += sigma * np.random.default_rng(1).standard_normal(x.shape)
    groups = row_groups(side, side, channels, patch_size, circular=True)
    parts = parts_needed(channels * patch_size**2, torch.tensor(alpha), torch.tensor(sigma))
    sliding = Sliding.of(
        groups,
        rows_of(
            torch.from_numpy(x),
            torch.tensor([alpha], dtype=torch.float64),
            torch.tensor([sigma], dtype=torch.float64),
            groups,
            torch.arange(side).repeat(side, 1),
            int(parts),
            are_added=True,
        ),
        radius=radius,
        first=0,
        batch=1,
        channels=channels,
        block_images=len(images),
        configuration=Configuration(128, 64, warps=8, stages=1),
    )
    bank = bank_of(packed(images.astype(np.uint8)), on_device(groups), channels, 64)
    keys = bank.keys[:, : bank.count].cpu().double()
    whole_rows, *fraction_rows = sliding.row_windows.coordinates.double()
    starts = sliding.starts.reshape(side, 1)
    # By the pixel of the query, then the training row, then the key.
    scores = torch.empty(side, side, side - 2 * radius, bank.count, dtype=torch.float64)
    for displacement in range(side):
        whole = starts.expand(side, bank.count)
        fractions = torch.zeros_like(whole)
        for i in range(side):
            row = (i + displacement) % side
            whole = multiplied(whole_rows[row], keys[i], whole)
            for part in fraction_rows:
                fractions = multiplied(part[row], keys[i], fractions)
            if i >= 2 * radius:
                tiles = slice(displacement * side, (displacement + 1) * side)
                lowest = sliding.lowest[0, tiles]
                sliding.lowest[0, tiles] = torch.minimum(lowest, whole.amin(1).float())
                score = ((whole - starts) + fractions).float()
                sliding.sums[0, 0, i - 2 * radius, tiles] = score.amax(1).double()
                scores[(row - radius) % side, :, i - 2 * radius] = score.double()
    rows = sliding.rows
    scores = scores.flatten(0, 1).flatten(1)
    logits = rows.slopes[0].double()[:, None] * scores + rows.constant[0][:, None]
    whole_groups = make_groups((channels, side, side), patch_size)[0]
    clean = alpha * (images / 127.5 - 1)
    noisy, patches = (
        torch.from_numpy(padded_channels(values))[:, windows[0].long()].flatten(0, 1)
        for values, windows in (
            (x, whole_groups.query_windows),
            (clean, whole_groups.candidate_windows),
        )
    )
    # Candidates by image, row and column; keys of a row by image and column.
    patches = patches.unflatten(0, (len(images), side - 2 * radius, -1)).transpose(0, 1)
    found = weighted_errors(logits, noisy, patches.flatten(0, 2), sigma)
    check_claims(found, rows.errors(sliding.states[0].amax(0))[0])


def padded_channels(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Four channels a pixel, the last of them 0: ``[n, H * W * 4]``."""
    values = np.moveaxis(images, 1, -1).reshape(len(images), -1, images.shape[1])
    return np.pad(values, ((0, 0), (0, 0), (0, 4 - images.shape[1]))).reshape(len(images), -1)


def exact_logits(noisy: torch.Tensor, clean: torch.Tensor, sigma: float) -> torch.Tensor:
    """To base 2, ``[rows, candidates]``."""
    distances = torch.cdist(noisy, clean, compute_mode="donot_use_mm_for_euclid_dist").square()
    return -distances / (2 * sigma**2 * math.log(2))


def weighted_errors(
    logits: torch.Tensor, noisy: torch.Tensor, clean: torch.Tensor, sigma: float
) -> torch.Tensor:
    """Root-mean-square errors of logits to base 2, but for what is common, under the posterior."""
    exact = exact_logits(noisy, clean, sigma)
    weights = torch.softmax(exact * math.log(2), dim=1)
    errors = logits - exact
    errors = errors - (weights * errors).sum(1, keepdim=True)
    return (weights * errors.square()).sum(1).sqrt()


def check_claims(found: torch.Tensor, claimed: torch.Tensor) -> None:
    assert claimed.median() < 1e-4
    assert found.square().mean().sqrt() <= claimed.square().mean().sqrt()
    # Pixels that claim more than the most are computed again.
    assert (found <= (4 * claimed).clamp(min=MOST_ERROR)).all()


def smooth(count: int, shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """Images whose amplitudes fall as 1 / frequency."""
    channels, height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1 / width
    rng = np.random.default_rng(3)
    grey = rng.standard_normal((count, 1, height, width))
    field = grey + 0.3 * rng.standard_normal((count, channels, height, width))
    field = np.fft.irfft2(np.fft.rfft2(field) / frequency, s=(height, width))
    field *= 60 / field.std(axis=(1, 2, 3), keepdims=True)
    return np.clip(128 + field, 0, 255).astype(np.int64)
