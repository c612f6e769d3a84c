"""Shared by the tests: a tiny random checkpoint with a real byte-level BPE tokenizer, in hub format."""

import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from model import Config, Qwen2, init_weights  # noqa: E402


def tiny_config(**changes):
    fields = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, rope_theta=10000.0, tie_word_embeddings=True, max_position_embeddings=512)
    return Config(**{**fields, **changes})


def random_model(config, scalar_head=False, seed=0, std=0.1):
    model = Qwen2(config, scalar_head)
    init_weights(model, seed, std)
    with torch.no_grad():  # biases and norms away from their neutral values, so that a forgotten one shows
        generator = torch.Generator().manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias") or name == "score.weight":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(autouse=True)
def quiet_threads():
    torch.set_num_threads(2)
