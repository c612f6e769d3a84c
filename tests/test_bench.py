"""The benchmarks measure what they say: bounded passes, no warm-up inside the clock."""

import importlib
import importlib.metadata
import sys

import pytest
import torch
from conftest import random_model, tiny_config

from engine import Engine
from engine.cpu_runner import CPURunner


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, which puts the root of the project in the place of its own folder on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda name: importlib.import_module(f"bench.{name}")


def test_passes_of_the_shared_prefix_bench_are_bounded(bench):
    """All responses apart in one pass would not fit a GPU; in several, the same tokens are trained on."""
    train = bench("train")
    prompts = [[i] * 8 for i in range(4)]
    responses = [[[9 - j] * 4 for j in range(6)] for _ in prompts]
    shared, apart = train.shared_and_apart(prompts, responses, 40, "cpu")
    assert max(len(b.input_ids) for b in (*shared, *apart)) <= 40
    assert len(shared) == 4 and len(apart) == 8  # 8 + 6 x 4 tokens; three times 8 + 4
    expected = [ids for group in responses for ids in group]
    for batches in (shared, apart):
        assert torch.cat([b.targets for b in batches]).view(-1, 4).tolist() == expected
    (one,), (other,) = train.shared_and_apart(prompts, responses, 10**6, "cpu")
    assert len(one.input_ids) == 4 * 32 and len(other.input_ids) == 24 * 12
    assert [len(b.input_ids) for b in train.shared_and_apart(prompts[:1], [[[1] * 50]], 40, "cpu")[1]] == [58]


def test_no_batch_size_is_new_to_the_engine_while_the_clock_runs(bench, monkeypatch):
    """On a GPU the first decode step at a batch size captures a CUDA graph."""
    bench_generate = bench("generate")
    sizes = []
    decode = CPURunner.decode

    def recorded(runner, n):
        sizes.append(n)
        return decode(runner, n)

    monkeypatch.setattr(CPURunner, "decode", recorded)
    requests = [([i + 1] * 5, 1, 3 + 4 * i) for i in range(6)]  # batch sizes from 6 down to 1
    short = [(prompt, n, 2) for prompt, n, _ in requests]
    engine = Engine(random_model(tiny_config()), [], 40, 6)
    run = bench_generate.functools.partial(bench_generate.run_ours, engine, cached=0)
    timed = bench_generate.warmed_up(run, requests, short, torch.device("cuda"))
    warm = set(sizes)
    sizes.clear()
    timed()
    assert {1, 6} <= set(sizes) <= warm
    sizes.clear()
    bench_generate.warmed_up(run, requests, short, torch.device("cpu"))  # a CPU has no graphs: two tokens per answer
    assert len(sizes) == 1


def test_the_plans_seconds_are_measured_by_phase(bench, capsys):
    plan = bench("plan")
    plan.main(plan.Args(width=64, layers=1, vocabulary=300, prompts=2, repeats=1))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["prefill", "decode", "score", "update"]
    for _, expected, measured, ratio, *_ in lines:  # width 64 is bound by calls: of the ratio nothing is asked
        assert float(expected) >= 0 and float(measured) > 0 and float(ratio) > 0


def test_without_trl_the_bench_says_what_it_needs(bench, monkeypatch):
    peers = bench("peers")
    monkeypatch.setattr("importlib.metadata.version", lambda name: importlib.metadata.distribution("no-such-package"))
    with pytest.raises(ValueError, match="TRL is not installed; expected: pip install trl==1.16.0"):
        peers.main(peers.Args())
