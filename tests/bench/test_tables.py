"""What the benchmarks count and report."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from els.bench import index_growth
from els.bench.tables.__main__ import app
from els.bench.tables.indices import power_law
from els.index import PatchDatabase


def test_a_power_law_is_found() -> None:
    x = [1.0, 4.0, 16.0, 60.0]
    scale, exponent, ratios = power_law(x, [3 * value**0.5 for value in x])
    assert (scale, exponent) == (pytest.approx(3), pytest.approx(0.5))
    assert ratios == pytest.approx([1] * 4)
    # Least squares in logarithms: what is left has the geometric mean 1 and no slope.
    _, _, ratios = power_law(x, [2.0, 3.0, 11.0, 17.0])
    left = np.log(ratios)
    assert left.sum() == pytest.approx(0, abs=1e-12)
    assert left @ np.log(x) == pytest.approx(0, abs=1e-12)
    assert np.abs(left).max() > 0.1


def raw(name: str, processor: str, dirty: bool = False) -> dict[str, object]:
    stats = {"rounds": 1, "q1": 1.0, "median": 2.0, "q3": 3.0}
    case = {"name": f"{name}[x]", "params": None, "extra_info": {}, "stats": stats}
    return {
        "machine_info": {
            "cpu": {"brand_raw": processor, "count": 2},
            "python_version": "3.11",
        },
        "commit_info": {"id": name, "dirty": dirty},
        "datetime": "2026-11-25T00:00",
        "benchmarks": [case],
    }


def test_several_runs_make_one_result(tmp_path: Path) -> None:
    first, second, other = (tmp_path / f"{name}.json" for name in ("first", "second", "other"))
    first.write_text(json.dumps(raw("first", "A", dirty=True)))
    second.write_text(json.dumps(raw("second", "A")))
    other.write_text(json.dumps(raw("other", "B")))
    output = tmp_path / "results" / "out.json"
    done = CliRunner().invoke(app, ["record", str(first), str(second), str(output)])
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert [case["test"] for case in result["cases"]] == ["first", "second"]
    assert (result["commit"], result["dirty"]) == ("second", True)
    done = CliRunner().invoke(app, ["record", str(first), str(other), str(output)])
    assert done.exit_code != 0
    assert "different processors" in done.output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_build_and_a_search_cost(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 12, 12), dtype=np.uint8)
    db = PatchDatabase.build(images, path=tmp_path / "db")
    done = CliRunner().invoke(index_growth.app, ["build", str(db.path), "3"])
    assert done.exit_code == 0, done.output
    built = json.loads(done.stdout)
    index = db.open_index(3)
    assert (built["patches"], built["lists"], built["factory"]) == (3000, 0, "Flat")
    assert built["disk"] == index.size_bytes
    # The trained index, one shard and the result, before the first two are removed.
    assert 2 * index.size_bytes <= built["peak_disk"] < 3 * index.size_bytes
    assert set(built["seconds"]) == {"training", "adding", "merging", "writing"}
    assert all(seconds > 0 for seconds in built["seconds"].values())
    questions, answers = tmp_path / "questions.npz", tmp_path / "answers.npz"
    patches = images[:5, :, 2:5, 4:7].astype(np.float32) / 127.5 - 1
    np.savez(questions, own=patches)
    arguments = ["search", str(db.path), "3", str(questions), str(answers)]
    done = CliRunner().invoke(index_growth.app, arguments)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["searches"]
    assert [row["effort"] for row in rows] == list(index_growth.EFFORTS)
    assert all(row["seconds"] > 0 for row in rows)
    with np.load(answers) as file:
        own = file["own 32 addresses"][:, 0]
    np.testing.assert_array_equal(own, [(n * 12 + 3) * 12 + 5 for n in range(5)])
