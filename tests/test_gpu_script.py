"""bench/gpu.sh runs to its end on the emulated GPU, and says what failed."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def run(out, stages, **environment):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "EMULATED": "1", "OUT": str(out), "STAGES": stages, **environment}
    done = subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done, (out / "table.md").read_text()


def test_checks_and_stages_end_in_one_table(tmp_path):
    stages = "versions attention world bf16-base bf16-ppo"
    done, table = run(tmp_path / "out", stages, LIMIT="400", BUDGET="2000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert table.startswith("5 of 5 stages ok on an emulated GPU")
    assert all(f"| {name} | ok |" in table for name in stages.split())
    assert "| attention, 28 / 4 heads of 128, dk: error |" in table and "MISSED" not in table
    assert "attention: torch's varlen_attn" in (tmp_path / "out" / "versions.log").read_text()


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path):
    done, table = run(tmp_path / "out", "fp32-mismatches bf16-mismatches", LIMIT="400")
    assert done.returncode == 1
    assert table.startswith("0 of 2 stages ok") and "failed: fp32-mismatches, bf16-mismatches" in table
    assert "metrics.jsonl" in (tmp_path / "out" / "bf16-mismatches.log").read_text()  # what was not there
    done, table = run(tmp_path / "late", "versions", BUDGET="0")
    assert done.returncode == 1 and "| versions | not run: the time is over |" in table


def test_a_figure_that_is_nan_in_any_step_is_missed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu = importlib.import_module("bench.gpu")
    for broken in (None, 0, 3):
        errors = [None if i == broken else 1e-5 for i in range(4)]
        lines = [json.dumps({"weight_sync_error": e, "train_inference_mismatch": 1e-5}) for e in errors]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        assert gpu.mismatches(str(tmp_path), "0.001") == (broken is None)
    assert "weight_sync_error | nan | <= 0.001 | MISSED" in capsys.readouterr().out


def test_the_table_finds_the_figures_of_the_benchmarks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu, train = (importlib.import_module(f"bench.{name}") for name in ("gpu", "train"))
    train.line("  forward and backward, 600.00 TFLOP/s", 2.0, 1.0)
    train.line("  actor (limit 2.10 x), 400.00 TFLOP/s", 4.0, 2.0)
    (tmp_path / "training.log").write_text(capsys.readouterr().out)
    (tmp_path / "generation.log").write_text(
        "0.5b  decode 256       32768      1.50     21845         -       -         -       -      0.60      40%\n"
    )
    (tmp_path / "stages.txt").write_text("training 0 30\ngeneration 137 90\n")
    assert not gpu.table(str(tmp_path))
    table = (tmp_path / "table.md").read_text()
    assert "1 of 2 stages ok on a GPU; 0 of 0 bounds missed; failed: generation" in table
    for row in (
        "600.00 TFLOP/s |",
        "2.00 x unshared |",
        "400.00 TFLOP/s |",
        "40 % of the limit |",
        "| generation | time limit, killed | 90 |",
    ):
        assert row in table
