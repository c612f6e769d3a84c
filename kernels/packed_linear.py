"""Linear layers for inference: layers with a common input are joined; on a CPU, large weights are packed for oneDNN.

    linear = PackedLinear([(weight, bias), ...])
    y = linear(x)          # F.linear(x, weight, bias) of each, concatenated

`F.linear` calls MKL in fp32, and a slow product in bf16. One thread of a Zen 4 core, 3072 x 576 (110 GFLOP/s at most):

    rows    F.linear fp32    here    F.linear bf16    here
    1       11 GB/s          22      5 GB/s           12
    8       6 GB/s           10      6 GB/s           10
    32      60 GFLOP/s       94      50 GFLOP/s       177

In fp32 one or two rows go to MKL as a batch of products, each with a part of the weight: one thread reads a single
matrix at half the memory's speed. Small weights stay with `F.linear`, whose calls cost less. In all of them the order
of a sum depends on the number of rows, so that results of different batch sizes differ by rounding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Elements of a weight. Below this, a call of oneDNN (20 microseconds) costs more than it saves.
WORTH_PACKING = 2**18


class PackedLinear:
    """x [T, in] -> [T, sum of out]. Not differentiable."""

    @torch.no_grad()
    def __init__(self, parts: list[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """parts: (weight [out, in], bias [out] or None) of each layer, which become views of one joined tensor."""
        self.weight = _join([weight for weight, _ in parts])
        biases = [bias for _, bias in parts if bias is not None]
        self.bias = _join(biases) if biases else None
        self.packed = pack(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return packed_linear(x, self.weight, self.packed, self.bias)


def _join(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parameters) == 1:
        return parameters[0]
    joined = torch.cat(list(parameters))
    for parameter, view in zip(parameters, joined.split([len(p) for p in parameters])):
        parameter.data = view
    return joined


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias)


@torch.no_grad()
def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """Returns a copy of weight [out, in] for `packed_linear`, or None if too small or not for oneDNN on this CPU."""
    if weight.device.type != "cpu" or weight.numel() < WORTH_PACKING or not torch.backends.mkldnn.is_available():
        return None
    is_bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype != torch.float32 and not is_bf16:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, in], weight [out, in], packed: `pack` of it, bias [out] -> [T, out]. Not differentiable."""
    parts = max(2, torch.get_num_threads())
    if x.dtype == torch.float32 and len(x) <= 2 and len(weight) % parts == 0:
        y = torch.bmm(weight.view(parts, -1, weight.shape[1]), x.t().expand(parts, -1, -1))  # [parts, out / parts, T]
        y = y.view(len(weight), -1).t().contiguous()
        return y if bias is None else y + bias
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
