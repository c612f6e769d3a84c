"""JSON-lines rows: what each kind must hold, checked before any work is done; files that appear whole or not at all."""

import contextlib
import errno
import glob
import json
import os
import re
from collections.abc import Sequence
from typing import Any

PROMPT = {"prompt_id": "text", "persona": "persona", "question": "text"}
DIMENSIONS = ("helpfulness", "personalization", "naturalness")  # of a judgement
SCORES = dict.fromkeys(DIMENSIONS, "score")
ROW_FIELDS = {
    "prompt": PROMPT,
    "pair": {**PROMPT, "chosen": "text", "rejected": "text"},
    "answer": {**PROMPT, "answer": "string"},
    "judgement": {**PROMPT, "answer": "text", "critique": "text", **SCORES},
    "messages": {"messages": "messages"},
    "metrics": {"step": "step"},
    "object": {},
}

# Nesting of objects and lists in a row: what walks through a row by recursion, the text of a persona, say, can do it.
MAX_DEPTH = 100

# What makes the files and folders that the scripts read by default: said where one is missing.
MADE_BY = {
    "out/sft/": "run sft.py first",
    "out/grm/": "run train_grm.py first",
    "out/bt/": "run train_grm.py --objective bt first",
    "out/dpo/": "run dpo.py first",
    "out/ppo_cpe/": "run ppo_cpe.py first",
    "out/data/judgements": "make judgements with data/annotate.py, or train on --data of your own",
    "out/data/": "make rows with data/prepare.py, or name a file of your own",
    "out/world/": "run data/persona_world.py first",
}


def made_by(path: str) -> str:
    """ "; " and what makes a file or folder that is missing, where a script of ours does by default; else ""."""
    return next((f"; {hint}" for start, hint in MADE_BY.items() if path.startswith(start)), "")


SURROGATE = re.compile("[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """A text that can be encoded: each half of a surrogate pair is U+FFFD, as in text that was decoded wrongly."""
    return SURROGATE.sub("\ufffd", text)


def _are_messages(messages):
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        return False
    return all(m.get("role") in ("system", "user", "assistant") and isinstance(m.get("content"), str) for m in messages)


CHECKS = {
    "text": ("a non-empty string", lambda v: isinstance(v, str) and bool(v.strip())),
    "string": ("a string", lambda v: isinstance(v, str)),
    "persona": ("a non-empty JSON object or string", lambda v: isinstance(v, (dict, str)) and bool(v)),
    "score": ("an integer from -5 to 5", lambda v: type(v) is int and -5 <= v <= 5),
    "step": ("a positive integer", lambda v: type(v) is int and v > 0),
    "messages": ('a list of {"role": "system" | "user" | "assistant", "content": text}', _are_messages),
}


def _encodes(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_lone_surrogate(value: Any) -> str | None:
    """Where a JSON value holds half a surrogate pair, which JSON can spell but no encoding can write.

    -> the path of the first such string or key, such as "persona.pets[1]" ("" for the value itself), or None. The path
    can be printed: a surrogate in it is escaped.
    """

    def find(value, path):
        if isinstance(value, str):
            return path if SURROGATE.search(value) else None
        if isinstance(value, dict):
            for key, inner in value.items():
                here = f"{path}.{key}" if path else str(key)
                if SURROGATE.search(str(key)):
                    return here
                if (found := find(inner, here)) is not None:
                    return found
        if isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                if (found := find(inner, f"{path}[{i}]")) is not None:
                    return found
        return None

    path = find(value, "")
    return path if path is None else path.encode("utf-8", "backslashreplace").decode()


def check_row(row: Any, kind: str, where: str) -> None:
    """ValueError naming the place, the field and what was expected, unless `row` is a row of that kind."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object ({kind} row), found {type(row).__name__}")
    for field, check in ROW_FIELDS[kind].items():
        expected, holds = CHECKS[check]
        if field not in row:
            raise ValueError(f'{where}: field "{field}" is missing, expected {expected} ({kind} row)')
        if not holds(row[field]):
            raise ValueError(f'{where}: field "{field}" is {json.dumps(row[field])[:80]}, expected {expected}')
    if not _encodes(json.dumps(row, ensure_ascii=False)):
        broken = first_lone_surrogate(row)
        raise ValueError(
            f'{where}: field "{broken}" holds half of a surrogate pair (such as \\ud83d), which is no text'
        )


def _depth(value):
    """How deep the objects and lists of a JSON value are nested."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]
    return depth


def parse_json(text: str, where: str) -> Any:
    """A JSON value. ValueError naming the place: it is none, or nested more than MAX_DEPTH deep."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(f"{where}: objects and lists nested more than {MAX_DEPTH} deep")
    return value


def json_lines(path: str, growing: bool = False) -> list[tuple[str, Any]]:
    """("FILE:LINE", value) of every line; a byte order mark and blank lines at the end are passed over. growing: so is
    a line without its end, which is being written or was when its writer was killed.

    ValueError: not UTF-8, a compressed file, a line that is not JSON, is blank or nested too deep, with file and line.
    """
    with open(path, "rb") as f:
        content = f.read()
    if content[:2] == b"\x1f\x8b":
        raise ValueError(f"{path}: a gzip file; expected JSON lines as text (gunzip it first)")
    if growing:
        content = content[: content.rfind(b"\n") + 1]
    text = content.removeprefix(b"\xef\xbb\xbf").rstrip()
    found = []
    for number, line in enumerate(text.split(b"\n") if text else [], 1):
        where = f"{path}:{number}"
        try:
            found.append((where, parse_json(line.decode("utf-8"), where)))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error})") from error
    return found


def read_rows(path: str, kind: str) -> list[dict]:
    """All rows of a JSON-lines file, checked before any work is done.

    kind: prompt | pair | answer | judgement | messages | metrics (of a run) | object (any). ValueError: file:line,
    field, what was expected. Read with `json`, not into Arrow: personas are free objects, and a table would give every
    persona the keys of all the others.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; expected JSON lines ({kind} rows){made_by(path)}")
    rows, line_of = [], {}
    for where, row in json_lines(path, growing=kind == "metrics"):
        check_row(row, kind, where)
        if kind == "prompt" and line_of.setdefault(row["prompt_id"], where) != where:
            raise ValueError(f'{where}: prompt_id "{row["prompt_id"]}" stands at {line_of[row["prompt_id"]]} too')
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: empty, expected {kind} rows")
    return rows


def logged_rows(path: str, fields: Sequence[str] = ()) -> list[dict]:
    """Rows of a file that a run writes or wrote; [] where there is none. Half a line at its end is left out.

    ValueError: a line is not a JSON object or lacks one of the fields.
    """
    if not os.path.isfile(path):
        return []
    rows = []
    for where, row in json_lines(path, growing=True):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        for field in fields:
            if field not in row:
                raise ValueError(f'{where}: field "{field}" is missing')
        rows.append(row)
    return rows


def step_files(folder: str, kind: str) -> list[tuple[int, str]]:
    """(step, file) of OUT/KIND/step_NNNNNN.jsonl (`runs.write_step`), by step."""
    names = sorted(glob.glob(os.path.join(glob.escape(folder), kind, "step_*.jsonl")))
    return [(int(match[1]), name) for name in names if (match := re.search(r"step_(\d+)\.jsonl$", name))]


def write_rows(path: str, rows: list[dict]) -> None:
    """JSON lines; see `write_text`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: str, text: str) -> None:
    """The file appears whole or not at all, also when the power fails."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    with naming(path):
        with open(f"{path}.tmp", "w", encoding="utf-8") as f:
            f.write(text)
        sync(f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
        sync(folder)


def append_line(path: str, line: str) -> None:
    """One more line: a disk that is full leaves the file as it was, without a part of the line."""
    with naming(path), open(path, "ab", buffering=0) as f:
        size, content = f.tell(), line.encode() + b"\n"
        try:
            written = f.write(content)
            if written < len(content):
                written += f.write(content[written:])  # says what is wrong
        finally:
            if f.tell() != size + len(content):
                f.truncate(size)


def sync(path: str) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do it for folders
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def naming(path: str):
    """An error of the disk says which file it met: that of a write does not by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (what was finished is kept)", path) from error
