"""Linear layers for inference: layers with a common input are joined; on a CPU, large weights are packed for oneDNN.

    linear = PackedLinear([(weight, bias), ...])
    y = linear(x)          # F.linear(x, weight, bias) of each, concatenated

In fp32 `F.linear` calls MKL, which reads a weight with one thread at batch 1 and runs at half its speed at batches of 2
to 32. Packed weights are faster. On two cores with AVX-512, at 4864 x 896:

    rows    F.linear       here
    1       14 GB/s        34 GB/s (oneDNN: 25)
    8       10 GB/s        25 GB/s
    32      96 GFLOP/s     192 GFLOP/s

One or two rows are left to MKL, as a batch of products with one part of the weight per thread. Small weights stay with
`F.linear`, whose calls cost less. In all three the order of a sum depends on the number of rows, so that results of
different batch sizes differ by rounding.
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
    """Returns a copy of weight [out, in] for `packed_linear`, or None if not fp32, too small, or without oneDNN."""
    if weight.dtype != torch.float32 or weight.numel() < WORTH_PACKING:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x fp32 [T, in], weight [out, in], packed: `pack` of it, bias [out] -> [T, out]. Not differentiable."""
    parts = torch.get_num_threads()
    if len(x) <= 2 and len(weight) % parts == 0:
        y = torch.bmm(weight.view(parts, -1, weight.shape[1]), x.t().expand(parts, -1, -1))  # [parts, out / parts, T]
        y = y.view(len(weight), -1).t().contiguous()
        return y if bias is None else y + bias
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
