"""The command line: what it says, what it writes, how it fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from commands import els
from typer import Typer
from typer.testing import CliRunner

from els.cli import app as cli
from els.cli import console, sampling
from els.engine import ScoreMachine
from els.index import PatchDatabase
from els.runs.folder import RunFolder, read_settings
from els.runs.run import StepProgress, sample_run
from els.runs.stores import RunError

RNG = np.random.default_rng(13)
IMAGES = RNG.integers(0, 256, (6, 6, 8), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])
SAMPLE = ("-n", "2", "--steps", "3", "--sizes", "3", "--backend", "torch")


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
    assert "kB)" in walked.stdout
    assert '"top":3' in (run / "explain-000001.html").read_text(encoding="utf-8")


def test_info_counts_classes(db: Path) -> None:
    result = els("info", db, "--verify")
    assert result.exit_code == 0, result.stderr
    assert "[red]" in result.stdout
    assert PatchDatabase.open(db).content_hash in result.stdout
    assert "verified" in result.stdout


def test_an_index_says_what_it_costs_and_info_lists_it(db: Path) -> None:
    pytest.importorskip("faiss")
    assert "indices  none" in els("info", db).stdout
    made = els("index", db, "--patch-sizes", "3,5")
    assert made.exit_code == 0, made.stderr
    for size, count in ((3, 144), (5, 48)):
        found = re.search(
            rf"P {size}: {count} patches; about 1 s and at most (\S+) kB", made.stderr
        )
        assert found
        assert "An exact step of one image takes" in made.stderr
        assert f"P {size}: with so few images --tolerance computes every step" in made.stderr
        index = PatchDatabase.open(db).open_index(size)
        assert index.size_bytes <= 1e3 * float(found[1]) + 50
    told = els("info", db).stdout
    assert re.search(r"indices  P  3 .* Flat\s+P  5 .* Flat", told)
    again = els("index", db, "--patch-sizes", "3")
    assert again.exit_code == 0
    assert "patches; about" not in again.stderr
    assert re.search(r"Flat .* never", again.stdout)
    other = els("index", db, "--patch-sizes", "3", "--factory", "IVF4,SQ8_direct", "--overwrite")
    assert other.exit_code == 0, other.stderr
    found = re.search(r"IVF4,SQ8_direct .* (0\.\d+)", other.stdout)
    assert found
    assert 0 < float(found[1]) < 0.05
    told = els("info", db).stdout
    assert f"IVF4,SQ8_direct  --tolerance reads it from beta {found[1]}" in told


def test_a_log_gets_lines_of_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_LOG_SECONDS", 0.01)
    with console.progress_bar("images") as progress:
        task = progress.add_task("reading", total=7)
        progress.update(task, completed=3)
        time.sleep(0.2)
    assert "reading: 3 of 7 images after 0 s" in capsys.readouterr().err


def test_a_bar_says_in_words_what_elapsed_and_what_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 3 of 7 images in 60 s, by a clock of our own.
    with console.progress_bar("images") as progress:
        progress.get_time = lambda: now
        now = 0.0
        task = progress.add_task("reading", total=7)
        now = 60.0
        progress.update(task, completed=3)
        now = 120.0
        progress.update(task, completed=6)
    assert "6/7 images 2 min elapsed, 20 s left" in capsys.readouterr().err
    with console.progress_bar("images") as progress:
        progress.add_task("reading", total=7)
    assert "0/7 images 0 s elapsed\n" in re.sub(" +\n", "\n", capsys.readouterr().err)


def test_the_bar_of_a_complete_run_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where other processes drew samples that this one did not hear of."""
    with sampling._sampling(6, 2, shown=True) as update:
        assert update is not None
        # Two of six, each in two steps; the others' four are never heard of.
        update(StepProgress(0, 1, 3, 2, 0.1))
        update(StepProgress(0, 2, 3, 2, 0.1))
    assert "12/12 image-steps" in capsys.readouterr().err
    interrupted = sampling._sampling(6, 2, shown=True)
    update = interrupted.__enter__()
    assert update is not None
    update(StepProgress(2, 1, 3, 2, 0.1))
    interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "2/8 image-steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(console.counted(1, "image"), "1 image", id="one"),
        pytest.param(console.counted(0, "image"), "0 images", id="none"),
        pytest.param(console.counted(1024, "image"), "1,024 images", id="many"),
        pytest.param(console.size_in_words(340), "340 bytes", id="bytes"),
        pytest.param(console.size_in_words(12_540), "12.5 kB", id="kilobytes"),
        pytest.param(console.size_in_words(2.5e9), "2,500.0 MB", id="megabytes"),
        pytest.param(console.duration(0.123), "0.12 s", id="short"),
        pytest.param(console.duration(99.6), "100 s", id="seconds"),
        pytest.param(console.duration(601), "10 min", id="minutes"),
        pytest.param(console.duration(9000), "2.5 h", id="hours"),
    ],
)
def test_amounts_in_words(words: str, expected: str) -> None:
    assert words == expected


def test_info_draws_images(db: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        assert f"grid: {tmp_path / name}" in els("info", db, "--grid", tmp_path / name).stdout
        assert (tmp_path / name).read_bytes().startswith(start)
    for name, says in (("a.xyz", "'xyz' is not supported"), ("none/a.png", "--grid")):
        refused = els("info", db, "--grid", tmp_path / name)
        assert refused.exit_code == 1
        assert says in refused.stderr
        assert not (tmp_path / name).exists()


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
        pytest.param(["sample", "db", "-o", "run", "--sizes", "3", "-n", "0"], "-n 0", id="n"),
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
    "text",
    [
        "[3.0, 3.0]",
        "[true, true]",
        '["3", "3"]',
        "[[3], [3]]",
        "[null, 3]",
        "[NaN, 3]",
        "[Infinity, 3]",
        "[]",
        "[3, 3, 3, 3, 3]",
        "[-3, 3]",
        "[4, 4]",
        "3",
        "null",
        '"3"',
        "{",
        "",
        '{"format": "els-sizes", "sizes": 3}',
        '{"format": "els-sizes"}',
        "[" * 100_000,
        "\xff",
    ],
    ids=lambda text: text[:24],
)
def test_sizes_that_are_none_are_refused(db: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_bytes(text.encode("latin-1"))
    options = ("--steps", 2, "-n", 1, "--backend", "torch")
    result = els("sample", db, *options, "--sizes", tmp_path / "s.json", "-o", tmp_path / "run")
    assert result.exit_code == 1, result.output
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "--sizes" in message
    assert not isinstance(result.exception, TypeError)


def test_a_file_of_sizes_is_read_in_bounded_memory(db: Path, tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as stream:
        stream.truncate(1 << 40)
    os.mkfifo(tmp_path / "fifo.json")
    for name, words in (("large.json", "1,099,511,627,776 bytes"), ("fifo.json", "not a file")):
        result = els("sample", db, "--sizes", tmp_path / name, "-o", tmp_path / "run")
        assert result.exit_code == 1
        assert words in result.stderr


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta", "xla", "cuda:-1", ""])
def test_a_device_that_is_not_there_is_refused_before_any_work(db, tmp_path, device: str) -> None:
    run = tmp_path / "run"
    result = els("sample", db, *SAMPLE, "--device", device, "-o", run)
    assert result.exit_code == 1
    assert f"error: {f'--device {device}'.strip()} is not here; choose one of" in result.stderr
    assert not run.exists()


def test_messages_name_options_in_place_of_arguments(db: Path, tmp_path: Path) -> None:
    for options, words in (
        (("--steps", 0), "error: --steps 0 must be"),
        (("--shard-size", 0), "error: --shard-size 0 must be"),
        (("--batch-size", 0), "error: --batch-size 0 must be"),
        (("--sizes", "3,3"), "error: --sizes has 2 entries for --steps 3"),
        (("--label", -1), "error: --label -1 must be"),
    ):
        result = els("sample", db, *SAMPLE, *options, "-o", tmp_path / "run")
        assert result.exit_code == 1
        assert words in result.stderr
    # What the user wrote stays as it is.
    (tmp_path / "steps=3").write_text("x")
    result = els("sample", db, *SAMPLE, "-o", tmp_path / "steps=3")
    assert f"{tmp_path / 'steps=3'} is a file" in result.stderr


def test_errors_of_the_system_name_the_path_and_the_remedy(db: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert els("sample", db, *SAMPLE, "-o", run).exit_code == 0
    result = els("grid", run, "-o", tmp_path / "none" / "z.png")
    assert result.exit_code == 1
    assert "none/z.png: its folder is not there; make the folder" in result.stderr
    assert "[Errno" not in result.stderr
    db.rename(tmp_path / "moved")
    result = els("explain", run, "--sample", 0)
    assert result.exit_code == 1
    assert "say where it is now with --db PATH" in result.stderr
    assert els("explain", run, "--sample", 0, "--db", tmp_path / "moved").exit_code == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(MemoryError("4 GB"), "error: not enough memory", id="memory"),
        pytest.param(RecursionError("too deep"), "error: too deep", id="recursion"),
        pytest.param(OSError(5, "I/O error"), "error: I/O error\n", id="no-path"),
        pytest.param(PermissionError(13, "denied", "a/b"), "error: a/b: denied\n", id="path"),
        pytest.param(ValueError(), "error: ValueError\n", id="no-words"),
    ],
)
def test_errors_in_words(error: Exception, words: str) -> None:
    app = Typer()

    @app.command()
    @console.reported
    def fail() -> None:
        raise error

    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.parametrize("error", [AssertionError, TypeError, AttributeError, KeyError])
def test_faults_of_the_program_keep_their_traceback(error: type[Exception]) -> None:
    @console.reported
    def fail() -> None:
        raise error

    with pytest.raises(error):
        fail()


def shell(command: str, folder: Path, **surroundings: str) -> subprocess.CompletedProcess[str]:
    """A command of bash, in which ``els`` is the command line."""
    command = f'els() {{ "{sys.executable}" -m els.engine "$@"; }}; set -o pipefail; {command}'
    environment = {**os.environ, **surroundings}
    arguments = ["bash", "-c", command]
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_streams_that_are_closed_or_broken_end_a_command_quietly(db: Path) -> None:
    for redirection in (">&-", "<&- >&- 2>&-"):
        done = shell(f"els info db {redirection}", db.parent)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), redirection
    for command in ("els info db", "els --help", "els info none 2>&1"):
        done = shell(f"{command} | true", db.parent)
        assert (done.returncode, done.stderr) == (1, ""), command
    if Path("/dev/full").exists():
        done = shell("els info db > /dev/full", db.parent)
        assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_names_that_cannot_be_encoded_are_shown_otherwise(tmp_path: Path) -> None:
    names = ["日本", "b\udcff"]
    source = tmp_path / "日本.npy"
    np.save(source, IMAGES)
    PatchDatabase.build(IMAGES, LABELS % 2, path=tmp_path / "db", class_names=names)
    for encoding in ("latin-1", "ascii:strict"):
        shown = shell("els info db; els info none-日本", tmp_path, PYTHONIOENCODING=encoding)
        assert "\\udcff" in shown.stdout
        assert "Traceback" not in shown.stderr
        assert "no database at none-" in shown.stderr
        command = "els build 日本.npy -o 日本 --overwrite"
        assert shell(command, tmp_path, PYTHONIOENCODING=encoding).returncode == 0
        assert len(PatchDatabase.open(tmp_path / "日本")) == len(IMAGES)


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
from els.cli.app import command_line
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


def test_ctrl_c_while_the_imports_run(tmp_path: Path) -> None:
    """They take half a second: a module that everything imports stops in the middle."""
    (tmp_path / "typer.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    )
    for program in (["-m", "els.engine"], ["-c", "from els.cli import main; main()"]):
        with subprocess.Popen(
            [sys.executable, *program, "info", "none"],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (130, "stopped\n")


def test_a_class_is_given_by_number_or_name(db: Path, tmp_path: Path) -> None:
    for number, text in enumerate(["1", "b", "B"]):
        result = els("sample", db, *SAMPLE, "--label", text, "-o", tmp_path / str(number))
        assert result.exit_code == 0, result.stderr
        assert read_settings(tmp_path / str(number)).label == 1
    refused = els("sample", db, *SAMPLE, "--label", "bb", "-o", tmp_path / "none")
    assert refused.exit_code == 1
    assert "error: no class is called 'bb'; there are b, [red], c" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_sizes_of_another_boundary_are_warned_of(db: Path, tmp_path: Path) -> None:
    sizes = tmp_path / "sizes.json"
    content = {"format": "els-sizes", "sizes": [3, 3, 3], "boundary": "zeros"}
    sizes.write_text(json.dumps(content))
    warning = f"warning: --sizes {sizes} was calibrated for --boundary zeros, not circular"
    options = ("--steps", 3, "-n", 1, "--backend", "torch", "--sizes", sizes)
    for name, more, is_warned in (
        ("zeros", (), False),
        ("circular", ("--boundary", "circular"), True),
        ("ideal", ("--boundary", "circular", "--machine", "IS"), False),
    ):
        result = els("sample", db, *options, *more, "-o", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        assert (warning in result.stderr) == is_warned, name


def test_another_database_is_told_in_words(db: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert els("sample", db, *SAMPLE, "-o", run).exit_code == 0
    PatchDatabase.build(IMAGES[:3], path=other)
    hashes = [PatchDatabase.open(each).content_hash for each in (db, other)]
    for refused in (
        els("sample", other, *SAMPLE, "-o", run),
        els("explain", run, "--sample", 0, "--db", other),
        els("grid", run, "-o", tmp_path / "grid.png", "--nearest", "--db", other),
    ):
        assert refused.exit_code == 1
        for folder, count, content in ((db, 6, hashes[0]), (other, 3, hashes[1])):
            words = f"{count} images 1x6x8, {folder}, content {content[:12]}"
            assert words in refused.stderr
            assert content not in refused.stderr
    db.rename(tmp_path / "moved")
    for refused in (
        els("explain", run, "--sample", 0),
        els("grid", run, "-o", tmp_path / "grid.png", "--nearest"),
    ):
        assert f"is not at {db} any more; if it was moved, say where it is now with --db PATH" in (
            refused.stderr
        )
    gone = els("sample", other, *SAMPLE, "-o", run)
    assert f"its database is {db}, content {hashes[0][:12]}; the one here is 3 images" in (
        gone.stderr
    )


def test_many_classes_are_not_all_listed(tmp_path: Path) -> None:
    labels = [*range(1000), *[7] * 5, 999]
    images = np.zeros((len(labels), 4, 4), np.uint8)
    np.savez(tmp_path / "source.npz", images=images, labels=labels)
    built = els("build", tmp_path / "source.npz", "-o", tmp_path / "db")
    for shown in (built, els("info", tmp_path / "db")):
        assert shown.exit_code == 0, shown.stderr
        rows = shown.stdout.partition("\nclasses")[2].splitlines()
        assert rows[0].split() == ["7", "6"]
        assert rows[1].split() == ["999", "2"]
        assert rows[20].split("(")[0].strip() == "... and 980 more"
        assert len(rows) == 21
    every = els("info", tmp_path / "db", "--classes").stdout.partition("\nclasses")[2].splitlines()
    assert len(every) == 1000
    assert every[7].split() == ["7", "6"]


def test_errors_of_the_system_name_the_option(db: Path, tmp_path: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("no /proc, where nobody can make a folder")
    for arguments, words in (
        (("sample", db, *SAMPLE, "-o", "/proc/run"), "error: --output /proc/run: No such file"),
        (("build", tmp_path / "s.npy", "-o", "/proc/a/db"), "error: --output /proc/a/db: /proc/a"),
        (("train", db, "-o", "/proc/net"), "error: --output /proc/net: /proc/net/.lock: No such"),
    ):
        np.save(tmp_path / "s.npy", IMAGES)
        result = CliRunner().invoke(cli.command_line(), list(map(str, arguments)))
        assert result.exit_code == 1
        assert words in result.stderr, result.stderr
