"""Grids of images with words beside them."""

from pathlib import Path

import numpy as np
import pytest
from pictures import find_tile
from PIL import Image

from els.storage.labelled import Labels, draw_grid, require_picture, write_grid
from els.storage.png import GAP, grid

RNG = np.random.default_rng(3)
TILES = [RNG.integers(0, 256, (7, 5), dtype=np.uint8) for _ in range(6)]
CASES = [
    pytest.param(Labels(rows=("0", "3")), id="rows"),
    pytest.param(Labels(columns=("1", "2", "3")), id="columns"),
    pytest.param(Labels(columns=("a long name", "b", "c")), id="turned"),
    pytest.param(Labels(tiles=tuple("abcdef")), id="tiles"),
    pytest.param(Labels(title="a title that is longer than the tiles are wide"), id="title"),
    pytest.param(Labels("t", ("above", "below"), ("1", "2", "3"), tuple("abcdef")), id="all"),
    pytest.param(Labels(rows=("$a$ \udcff 日本", "")), id="any-text"),
]


@pytest.mark.parametrize("labels", CASES)
def test_tiles_are_there_to_the_pixel_and_in_order(labels: Labels) -> None:
    picture = draw_grid(TILES, 3, labels)
    assert (picture == picture[..., :1]).all()
    places = [find_tile(picture[..., 0], tile) for tile in TILES]
    assert len({scale for _, _, scale in places}) == 1
    rows, columns = [places[:3], places[3:]], [places[column::3] for column in range(3)]
    assert all(len({y for y, _, _ in row}) == 1 for row in rows)
    assert all(len({x for _, x, _ in column}) == 1 for column in columns)
    assert rows[0][0][0] < rows[1][0][0]
    assert [x for _, x, _ in places[:3]] == sorted({x for _, x, _ in places})
    # Words are dark, and outside the tiles.
    for y, x, scale in places:
        picture[y : y + 7 * scale, x : x + 5 * scale] = 255
    assert picture.min() < 128


def test_without_labels_it_is_the_grid() -> None:
    np.testing.assert_array_equal(draw_grid(TILES, 4)[..., 0], grid(TILES, 4))
    coloured = [np.stack([tile, tile.T[:5].repeat(2, 0)[:7, :5], tile], 2) for tile in TILES]
    np.testing.assert_array_equal(draw_grid(coloured, 2), grid(coloured, 2))


def test_words_are_where_they_belong() -> None:
    blank = [np.full((30, 40), 255, np.uint8)] * 4
    ink = {
        name: np.argwhere(draw_grid(blank, 2, labels)[..., 0] < 200)
        for name, labels in (
            ("row", Labels(rows=("", "x"))),
            ("column", Labels(columns=("", "x"))),
            ("tile", Labels(tiles=("", "", "", "x"))),
        )
    }
    half = GAP + 30 * 8
    assert ink["row"][:, 0].min() > half
    assert ink["row"][:, 1].max() < 30
    assert ink["column"][:, 0].max() < 20
    assert ink["column"][:, 1].min() > 40 * 8
    assert ink["tile"][:, 0].min() > half
    assert ink["tile"][:, 1].min() > 40 * 8


def test_pictures_that_are_too_large_for_their_format(tmp_path: Path) -> None:
    tiles = [np.zeros((1, 3000), np.uint8)] * 12
    with pytest.raises(ValueError, match=r"12,001 x|36,026 x .*\.webp has at most 16,383 a side"):
        write_grid(tmp_path / "g.webp", tiles, 12)
    assert not (tmp_path / "g.webp").exists()
    write_grid(tmp_path / "g.png", tiles, 12)
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.size == (12 * 3002 + 2, 5)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must end in one of"):
        require_picture(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        require_picture(tmp_path / "none" / "a.png")
    require_picture(tmp_path / "a.PNG")
