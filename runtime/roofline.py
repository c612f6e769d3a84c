"""Roofline model of an RL step: what its passes compute and read, over the rates of a device.

A pass takes the longer of two times: floating-point operations over the rate of matrix products, and bytes read over
the memory's bandwidth. A step of decoding reads the weights once, and the keys and values of all running sequences.
bench/simulate.py adds them up over the schedule of a step.
"""

from dataclasses import dataclass

import torch

from engine.cache_size import kv_bytes_per_token
from model import Transformer
from model_config import Config
from runtime.distributed import Ranks
from runtime.packing import Batch

# Dense bf16 TFLOP/s and memory TB/s from data sheets (SXM where there are several), by a part of the device's name.
# The longer of two names comes first.
PEAKS = {
    "H100 PCIe": (756, 2.0),
    "H100": (989, 3.35),
    "H200": (989, 4.8),
    "H800": (989, 3.35),
    "A100": (312, 2.04),
    "A800": (312, 2.04),
    "L40S": (362, 0.864),
}


@dataclass
class Rates:
    """Rates that programs reach on a device."""

    flops: float  # FLOP/s of matrix products
    bandwidth: float  # bytes/s read from memory
    itemsize: int  # bytes of a weight, a key or a value


def matrices(config: Config) -> tuple[int, int]:
    """Number of weights in the matrices of all layers, and in the LM head."""
    d = config.hidden_size
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    layer = 2 * d * d_q + 2 * d * d_kv + 3 * d * config.intermediate_size
    return config.num_hidden_layers * layer, d * config.vocab_size


def attention_flops(config: Config, n_pairs: float) -> float:
    """FLOPs of a forward pass's attention over so many pairs of a query and a key that it attends to."""
    return 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * n_pairs


def pass_flops(config: Config, n_tokens: float, n_pairs: float, n_logits: float, scalar_head: bool = False) -> float:
    """FLOPs of a packed forward pass: two per weight and token, and attention. n_logits: positions of the head."""
    body, lm_head = matrices(config)
    head = config.hidden_size if scalar_head else lm_head
    return 2 * body * n_tokens + attention_flops(config, n_pairs) + 2 * head * n_logits


def forward_flops(model: Transformer, batch: Batch) -> float:
    """FLOPs of a forward pass over a batch."""
    n_pairs = batch.context.attention_pairs
    return pass_flops(model.config, len(batch.input_ids), n_pairs, len(batch.index), model.scalar_head)


def update_flops(model: Transformer, batch: Batch) -> float:
    """FLOPs of forward and backward. The backward pass costs two forward passes, or one where weights are frozen."""
    return (2 if model.lora else 3) * forward_flops(model, batch)


def peak_flops(ranks: Ranks, tflops: float | None) -> float | None:
    """Peak FLOP/s of one device in the compute dtype: --peak-tflops, else from PEAKS, else None. Nothing is guessed."""
    if tflops is not None:
        return tflops * 1e12
    if ranks.device.type != "cuda" or ranks.dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(ranks.device)
    return next((tflops * 1e12 for part, (tflops, _) in PEAKS.items() if part in name), None)


def forward_seconds(config: Config, n_tokens: float, context: float, n_logits: float, rates: Rates) -> float:
    """Seconds of a packed forward pass. context: tokens that a token attends to, on average."""
    return pass_flops(config, n_tokens, n_tokens * context, n_logits) / rates.flops


def decode_seconds(
    config: Config, n_responses: float, length: float, context: float, max_batch: int, rates: Rates
) -> float:
    """Seconds to decode responses of one length, max_batch at once. context: tokens that one attends to, on average."""
    if n_responses == 0:
        return 0.0
    body, head = matrices(config)
    batch = min(n_responses, max_batch)
    kv_bytes = kv_bytes_per_token(config, rates.itemsize)
    bytes_read = (body + head) * rates.itemsize + batch * context * kv_bytes
    flops = batch * (2 * (body + head) + attention_flops(config, context))
    return length * n_responses / batch * max(bytes_read / rates.bandwidth, flops / rates.flops)
