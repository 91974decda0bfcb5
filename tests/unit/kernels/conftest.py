"""Kernels run in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined


@pytest.fixture(scope="session")
def device():
    """Where kernels run here."""
    pytest.importorskip("triton", reason="kernels take triton, which is not here")
    if torch.cuda.is_available():
        return torch.device("cuda")
    teach_bfloat16()
    return torch.device("cpu")


def teach_bfloat16():
    """The interpreter keeps the bits of bfloat16 as integers, multiplies those, and rounds 1.999 to 1."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    multiply = interpreter.InterpreterBuilder.create_dot

    def convert_float(values, kind, wanted, rounding):
        if (kind, wanted) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy()
        if (kind, wanted) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(values, kind, wanted, rounding)

    def create_dot(self, a, b, *rest):
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
