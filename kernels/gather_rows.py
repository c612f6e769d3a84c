"""Rows of a matrix by index, with gradients summed in fp32.

y = gather_rows(x, index)
"""

import torch


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index] for x [N, d] and int64 index [M] -> [M, d]. Gradients of a row that occurs often are summed in fp32."""
    return _GatherRows.apply(x, index)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.n_rows = x.shape[0]
        return x[index]

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        acc_dtype = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.n_rows, grad.shape[1], dtype=acc_dtype, device=grad.device)
        return total.index_add_(0, index, grad.to(acc_dtype)).to(grad.dtype), None
