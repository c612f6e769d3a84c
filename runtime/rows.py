"""JSON-lines rows, checked before any work is done, and files that appear whole or not at all."""

import codecs
import contextlib
import errno
import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

FORM_TAGS = "checks|critique|scores"  # the blocks of a judge's reply
FORM_TAG = rf"</?(?:{FORM_TAGS})>"
DIMENSIONS = ("helpfulness", "personalization", "naturalness")  # of a judgement

# kind of row: {field: its entry of CHECKS}
PROMPT = {"prompt_id": "text", "persona": "persona", "question": "text"}
ROW_FIELDS: dict[str, dict[str, str]] = {
    "prompt": PROMPT,
    "pair": {**PROMPT, "chosen": "text", "rejected": "text"},
    "answer": {**PROMPT, "answer": "string"},
    "judgement": {**PROMPT, "answer": "text", "critique": "critique", **dict.fromkeys(DIMENSIONS, "score")},
    "messages": {"messages": "messages"},
    "metrics": {"step": "step"},
    "object": {},
}

DATA_KINDS = ("prompt", "pair", "answer", "judgement", "messages")

# Limit on the nesting of objects and lists in a row, so that code which walks through one can be recursive.
MAX_DEPTH = 100

# How to make the files that the scripts read by default, for the message where one is missing.
MADE_BY = {
    "out/data/judgements": "make judgements with data/annotate.py, or train on --data of your own",
    "out/data/": "make rows with data/prepare.py, or name a file of your own",
    "out/world/": "run data/persona_world.py first",
}


def made_by(path: str) -> str:
    """How to make a missing default file, as "; HINT". Empty for other files."""
    return next((f"; {hint}" for start, hint in MADE_BY.items() if path.startswith(start)), "")


# -- surrogates: JSON can spell half of a surrogate pair, but no encoding can write it ---------------------------------

SURROGATE = re.compile("[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """Replaces each half of a surrogate pair by U+FFFD, as decoders do with invalid text."""
    return SURROGATE.sub("\ufffd", text)


def refuse_surrogates(value: Any, where: str) -> None:
    """Raises ValueError, with the place, if a text or key in a JSON value holds half of a surrogate pair."""
    path = first_lone_surrogate(value)
    if path is not None:
        field = f'field "{path}"' if path else "the text"
        raise ValueError(f"{where}: {field} holds half of a surrogate pair (such as \\ud83d), which is no text")


def first_lone_surrogate(value: Any) -> str | None:
    """Path of the first string or key in a JSON value that holds half of a surrogate pair, or None.

    Paths look like "persona.pets[1]"; "" is the value itself. Surrogates in a path are escaped, so that it prints.
    """
    for path, text in _texts(value, ""):
        if SURROGATE.search(text):
            return path.encode("utf-8", "backslashreplace").decode()
    return None


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Each string and key in a JSON value, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            inner_path = f"{path}.{key}" if path else str(key)
            yield inner_path, str(key)
            yield from _texts(inner, inner_path)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{path}[{i}]")


# -- thoughts of reasoning models ------------------------------------------------------------------------------------

# How models of several makers enclose them: most, Seed, Mistral, Kimi
THOUGHTS_START = re.compile(r"<(?:seed:)?think(?:ing)?>|\[THINK\]|◁think▷")
THOUGHTS_END = re.compile(r"</(?:seed:)?think(?:ing)?>|\[/THINK\]|◁/think▷")
# An empty thought, which rows hold that were made with a model told not to reason. It is not part of the answer.
EMPTY_THOUGHT = re.compile(r"\A\s*<think>\s*</think>\s*")


def final_answer(text: str) -> str | None:
    """A reply without the thoughts at its beginning. None: it is empty, or thoughts without an answer.

    Some chat templates write the opening tag, so that a reply begins within the thoughts. An answer that mentions both
    tags later is left as it is.
    """
    ends = [match.end() for match in THOUGHTS_END.finditer(text)]
    if THOUGHTS_START.match(text.lstrip()):
        text = text[ends[-1] :].strip() if ends else ""
    elif ends and not THOUGHTS_START.search(text, 0, ends[0]):
        text = text[ends[0] :].strip()
    return text if text.strip() else None


def refuse_thoughts(answers: dict[str, Any], where: str) -> None:
    """Raises ValueError if an answer begins with thoughts, which would be trained or judged as a part of it.

    answers: {field: text}. Other values are skipped.
    """
    for field, text in answers.items():
        answer = EMPTY_THOUGHT.sub("", text) if isinstance(text, str) else ""
        if answer.strip() and final_answer(answer) != answer:
            raise ValueError(
                f'{where}: field "{field}" begins with the thoughts of a reasoning model ({text[:40]!r}), expected the '
                "answer alone"
            )


def _answers_in(row: dict, kind: str) -> dict[str, Any]:
    if kind == "messages":
        turns = enumerate(row["messages"])
        return {f"messages[{i}].content": turn["content"] for i, turn in turns if turn["role"] == "assistant"}
    return {name: row.get(name) for name in ("chosen", "rejected", "answer", "reference")}


# -- reading -----------------------------------------------------------------------------------------------------------


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return False
    return value.get("role") in ("system", "user", "assistant")


CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # name: (what is expected, whether a value is that)
    "text": ("a non-empty string", lambda v: isinstance(v, str) and bool(v.strip())),
    "critique": (
        "a non-empty string without the tags of a judgement (such as <scores>)",
        lambda v: isinstance(v, str) and bool(v.strip()) and not re.search(FORM_TAG, v),
    ),
    "string": ("a string", lambda v: isinstance(v, str)),
    "persona": ("a non-empty JSON object or string", lambda v: isinstance(v, (dict, str)) and bool(v)),
    "score": ("an integer from -5 to 5", lambda v: type(v) is int and -5 <= v <= 5),
    "step": ("a positive integer", lambda v: type(v) is int and v > 0),
    "messages": (
        'a list of {"role": "system" | "user" | "assistant", "content": text}',
        lambda v: isinstance(v, list) and bool(v) and all(map(_is_message, v)),
    ),
}


def check_row(row: Any, kind: str, where: str) -> None:
    """Raises ValueError, with the place, the field and what was expected, unless `row` is a row of that kind."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object ({kind} row), found {type(row).__name__}")
    for field, check in ROW_FIELDS[kind].items():
        expected, is_valid = CHECKS[check]
        if field not in row:
            raise ValueError(f'{where}: field "{field}" is missing, expected {expected} ({kind} row)')
        if not is_valid(row[field]):
            raise ValueError(f'{where}: field "{field}" is {json.dumps(row[field])[:80]}, expected {expected}')
    checks = row.get("checks", "")  # of a judgement, optional
    if kind == "judgement" and (not isinstance(checks, str) or re.search(FORM_TAG, checks)):
        raise ValueError(
            f'{where}: field "checks" is {json.dumps(checks)[:80]}, expected a string without a tag such as <scores>'
        )
    refuse_surrogates(row, where)
    if kind in DATA_KINDS:
        refuse_thoughts(_answers_in(row, kind), where)


def _depth(value: Any) -> int:
    """Nesting depth of the objects and lists in a JSON value, without recursion."""
    depth = 0
    level = [value]
    while True:
        containers = [v for v in level if isinstance(v, (dict, list))]
        if not containers:
            return depth
        depth += 1
        level = []
        for container in containers:
            level += container.values() if isinstance(container, dict) else container


def parse_json(text: str, where: str) -> Any:
    """Parses a JSON value. Raises ValueError, naming the place, if it is not one or is nested deeper than MAX_DEPTH."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    may_be_deep = text.count("[") + text.count("{") > MAX_DEPTH  # spares most rows the walk
    if may_be_deep and _depth(value) > MAX_DEPTH:
        raise ValueError(f"{where}: objects and lists nested more than {MAX_DEPTH} deep")
    return value


def check_compression(path: str, start: bytes) -> None:
    """Raises ValueError if a file, of which `start` are the first bytes, is compressed with gzip."""
    if path.endswith(".gz") or start.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path}: compressed with gzip; unpack it first (gunzip)")


def decode(data: bytes, path: str, line: int = 1) -> str:
    """Text of a file from a line on, without a byte order mark. Raises ValueError with file:line if it is not UTF-8."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8") if line == 1 else data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not UTF-8 ({error})") from error


def json_lines(path: str, growing: bool = False) -> Iterator[tuple[str, Any]]:
    """Parses each line of a file: ("FILE:LINE", value). Skips a byte order mark and blank lines at the end.

    growing: also skips a last line without a line break, which is being written or was when its writer was killed.

    Raises ValueError, with file and line, for a line that is blank, not UTF-8, not JSON or nested too deep, and for a
    compressed file.
    """
    with open(path, "rb") as f:
        check_compression(path, f.peek(2))
        blank = None
        for number, line in enumerate(f, 1):
            if growing and not line.endswith(b"\n"):
                return
            where = f"{path}:{number}"
            text = decode(line, path, number)
            if not text.strip():
                blank = blank or where
            elif blank:  # harmless at the end; here a row may be lost
                raise ValueError(f"{blank}: a blank line between rows")
            else:
                yield where, parse_json(text, where)


def normalized(value: Any) -> Any:
    """The value without traces of a table (Arrow, pandas, CSV), at any depth, so that a row is the same in any format.

    A table has every column in every row. What is null or NaN is dropped, in objects and lists, and so is a key whose
    value is an object of such keys only. 36.0 becomes 36, because a column of integers with gaps, or with one fraction
    in it, is stored as floats.
    """
    if isinstance(value, dict):
        inner_values = {key: normalized(inner) for key, inner in value.items()}
        return {k: v for k, v in inner_values.items() if v is not None and (v != {} or value[k] == {})}
    if isinstance(value, (list, tuple)):
        return [inner for inner in map(normalized, value) if inner is not None]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value


def data_row(value: Any, where: str) -> Any:
    """A row of data, `normalized`. Raises ValueError, with the place, for what JSON cannot hold: infinity, dates."""
    row = normalized(value)
    try:
        json.dumps(row, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; expected text, finite numbers, lists, objects") from error
    return row


def read_rows(path: str, kind: str) -> list[dict[str, Any]]:
    """Reads and checks all rows of a JSON-lines file.

    kind: prompt | pair | answer | judgement | messages: rows of data, `normalized`; metrics (of a run) | object (any).

    Rows are read with `json`, not into Arrow tables: personas are free objects, and a table would give every persona
    the keys of all others. Raises ValueError with file:line, the field and what was expected.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; expected JSON lines ({kind} rows){made_by(path)}")
    rows = []
    first_place: dict[str, str] = {}  # of each prompt_id
    for where, row in json_lines(path, growing=kind == "metrics"):
        if kind in DATA_KINDS:
            row = data_row(row, where)
        check_row(row, kind, where)
        if kind == "prompt":
            first = first_place.setdefault(row["prompt_id"], where)
            if first != where:
                raise ValueError(f'{where}: prompt_id "{row["prompt_id"]}" stands at {first} too')
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: empty, expected {kind} rows")
    return rows


def logged_rows(path: str, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a file that a run writes or wrote; [] where there is none. Half a line at its end is left out.

    Raises ValueError if a line is not a JSON object or lacks one of the fields.
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


def step_files(folder: str, kind: str, rest: str = "") -> list[tuple[int, str]]:
    """(step, file) of each FOLDER/KIND/step_NNNNNN.jsonl (`Run.write_rows`), by step.

    rest: a pattern of what follows the number, as in bad_steps/step_000005_policy_1.jsonl.
    """
    files = []
    for name in sorted(glob.glob(os.path.join(glob.escape(folder), kind, "step_*.jsonl"))):
        if match := re.search(rf"step_(\d+){rest}\.jsonl$", name):
            files.append((int(match[1]), name))
    return files


# -- held-out rows -----------------------------------------------------------------------------------------------------

# Files whose rows are for evaluation. No persona or prompt of them is trained on.
HELD_OUT = ("prompts_eval", "prompts_winrate", "pairs_eval", "judgements_eval")


def refuse_held_out(path: str, *files: str | None) -> None:
    """Refuses a file to train on if it has a persona or prompt of a held-out row.

    Held out are the rows of the HELD_OUT files in the same folder, and those of `files` (None: no file). Raises
    ValueError with file:line of both rows.
    """
    beside = [os.path.join(os.path.dirname(path), f"{name}.jsonl") for name in HELD_OUT]
    held_out: dict[tuple[str, str], str] = {}  # {(field, value): where}
    for file in filter(os.path.isfile, filter(None, [*beside, *files])):
        for where, key in _identities(file):
            held_out.setdefault(key, where)
    if not held_out:
        return  # the rows need not be read once more
    for where, key in _identities(path):
        if key in held_out:
            raise ValueError(
                f"{where}: its {key[0]} is held out, at {held_out[key]}; expected rows to train on. Remove the row, or "
                "keep a held-out file that you don't use in another folder"
            )


def _identities(path: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Where each row stands, with its prompt_id and its persona."""
    for where, row in json_lines(path):
        check_row(row, "object", where)
        row = normalized(row)
        for field in ("prompt_id", "persona"):
            if field in row:
                yield where, (field, json.dumps(row[field], sort_keys=True))


# -- writing -----------------------------------------------------------------------------------------------------------


def write_rows(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines; see `write_text`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: str, text: str) -> None:
    """Writes a file that appears whole or not at all, even if the power fails."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    with naming(path):
        with open(f"{path}.tmp", "w", encoding="utf-8") as f:
            f.write(text)
        sync(f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
        sync(folder)


def append_line(path: str, line: str) -> None:
    """Appends one line. If the disk is full, the file stays as it was, without a part of the line."""
    content = line.encode() + b"\n"
    with naming(path), open(path, "ab", buffering=0) as f:
        size = f.tell()
        try:
            written = f.write(content)
            if written < len(content):
                f.write(content[written:])  # raises the error that cut the first write short
        finally:
            if f.tell() != size + len(content):
                f.truncate(size)


def sync(path: str) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Adds the path to an error of the disk. A failed write does not carry it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (what was finished is kept)", path) from error
