"""Batches by index arithmetic on packed arrays: no Python work for a single crystal.

Where the arrays are: on the CPU they stay memory-mapped, since the page cache is all the copy that they need.
On a GPU an array moves there once if it takes at most half of the memory that is free then (graphs always,
token states of small sets); of a larger one, the values of a batch are gathered on the host and sent.

Where all arrays are on the GPU a batch can be made there, in one of few shapes, and without the host having
to wait: what it takes to record a training step and replay it (recorder.py).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from castbench import kernels
from castbench.errors import InputError
from castbench.graphs.packed import PackedGraphs
from castbench.models.base import Network
from castbench.models.batch import ABSENT, Batch, Sizes, Texts, different_texts
from castbench.provenance import sha256_file
from castbench.text.states import PackedStates
from castbench.text.tokens import PackedTokens
from castbench.training.padding import Graphs, padded_graphs, padded_tokens

SHARE_OF_FREE_MEMORY = 0.5
EDGES_PER_NODE = 10  # of a padded batch; of real crystals there are mostly more


class Ragged:
    """Arrays of one ragged shape: crystal g has the values offsets[g]:offsets[g + 1] of each.

    Behind the G crystals stands one that has none.
    """

    def __init__(self, offsets: np.ndarray, device: torch.device, **arrays: np.ndarray):
        self.device = device
        offsets = np.append(offsets, offsets[-1])
        self.offsets = torch.from_numpy(offsets)  # on the host: sizes are known without waiting for a GPU
        self.counts = np.diff(offsets)
        self.arrays = {name: _place(_tensor(array), device) for name, array in arrays.items()}

    @cached_property
    def offsets_there(self) -> Tensor:
        """The offsets on the device."""
        return self.offsets.to(self.device)

    def lengths(self, rows: Tensor) -> np.ndarray:
        """Number of values (B,) of the crystals `rows` (B,), on the host."""
        return self.counts[rows.numpy()]

    def own_offsets(self, rows: Tensor) -> Tensor:
        """Offsets (B + 1,) of the crystals `rows` (B,) among one another, on the host."""
        return functional.pad((self.offsets[rows + 1] - self.offsets[rows]).cumsum(0), (1, 0))

    def take(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Offsets (B + 1,) and values of the crystals `rows` (B,), given on the host, in this order."""
        starts, offsets = self.offsets[rows], self.own_offsets(rows)
        lengths = offsets.diff()
        total = int(offsets[-1])
        places: dict[torch.device, Tensor] = {}  # of the values, once for each device that holds some
        for device in {array.device for array in self.arrays.values()}:
            shift, repeats = (part.to(device, non_blocking=True) for part in (starts - offsets[:-1], lengths))
            places[device] = torch.repeat_interleave(shift, repeats, output_size=total)
            places[device] += torch.arange(total, device=device)
        values = {
            name: array.index_select(0, places[array.device]).to(self.device)
            for name, array in self.arrays.items()
        }
        return offsets.to(self.device, non_blocking=True), values


class Crystals:
    """The caches that a model needs, as a source of batches. A row is a crystal's place in materials.parquet.

    Attributes:
        material_ids: (G,), of every row.
        has_graph: (G,) bool. Crystals without a graph are in no batch, also of a model that reads no graph:
            all models are compared on the same crystals.
        has_text: (G,) bool, None for a model that reads no text.
        cls_id: token that every text begins with, None likewise.
        checksums: SHA-256 of the manifests of the caches that are read, which hold those of the files.

    Raises:
        InputError: a cache is missing, damaged, or of other materials than the graphs.
    """

    def __init__(
        self, network: Network, graphs: Path, tokens: Path, states: Path | None, device: torch.device
    ):
        self.device, self.takes_padded = device, network.takes_padded
        self.encoder_takes_padded = network.structure is not None and network.structure.takes_padded
        packed = PackedGraphs.open(graphs)
        index = packed.index()
        self.material_ids: list[str] = index["material_id"].to_pylist()
        self.has_graph = np.array(index["status"].to_pylist()) == "ok"
        self.has_text: np.ndarray | None = None
        self.cls_id: int | None = None
        self.checksums: dict[str, str | None] = {"graphs": _checksum(graphs), "tokens": None, "states": None}
        self.nodes: Ragged | None = None
        self.edges: Ragged | None = None
        self.tokens: Ragged | None = None
        self.cls_states: Tensor | None = None  # in the place of tokens, for a model that reads [CLS] alone,
        self.cls_places: Tensor  # (G,), and the row of each crystal's among them
        if "graph" in network.needs:
            nodes = {name: getattr(packed, name) for name in ("atomic_numbers", "multiplicities")}
            made_for = packed.manifest["settings"]["structure_encoder"]
            if made_for != network.structure_encoder:
                raise InputError(
                    f"{graphs}: graphs for {made_for}, and the model reads those for "
                    f"{network.structure_encoder}; build the graphs again"
                )
            self.nodes = Ragged(packed.node_offsets, device, **nodes)
            self.edges = Ragged(packed.edge_offsets, device, **packed.edge_arrays)
        self.text_ids: Tensor | None = None
        if network.text_mode != "none":
            packed_tokens = self._open_text(tokens, states, network)
            if network.text_mode == "lora":  # equal texts of a batch are encoded once
                self.text_ids = torch.from_numpy(packed_tokens.text_ids())
                # The more layers read a token, the fewer may pad, and the more sizes there are.
                self.token_sizes = min(4 * (network.text.n_layers - network.text.start_layer), 16)

    def _open_text(self, tokens: Path, states: Path | None, network: Network) -> PackedTokens:
        packed = PackedTokens.open(tokens)
        index = packed.index()
        if index["material_id"].to_pylist() != self.material_ids:
            raise InputError(f"{tokens}: other crystals than the graphs have; make both caches again")
        self.has_text = index["has_text"].to_numpy()
        self.cls_id = int(packed.token_ids[0])
        self.checksums["tokens"] = _checksum(tokens)
        arrays, layer = {"token_ids": packed.token_ids}, network.text_layer
        if layer is not None:
            if states is None:
                raise InputError(
                    "states: the model reads cached token states; give their folder with --states"
                )
            cached = PackedStates.open(states, tokens)
            if cached.manifest["layer"] != layer:
                raise InputError(
                    f"{states}: states after {cached.manifest['layer']} layers, and the model reads those "
                    f"after {layer}; run embed_text for it"
                )
            arrays = {"token_states": cached.states}
            self.checksums["states"] = _checksum(states)
        if "cls_states" in network.needs:
            places, values = packed.token_offsets[:-1], cached.states
            if self.device.type == "cuda":  # the others stay where they are
                places, values = np.arange(len(places)), values[places]
            self.cls_places, self.cls_states = (_tensor(part).to(self.device) for part in (places, values))
        else:
            self.tokens = Ragged(packed.token_offsets, self.device, **arrays)
        return packed

    def rows(self, material_ids: Iterable[str]) -> tuple[Tensor, int]:
        """Rows (n,) of those crystals that have a graph, and the number of those that have none.

        Raises:
            InputError: a crystal is not in the caches.
        """
        places = {material_id: row for row, material_id in enumerate(self.material_ids)}
        try:
            rows = np.array([places[material_id] for material_id in material_ids], dtype=np.int64)
        except KeyError as error:
            raise InputError(
                f"{error.args[0]}: in the split but not in the graphs; build the graphs again"
            ) from None
        kept = rows[self.has_graph[rows]]
        return torch.from_numpy(kept), len(rows) - len(kept)

    def n_without_text(self, rows: Tensor) -> int | None:
        """How many of `rows` have no description; None for a model that reads none."""
        return None if self.has_text is None else int((~self.has_text[rows.numpy()]).sum())

    def ids(self, rows: Tensor) -> list[str]:
        """Material ids of rows."""
        return [self.material_ids[row] for row in rows.tolist()]

    def batch(self, rows: Tensor) -> Batch:
        """The crystals `rows` (B,), with the parts that the model needs."""
        batch = Batch(n=len(rows))
        if self.nodes is not None and self.edges is not None:
            batch.node_offsets, nodes = self.nodes.take(rows)
            batch.atomic_numbers = nodes["atomic_numbers"].long()
            batch.multiplicities = nodes["multiplicities"]
            edge_offsets, edges = self.edges.take(rows)
            first = torch.repeat_interleave(
                batch.node_offsets[:-1], edge_offsets.diff(), output_size=len(edges["distances"])
            )
            batch.edge_source = first + edges["edge_source"]
            batch.edge_target = first + edges["edge_target"]
            for name in edges.keys() - {"edge_source", "edge_target", "edge_reverse"}:
                setattr(batch, name, edges[name])
            if "edge_reverse" in edges:
                first = torch.repeat_interleave(
                    edge_offsets[:-1], edge_offsets.diff(), output_size=len(first)
                )
                batch.edge_reverse = first + edges["edge_reverse"]
        self._add_text(batch, rows)
        return batch

    def _add_text(self, batch: Batch, rows: Tensor) -> None:
        if self.tokens is not None:
            batch.token_offsets, tokens = self.tokens.take(rows)
            if "token_ids" in tokens:
                batch.token_ids = tokens["token_ids"].long()
            else:
                batch.token_states = tokens["token_states"]
            if self.text_ids is not None:
                texts = different_texts(self.tokens.own_offsets(rows), self.text_ids[rows])
                batch.texts = texts.to(self.device)
        if self.cls_states is not None:
            batch.cls_states = self._states_of_cls(rows.to(self.device, non_blocking=True))

    def _states_of_cls(self, rows: Tensor) -> Tensor:
        """Those (B, d) of the crystals `rows` (B,), given on the device."""
        assert self.cls_states is not None
        return self.cls_states.index_select(0, self.cls_places[rows])

    @property
    def pads(self) -> bool:
        """Whether batches are padded: for a network that can, on a GPU that holds all they are made of.

        And that has the kernels by which LoRA's texts attend, in any precision.
        """
        if not self.takes_padded or not _on_gpu(self.nodes, self.edges, self.tokens):
            return False
        if self.text_ids is None:
            return True
        names, kinds = ("self_attention", "cross_attention"), (torch.float32, torch.bfloat16)
        return all(kernels.usable(*each) for each in product(names, (self.device,), kinds))

    @property
    def pads_graphs(self) -> bool:
        """Whether graphs alone can be made as in a padded batch."""
        return self.encoder_takes_padded and _on_gpu(self.nodes, self.edges)

    def unpadded(self, rows: Tensor) -> Batch:
        """The crystals `rows` (B,), for a step that is not recorded.

        Where graphs can be padded, it has the form of a padded batch, which the GPU's kernels read, and the
        crystal that pads is empty.
        """
        if not self.pads_graphs:
            return self.batch(rows)
        assert self.nodes is not None and self.edges is not None
        nodes, edges = self.nodes.lengths(rows), self.edges.lengths(rows)
        tokens = np.zeros(1, np.int64) if self.tokens is None else self.tokens.lengths(rows)
        n_nodes, n_edges, n_tokens = (int(lengths.sum()) for lengths in (nodes, edges, tokens))
        most = int(nodes.max(initial=0)), int(tokens.max(initial=0))
        sizes = Sizes(len(rows), n_nodes, n_edges, n_tokens, *most)
        batch, there = Batch(len(rows), sizes=sizes), rows.to(self.device, non_blocking=True)
        for name, part in padded_graphs(self._graphs, there, sizes.nodes, sizes.edges).items():
            setattr(batch, name, part)
        self._add_text(batch, rows)
        if self.tokens is not None:
            batch.token_offsets = torch.cat([batch.token_offsets, batch.token_offsets[-1:]])
        return batch

    def texts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Where equal texts are encoded once, those of a padded batch of the crystals `rows` (B,); else none.

        On the host: for each of B texts, the shorter ones first, a row that has it, and for each crystal its
        text. Texts that are not needed are empty.
        """
        if self.text_ids is None or self.tokens is None:
            return ()
        texts = different_texts(self.tokens.own_offsets(rows), self.text_ids[rows])
        empty = len(rows) - len(texts.first)
        none = len(self.material_ids)
        return functional.pad(rows[texts.first], (empty, 0), value=none), texts.of + empty

    def sizes(self, rows: Tensor, *texts: Tensor) -> Sizes:
        """Sizes of a padded batch of the crystals `rows` (B,), on the host: few, since each is recorded.

        Nodes are as many as go with the edges, or more. Of tokens of LoRA's `texts`, none have to pad.
        """
        found = {}
        if self.nodes is not None and self.edges is not None:
            nodes, edges = (int(ragged.lengths(rows).sum()) for ragged in (self.nodes, self.edges))
            found["edges"] = _above(max(edges, EDGES_PER_NODE * nodes))
            found["nodes"] = 8 * math.ceil((found["edges"] / EDGES_PER_NODE + 1) / 8)
        if self.tokens is not None and texts:
            found["tokens"] = _from(int(self.tokens.lengths(texts[0]).sum()), self.token_sizes)
        elif self.tokens is not None:
            lengths = self.tokens.lengths(rows)
            found["tokens"] = _above(int(lengths.sum()))
            found["most_tokens"] = 1 << int(lengths.max() - 1).bit_length()
            if self.nodes is not None:
                found["most_nodes"] = max(1 << int(self.nodes.lengths(rows).max() - 1).bit_length(), 16)
        return Sizes(len(rows), **found)

    @cached_property
    def _graphs(self) -> Graphs:
        """The graphs that padded batches are made of."""
        assert self.nodes is not None and self.edges is not None
        offsets = self.nodes.offsets_there, self.edges.offsets_there
        return Graphs.of(*offsets, self.nodes.arrays, self.edges.arrays)

    def padded(self, rows: Tensor, sizes: Sizes, *texts: Tensor) -> Batch:
        """The crystals `rows` (B,) and their `texts`, given on the device, as a padded batch of `sizes`."""
        batch = Batch(n=len(rows), sizes=sizes)
        if self.nodes is not None:
            parts = padded_graphs(self._graphs, rows, sizes.nodes, sizes.edges)
            for name, part in parts.items():
                setattr(batch, name, part)
        if self.tokens is not None:
            ((name, held),) = self.tokens.arrays.items()
            with_text = texts[0] if texts else rows
            tokens = padded_tokens(self.tokens.offsets_there, held, with_text, sizes.tokens)
            batch.token_offsets, values = tokens
            setattr(batch, name, values.long() if name == "token_ids" else values)
            if texts:
                batch.texts = Texts(ABSENT, texts[1], sizes.tokens)
        if self.cls_states is not None:
            batch.cls_states = self._states_of_cls(rows)
        return batch


def _above(n: int) -> int:
    """The least of four numbers between each power of two and the next that is above `n`; from 32 on."""
    return _from(n + 1, 4)


def _from(n: int, parts: int) -> int:
    """The least of `parts` numbers between each power of two and the next from `n` on; see `_above`."""
    step = max(1 << max(n.bit_length() - 1, 0), 32) // parts
    return math.ceil(n / step) * step


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor on the memory of an array that nobody will write to; uint16 holds the bits of bfloat16."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def _on_gpu(*parts: Ragged | None) -> bool:
    """Whether a GPU holds all arrays of those parts that there are."""
    return all(array.is_cuda for part in parts if part is not None for array in part.arrays.values())


def _place(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor where its values are gathered: see the top of the module."""
    if device.type != "cuda" or tensor.nbytes > SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]:
        return tensor
    return tensor.to(device)


def _checksum(folder: Path) -> str:
    return sha256_file(folder / "manifest.json")
