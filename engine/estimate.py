"""Posteriors with known error from a part of the candidates: head, tail, and both (design, 5).

The *head* are the k nearest patches that an index finds, weighed exactly. The *tail* is everything
else, estimated from a random subset of the images, whose sums are scaled by N / n; what the head
already counts is left out. The error of a tail is measured and not assumed: the subset is dealt
into groups, and the means without each of them in turn (the jackknife) spread as the error does,
also where one group holds most of the mass.

Where the index's lists can be read whole (`els.engine.scan`), sampling them takes the place of
both: all patches are drawn from, the heavier the more densely. Pixels near a border of zeros have
candidates of their own, which no index holds: they are a subset's, or all of them are weighed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends import Backend
from els.engine.border import border_states, can_multiply
from els.engine.posterior import (
    Error,
    ErrorKind,
    Mode,
    PosteriorQuery,
    PosteriorState,
    merge,
    merge_all,
    moved,
)
from els.engine.scan import COARSEST, can_read, scan
from els.index import PatchDatabase, PatchIndex
from els.index.retrieval import DEFAULT_EFFORT

Members = npt.NDArray[np.int64]

# Groups of images whose spread is the error.
_GROUPS = 16
# Images of the first look of mode="auto", at most of that at the border where products weigh it,
# and the pixels that a head is tried on.
_PILOT_IMAGES, _BORDER_IMAGES, _PILOT_PIXELS = 256, 2048, 32
# Lists that a head may look into. The fewest are right where the tail does the work, the most where
# few patches matter and they must be found.
_EFFORTS = (4, 16, 32, 64)
# What reading a code costs, in pairs of the exact kernel: a number, and so much for each byte.
# Fixed, so that what is chosen depends on the input and not on how busy the machine is.
_CODE_PAIRS, _BYTE_PAIRS = 9.0, 1 / 3
# How errors fall with the size of a subset at first, without and with a head, and how far a subset
# grows before that is looked at again, at least and at most.
_TAIL_POWER, _HEAD_POWER, _LEAST_GROWTH, _GROWTH = 0.35, 0.45, 1.5, 4
# What lists cost, likewise: ranking one for a pixel, and weighing a code.
_LIST_PAIRS, _READ_PAIRS = 15.0, 4.0
# How their errors fall with the share that is read.
_SCAN_POWER = 0.8
# Shares of the tolerance that may be the interior's, and what a pair of the border's costs, by the
# exact kernel and by products.
_SPLITS, _BORDER_PAIRS, _PRODUCT_PAIRS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9), 2.0, 0.8
# Where they cost so few first looks, lists need none.
_PLAIN = 6
# Where so many patches of the first look share a pixel, no single one must be met.
_MANY = 12.0
# A subset that is so large a part of the images is not worth its error.
_MOST_SHARE = 0.6
# Aim below the tolerance: its measure is itself uncertain.
_MARGIN = 0.85
# Mean absolute value of a normal variable of standard deviation 1.
_MEAN_ABSOLUTE = math.sqrt(2 / math.pi)
# Float32 sums of a group are known to this, so a head that is a larger share of it leaves no tail.
_CANCELS = 1e-5
# Rounding of an index's squared distances, as a share of the squared norms.
_INDEX_ROUNDING = 4e-6
_RANGE = 2.0  # of clean pixels
_LEAST_MASS = 1e-290  # of a group; below, there is nothing to average


@dataclass(frozen=True)
class Approximation:
    """What to compute instead of everything; checked.

    Attributes:
        mode: which part.
        tolerance: of ``auto``: mean absolute error of the posterior mean over an image's pixels.
        k: size of the head.
        images: size of the subset.
        share: of the codes of an index, that a pixel reads of its lists at least.
    """

    mode: Mode = "exact"
    tolerance: float | None = None
    k: int = 256
    images: int = 1024
    share: float = 1 / 128


@final
class Estimator:
    """Approximate posteriors of one query image at a time.

    Args:
        backend: weighs candidates.
        db: the training images.
        index: of the query's patch size, for modes with a head; None if there is none.
        query: one image, ``B = 1``, with all its members.
        seed: of the choice of images: the same seed, the same result.
    """

    def __init__(
        self,
        backend: Backend,
        db: PatchDatabase,
        index: PatchIndex | None,
        query: PosteriorQuery,
        seed: Sequence[int],
    ) -> None:
        self._backend = backend
        self._db = db
        self._index = index
        # The tilt costs little, and a state without it could not be scaled.
        self._query = replace(query, entropy=True, top=0)
        self._rng = np.random.default_rng(list(seed))
        self._order = _stratified(query.members, db.labels, self._rng)
        self._list_seed = int(self._rng.integers(1 << 63))

    def state(self, approximation: Approximation) -> tuple[PosteriorState, Error]:
        """The estimated state of the whole posterior, and its error."""
        match approximation.mode:
            case "topk":
                return self._head_alone(self.head(approximation.k))
            case "subset" | "topk+subset":
                if approximation.images >= len(self._order) or len(self._order) < 2 * _GROUPS:
                    return self._exact()
                tail = self._tail(max(approximation.images, 2 * _GROUPS))
                with_head = approximation.mode == "topk+subset"
                return self.combined(self.head(approximation.k) if with_head else None, tail)
            case "lists":
                return self._with_lists(approximation.share)
            case "auto":
                assert approximation.tolerance is not None
                return self._automatic(approximation.k, approximation.tolerance)
        raise AssertionError(f"mode {approximation.mode!r} is not an approximation")

    @property
    def images(self) -> int:
        """How many images are candidates."""
        return len(self._order)

    def recall(self, k: int) -> float:
        """Share of the k nearest patches that the index finds, by exact distance, over pixels."""
        head = self.head(k)
        state = self._backend.state(self._db.images, replace(self._query, top=k))
        assert state.top is not None
        kth = state.top.logits[..., -1:].cpu()
        # Equal patches are equally good: what counts is the distance.
        near_enough = head.logits >= kth - 1e-5 * kth.abs()
        return float(near_enough.double().mean(-1)[0][head.served].mean())

    def _exact(self) -> tuple[PosteriorState, Error]:
        state = self._backend.state(self._db.images, self._query)
        return state, Error.none(state.mass)

    def _automatic(self, k: int, tolerance: float) -> tuple[PosteriorState, Error]:
        """The cheapest of subset, head and subset, and everything, as a small subset tells.

        Border pixels have few candidates each, so that they need more images than others, and an
        image costs less there: they get a subset of their own.
        """
        if len(self._order) <= 2 * _PILOT_IMAGES:
            return self._exact()
        aim, interior = _MARGIN * tolerance, self._interior()
        has_border, scans = not bool(interior.all()), self._can_scan
        tail, result, border = None, None, None
        if not scans or self._scan_cost(self._first_share()) > _PLAIN * _PILOT_IMAGES:
            tail = self._tail(_PILOT_IMAGES)
            result = self._interior_to(aim, k, tail, interior)
        if result is None and scans:
            share = self._first_share(tail)
            start, interior_aim = self._lists(share, interior), aim
            if has_border:
                tail = self._border_tail(tail)
                border_aim = self._border_aim(aim, share, start, tail, interior)
                border = self._border_to(border_aim, tail, ~interior)
                interior_aim = _left(aim, border, ~interior)
            result = self._lists_to(interior_aim, share, start)
        if result is None:
            return self._exact()
        if not has_border:
            return result
        if border is None:
            assert tail is not None
            border = self._border_to(_left(aim, result, interior), tail, ~interior)
        return _chosen(interior, result, border)

    def _border_tail(self, before: _Tail | None) -> _Tail:
        """A first subset for the border's pixels, ``before`` in it."""
        images = _PILOT_IMAGES
        if self._multiplies:
            images = max(images, min(_BORDER_IMAGES, len(self._order) // 8))
        if before is not None and len(before) >= images:
            return before
        return self._tail(images, before, query=replace(self._query, border_only=True))

    def _border_aim(
        self,
        aim: float,
        share: float,
        start: tuple[PosteriorState, Error],
        tail: _Tail,
        interior: Tensor,
    ) -> float:
        """How wrong the border may be, so that it and the interior together cost least.

        Args:
            aim: for the mean over all pixels.
            share: of the lists.
            start: the interior from it.
            tail: a subset for the border's pixels.
            interior: the others.
        """
        inside, total = float(interior.double().mean()), len(self._order)
        error = inside * _typical_error(start[1], interior)
        around = _typical_error(self.combined(None, tail)[1], ~interior)
        border = (1 - inside) * max(around, 1e-30)
        costs = {}
        for part in (*_SPLITS, min(error / aim, 1.0)):
            cost = 0.0
            if error > part * aim:
                cost = self._scan_cost(share * (error / (part * aim)) ** (1 / _SCAN_POWER))
            left = max((1 - part) * aim, 1e-30)
            images = _images_needed(border, left, len(tail), total, _HEAD_POWER)
            costs[left] = cost + self._border_cost * (images - len(tail))
        return min(costs, key=costs.__getitem__) / (1 - inside)

    @property
    def _border_cost(self) -> float:
        """Of an image for the border's pixels, in images of the exact kernel for the others."""
        _, _, height, width = self._query.x.shape
        reach = self._query.patch_size - 1
        inside = (height - reach) * (width - reach)
        edges = reach * ((height - reach) ** 2 + (width - reach) ** 2) + reach**2
        return (_PRODUCT_PAIRS if self._multiplies else _BORDER_PAIRS) * edges / inside**2

    def _interior_to(
        self, aim: float, k: int, tail: _Tail, interior: Tensor
    ) -> tuple[PosteriorState, Error] | None:
        """Head and tail, enlarged until the error is met; None where all or lists are cheaper.

        What is cheapest is judged anew after every step: a few heavy patches hide from small
        subsets, so that errors fall more slowly than the root of their size.
        """
        scans = self._can_scan
        pilot = _Pilot(self, k, interior) if self._can_search and not scans else None
        total, most = len(self._order), math.floor(_MOST_SHARE * len(self._order))
        head, effort, power = None, 0, _TAIL_POWER
        result, error = self._judged(head, tail, interior, pilot)
        while error > aim:
            needed = _images_needed(error, aim, len(tail), total, power)
            if scans:
                most = min(most, len(tail) + math.ceil(self._scan_cost(self._first_share(tail))))
            if pilot is not None:
                best = pilot.cheapest(effort, min(needed, most), error, aim, result[1], tail)
                if best != effort:
                    head, effort, power = self.head(k, effort=best), best, _HEAD_POWER
                    result, error = self._judged(head, tail, interior, pilot)
                    continue
            if needed > most:
                return None
            grown = min(max(needed, 2 * len(tail)), _GROWTH * len(tail))
            before, tail = len(tail), self._tail(grown, tail)
            larger = error
            result, error = self._judged(head, tail, interior, pilot)
            fallen = math.log(larger / max(error, 1e-30)) / math.log(len(tail) / before)
            power = min(max(fallen, 0.2), 0.5)
        return result

    def _judged(
        self, head: _Head | None, tail: _Tail, interior: Tensor, pilot: _Pilot | None
    ) -> tuple[tuple[PosteriorState, Error], float]:
        """Head and tail, and their expected absolute error; both as the pilot pixels say."""
        state, error = self.combined(head, tail)
        if pilot is not None:
            doubt = pilot.doubt((state, error), tail)
            error = replace(
                error, mean_error=doubt * error.mean_error, typical=doubt * error.typical
            )
        return (state, error), _typical_error(error, interior)

    @property
    def _can_search(self) -> bool:
        """Whether there is an index, pixels that it serves, and a signal to search for."""
        has_pixels = bool(self._is_served().any())
        return self._index is not None and has_pixels and bool(self._query.alpha[0] > 0)

    @property
    def _can_scan(self) -> bool:
        """Whether the index has lists that tell the posterior well enough at this noise."""
        if not self._can_search:
            return False
        assert self._index is not None
        alpha, sigma = float(self._query.alpha[0]), float(self._query.sigma[0])
        return can_read(self._index.inverted, alpha, sigma)

    def _scan_cost(self, share: float) -> float:
        """What reading so much of the lists costs, in images of the exact kernel."""
        assert self._index is not None
        _, _, height, width = self._query.x.shape
        reach = self._query.patch_size - 1
        pairs_per_image = (height - reach) * (width - reach)
        read = _LIST_PAIRS * self._index.lists + _READ_PAIRS * share * self._index.count
        return read / pairs_per_image

    def _lists_to(
        self, aim: float, share: float, result: tuple[PosteriorState, Error]
    ) -> tuple[PosteriorState, Error] | None:
        """The interior from lists, read until the error is met; None where all is cheaper.

        Args:
            aim: of the error.
            share: of the lists.
            result: of it.
        """
        served = self._is_served()
        while (error := _typical_error(result[1], served)) > aim:
            share *= min(max((error / aim) ** (1 / _SCAN_POWER), 3 / 2), 8)
            if self._scan_cost(share) > _MOST_SHARE * len(self._order):
                return None
            result = self._lists(share, served)
        return result

    def _first_share(self, tail: _Tail | None = None) -> float:
        """The share that is read at first, by what a subset tells if there is one.

        Lists of long codes say less about their patches. Where the interior is a part of the image,
        so is its error. Where few patches share a pixel they must be met, and that takes as many
        lists as a search would probe.
        """
        assert self._index is not None
        _, size = self._index.codes_read()
        interior = self._interior()
        inside = float(interior.double().mean())
        by_size = math.pow(size / 64, 1.5) * math.pow(inside, 1 / _SCAN_POWER) / 256
        share = max(min(by_size, 1 / 32), 1.5 * 2.0**-COARSEST)
        if tail is not None:
            state, _ = self.combined(None, tail)
            assert state.tilt is not None
            effective = state.mass * (-state.tilt / state.mass).exp() * len(tail) / self.images
            if float(effective[0][interior].median()) > _MANY:
                return share
        return max(share, DEFAULT_EFFORT / self._index.lists)

    def _with_lists(self, share: float) -> tuple[PosteriorState, Error]:
        """The lists' posterior, and the exact one of the pixels that the index does not serve."""
        served = self._is_served()
        state, error = self._lists(share, served)
        if bool(served.all()):
            return state, error
        return _chosen(served, (state, error), self._whole_border())

    def _lists(self, share: float, served: Tensor) -> tuple[PosteriorState, Error]:
        """Of some of the interior's pixels; others have anything."""
        index, query = self._index, self._query
        assert index is not None
        lists = index.inverted
        assert lists is not None
        y, rest = index.components(self._patches(served))
        height, width = query.x.shape[2:]
        allowed = None
        if len(self._order) < len(self._db):
            allowed = np.zeros(len(self._db), dtype=np.uint8)
            allowed[self._order] = 1
        sums = scan(
            lists,
            y,
            rest,
            alpha=float(query.alpha[0]),
            sigma=float(query.sigma[0]),
            share=share,
            seed=self._list_seed,
            allowed=allowed,
            pixels=height * width,
            threads=self._backend.workers if self._backend.device.type == "cpu" else None,
        )

        def placed(values: npt.NDArray[np.float64], elsewhere: float) -> Tensor:
            room = torch.full((*served.shape, *values.shape[1:]), elsewhere, dtype=torch.float64)
            room[served] = torch.from_numpy(values)
            return room.movedim(-1, 0).unsqueeze(0) if values.ndim == 2 else room.unsqueeze(0)

        state = PosteriorState(
            placed(sums.maximum, -math.inf),
            placed(sums.mass, 0.0),
            placed(sums.centre, 0.0),
            placed(sums.tilt, 0.0),
        )
        omitted = placed(1 - sums.seen / sums.mass, 0.0).clamp(0, 1)
        deviation = placed(sums.deviation * _doubt(sums.effective, lists.is_lossless)[:, None], 0.0)
        worst, typical = deviation.amax(1), deviation.mean(1)
        return state, Error(omitted, worst, "estimate", "lists", 0, typical)

    def _border_to(self, aim: float, tail: _Tail, border: Tensor) -> tuple[PosteriorState, Error]:
        """The border's pixels from a growing subset of the images, in the end all of them."""
        total, query = len(self._order), replace(self._query, border_only=True)
        result = self.combined(None, tail)
        while (error := _typical_error(result[1], border)) > aim and len(tail) < total:
            needed = _images_needed(error, aim, len(tail), total, _HEAD_POWER)
            tail = self._tail(max(needed, math.ceil(_LEAST_GROWTH * len(tail))), tail, query)
            result = self.combined(None, tail)
        return result

    def head_cost(self, effort: int) -> float:
        """What a search for every pixel costs, in images of the exact kernel."""
        assert self._index is not None
        codes, size = self._index.codes_read(effort)
        _, _, height, width = self._query.x.shape
        reach = self._query.patch_size - 1
        pairs_per_image = (height - reach) * (width - reach)
        return codes * (_CODE_PAIRS + _BYTE_PAIRS * size) / pairs_per_image

    def pilot_pixels(self, interior: Tensor) -> Tensor:
        """A few of the interior's pixels, bool ``[H, W]``."""
        places = torch.nonzero(interior.flatten()).flatten().numpy()
        chosen = self._rng.permutation(places)[:_PILOT_PIXELS]
        pixels = torch.zeros(interior.numel(), dtype=torch.bool)
        pixels[torch.from_numpy(chosen)] = True
        return pixels.reshape(interior.shape)

    def _interior(self) -> Tensor:
        """Pixels but those of a border of its own, bool ``[H, W]``; all, if they have none."""
        served = self._is_served()
        has_border = self._query.kind == "ELS" and bool(served.any())
        return served if has_border else torch.ones_like(served)

    def _is_served(self) -> Tensor:
        """Which pixels' candidates are patches inside the training image, bool ``[H, W]``."""
        height, width = self._query.x.shape[2:]
        if self._query.boundary == "circular":
            return torch.ones(height, width, dtype=torch.bool)
        radius = self._query.patch_size // 2
        served = torch.zeros(height, width, dtype=torch.bool)
        served[radius : height - radius, radius : width - radius] = True
        return served

    def head(self, k: int, pixels: Tensor | None = None, effort: int | None = None) -> _Head:
        """The k nearest patches of each pixel that the index serves, or of some of them."""
        index = self._index
        assert index is not None
        served = self._is_served()
        chosen = served if pixels is None else served & pixels
        everyone = len(self._order) == len(self._db)
        addresses = torch.full((1, *served.shape, k), -1, dtype=torch.int64)
        patches = self._patches(chosen)
        _, found = index.search(
            patches, k, members=None if everyone else np.sort(self._order), effort=effort
        )
        addresses[0, chosen] = torch.from_numpy(found)
        device = self._query.x.device
        state, logits = self._backend.given(self._db.images, self._query, addresses.to(device))
        return _Head(index.is_exact, addresses, moved(state, "cpu"), logits.cpu(), served, patches)

    def _patches(self, pixels: Tensor) -> npt.NDArray[np.float32]:
        """Patches around some pixels, over alpha, ``[Q, C, P, P]``."""
        query = self._query
        radius, size = query.patch_size // 2, query.patch_size
        mode = "circular" if query.boundary == "circular" else "constant"
        x = torch.nn.functional.pad(query.x.cpu().double(), (radius,) * 4, mode)[0]
        windows = x.unfold(1, size, 1).unfold(2, size, 1).movedim(0, 2)[pixels]
        return (windows / query.alpha[0]).float().numpy()

    def _head_alone(self, head: _Head) -> tuple[PosteriorState, Error]:
        """The head as the whole posterior, with what may have been left out."""
        query, served = self._query, head.served
        state = self._with_border(head)
        log_mass = head.state.maximum + head.state.mass.log()
        # A full list may leave out candidates as heavy as its last one, and no heavier.
        height, width = served.shape
        inside = (height - query.patch_size + 1) * (width - query.patch_size + 1)
        places = inside * len(self._order)
        found = (head.addresses >= 0).sum(-1)
        last = head.logits.masked_fill(head.addresses < 0, torch.inf).amin(-1)
        norms = torch.zeros(served.shape, dtype=torch.float64)
        norms[served] = torch.from_numpy(head.patches).double().square().sum((1, 2, 3))
        terms = query.x.shape[1] * query.patch_size**2
        alpha, sigma = float(query.alpha[0]), float(query.sigma[0])
        rounding = _INDEX_ROUNDING * alpha**2 * (norms + terms) / (2 * sigma**2)
        left = (places - found).clamp(min=0)
        log_ratio = left.double().log() + last + rounding - log_mass
        omitted = torch.where(served, torch.sigmoid(log_ratio), 0.0)
        # With nothing left log 0 is -inf, of which the sigmoid is 0; an empty list knows nothing.
        omitted = torch.where(served & (found == 0), 1.0, omitted)
        kind: ErrorKind = "bound" if head.is_exact else "estimate"
        bound = _RANGE * omitted
        return state, Error(omitted, bound, kind, "topk", 0, bound)

    def _with_border(self, head: _Head) -> PosteriorState:
        """The head's state, and the exact one of the pixels that the index does not serve."""
        if bool(head.served.all()):
            return head.state
        return _choose(head.served, head.state, self._exact_border())

    def _exact_border(self) -> PosteriorState:
        """The state of the border's pixels; others have anything."""
        query = replace(self._query, border_only=True)
        return moved(self._backend.state(self._db.images, query), "cpu")

    def _whole_border(self) -> tuple[PosteriorState, Error]:
        """The border's pixels from all images, by products where they can be."""
        if not self._multiplies:
            state = self._exact_border()
            return state, Error.none(state.mass)
        groups = np.array_split(self._query.members, _GROUPS)
        state = merge_all(self._border_states(groups))
        return state, Error.none(state.mass)

    def _border_states(self, groups: Sequence[Members]) -> list[PosteriorState]:
        workers = self._backend.workers
        return border_states(self._db.images, self._query, groups, threads=workers)

    @cached_property
    def _multiplies(self) -> bool:
        """Whether the border's pixels are weighed by products on a matrix unit."""
        return self._backend.device.type == "cpu" and can_multiply(self._query)

    def _tail(
        self, images: int, before: _Tail | None = None, query: PosteriorQuery | None = None
    ) -> _Tail:
        """States of groups of so many images in all, those of ``before`` among them."""
        query = query or self._query
        seen = 0 if before is None else len(before)
        group_of = np.full(len(self._db), -1, dtype=np.int64)
        chosen = self._order[:images]
        group_of[chosen] = np.arange(len(chosen)) % _GROUPS
        fresh = chosen[seen:]
        groups = [np.sort(fresh[group_of[fresh] == group]) for group in range(_GROUPS)]

        def weigh(members: Members) -> PosteriorState:
            return moved(
                self._backend.state(self._db.images, replace(query, members=members)), "cpu"
            )

        if query.border_only and self._multiplies:
            states = self._border_states(groups)
        else:
            with ThreadPoolExecutor(self._backend.workers) as pool:
                states = list(pool.map(weigh, groups))
        together = _Groups.of(states)
        if before is not None:
            together = together.merged(before.groups)
        counts = np.bincount(group_of[chosen], minlength=_GROUPS)
        return _Tail(together, torch.from_numpy(counts).double(), group_of)

    def combined(self, head: _Head | None, tail: _Tail) -> tuple[PosteriorState, Error]:
        """Head and scaled tail as one state; the error from leaving out each group in turn."""
        groups = tail.groups
        reference = groups.maximum.amax(0)
        if head is not None:
            reference = torch.maximum(reference, head.state.maximum[0])
        scale = (groups.maximum - reference).exp()
        # [G, H, W] and [G, C, H, W] on one reference.
        mass, centre = scale * groups.mass, scale.unsqueeze(1) * groups.centre
        tilt = scale * (groups.tilt + (groups.maximum - reference) * groups.mass)
        head_mass = torch.zeros_like(reference)
        head_centre = torch.zeros_like(centre[0])
        head_tilt = torch.zeros_like(reference)
        if head is not None:
            mass, centre, tilt = self._without(head, tail, reference, mass, centre, tilt)
            there = head.state.mass[0] > 0
            shift = torch.where(there, head.state.maximum[0] - reference, 0.0)
            factor = torch.where(there, shift.exp(), 0.0)
            head_mass = factor * head.state.mass[0]
            head_centre = factor * head.state.centre[0]
            assert head.state.tilt is not None
            head_tilt = factor * (head.state.tilt[0] + shift * head.state.mass[0])
        total, n = len(self._order), len(tail)
        ratio = total / n
        all_mass = head_mass + ratio * mass.sum(0)
        all_centre = head_centre + ratio * centre.sum(0)
        all_tilt = head_tilt + ratio * tilt.sum(0)
        # The jackknife: the mean without group g, summed anew, since a group may hold nearly all.
        others = 1 - torch.eye(_GROUPS, dtype=torch.float64)
        ratios = (total / (n - tail.counts)).reshape(-1, 1, 1)
        less_mass = head_mass + ratios * torch.einsum("gf,fhw->ghw", others, mass)
        less_centre = head_centre + ratios.unsqueeze(1) * torch.einsum(
            "gf,fchw->gchw", others, centre
        )
        means = (less_centre / less_mass.clamp(min=_LEAST_MASS).unsqueeze(1)).clamp(-1, 1)
        spread = (means - means.mean(0)).square().sum(0) * (_GROUPS - 1) / _GROUPS
        deviation = (spread * (1 - n / total)).sqrt()
        seen = head_mass + mass.sum(0)
        omitted = (1 - seen / all_mass).clamp(0, 1)
        state = PosteriorState(
            reference.unsqueeze(0),
            all_mass.unsqueeze(0),
            all_centre.unsqueeze(0),
            all_tilt.unsqueeze(0),
        )
        mode: Mode = "subset" if head is None else "topk+subset"
        worst, typical = deviation.amax(0, keepdim=True), deviation.mean(0, keepdim=True)
        return state, Error(omitted.unsqueeze(0), worst, "estimate", mode, n, typical)

    def _without(
        self,
        head: _Head,
        tail: _Tail,
        reference: Tensor,
        mass: Tensor,
        centre: Tensor,
        tilt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The groups' sums less what the head counts already."""
        height, width = reference.shape
        pixels = height * width
        addresses = head.addresses[0].numpy()
        group = np.where(addresses >= 0, tail.group_of[addresses // pixels], -1)
        pixel, place = np.nonzero(group.reshape(pixels, -1) >= 0)
        flat = addresses.reshape(pixels, -1)[pixel, place]
        clean = self._db.images[flat // pixels, :, flat % pixels // width, flat % width]
        centres = torch.from_numpy(clean).double() / 127.5 - 1  # [M, C]
        logits = head.logits[0].reshape(pixels, -1)[pixel, place]
        shifted = logits - reference.flatten()[pixel]
        weights = shifted.exp()
        slot = torch.from_numpy(group.reshape(pixels, -1)[pixel, place] * pixels + pixel)

        def sums(values: Tensor) -> Tensor:
            room = torch.zeros(_GROUPS * pixels, dtype=torch.float64)
            return room.index_add_(0, slot, values).reshape(_GROUPS, height, width)

        counted = sums(weights)
        left = mass - counted
        # Below the rounding of the sums nothing is known to be left.
        there = left > _CANCELS * mass
        counted_centre = torch.stack([sums(weights * c) for c in centres.T], dim=1)
        counted_tilt = sums(torch.where(weights > 0, weights * shifted, 0.0))
        return (
            torch.where(there, left, 0.0),
            torch.where(there.unsqueeze(1), centre - counted_centre, 0.0),
            torch.where(there, tilt - counted_tilt, 0.0),
        )


@final
class _Pilot:
    """Heads of a few pixels: what heads of all would gain, and what has been overlooked so far."""

    def __init__(self, estimator: Estimator, k: int, interior: Tensor) -> None:
        self._estimator = estimator
        self._k = k
        self._pixels = estimator.pilot_pixels(interior)
        self._heads: dict[int, _Head] = {}
        self._tail: _Tail | None = None
        self._with_tail: dict[int, tuple[PosteriorState, Error]] = {}

    def doubt(self, result: tuple[PosteriorState, Error], tail: _Tail) -> float:
        """How much larger the error is than it seems, at least 1.

        A spread does not tell of heavy patches that neither head nor tail has met; the largest head
        meets most of them.
        """
        seems = _typical_error(result[1], self._pixels)
        return max(1.0, self._error(result, tail) / max(seems, 1e-30))

    def cheapest(
        self, effort: int, needed: int, error: float, aim: float, doubted: Error, tail: _Tail
    ) -> int:
        """The effort to go on with, ``effort`` or a larger one, by what is still to be paid.

        Args:
            effort: of the head that there is; 0 without one.
            needed: size of the tail that would do with it, or at which everything is cheaper.
            error: of what there is, over the interior.
            aim: at which error.
            doubted: the same, pixel by pixel, enlarged by :meth:`doubt`.
            tail: what there is.
        """
        best, least = effort, needed - len(tail)
        now = _typical_error(doubted, self._pixels)
        total = self._estimator.images
        for more in (each for each in _EFFORTS if each > effort):
            cost = math.ceil(self._estimator.head_cost(more))
            if cost >= least:
                break
            there = self._error(self._answer(more, tail), tail)
            expected = error * there / max(now, 1e-30)
            images = _images_needed(expected, aim, len(tail), total, _HEAD_POWER)
            cost += max(images - len(tail), 0)
            if cost < least:
                best, least = more, cost
        return best

    def _error(self, result: tuple[PosteriorState, Error], tail: _Tail) -> float:
        """By the spread, or by the difference that the largest head makes, if that is more."""
        reference = self._answer(_EFFORTS[-1], tail)[0]
        difference = (_mean(result[0]) - _mean(reference)).abs().mean(0)[self._pixels]
        return max(_typical_error(result[1], self._pixels), float(difference.mean()))

    def _answer(self, effort: int, tail: _Tail) -> tuple[PosteriorState, Error]:
        """The pilot pixels' head of an effort with a tail, made once for each tail."""
        if tail is not self._tail:
            self._tail, self._with_tail = tail, {}
        if effort not in self._heads:
            self._heads[effort] = self._estimator.head(self._k, self._pixels, effort)
        if effort not in self._with_tail:
            self._with_tail[effort] = self._estimator.combined(self._heads[effort], tail)
        return self._with_tail[effort]


@dataclass(frozen=True, eq=False)
class _Head:
    """The retrieved patches of an image's pixels, on the CPU; `state` and `logits` are exact."""

    is_exact: bool
    addresses: Tensor  # [1, H, W, k]
    state: PosteriorState
    logits: Tensor  # [1, H, W, k]
    served: Tensor  # [H, W]
    patches: npt.NDArray[np.float32]  # of the pixels that were searched


@dataclass(frozen=True, eq=False)
class _Groups:
    """States of groups of images, ``[G, H, W]`` and ``[G, C, H, W]``."""

    maximum: Tensor
    mass: Tensor
    centre: Tensor
    tilt: Tensor

    @classmethod
    def of(cls, states: Sequence[PosteriorState]) -> _Groups:
        tilts = [state.tilt for state in states if state.tilt is not None]
        return cls(
            torch.cat([state.maximum for state in states]),
            torch.cat([state.mass for state in states]),
            torch.cat([state.centre for state in states]),
            torch.cat(tilts),
        )

    def merged(self, other: _Groups) -> _Groups:
        """Group by group, with the states of other images."""
        whole = merge(
            PosteriorState(self.maximum, self.mass, self.centre, self.tilt),
            PosteriorState(other.maximum, other.mass, other.centre, other.tilt),
        )
        assert whole.tilt is not None
        return _Groups(whole.maximum, whole.mass, whole.centre, whole.tilt)


@dataclass(frozen=True, eq=False)
class _Tail:
    """A subset of the images in groups.

    Attributes:
        groups: their states.
        counts: images of each group, float64 ``[G]``.
        group_of: group of each image of the database, -1 for none.
    """

    groups: _Groups
    counts: Tensor
    group_of: Members

    def __len__(self) -> int:
        return int(self.counts.sum())


def _doubt(effective: npt.NDArray[np.float64], is_lossless: bool) -> npt.NDArray[np.float64]:
    """How much larger errors are than the spread of what was read, for so many effective patches.

    A spread does not tell of heavy patches that were not met, and the fewer patches share a pixel,
    the more that matters. Where codes are not whole patches, what they leave unknown hides most of
    that. As measured (docs/retrieval.md).
    """
    if not is_lossless:
        return np.full_like(effective, 1.25)
    return 1 + 3 / (1 + (effective / 60) ** 0.4)


def _stratified(
    members: Members, labels: npt.NDArray[np.int64] | None, rng: np.random.Generator
) -> Members:
    """The members in a random order of which every beginning has its share of every class."""
    shuffled = rng.permutation(members)
    if labels is None:
        return shuffled
    classes = np.asarray(labels[shuffled])
    by_class = np.argsort(classes, kind="stable")
    _, starts, counts = np.unique(classes[by_class], return_index=True, return_counts=True)
    rank = np.empty(len(members))
    rank[by_class] = np.arange(len(members)) - np.repeat(starts, counts)
    size = np.empty(len(members))
    size[by_class] = np.repeat(counts, counts)
    return shuffled[np.argsort((rank + rng.random(len(members))) / size, kind="stable")]


def _left(aim: float, done: tuple[PosteriorState, Error], where: Tensor) -> float:
    """What some pixels leave of a mean error over all of them to each of the others."""
    part = float(where.double().mean())
    return (aim - part * _typical_error(done[1], where)) / (1 - part)


def _typical_error(error: Error, pixels: Tensor | None = None) -> float:
    """Expected absolute error of the mean, over all pixels or some, from its standard error."""
    typical = error.typical[0] if pixels is None else error.typical[0][pixels]
    return _MEAN_ABSOLUTE * float(typical.mean())


def _mean(state: PosteriorState) -> Tensor:
    """Of one image, ``[C, H, W]``."""
    return (state.centre / state.mass.unsqueeze(1))[0]


def _images_needed(error: float, aim: float, images: int, total: int, power: float) -> int:
    """The size of a subset that has the error aimed at, from that of another.

    Errors are taken to fall as ``(1 / n - 1 / N) ** power``: power 1 / 2 for means of many alike.
    """
    inverse = math.pow(aim / error, 1 / power) * (1 / images - 1 / total) + 1 / total
    return math.ceil(1 / inverse)


def _chosen(
    where: Tensor, first: tuple[PosteriorState, Error], second: tuple[PosteriorState, Error]
) -> tuple[PosteriorState, Error]:
    """Pixel by pixel one estimate or the other; the first says what was computed."""
    error = replace(
        first[1],
        omitted_mass=torch.where(where, first[1].omitted_mass, second[1].omitted_mass),
        mean_error=torch.where(where, first[1].mean_error, second[1].mean_error),
        typical=torch.where(where, first[1].typical, second[1].typical),
    )
    return _choose(where, first[0], second[0]), error


def _choose(where: Tensor, first: PosteriorState, second: PosteriorState) -> PosteriorState:
    """Pixel by pixel one state or the other."""
    assert first.tilt is not None
    assert second.tilt is not None
    return PosteriorState(
        torch.where(where, first.maximum, second.maximum),
        torch.where(where, first.mass, second.mass),
        torch.where(where, first.centre, second.centre),
        torch.where(where, first.tilt, second.tilt),
    )
