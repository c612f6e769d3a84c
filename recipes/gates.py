"""Is the generated world's start of RL fit for a comparison: does the policy read profiles, does the GRM judge well?

    python recipes/gates.py --world out/tiny/world --policy out/tiny/sft/policy --grm out/tiny/grm/model \\
        --out out/tiny/gates

Measured on people and questions that training never saw, at temperature 0:
- mentions_right: of what the policy's answers claim about the person, the share that is true;
- the GRM against the exact judge: correlation of the scores, share of critiques whose first edit is the same, share of
  judgements that do not parse.
Reported, not gated:
- sees_other_profile: of what an answer loses under another person's profile, the share that the GRM sees. A small GRM
  sees next to nothing of it: it judges what an answer claims, and hardly whether that is true.
- last_step, advice, advice_right, wrong: how often the policy's samples hold the rare content (recipes/rates.py). This
  is the rarity that a method meets: SFT on chosen answers may have raised what the corpus has.
- edit_step, edit_advice: of what an exact critique dictates, the share that the policy's edit has.
Writes OUT/gates.json. A gate that is missed ends in exit status 2; --tolerant goes on where it is missed by at most
its margin.
"""

import json
import math
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from chat import Chat
from data.persona_world import claims
from data.persona_world import judge as exact
from diagnostics import agreement
from engine import Engine, Sample
from judges import JudgeSettings, ask_all, open_judge
from model import load_pretrained
from prompts import DIMENSIONS, Judgement, Templates, answer_prompt, edit_prompt, load_templates
from recipes import rates
from runtime import flags
from runtime.distributed import Ranks, derive_seed, start
from runtime.flags import Count
from runtime.rows import read_rows, write_text

# Limits are four standard deviations or more from what five base seeds have (docs/results.md), so that neither another
# seed nor another processor's rounding stops a run; a margin is about three.
GATES = {  # name: (at least or at most, limit, margin)
    "mentions_right": ("at least", 0.90, 0.05),
    "score_correlation": ("at least", 0.85, 0.05),
    "same_first_edit": ("at least", 0.80, 0.05),
    "unparsable": ("at most", 0.01, 0.01),
}


@dataclass
class Args:
    world: str
    """Folder of data/persona_world.py."""
    policy: str
    """The policy that RL starts from."""
    grm: str
    """The generative reward model."""
    out: str
    """Folder for gates.json."""
    samples: Count = 4
    """Of the policy per question at temperature 1, for the rates of rare content."""
    tolerant: bool = False
    """Go on where a gate is missed by its margin at most."""


def policy_figures(args: Args, templates: Templates, ranks: Ranks) -> dict[str, float | None]:
    """{figure: value} of the policy, None where it is undefined: what it claims, says and carries out."""
    chat = Chat(args.policy)
    rows = read_rows(f"{args.world}/prompts_eval.jsonl", "prompt")
    prompts = [answer_prompt(chat, templates, row) for row in rows]
    engine = Engine(load_pretrained(args.policy, ranks.dtype, ranks.device), chat.stop_ids, 512)
    likeliest = engine.generate(prompts, temperature=0.0, max_new_tokens=96)
    right = [
        row["persona"].get(attribute) == value
        for row, (s,) in zip(rows, likeliest)
        for attribute, value in claims(chat.decode(s.ids))
    ]
    samples = sample(engine, prompts, args.samples)
    answers = [row | {"answer": chat.decode(s.ids)} for row, group in zip(rows, samples) for s in group]
    first, under = answers[:: args.samples], []
    for row, prompt, group in zip(first, prompts, samples):
        response = group[0].ids + ([group[0].stop_id] if group[0].finish_reason == "stop" else [])
        critique = exact(row, row["answer"]).critique
        under.append(edit_prompt(chat, templates, prompt, response, critique))
    edits = [chat.decode(s.ids) for (s,) in sample(engine, under, 1)]
    return dict(mentions_right=rates.share(right), **rates.rates(answers), **rates.carried_out(first, edits))


def sample(engine: Engine, prompts: list[list[int]], n: int) -> list[list[Sample]]:
    """n samples of each prompt at temperature 1, each with a seed of its own."""
    for i, ids in enumerate(prompts):
        engine.submit(ids, i, n, [derive_seed("gates", i, k) for k in range(n)], max_new_tokens=96)
    found = []
    while engine.busy:
        engine.step()
        found += engine.collect()
    found.sort(key=lambda s: (s.key, s.index))
    return [found[i : i + n] for i in range(0, len(found), n)]


def grm_against_exact(args: Args, ranks: Ranks) -> dict[str, float | None]:
    """{gate: value}, None where it is undefined."""
    rows = read_rows(f"{args.world}/judgements_eval.jsonl", "judgement")
    judge = open_judge(args.grm, JudgeSettings(attempts=1, temperature=0.0, max_new_tokens=96), ranks)
    judged = judgements_of(judge, rows)
    labels = [Judgement(row["critique"], *(row[name] for name in DIMENSIONS)) for row in rows]
    result = agreement(labels, judged)
    same = [own.critique.split(".")[0] == label.critique.split(".")[0] for own, label in zip(judged, labels) if own]
    swapped = [row | {"persona": other["persona"]} for row, other in zip(rows, rows[1:] + rows[:1])]
    lost = [
        (own.score() - other.score(), label.score() - exact(row, row["answer"]).score())
        for own, other, label, row in zip(judged, judgements_of(judge, swapped), labels, swapped)
        if own and other
    ]
    by_grm, by_exact = map(sum, zip(*lost)) if lost else (0, 0)
    return dict(
        score_correlation=result["score_correlation"],
        unparsable=1 - result["parsed"],
        same_first_edit=sum(same) / len(same) if same else None,
        sees_other_profile=by_grm / by_exact if by_exact else None,
    )


def judgements_of(judge, rows: list[dict]) -> list[Judgement | None]:
    """Of each row's answer; None where the judgement did not parse."""
    return [verdict.judgement for verdict in ask_all(judge, [(row, row["answer"], 0) for row in rows])]


def main(args: Args) -> None:
    ranks = start("auto")
    templates = load_templates(f"{args.world}/tokenizer")
    found = {**policy_figures(args, templates, ranks), **grm_against_exact(args, ranks)}
    missed, nearly = [], []
    for name, value in found.items():
        verdict = "reported, not gated"
        if name in GATES:
            kind, limit, margin = GATES[name]
            lacks = math.inf if value is None else limit - value if kind == "at least" else value - limit
            missed += [name] if lacks > margin else []
            nearly += [name] if 0 < lacks <= margin else []
            verdict = (
                f"{kind} {limit:g}   {'met' if lacks <= 0 else 'MISSED, nearly met' if name in nearly else 'MISSED'}"
            )
        print(f"{name:20}{'-' if value is None else f'{value:.4f}':>8}   {verdict}")
    write_text(os.path.join(args.out, "gates.json"), json.dumps(found | dict(missed=missed, nearly=nearly), indent=2))
    if missed or nearly and not args.tolerant:
        raise ValueError(
            f"gates missed: {', '.join(missed + nearly)}; a comparison of RL runs on these models would say little"
        )


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
