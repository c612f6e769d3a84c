"""FLOPs and bytes of passes, counted otherwise. Schedules and seconds: tests/test_bench.py."""

import pytest
import torch
from conftest import random_model, tiny_config
from test_plan import QWEN, SIZES

from model_config import Config
from runtime import roofline
from runtime.packing import pack
from runtime.roofline import Rates, decode_seconds, forward_seconds

SEVEN = Config.from_dict({**QWEN, **SIZES["7b"]}, "7b")
H100 = Rates(989e12, 3.35e12, 2)  # all that the data sheet promises


def test_a_pass_has_the_operations_that_training_counts():
    config = tiny_config()
    model, lengths = random_model(config), (7, 20, 33)
    batch = pack([[1] * n for n in lengths], [[False] + [True] * (n - 1) for n in lengths], torch.device("cpu"))
    seen = batch.context.attention_pairs / sum(lengths)
    found = forward_seconds(config, sum(lengths), seen, len(batch.index), Rates(1.0, 1.0, 4))
    assert found == pytest.approx(roofline.forward_flops(model, batch))


def test_decoding_reads_weights_once_a_step_and_keys_once_a_row():
    weights = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 3584 * 152064
    kv = 28 * 2 * 512 * 2  # bytes of a token's keys and values
    assert decode_seconds(SEVEN, 1, 100, 0, 64, H100) == pytest.approx(100 * 2 * weights / 3.35e12)
    few = decode_seconds(SEVEN, 64, 400, 1000, 64, H100)
    assert few == pytest.approx(400 * (2 * weights + 64 * 1000 * kv) / 3.35e12)
    assert decode_seconds(SEVEN, 128, 400, 1000, 64, H100) == pytest.approx(2 * few)  # one half after the other
    many = decode_seconds(SEVEN, 2000, 400, 0, 2000, H100)  # here the products take longer
    assert many == pytest.approx(400 * 2000 * 2 * weights / 989e12)
    assert decode_seconds(SEVEN, 0, 400, 1000, 64, H100) == 0
