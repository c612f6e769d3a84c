"""Numbers that are not finite or out of bounds: the update is left out, its batch kept, and what is said."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import error_of, read_metrics
from test_faults import JUDGE, ppo_flags, run, sft_flags

import ppo_cpe
import report
import sft
from model import Transformer, load_pretrained
from runtime import checkpoints, rows, training
from runtime.distributed import start


@pytest.fixture
def spoilt(monkeypatch):
    """Spoils log-probs or values of the passes with these numbers (from 1), by a factor."""

    def spoil(passes, factor):
        forward, count = Transformer.forward, 0

        def changed(self, *args, **kwargs):
            nonlocal count
            found = forward(self, *args, **kwargs)
            if torch.is_grad_enabled() and len(args) > 3:
                count += 1
                if count in passes:
                    return found * factor if self.scalar_head else (found[0] * factor, *found[1:])
            return found

        monkeypatch.setattr(Transformer, "forward", changed)

    return spoil


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
def test_a_bad_step_is_not_applied(tiny, tmp_path, capsys, spoilt, factor):
    """Step 3 of sft.py, one pass a step. 1e6: finite, but no loss that a model has."""
    spoilt({3}, factor)
    out = tmp_path / "run"
    error = error_of(sft, capsys, *sft_flags(tiny, out, "--max-steps", 5))
    assert re.match(
        r"error: step 3: loss .*, grad_norm .*: not finite or out of bounds; the update was left out", error
    )
    assert "bad_steps/step_000003.jsonl" in error and "--skip-bad-steps 1" in error and "learning rate" in error
    first, *batch = rows.read_rows(str(out / "bad_steps" / "step_000003.jsonl"), "object")
    assert set(first) == {"loss", "grad_norm"} and len(batch) == 4 and batch[0]["rank"] == 0
    ids, trained = batch[0]["example"]
    assert len(ids) == len(trained) and any(trained)
    assert len(read_metrics(out)) == 2 and (out / "policy").resolve().parent.name == "step_000002"


def test_bad_steps_are_skipped_and_counted(tiny, tmp_path, capsys, spoilt):
    spoilt({3}, float("nan"))
    out = tmp_path / "run"
    run(sft, *sft_flags(tiny, out, "--max-steps", 4, "--skip-bad-steps", 1))
    assert "(1 of --skip-bad-steps 1)" in capsys.readouterr().out
    metrics = read_metrics(out)
    assert [m["bad_steps"] for m in metrics] == [0, 0, 1, 1]
    assert metrics[2]["loss"] is None and metrics[3]["loss"] < metrics[0]["loss"]


def test_a_bad_step_that_is_run_again_does_not_count_twice(tiny, tmp_path, capsys, spoilt, monkeypatch):
    out = tmp_path / "run"
    spoilt({3}, float("nan"))
    error_of(sft, capsys, *sft_flags(tiny, out, "--max-steps", 4))
    assert os.listdir(out / "bad_steps") == ["step_000003.jsonl"]
    monkeypatch.undo()
    run(sft, *sft_flags(tiny, out, "--max-steps", 4))
    assert os.listdir(out / "bad_steps") == [] and [m["bad_steps"] for m in read_metrics(out)] == [0, 0, 0, 0]


def test_a_bad_step_before_a_checkpoint_counts(tiny, tmp_path, spoilt):
    """The checkpoint is that of the very step that was left out."""
    out = tmp_path / "run"
    spoilt({3}, float("nan"))
    for steps in (3, 4):
        run(sft, *sft_flags(tiny, out, "--max-steps", steps, "--skip-bad-steps", 1))
    assert [m["bad_steps"] for m in read_metrics(out)] == [0, 0, 1, 1]


def test_a_state_in_several_files(tiny, tmp_path, monkeypatch):
    """As that of a rank with more than 2 GiB: what is read is what was written."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(sft, *sft_flags(tiny, whole, "--max-steps", 4))
    monkeypatch.setattr(checkpoints, "PART_BYTES", 50_000)
    run(sft, *sft_flags(tiny, parts, "--max-steps", 2))
    assert len(list(parts.glob("checkpoints/step_000002/train_state/rank00000_*"))) > 2
    run(sft, *sft_flags(tiny, parts, "--max-steps", 4))
    assert [m["loss"] for m in read_metrics(parts)] == [m["loss"] for m in read_metrics(whole)]


@pytest.mark.parametrize("number, model", [(1, "policy"), (2, "critic")])
def test_a_bad_update_of_rl(tiny, tmp_path, spoilt, number, model):
    """The passes of a step are policy, critic, policy, critic."""
    (tmp_path / "judge.py").write_text(JUDGE.format(when=False, what="pass"))
    spoilt({number}, float("nan"))
    given = ppo_flags(tiny, tmp_path / "run", tmp_path / "judge.py", "--max-steps", 1, "--skip-bad-steps", 1)
    run(ppo_cpe, *given)
    (name,) = os.listdir(tmp_path / "run" / "bad_steps")
    assert name == f"step_000001_{model}_1.jsonl"
    _, *batch = rows.read_rows(str(tmp_path / "run" / "bad_steps" / name), "object")
    assert batch[0]["example"]["response_ids"] and batch[0]["example"]["advantages"]
    assert read_metrics(tmp_path / "run")[0]["bad_steps"] == 1
    report.main(report.Args(run=str(tmp_path / "run"), out=str(tmp_path / "page.html")))  # what is NaN stays empty


def test_bounds_of_an_update(tiny, tmp_path):
    """KL beyond the bound, the gradient finite: left out; just below it: applied."""
    ranks, model = start("fp32"), load_pretrained(str(tiny / "checkpoint"), torch.float32)
    optimizer = training.adamw(model, 1e-3, 0.0)
    run = SimpleNamespace(args=sft.Args(skip_bad_steps=1), out=str(tmp_path), ranks=ranks, step=0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for kl, changes in ((10.1, False), (9.9, True)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        training.optimizer_step(model, optimizer, 1e-3, 1.0, {"original/approx_kl": kl}, [], run)
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters()) == changes
        assert all(p.grad is None for p in model.parameters())


def test_a_learning_rate_that_would_wreck_the_model(tiny, tmp_path, capsys):
    error = error_of(sft, capsys, *sft_flags(tiny, tmp_path / "run", "--lr", 1e6, "--max-steps", 1))
    assert re.match(r"error: learning rate 1e\+06: a step of Adam moves each weight by about that", error)
    assert not (tmp_path / "run" / "policy").exists()
