"""bench/gpu.sh runs to its end on the emulated GPU, and says what failed."""

import os
import subprocess
import sys

from conftest import ROOT


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
    done, table = run(tmp_path / "out", "fp32-gaps bf16-gaps", LIMIT="400")
    assert done.returncode == 1
    assert table.startswith("0 of 2 stages ok") and "failed: fp32-gaps, bf16-gaps" in table
    assert "metrics.jsonl" in (tmp_path / "out" / "bf16-gaps.log").read_text()  # what was not there
    done, table = run(tmp_path / "late", "versions", BUDGET="0")
    assert done.returncode == 1 and "| versions | not run: the time is over |" in table
