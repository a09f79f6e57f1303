"""Atomic writes: whole or not at all."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from disks import everything_in, file_size_limit

from els.storage import files, locks
from els.storage.files import DiskFullError


def test_writers_replace_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    for data in (b"", b"old", memoryview(b"newer")):
        files.write_bytes(path, data)
        assert path.read_bytes() == bytes(data)
    files.write_text(path, "grün\n")
    assert path.read_text(encoding="utf-8") == "grün\n"
    files.write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert everything_in(tmp_path) == ["a file"]


def test_a_failing_writer_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def interrupted() -> None:
        with files.atomic_file(path) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert everything_in(tmp_path) == ["file"]


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    files.write_text(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "folder"
    with files.atomic_directory(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not path.exists()
    assert everything_in(tmp_path / "parent") == ["folder", "folder/sub", "folder/sub/file"]
    with pytest.raises(FileExistsError, match="choose another path"), files.atomic_directory(path):
        pytest.fail("an existing folder must be refused before any work")


@pytest.mark.parametrize("one_step", [True, False], ids=["exchange", "two renames"])
def test_an_overwritten_folder_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_step: bool
) -> None:
    if not one_step:
        monkeypatch.setattr("els.storage.files.sys.platform", "other")
    path = tmp_path / "folder"
    with files.atomic_directory(path, overwrite=True) as folder:
        (folder / "old").touch()
    with monkeypatch.context() as patch:
        if one_step and sys.platform == "linux":
            patch.delattr(Path, "rename")
        with files.atomic_directory(path, overwrite=True) as folder:
            (folder / "new").touch()
            assert everything_in(path) == ["old"]
    assert everything_in(tmp_path) == ["folder", "folder/new"]
    with pytest.raises(RuntimeError), files.atomic_directory(path, overwrite=True) as folder:
        raise RuntimeError
    assert everything_in(tmp_path) == ["folder", "folder/new"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def build() -> None:
        with files.atomic_directory(tmp_path / "folder") as folder:
            (folder / "mine").touch()
            (tmp_path / "folder").mkdir()

    with pytest.raises(FileExistsError, match="meanwhile"):
        build()
    assert everything_in(tmp_path) == ["folder"]


def test_a_file_is_never_overwritten_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), files.atomic_directory(tmp_path / "file", overwrite=True):
        pytest.fail("refused before any work")


def test_stale_temporaries_go_and_live_ones_stay(tmp_path: Path) -> None:
    dead_folder, dead_file = tmp_path / ".els-1.partial", tmp_path / ".els-2.partial"
    dead_folder.mkdir()
    (dead_folder / "x").touch()
    dead_file.touch()
    (tmp_path / ".els-link.partial").symlink_to(tmp_path)
    (tmp_path / "other").touch()
    with files.atomic_directory(tmp_path / "db") as live, files.atomic_file(tmp_path / "f") as file:
        files.remove_stale(tmp_path)
        assert live.exists()
        assert not dead_folder.exists()
        assert not dead_file.exists()
        file.write(b"still here")
    assert everything_in(tmp_path) == [".els-link.partial", "db", "f", "other"]
    assert (tmp_path / "f").read_bytes() == b"still here"


def test_a_size_limit_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        file_size_limit(1 << 16),
        pytest.raises(DiskFullError, match=r"file.*free some space") as caught,
    ):
        files.write_bytes(path, bytes(1 << 17))
    assert caught.value.errno == errno.EFBIG
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["full", "quota"])
def test_a_disk_that_fills_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFullError, match=str(tmp_path)):
        files.write_text(tmp_path / "file", "x")
    with (
        pytest.raises(DiskFullError, match=str(tmp_path)),
        files.atomic_directory(tmp_path / "folder") as folder,
    ):
        (folder / "x").touch()
    assert everything_in(tmp_path) == []


def test_other_errors_of_the_system_pass(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        files.write_text(tmp_path, "x")
    assert everything_in(tmp_path) == []


def test_a_small_disk(small_disk: Path) -> None:
    with pytest.raises(DiskFullError, match="2,000,000 bytes are needed"):
        files.require_space(small_disk / "not" / "yet", 2_000_000)
    files.require_space(small_disk / "file", 1000)
    files.write_text(small_disk / "file", "old")
    with pytest.raises(DiskFullError):
        files.write_bytes(small_disk / "file", bytes(2_000_000))
    assert everything_in(small_disk) == ["file"]
    assert (small_disk / "file").read_text() == "old"


def test_a_lock_is_held_until_it_is_let_go(tmp_path: Path) -> None:
    with locks.take_lock(tmp_path / "lock"), pytest.raises(BlockingIOError):
        locks.take_lock(tmp_path / "lock", patience=0.05)
    locks.take_lock(tmp_path / "lock").close()


def failing_fsync(monkeypatch: pytest.MonkeyPatch, code: int, *, folders_only: bool) -> None:
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if folders_only and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return fsync(descriptor)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)


def failing_flock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def failing(descriptor: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", failing)


@pytest.mark.parametrize("folders_only", [True, False], ids=["folders", "files too"])
@pytest.mark.parametrize("code", sorted(files._NO_FLUSH), ids=errno.errorcode.get)
def test_what_cannot_be_flushed_is_written_with_one_warning(
    tmp_path: Path, monkeypatch, caplog, code: int, folders_only: bool
) -> None:
    monkeypatch.setattr(locks, "_warned", set())
    failing_fsync(monkeypatch, code, folders_only=folders_only)
    files.write_text(tmp_path / "file", "x")
    with files.atomic_directory(tmp_path / "folder") as folder:
        (folder / "x").touch()
    assert everything_in(tmp_path) == ["file", "folder", "folder/x"]
    assert len(caplog.messages) == 1
    assert "power cut" in caplog.messages[0]


def test_a_folder_that_cannot_be_opened_is_not_flushed(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(locks, "_warned", set())
    opened = os.open

    def refused(path: object, *arguments: int) -> int:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", refused)
    files.write_text(tmp_path / "file", "x")
    assert (tmp_path / "file").read_text() == "x"
    assert "power cut" in caplog.text


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_fails_is_no_missing_protection(tmp_path, monkeypatch, code: int) -> None:
    failing_fsync(monkeypatch, code, folders_only=False)
    with pytest.raises(OSError, match=os.strerror(code)):
        files.write_text(tmp_path / "file", "x")
    failing_flock(monkeypatch, code)
    for attempt in (locks.take_lock, locks.is_locked):
        (tmp_path / "lock").touch()
        with pytest.raises(OSError, match=os.strerror(code)):
            attempt(tmp_path / "lock")
    assert everything_in(tmp_path) == ["lock"]


@pytest.mark.parametrize("code", sorted(locks._NO_LOCKS), ids=errno.errorcode.get)
def test_without_locks_work_goes_on_with_one_warning(
    tmp_path: Path, monkeypatch, caplog, code: int
) -> None:
    monkeypatch.setattr(locks, "_warned", set())
    (tmp_path / ".els-1.partial").touch()
    failing_flock(monkeypatch, code)
    with files.atomic_directory(tmp_path / "db") as live, files.atomic_file(tmp_path / "f") as file:
        files.remove_stale(tmp_path)
        assert live.exists()
        file.write(b"x")
    with locks.take_lock(tmp_path / "lock"):
        assert not locks.is_locked(tmp_path / "lock")
    # Nobody knows whether the writer of a temporary lives: it stays.
    assert everything_in(tmp_path) == [".els-1.partial", "db", "f", "lock"]
    assert len(caplog.messages) == 1
    assert "no file locks" in caplog.messages[0]


def test_a_writer_without_locks_is_safe_from_those_who_have_them(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        failing_flock(patch, errno.ENOLCK)
        folder, file = files.atomic_directory(tmp_path / "db"), files.atomic_file(tmp_path / "f")
        live, stream = folder.__enter__(), file.__enter__()
    files.remove_stale(tmp_path)
    (live / "x").touch()
    stream.write(b"x")
    file.__exit__(None, None, None)
    folder.__exit__(None, None, None)
    assert everything_in(tmp_path) == ["db", "db/x", "f"]


def test_a_temporary_that_another_process_removes_is_made_again(tmp_path, monkeypatch) -> None:
    flock, rivals = fcntl.flock, []

    def rival_first(descriptor: int, operation: int) -> None:
        if not rivals:
            rivals.append(next(tmp_path.glob(".els-*.partial")).open("rb"))
            flock(rivals[0], fcntl.LOCK_EX)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", rival_first)
    with files.atomic_file(tmp_path / "file") as stream:
        taken = Path(rivals[0].name)
        taken.unlink()
        rivals[0].close()
        stream.write(b"x")
    assert everything_in(tmp_path) == ["file"]


def test_a_fifo_among_temporaries_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".els-1.partial")
    files.remove_stale(tmp_path)
    assert everything_in(tmp_path) == []


def test_errors_name_the_path_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"make the folder.*no-folder"):
        files.write_text(tmp_path / "no-folder" / "file", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"'[^']*folder'$"):
        files.write_text(tmp_path / "folder", "x")
    assert everything_in(tmp_path) == ["folder"]


COMMANDS = """
import sys
from typer.testing import CliRunner
from els.cli.app import command_line
for arguments in (
    "build images.npy -o db",
    "index db --patch-sizes 3",
    "sample db --sizes 3 --steps 2 -n 1 -o run",
    "status run",
    "train db -o net --steps 2 --channels 4",
    "calibrate db net --steps 2 --seeds 1 --sizes 1,3 -o sizes.json",
    "evaluate db net --sizes sizes.json -n 2 -o evaluation",
):
    done = CliRunner().invoke(command_line(), arguments.split(), catch_exceptions=False)
    sys.stderr.write(done.stderr)
    assert done.exit_code == 0, (arguments, done.output)
"""


def test_the_command_line_on_a_file_system_of_a_cluster(tmp_path: Path) -> None:
    if shutil.which("gcc") is None or sys.platform != "linux":
        pytest.skip("needs gcc and LD_PRELOAD")
    (tmp_path / "fs.c").write_text(
        """
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int flock(int descriptor, int operation) { errno = ENOSYS; return -1; }
int fsync(int descriptor) {
  struct stat status;
  if (!fstat(descriptor, &status) && S_ISDIR(status.st_mode)) { errno = EINVAL; return -1; }
  return syscall(SYS_fsync, descriptor);
}
"""
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "fs.so", "fs.c"], cwd=tmp_path, check=True)
    np.save(tmp_path / "images.npy", np.zeros((4, 8, 8), np.uint8))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=tmp_path,
        env={**os.environ, "LD_PRELOAD": str(tmp_path / "fs.so")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no file locks") == done.stderr.count("power cut") == 1
