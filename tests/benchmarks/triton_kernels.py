"""The GPU's kernels, each family against the torch operations that it stands for, forward and backward.

    PYTHONHASHSEED=0 python tests/benchmarks/triton_kernels.py [--inputs FOLDER] [--precision bf16-mixed]

Inputs are those of train.py: 64 real crystals of mp36k, and of elastic4 with their texts; states and weights
are random. Each is recorded as a CUDA graph and replayed, as in training, so that the host takes no part;
LoRA's attention, 64 texts of 512 tokens at MatSciBERT's shape, stands against flash attention in bfloat16.
Kernels that `castbench.kernels.usable` turns down are not among those "in use"; a warning says why.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from train import ARCHITECTURE, write_inputs, write_text  # finds the next

from castbench import kernels
from castbench.models import build_model
from castbench.models.bert import flash
from castbench.text.encoders import prefetch_encoder
from castbench.training.dataset import Crystals
from make_random_bert import make_random_bert

REPLAYS, ROUNDS = 20, 9
Work = Callable[[], Any]


def milliseconds(work: Work, device: torch.device) -> float:
    """Median of a replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    found = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        found.append(start.elapsed_time(end) / REPLAYS)
    return float(np.median(found))


def with_gradients(value: Callable[[], Tensor], leaves: list[Tensor]) -> Work:
    """The value and the gradients of its sum."""
    return lambda: torch.autograd.grad(value().float().sum(), leaves)


def families(inputs: Path, encoder: Path, device: torch.device, kind: torch.dtype) -> dict[str, Work]:
    """What is timed, by the names of the kernels."""
    half = torch.autocast(device.type, kind, enabled=kind is not torch.float32)
    found: dict[str, Work] = {}
    for model, folder in (("structure_only", inputs / "mp36k"), ("cast_scratch", inputs / "elastic4")):
        network = build_model(model, ARCHITECTURE, encoder).to(device)
        text = (folder / "tokens", folder / "states") if model != "structure_only" else (None, None)
        crystals = Crystals(network, folder / "graphs", *text, device)  # type: ignore[arg-type]
        rows = torch.arange(len(crystals.material_ids))[:64]
        sizes, there = crystals.sizes(rows), rows.to(device)
        batch = crystals.padded(there, sizes)
        states = torch.randn(sizes.nodes, network.structure.width, device=device, requires_grad=True)
        if model == "structure_only":

            def nodes(network: Any = network, batch: Any = batch) -> Tensor:
                with half:
                    return network.structure.nodes(batch)

            def read_out(network: Any = network, batch: Any = batch, states: Tensor = states) -> Tensor:
                return network.structure.readout(states, batch)

            found["batches"] = lambda c=crystals, r=there, s=sizes: c.padded(r, s)
            found["cogn"] = with_gradients(nodes, list(network.structure.parameters()))
            found["readout"] = with_gradients(read_out, [states])
        else:

            def fuse(network: Any = network, batch: Any = batch, states: Tensor = states) -> Tensor:
                with half:
                    return network.fusion(states, batch.token_states, batch)

            leaves = [states, *network.fusion.parameters()]
            found["attention, fusion and projection"] = with_gradients(fuse, leaves)
    return found


def own_attention(device: torch.device) -> tuple[Work, Work]:
    """LoRA's attention by the kernels, and flash attention."""
    from castbench.kernels.self_attention import attend_own

    qkv = torch.randn(64 * 512, 3 * 768, device=device, dtype=torch.bfloat16, requires_grad=True)
    offsets = (torch.arange(65, device=device) * 512).int()
    with_none = torch.cat([offsets, offsets[-1:]])  # the kernels' last text is one that pads
    return tuple(
        with_gradients(lambda attend=attend, offsets=offsets: attend(qkv, offsets, 512, 12), [qkv])
        for attend, offsets in ((attend_own, with_none), (flash, offsets))
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=Path, help="folder of inputs, made where it is absent")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="bf16-mixed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernels are for a GPU, and there is none here")
    device = torch.device("cuda")
    kind = torch.bfloat16 if options.precision == "bf16-mixed" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        inputs = options.inputs or Path(folder) / "inputs"
        if not inputs.is_dir():
            write_inputs(1024, inputs)
        encoder, bert = Path(folder) / "encoder", Path(folder) / "bert"
        make_random_bert(bert, (inputs / "vocabulary.txt").read_text().splitlines())
        prefetch_encoder(f"{bert}@random", encoder)
        if not (inputs / "elastic4" / "states").is_dir():
            write_text(inputs / "elastic4", encoder)
        ratios = []
        every = {name: (work, work) for name, work in families(inputs, encoder, device, kind).items()}
        if kernels.usable("self_attention", device, torch.bfloat16):
            every["attention of a text's own tokens, against flash attention"] = own_attention(device)
        for name, (work, other) in every.items():
            ours = milliseconds(work, device)
            with mock.patch("castbench.kernels.usable", return_value=False):
                plain = milliseconds(other, device)
            ratios.append(plain / ours)
            print(f"{name:60} {ours:7.3f} ms, {plain:7.3f} ms by operations, ratio {plain / ours:.2f}")
    files = ("batches", "cogn", "readout", "cross_attention", "self_attention", "fusion", "projection")
    print("kernels in use:", *(name for name in files if kernels.usable(name, device, kind)))
    mean = float(np.exp(np.mean(np.log(ratios))))
    print(f"ratio {mean:.2f} (geometric mean, {options.precision}, against torch operations, recorded)")


if __name__ == "__main__":
    main()
