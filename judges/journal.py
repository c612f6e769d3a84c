"""Rows that cost something to make, appended to disk as they come, so that a killed run does not make them again.

Each row carries `made_by`, a digest of all that it depends on. evaluate.py keeps answers and verdicts this way,
data/annotate.py the replies of its models.
"""

import contextlib
import fcntl
import glob
import json
import os
from collections.abc import Callable, Iterator

from judges.chat_client import ServerDown
from runtime.digests import is_whole, sealed
from runtime.distributed import Ranks, all_gather, barrier, print0
from runtime.progress import counting
from runtime.watch import set_phase


class Journal:
    """Rows, one a line, in OUT/journal/NAME.RANK.jsonl; a line is either whole or torn. Each line has a digest.

    ValueError: another run is writing there, or a line in the middle is no such row, or was changed.
    """

    def __init__(self, out: str, name: str, rank: int):
        self.name = name
        self.folder = os.path.join(out, "journal")
        self.path = os.path.join(self.folder, f"{name}.{rank}.jsonl")

    def rows(self) -> dict[str, dict]:
        """{made_by: row} of all ranks, without a torn last line."""
        rows = {}
        for path in sorted(glob.glob(f"{glob.escape(self.folder)}/{self.name}.*.jsonl")):
            with open(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if not line.endswith(b"\n"):
                        break
                    try:
                        row = json.loads(line)
                        if not is_whole(row):
                            raise ValueError("not what was written")
                        rows[row["made_by"]] = {name: row[name] for name in row if name != "digest"}
                    except (ValueError, KeyError, AttributeError, RecursionError) as error:
                        raise ValueError(f"{path}:{number}: no row of a journal ({error}); remove the line") from error
        return rows

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """The time in which this process, and no other, appends."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(self.path, "a+b") as self.file:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{self.path}: another run is writing it") from error
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)  # drops a torn last line
            yield

    def append(self, row: dict) -> None:
        self.file.write(json.dumps(sealed(row), ensure_ascii=False).encode() + b"\n")
        self.file.flush()


Record = Callable[[int, dict], None]


def made_once(
    name: str, digests: list[str], make: Callable[[list[int], Record], None], out: str, ranks: Ranks, reason: str | None
) -> list[dict | None]:
    """Rows for the digests, in order, None where there is none: from OUT/journal, and the missing ones from `make`.

    make(indices, record): makes this rank's part of the missing rows, given as indices into digests; calls
    record(index, row) for each as soon as it is done. reason: why none are made now, if so.
    """
    set_phase(name)
    journal = Journal(out, name, ranks.rank)
    rows = journal.rows()
    barrier(ranks)  # no rank writes before all have read: they have to agree on what is missing
    index_of: dict[str, int] = {}
    for i, digest in enumerate(digests):  # equal ones are made once
        index_of.setdefault(digest, i)
    missing = [i for digest, i in index_of.items() if digest not in rows]
    n_kept = len(index_of) - len(missing)
    if reason is not None:
        print0(f"{name}: {n_kept} kept, {len(missing)} missing ({reason})")
        return [rows.get(digest) for digest in digests]
    print0(f"{name}: {len(missing)} to make, {n_kept} kept")
    mine = missing[ranks.rank :: ranks.world_size]
    made = {}
    if mine:
        with journal.writing(), counting(len(mine), name, ranks.rank > 0) as done:

            def record(i: int, row: dict) -> None:
                made[digests[i]] = row | {"made_by": digests[i]}
                journal.append(made[digests[i]])
                set_phase(name)  # each row has a time-out of its own
                done()

            try:
                make(mine, record)
            except ServerDown as error:
                raise ServerDown(
                    f"{error}; the {len(made)} of {len(mine)} {name} that were made are kept, the same command goes on"
                ) from error
    rows |= dict(all_gather(ranks, made.items()))
    return [rows.get(digest) for digest in digests]
