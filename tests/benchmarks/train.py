"""A training step of coGN, CAST and the LoRA text encoder against plain loops, and the machine's ceilings.

    PYTHONHASHSEED=0 python tests/benchmarks/train.py [--device cpu] [--rounds 9] [--only cogn cast lora]

With --inputs FOLDER they are kept there, so that a machine that has neither the data nor pymatgen can read
what another made.

Real crystals of ../shared/data, batches of 64, loading included, the same batches for every alternative.
The plain loop of coGN is torch-geometric's DataLoader over a Data object a crystal, and the model as a
MessagePassing layer on concatenated states; that of LoRA is transformers' BertModel with peft, each batch
padded to its longest text. The text encoder has MatSciBERT's shape; its weights and the cached states are
random.

Alternatives run in turns, a step each; figures are medians: CPU seconds with one thread, which other jobs
disturb little, and wall seconds with more threads or on a GPU. Behind them stand, for the first batch, the
operations of all matrix products with their time at the measured matrix rate, below which no step goes in
this way, and the bytes that operations read and write with their time at the measured copy rate, below which
it goes as far as a cache holds what the next operation reads.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.attention.varlen  # registers its operators
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter
from transformers import AutoModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from castbench.graphs.packed import NODE_ARRAYS, PackedGraphs, PackedWriter  # noqa: E402
from castbench.models import build_model  # noqa: E402
from castbench.models.base import Network  # noqa: E402
from castbench.models.cogn import CUTOFF, N_BASIS  # noqa: E402
from castbench.models.elements import N_ELEMENTS, element_facts  # noqa: E402
from castbench.models.heads import Regression, dense  # noqa: E402
from castbench.packed import write_manifest  # noqa: E402
from castbench.provenance import sha256_file  # noqa: E402
from castbench.text import read_encoder  # noqa: E402
from castbench.text.encoders import prefetch_encoder  # noqa: E402
from castbench.text.tokens import PackedTokens, tokenize_text  # noqa: E402
from castbench.training import objectives  # noqa: E402
from castbench.training.dataset import Crystals  # noqa: E402
from castbench.training.loop import Trainer  # noqa: E402
from castbench.training.optimizer import MAX_GRADIENT_NORM  # noqa: E402
from castbench.training.session import make_fabric  # noqa: E402
from castbench.training.turns import take_turns  # noqa: E402
from make_random_bert import make_random_bert  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
FILES = ("elastic4", "mp36k")
BATCH, WIDTH, DEPTH, HIDDEN = 64, 128, 5, 4
RATES = {
    "learning_rate": 5e-4,
    "lora_learning_rate": 1e-4,
    "weight_decay": 1e-2,
    "warmup_steps": 0,
    "cycles": 1,
}
ARCHITECTURE: dict[str, Any] = {
    "cogn": {"width": WIDTH, "depth": DEPTH},
    "lora": {"rank": 8, "alpha": 16, "dropout": 0.05, "layers": "all"},
    "cross_attention": {
        "text": "frozen", "layers": 4, "heads": 8, "width": WIDTH, "feedforward": 512, "dropout": 0.0,
    },
}  # fmt: skip
# Operations and bytes of a step, counted when it is measured.
COUNTED = ("coGN, castbench", "coGN alone", "CAST, frozen text", "LoRA, castbench", "LoRA, padded")
LONG = ", 512 tokens"
FLOOR = dict.fromkeys([*COUNTED, f"LoRA, castbench{LONG}", f"LoRA, padded{LONG}"], (0.0, 0.0))
WARM = 40  # steps on a GPU before any is timed: all batches have been seen then, and their shapes recorded
TURN = 10  # steps in a row on a GPU, which does not wait for the host between two
Steps = Iterator[None]  # takes a training step each time it is asked


def write_crystals(name: str, n: int, folder: Path) -> None:
    """Graphs, and descriptions.parquet, of about n crystals evenly spread over a file of ../shared/data.

    Those of a file without descriptions are generated, a third of a second each.
    """
    from pymatgen.core import Element  # not needed where inputs are only read, as are the next

    from castbench.text import robocrystallographer
    from crystals import cogn_graph
    from real_crystals import sample

    robocrystallographer.prepare()
    graphs, rows = [], []
    for crystal in sample(DATA, {name: n}):
        structure, text = crystal["structure"], crystal["description"]
        lattice, positions = (np.reshape(structure[key], (-1, 3)) for key in ("lattice", "frac_coords"))
        elements = np.array([Element(symbol).Z for symbol in structure["species"]])
        graphs.append(cogn_graph(lattice, positions, elements))
        if text is None:
            with suppress(Exception):  # it has no text for a few
                text = robocrystallographer.describe(structure)
        rows.append({"material_id": crystal["material_id"], "text": text})
    with PackedWriter(folder / "graphs", {"structure_encoder": "cogn"}, "benchmark") as writer:
        writer.append([row["material_id"] for row in rows], graphs)
    pq.write_table(pa.Table.from_pylist(rows), folder / "descriptions.parquet")


def write_inputs(n: int, folder: Path) -> None:
    """Crystals of both files, and the text encoder's vocabulary."""
    for name in FILES:
        (folder / name).mkdir(parents=True)
        write_crystals(name, n, folder / name)
    shutil.copyfile(DATA / "scivocab_uncased.txt", folder / "vocabulary.txt")


class PlainBlock(MessagePassing):
    """coGN's message block on the concatenation of edge, receiver and sender."""

    def __init__(self):
        super().__init__(aggr="sum")
        sizes = [3 * WIDTH] + [WIDTH] * (1 + HIDDEN)
        layers = [
            layer for n_in, n_out in itertools.pairwise(sizes) for layer in (dense(n_in, n_out), nn.SiLU())
        ]
        self.mlp, self.update_node = nn.Sequential(*layers), dense(WIDTH, WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor, edge: Tensor, weight: Tensor) -> Tensor:
        """Node states after the messages."""
        received = self.propagate(edge_index, x=x, edge=edge, weight=weight)
        return x + functional.silu(self.update_node(received))

    def message(self, x_i: Tensor, x_j: Tensor, edge: Tensor, weight: Tensor) -> Tensor:
        """Messages of all edges."""
        return self.mlp(torch.cat([edge, x_i, x_j], dim=-1)) * weight[:, None]


class PlainCoGN(nn.Module):
    """coGN as one would write it with torch-geometric."""

    def __init__(self):
        super().__init__()
        facts = torch.from_numpy(element_facts())
        self.register_buffer("facts", facts)
        self.register_buffer("centres", torch.linspace(0, CUTOFF, N_BASIS + 1)[1:])
        self.embedding = nn.Embedding(N_ELEMENTS + 1, WIDTH)
        self.node_input, self.edge_input = dense(WIDTH + facts.shape[1], WIDTH), dense(N_BASIS, WIDTH)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(DEPTH))
        self.head = Regression(WIDTH)

    def forward(self, data: Data) -> Tensor:
        """Predictions (B,)."""
        x = self.node_input(torch.cat([self.embedding(data.z), self.facts[data.z]], dim=1))
        spacing = CUTOFF / N_BASIS
        gaussians = torch.exp((data.distance[:, None] - self.centres).square() / (-2 * spacing))
        edge = self.edge_input(gaussians)
        for block in self.blocks:
            x = block(x, data.edge_index, edge, data.weight)
        total = scatter(x * data.atoms[:, None], data.batch, dim_size=data.num_graphs)
        return self.head(total / scatter(data.atoms, data.batch, dim_size=data.num_graphs)[:, None])


def plain_data(graphs: PackedGraphs, targets: Tensor, merged: bool) -> list[Data]:
    """A Data object a crystal; `merged` keeps the weight of parallel edges, else each stands for itself."""
    found = []
    for place, y in enumerate(targets):
        graph = graphs[place]
        parallel = graph.edge_multiplicities.astype(int)
        repeats = np.ones_like(parallel) if merged else parallel
        edges = np.stack([graph.edge_source, graph.edge_target]).repeat(repeats, axis=1).astype(np.int64)
        weight = graph.edge_multiplicities if merged else np.ones(edges.shape[1], np.float32)
        z, atoms = (np.array(getattr(graph, name)) for name in NODE_ARRAYS)
        parts = {"edge_index": edges, "distance": graph.distances.repeat(repeats), "weight": np.array(weight)}
        parts |= {"z": z.astype(np.int64) - 1, "atoms": atoms}
        found.append(
            Data(**{key: torch.from_numpy(part) for key, part in parts.items()}, y=y[None], num_nodes=len(z))
        )
    return found


def shuffled(n: int, size: int) -> Iterator[Tensor]:
    """Whole batches of rows for ever, the same in the same order for every alternative."""
    batches = torch.randperm(n, generator=torch.Generator().manual_seed(0)).split(size)
    return itertools.cycle(batches[: max(n // size, 1)])


def plain_steps(network: nn.Module, loader: Any, predict: Callable[[Any], tuple[Tensor, Tensor]]) -> Steps:
    """Steps over an endless loader, as in a tutorial; `predict` gives predictions and targets of a batch."""
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=1e-4)
    network.train()
    for batch in loader:
        optimizer.zero_grad()
        loss = functional.l1_loss(*predict(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        yield


def our_steps(network: Network, crystals: Crystals, size: int = BATCH, precision: Any = "32-true") -> Steps:
    """Steps of `Trainer` on random targets; the first is not recorded on a GPU, so that it can be counted.

    The trainer is made at once, not at the first step, where `count` lets no kernel be used: it would not
    record.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # as in open_session, but for these steps alone
    torch.utils.deterministic.fill_uninitialized_memory = False
    fabric = make_fabric(crystals.device.type, precision, devices=1)
    every = torch.arange(len(crystals.material_ids))
    values = np.random.default_rng(0).normal(size=len(every))
    objective = objectives.Regression(crystals, values, every, every[:0], {"batch_size": size, "loss": "l1"})
    trainer = Trainer(network, objective, RATES, 1, 0, fabric, Path("not written"), "benchmark")
    trainer.module.train()
    trainer.rate_factor = lambda step: 1.0  # type: ignore[method-assign]
    own = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(before)

    def steps() -> Steps:
        recorder, trainer.recorder = trainer.recorder, None
        for rows in shuffled(len(every), size):
            torch.set_deterministic_debug_mode(own)
            trainer.advance(rows)
            torch.set_deterministic_debug_mode(before)
            trainer.recorder = recorder
            yield

    return steps()


def seconds_each(
    steps: dict[str, Steps], rounds: int, device: torch.device, threads: int, warm: int = WARM
) -> dict[str, float]:
    """Median seconds of a step of each, taken in turns: one step, or ten on a GPU, which runs behind."""
    clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
    warm, turn = (warm, TURN) if device.type == "cuda" else (1, 1)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        if name in FLOOR:
            FLOOR[name] = count(step)
        else:
            next(step)  # as the others, which are at the same batch then
        for _ in range(warm):
            next(step)
    for _ in range(rounds):
        for name, step in steps.items():
            wait(device)
            start = clock()
            for _ in range(turn):
                next(step)
            wait(device)
            found[name].append((clock() - start) / turn)
    return {name: float(np.median(values)) for name, values in found.items()}


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare_cogn(folder: Path, device: torch.device, rounds: int, threads: int) -> dict[str, float]:
    """Seconds of coGN's step, ours and plain ones, on crystals like the Materials Project's."""
    network = build_model("structure_only", ARCHITECTURE, None)
    crystals = Crystals(network, folder / "graphs", None, None, device)  # type: ignore[arg-type]
    targets = torch.randn(len(crystals.material_ids), device=device)
    steps = {"coGN, castbench": our_steps(network, crystals)}
    graphs = PackedGraphs.open(folder / "graphs")
    for name, merged in (("an edge a neighbour", False), ("equal edges merged", True)):
        plain = PlainCoGN().to(device)
        data = plain_data(graphs, targets.cpu(), merged)
        loader = DataLoader(data, batch_sampler=(rows.tolist() for rows in shuffled(len(data), BATCH)))

        def predict(batch: Any, plain: PlainCoGN = plain) -> tuple[Tensor, Tensor]:
            batch = batch.to(device)
            return plain(batch), batch.y

        steps[f"coGN, torch-geometric, {name}"] = plain_steps(plain, loader, predict)
    return seconds_each(steps, rounds, device, threads)


def write_text(folder: Path, encoder: Path) -> None:
    """Tokens of descriptions.parquet and random states of them, as if of the encoder's last layer."""
    settings = {"max_tokens": 512}
    tokenize_text(settings, folder / "descriptions.parquet", encoder, folder / "tokens")
    n, described = len(PackedTokens.open(folder / "tokens").token_ids), read_encoder(encoder)
    (folder / "states").mkdir()
    bits = torch.randn(n, described["hidden_size"]).bfloat16().view(torch.uint16).numpy()
    np.save(folder / "states" / "states.npy", bits)
    content = {"layer": described["layers"], "hidden_size": described["hidden_size"], "n_tokens": n}
    content["tokens"] = sha256_file(folder / "tokens" / "manifest.json")
    write_manifest(folder / "states", "embed_text", content, ["states.npy"])


def compare_cast(
    folder: Path, encoder: Path, device: torch.device, rounds: int, threads: int, precision: str
) -> dict[str, float]:
    """Seconds of the step of CAST on cached token states, and of coGN alone, on the same crystals."""
    steps = {}
    for name, model in (("coGN alone", "structure_only"), ("CAST, frozen text", "cast_scratch")):
        network = build_model(model, ARCHITECTURE, encoder)
        crystals = Crystals(network, folder / "graphs", folder / "tokens", folder / "states", device)
        steps[name] = our_steps(network, crystals, precision=precision)
    return seconds_each(steps, rounds, device, threads)


def plain_texts(folder: Path, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches of token ids, masks and targets for ever: shuffled, padded to the longest of the batch."""
    tokens = PackedTokens.open(folder / "tokens")
    for rows in shuffled(len(tokens), size):
        texts = [torch.from_numpy(tokens[row].astype(np.int64)) for row in rows.tolist()]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        yield ids, mask, torch.randn(len(rows))


class PlainText(nn.Module):
    """BertModel with LoRA on query and value, and a linear head on [CLS]."""

    def __init__(self, encoder: Path, lora: dict[str, Any]):
        super().__init__()
        sizes = {"r": lora["rank"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"]}
        bert = AutoModel.from_pretrained(
            encoder, dtype=torch.float32, hidden_dropout_prob=0, attention_probs_dropout_prob=0
        )
        self.bert = get_peft_model(bert, LoraConfig(target_modules=["query", "value"], **sizes))
        self.head = Regression(bert.config.hidden_size)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Predictions (B,)."""
        return self.head(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])


def write_long(folder: Path, short: Path, encoder: Path, words: list[str]) -> None:
    """The crystals of another folder, each with as many random words as its text may have tokens."""
    shutil.copytree(short / "graphs", folder / "graphs")
    generator = np.random.default_rng(0)
    whole = [word for word in words if word.isalpha()]
    rows = pq.read_table(short / "descriptions.parquet", columns=["material_id"]).to_pylist()
    rows = [row | {"text": " ".join(generator.choice(whole, 512))} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "descriptions.parquet")
    tokenize_text({"max_tokens": 512}, folder / "descriptions.parquet", encoder, folder / "tokens")


def compare_lora(
    folder: Path, encoder: Path, device: torch.device, rounds: int, threads: int, size: int, kind: str = ""
) -> dict[str, float]:
    """Seconds of a LoRA step on all layers, ours and the plain one; in bfloat16 on a GPU, both of them."""
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    plain = PlainText(encoder, ARCHITECTURE["lora"]).to(device)

    def predict(batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        ids, mask, y = (part.to(device) for part in batch)
        with half:
            return plain(ids, mask).float(), y

    network = build_model("text_only", ARCHITECTURE, encoder)
    crystals = Crystals(network, folder / "graphs", folder / "tokens", None, device)
    steps = our_steps(network, crystals, size, "bf16-mixed" if device.type == "cuda" else "32-true")
    return seconds_each(
        {
            f"LoRA, castbench{kind}": steps,
            f"LoRA, padded{kind}": plain_steps(plain, plain_texts(folder, size), predict),
        },
        rounds, device, threads, warm=len(crystals.material_ids) // size + 1,
    )  # fmt: skip


def compare_seeds(
    folder: Path, device: torch.device, steps: int, threads: int, seeds: int = 3
) -> dict[str, float]:
    """Seconds of a coGN step of each of three seeds, one after another and side by side."""
    clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
    found = {}
    for name, together in (("three seeds, one after another", 1), ("three seeds, side by side", seeds)):
        runs = []
        for _ in range(seeds):
            network = build_model("structure_only", ARCHITECTURE, None)
            crystals = Crystals(network, folder / "graphs", None, None, device)  # type: ignore[arg-type]
            runs.append(our_steps(network, crystals))
        take_turns(
            [itertools.islice(run, 1 if device.type == "cpu" else WARM) for run in runs], together, device
        )
        wait(device)
        start = clock()
        take_turns([itertools.islice(run, steps) for run in runs], together, device)
        wait(device)
        found[name] = (clock() - start) / steps
    return found


EMPTY = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty}
GATHERS = {torch.ops.aten.index_select, torch.ops.aten.index}


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, views excepted."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket in EMPTY:
            return found
        written = {argument.name for argument in func._schema.arguments if argument.is_out}  # `found` again
        read = args, {name: value for name, value in (kwargs or {}).items() if name not in written}
        if func.overloadpacket in GATHERS:
            read = args[1:], found  # as many rows as it returns
        for value in tree_leaves((read, found)):
            if isinstance(value, Tensor):
                self.bytes += value.nbytes
        return found


def attention_products(n: int, query: int, q_offsets: int) -> Callable[..., int]:
    """Operations of variable-length attention, which has n products for each pair of tokens of a text.

    `query` and `q_offsets` are the places of these among the arguments.
    """

    def operations(*args: Any, **_: Any) -> int:
        _, heads, size = args[query].shape
        texts = zip(*(args[q_offsets + i].diff().tolist() for i in range(2)), strict=True)
        return 2 * n * heads * size * sum(queries * keys for queries, keys in texts)

    operations._get_raw = True  # type: ignore[attr-defined]
    return operations


def as_counted(operation: Any) -> Callable[..., int]:
    """Operations as torch counts those of another one, for what is written in place or on the CPU alone."""

    def operations(*args: Any, **kwargs: Any) -> int:
        return flop_registry[operation](*args, **kwargs)

    operations._get_raw = True  # type: ignore[attr-defined]
    return operations


UNCOUNTED = {  # by torch 2.11
    torch.ops.torch_attn._varlen_attn: attention_products(2, 0, 3),
    torch.ops.torch_attn._varlen_attn_backward: attention_products(5, 1, 6),  # the scores once more
    torch.ops.aten.addmm_: as_counted(torch.ops.aten.addmm),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: as_counted(
        torch.ops.aten._scaled_dot_product_flash_attention
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: as_counted(
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


def count(step: Steps) -> tuple[float, float]:
    """Operations (multiplications and additions of matrix products) and bytes of a step.

    What is compiled runs uncompiled here, and what kernels do is done by the operations that they stand for:
    the same products, more bytes. Without the stance, torch would not compile it afterwards either.
    """
    products, traffic = FlopCounterMode(display=False, custom_mapping=UNCOUNTED), Traffic()
    one_by_one = mock.patch("castbench.kernels.usable", return_value=False)
    with torch.compiler.set_stance("force_eager"), one_by_one, products, traffic:
        next(step)
    return products.get_total_flops(), traffic.bytes


def ceilings(device: torch.device, threads: int) -> tuple[float, float]:
    """Operations a second of a large float32 product (bfloat16 on a GPU), bytes a second of a large copy."""
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)

    def forever(function: Callable[[], Any]) -> Steps:
        while True:
            function()
            yield

    steps = {"product": forever(lambda: a @ b), "copy": forever(lambda: target.copy_(source))}
    found = seconds_each(steps, 9, device, threads)
    return 2 * size**3 / found["product"], 2 * source.nbytes / found["copy"]


def main() -> None:
    """Print a table and, last, the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="alone on a machine: 1 2")
    parser.add_argument("--inputs", help="folder that keeps the inputs")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each alternative")
    parser.add_argument("--crystals", type=int, default=512, help="of each file")
    parser.add_argument("--only", nargs="+", default=["cogn", "cast", "lora", "seeds"], help="of these")
    parser.add_argument("--texts", type=int, default=8, help="a batch of LoRA's steps (a GPU: 128)")
    arguments = parser.parse_args()
    device, rounds = torch.device(arguments.device), arguments.rounds
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(arguments.inputs or scratch) / "inputs"
        if not inputs.exists():
            write_inputs(arguments.crystals, inputs)
        work = Path(shutil.copytree(inputs, Path(scratch) / "work"))
        mp36k, elastic4, long, encoder = (work / name for name in ("mp36k", "elastic4", "long", "encoder"))
        vocabulary = (work / "vocabulary.txt").read_text(encoding="utf-8").splitlines()
        make_random_bert(Path(scratch) / "bert", vocabulary)
        prefetch_encoder(f"{Path(scratch) / 'bert'}@random", encoder)
        for folder in (mp36k, elastic4):
            write_text(folder, encoder)
        last = ""
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            on = f"{device}, {threads} threads" if device.type == "cpu" else torch.cuda.get_device_name()
            limits = ceilings(device, threads)
            print(f"{on}: matrix rate {limits[0] / 1e9:.0f} Gflop/s, copy rate {limits[1] / 1e9:.1f} GB/s")
            if "cogn" in arguments.only:
                found = compare_cogn(mp36k, device, rounds, threads)
                ours, plain, merged = found.values()
                show(on, found, limits)
                print(f"ratio {plain / ours:.2f}; {merged / ours:.2f} to the plain loop on our merged edges")
                last = f"ratio {plain / ours:.2f} (coGN training steps a second, against torch-geometric)"
                print(last)
            if "cast" in arguments.only:
                precisions = ("32-true", "bf16-mixed") if device.type == "cuda" else ("32-true",)
                for folder, precision in itertools.product((mp36k, elastic4), precisions):
                    found = compare_cast(folder, encoder, device, rounds, threads, precision)
                    show(on, found, limits)
                    alone, cast = found.values()
                    last = (
                        f"ratio {alone / cast:.2f} (CAST with frozen text, steps a second, against coGN "
                        f"alone, {folder.name}, {precision})"
                    )
                    print(last)
            if "lora" in arguments.only:
                found = compare_lora(elastic4, encoder, device, rounds, threads, arguments.texts)
                show(on, found, limits)
                ours, padded = found.values()
                last = f"ratio {padded / ours:.2f} (LoRA steps a second, against padded peft)"
                print(last)
                if device.type == "cuda":
                    write_long(long, elastic4, encoder, vocabulary)
                    found = compare_lora(long, encoder, device, rounds, threads, arguments.texts, LONG)
                    show(on, found, limits)
                    ours, padded = found.values()
                    print(f"ratio {padded / ours:.2f} (the same, texts of 512 tokens)")
                    share = FLOOR[f"LoRA, castbench{LONG}"][0] / ours / limits[0]
                    print(f"share {share:.3f} of the matrix rate (LoRA, texts of 512 tokens)")
            if "seeds" in arguments.only:
                found = compare_seeds(elastic4, device, 2 * rounds, threads)
                show(on, found, limits)
                one_by_one, together = found.values()
                last = f"ratio {one_by_one / together:.2f} (steps a second, side by side against in a row)"
                print(last)


def show(on: str, found: dict[str, float], limits: tuple[float, float]) -> None:
    """Print the seconds of each alternative, and what they would be at the machine's two ceilings."""
    for name, seconds in found.items():
        line = f"{on:16} {name:45} {1e3 * seconds:9.1f} ms a step"
        if name in FLOOR:
            operations, moved = FLOOR[name]
            line += (
                f"; {operations / 1e9:.1f} Gflop in {1e3 * operations / limits[0]:.1f} ms at the matrix rate"
            )
            line += f", {moved / 1e9:.2f} GB in {1e3 * moved / limits[1]:.1f} ms at the copy rate"
        print(line, flush=True)


if __name__ == "__main__":
    main()
