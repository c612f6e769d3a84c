"""The closing table of recipes/tiny.sh: evaluated policies, failed sanity checks, and what edits gained in training.

The policies have been evaluated on the generated world's questions; NOTE explains the columns.

    python recipes/tiny_table.py --runs "SFT=out/tiny/eval/sft" "CPE=out/tiny/eval/cpe" --edits-of out/tiny/cpe
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.persona_world import judge, recites_profile
from evaluation.annotations import mean_and_error
from evaluation.tables import percent_text
from json_files import read_json
from recipes import rare_content
from runtime import flags
from runtime.rows import read_rows, step_files


@dataclass
class Args:
    runs: tuple[str, ...]
    """NAME=FOLDER of finished evaluations (evaluate.py), one line each."""
    edits_of: str | None = None
    """Run folder of ppo_cpe.py: how much better its edits are than their originals."""
    checks: str | None = None
    """Folder of recipes/sanity_checks.py: failed checks are named below the table."""


COLUMNS = ("score", "last step, %", "advice, %", "wrong fact, %", "recites, %", "tokens")
NOTE = """\
score: by the exact judge, -5 to 4.75, mean ± standard error over the questions; last step, advice: how often
answers say what critiques ask for and answers of SFT lack; win rate: against SFT, 95 % interval"""


def with_error(figure: dict, scale: float = 1) -> str:
    """Text of a mean and its standard error."""
    return f"{scale * figure['mean']:.2f} ± {scale * figure['standard_error']:.2f}"


def run_line(name: str, folder: str) -> str:
    """One evaluated policy."""
    results = read_json(f"{folder}/results.json")
    rows = read_rows(f"{folder}/answers_model.jsonl", "object")
    rare: dict = rare_content.measure(rows)
    recites = mean_and_error(recites_profile(row["persona"], row["answer"]) for row in rows)
    figures = [with_error(results["model"]["reward"])]
    figures += [f"{100 * rare[key]:.1f}" for key in ("last_step", "advice", "wrong")]
    figures += [with_error(recites, 100), with_error(results["model"]["n_tokens"])]
    win_rate = percent_text(results["win_rate"])
    return f"{name:12}" + "".join(f"{figure:>15}" for figure in figures) + f"{win_rate:>22}"


def failed_checks(folder: str) -> list[str]:
    """A line for each sanity check that failed."""
    report = read_json(f"{folder}/sanity_checks.json")
    return [
        f"sanity check {name}: {report[name]} (recipes/sanity_checks.py): these models are weaker than they should be"
        for name in report["missed"] + report["nearly"]
    ]


def edit_line(part: str, files: Sequence[str]) -> list[str]:
    """Mean gain of edits over their originals in some steps, by the run's and the exact judge; [] without edits."""
    rows = [row for file in files for row in read_rows(file, "object") if row["edit"]]
    if not rows:
        return []
    run_gain = np.mean([row["edit"]["reward"] - row["reward"] for row in rows])
    exact_gains = []
    for row in rows:
        before = judge(row, row["answer"]).score()
        after = judge(row, row["edit"]["answer"]).score()
        exact_gains.append(after - before)
    gains = np.array(exact_gains)
    better = 100 * np.mean(gains > 0)
    worse = 100 * np.mean(gains < 0)
    return [f"{part:22}{run_gain:>+12.2f}{gains.mean():>+14.2f}{better:>12.0f}{worse:>12.0f}{len(rows):>8}"]


def edit_table(folder: str) -> list[str]:
    """Gain of edits in the first and last third of a run, and in all of it."""
    files = [path for _, path in step_files(folder, "rollouts")]
    third = len(files) // 3
    header = (
        f"{'edits less originals':22}{'run judge':>12}{'exact judge':>14}{'better, %':>12}{'worse, %':>12}{'edits':>8}"
    )
    lines = [header]
    lines += edit_line("first third", files[:third])
    lines += edit_line("last third", files[len(files) - third :])
    lines += edit_line("all", files)
    return lines


def main(args: Args) -> None:
    print(f"{'':12}" + "".join(f"{title:>15}" for title in COLUMNS) + f"{'win rate, %':>22}")
    for run in args.runs:
        name, _, folder = run.partition("=")
        print(run_line(name, folder))
    print(NOTE)
    for line in failed_checks(args.checks) if args.checks else []:
        print(line)
    if args.edits_of:
        print("", *edit_table(args.edits_of), sep="\n")


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
