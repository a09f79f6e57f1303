"""The triton backend: posteriors on a GPU, of images that stay in its memory or stream to it."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from els.engine.backends.backend import Costs, Images, Members
from els.engine.backends.cores import available_cores
from els.engine.backends.image_machines import image_state
from els.engine.backends.native import LIST_COSTS
from els.engine.backends.native_lists import ListSampling
from els.engine.kinds import Kind
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, TopPatches, best, empty, moved

if TYPE_CHECKING:
    from els.triton_kernels.configurations import Configuration
    from els.triton_kernels.merge import Totals
    from els.triton_kernels.queries import Queries
    from els.triton_kernels.tiles import DevicePlan

_LN2 = math.log(2.0)
# Bytes of packed images for one launch; fixed, so that results do not depend on where they lie.
_BLOCK_BYTES = 64 << 20
# Share of the GPU's free memory that images may stay in.
_RESIDENT_SHARE = 0.6
# Largest error of a float32 distance (to base 2); pixels with a larger one are computed in float64.
_MOST_ERROR = 3e-5
# The oldest Triton that the kernels are tested with; and on AMD, where float64 products are newer.
_OLDEST_TRITON = (3, 6)
_OLDEST_TRITON_AMD = (3, 8)
# The oldest NVIDIA architecture (compute capability) that Triton compiles for.
_OLDEST_CAPABILITY = (8, 0)
# Root-mean-square errors by which a threshold is raised before float64 ranks what is below it.
_SAFETY = 8.0
# Float64 distances that were summed in different orders are equal if they agree to this.
_EQUAL = 1e-13
# Logit of an empty place among the nearest: finite, below every other.
_FAR = -1e300
# Number of tile plans that stay on the device.
_PLANS_KEPT = 64
# Candidates of one pixel that a selection has room for, in units of how many are wanted.
_ROOM = 4
_LEAST_ROOM = 256
_SELECTION_BYTES = 256 << 20


@final
class TritonBackend(ListSampling):
    """Exact posteriors on a CUDA or ROCm device; IS and ES through torch.

    Images are packed, one 32-bit word of bytes a pixel. They stay on the device if they fit, else
    blocks of them stream through pinned memory while the block before is computed; results do not
    depend on which.

    Args:
        device: for example ``"cuda:1"``; None for ``"cuda"``, the current device of the thread
            that constructs the backend, or ``"cpu"`` where ``TRITON_INTERPRET=1`` is set and
            kernels are interpreted.
        resident_bytes: device memory that packed images may stay in; None for most of what is
            free when they are first needed.
        configuration: of the exact kernel; None for the shipped one.

    Raises:
        RuntimeError: if Triton is not installed or too old, or the device is not there, too old,
            or cannot be used by Triton.
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
        _require_version(triton.__version__, _OLDEST_TRITON, "the kernels need")
        from els.triton_kernels.configurations import SHIPPED

        interpreted = bool(triton.knobs.runtime.interpret)
        self.device = torch.device(device or ("cpu" if interpreted else "cuda"))
        if interpreted and self.device.type != "cpu":
            raise RuntimeError(
                f"with TRITON_INTERPRET=1 kernels run on the CPU, not on {self.device}; unset "
                "it, or use device='cpu'"
            )
        self._on_device: Callable[[], AbstractContextManager[object]] = nullcontext
        if not interpreted:
            self.device = _usable(self.device, triton.__version__)
            # Triton launches on the current device, which in a new thread is the first one.
            self._on_device = partial(torch.cuda.device, self.device)
        where = "interpreted" if interpreted else torch.cuda.get_device_name(self.device)
        self.name = f"triton ({where})"
        self.threads = available_cores()
        # Buffers and streams are not copied; a copy makes its own.
        self._made = partial(
            TritonBackend, device, resident_bytes=resident_bytes, configuration=configuration
        )
        self._choices = SHIPPED if configuration is None else (configuration,)
        self._images = _DeviceImages(self.device, resident_bytes)

    def __reduce__(self) -> tuple[partial[TritonBackend], tuple[()]]:
        return self._made, ()

    def supports(self, kind: Kind) -> bool:
        """See :class:`els.engine.backends.backend.Backend`."""
        return kind.window is None

    def costs(self, query: PosteriorQuery) -> Costs:
        """See :class:`els.engine.backends.backend.Backend`; lists would be sampled on the CPU."""
        return LIST_COSTS if self.device.type == "cpu" else Costs()

    def states(
        self, images: Images, query: PosteriorQuery, groups: Sequence[Members]
    ) -> list[PosteriorState]:
        """See :class:`els.engine.backends.backend.Backend`."""
        state = self._local_state if query.kind.is_local else image_state
        with self._on_device():
            return [moved(state(images, query, members), "cpu") for members in groups]

    def weigh(
        self, images: Images, query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """See :class:`els.engine.backends.backend.Backend`."""
        with self._on_device():
            state, logits = self._weighed(images, query, addresses.to(self.device))
            return moved(state, "cpu"), logits.cpu()

    def _local_state(
        self, images: Images, query: PosteriorQuery, members: Members
    ) -> PosteriorState:
        """The state of a machine that compares patches."""
        from els.triton_kernels.queries import Queries

        if len(members) == 0:
            return empty(query)
        queries = Queries.of(query.x, query.alpha, query.sigma)
        state = self._natural(query, queries, self._totals(images, query, members, queries))
        if query.top:
            # Both compute the heaviest logit; where it is large, their roundings differ by more
            # than weights may.
            top = self._top(images, query, members, queries)
            state = replace(state, reference=top.logits[..., 0], top=top)
        return state

    def _weighed(
        self, images: Images, query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        from els.triton_kernels.queries import Queries
        from els.triton_kernels.truncated import truncated

        queries = Queries.of(query.x, query.alpha, query.sigma)
        pixels = queries.x.shape[2]
        flat = addresses.reshape(len(addresses), pixels, -1)
        # Only the images of the addresses are uploaded.
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

    def _totals(
        self, images: Images, query: PosteriorQuery, members: Members, queries: Queries
    ) -> Totals:
        """The biased states; of the pixels that float32 does not know well enough, in float64."""
        from els.triton_kernels.merge import Totals

        every = frozenset(range(query.x.shape[2])), frozenset(range(query.x.shape[3]))
        totals = Totals.empty(queries.x, entropy=query.entropy)
        is_coarse = queries.least_error > _MOST_ERROR
        batches = {every: torch.nonzero(~is_coarse).flatten().tolist()}
        self._replace(totals, images, query, members, queries, torch.float32, batches)
        terms = self._plan(query, torch.float32)[1].terms
        unsure = queries.distance_error(-totals.reference, terms) > _MOST_ERROR
        unsure = unsure & (totals.mass > 0) | is_coarse[:, None]

        def cost(rows: frozenset[int], columns: frozenset[int]) -> float:
            plans = self._plans(query, torch.float64, rows, columns)
            return sum(plan.cost for _, plan in plans)

        # The rows and columns in which images have such pixels, or all where that costs less.
        batches = {}
        for image, pixels in enumerate(unsure.reshape(query.x[:, 0].shape).cpu().numpy()):
            if pixels.any():
                rows, columns = (
                    frozenset(np.flatnonzero(pixels.any(axis)).tolist()) for axis in (1, 0)
                )
                rectangle = min((rows, columns), every, key=lambda pair: cost(*pair))
                batches.setdefault(rectangle, []).append(image)
        self._replace(totals, images, query, members, queries, torch.float64, batches)
        return totals

    def _replace(
        self,
        totals: Totals,
        images: Images,
        query: PosteriorQuery,
        members: Members,
        queries: Queries,
        dtype: torch.dtype,
        batches: dict[tuple[frozenset[int], frozenset[int]], list[int]],
    ) -> None:
        """Compute some rows and columns of some images of the batch anew, in place."""
        for (rows, columns), batch in batches.items():
            if not batch:
                continue
            which = torch.tensor(batch, device=self.device)
            found = self._accumulated(
                images, query, members, queries.rows(which), dtype, rows, columns
            )
            known = found.mass > 0
            for whole, part in zip(totals, found, strict=True):
                if whole is not None and part is not None:
                    of_pixel = known if part.ndim == 2 else known.unsqueeze(1)
                    whole[which] = torch.where(of_pixel, part, whole[which])

    def _accumulated(
        self,
        images: Images,
        query: PosteriorQuery,
        members: Members,
        queries: Queries,
        dtype: torch.dtype,
        rows: frozenset[int],
        columns: frozenset[int],
    ) -> Totals:
        """The biased states of the pixels that are in some rows and some columns."""
        from els.triton_kernels.exact import accumulate
        from els.triton_kernels.merge import Totals

        plans = self._plans(query, dtype, rows, columns)
        totals = Totals.empty(queries.x, entropy=query.entropy)
        x, scales = queries.arguments(dtype)
        for block in self._images.blocks(images, members):
            for configuration, plan in plans:
                accumulate(totals, block, x, scales, plan, configuration)
        return totals

    def _plans(
        self,
        query: PosteriorQuery,
        dtype: torch.dtype,
        rows: frozenset[int],
        columns: frozenset[int],
    ) -> list[tuple[Configuration, DevicePlan]]:
        """The tiles of some rows and columns, of which only the border may be wanted."""
        parts = [(rows, columns)]
        if query.border_only:
            # The ends of the rows with all columns, then middle rows with the ends of the columns.
            radius = query.patch_size // 2
            middle_rows, middle_columns = (
                frozenset(range(radius, length - radius)) for length in query.x.shape[2:]
            )
            parts = [(rows - middle_rows, columns), (rows & middle_rows, columns - middle_columns)]
        return [self._plan(query, dtype, *part) for part in parts if all(part)]

    def _natural(self, query: PosteriorQuery, queries: Queries, totals: Totals) -> PosteriorState:
        """Natural logarithms and clean pixels, without the bias."""
        _, plan = self._plan(query, torch.float32)
        shape = query.x[:, 0].shape
        reference = totals.reference - queries.bias[:, None] * plan.terms
        centre = totals.centre / 127.5 - totals.mass.unsqueeze(1)
        reference = torch.where(totals.mass > 0, _LN2 * reference, -torch.inf)
        return PosteriorState(
            reference.reshape(shape),
            totals.mass.reshape(shape),
            centre.reshape(query.x.shape),
            None if totals.logit_sum is None else (_LN2 * totals.logit_sum).reshape(shape),
        )

    def _top(
        self, images: Images, query: PosteriorQuery, members: Members, queries: Queries
    ) -> TopPatches:
        """The heaviest candidates, for as many queries at a time as memory allows."""
        shape = query.x[:, 0].shape
        room = max(
            _LEAST_ROOM, _ROOM * query.top, 2 * self._plan(query, torch.float32)[1].candidates
        )
        at_once = max(1, _SELECTION_BYTES // (32 * room * shape[1] * shape[2]))
        parts = [
            self._top_of(images, query, members, queries.rows(slice(first, first + at_once)), room)
            for first in range(0, shape[0], at_once)
        ]
        return TopPatches(
            torch.cat([part.logits for part in parts]).reshape(*shape, query.top),
            torch.cat([part.addresses for part in parts]).reshape(*shape, query.top),
        )

    def _top_of(
        self, images: Images, query: PosteriorQuery, members: Members, queries: Queries, room: int
    ) -> TopPatches:
        """Stream blocks that double, and keep the nearest; see triton_kernels.top_k."""
        from els.triton_kernels.top_k import select
        from els.triton_kernels.truncated import truncated

        height = query.x.shape[2]
        pixels = queries.x.shape[2]
        numbers = torch.tensor(members, device=self.device)
        is_coarse = bool((queries.least_error > _MOST_ERROR).any())
        dtype = torch.float64 if is_coarse else torch.float32
        nearest = TopPatches(
            queries.x.new_full((len(queries.x), pixels, query.top), -torch.inf),
            numbers.new_full((len(queries.x), pixels, query.top), -1),
        )
        start, size = 0, max(1, room // self._plan(query, dtype)[1].candidates)
        while start < len(members):
            configuration, plan = self._plan(query, dtype)
            stop = min(start + size, len(members), start + self._images.most(images))
            block = self._images.block(images, members[start:stop])
            x, scales = queries.arguments(dtype)
            threshold = self._threshold(queries, nearest.logits[..., -1], plan, dtype)
            counts, found = select(block, x, scales, threshold, plan, configuration, room)
            if int(counts.max()) > room:
                # Many equal distances, as of blank patches: float64 distinguishes them from nearer
                # ones, and keeps none that equals an earlier one.
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
            addresses = numbers[start + local.clamp(min=0) // pixels] * pixels + local % pixels
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
        rows: frozenset[int] | None = None,
        columns: frozenset[int] | None = None,
    ) -> tuple[Configuration, DevicePlan]:
        """The tiles of some rows and columns of a query, None for all."""
        from els.triton_kernels.configurations import PRECISE

        return _device_plan(
            (PRECISE,) if dtype == torch.float64 else self._choices,
            self.device,
            equivariant=query.kind.is_equivariant,
            circular=query.boundary == "circular",
            height=query.x.shape[2],
            width=query.x.shape[3],
            patch_size=query.patch_size,
            wanted_rows=rows,
            wanted_columns=columns,
        )


@lru_cache(_PLANS_KEPT)
def _device_plan(
    choices: tuple[Configuration, ...], device: torch.device, **machine: Any
) -> tuple[Configuration, DevicePlan]:
    """The cheapest choice and its tiles, on the device; see :func:`.configurations.cheapest`."""
    from els.triton_kernels.configurations import cheapest
    from els.triton_kernels.tiles import DevicePlan

    configuration, plan = cheapest(choices, **machine)
    return configuration, DevicePlan.of(plan, device)


def _require_version(version: str, oldest: tuple[int, int], why: str) -> None:
    """Whether an installed Triton is new enough.

    Raises:
        RuntimeError: if not.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < oldest:
        needed = ".".join(map(str, oldest))
        raise RuntimeError(
            f"backend='triton': {why} Triton {needed} or later, but {version} is installed: "
            f"pip install 'triton>={needed}', or use backend='torch'"
        )


def _usable(device: torch.device, version: str) -> torch.device:
    """A device that the kernels run on, with its index.

    Args:
        device: as it was asked for.
        version: of Triton.

    Raises:
        RuntimeError: if they do not.
    """
    from triton.runtime import driver

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or count <= (device.index or 0):
        has_support = torch.version.cuda or torch.version.hip
        why = "" if has_support else "; this torch was built without CUDA and ROCm"
        raise RuntimeError(
            f"backend='triton' cannot run on {device}: it needs a CUDA or ROCm device that torch "
            f"sees, and a driver for it ({count} devices here{why}); use backend='native'"
        )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if torch.version.hip:
        _require_version(version, _OLDEST_TRITON_AMD, "on AMD, products in float64 need")
    elif torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        found, oldest = (
            ".".join(map(str, pair))
            for pair in (torch.cuda.get_device_capability(device), _OLDEST_CAPABILITY)
        )
        raise RuntimeError(
            f"backend='triton' cannot run on {device}, a {torch.cuda.get_device_name(device)} of "
            f"compute capability {found}: Triton needs {oldest} or later; use backend='torch' with "
            f"device='{device}'"
        )
    try:
        with torch.cuda.device(device):
            driver.active.get_current_target()
    except Exception as error:
        raise RuntimeError(
            f"backend='triton' cannot run on {device}, since Triton cannot talk to its driver "
            f"({error}); it needs a C compiler and the driver's library: install them, or use "
            f"backend='torch' with device='{device}'"
        ) from error
    return device


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
        self._staging = [_Staging(device), _Staging(device)]

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
        """All images, if they fit; uploaded when a database is first used."""
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
        self._staging.reverse()
        return _packed(self._staging[0].upload(images, members))

    @staticmethod
    def _bytes_each(images: Images) -> int:
        _, _, height, width = images.shape
        return 4 * int(height) * int(width)


class _Staging:
    """A buffer on the way to the device, which grows; two of them take turns.

    Args:
        device: where to. To a GPU copies run beside the kernels, from pinned memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._copied: torch.cuda.Event | None = None

    def upload(self, images: Images, members: Members) -> Tensor:
        """Images of some members, uint8 ``[n, C, H, W]`` on the device, when its queue gets there.

        Returns as soon as they are in the buffer; on the CPU they stay there until the next call.
        """
        if self._copied is not None:
            self._copied.synchronize()
        shape = (len(members), *images.shape[1:])
        size = math.prod(shape)
        if len(self._buffer) < size:
            self._buffer = torch.empty(
                size, dtype=torch.uint8, device="cpu", pin_memory=self._is_gpu
            )
        staged = self._buffer[:size].reshape(shape)
        # Members exist, so nothing is clipped; "raise" would write to a buffer of its own first.
        np.take(images, members, axis=0, out=staged.numpy(), mode="clip")
        if not self._is_gpu:
            return staged
        if self._copied is None:
            self._stream, self._copied = torch.cuda.Stream(self._device), torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            copy = staged.to(self._device, non_blocking=True)
            self._copied.record(self._stream)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(self._copied)
        copy.record_stream(computing)
        return copy


def _packed(images: Tensor) -> Tensor:
    """uint8 ``[n, C, H, W]`` as int32 ``[n, H * W]``: channel 0 in the lowest byte."""
    words = torch.zeros_like(images[:, 0], dtype=torch.int32)
    for channel in range(images.shape[1]):
        words |= images[:, channel].to(torch.int32) << (8 * channel)
    return words.flatten(1)
