"""Kernels run on a GPU where there is one, else in the interpreter, to be chosen before they are read."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
if not torch.cuda.is_available():
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        """A bound of a loop is an array of one number, which numpy 2.4 no longer takes for a number."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        """It takes the bits of a bfloat16 for a whole number."""
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
