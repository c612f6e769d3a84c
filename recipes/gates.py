"""Is the miniature fit for a comparison? A policy that misreads profiles, or a judge that cannot judge, decides it.

    python recipes/gates.py --world out/tiny/world --policy out/tiny/sft/policy --grm out/tiny/grm/model --out out/tiny/gates

On people and questions that training never saw, all greedy:
- mentions: of the values that the policy's answers claim of the person, the share that is right;
- the GRM against the exact judge: correlation of scores, share of critiques whose first edit is the same, unparsable.
Writes OUT/gates.json; exit status 1 where one is missed.
"""

import json
import os
import sys
from dataclasses import dataclass

import numpy as np
import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402
from data.persona_world import read_sentences  # noqa: E402
from generate import Engine  # noqa: E402
from judges import open_judge  # noqa: E402
from model import load_pretrained  # noqa: E402
from prompts import Chat, Judgement, answer_prompt, load_templates  # noqa: E402

GATES = {  # name: (at least or at most, limit)
    "mentions_right": ("at least", 0.90), "score_correlation": ("at least", 0.85),
    "same_first_edit": ("at least", 0.85), "unparsable": ("at most", 0.01)}


@dataclass
class Args:
    world: str
    """Folder of data/persona_world.py."""
    policy: str
    """The start policy of RL."""
    grm: str
    """The generative reward model."""
    out: str
    """Folder of gates.json."""


def mentions_right(args, templates, ranks):
    """-> share of the claims in the policy's answers that are true of the person."""
    chat = Chat(args.policy)
    rows = common.read_rows(f"{args.world}/prompts_eval.jsonl", "prompt")
    engine = Engine(load_pretrained(args.policy, ranks.dtype, ranks.device), chat.stop_ids, 512)
    samples = engine.generate([answer_prompt(chat, templates, row) for row in rows], temperature=0.0, max_new_tokens=96)
    right = [row["persona"].get(item[1]) == item[2] for row, (sample,) in zip(rows, samples)
             for sentence in read_sentences(row["persona"], chat.decode(sample.ids))
             for item in sentence.items if item[0] == "claim"]
    return float(np.mean(right)) if right else 0.0


def judge_agreement(args, templates, ranks):
    """-> correlation of scores, share of equal first edits, share without a judgement."""
    rows = common.read_rows(f"{args.world}/judgements_eval.jsonl", "judgement")
    judge = open_judge(args.grm, templates, ranks, attempts=1, temperature=0.0, max_new_tokens=96)
    for i, row in enumerate(rows):
        judge.submit(i, row, row["answer"], seed=0)
    found = {}
    while judge.busy:
        found |= {v.key: v.judgement for v in judge.poll() if v.judgement}
    labels = {i: Judgement(*(rows[i][k] for k in ("critique", "helpfulness", "personalization", "naturalness"))) for i in found}
    scores = np.array([[found[i].score(), labels[i].score()] for i in found])  # [N, 2]
    first = [[j.critique.split(".")[0] for j in (found[i], labels[i])] for i in found]
    return dict(score_correlation=float(np.corrcoef(scores.T)[0, 1]) if len(found) > 1 else 0.0,
                same_first_edit=float(np.mean([own == label for own, label in first])) if first else 0.0,
                unparsable=1 - len(found) / len(rows))


def main(args):
    ranks = common.start("auto")
    templates = load_templates(*(f"{args.world}/templates/{name}.txt" for name in ("answer", "edit", "grm")))
    found = dict(mentions_right=mentions_right(args, templates, ranks), **judge_agreement(args, templates, ranks))
    missed = []
    for name, (kind, limit) in GATES.items():
        met = found[name] >= limit if kind == "at least" else found[name] <= limit
        missed += [] if met else [name]
        print(f"{name:20}{found[name]:8.3f}   {kind} {limit:g}   {'met' if met else 'MISSED'}")
    common.write_text(os.path.join(args.out, "gates.json"), json.dumps(found | {"missed": missed}, indent=2))
    if missed:
        raise ValueError(f"gates missed: {', '.join(missed)}; a comparison of RL runs on these models would say little")


if __name__ == "__main__":
    with common.user_errors():
        main(tyro.cli(Args))
