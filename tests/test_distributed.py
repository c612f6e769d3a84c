"""What every script starts with: how long ranks wait for one another, and --deterministic."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import ROOT

from kernels import varlen_attention
from model import Segments
from runtime.distributed import COLLECTIVE_TIMEOUT, make_deterministic, start


def test_ranks_wait_for_a_judge_that_is_asked_again():
    """An unreachable server costs an original and then its edit 7 attempts of 5 minutes each (chat_client.py)."""
    start("fp32")
    options = dist.group.WORLD._get_backend(torch.device("cpu")).options
    assert options._timeout == COLLECTIVE_TIMEOUT > timedelta(minutes=2 * 7 * 5)


def test_deterministic_holds_for_torch_and_for_flash_attn(monkeypatch):
    given = []
    monkeypatch.setattr(varlen_attention, "flash_attn_varlen_func", lambda q, *_, **flags: given.append(flags) or q)
    monkeypatch.setattr(varlen_attention, "say_once", lambda text: None)

    class OnGPU(torch.Tensor):
        is_cuda = True

    q, where = torch.zeros(5, 2, 8, dtype=torch.bfloat16).as_subclass(OnGPU), Segments([5])
    try:
        for _ in range(2):
            varlen_attention.varlen_attention(q, q, q, where, where)
            make_deterministic()
        assert [flags["deterministic"] for flags in given] == [False, True]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_kernels_have_no_atomics():
    """--deterministic promises so."""
    texts = [file.read_text() for file in Path(ROOT, "kernels").glob("*.py")]
    assert any("tl.store" in text for text in texts) and not any("tl.atomic" in text for text in texts)
