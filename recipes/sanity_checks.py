"""Checks, before RL in the generated world, that the policy reads profiles and that the GRM judges well.

    python recipes/sanity_checks.py --world out/tiny/world --policy out/tiny/sft/policy --grm out/tiny/grm/model \\
        --out out/tiny/checks

A comparison of RL runs says little about models that fail them. All figures are measured on people and questions that
training never saw, at temperature 0 unless it says samples. Checked against a limit:
- mentions_right: fraction of the policy's claims about the person that are true;
- score_correlation, same_first_edit, unparsable: the GRM against the exact judge. Correlation of the scores, fraction
  of critiques with the same first edit, fraction of judgements that do not parse;
- swapped_correlation, sees_other_profile: the same answers, judged under the next person's profile, which makes most
  claims wrong. Correlation of the scores, and the GRM's drop in score as a fraction of the exact judge's.
Reported without a limit:
- last_step, advice, advice_right, wrong: rare content in the policy's samples (recipes/rare_content.py). SFT on chosen
  answers may have raised it above what the corpus has;
- edit_step, edit_advice: how much of an exact critique the policy's edits carry out.

Writes OUT/sanity_checks.json. A failed check ends in exit status 2; with --tolerant only a check that fails by more
than its margin does.
"""

import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from chat import Chat
from data.persona_world import claims
from data.persona_world import judge as exact_judge
from diagnostics import agreement
from engine import Engine, Sample
from judges import JudgeSettings, ask_all, open_judge
from model import load_pretrained
from prompts import Judgement, Templates, answer_prompt, edit_prompt, load_templates
from recipes import rare_content
from runtime import flags
from runtime.distributed import Ranks, derive_seed, start
from runtime.flags import Count
from runtime.rows import read_rows, write_text

# Limits are three standard deviations or more from the mean over three base models (docs/results.md), so that neither
# another seed nor another processor's rounding fails a run. A margin is about three standard deviations.
CHECKS = {  # name: (at least or at most, limit, margin)
    "mentions_right": ("at least", 0.90, 0.05),
    "score_correlation": ("at least", 0.85, 0.05),
    "same_first_edit": ("at least", 0.80, 0.05),
    "swapped_correlation": ("at least", 0.85, 0.05),
    "sees_other_profile": ("at least", 0.80, 0.05),
    "unparsable": ("at most", 0.01, 0.01),
}
MAX_NEW_TOKENS = 96
KV_TOKENS = 512

Figures = dict[str, float | None]


@dataclass
class Args:
    world: str
    """Folder of data/persona_world.py."""
    policy: str
    """The policy that RL starts from."""
    grm: str
    """The generative reward model."""
    out: str
    """Folder for sanity_checks.json."""
    samples: Count = 4
    """Samples of the policy per question, at temperature 1, for the rare content."""
    tolerant: bool = False
    """Go on if a check fails by its margin at most."""


def policy_figures(args: Args, templates: Templates, ranks: Ranks) -> Figures:
    """What the policy claims, how often it says the rare content, and how well it carries out critiques."""
    chat = Chat(args.policy)
    rows = read_rows(f"{args.world}/prompts_eval.jsonl", "prompt")
    prompts = [answer_prompt(chat, templates, row) for row in rows]
    engine = Engine(load_pretrained(args.policy, ranks.dtype, ranks.device), chat.stop_ids, KV_TOKENS)

    true_claims = []
    greedy = engine.generate(prompts, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
    for row, (response,) in zip(rows, greedy):
        for attribute, value in claims(chat.decode(response.ids)):
            true_claims.append(row["persona"].get(attribute) == value)

    answers = []
    edit_prompts = []
    for row, prompt, responses in zip(rows, prompts, sample(engine, prompts, args.samples)):
        answers += [row | {"answer": chat.decode(response.ids)} for response in responses]
        critique = exact_judge(row, chat.decode(responses[0].ids)).critique
        edit_prompts.append(edit_prompt(chat, templates, prompt, responses[0].response_ids, critique))
    edits = [chat.decode(edit.ids) for (edit,) in sample(engine, edit_prompts, 1)]
    edited = answers[:: args.samples]  # the first sample of each prompt
    return {
        "mentions_right": rare_content.fraction(true_claims),
        **rare_content.measure(answers),
        **rare_content.carried_out(edited, edits),
    }


def sample(engine: Engine, prompts: list[list[int]], n: int) -> list[list[Sample]]:
    """n samples of each prompt at temperature 1, each with its own seed. Indexed [prompt][sample]."""
    for i, ids in enumerate(prompts):
        seeds = [derive_seed("gates", i, k) for k in range(n)]  # a name of before: samples stay the same
        engine.submit(ids, i, n, seeds, max_new_tokens=MAX_NEW_TOKENS)
    samples = []
    while engine.busy:
        engine.step()
        samples += engine.collect()
    samples.sort(key=lambda s: (s.key, s.index))
    return [samples[i : i + n] for i in range(0, len(samples), n)]


def grm_figures(args: Args, ranks: Ranks) -> Figures:
    """The GRM against the exact judge, on answers to their own persons and to the next ones."""
    settings = JudgeSettings(attempts=1, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
    judge = open_judge(args.grm, settings, ranks)
    rows = read_rows(f"{args.world}/judgements_eval.jsonl", "judgement")
    swapped = [row | {"persona": other["persona"]} for row, other in zip(rows, rows[1:] + rows[:1])]
    by_grm = judgements_of(judge, rows)
    by_exact = [exact_judge(row, row["answer"]) for row in rows]
    swapped_by_grm = judgements_of(judge, swapped)
    swapped_by_exact = [exact_judge(row, row["answer"]) for row in swapped]
    agreed = agreement(by_exact, by_grm)
    return {
        "score_correlation": agreed["score_correlation"],
        "unparsable": 1 - agreed["parsed"],
        "same_first_edit": same_first_edit(by_exact, by_grm),
        "swapped_correlation": agreement(swapped_by_exact, swapped_by_grm)["score_correlation"],
        "sees_other_profile": relative_drop(by_exact, swapped_by_exact, by_grm, swapped_by_grm),
    }


def same_first_edit(by_exact: list[Judgement], by_grm: list[Judgement | None]) -> float | None:
    """Fraction of the GRM's critiques whose first edit is the exact judge's."""
    same = []
    for exact, judgement in zip(by_exact, by_grm):
        if judgement:
            same.append(judgement.critique.split(".")[0] == exact.critique.split(".")[0])
    return rare_content.fraction(same)


def relative_drop(
    by_exact: list[Judgement],
    swapped_by_exact: list[Judgement],
    by_grm: list[Judgement | None],
    swapped_by_grm: list[Judgement | None],
) -> float | None:
    """The GRM's total drop in score under the other profile, as a fraction of the exact judge's."""
    grm_drop = 0.0
    exact_drop = 0.0
    for exact, swapped_exact, own, swapped in zip(by_exact, swapped_by_exact, by_grm, swapped_by_grm):
        if own and swapped:
            grm_drop += own.score() - swapped.score()
            exact_drop += exact.score() - swapped_exact.score()
    return grm_drop / exact_drop if exact_drop else None


def judgements_of(judge, rows: list[dict]) -> list[Judgement | None]:
    """The judgement of each row's answer; None where it did not parse."""
    return [verdict.judgement for verdict in ask_all(judge, [(row, row["answer"], 0) for row in rows])]


def shortfall(name: str, value: float | None) -> float:
    """How far a value is beyond the limit of its check; at most 0 where the check passes."""
    if value is None:
        return float("inf")
    bound, limit, _ = CHECKS[name]
    return limit - value if bound == "at least" else value - limit


def main(args: Args) -> None:
    ranks = start("auto")
    templates = load_templates(f"{args.world}/tokenizer")
    figures = policy_figures(args, templates, ranks) | grm_figures(args, ranks)
    missed = [name for name, (*_, margin) in CHECKS.items() if shortfall(name, figures[name]) > margin]
    nearly = [name for name in CHECKS if name not in missed and shortfall(name, figures[name]) > 0]
    for name, value in figures.items():
        verdict = "reported, no limit"
        if name in CHECKS:
            bound, limit, _ = CHECKS[name]
            verdict = f"{bound} {limit:g}   passed"
        if name in missed:
            verdict = f"{bound} {limit:g}   FAILED"
        if name in nearly:
            verdict = f"{bound} {limit:g}   FAILED, within the margin"
        print(f"{name:20}{'-' if value is None else f'{value:.4f}':>8}   {verdict}")
    report = figures | {"missed": missed, "nearly": nearly}
    write_text(os.path.join(args.out, "sanity_checks.json"), json.dumps(report, indent=2))
    if missed or (nearly and not args.tolerant):
        failed = ", ".join(missed + nearly)
        raise ValueError(f"sanity checks failed: {failed}; a comparison of RL runs on these models would say little")


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
