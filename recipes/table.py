"""The table at the end of recipes/tiny.sh: runs of evaluate.py against one baseline, and what the edits of a PPO run did.

python recipes/table.py --runs "SFT=out/tiny/eval/sft" "CPE=out/tiny/eval/cpe" --edits-of out/tiny/cpe
"""

import glob
import json
import os
import sys
from dataclasses import dataclass

import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.persona_world import judge
from runtime.flags import user_errors
from runtime.rows import read_rows

COLUMNS = {
    "reward": "score",
    "helpfulness": "helpful",
    "personalization": "personal",
    "naturalness": "natural",
    "n_tokens": "tokens",
    "recites_profile": "recites, %",
}


@dataclass
class Args:
    runs: list[str]
    """NAME=FOLDER of a finished evaluate.py, a line of the table each."""
    edits_of: str | None = None
    """Run folder of ppo_cpe.py on the generated world: its edits against their originals, by the exact judge too."""


def table(runs):
    lines = [f"{'':12}" + "".join(f"{title:>15}" for title in COLUMNS.values()) + f"{'win rate, %':>22}"]
    for run in runs:
        name, _, folder = run.partition("=")
        with open(os.path.join(folder, "results.json")) as f:
            results = json.load(f)
        cells = []
        for column in COLUMNS:
            scale = 100 if column == "recites_profile" else 1
            mean, error = (scale * results["model"][column][k] for k in ("mean", "standard_error"))
            cells.append(f"{mean:.2f} ± {error:.2f}")
        rate = "{:.1f} ({:.1f} to {:.1f})".format(*(100 * results["win_rate"][k] for k in ("win_rate", "low", "high")))
        lines.append(f"{name:12}" + "".join(f"{cell:>15}" for cell in cells) + f"{rate:>22}")
    return lines + ["mean ± standard error over the prompts, by the exact judge; win rate with its 95 % interval"]


def edits(folder):
    """Gain of edits over originals: by the judge of the run, and by the exact one; thirds of the run apart."""
    files = sorted(glob.glob(os.path.join(folder, "rollouts", "step_*.jsonl")))
    thirds = [("first third", files[: len(files) // 3]), ("last third", files[-(len(files) // 3) :]), ("all", files)]
    lines = [
        f"{'edits less originals':22}{'run judge':>12}{'exact judge':>14}{'better, %':>12}{'worse, %':>12}{'edits':>8}"
    ]
    for name, some in thirds:
        gains, exact = [], []
        for row in (row for file in some for row in read_rows(file, "object") if row["edit"]):
            gains.append(row["edit"]["reward"] - row["reward"])
            before, after = (
                judge(row["persona"], row["question"], text).score() for text in (row["answer"], row["edit"]["answer"])
            )
            exact.append(after - before)
        if exact:
            better, worse = (100 * sum(x) / len(exact) for x in ((e > 0 for e in exact), (e < 0 for e in exact)))
            lines.append(
                f"{name:22}{sum(gains) / len(gains):>+12.2f}{sum(exact) / len(exact):>+14.2f}"
                f"{better:>12.0f}{worse:>12.0f}{len(exact):>8}"
            )
    return lines


if __name__ == "__main__":
    with user_errors():
        args = tyro.cli(Args)
        print("\n".join(table(args.runs) + (["", *edits(args.edits_of)] if args.edits_of else [])))
