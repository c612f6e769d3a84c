"""The forks of docs/forking.md, as they stand there: applied, planned, run, replayed."""

import json
import os
import re
import subprocess

import pytest
import torch
from conftest import read_metrics, run_script

import replay
from runtime.rows import write_rows

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
JUDGE = """
from prompts import Judgement

def judge(row, answer) -> Judgement:
    return Judgement("Say it shorter.", 1, 2, min(5, len(answer) // 8))
"""


@pytest.fixture(scope="module")
def page():
    with open(os.path.join(ROOT, "docs", "forking.md"), encoding="utf-8") as f:
        return f.read()


def fork(page, name, folder):
    """The copy of ppo_cpe.py that the page's diff for `name` makes."""
    (diff,) = [d for d in re.findall(r"```diff\n(.*?)```", page, re.DOTALL) if f"+++ ppo_{name}.py" in d]
    script = folder / f"ppo_{name}.py"
    command = ["patch", "--silent", "--fuzz=0", "-o", str(script), os.path.join(ROOT, "ppo_cpe.py")]
    subprocess.run(command, input=diff, text=True, check=True)
    return str(script)


def flags_of(tiny, folder, judge):
    (folder / "judge.py").write_text(judge)
    return [
        *("--model", tiny / "checkpoint", "--prompts", tiny / "prompts.jsonl", "--out", folder / "run"),
        *("--answer-template", tiny / "answer.txt", "--edit-template", tiny / "edit.txt"),
        *("--prompts-per-step", 4, "--mini-batch-prompts", 2, "--n-samples", 2, "--max-new-tokens", 12),
        *("--temperature", 1, "--top-p", 1, "--lr", 1e-4, "--tokens-per-microbatch", 300, "--max-steps", 2),
        *("--judge", f"{folder / 'judge.py'}:judge"),
    ]


def test_another_loss(page, tiny, tmp_path):
    script = fork(page, "loss", tmp_path)
    flags = flags_of(tiny, tmp_path, JUDGE)
    run_script(script, *flags, "--edit-ratio", "root", "--edit-rate", 1, "--save-batch", 1)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["edit_ratio"] == "root"
    gradients = replay.replay(str(tmp_path / "run" / "batch_000001"))
    assert gradients["root"].norm() > 0
    assert not torch.equal(gradients["root"], gradients["tis"]) and not torch.equal(
        gradients["root"], gradients["none"]
    )


def test_grpo_without_a_critic(page, tiny, tmp_path):
    script = fork(page, "grpo", tmp_path)
    flags = flags_of(tiny, tmp_path, JUDGE)
    planned = run_script(script, *flags, "--plan", "--gpu-gib", 0)
    assert "policy" in planned and "critic" not in planned
    run_script(script, *flags)
    steps = read_metrics(tmp_path / "run")
    assert len(steps) == 2 and all(step["grad_norm_policy"] > 0 for step in steps)
    assert "value_loss" not in steps[0] and not (tmp_path / "run" / "critic").exists()


def test_another_reward(page, tiny, tmp_path):
    """The page's function is a judge for edits: it names the food, and its critique is followed by a second score."""
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    flags = flags_of(tiny, tmp_path, code)
    rows = [dict(prompt_id=f"p{i}", persona={"food": "soup"}, question=f"What to eat {i}?") for i in range(8)]
    write_rows(str(tmp_path / "prompts.jsonl"), rows)
    flags[flags.index("--prompts") + 1] = tmp_path / "prompts.jsonl"
    flags[-1] = f"{tmp_path / 'judge.py'}:brief"
    run_script("ppo_cpe.py", *flags)
    (row, *_) = map(json.loads, (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines())
    assert row["critique"] == "Say your food is soup." and row["personalization"] == -5 and row["edit"]["answer"]
