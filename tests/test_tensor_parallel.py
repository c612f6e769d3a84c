"""Engines that several ranks share, over gloo: they say what a whole engine says."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, finish, launch, random_model, tiny_config

from engine import Engine
from model import save_pretrained
from tensor_parallel import EngineRanks, ModelPart

# Each rank runs this: it writes what its engine says before and after new weights.
SCRIPT = """
import sys, json, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
if {on_gpu}:
    import emulated_gpu
    emulated_gpu.install()
from test_tensor_parallel import STOPS, samples_of
from engine import Engine
from model import load_pretrained
from runtime.distributed import start
from runtime.training import weight_sync_error

ranks = start(tensor_parallel={size})
device = ranks.device
engine = Engine(load_pretrained({first!r}, None, device, engine_ranks=ranks.engine_ranks), STOPS, 300, 8, 1200)
found = samples_of(engine)
engine.release_cache()
other = load_pretrained({second!r}, None, device)
engine.sync_weights(other)
found += samples_of(engine)
error = weight_sync_error(engine.model, other, list(range(40)), ranks)
assert device.type == "cpu" or engine.runner.graphs
json.dump([found, error], open(f"{folder}/{{ranks.rank}}.json", "w"))
"""


def run_apart(script, processes):
    """Runs the ranks of a script in new processes: the emulated GPU has to be there before anything is imported."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = dict(WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=s.getsockname()[1], OMP_NUM_THREADS=1)
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    ranks = [
        subprocess.Popen([sys.executable, script], env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(processes)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors.decode()[-3000:]


STOPS = range(6, 30)


def samples_of(engine):
    """More sequences than slots, prompts of several chunks, a shared prefix, greedy and top-p, alternatives."""
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(6, 300, (n,), generator=rng).tolist() for n in (3, 150, 40, 9)]
    prompts.append(prompts[1] + prompts[0])
    for key, ids in enumerate(prompts):
        settings = dict(temperature=0.0 if key == 2 else 0.8, top_p=0.9 if key == 3 else 1.0)
        engine.submit(ids, key, n=3, max_new_tokens=20, top_logprobs=2 if key == 0 else 0, **settings)
    samples = []
    while engine.busy:
        engine.step()
        samples += engine.collect()
    samples.sort(key=lambda s: (s.key, s.index))
    return [[s.ids, s.logprobs, s.finish_reason, s.top_logprobs] for s in samples]


QWEN3 = dict(model_type="qwen3", tie_word_embeddings=False, vocab_size=301)


@pytest.mark.parametrize(
    ("size", "config", "on_gpu"),
    [
        (2, dict(model_type="qwen2"), False),
        (2, QWEN3, False),
        # two ranks for each key-value head, with one and two of its three queries; uneven columns and vocabulary
        (
            4,
            dict(model_type="llama", attention_bias=True, num_attention_heads=6, intermediate_size=50, head_dim=8),
            False,
        ),
        (2, QWEN3, True),
    ],
    ids=["qwen2", "qwen3", "llama", "qwen3 on an emulated gpu"],
)
def test_ranks_say_what_one_engine_says(size, config, on_gpu, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    models = [random_model(tiny_config(**config), seed=seed, std=0.3) for seed in (0, 1)]
    for model, path in zip(models, (first, second)):
        save_pretrained(model, str(path), None)
    script = tmp_path / "ranks.py"
    names = dict(root=ROOT, size=size, folder=str(tmp_path), on_gpu=on_gpu)
    script.write_text(SCRIPT.format(first=str(first), second=str(second), **names))
    if on_gpu:
        run_apart(script, size)
    else:
        finish(launch(script, processes=size))
    expected = [sample for model in models for sample in samples_of(Engine(model, STOPS, 300, 8, 1200))]
    assert len({tuple(ids) for ids, *_ in expected}) > 20 and {s[2] for s in expected} == {"stop", "length"}
    for rank in range(size):
        found, error = json.loads((tmp_path / f"{rank}.json").read_text())
        assert error < 1e-4
        for (ids, logprobs, reason, top), (ids_, logprobs_, reason_, top_) in zip(found, expected, strict=True):
            assert (ids, reason) == (ids_, reason_)
            assert logprobs == pytest.approx(logprobs_, abs=1e-4)
            assert [[i for i, _ in step] for step in top] == [[i for i, _ in step] for step in top_]


def test_heads_that_cannot_be_distributed():
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2)
    for size in (3, 8):
        with pytest.raises(ValueError, match=f"--tensor-parallel {size}: the model has 4 heads and 2 key-value heads"):
            ModelPart(config, EngineRanks(None, 0, size))


@pytest.mark.parametrize(("heads", "kv", "size"), [(28, 4, 8), (28, 4, 4), (40, 8, 8), (14, 2, 2), (12, 2, 8)])
def test_parts_are_disjoint_and_complete(heads, kv, size):
    """Shapes of Qwen2.5 7B, 14B, 0.5B, 1.5B. A query is on the same rank as its key-value head."""
    config = tiny_config(num_attention_heads=heads, num_key_value_heads=kv, head_dim=8)
    parts = [ModelPart(config, EngineRanks(None, rank, size)) for rank in range(size)]
    queries = [head for part in parts for head in range(heads)[part.heads]]
    assert queries == list(range(heads))
    for part in parts:
        own = range(heads)[part.heads]
        assert {head * kv // heads for head in own} == set(range(kv)[part.kv_heads])
        assert (part.config.num_attention_heads, part.config.num_key_value_heads) == (
            len(own),
            part.kv_heads.stop - part.kv_heads.start,
        )
        assert part.config.num_attention_heads % part.config.num_key_value_heads == 0
