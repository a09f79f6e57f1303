"""What a database says of itself: pictures, class names, places as plain numbers."""

import numpy as np
import pytest

from els.index import PatchDatabase

IMAGES = np.random.default_rng(2).integers(0, 256, (30, 1, 5, 7), dtype=np.uint8)
LABELS = np.arange(30) % 3
DB = PatchDatabase.from_arrays(IMAGES, LABELS, ["cat", "dog", "<b>"])


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_images_are_shown_with_their_classes() -> None:
    pytest.importorskip("matplotlib")
    figure = DB.show(4, columns=3)
    assert titles(figure) == ["0: cat", "9: cat", "19: dog", "29: <b>"]
    shown = np.asarray(figure.axes[1].images[0].get_array())
    np.testing.assert_array_equal(shown[..., 0], IMAGES[9, 0])
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert titles(DB.show(indices=[7, 0])) == ["7: dog", "0: cat"]
    assert titles(DB.show(2, label="dog")) == ["1: dog", "28: dog"]
    assert len(titles(DB.show(100))) == 30
    plain = PatchDatabase.from_arrays(IMAGES)
    assert titles(plain.show(2)) == ["0", "29"]
    unnamed = PatchDatabase.from_arrays(IMAGES, LABELS)
    assert titles(unnamed.show(1, label=2)) == ["2: class 2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, "n=0"),
        ({"columns": 0}, "columns=0"),
        ({"indices": [30]}, "indices must be in 0..29"),
        ({"indices": []}, "indices is empty"),
        ({"indices": [1], "label": 0}, "not both"),
        ({"label": "cow"}, "no class is called 'cow'"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DB.show(**arguments)


def test_notebooks_show_some_images() -> None:
    html = DB._repr_html_()
    assert html.startswith("<div>PatchDatabase(30 images 1x5x7, 3 classes, path=&#x27;None&#x27;)")
    assert "data:image/png;base64," in html


def test_classes_have_names() -> None:
    assert DB.class_numbers("dog") == 1
    assert DB.class_numbers("DOG") == 1
    assert DB.class_numbers(["cat", 2]) == [0, 2]
    assert DB.class_numbers(2) == 2
    assert DB.class_numbers(None) is None
    with pytest.raises(ValueError, match="no class is called 'dogs'; there are dog, cat, <b>"):
        DB.class_numbers("dogs")
    with pytest.raises(ValueError, match="have no names; give a number"):
        PatchDatabase.from_arrays(IMAGES, LABELS).class_numbers("dog")
    two = PatchDatabase.from_arrays(IMAGES[:2], [0, 1], ["a", "A"])
    assert two.class_numbers("A") == 1
    many = PatchDatabase.from_arrays(IMAGES, np.arange(30), [f"name {i:02d}" for i in range(30)])
    with pytest.raises(ValueError, match=r"there are name 2\d") as caught:
        many.class_numbers("name 2x")
    assert str(caught.value).count("name") == 21
    assert str(caught.value).endswith(", ...")


def test_plain_numbers_in_are_plain_numbers_out() -> None:
    found = DB.locate(40)
    assert found == (1, 0, 5)
    assert {type(each) for each in found} == {int}
    address = DB.address(1, 0, 5)
    assert (address, type(address)) == (40, int)
    assert DB.locate(np.int64(40)) == (1, 0, 5)
    arrays = DB.locate([40])
    assert [each.tolist() for each in arrays] == [[1], [0], [5]]
    assert DB.address([1], 0, 5).tolist() == [40]
    assert DB.locate(np.array(40))[0].shape == ()
    with pytest.raises(ValueError, match="address must be in"):
        DB.locate(30 * 35)


def test_a_summary_has_a_short_hash() -> None:
    assert DB.summary == f"30 images 1x5x7, in memory, content {DB.content_hash[:12]}"
