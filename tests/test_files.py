"""Atomic writes: whole or not at all."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from els.index import files
from els.index.files import DiskFullError


def everything_in(folder: Path) -> list[str]:
    return sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*"))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A quota that the kernel enforces on this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


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
        monkeypatch.setattr("els.index.files.sys.platform", "other")
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
    with files.take_lock(tmp_path / "lock"), pytest.raises(BlockingIOError):
        files.take_lock(tmp_path / "lock", patience=0.05)
    files.take_lock(tmp_path / "lock").close()
