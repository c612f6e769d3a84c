"""How well a judge agrees with the exact judge, on the world's 400 held-out answers.

    python results/make/agreement.py --world out/tiny/world --judge bt:out/tiny/bt/model --out out/agreement

Writes OUT/agreement.json:

own          correlation of the rewards with the exact scores
other        the same under the next person's profile, which makes most claims wrong
sees_other   the drop in reward under that profile, as a fraction of the exact judge's
unparsable   fraction of the answers without a judgement
"""

import json
import os
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from data.persona_world import judge as exact_judge
from judges import Judge, JudgeSettings, ask_all, open_judge
from runtime import flags
from runtime.distributed import start
from runtime.rows import read_rows, write_text


@dataclass
class Args:
    world: str
    """Folder of data/persona_world.py."""
    judge: str
    """The judge, as ppo_cpe.py takes it."""
    out: str
    """Folder of agreement.json."""


def rewards(judge: Judge, rows: list[dict]) -> np.ndarray:
    """The judge's rewards and the exact scores; nan without a judgement.  # [2, rows]"""
    verdicts = ask_all(judge, [(row, row["answer"], 0) for row in rows])
    given = [np.nan if verdict.reward is None else verdict.reward for verdict in verdicts]
    return np.array([given, [exact_judge(row, row["answer"]).score() for row in rows]])


def main(args: Args) -> None:
    judge = open_judge(args.judge, JudgeSettings(attempts=1, temperature=0.0, max_new_tokens=96), start("auto"))
    rows = read_rows(f"{args.world}/judgements_eval.jsonl", "judgement")
    own = rewards(judge, rows)
    other = rewards(judge, [row | {"persona": next_["persona"]} for row, next_ in zip(rows, rows[1:] + rows[:1])])
    known = ~np.isnan(own[0]) & ~np.isnan(other[0])
    drop, exact_drop = (own - other)[:, known].sum(1)
    figures = {
        "own": float(np.corrcoef(own[:, known])[0, 1]),
        "other": float(np.corrcoef(other[:, known])[0, 1]),
        "sees_other": float(drop / exact_drop),
        "unparsable": float(1 - known.mean()),
    }
    print(figures)
    write_text(os.path.join(args.out, "agreement.json"), json.dumps(figures, indent=2))


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
