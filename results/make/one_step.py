"""One step of Critique-Post-Edit with real text, as Markdown: the page docs/one-step.md.

RUN is a run of ppo_cpe.py with edits and --log-tokens. The page shows the step's edit that gained most, of those whose
tokens were logged: persona, answer, critique, and the edit as a diff. For each inserted token it gives p, q, r, the
weight on grad log p, and the advantage.
"""

import difflib
import re
from math import exp

from json_files import read_json
from prompts import DIMENSIONS
from results.make.draw import markdown_table
from runtime.rows import read_rows, step_files


def find_edit(run: str, first_step: int) -> tuple[int, dict, dict, dict]:
    """-> step, rollout row, token row of its edit, token row of its original. ValueError: no such edit."""
    for step, path in step_files(run, "tokens"):
        if step < first_step:
            continue
        tokens = {(row["prompt_id"], row["sample_id"], row["edit"]): row for row in read_rows(path, "object")}
        rollouts = read_rows(f"{run}/rollouts/step_{step:06d}.jsonl", "object")
        edited = [row for row in rollouts if (row["prompt_id"], row["sample_id"], True) in tokens]
        if edited:
            best = max(edited, key=lambda row: row["edit"]["reward"] - row["reward"])
            sample = (best["prompt_id"], best["sample_id"])
            return step, best, tokens[*sample, True], tokens[*sample, False]
    raise ValueError(f"{run}/tokens: no edit from step {first_step} on; expected a run with edits and --log-tokens")


def word_diff(before: str, after: str) -> str:
    """What the edit deleted is struck through, what it inserted is bold."""
    old = before.split()
    new = after.split()
    parts = []
    for kind, i, j, k, n in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind in ("delete", "replace"):
            parts.append(f"~~{' '.join(old[i:j])}~~")
        if kind in ("insert", "replace"):
            parts.append(f"**{' '.join(new[k:n])}**")
        if kind == "equal":
            parts.append(" ".join(new[k:n]))
    return " ".join(parts)


def token_table(row: dict) -> str:
    """p, q, r, weight and advantage of the tokens that the edit inserted."""
    columns = zip(row["text"], row["kept"], row["logp"], row["logq"], row["weight"], row["advantage"], strict=True)
    lines = []
    for text, kept, logp, logq, weight, advantage in columns:
        if kept:
            continue
        literal = re.sub(r"([|`*_<~\\])", r"\\\1", text)  # shown as text, whatever it holds
        probabilities = [f"{value:.4f}" for value in (exp(logp), exp(logq), exp(logp - logq))]
        lines.append([literal, *probabilities, f"{weight:.4f}", f"{advantage:+.2f}"])
    return markdown_table(["token", "p", "q", "r = p / q", "weight", "advantage"], lines)


def page(run: str, first_step: int = 1) -> str:
    step, row, edit, original = find_edit(run, first_step)
    settings = read_json(f"{run}/args.json")
    scores = [
        ["answer", *(row[name] for name in DIMENSIONS), f"{row['reward']:.2f}"],
        ["edit", *(row["edit"][name] for name in DIMENSIONS), f"{row['edit']['reward']:.2f}"],
    ]
    persona = row["persona"]
    if isinstance(persona, dict):
        persona = ", ".join(f"{key}: {value}" for key, value in persona.items())
    weights = ", ".join(f"{weight:g}" for weight in settings["score_weights"])
    n_kept = sum(edit["kept"])
    n_tokens = len(edit["kept"])
    return f"""# One step, with real text

Made by `python results/make/tables.py one-step --step {step} > docs/one-step.md` from a run of `bash recipes/tiny.sh`.
Prompt {row["prompt_id"]}, loss on edits `{settings["edit_loss"]}`, its baseline `{settings["edit_baseline"]}`.

**1. A prompt**: the persona, and a question. Nothing else is in the context in which answers, and later edits, are
trained.

> {persona}
>
> {row["question"]}

**2. The policy answers.** This is one of {settings["n_samples"]} samples, the one whose edit gained most among
those whose tokens were logged:

> {row["answer"]}

**3. The judge checks each claim about the person** (attribute, value of the profile, value of the answer), then writes
a critique and three scores from -5 to 5. The reward is their mean, weighted by {weights}:

> {row["checks"] or "(no checks)"}
>
> {row["critique"]}

{markdown_table(["", *DIMENSIONS, "reward"], scores)}

**4. The policy rewrites its answer by the critique**, and the judge scores that, too (second line above). Deleted words
are struck through, inserted ones bold:

> {word_diff(row["answer"], row["edit"]["answer"])}

**5. PPO trains on both, under the prompt alone.** The answer's tokens have PPO's clipped loss; its advantage here is
{original["advantage"][0]:+.2f} on the first token. All {n_tokens} tokens of the edit are trained, of which {n_kept} are
in the answer already. The table has the others. p is their probability under the prompt alone, q under the edit prompt,
which holds answer and critique. The gradient of a token is -weight x advantage x grad log p (`edit_loss` in
`ppo_cpe.py`; [method.md](method.md) 2 has the losses). Tokens with p far below q are what only the critique brings in.

{token_table(edit)}
"""
