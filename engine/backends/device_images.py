"""Training images on a GPU: all of them if they fit, else block by block through pinned memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from els.engine.backends.backend import Images, Members

# Bytes of packed images that are uploaded at a time where all of them stay on the device.
_UPLOAD_BYTES = 64 << 20
# Share of the GPU's free memory that images may stay in.
_RESIDENT_SHARE = 0.6


class DeviceImages:
    """Packed training images, int32 ``[n, H * W]``, on a device: whole, or a block at a time.

    Args:
        device: where.
        resident_bytes: bytes that they may take; None for most of what is free when they are
            first needed.
    """

    def __init__(self, device: torch.device, resident_bytes: int | None) -> None:
        self._device = device
        self._resident_bytes = resident_bytes
        self._known: weakref.ref[Images] | None = None
        self._resident: Tensor | None = None
        self._staging = [_Staging(device), _Staging(device)]

    def blocks(self, images: Images, members: Members, count: int) -> Iterator[Tensor]:
        """The members' images in their order, so many at a time.

        The next block is uploaded when the caller comes back for it: its kernels are in the
        device's queue by then, so that copying and computing overlap.
        """
        for first in range(0, len(members), count):
            yield self.block(images, members[first : first + count])

    def block(self, images: Images, members: Members) -> Tensor:
        """The images of some members."""
        resident = self._resident_images(images)
        if resident is None:
            return self._uploaded(images, members)
        first, last = int(members[0]), int(members[-1])
        if last - first + 1 == len(members):
            return resident[first : last + 1]
        return resident[torch.tensor(members, device=self._device)]

    def some(self, images: Images, members: Members) -> Tensor:
        """The images of some members, of which an upload holds only so many."""
        return torch.cat(list(self.blocks(images, members, self._upload(images))))

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
                for first in range(0, len(images), self._upload(images)):
                    part = slice(first, first + self._upload(images))
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
        return packed(self._staging[0].upload(images, members))

    def _upload(self, images: Images) -> int:
        """How many images are uploaded at a time."""
        return max(1, _UPLOAD_BYTES // self._bytes_each(images))

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


def packed(images: Tensor) -> Tensor:
    """uint8 ``[n, C, H, W]`` as int32 ``[n, H * W]``: channel 0 in the lowest byte."""
    words = torch.zeros_like(images[:, 0], dtype=torch.int32)
    for channel in range(images.shape[1]):
        words |= images[:, channel].to(torch.int32) << (8 * channel)
    return words.flatten(1)
