"""Network folders: their files, written during training and read afterwards.

A folder holds::

    network.json            the config, the training settings and the data, fixed at the start
    weights.safetensors     the averaged weights, to be used; its header says after how many steps
    training.safetensors    all that training needs to go on; may be removed when it is finished
    loss.csv                step, loss and seconds of training, all sessions, of every saved step
    loss.png                the loss curve
    sizes.json              calibrated patch sizes, where els calibrate was told to put them here

Each file appears whole or not at all, and any weights fit any ``network.json`` of the same folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from els.storage.files import atomic_file, write_json
from els.storage.locks import take_lock
from els.storage.manifests import read_json

FORMAT = "els-network"
VERSION = 1
CHECKPOINTS = Path(__file__).parent / "checkpoints"
EMBEDDED = "embedded:"


class NetworkError(RuntimeError):
    """A network folder is missing, damaged, in use, or holds another network."""


@dataclass(frozen=True)
class NetworkFolder:
    """Where the files of a network are."""

    path: Path

    @property
    def manifest(self) -> Path:
        """Config, settings, data."""
        return self.path / "network.json"

    @property
    def weights(self) -> Path:
        """Averaged weights."""
        return self.path / "weights.safetensors"

    @property
    def training(self) -> Path:
        """Weights, averages, the optimiser's moments and the losses so far."""
        return self.path / "training.safetensors"

    @property
    def sizes(self) -> Path:
        """Calibrated patch sizes, where they come with the network."""
        return self.path / "sizes.json"

    @property
    def losses(self) -> Path:
        """The loss of every saved step."""
        return self.path / "loss.csv"

    @property
    def picture(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"


def network_folder(name: str | Path) -> NetworkFolder:
    """The folder of a path, or of ``embedded:NAME``, a network that comes with the package.

    Raises:
        NetworkError: for an unknown name.
    """
    if not str(name).startswith(EMBEDDED):
        return NetworkFolder(Path(name))
    wanted = str(name).removeprefix(EMBEDDED)
    if wanted not in embedded():
        raise NetworkError(
            f"network={str(name)!r} is not in the package; it has "
            f"{', '.join(EMBEDDED + known for known in embedded()) or 'none'}"
        )
    return NetworkFolder(CHECKPOINTS / wanted)


def embedded() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/network.json"))


def read_manifest(folder: NetworkFolder) -> dict[str, Any]:
    """What ``network.json`` says.

    Raises:
        NetworkError: if there is none, or it is damaged or too new.
    """
    try:
        manifest = read_json(folder.manifest)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NetworkError(
            f"{folder.path} is not a network (no {folder.manifest.name}); els train makes one"
        ) from error
    except ValueError as error:
        raise NetworkError(f"{folder.manifest} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise NetworkError(f"{folder.manifest} is damaged: its format is not {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise NetworkError(
            f"{folder.manifest} has version {manifest.get('version')}, this els-machine reads "
            f"{VERSION}; upgrade els-machine"
        )
    for part in ("network", "training", "data"):
        if not isinstance(manifest.get(part), dict):
            raise NetworkError(f"{folder.manifest} is damaged: it has no {part!r}")
    return manifest


def write_manifest(folder: NetworkFolder, content: Mapping[str, Any]) -> None:
    """Write ``network.json``."""
    write_json(folder.manifest, {"format": FORMAT, "version": VERSION, **content})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        RuntimeError: without safetensors.
    """
    save = _safetensors().save
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(header))
    with atomic_file(path) as stream:
        stream.write(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file; nothing is unpickled.

    Raises:
        NetworkError: if it is missing or damaged.
        RuntimeError: without safetensors.
    """
    with _opened(path) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata() or {}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, none of which is read.

    Raises:
        NetworkError: if it is missing or damaged.
        RuntimeError: without safetensors.
    """
    with _opened(path) as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open for reading."""
    safetensors = _safetensors()
    # Opening a fifo would wait for who writes to it.
    if not path.is_file():
        raise NetworkError(f"{path} is not there; els train makes it")
    try:
        with _utf8(path) as named, safetensors.safe_open(named, framework="pt") as opened:
            yield opened
    except Exception as error:
        # The library's own exception class is not public in every version.
        if type(error).__module__.partition(".")[0] != "safetensors":
            raise
        raise NetworkError(f"{path} is damaged ({error})") from error


@contextmanager
def _utf8(path: Path) -> Iterator[Path]:
    """The same file under a name in UTF-8, which safetensors needs."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with TemporaryDirectory() as folder:
            link = Path(folder, "tensors")
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def require_safetensors() -> None:
    """Fail before long work rather than when its result is to be written.

    Raises:
        RuntimeError: without safetensors.
    """
    _safetensors()


@contextmanager
def claimed(path: Path, doing: str) -> Iterator[None]:
    """Makes a folder and locks it against other processes, until the context ends.

    Raises:
        NetworkError: if it is a file, or another process has it.
    """
    if path.exists() and not path.is_dir():
        raise NetworkError(f"{path} is a file; give a folder")
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(path / ".lock")
    except BlockingIOError as error:
        raise NetworkError(
            f"another process is {doing} {path}; wait for it, or give another folder"
        ) from error
    with lock:
        yield


class _Safetensors:
    """The two functions of safetensors that are used here."""

    def __init__(self) -> None:
        from safetensors import safe_open
        from safetensors.torch import save

        self.safe_open, self.save = safe_open, save


def _safetensors() -> _Safetensors:
    try:
        return _Safetensors()
    except ImportError as error:
        raise RuntimeError(
            "networks are stored with safetensors: pip install 'els-machine[networks]'"
        ) from error
