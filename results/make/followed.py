"""Do edits follow the words of a critique? A table in Markdown.

The SFT policy that RL starts from at R = 0 answers the questions of unseen people, and edits each answer under
critiques in the exact judge's form. Their words are right, wrong, or missing.
"""

from collections import defaultdict
from collections.abc import Callable
from random import Random

import numpy as np

from chat import Chat
from data.persona_world import ATTRIBUTES, TOPICS, edit_text, find_topic
from engine import Engine
from evaluation.tables import spread
from model import load_pretrained
from prompts import answer_prompt, edit_prompt, load_templates
from recipes.rare_content import item_of, items_of
from recipes.sanity_checks import KV_TOKENS, sample
from results.make.critics import edits_of, misled
from results.make.draw import markdown_table
from runtime.distributed import start
from runtime.rows import read_rows

Edit = tuple[str, ...]  # as `persona_world.review` has them: ("say", attribute), ("add", step), ...
Said = tuple[dict, Edit] | None  # the persona and the edit that a sentence of the critique is of; None: it says nothing


def elsewhere(rng: Random, row: dict, edit: Edit) -> Said:
    """The person's value of an attribute that does not matter for the question."""
    if edit[0] == "say":
        relevant = TOPICS[find_topic(row["question"])][0]
        edit = ("say", rng.choice([attribute for attribute in ATTRIBUTES if attribute not in relevant]))
    return row["persona"], edit


CRITIQUES: dict[str, Callable[[Random, dict, Edit], Said]] = {
    "the exact words": lambda rng, row, edit: (row["persona"], edit),
    "another value, another topic's step": lambda rng, row, edit: misled(rng, row["persona"], edit),
    "an attribute that does not matter": elsewhere,
    "a full stop": lambda rng, row, edit: None,
}


def measure(out: str, seed: int) -> dict[str, dict[str, float]]:
    """{critique: {"advice", "step": percent of what the exact critique asks for that the edits say; "told advice",
    "told step": percent of what the critique says instead}}."""
    policy = f"{out}/seed{seed}/rate0/sft/policy"
    ranks = start("fp32")
    chat = Chat(policy)
    templates = load_templates(f"{out}/seed{seed}/recipe/world/tokenizer")
    rows = read_rows(f"{out}/seed{seed}/recipe/world/prompts_eval.jsonl", "prompt")
    prompts = [answer_prompt(chat, templates, row) for row in rows]
    engine = Engine(load_pretrained(policy, ranks.dtype, ranks.device), chat.stop_ids, KV_TOKENS)
    answers = [first for (first,) in sample(engine, prompts, 1)]
    figures = {}
    for name, said_of in CRITIQUES.items():
        rng = Random(seed)
        asked = []  # for each row, (what the exact critique asks for, what this one does)
        edit_prompts = []
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            wanted = edits_of(row, chat.decode(answer.ids))
            said = [said_of(rng, row, edit) for edit in wanted]
            critique = " ".join(edit_text(*sentence) for sentence in said if sentence) or "."
            edit_prompts.append(edit_prompt(chat, templates, prompt, answer.response_ids, critique))
            items = [item_of(row["persona"], edit) for edit in wanted]
            asked.append(list(zip(items, [sentence and item_of(*sentence) for sentence in said])))
        found = defaultdict(list)
        for row, pairs, (edit,) in zip(rows, asked, sample(engine, edit_prompts, 1), strict=True):
            items = items_of(row, chat.decode(edit.ids))
            for right, told in pairs:
                if right:
                    found[right[0]].append(right in items)
                if told and told != right:
                    found[f"told {told[0]}"].append(told in items)
        figures[name] = {kind: 100 * float(np.mean(values)) for kind, values in found.items()}
    return figures


def page(out: str, seeds: int) -> str:
    """The table, mean ± standard deviation over seeds."""
    by_seed = [measure(out, seed) for seed in range(seeds)]
    header = ["critique", "advice that suits", "advice that it says instead", "right step", "step that it says instead"]
    lines = []
    for name in CRITIQUES:
        cells = []
        for kind in ("advice", "told advice", "step", "told step"):
            values = [figures[name][kind] for figures in by_seed if kind in figures[name]]
            cells.append(spread(values, 1))
        lines.append([name, *cells])
    note = "Percent of what a critique asks for. Seeds: " + ", ".join(map(str, range(seeds)))
    return f"# Do edits follow the words of a critique?\n\n{note}.\n\n{markdown_table(header, lines)}\n"
