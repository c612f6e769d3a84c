"""Causal attention of packed sequences (training, scoring, prefill) behind one function.

    out = varlen_attention(q, k, v, queries, keys)

On a GPU in bf16 or fp16: flash-attn where it is installed, else torch's own build of FlashAttention (varlen_attn).
In fp32 and on a CPU: torch's scaled_dot_product_attention, a segment at a time. Which one it is, is said once on a GPU.
"""

import functools
import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F

flash_attn_varlen_func = flash_attn_error = None
try:
    from flash_attn import flash_attn_varlen_func
except (ImportError, OSError) as error:  # an optional extra: requirements-cuda.txt
    if not isinstance(error, ModuleNotFoundError) or error.name != "flash_attn":  # it is there, built for another torch
        flash_attn_error = f"{type(error).__name__}: {error}"
try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
except ImportError:
    varlen_attn, VARLEN_GQA = None, False


@functools.cache
def say_once(text: str) -> None:
    """A line on stderr, from the first rank, once in a process."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def attention_used(on_tensor_cores: bool) -> str:
    """The line about what computes the attention of packed sequences on a GPU, and why it is not FlashAttention."""
    if on_tensor_cores and flash_attn_varlen_func is not None:
        return "attention: flash-attn"
    if on_tensor_cores and varlen_attn is not None:
        name = "torch's varlen_attn" if VARLEN_GQA else "torch's varlen_attn, with K and V copied for each query head"
    else:
        name = "torch's scaled_dot_product_attention, a segment at a time"
    why = f"flash-attn is installed but does not load ({flash_attn_error})" if flash_attn_error else ""
    why = why or ("flash-attn is not installed" if flash_attn_varlen_func is None else "flash-attn has no fp32")
    return f"attention: {name} ({why})"


def varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Any, keys: Any) -> torch.Tensor:
    """Causal attention of each segment of the queries to the segment of the keys with the same number.

    q [Tq, Hq, D], k and v [Tk, Hkv, D], GQA by Hq = g Hkv; queries, keys: `model.SeqLens` -> [Tq, Hq, D]. A segment
    of the keys is at least as long as that of the queries: they end together, the last query sees all of it.
    """
    on_tensor_cores = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda:
        say_once(attention_used(on_tensor_cores))
    where = (queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)
    if on_tensor_cores and flash_attn_varlen_func is not None:
        # --deterministic; torch's own follows the switch by itself
        fixed_order = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(q, k, v, *where, causal=True, deterministic=fixed_order)
    if on_tensor_cores and varlen_attn is not None:
        if VARLEN_GQA:
            return varlen_attn(q, k, v, *where, window_size=(-1, 0), enable_gqa=True)
        group = q.shape[1] // k.shape[1]  # K and V that many times over
        return varlen_attn(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), *where, window_size=(-1, 0))
    out = []
    segments = (x.transpose(0, 1).split(s.lengths, 1) for x, s in ((q, queries), (k, keys), (v, keys)))
    for qs, ks, vs in zip(*segments):  # [H, L, D] each
        same, mask = qs.shape[1] == ks.shape[1], None
        if not same:
            seen = torch.ones(qs.shape[1], ks.shape[1], dtype=torch.bool, device=q.device)
            mask = seen.tril(ks.shape[1] - qs.shape[1])
        out.append(
            F.scaled_dot_product_attention(qs[None], ks[None], vs[None], mask, is_causal=same, enable_gqa=True)[0]
        )
    return torch.cat(out, 1).transpose(0, 1)
