"""The seconds of `--plan`: what they are made of, counted otherwise; what is measured is in bench/plan.py."""

import pytest
import torch
import tyro
from conftest import random_model, tiny_config
from test_plan import QWEN, SIZES, config_folder

import ppo_cpe
from model_config import Config
from runtime import roofline
from runtime.packing import pack
from runtime.roofline import Rates, Work, decode_seconds, forward_seconds, phases

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


def test_phases_of_the_papers_step():
    """7B on eight H100 as if they reached their data sheets, against a count by hand."""
    work = Work(128 / 8, 4, 4, 6, 800, 400, 200, max_batch=64)
    found = phases(work, SEVEN, SEVEN, SEVEN, True, 3, H100)
    step = 2 * 7.07e9 / 3.35e12  # of decoding, the weights alone
    assert 2 * 400 * step < found["decode"] < 2 * 400 * step * 1.5
    assert found["update"] > 6 * 2 * 6.5e9 * 16 * (800 + 6 * 400) / 989e12  # two models, three passes
    assert found["update"] == pytest.approx(6 * 2 * 6.5e9 * 16 * (800 + 6 * 400) / 989e12, rel=0.15)
    assert found["prefill"] == pytest.approx(2 * 6.5e9 * 16 * (800 + 4 * 240) / 989e12, rel=0.15)
    apart = phases(work, SEVEN, None, None, False, 4, H100)
    assert apart["judge"] == 0 and apart["decode"] == found["decode"]
    assert apart["update"] / found["update"] == pytest.approx(4 / 6, rel=0.05)  # no critic, but recomputed
    scored = phases(work, SEVEN, SEVEN, SEVEN, False, 3, H100)["judge"]  # Bradley-Terry: one pass, nothing shared
    assert scored == pytest.approx(2 * 6.5e9 * 16 * 8 * 1200 / 989e12, rel=0.15)
    plain = phases(Work(16, 6, 0, 6, 800, 400, 200, 64), SEVEN, SEVEN, None, False, 3, H100)
    assert plain["decode"] < found["decode"] and plain["prefill"] < found["prefill"]


def test_the_plan_prints_them(tmp_path, capsys):
    folder = config_folder(tmp_path / "m", "0.5b")

    def printed(*flags):
        flags = ["--plan", "--model", folder, "--gpu-gib", 80, *flags]
        ppo_cpe.main(tyro.cli(ppo_cpe.Args, args=[str(flag) for flag in flags]))
        lines = capsys.readouterr().out.splitlines()
        start = next((i for i, line in enumerate(lines) if line.startswith("seconds of a step")), None)
        if start is None:
            return None
        names = lines[start + 2].split()
        rows = (line.split() for line in lines[start + 3 : start + 3 + len(roofline.PLANNED_GPUS)])
        return {name: dict(zip(names, map(float, values))) for name, *values in rows}

    found = printed("--judge", folder, "--checkpoint-activations")
    assert list(found) == ["A100", "H100", "H200", "L40S"]
    for seconds in found.values():
        assert seconds["together"] == pytest.approx(sum(seconds.values()) / 2, abs=0.3) and seconds["judge"] > 0
    assert found["H200"]["decode"] < found["H100"]["decode"] < found["L40S"]["decode"]
    assert printed("--judge", "world", "--checkpoint-activations")["H100"]["judge"] == 0
    assert printed("--judge", "world", "--gpu-gib", 0) is None
