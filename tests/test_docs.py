"""The site of docs/: it builds without a warning, says what the sources say, loads nothing from elsewhere, and its runbooks are found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from store import views
from tests.program import ROOT
from tests.test_prometheus import ALERTS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})

    assert (ran.returncode, ran.stderr.strip()) == (0, "")
    return folder


def test_what_is_made_of_the_sources(site: Path) -> None:
    """Every view with every column, every section of the settings, and the cells of the notebook."""
    schema = unescape((site / "sql.html").read_text())

    assert all(
        f'id="{view.name}"' in schema and all(f"<code>{name}</code>" in schema for name, _ in view.columns) for view in views.describe()
    )
    assert "[gateway]" in re.sub("<[^>]+>", "", (site / "settings.html").read_text())
    assert "tape.begin" in re.sub("<[^>]+>", "", (site / "notebook.html").read_text())


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """No page has a script, a style, a font or a picture of another host."""
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    loads = {page.name: found for page, text in pages.items() if (found := re.findall(r'(?:src|<link[^>]+href)="https?://[^"]+"', text))}

    assert len(pages) > 12
    assert loads == {}


def test_alerts_lead_to_runbooks(site: Path) -> None:
    """The runbook that an alert names is a page, and the place in it is there."""
    named = {rule["annotations"]["runbook"] for rule in ALERTS if "runbook" in rule["annotations"]}

    assert named
    for runbook in named:
        path, _, place = runbook.removeprefix("docs/").partition("#")
        assert f'id="{place}"' in (site / path.replace(".md", ".html")).read_text()
