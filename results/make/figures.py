"""Figures of a finished experiment, read from its run folder: scores, rare content, cost, and curves over training.

Scores are the exact judge's (data/persona_world.py), unless a name says otherwise.
"""

import os
from collections import defaultdict

import numpy as np

from data.persona_world import claims, judge, recites_profile
from json_files import read_json
from prompts import DIMENSIONS
from recipes import rare_content
from runtime.rows import read_rows, step_files

Figures = dict[str, float | None]  # of one experiment at one seed
Curves = dict[str, list]  # of one run: a value per step; None where there is none

EDIT_METRICS = (  # metrics.jsonl has them as edit/NAME
    *(
        "gain",
        "ratio",
        "ratio_low",
        "weight",
        "kept_gradient_mass",
        "inserted_gradient_mass",
        "inserted_weight",
        "inserted_clipfrac",
    ),
    *("novel", "novel_ratio", "novel_weight", "novel_clipfrac"),
)
LEDGER = {"ratio": "r = p / q", "weight": "weight on grad log p", "clipfrac": "without gradient, share"}


def exact_score(row: dict, answer: str) -> float:
    return judge(row, answer).score()


def recites(rows: list[dict]) -> float:
    """Percent of the answers that recite the profile."""
    return 100 * float(np.mean([recites_profile(row["persona"], row["answer"]) for row in rows]))


def claims_right(rows: list[dict]) -> float | None:
    """Percent of the claims about the person that are right; None without claims."""
    right = [row["persona"].get(attribute) == value for row in rows for attribute, value in claims(row["answer"])]
    return 100 * sum(right) / len(right) if right else None


# -- one number per experiment -----------------------------------------------------------------------------------------


def evaluated(run: str, evaluation: str | None = None) -> Figures:
    """Exact scores, win rates and other rates in percent, and the cost of the run. evaluation: RUN/eval if None."""
    evaluation = evaluation or f"{run}/eval"
    results = read_json(f"{evaluation}/results.json")
    answers = read_rows(f"{evaluation}/answers_model.jsonl", "object")
    figures = {name: results["model"][name]["mean"] for name in ("reward", *DIMENSIONS, "n_tokens")}
    figures["recites"] = recites(answers)
    figures["claims"] = claims_right(answers)
    figures["win"] = 100 * results["win_rate"]["win_rate"]
    figures["lc"] = results["length_controlled"]["minimal"]["length_controlled_winrate"]
    if os.path.exists(f"{run}/swap/results.json"):
        figures["swap"] = read_json(f"{run}/swap/results.json")["difference"]["reward"]["difference"]
    if os.path.exists(f"{run}/done.json"):
        figures["minutes"] = read_json(f"{run}/done.json")["seconds"] / 60
    if os.path.isdir(f"{run}/rollouts"):
        figures |= training_cost(read_rows(f"{run}/metrics.jsonl", "metrics"))
    return figures


def training_cost(steps: list[dict]) -> Figures:
    """Totals over a run of RL, and the means of its edit metrics."""
    figures = {}
    for name, key in (("trained", "batch"), ("generated", "generated_tokens"), ("judge_calls", "judge_calls")):
        figures[name] = sum(step[key] for step in steps)
    for name in EDIT_METRICS:
        values = [step[f"edit/{name}"] for step in steps if step.get(f"edit/{name}") is not None]
        if values:
            figures[f"edit/{name}"] = float(np.mean(values))
    inserted = figures.get("edit/inserted_gradient_mass", 0)
    if inserted:
        figures["inserted"] = 100 * inserted / (figures["edit/kept_gradient_mass"] + inserted)
    return figures


def with_rare_content(run: str) -> dict:
    """What rarity.json keeps of an experiment: sanity checks, or a trained policy's figures and curves."""
    if os.path.exists(f"{run}/sanity_checks.json"):
        return read_json(f"{run}/sanity_checks.json")
    answers = read_rows(f"{run}/eval/answers_model.jsonl", "object")
    rollouts = [read_rows(path, "object") for _, path in step_files(run, "rollouts")]
    sampled_advice = [rare_content.measure(rows)["advice"] for rows in rollouts]
    figures: dict = evaluated(run) | rare_content.measure(answers) | {"curve": sampled_advice}
    if rollouts:
        figures |= edit_curves(read_rows(f"{run}/metrics.jsonl", "metrics"))
    return figures


def seconds_by_phase(run: str) -> Figures:
    """Mean seconds of a step's phases."""
    steps = read_rows(f"{run}/metrics.jsonl", "metrics")
    return {phase: sum(s[f"seconds/{phase}"] for s in steps) / len(steps) for phase in ("rollout", "score", "update")}


# -- curves over training ----------------------------------------------------------------------------------------------


def edit_curves(steps: list[dict]) -> Curves:
    """What the loss did, step by step, with the tokens that edits inserted.

    -> {"novel_ratio", "followed_ratio", ...}: for novel tokens (p < 0.1) and for the other inserted tokens, which
    follow from them. None at a step without such tokens. Empty for a run without edits.
    """
    curves: dict[str, list] = defaultdict(list)
    for step in steps:
        novel = step.get("edit/novel", 0)  # fractions of the edits' tokens
        followed = 1 - step.get("edit/kept", 1) - novel
        for quantity in LEDGER:
            of_novel = step.get(f"edit/novel_{quantity}")
            of_followed = None
            if followed > 1e-6:
                of_inserted = step.get(f"edit/inserted_{quantity}")
                of_followed = ((novel + followed) * of_inserted - novel * (of_novel or 0)) / followed
            curves[f"novel_{quantity}"].append(rounded(of_novel))
            curves[f"followed_{quantity}"].append(rounded(of_followed))
    return {name: values for name, values in curves.items() if any(value is not None for value in values)}


def rounded(value: float | None) -> float | None:
    """To four significant digits."""
    return None if value is None else float(f"{value:.4g}")


def exact_curves(run: str) -> Curves:
    """What the policy sampled, step by step: means by the exact judge, and "own" by the judge of the run."""
    curves: dict[str, list] = defaultdict(list)
    steps = read_rows(f"{run}/metrics.jsonl", "metrics")
    for (_, path), step in zip(step_files(run, "rollouts"), steps, strict=True):
        rows = read_rows(path, "object")
        judgements = [judge(row, row["answer"]) for row in rows]
        curves["exact"].append(np.mean([j.score() for j in judgements]))
        for name in DIMENSIONS:
            curves[name].append(np.mean([getattr(j, name) for j in judgements]))
        curves["own"].append(np.mean([row["reward"] for row in rows]))
        curves["tokens"].append(np.mean([row["n_tokens"] for row in rows]))
        curves["claims"].append(claims_right(rows))
        curves["recites"].append(recites(rows))
        edited = [row for row in rows if row.get("edit")]
        if edited:
            gains = edit_gains(edited)
            curves["gain_exact"].append(gains.mean())
            curves["gain_own"].append(np.mean([row["edit"]["reward"] - row["reward"] for row in edited]))
            curves["improved"].append(100 * np.mean(gains > 0))
            curves["worse"].append(100 * np.mean(gains < 0))
        curves["generated_tokens"].append(step["generated_tokens"])
        curves["judge_calls"].append(step["judge_calls"])
    for name in ("generated_tokens", "judge_calls"):
        curves[name] = list(np.cumsum(curves[name]) / 1000)
    return curves


def edit_gains(rows: list[dict]) -> np.ndarray:
    """Exact score of each row's edit less that of its answer.  # [rows]"""
    return np.array([exact_score(row, row["edit"]["answer"]) - exact_score(row, row["answer"]) for row in rows])


def held_out_curves(run: str) -> Curves:
    """{"step", "answer", "edit", "gap"}: exact scores on prompts that are not trained on, by steps trained before."""
    curves: dict[str, list] = defaultdict(list)
    for step, path in step_files(run, "held_out"):
        rows = read_rows(path, "object")
        curves["step"].append(step - 1)
        curves["answer"].append(np.mean([exact_score(row, row["answer"]) for row in rows]))
        edited = [row for row in rows if row.get("edit")]
        if edited:
            curves["edit"].append(np.mean([exact_score(row, row["edit"]["answer"]) for row in edited]))
            curves["gap"].append(edit_gains(edited).mean())
    return curves
