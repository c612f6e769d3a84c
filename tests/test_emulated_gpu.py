"""The project on a GPU that is emulated (emulated_gpu.py): what differs there from a CPU, without one.

torch cannot lose a GPU again, so these tests run in a process of their own, by `test_on_an_emulated_gpu`:

    EMULATED_GPU=1 python -m pytest tests/test_emulated_gpu.py
"""

import json
import os
import random
import subprocess
import sys

import pytest
import torch

EMULATED = os.environ.get("EMULATED_GPU") == "1"
if EMULATED:  # before the scripts are imported
    import emulated_gpu

    emulated_gpu.install()

from conftest import ROOT, finish, grm_flags, launch, random_model, read_metrics, tiny_config
from test_engine import check_blocks, drain, tokens
from test_ppo_run import REWARDS, flags_of

import evaluate
import ppo_cpe
import train_grm
from chat import Chat
from engine import Engine
from engine.gpu_runner import GPURunner
from model import load_pretrained
from runtime import offload, training
from runtime.flags import parse
from runtime.rows import write_rows

emulated = pytest.mark.skipif(not EMULATED, reason="in a process of its own")


@pytest.mark.slow
@pytest.mark.skipif(EMULATED, reason="this is that process")
def test_on_an_emulated_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "EMULATED_GPU": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def model_on(device, dtype=torch.float32, seed=0):
    return random_model(tiny_config(tie_word_embeddings=False), seed=seed, std=0.3).to(dtype).to(device)


# -- the emulation itself: it has to refuse what a GPU refuses ---------------------------------------------------------


@emulated
def test_devices_do_not_mix():
    x = torch.ones(3, 4, device="cuda", requires_grad=True)
    assert x.is_cuda and (x * 2.0).device == torch.device("cuda", 0) and not x.detach().cpu().is_cuda
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.ones(4)
    with pytest.raises(RuntimeError, match="one device"):
        torch.zeros(3)[torch.zeros(2, dtype=torch.int64, device="cuda")]
    (x * x).sum().backward()
    assert x.grad.is_cuda and x.grad.tolist() == [[2.0] * 4] * 3


@emulated
def test_waits_are_counted_and_refused_in_a_capture():
    emulated_gpu.WAITS.clear()
    x = torch.ones(3, device="cuda") * 2
    assert not emulated_gpu.WAITS
    x.sum().item(), x.tolist(), x.nonzero(), x.to("cpu"), torch.ones(2).to("cuda")
    torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    assert sum(emulated_gpu.WAITS.values()) == 5 and all("test_emulated_gpu.py:" in line for line in emulated_gpu.WAITS)
    refused = pytest.raises(RuntimeError, match="not permitted when stream is capturing")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()


@emulated
def test_a_graph_computes_when_it_is_replayed():
    x, total, graph = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        double = x * 2
        total += double
    assert total.tolist() == [0, 0] and double.isnan().all()
    for expected in (2, 4):
        graph.replay()
        assert total.tolist() == [expected] * 2
    x.fill_(5)
    graph.replay()
    assert (double.tolist(), total.tolist()) == ([10, 10], [14, 14])


# -- the engine --------------------------------------------------------------------------------------------------------


def requests(n):
    """Random prompts with common beginnings, forks, and settings of every kind."""
    rng = random.Random(3)
    beginnings = [tokens(n, seed=100 + n) for n in (0, 16, 23, 48)]
    for key in range(n):
        prompt, n_samples = rng.choice(beginnings) + tokens(rng.randint(1, 30), seed=key), rng.choice((1, 1, 2, 3))
        settings = dict(n=n_samples, seeds=[rng.getrandbits(60) for _ in range(n_samples)])
        settings |= dict(top_p=rng.choice((1.0, 0.9)), temperature=rng.choice((0.0, 0.8, 1.0)))
        yield key, prompt, settings | dict(max_new_tokens=rng.randint(1, 24), top_logprobs=rng.choice((0, 0, 2)))


STOP_IDS = [7, 11, 100, 200, 250]


@emulated
def test_the_engine_gives_what_it_gives_on_a_cpu():
    """Forks, top-p, alternatives; too few blocks for all; responses as they grow, one cancelled, one ended early."""
    plain = Engine(model_on("cpu"), STOP_IDS, 128, max_batch=64)
    for key, prompt, settings in requests(18):
        plain.submit(prompt, key, **settings)
    expected = drain(plain)

    engine, found = Engine(model_on("cuda"), STOP_IDS, 128, max_batch=6, kv_tokens=11 * 16), {}
    assert isinstance(engine.runner, GPURunner)
    for key, prompt, settings in requests(18):
        engine.submit(prompt, key, **settings)
        if key % 3 == 0:
            engine.step()
        found |= {(s.key, s.index): s for s in engine.collect()}
        for s in engine.scheduler.running:
            shown = engine.partial(s.key, s.index)
            assert shown == expected[s.key, s.index].ids[: len(shown)]  # never with the stop token
    engine.submit(tokens(9), "cancelled", n=2, max_new_tokens=60)
    engine.submit(tokens(12), "ended", max_new_tokens=60)
    while not (engine.partial("ended") and engine.partial("cancelled")):
        engine.step()
        found |= {(s.key, s.index): s for s in engine.collect()}
    engine.cancel("cancelled")
    engine.finish("ended")
    drain(engine, found)
    check_blocks(engine)
    assert engine.scheduler.preemptions > 3 and engine.scheduler.reused_tokens > 100
    assert len(engine.runner.graphs) > 2
    assert 1 <= len(found.pop(("ended", 0)).ids) < 60
    assert found.keys() == expected.keys()
    for at, sample in expected.items():
        ours = found[at]
        assert (ours.ids, ours.stop_id, ours.finish_reason) == (sample.ids, sample.stop_id, sample.finish_reason), at
        assert ours.logprobs == pytest.approx(sample.logprobs, abs=1e-4)
        assert [[i for i, _ in top] for top in ours.top_logprobs] == [
            [i for i, _ in top] for top in sample.top_logprobs
        ]


@emulated
def test_graphs_see_new_weights():
    """New weights are written where the graphs read, and the cache of the old ones is emptied."""
    prompts, settings = [tokens(5), tokens(40, seed=1)], dict(temperature=0, max_new_tokens=12)
    engine = Engine(model_on("cuda"), [], 128)
    before = engine.generate(prompts, **settings)
    graphs = dict(engine.runner.graphs)
    engine.sync_weights(model_on("cuda", seed=5))
    after = engine.generate(prompts, **settings)
    expected = Engine(model_on("cpu", seed=5), [], 128).generate(prompts, **settings)
    assert [s.ids for (s,) in after] == [s.ids for (s,) in expected] != [s.ids for (s,) in before]
    assert engine.runner.graphs == graphs and engine.scheduler.reused_tokens == 0
    attention = engine.model.model.layers[0].self_attn  # its projections are one product, of the memory that was synced
    assert torch.equal(attention.packed_qkv.weight[:32], attention.q_proj.weight)


@emulated
def test_a_released_cache_comes_back():
    prompts, settings = [tokens(5), tokens(40, seed=1)], dict(max_new_tokens=12)
    engine = Engine(model_on("cuda"), [], 128)
    before = engine.generate(prompts, **settings)
    for _ in range(2):  # also twice in a row, as by a judge that was asked nothing
        engine.release_cache()
        assert engine.runner.cache.numel() == 0 and not engine.runner.graphs
    assert engine.generate(prompts, **settings) == before
    assert engine.runner.cache.numel() > 0 and engine.scheduler.reused_tokens == 0


@emulated
def test_the_host_seldom_waits_for_a_decode_step():
    """32 samples, 64 steps: one poll every eight steps, no other read, and no copy that is waited for."""
    engine = Engine(model_on("cuda"), [], 200, max_batch=32, kv_tokens=32 * 208)
    for i in range(32):
        engine.submit(tokens(20 + i, seed=i), i, max_new_tokens=100)
    while len(engine.scheduler.running) < 32:
        engine.step()
    engine.step()  # captures the graph
    emulated_gpu.WAITS.clear()
    computed = engine.scheduler.computed_tokens
    for _ in range(64):
        engine.step()
    assert (
        engine.scheduler.computed_tokens == computed and len(engine.scheduler.running) == 32
    )  # nothing but decode steps
    print(f"\n64 decode steps: {dict(emulated_gpu.WAITS)}")
    assert sum(emulated_gpu.WAITS.values()) == 64 // engine.runner.steps_per_poll, emulated_gpu.WAITS


@emulated
def test_the_host_does_not_wait_between_passes(tiny, tmp_path, monkeypatch):
    """The arrays of an update's tokens are copied to the host after its last pass."""
    (tmp_path / "my.py").write_text(REWARDS)
    flags = [*flags_of(tiny, f"{tmp_path}/my.py:critic"), "--tokens-per-microbatch", 150, "--max-steps", 1]
    n_passes = []
    backward = ppo_cpe.backward

    def counted(model, one_pass, micro_batches, *rest):
        emulated_gpu.WAITS.clear()
        found = backward(model, one_pass, micro_batches, *rest)
        n_passes.append(len(micro_batches))
        assert all("trajectory.py" in where for where in emulated_gpu.WAITS), emulated_gpu.WAITS  # arrays_on_cpu
        return found

    monkeypatch.setattr(ppo_cpe, "backward", counted)
    on_gpu(ppo_cpe, *flags, "--out", tmp_path / "run")
    assert max(n_passes) > 1


# -- the stages --------------------------------------------------------------------------------------------------------


def on_gpu(module, *flags):
    module.main(parse(module.Args, module.__doc__, [str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def judge(tiny):
    """A GRM that writes one of two judgements, of whatever a random policy says: 100 steps on random answers."""
    rng, rows = random.Random(0), []
    words = " ".join((tiny / "pairs.jsonl").read_text().split()[:200]).replace('"', "").split()
    for i in range(64):
        row = dict(prompt_id=f"j{i}", persona={"name": f"Kim {i}"}, question=rng.choice(words))
        row |= dict(answer=" ".join(rng.choices(words, k=rng.randint(1, 12))), helpfulness=2, naturalness=0)
        rows.append(row | dict(personalization=4 * (i % 2), critique=("Name tea.", "Say it shorter.")[i % 2]))
    write_rows(str(tiny / "two_judgements.jsonl"), rows)
    flags = [
        "--model",
        tiny / "checkpoint",
        "--data",
        tiny / "two_judgements.jsonl",
        "--grm-template",
        tiny / "grm.txt",
    ]
    flags += ["--batch-size", 16, "--epochs", 25, "--lr", 5e-3, "--out", tiny / "two_judgements"]
    finish(launch("train_grm.py", *flags))
    return tiny / "two_judgements" / "model"


@emulated
def test_offloading_reuses_its_host_memory():
    """Weights and moments leave the GPU and come back unchanged; the second time nothing is allocated on the host."""
    models = {"policy": model_on("cuda"), "critic": model_on("cuda", seed=1)}
    optimizers = {name: training.adamw(model, 1e-3, 0.0) for name, model in models.items()}
    addresses = []
    for _ in range(2):
        for name, model in models.items():
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            offload.move_moments(optimizers[name], lambda parameter, name, moment: moment.to("cuda"))
            optimizers[name].step()
            optimizers[name].zero_grad()
        before = [p.tolist() for model in models.values() for p in model.parameters()]
        moments = [s["exp_avg_sq"].tolist() for o in optimizers.values() for s in o.state.values()]
        with training.offloaded(models, optimizers, torch.device("cuda", 0), True):
            host = [p for model in models.values() for p in model.parameters()]
            host += [
                s[name] for o in optimizers.values() for s in o.state.values() for name in ("exp_avg", "exp_avg_sq")
            ]
            assert not any(x.is_cuda for x in host)
            addresses.append([x.data_ptr() for x in host])
            assert [p.tolist() for p in host[: len(before)]] == before
        assert all(p.is_cuda for model in models.values() for p in model.parameters())
        assert [p.tolist() for model in models.values() for p in model.parameters()] == before
        assert [s["exp_avg_sq"].tolist() for o in optimizers.values() for s in o.state.values()] == moments
    assert addresses[0] == addresses[1]


SMALL = ["--prompts-per-step", 2, "--mini-batch-prompts", 1]
PPO = [*SMALL, "--offload", "--checkpoint-activations", "--release-cache", "--deterministic"]


@pytest.fixture(scope="module")
def ppo(tiny, judge, tmp_path_factory):
    """Two steps of PPO with a GRM and edits on the emulated GPU, in fp32 -> the run's folder."""
    out = tmp_path_factory.mktemp("gpu") / "ppo"
    on_gpu(ppo_cpe, *flags_of(tiny, judge), *PPO, "--dtype", "fp32", "--max-steps", 2, "--out", out)
    return out


@emulated
def test_ppo_does_what_it_does_on_a_cpu(ppo, tiny, judge, tmp_path):
    finish(launch("ppo_cpe.py", *flags_of(tiny, judge), *SMALL, "--max-steps", 2, "--out", tmp_path / "cpu"))
    for ours, theirs in zip(read_metrics(ppo), read_metrics(tmp_path / "cpu"), strict=True):
        assert ours["batch"] == theirs["batch"] and ours["generated_tokens"] == theirs["generated_tokens"]
        for name in ("policy_loss", "value_loss", "original/reward", "edit/gain", "grad_norm_policy", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        assert ours["weight_sync_error"] < 1e-4 and ours["train_inference_mismatch_max"] < 1e-3


@emulated
def test_ppo_resumes(ppo, tiny, judge, tmp_path):
    flags = [*flags_of(tiny, judge), *PPO, "--dtype", "fp32", "--out", tmp_path / "run"]
    on_gpu(ppo_cpe, *flags, "--max-steps", 1)
    on_gpu(ppo_cpe, *flags, "--max-steps", 2)
    assert read_metrics(tmp_path / "run") == read_metrics(ppo)


@emulated
def test_ppo_in_bf16(tiny, tmp_path):
    """With FlashAttention's demands checked, and the gaps of the trainer to the engine within the steps of bf16."""
    (tmp_path / "my.py").write_text(REWARDS)
    flags = [*flags_of(tiny, f"{tmp_path}/my.py:critic"), *PPO, "--max-steps", 2, "--out", tmp_path / "run"]
    on_gpu(ppo_cpe, *flags)
    for metrics in read_metrics(tmp_path / "run"):
        assert metrics["grad_norm_policy"] > 0 and metrics["grad_norm_critic"] > 0
        # log-probs near 5, of logits whose terms carry 8 bits: a wrong weight would show as whole units
        assert metrics["weight_sync_error"] < 0.25 and metrics["train_inference_mismatch"] < 0.05
    load_pretrained(str(tmp_path / "run" / "policy"), device="cpu")


@emulated
def test_a_grm_in_bf16(tiny, tmp_path):
    short = ["--max-steps", 2, "--eval-judgements", 2, "--eval-max-new-tokens", 8]
    on_gpu(train_grm, *grm_flags(tiny), *short, "--out", tmp_path / "grm")
    losses = [metrics["loss"] for metrics in read_metrics(tmp_path / "grm")]
    assert losses[1] < losses[0]


@emulated
def test_evaluate(ppo, tiny, tmp_path):
    (tmp_path / "length.py").write_text("def length(row, answer): return len(answer)")
    flags = ["--model", ppo / "policy", "--baseline", tiny / "checkpoint", "--prompts", tiny / "prompts.jsonl"]
    flags += ["--n-prompts", 6, "--max-new-tokens", 12, "--judge", f"{tmp_path}/length.py:length"]
    flags += ["--answer-template", tiny / "answer.txt", "--bootstrap-draws", 5, "--out", tmp_path / "out"]
    on_gpu(evaluate, *flags)
    assert 0 <= json.loads((tmp_path / "out" / "results.json").read_text())["win_rate"]["win_rate"] <= 1


@emulated
def test_serve(tiny):
    """Answers and streams over HTTP, on the thread of the server, are what a CPU's engine samples."""
    from test_serve import MESSAGES, Running

    path = str(tiny / "checkpoint")
    chat = Chat(path)
    engine = Engine(load_pretrained(path, device="cuda"), chat.stop_ids, 512, 8)
    running = Running(path, engine=engine)
    try:
        text = running.ask().choices[0].message.content
        parts = [c.choices[0].delta.content or "" for c in running.ask(stream=True) if c.choices]
    finally:
        running.server.should_exit = True
        running.thread.join(10)
    assert engine.device.type == "cuda" and engine.runner.graphs
    cpu = Running(path)
    assert text == "".join(parts) == cpu.ask(MESSAGES).choices[0].message.content
    cpu.server.should_exit = True
    cpu.thread.join(10)
