"""Rows for experiments of the sweep (results/make/sweep.py).

    python results/make/subset.py --world out/world --hold-out-values --out out/kept.jsonl
    python results/make/subset.py --world out/world --pairs out/other/pairs.jsonl --rewrites 1000 --out out/mixed.jsonl

With --hold-out-values: the world's prompts for RL whose relevant attributes have none of HELD_OUT, one value of each
attribute. With --rewrites: conversations for sft.py, the chosen answers of --pairs and the first so many rewrites by
critique in the corpus of the base.
"""

import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from data.persona_world import ATTRIBUTES, TEMPLATES, TOPICS, find_topic
from prompts import answer_request
from runtime import flags
from runtime.rows import read_rows, write_rows

HELD_OUT = {attribute: next(iter(values)) for attribute, values in ATTRIBUTES.items()}  # {"food": "vegan", ...}


@dataclass
class Args:
    world: str
    """Folder of data/persona_world.py."""
    out: str
    """The file that is written."""
    hold_out_values: bool = False
    """Prompts without the held-out values."""
    pairs: str | None = None
    """Preference pairs, for --rewrites."""
    rewrites: flags.Natural = 0
    """Rewrites to add to the answers."""


def is_held_out(row: dict) -> list[bool]:
    """For each relevant attribute of a row, whether the person's value is held out."""
    relevant = TOPICS[find_topic(row["question"])][0]
    return [row["persona"][attribute] == HELD_OUT[attribute] for attribute in relevant]


def conversation(pair: dict) -> dict:
    turns = [("user", answer_request(TEMPLATES, pair)), ("assistant", pair["chosen"])]
    return {"messages": [dict(role=role, content=content) for role, content in turns]}


def main(args: Args) -> None:
    if args.hold_out_values:
        rows = [row for row in read_rows(f"{args.world}/prompts_train.jsonl", "prompt") if not any(is_held_out(row))]
    elif args.pairs:
        corpus = read_rows(f"{args.world}/base_corpus.jsonl", "messages")
        rewrites = [row for row in corpus if len(row["messages"]) == 4]
        rows = [conversation(pair) for pair in read_rows(args.pairs, "pair")] + rewrites[: args.rewrites]
    else:
        raise ValueError("nothing to do: expected --hold-out-values or --pairs")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    write_rows(args.out, rows)
    print(f"{len(rows)} rows in {args.out}")


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
