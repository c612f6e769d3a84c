"""RMSNorm, and RMSNorm of a residual sum, in one pass over each row, forward and backward.

    y = rms_norm(x, weight, eps)
    y, residual = add_rms_norm(x, residual, weight, eps)

bf16 and fp16 are rounded as in torch: `x + residual` is rounded, then read back as fp32; mean square, scaling and the
product with the weight are fp32, and the result is rounded once.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs the torch code only
    triton = None

MAX_WIDTH = 32768  # elements per row; one program holds a whole row


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [T, d], weight [d], one dtype -> [T, d].

    Differentiable in x and weight.
    """
    _check(x, None, weight)
    return (_RMSNorm.apply if x.is_cuda and triton is not None else reference)(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [T, d], weight [d], one dtype -> (rms_norm(x + residual), x + residual). Differentiable in all."""
    _check(x, residual, weight)
    return (_RMSNorm.apply if x.is_cuda and triton is not None else reference)(x, residual, weight, eps)


def reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference in torch, used on CPUs. With residual None the sum is x itself."""
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def _check(x, residual, weight):
    assert x.ndim == 2 and weight.shape == x.shape[1:] and x.shape[1] <= MAX_WIDTH, (x.shape, weight.shape)
    assert x.dtype == weight.dtype and x.stride(1) == 1 and weight.is_contiguous(), (x.dtype, weight.dtype, x.stride())
    if residual is not None:
        assert residual.shape == x.shape and residual.dtype == x.dtype, (residual.shape, residual.dtype, x.dtype)
        assert residual.stride(1) == 1, residual.stride()


if triton is not None:

    @triton.jit
    def _forward_kernel(
        x_ptr,
        residual_ptr,
        weight_ptr,
        out_ptr,
        total_ptr,
        rstd_ptr,
        x_stride,
        residual_stride,
        eps,
        D: tl.constexpr,
        TILE: tl.constexpr,
        ADD: tl.constexpr,
    ):
        """One program per row."""
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, TILE)
        mask = d < D
        value = tl.load(x_ptr + row * x_stride + d, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(residual_ptr + row * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
            rounded = value.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * D + d, rounded, mask=mask)
            value = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
        tl.store(rstd_ptr + row, scale)
        w = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * D + d, (value * scale * w).to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_kernel(
        grad_out_ptr,
        grad_total_ptr,
        total_ptr,
        weight_ptr,
        rstd_ptr,
        grad_x_ptr,
        grad_weight_ptr,
        total_stride,
        n_rows,
        D: tl.constexpr,
        TILE: tl.constexpr,
        ADD: tl.constexpr,
    ):
        """Program p: dx of rows p, p + programs, ... and the sum of their dW, written to row p of grad_weight."""
        program = tl.program_id(0).to(tl.int64)
        programs = tl.num_programs(0)
        d = tl.arange(0, TILE)
        mask = d < D
        w = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
        grad_w = tl.zeros([TILE], tl.float32)
        for i in range(tl.cdiv(n_rows - tl.program_id(0), programs)):
            row = program + i * programs
            scale = tl.load(rstd_ptr + row)
            normed = tl.load(total_ptr + row * total_stride + d, mask=mask, other=0.0).to(tl.float32) * scale
            grad = tl.load(grad_out_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
            grad_w += grad * normed
            grad *= w
            grad = (grad - normed * (tl.sum(grad * normed, 0) / D)) * scale
            if ADD:
                grad += tl.load(grad_total_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_x_ptr + row * D + d, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_weight_ptr + program * D + d, grad_w, mask=mask)


def _launch_options(width):
    tile = triton.next_power_of_2(width)
    return dict(D=width, TILE=tile, num_warps=min(16, max(1, tile // 512)))


class _RMSNorm(torch.autograd.Function):
    """(x, residual or None, weight, eps) -> (normed, sum); without a residual the sum is x itself."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        n_rows, width = x.shape
        add = residual is not None
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = torch.empty_like(out) if add else x
        rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
        if n_rows:
            _forward_kernel[n_rows,](
                x,
                residual if add else x,
                weight,
                out,
                total,
                rstd,
                x.stride(0),
                residual.stride(0) if add else 0,
                eps,
                ADD=add,
                **_launch_options(width),
            )
        ctx.save_for_backward(total, weight, rstd)
        ctx.add = add
        ctx.set_materialize_grads(False)
        return out, total if add else None

    @staticmethod
    def backward(ctx, grad_out, grad_total):
        total, weight, rstd = ctx.saved_tensors
        if grad_out is None:  # only the sum was used
            return grad_total, grad_total, None, None
        n_rows, width = total.shape
        add = grad_total is not None
        grad_out = grad_out.contiguous()
        grad_total = grad_total.contiguous() if add else grad_out
        grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
        options = _launch_options(width)
        # some 16 warps a multiprocessor: narrow rows, as of Qwen3's heads, have one warp a program
        programs = min(n_rows, 2 * _processors(total.device) * max(1, 8 // options["num_warps"]))
        partial = torch.empty(programs, width, dtype=torch.float32, device=total.device)
        if n_rows:
            _backward_kernel[programs,](
                grad_out, grad_total, total, weight, rstd, grad_x, partial, total.stride(0), n_rows, ADD=add, **options
            )
        return grad_x, grad_x if ctx.add else None, partial.sum(0).to(weight.dtype), None


def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
