"""JSON-lines rows: what each kind must hold, checked before any work is done; files that appear whole or not at all."""

import json
import os

_PROMPT = {"prompt_id": "text", "persona": "persona", "question": "text"}

ROW_FIELDS = {
    "prompt": _PROMPT,
    "pair": {**_PROMPT, "chosen": "text", "rejected": "text"},
    "answer": {**_PROMPT, "answer": "string"},
    "judgement": {
        **_PROMPT,
        "answer": "text",
        "critique": "text",
        "helpfulness": "score",
        "personalization": "score",
        "naturalness": "score",
    },
    "messages": {"messages": "messages"},
    "object": {},
}


def _roles_alternate(messages):
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        return False
    return all(m.get("role") in ("system", "user", "assistant") and isinstance(m.get("content"), str) for m in messages)


CHECKS = {
    "text": ("a non-empty string", lambda v: isinstance(v, str) and bool(v.strip())),
    "string": ("a string", lambda v: isinstance(v, str)),
    "persona": ("a non-empty JSON object or string", lambda v: isinstance(v, (dict, str)) and bool(v)),
    "score": ("an integer from -5 to 5", lambda v: type(v) is int and -5 <= v <= 5),
    "messages": ('a list of {"role": "system" | "user" | "assistant", "content": text}', _roles_alternate),
}


def check_row(row, kind, where):
    """ValueError naming the place, the field and what was expected, unless `row` is a row of that kind."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object ({kind} row), found {type(row).__name__}")
    for field, check in ROW_FIELDS[kind].items():
        expected, holds = CHECKS[check]
        if field not in row:
            raise ValueError(f'{where}: field "{field}" is missing, expected {expected} ({kind} row)')
        if not holds(row[field]):
            raise ValueError(f'{where}: field "{field}" is {json.dumps(row[field])[:80]}, expected {expected}')


def read_rows(path, kind):
    """All rows of a JSON-lines file, checked before any work is done.

    kind: prompt | pair | answer | judgement | messages | object (any JSON object). ValueError: file:line, field,
    what was expected. Read with `json`, not into Arrow: personas are free objects, and a table would give every
    persona the keys of all the others.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; expected JSON lines ({kind} rows)")
    rows, line_of = [], {}
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            check_row(row, kind, where)
            if kind == "prompt" and line_of.setdefault(row["prompt_id"], number) != number:
                raise ValueError(
                    f'{where}: prompt_id "{row["prompt_id"]}" stands on line {line_of[row["prompt_id"]]} too'
                )
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: empty, expected {kind} rows")
    return rows


def write_rows(path, rows):
    """JSON lines; see `write_text`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path, text):
    """The file appears whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(f"{path}.tmp", path)
