"""The documentation follows the code: named functions exist, defaults are equal, links lead somewhere."""

import functools
import glob
import importlib
import json
import os
import re
import shlex

import pytest
from conftest import run_script

from results.make import one_step
from runtime.rows import write_rows

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md", "AGENTS.md", "CONTRIBUTING.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))]


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


def test_details_name_functions_that_exist():
    names = re.findall(r"^`([\w/]+\.py)`: `(\w+)`$", read("docs/details.md"), re.MULTILINE)
    assert len(names) == len(re.findall(r"^\*\*\d+\. ", read("docs/details.md"), re.MULTILINE)) >= 28
    names += re.findall(r"\| `(\w+\.py)`: `(\w+)` \|$", read("docs/method.md"), re.MULTILINE)  # its table of equations
    missing = [
        (file, name) for file, name in names if not re.search(rf"^(def|class) {name}\b", read(file), re.MULTILINE)
    ]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, "docs/ten_steps.ipynb"])
def test_links_lead_somewhere(page):
    """To a file that exists, and where a heading is named, to a heading that it has."""
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", read(page))
    missing = []
    for file, heading in links:
        if file.startswith(("http://", "https://")):
            continue
        target = os.path.normpath(os.path.join(os.path.dirname(page), file)) if file else page
        if not os.path.exists(os.path.join(ROOT, target)):
            missing.append(file)
        elif heading and heading not in headings(target):
            missing.append(f"{file}#{heading}")
    assert missing == []


def headings(page):
    """The headings of a page, as GitHub writes them in an address."""
    titles = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_one_step_is_told_from_a_run(tmp_path):
    """The edit that gained most, of those whose tokens were kept; what it inserted has p, q and r beside it."""
    scores = dict(helpfulness=1, personalization=1, naturalness=1)

    def rollout(name, gain):
        edit = dict(answer="Drink tea now.", reward=1.0 + gain, **scores)
        row = dict(
            prompt_id=name,
            sample_id=0,
            persona={"drink": "tea"},
            question="What to drink?",
            checks="drink tea wine wrong",
            critique="Say tea.",
        )
        return row | dict(answer="Drink now.", reward=1.0, edit=edit, **scores)

    def tokens(name, edit):
        text = ["Drink", " tea", " |now", "."] if edit else ["Drink", " now", "."]
        figures = dict(
            logp=[-0.5] * len(text), logq=[-0.25] * len(text), weight=[0.8] * len(text), advantage=[1.5] * len(text)
        )
        row = dict(prompt_id=name, sample_id=0, edit=edit, text=text, **figures)
        return row | ({"kept": [True, False, False, True]} if edit else {})

    names = ("a", "b", "c")
    write_rows(
        str(tmp_path / "rollouts" / "step_000002.jsonl"), [rollout(n, g) for n, g in zip(names, (0.5, 2.0, 3.0))]
    )
    write_rows(str(tmp_path / "tokens" / "step_000002.jsonl"), [tokens(n, e) for n in "ab" for e in (False, True)])
    settings = dict(edit_loss="unclipped", edit_baseline="batch", n_samples=4, score_weights=[0.35, 0.4, 0.25])
    (tmp_path / "args.json").write_text(json.dumps(settings))
    text = one_step.page(str(tmp_path))
    assert "> drink tea wine wrong\n>\n> Say tea." in text
    assert (
        "--step 2 >" in text
        and "Prompt b," in text
        and "Drink **tea** now." in text
        and "+1.50 on the first token" in text
    )
    assert "|  tea | 0.6065 | 0.7788 | 0.7788 | 0.8000 | +1.50 |" in text and r"\|now" in text
    with pytest.raises(ValueError, match="no edit from step 3 on"):
        one_step.page(str(tmp_path), 3)


# -- commands: each `python SCRIPT.py ...` of the pages is one that the script takes ----------------------------------


def commands(page):
    """The commands of indented and fenced lines and of table cells, without comments, with what they continue on."""
    text = re.sub(r"\\\n\s*", " ", read(page))
    found = re.findall(r"^(?:    |\$ )((?:[A-Z_]+=\S+ )*(?:python|torchrun|bash) .*)$", text, re.MULTILINE)
    found += re.findall(r"`((?:[A-Z_]+=\S+ )*(?:python|bash) [^`]*)`", text)
    return [re.split(r"\s+#|\s[>|]\s", command)[0].strip() for command in found]


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


def test_commands_are_found():
    assert "bash recipes/tiny.sh" in COMMANDS and any(c.startswith("torchrun") for c in COMMANDS) and len(COMMANDS) > 25


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_its_script_takes(command):
    """The script exists and has the flags that are named. What a page runs with data of the reader's own cannot be run
    here; recipes/tiny.sh, which .ci/run runs, has every stage with real data."""
    words = [w for w in shlex.split(command) if not re.match(r"^[A-Z_]+=", w)]
    script = next((w for w in words if w.endswith((".py", ".sh"))), None)
    if script is None or script == "SCRIPT.py" or script.startswith("exp/"):  # tests/test_forks.py runs the forks
        assert words[0] in ("python", "torchrun") and ("-m" in words or script)
        return
    assert os.path.isfile(os.path.join(ROOT, script)), command
    if script.endswith(".py"):
        shown = help_of(script)
        named = {w.split("=")[0] for w in words[words.index(script) + 1 :] if w.startswith("--") and w != "--help"}
        assert [flag for flag in sorted(named) if not re.search(rf"{flag}(?![\w-])", shown)] == []


@functools.cache
def help_of(script):
    return run_script(script, "--help", folder=ROOT)


def test_pre_commit_has_the_same_ruff():
    (version,) = re.findall(r"^ruff==(\S+)", read("requirements.txt"), re.MULTILINE)
    assert f"rev: v{version}\n" in read(".pre-commit-config.yaml")


def test_the_table_of_hyperparameters_has_the_defaults_of_the_scripts():
    rows = re.findall(
        r"^\|.*\| `(\w+)\.py (?:--objective (bt) )?--([\w-]+)` \|.*\| (\S+) \|$", read("docs/method.md"), re.M
    )
    assert len(rows) >= 35
    for script, objective, flag, default in rows:
        module = importlib.import_module(script)
        name = flag.replace("-", "_")
        value = module.Args.__dataclass_fields__[name].default
        if value is None:
            value = module.DEFAULTS[objective or "grm"][name]
        assert value == float(default), (script, flag)
