"""What every rank of ``test_mesh.py`` does; rank 0 writes down what came out."""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from els.engine import ScoreMachine
from els.engine.approximate import auto
from els.engine.backends.native_kernels import is_compiled
from els.engine.mesh import ProcessMesh, process_mesh
from els.index import PatchDatabase
from els.runs.run import sample_run

RNG = np.random.default_rng(21)
# 37 images: neither ranks nor blocks divide them. Class 3 is with one rank only, as are its ties.
IMAGES = RNG.integers(0, 256, (37, 2, 6, 8), dtype=np.uint8)
IMAGES[36] = IMAGES[35]
IMAGES[4] = IMAGES[30]
LABELS = np.where(np.arange(37) >= 35, 3, np.arange(37) % 3)
# Enough images for mode="auto" to take a part of them, once it is told so.
auto.LEAST_PAIRS = 0
MANY = np.random.default_rng(22).integers(0, 256, (1200, 1, 5, 5)).astype(np.uint8)
RUN = {"n": 10, "steps": 3, "patch_sizes": [1, 3, 5], "eta": 0.5, "batch_size": 2, "shard_size": 4}
# The native one last, where it was compiled.
BACKENDS = ("torch", "native") if is_compiled() else ("torch",)
MACHINES = [
    (kind, boundary, backend)
    for kind in ("IS", "ES", "LS", "ELS")
    for boundary in (("zeros", "circular") if kind == "ELS" else ("zeros",))
    for backend in BACKENDS
]


def answers(database: Path, mesh: ProcessMesh | None) -> dict[str, NDArray[np.generic]]:
    """Posteriors of every machine, exact and approximate, by name."""
    found = {}
    x = torch.from_numpy(np.random.default_rng(23).standard_normal((3, 2, 6, 8)))
    db = PatchDatabase.from_arrays(IMAGES, LABELS)
    for kind, boundary, backend in MACHINES:
        machine = ScoreMachine(db, kind, boundary, backend, mesh=mesh)
        for name, labels in (("all", None), ("one rank", 3), ("mixed", torch.tensor([0, 3, 1]))):
            post = machine.posterior(x, alpha=0.8, sigma=0.6, patch_size=3, labels=labels, top=5)
            title = f"{kind} {boundary} {backend} {name}"
            for field in ("mean", "log_evidence", "effective_patches", "top_weights"):
                found[f"{title} {field}"] = getattr(post, field).numpy()
            # Equal images may change places: what is compared is what is there.
            addresses = post.top_addresses.numpy()
            n, y, column = db.locate(addresses.clip(0))
            there = addresses[..., np.newaxis] >= 0
            found[f"{title} top"] = np.where(there, IMAGES[n, :, y, column].astype(int), -1)
    many = ScoreMachine(PatchDatabase.open(database), "ELS", "zeros", BACKENDS[-1], mesh=mesh)
    x = torch.from_numpy(np.random.default_rng(24).standard_normal((2, 1, 5, 5)))
    for mode in ("subset", "topk", "topk+subset", "auto"):
        post = many.posterior(
            x,
            alpha=0.8,
            sigma=0.6,
            patch_size=3,
            mode=mode,
            k=20,
            subset=100,
            tolerance=0.1 if mode == "auto" else None,
        )
        found[f"{mode} mean"] = post.mean.numpy()
        found[f"{mode} error"] = post.mean_error.numpy()
        found[f"{mode} images"] = np.array(post.subset_images)
    return found


def main(folder: Path) -> None:
    with process_mesh(database_shards=2) as mesh:
        found = answers(folder / "db", mesh)
        db = PatchDatabase.from_arrays(IMAGES, LABELS)
        sample_run(ScoreMachine(db, backend=BACKENDS[-1], mesh=mesh), folder / "dealt", **RUN)
        if mesh.rank == 0:
            np.savez(folder / "answers.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
