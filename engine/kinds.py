"""Kinds of score machine: which patches are the candidates of a pixel (docs/theory.md).

A kind is two choices: whether whole images or patches are compared, and whether a candidate must
stand at the pixel's own place or may stand anywhere. The four kinds of arXiv 2412.20292 are
registered here, and the baselines that they are compared with; others are added by
:func:`register`, from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Boundary: TypeAlias = Literal["zeros", "circular"]
Rule: TypeAlias = Literal["posterior", "nearest", "linear", "local"]
Window: TypeAlias = Callable[[int], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Kind:
    """The definition of a score machine.

    Attributes:
        name: by which machines, runs and the command line call it.
        is_local: whether patches around a pixel are compared, which need a patch size; else whole
            images are.
        is_equivariant: whether candidates stand at any place, else only at the pixel's own. Patches
            that reach over the border are candidates of pixels with the same place relative to it.
        window: which pixels of a local machine's patch are compared: a function, importable by
            name, from the odd patch size P to a bool array ``[P, P]`` with at least one True. None
            for all of them, which every backend computes; other windows need the torch backend.
        rule: how whole images at their own place are weighed. ``posterior``: by their distance.
            ``nearest``: the nearest alone. ``linear``: not at all, but by their covariance (the
            Wiener filter). ``local``: for each coordinate by a distance of its own, which follows
            from the covariance (locality by PCA, arXiv 2509.09672).
    """

    name: str
    is_local: bool
    is_equivariant: bool
    window: Window | None = None
    rule: Rule = "posterior"

    def mask(self, patch_size: int) -> npt.NDArray[np.bool_]:
        """Which pixels of a patch are compared, bool ``[P, P]``.

        Raises:
            ValueError: if the kind's window is not such an array.
        """
        square = (patch_size, patch_size)
        if self.window is None:
            return np.ones(square, dtype=np.bool_)
        mask = np.asarray(self.window(patch_size))
        if mask.dtype != np.bool_ or mask.shape != square or not mask.any():
            raise ValueError(
                f"window({patch_size}) of kind {self.name!r} must be a bool array {square} with a "
                f"True, got {mask.dtype} {mask.shape}"
            )
        return mask


_REGISTERED: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Make a kind known by its name, so that machines and stored runs find it.

    A program that goes on with a stored run registers the run's kind first.

    Returns:
        The kind.

    Raises:
        ValueError: if another kind has the name, or a kind that compares images has a window.
    """
    if _REGISTERED.get(kind.name, kind) != kind:
        raise ValueError(f"another kind is registered as {kind.name!r}; choose another name")
    if kind.rule != "posterior" and (kind.is_local or kind.is_equivariant):
        raise ValueError(
            f"kind {kind.name!r} has rule={kind.rule!r}, which is of whole images at their own "
            "place: leave out is_local and is_equivariant"
        )
    if kind.window is not None:
        if not kind.is_local:
            raise ValueError(f"kind {kind.name!r} compares whole images: leave out its window")
        kind.mask(3)
    return _REGISTERED.setdefault(kind.name, kind)


def kind_named(name: str) -> Kind:
    """The registered kind of that name, in any case where that is not ambiguous.

    Raises:
        ValueError: if there is none; the message lists those that there are.
    """
    alike = [kind for kind in _REGISTERED.values() if kind.name.lower() == str(name).lower()]
    if name in _REGISTERED:
        return _REGISTERED[name]
    if len(alike) != 1:
        raise ValueError(
            f"kind={name!r} is not known; choose one of {', '.join(_REGISTERED)}, or register "
            "a kind of that name first (els.engine.kinds.register)"
        )
    return alike[0]


IS = register(Kind("IS", is_local=False, is_equivariant=False))
ES = register(Kind("ES", is_local=False, is_equivariant=True))
LS = register(Kind("LS", is_local=True, is_equivariant=False))
ELS = register(Kind("ELS", is_local=True, is_equivariant=True))
PCA = register(Kind("PCA", is_local=False, is_equivariant=False, rule="local"))
WIENER = register(Kind("Wiener", is_local=False, is_equivariant=False, rule="linear"))
NEAREST = register(Kind("nearest", is_local=False, is_equivariant=False, rule="nearest"))
