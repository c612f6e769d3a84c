"""Answers that evaluate.py reads instead of sampling them: from a file, or from the prompts' own references."""

import json
from collections import Counter
from typing import Any, NamedTuple

from json_files import read_json_list
from prompts import persona_text
from runtime.rows import EMPTY_THOUGHT, normalized, read_rows, refuse_thoughts


class Entry(NamedTuple):
    """One answer of a file."""

    place: str  # such as "line 7"
    where: str  # the place with the file's name
    keys: list[tuple[str, str]]  # what the answer can be found by: (kind of key, key)
    asked: tuple[str, str]  # the key of its question, and of its persona if it names one
    fields: dict


def instruction_of(row: dict) -> str:
    """Persona and question as one text, as the instruction of AlpacaEval's files."""
    return f"{persona_text(row['persona'])}\n\n{row['question']}"


def given_answers(file: str, rows: list[dict]) -> tuple[str, list[dict]]:
    """Finds the prompts' answers in a file of answer rows, or of AlpacaEval's outputs (.json).

    Returns:
        the generator, and the rows with `answer`, which is None where the file has none

    Raises:
        ValueError: there is no answer to any prompt, a second one to some prompt, or one to another question or for
            another persona under its id.
    """
    generator, entries = read_outputs(file) if file.endswith(".json") else read_answers(file)
    entries_of: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        for key in entry.keys:
            entries_of.setdefault(key, []).append(entry)
    times = Counter(row["question"] for row in rows)
    given = []
    for row in rows:
        instruction = instruction_of(row)
        keys = [
            ("prompt", row["prompt_id"]),
            ("question of a persona", _persona_and_question(row["persona"], row["question"])),
            ("question of a persona", _persona_and_question(row["persona"], instruction)),
            ("instruction", instruction),
            ("instruction", row["question"]),
        ]
        known = keys if times[row["question"]] == 1 else keys[:-1]  # the question alone would fit several prompts
        matching = [key for key in known if key in entries_of]
        if not matching:
            given.append({**row, "answer": None})
            continue
        entry, *others = entries_of[matching[0]]
        if others:
            kind, text = matching[0]
            raise ValueError(f'{others[0].where}: a second answer to {kind} "{text[:80]}"; the first is {entry.place}')
        if entry.asked not in keys:
            raise ValueError(
                f'{entry.where}: prompt "{row["prompt_id"]}" has another question or persona here than in --prompts'
            )
        given.append({**row, **entry.fields})
    if all(row["answer"] is None for row in given):
        raise ValueError(f"{file}: no answer to any of the {len(rows)} prompts")
    return generator, given


def read_answers(file: str) -> tuple[str, list[Entry]]:
    rows = read_rows(file, "answer")
    names = [row["generator"] for row in rows if row.get("generator")]
    entries = []
    for number, row in enumerate(rows, 1):
        asked = ("question of a persona", _persona_and_question(row["persona"], row["question"]))
        fields = row | {"answer": EMPTY_THOUGHT.sub("", row["answer"])}
        entries.append(Entry(f"line {number}", f"{file}:{number}", [("prompt", row["prompt_id"])], asked, fields))
    return names[-1] if names else file, entries


def read_outputs(file: str) -> tuple[str, list[Entry]]:
    """AlpacaEval's outputs: a JSON list of instruction, output and generator."""
    generator = file
    entries = []
    for i, output in enumerate(read_json_list(file, "AlpacaEval's outputs")):
        for field in ("instruction", "output"):
            if not isinstance(output, dict) or not isinstance(output.get(field), str):
                raise ValueError(
                    f'{file}, entry {i}: field "{field}" is missing or no text; expected AlpacaEval\'s outputs, a JSON '
                    "list of instruction, output, generator"
                )
        refuse_thoughts({"output": output["output"]}, f"{file}, entry {i}")
        generator = output.get("generator") or generator
        keys = _keys_of(output)
        fields = {"answer": EMPTY_THOUGHT.sub("", output["output"])}
        entries.append(Entry(f"entry {i}", f"{file}, entry {i}", keys, keys[-1], fields))
    return generator, entries


def _keys_of(output: dict) -> list[tuple[str, str]]:
    """An output that names its persona answers nobody else's question."""
    keys = []
    if isinstance(output.get("prompt_id"), str | int):
        keys.append(("prompt", output["prompt_id"]))
    if isinstance(output.get("persona"), str | dict):
        keys.append(("question of a persona", _persona_and_question(output["persona"], output["instruction"])))
    else:
        keys.append(("instruction", output["instruction"]))
    return keys


def _persona_and_question(persona: dict | str, question: str) -> str:
    """Both as one text. A persona may be an object in one file and its JSON in the other."""
    value: Any = persona
    if isinstance(persona, str):
        try:
            value = json.loads(persona)
        except (ValueError, RecursionError):  # not JSON, but a text
            value = persona.strip()
    return json.dumps([normalized(value), question], sort_keys=True)


def reference_answers(file: str, rows: list[dict]) -> list[dict]:
    """The rows with their own references as answers. ValueError: a row has none."""
    for row in rows:
        if not isinstance(row.get("reference"), str):
            raise ValueError(
                f'{file}: prompt "{row["prompt_id"]}" has no reference; give --baseline FOLDER or --baseline-answers '
                "FILE"
            )
    return [{**row, "answer": EMPTY_THOUGHT.sub("", row["reference"]), "truncated": None} for row in rows]
