"""Rows to train the judges of the ladder on (results/make/ladder.py), for train_grm.py.

    python results/make/judgements.py --world out/world --without checks --out out/plain.jsonl
    python results/make/judgements.py --world out/world --rollouts out/ppo out/cpe --out out/refreshed.jsonl
    python results/make/judgements.py --world out/world --exact-pairs --out out/exact.jsonl

The world's judgements. With --rollouts: half of them, and as many answers that policies wrote in the last half of their
training, judged by the exact judge. With --exact-pairs: the world's pairs in the exact judge's order, in which length
and recitation win nothing.
"""

import os
import sys
from dataclasses import asdict, dataclass
from random import Random
from typing import Literal

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from data.persona_world import exact_pair, judge
from runtime import flags
from runtime.rows import read_rows, step_files, write_rows


@dataclass
class Args:
    world: str
    """Folder of data/persona_world.py."""
    out: str
    """The file that is written."""
    without: tuple[Literal["checks", "critique"], ...] = ()
    """Parts to leave out. An empty critique is not allowed, so a full stop takes its place."""
    rollouts: tuple[str, ...] = ()
    """Run folders of ppo_cpe.py."""
    exact_pairs: bool = False
    """Pairs instead of judgements."""
    seed: int = 0
    """Which of the answers are taken."""


EMPTY = {"checks": "", "critique": "."}


def late_answers(run: str) -> list[dict]:
    """The originals and edits of the last half of a run's steps."""
    files = [path for _, path in step_files(run, "rollouts")]
    rows = []
    for path in files[len(files) // 2 :]:
        for row in read_rows(path, "object"):
            kept = {name: row[name] for name in ("prompt_id", "persona", "question")}
            rows.append(kept | {"answer": row["answer"]})
            if row["edit"]:
                rows.append(kept | {"answer": row["edit"]["answer"]})
    return rows


def main(args: Args) -> None:
    if args.exact_pairs:
        pairs = map(exact_pair, read_rows(f"{args.world}/pairs.jsonl", "pair"))
        return save([pair for pair in pairs if pair], args.out)
    rows = read_rows(f"{args.world}/judgements.jsonl", "judgement")
    if args.rollouts:
        rng = Random(args.seed)
        answers = [row for run in args.rollouts for row in late_answers(run) if row["answer"].strip()]
        half = min(len(rows) // 2, len(answers))
        judged = [row | asdict(judge(row, row["answer"])) for row in rng.sample(answers, half)]
        rows = rng.sample(rows, half) + judged
    rows = [row | {name: EMPTY[name] for name in args.without} for row in rows]
    save(rows, args.out)


def save(rows: list[dict], path: str) -> None:
    write_rows(path, rows)
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
