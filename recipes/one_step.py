"""One step of Critique-Post-Edit with real text, as Markdown: what docs/one-step.md holds.

    python recipes/one_step.py --run out/tiny/cpe > docs/one-step.md

RUN is a run of ppo_cpe.py with edits and --log-tokens. Of the step's edits whose tokens were kept, the one that gained
most is shown: persona, answer, critique, the edit as a diff, and for the tokens that it inserted p, q, r, the weight on
grad log p and the advantage.
"""

import difflib
import os
import re
import sys
from dataclasses import dataclass
from math import exp

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from prompts import DIMENSIONS
from recipes.draw import markdown_table, read_json
from runtime import flags
from runtime.rows import read_rows, step_files


@dataclass
class Args:
    run: str
    """Run folder of ppo_cpe.py."""
    step: flags.Count = 1
    """Which step; the next one with an edit whose tokens were kept is taken."""


def find(run: str, first: int) -> tuple[int, dict, dict, dict]:
    """-> step, rollout row, its edit's token row, its original's. ValueError: no edit's tokens were kept."""
    for step, path in step_files(run, "tokens"):
        kept = {(row["prompt_id"], row["sample_id"], row["edit"]): row for row in read_rows(path, "object")}
        rollouts = read_rows(f"{run}/rollouts/step_{step:06d}.jsonl", "object")
        edited = [row for row in rollouts if (row["prompt_id"], row["sample_id"], True) in kept]
        if step >= first and edited:
            row = max(edited, key=lambda row: row["edit"]["reward"] - row["reward"])
            key = (row["prompt_id"], row["sample_id"])
            return step, row, kept[*key, True], kept[*key, False]
    raise ValueError(f"{run}/tokens: no edit from step {first} on; expected a run with edits and --log-tokens")


def word_diff(before: str, after: str) -> str:
    """What the edit deleted struck through, what it inserted in bold."""
    old, new, parts = before.split(), after.split(), []
    for kind, i, j, k, n in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        parts += [f"~~{' '.join(old[i:j])}~~"] if kind in ("delete", "replace") else []
        parts += [f"**{' '.join(new[k:n])}**"] if kind in ("insert", "replace") else []
        parts += [" ".join(new[k:n])] if kind == "equal" else []
    return " ".join(parts)


def token_table(row: dict) -> str:
    columns = zip(row["text"], row["kept"], row["logp"], row["logq"], row["weight"], row["advantage"], strict=True)
    lines = []
    for text, kept, logp, logq, weight, advantage in columns:
        if not kept:
            shown = re.sub(r"([|`*_<~\\])", r"\\\1", text)  # as text, whatever it holds
            ratio = exp(logp - logq)
            lines.append(
                [shown, f"{exp(logp):.4f}", f"{exp(logq):.4f}", f"{ratio:.4f}", f"{weight:.4f}", f"{advantage:+.2f}"]
            )
    return markdown_table(["token", "p", "q", "r = p / q", "weight", "advantage"], lines)


def page(args: Args) -> str:
    step, row, edit, original = find(args.run, args.step)
    settings = read_json(f"{args.run}/args.json")
    scores = [
        ["answer", *(row[name] for name in DIMENSIONS), f"{row['reward']:.2f}"],
        ["edit", *(row["edit"][name] for name in DIMENSIONS), f"{row['edit']['reward']:.2f}"],
    ]
    persona = row["persona"]
    if isinstance(persona, dict):
        persona = ", ".join(f"{key}: {value}" for key, value in persona.items())
    n_kept, n = sum(edit["kept"]), len(edit["kept"])
    return f"""# One step, with real text

Made by `python recipes/one_step.py --run out/tiny/cpe > docs/one-step.md` from the run of `bash recipes/tiny.sh`:
step {step}, prompt {row["prompt_id"]}, loss on edits `{settings["edit_ratio"]}`, its baseline
`{settings["edit_baseline"]}`.

**1. A prompt**: the persona, and a question. Nothing else is in the context in which answers, and later edits, are
trained.

> {persona}
>
> {row["question"]}

**2. The policy answers.** Of {settings["n_samples"]} samples this is one:

> {row["answer"]}

**3. The judge writes a critique and three scores** from -5 to 5, whose weighted mean is the reward:

> {row["critique"]}

{markdown_table(["", *DIMENSIONS, "reward"], scores)}

**4. The policy rewrites its answer by the critique**, and the judge scores that, too (second line above). Deleted words
are struck through, inserted ones bold:

> {word_diff(row["answer"], row["edit"]["answer"])}

**5. PPO trains on both, under the prompt alone.** The answer's tokens have PPO's clipped loss; its advantage here is
{original["advantage"][0]:+.2f} on the first token. Of the edit's {n} tokens {n_kept} stood in the answer already.
The others are what can be learned from it: p is their probability under the prompt alone, q under the edit prompt,
which holds answer and critique. The gradient of a token is -weight x advantage x grad log p (`edit_loss` in
`ppo_cpe.py`; [method.md](method.md) 2 has the weights of the other losses).

{token_table(edit)}
"""


if __name__ == "__main__":
    with flags.user_errors():
        print(page(flags.parse(Args, __doc__)), end="")
