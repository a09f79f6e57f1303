"""Posteriors with known error from a part of the candidates: head, tail, and both.

The *head* are the k nearest patches that an index finds, weighed exactly. The *tail* is everything
else, estimated from a random subset of the images (`els.engine.approximate.subset`), whose sums are
scaled by N / n; what the head already counts is left out. The error of a tail is measured and not
assumed (docs/retrieval.md). A pixel of which a part says nothing is computed from everything.

Where the index's lists can be read whole (`els.engine.backends.native_lists`), sampling them takes
the place of both: all patches are drawn from, the heavier the more densely. Pixels near a border of
zeros have candidates of their own, which no index holds: they are a subset's, or all of them are
weighed.
Pixels differ, so that more is spent on those that err most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.approximate.subset import (
    GROUPS,
    Allotments,
    Array,
    Groups,
    Members,
    Tail,
    counts_of,
    images_needed,
    share_allotments,
    stratified,
    subset_allotments,
    sums_without_each,
)
from els.engine.backends import Backend
from els.engine.backends.native_border import border_states, can_multiply
from els.engine.backends.native_lists import COARSEST, can_read, is_precise, scan
from els.engine.query import PosteriorQuery
from els.engine.result import Error, ErrorKind, Mode
from els.engine.state import PosteriorState, merge_all, moved
from els.index import PatchDatabase, PatchIndex
from els.index.patches.index import DEFAULT_EFFORT

# Of numpy's independent streams of a seed. The order of the images in an index is that of seed 0,
# and must tell nothing of a subset: a search that is cut short finds patches of the first.
_STREAM = 1
# Images of the first subset of mode="auto", at most of that at the border where products weigh it,
# and the pixels that a head is tried on.
_PILOT_IMAGES, _BORDER_IMAGES, _PILOT_PIXELS = 256, 2048, 32
# Lists that a head may look into. The fewest are right where the tail does the work, the most where
# few patches matter and they must be found.
_EFFORTS = (4, 16, 32, 64)
# What reading a code costs, in pairs of the exact kernel: a number, and so much for each byte.
# Fixed, so that what is chosen depends on the input and not on how busy the machine is.
_CODE_PAIRS, _BYTE_PAIRS = 9.0, 1 / 3
# How errors fall with the size of a subset at first, without and with a head, and how far a subset
# grows before that is looked at again.
_TAIL_POWER, _HEAD_POWER, _GROWTH = 0.35, 0.45, 4
# What lists cost, likewise: ranking one for a pixel, and weighing a code.
_LIST_PAIRS, _READ_PAIRS = 15.0, 4.0
# How their errors fall with the share that is read, and by how much it grows when a pixel is read
# anew, at least and at most.
_SCAN_POWER, _LEAST_GROWTH, _MOST_GROWTH = 0.8, 1.5, 8.0
# How the border's errors fall, and what part of its aim a step aims at: another costs as much.
_BORDER_POWER, _ENOUGH = 0.35, 0.95
# What a pair of the border's costs, by the exact kernel and by products, and beside those what an
# image costs that is read for a few pixels on every edge, to what all pixels cost.
_BORDER_PAIRS, _PRODUCT_PAIRS, _PASSING = 2.0, 1.1, 0.6
# Where they cost so few first subsets, lists need none.
_PLAIN = 6
# Where so many patches of a few images share a pixel, no single one must be met.
_LOOK_IMAGES, _MANY = 64, 8.0
# A subset that is so large a part of the images is not worth its error.
_MOST_SHARE = 0.6
# Aim below the tolerance: its measure is itself uncertain.
_MARGIN = 0.9
# Mean absolute value of a normal variable of standard deviation 1.
_MEAN_ABSOLUTE = math.sqrt(2 / math.pi)
# Float32 sums of a group are known to this, so a head that is a larger share of it leaves no tail.
_CANCELS = 1e-5
# Natural logarithm of the most by which a candidate may seem heavier than its group's reference.
_MOST_ABOVE = 50.0
# Rounding of an index's squared distances, as a share of the squared norms.
_INDEX_ROUNDING = 4e-6
_RANGE = 2.0  # of clean pixels
# Largest query over alpha: beyond, float32 squares of up to 10^4 components would overflow, and an
# index could not tell patches apart.
_LARGEST_QUERY = 1e15


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
        self._rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
        self._order = stratified(query.members, db.labels, self._rng)
        self._list_seed = int(self._rng.integers(1 << 63))

    def state(self, approximation: Approximation) -> tuple[PosteriorState, Error]:
        """The estimated state of the whole posterior, and its error.

        Raises:
            DatabaseError: the index names patches that are not there.
        """
        if approximation.mode in ("topk", "topk+subset", "lists") and not self._can_search:
            return self._exact()
        match approximation.mode:
            case "topk":
                return self._head_alone(self.head(approximation.k))
            case "subset" | "topk+subset":
                if approximation.images >= len(self._order) or len(self._order) < 2 * GROUPS:
                    return self._exact()
                tail = self._tail(max(approximation.images, 2 * GROUPS))
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
        """The cheapest of subset, head and subset, lists, and everything, as a small part tells.

        Border pixels have few candidates each, so that they need more images than others, and an
        image costs less there: they get subsets of their own.
        """
        if len(self._order) <= 2 * _PILOT_IMAGES:
            return self._exact()
        aim, interior = _MARGIN * tolerance, self._interior()
        has_border, scans = not bool(interior.all()), self._can_scan
        tail, result, border = None, None, None
        if not scans or self._scan_cost(self._least_share) > _PLAIN * _PILOT_IMAGES:
            tail = self._tail(_PILOT_IMAGES)
            result = self._interior_to(aim, k, tail, interior)
        if result is None and scans:
            share = self._first_share
            start, interior_aim = self._lists(share, interior), aim
            if has_border:
                tail = self._border_tail(tail)
                border = self._border(tail)
                border_aim = self._border_aim(aim, share, start, tail, border)
                border = self._border_to(border_aim, tail, border)
                interior_aim = _left(aim, border, ~interior)
            result = self._lists_to(interior_aim, share, start)
        if result is None:
            return self._exact()
        if not has_border:
            return result
        if border is None:
            assert tail is not None
            border = self._border_to(_left(aim, result, interior), tail, self._border(tail))
        return _chosen(interior, result, border)

    def _border_tail(self, before: Tail | None) -> Tail:
        """A first subset for the border's pixels, ``before`` in it."""
        images = self._border_images
        if before is not None and len(before) >= images:
            return before
        return self._tail(images, before, query=replace(self._query, border_only=True))

    @property
    def _border_images(self) -> int:
        """Of the first subset for the border's pixels."""
        if not self._multiplies:
            return _PILOT_IMAGES
        return max(_PILOT_IMAGES, min(_BORDER_IMAGES, len(self._order) // 8))

    def _border_aim(
        self,
        aim: float,
        share: float,
        start: tuple[PosteriorState, Error],
        tail: Tail,
        around: tuple[PosteriorState, Error],
    ) -> float:
        """How wrong the border may be, so that it and the interior together cost least.

        Args:
            aim: for the mean over all pixels.
            share: of the lists.
            start: the interior from it.
            tail: a subset for the border's pixels.
            around: the border from it.
        """
        served = self._is_served().numpy()
        lists = self._share_allotments(start[1], np.full(served.sum(), share))
        border = self._border_allotments(tail, around[1])
        inside = float(served.mean())
        border_errors = border.errors / _ENOUGH
        errors = inside * lists.errors[:, None] + (1 - inside) * border_errors
        costs = inside * lists.costs[:, None] + (1 - inside) * self._border_cost * border.costs
        good = errors <= aim
        if not good.any():
            return aim / 2 / (1 - inside)
        best = int(np.argmin(np.where(good, costs, np.inf)))
        # By rounding what is aimed at may come out not quite as good.
        return float(border_errors[best % len(border_errors)]) * (1 + 1e-9)

    def _border_allotments(self, tail: Tail, error: Error) -> Allotments:
        """Larger subsets for the border's pixels, from what there is."""
        border = ~self._interior().numpy()
        sizes = np.broadcast_to(tail.sizes, border.shape)[border]
        errors = _absolute_errors(error)[border]
        if not self._multiplies:  # and so serves all alike
            errors = np.full_like(errors, errors.mean())
        total = len(self._order)
        passing = _PASSING if self._multiplies else 0.0
        return subset_allotments(errors, sizes, self._border_images, total, _BORDER_POWER, passing)

    def _share_allotments(self, error: Error, shares: Array) -> Allotments:
        """Larger shares of the lists for the pixels that the index serves."""
        errors = _absolute_errors(error)[self._is_served().numpy()]
        nothing = self._scan_cost(0.0)
        costs = (nothing, self._scan_cost(1.0) - nothing)
        return share_allotments(errors, shares, _SCAN_POWER, _LEAST_GROWTH, _MOST_GROWTH, costs)

    @property
    def _border_cost(self) -> float:
        """Of an image for a pixel of the border, in images of the exact kernel for the others."""
        _, _, height, width = self._query.x.shape
        reach = self._query.patch_size - 1
        inside = (height - reach) * (width - reach)
        edges = reach * ((height - reach) ** 2 + (width - reach) ** 2) + reach**2
        pairs = edges / (height * width - inside)
        return (_PRODUCT_PAIRS if self._multiplies else _BORDER_PAIRS) * pairs / inside

    def _interior_to(
        self, aim: float, k: int, tail: Tail, interior: Tensor
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
            needed = images_needed(error, aim, len(tail), total, power)
            if scans:
                most = min(most, len(tail) + math.ceil(self._scan_cost(self._first_share)))
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
        self, head: _Head | None, tail: Tail, interior: Tensor, pilot: _Pilot | None
    ) -> tuple[tuple[PosteriorState, Error], float]:
        """Head and tail, and their expected absolute error; both as the pilot pixels say."""
        result = self.combined(head, tail)
        if pilot is not None:
            result = _enlarged(result, pilot.doubt(result, tail))
        return result, _typical_error(result[1], interior)

    @property
    def _can_search(self) -> bool:
        """Whether there is an index, pixels that it serves, and a signal to search for."""
        has_pixels = bool(self._is_served().any())
        alpha, largest = float(self._query.alpha[0]), float(self._query.x.abs().max())
        return self._index is not None and has_pixels and largest < _LARGEST_QUERY * alpha

    @property
    def _can_scan(self) -> bool:
        """Whether lists are cheap enough to read here and tell the posterior well enough."""
        if not (self._can_search and self._is_here):
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
            result: of it; pixels that err much are read anew.
        """
        served = self._is_served()
        shares = np.full(int(served.sum()), share)
        while _typical_error(result[1], served) > aim:
            allotments = self._share_allotments(result[1], shares)
            chosen = allotments.cheapest(aim)
            larger = allotments.sizes[chosen]
            # Where all has been read, what is left is what codes do not tell.
            is_all = not (larger > shares).any()
            if is_all or allotments.costs[chosen] > _MOST_SHARE * len(self._order):
                return None
            again = served.clone()
            again[served] = torch.from_numpy(larger > shares)
            result = _chosen(again, self._lists(larger[larger > shares], again), result)
            shares = larger
        return result if _all_known(result[0], served) else None

    @cached_property
    def _first_share(self) -> float:
        """The share that is read at first.

        Where few patches share a pixel they must be met, and that takes as many lists as a search
        would probe. If that costs much, a few images tell whether it is so.
        """
        assert self._index is not None
        share, probed = self._least_share, min(DEFAULT_EFFORT / self._index.lists, 1.0)
        if self._scan_cost(probed) - self._scan_cost(share) < _LOOK_IMAGES:
            return max(share, probed)
        query = replace(self._query, members=np.sort(self._order[:_LOOK_IMAGES]))
        state = moved(self._backend.state(self._db.images, query), "cpu")
        assert state.tilt is not None
        effective = state.mass * (-state.tilt / state.mass).exp()
        return share if float(effective[0][self._interior()].median()) > _MANY else probed

    @property
    def _least_share(self) -> float:
        """The share that tells enough where many patches share a pixel.

        Lists of long codes say less about their patches. Where the interior is a part of the image,
        so is its error.
        """
        assert self._index is not None
        _, size = self._index.codes_read()
        inside = float(self._interior().double().mean())
        by_size = math.pow(size / 64, 1.5) * math.pow(inside, 1 / _SCAN_POWER) / 256
        return max(min(by_size, 1 / 32), 1.5 * 2.0**-COARSEST)

    def _with_lists(self, share: float) -> tuple[PosteriorState, Error]:
        """The lists' posterior, and the exact one of the pixels that the index does not serve.

        If a pixel has met no patch, everything is computed.
        """
        served = self._is_served()
        state, error = self._lists(share, served)
        if not _all_known(state, served):
            # The exact state of some pixels costs as much as that of all.
            return self._exact()
        if bool(served.all()):
            return state, error
        return _chosen(served, (state, error), self._whole_border())

    def _lists(self, share: float | Array, served: Tensor) -> tuple[PosteriorState, Error]:
        """Of some of the interior's pixels, each with its share.

        Others, and those that have met no patch, have no mass and the largest error.
        """
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
        alpha, sigma = float(query.alpha[0]), float(query.sigma[0])
        largest = math.sqrt(float(np.square(y.astype(np.float64)).sum(1).max()))
        try:
            sums = scan(
                lists,
                y,
                rest,
                alpha=alpha,
                sigma=sigma,
                share=share,
                seed=self._list_seed,
                allowed=allowed,
                pixels=height * width,
                threads=self._backend.threads,
            )
        except IndexError as error:
            raise index.damaged(str(error)) from error
        known = sums.known & is_precise(lists, alpha, sigma, largest)

        def placed(values: npt.NDArray[np.float64], elsewhere: float) -> Tensor:
            room = torch.full(
                (*served.shape, *values.shape[1:]), elsewhere, dtype=torch.float64, device="cpu"
            )
            room[served] = torch.from_numpy(values)
            return room.movedim(-1, 0).unsqueeze(0) if values.ndim == 2 else room.unsqueeze(0)

        mass = np.where(known, sums.mass, 1.0)
        state = PosteriorState(
            placed(np.where(known, sums.maximum, -math.inf), -math.inf),
            placed(np.where(known, sums.mass, 0.0), 0.0),
            placed(np.where(known[:, None], sums.centre, 0.0), 0.0),
            placed(np.where(known, sums.tilt, 0.0), 0.0),
        )
        share_omitted = np.where(known, np.clip(1 - sums.seen / mass, 0, 1), 1.0)
        omitted = placed(share_omitted, 1.0)
        doubted = sums.deviation * _doubt(sums.effective, lists.is_lossless)[:, None]
        # A spread needs several blocks, and knows as little of what is between them.
        least = share_omitted / np.maximum(sums.blocks, 1.0)
        doubted = np.where(known[:, None], np.hypot(doubted, least[:, None]), _RANGE)
        deviation = placed(doubted, _RANGE)
        worst, typical = deviation.amax(1), deviation.mean(1)
        return state, Error(omitted, worst, "estimate", "lists", 0, typical)

    def _border_to(
        self, aim: float, tail: Tail, result: tuple[PosteriorState, Error]
    ) -> tuple[PosteriorState, Error]:
        """The border's pixels from growing subsets of the images, in the end all of them.

        Args:
            aim: of the error.
            tail: a first subset.
            result: of it.
        """
        border = ~self._interior()
        while _typical_error(result[1], border) > max(aim, 0.0):
            allotments = self._border_allotments(tail, result[1])
            sizes = np.broadcast_to(tail.sizes, border.shape).copy()
            sizes[border.numpy()] = allotments.sizes[allotments.cheapest(_ENOUGH * aim)]
            tail = self._grown(tail, sizes)
            result = self._border(tail)
        return result

    def _border(self, tail: Tail) -> tuple[PosteriorState, Error]:
        """The border's pixels from a subset."""
        state, error = self.combined(None, tail)
        assert state.tilt is not None
        met = state.mass * (-state.tilt / state.mass).exp() * torch.from_numpy(tail.sizes)
        return _enlarged((state, error), _border_doubt(met / self.images))

    def _grown(self, tail: Tail, sizes: Array) -> Tail:
        """A subset of such a size for each pixel near the border, ``[H, W]``, ``tail`` in it."""
        before = np.broadcast_to(tail.sizes, sizes.shape)
        groups, query = tail.groups, replace(self._query, border_only=True)
        steps = np.unique(np.concatenate([before[sizes > before], sizes[sizes > before]]))
        for first, last in pairwise(steps.astype(np.int64)):
            wanted = (before <= first) & (sizes >= last)
            if wanted.any():
                fresh = self._groups(first, last, query, wanted)
                groups = groups.merged(fresh, wanted)
        return Tail(groups, sizes, None)

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
        pixels = torch.zeros(interior.numel(), dtype=torch.bool, device="cpu")
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
            return torch.ones(height, width, dtype=torch.bool, device="cpu")
        radius = self._query.patch_size // 2
        served = torch.zeros(height, width, dtype=torch.bool, device="cpu")
        served[radius : height - radius, radius : width - radius] = True
        return served

    def head(self, k: int, pixels: Tensor | None = None, effort: int | None = None) -> _Head:
        """The k nearest patches of each pixel that the index serves, or of some of them."""
        index = self._index
        assert index is not None
        served = self._is_served()
        chosen = served if pixels is None else served & pixels
        everyone = len(self._order) == len(self._db)
        addresses = torch.full((1, *served.shape, k), -1, dtype=torch.int64, device="cpu")
        patches = self._patches(chosen)
        _, found = index.search(
            patches,
            k,
            members=None if everyone else np.sort(self._order),
            effort=effort,
            threads=self._backend.threads,
        )
        addresses[0, chosen] = torch.from_numpy(found)
        device = self._query.x.device
        state, logits = self._backend.given(self._db.images, self._query, addresses.to(device))
        return _Head(index.is_exact, addresses, moved(state, "cpu"), logits.cpu(), served, patches)

    def _patches(self, pixels: Tensor) -> npt.NDArray[np.float32]:
        """Patches around some pixels, over alpha, ``[Q, C, P, P]``."""
        query = self._query
        radius, size = query.patch_size // 2, query.patch_size
        x = query.x[0].cpu().double().numpy() / float(query.alpha[0])
        around = ((0, 0), (radius, radius), (radius, radius))
        x = np.pad(x, around, "wrap" if query.boundary == "circular" else "constant")
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
        patches: npt.NDArray[np.float32] = np.moveaxis(windows, 0, 2)[pixels.numpy()]
        return patches.astype(np.float32)

    def _head_alone(self, head: _Head) -> tuple[PosteriorState, Error]:
        """The head as the whole posterior, with what may have been left out.

        If the index has found nothing for a pixel, everything is computed.
        """
        query, served = self._query, head.served
        if not _all_known(head.state, served):
            return self._exact()
        state = self._with_border(head)
        log_mass = head.state.maximum + head.state.mass.log()
        # A full list may leave out candidates as heavy as its last one, and no heavier.
        height, width = served.shape
        inside = (height - query.patch_size + 1) * (width - query.patch_size + 1)
        places = inside * len(self._order)
        found = (head.addresses >= 0).sum(-1)
        last = head.logits.masked_fill(head.addresses < 0, torch.inf).amin(-1)
        norms = torch.zeros(served.shape, dtype=torch.float64, device="cpu")
        norms[served] = torch.from_numpy(head.patches).double().square().sum((1, 2, 3))
        terms = query.x.shape[1] * query.patch_size**2
        alpha, sigma = float(query.alpha[0]), float(query.sigma[0])
        rounding = _INDEX_ROUNDING * alpha**2 * (norms + terms) / (2 * sigma**2)
        left = (places - found).clamp(min=0)
        log_ratio = left.double().log() + last + rounding - log_mass
        # With nothing left log 0 is -inf, of which the sigmoid is 0.
        omitted = torch.where(served, torch.sigmoid(log_ratio), 0.0)
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
        groups = np.array_split(self._query.members, GROUPS)
        state = merge_all(self._border_states(groups))
        return state, Error.none(state.mass)

    def _border_states(
        self, groups: Sequence[Members], wanted: npt.NDArray[np.bool_] | None = None
    ) -> list[PosteriorState]:
        threads = self._backend.threads
        return border_states(self._db.images, self._query, groups, wanted=wanted, threads=threads)

    @cached_property
    def _multiplies(self) -> bool:
        """Whether the border's pixels are weighed by products on a matrix unit."""
        return self._is_here and can_multiply(self._query)

    @property
    def _is_here(self) -> bool:
        """Whether this process's CPU computes everything.

        Elsewhere reading lists and products would cost what they cost here, and where processes
        share the images, every one of them would do all of it.
        """
        return self._backend.device.type == "cpu" and self._backend.shards == 1

    def _tail(
        self, images: int, before: Tail | None = None, query: PosteriorQuery | None = None
    ) -> Tail:
        """States of groups of so many images in all, those of ``before`` among them."""
        groups = self._groups(0 if before is None else len(before), images, query or self._query)
        if before is not None:
            groups = before.groups.merged(groups, np.ones(groups.mass.shape[1:], dtype=np.bool_))
        chosen = self._order[:images]
        group_of = np.full(len(self._db), -1, dtype=np.int64)
        group_of[chosen] = np.arange(len(chosen)) % GROUPS
        return Tail(groups, np.full((1, 1), float(len(chosen))), group_of)

    def _groups(
        self,
        first: int,
        last: int,
        query: PosteriorQuery,
        wanted: npt.NDArray[np.bool_] | None = None,
    ) -> Groups:
        """Of a part of the images in their order.

        Of the border's pixels those that are ``wanted``; others may have anything.
        """
        number = np.arange(first, min(last, len(self._order)))
        members = [np.sort(self._order[number[number % GROUPS == g]]) for g in range(GROUPS)]
        if query.border_only and self._multiplies:
            return Groups.of(self._border_states(members, wanted))
        return Groups.of(self._backend.states(self._db.images, query, members))

    def combined(self, head: _Head | None, tail: Tail) -> tuple[PosteriorState, Error]:
        """Head and scaled tail as one state; the error from leaving out each group in turn."""
        groups = tail.groups if head is None else self._without(head, tail)
        nothing = groups.first().where(np.zeros(groups.mass[:1].shape, dtype=np.bool_))
        apart = nothing if head is None else Groups.of([head.state])
        total, sizes = len(self._order), tail.sizes
        ratio, ratios = total / sizes, total / (sizes - counts_of(sizes))
        reference = np.maximum(groups.maximum.max(0), apart.maximum[0])
        own, kept = groups.on(reference), apart.on(reference)
        all_mass = kept.mass[0] + ratio * own.mass.sum(0)
        all_centre = kept.centre[0] + ratio * own.centre.sum(0)
        all_tilt = kept.tilt[0] + ratio * own.tilt.sum(0)
        seen_mass = kept.mass[0] + own.mass.sum(0)
        less_mass = kept.mass + ratios * sums_without_each(own.mass)
        less_centre = kept.centre + ratios[:, None] * sums_without_each(own.centre)
        # Beside the heaviest group the others may be too light to be seen; without it they are not.
        heaviest = np.arange(GROUPS)[:, None, None] == groups.maximum.argmax(0)
        others = groups.where(~heaviest)
        below = np.maximum(others.maximum.max(0), apart.maximum[0])
        own, kept = others.on(below), apart.on(below)
        less_mass = np.where(heaviest, kept.mass + ratios * own.mass.sum(0), less_mass)
        rest_centre = kept.centre + ratios[:, None] * own.centre.sum(0)
        less_centre = np.where(heaviest[:, None], rest_centre, less_centre)
        means = np.clip(less_centre / np.where(less_mass > 0, less_mass, 1.0)[:, None], -1, 1)
        spread = np.square(means - means.mean(0)).sum(0) * (GROUPS - 1) / GROUPS
        omitted = np.clip(1 - seen_mass / np.where(all_mass > 0, all_mass, 1.0), 0, 1)
        # One more image may differ from those of the subset and weigh as much as one of them.
        least = (1 - sizes / total) / sizes
        if head is not None:
            least = least * _share_of(tail.groups, head.state, ratio)
        deviation = np.hypot(np.sqrt(spread * (1 - sizes / total)), least)
        reference, all_mass, all_centre, all_tilt, omitted, worst, typical = (
            torch.from_numpy(values[None])
            for values in (
                reference,
                all_mass,
                all_centre,
                all_tilt,
                omitted,
                deviation.max(0),
                deviation.mean(0),
            )
        )
        mode: Mode = "subset" if head is None else "topk+subset"
        error = Error(omitted, worst, "estimate", mode, len(tail), typical)
        return PosteriorState(reference, all_mass, all_centre, all_tilt), error

    def _without(self, head: _Head, tail: Tail) -> Groups:
        """The groups' sums less what the head counts already."""
        groups = tail.groups
        _, height, width = groups.mass.shape
        pixels = height * width
        addresses = head.addresses[0].numpy().reshape(pixels, -1)
        assert tail.group_of is not None
        group = np.where(addresses >= 0, tail.group_of[addresses // pixels], -1)
        pixel, place = np.nonzero(group >= 0)
        flat = addresses[pixel, place]
        clean = self._db.images[flat // pixels, :, flat % pixels // width, flat % width]
        centres = clean / 127.5 - 1  # [M, C]
        slot = group[pixel, place] * pixels + pixel
        logits = head.logits[0].numpy().reshape(pixels, -1)[pixel, place]
        # A candidate of a group is no heavier than its heaviest but for rounding, which in float32
        # may be much where logits are huge.
        shifted = np.minimum(logits - groups.maximum.ravel()[slot], _MOST_ABOVE)
        weights = np.exp(shifted)

        def sums(values: Array) -> Array:
            counted: Array = np.bincount(slot, values, GROUPS * pixels).astype(np.float64)
            return counted.reshape(GROUPS, height, width)

        left = groups.mass - sums(weights)
        counted_centre = np.stack([sums(weights * c) for c in centres.T], axis=1)
        counted_tilt = sums(np.where(weights > 0, weights * shifted, 0.0))
        rest = Groups(
            groups.maximum, left, groups.centre - counted_centre, groups.tilt - counted_tilt
        )
        # Below the rounding of the sums nothing is known to be left.
        return rest.where(left > _CANCELS * groups.mass)


@final
class _Pilot:
    """Heads of a few pixels: what heads of all would gain, and what has been overlooked so far."""

    def __init__(self, estimator: Estimator, k: int, interior: Tensor) -> None:
        self._estimator = estimator
        self._k = k
        self._pixels = estimator.pilot_pixels(interior)
        self._heads: dict[int, _Head] = {}
        self._tail: Tail | None = None
        self._with_tail: dict[int, tuple[PosteriorState, Error]] = {}

    def doubt(self, result: tuple[PosteriorState, Error], tail: Tail) -> float:
        """How much larger the error is than it seems, at least 1.

        A spread does not tell of heavy patches that neither head nor tail has met; the largest head
        meets most of them.
        """
        seems = _typical_error(result[1], self._pixels)
        return max(1.0, self._error(result, tail) / max(seems, 1e-30))

    def cheapest(
        self, effort: int, needed: int, error: float, aim: float, doubted: Error, tail: Tail
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
            images = images_needed(expected, aim, len(tail), total, _HEAD_POWER)
            cost += max(images - len(tail), 0)
            if cost < least:
                best, least = more, cost
        return best

    def _error(self, result: tuple[PosteriorState, Error], tail: Tail) -> float:
        """By the spread, or by the difference that the largest head makes, if that is more."""
        reference = self._answer(_EFFORTS[-1], tail)[0]
        difference = (_mean(result[0]) - _mean(reference)).abs().mean(0)[self._pixels]
        return max(_typical_error(result[1], self._pixels), float(difference.mean()))

    def _answer(self, effort: int, tail: Tail) -> tuple[PosteriorState, Error]:
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


def _doubt(effective: npt.NDArray[np.float64], is_lossless: bool) -> npt.NDArray[np.float64]:
    """How much larger errors are than the spread of what was read, for so many effective patches.

    A spread does not tell of heavy patches that were not met, and the fewer patches share a pixel,
    the more that matters. Where codes are not whole patches, what they leave unknown hides most of
    that. As measured (docs/retrieval.md).
    """
    if not is_lossless:
        return np.full_like(effective, 1.25)
    return 1 + 3 / (1 + (effective / 60) ** 0.4)


def _border_doubt(effective: Tensor) -> Tensor:
    """The same for a border pixel's subset, with so many effective patches in it.

    Those who have met no heavy patch seem to be done.
    """
    return 1.08 + 0.3 / (1 + effective / 400)


def _enlarged(
    result: tuple[PosteriorState, Error], factor: float | Tensor
) -> tuple[PosteriorState, Error]:
    """The same with larger errors."""
    state, error = result
    larger = replace(error, mean_error=factor * error.mean_error, typical=factor * error.typical)
    return state, larger


def _left(aim: float, done: tuple[PosteriorState, Error], where: Tensor) -> float:
    """What some pixels leave of a mean error over all of them to each of the others."""
    part = float(where.double().mean())
    return (aim - part * _typical_error(done[1], where)) / (1 - part)


def _typical_error(error: Error, pixels: Tensor | None = None) -> float:
    """Expected absolute error of the mean, over all pixels or some, from its standard error."""
    typical = error.typical[0] if pixels is None else error.typical[0][pixels]
    return _MEAN_ABSOLUTE * float(typical.mean())


def _absolute_errors(error: Error) -> Array:
    """Expected absolute errors of one image, ``[H, W]``."""
    errors: Array = _MEAN_ABSOLUTE * error.typical[0].numpy()
    return errors


def _share_of(groups: Groups, head: PosteriorState, ratio: Array) -> Array:
    """What the groups, scaled, weigh of themselves and a head together, ``[H, W]``."""
    apart = Groups.of([head])
    reference = np.maximum(groups.maximum.max(0), apart.maximum[0])
    scaled = ratio * groups.on(reference).mass.sum(0)
    together = scaled + apart.on(reference).mass[0]
    share: Array = scaled / np.where(together > 0, together, 1.0)
    return share


def _all_known(state: PosteriorState, pixels: Tensor) -> bool:
    """Whether each of some pixels has met a candidate."""
    return bool((state.mass[0][pixels] > 0).all())


def _mean(state: PosteriorState) -> Tensor:
    """Of one image, ``[C, H, W]``."""
    return (state.centre / state.mass.unsqueeze(1))[0]


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
