"""Pages of the site that are made from the sources, so that they never say other than these; mkdocs calls the functions by their names."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from store import views
from tokentape.config import example

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = ROOT / "docs" / "screenshots"
"""Where `SCREENSHOTS=docs/screenshots pytest tests/test_page.py` leaves pictures; without them the pages are text."""
_SCREENSHOT = re.compile(r"^<!-- screenshot: (?P<name>[\w-]+) \| (?P<text>.+) -->$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#)(?P<path>[^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {
        "sql.md": sql_page(),
        "settings.md": f"# Settings\n\n```toml\n{example()}```\n",
        "notebook.md": notebook_page(ROOT / "docs" / "notebook.ipynb"),
        "architecture.md": _moved(ROOT / "ARCHITECTURE.md"),
        "changelog.md": _moved(ROOT / "CHANGELOG.md"),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put a picture where the page names one that was taken."""

    def picture(match: re.Match[str]) -> str:
        path = f"screenshots/{match['name']}.png"
        up = "../" * page.file.src_uri.count("/")
        return f"![{match['text']}]({up}{path})\n*{match['text']}*" if files.get_file_from_path(path) else ""

    return _SCREENSHOT.sub(picture, markdown)


def sql_page() -> str:
    """Every view, column by column."""
    lines = ["# The SQL schema", "", "Ids in `events` are BLOBs (`uuid_blob('…')`), in all other views text. Times are UTC.", ""]
    for view in views.describe():
        lines += [f"## {view.name}", "", f"{view.purpose[0].upper()}{view.purpose[1:]}.", "", "| column | type |", "|---|---|"]
        lines += [f"| `{name}` | {_type(kind)} |" for name, kind in view.columns]
        lines.append("")
    return "\n".join(lines)


def _type(kind: str) -> str:
    """A type, a long STRUCT folded away."""
    shown = f"`{kind.replace('|', chr(92) + '|')}`"
    return shown if len(kind) <= 60 else f"<details><summary>`{kind.partition('(')[0]}`</summary>{shown}</details>"


def notebook_page(path: Path) -> str:
    """A notebook's cells one after another; what they show is seen by running it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = ["".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```" for cell in cells]
    return "\n\n".join(parts) + "\n"


def _moved(path: Path) -> str:
    """A page of the root: its links lead to pages of the site, or are words where the site has none."""

    def link(match: re.Match[str]) -> str:
        target = match["path"].removeprefix("docs/")
        return f"]({target})" if (ROOT / "docs" / target.partition("#")[0]).is_file() else "]"

    return _LINK.sub(link, path.read_text(encoding="utf-8"))
