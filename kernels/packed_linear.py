"""Products with weights that stay the same for many passes, on a CPU: matrices that are used together as one, and those
that are large laid out for oneDNN, once.

    product = Product([(weight, bias), ...])
    y = product(x)          # F.linear(x, weight, bias) of each, side by side

`F.linear` in fp32 goes to MKL, which reads a matrix at batch 1 with one thread and is at half its own speed at batches
of 2 to 32. On two cores (AVX-512) at 4864 x 896: batch 8 10 -> 25 GB/s, batch 32 96 -> 192 GFLOP/s. One or two rows are
left to MKL, as products of the parts of the matrix, which it gives to one thread each: 14 -> 34 GB/s (oneDNN: 25).
Small matrices stay with MKL as they are: its calls cost less.
"""

import torch
import torch.nn.functional as F

WORTH_PACKING = 2**18  # weights of a matrix; below, a call of oneDNN costs more (20 microseconds) than it saves


class Product:
    """x [T, in] -> [T, sum of out]. Not differentiable."""

    @torch.no_grad()
    def __init__(self, parts):
        """parts: (weight [out, in], bias [out] or None) each. Of several, the parameters become views of one tensor."""
        self.weight, self.bias = (_joined(tensors) for tensors in zip(*parts))
        self.packed = pack(self.weight)

    def __call__(self, x):
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


def reference(x, weight, bias=None):
    return F.linear(x, weight, bias)


@torch.no_grad()
def pack(weight):
    """weight [out, in] -> a copy for `packed_linear`; None: not fp32, too small, or no oneDNN in this torch."""
    if weight.dtype != torch.float32 or weight.numel() < WORTH_PACKING:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def packed_linear(x, weight, packed, bias=None):
    """x fp32 [T, in], weight [out, in], packed: `pack` of it, bias [out] -> [T, out]. Not differentiable."""
    parts = torch.get_num_threads()
    if len(x) <= 2 and len(weight) % parts == 0:
        y = torch.bmm(weight.view(parts, -1, weight.shape[1]), x.t().expand(parts, -1, -1))  # [parts, out / parts, T]
        y = y.view(len(weight), -1).t().contiguous()
        return y if bias is None else y + bias
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
