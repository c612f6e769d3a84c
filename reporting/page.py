"""The HTML of a page: one file with its data, styles and scripts inside, which needs no network."""

import json
import os
import re
import time
from typing import Any

import jinja2

from reporting.evaluations import VERDICTS
from reporting.panels import AXES
from runtime.rows import SURROGATE

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page")
STYLES = ("vendor/uPlot.min.css", "page.css")
SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "vendor/diff.min.js",
    "app.js",
    "curves.js",
    "rollouts.js",
    "evaluation.js",
    "compare.js",
    "start.js",
)


def embedded(value: Any) -> str:
    """JSON for the inside of a <script> element: nothing in it can end the element or open a comment."""

    def escaped(match: re.Match) -> str:
        return f"\\u{ord(match[0]):04x}"

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return SURROGATE.sub(escaped, re.sub("[<>&\u2028\u2029]", escaped, text))


def html_page(runs: list[dict]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )

    def content_of(name: str) -> str:
        with open(os.path.join(FOLDER, name), encoding="utf-8") as f:
            return f.read()

    return environment.get_template("page.html").render(
        title=" | ".join(run["name"] for run in runs),
        data=embedded(dict(runs=runs, axes=AXES, verdicts=VERDICTS, made=time.time())),
        styles=[content_of(name) for name in STYLES],
        scripts=[content_of(name) for name in SCRIPTS],
    )
