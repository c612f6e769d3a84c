"""Products with weights that do not change for many passes, on a CPU: matrices that are applied to the same input are
joined, and large ones are packed for oneDNN once.

    linear = PackedLinear([(weight, bias), ...])
    y = linear(x)          # F.linear(x, weight, bias) of each, concatenated

`F.linear` in fp32 calls MKL, which reads a matrix with one thread at batch 1 and runs at half its speed at batches of 2
to 32. On two cores (AVX-512) at 4864 x 896, packed weights are faster: batch 8 10 -> 25 GB/s, batch 32 96 -> 192
GFLOP/s. One or two rows are left to MKL, as a batch of products with parts of the matrix, one per thread: 14 -> 34 GB/s
(oneDNN: 25). Small matrices stay with MKL unchanged, since its calls cost less.
"""

import torch
import torch.nn.functional as F

WORTH_PACKING = (
    2**18
)  # weights of a matrix; for smaller ones a call of oneDNN (20 microseconds) costs more than it saves


class PackedLinear:
    """x [T, in] -> [T, sum of out]. Not differentiable."""

    @torch.no_grad()
    def __init__(self, parts: list[tuple[torch.nn.Parameter, torch.nn.Parameter | None]]) -> None:
        """parts: (weight [out, in], bias [out] or None) each. The parameters of several become views of one tensor."""
        self.weight, self.bias = (_joined(tensors) for tensors in zip(*parts))
        self.packed = pack(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return packed_linear(x, self.weight, self.packed, self.bias)


def _joined(parameters):
    if parameters[0] is None or len(parameters) == 1:
        return parameters[0]
    joined = torch.cat(parameters)
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters])):
        parameter.data = part
    return joined


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias)


@torch.no_grad()
def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """weight [out, in] -> a copy for `packed_linear`; None: not fp32, too small, or no oneDNN in this torch."""
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
