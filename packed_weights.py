"""Joined and packed weights for fast inference on a CPU."""

import torch

from kernels.packed_linear import PackedLinear
from lora import Linear
from model import Layer, Transformer


@torch.no_grad()
def pack_weights(model: Transformer) -> None:
    """Prepares fast inference on a CPU. Does nothing elsewhere; call it again after the weights have changed.

    In fp32, adapters are merged into the packed weights. In bf16, as on a GPU, they are applied next to the shared
    base: a merged weight would be rounded to steps of 1/256 of its size, and early updates are smaller than that.
    """
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cpu" or (model.lora and weight.dtype == torch.bfloat16):
        return

    def packed(*projections: Linear) -> PackedLinear:
        return PackedLinear([(p.merged(), p.bias) for p in projections])

    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        attention = layer.self_attn
        mlp = layer.mlp
        attention.packed_qkv = packed(attention.q_proj, attention.k_proj, attention.v_proj)
        attention.o_proj.packed = packed(attention.o_proj)
        mlp.packed_gate_up = packed(mlp.gate_proj, mlp.up_proj)
        mlp.down_proj.packed = packed(mlp.down_proj)
    if not model.scalar_head:
        model.packed_head = PackedLinear([(model.head_weight, None)])
