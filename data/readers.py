"""Reads rows from .jsonl, .csv, .parquet and .json files, for data/prepare.py.

The same data give the same rows in each format (`normalized`): a table has every column in every row, so keys without a
value are dropped, at any depth. Whatever cannot become a row of JSON lines (broken JSON, text that is not UTF-8, half a
surrogate pair, dates) stops the script with a ValueError that names the file and the line or row.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from typing import Any

from runtime.rows import first_lone_surrogate

ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"


def normal(text: str) -> str:
    """The text without differences of case and white space, to compare texts."""
    return " ".join(text.split()).casefold()


def check_text(value: Any, where: str) -> None:
    """ValueError naming where and the field, if any text in the value holds half a surrogate pair."""
    refuse_surrogate(first_lone_surrogate(value), where)


def refuse_surrogate(path: str | None, where: str) -> None:
    if path is not None:
        field = f'field "{path}"' if path else "the text"
        raise ValueError(f"{where}: {field} holds half a surrogate pair (\\ud800 to \\udfff), which is no character")


def normalized(value: Any) -> Any:
    """The value without traces of a table's layout, at any depth.

    Keys whose value is null or NaN, or an object of such keys only, are dropped. 36.0 becomes 36, because a column of
    integers with gaps, or with one fraction in it, is stored as floats.
    """
    if isinstance(value, dict):
        inner_values = {key: normalized(inner) for key, inner in value.items()}
        return {k: v for k, v in inner_values.items() if v is not None and (v != {} or value[k] == {})}
    if isinstance(value, (list, tuple)):
        return [normalized(inner) for inner in value]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON value")


DECODER = json.JSONDecoder(parse_constant=_refuse)


def parse_json(text: str, where: str, field: str = "") -> Any:
    """The value of a JSON text, which may be the text of a field. ValueError: where and why it is not JSON."""
    subject = f"the {field} is " if field else ""
    try:
        value = DECODER.decode(text.strip())
        path = first_lone_surrogate({field: value} if field else value)
    except RecursionError:
        raise ValueError(f"{where}: {subject}nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: {subject}not JSON ({error})") from error
    refuse_surrogate(path, where)
    return value


def check_compression(path: str, start: bytes) -> None:
    """ValueError: the file is compressed with gzip."""
    if path.endswith(".gz") or start.startswith(GZIP):
        raise ValueError(f"{path}: compressed with gzip; unpack it first (gunzip)")


def _decode(data, path, line):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})") from error


def read_text(path: str) -> str:
    """The text of a UTF-8 file, without its byte order mark. ValueError: file:line that is not UTF-8."""
    with open(path, "rb") as f:
        data = f.read().removeprefix(BYTE_ORDER_MARK)
    check_compression(path, data)
    return _decode(data, path, 1)


def _read_jsonl(path):
    with open(path, "rb") as f:
        check_compression(path, f.peek(2))
        blank = None
        for number, line in enumerate(f, 1):
            text = _decode(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, path, number)
            if not text.strip():
                blank = blank or number
                continue
            if blank:  # harmless at the end; here a row may be lost
                raise ValueError(f"{path}:{blank}: a blank line between rows")
            row = parse_json(text, f"{path}:{number}")
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object")
            yield f"{path}:{number}", row


def _open_csv(path):
    csv.field_size_limit(2**30)
    return csv.reader(io.StringIO(read_text(path), newline=""))


def _read_csv(path):
    lines = _open_csv(path)
    number = 0
    try:
        header: list[str] = next(lines, [])
        repeated = next((name for name in header if header.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f'{path}: two columns "{repeated}"')
        for cells in lines:
            if not cells:  # a blank line
                continue
            number += 1
            if len(cells) > len(header):
                raise ValueError(f"{path}, row {number}: more cells than the header has ({len(cells)}, {len(header)})")
            yield f"{path}, row {number}", dict(zip(header, cells))
    except csv.Error as error:
        raise ValueError(f"{path}, row {number + 1}: not CSV ({error})") from error


def _open_parquet(path):
    import pyarrow  # comes with `datasets`
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        with open(path, "rb") as f:
            check_compression(path, f.read(2))
        raise ValueError(f"{path}: not a Parquet file ({error})") from error


def _read_parquet(path):
    number = 0
    for batch in _open_parquet(path).iter_batches(batch_size=1000):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, rows {number + 1} to {number + len(batch)}: not UTF-8 ({error})") from error
        for row in rows:
            number += 1
            try:
                json.dumps(normalized(row), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, row {number}: {error}; expected text, numbers, lists, objects") from error
            yield f"{path}, row {number}", row


def read_raw(path: str) -> Iterator[tuple[str, dict]]:
    """Where it stands and the object, of each row, including keys without a value."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    return readers.get(os.path.splitext(path)[1], _read_jsonl)(path)


def read_objects(path: str) -> Iterator[tuple[str, dict]]:
    """Where it stands ("FILE:LINE" or "FILE, row N") and the `normalized` object, of each row.

    path: a .jsonl, .csv or .parquet file. The cells of a CSV file are text. ValueError: where and why it is no row.
    """
    for where, row in read_raw(path):
        yield where, normalized(row)


def read_table(path: str) -> tuple[list[str], list[tuple[str, dict]]]:
    """-> columns, and rows with where they stand, of a table that a flag names. An empty cell is no value.

    ValueError: there is no such table, or it has no rows.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    check_compression(path, b"")
    if not path.endswith((".jsonl", ".csv", ".parquet")):
        raise ValueError(f"{path}: expected a .jsonl, .csv or .parquet file")
    rows = list(read_objects(path))
    if not rows:
        raise ValueError(f"{path}: empty, no rows")
    if path.endswith(".csv"):
        columns = next(_open_csv(path))
        rows = [(where, {k: v for k, v in row.items() if v}) for where, row in rows]
    elif path.endswith(".parquet"):
        columns = _open_parquet(path).schema_arrow.names
    else:
        columns = list(dict.fromkeys(key for _, row in rows for key in row))
    return columns, rows
