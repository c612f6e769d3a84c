"""A real pretrained checkpoint against transformers; runs where CHECKPOINT names one (minutes at 135M on a CPU).

CHECKPOINT=path/to/model python -m pytest tests/test_checkpoint.py
"""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from attention import Packed
from chat import Chat
from engine import Engine
from model import load_pretrained, save_pretrained

CHECKPOINT = os.environ.get("CHECKPOINT")
pytestmark = pytest.mark.skipif(CHECKPOINT is None, reason="CHECKPOINT is not set")
N_TOKENS = 64
WORDS = [
    "Explain",
    "in",
    "a",
    "few",
    "sentences,",
    "to",
    "somebody",
    "who",
    "has",
    "never",
    "heard",
    "of",
    "it,",
    "how",
    "a",
    "lighthouse",
    "works,",
    "what",
    "it",
    "is",
    "good",
    "for,",
    "who",
    "looks",
    "after",
    "it,",
    "and",
    "why",
    "so",
    "many",
    "of",
    "them",
    "stand",
    "empty",
    "today.",
]


@pytest.fixture(scope="module")
def model():
    return load_pretrained(CHECKPOINT, torch.float32)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts():
    """32 chats of 13 to some 400 tokens."""
    chat = Chat(CHECKPOINT)
    texts = [f"Letter {i}: " + " ".join((WORDS * 12)[: 1 + i * i // 3]) for i in range(32)]
    return [chat.messages([{"role": "user", "content": text}]) for text in texts]


@pytest.fixture(scope="module")
def expected(reference, prompts):
    settings = dict(do_sample=False, max_new_tokens=N_TOKENS, pad_token_id=0, eos_token_id=None)
    return [
        reference.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **settings)[0, len(p) :].tolist()
        for p in prompts
    ]


def greedy(engine, prompts, **settings):
    return [
        [s.ids for s in samples]
        for samples in engine.generate(prompts, temperature=0, max_new_tokens=N_TOKENS, **settings)
    ]


def test_logits_equal_transformers(model, reference, prompts):
    packed = Packed([len(p) for p in prompts[::4]])
    with torch.no_grad():
        logits = model(torch.tensor(sum(prompts[::4], [])), packed.position_ids, packed)
        want = torch.cat([reference(torch.tensor([p])).logits[0] for p in prompts[::4]])
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)


def test_what_is_saved_transformers_loads(model, reference, tmp_path):
    save_pretrained(model, str(tmp_path / "saved"), CHECKPOINT, torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for (name, a), b in zip(loaded.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float()), name


def test_greedy_alone(model, prompts, expected):
    engine = Engine(model, [], 1024)
    assert [greedy(engine, [p])[0][0] for p in prompts] == expected


def test_greedy_batched_and_forked(model, prompts, expected):
    engine = Engine(model, [], 1024)
    assert greedy(engine, prompts, n=2) == [[ids, ids] for ids in expected]
    assert engine.scheduler.computed_tokens + engine.scheduler.reused_tokens == sum(map(len, prompts))


def test_greedy_preempted(model, prompts, expected):
    engine = Engine(model, [], 1024, max_batch=32, kv_tokens=2048)
    assert greedy(engine, prompts) == [[ids] for ids in expected]
    assert engine.scheduler.preemptions > 0


def test_greedy_after_new_weights(model, prompts, expected):
    """An engine that has generated with other weights, prompts in its cache, and is then given these."""
    other = load_pretrained(CHECKPOINT, torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    engine = Engine(other, [], 1024)
    assert greedy(engine, prompts[:4]) != [[ids] for ids in expected[:4]]
    engine.sync_weights(model)
    assert greedy(engine, prompts) == [[ids] for ids in expected]
