"""The pages, their blocks of code, and the modules that make tables of them."""

import importlib
import re
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def text(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    """Code blocks of a page in one language, indentation of lists taken off."""
    return [textwrap.dedent(body) for _, kind, body in FENCE.findall(text(page)) if kind == language]


def with_blocks(language):
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


def docs_module(name):
    """A module of the folder of the docs, which is on the path as mkdocs puts it there."""
    if str(ROOT / "docs") not in sys.path:
        sys.path.insert(0, str(ROOT / "docs"))
    return importlib.import_module(name)
