"""--lora-rank: the mathematics of adapters, what is shared and saved, and every stage on one and two processes."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import error_of, finish, launch, random_model, read_metrics, run_script, tiny_config
from peft import PeftModel
from safetensors.torch import load_file
from test_ppo_run import REWARDS
from test_ppo_run import flags_of as ppo_flags
from test_training import SCRIPTS, WEIGHTS, flags_of
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dpo
import sft
from attention import Packed
from engine import Engine
from lora import Linear, Lora, add_adapters, init_adapters
from model import load_pretrained, save_pretrained
from packed_weights import pack_weights
from runtime import training
from runtime.distributed import start

LORA = ["--lora-rank", 4, "--lora-alpha", 8]


def with_adapters(model, rank=4, alpha=8.0, std=0.1):
    """Adapters whose B is not zero any more, nor a scalar head."""
    add_adapters(model, Lora(rank, alpha, "base"))
    init_adapters(model, seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def loss_of(model, weights=None):
    ids = torch.arange(40) * 7 % 300
    packed, index, targets = Packed([25, 15]), torch.arange(24), torch.arange(24) * 5 % 300
    arguments = (ids, packed.position_ids, packed, index, None if model.scalar_head else targets)
    out = functional_call(model, weights, arguments) if weights else model(*arguments)
    return (out if model.scalar_head else out[0]).square().mean()


# -- the mathematics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, dict(model_type="qwen3", head_dim=12, tie_word_embeddings=False)])
@pytest.mark.parametrize("scalar_head", [False, True])
def test_gradients_are_those_of_dense_matrices(changes, scalar_head):
    """W + s B A as one matrix whose gradient is G: A gets s B' G, B gets s G A'. In fp64, all projections."""
    model = with_adapters(random_model(tiny_config(**changes), scalar_head)).double()
    loss_of(model).backward()
    projections = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    assert len(projections) == 2 * 7
    dense = {f"{name}.weight": m.merged().detach().requires_grad_() for name, m in projections.items()}
    without = {
        f"{name}.{part}": torch.zeros_like(getattr(m, part))
        for name, m in projections.items()
        for part in ("lora_A", "lora_B")
    }
    loss = loss_of(model, dense | without)
    assert loss.item() == pytest.approx(loss_of(model).item(), rel=1e-12)
    loss.backward()
    for name, m in projections.items():
        full = dense[f"{name}.weight"].grad
        assert full.abs().max() > 1e-6 and m.scale == 2
        torch.testing.assert_close(m.lora_A.grad, 2 * m.lora_B.T @ full, atol=1e-14, rtol=1e-9)
        torch.testing.assert_close(m.lora_B.grad, 2 * full @ m.lora_A.T, atol=1e-14, rtol=1e-9)
    has_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    heads = {"score.weight"} if scalar_head else set()
    assert has_gradient == {f"{name}.lora_{x}" for name in projections for x in "AB"} | heads


def test_full_rank_takes_the_first_step_of_full_training():
    """With A the identity and B zero a step of SGD moves s B A by -lr s^2 G: what full training does at lr s^2.

    To 1e-6 of the largest change in fp64: both are the same products in another order. A wrong scale would be a factor.
    """
    config = tiny_config(intermediate_size=32)  # all inputs as wide as the rank
    full, low = random_model(config).double(), random_model(config).double()
    before = {name: p.detach().clone() for name, p in full.named_parameters()}
    add_adapters(low, Lora(32, 96.0, "base"))  # s = 3
    low.double()
    with torch.no_grad():
        for m in low.modules():
            if isinstance(m, Linear):
                m.lora_A.copy_(torch.eye(32))
                m.lora_B.zero_()
    for model, lr in ((full, 0.01 * 9), (low, 0.01)):
        optimizer = torch.optim.SGD(training.trainable(model), lr=lr)
        loss_of(model).backward()
        optimizer.step()
    for (name, m), after in zip(low.named_modules(), full.modules(), strict=True):
        if isinstance(m, Linear):
            change = after.weight - before[f"{name}.weight"]
            found = m.merged() - before[f"{name}.weight"]
            assert change.abs().max() > 1e-5
            torch.testing.assert_close(found, change, atol=1e-6 * change.abs().max().item(), rtol=0)


def test_at_first_the_model_is_its_base(tmp_path):
    save_pretrained(random_model(tiny_config()), str(tmp_path / "m"), None)
    base, model = load_pretrained(str(tmp_path / "m")), load_pretrained(str(tmp_path / "m"), lora=Lora(4, 8.0, "m"))
    assert torch.equal(loss_of(base), loss_of(model))
    same = load_pretrained(str(tmp_path / "m"), lora=Lora(4, 8.0, "m"))
    other = load_pretrained(str(tmp_path / "m"), lora=Lora(4, 8.0, "m", seed=1))
    a, b, c = (m.model.layers[0].mlp.down_proj.lora_A for m in (model, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)  # of the seed alone
    assert a.std().item() == pytest.approx((3 * 48) ** -0.5, rel=0.2)  # uniform, 192 draws


# -- one frozen base ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_policy_critic_and_sampler_share_the_base(tmp_path, tied):
    save_pretrained(random_model(tiny_config(tie_word_embeddings=tied)), str(tmp_path / "m"), None)
    ranks = replace(start("bf16"), device=torch.device("cpu"))
    args = sft.Args(lora_rank=4, checkpoint_activations=True)
    policy = training.open_model(str(tmp_path / "m"), args, args.seed, ranks)
    critic = training.open_model(str(tmp_path / "m"), args, args.seed, ranks, scalar_head=True, other=policy)
    sampler = training.open_sampler(str(tmp_path / "m"), policy, ranks)
    assert policy.lora.alpha == 8 and critic.checkpoint_activations and loss_of(critic) == 0
    theirs = dict(policy.named_parameters())
    for model in (critic, sampler):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                assert parameter is not theirs[name] and parameter.requires_grad
                assert parameter.data_ptr() != theirs[name].data_ptr()
            elif name != "score.weight":
                assert parameter is theirs[name] and not parameter.requires_grad
    trained = [p.dtype for model in (policy, critic) for p in training.trainable(model)]
    assert set(trained) == {torch.float32} and len(trained) == 2 * 28 + 1
    assert policy.model.norm.weight.dtype == torch.bfloat16
    assert sum(p.numel() for p in critic.parameters()) < sum(p.numel() for p in policy.parameters()) or tied


def test_updates_reach_the_engine(tmp_path):
    """In fp32 merged into what is packed, to rounding; in bf16 applied, since merged they would round to nothing."""
    save_pretrained(random_model(tiny_config()), str(tmp_path / "m"), None)
    prompt = list(range(5, 30))
    for dtype in ("fp32", "bf16"):
        ranks = start(dtype)
        policy = training.open_model(str(tmp_path / "m"), sft.Args(lora_rank=4), 0, ranks)
        engine = Engine(training.open_sampler(str(tmp_path / "m"), policy, ranks), [], 64)
        (before,) = engine.generate([prompt], temperature=0, max_new_tokens=16)
        engine.sync_weights(policy)
        assert engine.generate([prompt], temperature=0, max_new_tokens=16)[0][0].logprobs == before[0].logprobs
        with torch.no_grad():
            for m in policy.modules():
                if isinstance(m, Linear):  # an update of Adam at 1e-5
                    m.lora_B += 1e-5
                    if dtype == "bf16":
                        assert (m.merged().bfloat16() == m.weight).float().mean() > 0.95
        assert training.weight_sync_error(engine.model, policy, prompt, ranks) > 0
        engine.sync_weights(policy)
        (after,) = engine.generate([prompt], temperature=0, max_new_tokens=16)
        assert after[0].logprobs != before[0].logprobs
        # fp32: sums in another order. bf16: the same operations, but products of one row and of many differ
        assert training.weight_sync_error(engine.model, policy, prompt, ranks) <= (1e-5 if dtype == "fp32" else 0)


def test_packed_products_are_those_of_the_adapters():
    model = with_adapters(random_model(tiny_config()))
    with torch.no_grad():
        plain = loss_of(model).item()
        base = model.model.layers[0].self_attn.q_proj.weight.clone()
        pack_weights(model)
        assert loss_of(model).item() == pytest.approx(plain, rel=1e-5)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, base)  # and the base stays what it is


# -- what is saved -----------------------------------------------------------------------------------------------------

FAMILIES = [
    {},
    dict(tie_word_embeddings=False),
    dict(model_type="qwen3", head_dim=12),
    dict(model_type="llama", attention_bias=True, tie_word_embeddings=False),
]


@pytest.mark.parametrize("changes", FAMILIES)
def test_merged_weights_and_adapter_load_elsewhere(tmp_path, changes):
    """Logits of transformers on the merged folder and of PEFT on base and adapter, to 1e-5 of ours."""
    save_pretrained(random_model(tiny_config(**changes)), str(tmp_path / "base"), None)
    model = with_adapters(load_pretrained(str(tmp_path / "base")))
    save_pretrained(model, str(tmp_path / "m"), None)
    ids, packed = torch.arange(30) * 7 % 300, Packed([30])
    with torch.no_grad():
        ours = model(ids, packed.position_ids, packed)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        plain = base(ids[None]).logits[0]
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)(ids[None]).logits[0]
        theirs = PeftModel.from_pretrained(base, tmp_path / "m" / "adapter")(ids[None]).logits[0]
        again = load_pretrained(str(tmp_path / "m"))(ids, packed.position_ids, packed)
    assert (ours - plain).abs().max() > 0.1
    for found in (merged, theirs, again):
        torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)


def test_a_critics_adapter_loads_elsewhere(tmp_path):
    save_pretrained(random_model(tiny_config()), str(tmp_path / "base"), None)
    critic = with_adapters(load_pretrained(str(tmp_path / "base"), scalar_head=True))
    with torch.no_grad():
        critic.score.weight += 0.3
    save_pretrained(critic, str(tmp_path / "m"), None)
    ids, packed = torch.arange(30) * 7 % 300, Packed([30])
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "m" / "adapter").get_base_model()
    with torch.no_grad():
        values = critic(ids, packed.position_ids, packed)
        found = theirs.score(theirs.model(ids[None]).last_hidden_state)[0, :, 0]
    torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-5)
    assert values.abs().max() > 0.1


# -- the stages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_ranks_learn_what_one_does(name, tiny, tmp_path):
    """FSDP2 with frozen shards, in fp32 to rounding and in bf16 as far as that goes, recomputed and offloaded."""
    script, flags = flags_of(name, tiny)
    flags += ["--max-steps", 3, "--lr", 1e-2, *LORA]
    one = launch(script, *flags, "--out", tmp_path / "one")
    two = launch(script, *flags, "--out", tmp_path / "two", processes=2)
    finish(one)
    finish(two)
    saves = ["--checkpoint-activations", "--offload", "--dtype", "bf16"]
    half = launch(script, *flags, *saves, "--out", tmp_path / "half")
    halves = launch(script, *flags, *saves, "--out", tmp_path / "halves", processes=2)
    finish(half)
    finish(halves)
    one, two, half, halves = (read_metrics(tmp_path / name) for name in ("one", "two", "half", "halves"))
    for ours, theirs, in_half, in_halves in zip(one, two, half, halves, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3)
        # 8 bits, as in test_fsdp_bf16.py; half a gradient would be half a norm
        for found in (in_half, in_halves):
            assert found["loss"] == pytest.approx(ours["loss"], rel=0.02, abs=0.01)
            assert found["grad_norm"] == pytest.approx(ours["grad_norm"], rel=0.25)
    assert abs(one[2]["loss"] - one[0]["loss"]) > 0.01
    saved = [
        load_file(tmp_path / run / WEIGHTS[name] / "adapter" / "adapter_model.safetensors") for run in ("one", "two")
    ]
    for key, a in saved[0].items():  # of the seed, and of gradients whose signs Adam takes
        torch.testing.assert_close(saved[1][key], a, atol=2e-2 if "lora_B" in key or "score" in key else 4e-2, rtol=0)
    # only what is trained is in the trainer's state, and the base in the saved weights is the one that was given
    index = json.loads(next((tmp_path / "two").glob("checkpoints/step_*/train_state/index.json")).read_text())
    assert all("lora_" in key or "score" in key for key in index) and len(index) == 4 * (28 + (name == "bt"))
    weights = load_file(tmp_path / "two" / WEIGHTS[name] / "model.safetensors")
    base = load_file(tiny / "checkpoint" / "model.safetensors")
    assert torch.equal(weights["model.norm.weight"], base["model.norm.weight"])
    moved = [key for key in base if not torch.equal(weights[key], base[key])]
    assert len(moved) == 14 and all("proj.weight" in key for key in moved)


@pytest.mark.parametrize("name", ["sft", "bt"])
def test_a_stopped_run_continues_bit_for_bit(name, tiny, tmp_path):
    script, flags = flags_of(name, tiny)
    flags += ["--lr", 1e-2, *LORA]
    whole = launch(script, *flags, "--max-steps", 7, "--out", tmp_path / "whole")
    run_script(script, *flags, "--max-steps", 5, "--out", tmp_path / "run")
    finish(whole)
    assert "resumed from" in run_script(script, *flags, "--max-steps", 7, "--out", tmp_path / "run")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / WEIGHTS[name] / file) for run in ("run", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def ppo(tiny, tmp_path_factory):
    """-> (flags of RL with adapters and a critic of one's own, folder of four steps on one process)."""
    folder = tmp_path_factory.mktemp("ppo")
    (folder / "my.py").write_text(REWARDS)
    flags = [*ppo_flags(tiny, f"{folder}/my.py:critic"), *LORA, "--lr", 2e-3, "--critic-lr", 2e-3]
    run_script("ppo_cpe.py", *flags, "--max-steps", 4, "--out", folder / "whole")
    return flags, folder / "whole"


def test_rl_trains_both_and_samples_with_them(ppo, tiny):
    _, whole = ppo
    metrics = read_metrics(whole)
    for m in metrics:
        assert m["grad_norm_policy"] > 0 and m["grad_norm_critic"] > 0 and m["batch"] == 12
        assert m["weight_sync_error"] < 1e-4 and m["train_inference_mismatch"] < 1e-3
    assert metrics[0]["explained_variance"] != metrics[-1]["explained_variance"]
    base = load_file(tiny / "checkpoint" / "model.safetensors")
    for name in ("policy", "critic"):
        weights = load_file(whole / name / "model.safetensors")
        moved = {key for key in weights if key not in base or not torch.equal(weights[key], base[key])}
        assert len(moved) == 14 + (name == "critic"), moved


def test_rl_continues_bit_for_bit(ppo, tmp_path):
    flags, whole = ppo
    run_script("ppo_cpe.py", *flags, "--max-steps", 2, "--out", tmp_path / "run")
    assert "resumed from" in run_script("ppo_cpe.py", *flags, "--max-steps", 4, "--out", tmp_path / "run")
    assert read_metrics(tmp_path / "run") == read_metrics(whole)
    for file in ("policy/model.safetensors", "critic/model.safetensors", "critic/adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(folder / file) for folder in (tmp_path / "run", whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_rl_on_two_ranks_that_save_memory(ppo, tmp_path):
    """The same answers, rewards and losses on two ranks; in bf16 recomputed and offloaded, on one and on two."""
    flags, whole = ppo
    finish(launch("ppo_cpe.py", *flags, "--max-steps", 2, "--out", tmp_path / "two", processes=2))
    for ours, theirs in zip(read_metrics(whole), read_metrics(tmp_path / "two")):
        assert ours["original/reward"] == pytest.approx(theirs["original/reward"])
        for name in ("grad_norm_policy", "grad_norm_critic", "value_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=5e-3)
    saves = ["--dtype", "bf16", "--offload", "--checkpoint-activations", "--max-steps", 2]
    for processes in (1, 2):
        out = tmp_path / f"bf16_{processes}"
        finish(launch("ppo_cpe.py", *flags, *saves, "--out", out, processes=processes))
        for m in read_metrics(out):  # engine and trainer apply the same adapters to the same base, in sums of their own
            assert m["grad_norm_policy"] > 0 and m["weight_sync_error"] < 0.1 and m["train_inference_mismatch"] < 0.05


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_flags_that_make_no_adapter(tiny, tmp_path, capsys):
    assert "--lora-alpha 4.0: expected a --lora-rank beside it" in error_of(dpo, capsys, "--lora-alpha", 4)
    scratch = ["--from-scratch", tiny / "tokenizer", "--data", tiny / "pairs.jsonl", *LORA]
    assert "--lora-rank 4: random weights (--from-scratch) are trained whole" in error_of(sft, capsys, *scratch)
    script, flags = flags_of("sft", tiny)
    wide = [*flags, "--lora-rank", 65, "--out", tmp_path / "run"]
    assert "--lora-rank 65: expected at most the model's width, 64" in error_of(sft, capsys, *wide)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run_script(script, *flags, *LORA, "--max-steps", 1, "--out", tmp_path / "run")
    again = error_of(sft, capsys, *flags, "--lora-rank", 4, "--out", tmp_path / "run")
    assert "holds a run with other flags (--lora-alpha 8.0 -> None)" in again
    assert os.path.isfile(tmp_path / "run" / "policy" / "adapter" / "adapter_config.json")
