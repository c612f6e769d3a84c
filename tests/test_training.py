"""sft.py, train_grm.py and dpo.py as a user runs them: alone, on two processes, killed and continued, on bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import tyro
from conftest import ROOT, error_of, finish, grm_flags, launch, random_model, read_metrics, run_script, tiny_config
from safetensors.torch import load_file

import dpo
import sft
import train_grm
from attention import Packed
from chat import Chat
from model import load_pretrained
from prompts import Judgement, answer_prompt, load_templates, response_ids
from runtime import packing
from runtime.flags import parse
from runtime.rows import read_rows

SCRIPTS = ("sft", "grm", "bt", "dpo")
WEIGHTS = dict(sft="policy", grm="model", bt="model", dpo="policy")


def flags_of(name, tiny):
    """(script, flags) for some dozen steps on the tiny rows, several micro-batches a step."""
    if name == "grm":
        return "train_grm.py", grm_flags(tiny)
    flags = [
        "--model",
        tiny / "checkpoint",
        "--data",
        tiny / "pairs.jsonl",
        "--answer-template",
        tiny / "answer.txt",
        "--batch-size",
        8,
        "--lr",
        2e-3,
        "--tokens-per-microbatch",
        250,
    ]
    if name == "bt":
        return "train_grm.py", [
            *flags,
            "--objective",
            "bt",
            "--epochs",
            3,
            "--eval-data",
            tiny / "pairs_other.jsonl",
            "--eval-every",
            5,
        ]
    return f"{name}.py", [*flags, "--epochs", 6 if name == "sft" else 3, "--save-every", 8]


@pytest.fixture(scope="module")
def runs(tiny, tiny_grm, tmp_path_factory):
    """name -> (folder of a whole run on one process, folder of its first three steps on two)."""
    done = {}

    def run(name):
        if name not in done:
            one, two = (tmp_path_factory.mktemp(f"{name}_{n}") / "run" for n in (1, 2))
            script, flags = flags_of(name, tiny)
            if name == "grm":
                one = tiny_grm
            else:
                run_script(script, *flags, "--out", one)
            finish(launch(script, *flags, "--out", two, "--max-steps", 3, processes=2))
            done[name] = one, two
        return done[name]

    return run


# -- one and two processes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_give_the_losses_of_one(runs, name):
    one, two = map(read_metrics, runs(name))
    assert len(one) > len(two) == 3
    for ours, theirs in zip(one, two):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["tokens"] == theirs["tokens"]
    # the update counts too: a step with half the gradient would show only here and in grad_norm
    assert abs(one[2]["loss"] - one[0]["loss"]) > 1e-3


@pytest.mark.parametrize("name", SCRIPTS)
def test_losses_fall_and_the_weights_load(runs, name):
    out, _ = runs(name)
    metrics = read_metrics(out)
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    Chat(str(out / WEIGHTS[name]))  # the folder is complete: tokenizer, config, weights
    load_pretrained(str(out / WEIGHTS[name]), scalar_head=name == "bt")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_of_two_ranks_has_all_moments(runs, name):
    """Also behind an evaluation, which leaves the root of FSDP gathered."""
    _, two = runs(name)
    (file,) = two.glob("checkpoints/step_000003/train_state/index.json")
    keys = json.loads(file.read_text()).keys()
    assert {key for key in keys if key.count("/") == 1 and f"{key}/exp_avg" not in keys} == set()


# -- resume ----------------------------------------------------------------------------------------


def assert_same_run(name, out, other):
    assert read_metrics(out) == read_metrics(other)  # floats survive JSON exactly
    ours, theirs = (load_file(folder / WEIGHTS[name] / "model.safetensors") for folder in (out, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_killed_run_continues_bit_for_bit(runs, tiny, tmp_path):
    whole, _ = runs("sft")
    script, flags = flags_of("sft", tiny)
    out = tmp_path / "run"
    run = launch(script, *flags, "--out", out)
    log, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 11:  # a checkpoint at 8, and steps beyond it
        assert run.ranks[0].is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    run.ranks[0].kill()
    finish(run, status=-signal.SIGKILL)
    assert 11 <= log.read_text().count("\n") < len(read_metrics(whole))
    assert (out / "checkpoints" / "step_000008").is_dir()

    with open(log, "a") as f:
        f.write('{"step": 12, "lo')  # what a kill in the middle of a write leaves
    output = run_script(script, *flags, "--out", out)
    assert "resumed from" in output
    assert_same_run("sft", out, whole)


@pytest.mark.parametrize("name", ["bt", "dpo"])
def test_a_stopped_run_continues_bit_for_bit(runs, tiny, tmp_path, name):
    whole, _ = runs(name)
    module = {"bt": train_grm, "dpo": dpo}[name]
    flags = [str(flag) for flag in [*flags_of(name, tiny)[1], "--out", tmp_path / "run"]]
    module.main(tyro.cli(module.Args, args=[*flags, "--max-steps", "5"]))
    assert len(read_metrics(tmp_path / "run")) == 5
    module.main(tyro.cli(module.Args, args=flags))
    assert_same_run(name, tmp_path / "run", whole)


# -- the losses, by hand ---------------------------------------------------------------------------


def test_each_epoch_has_an_order_of_its_own():
    epochs = [sum((packing.batch_indices(10, 3, 3 * k + i, seed=0) for i in range(3)), []) for k in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and len(set(map(tuple, epochs))) == 3


def test_dpo_counts_from_the_reference():
    model = random_model(tiny_config())
    pair = dpo.Pair([5, 6, 7], [8, 9], [10, 11, 12])
    chosen, rejected, _ = dpo.answer_logprobs(model, [pair], torch.device("cpu"))
    moved = pair._replace(reference_chosen=chosen.item() - 2, reference_rejected=rejected.item() + 1)
    loss, sums, _ = dpo.loss_of(dpo.Args(beta=0.5, sft_weight=0), model, [moved], torch.device("cpu"))
    assert sums["margin"].item() == pytest.approx(1.5, abs=1e-4)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-4)


def test_dpo_loss_by_hand():
    # first pair: chosen rose by 2, rejected fell by 1 -> margin 0.2 * 3; second: nothing moved
    chosen, rejected = torch.tensor([-10.0, -5.0]), torch.tensor([-20.0, -7.0])
    loss, margin = dpo.dpo_loss(chosen, rejected, torch.tensor([-12.0, -5.0]), torch.tensor([-19.0, -7.0]), 0.2)
    assert margin.tolist() == pytest.approx([0.6, 0.0], abs=1e-6)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.6)), math.log(2)], abs=1e-6)


def test_bt_loss_by_hand():
    loss = train_grm.bt_loss(torch.tensor([1.0, 0.5, -1.0]), torch.tensor([-1.0, 0.5, 2.0]))
    assert loss.tolist() == pytest.approx([0.126928, 0.693147, 3.048587], abs=1e-5)  # log(1 + e^-(difference))


def test_dpo_starts_at_the_reference(runs, tiny):
    """Reference log-probs against a plain log-softmax; the first loss is log 2 + 0.1 x mean token NLL."""
    out, _ = runs("dpo")
    kept = json.loads((out / "reference.json").read_text())
    chat, model = Chat(str(tiny / "checkpoint")), load_pretrained(str(tiny / "checkpoint"))
    templates = load_templates(None, answer_template=str(tiny / "answer.txt"))
    rows = read_rows(str(tiny / "pairs.jsonl"), "pair")
    sums, means = {"chosen": [], "rejected": []}, []
    for row in rows:
        for key in sums:
            prompt, answer = answer_prompt(chat, templates, row), response_ids(chat, row[key])
            packed = Packed([len(prompt) + len(answer)])
            logits = model(torch.tensor(prompt + answer), packed.position_ids, packed)
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
            sums[key].append(logprobs.sum().item())
            if key == "chosen":
                means.append(logprobs.mean().item())
    assert kept["chosen"] == pytest.approx(sums["chosen"], abs=1e-3)
    assert kept["rejected"] == pytest.approx(sums["rejected"], abs=1e-3)
    first = read_metrics(out)[0]
    batch = packing.batch_indices(len(rows), 8, 0, seed=0)
    expected = -sum(means[i] for i in batch) / 8
    assert first["sft_loss"] == pytest.approx(expected, abs=1e-4)
    assert first["loss"] == pytest.approx(math.log(2) + 0.1 * expected, abs=1e-4)
    assert read_metrics(out)[-1]["accuracy"] == 1.0


def test_bt_scores_the_last_token(tiny, tmp_path):
    """Rewards of packed pairs equal those of each sequence alone, and padding ranks add nothing."""
    model = load_pretrained(str(tiny / "checkpoint"), scalar_head=True)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    examples = [([5, 6, 7, 8], [5, 6, 9]), ([1, 2], [3, 4, 5, 6, 7])]

    def reward(ids):
        packed = Packed([len(ids)])
        return model(torch.tensor(ids), packed.position_ids, packed)[-1].item()

    margins = [reward(chosen) - reward(rejected) for chosen, rejected in examples]
    loss, sums, _ = train_grm.bt_sums(model, examples, "cpu")
    assert sums["margin"] == pytest.approx(sum(margins), abs=1e-5)
    assert sums["correct"] == sum(m > 0 for m in margins) and sums["ties"] == 0
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins), abs=1e-5)


def test_bt_counts_ties_apart(runs):
    first, *_, last = read_metrics(runs("bt")[0])
    assert first["ties"] == 1 and first["accuracy"] is None  # the head starts at zero: nothing is decided
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["ties"] == 0 and last["accuracy"] == 1 and last["held_out_accuracy"] == 1


def test_agreement_by_hand():
    labels = [Judgement("c", *scores) for scores in ((4, 5, 3), (-1, -2, 1), (0, 0, 0))]
    found = [Judgement("d", 4, 4, 3), Judgement("d", -1, -2, 0), None]
    result = train_grm.agreement(labels, found)
    assert result["judged"] == 3 and result["parsed"] == pytest.approx(2 / 3)
    assert result["score_correlation"] == pytest.approx(1)  # two points lie on a line
    assert [result[f"exact_{d}"] for d in train_grm.DIMENSIONS] == [1.0, 0.5, 0.5]
    nothing = train_grm.agreement(labels, [None] * 3)
    assert nothing["parsed"] == 0 and nothing["score_correlation"] is None and nothing["exact_helpfulness"] is None
    assert train_grm.agreement(labels, [found[0]] * 3)["score_correlation"] is None  # no variance


def test_the_grm_writes_judgements_that_parse(tiny_grm):
    held_out = json.loads((tiny_grm / "held_out.json").read_text())
    assert held_out["judged"] == 8 and held_out["parsed"] == 1
    assert held_out["score_correlation"] > 0.9 and held_out["exact_helpfulness"] > 0.9
    assert read_metrics(tiny_grm)[-1]["held_out_loss"] < 0.3


def test_defaults_are_those_of_the_objective():
    grm, bt = (train_grm.with_defaults(train_grm.Args(objective=o)) for o in ("grm", "bt"))
    assert (grm.lr, grm.epochs, grm.data, grm.out) == (4e-5, 2, "out/data/judgements.jsonl", "out/grm")
    assert (bt.lr, bt.epochs, bt.data, bt.out) == (1e-5, 1, "out/data/pairs.jsonl", "out/bt")
    assert train_grm.with_defaults(train_grm.Args(objective="bt", lr=1e-6)).lr == 1e-6


# -- bad input -------------------------------------------------------------------------------------


def rows_with(tiny, tmp_path, name, line, text):
    """A copy of a file of the tiny project in which one line is replaced."""
    lines = (tiny / name).read_text().splitlines()
    lines[line - 1] = text
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path / name


@pytest.mark.parametrize(
    "module, kind, field",
    [(sft, "pairs", "chosen"), (dpo, "pairs", "rejected"), (train_grm, "judgements", "naturalness")],
)
def test_malformed_rows(module, kind, field, tiny, tmp_path, capsys):
    row = json.loads((tiny / f"{kind}.jsonl").read_text().splitlines()[2])
    out = tmp_path / "out"
    flags = ["--model", tiny / "checkpoint", "--out", out, "--data"]
    missing = rows_with(tiny, tmp_path, f"{kind}.jsonl", 3, json.dumps({k: row[k] for k in row if k != field}))
    assert f'{missing}:3: field "{field}" is missing' in error_of(module, capsys, *flags, missing)
    wrong = rows_with(tiny, tmp_path, f"{kind}.jsonl", 2, json.dumps(row | {field: 7.5}))
    assert f'{wrong}:2: field "{field}" is 7.5, expected' in error_of(module, capsys, *flags, wrong)
    torn = rows_with(tiny, tmp_path, f"{kind}.jsonl", 4, '{"prompt_id": ')
    assert f"{torn}:4: not JSON" in error_of(module, capsys, *flags, torn)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert f"{empty}: empty, expected" in error_of(module, capsys, *flags, empty)
    assert "no such file" in error_of(module, capsys, *flags, tmp_path / "none.jsonl")
    assert not out.exists()  # nothing was begun


@pytest.mark.parametrize("name, module", [("sft", sft), ("bt", train_grm), ("dpo", dpo)])
def test_other_flags_in_a_used_folder(name, module, runs, tiny, tmp_path, capsys):
    whole, _ = runs(name)
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    flags = [*flags_of(name, tiny)[1], "--out", tmp_path / "run", "--seed", 1]
    assert "holds a run with other flags (--seed 0 -> 1)" in error_of(module, capsys, *flags)


@pytest.mark.parametrize("module", [sft, train_grm, dpo])
def test_models_and_limits(module, tiny, tmp_path, capsys):
    kind = "judgements" if module is train_grm else "pairs"
    flags = ["--data", tiny / f"{kind}.jsonl", "--out", tmp_path / "out"]
    assert "no/such/model" in error_of(module, capsys, *flags, "--model", tmp_path / "no/such/model")
    folder = tmp_path / "empty"
    folder.mkdir()
    assert f"{folder}: no tokenizer.json" in error_of(module, capsys, *flags, "--model", folder)
    template = "grm" if module is train_grm else "answer"  # the built-in ones are over the 512 positions
    here = [*flags, "--model", tiny / "checkpoint", f"--{template}-template", tiny / f"{template}.txt"]
    assert "fewer than --batch-size 128" in error_of(module, capsys, *here)


def test_held_out_rows_are_checked_before_work(tiny, tmp_path, capsys):
    flags = [*grm_flags(tiny), "--out", tmp_path / "out", "--max-length"]
    assert "no row is within 20 tokens" in error_of(train_grm, capsys, *flags, 20)
    short = tmp_path / "short.jsonl"
    short.write_text((tiny / "pairs_other.jsonl").read_text())
    error = error_of(train_grm, capsys, *flags, 500, "--eval-data", short)
    assert f'{short}:1: field "answer" is missing' in error
    error = error_of(train_grm, capsys, *flags, 500, "--eval-data", tiny / "judgements.jsonl")
    assert f"{tiny / 'judgements.jsonl'}:1: its prompt_id is held out" in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_objective(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(train_grm.Args, train_grm.__doc__, ["--objective", "rm"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "'rm'" in printed.out + printed.err and "--objective" in printed.out + printed.err


def test_the_exit_status_and_the_one_line(tiny, tmp_path):
    flags = ["--model", str(tiny / "checkpoint"), "--data", str(tmp_path / "none.jsonl")]
    run = subprocess.run([sys.executable, f"{ROOT}/dpo.py", *flags], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == (
        f"error: {tmp_path}/none.jsonl: no such file; expected JSON lines (pair rows)\n(TRACEBACK=1 shows where)\n"
    )


def test_torchrun(tiny, tmp_path):
    script, flags = flags_of("sft", tiny)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [str(flag) for flag in [*flags, "--out", tmp_path / "run", "--max-steps", 1]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):  # torchrun picks a free port, which another test's processes may take before its own do
        done = subprocess.run([*torchrun, f"{ROOT}/{script}", *flags], capture_output=True, text=True, env=environment)
        if "EADDRINUSE" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-5000:]
    assert len(read_metrics(tmp_path / "run")) == 1
