"""The float64 oracle: local posteriors straight from their definition (docs/theory.md).

Loops over pixels, candidates and patch offsets; numpy alone, and nothing of the engine's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OraclePosterior:
    """The posterior of one noisy image.

    Attributes:
        mean: ``[C, H, W]``.
        log_evidence: ``[H, W]``.
        effective_patches: ``[H, W]``.
        score: ``[C, H, W]``.
        logits: for each pixel (y, x), the logit of every candidate, keyed by its address.
        terms: how many squares are in a distance.
    """

    mean: np.ndarray
    log_evidence: np.ndarray
    effective_patches: np.ndarray
    score: np.ndarray
    logits: dict[tuple[int, int], dict[int, float]]
    terms: int


def posterior(
    images: np.ndarray,
    x: np.ndarray,
    *,
    alpha: float,
    sigma: float,
    kind: str,
    boundary: str,
    patch_size: int,
    members: np.ndarray | None = None,
) -> OraclePosterior:
    """Brute force.

    Args:
        images: uint8 ``[N, C, H, W]``.
        x: one noisy image, ``[C, H, W]``.
        alpha: signal scale.
        sigma: noise standard deviation.
        kind: ``IS``, ``ES``, ``LS`` or ``ELS``.
        boundary: ``zeros`` or ``circular``.
        patch_size: side of the patch.
        members: numbers of the images that are candidates; None for all.
    """
    clean = images.astype(np.float64) / 127.5 - 1
    noisy = x.astype(np.float64)
    numbers = np.arange(len(images)) if members is None else np.asarray(members)
    weigh = _whole_image_logits if kind in ("IS", "ES") else _patch_logits
    table = weigh(clean, noisy, alpha, kind, boundary, patch_size)

    _, height, width = noisy.shape
    mean = np.empty_like(noisy)
    log_evidence = np.empty((height, width))
    effective = np.empty((height, width))
    logits_at = {}
    for y in range(height):
        for x_ in range(width):
            squared, locations = table(y, x_)
            logits = -squared[:, numbers] / (2 * sigma**2)
            rows, columns = np.array(locations).T
            centres = clean[numbers][:, :, rows, columns]
            largest = logits.max()
            total = np.exp(logits - largest).sum()
            weights = np.exp(logits - largest) / total
            mean[:, y, x_] = np.einsum("ln,ncl->c", weights, centres)
            log_evidence[y, x_] = largest + np.log(total)
            positive = weights[weights > 0]
            effective[y, x_] = np.exp(-(positive * np.log(positive)).sum())
            addresses = (numbers * height + rows[:, None]) * width + columns[:, None]
            logits_at[y, x_] = dict(
                zip(addresses.ravel().tolist(), logits.ravel().tolist(), strict=True)
            )
    score = (alpha * mean - noisy) / sigma**2
    terms = noisy.size if kind in ("IS", "ES") else len(noisy) * patch_size**2
    return OraclePosterior(mean, log_evidence, effective, score, logits_at, terms)


def candidates(
    kind: str, boundary: str, height: int, width: int, patch_size: int, y: int, x: int
) -> list[tuple[int, int]]:
    """Locations in a training image whose patch may explain pixel (y, x) of an LS or ELS query."""
    if kind == "LS":
        return [(y, x)]
    radius = patch_size // 2
    found = []
    for row in range(height):
        for column in range(width):
            if boundary == "circular":
                inside_rows = row - radius >= 0 and row + radius <= height - 1
                inside_columns = column - radius >= 0 and column + radius <= width - 1
                allowed = inside_rows and inside_columns
            else:
                allowed = _sees_the_same(y, row, height, radius) and _sees_the_same(
                    x, column, width, radius
                )
            if allowed:
                found.append((row, column))
    return found


def _sees_the_same(coordinate: int, other: int, length: int, radius: int) -> bool:
    def is_middle(i: int) -> bool:
        is_low = i < radius
        is_high = i >= length - radius
        return not is_low and not is_high

    return (is_middle(coordinate) and is_middle(other)) or coordinate == other


def patch(image: np.ndarray, y: int, x: int, patch_size: int, boundary: str) -> np.ndarray:
    """The patch around (y, x), offset by offset, ``[..., P, P]`` of an image ``[..., H, W]``."""
    height, width = image.shape[-2:]
    radius = patch_size // 2
    values = np.zeros((*image.shape[:-2], patch_size, patch_size))
    for i in range(patch_size):
        for j in range(patch_size):
            row, column = y + i - radius, x + j - radius
            if boundary == "circular":
                values[..., i, j] = image[..., row % height, column % width]
            elif 0 <= row < height and 0 <= column < width:
                values[..., i, j] = image[..., row, column]
    return values


def _patch_logits(clean, noisy, alpha, kind, boundary, patch_size):
    """Squared distances ``[locations, N]`` of each pixel to its candidates, and their locations."""
    _, height, width = noisy.shape
    training = {
        (y, x): patch(clean, y, x, patch_size, boundary)
        for y in range(height)
        for x in range(width)
    }

    def of_pixel(y, x):
        locations = candidates(kind, boundary, height, width, patch_size, y, x)
        query = patch(noisy, y, x, patch_size, boundary)
        squared = [
            ((query - alpha * training[location]) ** 2).sum(axis=(1, 2, 3))
            for location in locations
        ]
        return np.array(squared), locations

    return of_pixel


def _whole_image_logits(clean, noisy, alpha, kind, _boundary, _patch_size):
    """The like for whole images: the candidates of a pixel are what each shift moves onto it."""
    _, height, width = noisy.shape
    shifts = [(0, 0)]
    if kind == "ES":
        shifts = [(down, right) for down in range(height) for right in range(width)]
    squared = np.array(
        [
            ((noisy - alpha * np.roll(clean, shift, axis=(2, 3))) ** 2).sum(axis=(1, 2, 3))
            for shift in shifts
        ]
    )

    def of_pixel(y, x):
        return squared, [((y - down) % height, (x - right) % width) for down, right in shifts]

    return of_pixel
