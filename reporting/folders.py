"""Reads run folders, also of runs that are going on."""

import json
import os
from collections.abc import Iterator


def read_lines(path: str, needs: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """(line, row) of a JSON-lines file, which may be growing: half a line at its end is left out.

    ValueError: a line in the middle is not a JSON object, or lacks one of the fields that it needs.
    """
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line, parse_constant=lambda name: None)  # NaN is no JSON
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object")
            for name in needs:
                if name not in row:
                    raise ValueError(f'{path}:{number}: field "{name}" is missing')
            yield line, row


def rows_of(*path: str) -> list[dict]:
    """Rows of a file, [] where there is none."""
    file = os.path.join(*path)
    return [row for _, row in read_lines(file)] if os.path.isfile(file) else []


def read_object(file: str) -> dict:
    try:
        with open(file, encoding="utf-8") as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected a JSON object ({error})") from error
