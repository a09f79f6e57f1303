"""Pixels and labels in memory: the uint8 convention, and checks of arguments."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class ArrayData(Protocol):
    """The part that numpy arrays and torch tensors have in common; torch is not imported here."""

    @property
    def dtype(self) -> Any:
        """Type of an element."""

    @property
    def shape(self) -> Any:
        """Lengths of the axes."""

    def __array__(self) -> Any: ...


def decode(images: ArrayData) -> NDArray[np.float32]:
    """Turns stored pixels into real values: ``v / 127.5 - 1``.

    Args:
        images: uint8 array or tensor of any shape.

    Returns:
        float32 array of the same shape, values in [-1, 1].

    Raises:
        TypeError: the dtype is not uint8.
    """
    array = _numpy(images)
    if array.dtype != np.uint8:
        raise TypeError(f"decode takes uint8 pixels, got {array.dtype}; encode() makes them")
    return array.astype(np.float32) / np.float32(127.5) - np.float32(1)


def encode(values: ArrayData) -> NDArray[np.uint8]:
    """Turns real values into stored pixels: the nearest ``(v + 1) * 127.5``, clipped to 0..255.

    Args:
        values: floating array or tensor of any shape, nominally in [-1, 1].

    Returns:
        uint8 array of the same shape; ``encode(decode(x))`` is x.

    Raises:
        TypeError: the dtype is not floating.
        ValueError: a value is NaN.
    """
    array = _numpy(values)
    if array.dtype.kind != "f":
        raise TypeError(
            f"encode takes floating values in [-1, 1], got {array.dtype}; "
            "uint8 pixels need no encoding"
        )
    levels = np.rint((array.astype(np.float64) + 1.0) * 127.5)
    if np.isnan(levels).any():
        raise ValueError(
            "encode got NaN, expected values in [-1, 1]; look where the NaN comes from"
        )
    return np.clip(levels, 0, 255).astype(np.uint8)


def check_images(images: object) -> NDArray[np.uint8]:
    """Checks an array of training images.

    Args:
        images: uint8 [N, C, H, W] or [N, H, W], numpy or torch, N >= 1, C in 1..4.

    Returns:
        The same pixels as a numpy array [N, C, H, W]; a view where that is possible.

    Raises:
        TypeError: not an array, or not uint8.
        ValueError: a shape that is not one of the two above.
    """
    dtype, shape = getattr(images, "dtype", None), getattr(images, "shape", None)
    if dtype is None or shape is None:
        raise TypeError(
            "images must be a uint8 numpy array or torch tensor [N, C, H, W] or [N, H, W], "
            f"got {type(images).__name__}; files are opened with open_source(path)"
        )
    # By name, because numpy has no bfloat16 to convert a tensor to.
    if str(dtype).removeprefix("torch.") != "uint8":
        raise TypeError(
            f"images must be uint8, got {dtype}; values in [-1, 1] become uint8 by "
            "els.index.encode(images), values in 0..255 by images.astype('uint8')"
        )
    shape = tuple(int(length) for length in shape)
    if len(shape) not in (3, 4):
        raise ValueError(
            f"images must be [N, C, H, W] or [N, H, W], got shape {shape}; reshape them"
        )
    if 0 in shape:
        raise ValueError(f"images must hold at least one image of one pixel, got shape {shape}")
    if len(shape) == 4 and not 1 <= shape[1] <= 4:
        hint = (
            "these look like [N, H, W, C]: pass images.transpose(0, 3, 1, 2)"
            if 1 <= shape[3] <= 4
            else "drop or merge channels first"
        )
        raise ValueError(f"images [N, C, H, W] must have C in 1..4, got shape {shape}; {hint}")
    array: NDArray[np.uint8] = _numpy(images)
    return array if array.ndim == 4 else array[:, None]


def check_labels(labels: object, count: int) -> NDArray[np.int64]:
    """Checks class labels: one integer of at least 0 for each of `count` images.

    Args:
        labels: integers [count]: a numpy array, torch tensor or sequence.
        count: the number of images.

    Returns:
        int64 [count], contiguous, a copy.

    Raises:
        TypeError: not integers.
        ValueError: wrong shape or length, or a label out of range.
    """
    array = _numpy(labels)
    if array.shape != (count,):
        raise ValueError(
            f"labels must be [{count}], one for each image, got shape {array.shape}; "
            "check that images and labels come from the same split"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {array.dtype}; number the classes from 0")
    for place in (int(array.argmin()), int(array.argmax())):
        if not 0 <= int(array[place]) < 2**63 - 1:
            raise ValueError(
                f"labels must be in 0..2**63-2, got {array[place]} for image {place}; number the "
                "classes from 0, or leave out labels for images without any"
            )
    return array.astype(np.int64)


def check_class_names(
    names: Sequence[str] | None, labels: NDArray[np.int64] | None
) -> tuple[str, ...] | None:
    """Checks that `names` are distinct strings, one for every label that occurs.

    Args:
        names: name of class 0, 1, ...; None for no names.
        labels: checked labels (`check_labels`), or None.

    Returns:
        The names as a tuple, or None.

    Raises:
        TypeError: not a sequence of strings.
        ValueError: names without labels, too few names, or a name twice.
    """
    if names is None:
        return None
    sequence = isinstance(names, Sequence | np.ndarray) and not isinstance(names, str)
    if not sequence or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names must be a sequence of strings, got {names!r}")
    # numpy strings are str, but JSON does not restore them.
    names = tuple(str(name) for name in names)
    if labels is None:
        raise ValueError(f"got {len(names)} class_names but no labels; pass labels as well")
    needed = int(labels.max()) + 1
    if len(names) < needed:
        raise ValueError(
            f"class_names must name every class 0..{needed - 1}, got {len(names)} names; "
            f"give {needed}, in the order of the labels"
        )
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"class_names must be distinct, got {name!r} {times} times")
    return names


def _numpy(data: Any) -> NDArray[Any]:
    if hasattr(data, "detach"):
        data = data.detach().cpu().numpy()
    return np.asarray(data)
