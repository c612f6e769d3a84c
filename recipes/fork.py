"""Writes a fork of docs/forking.md or docs/tournament.md into exp/: its diff, applied to a copy of ppo_cpe.py.

A diff may also be one against another fork, which is then applied first. A file that is there already stays as it is.

    python recipes/fork.py root      # exp/root.py
"""

import os
import re
import sys
from dataclasses import dataclass

import tyro

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from runtime import flags
from runtime.rows import write_text

PAGES = ("docs/forking.md", "docs/tournament.md")


@dataclass
class Args:
    name: tyro.conf.Positional[str]
    """Name of the fork: root for the diff of exp/root.py."""
    folder: str = "exp"
    """Folder of the written file."""


def read(name: str) -> str:
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def diffs(page: str) -> dict[str, str]:
    """{name: diff} of a page's ```diff blocks, each of which says `+++ exp/NAME.py`."""
    blocks = re.findall(r"^```diff\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return {re.search(r"^\+\+\+ exp/(\w+)\.py$", block, re.MULTILINE)[1]: block for block in blocks}


def all_diffs() -> dict[str, str]:
    """{name: diff} of all pages."""
    return {name: diff for page in PAGES for name, diff in diffs(read(page)).items()}


def base_of(diff: str) -> str:
    """Name after `---` in a diff: ppo_cpe or another fork."""
    return re.search(r"^--- (?:exp/)?(\w+)\.py$", diff, re.MULTILINE)[1]


def code_of(name: str, forks: dict[str, str]) -> str:
    """The code of a fork: its diff applied to what it is against."""
    base = base_of(forks[name])
    return apply(forks[name], read("ppo_cpe.py") if base == "ppo_cpe" else code_of(base, forks))


def apply(diff: str, text: str) -> str:
    """A file's text after a diff without line numbers. ValueError: a hunk's old lines are not there once."""
    _, *hunks = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)
    for hunk in hunks:
        lines = hunk.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        if text.count(old) != 1:
            raise ValueError(f"expected these lines once, found them {text.count(old)} times:\n{old}")
        text = text.replace(old, new)
    return text


def main(args: Args) -> None:
    forks = all_diffs()
    if args.name not in forks:
        raise ValueError(f"{args.name}: expected one of {', '.join(forks)}, the forks of {' and '.join(PAGES)}")
    file = os.path.join(args.folder, f"{args.name}.py")
    code = code_of(args.name, forks)
    if os.path.exists(file) and read(os.path.abspath(file)) != code:
        raise ValueError(f"{file} is there already, and differs; remove or rename it")
    write_text(file, code)
    print(f"output: {file}")


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
