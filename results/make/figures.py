"""Figures of a finished experiment, read from its run folder: scores, rare content, cost, and curves over training.

Scores are the exact judge's (data/persona_world.py), unless a name says otherwise.
"""

from collections import defaultdict

import numpy as np

from data.persona_world import judge, recites_profile
from json_files import read_json
from prompts import DIMENSIONS
from recipes import rare_content
from runtime.rows import read_rows, step_files

Figures = dict[str, float | None]  # of one experiment at one seed
Curves = dict[str, list]  # of one run: a value per step; None where there is none

EDIT_METRICS = ("gain", "weight", "novel", "novel_weight", "inserted_weight")  # metrics.jsonl has them as edit/NAME


def exact_score(row: dict, answer: str) -> float:
    return judge(row, answer).score()


def recites(rows: list[dict]) -> float:
    """Percent of the answers that recite the profile."""
    return 100 * float(np.mean([recites_profile(row["persona"], row["answer"]) for row in rows]))


def evaluated(run: str, evaluation: str) -> dict:
    """Figures of a policy. run: its run folder; evaluation: that of evaluate.py.

    Exact scores, win rates and other rates in percent, fractions of rare content; of RL also the totals of the run and,
    by step, "curve" (fraction of samples with suitable advice) and "curve_generated" (tokens).
    """
    results = read_json(f"{evaluation}/results.json")
    answers = read_rows(f"{evaluation}/answers_model.jsonl", "object")
    figures: dict = {name: results["model"][name]["mean"] for name in ("reward", *DIMENSIONS, "n_tokens")}
    figures["recites"] = recites(answers)
    figures["win"] = 100 * results["win_rate"]["win_rate"]
    figures["lc"] = results["length_controlled"]["minimal"]["length_controlled_winrate"]
    figures |= rare_content.measure(answers)
    rollouts = [read_rows(path, "object") for _, path in step_files(run, "rollouts")]
    if rollouts:
        steps = read_rows(f"{run}/metrics.jsonl", "metrics")
        figures |= training_cost(steps)
        figures["curve_generated"] = [step["generated_tokens"] for step in steps]
        figures["curve"] = [rare_content.measure(rows)["advice"] for rows in rollouts]
    return figures


def training_cost(steps: list[dict]) -> Figures:
    """Totals over a run of RL, the mean seconds of an update, and the means of its edit metrics.

    Seconds include what else the machine did."""
    figures: Figures = {}
    for name, key in (("trained", "batch"), ("generated", "generated_tokens"), ("judge_calls", "judge_calls")):
        figures[name] = sum(step[key] for step in steps)
    figures["update"] = float(np.mean([step["seconds/update"] for step in steps]))
    figures["seconds"] = sum(sum(value for key, value in step.items() if key.startswith("seconds/")) for step in steps)
    for name in EDIT_METRICS:
        values = [step[f"edit/{name}"] for step in steps if step.get(f"edit/{name}") is not None]
        if values:
            figures[f"edit/{name}"] = float(np.mean(values))
    return figures


EDIT_CURVES = ("edits", "edit_advice", "novel_weight")


def edit_curves(run: str) -> Curves:
    """Curves of a run with edits, a value per step: edits per original, the fraction of the edits' relevant attributes
    with suitable advice, and the weight of novel tokens.
    """
    curves: Curves = {f"curve_{name}": [] for name in EDIT_CURVES}
    for (_, path), step in zip(step_files(run, "rollouts"), read_rows(f"{run}/metrics.jsonl", "metrics")):
        rows = read_rows(path, "object")
        edits = [row | {"answer": row["edit"]["answer"]} for row in rows if row["edit"]]
        curves["curve_edits"].append(len(edits) / len(rows))
        curves["curve_edit_advice"].append(rare_content.measure(edits)["advice"])
        curves["curve_novel_weight"].append(step.get("edit/novel_weight"))
    if not any(curves["curve_edits"]):
        return {}
    return {name: [rounded(value) for value in values] for name, values in curves.items()}


def exact_curves(run: str) -> Curves:
    """What the policy sampled, step by step: means by the exact judge, and "own" by the judge of the run."""
    curves: dict[str, list] = defaultdict(list)
    for _, path in step_files(run, "rollouts"):
        rows = read_rows(path, "object")
        curves["exact"].append(np.mean([exact_score(row, row["answer"]) for row in rows]))
        curves["own"].append(np.mean([row["reward"] for row in rows]))
        curves["tokens"].append(np.mean([row["n_tokens"] for row in rows]))
        curves["recites"].append(recites(rows))
        said = rare_content.measure(rows)
        curves["wrong"].append(said["wrong"])
        curves["advice"].append(said["advice"])
    return {name: [rounded(value) for value in values] for name, values in curves.items()}


def rounded(value: float | None) -> float | None:
    """To four significant digits."""
    return None if value is None else float(f"{value:.4g}")
