"""Nothing lost: kills, other numbers of ranks, full disks, damaged checkpoints.

tests/faults.sh does the kills at length; here a few of them.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import time

import faults
import pytest
import torch
from conftest import error_of, finish, launch, read_metrics
from safetensors import SafetensorError

import ppo_cpe
import sft
from model import load_pretrained
from runtime import checkpoints, flags, rows

JUDGE = """
import os, time
from prompts import Judgement

def score(row, answer):
    if os.environ.get("RANK") == "1" and {when}:
        {what}
    return Judgement("Name tea and drop the end.", len(answer) % 5, 0, 1)
"""


def sft_flags(tiny, out, *more):
    flags = ["--model", tiny / "checkpoint", "--data", tiny / "pairs.jsonl", "--answer-template", tiny / "answer.txt"]
    return [*flags, "--batch-size", 4, "--lr", 1e-3, "--epochs", 40, "--save-every", 1, "--out", out, *more]


def ppo_flags(tiny, out, judge, *more):
    flags = ["--model", tiny / "checkpoint", "--prompts", tiny / "prompts.jsonl", "--judge", f"{judge}:score"]
    flags += ["--prompts-per-step", 4, "--mini-batch-prompts", 2, "--n-samples", 1, "--max-new-tokens", 4]
    for name in ("answer", "edit"):
        flags += [f"--{name}-template", tiny / f"{name}.txt"]
    return [*flags, "--save-every", 1, "--out", out, *more]


def run(module, *given):
    module.main(flags.parse(module.Args, module.__doc__, [str(flag) for flag in given]))


def weights(out, name="policy"):
    return load_pretrained(str(out / name)).state_dict()


def assert_equal(ours, theirs):
    assert read_metrics(ours) == read_metrics(theirs)
    a, b = weights(ours), weights(theirs)
    assert all(torch.equal(a[key], b[key]) for key in b)


# -- kills, and damage ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_few_kills_and_damaged_files(tmp_path, capsys):
    some = ("sft.py", "ppo_cpe.py", "ppo_cpe.py, in background", "annotate.py", "evaluate.py")
    assert faults.main(8, 2, str(tmp_path), only=some) == 0, capsys.readouterr().out


def test_what_is_compared_of_an_evaluation(tmp_path):
    """Every row and figure, but not flags, clock, journal and plots."""
    for name, reward, seconds in (("a", 1, 2), ("same", 1, 3), ("other row", 0, 2)):
        (tmp_path / name / "journal").mkdir(parents=True)
        (tmp_path / name / "journal" / "replies.0.jsonl").write_text(f"{seconds}\n")
        (tmp_path / name / "verdicts.jsonl").write_text(json.dumps({"reward": reward}))
        results = {"args": {"out": name}, "models": {"world": {"calls": 1, "seconds": seconds}}}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    a, same, other_row = (faults.result(str(tmp_path / name)) for name in ("a", "same", "other row"))
    assert a == same != other_row and set(a) == {"verdicts.jsonl", "results.json"}
    assert a["results.json"] == {"models": {"world": {"calls": 1}}}


@pytest.mark.parametrize("steps", [8, 16])
def test_a_run_that_ended_with_an_epoch_continues_bit_for_bit(tiny, tmp_path, steps):
    """8 steps of 4 are an epoch of the 32 rows."""
    for out, stops in ((tmp_path / "whole", [17]), (tmp_path / "parts", [steps, 17])):
        for stop in stops:
            run(sft, *sft_flags(tiny, out, "--max-steps", stop, "--save-every", 100))
    assert_equal(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("before, after, shard", [(2, 1, 2), (1, 2, 2), (2, 2, 1)])
def test_another_number_of_ranks_continues(whole, tiny, tmp_path, before, after, shard):
    """Also from sharded to replicated (--shard-size 1). Sums are in another order: 1e-5, an update is 1e-3."""
    whole, parts = whole / "5", tmp_path / "parts"
    finish(launch("sft.py", *sft_flags(tiny, parts, "--max-steps", 3), processes=before))
    more = ["--shard-size", shard] if after > 1 else []
    finish(launch("sft.py", *sft_flags(tiny, parts, "--max-steps", 5, *more), processes=after))
    for ours, theirs in zip(read_metrics(parts), read_metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    a, b = weights(parts), weights(whole)
    assert max((a[key] - b[key]).abs().max().item() for key in b) < 1e-5


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run of five steps, by number of steps also its first three."""
    folder = tmp_path_factory.mktemp("whole")
    for steps in (3, 5):
        run(sft, *sft_flags(tiny, folder / str(steps), "--max-steps", steps))
    return folder


@pytest.fixture
def three(whole, tmp_path):
    """A copy of the run of three steps, of which two checkpoints are kept."""
    shutil.copytree(whole / "3", tmp_path / "run", symlinks=True)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step_000002", "step_000003"]
    return tmp_path / "run"


def flip(file, place=-1):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "train_state/rank00000_000.safetensors": flip,
    "train_state/index.json": flip,
    "policy/model.safetensors": flip,
    "policy/tokenizer.json": os.unlink,
    "state.json": lambda file: os.truncate(file, 30),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(three, whole, tiny, capsys, name):
    DAMAGES[name](three / "checkpoints" / "step_000003" / name)
    run(sft, *sft_flags(tiny, three, "--max-steps", 3))
    said = capsys.readouterr()
    assert re.search(rf"set aside as \*.damaged: .*step_000003: {re.escape(name)} is (damaged|missing)", said.err)
    assert re.search(r"resumed from .*step_000002 \(", said.out)
    assert (three / "checkpoints" / "step_000003.damaged").is_dir()
    assert_equal(three, whole / "3")


def test_no_whole_checkpoint_is_left(three, tiny, capsys):
    for step in (2, 3):
        os.truncate(three / "checkpoints" / f"step_00000{step}" / "train_state" / "rank00000_000.safetensors", 100)
    before = (three / "metrics.jsonl").read_bytes()
    error = error_of(sft, capsys, *sft_flags(tiny, three, "--max-steps", 4))
    assert error.startswith("error: no whole checkpoint is left (") and error.count("rank00000_000.safetensors is") == 2
    assert (three / "metrics.jsonl").read_bytes() == before


def test_nothing_is_unpickled(three):
    """The project reads no pickle at all."""
    for folder, _, names in os.walk(three):
        assert all(name.endswith((".safetensors", ".json", ".jsonl", ".txt", ".md")) for name in names), (folder, names)


def test_what_a_killed_run_had_begun_is_removed(three, tiny):
    (three / "checkpoints" / "step_000009.tmp" / "policy").mkdir(parents=True)
    (three / "policy.tmp").symlink_to("checkpoints/step_000009/policy")
    (three / "args.json.tmp").write_text("{")
    run(sft, *sft_flags(tiny, three, "--max-steps", 3))
    assert not [name for _, folders, names in os.walk(three) for name in folders + names if name.endswith(".tmp")]
    assert (three / "policy" / "config.json").is_file()


def test_files_of_the_user_are_kept(three, tiny, tmp_path):
    """A run removes only names that runs give, and in a folder without a run nothing at all."""
    (tmp_path / "new" / "data").mkdir(parents=True)
    mine = [tmp_path / "new" / "notes.tmp", tmp_path / "new" / "data" / "step_000001.jsonl.tmp"]
    mine += [three / "notes.tmp", three / "rows" / "a.tmp", three / "link.tmp"]
    (three / "rows").mkdir()
    for path in mine[:-1]:
        path.write_text("mine")
    mine[-1].symlink_to(tmp_path / "new")
    for out in (three, tmp_path / "new"):
        run(sft, *sft_flags(tiny, out, "--max-steps", 3))
    assert all(path.exists() for path in mine)


def test_all_is_on_the_disk_before_a_checkpoint_has_its_name(three, tiny, monkeypatch):
    """Every file and folder of it, and the metrics up to its step."""
    fsync, rename, flushed, at_rename = os.fsync, os.rename, set(), []

    def noted(fd):
        fsync(fd)
        flushed.add(os.readlink(f"/proc/self/fd/{fd}"))

    def renamed(source, target):
        if target.endswith("step_000004"):
            below = [os.path.join(top, name) for top, folders, names in os.walk(source) for name in folders + names]
            at_rename.append({source, *below, str(three / "metrics.jsonl")} - flushed)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    run(sft, *sft_flags(tiny, three, "--max-steps", 4))
    not_flushed = {os.path.basename(path) for path in at_rename[0]}
    assert not_flushed <= {"state.json", "index.json"}  # these two were flushed under another name
    assert str(three / "checkpoints") in flushed


# -- disks ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files(size):
    """No file may grow beyond size bytes: what a full disk does to a write, a part of it first.

    The whole process is so limited, pytest's own output in a file too: left before a test ends.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_half_a_line_is_taken_back(tmp_path):
    file = str(tmp_path / "metrics.jsonl")
    rows.append_line(file, '{"step": 1}')
    with small_files(20), pytest.raises(OSError, match="metrics.jsonl") as error:
        rows.append_line(file, '{"step": 2, "loss": 0.5}')
    assert "what was finished is kept" in str(error.value)
    rows.append_line(file, '{"step": 2}')
    assert [row["step"] for row in rows.read_rows(file, "metrics")] == [1, 2]
    with open(file, "a") as f:
        f.write('{"step": 3, "lo')  # a kill
    assert [row["step"] for row in rows.read_rows(file, "metrics")] == [1, 2]


def test_a_full_disk_loses_nothing(three, whole, tiny, capsys):
    with small_files(50_000):  # the weights are larger
        error = error_of(sft, capsys, *sft_flags(tiny, three, "--max-steps", 5))
    assert re.search(r"checkpoints/step_000004 could not be written: .*File too large.*whole: make room", error)
    assert sorted(os.listdir(three / "checkpoints")) == ["step_000002", "step_000003"]
    run(sft, *sft_flags(tiny, three, "--max-steps", 5))
    assert_equal(three, whole / "5")


@pytest.mark.parametrize("more", [(), ("--save-in-background",)], ids=["at once", "in background"])
def test_a_disk_that_fails_on_one_rank_ends_all(three, tiny, capsys, monkeypatch, more):
    def fail(*_, **__):
        raise SafetensorError("I/O error: Read-only file system (os error 30)")

    monkeypatch.setattr(checkpoints, "write_tensors", fail)
    error = error_of(sft, capsys, *sft_flags(tiny, three, "--max-steps", 5, *more))
    assert "step_000004 could not be written: I/O error: Read-only file system" in error
    assert sorted(os.listdir(three / "checkpoints")) == ["step_000002", "step_000003"]


def test_a_checkpoint_in_the_background_is_of_its_own_step(whole, tiny, tmp_path, monkeypatch):
    """Training goes on while it is written: it holds the weights and moments of the step after which it was begun."""
    write = checkpoints.write_tensors
    started = []

    def slow(tensors, file, *given, **more):
        started.append(int(re.search(r"step_(\d+)", file)[1]))
        deadline = time.monotonic() + 60
        while len(read_metrics(tmp_path / "run")) < min(started[-1] + 1, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        write(tensors, file, *given, **more)

    monkeypatch.setattr(checkpoints, "write_tensors", slow)
    flags = sft_flags(tiny, tmp_path / "run", "--max-steps", 5, "--keep-checkpoints", 9, "--save-every", 2)
    run(sft, *flags, "--save-in-background")
    assert started == [2, 4, 5]
    for step in (4, 5):
        ours, theirs = (
            json.loads((out / f"checkpoints/step_{step:06d}/state.json").read_text())["files"]
            for out in (tmp_path / "run", whole / "5")
        )
        assert ours == theirs, step


def test_a_checkpoint_in_the_background_counts_from_the_next_phase(tiny, tmp_path, monkeypatch):
    """Step 3 fails after the checkpoint of step 2 was written, which is whole all the same."""
    (tmp_path / "judge.py").write_text(JUDGE.format(when="False", what="pass"))
    flags = ppo_flags(tiny, tmp_path / "run", tmp_path / "judge.py", "--max-steps", 4)
    score = ppo_cpe.score

    def failing(trajectories, models, args, step, ranks):
        if step == 2:
            raise ZeroDivisionError
        return score(trajectories, models, args, step, ranks)

    monkeypatch.setattr(ppo_cpe, "score", failing)
    monkeypatch.setattr(checkpoints.Saving, "is_written", lambda self: bool(self.written.result()))  # waits for it
    with pytest.raises(ZeroDivisionError):
        run(ppo_cpe, *flags, "--save-every", 2, "--save-in-background")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step_000002"]


def test_a_folder_that_cannot_be_written(tiny, capsys):
    error = error_of(sft, capsys, *sft_flags(tiny, "/proc/run"))
    assert error.startswith("error: [Errno ") and "/proc/run" in error


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_goes_only_after_the_next_is_complete(three, tiny, monkeypatch, when):
    """A kill on either side of the rename: the old one is still there, or the new one is."""
    rename = os.rename

    def killed(source, target):
        if when == "after":
            rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", lambda s, t: killed(s, t) if t.endswith("step_000004") else rename(s, t))
    with pytest.raises(KeyboardInterrupt):
        run(sft, *sft_flags(tiny, three, "--max-steps", 4, "--keep-checkpoints", 1))
    kept = [f"step_00000{i}" for i in (2, 3)]
    found = sorted(name for name in os.listdir(three / "checkpoints") if not name.endswith(".tmp"))
    assert found == kept + ["step_000004"] * (when == "after")
