"""The gated activation of the MLP: silu(gate) * up, in one pass forward and one backward.

    hidden = swiglu(gate, up)

In bf16 and fp16 silu(gate) is rounded before the product, as in torch; gradients are rounded once.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs the torch code only
    triton = None

TILE = 1024  # elements per program


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [T, f], one dtype; rows may be strided, such as halves of one projection -> [T, f]. Differentiable."""
    assert gate.ndim == 2 and gate.shape == up.shape, (gate.shape, up.shape)
    assert gate.dtype == up.dtype, (gate.dtype, up.dtype)
    assert gate.stride(1) == 1 and up.stride(1) == 1, (gate.stride(), up.stride())
    return _SwiGLU.apply(gate, up) if gate.is_cuda and triton is not None else reference(gate, up)


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """In torch, as run on a CPU."""
    return F.silu(gate) * up


if triton is not None:

    @triton.jit
    def _forward_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, WIDTH: tl.constexpr, TILE: tl.constexpr):
        """Program (row, tile of columns)."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = column < WIDTH
        g = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0)
        u = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = g.to(tl.float32)
        silu = (x * tl.sigmoid(x)).to(g.dtype).to(tl.float32)
        tl.store(out_ptr + row * WIDTH + column, (silu * u).to(g.dtype), mask=mask)

    @triton.jit
    def _backward_kernel(
        grad_ptr,
        gate_ptr,
        up_ptr,
        grad_gate_ptr,
        grad_up_ptr,
        gate_stride,
        up_stride,
        WIDTH: tl.constexpr,
        TILE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = column < WIDTH
        dy = tl.load(grad_ptr + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        # d silu(g) / dg = s + g s (1 - s)
        dtype = grad_gate_ptr.dtype.element_ty
        tl.store(grad_gate_ptr + row * WIDTH + column, (dy * u * (s + g * s * (1 - s))).to(dtype), mask=mask)
        tl.store(grad_up_ptr + row * WIDTH + column, (dy * g * s).to(dtype), mask=mask)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        n_rows, width = gate.shape
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if out.numel():
            _forward_kernel[n_rows, triton.cdiv(width, TILE)](gate, up, out, gate.stride(0), up.stride(0), width, TILE)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        n_rows, width = gate.shape
        grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        if grad.numel():
            _backward_kernel[n_rows, triton.cdiv(width, TILE)](
                grad.contiguous(), gate, up, grad_gate, grad_up, gate.stride(0), up.stride(0), width, TILE
            )
        return grad_gate, grad_up
