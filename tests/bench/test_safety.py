"""The safety factor is the one that was measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from els.bench.safety import Row, factor_of, rows
from els.engine.approximate.costs import SAFETY
from els.index import PatchDatabase

RESULT = Path(__file__).parents[2] / "bench" / "results" / "safety.json"


def test_the_factor_is_that_of_the_result() -> None:
    result = json.loads(RESULT.read_text())
    found = [Row(**row) for row in result["rows"]]
    assert len({row.source for row in found}) >= 4
    assert {row.method.split()[0] for row in found} == {"subset", "lists"}
    assert pytest.approx(result["factor"]) == factor_of(found) == SAFETY


def test_a_factor_covers_nearly_all_rows() -> None:
    def row(ratio: float) -> Row:
        return Row("a", "ELS", "zeros", 0.1, 3, "subset 256", ratio, 1.0)

    assert factor_of([row(ratio) for ratio in np.linspace(0.5, 1.5, 101)]) == pytest.approx(1.4)
    assert factor_of([row(0.2)] * 5) == 1


def test_rows_compare_errors_with_claims() -> None:
    images = np.random.default_rng(0).integers(0, 256, (603, 1, 16, 16), dtype=np.uint8)
    found = list(rows(PatchDatabase.from_arrays(images[3:]), images[:1], "random", 2))
    assert {row.method for row in found} == {"subset 256"}
    assert len({(row.kind, row.boundary) for row in found}) == 3
    assert all(0.2 < row.ratio < 5 for row in found)
