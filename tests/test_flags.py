"""The command line of every script: help, ranges, and messages on wrong values before any file is read."""

import dataclasses
import glob
import importlib
import os
import re
import resource
import subprocess
import sys
import types
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Ge, Gt, Le, Lt
from conftest import ROOT, error_of, run_script
from pydantic.fields import FieldInfo

import sft
from runtime.flags import (
    COMMAND,
    DiagnosticArgs,
    JudgeArgs,
    RuntimeArgs,
    _documented,
    check_ranges,
    help_text,
    may_change,
    parse,
)

SCRIPTS = ("sft", "train_grm", "dpo", "ppo_cpe", "evaluate", "generate", "serve", "replay", "report")
SCRIPTS += ("data/persona_world", "data/prepare")
TRAINING = ("sft", "train_grm", "dpo", "ppo_cpe")
MOST_SECONDS = 2  # of CPU time, so that `--help` is an answer; libraries alone take longer


def module_of(script):
    return importlib.import_module(script.replace("/", "."))


# -- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    # CPU time, since wall time depends on what else the machine does; of the child alone
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, os.path.join(ROOT, f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == ""
    text, flat = done.stdout, " ".join(done.stdout.split())

    module = module_of(script)
    first = module.__doc__.strip().partition("\n\n")[0]
    positional = {"replay": {"batch"}, "report": {"run"}}.get(script, set())
    before_flags = "".join(f"{name.upper()} " for name in positional)
    usage = f"usage: {os.path.basename(script)}.py {before_flags}[flags]\n"
    assert text.startswith(usage) and " ".join(first.split()) in flat
    titles = [t for c in module.Args.__mro__ for t in titles_of(c)]
    assert all(f"\n{title}:\n" in text for title in titles)
    shown = re.findall(r"^  (--[a-z0-9-]+|[A-Z_]+)(?: |$)", text, re.M)
    names = [field.name for field in dataclasses.fields(module.Args)]
    expected = [n.upper() if n in positional else "--" + n.replace("_", "-") for n in names]
    assert sorted(shown) == sorted(expected)  # each once
    assert "{None}" not in text and "NoneType" not in text and "MISSING" not in text and "Annotated" not in text

    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < MOST_SECONDS


def titles_of(a_class):
    """The groups (`# -- title`) of a dataclass of ours."""
    if a_class is object:
        return []
    file = sys.modules[a_class.__module__].__file__
    with open(file, encoding="utf-8") as f:
        body = re.search(rf"^class {a_class.__name__}\b.*?(?=^\S)", f.read(), re.M | re.S)[0]
    return re.findall(r"^    # -- (.*)$", body, re.M)


def test_groups_are_found():
    assert titles_of(RuntimeArgs)[0] == "the machine" and titles_of(JudgeArgs) == ["the judge"]
    assert len(titles_of(module_of("ppo_cpe").Args)) == 4


def test_every_flag_is_explained():
    for script in SCRIPTS:
        module = module_of(script)
        text = " ".join(help_text(module.Args, module.__doc__).split())
        bare = re.findall(r"(--[a-z-]+)(?: [A-Z]+| \{[^}]*\})* \((?:default|required)", text)
        assert bare == [], script


def scripts_in(*folders):
    """The Python files in these folders that are commands."""
    scripts = []
    for folder in folders:
        for file in sorted(glob.glob(f"{folder}/*.py", root_dir=ROOT)):
            with open(os.path.join(ROOT, file), encoding="utf-8") as f:
                if '\nif __name__ == "__main__":' in f.read():
                    scripts.append(os.path.normpath(file))
    return scripts


@pytest.mark.parametrize("script", scripts_in(".", "data", "recipes", "bench", "results/make"))
def test_help_ends_with_an_example(script, monkeypatch):
    """Every command has one, before it does any work or imports what may not be installed (TRL, for one)."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the scripts in bench/ change its first entry
    text = run_script(script, "--help", folder=ROOT)
    commands = COMMAND.findall(text)
    assert any(script in command for command in commands)
    assert text.rstrip().endswith(commands[-1].rstrip())


def flag_texts(script):
    """(flag, its docstring, its default) of each flag of a script."""
    args_class = module_of(script).Args
    defaults = {field.name: field.default for field in dataclasses.fields(args_class)}
    return [(name, text, defaults[name]) for _, name, text in _documented(args_class)]


@pytest.mark.parametrize("script", [*SCRIPTS, "data/annotate", "results/make/tables", "recipes/real_english"])
def test_none_is_shown_only_where_nothing_is_used(script):
    """A flag whose value then comes from elsewhere has a "Default: " that says from where."""
    elsewhere = re.compile(r"\b(none|None|unset): |by default|replaces")
    texts = [(name, text) for name, text, default in flag_texts(script) if default in (None, ())]
    assert [name for name, text in texts if "Default: " not in text and elsewhere.search(text)] == []


def test_the_defaults_of_both_objectives_are_those_that_are_used():
    module = module_of("train_grm")
    shown = {"grm": {}, "bt": {}}
    for name, text, _ in flag_texts("train_grm"):
        if both := re.search(r"Default: (\S+) \(grm\), (\S+) \(bt\)\.", text):
            of_type = type(module.DEFAULTS["grm"][name])
            shown["grm"][name], shown["bt"][name] = of_type(both[1]), of_type(both[2])
    assert shown == module.DEFAULTS


# -- ranges --------------------------------------------------------------------------------------------------------


def without_range(hint):
    """Whether a type has a number that may be anything: walks unions, tuples, and what is annotated."""
    if get_origin(hint) is Annotated:
        base, *metadata = hint.__origin__, *hint.__metadata__
        bounds = [m for info in metadata if isinstance(info, FieldInfo) for m in info.metadata]
        finite = any(getattr(m, "allow_inf_nan", None) is False for m in bounds)  # a reward of the user's own scale
        return without_range(base) and not finite and not any(isinstance(m, (Ge, Gt, Le, Lt)) for m in bounds)
    if get_origin(hint) in (Union, types.UnionType, tuple):
        return any(map(without_range, get_args(hint)))
    return hint in (int, float)  # bool is neither


def test_what_counts_as_a_range():
    hints = get_type_hints(RuntimeArgs, include_extras=True)
    assert without_range(int) and without_range(int | None) and without_range(tuple[float, ...])
    assert without_range(Annotated[int, "no range"])
    assert not any(map(without_range, (hints["save_every"], hints["shard_size"], bool, str, Literal[1, 2])))


@pytest.mark.parametrize("script", [*TRAINING, "evaluate", "generate", "serve"])
def test_every_number_has_a_range(script):
    hints = get_type_hints(module_of(script).Args, include_extras=True)
    assert [name for name, hint in hints.items() if without_range(hint)] == ["seed"] * ("seed" in hints)


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_in_their_range(script):
    args_class = module_of(script).Args
    required = {f.name: ("x",) for f in dataclasses.fields(args_class) if f.default is dataclasses.MISSING}
    check_ranges(args_class(**{name: "x" if name in ("batch", "run") else value for name, value in required.items()}))


ALL = ("--epochs -1", "--epochs 0", "--epochs inf", "--max-steps 0", "--max-steps -1", "--keep-checkpoints 0")
ALL += ("--skip-bad-steps -1", "--timeouts 0 1 1", "--timeouts 60 60")
ALL += ("--save-every 0", "--lr nan", "--lr -1e-6", "--lr 0", "--lr much", "--dtype bf17", "--max-grad-norm 0")
ALL += ("--weight-decay -0.1", "--tokens-per-microbatch 0", "--shard-size 0", "--peak-tflops nan", "--gpu-gib -1")
OF_SCRIPT = {
    "sft": ("--batch-size -4", "--batch-size 0", "--batch-size 1.5", "--warmup-ratio 1.1", "--layers 0"),
    "train_grm": ("--batch-size -4", "--max-length 0", "--objective rm", "--eval-every 0", "--eval-judgements -1"),
    "dpo": ("--batch-size -4", "--beta 0", "--beta nan", "--sft-weight -1", "--max-length -1"),
    "ppo_cpe": (
        "--mini-batch-prompts 0",
        "--prompts-per-step 0",
        "--n-samples 0",
        "--temperature 0",
        "--temperature nan",
        "--top-p 0",
        "--top-p 1.01",
        "--edit-rate 1.5",
        "--edit-rate nan",
        "--eps-low -0.1",
        "--gamma 2",
        "--critic-warmup-steps -1",
        "--judge-attempts 0",
        "--ratio-cap 0",
        "--edit-loss papers",
        "--save-batch 0",
        "--score-weights nan 1 1",
        "--score-weights 1 1",
        "--score-weights -1 1 1",
        "--judge-temperature -1",
        "--kv-tokens 0",
    ),
}
GENERATING = {
    "evaluate": ("--temperature -1", "--dtype bf17", "--n-prompts -1", "--task win", "--judge-votes 0", "--top-p 0"),
    "generate": ("--temperature nan", "--dtype bf17", "--n 0", "--max-new-tokens 0", "--max-batch 0", "--top-p 2"),
    "serve": ("--port -1", "--port 65536", "--max-len 0", "--dtype bf17", "--max-batch 0", "--kv-tokens -1"),
}
WRONG = [(script, wrong) for script in TRAINING for wrong in (*ALL, *OF_SCRIPT[script])]
WRONG += [(script, wrong) for script, found in GENERATING.items() for wrong in found]


@pytest.mark.parametrize("script, wrong", WRONG)
def test_a_wrong_value_is_refused_before_any_file_is_read(script, wrong, tmp_path, capsys):
    module, flag = module_of(script), wrong.split()[0]
    file = {"ppo_cpe": "--prompts", "evaluate": "--prompts", "generate": "--input", "serve": "--model"}
    none = str(tmp_path / "none.jsonl")
    out = ["--out", str(tmp_path / "out")] if script not in ("generate", "serve") else []
    with pytest.raises(SystemExit) as stop:
        module.main(parse(module.Args, module.__doc__, [file.get(script, "--data"), none, *out, *wrong.split()]))
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert flag in said.err + said.out and "none.jsonl" not in said.err and "Traceback" not in said.err
    assert os.listdir(tmp_path) == []


def test_a_wrong_value_is_named_in_one_line(capsys):
    with pytest.raises(SystemExit):
        parse(sft.Args, sft.__doc__, ["--batch-size", "-4"])
    said = capsys.readouterr().err
    assert said.startswith("error: --batch-size -4: it should be greater than or equal to 1\n")


def test_the_exit_status_of_a_process(tmp_path):
    """As a user starts it: the flags are read before the libraries, so this is quick."""
    flags = ["--data", str(tmp_path / "none.jsonl"), "--max-steps", "0"]
    done = subprocess.run([sys.executable, os.path.join(ROOT, "dpo.py"), *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --max-steps 0: ") and done.stdout == ""


def test_an_unknown_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(sft.Args, sft.__doc__, ["--batchsize", "4"])
    assert stop.value.code == 2 and "--batchsize" in capsys.readouterr().err


@pytest.mark.parametrize("script", TRAINING)
def test_epochs_that_make_no_step(script, tiny, tmp_path, capsys):
    kind = {"train_grm": "judgements", "ppo_cpe": "prompts"}.get(script, "pairs")
    rows = ["--prompts" if script == "ppo_cpe" else "--data", tiny / f"{kind}.jsonl"]
    size = ["--prompts-per-step" if script == "ppo_cpe" else "--batch-size", 8]
    template = "grm" if script == "train_grm" else "answer"
    short = [f"--{template}-template", tiny / f"{template}.txt"]
    short += ["--max-new-tokens", 4] if script == "ppo_cpe" else []
    flags = ["--model", tiny / "checkpoint", *rows, *size, *short, "--out", tmp_path / "out", "--epochs", 0.2]
    error = error_of(module_of(script), capsys, *flags)  # 32 rows: four steps an epoch
    assert error == "error: --epochs 0.2: 32 rows make less than one step of 8"
    assert not (tmp_path / "out").exists()


# -- what a continuation may change --------------------------------------------------------------------------------

MACHINE = {"tokens_per_microbatch", "checkpoint_activations", "shard_size", "offload", "peak_tflops", "plan"}
MACHINE |= {"world_size", "gpu_gib", "max_steps", "save_every", "keep_checkpoints", "save_in_background"}
MACHINE |= {"skip_bad_steps", "timeouts", "deterministic", "wandb", "tensorboard", "push_to_hub"}
WATCHING = {"eval_data", "eval_every", "eval_n", "audit_share", "audit_judge", "save_batch", "log_tokens"}
HELD_OUT = {"eval_data", "eval_every", "eval_judgements", "eval_max_new_tokens"}


def test_what_a_continuation_may_change():
    assert may_change(RuntimeArgs) == MACHINE and may_change(DiagnosticArgs) == WATCHING
    assert may_change(JudgeArgs) == {"judge_patience"}
    assert may_change(module_of("sft").Args) == may_change(module_of("dpo").Args) == MACHINE
    assert may_change(module_of("train_grm").Args) == MACHINE | HELD_OUT
    engines = {"max_batch", "kv_tokens", "tensor_parallel", "release_cache", "judge_patience"}
    assert may_change(module_of("ppo_cpe").Args) == MACHINE | WATCHING | engines
