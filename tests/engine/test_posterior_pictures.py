"""`post.show` and `machine.explain`: figures that hold what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from els.engine import ScoreMachine, SmoothedDenoiser
from els.index import PatchDatabase

matplotlib = pytest.importorskip("matplotlib")

RNG = np.random.default_rng(7)
IMAGES = RNG.integers(0, 256, (40, 3, 8, 10), dtype=np.uint8)
NAMES = ["cat", "b\udcff", "$x_1$"]
DB = PatchDatabase.from_arrays(IMAGES, np.arange(40) % 3, NAMES)
MACHINE = ScoreMachine(DB, backend="torch")
NOISE = {"alpha": 0.9, "sigma": 0.4}
X = torch.from_numpy(RNG.standard_normal((2, 3, 8, 10))).float()


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def drawn(figure) -> bytes:
    png = figure._repr_png_()
    assert png.startswith(b"\x89PNG")
    return png


def test_a_posterior_is_shown() -> None:
    post = MACHINE.posterior(X, **NOISE, patch_size=3)
    figure = post.show(1)
    entropy = float(post.effective_patches[1].double().log().mean())
    assert titles(figure) == [
        "noisy image\nalpha 0.9, sigma 0.4",
        "posterior mean\nELS zeros P=3",
        f"effective patches\nentropy {entropy:.3g} nats on average",
    ]
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(shown), -1, 0) / 127.5 - 1, post.mean[1], atol=1 / 127
    )
    effective = figure.axes[2].images[0]
    assert isinstance(effective.norm, matplotlib.colors.LogNorm)
    np.testing.assert_allclose(effective.get_array(), post.effective_patches[1], rtol=1e-6)
    drawn(figure)
    with pytest.raises(ValueError, match="i=2 is out of range 0 to 1"):
        post.show(2)


def test_what_was_not_computed_is_not_shown() -> None:
    assert len(MACHINE.posterior(X, **NOISE, patch_size=3, entropy=False).show().axes) == 2
    post = MACHINE.posterior(X, **NOISE, patch_size=3, mode="subset", subset=32)
    error = float(post.expected_error[0].double().mean())
    assert titles(post.show())[-1] == f"expected error of the mean\n{error:.2g} on average"


@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_a_pixel_is_explained(boundary: str) -> None:
    machine = ScoreMachine(DB, "ELS", boundary, "torch")
    figure = machine.explain(X[:1], **NOISE, patch_size=5, pixel=(0, 9), top=3)
    post = machine.posterior(X[:1], **NOISE, patch_size=5, top=3)
    weights = post.top_weights[0, 0, 9].tolist()
    images, rows, columns = DB.locate(post.top_addresses[0, 0, 9].numpy())
    found = titles(figure)[3:]
    assert found[0] == "noisy"
    panels = [axes for axes in figure.axes if axes.get_title() in found[1:]]
    for panel, weight, image, row, column in zip(
        panels, weights, images, rows, columns, strict=True
    ):
        name = ["cat", "b?", "$x_1$"][image % 3]
        assert panel.get_title() == f"{weight:.1%}\nimage {image}\n{name}"
        # The patch's centre is the pixel that it gives.
        cut = np.asarray(panel.images[0].get_array())
        assert cut.shape == (5, 5, 3)
        np.testing.assert_array_equal(cut[2, 2], IMAGES[image, :, row, column])
    drawn(figure)


@pytest.mark.parametrize("kind", ["IS", "ES", "PCA", "nearest"])
def test_whole_images_are_explained(kind: str) -> None:
    figure = ScoreMachine(DB, kind, backend="torch").explain(X[0], **NOISE, top=2)
    assert titles(figure)[1] == f"posterior mean\n{kind}"
    drawn(figure)


def test_what_cannot_be_explained_is_refused() -> None:
    for arguments, words in (
        ({"x": X}, "x must be one image"),
        ({"x": X[:1], "pixel": (8, 0)}, r"pixel=\(8, 0\) is outside the image of 8 x 10"),
        ({"x": X[:1], "top": 0}, "top=0 must be an integer from 1"),
        ({"x": X[:1], "labels": "dog"}, "no class is called 'dog'; there are cat"),
    ):
        with pytest.raises(ValueError, match=words):
            MACHINE.explain(**NOISE, patch_size=3, **arguments)
    with pytest.raises(ValueError, match="Wiener filter weighs no patches"):
        ScoreMachine(DB, "Wiener").explain(X[:1], **NOISE)
    with pytest.raises(ValueError, match="explain its machine's"):
        SmoothedDenoiser(MACHINE, std=0.1).explain(X[:1], **NOISE)


def test_notebooks_show_a_posterior() -> None:
    html = MACHINE.posterior(X, **NOISE, patch_size=3)._repr_html_()
    assert html.startswith("<div>LocalPosterior(ELS zeros P=3, 2 images 3x8x10")
    assert 'src="data:image/png;base64,' in html


def test_without_matplotlib_one_error_names_the_remedy(monkeypatch, tmp_path: Path) -> None:
    post = MACHINE.posterior(X, **NOISE, patch_size=3)
    for name in list(sys.modules):
        if name == "els.index.notebook_figure" or name.partition(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        post.show,
        DB.show,
        lambda: MACHINE.explain(X[:1], **NOISE, patch_size=3),
    ):
        with pytest.raises(RuntimeError, match="pip install matplotlib"):
            draw()


def test_names_are_taken_in_any_case() -> None:
    machine = ScoreMachine(DB, "els", "ZEROS", backend="Torch")
    assert (machine.kind, machine.boundary, machine.backend_name) == ("ELS", "zeros", "torch")
    post = machine.posterior(X, **NOISE, patch_size=3, mode="Subset", subset=32)
    assert set(post.modes) <= {"subset", "exact"}
    by_name = machine.posterior(X, **NOISE, patch_size=3, labels="CAT").mean
    assert torch.equal(by_name, machine.posterior(X, **NOISE, patch_size=3, labels=0).mean)
    for arguments in ({"boundary": "round"}, {"backend": "numpy"}, {"kind": "GAN"}):
        with pytest.raises(ValueError, match="is not known"):
            ScoreMachine(DB, **arguments)
