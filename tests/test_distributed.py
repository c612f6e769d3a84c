"""What every script starts with: how long ranks wait for one another, and --deterministic."""

from pathlib import Path

import torch
from conftest import ROOT

from attention import SeqLens
from kernels import varlen_attention
from runtime.distributed import make_deterministic
from runtime.flags import PATIENCE, TIMEOUTS


def test_a_rollout_outlasts_a_judge_that_is_waited_for():
    """--judge-patience for an original, and again for its edit, on one rank; the others wait in a collective."""
    assert TIMEOUTS[1] > 2 * PATIENCE


def test_deterministic_holds_for_torch_and_for_flash_attn(monkeypatch):
    given = []

    def recording(q, k, v, *where, **flags):
        given.append(flags | {"where": where})
        return q

    monkeypatch.setattr(varlen_attention, "flash_attn_varlen_func", recording)
    monkeypatch.setattr(varlen_attention, "say_once", lambda text: None)

    class OnGPU(torch.Tensor):
        is_cuda = True

    q, where = torch.zeros(5, 2, 8, dtype=torch.bfloat16).as_subclass(OnGPU), SeqLens([5])
    last, two = q[:2], SeqLens([2])
    try:
        for _ in range(2):
            varlen_attention.varlen_attention(last, q, q, two, where)
            make_deterministic()
        assert [flags["deterministic"] for flags in given] == [False, True] and all(flags["causal"] for flags in given)
        starts, ends = ([x.tolist() for x in given[0]["where"][:2]], given[0]["where"][2:])
        assert starts == [[0, 2], [0, 5]] and ends == (2, 5)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_kernels_have_no_atomics():
    """--deterministic promises so."""
    texts = [file.read_text() for file in Path(ROOT, "kernels").glob("*.py")]
    assert any("tl.store" in text for text in texts) and not any("tl.atomic" in text for text in texts)
