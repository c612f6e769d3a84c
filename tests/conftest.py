"""Shared by the tests: a tiny random checkpoint with a real byte-level BPE tokenizer, in hub format."""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from model import Transformer, init_weights, save_pretrained
from model_config import Config
from runtime import runs
from runtime.flags import parse, user_errors

torch.set_num_threads(1)  # the models are too small for more; sums in another order would differ in the last bit

# Of test_fuzz.py: the same cases each time in the suite; HYPOTHESIS_PROFILE=long draws many more, others each time.
COMMON = dict(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("fast", max_examples=50, derandomize=True, **COMMON)
hypothesis.settings.register_profile("long", max_examples=2000, **COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def tiny_config(**changes):
    fields = dict(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    return Config(**{**fields, **changes})


def random_model(config, scalar_head=False, seed=0, std=0.1):
    model = Transformer(config, scalar_head)
    init_weights(model, seed, std)
    with torch.no_grad():  # biases and norms away from their neutral values, so that a forgotten one shows
        generator = torch.Generator().manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias") or name == "score.weight":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def short_pauses(monkeypatch):
    """So that the half a minute in which a server is asked again takes half a second."""
    from judges import chat_client

    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(chat_client, "LONGEST_PAUSE", 0.1)


# -- a whole tiny project: checkpoint, rows, templates ---------------------------------------------

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "answer": "Profile:\n{persona}\nQuestion: {question}",
    "edit": "Critique: {critique}\nRewrite it.",
    "grm": "Judge the answer.\nProfile:\n{persona}\nQuestion: {question}\nAnswer: {answer}",
}


def tiny_rows(n=32):
    """prompt, pair and judgement rows with a learnable regularity: good answers name what the person likes."""
    likes, topics = ("tea", "jazz", "chess", "roses"), ("an evening", "a gift", "a trip", "a book")
    rows = {"prompts": [], "pairs": [], "judgements": []}
    for i in range(n):
        like, topic = likes[i % 4], topics[i // 4 % 4]
        row = dict(prompt_id=f"p{i}", persona={"name": f"Kim {i}", "likes": [like]}, question=f"What about {topic}?")
        good, bad = f"Plan {topic} with {like}.", f"There are many options for {topic}, it depends."
        rows["prompts"].append(row | {"reference": bad})
        rows["pairs"].append(row | {"chosen": good, "rejected": bad})
        judged = dict(answer=good, critique="Keep it as it is.", helpfulness=4, personalization=5, naturalness=3)
        if i % 2:
            judged = dict(
                answer=bad, critique=f"Name {like} and drop the end.", helpfulness=-1, personalization=-2, naturalness=1
            )
        rows["judgements"].append(row | judged)
    return rows


def tiny_tokenizer(folder, texts):
    """A byte-level BPE tokenizer trained on the texts, with Qwen2's control tokens and a plain ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(config, f)
    return tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with checkpoint/, {prompts,pairs,judgements}.jsonl and {answer,edit,grm}.txt (short templates).

    NAME_other.jsonl has the same rows of other people.
    """
    folder = tmp_path_factory.mktemp("tiny")
    rows = tiny_rows()
    for name, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
        (folder / f"{name}_other.jsonl").write_text(
            text.replace('"prompt_id": "p', '"prompt_id": "q').replace("Kim", "Ben")
        )
    for name, text in TEMPLATES.items():
        (folder / f"{name}.txt").write_text(text)
    texts = [json.dumps(row) for some in rows.values() for row in some] + list(TEMPLATES.values())
    texts.append(
        "<critique> </critique>\n<scores> Helpfulness: -1 Personalization: 2 Natural: 0 </scores>\nuser assistant"
    )
    tokenizer = tiny_tokenizer(str(folder / "tokenizer"), texts)
    config = tiny_config(vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128)
    model = random_model(config, std=0.05)
    save_pretrained(model, str(folder / "checkpoint"), str(folder / "tokenizer"))
    return folder


# -- scripts: `run_script` in this process; `launch` and `finish` where a test is about processes ----------------------


def path_of(script, folder="."):
    """A script in `folder` (a copy, a fork), or the project's own."""
    path = os.path.join(os.path.abspath(folder), script)
    return path if os.path.exists(path) else os.path.join(ROOT, script)


def run_script(script, *flags, folder=".", status=0):
    """Runs `python script flags` in folder, in this process -> what it wrote (stdout and stderr).

    The exit status has to be `status`. As after a process, nothing stays locked. Always on the CPU.
    """
    output = io.StringIO()
    code = 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(sys, "argv", [script, *map(str, flags)]),
        mock.patch("torch.cuda.is_available", return_value=False),
    ):
        try:
            runpy.run_path(path_of(script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            for lock in runs._locks.values():
                lock.close()
            runs._locks.clear()
    assert code == status, output.getvalue()[-3000:]
    return output.getvalue()


# Processes are forked from a server that has imported the libraries, which saves seconds per process.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "ppo_cpe", "tqdm", "transformers.utils.chat_template_utils"])


def _as_script(script, flags, environment, log, folder):
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = [script, *flags]
    runpy.run_path(path_of(script), run_name="__main__")


def launch(script, *flags, processes=1, folder=".", **environment):
    """Starts `python script flags` in folder, or that many ranks as torchrun would -> what `finish` takes.

    Each rank writes to a file of its own, so that no line of one lands inside a line of another.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks, logs = [], []
    for rank in range(processes):
        handle, log = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        logs.append(log)
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env = {**environment, **(place if processes > 1 else {}), "CUDA_VISIBLE_DEVICES": ""}
        args = (script, list(map(str, flags)), {k: str(v) for k, v in env.items()}, log, os.path.abspath(folder))
        ranks.append(FORKS.Process(target=_as_script, args=args))
        ranks[-1].start()
    return SimpleNamespace(ranks=ranks, logs=logs)


def written(run):
    """The output of a launched script so far: rank after rank, stdout and stderr."""
    output = ""
    for log in run.logs:
        with open(log) as f:
            output += f.read()
    return output


def finish(run, status=0):
    """Waits for a launched script, which has to end with that exit status -> what it wrote (stdout and stderr)."""
    for rank in run.ranks:
        rank.join(300)
    output = written(run)
    for log in run.logs:
        os.unlink(log)
    assert [rank.exitcode for rank in run.ranks] == [status] * len(run.ranks), output[-3000:]
    return output


@pytest.fixture(scope="session")
def tiny_grm(tiny):
    """A run folder of train_grm.py on tiny/: its model writes judgements that parse (60 steps, 3 s)."""
    run_script("train_grm.py", *grm_flags(tiny), "--out", tiny / "grm")
    return tiny / "grm"


def grm_flags(tiny):
    return [
        "--model",
        tiny / "checkpoint",
        "--data",
        tiny / "judgements.jsonl",
        "--grm-template",
        tiny / "grm.txt",
        "--batch-size",
        16,
        "--epochs",
        30,
        "--lr",
        5e-3,
        "--tokens-per-microbatch",
        500,
        "--eval-data",
        tiny / "judgements_other.jsonl",
        "--eval-judgements",
        8,
        "--eval-max-new-tokens",
        64,
    ]


def error_of(module, capsys, *flags):
    """Runs a script's main on flags that must not work -> the line that the user sees; the exit status is 2."""
    with pytest.raises(SystemExit) as stop, user_errors():
        module.main(parse(module.Args, module.__doc__, [str(flag) for flag in flags]))
    assert stop.value.code == 2
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


def read_metrics(out):
    """The lines of a run folder's metrics.jsonl, without what depends on the clock or the process."""
    with open(os.path.join(out, "metrics.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    return [{k: v for k, v in line.items() if "second" not in k and k != "peak_memory_gib"} for line in lines]
