"""Rows for dpo.py and sft.py from the rollouts of an RL run: what edits by critiques teach without RL.

    gained.jsonl         each edit with a higher reward than its original, chosen over it
    best.jsonl           the best answer to a prompt in a step, among originals and edits, chosen over the worst
    best_original.jsonl  the same among originals: best of n without critiques

All are pairs: dpo.py compares the two answers, sft.py learns the chosen ones. Answers that are empty or were cut off at
--max-new-tokens are left out, and so are prompts whose answers all have the same reward. A run that trains only its
critic has rollouts of the policy that it starts from:

    python ppo_cpe.py --edit-rate 1 --critic-warmup-steps 20 --max-steps 20 --out out/rollouts
    python recipes/edit_pairs.py out/rollouts --out out/edits
    python dpo.py --data out/edits/gained.jsonl --out out/dpo_edits
"""

import os
import sys
from collections import defaultdict
from dataclasses import dataclass

import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runtime import flags
from runtime.rows import read_rows, step_files, write_rows


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """Run folder of ppo_cpe.py."""
    out: str = "out/edits"
    """Folder of the written files."""


def pair(row: dict, answers: list[dict]) -> list[dict]:
    """The pair of the best and the worst of some answers to a prompt; none if all have the same reward."""
    whole = [answer for answer in answers if answer["answer"].strip() and not answer["truncated"]]
    answers = sorted(whole, key=lambda answer: answer["reward"])
    if not answers or answers[0]["reward"] == answers[-1]["reward"]:
        return []
    prompt = {name: row[name] for name in ("prompt_id", "persona", "question")}
    return [prompt | dict(chosen=answers[-1]["answer"], rejected=answers[0]["answer"])]


def main(args: Args) -> None:
    rows: dict[str, list[dict]] = {"gained": [], "best": [], "best_original": []}
    files = step_files(args.run, "rollouts")
    if not files:
        raise ValueError(f"{args.run}: no rollouts there; expected a run folder of ppo_cpe.py")
    for _, file in files:
        originals_of = defaultdict(list)
        for row in read_rows(file, "object"):
            originals_of[row["prompt_id"]].append(row)
        for originals in originals_of.values():
            edits = [row["edit"] for row in originals if row["edit"]]
            for row in originals:
                if row["edit"] and row["edit"]["reward"] > row["reward"]:
                    rows["gained"] += pair(row, [row, row["edit"]])
            rows["best"] += pair(originals[0], originals + edits)
            rows["best_original"] += pair(originals[0], originals)
    for name, pairs in rows.items():
        file = os.path.join(args.out, f"{name}.jsonl")
        write_rows(file, pairs)
        print(f"{file}: {len(pairs)} pairs")


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
