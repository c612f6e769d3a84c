"""The benchmarks measure what they say: bounded passes, no warm-up inside the clock."""

import functools
import importlib
import importlib.metadata
import sys

import pytest
import torch
from conftest import random_model, tiny_config

from engine import Engine
from engine.cpu_runner import CPURunner
from runtime.distributed import start


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


def test_the_plans_seconds_are_measured_by_phase(bench, capsys):
    plan = bench("plan")
    plan.main(plan.Args(width=64, layers=1, prompts=2, repeats=1))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["prefill", "decode", "score", "update"]
    for _, expected, measured, ratio, *_ in lines:  # width 64 is bound by calls: of the ratio nothing is asked
        assert float(expected) >= 0 and float(measured) > 0 and float(ratio) > 0


def test_without_trl_the_bench_says_what_it_needs(bench, monkeypatch):
    peers = bench("peers")
    monkeypatch.setattr("importlib.metadata.version", lambda name: importlib.metadata.distribution("no-such-package"))
    with pytest.raises(ValueError, match="TRL is not installed; expected: pip install trl==1.16.0"):
        peers.main(peers.Args())
