"""Is the generated world's start of RL fit for a comparison: does the policy read profiles, does the GRM judge well?

    python recipes/gates.py --world out/tiny/world --policy out/tiny/sft/policy --grm out/tiny/grm/model \\
        --out out/tiny/gates

Measured on people and questions that training never saw, at temperature 0:
- mentions_right: of what the policy's answers claim about the person, the share that is true;
- the GRM against the exact judge: correlation of the scores, share of critiques whose first edit is the same, share of
  judgements that do not parse.
Reported, not gated (sees_other_profile): of what an answer loses under another person's profile, the share that the GRM
sees. A small GRM sees next to nothing of it: it judges what an answer claims, and hardly whether that is true.
Writes OUT/gates.json; the exit status is 2 if a gate is missed.
"""

import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.persona_world import claims
from data.persona_world import judge as exact
from diagnostics import agreement
from generate import Engine
from judges import JudgeSettings, ask_all, open_judge
from model import load_pretrained
from prompts import DIMENSIONS, Chat, Judgement, Templates, answer_prompt, load_templates
from runtime import flags
from runtime.distributed import Ranks, start
from runtime.rows import read_rows, write_text

GATES = {  # name: (at least or at most, limit)
    "mentions_right": ("at least", 0.90),
    "score_correlation": ("at least", 0.85),
    "same_first_edit": ("at least", 0.85),
    "unparsable": ("at most", 0.01),
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


def mentions_right(args: Args, templates: Templates, ranks: Ranks) -> float | None:
    """Share of the claims in the policy's answers that are true of the person; None without claims."""
    chat = Chat(args.policy)
    rows = read_rows(f"{args.world}/prompts_eval.jsonl", "prompt")
    engine = Engine(load_pretrained(args.policy, ranks.dtype, ranks.device), chat.stop_ids, 512)
    samples = engine.generate([answer_prompt(chat, templates, row) for row in rows], temperature=0.0, max_new_tokens=96)
    right = [
        row["persona"].get(attribute) == value
        for row, (sample,) in zip(rows, samples)
        for attribute, value in claims(chat.decode(sample.ids))
    ]
    return sum(right) / len(right) if right else None


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
        (own.score() - other.score(), label.score() - exact(row["persona"], row["question"], row["answer"]).score())
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
    found = dict(mentions_right=mentions_right(args, templates, ranks), **grm_against_exact(args, ranks))
    missed = []
    for name, (kind, limit) in GATES.items():
        value = found[name]
        met = value is not None and (value >= limit if kind == "at least" else value <= limit)
        missed += [] if met else [name]
        text = "-" if value is None else f"{value:.3f}"
        print(f"{name:20}{text:>8}   {kind} {limit:g}   {'met' if met else 'MISSED'}")
    share = found["sees_other_profile"]
    print(f"{'sees_other_profile':20}{'-' if share is None else f'{share:.3f}':>8}   reported, not gated")
    write_text(os.path.join(args.out, "gates.json"), json.dumps(found | {"missed": missed}, indent=2))
    if missed:
        raise ValueError(f"gates missed: {', '.join(missed)}; a comparison of RL runs on these models would say little")


if __name__ == "__main__":
    with flags.user_errors():
        main(flags.parse(Args, __doc__))
