"""Mean and covariance of a database's images."""

import logging
from pathlib import Path

import numpy as np
import pytest

from els.index import DatabaseError, PatchDatabase, decode, statistics
from els.index.statistics import Spectrum, image_spectrum

RNG = np.random.default_rng(4)


def images(count: int, channels: int = 1) -> np.ndarray:
    return RNG.integers(0, 256, (count, channels, 5, 6), dtype=np.uint8)


def covariance(spectrum: Spectrum) -> np.ndarray:
    u = spectrum.components.astype(np.float64)
    return (u.T * spectrum.variances) @ u


@pytest.mark.parametrize("count", [2, 7, 30, 31, 200])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_it_is_the_covariance(
    count: int, channels: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_CHUNK_BYTES", chunk)
    db = PatchDatabase.from_arrays(images(count, channels))
    flat = decode(db.images).reshape(count, -1).astype(np.float64)
    found = image_spectrum(db)
    np.testing.assert_allclose(found.mean, flat.mean(0), atol=1e-6)
    # Eigenvectors are kept in float32.
    np.testing.assert_allclose(covariance(found), np.cov(flat.T), atol=2e-6)
    assert len(found.variances) <= min(count - 1, flat.shape[1])
    assert (np.diff(found.variances) <= 0).all()
    assert (found.variances > 0).all()
    products = found.components.astype(np.float64) @ found.components.T
    np.testing.assert_allclose(products, np.eye(len(products)), atol=1e-5)


def test_constant_images_have_no_variance() -> None:
    same = np.repeat(images(1), 4, axis=0)
    for db in (PatchDatabase.from_arrays(same), PatchDatabase.from_arrays(same[:1])):
        found = image_spectrum(db)
        assert found.components.shape == (0, 30)
        np.testing.assert_allclose(found.mean, decode(same[0]).ravel(), atol=1e-6)


def test_it_is_computed_once_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = PatchDatabase.build(images(40), np.arange(40) % 2, path=tmp_path / "db")
    first = image_spectrum(db)
    of_class = image_spectrum(db, 1)
    np.testing.assert_allclose(
        of_class.mean, decode(db.images[1::2]).reshape(20, -1).mean(0), atol=1e-6
    )
    monkeypatch.setattr(statistics, "_computed", None)
    again = image_spectrum(PatchDatabase.open(tmp_path / "db"))
    for name in ("mean", "variances", "components"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    db.verify()


def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    db = PatchDatabase.build(images(40), path=tmp_path / "db")
    image_spectrum(db)
    folder = tmp_path / "db" / "statistics"
    (folder / "mean.npy").write_bytes(b"nothing")
    with pytest.raises(
        DatabaseError, match=r"mean.npy is not what was written; remove that folder"
    ):
        image_spectrum(db)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(DatabaseError, match="manifest"):
        image_spectrum(db)
    other = PatchDatabase.build(images(41), path=tmp_path / "other")
    image_spectrum(other)
    folder.rename(tmp_path / "old")
    (tmp_path / "other" / "statistics").rename(folder)
    with pytest.raises(DatabaseError, match="of other images"):
        image_spectrum(db)


def test_a_large_one_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(statistics, "_LARGE_BYTES", 1)
    with caplog.at_level(logging.WARNING, logger="els"):
        image_spectrum(PatchDatabase.from_arrays(images(40)))
    assert "30 coordinates" in caplog.text
