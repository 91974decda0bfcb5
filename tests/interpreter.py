"""Triton's interpreter, which runs the kernels where there is no GPU; import before any of them."""

import os
from dataclasses import replace
from importlib.util import find_spec

import torch

AVAILABLE = find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined


def mend():
    """Let it multiply and round bfloat16, of which it takes the bits, and take arrays as bounds of loops.

    And let it run Triton's own functions where they were defined before, as torch's compiler has them, and
    take products of float32 by three of bfloat16 for float32 ones.
    """
    from triton import language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    for module in (tl, tl.standard):
        for name, member in list(vars(module).items()):
            if isinstance(member, JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(member.fn))
    patch, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    multiply = interpreter.InterpreterBuilder.create_dot

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_float(values, kind, wanted, rounding):
        if (kind, wanted) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy()
        if (kind, wanted) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(values, kind, wanted, rounding)

    def create_dot(self, a, b, *rest):
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    builder = interpreter.interpreter_builder
    precisions = (*builder.options.allowed_dot_input_precisions, "bf16x3")
    builder.options = replace(builder.options, allowed_dot_input_precisions=precisions)
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


if AVAILABLE and DEVICE.type == "cpu":
    mend()
