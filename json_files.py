"""Files that hold one JSON object."""

import json
from typing import Any


def read_json(file: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ValueError with the file's name if it holds something else."""
    with open(file, encoding="utf-8-sig") as f:  # a byte order mark is no text
        try:
            content = json.load(f)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deep
            raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(file: str, content: dict[str, Any]) -> None:
    with open(file, "w") as f:
        json.dump(content, f, indent=2)
