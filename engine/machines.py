"""Score machines: who the candidates of a pixel are, and the one place where input is checked."""

from __future__ import annotations

from dataclasses import replace
from typing import cast, final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.backends import BackendName, choose
from els.engine.posterior import (
    Boundary,
    Kind,
    LocalPosterior,
    PosteriorQuery,
    PosteriorState,
    finish,
    stack,
    take,
)
from els.index import PatchDatabase

MAX_TOP = 4096


@final
class ScoreMachine:
    """An analytic denoiser over a patch database (arXiv 2412.20292; design, section 1).

    Args:
        db: the training images.
        kind: ``"IS"`` ideal score, ``"ES"`` equivariant, ``"LS"`` local or ``"ELS"`` equivariant
            local.
        boundary: ``"zeros"`` (with ELS: the boundary-broken machine) or ``"circular"``; it does not
            matter to IS and ES.
        backend: ``"native"``, ``"torch"``, ``"triton"``, or ``"auto"``, which chooses (see
            ``backend_reason``).
        threads: threads of the native backend; None for one per core. Results do not depend on it.
        device: where the torch and triton backends compute and queries live, e.g. ``"cpu"``,
            ``"cuda:1"``; None for a GPU with ``"triton"`` and ``"auto"`` (if there is one), else
            the CPU.

    Raises:
        TypeError: if ``db`` is not a :class:`PatchDatabase`.
        ValueError: for an unknown kind, boundary or backend, or threads < 1.
        RuntimeError: if the backend asked for cannot run here.
    """

    def __init__(
        self,
        db: PatchDatabase,
        kind: Kind = "ELS",
        boundary: Boundary = "zeros",
        backend: BackendName = "auto",
        *,
        threads: int | None = None,
        device: str | None = None,
    ) -> None:
        if not isinstance(db, PatchDatabase):
            raise TypeError(
                f"db must be a PatchDatabase, got {type(db).__name__}; "
                "open one with PatchDatabase.open(path)"
            )
        _require_choice("kind", kind, get_args(Kind))
        _require_choice("boundary", boundary, get_args(Boundary))
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"threads={threads!r} must be an integer of at least 1, or None")
        self.db = db
        self.kind: Kind = kind
        self.boundary: Boundary = boundary
        self._backend, self.backend_reason = choose(backend, threads=threads, device=device)

    @property
    def backend(self) -> str:
        """The backend that computes, e.g. ``native (avx512, 2 threads)``."""
        return self._backend.name

    @property
    def backend_name(self) -> BackendName:
        """What would choose this backend by name."""
        return cast(BackendName, self.backend.partition(" ")[0])

    @property
    def device(self) -> torch.device:
        """Where queries must live."""
        return self._backend.device

    @property
    def is_local(self) -> bool:
        """Whether the machine compares patches (LS, ELS) and so needs a patch size."""
        return self.kind in ("LS", "ELS")

    def posterior(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | Tensor | None = None,
        entropy: bool = True,
        top: int = 0,
    ) -> LocalPosterior:
        """Local posterior of every pixel's clean value (design, section 1).

        Args:
            x: noisy images ``alpha * x0 + sigma * eps``, any float dtype, ``[B, C, H, W]``, with
                the clean images in [-1, 1]. The native backend computes distances in float32.
            alpha: signal scale, a number or ``[B]``, >= 0.
            sigma: noise standard deviation, a number or ``[B]``, > 0.
            patch_size: odd side of the patch, 1 to the image's shorter side; needed by LS and ELS,
                ignored by IS and ES.
            labels: only patches of images with this label are candidates: an int, or ints ``[B]``.
            entropy: whether to compute ``effective_patches``.
            top: return the addresses and weights of this many heaviest patches per pixel.

        Raises:
            TypeError: for an argument of the wrong type or dtype.
            ValueError: for a wrong shape, a value out of range, or not-a-number in ``x``.
        """
        query = self._validated(x, alpha, sigma, patch_size, entropy, top)
        return finish(self._state(query, self._label_tensor(labels, x.shape[0])), x.dtype)

    def score(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | Tensor | None = None,
    ) -> Tensor:
        """The score ``(alpha * mean - x) / sigma^2``, ``[B, C, H, W]``; see :meth:`posterior`."""
        return -self.epsilon(
            x, alpha=alpha, sigma=sigma, patch_size=patch_size, labels=labels
        ) / _per_image(sigma, x)

    def epsilon(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | Tensor | None = None,
    ) -> Tensor:
        """The predicted noise ``(x - alpha * mean) / sigma``, ``[B, C, H, W]``."""
        mean = self.posterior(
            x, alpha=alpha, sigma=sigma, patch_size=patch_size, labels=labels, entropy=False
        ).mean
        return (x - _per_image(alpha, x) * mean) / _per_image(sigma, x)

    def _state(self, query: PosteriorQuery, labels: Tensor | None) -> PosteriorState:
        images = self.db.images
        if labels is None:
            members = np.arange(len(self.db), dtype=np.int64)
            return self._backend.state(images, replace(query, members=members))
        classes = sorted(set(labels.tolist()))
        # Every class is looked up before any work: an empty one must not cost the others' time.
        members_of = {label: self.db.class_members(label) for label in classes}
        if len(classes) == 1:
            return self._backend.state(images, replace(query, members=members_of[classes[0]]))
        rows_of = {label: torch.nonzero(labels == label).flatten() for label in classes}
        states = [
            self._backend.state(images, _rows(query, rows_of[label], members_of[label]))
            for label in classes
        ]
        order = torch.cat([rows_of[label] for label in classes]).argsort()
        return take(stack(states), order)

    def _validated(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None,
        entropy: bool,
        top: int,
    ) -> PosteriorQuery:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {given}; decode pixels first")
        shape = self.db.shape
        if x.ndim != 4 or tuple(x.shape[1:]) != shape or x.shape[0] == 0:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but this database needs [B, C, H, W] = "
                f"[B, {shape[0]}, {shape[1]}, {shape[2]}] with B >= 1"
            )
        device = self._backend.device
        if x.device.type != device.type:
            raise ValueError(f"x is on {x.device}, but {self.backend} computes on {device}; move x")
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise ValueError(f"x has {bad} values that are not finite; check the previous step")
        return PosteriorQuery(
            x=x.detach(),
            alpha=_scalars("alpha", alpha, x.shape[0], positive=False),
            sigma=_scalars("sigma", sigma, x.shape[0], positive=True),
            kind=self.kind,
            boundary=self.boundary,
            patch_size=self._patch_size(patch_size),
            members=np.empty(0, dtype=np.int64),
            entropy=bool(entropy),
            top=_count("top", top, MAX_TOP),
        )

    def _patch_size(self, patch_size: int | None) -> int:
        if not self.is_local:
            return 1
        side = min(self.db.shape[1:])
        if patch_size is None:
            raise ValueError(f"{self.kind} compares patches: give patch_size, odd, 1 to {side}")
        if isinstance(patch_size, bool) or not isinstance(patch_size, int | np.integer):
            raise TypeError(f"patch_size must be an int, got {type(patch_size).__name__}")
        if patch_size % 2 == 0:
            raise ValueError(
                f"patch_size={patch_size} is even; a patch has a centre pixel: use odd"
            )
        if not 1 <= patch_size <= side:
            raise ValueError(
                f"patch_size={patch_size} is out of range 1 to {side}, the image's shorter side"
            )
        return int(patch_size)

    def _label_tensor(self, labels: int | Tensor | None, batch: int) -> Tensor | None:
        if labels is None:
            return None
        if self.db.labels is None:
            raise ValueError("labels were given, but the database has none; build it with labels")
        try:
            tensor = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"labels must be an int or ints [B], got {labels!r}") from error
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {tensor.dtype}")
        if tensor.ndim not in (0, 1) or (tensor.ndim == 1 and tensor.shape[0] != batch):
            raise ValueError(
                f"labels have shape {tuple(tensor.shape)}; give one int, or [B] = [{batch}]"
            )
        return tensor.cpu().to(torch.int64).expand(batch)


def _require_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument}={value!r} is not known; choose one of {', '.join(choices)}")


def _count(argument: str, value: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{argument}={value!r} must be an integer from 0 to {most}")
    return value


def _scalars(argument: str, value: float | Tensor, batch: int, *, positive: bool) -> Tensor:
    """A number or ``[B]`` as float64 ``[B]`` on the CPU."""
    tensor = _as_float64(argument, value).detach().cpu()
    if tensor.ndim > 1 or (tensor.ndim == 1 and tensor.shape[0] != batch):
        raise ValueError(
            f"{argument} has shape {tuple(tensor.shape)}; give a number or [B] = [{batch}]"
        )
    allowed = tensor > 0 if positive else tensor >= 0
    if not bool((allowed & torch.isfinite(tensor)).all()):
        bound = "> 0" if positive else ">= 0"
        raise ValueError(f"{argument}={tensor.tolist()} must be finite and {bound}")
    return tensor.expand(batch).contiguous()


def _as_float64(argument: str, value: float | Tensor) -> Tensor:
    # Asked for at once: torch would take a Python float as a float32.
    if isinstance(value, Tensor | np.ndarray | np.generic | int | float):
        tensor = torch.as_tensor(value)
        if not tensor.is_complex():
            return torch.as_tensor(value, dtype=torch.float64)
    raise TypeError(f"{argument} must be a real number or a tensor [B], got {value!r}")


def _per_image(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or ``[B]``, shaped to multiply ``[B, C, H, W]``."""
    return torch.as_tensor(value, dtype=torch.float64).to(x.device, x.dtype).reshape(-1, 1, 1, 1)


def _rows(query: PosteriorQuery, rows: Tensor, members: npt.NDArray[np.int64]) -> PosteriorQuery:
    """The same question for some images of the batch."""
    return replace(
        query,
        x=query.x[rows.to(query.x.device)],
        alpha=query.alpha[rows],
        sigma=query.sigma[rows],
        members=members,
    )
