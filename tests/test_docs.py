"""The documentation: links lead somewhere, commands and their options exist, Python compiles."""

import re
from pathlib import Path

import pytest
from test_snapshots import commands

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def heading_anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in heading_anchors(path), target


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:[a-z_]+/)+[\w.-]+\.\w+)`", page.read_text(encoding="utf-8"))
    made_by_users = ("demo/", "db/", "samples/", "shards/", "trajectory/", "bench/results/gpu")
    for name in named:
        assert name.startswith(made_by_users) or (ROOT / name).exists(), name


@every_page
def test_commands_exist(page: Path) -> None:
    known = commands()
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    for line in lines:
        match = re.search(r"(?:^\s*|`|/)(els|torchrun .*-m els.engine) ([a-z]+)([^`#]*)", line)
        if match is None or match[2] == "and":
            continue
        _, command, rest = match.groups()
        options = known[f"els {command}"].values()
        spellings = {spelling for option in options for spelling in option["spellings"]}
        used = {word.partition("=")[0] for word in rest.split() if re.match(r"--?[a-z]", word)}
        assert used <= spellings | {"--help"}, line


@every_page
def test_python_compiles(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        compile(block, str(page), "exec")
