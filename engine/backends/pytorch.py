"""The torch backend: exact, every kind of machine, on any device with float64.

Everything is float64 whatever the query's dtype: at sigma = 1e-3 the rounding of a float32 distance
can exceed the differences of logits, and float32 would be only 1.3 to 1.7 times faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from itertools import product
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from els.engine.backends.backend import Costs, Images, Members
from els.engine.backends.image_blocks import blocks, merged_in_order
from els.engine.backends.image_machines import image_state
from els.engine.backends.native import LIST_COSTS
from els.engine.backends.native_lists import ListSampling
from els.engine.kinds import Kind
from els.engine.query import PosteriorQuery
from els.engine.state import PosteriorState, best, empty, merge, merge_into, moved, state_of
from els.engine.watching import counted

# Temporary memory of one block of training images, in bytes.
_BLOCK_BYTES = 32 << 20


@final
class TorchBackend(ListSampling):
    """Exact posteriors in chunked torch.

    Args:
        device: where queries live and states are returned, e.g. ``"cpu"``, ``"cuda"``.

    Raises:
        RuntimeError: if the device is not there, or lacks float64.
    """

    def __init__(self, device: str = "cpu") -> None:
        try:
            self.device = torch.empty(0, dtype=torch.float64, device=device).device
        except (AssertionError, RuntimeError, TypeError) as error:
            raise RuntimeError(
                f"device={device!r} cannot compute in float64 here ({error}); use device='cpu'"
            ) from error
        self.name = f"torch ({self.device})"
        self.threads = torch.get_num_threads()

    def supports(self, kind: Kind) -> bool:
        """See :class:`els.engine.backends.backend.Backend`."""
        return True

    def costs(self, query: PosteriorQuery) -> Costs:
        """See :class:`els.engine.backends.backend.Backend`."""
        return LIST_COSTS if self.device.type == "cpu" else Costs()

    @torch.no_grad()
    def states(
        self, images: Images, query: PosteriorQuery, groups: Sequence[Members]
    ) -> list[PosteriorState]:
        """See :class:`els.engine.backends.backend.Backend`."""
        state = local_state if query.kind.is_local else image_state
        return [moved(state(images, query, members), "cpu") for members in groups]

    @torch.no_grad()
    def weigh(
        self, images: Images, query: PosteriorQuery, addresses: Tensor
    ) -> tuple[PosteriorState, Tensor]:
        """See :class:`els.engine.backends.backend.Backend`."""
        addresses = addresses.to(self.device)
        parts = [
            _weighed(images, query, addresses, image, row)
            for image in range(len(addresses))
            for row in range(addresses.shape[1])
        ]
        logits, centres = (torch.stack(part).cpu() for part in zip(*parts, strict=True))
        logits = logits.reshape(addresses.shape)
        return state_of(logits, centres.reshape(*addresses.shape, -1)), logits


class _Alignment(NamedTuple):
    """A run of query coordinates of one axis, and the training coordinates ``shift`` further."""

    start: int
    shift: int
    length: int

    def queries(self) -> slice:
        return slice(self.start, self.start + self.length)

    def candidates(self) -> slice:
        return slice(self.start + self.shift, self.start + self.shift + self.length)

    def widened(self, patch_size: int) -> _Alignment:
        """The coordinates of padded images that the patches of this run read."""
        return self._replace(length=self.length + patch_size - 1)


def _alignments(query: PosteriorQuery, length: int) -> list[_Alignment]:
    """Each pair of a query coordinate and one of its candidates, exactly once."""
    same = _Alignment(0, 0, length)
    if not query.kind.is_equivariant:
        return [same]
    radius = query.patch_size // 2
    inside = length - 2 * radius
    if query.boundary == "zeros":
        # Only coordinates whose patch is inside match others than themselves.
        return [same] + [
            _Alignment(radius + max(0, -shift), shift, inside - abs(shift))
            for shift in range(1 - inside, inside)
            if shift != 0
        ]
    alignments = []
    for shift in range(radius + 1 - length, length - radius):
        start = max(0, radius - shift)
        alignments.append(_Alignment(start, shift, min(length, length - radius - shift) - start))
    return alignments


def local_state(images: Images, query: PosteriorQuery, members: Members) -> PosteriorState:
    """The state of a machine that compares patches, on the query's device."""
    if len(members) == 0:
        return empty(query)
    _, channels, height, width = query.x.shape
    radius = query.patch_size // 2
    planes = 4 * channels + 6 + (8 if query.top else 0)
    count = _BLOCK_BYTES // (8 * planes * (height + 2 * radius) * (width + 2 * radius))
    block_state = partial(_members_state, images, query)
    some = counted(blocks(members, count), len(query.x))
    return merged_in_order(block_state, some, merge, query.x.device)


def _members_state(
    images: Images, query: PosteriorQuery, members: Members
) -> Iterator[PosteriorState]:
    """The same over a block of members, with one more alignment each time."""
    total = empty(query)
    batch, mask = len(query.x), query.kind.mask(query.patch_size)
    x = padded(query.x.to(torch.float64), query)
    numbers = torch.tensor(members, device=x.device)
    clean = torch.from_numpy(images[members]).to(x.device, torch.float64) / 127.5 - 1
    for image in range(batch):
        training = padded(query.alpha[image].item() * clean, query)
        precision = query.sigma[image].item() ** -2
        for rows, columns in aligned(query):
            distances = patch_distances(x[image], training, rows, columns, mask)
            part = _block_state(query, -0.5 * precision * distances, clean, numbers, rows, columns)
            merge_into(total, part, slice(image, image + 1), rows.queries(), columns.queries())
            yield total


def _weighed(
    images: Images,
    query: PosteriorQuery,
    addresses: Tensor,
    image: int,
    row: int,
) -> tuple[Tensor, Tensor]:
    """Logits ``[W, k]`` and centres ``[W, k, C]`` of the candidates of one row of pixels."""
    _, _, height, width = query.x.shape
    x = padded(query.x[image : image + 1].to(torch.float64), query)[0]
    here = addresses[image, row]
    numbers = here.clamp(min=0) // (height * width)
    distinct, which = torch.unique(numbers, return_inverse=True)
    clean = torch.from_numpy(images[distinct.cpu().numpy()]).to(x.device, torch.float64)
    clean = clean / 127.5 - 1
    training = padded(query.alpha[image].to(x.device) * clean, query)
    place = here.clamp(min=0) % (height * width)
    y, v = place // width, place % width
    columns = torch.arange(width, device=x.device)
    distance = torch.zeros(here.shape, dtype=torch.float64, device=x.device)
    for down, right in np.argwhere(query.kind.mask(query.patch_size)).tolist():
        noisy = x[:, row + down, columns + right].T.unsqueeze(1)
        distance += (noisy - training[which, :, y + down, v + right]).square().sum(-1)
    logits = distance / (-2 * query.sigma[image].to(x.device) ** 2)
    return torch.where(here < 0, -torch.inf, logits), clean[which, :, y, v]


def padded(images: Tensor, query: PosteriorQuery) -> Tensor:
    """Images ``[n, C, H, W]`` with what patches read beyond the border, P // 2 on every side."""
    mode = "constant" if query.boundary == "zeros" else "circular"
    return pad(images, (query.patch_size // 2,) * 4, mode)


def aligned(query: PosteriorQuery) -> Iterator[tuple[_Alignment, _Alignment]]:
    """Each run of pairs of rows, with each run of pairs of columns."""
    rows, columns = (_alignments(query, length) for length in query.x.shape[2:])
    if not query.border_only:
        yield from product(rows, columns)
        return
    radius = query.patch_size // 2

    def ends(length: int) -> list[_Alignment]:
        return [_Alignment(start, 0, radius) for start in (0, length - radius) if radius]

    # Where one axis slides, pixels are at the border if the other is at one of its ends.
    height, width = query.x.shape[2:]
    yield rows[0], columns[0]
    yield from product(ends(height), columns[1:])
    yield from product(rows[1:], ends(width))


def patch_distances(
    x: Tensor,
    training: Tensor,
    rows: _Alignment,
    columns: _Alignment,
    mask: npt.NDArray[np.bool_],
) -> Tensor:
    """Squared distances of aligned patches, ``[n, rows.length, columns.length]``.

    Args:
        x: a noisy image, padded by the patch's radius, ``[C, H + 2 r, W + 2 r]``.
        training: training images times alpha, padded likewise, ``[n, C, H + 2 r, W + 2 r]``.
        rows: how the rows are aligned.
        columns: how the columns are aligned.
        mask: which pixels of a patch are compared, ``[P, P]``.
    """
    down, right = rows.widened(len(mask)), columns.widened(len(mask))
    differences = (
        x[:, down.queries(), right.queries()]
        - training[:, :, down.candidates(), right.candidates()]
    )
    squares = reduce(torch.add, differences.square_().unbind(1))
    return patch_sums(squares, mask)


def patch_sums(values: Tensor, mask: npt.NDArray[np.bool_]) -> Tensor:
    """Sums over the masked places of every window, ``[..., h, w]`` to ``[..., h-P+1, w-P+1]``.

    Every window is summed in the same order, so that equal windows tie exactly.
    """
    size = len(mask)
    if mask.all():
        return _window_sums(_window_sums(values, size, -1), size, -2)
    height, width = (length - size + 1 for length in values.shape[-2:])
    shifted = (values[..., y : y + height, x : x + width] for y, x in np.argwhere(mask).tolist())
    return reduce(torch.add, shifted)


def _window_sums(values: Tensor, size: int, dim: int) -> Tensor:
    """Sums of ``size`` neighbours by doubling: log2(size) additions, and no subtraction."""
    length = values.shape[dim] - size + 1
    parts = []
    offset, width = 0, 1
    while width <= size:
        if size & width:
            parts.append(values.narrow(dim, offset, length))
            offset += width
        if 2 * width <= size:
            shorter = values.shape[dim] - width
            values = values.narrow(dim, 0, shorter) + values.narrow(dim, width, shorter)
        width *= 2
    return reduce(torch.add, parts)


def _block_state(
    query: PosteriorQuery,
    logits: Tensor,
    clean: Tensor,
    numbers: Tensor,
    rows: _Alignment,
    columns: _Alignment,
) -> PosteriorState:
    """The state of logits ``[n, h, w]`` of one alignment."""
    reference = logits.amax(0)
    shifted = logits - reference
    weights = shifted.exp()
    centres = clean[:, :, rows.candidates(), columns.candidates()]
    top = None
    if query.top:
        height, width = clean.shape[2:]
        y = torch.arange(height, device=clean.device)[rows.candidates()].unsqueeze(-1)
        x = torch.arange(width, device=clean.device)[columns.candidates()]
        addresses = (numbers.reshape(-1, 1, 1) * height + y) * width + x
        top = best(
            logits.movedim(0, -1).unsqueeze(0), addresses.movedim(0, -1).unsqueeze(0), query.top
        )
    return PosteriorState(
        reference=reference.unsqueeze(0),
        mass=weights.sum(0, keepdim=True),
        centre=(weights.unsqueeze(1) * centres).sum(0, keepdim=True),
        logit_sum=(weights * shifted).sum(0, keepdim=True) if query.entropy else None,
        top=top,
    )
