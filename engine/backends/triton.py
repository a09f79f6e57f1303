"""The triton backend: posteriors on a GPU, of images that stay in its memory or stream to it."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends.backend import Costs, Images, Members
from els.engine.backends.cores import available_cores
from els.engine.backends.device_images import DeviceImages
from els.engine.backends.image_machines import image_state
from els.engine.backends.native import LIST_COSTS
from els.engine.backends.native_lists import ListSampling
from els.engine.kinds import Kind
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, TopPatches, best, empty, moved, summed, where
from els.engine.watching import counted

if TYPE_CHECKING:
    from els.triton_kernels.attention import Attention
    from els.triton_kernels.configurations import Configurations
    from els.triton_kernels.pixel_groups import PixelGroups
    from els.triton_kernels.queries import Rows
    from els.triton_kernels.sliding import Sliding
    from els.triton_kernels.truncated import Totals

# How scores are computed: by matrix products, of windows of a row that slide or of whole patches,
# these in as many float16 parts as true noise needs or always in three; or by squared differences
# in float64.
_Method: TypeAlias = Literal["sliding", "products", "fine products", "differences"]

_LN2 = math.log(2.0)
# Bytes of the bank of a block of images, near what the second-level caches of GPUs hold; fixed, so
# that results do not depend on where images lie.
_BANK_BYTES = 64 << 20
# Float16 parts of a row, at most.
_MOST_PARTS = 3
# So many candidates tell how far the heaviest ones are.
_CENTRED_KEYS = 1 << 16
# Bytes of the rows of a batch while they are made, and for each coordinate of a row.
_ROW_BYTES = 1 << 30
_BYTES_PER_COORDINATE = 64
# The oldest Triton that the kernels are tested with.
_OLDEST_TRITON = (3, 6)
# The oldest NVIDIA architecture (compute capability) that Triton compiles for.
_OLDEST_CAPABILITY = (8, 0)
# Root-mean-square errors by which a threshold is raised before float64 ranks what is below it.
_SAFETY = 8.0
# Float64 distances that were summed in different orders are equal if they agree to this.
_EQUAL = 1e-13
# Logit of an empty place among the nearest: finite, below every other.
_FAR = -1e300
# Number of machines whose groups of pixels stay on the device.
_GROUPS_KEPT = 16
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
        configurations: of the kernels' launches; None for the shipped ones.

    Raises:
        RuntimeError: if Triton is not installed or too old, or the device is not there, too old,
            or cannot be used by Triton.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        resident_bytes: int | None = None,
        configurations: Configurations | None = None,
    ) -> None:
        try:
            import triton
        except ImportError as error:
            raise RuntimeError(
                "backend='triton' needs Triton, which is not installed: pip install "
                "'els-machine[gpu]', or use backend='native'"
            ) from error
        _require_version(triton.__version__)
        from els.triton_kernels.configurations import SHIPPED

        interpreted = bool(triton.knobs.runtime.interpret)
        self.device = torch.device(device or ("cpu" if interpreted else "cuda"))
        if interpreted and self.device.type != "cpu":
            raise RuntimeError(
                f"with TRITON_INTERPRET=1 kernels run on the CPU, not on {self.device}; unset "
                "it, or use device='cpu'"
            )
        self._on_device: Callable[[], AbstractContextManager[object]] = nullcontext
        self._shared = sys.maxsize
        if not interpreted:
            self.device, self._shared = _usable(self.device)
            # Triton launches on the current device, which in a new thread is the first one.
            self._on_device = partial(torch.cuda.device, self.device)
        where = "interpreted" if interpreted else torch.cuda.get_device_name(self.device)
        self.name = f"triton ({where})"
        self.threads = available_cores()
        # Buffers and streams are not copied; a copy makes its own.
        self._made = partial(
            TritonBackend, device, resident_bytes=resident_bytes, configurations=configurations
        )
        self._configurations = configurations or SHIPPED
        self._images = DeviceImages(self.device, resident_bytes)

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
        with self._on_device():
            if query.kind.is_local:
                return self._local_states(images, query, groups)
            return [moved(image_state(images, query, members), "cpu") for members in groups]

    def weigh(
        self, images: Images, query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """See :class:`els.engine.backends.backend.Backend`."""
        pixels = query.x[0, 0].numel()
        with self._on_device():
            flat = addresses.to(self.device).reshape(len(addresses), pixels, -1)
            # Only the images of the addresses are uploaded.
            numbers, which = torch.unique(flat.clamp(min=0) // pixels, return_inverse=True)
            local = torch.where(flat < 0, -1, which * pixels + flat % pixels)
            totals, logits = _truncated(
                self._images.some(images, numbers.cpu().numpy()), query, local
            )
            shape = query.x[:, 0].shape
            state = PosteriorState(
                torch.where(totals.mass > 0, _LN2 * totals.reference, -torch.inf).reshape(shape),
                totals.mass.reshape(shape),
                (totals.centre / 127.5 - totals.mass.unsqueeze(1)).reshape(query.x.shape),
                (_LN2 * totals.logit_sum).reshape(shape),
            )
            return moved(state, "cpu"), (_LN2 * logits).reshape(addresses.shape).cpu()

    def _local_states(
        self, images: Images, query: PosteriorQuery, groups: Sequence[Members]
    ) -> list[PosteriorState]:
        """The states of a machine that compares patches, on the CPU."""
        from els.triton_kernels.queries import MOST_ERROR

        wanted = np.ones(query.x[:, 0].shape, dtype=np.bool_)
        if query.pixels is not None:
            wanted &= query.pixels
        states = [moved(empty(replace(query, top=0)), "cpu") for _ in groups]
        unsure = [wanted if len(members) else np.zeros_like(wanted) for members in groups]
        for method in self._methods(query):
            left = [i for i, pixels in enumerate(unsure) if pixels.any()]
            if not left:
                break
            some = [groups[i] for i in left]
            together = np.logical_or.reduce([unsure[i] for i in left])
            found = self._attended(images, query, some, together, method)
            for i, (state, errors) in zip(left, found, strict=True):
                states[i] = where(torch.from_numpy(unsure[i]), state, states[i])
                unsure[i] = unsure[i] & ~(errors.numpy() <= MOST_ERROR)
        if query.top:
            for i, members in enumerate(groups):
                top = self._top(images, query, members, wanted)
                # Both compute the heaviest logit; where it is large, their roundings differ by more
                # than weights may.
                states[i] = replace(states[i], reference=top.logits[..., 0], top=top)
        return states

    def _methods(self, query: PosteriorQuery) -> list[_Method]:
        """How states are computed: each serves the pixels that the one before knows too roughly."""
        if self._slides(query):
            return ["sliding", "fine products", "differences"]
        if all(parts == _MOST_PARTS for _, parts in self._batches(query, "products")):
            return ["products", "differences"]
        return ["products", "fine products", "differences"]

    @staticmethod
    def _slides(query: PosteriorQuery) -> bool:
        """Whether sums over rows of patches slide: long square patches that stand anywhere."""
        from els.triton_kernels.pixel_groups import Layout

        row = query.x.shape[1] * query.patch_size
        is_long = Layout.of(row * query.patch_size).segments > 1 and Layout.of(row).segments == 1
        return is_long and query.kind.is_equivariant and query.kind.window is None

    def _attended(
        self,
        images: Images,
        query: PosteriorQuery,
        groups: Sequence[Members],
        wanted: npt.NDArray[np.bool_],
        method: _Method,
    ) -> list[tuple[PosteriorState, Tensor]]:
        """States of the wanted pixels, and errors of their logits to base 2, on the CPU.

        Args:
            images: the whole database.
            query: what to compute.
            groups: ascending image numbers, at least one each.
            wanted: pixels, ``[B, H, W]``; of others nothing is known.
            method: how.
        """
        everything = np.sort(np.concatenate(groups))
        block_images = self._block_images(query, max(map(len, groups)), method)
        shape = (len(groups), 4 + query.x.shape[1], len(query.x), query.x[0, 0].numel())
        fields = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        for batch, parts in self._batches(query, method):
            part = _images_of(query, batch)
            attentions = [
                self._centred(each, images, everything, block_images)
                for each in self._attentions(
                    part, wanted[batch], parts, block_images, method, detailed=query.entropy
                )
            ]
            on_device = fields.new_full(
                (*shape[:2], len(batch), shape[3]), torch.nan, device=self.device
            )
            for i, members in enumerate(groups):
                fresh = [each.fresh() for each in attentions]
                for block in counted(
                    self._images.blocks(images, members, block_images), len(batch)
                ):
                    for attention in fresh:
                        attention.add(block, entropy=query.entropy)
                for attention in fresh:
                    rows, found = _merged(attention)
                    on_device[i][:, rows.images, rows.pixels] = found
            # The only time that a step waits for the device.
            fields[:, :, batch] = on_device.cpu()
        return [
            (
                PosteriorState(
                    reference,
                    mass,
                    torch.stack(centre, dim=1),
                    logit_sum if query.entropy else None,
                ),
                errors,
            )
            for reference, mass, errors, logit_sum, *centre in fields.reshape(
                *shape[:3], *query.x.shape[2:]
            )
        ]

    def _centred(
        self,
        attention: Attention | Sliding,
        images: Images,
        members: Members,
        block_images: int,
    ) -> Attention | Sliding:
        """With rows whose scores are near zero for the heaviest candidates of some members.

        So that they round less; rows of several sums gain nothing, and few members do not pay.
        """
        from els.triton_kernels.attention import Attention

        if not isinstance(attention, Attention) or not attention.rows.is_one_sum:
            return attention
        some = min(-(-_CENTRED_KEYS // attention.groups.candidates.shape[1]), block_images)
        if some >= len(members):
            return attention
        seen = attention.fresh()
        seen.add(self._images.block(images, members[:some]), entropy=True)
        rows, (reference, mass, _, logit_sum, *_) = _merged(seen)
        centre = (reference + logit_sum / mass) / _LN2
        return replace(attention, rows=rows.centred(centre, attention.groups.query_layout))

    def _attentions(
        self,
        query: PosteriorQuery,
        wanted: npt.NDArray[np.bool_],
        parts: int,
        block_images: int,
        method: _Method,
        *,
        detailed: bool,
    ) -> Iterator[Attention | Sliding]:
        """The rows of the wanted pixels, for each shape of groups that has some.

        Args:
            query: of some images.
            wanted: pixels of them, ``[B, H, W]``.
            parts: of a row, see :func:`els.triton_kernels.queries.rows_of`.
            block_images: images of the largest block.
            method: how states are computed.
            detailed: whether the entropy or the heaviest candidates are wanted.
        """
        from els.triton_kernels.attention import Attention
        from els.triton_kernels.queries import rows_of

        x = query.x.to(torch.float64)
        alpha, sigma = query.alpha.to(self.device), query.sigma.to(self.device)
        for groups, pixels in self._groups(query):
            is_wanted = np.moveaxis(wanted.reshape(len(x), -1)[:, pixels], 1, 0)
            is_wanted = is_wanted.reshape(len(pixels), -1)
            most = int(is_wanted.sum(1).max())
            if not most:
                continue
            # Pixels near an edge are in sets of several groups, one for each distance from it.
            if method == "sliding" and len(groups.queries) == 1:
                yield self._sliding(query, parts, block_images, detailed=detailed)
                continue
            configuration = self._configurations.chosen(
                most,
                block_images * groups.candidates.shape[1],
                columns=groups.layout.columns,
                parts=parts,
                detailed=detailed,
                shared=self._shared,
            )
            # Groups with fewer take others beside; after the last one, it is repeated.
            order = np.argsort(~is_wanted, axis=1, kind="stable")
            count = configuration.padded_rows(most)
            which = order.take(np.minimum(np.arange(count), order.shape[1] - 1), axis=1)
            rows = rows_of(
                x,
                alpha,
                sigma,
                groups,
                torch.from_numpy(which).to(self.device),
                parts,
            )
            yield Attention.of(groups, rows, x.shape[1], block_images, configuration)

    def _sliding(
        self, query: PosteriorQuery, parts: int, block_images: int, *, detailed: bool
    ) -> Sliding:
        """The rows of all pixels whose patches may be anywhere."""
        from els.triton_kernels.queries import rows_of
        from els.triton_kernels.sliding import Sliding

        groups, chosen = self._row_groups(query), self._configurations
        configuration = chosen.sliding_detailed if detailed else chosen.sliding
        batch, channels, height, _ = query.x.shape
        count = batch * groups.queries.shape[1]
        radius = query.patch_size // 2
        return Sliding.of(
            groups,
            rows_of(
                query.x.to(torch.float64),
                query.alpha.to(self.device),
                query.sigma.to(self.device),
                groups,
                torch.arange(count, device=self.device).repeat(height, 1),
                parts,
                are_added=True,
            ),
            radius=radius,
            first=0 if query.boundary == "circular" else radius,
            batch=batch,
            channels=channels,
            block_images=block_images,
            configuration=configuration.fitting(groups.layout.columns, parts, self._shared),
        )

    def _batches(
        self, query: PosteriorQuery, method: _Method
    ) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
        """Images of a batch that are computed together, and the parts of their rows."""
        from els.triton_kernels.queries import parts_needed

        coordinates = int(query.kind.mask(query.patch_size).sum()) * query.x.shape[1]
        at_once = max(
            1, _ROW_BYTES // (_BYTES_PER_COORDINATE * coordinates * query.x[0, 0].numel())
        )
        parts = parts_needed(coordinates, query.alpha, query.sigma).numpy()
        if method == "fine products":
            parts[:] = _MOST_PARTS
        elif method == "differences":
            parts[:] = 0
        for each in np.unique(parts).tolist():
            batch = np.flatnonzero(parts == each)
            for first in range(0, len(batch), at_once):
                yield batch[first : first + at_once], each

    def _top(
        self,
        images: Images,
        query: PosteriorQuery,
        members: Members,
        wanted: npt.NDArray[np.bool_],
    ) -> TopPatches:
        """The heaviest candidates, for as many queries at a time as memory allows."""
        if len(members) == 0:
            nothing = moved(empty(query), "cpu").top
            assert nothing is not None
            return nothing
        batch, height, width = wanted.shape
        most = max(groups.candidates.shape[1] for groups, _ in self._groups(query))
        room = max(_LEAST_ROOM, _ROOM * query.top, 2 * most)
        at_once = max(1, _SELECTION_BYTES // (32 * room * height * width))
        parts = [
            self._top_of(
                images,
                _images_of(query, np.arange(first, min(first + at_once, batch))),
                members,
                wanted[first : first + at_once],
                room,
            )
            for first in range(0, batch, at_once)
        ]
        shape = (batch, height, width, query.top)
        return TopPatches(
            torch.cat([part.logits for part in parts]).reshape(shape),
            torch.cat([part.addresses for part in parts]).reshape(shape),
        )

    def _top_of(
        self,
        images: Images,
        query: PosteriorQuery,
        members: Members,
        wanted: npt.NDArray[np.bool_],
        room: int,
    ) -> TopPatches:
        """Stream blocks that double, and keep the nearest.

        What is above a row's threshold in float32 scores, less their error, is ranked in float64.
        """
        batch, pixels = len(wanted), wanted[0].size
        numbers = torch.tensor(members, device=self.device)
        block_images = self._block_images(query, len(members), "products")

        def attentions(parts: int) -> list[Attention]:
            found = self._attentions(query, wanted, parts, block_images, "products", detailed=True)
            return cast("list[Attention]", list(found))

        chosen = attentions(2)
        if not all(each.rows.are_held for each in chosen):
            chosen = attentions(0)
        nearest = TopPatches(
            query.x.new_full((batch, pixels, query.top), -torch.inf, dtype=torch.float64),
            numbers.new_full((batch, pixels, query.top), -1),
        )
        start = 0
        size = max(1, room // max(each.groups.candidates.shape[1] for each in chosen))
        while start < len(members):
            stop = min(start + size, len(members), start + block_images)
            block = self._images.block(images, members[start:stop])
            found = numbers.new_full((batch, pixels, room), -1)
            most = 0
            for each in chosen:
                kth = nearest.logits[each.rows.images, each.rows.pixels, -1].clamp(min=_FAR)
                counts, addresses = each.select(block, _threshold(each.rows, kth), room)
                # Rows after the distinct ones repeat the last, and may have its candidates in
                # another order.
                distinct = batch * each.groups.queries.shape[1]
                place = each.rows.images[:, :distinct], each.rows.pixels[:, :distinct]
                found[place] = addresses[:, :distinct]
                most = max(most, int(counts.max()))
            if most > room:
                # Many equal distances, as of blank patches: float64 distinguishes them from nearer
                # ones, and keeps none that equals an earlier one.
                if chosen[0].rows.parts == 0:
                    size = (stop - start) // 2
                else:
                    chosen = attentions(0)
                continue
            found = found[..., : max(1, most)]
            _, logits = _truncated(block, query, found)
            addresses = numbers[start + found.clamp(min=0) // pixels] * pixels + found % pixels
            addresses = torch.where(found < 0, -1, addresses)
            nearest = best(
                torch.cat([nearest.logits, logits], dim=-1),
                torch.cat([nearest.addresses, addresses], dim=-1),
                query.top,
            )
            start, size = stop, stop
        return TopPatches(_LN2 * nearest.logits.cpu(), nearest.addresses.cpu())

    def _groups(
        self, query: PosteriorQuery
    ) -> tuple[tuple[PixelGroups, npt.NDArray[np.int64]], ...]:
        """Groups of pixels on the device, and the pixels on the CPU."""
        return _device_groups(
            self.device,
            query.kind,
            query.patch_size,
            is_circular=query.boundary == "circular",
            shape=tuple(query.x.shape[1:]),
        )

    def _row_groups(self, query: PosteriorQuery) -> PixelGroups:
        """Windows of single rows, on the device."""
        return _device_row_groups(
            self.device,
            query.patch_size,
            is_circular=query.boundary == "circular",
            shape=tuple(query.x.shape[1:]),
        )

    def _block_images(self, query: PosteriorQuery, most: int, method: _Method) -> int:
        """How many images a block has: as many as its bank has room for, and at most that many."""
        from els.triton_kernels.bank import key_bytes

        banks = [
            key_bytes(groups)
            for groups, _ in self._groups(query)
            if method != "sliding" or len(groups.queries) > 1
        ]
        if method == "sliding":
            banks.append(key_bytes(self._row_groups(query)))
        return min(most, max(1, _BANK_BYTES // max(banks)))


@lru_cache(_GROUPS_KEPT)
def _device_groups(
    device: torch.device,
    kind: Kind,
    patch_size: int,
    *,
    is_circular: bool,
    shape: tuple[int, int, int],
) -> tuple[tuple[PixelGroups, npt.NDArray[np.int64]], ...]:
    """The groups of a machine's pixels, on a device, and those pixels on the CPU."""
    from els.triton_kernels.pixel_groups import pixel_groups

    channels, height, width = shape
    groups = pixel_groups(
        height,
        width,
        channels,
        kind.mask(patch_size),
        equivariant=kind.is_equivariant,
        circular=is_circular,
    )
    return tuple((each.to(device), each.queries.numpy()) for each in groups)


@lru_cache(_GROUPS_KEPT)
def _device_row_groups(
    device: torch.device, patch_size: int, *, is_circular: bool, shape: tuple[int, int, int]
) -> PixelGroups:
    """Windows of the single rows of a machine's pixels, on a device."""
    from els.triton_kernels.pixel_groups import row_groups

    channels, height, width = shape
    return row_groups(height, width, channels, patch_size, circular=is_circular).to(device)


def _images_of(query: PosteriorQuery, batch: npt.NDArray[np.int64]) -> PosteriorQuery:
    """The query of some images of the batch."""
    if len(batch) == len(query.x):
        return query
    which = torch.from_numpy(batch)
    x = query.x[which.to(query.x.device)]
    return replace(query, x=x, alpha=query.alpha[which], sigma=query.sigma[which])


def _merged(attention: Attention | Sliding) -> tuple[Rows, Tensor]:
    """All rows, and their reference, mass, error to base 2, logit_sum and centre.

    The latter are ``[4 + C, G, M]``.
    """
    rows = attention.rows
    scores, *centre, mass, logit_sum = attention.states
    is_known = mass > 0
    state = summed(
        PosteriorState(
            torch.where(is_known, _LN2 * rows.logits(scores), -torch.inf),
            mass,
            # Values are bytes less 128.
            torch.stack(centre, dim=1) / 127.5 + (128 / 127.5 - 1) * mass.unsqueeze(1),
            _LN2 * logit_sum,
        )
    )
    assert state.logit_sum is not None
    errors = rows.errors(scores.amax(0))
    found = torch.stack([state.reference[0], state.mass[0], errors, state.logit_sum[0]])
    return rows, torch.cat([found, state.centre[0]])


def _threshold(rows: Rows, kth: Tensor) -> Tensor:
    """Scores above which a candidate may be among the nearest.

    Args:
        rows: of the queries.
        kth: logits of the k-th nearest until now, to base 2, ``[G, M]``.
    """
    if rows.parts == 0:
        return kth - _EQUAL * kth
    scores = rows.scores(kth)
    return scores - _SAFETY * rows.errors(scores) / rows.slopes


def _truncated(block: Tensor, query: PosteriorQuery, addresses: Tensor) -> tuple[Totals, Tensor]:
    """States and logits to base 2 of candidates of a block, ``[B, H * W, k]``."""
    from els.triton_kernels.truncated import truncated

    return truncated(
        block,
        query.x.to(torch.float64),
        query.alpha.to(block.device),
        query.sigma.to(block.device),
        addresses,
        patch_size=query.patch_size if query.kind.is_local else None,
        circular=query.boundary == "circular",
    )


def _require_version(version: str) -> None:
    """Whether an installed Triton is new enough.

    Raises:
        RuntimeError: if not.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < _OLDEST_TRITON:
        needed = ".".join(map(str, _OLDEST_TRITON))
        raise RuntimeError(
            f"backend='triton' needs Triton {needed} or later, but {version} is installed: "
            f"pip install 'triton>={needed}', or use backend='torch'"
        )


def _usable(device: torch.device) -> tuple[torch.device, int]:
    """A device that the kernels run on, with its index, and a program's shared memory in bytes.

    Args:
        device: as it was asked for.

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
    if not torch.version.hip and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
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
            properties = driver.active.utils.get_device_properties(device.index)
    except Exception as error:
        raise RuntimeError(
            f"backend='triton' cannot run on {device}, since Triton cannot talk to its driver "
            f"({error}); it needs a C compiler and the driver's library: install them, or use "
            f"backend='torch' with device='{device}'"
        ) from error
    return device, int(properties["max_shared_mem"])
