"""The forks of docs/forking.md, as they stand there: applied to a copy in exp/, planned, trained for two steps."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_metrics, run_script
from test_layout import STAGES

import replay
from chat import Chat
from model import load_pretrained
from prompts import Judgement, answer_prompt, fill, load_templates
from recipes import fork
from runtime import training
from runtime.distributed import start
from runtime.packing import pack
from runtime.rows import write_rows
from trajectory import Prompt, Trajectory

JUDGE = """
from prompts import Judgement

def judge(row, answer) -> Judgement:
    return Judgement("Say it shorter.", 1, 2, min(5, len(answer) // 8))
"""


def page():
    return fork.read("docs/forking.md")


def make_forks(folder):
    """Writes folder/exp/NAME.py for each diff of the page."""
    for name in fork.diffs(page()):
        run_script("recipes/fork.py", name, folder=folder)


def flags_of(tiny, folder, judge=JUDGE):
    (folder / "judge.py").write_text(judge)
    return [
        *("--model", tiny / "checkpoint", "--prompts", tiny / "prompts.jsonl", "--out", folder / "run"),
        *("--answer-template", tiny / "answer.txt", "--edit-template", tiny / "edit.txt"),
        *("--prompts-per-step", 4, "--mini-batch-prompts", 2, "--n-samples", 2, "--max-new-tokens", 12),
        *("--temperature", 1, "--top-p", 1, "--lr", 1e-4, "--tokens-per-microbatch", 300, "--max-steps", 2),
        *("--judge", f"{folder / 'judge.py'}:judge"),
    ]


# What each fork is run with, besides the flags above
RUN_WITH = {"root": ("--edit-loss", "root"), "gain": ("--edit-strategy", "gain"), "grpo": (), "sdpo": ()}


def test_a_hunk_applies_where_its_lines_stand_once():
    diff = "--- a\n+++ exp/b.py\n@@ f\n one\n-two\n+three\n@@\n+zero\n \n four\n"
    assert fork.apply(diff, "one\ntwo\n\nfour\n") == "one\nthree\nzero\n\nfour\n"
    for text, times in (("one\n\nfour\n", 0), ("one\ntwo\none\ntwo\n\nfour\n", 2)):
        with pytest.raises(ValueError, match=f"found them {times} times:\none\ntwo\n"):
            fork.apply(diff, text)


def test_a_fork_is_written_once(tmp_path):
    """A file that may have been changed since is left as it is; so is the folder where the page has no such fork."""
    assert "expected one of root, gain" in run_script("recipes/fork.py", "foot", folder=tmp_path, status=2)
    run_script("recipes/fork.py", "root", folder=tmp_path)
    (tmp_path / "exp/root.py").write_text("mine")
    assert "exp/root.py is there already" in run_script("recipes/fork.py", "root", folder=tmp_path, status=2)
    assert (tmp_path / "exp/root.py").read_text() == "mine"


@pytest.mark.parametrize("name", fork.diffs(page()))
def test_a_fork_of_the_page_trains(name, tiny, tmp_path):
    make_forks(tmp_path)
    run_script(tmp_path / "exp" / f"{name}.py", *flags_of(tiny, tmp_path), *RUN_WITH[name])
    steps = read_metrics(tmp_path / "run")
    assert len(steps) == 2 and all(step["grad_norm_policy"] > 0 for step in steps)


def test_a_loss_is_replayed_by_the_copys_own_code(tiny, tmp_path):
    make_forks(tmp_path)
    script = tmp_path / "exp" / "root.py"
    more = ("--edit-loss", "root", "--edit-rate", 1, "--save-batch", 1, "--max-steps", 1)
    run_script(script, *flags_of(tiny, tmp_path), *more)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["edit_loss"] == "root"
    gradients = replay.replay(str(tmp_path / "run" / "batch_000001"), str(script))
    assert gradients["root"].norm() > 0
    for name in ("tis", "none"):
        assert not torch.equal(gradients["root"], gradients[name])


@pytest.mark.parametrize("place", ["batch", "beside", "relative"])
def test_a_batch_runs_no_script_of_its_own(place, tiny, tmp_path, monkeypatch):
    """A batch that somebody sent may name any file."""
    folder = tmp_path / "out" / "batch_000001"
    folder.mkdir(parents=True)
    file = {"batch": folder / "a.py", "beside": tmp_path / "a.py", "relative": tmp_path / "a.py"}[place]
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    named = "a.py" if place == "relative" else str(file)
    (folder / "batch.json").write_text(json.dumps(dict(script=named, args={}, trajectories=[])))
    with pytest.raises(ValueError, match="no script of this checkout; if you trust it: --script"):
        replay.replay(str(folder))
    assert not (tmp_path / "ran").exists()
    (folder / "batch.json").unlink()
    with pytest.raises(ValueError, match="expected a folder that --save-batch wrote to its end"):
        replay.replay(str(folder))


def test_grpo_has_no_critic(tiny, tmp_path):
    make_forks(tmp_path)
    script = tmp_path / "exp" / "grpo.py"
    planned = run_script(script, *flags_of(tiny, tmp_path), "--plan", "--gpu-gib", 0)
    assert "policy" in planned and "critic" not in planned
    run_script(script, *flags_of(tiny, tmp_path), "--max-steps", 1)
    (step,) = read_metrics(tmp_path / "run")
    assert "value_loss" not in step and not (tmp_path / "run" / "critic").exists()


def test_sdpo_edits_nothing(tiny, tmp_path):
    make_forks(tmp_path)
    script = tmp_path / "exp" / "sdpo.py"
    flags = [*flags_of(tiny, tmp_path), "--max-steps", 1]
    run_script(script, *flags)
    lines = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["edit"] is None for line in lines)
    assert "--edit-rate" in run_script(script, *flags, "--edit-rate", 0.5, status=2)
    (tmp_path / "judge.py").write_text("def judge(row, answer): return 1.0")
    assert "no critique of an answer" in run_script(script, *flags, "--out", tmp_path / "without", status=2)


def test_sdpo_credit_is_what_the_critique_adds(tiny, tmp_path):
    make_forks(tmp_path)
    sdpo = replay.load_script(str(tmp_path / "exp" / "sdpo.py"))
    ranks = start("fp32")
    folder = str(tiny / "checkpoint")
    chat = Chat(folder)
    policy = load_pretrained(folder, torch.float32, ranks.device)
    templates = load_templates(None, *(str(tiny / f"{name}.txt") for name in ("answer", "edit", "grm")))
    row = {"prompt_id": "p", "persona": {"name": "Kim"}, "question": "What to drink?"}
    x = answer_prompt(chat, templates, row)
    y = chat.encode("Green tea.")
    batch = [
        Trajectory(
            prompt=Prompt(index=0, row=row, ids=x),
            sample_id=i,
            context_ids=x,
            response_ids=y,
            engine_logprobs=[],
            answer="Green tea.",
            truncated=False,
            reward=float(i),
            judgement=Judgement(critique, 1, 1, 1),
        )
        for i, critique in enumerate(("Say it shorter.", "Name the tea."))
    ]
    args = sdpo.Args(temperature=0.9, sdpo_lambda=0.25)
    old_logprobs, _ = sdpo.old_policy_logprobs(batch, policy, args, ranks)
    credit, _ = sdpo.critique_credit(batch, old_logprobs, policy, (chat, templates), args, ranks)

    def logprobs_under(context):  # each sequence alone, nothing shared
        packed = pack([context + y], [[False] * len(context) + [True] * len(y)], ranks.device)
        with torch.no_grad():
            return training.forward(policy, packed, args.temperature)

    for t, own in zip(batch, credit, strict=True):
        request = chat.turn("user", fill(templates.edit, critique=t.judgement.critique))
        told = [*x, chat.turn_end, *chat.after_turn, *request, *chat.header]
        assert torch.allclose(own, logprobs_under(told) - logprobs_under(x), atol=1e-4)
        assert own.abs().max() > 1e-2

    values = [torch.zeros(len(y)) for _ in batch]
    advantages, _ = sdpo.compute_advantages(batch, values, credit, args, ranks)
    for own, whitened, c in zip(advantages, (-1.0, 1.0), credit, strict=True):
        assert torch.allclose(own, 0.25 * whitened + 0.75 * c, atol=1e-5)


def test_another_reward(tiny, tmp_path):
    """The function of the page is a judge for edits: its critique is followed by a second score."""
    (code,) = re.findall(r"```python\n(.*?)```", page(), re.DOTALL)
    flags = flags_of(tiny, tmp_path, code)
    rows = [dict(prompt_id=f"p{i}", persona={"food": "soup"}, question=f"What to eat {i}?") for i in range(8)]
    write_rows(str(tmp_path / "prompts.jsonl"), rows)
    flags[flags.index("--prompts") + 1] = tmp_path / "prompts.jsonl"
    flags[-1] = f"{tmp_path / 'judge.py'}:brief"
    run_script("ppo_cpe.py", *flags)
    lines = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["edit"]]
    assert rows and all(row["critique"] == "Name one of these: soup." and row["edit"]["answer"] for row in rows)
    assert all(row["personalization"] == -5 for row in rows)


# -- a copy in a folder of one's own, however it is started ------------------------------------------------------------

STARTS = {
    "file": [sys.executable, "exp/mine.py"],
    "module": [sys.executable, "-m", "exp.mine"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "exp.mine"],
}


@pytest.mark.parametrize("start", STARTS)
def test_a_copy_in_a_folder_runs(start, tmp_path):
    """Started from the project's root: here a copy of it, whose modules are links."""
    for name in os.listdir(ROOT):
        if name not in ("exp", "out") and not name.startswith("."):
            (tmp_path / name).symlink_to(os.path.join(ROOT, name))
    (tmp_path / "exp").mkdir()
    shutil.copy(os.path.join(ROOT, "ppo_cpe.py"), tmp_path / "exp" / "mine.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [*STARTS[start], "--model", "nowhere", "--prompts", "nowhere.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # all is imported before the model is looked for
    assert done.returncode != 0 and "error: " in done.stderr and "nowhere" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_copy_of_any_stage_finds_the_modules(stage):
    with open(os.path.join(ROOT, f"{stage}.py"), encoding="utf-8") as f:
        before, _, _ = f.read().partition("\nfrom runtime import flags\n")
    assert "\nsys.path.append(os.getcwd())" in before
