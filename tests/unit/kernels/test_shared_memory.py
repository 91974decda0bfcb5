"""Kernels compiled for GPUs that are not here: what they take of shared memory."""

import os
import subprocess
import sys

SMALL = 101_376  # bytes that a program may have on sm_86, 89 and 120
COMPILE = """
import sys
from types import SimpleNamespace
from unittest import mock
import torch
import triton
from triton.backends.compiler import GPUTarget
from castbench.kernels import cogn

D, K, L = 128, 32, 4
IDS, PARTS, FLOAT = "*i64", "*bf16", "*fp32"
KERNELS = {
    "_edges_forward": (cogn.OF_EDGES, {"source": IDS, "target": IDS, "entry": PARTS, "hidden": PARTS}),
    "_edges_backward": (cogn.OF_EDGES, {"target": IDS, "hidden": PARTS}),
    "_nodes_forward": (cogn.OF_NODES, {"starts": IDS, "update": PARTS, "first": PARTS}),
}
SIZES = {"K": K, "D": D, "L": L, "STEP": 20 * D * D, "PARTS": 3, "RECEIVES": True, "PROJECTS": True}
like = SimpleNamespace(is_cuda=True, device=None, dtype=torch.float32)
for name, (settings, kinds) in KERNELS.items():
    kernel = getattr(cogn, name)
    with mock.patch.object(cogn, "shared_memory", lambda _: int(sys.argv[1])):
        settings = cogn._staged(settings, like)
    options = {name: settings[name] for name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in (SIZES | settings).items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else "i32" if name.startswith("n_") else kinds.get(name, FLOAT)
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    print(triton.compile(source, target=GPUTarget("cuda", 86, 32), options=options).metadata.shared)
"""


def test_cogn_fits_in_float32_on_a_gpu_with_little():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COMPILE, str(SMALL)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = [int(size) for size in run.stdout.split()]
    assert len(found) == 3 and min(found) > 0 and max(found) <= SMALL
