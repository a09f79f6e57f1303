"""The gate on mode="auto": what it measures, and what it objects to."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from els.bench import honesty
from els.bench.honesty import NOISE, Cell, cells
from els.bench.workloads import load_images
from els.index import PatchDatabase

GOOD = Cell(
    "ELS", "zeros", 0.2, 5, 0.005, 0.006, kept=1.0, worst=0.9, exact=0.0, seconds=1, exact_seconds=2
)


@pytest.mark.parametrize(
    ("change", "objection"),
    [
        ({}, None),
        ({"kept": 0.9}, "kept in 90%"),
        ({"worst": 1.6}, "exceeded 1.60 times"),
        ({"claim": 0.011}, "claims 2.20 times"),
        ({"claim": 0.003}, "claims 0.60 times"),
        ({"error": 0.0, "claim": 0.0, "exact": 1.0}, None),
    ],
)
def test_objections(change: dict[str, float], objection: str | None) -> None:
    found = list(replace(GOOD, **change).objections())
    assert len(found) == (objection is not None)
    assert objection is None or found[0].startswith(objection)


def test_cells_of_a_small_database_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(honesty, "NOISE", ((0.2, 3), (0.5, 5)))
    images = np.random.default_rng(1).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    found = list(cells(PatchDatabase.from_arrays(images[2:]), images[:2], 0.01, 2))
    assert [(cell.kind, cell.boundary) for cell in found[::2]] == list(honesty.MACHINES)
    for cell in found:
        assert (cell.exact, cell.error, cell.claim, cell.kept) == (1.0, 0.0, 0.0, 1.0)
        assert not list(cell.objections())


@pytest.mark.slow
@pytest.mark.parametrize("with_index", [False, True], ids=["no-index", "index"])
@pytest.mark.parametrize("source", os.environ.get("ELS_GATE", "embedded:fashion-mnist").split(","))
def test_auto_keeps_its_tolerance_and_knows_its_error(
    source: str, with_index: bool, tmp_path: Path
) -> None:
    """More sources, as of els build, in ELS_GATE, with commas between them."""
    images = load_images(source, 4096)
    db = PatchDatabase.build(images[1:], path=tmp_path / "db")
    for patch_size in sorted({patch_size for _, patch_size in NOISE}) if with_index else ():
        db.build_index(patch_size)
    found = list(cells(db, images[:1], 0.02, 3))
    assert any(cell.exact < 1 for cell in found)
    objections = [f"{cell}: {each}" for cell in found for each in cell.objections()]
    assert not objections, "\n".join(objections)
