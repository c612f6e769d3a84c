"""Causal attention of packed sequences (training, scoring, prefill) behind one function.

    out = varlen_attention(q, k, v, queries, keys)

On a GPU in bf16 or fp16: flash-attn where it is installed, else torch's own build of FlashAttention (varlen_attn).
In fp32 and on a CPU: torch's scaled_dot_product_attention, a segment at a time. On a GPU a line on stderr says which.
"""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

flash_attn_error = ""
try:
    from flash_attn import flash_attn_varlen_func
except (ImportError, OSError) as error:  # an optional extra: requirements-cuda.txt
    flash_attn_varlen_func = None
    if not isinstance(error, ModuleNotFoundError) or error.name != "flash_attn":  # it is there, built for another torch
        flash_attn_error = f"{type(error).__name__}: {error}"


@functools.cache
def say_once(text: str) -> None:
    """A line on stderr, from the first rank, once in a process."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def attention_used(on_tensor_cores: bool) -> str:
    """The line that says how attention of packed sequences is computed on a GPU, and why not by flash-attn."""
    if on_tensor_cores and flash_attn_varlen_func is not None:
        return "attention: flash-attn"
    name = "varlen_attn" if on_tensor_cores else "scaled_dot_product_attention, a segment at a time"
    if flash_attn_error:
        reason = f"flash-attn is installed but does not load ({flash_attn_error})"
    elif flash_attn_varlen_func is None:
        reason = "flash-attn is not installed"
    else:
        reason = "flash-attn has no fp32"
    return f"attention: torch's {name} ({reason})"


def varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Any, keys: Any) -> torch.Tensor:
    """Causal attention of each segment of the queries to the segment of the keys with the same number.

    q [Tq, Hq, D], k and v [Tk, Hkv, D], Hq a multiple of Hkv; queries, keys: `attention.SeqLens` -> [Tq, Hq, D]. A
    segment of the keys is at least as long as that of the queries. They end together: the last query sees all of it.
    """
    on_tensor_cores = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda:
        say_once(attention_used(on_tensor_cores))
    if on_tensor_cores:
        where = (queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)
        if flash_attn_varlen_func is None:
            attended = varlen_attn(q, k, v, *where, window_size=(-1, 0), enable_gqa=True)
            assert isinstance(attended, torch.Tensor)  # a tuple only where the log-sum-exp is asked for
            return attended
        # --deterministic; torch's own follows the switch by itself
        fixed_order = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(q, k, v, *where, causal=True, deterministic=fixed_order)
    if q.is_cuda:  # torch's memory-efficient kernel has no grouped heads; without it all scores would be stored
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outs = []
    segments = (x.transpose(0, 1).split(s.lengths, 1) for x, s in ((q, queries), (k, keys), (v, keys)))
    for qs, ks, vs in zip(*segments):  # [H, L, D] each
        n_queries = qs.shape[1]
        n_keys = ks.shape[1]
        mask = None
        if n_queries != n_keys:
            mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
        # with a batch dimension, without which torch materializes the scores
        batch = (qs[None], ks[None], vs[None])
        out = F.scaled_dot_product_attention(*batch, mask, is_causal=mask is None, enable_gqa=True)
        outs.append(out[0])
    return torch.cat(outs, 1).transpose(0, 1)
