"""The triton backend: posteriors on a GPU, from images that stay there or stream through it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.posterior import PosteriorQuery, PosteriorState, TopPatches, best
from els.engine.whole_image import equivariant_state, ideal_state

if TYPE_CHECKING:
    from els.triton_kernels.configurations import Configuration
    from els.triton_kernels.merge import Totals
    from els.triton_kernels.queries import Queries
    from els.triton_kernels.tiles import DevicePlan, Part

_LN2 = math.log(2.0)
# Packed images that a kernel is given at once. Fixed, so that where they lie shows in no bit.
_BLOCK_BYTES = 64 << 20
# Share of the GPU's free memory that images may stay in.
_RESIDENT_SHARE = 0.6
# Images whose distances float32 does not know to this (to base 2) are computed in float64.
_MOST_ERROR = 3e-5
# A threshold is raised by so many root-mean-square errors before float64 ranks what passes.
_SAFETY = 8.0
# Float64 distances that were summed in different orders are equal if they agree to this.
_EQUAL = 1e-13
# The logit of a place that is still free among the nearest; a float32.
_FAR = -1e30
# Candidates of one pixel that a selection has room for, in units of how many are wanted.
_ROOM = 4
_LEAST_ROOM = 256
_SELECTION_BYTES = 256 << 20

Images = npt.NDArray[np.uint8]
Members = npt.NDArray[np.int64]


@final
class TritonBackend:
    """Exact posteriors on a CUDA or ROCm device (design, section 4); IS and ES through torch.

    Images are packed, one 32-bit word of bytes a pixel. They stay on the device if they fit, else
    blocks of them stream through pinned memory while the block before is computed; results do not
    depend on which.

    Args:
        device: for example ``"cuda:1"``; None for ``"cuda"``, or ``"cpu"`` where
            ``TRITON_INTERPRET=1`` is set and kernels are interpreted.
        resident_bytes: device memory that packed images may stay in; None for most of what is
            free when they are first needed.
        configuration: of the exact kernel; None for the shipped one.

    Raises:
        RuntimeError: if Triton is not installed, or the device is not there.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        resident_bytes: int | None = None,
        configuration: Configuration | None = None,
    ) -> None:
        try:
            import triton
        except ImportError as error:
            raise RuntimeError(
                "backend='triton' needs Triton, which is not installed: pip install "
                "'els-machine[gpu]', or use backend='native'"
            ) from error
        interpreted = bool(triton.knobs.runtime.interpret)
        self.device = torch.device(device or ("cpu" if interpreted else "cuda"))
        if interpreted and self.device.type != "cpu":
            raise RuntimeError(
                f"with TRITON_INTERPRET=1 kernels run on the CPU, not on {self.device}; unset "
                "it, or use device='cpu'"
            )
        if not interpreted and (self.device.type != "cuda" or not torch.cuda.is_available()):
            raise RuntimeError(
                f"backend='triton' cannot run on {self.device}: it needs a CUDA or ROCm device "
                f"that torch sees ({torch.cuda.device_count()} here); use backend='native'"
            )
        where = "interpreted" if interpreted else torch.cuda.get_device_name(self.device)
        self.name = f"triton ({where})"
        self.workers = 1
        self._configuration = configuration
        self._images = _DeviceImages(self.device, resident_bytes)
        self._plans: dict[tuple[object, ...], tuple[Configuration, DevicePlan]] = {}

    def state(self, images: Images, query: PosteriorQuery) -> PosteriorState:
        """See :class:`els.engine.backends.Backend`."""
        match query.kind:
            case "IS":
                return ideal_state(images, query)
            case "ES":
                return equivariant_state(images, query)
        from els.triton_kernels.queries import Queries

        queries = Queries.of(query.x, query.alpha, query.sigma)
        state = self._natural(query, queries, self._totals(images, query, queries))
        if query.top:
            state = replace(state, top=self._top(images, query, queries))
        return state

    def given(
        self, images: Images, query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """See :class:`els.engine.backends.Backend`."""
        from els.triton_kernels.queries import Queries
        from els.triton_kernels.truncated import truncated

        queries = Queries.of(query.x, query.alpha, query.sigma)
        pixels = queries.x.shape[2]
        flat = addresses.reshape(len(addresses), pixels, -1)
        # Only the images that are named need to be there.
        numbers, which = torch.unique(flat.clamp(min=0) // pixels, return_inverse=True)
        local = torch.where(flat < 0, -1, which * pixels + flat % pixels)
        totals, logits = truncated(
            self._images.some(images, numbers.cpu().numpy()),
            queries.x,
            queries.slope,
            local,
            height=query.x.shape[2],
            patch_size=query.patch_size,
            circular=query.boundary == "circular",
        )
        unbiased = replace(queries, bias=torch.zeros_like(queries.bias))
        return self._natural(query, unbiased, totals), (_LN2 * logits).reshape(addresses.shape)

    def _totals(self, images: Images, query: PosteriorQuery, queries: Queries) -> Totals:
        """The biased states, in float64 where float32 would not do."""
        totals, plan = self._accumulated(images, query, queries, torch.float32)
        error = queries.distance_error(-totals.maximum, plan.terms)
        error = torch.where(totals.mass > 0, error, 0.0)
        coarse = torch.nonzero((error > _MOST_ERROR).any(1)).flatten()
        if len(coarse):
            exact, _ = self._accumulated(images, query, queries.rows(coarse), torch.float64)
            for whole, part in zip(totals, exact, strict=True):
                if whole is not None and part is not None:
                    whole[coarse] = part
        return totals

    def _accumulated(
        self, images: Images, query: PosteriorQuery, queries: Queries, dtype: torch.dtype
    ) -> tuple[Totals, DevicePlan]:
        from els.triton_kernels.exact import accumulate
        from els.triton_kernels.merge import Totals

        # The pixels at the border: the ends of the rows with all columns, then the other way round.
        parts: list[tuple[Part, Part]] = [("all", "all")]
        if query.border_only:
            parts = [("ends", "all"), ("middle", "ends")]
        plans = [self._plan(query, dtype, *part) for part in parts]
        totals = Totals.empty(queries.x, entropy=query.entropy)
        x, scales = queries.arguments(dtype)
        for block in self._images.blocks(images, query.members):
            for configuration, plan in plans:
                if plan.row_tiles * plan.column_tiles == 0:
                    continue
                accumulate(totals, block, x, scales, plan, configuration)
        return totals, self._plan(query, dtype)[1]

    def _natural(self, query: PosteriorQuery, queries: Queries, totals: Totals) -> PosteriorState:
        """Natural logarithms and clean pixels, without the bias."""
        _, plan = self._plan(query, torch.float32)
        shape = query.x[:, 0].shape
        maximum = totals.maximum - queries.bias[:, None] * plan.terms
        centre = totals.centre / 127.5 - totals.mass.unsqueeze(1)
        maximum = torch.where(totals.mass > 0, _LN2 * maximum, -torch.inf)
        return PosteriorState(
            maximum.reshape(shape),
            totals.mass.reshape(shape),
            centre.reshape(query.x.shape),
            None if totals.tilt is None else (_LN2 * totals.tilt).reshape(shape),
        )

    def _top(self, images: Images, query: PosteriorQuery, queries: Queries) -> TopPatches:
        """The heaviest candidates, for as many queries at a time as memory allows."""
        shape = query.x[:, 0].shape
        room = max(
            _LEAST_ROOM, _ROOM * query.top, 2 * self._plan(query, torch.float32)[1].candidates
        )
        at_once = max(1, _SELECTION_BYTES // (32 * room * shape[1] * shape[2]))
        parts = [
            self._top_of(images, query, queries.rows(slice(first, first + at_once)), room)
            for first in range(0, shape[0], at_once)
        ]
        return TopPatches(
            torch.cat([part.logits for part in parts]).reshape(*shape, query.top),
            torch.cat([part.addresses for part in parts]).reshape(*shape, query.top),
        )

    def _top_of(
        self, images: Images, query: PosteriorQuery, queries: Queries, room: int
    ) -> TopPatches:
        """Stream blocks that double, and keep the nearest; see triton_kernels.top_k."""
        from els.triton_kernels.top_k import select
        from els.triton_kernels.truncated import truncated

        height = query.x.shape[2]
        pixels = queries.x.shape[2]
        members = torch.tensor(query.members, device=self.device)
        dtype = torch.float32
        nearest = TopPatches(
            queries.x.new_full((len(queries.x), pixels, query.top), -torch.inf),
            members.new_full((len(queries.x), pixels, query.top), -1),
        )
        start, size = 0, max(1, room // self._plan(query, dtype)[1].candidates)
        while start < len(members):
            configuration, plan = self._plan(query, dtype)
            stop = min(start + size, len(members), start + self._images.most(images))
            block = self._images.block(images, query.members[start:stop])
            x, scales = queries.arguments(dtype)
            threshold = self._threshold(queries, nearest.logits[..., -1], plan, dtype)
            counts, found = select(block, x, scales, threshold, plan, configuration, room)
            if int(counts.max()) > room:
                # Many equal distances, as those of blank patches: float64 can tell them from
                # nearer ones, and lets none in that an earlier one equals.
                if dtype == torch.float64:
                    size = (stop - start) // 2
                dtype = torch.float64
                continue
            _, logits = truncated(
                block,
                queries.x,
                queries.slope,
                found,
                height=height,
                patch_size=query.patch_size,
                circular=query.boundary == "circular",
            )
            local = found.to(torch.int64)
            addresses = members[start + local.clamp(min=0) // pixels] * pixels + local % pixels
            addresses = torch.where(local < 0, -1, addresses)
            nearest = best(
                torch.cat([nearest.logits, logits], dim=-1),
                torch.cat([nearest.addresses, addresses], dim=-1),
                query.top,
            )
            start, size = stop, stop
        return TopPatches(_LN2 * nearest.logits, nearest.addresses)

    def _threshold(
        self, queries: Queries, kth: Tensor, plan: DevicePlan, dtype: torch.dtype
    ) -> Tensor:
        """Biased distances below which a candidate may be among the nearest."""
        kth = kth.clamp(min=_FAR)
        biased = -kth - queries.bias[:, None] * plan.terms
        if dtype == torch.float64:
            return biased + _EQUAL * kth
        slack = _SAFETY * queries.distance_error(biased, plan.terms)
        return (biased + slack).to(dtype)

    def _plan(
        self,
        query: PosteriorQuery,
        dtype: torch.dtype,
        row_part: Part = "all",
        column_part: Part = "all",
    ) -> tuple[Configuration, DevicePlan]:
        from els.triton_kernels.configurations import PRECISE, SHIPPED, cheapest
        from els.triton_kernels.tiles import DevicePlan

        shape = query.x.shape[2:]
        key = (query.kind, query.boundary, query.patch_size, *shape, dtype, row_part, column_part)
        if key not in self._plans:
            choices = SHIPPED if self._configuration is None else (self._configuration,)
            configuration, plan = cheapest(
                (PRECISE,) if dtype == torch.float64 else choices,
                equivariant=query.kind == "ELS",
                circular=query.boundary == "circular",
                height=query.x.shape[2],
                width=query.x.shape[3],
                patch_size=query.patch_size,
                row_part=row_part,
                column_part=column_part,
            )
            self._plans[key] = configuration, DevicePlan.of(plan, self.device)
        return self._plans[key]


class _DeviceImages:
    """Packed training images, int32 ``[n, H * W]``, on a device: whole, or a block at a time.

    Args:
        device: where.
        resident_bytes: see :class:`TritonBackend`.
    """

    def __init__(self, device: torch.device, resident_bytes: int | None) -> None:
        self._device = device
        self._resident_bytes = resident_bytes
        self._known: weakref.ref[Images] | None = None
        self._resident: Tensor | None = None
        self._staging: list[_Staging] = []

    def blocks(self, images: Images, members: Members) -> Iterator[Tensor]:
        """The members' images in their order, a fixed number at a time.

        The next block is uploaded when the caller comes back for it: its kernels are in the
        device's queue by then, so that copying and computing overlap.
        """
        most = self.most(images)
        for first in range(0, len(members), most):
            yield self.block(images, members[first : first + most])

    def most(self, images: Images) -> int:
        """How many images a block may hold."""
        return max(1, _BLOCK_BYTES // self._bytes_each(images))

    def block(self, images: Images, members: Members) -> Tensor:
        """The images of some members, at most as many as a block may hold."""
        resident = self._resident_images(images)
        if resident is None:
            return self._uploaded(images, members)
        first, last = int(members[0]), int(members[-1])
        if last - first + 1 == len(members):
            return resident[first : last + 1]
        return resident[torch.tensor(members, device=self._device)]

    def some(self, images: Images, members: Members) -> Tensor:
        """Any number of images."""
        most = self.most(images)
        starts = range(0, len(members), most)
        return torch.cat([self.block(images, members[start : start + most]) for start in starts])

    def _resident_images(self, images: Images) -> Tensor | None:
        """All images, if they fit; uploaded when a database is first met."""
        if self._known is None or self._known() is not images:
            self._known, self._resident = weakref.ref(images), None
            if len(images) * self._bytes_each(images) <= self._budget():
                self._resident = torch.empty(
                    (len(images), images.shape[2] * images.shape[3]),
                    dtype=torch.int32,
                    device=self._device,
                )
                everything = np.arange(len(images), dtype=np.int64)
                for first in range(0, len(images), self.most(images)):
                    part = slice(first, first + self.most(images))
                    self._resident[part] = self._uploaded(images, everything[part])
        return self._resident

    def _budget(self) -> float:
        if self._resident_bytes is not None:
            return self._resident_bytes
        if self._device.type != "cuda":
            return math.inf
        return _RESIDENT_SHARE * torch.cuda.mem_get_info(self._device)[0]

    def _uploaded(self, images: Images, members: Members) -> Tensor:
        if self._device.type != "cuda":
            return _packed(torch.from_numpy(images[members]))
        if not self._staging:
            size = self.most(images) * math.prod(images.shape[1:])
            stream = torch.cuda.Stream(self._device)
            self._staging = [_Staging(size, stream) for _ in range(2)]
        self._staging.reverse()
        return _packed(self._staging[0].upload(images, members, self._device))

    @staticmethod
    def _bytes_each(images: Images) -> int:
        _, _, height, width = images.shape
        return 4 * int(height) * int(width)


class _Staging:
    """A pinned buffer on the way to the device; two of them take turns.

    Args:
        size: in bytes.
        stream: on which copies run, beside the kernels.
    """

    def __init__(self, size: int, stream: torch.cuda.Stream) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._stream = stream
        self._copied = torch.cuda.Event()

    def upload(self, images: Images, members: Members, device: torch.device) -> Tensor:
        """Images of some members, uint8 ``[n, C, H, W]`` on the device, when its queue gets there.

        Returns as soon as they are in the buffer.
        """
        self._copied.synchronize()
        shape = (len(members), *images.shape[1:])
        pinned = self._buffer[: math.prod(shape)].reshape(shape)
        np.take(images, members, axis=0, out=pinned.numpy())
        with torch.cuda.stream(self._stream):
            copy = pinned.to(device, non_blocking=True)
            self._copied.record(self._stream)
        computing = torch.cuda.current_stream(device)
        computing.wait_event(self._copied)
        copy.record_stream(computing)
        return copy


def _packed(images: Tensor) -> Tensor:
    """uint8 ``[n, C, H, W]`` as int32 ``[n, H * W]``: channel 0 in the lowest byte."""
    words = torch.zeros_like(images[:, 0], dtype=torch.int32)
    for channel in range(images.shape[1]):
        words |= images[:, channel].to(torch.int32) << (8 * channel)
    return words.flatten(1)
