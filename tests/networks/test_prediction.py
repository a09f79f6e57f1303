"""Calibration and evaluation, on networks whose right answers are known, and their commands."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine_network import MachineNetwork
from typer.testing import CliRunner, Result

from els.cli import app as cli
from els.cli import networks
from els.engine import ScoreMachine, sample
from els.index import PatchDatabase
from els.runs.stores import RunError

pytest.importorskip("safetensors", reason="networks are stored with safetensors")

from els.networks.calibrate import _odd_ticks, calibrate, draw_calibration, read_calibration
from els.networks.denoiser import Network, NetworkDenoiser, open_network
from els.networks.evaluate import Evaluation, _scatter, evaluate
from els.networks.folders import NetworkError, embedded, network_folder
from els.networks.training import TrainingProgress
from els.runs.agreement import Agreement, compared

RNG = np.random.default_rng(8)
IMAGES = RNG.integers(0, 256, (12, 1, 9, 9), dtype=np.uint8)
LABELS = np.arange(12) % 2
DB = PatchDatabase.from_arrays(IMAGES, LABELS)


def denoiser_of(machine: ScoreMachine, sizes, **options) -> NetworkDenoiser:
    num_classes = options.pop("num_classes", 0)
    network = Network.of(MachineNetwork(machine, sizes), num_classes=num_classes)
    return NetworkDenoiser(network, machine.db, device="cpu", **options)


@pytest.mark.parametrize("search", ["neighbours", "all"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(
    ("kind", "boundary"),
    [
        pytest.param("ELS", "zeros", id="bbELS"),
        pytest.param("ELS", "circular", id="ELS"),
        pytest.param("LS", "zeros", id="LS"),
    ],
)
def test_calibration_finds_the_sizes_of_a_machine(tmp_path, kind, boundary, metric, search) -> None:
    machine = ScoreMachine(DB, kind, boundary)
    sizes = (1, 3, 5, 7)
    found = calibrate(
        machine,
        denoiser_of(machine, sizes),
        tmp_path / "sizes.json",
        steps=4,
        seeds=2,
        metric=metric,
        search=search,
    )
    assert found.sizes == sizes
    assert found.per_seed == (sizes, sizes)
    # The network's epsilon is float32, and at t = 1 its mean is that magnified 80 times.
    for closeness in found.agreement:
        for value in closeness:
            assert value == pytest.approx(1.0 if metric == "cosine" else 0.0, abs=1e-4)
    assert read_calibration(tmp_path / "sizes.json") == found


def test_calibration_goes_on_and_refuses_other_settings(tmp_path: Path) -> None:
    machine = ScoreMachine(DB, "LS")
    denoiser = denoiser_of(machine, (3, 3, 5))
    path = tmp_path / "sizes.json"

    def stop(done: int, total: int) -> None:
        assert total == 9
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(machine, denoiser, path, steps=3, seeds=3, progress=stop)
    with pytest.raises(ValueError, match="1 of 3 seeds"):
        read_calibration(path)
    # What is there may be enough.
    fewer = calibrate(machine, denoiser, path, steps=3, seeds=1)
    assert read_calibration(path) == fewer
    counts: list[int] = []
    found = calibrate(
        machine, denoiser, path, steps=3, seeds=3, progress=lambda done, _: counts.append(done)
    )
    assert counts == [4, 5, 6, 7, 8, 9]
    assert found.sizes == (3, 3, 5)
    for changes, words in (
        ({"metric": "l2"}, "metric is cosine there, l2 here"),
        ({"seeds": 2}, "3 seeds, 2 are wanted"),
        ({"sizes": [1, 3]}, "candidates"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(machine, denoiser, path, **{"steps": 3, "seeds": 3, **changes})
    with pytest.raises(ValueError, match="boundary"):
        calibrate(ScoreMachine(DB, "LS", "circular"), denoiser, path, steps=3, seeds=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"sizes": [3, 4]}, "odd", id="even"),
        pytest.param({"sizes": [3, 11]}, "shorter side, 9", id="large"),
        pytest.param({"metric": "angle"}, "cosine", id="metric"),
        pytest.param({"search": "some"}, "neighbours", id="search"),
        pytest.param({"seeds": 0}, "seeds=0", id="seeds"),
    ],
)
def test_what_calibration_refuses(tmp_path, changes, words) -> None:
    machine = ScoreMachine(DB, "LS")
    with pytest.raises(ValueError, match=words):
        calibrate(machine, denoiser_of(machine, (3,)), tmp_path / "sizes.json", **changes)
    assert not (tmp_path / "sizes.json").exists()


def test_whole_image_machines_are_not_calibrated(tmp_path: Path) -> None:
    machine = ScoreMachine(DB, "IS")
    with pytest.raises(ValueError, match="no patch size"):
        calibrate(machine, denoiser_of(machine, (3,)), tmp_path / "sizes.json")


def test_the_figures_of_a_sample() -> None:
    a, b = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
    r = np.corrcoef(a.ravel(), b.ravel())[0, 1]
    got = compared(a, b)
    assert got.r == pytest.approx(r, abs=1e-12)
    assert got.r_squared == pytest.approx(r**2, abs=1e-12)
    residual = np.square(a.astype(np.float64) - b).sum() / (a.size * a.astype(np.float64).var())
    assert got.determination == pytest.approx(1 - residual, abs=1e-12)
    # Neither scale nor offset matters to r; both matter to the determination.
    moved = compared(a, -2 * a + 3)
    assert moved.r == pytest.approx(-1, abs=1e-6)
    assert moved.r_squared == pytest.approx(1, abs=1e-6)
    assert moved.determination < -1
    assert compared(a, a) == Agreement(1.0, 1.0, 1.0, 0.0)
    flat = np.ones_like(a)
    assert compared(flat, a) == Agreement(0.0, 0.0, 0.0, pytest.approx(((flat - a) ** 2).mean()))
    assert compared(flat, flat) == Agreement(0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "kind", "boundary"),
    [
        pytest.param("bbELS", "ELS", "zeros", id="bbELS"),
        pytest.param("ELS", "ELS", "circular", id="ELS"),
        pytest.param("LS", "LS", "circular", id="LS"),
        pytest.param("IS", "IS", "zeros", id="IS"),
    ],
)
def test_a_machine_predicts_itself(tmp_path, name, kind, boundary) -> None:
    machine = ScoreMachine(DB, kind, boundary)
    denoiser = denoiser_of(machine, (3, 3, 5, 5))
    local = ScoreMachine(DB, "LS", "circular")
    calibration = calibrate(
        local, denoiser_of(local, (3, 3, 5, 5)), tmp_path / "sizes.json", steps=4, seeds=1
    )
    evaluation = evaluate(DB, denoiser, calibration, tmp_path / "evaluation", n=2)
    for figure in ("r", "r_squared", "determination"):
        assert evaluation.spread(name, figure).lower == pytest.approx(1, abs=1e-5)
        for other in set(evaluation.predictions) - {name}:
            assert evaluation.spread(other, figure).upper < 0.99
    if name != "IS":
        assert evaluation.share_above(name) == 1.0
    written = json.loads((tmp_path / "evaluation" / "evaluation.json").read_bytes())
    assert written["summary"][name]["r"]["median"] == pytest.approx(1, abs=1e-5)
    assert len(written["samples"]["IS"]) == 2
    drawn = np.load(tmp_path / "evaluation" / "network" / "000001.npy")
    np.testing.assert_array_equal(drawn, sample(denoiser, n=2, steps=4)[1].numpy())
    for picture in ("scatter.png", "grid.png"):
        assert (tmp_path / "evaluation" / picture).exists()


def test_evaluation_goes_on_and_refuses_other_settings(tmp_path: Path) -> None:
    machine = ScoreMachine(DB, "LS")
    denoiser = denoiser_of(machine, (3, 5))
    calibration = calibrate(machine, denoiser, tmp_path / "sizes.json", steps=2, seeds=1)
    folder = tmp_path / "evaluation"
    drawn: list[tuple[str, int]] = []

    def stop(name: str, done) -> None:
        if name == "IS":
            raise KeyboardInterrupt

    chosen = ("LS", "IS")
    with pytest.raises(KeyboardInterrupt):
        evaluate(DB, denoiser, calibration, folder, n=2, machines=chosen, progress=stop)
    cut = evaluate(
        DB,
        denoiser,
        calibration,
        folder,
        n=2,
        machines=chosen,
        progress=lambda name, done: drawn.append((name, done.images)),
    )
    assert drawn == [("IS", 2), ("IS", 2)]
    whole = evaluate(DB, denoiser, calibration, tmp_path / "whole", n=2, machines=chosen)
    assert cut.predictions == whole.predictions
    more = evaluate(DB, denoiser, calibration, folder, n=3, machines=chosen)
    assert more.predictions["LS"][:2] == cut.predictions["LS"]
    with pytest.raises(NetworkError, match="seed"):
        evaluate(DB, denoiser, calibration, folder, n=3, seed=1, machines=chosen)
    with pytest.raises(RunError, match="may grow"):
        evaluate(DB, denoiser, calibration, folder, n=2, machines=chosen)
    other = PatchDatabase.from_arrays(IMAGES[:5])
    with pytest.raises(ValueError, match="calibrated on other images"):
        evaluate(other, denoiser, calibration, folder, n=3)
    with pytest.raises(ValueError, match="bbELS"):
        evaluate(DB, denoiser, calibration, folder, machines=("GAN",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(NetworkError, match=r"letter\.txt"):
        evaluate(DB, denoiser, calibration, tmp_path / "full", n=1)


def test_classes_reach_network_and_machines(tmp_path: Path) -> None:
    machine = ScoreMachine(DB, "LS")
    denoiser = denoiser_of(machine, (3, 5), num_classes=2)
    path = tmp_path / "sizes.json"
    found = calibrate(machine, denoiser, path, steps=2, seeds=1, label=1)
    assert found.sizes == (3, 5)
    evaluation = evaluate(
        DB, denoiser, found, tmp_path / "evaluation", n=1, machines=("LS",), label=1
    )
    assert evaluation.spread("LS", "r").median == pytest.approx(1, abs=1e-5)


def els(*arguments: object) -> Result:
    return CliRunner().invoke(cli.command_line(), [str(argument) for argument in arguments])


@pytest.mark.parametrize("begun", [0, 700])
def test_the_time_left_is_told_after_some_steps(monkeypatch, begun: int) -> None:
    """The first steps of a session take longer, and a resumed one has steps that took no time."""
    told: list[dict[str, Any]] = []

    class Bar:
        def add_task(self, name: str, **fields: Any) -> int:
            assert fields["total"] is None
            return 0

        def update(self, task: int, **fields: Any) -> None:
            told.append(fields)

    monkeypatch.setattr(networks, "progress_bar", lambda *columns: nullcontext(Bar()))
    with networks._training() as update:
        for step in range(begun + 1, begun + 14):
            update(TrainingProgress(step, 1000, 0.5, 1.0, kept=begun))
        update(TrainingProgress(1000, 1000, 0.5, 1.0, kept=900))
    assert [fields["total"] for fields in told] == [None] * 10 + [1000] * 4
    assert told[0]["told"] == f"loss 0.5000, {begun} steps kept"
    assert told[-1]["told"] == "loss 0.5000"


def test_from_training_to_an_evaluation(tmp_path: Path) -> None:
    PatchDatabase.build(IMAGES, LABELS, path=tmp_path / "db")
    net, db = tmp_path / "net", tmp_path / "db"
    small = [*("--channels", 4, "--layers", 3, "--steps", 3, "--batch-size", 2, "--threads", 1)]
    trained = els("train", db, "-o", net, *small)
    assert trained.exit_code == 0, trained.stderr
    assert (net / "loss.png").exists()
    assert f"losses: {net / 'loss.csv'}\n" in trained.stdout
    assert len((net / "loss.csv").read_text(encoding="ascii").splitlines()) == 4
    refused = els("train", db, "-o", net, *small, "--seed", 1)
    assert refused.exit_code == 1
    assert "seed is 0 there, 1 here" in refused.stderr
    options = ["--steps", "3", "--seeds", "1", "--sizes", "1,3,5", "--threads", "1"]
    calibrated = els("calibrate", db, net, "-o", net / "sizes.json", *options)
    assert calibrated.exit_code == 0, calibrated.stderr
    assert "sizes, lowest noise first: " in calibrated.stdout
    assert (net / "sizes.png").exists()
    found = read_calibration(net / "sizes.json")
    assert (found.kind, found.boundary) == ("ELS", "zeros")
    evaluated = els("evaluate", db, net, "-n", 2, "-o", tmp_path / "evaluation", "--threads", 1)
    assert evaluated.exit_code == 0, evaluated.stderr
    for name in ("bbELS", "ELS", "LS", "IS", "r^2", "R^2", "grid.png"):
        assert name in evaluated.stdout
    run = tmp_path / "run"
    sampled = els("sample", db, "-n", 1, "--steps", 3, "--sizes", net / "sizes.json", "-o", run)
    assert sampled.exit_code == 0, sampled.stderr
    drawn = np.load(tmp_path / "evaluation" / "bbELS" / "samples" / "000000.npy")
    np.testing.assert_array_equal(np.load(run / "samples" / "000000.npy"), drawn)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["train", "db", "-o", "n", "--conditional"], "needs labels", id="no-labels"),
        pytest.param(["train", "db", "-o", "n", "--layers", "1"], "at least 2", id="layers"),
        pytest.param(["calibrate", "db", "none", "-o", "s.json"], "module:function", id="network"),
        pytest.param(["calibrate", "db", "none", "-o", "s.txt"], ".json", id="suffix"),
        pytest.param(["evaluate", "db", "none"], "els calibrate", id="no-sizes"),
        pytest.param(["evaluate", "db", "none", "--sizes", "o.json"], "sizes file", id="sizes"),
        pytest.param(
            ["train", "db", "-o", "n", "--device", "cuda:99"], "--device cuda:99", id="dev"
        ),
        pytest.param(["train", "db", "-o", "n", "--steps", "0"], "--steps 0", id="steps"),
        pytest.param(["train", "db", "-o", "n", "--layers", "0"], "--layers 0", id="no-layers"),
        pytest.param(
            ["calibrate", "db", "none", "-o", "s.json", "--device", "?"],
            "--device ?",
            id="c-device",
        ),
        pytest.param(
            ["evaluate", "db", "none", "--device", "meta"], "--device meta", id="e-device"
        ),
    ],
)
def test_expected_failures_are_one_message(tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    PatchDatabase.build(IMAGES, path=tmp_path / "db")
    Path("o.json").write_text("{}")
    result = els(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("error: ") == 1
    assert words in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db", "o.json"]


@pytest.mark.parametrize("command", ["train", "calibrate", "evaluate"])
def test_every_command_has_an_example(command: str) -> None:
    result = els(command, "--help")
    assert result.exit_code == 0
    assert f"els {command} db" in " ".join(result.stdout.split())


@pytest.mark.parametrize("name", embedded())
def test_networks_in_the_package_come_with_their_sizes(name: str) -> None:
    network = open_network(f"embedded:{name}")
    folder = network_folder(f"embedded:{name}")
    calibration = read_calibration(folder.sizes)
    assert calibration.network == network.fingerprint
    assert calibration.database == network.content_hash
    assert calibration.boundary == (network.padding or "zeros")
    assert folder.weights.stat().st_size <= 5_000_000
    assert not folder.training.exists()
    x = torch.randn(1, *network.module.config.shape, generator=torch.Generator().manual_seed(0))
    # It was trained: where there is almost nothing but noise, it says so.
    epsilon = network.module(torch.tensor([0.95]), x)
    assert (epsilon - x).square().mean() < 0.05


def test_the_picture_of_sizes(tmp_path: Path) -> None:
    machine = ScoreMachine(DB, "LS")
    for metric in ("cosine", "l2"):
        path = tmp_path / f"{metric}.json"
        found = calibrate(
            machine, denoiser_of(machine, (1, 3)), path, steps=2, seeds=2, metric=metric
        )
        draw_calibration(found, path.with_suffix(".png"))
        assert path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("sizes", "ticks"),
    [
        pytest.param([3], [3], id="one"),
        pytest.param([7, 3], [3, 5, 7], id="few"),
        pytest.param([1, 19], [1, 5, 9, 13, 17], id="many"),
        pytest.param([3, 63], [3, 11, 19, 27, 35, 43, 51, 59], id="very-many"),
    ],
)
def test_ticks_of_sizes_are_sizes(sizes: list[int], ticks: list[int]) -> None:
    assert _odd_ticks(sizes) == ticks


def test_both_axes_of_the_scatter_have_the_same_ticks() -> None:
    predictions = {
        name: tuple(Agreement(r, r * r, r, 0.1) for r in values)
        for name, values in {"IS": (0.2, 0.4), "ELS": (0.9, 0.8), "PCA": (0.5, 0.7)}.items()
    }
    (axes,) = _scatter(Evaluation(predictions, {})).axes
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xticks().tolist() == axes.get_yticks().tolist()
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert len({line.get_color() for line in dots}) == len(dots) == 2


def test_a_users_module_of_another_device_and_dtype_is_asked_in_float32(tmp_path: Path) -> None:
    asked = []

    class Watching(torch.nn.Module):
        def forward(self, t, x, label=None):
            asked.append((t.dtype, x.dtype, t.shape, x.shape, label))
            return x

    denoiser = NetworkDenoiser(Network.of(Watching()), DB, device="cpu")
    sample(denoiser, n=3, steps=2)
    assert asked == [(torch.float32, torch.float32, (3,), (3, 1, 9, 9), None)] * 2


@pytest.fixture(scope="module")
def sizes_file(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a finished sizes file holds."""
    path = tmp_path_factory.mktemp("sizes") / "sizes.json"
    machine = ScoreMachine(DB, "LS")
    calibrate(machine, denoiser_of(machine, (1, 3)), path, steps=2, seeds=1, sizes=[1, 3])
    return json.loads(path.read_bytes())


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {name: value}
            for name in ("steps", "seeds", "seed", "images", "label")
            for value in (-1, 2.0, True, "2", [2], {}, 2**64)
            if value != 2**64 or name in ("steps", "seeds")
        ),
        *(
            {name: value}
            for name in ("kind", "boundary", "metric", "search", "clip", "schedule")
            for value in (None, "IS", [], {"name": "nonsense"}, 3)
        ),
        *({name: 3} for name in ("network", "database", "candidates", "per_seed", "agreement")),
        *({"candidates": value} for value in ([2], [1.0], ["1"], [[1]], None)),
        *({"per_seed": value} for value in ([[3.0, 3.0]], [[3]], [3, 3], [["3", "3"]], [[1, 2]])),
        *({"per_seed": value} for value in ([[1, 1]] * 2, None, {"a": 1})),
        *({"agreement": value} for value in ([[1.0]], [["a", "b"]], [], [1.0], None)),
        {"version": 2},
        {"format": "els-network"},
    ],
    ids=str,
)
def test_damaged_sizes_files_are_refused(tmp_path: Path, sizes_file, changes) -> None:
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(sizes_file))
    assert read_calibration(path).sizes
    path.write_text(json.dumps(sizes_file | changes))
    with pytest.raises(ValueError, match=str(path)):
        read_calibration(path)
    for name in changes:
        path.write_text(json.dumps({key: sizes_file[key] for key in sizes_file if key != name}))
        with pytest.raises(ValueError, match=str(path)):
            read_calibration(path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"", b"[]", b"3"], ids=len)
def test_sizes_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sizes.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="els calibrate makes one"):
        read_calibration(path)
    machine = ScoreMachine(DB, "LS")
    with pytest.raises(ValueError, match="els calibrate makes one"):
        calibrate(machine, denoiser_of(machine, (1, 3)), path, steps=2, seeds=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": None},
        {"settings": 3},
        {"seconds": ["network"]},
        {"seconds": {"network": "long"}},
        {"seconds": 3},
        {"version": 9},
    ],
    ids=str,
)
def test_a_damaged_evaluation_is_refused(tmp_path: Path, sizes_file, changes) -> None:
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(sizes_file))
    machine = ScoreMachine(DB, "LS")
    denoiser = denoiser_of(machine, (1, 3))
    options = {"n": 2, "machines": ["IS"]}
    folder = tmp_path / "evaluation"
    evaluate(DB, denoiser, read_calibration(sizes), folder, **options)
    manifest = folder / "evaluation.json"
    there = manifest.read_bytes()
    for content in (
        json.dumps(json.loads(there) | changes).encode(),
        b"[" * 100_000,
        b"[]",
        b"\xff",
    ):
        manifest.write_bytes(content)
        with pytest.raises(NetworkError, match=r"evaluation\.json is malformed"):
            evaluate(DB, denoiser, read_calibration(sizes), folder, **options)
    manifest.write_bytes(there)
    drawn = folder / "network" / "000001.npy"
    for image in (np.zeros((1, 9, 8), np.float32), np.zeros((1, 9, 9)), None):
        if image is None:
            drawn.write_bytes(b"\x93NUMPY")
        else:
            np.save(drawn, image)
        with pytest.raises(NetworkError, match=r"000001\.npy.*remove it"):
            evaluate(DB, denoiser, read_calibration(sizes), folder, **options)
    drawn.unlink()
    evaluate(DB, denoiser, read_calibration(sizes), folder, **options)


def test_pictures_that_cannot_be_drawn_do_not_fail_the_work(tmp_path, monkeypatch) -> None:
    from els.networks import calibrate as calibration
    from els.networks import evaluate as evaluation

    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(calibration, "_drawn", fail)
    monkeypatch.setattr(evaluation, "_scatter", fail)
    monkeypatch.setattr(evaluation, "_grid_figure", fail)
    PatchDatabase.build(IMAGES, path=tmp_path / "db")
    db, net = tmp_path / "db", tmp_path / "net"
    assert els("train", db, "-o", net, "--steps", 1, "--channels", 2).exit_code == 0
    options = ("--steps", 2, "--seeds", 1, "--sizes", "1,3", "-o", net / "sizes.json")
    calibrated = els("calibrate", db, net, *options)
    assert calibrated.exit_code == 0, calibrated.stderr
    assert "picture: " not in calibrated.stdout
    options = ("-n", 2, "--machines", "LS,IS", "-o", tmp_path / "evaluation")
    evaluated = els("evaluate", db, net, *options)
    assert evaluated.exit_code == 0, evaluated.stderr
    assert "evaluation.json" in evaluated.stdout
    assert "scatter.png" not in evaluated.stdout
    assert "grid.png" not in evaluated.stdout
    monkeypatch.undo()
    assert "scatter.png" in els("evaluate", db, net, *options).stdout
