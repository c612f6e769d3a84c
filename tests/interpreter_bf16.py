"""Imported where Triton interprets: its bf16 is not that of a GPU. It cuts bits off instead of rounding, and a product
of two bf16 tiles is one of their bit patterns. Here both are as on a GPU: rounded to nearest, widened before a product.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert_float, _create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def convert_float(x, source, target, rounding):
    if (source, target) == (tl.bfloat16, tl.float32):
        return (x.astype(np.uint32) << 16).view(np.float32)
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16()  # to the nearest, ties to even
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert_float(x, source, target, rounding)


def create_dot(self, a, b, *rest):
    wide = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _create_dot(self, *wide, *rest)


interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, create_dot
