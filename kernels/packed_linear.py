"""Products with weights that stay the same for many passes, on a CPU: oneDNN on weights laid out for it once.

    packed = pack(weight)                   # None where it is not worth it
    y = packed_linear(x, packed, bias)      # F.linear(x, weight, bias)

`F.linear` in fp32 goes to MKL, which reads a matrix at batch 1 with one thread and is at half its own speed at batches of 2 to
32. On two cores (AVX-512) at 4864 x 896: batch 1 14 -> 25 GB/s, batch 8 10 -> 25 GB/s, batch 32 96 -> 192 GFLOP/s. A row's result
also does not depend on how many rows there are. Small matrices stay with MKL, whose calls cost less.
"""

import torch
import torch.nn.functional as F

WORTH_PACKING = 2**18  # weights of a matrix; below, a call of oneDNN costs more (20 microseconds) than it saves


def reference(x, weight, bias=None):
    return F.linear(x, weight, bias)


@torch.no_grad()
def pack(weight):
    """weight [out, in] -> a copy for `packed_linear`; None: not fp32 on a CPU, too small, or no oneDNN in this torch."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < WORTH_PACKING:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def packed_linear(x, packed, bias=None):
    """x fp32 [T, in] -> [T, out]. Not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
