"""Reads rows from .jsonl, .csv, .parquet and .json files, for data/prepare.py.

The same data give the same rows in each format (`runtime.rows.normalized`), but for CSV, whose cells are text. Whatever
cannot become a row of JSON lines (broken JSON, text that is not UTF-8, half a surrogate pair, dates) stops the script
with a ValueError that names the file and the line or row.
"""

import csv
import io
import os
from collections.abc import Iterator
from typing import Any

from runtime.rows import check_compression, check_row, data_row, decode, json_lines

ENDINGS = (".jsonl", ".json", ".parquet", ".csv")


def normal(text: str) -> str:
    """The text without differences of case and white space, to compare texts."""
    return " ".join(text.split()).casefold()


def read_text(path: str) -> str:
    """The text of a UTF-8 file, without its byte order mark. ValueError: file:line that is not UTF-8."""
    with open(path, "rb") as f:
        data = f.read()
    check_compression(path, data)
    return decode(data, path)


def _read_csv(path: str) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**30)
    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    number = 0
    try:
        header: list[str] = next(lines, [])
        for name in header:
            if header.count(name) > 1:
                raise ValueError(f'{path}: two columns "{name}"')
        for cells in filter(None, lines):  # blank lines are skipped
            number += 1
            if len(cells) != len(header):
                raise ValueError(f"{path}, row {number}: {len(cells)} cells, expected {len(header)} as in the header")
            yield f"{path}, row {number}", dict(zip(header, cells))
    except csv.Error as error:
        reason = f"not CSV, such as a quotation mark that is not closed ({error})"
        raise ValueError(f"{path}, row {number + 1}: {reason}") from error


def _read_parquet(path: str) -> Iterator[tuple[str, dict]]:
    import pyarrow  # comes with `datasets`
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        with open(path, "rb") as f:
            check_compression(path, f.read(2))
        raise ValueError(f"{path}: not a Parquet file ({error})") from error
    number = 0
    for batch in file.iter_batches(batch_size=1000):
        try:
            rows = batch.to_pylist(maps_as_pydicts="strict")
        except (UnicodeDecodeError, KeyError) as error:  # KeyError: a map with two equal keys
            place = f"{path}, rows {number + 1} to {number + len(batch)}"
            raise ValueError(f"{place}: {error}; expected UTF-8 texts, and objects with different keys") from error
        for row in rows:
            number += 1
            yield f"{path}, row {number}", row


def read_raw(path: str) -> Iterator[tuple[str, Any]]:
    """Where it stands and the value, of each row, including keys without a value."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    return readers.get(os.path.splitext(path)[1], json_lines)(path)


def read_objects(path: str) -> Iterator[tuple[str, dict]]:
    """Where it stands ("FILE:LINE" or "FILE, row N") and the `normalized` object, of each row.

    path: a .jsonl, .csv or .parquet file. The cells of a CSV file are text. ValueError: where and why it is no row.
    """
    for where, raw in read_raw(path):
        row = data_row(raw, where)
        check_row(row, "object", where)
        yield where, row


def read_table(path: str) -> tuple[list[str], list[tuple[str, dict]]]:
    """-> columns, and rows with where they stand, of a table that a flag names. An empty cell is no value.

    ValueError: there is no such table, or it has no rows.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    check_compression(path, b"")
    if not path.endswith((".jsonl", ".csv", ".parquet")):
        raise ValueError(f"{path}: expected a .jsonl, .csv or .parquet file")
    columns: dict[str, None] = {}
    rows = []
    for where, raw in read_raw(path):
        check_row(raw, "object", where)
        columns |= dict.fromkeys(raw)
        if path.endswith(".csv"):
            raw = {name: cell or None for name, cell in raw.items()}
        rows.append((where, data_row(raw, where)))
    if not rows:
        raise ValueError(f"{path}: empty, no rows")
    return list(columns), rows
