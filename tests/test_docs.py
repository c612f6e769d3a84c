"""The documentation follows the code: quoted lines exist, links lead somewhere."""

import glob
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))]


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


def test_details_quote_lines_that_exist():
    quotes = re.findall(r"^`([\w/]+\.py)`: `(.+)`$", read("docs/details.md"), re.MULTILINE)
    assert len(quotes) >= 20
    missing = [(file, line) for file, line in quotes if line not in read(file)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    found = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(page))
    local = [link for link in found if not link.startswith(("http://", "https://"))]
    folder = os.path.dirname(os.path.join(ROOT, page))
    assert [link for link in local if not os.path.exists(os.path.join(folder, link))] == []
