"""The benchmarks measure what they say: bounded passes, no warm-up inside the clock."""

import functools
import importlib
import importlib.metadata
import sys
from dataclasses import replace

import pytest
import torch
from conftest import random_model, tiny_config

from engine import Engine
from engine.cpu_runner import CPURunner
from model import save_pretrained
from runtime.distributed import start
from runtime.roofline import Rates


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, which puts the root of the project in the place of its own folder on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda name: importlib.import_module(f"bench.{name}")


def test_passes_of_the_shared_prefix_bench_are_bounded(bench):
    """All responses apart in one pass would not fit a GPU; in several, the same tokens are trained on."""
    train = bench("train")
    ranks = start("fp32")
    prompts = [[i] * 8 for i in range(4) for _ in range(6)]
    responses = [[9 - j, i] * 2 for i in range(4) for j in range(6)]
    shared, apart = train.shared_and_apart(prompts, responses, 40, ranks)
    assert max(len(b.input_ids) for b in (*shared, *apart)) <= 40
    assert len(shared) == 4 and len(apart) == 8  # 8 + 6 x 4 tokens; three times 8 + 4
    for batches in (shared, apart):
        assert sorted(torch.cat([b.targets for b in batches]).view(-1, 4).tolist()) == sorted(responses)
    (one,), (other,) = train.shared_and_apart(prompts, responses, 10**6, ranks)
    assert len(one.input_ids) == 4 * 32 and len(other.input_ids) == 24 * 12
    assert [len(b.input_ids) for b in train.shared_and_apart(prompts[:1], [[1] * 50], 40, ranks)[1]] == [58]


def test_no_batch_size_is_new_to_the_engine_while_the_clock_runs(bench, monkeypatch):
    """On a GPU the first decode step at a batch size captures a CUDA graph."""
    common, generate = bench("common"), bench("generate")
    sizes = []  # of each run
    decode = CPURunner.decode

    def recorded(runner, n):
        sizes[-1].add(n)
        return decode(runner, n)

    monkeypatch.setattr(CPURunner, "decode", recorded)
    requests = [([i + 1] * 5, 1, 3 + 4 * i) for i in range(6)]  # batch sizes from 6 down to 1
    engine = Engine(random_model(tiny_config()), [], 40, 6)
    run = functools.partial(generate.run_ours, engine, requests)
    common.seconds_of({"ours": run}, 2, before=lambda: sizes.append(set()))
    warm_up, *timed = sizes
    assert len(timed) == 2 and all({1, 6} <= run <= warm_up for run in timed)


def test_a_simulation_is_compared_by_phase(bench, capsys):
    check = bench("check_simulation")
    check.main(check.Args(prompts=2, repeats=1))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    names = {" ".join(line[:-3]) for line in lines}
    assert names == {*check.PARTS, "rollout together", "score", "update"}
    for *_, expected, measured, ratio in lines:  # of the ratio nothing is asked: this step is too short
        assert float(expected) > 0 and float(measured) > 0 and float(ratio) > 0


@pytest.fixture
def simulated(bench):
    """Simulates a step of four prompts on two H100: phases and floors."""
    simulate = bench("simulate")

    def run(**settings):
        sizes = dict(world_size=2, prompts_per_step=4, mini_batch_prompts=2, max_batch=8, tokens_per_microbatch=4096)
        return simulate.simulate(simulate.Args(**{**sizes, **settings}), simulate.GPUS[0])

    return run


def test_a_simulated_step_has_the_costs_of_its_calls(simulated):
    """7B, responses and judgements of one length, against a count by hand."""
    weights = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 3584 * 152064
    kv = 28 * 2 * 512 * 2  # bytes of a token's keys and values
    phases, floors = simulated(response_cv=0.0, edit_rate=0.0)
    # two prompts a rank: 8 originals decode 399 tokens, one comes from the prefill, and up to 8 are waited for
    bytes_read = 2 * weights + 8 * (800 + 200) * kv
    assert (
        399 * (bytes_read / (0.7 * 3.35e12)) < phases["policy decode"] < 410 * (0.9e-3 + bytes_read / (0.7 * 3.35e12))
    )
    assert floors["policy decode"] == pytest.approx(400 * bytes_read / (0.89 * 3.35e12), rel=0.03)
    trained = 2 * 6.53e9 * 2 * (800 + 4 * 400)  # FLOPs of a forward pass without attention, one model
    assert floors["update"] == pytest.approx(2 * 3 * trained / (0.81 * 989e12), rel=0.15)
    recomputed, _ = simulated(response_cv=0.0, edit_rate=0.0, checkpoint_activations=True)
    assert recomputed["update"] == pytest.approx(phases["update"] * 4 / 3)
    assert phases["offload"] == 0 and simulated(offload=True)[0]["offload"] > 0


def test_ranks_share_the_work_of_an_engine(simulated):
    apart, floors = simulated()
    together, lowest = simulated(tensor_parallel=2, max_batch=16)
    assert together["policy decode"] < apart["policy decode"]
    for phase in ("policy prefill", "judge prefill", "score", "update"):  # the same work, on two ranks
        assert lowest[phase] == pytest.approx(floors[phase], rel=0.05)
    released, _ = simulated(tensor_parallel=2, max_batch=16, release_cache=True)
    assert released["CUDA graphs"] > 0 and "CUDA graphs" not in together


def test_a_simulated_step_heeds_selection_cache_and_warm_up(simulated):
    """A selection trains on fewer edits, a small cache decodes in more steps, and the policy is trained."""
    every, _ = simulated(edit_rate=1.0)
    half, _ = simulated(edit_rate=0.5, edit_strategy="batch_rank")
    assert half["policy decode"] == every["policy decode"] and half["update"] < 0.9 * every["update"]
    small, _ = simulated(edit_rate=1.0, kv_tokens=4000)
    assert small["policy decode"] > 1.1 * every["policy decode"]
    assert simulated(edit_rate=1.0, critic_warmup_steps=5)[0] == every


def test_a_simulated_server_judges_beside_the_policy(simulated):
    phases, _ = simulated(judge_server=True)
    assert phases["waiting for the judge"] > 0 and "judge decode" not in phases


def test_without_trl_the_bench_says_what_it_needs(bench, monkeypatch):
    peers = bench("peers")
    monkeypatch.setattr("importlib.metadata.version", lambda name: importlib.metadata.distribution("no-such-package"))
    with pytest.raises(ValueError, match="TRL is not installed; expected: pip install trl==1.16.0"):
        peers.main(peers.Args())


@pytest.fixture
def engines(bench, monkeypatch, tmp_path):
    """bench/cpu_engines.py at small sizes, a folder of a small model, and its jobs run in this process."""
    module, worker = bench("cpu_engines"), bench("cpu_engine")
    for name, size in dict(PROMPT=6, NEW_TOKENS=4, PREFILL=20).items():
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(module, "run", lambda job, python: worker.measure(job))
    monkeypatch.setattr(module, "measured_rates", lambda *_: Rates(1e11, 1e10, 4))
    monkeypatch.setitem(worker.PEERS, "llama.cpp", ("no-such-package", None))
    save_pretrained(random_model(tiny_config()), str(tmp_path), None)
    args = module.Args(model=str(tmp_path), peers=("llama.cpp", "transformers"), batch=(1, 3), dtypes=("fp32",))
    return module, worker, args


def test_engines_on_a_cpu_are_compared(engines, capsys):
    """Rates of ours and of `transformers`; what is not installed is named."""
    module, _, args = engines
    module.main(args)
    missing, versions, header, one, three, prefill = capsys.readouterr().out.splitlines()
    assert missing == f"llama.cpp is left out: {sys.executable} has no no-such-package"
    assert versions.endswith(f"GFLOP/s; transformers {importlib.metadata.version('transformers')}")
    assert header.split() == ["fp32,", "tokens/s", "limit", "ours", "transformers", "ratio"]
    for line, name in ((one, "decode 1"), (three, "decode 3"), (prefill, "prefill")):
        assert line.startswith(name)
        limit, ours, peer, ratio = map(float, line.removeprefix(name).removesuffix("x").split())
        assert min(limit, ours, peer) > 0
        assert ratio == pytest.approx(ours / peer, rel=0.05)


def test_an_engine_with_another_model_ends_the_bench(engines, monkeypatch):
    module, worker, args = engines
    open_transformers = worker.open_transformers

    def open_other(job):
        generate = open_transformers(job)
        return lambda prompts, n_new: [[*ids[:-1], ids[-1] ^ 1] for ids in generate(prompts, n_new)]

    monkeypatch.setitem(worker.PEERS, "transformers", ("transformers", open_other))
    with pytest.raises(ValueError, match="transformers computes another model: expected the greedy tokens"):
        module.main(args)


def test_engines_are_asked_for_before_any_work(engines, tmp_path):
    module, _, args = engines
    with pytest.raises(ValueError, match="--peers-python nowhere/python: no such file"):
        module.main(replace(args, peers_python="nowhere/python"))
    save_pretrained(random_model(tiny_config(model_type="llama")), str(tmp_path / "llama"), None)
    with pytest.raises(ValueError, match="--model .*llama: expected a Qwen2 model"):
        module.main(replace(args, model=str(tmp_path / "llama")))
