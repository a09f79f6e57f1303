"""Score machines: the public denoiser, where every input is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast, final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els.engine.approximate import head
from els.engine.approximate.estimate import Problem, Situation
from els.engine.approximate.heaviest import with_heaviest
from els.engine.approximate.methods import (
    MAX_TOP,
    Lists,
    Method,
    TopK,
    method_named,
    require_integer,
)
from els.engine.backends import Backend, BackendName, choose, require_support
from els.engine.backends.cores import available_cores
from els.engine.backends.statistical import wiener_state
from els.engine.canvas import on_canvas
from els.engine.gradients import Inputs, differentiable, variances
from els.engine.kinds import IS, Boundary, Kind, kind_named, register
from els.engine.query import PosteriorQuery
from els.engine.result import LocalPosterior, Mode, finish
from els.engine.state import PosteriorState, best, moved, stack, take
from els.engine.watching import begin
from els.index import PatchDatabase, PatchIndex
from els.index.statistics import Spectrum, image_spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from els.engine.mesh import ProcessMesh

# Largest number of threads; the native backend starts no more than it has tasks.
_MOST_THREADS = 2**16
# Default of kind="PCA" (arXiv 2509.09672).
_MASK_THRESHOLD = 0.02
# Noise over alpha at which the posterior is the nearest image, but for equally near ones.
_NEAREST_NOISE = 1e-9
# Largest squared distance over 2 sigma^2, so that sums over candidates do not overflow float64.
_LARGEST_LOGIT = 1e280


@final
class ScoreMachine:
    """An analytic denoiser over a patch database (arXiv 2412.20292; docs/theory.md).

    Machines can be copied and pickled; a database on disk is pickled as its path.

    Args:
        db: the training images.
        kind: in any case, as other names are: ``"IS"`` ideal score, ``"ES"`` equivariant, ``"LS"``
            local, ``"ELS"`` equivariant local; the baselines ``"Wiener"``, the best linear
            denoiser, ``"PCA"``, locality by the images' covariance (arXiv 2509.09672), and
            ``"nearest"``, the nearest image; or another that is registered; or its definition, a
            :class:`~els.engine.kinds.Kind`, which is registered.
        boundary: ``"zeros"`` (with ELS: the boundary-broken machine) or ``"circular"``; it does not
            matter to IS and ES.
        backend: ``"native"``, ``"torch"``, ``"triton"``, or ``"auto"``, which chooses (see
            ``backend_reason``); or a :class:`~els.engine.backends.Backend` of one's own.
        threads: threads of the native backend; None for one per core, divided among the mesh's
            processes on this machine. Results do not depend on it.
        device: where the torch and triton backends compute and queries live, e.g. ``"cpu"``,
            ``"cuda:1"``; None for a GPU with ``"triton"`` and ``"auto"`` (if there is one), else
            the CPU.
        mesh: the processes of a distributed run (:func:`~els.engine.mesh.process_mesh`).
            With database shards, every rank of a group asks the same questions in the same order,
            computes over its own images, and gets the answer over all.
        mask_threshold: of ``"PCA"``, 0 to 1 (default 0.02): share of the largest entry of the
            normalised Wiener matrix from which a coordinate matters to another; 0 to weigh it by
            the entry itself.

    Raises:
        TypeError: if ``db`` is not a :class:`PatchDatabase`.
        ValueError: for an unknown kind, boundary or backend, a kind that the backend does not
            compute, threads < 1, or more database shards than images.
        RuntimeError: if the backend asked for cannot run here.
    """

    def __init__(
        self,
        db: PatchDatabase,
        kind: str | Kind = "ELS",
        boundary: Boundary = "zeros",
        backend: BackendName | Backend = "auto",
        *,
        threads: int | None = None,
        device: str | None = None,
        mesh: ProcessMesh | None = None,
        mask_threshold: float | None = None,
    ) -> None:
        if not isinstance(db, PatchDatabase):
            raise TypeError(
                f"db must be a PatchDatabase, got {type(db).__name__}; "
                "open one with PatchDatabase.open(path)"
            )
        self.definition = register(kind) if isinstance(kind, Kind) else kind_named(kind)
        chosen = str(boundary).lower()
        _require_choice("boundary", boundary, chosen, get_args(Boundary))
        if threads is not None:
            require_integer("threads", threads, 1, _MOST_THREADS)
        if mesh is not None and mesh.database_shards > len(db):
            raise ValueError(
                f"database_shards={mesh.database_shards} for {len(db)} images; give at most as many"
            )
        self.mask_threshold = _mask_threshold(self.definition, mask_threshold)
        self.db = db
        self.mesh = mesh
        self.boundary = cast(Boundary, chosen)
        self._everyone = np.arange(len(db), dtype=np.int64)
        self._indices: dict[int, PatchIndex] = {}
        self._spectra: dict[int | None, Spectrum] = {}
        if mesh is not None and threads is None:
            threads = max(1, available_cores() // mesh.processes_here)
        if isinstance(backend, str):
            self._backend, self.backend_reason = choose(
                backend, self.definition, threads=threads, device=device
            )
        else:
            require_support(backend, self.definition)
            self._backend, self.backend_reason = backend, "a backend object"
        if mesh is not None and mesh.database_shards > 1:
            from els.engine.backends.sharded import ShardedBackend

            self._backend = ShardedBackend(self._backend, mesh)

    def __getstate__(self) -> dict[str, object]:
        # Spectra may have gigabytes; a copy reads them from the database again.
        return {**self.__dict__, "_spectra": {}}

    def __repr__(self) -> str:
        side = "x".join(map(str, self.db.shape))
        parts = [self.kind, *([self.boundary] if self.is_local else [])]
        if self.mask_threshold is not None:
            parts.append(f"mask_threshold={self.mask_threshold:g}")
        parts += [f"{len(self.db)} images {side}", self.backend]
        return f"ScoreMachine({', '.join(parts)})"

    @property
    def kind(self) -> str:
        """The name of the kind of machine."""
        return self.definition.name

    @property
    def backend(self) -> str:
        """The backend that computes, e.g. ``native (avx512, 2 threads)``."""
        return self._backend.name

    @property
    def backend_object(self) -> Backend:
        """The backend itself."""
        return self._backend

    @property
    def backend_name(self) -> BackendName:
        """The name that chooses this backend."""
        return cast(BackendName, self.backend.partition(" ")[0])

    @property
    def device(self) -> torch.device:
        """Where queries must live."""
        return self._backend.device

    @property
    def is_local(self) -> bool:
        """Whether the machine compares patches (LS, ELS) and so needs a patch size."""
        return self.definition.is_local

    @property
    def is_indexed(self) -> bool:
        """Whether a patch index holds the machine's candidates (ELS)."""
        return head.serves(self.definition)

    @property
    def estimate_kernel(self) -> str:
        """What estimates are computed with, e.g. ``avx512``: others agree to their error only."""
        return self._backend.estimate_kernel

    def posterior(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | str | Tensor | None = None,
        entropy: bool = True,
        top: int = 0,
        mode: Mode | Method = "exact",
        tolerance: float | None = None,
        k: int = 256,
        subset: int = 1024,
        share: float = 1 / 128,
        seed: int | Sequence[int] = 0,
    ) -> LocalPosterior:
        """Local posterior of every pixel's clean value (docs/theory.md, equations 1 to 3).

        With ``mode="exact"`` autograd can follow the mean, the log evidence and the effective
        patches to x, alpha and sigma, once: a backward pass takes a few times as long as a
        posterior of the torch backend, whatever the machine's own.

        Args:
            x: noisy images ``alpha * x0 + sigma * eps``, any float dtype, ``[B, C, H, W]``, with
                the clean images in [-1, 1]. ELS takes any height and width.
            alpha: signal scale, a number or ``[B]``, >= 0.
            sigma: noise standard deviation, a number or ``[B]``, > 0.
            patch_size: odd side of the patch, 1 to the image's shorter side; needed by LS and ELS,
                ignored by IS and ES.
            labels: only patches of images of this class are candidates: its number or its name, or
                numbers ``[B]``.
            entropy: whether to compute ``effective_patches``.
            top: return the addresses and weights of this many heaviest patches per pixel, 0 to
                4,096: of all images with ``mode="exact"``, of the subset's with ``"subset"``, of
                those that the index finds with the others (and, for border pixels, of their
                subset or of all). Their weights are shares of the estimated sum of all weights.
            mode: what to compute (docs/theory.md). ``"exact"``: everything. ``"topk"``: the k
                nearest patches that the database's index finds, weighed exactly. ``"subset"``: a
                random subset of the images, extrapolated. ``"topk+subset"``: both. ``"lists"``: a
                random part of the index's patches, the nearer the denser, extrapolated.
                ``"auto"``: the cheapest that meets ``tolerance``. Or a method with parameters of
                its own (:mod:`els.engine.approximate.methods`).
            tolerance: of ``"auto"``: mean absolute error of the posterior mean over the pixels of
                an image, > 0.
            k: how many patches the index is asked for per pixel, >= 1.
            subset: how many images are in a subset, >= 32.
            share: of the patches of the index, that a pixel reads of its lists, 0 to 1; 1 for all.
                2^-10 of all lists is the least that is read.
            seed: of what is drawn: of image b of the batch, (seed, b); or one for each image.

        Raises:
            TypeError: for an argument of the wrong type or dtype.
            ValueError: for a wrong shape, a value out of range, not-a-number in ``x``, a mode that
                this machine does not have, or a gradient that is wanted of an approximation.
            DatabaseError: if the mode needs an index that is not there.
        """
        if self._is_canvas(x):
            given = {"entropy": entropy, "top": top, "mode": mode, "tolerance": tolerance}
            given |= {"k": k, "subset": subset, "share": share}
            return self._on_canvas(x, alpha, sigma, patch_size, labels, seed, given)
        query, inputs = self._validated(x, alpha, sigma, patch_size, entropy, top)
        label = self._label_tensor(labels, x.shape[0])
        if self.definition.rule != "posterior":
            self._require_plain(query, inputs, mode)
            return replace(self._baseline(query, label), query=query)
        method = method_named(mode, tolerance=tolerance, k=k, subset=subset, share=share)
        if method.mode != "exact":
            if inputs.want_gradients:
                raise ValueError(
                    f"a gradient is wanted, but mode={method.mode!r} has none: use mode='exact', "
                    "or give x, alpha and sigma detached (torch.no_grad())"
                )
            self._require(method, query)
            estimated = self._estimated(query, label, method, _seeds(seed, x.shape[0]))
            return replace(estimated, query=query)

        def exact(asked: PosteriorQuery) -> LocalPosterior:
            answer = finish(moved(self._state(asked, label), self.device), asked.x.dtype)
            return replace(answer, query=query)

        if not inputs.want_gradients:
            return exact(query)
        return differentiable(exact, self.db.images, query, self._members_of(query, label), inputs)

    def explain(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        pixel: tuple[int, int] | None = None,
        top: int = 7,
        labels: int | str | Tensor | None = None,
        **arguments: Any,
    ) -> Figure:
        """Draw the posterior of one noisy image, and the training patches behind one pixel.

        Args:
            x: one noisy image, ``[1, C, H, W]`` or ``[C, H, W]``; the others as in
                :meth:`posterior`.
            alpha: see there.
            sigma: see there.
            patch_size: see there.
            pixel: row and column of the pixel; None for the middle.
            top: how many of its heaviest training patches to draw, best first, >= 1.
            labels: see there.
            arguments: others of :meth:`posterior`, such as ``tolerance`` with ``mode="auto"``.

        Returns:
            A matplotlib figure, which notebooks show; ``savefig`` writes it.

        Raises:
            TypeError, ValueError: as :meth:`posterior`, for more than one image, and for a pixel
                outside of it.
            RuntimeError: without matplotlib.
        """
        from els.engine.pictures import Patch, explained_figure

        if isinstance(x, Tensor) and x.ndim == 3:
            x = x.unsqueeze(0)
        if not isinstance(x, Tensor) or x.ndim != 4 or len(x) != 1:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be one image [1, C, H, W], got {given}; give x[:1]")
        require_integer("top", top, 1, MAX_TOP)
        height, width = x.shape[2:]
        row, column = (height // 2, width // 2) if pixel is None else pixel
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"pixel={pixel!r} is outside the image of {height} x {width} pixels")
        answer = self.posterior(
            x,
            alpha=alpha,
            sigma=sigma,
            patch_size=patch_size,
            labels=labels,
            **{**arguments, "top": top},
        )
        assert answer.top_weights is not None
        assert answer.top_addresses is not None
        assert answer.query is not None
        weights = answer.top_weights[0, row, column].tolist()
        addresses = answer.top_addresses[0, row, column].tolist()
        return explained_figure(
            answer.query,
            answer.mean[0],
            None if answer.effective_patches is None else answer.effective_patches[0],
            None
            if answer.expected_error is None or answer.error_kinds[0] == "exact"
            else answer.expected_error[0],
            self.db,
            (row, column),
            [
                Patch(weight, *self.db.locate(address))
                for weight, address in zip(weights, addresses, strict=True)
                if address >= 0
            ],
        )

    def score(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | str | Tensor | None = None,
    ) -> Tensor:
        """The score ``(alpha * mean - x) / sigma^2``, ``[B, C, H, W]`` (docs/theory.md, (4)).

        Arguments and errors are those of :meth:`posterior`.
        """
        return score_of(
            self.posterior, x, alpha=alpha, sigma=sigma, patch_size=patch_size, labels=labels
        )

    def epsilon(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | str | Tensor | None = None,
    ) -> Tensor:
        """The noise ``(x - alpha * mean) / sigma``, ``[B, C, H, W]`` (docs/theory.md, (5)).

        Arguments and errors are those of :meth:`posterior`.
        """
        return noise_of(
            self.posterior, x, alpha=alpha, sigma=sigma, patch_size=patch_size, labels=labels
        ).to(x.dtype)

    def divergence(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None = None,
        labels: int | str | Tensor | None = None,
        probes: Tensor | None = None,
    ) -> Tensor:
        """The divergence of the score, ``sum_i d score_i / d x_i``, of each image.

        See docs/theory.md, equation 9; the likelihood of a probability-flow ODE integrates it
        (arXiv 2011.13456, equations 39 and 40). Exact at any size without probes: the Jacobian of
        the mean has ``alpha / sigma^2`` times the posterior variances of the pixels on its
        diagonal. It takes about twice as long as a posterior of the torch backend.

        Args:
            x: see :meth:`posterior`; so are alpha, sigma, patch_size and labels.
            alpha: see there.
            sigma: see there.
            patch_size: see there.
            labels: see there.
            probes: estimate it instead, as the mean of ``v^T (d score / d x) v`` over such v,
                floating, ``[K, B, C, H, W]`` (Hutchinson's estimator; components of mean 0,
                variance 1 and no correlation).

        Returns:
            float64 ``[B]``, on the machine's device.

        Raises:
            TypeError, ValueError: as :meth:`posterior`, and for probes of another shape, or if a
                gradient of the divergence is wanted.
        """
        if self.definition.rule != "posterior":
            raise ValueError(f"kind={self.kind!r} has no divergence: use IS, ES, LS or ELS")
        query, inputs = self._validated(x, alpha, sigma, patch_size, entropy=False, top=0)
        label = self._label_tensor(labels, x.shape[0])
        if inputs.want_gradients:
            raise ValueError(
                "a gradient is wanted, but the divergence has none: give x, alpha and sigma "
                "detached (torch.no_grad())"
            )
        if probes is not None:
            return self._hutchinson(query, labels, probes)
        members = self._members_of(query, label)
        trace = variances(self.db.images, query, members).sum((1, 2, 3))
        signal, noise = (scale.to(trace.device) for scale in (query.alpha, query.sigma))
        return ((signal / noise) ** 2 * trace - x[0].numel()) / noise**2

    def _hutchinson(
        self, query: PosteriorQuery, labels: int | str | Tensor | None, probes: Tensor
    ) -> Tensor:
        shape = tuple(query.x.shape)
        if not isinstance(probes, Tensor) or tuple(probes.shape[1:]) != shape or not len(probes):
            given = tuple(probes.shape) if isinstance(probes, Tensor) else type(probes).__name__
            raise ValueError(f"probes has shape {given}; give [K, B, C, H, W] = [K, {shape}]")
        # Autograd does not follow tensors of inference mode; it follows copies made outside of it.
        with torch.inference_mode(False), torch.enable_grad():
            x = query.x.double().clone().requires_grad_()
            directions = probes.detach().to(x.device, torch.float64).clone()
            alpha, sigma = query.alpha.clone(), query.sigma.clone()
            size = query.patch_size if self.is_local else None
            score = self.score(x, alpha=alpha, sigma=sigma, patch_size=size, labels=labels)
            found = [
                (torch.autograd.grad(score, x, v, retain_graph=True)[0] * v).sum((1, 2, 3))
                for v in directions
            ]
        return torch.stack(found).mean(0)

    def recall(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int,
        k: int,
    ) -> float:
        """Share of the k nearest patches that the database's index finds for one query.

        Args:
            x: noisy image ``[1, C, H, W]``; the others as in :meth:`posterior`.
            alpha: see there.
            sigma: see there.
            patch_size: see there.
            k: how many, >= 1.

        Raises:
            ValueError: as :meth:`posterior`, and for more than one image.
            DatabaseError: if there is no index of this patch size.
        """
        query, _ = self._validated(x, alpha, sigma, patch_size, entropy=False, top=0)
        if len(x) != 1:
            raise ValueError(f"x has {len(x)} images; the recall is of one at a time")
        self._require(TopK(k), query)
        index = self.index(query.patch_size)
        problem = Problem(self._backend, self.db, index, query, self._everyone, (0,))
        return head.recall(problem, k)

    def has_lists(self, patch_size: int, alpha: float, sigma: float) -> bool:
        """Whether ``mode="lists"`` works for a patch size and noise; see :meth:`posterior`."""
        scales = (
            torch.tensor([scale], dtype=torch.float64, device="cpu") for scale in (alpha, sigma)
        )
        index = self.index(patch_size) if self.is_indexed else None
        situation = Situation(self.definition, index, self._backend, *scales)
        return index is not None and Lists().obstacle(situation) is None

    def index(self, patch_size: int) -> PatchIndex | None:
        """The database's index of this patch size, opened once; None if there is none."""
        if patch_size not in self._indices and self.db.has_index(patch_size):
            self._indices[patch_size] = self.db.open_index(patch_size)
        return self._indices.get(patch_size)

    def _require(self, method: Method, query: PosteriorQuery) -> None:
        """Check that an approximation can answer a query.

        Raises:
            ValueError: if the method cannot be used; the message says why.
            DatabaseError: if it needs an index that is not there.
        """
        if isinstance(method, TopK) and query.top > method.k:
            raise ValueError(
                f"top={query.top} is more than the k={method.k} patches that mode='topk' weighs"
            )
        index = self.index(query.patch_size) if self.is_indexed else None
        situation = Situation(self.definition, index, self._backend, query.alpha, query.sigma)
        obstacle = method.obstacle(situation)
        if obstacle is not None:
            raise ValueError(f"mode={method.mode!r} {obstacle}")
        if method.needs_index and index is None:
            self.db.open_index(query.patch_size)  # says what is missing

    def _estimated(
        self,
        query: PosteriorQuery,
        labels: Tensor | None,
        method: Method,
        seeds: list[tuple[int, ...]],
    ) -> LocalPosterior:
        """Those that want all images together, others one by one: none depends on the batch."""
        members = self._members_of(query, labels)
        wants_all = [method.wants_all(query, len(each)) for each in members]
        if all(wants_all):
            return finish(moved(self._state(query, labels), self.device), query.x.dtype)
        begin(sum(map(len, members)))
        index = None
        if self.is_indexed and method.mode != "subset":
            index = self.index(query.patch_size)
        states, uncertainties = [], []
        for b, seed in enumerate(seeds):
            one = _rows(query, [b])
            problem = Problem(self._backend, self.db, index, one, members[b], seed)
            estimate = problem.exact() if wants_all[b] else method.estimate(problem)
            uncertainties.append(estimate.uncertainty)
            state = estimate.state
            states.append(with_heaviest(problem, estimate, query.top) if query.top else state)
        state = stack(states)
        if not query.entropy:
            state = replace(state, logit_sum=None)
        return finish(moved(state, self.device), query.x.dtype, uncertainties)

    @property
    def takes_canvas(self) -> bool:
        """Whether queries may have another size than the training images (ELS)."""
        return self.definition.is_local and self.definition.is_equivariant

    def _is_canvas(self, x: Tensor) -> bool:
        return (
            self.takes_canvas
            and isinstance(x, Tensor)
            and x.ndim == 4
            and x.shape[1] == self.db.shape[0]
            and tuple(x.shape[2:]) != self.db.shape[1:]
            and x.numel() > 0
        )

    def _on_canvas(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None,
        labels: int | str | Tensor | None,
        seed: int | Sequence[int],
        given: dict[str, Any],
    ) -> LocalPosterior:
        """The posterior of images of another size, from windows of the training size."""
        size, batch = self._patch_size(patch_size), len(x)
        if size > min(x.shape[2:]):
            raise ValueError(
                f"patch_size={size} is larger than the shorter side of x, {min(x.shape[2:])}"
            )
        scales = [
            _scalars(name, value, batch, positive=positive)
            for name, value, positive in (("alpha", alpha, False), ("sigma", sigma, True))
        ]
        label, seeds = self._label_tensor(labels, batch), _seeds(seed, batch)
        limit = given["tolerance"]
        if limit is None:
            limit = getattr(given["mode"], "tolerance", None)

        def ask(
            windows: Tensor, rows: Tensor, numbers: Sequence[int], served: Tensor
        ) -> LocalPosterior:
            each = [
                int(np.random.SeedSequence([*seeds[b], number]).generate_state(1, np.uint64)[0])
                for b, number in zip(rows.tolist(), numbers, strict=True)
            ]

            def answered(options: dict[str, Any]) -> LocalPosterior:
                return self.posterior(
                    windows,
                    alpha=scales[0][rows],
                    sigma=scales[1][rows],
                    patch_size=size,
                    labels=None if label is None else label[rows],
                    seed=each,
                    **options,
                )

            found = answered(given)
            if limit is None or found.expected_error is None:
                return found
            # A tolerance limits the mean of a window, of which only these pixels are wanted.
            errors = found.expected_error.double().cpu()
            of_served = (errors * served).sum((1, 2)) / served.sum((1, 2))
            if bool((of_served <= limit).all()):
                return found
            return answered({**given, "mode": "exact", "tolerance": None})

        answer = on_canvas(x, self.db.shape[1:], size, self.boundary, ask)
        query = PosteriorQuery(
            x=x.detach(),
            alpha=scales[0].detach(),
            sigma=scales[1].detach(),
            kind=self.definition,
            boundary=self.boundary,
            patch_size=size,
            entropy=bool(given["entropy"]),
            top=given["top"],
        )
        return replace(answer, query=query)

    def _require_plain(self, query: PosteriorQuery, inputs: Inputs, mode: Mode | Method) -> None:
        """Check that nothing is asked of a baseline but its exact answer.

        Raises:
            ValueError: if something is.
        """
        if inputs.want_gradients:
            raise ValueError(
                f"a gradient is wanted, but kind={self.kind!r} has none here: give x, alpha and "
                "sigma detached (torch.no_grad())"
            )
        name = mode.lower() if isinstance(mode, str) else mode.mode
        if name not in ("exact", "auto"):
            raise ValueError(f"kind={self.kind!r} has mode='exact' only, got mode={mode!r}")
        if query.top and self.definition.rule == "linear":
            raise ValueError(
                f"top={query.top} was asked for, but the Wiener filter weighs no patches"
            )

    def _baseline(self, query: PosteriorQuery, labels: Tensor | None) -> LocalPosterior:
        """The answer of a kind with another rule than the posterior's."""
        rule, shape = self.definition.rule, query.x.shape
        if rule == "nearest":
            # The posterior at next to no noise: equally near images share the weight.
            sigma = torch.where(query.alpha > 0, _NEAREST_NOISE * query.alpha, 1.0)
            state = self._state(replace(query, kind=IS, sigma=sigma), labels)
            return finish(moved(state, self.device), query.x.dtype)
        if rule == "local":
            # Locality is that of all images, whatever the class.
            threshold = self.mask_threshold or 0.0
            query = replace(query, spectrum=self._spectrum(None), mask_threshold=threshold)
            state = self._state(query, labels)
            return _unfolded(finish(moved(state, self.device), query.x.dtype), shape)
        # It weighs no images: every rank of a mesh computes all of it.
        if labels is None:
            state = wiener_state(replace(query, spectrum=self._spectrum(None)))
        else:
            each = [
                wiener_state(replace(_rows(query, [b]), spectrum=self._spectrum(label)))
                for b, label in enumerate(labels.tolist())
            ]
            state = stack(each)
        return finish(moved(state, self.device), query.x.dtype)

    def _spectrum(self, label: int | None) -> Spectrum:
        """Of all images or of a class, computed or read once."""
        if label not in self._spectra:
            self._spectra[label] = image_spectrum(self.db, label)
        return self._spectra[label]

    def _members_of(
        self, query: PosteriorQuery, labels: Tensor | None
    ) -> list[npt.NDArray[np.int64]]:
        """The images whose patches are candidates, for each image of the batch."""
        if labels is None:
            return [self._everyone] * len(query.x)
        return [self.db.class_members(label) for label in labels.tolist()]

    def _state(self, query: PosteriorQuery, labels: Tensor | None) -> PosteriorState:
        """The exact state, on the CPU."""
        # Every class is looked up before any work: an empty one is an error.
        members = self._members_of(query, labels)
        begin(sum(map(len, members)))
        if labels is None:
            return self._backend.states(self.db.images, query, [self._everyone])[0]
        members_of = dict(zip(labels.tolist(), members, strict=True))
        classes = sorted(members_of)
        rows_of = {label: torch.nonzero(labels == label).flatten().tolist() for label in classes}
        states = [
            self._backend.states(self.db.images, _rows(query, rows_of[label]), [members_of[label]])[
                0
            ]
            for label in classes
        ]
        rows = np.concatenate([rows_of[label] for label in classes])
        return take(stack(states), torch.from_numpy(rows.argsort()))

    def _validated(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        patch_size: int | None,
        entropy: bool,
        top: int,
    ) -> tuple[PosteriorQuery, Inputs]:
        """The query, over all images, and what autograd may follow of it."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {given}; decode pixels first")
        shape = self.db.shape
        if x.ndim != 4 or tuple(x.shape[1:]) != shape or x.shape[0] == 0:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but kind={self.kind!r} and this database need "
                f"[B, C, H, W] = [B, {shape[0]}, {shape[1]}, {shape[2]}] with B >= 1"
                + ("" if self.takes_canvas else "; other sizes are for ELS")
            )
        device = self._backend.device
        if x.device != device:
            raise ValueError(f"x is on {x.device}, but {self.backend} computes on {device}; move x")
        # Once for each image: reading x from a GPU waits for the GPU.
        largest = x.detach().abs().amax((1, 2, 3)).double().cpu()
        if not bool(torch.isfinite(largest).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise ValueError(f"x has {bad} values that are not finite; check the previous step")
        inputs = Inputs(
            x,
            _scalars("alpha", alpha, x.shape[0], positive=False),
            _scalars("sigma", sigma, x.shape[0], positive=True),
        )
        require_integer("top", top, 0, MAX_TOP)
        query = PosteriorQuery(
            x=x.detach(),
            alpha=inputs.alpha.detach(),
            sigma=inputs.sigma.detach(),
            kind=self.definition,
            boundary=self.boundary,
            patch_size=self._patch_size(patch_size),
            entropy=bool(entropy),
            top=top,
        )
        _require_range(query, largest)
        inputs.require_no_tangents()
        return query, inputs

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

    def _label_tensor(self, labels: int | str | Tensor | None, batch: int) -> Tensor | None:
        if labels is None:
            return None
        if self.db.labels is None:
            raise ValueError("labels were given, but the database has none; build it with labels")
        labels = self.db.class_numbers(labels)
        try:
            tensor = torch.as_tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"labels must be an int or ints [B], got {labels!r}") from error
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {tensor.dtype}")
        if tensor.ndim not in (0, 1) or (tensor.ndim == 1 and tensor.shape[0] != batch):
            raise ValueError(
                f"labels have shape {tuple(tensor.shape)}; give one int, or [B] = [{batch}]"
            )
        return tensor.to(torch.int64).expand(batch)


def noise_of(
    posterior: Callable[..., LocalPosterior],
    x: Tensor,
    *,
    alpha: float | Tensor,
    sigma: float | Tensor,
    **arguments: Any,
) -> Tensor:
    """The noise that a posterior's mean leaves of x, in float64: they may nearly cancel."""
    wide = x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
    mean = posterior(wide, alpha=alpha, sigma=sigma, entropy=False, **arguments).mean
    return (wide - _per_image(alpha, wide) * mean) / _per_image(sigma, wide)


def score_of(
    posterior: Callable[..., LocalPosterior],
    x: Tensor,
    *,
    sigma: float | Tensor,
    **arguments: Any,
) -> Tensor:
    """The score that follows from a posterior's mean, in the dtype of x."""
    noise = noise_of(posterior, x, sigma=sigma, **arguments)
    return (-noise / _per_image(sigma, noise)).to(x.dtype)


def WienerDenoiser(db: PatchDatabase, **options: Any) -> ScoreMachine:  # noqa: N802
    """The best linear denoiser of a database's images: ``ScoreMachine(db, kind="Wiener")``.

    With the images' mean mu and covariance ``U diag(lam) U^T``, computed once per database,

        mean = mu + U diag(alpha^2 lam / (alpha^2 lam + sigma^2)) U^T (x / alpha - mu).

    Args:
        db: the training images.
        options: others of :class:`ScoreMachine`, such as ``device``.
    """
    return ScoreMachine(db, "Wiener", **options)


def _mask_threshold(kind: Kind, given: float | None) -> float | None:
    """The value for a kind; None for those without.

    Raises:
        ValueError: if it is out of range, or the kind has none.
    """
    if kind.rule != "local":
        if given is not None:
            raise ValueError(f"mask_threshold={given!r} is of kind='PCA', not of {kind.name!r}")
        return None
    value = _MASK_THRESHOLD if given is None else given
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"mask_threshold={given!r} must be a number from 0 to 1, such as 0.02")
    return float(value)


def _unfolded(posterior: LocalPosterior, shape: torch.Size) -> LocalPosterior:
    """Posteriors of every channel, ``[B, 1, C * H, W]``, as those of pixels.

    Log evidence and effective patches are means over channels, and so are the weights of a pixel's
    heaviest images.
    """
    batch, channels, height, width = shape

    def apart(values: Tensor) -> Tensor:
        return values.reshape(batch, channels, height, width, *values.shape[3:])

    def averaged(values: Tensor) -> Tensor:
        return apart(values).mean(1)

    weights, addresses = posterior.top_weights, posterior.top_addresses
    if weights is not None and addresses is not None and channels > 1:
        weights, addresses = _joined(apart(weights), apart(addresses))
    effective = posterior.effective_patches
    return replace(
        posterior,
        mean=posterior.mean.reshape(shape),
        log_evidence=averaged(posterior.log_evidence),
        effective_patches=None if effective is None else averaged(effective),
        top_weights=weights,
        top_addresses=addresses,
        omitted_mass=averaged(posterior.omitted_mass),
        mean_error=averaged(posterior.mean_error),
        expected_error=torch.zeros_like(averaged(posterior.omitted_mass)),
    )


def _joined(weights: Tensor, addresses: Tensor) -> tuple[Tensor, Tensor]:
    """The heaviest of all channels' heaviest candidates, by their mean weight.

    Args:
        weights: ``[B, C, H, W, k]``; a candidate that a channel does not name weighs nothing there.
        addresses: -1 for none.

    Returns:
        Both as ``[B, H, W, k]``.
    """
    channels, count = weights.shape[1], weights.shape[-1]
    every = addresses.movedim(1, -2).flatten(-2)
    mass = weights.movedim(1, -2).flatten(-2) / channels
    order = every.argsort(dim=-1, stable=True)
    every, mass = every.gather(-1, order), mass.gather(-1, order)
    # A candidate is named by each channel once at most: its neighbours within so many places.
    total = mass.clone()
    for step in range(1, channels):
        same = every[..., step:] == every[..., :-step]
        total[..., :-step] += torch.where(same, mass[..., step:], 0)
    is_first = torch.ones_like(every, dtype=torch.bool)
    is_first[..., 1:] = every[..., 1:] != every[..., :-1]
    found = best(torch.where(is_first & (every >= 0), total, -torch.inf), every, count)
    is_there = torch.isfinite(found.logits)
    return (
        torch.where(is_there, found.logits, 0.0),
        torch.where(is_there, found.addresses, -1),
    )


def _require_choice(argument: str, value: object, chosen: str, choices: tuple[str, ...]) -> None:
    """Check that what a value means, in lower case, is one of some choices."""
    if chosen not in choices:
        raise ValueError(f"{argument}={value!r} is not known; choose one of {', '.join(choices)}")


def _seeds(seed: int | Sequence[int], batch: int) -> list[tuple[int, ...]]:
    """The seed of each image of a batch."""
    given = [seed] if isinstance(seed, int) else list(seed)
    if any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in given):
        raise ValueError(f"seed={seed!r} must be an integer >= 0, or one for each image")
    if isinstance(seed, int):
        return [(seed, b) for b in range(batch)]
    if len(given) != batch:
        raise ValueError(f"seed has {len(given)} numbers; give one, or [B] = [{batch}]")
    return [(s,) for s in given]


def _scalars(argument: str, value: float | Tensor, batch: int, *, positive: bool) -> Tensor:
    """A number or ``[B]`` as float64 ``[B]`` on the CPU."""
    tensor = _as_float64(argument, value)
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
    # With the dtype: torch makes a float32 of a Python float.
    if isinstance(value, Tensor | np.ndarray | np.generic | int | float):
        tensor = torch.as_tensor(value, device="cpu")
        if not tensor.is_complex():
            return torch.as_tensor(value, dtype=torch.float64, device="cpu")
    raise TypeError(f"{argument} must be a real number or a tensor [B], got {value!r}")


def _per_image(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or ``[B]``, shaped to multiply ``[B, C, H, W]``."""
    scale = torch.as_tensor(value, dtype=torch.float64, device=x.device)
    return scale.to(x.dtype).reshape(-1, 1, 1, 1)


def _require_range(query: PosteriorQuery, largest: Tensor) -> None:
    """Check that float64 holds the logits of a query.

    Args:
        query: what is asked.
        largest: absolute value in each noisy image, float64 ``[B]`` on the CPU.
    """
    ratios = (largest + query.alpha) / query.sigma
    logits = query.x[0].numel() * ratios.square() / 2
    if bool((logits > _LARGEST_LOGIT).any()):
        worst = int(ratios.argmax())
        raise ValueError(
            f"sigma={float(query.sigma[worst]):g} is too small for x, whose values go up to "
            f"{float(largest[worst]):g}: squared distances over sigma^2 would exceed "
            f"{_LARGEST_LOGIT:g}; check the previous step, or give more noise"
        )


def _rows(query: PosteriorQuery, rows: Sequence[int]) -> PosteriorQuery:
    """The query for some images of the batch."""
    return replace(query, x=query.x[rows], alpha=query.alpha[rows], sigma=query.sigma[rows])
