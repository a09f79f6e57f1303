"""Well-known data sets by name: files that are here already, else the Hugging Face hub."""

import os
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from els.index.arrays import check_class_names, check_labels
from els.index.sources.foreign import DAMAGED, SourceError, explained, open_regular
from els.index.sources.source import ArraySource, ImageSource

# Folders in which files are looked for, with ":" between them; in place of the usual ones.
ROOTS_VARIABLE = "ELS_DATA"
# Where torchvision and Keras users, and Debian, keep data sets.
_ROOTS = ("data", ".", "~/data", "~/.keras/datasets", "/usr/share/datasets")
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_CLASSES = 10
# Files of training images of CIFAR-10.
_CIFAR_FILES = 5
# Bytes of one of its files, at most; they have 31 MB.
_MOST_CIFAR_BYTES = 1 << 26
# Instructions of a pickle that hold text or bytes, and integers.
_STRINGS = (
    *("BINSTRING", "SHORT_BINSTRING", "STRING", "BINUNICODE", "SHORT_BINUNICODE"),
    *("UNICODE", "BINBYTES", "SHORT_BINBYTES"),
)
_INTEGERS = ("BININT", "BININT1", "BININT2", "INT")
# Bytes of a string that may be a key of integers.
_LONGEST_KEY = 100


@dataclass(frozen=True)
class Standard:
    """A well-known data set.

    Attributes:
        hub: its name on the Hugging Face hub.
        files: by part, below a root, what is looked for: files or folders, with a part after a
            colon, in the spelling of `els.index.open_source`.
        remedy: how the files are had where there is no network.
    """

    hub: str
    files: dict[str, tuple[str, ...]]
    remedy: str


def _idx(*folders: str) -> dict[str, tuple[str, ...]]:
    """Files of MNIST's format in some folders."""
    stems = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
    return {
        part: tuple(f"{folder}/{stem}{end}" for folder in folders for end in ("", ".gz"))
        for part, stem in stems.items()
    }


_MNIST = _idx("MNIST/raw", "mnist")
STANDARD = {
    "mnist": Standard(
        "ylecun/mnist",
        {part: (*files, f"mnist.npz:{part}") for part, files in _MNIST.items()},
        "copy the folder MNIST/raw of torchvision, or mnist.npz of Keras, into data/",
    ),
    "fashion-mnist": Standard(
        "zalando-datasets/fashion_mnist",
        _idx("FashionMNIST/raw", "fashion-mnist"),
        "copy the folder FashionMNIST/raw of torchvision into data/, or install Debian's package "
        "dataset-fashion-mnist; embedded:fashion-mnist has 4,096 of the images",
    ),
    "cifar10": Standard(
        "uoft-cs/cifar10",
        {part: (f"cifar-10-batches-py:{part}",) for part in ("train", "test")},
        "copy the folder cifar-10-batches-py of torchvision into data/",
    ),
    "celeba": Standard(
        "nielsr/CelebA-faces",
        {"train": ("celeba/img_align_celeba", "img_align_celeba", "img_align_celeba.zip")},
        "copy the folder celeba/img_align_celeba of torchvision, or img_align_celeba.zip, into "
        "data/",
    ),
    "afhq": Standard(
        "huggan/AFHQ",
        {
            part: (f"afhq:{part}", f"afhq_v2:{part}", f"afhq.zip:{part}", f"afhq_v2.zip:{part}")
            for part in ("train", "test", "val")
        },
        "unpack afhq.zip or afhq_v2.zip of the StarGAN v2 repository in data/",
    ),
}


def files_of(name: str, part: str) -> str | None:
    """What to open of a standard data set, if it is on this disk."""
    found = STANDARD[name].files.get(part)
    if found is None:
        parts = ", ".join(STANDARD[name].files)
        raise SourceError(f"{name} has no part {part!r}; it has: {parts}")
    for root in _roots():
        for spec in found:
            if (root / spec.partition(":")[0]).exists():
                return str(root / spec)
    return None


def not_here(name: str, part: str, error: SourceError) -> SourceError:
    """What to say where there are neither files nor a hub."""
    looked = ", ".join(map(str, _roots()))
    return SourceError(
        f"{name} ({part}) is not on this disk (looked in {looked}; {ROOTS_VARIABLE} names other "
        f"folders), and not to be had from the hub ({error}); {STANDARD[name].remedy}"
    )


def _roots() -> Sequence[Path]:
    given = os.environ.get(ROOTS_VARIABLE)
    folders = given.split(os.pathsep) if given else _ROOTS
    return [Path(folder).expanduser() for folder in folders if folder]


def is_cifar(path: Path) -> bool:
    """Whether a folder is CIFAR-10 as torchvision unpacks it."""
    return (path / "test_batch").is_file()


def open_cifar(path: Path, part: str | None) -> ImageSource:
    """CIFAR-10 as torchvision unpacks it: pickles, of which no object is ever made.

    The pickles are read as a list of instructions: the pixels are the one long string in each,
    the labels the integers behind the key ``labels``.
    """
    part = part or "train"
    if part not in ("train", "test"):
        raise SourceError(f"{path} has no part {part!r}; it has: train, test")
    files = [path / "test_batch"]
    if part == "train":
        files = sorted(path.glob("data_batch_[1-5]"))
        if len(files) != _CIFAR_FILES:
            raise SourceError(
                f"{path} has {len(files)} of the {_CIFAR_FILES} files data_batch_1, ...; {DAMAGED}"
            )
    with explained(path, DAMAGED):
        batches = [_strings_and_integers(file) for file in files]
        (names, _) = _strings_and_integers(path / "batches.meta")
        pixels = [max(strings, key=len) for strings, _ in batches]
        labels = [integers["labels"] for _, integers in batches]
        images = np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, *_CIFAR_SHAPE)
        source = ArraySource.of(images)
        kept = check_labels(np.concatenate([np.array(each) for each in labels]), len(images))
        first = names.index(b"label_names") + 1
        class_names = check_class_names(
            [name.decode() for name in names[first : first + _CIFAR_CLASSES]], kept
        )
    return replace(source, labels=kept, class_names=class_names)


def _strings_and_integers(path: Path) -> tuple[list[bytes], dict[str, list[int]]]:
    """What a pickle of plain data holds: its strings, and integers by the string before them."""
    strings: list[bytes] = []
    integers: dict[str, list[int]] = {}
    with open_regular(path, _MOST_CIFAR_BYTES) as stream:
        for opcode, value, _ in pickletools.genops(stream):
            argument: Any = value
            if opcode.name in _STRINGS:
                # Python 2 wrote bytes, which are read as Latin-1.
                is_text = isinstance(argument, str)
                strings.append(argument.encode("latin-1") if is_text else argument)
            elif opcode.name in _INTEGERS and strings:
                key = strings[-1][:_LONGEST_KEY].decode("latin-1")
                integers.setdefault(key, []).append(argument)
    return strings, integers
