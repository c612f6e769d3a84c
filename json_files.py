"""Files that hold one JSON object or list."""

import json
from typing import Any


def _read(file: str, kind: type, expected: str) -> Any:
    with open(file, encoding="utf-8-sig") as f:  # a byte order mark is no text
        try:
            content = json.load(f)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deep
            raise ValueError(f"{file}: not JSON ({error}); expected {expected}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file}: expected {expected}, found {type(content).__name__}")
    return content


def read_json(file: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ValueError with the file's name if it holds something else."""
    return _read(file, dict, "a JSON object")


def read_json_list(file: str, of: str) -> list[Any]:
    """The JSON list that a file holds. Raises ValueError with the file's name, and what it should be a list `of`."""
    return _read(file, list, f"a JSON list of {of}")


def write_json(file: str, content: dict[str, Any]) -> None:
    with open(file, "w") as f:
        json.dump(content, f, indent=2)
