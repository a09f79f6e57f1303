"""The pages of the site that are made from something else; mkdocs.yml names this file.

These are the reference of the commands, from the command line itself, the notebooks of examples/,
and files outside docs/ that pages link to.
"""

import os
import re
import tomllib
from pathlib import Path

import nbformat
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert.exporters import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor
from pygments.formatters import HtmlFormatter
from typer.cli import get_docs_for_click

from els.cli.app import command_line

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(ROOT.glob("examples/*.ipynb"))
# Seconds that a cell of a notebook may take.
CELL_TIMEOUT = 300


def on_startup(**_: object) -> None:
    """Show the packages to mkdocstrings where they will be installed, as `make types` does.

    At the start, since mkdocstrings looks once, before other hooks, for the folder that is there.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = ROOT / "build" / "types" / "els"
    packages.mkdir(parents=True, exist_ok=True)
    for folder in project["tool"]["setuptools"]["package-dir"].values():
        link = packages / folder
        if not link.is_symlink():
            link.symlink_to(ROOT / folder)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that are made here."""
    made: dict[str, str | bytes] = {
        "commands.md": command_reference(),
        "highlight.css": HtmlFormatter(style="default").get_style_defs(".codehilite"),
    }
    for page in files.documentation_pages():
        for name in re.findall(r"\]\(\.\./([^)\s#]+)", page.content_string):
            made[name] = (ROOT / name).read_text(encoding="utf-8")
    for notebook in EXAMPLES:
        made |= notebook_page(notebook, is_executed=os.environ.get("EXECUTE_EXAMPLES") == "1")
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of docs/ to files outside lead to their copies on the site."""
    return markdown if "/" in page.file.src_uri else markdown.replace("](../", "](")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn Sphinx's roles and literal blocks of docstrings into links and Markdown's own."""
    html = re.sub(r":[a-z]+:<code>[~.]?([\w.]+)</code>", _linked, html)
    return html.replace("::</p>", ":</p>")


def _linked(role: re.Match[str]) -> str:
    name = role[1]
    shown = f"<code>{name.rpartition('.')[2]}</code>"
    return f'<autoref optional identifier="{name}">{shown}</autoref>'


def command_reference() -> str:
    """The page of the commands, in Markdown."""
    command = typer.main.get_command(command_line())
    with typer.Context(command, info_name="els") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="els", title="Commands")
    # Each command has a section below.
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)
    return re.sub(r"^Examples?: (.*)$", _listed, text, flags=re.MULTILINE)


def _listed(examples: re.Match[str]) -> str:
    lines = examples[1].split("; ")
    return "\n".join(["**Examples**:\n", *(f"    {line}" for line in lines)])


def notebook_page(path: Path, *, is_executed: bool) -> dict[str, str | bytes]:
    """A notebook as a page in Markdown, with the pictures that it draws if it is executed."""
    notebook = nbformat.read(path, as_version=4)
    if is_executed:
        ExecutePreprocessor(timeout=CELL_TIMEOUT).preprocess(notebook)
        for cell in notebook.cells:
            if "outputs" in cell:
                cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    names = {"unique_key": path.stem}
    markdown, resources = MarkdownExporter().from_notebook_node(notebook, names)
    markdown = markdown.replace("](../docs/", "](../")
    pictures = {f"examples/{name}": content for name, content in resources["outputs"].items()}
    return {f"examples/{path.stem}.md": markdown, **pictures}
