"""Run folders: what may change under one, who may write there, what moves along with it; and forks of ppo_cpe.py."""

import json
import os
import re
import shutil
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TEMPLATES, error_of, finish, launch, random_model, run_script, tiny_config

import dpo
import ppo_cpe
import replay
import sft
import train_grm
from kernels.varlen_attention import say_once
from model import load_pretrained, save_pretrained
from runtime import digests, progress, trackers
from runtime.flags import RuntimeArgs, parse

JUDGE = "def score(row, answer) -> float:\n    return float(len(answer) % 5)\n"
EDITING_JUDGE = """
from prompts import Judgement

def score(row, answer) -> Judgement:
    n = len(answer)
    return Judgement("Name tea and drop the end.", n % 5, n % 4 - 2, n % 3)
"""


@pytest.fixture
def here(tiny, tmp_path):
    """A folder of inputs that a test may change: checkpoint/, the rows, the templates, judge.py."""
    for name in ("prompts", "pairs", "judgements", "prompts_other", "judgements_other"):
        shutil.copy(tiny / f"{name}.jsonl", tmp_path)
    for name in TEMPLATES:
        shutil.copy(tiny / f"{name}.txt", tmp_path)
    shutil.copytree(tiny / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "second.py").write_text(JUDGE)
    return tmp_path


def flags_of(module, here, *more):
    """Flags of one step of a stage on `here`, with its output in here/run."""
    flags = ["--model", here / "checkpoint", "--out", here / "run", "--max-steps", 1]
    if module is ppo_cpe:
        flags += ["--prompts", here / "prompts.jsonl", "--judge", f"{here}/judge.py:score", "--edit-rate", 0]
        flags += ["--edit-template", here / "edit.txt", "--prompts-per-step", 2, "--mini-batch-prompts", 2]
        flags += ["--n-samples", 1, "--max-new-tokens", 4, "--answer-template", here / "answer.txt"]
        shutil.copy(here / "prompts_other.jsonl", here / "held_out.jsonl")
        flags += ["--eval-data", here / "held_out.jsonl", "--eval-n", 1]
        flags += ["--audit-judge", f"{here}/second.py:score", "--audit-share", 0.5]
    elif module is train_grm:
        flags += ["--data", here / "judgements.jsonl", "--grm-template", here / "grm.txt", "--batch-size", 4]
        shutil.copy(here / "judgements_other.jsonl", here / "held_out.jsonl")
        flags += ["--eval-data", here / "held_out.jsonl", "--eval-judgements", 1, "--eval-max-new-tokens", 4]
    else:
        flags += ["--data", here / "pairs.jsonl", "--answer-template", here / "answer.txt", "--batch-size", 4]
    return [*flags, *more]


def run(module, *flags):
    module.main(parse(module.Args, module.__doc__, [str(flag) for flag in flags]))


def replace_in(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def other_weights(folder):
    """Puts other weights into a model's folder."""
    model = load_pretrained(str(folder))
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    save_pretrained(model, str(folder), str(folder))


# -- changed inputs ------------------------------------------------------------------------------------------------

CHANGES = {  # what is changed: how
    "--data": lambda here, kind: replace_in(here / f"{kind}.jsonl", "Plan", "Schedule"),
    "--prompts": lambda here, kind: replace_in(here / "prompts.jsonl", "What about", "How about"),
    "--model": lambda here, kind: other_weights(here / "checkpoint"),
    "its chat template": lambda here, kind: replace_in(
        here / "checkpoint" / "tokenizer_config.json",
        "{% for",
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\\nBe kind.<|im_end|>\\n{% endif %}{% for",
    ),
    "its stop ids": lambda here, kind: (here / "checkpoint" / "generation_config.json").write_text(
        '{"eos_token_id": [258]}'
    ),
    "--eval-data": lambda here, kind: replace_in(here / "held_out.jsonl", "tea", "coffee"),
    "--audit-judge": lambda here, kind: replace_in(here / "second.py", "% 5", "% 4"),
    "--judge": lambda here, kind: replace_in(here / "judge.py", "% 5", "% 4"),
    "--answer-template": lambda here, kind: replace_in(here / "answer.txt", "Question", "They ask"),
    "--grm-template": lambda here, kind: replace_in(here / "grm.txt", "Judge", "Rate"),
    "--edit-template": lambda here, kind: replace_in(here / "edit.txt", "Rewrite", "Improve"),
}
INPUTS = {
    sft: ("--data", "--model", "--answer-template", "its chat template"),
    dpo: ("--data", "--model", "--answer-template"),
    train_grm: ("--data", "--model", "--grm-template", "its chat template", "--eval-data"),
    ppo_cpe: (
        "--prompts",
        "--model",
        "--judge",
        "--answer-template",
        "--edit-template",
        "its chat template",
        "its stop ids",
        "--eval-data",
        "--audit-judge",
    ),
}

NAMED_WITH_FILE = {"--eval-data": "held_out.jsonl", "--audit-judge": "second.py:score"}
AS_SAID = {  # a template may be built in, or lie beside the weights: no flag need be given
    (train_grm, "--grm-template"): "the template",
    (ppo_cpe, "--answer-template"): "the templates",
    (ppo_cpe, "--edit-template"): "the templates",
}


def test_a_fork_does_not_continue_the_run_of_its_original(here, capsys):
    run(sft, *flags_of(sft, here))
    file = here / "run" / "args.json"
    kept = json.loads(file.read_text())
    assert kept["script"] == "sft.py"
    file.write_text(json.dumps(kept | {"script": "mine.py"}))
    assert "holds a run of mine.py, not of sft.py" in error_of(sft, capsys, *flags_of(sft, here, "--max-steps", 2))
    del kept["warmup_ratio"]
    file.write_text(json.dumps(kept))  # a fork's new flag: its default may stand for what the run did, other values not
    error = error_of(sft, capsys, *flags_of(sft, here, "--max-steps", 2, "--warmup-ratio", 0.5))
    assert "holds a run of another version, with no such flags (--warmup-ratio)" in error
    run(sft, *flags_of(sft, here, "--max-steps", 2))


def test_nothing_of_steps_that_run_again_stays(here):
    """Lost answers, bad steps: of an attempt that ended before its checkpoint, with metrics or without."""
    flags = flags_of(sft, here)
    run(sft, *flags)
    folder = here / "run"
    kinds = ("rollouts", "lost", "tokens", "held_out", "bad_steps")
    for kind in kinds:
        (folder / kind).mkdir(exist_ok=True)
        for step in (1, 2):
            (folder / kind / f"step_00000{step}.jsonl").write_text("{}\n")
    (folder / "metrics.jsonl").unlink()
    run(sft, *flags, "--max-steps", 2)
    for kind in kinds:
        assert os.listdir(folder / kind) == ["step_000001.jsonl"]


@pytest.mark.parametrize("module", INPUTS, ids=lambda module: module.__name__)
def test_the_same_command_on_changed_inputs(module, here, capsys):
    flags = flags_of(module, here)
    run(module, *flags)
    kept = {name: (here / "run" / name).read_bytes() for name in ("args.json", "metrics.jsonl")}
    shutil.copytree(here, here / "before", ignore=shutil.ignore_patterns("run", "before"))
    for changed in INPUTS[module]:
        CHANGES[changed](here, "judgements" if module is train_grm else "pairs")
        error = error_of(module, capsys, *flags, "--max-steps", 2)
        found = re.search(f"{here}/run holds a run on other inputs: what (.*) names has changed since; choose", error)
        named = AS_SAID.get((module, changed), changed)
        if changed in NAMED_WITH_FILE:  # another file may be given, so a change is one of this file
            named = f"{changed} {here / NAMED_WITH_FILE[changed]}"
        if changed.startswith("its "):
            named = "--model"
        also = ["--critic"] if module is ppo_cpe and named == "--model" else []  # it starts from --model
        assert found[1].split(", ") == [named, *also]
        shutil.copytree(here / "before", here, dirs_exist_ok=True)
    assert kept == {name: (here / "run" / name).read_bytes() for name in kept}
    run(module, *flags)  # as it was: nothing to do
    assert kept["metrics.jsonl"] == (here / "run" / "metrics.jsonl").read_bytes()


def test_a_continuation_may_hold_out_other_rows(here):
    """--eval-data may change, to another file and to none."""
    run(train_grm, *flags_of(train_grm, here))
    (here / "other.jsonl").write_text((here / "judgements_other.jsonl").read_text().replace("tea", "coffee"))
    run(train_grm, *flags_of(train_grm, here, "--eval-data", here / "other.jsonl", "--max-steps", 2))
    assert (here / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_a_template_that_says_the_same_may_lie_elsewhere(here):
    """A digest is of contents; the flag itself, a path, is compared as a flag."""
    run(sft, *flags_of(sft, here))
    os.utime(here / "answer.txt", (0, 0))
    os.utime(here / "pairs.jsonl", (0, 0))
    run(sft, *flags_of(sft, here, "--max-steps", 2))
    assert (here / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_the_same_command_again_as_a_process(here):
    flags = flags_of(sft, here)
    finish(launch("sft.py", *flags))
    before = (here / "run" / "metrics.jsonl").read_bytes()
    assert "resumed from" in finish(launch("sft.py", *flags), status=0)
    assert (here / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["", '{"model": ', "[1, 2]", "null", '"text"', "7", "\ufeff{}"])
def test_a_broken_args_file(here, capsys, content):
    run(sft, *flags_of(sft, here))
    (here / "run" / "args.json").write_text(content, encoding="utf-8")
    error = error_of(sft, capsys, *flags_of(sft, here))
    assert error.startswith(f"error: {here}/run/args.json: not the flags of a run (")


def test_bytes_in_the_args_file(here, capsys):
    run(sft, *flags_of(sft, here))
    (here / "run" / "args.json").write_bytes(b"\xff\xfe{}")
    assert f"{here}/run/args.json: not the flags of a run (" in error_of(sft, capsys, *flags_of(sft, here))


# -- the folder ----------------------------------------------------------------------------------------------------


def test_a_copy_whose_links_were_followed(here, capsys):
    run(sft, *flags_of(sft, here))
    shutil.copytree(here / "run", here / "copy")  # as `cp -rL` and most tools for buckets do
    assert not (here / "copy" / "policy").is_symlink()
    run(sft, *flags_of(sft, here, "--out", here / "copy", "--max-steps", 2))
    assert f"moved to {here}/copy/policy.copied" in capsys.readouterr().out
    policy = here / "copy" / "policy"
    assert policy.is_symlink() and os.readlink(policy) == "checkpoints/step_000002/policy"
    first = load_pretrained(str(here / "run" / "policy"))
    copied, newest = load_pretrained(f"{policy}.copied"), load_pretrained(str(policy))
    assert torch.equal(first.model.embed_tokens.weight, copied.model.embed_tokens.weight)
    assert not torch.equal(first.model.embed_tokens.weight, newest.model.embed_tokens.weight)
    assert (here / "run" / "checkpoints" / "step_000001").is_dir()  # the original is as it was


def test_another_process_is_refused(here):
    """The lock lasts as long as the process that took it: this one."""
    run(sft, *flags_of(sft, here))
    output = finish(launch("sft.py", *flags_of(sft, here, "--max-steps", 2)), status=2)
    assert f"error: {here}/run: another run is writing there" in output
    assert f'"host": "{socket.gethostname()}"' in output and f'"pid": {os.getpid()}' in output
    assert (here / "run" / "metrics.jsonl").read_text().count("\n") == 1
    run(sft, *flags_of(sft, here, "--max-steps", 2))  # its owner may go on


@pytest.mark.parametrize("damage", ["missing", "dangling", "old"])
def test_the_link_is_made_again(here, damage):
    flags = flags_of(sft, here, "--keep-checkpoints", 2)
    run(sft, *flags, "--max-steps", 2, "--save-every", 1)
    link = here / "run" / "policy"
    link.unlink()
    if damage != "missing":
        link.symlink_to(f"checkpoints/step_00000{'9' if damage == 'dangling' else '1'}/policy")
    run(sft, *flags, "--max-steps", 2, "--save-every", 1)
    assert os.readlink(link) == "checkpoints/step_000002/policy" and (link / "model.safetensors").is_file()


def test_templates_travel(here, capsys):
    run(sft, *flags_of(sft, here))
    policy = here / "run" / "policy"
    assert (policy / "templates" / "answer.txt").read_text().rstrip("\n") == TEMPLATES["answer"]
    capsys.readouterr()

    flags = ["--model", policy, "--data", here / "pairs.jsonl", "--batch-size", 4, "--max-steps", 1]
    run(dpo, *flags, "--out", here / "dpo")
    said = capsys.readouterr().err
    assert f"the answer template is {policy}/templates/answer.txt, which the model was trained with" in said
    assert said.count("template") == 3  # in that line alone
    inherited = here / "dpo" / "policy" / "templates" / "answer.txt"
    assert inherited.read_bytes() == (policy / "templates" / "answer.txt").read_bytes()

    other = here / "other.txt"
    other.write_text("{persona}\n{question}")
    run(dpo, *flags, "--out", here / "dpo2", "--answer-template", other)
    said = capsys.readouterr().err
    assert f"--answer-template {other} differs from {policy}/templates/answer.txt, which {policy} was" in said
    assert (here / "dpo2" / "policy" / "templates" / "answer.txt").read_text().rstrip("\n") == "{persona}\n{question}"


# -- files of a run that are read again ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda content: {**content, "chosen": [x - 1 for x in content["chosen"]]},
        lambda content: {**content, "rejected": content["rejected"][:-1]},
        lambda content: {"pairs": content["pairs"], "chosen": content["chosen"]},
        lambda content: {},
    ],
)
def test_reference_logprobs_that_were_changed_are_not_trained_on(here, capsys, change):
    run(dpo, *flags_of(dpo, here))
    file = here / "run" / "reference.json"
    whole = file.read_text()
    file.write_text(json.dumps(change(json.loads(whole))))
    assert f"{file}: damaged; remove it" in error_of(dpo, capsys, *flags_of(dpo, here, "--max-steps", 2))
    file.write_text(whole[:-20])
    assert f"{file}: not JSON" in error_of(dpo, capsys, *flags_of(dpo, here, "--max-steps", 2))
    file.unlink()
    run(dpo, *flags_of(dpo, here, "--max-steps", 2))
    assert file.read_text() == whole
    shutil.move(here / "run", here / "other")  # another model, with nothing left of the run but this file
    (here / "run").mkdir()
    file.write_text(whole)
    other_weights(here / "checkpoint")
    assert "or by another model than" in error_of(dpo, capsys, *flags_of(dpo, here))


def test_reference_logprobs_are_made_again_before_sharded_weights_are_loaded(here):
    flags = flags_of(dpo, here, "--dtype", "bf16")  # bf16 shards on a single process, too
    run(dpo, *flags)
    (here / "run" / "reference.json").unlink()
    run(dpo, *flags, "--max-steps", 2)


def test_checkpoints_without_their_flags_are_not_continued(here, capsys):
    run(sft, *flags_of(sft, here))
    (here / "run" / "args.json").unlink()
    error = error_of(sft, capsys, *flags_of(sft, here, "--max-steps", 2, "--lr", 1e-3))
    assert f"{here}/run holds checkpoints without args.json" in error
    assert not (here / "run" / "args.json").exists()


# -- digests -------------------------------------------------------------------------------------------------------


def test_every_byte_of_a_large_file_counts(tmp_path):
    """Rows of 70 MB, and weights as large: a byte anywhere changes the digest, and so does the size."""
    (tmp_path / "model").mkdir()
    for path, file in ((tmp_path / "rows",) * 2, (tmp_path / "model", tmp_path / "model" / "model.safetensors")):
        size = 70_000_001
        with open(file, "wb") as f:
            f.truncate(size)  # sparse: takes no room
        found = [digests.input_digest(str(path))]
        for place in (0, 100_000, 33_333_333, size - 1):
            with open(file, "r+b") as f:
                f.seek(place)
                f.write(b"\x01")
            found.append(digests.input_digest(str(path)))
        with open(file, "ab") as f:
            f.write(b"\x00")
        found.append(digests.input_digest(str(path)))
        assert len(set(found)) == 6


def test_the_digest_of_a_folder_holds_which_file_has_which_tensor(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny / "checkpoint", folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    before = digests.input_digest(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    assert digests.input_digest(str(folder)) != before


def test_the_digest_of_a_small_file_and_a_folder(tiny, tmp_path):
    file = tmp_path / "small"
    file.write_bytes(bytes(100_000))
    before = digests.input_digest(str(file))
    file.write_bytes(bytes(70_001) + b"\x01" + bytes(29_998))  # every byte of a small one counts
    assert digests.input_digest(str(file)) != before

    folder = tmp_path / "model"
    shutil.copytree(tiny / "checkpoint", folder)
    same = digests.input_digest(str(tiny / "checkpoint"))
    (folder / "README.md").write_text("not read")
    assert digests.input_digest(str(folder)) == same
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copytree(tiny / "checkpoint", folder, dirs_exist_ok=True)
        (folder / name).write_text((folder / name).read_text() + "\n")
        assert digests.input_digest(str(folder)) != same
    save_pretrained(random_model(tiny_config(), seed=1), str(tmp_path / "other"), str(tiny / "tokenizer"))
    assert digests.input_digest(str(tmp_path / "other")) != same


@pytest.mark.parametrize(
    "flags, found",
    [
        (["--lr", "0.5"], "--lr is 1e-05 there and 0.5 here"),
        (["--seed", "7"], "--seed is 0 there and 7 here"),
        (["--data", "other.jsonl"], "the input --data is "),
    ],
)
def test_ranks_that_were_started_otherwise_do_not_train(here, flags, found):
    """A flag, and rows of another content: torchrun on two machines with two checkouts."""
    (here / "other.jsonl").write_text("".join((here / "pairs.jsonl").read_text().splitlines(keepends=True)[::-1]))
    flags = [str(here / f) if f.endswith(".jsonl") else f for f in flags]
    start = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
import sft
from runtime import flags
more = {flags!r} if os.environ["RANK"] == "1" else []
given = {list(map(str, flags_of(sft, here, "--lr", "1e-5")))!r}
flags.run(sft.main, flags.parse(sft.Args, sft.__doc__, given + more))
"""
    (here / "start.py").write_text(start)
    output = finish(launch(here / "start.py", processes=2), status=2)
    assert "rank 1 differs from rank 0: " in output and found in output
    assert not (here / "run" / "args.json").exists()


# -- forks: a copy of ppo_cpe.py with an idea of its own -----------------------------------------------------------


def fork(folder, *changes):
    """A copy of ppo_cpe.py in a folder, with some of its text replaced; each pattern stands there once."""
    with open(os.path.join(ROOT, "ppo_cpe.py"), encoding="utf-8") as f:
        text = f.read()
    for pattern, new in changes:
        text, n = re.subn(pattern, new, text)
        assert n == 1, f"{pattern}: found {n} times in ppo_cpe.py"
    (folder / "fork.py").write_text(text)
    return str(folder / "fork.py")


def test_a_further_loss_on_edits(here, capsys):
    branch = '    if kind == "half":\n        return -0.5 * advantages * logprobs\n'
    script = fork(
        here,
        (r'(EditLoss = Literal\[[^]]*"novel")', r'\1, "half"'),
        (r"(?m)^(?=    raise ValueError\(f\"edit loss)", branch),
    )
    (here / "judge.py").write_text(EDITING_JUDGE)
    flags = flags_of(ppo_cpe, here, "--edit-rate", 1, "--edit-loss", "half", "--save-batch", 1, "--n-samples", 2)
    run_script(script, *flags)
    batch = here / "run" / "batch_000001"
    assert json.loads((here / "run" / "args.json").read_text())["edit_loss"] == "half"

    gradients = replay.replay(str(batch), script)
    losses = ("paper", "released", "unclipped", "tis", "luffy", "topr", "none", "novel", "half")
    assert tuple(name for name in gradients if name != "originals") == losses
    assert gradients["none"].norm() > 0
    torch.testing.assert_close(gradients["half"], 0.5 * gradients["none"])  # by the copy's own code
    assert re.search(r"(?m)^half +[0-9.]+", capsys.readouterr().out)


def test_a_plan_without_a_critic(here, capsys):
    script = fork(here, (r'trained = \{"policy": [^}]*\}', 'trained = {"policy": (args.model, False)}'))
    flags = flags_of(ppo_cpe, here, "--plan", "--gpu-gib", 0)
    assert "critic" in run_script("ppo_cpe.py", *flags)
    table = run_script(script, *flags)
    assert "policy" in table and "critic" not in table
    assert not (here / "run").exists()


# -- what goes elsewhere, and to the terminal --------------------------------------------------------------------------


class FakeWandb:
    """As much of wandb as is called; `log` and `saved` are what a run was given."""

    def __init__(self, log, saved):
        self.logged, self.saved, self.opened, self.axes = log, saved, [], []

    def init(self, **settings):
        self.opened.append(settings)
        log = self.logged.append
        save = lambda path, base_path, policy: self.saved.append(os.path.relpath(path, base_path))  # noqa: E731
        define = lambda name, step_metric: self.axes.append((name, step_metric))  # noqa: E731
        return SimpleNamespace(id=settings["id"] or "abc", log=log, save=save, define_metric=define)

    def Table(self, columns, data, allow_mixed_types=False):
        """Like the real one: values of a column other than None have one type, unless types may be mixed."""
        kinds = {bool: "boolean", int: "number", float: "number", str: "text"}
        for n, name in enumerate(columns):
            found = {kinds[type(cells[n])] for cells in data if cells[n] is not None}
            if len(found) > 1 and not allow_mixed_types:
                raise TypeError(f"Data row contained incompatible types: {name}: {found}")
        return [dict(zip(columns, cells)) for cells in data]


ODD_ROWS = [  # None, a number here and text there, a truth value here and a number there, fields that differ
    dict(reward=1.5, parent=None, failed=True, scores=[1, 2], only_here="x"),
    dict(reward=None, parent="p1", failed=0, scores=None),
    dict(reward="lost", parent=3, failed=None, scores={"a": None}),
]


@pytest.mark.parametrize("library", ["fake", "real"])
def test_odd_rows_in_a_wandb_table(tmp_path, monkeypatch, capsys, library):
    """With the real library where it is installed (offline), and a fake that checks types as it does."""
    fake = FakeWandb([], [])
    if library == "fake":
        monkeypatch.setitem(sys.modules, "wandb", fake)
    else:
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
    trackers.open_trackers(str(tmp_path), RuntimeArgs(wandb="cpe"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    trackers.log_rows("rollouts", 1, ODD_ROWS, str(tmp_path / "rows.jsonl"))
    trackers.log_rows("rollouts", 2, [], str(tmp_path / "rows.jsonl"))
    trackers.log_metrics({"step": 2, "loss": 1.0, "accuracy": None})
    assert "warning" not in capsys.readouterr().err
    if library == "fake":
        assert fake.logged[0]["rollouts"][2] == dict(
            reward="lost", parent=3, failed=None, scores='{"a": null}', only_here=None
        )
        assert fake.logged[1:] == [{"rollouts": [], "step": 2}, {"step": 2, "loss": 1.0}]
    else:
        tables = [json.loads(f.read_text()) for f in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
        (full,) = [table for table in tables if table["data"]]
        assert full["columns"] == ["failed", "only_here", "parent", "reward", "scores"]
        assert full["data"][1] == [0, None, "p1", None, None] and full["data"][2][3] == "lost"
        trackers.opened[0].run.finish()
    trackers.opened.clear()


@pytest.mark.parametrize("broken", ["init", "log", "save"])
def test_no_tracker_ends_a_run(here, monkeypatch, capsys, broken):
    class Broken(FakeWandb):
        def fail(self, *_, **__):
            raise RuntimeError("no network")

        def init(self, **settings):
            if broken == "init":
                self.fail()
            opened = super().init(**settings)
            setattr(opened, broken, self.fail)
            return opened

    monkeypatch.setitem(sys.modules, "wandb", Broken([], []))
    run(ppo_cpe, *flags_of(ppo_cpe, here, "--wandb", f"cpe-{broken}"), "--max-steps", 2)
    assert len((here / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    say_once.cache_clear()
    run(ppo_cpe, *flags_of(ppo_cpe, here, "--wandb", f"cpe-{broken}"), "--max-steps", 3)
    assert "warning: --wandb failed (RuntimeError: no network); the run goes on" in capsys.readouterr().err


def test_wandb_gets_metrics_and_rollouts_of_every_step(here, monkeypatch):
    fake = FakeWandb([], [])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    flags = [*flags_of(ppo_cpe, here, "--wandb", "cpe"), "--max-steps", 2]
    run(ppo_cpe, *flags)
    assert fake.opened[0]["project"] == "cpe" and fake.opened[0]["id"] is None and fake.opened[0]["name"] == "run"
    assert fake.axes == [("*", "step")]  # not W&B's own steps, which may not go back
    assert [values["step"] for values in fake.logged if "original/reward" in values] == [1, 2]
    tables = [(values["step"], values["rollouts"]) for values in fake.logged if "rollouts" in values]
    assert [step for step, _ in tables] == [1, 2] and len(tables[0][1]) == 2
    first = json.loads((here / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    assert tables[0][1][0]["answer"] == first["answer"] and json.loads(tables[0][1][0]["persona"]) == first["persona"]
    assert {"rollouts/step_000001.jsonl", "rollouts/step_000002.jsonl"} <= set(fake.saved)
    run(ppo_cpe, *flags)  # continued: the same run there
    assert fake.opened[1]["id"] == "abc" and fake.opened[1]["resume"] == "allow"


def test_tensorboard_gets_metrics_and_rollouts_of_every_step(here, monkeypatch):
    opened, scalars, texts = [], [], []

    class Writer:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, step))

        def add_text(self, name, text, step):
            texts.append((name, step, text))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run(ppo_cpe, *flags_of(ppo_cpe, here, "--tensorboard"), "--max-steps", 2)
    assert opened == [(f"{here}/run/tensorboard", 1)]
    assert [step for name, step in scalars if name == "original/reward"] == [1, 2]
    assert [(name, step) for name, step, _ in texts if name == "rollouts"] == [("rollouts", 1), ("rollouts", 2)]
    assert '    "answer": ' in texts[0][2] and all(line.startswith("    ") for line in texts[0][2].splitlines())


@pytest.mark.parametrize("module", [sft, train_grm, dpo, ppo_cpe])
@pytest.mark.parametrize(
    "flags, names", [(["--wandb", "cpe"], ["wandb"]), (["--tensorboard"], ["tensorboard", "torch.utils.tensorboard"])]
)
def test_a_tracker_that_is_not_installed_is_named(module, flags, names, here, capsys, monkeypatch):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    line = error_of(module, capsys, *flags_of(module, here, *flags))
    assert f"pip install {names[0]}" in line and flags[0] in line


def test_counting_in_a_log_file_and_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 1000)
    with progress.counting(3, "answers") as done:
        for _ in range(3):
            done()
    assert capsys.readouterr().err == "answers: 3 of 3\n"  # a line at the end, none of a bar
    monkeypatch.setattr(progress, "LINE_EVERY", -1)
    with progress.counting(2, "answers") as done:
        done()
        assert re.fullmatch(r"answers: 1 of 2(, 0 s left)?\n", capsys.readouterr().err)
    with progress.counting(3, "answers", quiet=True) as done:
        done()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.counting(2, "answers") as done:
        done()
    assert "answers:" in capsys.readouterr().err


@pytest.mark.parametrize("module", [sft, train_grm, dpo, ppo_cpe])
def test_the_end_of_a_stage_says_where_everything_is(module, here, capsys):
    run(module, *flags_of(module, here))
    output = capsys.readouterr()
    assert "\r" not in output.out + output.err
    weights = f"{here}/run/{'model' if module is train_grm else 'policy'}"
    assert f"done: {weights} (weights), {here}/run/metrics.jsonl" in output.out and os.path.isdir(weights)
    assert f"python report.py {here}/run" in output.out and "next:       python " in output.out
    run(module, *flags_of(module, here))
    output = capsys.readouterr().out
    assert f"{here}/run is finished already" in output and f"done: {weights}" in output
    shutil.rmtree(f"{here}/run/checkpoints")
    run(module, *flags_of(module, here))
    assert f"{here}/run has no checkpoint yet" in capsys.readouterr().out
