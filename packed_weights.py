"""Joined and packed weights for fast inference."""

import torch

from kernels.packed_linear import PackedLinear
from lora import Linear
from model import Layer, Transformer


@torch.no_grad()
def pack_weights(model: Transformer) -> None:
    """Prepares fast inference; call it again after the weights have changed.

    Projections with a common input become views of one weight, and one product. On a CPU weights are also packed. Then
    adapters are merged into them in fp32. In bf16, as on a GPU, adapters are applied next to the shared base: a merged
    weight would be rounded to steps of 1/256 of its size, and early updates are smaller than that.
    """
    weight = model.model.embed_tokens.weight
    on_cpu = weight.device.type == "cpu"
    if model.lora and (weight.dtype == torch.bfloat16 or not on_cpu):
        return

    def packed(*projections: Linear) -> PackedLinear:
        return PackedLinear([(p.merged(), p.bias) for p in projections])

    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        attention = layer.self_attn
        mlp = layer.mlp
        if not on_cpu and attention.packed_qkv is not None:
            return  # new weights were written into the joined ones, whose addresses CUDA graphs hold
        attention.packed_qkv = packed(attention.q_proj, attention.k_proj, attention.v_proj)
        mlp.packed_gate_up = packed(mlp.gate_proj, mlp.up_proj)
        if on_cpu:
            attention.o_proj.packed = packed(attention.o_proj)
            mlp.down_proj.packed = packed(mlp.down_proj)
    if on_cpu and not model.scalar_head:
        model.packed_head = PackedLinear([(model.head_weight, None)])
