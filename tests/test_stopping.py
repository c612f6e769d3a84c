"""How a run ends before its last step: signals, ranks that die or hang, and errors in one line."""

import json
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import finish, launch, read_metrics, written
from safetensors import SafetensorError
from test_faults import JUDGE, assert_equal, ppo_flags, run, sft_flags

import sft
from runtime import flags, signals, watch


def wait_for_steps(out, n, launched, seconds=120):
    log, deadline = out / "metrics.jsonl", time.monotonic() + seconds
    while not log.exists() or log.read_text().count("\n") < n:
        assert all(rank.is_alive() for rank in launched.ranks) and time.monotonic() < deadline, written(launched)
        time.sleep(0.01)


def end(launched, seconds=60):
    """Waits for a launched script -> (exit codes, what it wrote, seconds)."""
    started = time.monotonic()
    for rank in launched.ranks:
        rank.join(max(0.0, started + seconds - time.monotonic()))
    codes = [rank.exitcode for rank in launched.ranks]
    for rank in launched.ranks:
        rank.kill()
    return codes, written(launched), time.monotonic() - started


# -- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(tiny, tmp_path, number):
    out = tmp_path / "run"
    launched = launch("sft.py", *sft_flags(tiny, out, "--save-every", 10000))
    wait_for_steps(out, 2, launched)
    os.kill(launched.ranks[0].pid, number)
    said = finish(launched, status=watch.STOPPED)
    done = len(read_metrics(out))
    assert (
        f"{number.name}: the run ends with this step" in said and f"stopped after step {done}, which is saved" in said
    )
    assert os.listdir(out / "checkpoints") == [f"step_{done:06d}"]
    run(sft, *sft_flags(tiny, tmp_path / "whole", "--max-steps", done + 2))
    run(sft, *sft_flags(tiny, out, "--max-steps", done + 2))
    assert_equal(out, tmp_path / "whole")


def test_a_signal_to_one_of_two_ranks_of_rl(tiny, tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE.format(when=False, what="pass"))
    out = tmp_path / "run"
    launched = launch("ppo_cpe.py", *ppo_flags(tiny, out, tmp_path / "judge.py", "--save-every", 1000), processes=2)
    wait_for_steps(out, 1, launched)
    os.kill(launched.ranks[1].pid, signal.SIGTERM)
    finish(launched, status=watch.STOPPED)
    assert os.listdir(out / "checkpoints") == [f"step_{len(read_metrics(out)):06d}"]
    assert not list(out.glob("*/*.tmp"))


def test_a_second_signal_ends_at_once(tiny, tmp_path):
    """Even a rank whose main thread waits in a collective for one that never comes."""
    out = tmp_path / "run"
    launched = launch("sft.py", *sft_flags(tiny, out), processes=2)
    wait_for_steps(out, 1, launched)
    os.kill(launched.ranks[1].pid, signal.SIGSTOP)
    os.kill(launched.ranks[0].pid, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(launched.ranks[0].pid, signal.SIGTERM)  # torchrun's copy of the same notice
    time.sleep(signals.ONE_NOTICE + 0.5)
    assert launched.ranks[0].is_alive()
    os.kill(launched.ranks[0].pid, signal.SIGTERM)
    launched.ranks[0].join(10)
    codes, *_ = end(launched, 0)
    assert codes[0] == 128 + signal.SIGTERM


# -- ranks that die or hang ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, rank", [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)])
def test_a_rank_that_dies_or_is_stopped_is_named(tiny, tmp_path, number, rank):
    out = tmp_path / "run"
    launched = launch("sft.py", *sft_flags(tiny, out, "--timeouts", 60, 60, 6), processes=2)
    wait_for_steps(out, 2, launched)
    os.kill(launched.ranks[rank].pid, number)
    codes, output, seconds = end(launched)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == watch.RANK_LOST and seconds < 30
    # as it said last: these steps are shorter than the time between two signs of life
    said = "is gone; it was in (start|(update|checkpoint) of step [0-9]+) at [a-z_/]+.py:[0-9]+"
    if rank == 0:  # outside of torchrun it keeps the store, too
        said = "(, which keeps the job's store, is silent|has been silent)"
    assert re.search(rf"error: rank {rank} \(host .*, pid {launched.ranks[rank].pid}\) ?{said}", output)
    assert not re.search(rf"error: rank {1 - rank} ", output)


def end_when_the_judge_of_rank_1(tiny, tmp_path, does, *more):
    """RL on two ranks, whose judge on rank 1 does so after the first step -> as `end`."""
    (tmp_path / "judge.py").write_text(JUDGE.format(when=f"os.path.exists('{tmp_path}/now')", what=does))
    out = tmp_path / "run"
    given = ppo_flags(tiny, out, tmp_path / "judge.py", "--max-steps", 1000, "--epochs", 1000, *more)
    launched = launch("ppo_cpe.py", *given, processes=2)
    wait_for_steps(out, 1, launched)
    (tmp_path / "now").touch()
    return end(launched)


def test_a_rank_that_hangs_in_its_rollout(tiny, tmp_path):
    limits = ("--timeouts", 60, 4, 60)
    codes, output, seconds = end_when_the_judge_of_rank_1(tiny, tmp_path, "time.sleep(1000)", *limits)
    assert codes[0] == watch.RANK_LOST and codes[1] in (watch.RANK_LOST, -signal.SIGKILL) and seconds < 40
    assert re.search(r"rank 1 .* has been in rollout of step \d+ at [a-z_/.]+:\d+", output), output[-3000:]
    assert not re.search("error: rank 0 ", output), output[-3000:]


def test_a_judge_that_raises_on_one_rank_ends_both(tiny, tmp_path):
    codes, output, seconds = end_when_the_judge_of_rank_1(tiny, tmp_path, "raise ValueError('no tea')")
    assert codes == [2, 2] and seconds < 40
    assert len(re.findall(r"error: step \d+: .*no tea; what is done is saved", output)) == 2
    assert not re.search("error: rank ", output), output[-3000:]


PATCHED = """
import os, time
import sft
from runtime import flags, training

def on_rank_1(function):
    def wrapped(*given, **named):
        if os.environ["RANK"] == "1":
            {what}
        return function(*given, **named)
    return wrapped

{name} = on_rank_1({name})
flags.run(sft.main, flags.parse(sft.Args, sft.__doc__))
"""
TIMEOUTS = ("--timeouts", 60, 4, 4)
FAULTS = {
    # the other one waits in clip_grad_norm_, whose innermost frames are not torch.distributed's
    "hangs in its update": (
        "training.optimizer_step",
        "time.sleep(1000)",
        r"rank 1 .* has been in update of step 1 at sft.py:\d+ for",
    ),
    "dies before the run is open": (
        "sft.read_examples",
        "os.kill(os.getpid(), 9)",
        r"rank 1 .* is gone; it was in start at ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_is_watched_from_its_start(tiny, tmp_path, fault):
    name, what, said = FAULTS[fault]
    (tmp_path / "start.py").write_text(PATCHED.format(name=name, what=what))
    launched = launch(tmp_path / "start.py", *sft_flags(tiny, tmp_path / "run", *TIMEOUTS), processes=2)
    assert_rank_1_is_named(launched, said)


def test_a_rank_that_hangs_in_an_evaluation(tiny, tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE.format(when=True, what="time.sleep(1000)"))
    given = ["--task", "reward-accuracy", "--prompts", tiny / "pairs.jsonl", "--judge", f"{tmp_path}/judge.py:score"]
    launched = launch("evaluate.py", *given, "--out", tmp_path / "run", *TIMEOUTS, processes=2)
    assert_rank_1_is_named(launched, r"rank 1 .* has been in verdicts at [a-z_/.]+:\d+ for")


def assert_rank_1_is_named(launched, said):
    codes, output, _ = end(launched)
    assert codes[0] == watch.RANK_LOST and codes[1] in (watch.RANK_LOST, -signal.SIGKILL), output[-3000:]
    assert re.search(f"error: {said}", output) and not re.search("error: rank 0 ", output), output[-3000:]


WAITING = f"""
import json, sys, threading, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
import torch.distributed as dist
from conftest import random_model, tiny_config
from runtime import distributed, flags, training, watch
from weights import full_tensor


def main(_):
    ranks = distributed.start("fp32", timeouts=(60, 60, 60))
    seen = watch._State.watch
    held = seen.store.clone()
    model = training.shard(random_model(tiny_config()), ranks)
    losses = []

    def forward():
        losses.append(training.nll(model, [([1, 2, 3], [False, True, True])], ranks.device)[0])

    def total_norm():
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        return full_tensor(norm).item()

    waits = dict(
        forward=forward,
        backward=lambda: losses[0].backward(),
        clip_grad_norm_=lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        full_tensor=lambda: next(model.parameters()).full_tensor().sum().item(),
        total_norm=total_norm,
        all_sum=lambda: distributed.all_sum(ranks, 1.0),
        all_max=lambda: distributed.all_max(ranks, 1.0),
        all_gather=lambda: distributed.all_gather(ranks, ["a"]),
        barrier=lambda: distributed.barrier(ranks),
    )

    def sample(name):
        # what rank 0 says of itself: does it wait, 20 times in a row?
        in_a_row, deadline = 0, time.monotonic() + 3
        while in_a_row < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
            seen.tell()
            in_a_row = in_a_row + 1 if json.loads(seen.store.get("rank/0"))["waits"] else 0
        print(name, in_a_row == 20, flush=True)
        seen.store.set(name, "")

    for name, wait in waits.items():
        dist.barrier()
        if ranks.rank == 0:
            threading.Thread(target=sample, args=(name,)).start()
        else:
            threading.Timer(0.1, lambda: (seen.tell(), seen.store.set(name + " told", ""))).start()
            held.wait([name, name + " told"])
            print(name, json.loads(seen.store.get("rank/1"))["waits"], flush=True)
        wait()


flags.run(main, None)
print("groups left at the end:", int(dist.is_initialized()), flush=True)
"""


def test_who_waits_for_another_rank(tmp_path):
    """Rank 1 is held up by something else before each of these; rank 0 is in it."""
    (tmp_path / "waiting.py").write_text(WAITING)
    output = finish(launch(tmp_path / "waiting.py", processes=2))
    said = [line.split() for line in output.splitlines() if line.endswith(("True", "False"))]
    names = {name for name, _ in said}
    assert output.count("groups left at the end: 0") == 2
    assert len(names) == 9 and sorted(said) == sorted([name, w] for name in names for w in ("False", "True")), said


def test_progress_in_a_phase_restarts_its_time_and_is_no_other_phase(monkeypatch):
    """Ranks need not have the same number of answers to ask for."""
    watch.set_phase("verdicts")
    count, since = watch._State.count, watch._State.since
    watch.set_phase("verdicts")
    assert watch._State.count == count and watch._State.since > since
    watch.set_phase("answers")
    assert watch._State.count == count + 1


def states(*ranks):
    """(phases entered, phase, seconds in it, does it wait) of each rank, as they stand in the store."""
    names = ("count", "phase", "seconds", "waits")
    return [dict(zip(names, rank), beat=1, pid=i, host="elsewhere", at="x.py:1") for i, rank in enumerate(ranks)]


FOUND = {  # with time-outs of 600 s for a rollout, 100 s for an update: whom the watch names
    "a slow rollout": (states((5, "rollout of step 2", 500, True), (5, "rollout of step 2", 500, False)), None),
    "a rollout over its time": (states((5, "rollout of step 2", 700, True), (5, "rollout of step 2", 650, False)), 1),
    "told of later": (states((5, "rollout of step 2", 605, True), (5, "rollout of step 2", 598, False)), None),
    "an update": (states((6, "update of step 2", 150, False), (6, "update of step 2", 150, True)), 0),
    "behind the others": (states((7, "rollout of step 3", 150, False), (6, "update of step 2", 150, True)), 1),
    "ahead, and slow": (states((7, "update of step 2", 150, True), (6, "rollout of step 2", 550, False)), None),
    "each waits for the other": (states((6, "update of step 2", 150, True), (6, "update of step 2", 150, True)), 0),
    "an evaluation": (states((6, "evaluation of step 2", 500, False), (6, "evaluation of step 2", 500, True)), None),
}


@pytest.fixture
def watching():
    """A Watch of these states, without a group."""

    def make(found):
        seen = watch.Watch.__new__(watch.Watch)
        seen.limits, seen.silence, seen.world_size, seen.seen = dict(start=60, rollout=600, update=100), 60, 2, {}
        seen.store = SimpleNamespace(multi_get=lambda keys: [json.dumps(state) for state in found])
        return seen

    return make


@pytest.mark.parametrize("name", FOUND)
def test_whom_the_watch_names(watching, name):
    found, rank = FOUND[name]
    named = watching(found).find()
    assert (named and named[0]) == rank
    if named:
        assert f"rank {rank} (host elsewhere, pid {rank}) has been in {found[rank]['phase']} at x.py:1 for" in named[1]


def test_a_rank_that_does_not_join(tiny, tmp_path):
    alone = dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    output = finish(launch("sft.py", *sft_flags(tiny, tmp_path / "run", "--timeouts", 3, 60, 60), **alone), status=2)
    assert "error: not all 2 ranks have joined within 3 s (--timeouts): " in output and "1/2 clients joined" in output


def test_a_silent_rank(watching, monkeypatch):
    """It is one whose beat does not change; a phase of its own may last long."""
    found = states((6, "checkpoint of step 2", 0, False), (6, "checkpoint of step 2", 0, False))
    now, seen = 1000.0, watching(found)
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    for _ in range(19):
        assert seen.find() is None
        now += 5
        found[0]["beat"] += 1
        found[1]["beat"] += now < 1040
    assert seen.find() is None and now == 1095  # 60 s since the last beat
    now += 5
    found[0]["beat"] += 1
    assert seen.find()[0] == 1 and "has been silent for" in seen.find()[1]


# -- one line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [SafetensorError("cut\noff"), RecursionError("deep"), FloatingPointError("nan"), torch.OutOfMemoryError("x")],
)
def test_errors_that_a_user_can_mend_are_one_line(capsys, error):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as stop:
        flags.run(main, None)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 2


def test_an_interruption_before_the_first_step(capsys):
    def main(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        flags.run(main, None)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
