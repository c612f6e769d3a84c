"""--plan: what it counts, what it says of the recipes, and its figure against the memory of a real step."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import tyro
from conftest import ROOT, random_model, tiny_config, tiny_tokenizer

import dpo
import ppo_cpe
import sft
import train_grm
from attention import Packed
from kernels import rmsnorm, swiglu
from lora import Lora, add_adapters
from model import save_pretrained
from runtime import plan, training
from runtime.packing import Batch
from weights import GIB

QWEN = dict(model_type="qwen2", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32768)
SIZES = {  # the published config.json files of Qwen2.5-Instruct
    "0.5b": dict(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7b": dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "14b": dict(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}


def config_folder(path, size):
    os.makedirs(path)
    with open(path / "config.json", "w") as f:
        json.dump({**QWEN, **SIZES[size]}, f)
    return path


@pytest.mark.parametrize("size", SIZES)
def test_recipes_pass_their_own_plan(size, tmp_path, capsys):
    """The recipe itself, with PLAN_ONLY, from a folder whose `python` writes down what it is to run."""
    for name in ("recipes", "requirements.txt"):
        os.symlink(os.path.join(ROOT, name), tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    os.makedirs(python.parent)
    python.write_text(f"#!/bin/sh\nprintf '%s\\t' \"$@\" >> {tmp_path}/calls\necho >> {tmp_path}/calls\n")
    os.chmod(python, 0o755)
    shutil.copy(os.path.join(ROOT, "requirements.txt"), tmp_path / ".venv" / "installed.txt")
    environment = {**os.environ, "PLAN_ONLY": "1", "MODEL": str(config_folder(tmp_path / "model", size))}
    run = subprocess.run(
        ["bash", tmp_path / "recipes/qwen.sh", size], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    calls = [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    modules = [sft, train_grm, train_grm, dpo, ppo_cpe, ppo_cpe, ppo_cpe]
    assert [script for script, *_ in calls] == [f"{module.__name__}.py" for module in modules]
    for module, (_, *flags) in zip(modules, calls):
        module.main(tyro.cli(module.Args, args=flags))  # exits where it does not fit
    assert capsys.readouterr().out.count("fits: yes") == len(modules) and not (tmp_path / "out").exists()


def ppo_plan(tmp_path, capsys, *flags):
    """-> exit status, {part: GiB of the phase in which it is largest}."""
    flags = ["--model", tmp_path / "m", "--judge", "world", "--plan", *flags]
    status = 0
    try:
        ppo_cpe.main(tyro.cli(ppo_cpe.Args, args=[str(flag) for flag in flags]))
    except SystemExit as stop:
        status = stop.code
    lines = re.findall(r"^(\S.{33})((?: +[\d.-]+)+)$", capsys.readouterr().out, re.MULTILINE)
    return status, {name.strip(): max(float(x) for x in row.split() if x != "-") for name, row in lines}


def test_seven_billion_by_hand(tmp_path, capsys):
    config_folder(tmp_path / "m", "7b")
    status, parts = ppo_plan(tmp_path, capsys, "--world-size", 8)
    # 28 layers of (2 x 3584^2 + 2 x 3584 x 512 + 3 x 3584 x 18944 weights, 3584 + 2 x 512 + 2 x 3584 biases and norms),
    # a norm, and the vocabulary twice
    n = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944 + 3584 + 2 * 512 + 2 * 3584) + 3584 + 2 * 152064 * 3584
    assert n == 7_615_616_512  # what the model card says
    assert parts["policy: fp32 masters"] == pytest.approx(4 * n / 8 / GIB, abs=0.01)
    assert parts["policy: Adam moments"] == pytest.approx(8 * n / 8 / GIB, abs=0.01)
    assert parts["engine: weights"] == pytest.approx(2 * n / GIB, abs=0.01)
    assert parts["critic: fp32 masters"] == pytest.approx(4 * (n - 152064 * 3584 + 3584) / 8 / GIB, abs=0.01)
    max_len = 2048 + 2 * 2048 + 512 + 512
    assert parts["engine: KV cache"] == pytest.approx(256 * max_len / 4 * 28 * 2 * 512 * 2 / GIB, abs=0.01)
    assert status == 1  # without recomputation and at 256 sequences a rank it does not fit

    _, less = ppo_plan(tmp_path, capsys, "--world-size", 8, "--checkpoint-activations", "--tokens-per-microbatch", 8192)
    # the inputs of all layers (hidden states and residual), and one layer's seven tensors as wide as the MLP, or more
    assert 8192 * 2 * 27 * 3584 * 2 < less["activations"] * GIB < 8192 * (2 * 28 * 3584 + 12 * 18944) * 2
    assert parts["activations"] > 10 * less["activations"]  # 2 x the tokens, 28 whole layers
    # a row of 2,048 + 2,048 tokens is in one pass
    _, longest = ppo_plan(tmp_path, capsys, "--world-size", 8, "--checkpoint-activations", "--tokens-per-microbatch", 9)
    assert longest["activations"] == pytest.approx(less["activations"] / 2, abs=0.01)
    _, spread = ppo_plan(tmp_path, capsys, "--world-size", 32, "--shard-size", 8)
    assert spread["policy: fp32 masters"] == parts["policy: fp32 masters"]  # four copies of eight ranks each


def test_adapters_by_hand(tmp_path, capsys):
    """7B at rank 32: one frozen base in bf16, of the policy, the critic and the engine; 14 matrices more a layer."""
    config_folder(tmp_path / "m", "7b")
    lora = ("--lora-rank", 32, "--checkpoint-activations", "--tokens-per-microbatch", 8192, "--max-batch", 32)
    status, parts = ppo_plan(tmp_path, capsys, "--world-size", 1, "--judge", tmp_path / "m", *lora)
    n = 7_615_616_512
    # rank x (in + out) of q, k and v, o, gate and up, down
    adapters = 28 * 32 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert parts["policy: frozen weights"] == pytest.approx(2 * n / GIB, abs=0.01)
    assert "critic: frozen weights" not in parts
    assert parts["engine: weights"] == pytest.approx(2 * adapters / GIB, abs=0.01)
    for name in ("policy", "critic"):
        assert parts[f"{name}: fp32 adapters"] == pytest.approx(4 * adapters / GIB, abs=0.01)
        assert parts[f"{name}: Adam moments"] == pytest.approx(8 * adapters / GIB, abs=0.01)
    assert status == 0 and parts["together"] < 77  # on one GPU of 80 GB, with a judge of 7B
    _, whole = ppo_plan(tmp_path, capsys, "--world-size", 1, *lora[2:])
    assert whole["together"] > 200
    # several ranks shard a base each, and an engine has the whole of it on every rank
    _, eight = ppo_plan(tmp_path, capsys, "--world-size", 8, *lora)
    for name, size in (("policy", n), ("critic", n - 152064 * 3584)):
        assert eight[f"{name}: frozen weights"] == pytest.approx(2 * size / 8 / GIB, abs=0.01)
        assert eight[f"{name}: fp32 adapters"] == pytest.approx(4 * adapters / 8 / GIB, abs=0.01)
    assert eight["engine: weights"] == pytest.approx(2 * (n + adapters) / GIB, abs=0.01)
    other = config_folder(tmp_path / "other", "7b")  # a critic of its own has its own base
    _, two = ppo_plan(tmp_path, capsys, "--world-size", 1, "--critic", other, *lora)
    assert two["critic: frozen weights"] > 13


def test_judges_in_the_plan(tmp_path, capsys):
    config_folder(tmp_path / "m", "0.5b")
    (tmp_path / "my.py").write_text("def f(row, answer): return 1")

    def judge_parts(*flags):
        parts = ppo_plan(tmp_path, capsys, *flags)[1]
        return {name: size for name, size in parts.items() if "judge" in name}

    for spec in ("world", "http://nowhere.invalid/v1", f"{tmp_path}/my.py:f"):
        assert judge_parts("--judge", spec) == {}
    one = judge_parts("--judge", tmp_path / "m")
    # 494 million weights in bf16; 24 layers of 2 x 2 x 64 numbers for each token
    assert one["judge: weights"] == pytest.approx(2 * 494_032_768 / GIB, abs=0.01)
    assert one["judge: KV cache"] == pytest.approx(256 * 8192 / 4 * 24 * 2 * 128 * 2 / GIB, abs=0.01)
    both = judge_parts("--judge", f"bt:{tmp_path / 'm'}", "--audit-judge", tmp_path / "m", "--audit-share", 0.1)
    assert list(both) == ["judge: weights", "audit judge: weights", "audit judge: KV cache"]
    with pytest.raises(ValueError, match="my.py has no function g"):
        judge_parts("--judge", f"{tmp_path}/my.py:g")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(4, 8.0, "m")])
def test_what_the_plan_counts_is_what_autograd_saves(lora, recompute):
    config = tiny_config(num_hidden_layers=3)
    model, n = random_model(config), plan.PROBE_TOKENS
    if lora:
        add_adapters(model, lora)
    model.checkpoint_activations = recompute
    known, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def save(x):
        if x.untyped_storage()._cdata not in known:
            kept[x.untyped_storage()._cdata] = x
        return x

    ids, context = torch.zeros(n, dtype=torch.int64), Packed([n])
    batch = Batch(ids, context, ids, ids, [n])
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        training.forward(model, batch, 1.0)
    found = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert found == n * plan.saved_bytes(plan.meta_model(config, lora=lora), 3, recompute, 1, device="cpu")


class NoLaunch:
    def __getitem__(self, grid):
        return lambda *given, **options: None


def test_a_plan_for_a_gpu_counts_what_its_kernels_save(monkeypatch):
    model = plan.meta_model(tiny_config()).to(torch.bfloat16)
    planned = plan.saved_bytes(model, 2, False, 1, "cuda")
    for module in (rmsnorm, swiglu):
        monkeypatch.setattr(module, "_forward_kernel", NoLaunch())
    real = {
        "rms_norm": lambda x, weight, eps: rmsnorm._RMSNorm.apply(x, None, weight, eps)[0],
        "add_rms_norm": rmsnorm._RMSNorm.apply,
        "swiglu": swiglu._SwiGLU.apply,
    }
    monkeypatch.setattr(plan, "KERNELS_OF_A_GPU", real)
    assert plan.saved_bytes(model, 2, False, 1, "cuda") == planned < plan.saved_bytes(model, 2, False, 1, "cpu")


def test_a_recomputed_layer_keeps_hidden_states_and_residual():
    """Both are its inputs; only the first layer has no residual yet."""
    config = tiny_config(num_hidden_layers=5)
    per_token = plan.activations(plan.meta_model(config), 1, True, 1, device="cpu")
    one_layer_less = plan.activations(plan.meta_model(replace(config, num_hidden_layers=4)), 1, True, 1, device="cpu")
    assert per_token - one_layer_less == 2 * 4 * config.hidden_size


@pytest.mark.parametrize("lora", [(), ("--lora-rank", "32")])
def test_a_step_of_a_real_run_holds_what_the_plan_says(tmp_path, capsys, lora):
    """SFT of 17 million parameters, two micro-batches of some 1,000 tokens: the process's memory within 15 %."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(200)]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": " ".join(rng.choices(words, k=180))},
            ]
        }
        for _ in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer(str(tmp_path / "tokenizer"), [" ".join(words)] + ["user assistant hi"] * 2)
    config = tiny_config(
        vocab_size=max(8192, tokenizer.get_vocab_size()),
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=4096,
    )
    save_pretrained(random_model(config, std=0.02), str(tmp_path / "m"), str(tmp_path / "tokenizer"))
    flags = [
        str(x)
        for x in (
            "--model",
            tmp_path / "m",
            "--data",
            tmp_path / "rows.jsonl",
            "--out",
            tmp_path / "out",
            "--batch-size",
            8,
            "--epochs",
            3,
            "--tokens-per-microbatch",
            2000,
            "--max-length",
            800,
            *lora,
        )
    ]
    # blocks of their own for all tensors: else the C library keeps freed ones, a third more than what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, f"{ROOT}/tests/peak_of.py", "sft.py", *flags], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    measured = int(run.stdout.split()[-1])
    tokens = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["tokens"]
    parts = -(-tokens // 2000)
    flags[flags.index("2000")] = str(tokens // parts)  # the plan is for a full micro-batch: for as many as there were
    planned = sft.main(tyro.cli(sft.Args, args=[*flags, "--plan", "--gpu-gib", "0"]))
    print(f"planned {planned / GIB:.3f} GiB, measured {measured / GIB:.3f}")
    assert tokens > 2000 and measured > (0.15 if lora else 0.3) * GIB
    assert planned == pytest.approx(measured, rel=0.15)


def test_the_plan_says_what_a_smaller_batch_would_save(tmp_path, capsys):
    """Four prompts x 4 originals a rank need no cache for 256 sequences; a cache on a CPU is counted as it fills."""
    config_folder(tmp_path / "m", "0.5b")

    def said(*flags):
        flags = ["--model", tmp_path / "m", "--judge", tmp_path / "m", "--plan", "--prompts-per-step", 32, *flags]
        args = tyro.cli(ppo_cpe.Args, args=[str(flag) for flag in flags])
        ppo_cpe.main(args)
        out = capsys.readouterr().out
        return re.findall(r"engine: KV cache +([\d.]+)", out)[0], re.findall("at most .* sequences at once.*", out)

    max_len = 2048 + 2 * 2048 + 512 + 512
    per_token = 24 * 2 * 128 * 2 / GIB
    cache, lines = said("--world-size", 8)
    assert float(cache) == pytest.approx(256 * max_len / 4 * per_token, abs=0.01)
    (line,) = lines
    both = 256 * (max_len + 8192) / 4 * per_token  # with the judge's
    assert line.startswith("at most 16 sequences at once: --max-batch 16 would make the KV caches")
    assert line.endswith(f"{both:.2f} -> {both / 16:.2f} GiB")
    assert said("--world-size", 8, "--max-batch", 16)[1] == []
    assert "at most 64" in said("--world-size", 8, "--eval-data", "x.jsonl", "--eval-n", 512)[1][0]  # one answer each
    cache, lines = said("--world-size", 8, "--gpu-gib", 0)
    assert lines == [] and float(cache) == pytest.approx(2 * 2 * 16 * max_len / 4 * per_token, abs=0.01)  # fp32, rows


def test_the_plan_counts_the_host_memory_of_offload(tmp_path, capsys):
    config_folder(tmp_path / "m", "7b")
    n = 7_615_616_512
    for module, models, flags in ((sft, n, []), (ppo_cpe, n + n - 152064 * 3584 + 3584, ["--judge", "world"])):
        flags = [*flags, "--model", str(tmp_path / "m"), "--plan", "--world-size", "8", "--gpu-gib", "1000"]
        size = (12 if module is ppo_cpe else 8) * models / 8 / GIB  # sft.py offloads the moments alone
        module.main(tyro.cli(module.Args, args=flags))
        assert "--offload" not in capsys.readouterr().out
        module.main(tyro.cli(module.Args, args=[*flags, "--offload"]))
        (said,) = re.findall(r"--offload pins ([\d.]+) GiB", capsys.readouterr().out)
        assert float(said) == pytest.approx(size, abs=0.1)


def test_the_plan_counts_the_start_of_a_run_that_releases_its_cache(tmp_path, capsys):
    """The engine is opened beside the masters: only later are caches released, and masters offloaded."""
    config_folder(tmp_path / "m", "0.5b")
    flags = ["--model", tmp_path / "m", "--judge", "world", "--plan", "--world-size", 8, "--offload", "--gpu-gib", 1000]
    ppo_cpe.main(tyro.cli(ppo_cpe.Args, args=[str(flag) for flag in flags]))
    assert "start" not in capsys.readouterr().out
    ppo_cpe.main(tyro.cli(ppo_cpe.Args, args=[str(flag) for flag in [*flags, "--release-cache"]]))
    header, *lines = capsys.readouterr().out.splitlines()[1:]
    assert header.split() == ["start", "sampling", "passes", "optimizer"]
    rows = {line[:34].strip(): line[34:].split() for line in lines}
    assert rows["engine: KV cache"][:2] == [rows["engine: KV cache"][0]] * 2 and rows["engine: KV cache"][2:] == [
        "-",
        "-",
    ]
    masters = rows["policy: fp32 masters"]
    assert masters[0] == masters[2] and masters[1] == "-"
    parts = ("engine: weights", "engine: KV cache", "policy: fp32 masters", "critic: fp32 masters")
    assert float(rows["together"][0]) == pytest.approx(sum(float(rows[part][0]) for part in parts), abs=0.03)


def test_flags_that_do_not_go_together(tmp_path):
    config_folder(tmp_path / "m", "7b")
    with pytest.raises(ValueError, match="--shard-size 3: expected a divisor of --world-size 8"):
        sft.main(sft.Args(model=str(tmp_path / "m"), plan=True, world_size=8, shard_size=3))
    with pytest.raises(ValueError, match="no config.json"):
        sft.main(sft.Args(model=str(tmp_path), plan=True))


def test_a_model_from_scratch_is_planned_from_its_flags(tmp_path, capsys):
    tiny_tokenizer(str(tmp_path / "tokenizer"), ["a b c user assistant"])
    args = sft.Args(from_scratch=str(tmp_path / "tokenizer"), plan=True, gpu_gib=0, hidden_size=64, layers=2)
    assert 0 < sft.main(args) < GIB
    assert "0.00 billion parameters" in capsys.readouterr().out
