"""The page of els explain --html: what is in the file, and what a browser makes of it."""

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from els.engine import ScoreMachine
from els.explain import page as pages
from els.explain import replay as explain
from els.explain.explanation import Walkthrough
from els.explain.page import page, require_page, write_page
from els.explain.replay import explain_run, walk_run
from els.index import PatchDatabase, encode
from els.runs.folder import RunFolder, read_settings
from els.runs.run import sample_run
from els.runs.stores import RunError

RNG = np.random.default_rng(44)
COUNT, HEIGHT, WIDTH, STEPS, TOP = 7, 6, 9, 3, 4
# Names come from folders: anybody's.
NAMES = ["</script><script>document.title='broken'</script>", "<b>bold</b> & @DATA@"]
CASES = [
    pytest.param("ELS", "zeros", 1, id="ELS-zeros"),
    pytest.param("ELS", "circular", 3, id="ELS-circular"),
    pytest.param("LS", "circular", 1, id="LS-circular"),
    pytest.param("ES", "zeros", 1, id="ES"),
    pytest.param("IS", "zeros", 3, id="IS"),
]


@dataclass(frozen=True)
class Made:
    """A run of two samples, and the posterior of a step asked anew of the machine."""

    run: Path
    db: PatchDatabase

    def posterior(self, index: int, step: int, top: int = TOP) -> Any:
        settings = read_settings(self.run)
        machine = ScoreMachine(self.db, settings.machine, settings.boundary or "zeros", "torch")
        # Steps count from the noise, time from the clean end.
        schedule, t = settings.plan.schedule, (STEPS - step + 1) / STEPS
        with np.load(RunFolder(self.run).trajectory(index, ".npz")) as arrays:
            x = torch.from_numpy(arrays["x_t"][step - 1])
        return machine.posterior(
            x.unsqueeze(0),
            alpha=schedule.alpha(t),
            sigma=schedule.sigma(t),
            patch_size=settings.plan.patch_sizes and settings.plan.patch_sizes[STEPS - step],
            top=top,
        )


def make(path: Path, kind: str = "ELS", boundary: str = "zeros", channels: int = 1) -> Made:
    # The same whichever tests ran before.
    rng = np.random.default_rng(44)
    images = rng.integers(0, 256, (COUNT, channels, HEIGHT, WIDTH), dtype=np.uint8)
    labels = np.arange(COUNT) % 2
    db = PatchDatabase.build(images, labels, path=path / "db", class_names=NAMES)
    machine = ScoreMachine(db, kind, boundary, "torch")
    sizes = [3, 3, 5]
    sample_run(machine, path / "run", n=2, steps=STEPS, patch_sizes=sizes, trajectory=True)
    return Made(path / "run", db)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("page"))


class Page(HTMLParser):
    """The scripts of a page, and everything that could be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.references: list[str] = []
        self.title = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        self.references += [v or "" for name, v in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        if self._inside == "title":
            self.title += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def array(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def picture(uri: str) -> np.ndarray:
    kind, content = uri.split(",")
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    with Image.open(io.BytesIO(base64.b64decode(content))) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.mark.parametrize(("kind", "boundary", "channels"), CASES)
def test_a_walkthrough_is_what_the_machine_saw(kind, boundary, channels, tmp_path: Path) -> None:
    made = make(tmp_path, kind, boundary, channels)
    walkthrough, db = walk_run(made.run, 1, step=2, top=TOP)
    assert isinstance(walkthrough, Walkthrough)
    assert walkthrough.steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(walkthrough.values, RunFolder(made.run).load(1))
    with np.load(RunFolder(made.run).trajectory(1, ".npz")) as arrays:
        np.testing.assert_array_equal(walkthrough.noisy, arrays["x_t"])
        np.testing.assert_array_equal(walkthrough.predicted, arrays["predicted"])
    for row, step in enumerate(walkthrough.steps):
        # The run's own float64 x_t is rounded in the file: weights move by as little.
        post = made.posterior(1, int(step))
        np.testing.assert_array_equal(walkthrough.addresses[row], post.top_addresses[0])
        np.testing.assert_allclose(walkthrough.weights[row], post.top_weights[0], atol=1e-6)
        np.testing.assert_allclose(
            walkthrough.effective_patches[row], post.effective_patches[0], rtol=1e-5
        )
    explanation, _ = explain_run(made.run, 1)
    np.testing.assert_array_equal(
        np.stack(db.locate(walkthrough.addresses[..., 0]), -1), explanation.heaviest
    )


def test_the_file_holds_the_walkthrough(made: Made, tmp_path: Path) -> None:
    walkthrough, db = walk_run(made.run, 0, step=2, top=TOP)
    write_page(walkthrough, db, tmp_path / "new" / "page.html")
    parsed = Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    data = parsed.data
    assert parsed.title == "Where sample 0 came from"
    assert data["classNames"] == NAMES
    assert data["opensAt"] == 1
    shape = (STEPS, HEIGHT, WIDTH, TOP)
    np.testing.assert_array_equal(array(data["weights"], "<f4", *shape), walkthrough.weights)
    np.testing.assert_array_equal(
        array(data["effective"], "<f4", *shape[:3]), walkthrough.effective_patches
    )
    place, pixel = (array(data[name], "<i4", *shape) for name in ("place", "pixel"))
    numbers = np.array(data["numbers"])
    np.testing.assert_array_equal(numbers[place] * HEIGHT * WIDTH + pixel, walkthrough.addresses)
    assert data["labels"] == db.labels[numbers].tolist()
    # Every image once: those of heaviest patches first, and of them those that weigh most.
    assert len(set(data["numbers"])) == len(data["numbers"])
    assert (data["leftOut"], data["weightShown"]) == (0, 1)
    carried = np.bincount(place.ravel(), walkthrough.weights.ravel())
    first = np.isin(np.arange(len(carried)), place[..., 0])
    assert (np.diff(first.astype(int)) <= 0).all()
    assert (np.diff(carried[first]) <= 1e-12).all()
    assert (np.diff(carried[~first]) <= 1e-12).all()
    sprite, columns = picture(data["sprite"]), data["spriteColumns"]
    for index, number in enumerate(numbers):
        y, x = index // columns * HEIGHT, index % columns * WIDTH
        tile = sprite[y : y + HEIGHT, x : x + WIDTH]
        np.testing.assert_array_equal(tile, np.moveaxis(db.images[number][[0, 0, 0]], 0, -1))
    for name in ("noisy", "predicted"):
        strip = picture(data[name]).reshape(STEPS, HEIGHT, WIDTH, 3)
        np.testing.assert_array_equal(strip[..., 0], encode(getattr(walkthrough, name))[:, 0])
    n, y, x = db.locate(walkthrough.addresses[..., 0])
    mosaic = picture(data["mosaic"]).reshape(STEPS, HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(mosaic[..., 0], db.images[n, 0, y, x])
    shared = picture(data["shared"]).reshape(STEPS, HEIGHT, WIDTH, 3).astype(int)
    # magma: the brighter the more.
    least, most = (f(walkthrough.effective_patches) for f in (np.argmin, np.argmax))
    assert shared.sum(-1).flat[least] < shared.sum(-1).flat[most]


def test_the_file_is_all_there_is(made: Made) -> None:
    text = page(*walk_run(made.run, 0, top=TOP))
    parsed = Page(text)
    assert len(parsed.scripts) == 2
    assert parsed.references == []
    # The name of SVG's elements is an address that is never fetched.
    assert set(re.findall(r"https?://[^\"'\s<]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "url(" not in text


def test_patches_of_images_that_do_not_fit_are_left_out(made: Made, monkeypatch) -> None:
    walkthrough, db = walk_run(made.run, 0, top=TOP)
    monkeypatch.setattr(pages, "MOST_EMBEDDED_PIXELS", 3 * HEIGHT * WIDTH)
    data = Page(page(walkthrough, db)).data
    n, _, _ = db.locate(walkthrough.addresses)
    assert len(data["numbers"]) == 3
    assert data["leftOut"] == len(np.unique(n)) - 3 > 0
    heaviest = np.bincount(n.ravel(), walkthrough.weights.ravel())
    heaviest[~np.isin(np.arange(COUNT), n[..., 0])] = 0
    assert data["numbers"] == np.argsort(-heaviest, kind="stable")[:3].tolist()
    place = array(data["place"], "<i4", *n.shape)
    # What a page names is in it.
    assert place.max() == 2
    np.testing.assert_array_equal(place >= 0, np.isin(n, data["numbers"]))
    carried = walkthrough.weights[place >= 0].sum() / walkthrough.weights.sum()
    assert data["weightShown"] == pytest.approx(carried, rel=1e-5)
    assert len(picture(data["sprite"])) == 2 * HEIGHT


def test_many_images_are_compressed(made: Made, monkeypatch) -> None:
    walkthrough, db = walk_run(made.run, 0, top=TOP)
    whole = Page(page(walkthrough, db)).data
    assert whole["sprite"].startswith("data:image/png")
    monkeypatch.setattr(pages, "_MOST_LOSSLESS", 10)
    # So small that even pictures of a few pixels are smaller than their PNG.
    monkeypatch.setattr(pages, "_JPEG_QUALITY", 1)
    small = Page(page(walkthrough, db)).data
    assert small["sprite"].startswith("data:image/jpeg")
    assert len(small["sprite"]) < len(whole["sprite"])
    assert picture(small["sprite"]).shape == picture(whole["sprite"]).shape
    # The other pictures are kept as they are, and so are these where JPEG takes more.
    assert small["noisy"] == whole["noisy"]
    monkeypatch.setattr(pages, "_JPEG_QUALITY", 100)
    assert Page(page(walkthrough, db)).data["sprite"] == whole["sprite"]


def test_a_page_opens_at_the_step_that_the_fewest_patches_share(made: Made) -> None:
    walkthrough, db = walk_run(made.run, 1, top=TOP)
    shared = np.log(walkthrough.effective_patches.astype(float)).mean((1, 2))
    assert walkthrough.step == walkthrough.steps[shared.argmin()]
    data = Page(page(walkthrough, db)).data
    row = int(shared.argmin())
    assert data["opensAt"] == row
    # And at the pixel whose patch varies most, as far as it lies in the image.
    reach = int(walkthrough.patch_sizes[row]) // 2
    padded = np.pad(walkthrough.predicted[row, 0].astype(float), reach, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2)
    spread = np.nansum((windows - np.nanmean(windows, (2, 3), keepdims=True)) ** 2, (2, 3))
    assert data["pixelAtFirst"] == list(np.unravel_index(spread.argmax(), spread.shape))


def test_the_size_of_a_page_is_bounded_by_its_pixels() -> None:
    # Of 60,000 images of 28 x 28, those that fit.
    assert pages.MOST_EMBEDDED_PIXELS // 28**2 == 20_408


def test_steps_are_left_out_where_there_are_too_many(tmp_path: Path, monkeypatch) -> None:
    images = RNG.integers(0, 256, (2, 4, 4), dtype=np.uint8)
    db = PatchDatabase.build(images, path=tmp_path / "db")
    sample_run(ScoreMachine(db, "IS", backend="torch"), tmp_path / "run", n=1, steps=30)
    whole, _ = walk_run(tmp_path / "run", 0, step=9)
    assert whole.steps.tolist() == list(range(1, 31))
    monkeypatch.setattr(explain, "MOST_ENTRIES", 8 * 16 * 2)
    some, _ = walk_run(tmp_path / "run", 0, step=9, top=2)
    assert len(some.steps) <= 8
    assert {30, 9, 1} <= set(some.steps.tolist())
    rows = some.steps - 1
    np.testing.assert_array_equal(some.noisy, whole.noisy[rows])
    np.testing.assert_array_equal(some.weights, whole.weights[rows][..., :2])
    # Two images: two candidates, and nothing in the places beyond.
    assert (whole.addresses[..., 2:] == -1).all()
    assert array(Page(page(whole, db)).data["place"], "<i4", -1).min() == -1
    with pytest.raises(ValueError, match=r"top=6 is out of range 1 to 5 .* 4 x 4"):
        walk_run(tmp_path / "run", 0, top=6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"index": 2}, "sample 2", id="no-sample"),
        pytest.param({"step": 4}, "step=4", id="step"),
        pytest.param({"top": 0}, "top=0", id="top"),
        pytest.param({"database": "gone"}, "no database at gone", id="no-database"),
    ],
)
def test_wrong_arguments_are_refused(made: Made, options, words: str) -> None:
    with pytest.raises((ValueError, RunError), match=words):
        walk_run(made.run, **({"index": 0} | options))


def test_only_pages_are_written() -> None:
    with pytest.raises(ValueError, match=r"\.html"):
        require_page("why.png")


# In a browser.


@dataclass(frozen=True)
class Browser:
    """A headless Chromium at a page."""

    driver: Any

    def open(self, path: Path, *, is_dark: bool = False, width: int = 1200) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.errors()  # those of the page before
        self.driver.get(path.as_uri())
        self.wait(lambda: self.run("return document.documentElement.dataset.ready") == "yes")

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], bool]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda _: condition())

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text.replace("\u00a0", " ")

    def press(self, *keys: str, at: str = "#sample") -> None:
        for key in keys:
            self.find(at).send_keys(key)

    def point(self, y: int, x: int, *, kind: str = "mouse", click: bool = False) -> None:
        """Move the mouse, or a finger, to the middle of a pixel."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        box = self.run(
            "document.querySelector('#sample').scrollIntoView({block: 'center'});"
            "const b = document.querySelector('#sample canvas').getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height]"
        )
        left, top, wide, tall = box
        place = (round(left + (x + 0.5) * wide / WIDTH), round(top + (y + 0.5) * tall / HEIGHT))
        actions = ActionBuilder(self.driver, mouse=PointerInput(kind, kind))
        actions.pointer_action.move_to_location(*place)
        if click:
            actions.pointer_action.click()
        actions.perform()

    def rows(self) -> list[dict[str, float]]:
        """The numbers that are shown of every patch."""
        shown = []
        for row in self.driver.find_elements("css selector", "#patches .words"):
            if row.is_displayed():
                words = row.text.replace("\u00a0", " ").replace("\u2212", "-")
                number = r"([-+]?[\d.]+(?:e[-+]\d+)?)"
                pattern = rf"{number} %\nimage {number}, .*\nfrom row {number}, column {number}: .*"
                found = re.fullmatch(rf"{pattern}\(dy {number}, dx {number}\)", words)
                assert found, words
                names = ("percent", "image", "y", "x", "dy", "dx")
                shown.append(dict(zip(names, map(float, found.groups()), strict=True)))
        return shown

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # root, as in a container, has no sandbox.
    for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield Browser(started)
    started.quit()


@pytest.fixture(scope="module")
def written(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "page.html"
    write_page(*walk_run(made.run, 1, step=2, top=TOP), path)
    return path


def held_back(path: Path, made: Made) -> Path:
    """A page whose pictures are decoded only when ``release()`` is called."""
    write_page(*walk_run(made.run, 1, top=TOP), path)
    script = (
        "const held = [], descriptor = Object.getOwnPropertyDescriptor(Image.prototype, 'src');"
        "Object.defineProperty(HTMLImageElement.prototype, 'src', {set(value) {"
        "  held.push(() => descriptor.set.call(this, value)); }});"
        "window.release = () => held.forEach((go) => go());"
    )
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"use strict";', f'"use strict";{script}', 1), encoding="utf-8")
    return path


def require_shown(browser: Browser, made: Made, step: int, y: int, x: int) -> None:
    """What the page shows of a pixel is what the machine says, to the digits that are shown."""
    post = made.posterior(1, step)
    assert browser.text("#where").startswith(f"Pixel in row {y}, column {x}")
    assert browser.text("#level").lower().startswith(f"step {step} of {STEPS}")
    effective = float(browser.text("#summary").split()[0].replace(",", ""))
    assert effective == pytest.approx(float(post.effective_patches[0, y, x]), rel=5e-3)
    rows = browser.rows()
    n, row, column = made.db.locate(post.top_addresses[0, y, x].numpy())
    assert [shown["image"] for shown in rows] == n.tolist()
    assert [(shown["y"], shown["x"]) for shown in rows] == list(zip(row, column, strict=True))
    assert [(shown["dy"], shown["dx"]) for shown in rows] == list(
        zip(row - y, column - x, strict=True)
    )
    weights = post.top_weights[0, y, x].numpy()
    assert [shown["percent"] for shown in rows] == pytest.approx(100 * weights, rel=5e-2, abs=1e-6)
    large = weights > 1e-3
    np.testing.assert_allclose(
        np.array([shown["percent"] for shown in rows])[large], 100 * weights[large], rtol=6e-3
    )


def test_a_person_explores(browser: Browser, made: Made, written: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(written)
    assert browser.driver.title == "Where sample 1 came from"
    data = Page(written.read_text(encoding="utf-8")).data
    require_shown(browser, made, 2, *data["pixelAtFirst"])
    browser.point(1, 2)
    require_shown(browser, made, 2, 1, 2)
    # Held: the mouse goes on, the pixel stays.
    browser.point(4, 7, click=True)
    browser.point(0, 0)
    require_shown(browser, made, 2, 4, 7)
    assert browser.text("#where").endswith("(held)")
    browser.press(Keys.ESCAPE)
    assert not browser.text("#where").endswith("(held)")
    browser.point(0, 0)
    require_shown(browser, made, 2, 0, 0)
    # A corner has the corners alone for candidates.
    assert {(row["dy"], row["dx"]) for row in browser.rows()} == {(0, 0)}
    # Keys: over the pixels, stopping at the border, and over the steps.
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.ARROW_UP)
    require_shown(browser, made, 2, 0, 2)
    browser.press(Keys.END, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    require_shown(browser, made, 2, 1, WIDTH - 1)
    browser.press("[")
    require_shown(browser, made, 1, 1, WIDTH - 1)
    assert not browser.find("#earlier").is_enabled()
    browser.press("]", "]", "]")
    require_shown(browser, made, 3, 1, WIDTH - 1)
    browser.find("#earlier").click()
    require_shown(browser, made, 2, 1, WIDTH - 1)
    # The slider moves right as the number rises.
    left = int(browser.find("#step").get_attribute("value"))
    browser.press(Keys.ARROW_RIGHT, at="#step")
    assert int(browser.find("#step").get_attribute("value")) == left + 1
    require_shown(browser, made, 3, 1, WIDTH - 1)
    assert browser.find("#step").get_attribute("aria-valuetext").startswith("step 3 of 3")
    best = browser.rows()[0]
    expected = f"Row 1, column {WIDTH - 1}, step 3. Heaviest patch: "
    live = "return document.querySelector('#live').textContent.replaceAll('\\u00a0', ' ')"
    browser.wait(lambda: browser.run(live).startswith(expected))
    assert f"image {best['image']:.0f}, " in browser.run(live)
    assert browser.errors() == []


@pytest.mark.parametrize("canvas", [(10, 21), (5, 7)])
def test_a_canvas_of_another_size(
    browser: Browser, made: Made, tmp_path: Path, canvas: tuple[int, int]
) -> None:
    machine = ScoreMachine(made.db, "ELS", "zeros", "torch")
    sample_run(machine, tmp_path / "run", n=1, steps=2, patch_sizes=3, canvas=canvas)
    walkthrough, db = walk_run(tmp_path / "run", 0, top=TOP)
    write_page(walkthrough, db, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    data = Page((tmp_path / "page.html").read_text(encoding="utf-8")).data
    y, x = data["pixelAtFirst"]
    n, row, column = db.locate(walkthrough.addresses[data["opensAt"], y, x])
    shown = browser.rows()
    assert [patch["image"] for patch in shown] == n.tolist()
    assert [(patch["y"], patch["x"]) for patch in shown] == list(zip(row, column, strict=True))
    assert browser.errors() == []


def test_everything_is_reached_by_the_keyboard(browser: Browser, written: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(written)
    reached, rings = [], []
    browser.find("body").send_keys(Keys.TAB)
    for _ in range(5):
        focus = "const e = document.activeElement; return [e.id || e.name, "
        ring = "(e.name === 'view' ? e.nextElementSibling : e)"
        name, style = browser.run(f"{focus} getComputedStyle({ring}).outlineStyle]")
        reached.append(name)
        rings.append(style)
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert reached == ["view", "sample", "earlier", "step", "later"]
    assert set(rings) == {"solid"}
    assert browser.find("#sample").aria_role == "application"
    assert browser.find("#sample").accessible_name == "Pixels of the sample"
    assert browser.find("#live").get_attribute("aria-live") == "polite"


def test_a_finger_taps(browser: Browser, made: Made, written: Path) -> None:
    browser.open(written, width=375)
    browser.point(2, 3, kind="touch", click=True)
    require_shown(browser, made, 2, 2, 3)
    assert "(held)" not in browser.text("#where")
    browser.point(5, 8, kind="touch", click=True)
    require_shown(browser, made, 2, 5, 8)
    assert browser.run("return document.documentElement.scrollWidth") <= 375
    assert browser.errors() == []


def shown_pixels(browser: Browser) -> np.ndarray:
    """Where the big picture has its pixels' middles, ``[H, W, 3]``; the chosen one is marked."""
    values = browser.run(
        "const c = document.querySelector('#sample canvas'), [h, w] = arguments;"
        "const all = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, out = [];"
        "for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {"
        "  const at = 4 * (Math.floor((y + 0.5) * c.height / h) * c.width"
        "    + Math.floor((x + 0.5) * c.width / w)); out.push(...all.slice(at, at + 3)); }"
        "return out;",
        HEIGHT,
        WIDTH,
    )
    return np.array(values).reshape(HEIGHT, WIDTH, 3)


def test_four_pictures_of_a_step(browser: Browser, made: Made, written: Path) -> None:
    walkthrough, db = walk_run(made.run, 1, step=2, top=TOP)
    n, y, x = db.locate(walkthrough.addresses[1, ..., 0])
    browser.open(written)
    grey = {
        "predicted": encode(walkthrough.predicted[1, 0]),
        "noisy": encode(walkthrough.noisy[1, 0]),
        "mosaic": db.images[n, 0, y, x],
    }
    for name, expected in grey.items():
        browser.run("arguments[0].click()", browser.find(f"[value={name}]"))
        np.testing.assert_array_equal(shown_pixels(browser)[..., 0], expected)
        assert not browser.find("#legend").is_displayed()
    browser.run("arguments[0].click()", browser.find("[value=shared]"))
    assert browser.find("#legend").is_displayed()
    most = float(browser.text("#most").replace(",", ""))
    assert most == pytest.approx(walkthrough.effective_patches.max(), rel=5e-3)


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
def test_words_stand_out(browser: Browser, written: Path, is_dark: bool, width: int) -> None:
    browser.open(written, is_dark=is_dark, width=width)
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    for selector in ("h1", "#lede", "#caption", "#summary", ".offset", ".image", "#limits"):
        ink = browser.run(
            "return getComputedStyle(document.querySelector(arguments[0])).color", selector
        )
        # WCAG 2.1, level AA.
        assert contrast(ink, ground) >= 4.5, selector
    luminous = luminance(ground)
    assert luminous < 0.1 if is_dark else luminous > 0.8
    assert browser.run("return document.documentElement.scrollWidth") <= width


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return math.fsum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def drawn_in(browser: Browser, canvas: Any) -> list[int]:
    """The bytes of a canvas."""
    return browser.run(
        "const c = arguments[0];"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]",
        canvas,
    )


def test_a_resize_before_the_pictures_are_decoded(
    browser: Browser, made: Made, tmp_path: Path
) -> None:
    path = held_back(tmp_path / "held.html", made)
    browser.errors()
    browser.driver.get(path.as_uri())
    for width in (900, 390, 1200):
        size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.run("window.dispatchEvent(new Event('resize'))")
    browser.press("]", at="body")
    assert browser.text("#lede").startswith("Drawn by the ELS machine")
    assert browser.run("return document.documentElement.dataset.ready") is None
    browser.run("window.release()")
    browser.wait(lambda: browser.run("return document.documentElement.dataset.ready") == "yes")
    assert len(set(drawn_in(browser, browser.find("#sample canvas")))) > 2
    assert browser.rows()
    assert browser.errors() == []


def test_pictures_that_a_browser_cannot_decode_are_said(
    browser: Browser, made: Made, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    write_page(*walk_run(made.run, 1, top=TOP), path)
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'"sprite":"[^"]*"', '"sprite":"data:image/none;base64,AA"', text))
    browser.driver.get(path.as_uri())
    browser.wait(lambda: "cannot decode" in browser.text("#lede"))
    browser.errors()


def test_on_a_phone_the_patches_are_in_sight(browser: Browser, written: Path) -> None:
    browser.open(written, width=390)
    for selector in ("#sample", "#step", "#where", "#summary", "#patches li"):
        bottom = browser.run(
            "return document.querySelector(arguments[0]).getBoundingClientRect().bottom", selector
        )
        assert bottom <= 844, selector
    # What explains them comes after.
    tops = [
        browser.run(
            "return document.querySelector(arguments[0]).getBoundingClientRect().top", selector
        )
        for selector in ("h1", "#sample", "#patches", "#caption", "#lede", "#limits")
    ]
    assert tops == sorted(tops)


def test_one_is_singular(browser: Browser, tmp_path: Path) -> None:
    db = PatchDatabase.build(
        RNG.integers(0, 256, (1, 1, HEIGHT, WIDTH), dtype=np.uint8), path=tmp_path / "db"
    )
    sample_run(ScoreMachine(db, "IS", backend="torch"), tmp_path / "run", n=1, steps=1)
    write_page(*walk_run(tmp_path / "run", 0, top=1), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert "from 1 training image. " in browser.text("#lede")
    assert browser.text("#summary") == (
        "1 image effectively makes it; this one carries 100 % of the weight."
    )
    words = browser.text("#limits")
    assert "Each pixel has its heaviest image at each step, from 1 training image," in words


@pytest.mark.parametrize(("kind", "boundary", "channels"), CASES)
def test_every_machine_has_a_page(
    browser: Browser, kind, boundary, channels, tmp_path: Path, monkeypatch
) -> None:
    made = make(tmp_path, kind, boundary, channels)
    most = 6 if kind in ("LS", "ELS") else 3
    monkeypatch.setattr(pages, "MOST_EMBEDDED_PIXELS", most * HEIGHT * WIDTH)
    write_page(*walk_run(made.run, 1, step=2, top=TOP), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.point(0, 8)
    explanation, _ = explain_run(made.run, 1)
    best = browser.rows()[0]
    assert best["image"] == explanation.heaviest[1, 0, 8, 0]
    # ES moves images around: the shorter way.
    assert [best["dy"], best["dx"]] == explanation.offsets()[1, 0, 8].tolist()
    compared = browser.find("#query").is_displayed()
    assert compared == (kind in ("LS", "ELS"))
    words = browser.text("#limits")
    assert f"from {most} training images, all in this page. Those from " in words
    assert "did not fit and are left out" in words
    data = Page((tmp_path / "page.html").read_text(encoding="utf-8")).data
    assert {shown["image"] for shown in browser.rows()} <= set(data["numbers"])
    for canvas in browser.driver.find_elements("css selector", "#patches canvas"):
        if canvas.is_displayed():
            assert len(set(drawn_in(browser, canvas))) > 1
    # Names are text, whatever is in them.
    assert any(name in browser.text("#patches") for name in NAMES)
    assert browser.driver.title == "Where sample 1 came from"
    assert browser.errors() == []
