"""The command line: what it says, what it writes, how it fails."""

import json
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from els.engine import ScoreMachine, cli
from els.engine.runs import RunError, RunFolder, read_settings, sample_run
from els.index import PatchDatabase

RNG = np.random.default_rng(13)
IMAGES = RNG.integers(0, 256, (6, 6, 8), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])
SAMPLE = ("-n", "2", "--steps", "3", "--sizes", "3", "--backend", "torch")


def els(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def db(tmp_path: Path) -> Path:
    PatchDatabase.build(IMAGES, LABELS, path=tmp_path / "db", class_names=["[red]", "b", "c"])
    return tmp_path / "db"


def test_from_images_to_an_explanation(tmp_path: Path) -> None:
    np.savez(tmp_path / "source.npz", images=IMAGES, labels=LABELS)
    built = els("build", tmp_path / "source.npz", "-o", tmp_path / "db")
    assert built.exit_code == 0, built.stderr
    assert "6 x 8, 1 channel" in built.stdout
    run = tmp_path / "run"
    sampled = els("sample", tmp_path / "db", *SAMPLE, "--trajectory", "-o", run)
    assert sampled.exit_code == 0, sampled.stderr
    assert "backend: torch (cpu): asked for by name" in sampled.stderr
    assert "seconds per image-step (median): " in sampled.stdout
    assert "patch size   3: " in sampled.stdout
    assert RunFolder(run).trajectory(1, ".png").exists()
    explained = els("explain", run, "--sample", 1, "--step", 2)
    assert explained.exit_code == 0, explained.stderr
    assert "share of the sample" in explained.stdout
    assert (run / "explain-000001-step02.png").exists()
    assert (run / "explain-000001-step02.npz").exists()
    walked = els("explain", run, "--sample", 1, "--html", "--top", 3)
    assert walked.exit_code == 0, walked.stderr
    assert "MB)" in walked.stdout
    assert '"top":3' in (run / "explain-000001.html").read_text(encoding="utf-8")


def test_info_counts_classes(db: Path) -> None:
    result = els("info", db, "--verify")
    assert result.exit_code == 0, result.stderr
    assert "[red]" in result.stdout
    assert PatchDatabase.open(db).content_hash in result.stdout
    assert "verified" in result.stdout


def test_info_finds_damage(db: Path) -> None:
    with (db / "images.npy").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(bytes([IMAGES[-1, -1, -1] ^ 1]))
    assert els("info", db).exit_code == 0
    result = els("info", db, "--verify")
    assert result.exit_code == 1
    assert "damaged" in result.stderr


def test_build_options_reach_the_library(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    np.save(tmp_path / "labels.npy", LABELS)
    arguments = ("build", tmp_path / "images.npy", "-o", tmp_path / "db")
    options = ("--labels", tmp_path / "labels.npy", "--resize", 4)
    assert els(*arguments, *options).exit_code == 0
    db = PatchDatabase.open(tmp_path / "db")
    assert db.shape == (1, 4, 4)
    assert db.num_classes == 3
    refused = els(*arguments)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    assert els(*arguments, "--overwrite").exit_code == 0
    assert PatchDatabase.open(tmp_path / "db").labels is None


def test_sampling_goes_on_and_refuses_other_settings(db: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "2 computed now" in els("sample", db, *SAMPLE, "-o", run).stdout
    assert "0 computed now" in els("sample", db, *SAMPLE, "-o", run).stdout
    assert "1 computed now" in els("sample", db, *SAMPLE, "-n", "3", "-o", run).stdout
    refused = els("sample", db, *SAMPLE, "-n", "3", "--seed", 1, "-o", run)
    assert refused.exit_code == 1
    assert "seed is 0 there, 1 here" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_sample_options_reach_the_library(db: Path, tmp_path: Path) -> None:
    options = (
        "--machine ls --boundary CIRCULAR --schedule Linear --eta 0.5 --label 2 --seed 7 "
        "--batch-size 1 --threads 1"
    )
    run = tmp_path / "run"
    result = els("sample", db, *SAMPLE, *options.split(), "-o", run)
    assert result.exit_code == 0, result.stderr
    settings = read_settings(run)
    assert (settings.machine, settings.boundary, settings.label) == ("LS", "circular", 2)
    assert (settings.eta, settings.seed, settings.schedule["name"]) == (0.5, 7, "linear")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        pytest.param("1,3,5", (1, 3, 5), id="list"),
        pytest.param("5", (5, 5, 5), id="number"),
        pytest.param("sizes.json", (3, 5, 5), id="file"),
    ],
)
def test_ways_to_give_sizes(db: Path, tmp_path: Path, monkeypatch, text, sizes) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sizes.json").write_text("[3, 5, 5]")
    result = els("sample", db, *SAMPLE, "--sizes", text, "-o", "run")
    assert result.exit_code == 0, result.stderr
    assert read_settings("run").patch_sizes == sizes


def test_a_table_by_name(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (2, 18, 17), dtype=np.uint8)
    PatchDatabase.build(images, path=tmp_path / "db")
    options = ("-n", 1, "--steps", 2, "--sizes", "fashion-mnist-resnet", "--machine", "LS")
    result = els("sample", tmp_path / "db", *options, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert read_settings(tmp_path / "run").patch_sizes == (11, 17)


def test_whole_image_machines_need_no_sizes(db: Path, tmp_path: Path) -> None:
    result = els("sample", db, "-n", 1, "--steps", 2, "--machine", "IS", "-o", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "patch size" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["info", "nothing"], "no database at nothing", id="no-database"),
        pytest.param(["build", "nothing", "-o", "new"], "nothing", id="no-source"),
        pytest.param(["sample", "db", "-o", "run"], "fashion-mnist-resnet", id="no-sizes"),
        pytest.param(["sample", "db", "-o", "run", "--sizes", "4"], "odd", id="even-size"),
        pytest.param(["sample", "db", "-o", "run", "--sizes", "x"], "celeba", id="unknown-sizes"),
        pytest.param(["sample", "db", "-o", "run", "--sizes", "n.json"], "n.json", id="no-file"),
        pytest.param(["sample", "db", "-o", "run", "--sizes", "o.json"], "list", id="no-list"),
        pytest.param(["sample", "db", "-o", "run", "--sizes", "3", "-n", "0"], "n=0", id="n"),
        pytest.param(["sample", "db", "-o", "run", "--sizes", "3", "--label", "9"], "9", id="lbl"),
        pytest.param(["sample", "db", "-o", "o.json", "--sizes", "3"], "is a file", id="file"),
        pytest.param(["explain", "run", "--sample", "0"], "not a run", id="no-run"),
        pytest.param(["explain", "run", "--sample", "0", "-o", "a.txt"], ".png", id="suffix"),
        pytest.param(["explain", "run", "--sample", "0", "-o", "a.html"], "--html", id="page"),
        pytest.param(
            ["explain", "run", "--sample", "0", "--html", "-o", "a.png"], ".html", id="page-suffix"
        ),
    ],
)
def test_expected_failures_are_one_message(db, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    Path("o.json").write_text(json.dumps({"a": 1}))
    result = els(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("error: ") == 1
    assert words in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["sample"], id="no-arguments"),
        pytest.param(["sample", "db", "-o", "run", "--machine", "GAN"], id="unknown-machine"),
        pytest.param(["sample", "db", "-o", "run", "--steps", "few"], id="not-a-number"),
        pytest.param(["paint"], id="unknown-command"),
    ],
)
def test_wrong_usage_is_two(arguments: list[str]) -> None:
    assert els(*arguments).exit_code == 2


@pytest.mark.parametrize(
    "command", ["build", "info", "sample", "explain", "status", "merge", "grid"]
)
def test_every_command_has_an_example(command: str) -> None:
    result = els(command, "--help")
    assert result.exit_code == 0
    assert f"els {command}" in " ".join(result.stdout.split())


def test_other_packages_add_commands_and_a_broken_one_costs_its_own_only(
    monkeypatch, capsys
) -> None:
    points = [
        EntryPoint("broken", "no_such_module:register", "els.commands"),
        EntryPoint("good", f"{__name__}:register_greeting", "els.commands"),
    ]
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(cli, "app", Typer())
    extended = cli.command_line.__wrapped__()
    assert "no_such_module:register are left out" in capsys.readouterr().err
    assert CliRunner().invoke(extended, ["Ada"]).stdout == "hello Ada\n"


def register_greeting(app: Typer) -> None:
    @app.command()
    def greet(name: str) -> None:
        print(f"hello {name}")


def test_help_needs_no_heavy_imports() -> None:
    # The engine's package imports torch; its command line must not add to that.
    code = """
import sys, types, importlib.util
package = types.ModuleType("els.engine")
package.__path__ = list(importlib.util.find_spec("els.engine").submodule_search_locations)
sys.modules["els.engine"] = package
from els.engine.cli import command_line
command_line()
heavy = {"torch", "numpy", "matplotlib", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_ctrl_c_and_a_second_process(db: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    options = {"n": 50_000, "steps": 3, "patch_sizes": 3, "batch_size": 2}
    arguments = f"-n {options['n']} --steps 3 --sizes 3 --batch-size 2 --backend torch".split()
    arguments += ["--shard-size", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "els.engine", "sample", db, "-o", run.path, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not run.values(3).exists():
            time.sleep(0.01)
        machine = ScoreMachine(PatchDatabase.open(db), "ELS", "zeros", "torch")
        with pytest.raises(RunError, match="another process"):
            sample_run(machine, run.path, **options)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in stderr
    assert "of 50000 samples are finished and safe" in stderr
    assert "Traceback" not in stderr
