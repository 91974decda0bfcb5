"""Cross-attention of CAST without and with pretraining: the data of the paper's Figures 2 and 3."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from pymatgen.core import Element
from safetensors.torch import load_file
from torch import Tensor

from castbench.errors import InputError
from castbench.models import build_model
from castbench.models.batch import Batch
from castbench.models.cross_attention import Cast
from castbench.provenance import atomic_path, write_json
from castbench.text.encoders import load_tokenizer
from castbench.text.tokens import PackedTokens
from castbench.training.dataset import Crystals

log = logging.getLogger(__name__)

MODELS = ("cast_scratch", "cast")
BINS = 200  # of cosine similarity on [0, 1]
BATCH = 32
MEAN = -1  # in place of the number of a head: the mean over heads


def extract_attention(
    settings: dict[str, Any],
    runs: Path,
    seed: int,
    materials: Path,
    split: Path,
    graphs: Path,
    tokens: Path,
    encoder: Path,
    output: Path,
    states: Path | None = None,
) -> None:
    """Write `maps.json` (maps of one crystal) and `similarity.parquet` (all test crystals) into `output`.

    `settings` = {target, material}: material is an id, or None for the test crystal with the most nodes (then
    the most elements). A model whose run did not finish is left out. `similarity.parquet` counts node pairs
    by model, layer (from 1), head (from 1; -1 is the mean over heads) and bin [low, low + 1/200) of the
    cosine similarity of their attention rows.

    Raises:
        InputError: the material is unknown or has no graph.
    """
    target, record = settings["target"], json.loads(split.read_text())
    folders = {name: runs / target / name / str(seed) for name in MODELS}
    finished = {name: folder for name, folder in folders.items() if _finished(folder)}
    for name in folders.keys() - finished.keys():
        log.warning("%s/%s/%s: no finished run; its attention is left out", target, name, seed)
    maps: dict[str, Any] = {"target": target, "seed": seed, "models": {}, "similarity": {}}
    counts = []
    for name, folder in finished.items():
        model = _load(name, folder, encoder)
        crystals = Crystals(model, graphs, tokens, states, torch.device("cpu"))
        test, _ = crystals.rows(record["test"])
        if "material_id" not in maps:
            maps |= _describe(crystals, settings["material"], record, materials, tokens, encoder)
        chosen, _ = crystals.rows([maps["material_id"]])
        weights = attention(model, crystals.batch(chosen))[0]
        maps["models"][name] = np.round(weights, 5).tolist()
        histogram, summary = similarity_histogram(model, crystals, test)
        maps["similarity"][name] = summary
        counts.append(_frame(name, histogram))
    output.mkdir(parents=True, exist_ok=True)
    columns = ["model", "layer", "head", "low", "count"]
    with atomic_path(output / "similarity.parquet") as partial:
        (pd.concat(counts) if counts else pd.DataFrame(columns=columns)).to_parquet(partial, index=False)
    write_json(output / "maps.json", maps)


def _finished(run: Path) -> bool:
    file = run / "metrics.json"
    return file.exists() and json.loads(file.read_text())["status"] == "finished"


def _load(name: str, run: Path, encoder: Path) -> Cast:
    """The trained model of a run, in evaluation mode."""
    config = json.loads((run / "config.json").read_text())
    model = build_model(name, config["architecture"], encoder)
    assert isinstance(model, Cast)
    model.load_trained_state(load_file(run / "model.safetensors"))
    return model.eval()


@torch.inference_mode()
def attention(model: Cast, batch: Batch) -> list[np.ndarray]:
    """Attention weights (layers, heads, nodes, tokens) of each crystal of a batch; every row sums to 1."""
    _, layers = model.attention_maps(batch)
    weights = torch.stack(layers, dim=1)  # (B, layers, heads, N, T), padded
    nodes, tokens = batch.node_offsets.diff().tolist(), batch.token_offsets.diff().tolist()
    return [w[:, :, :n, :t].numpy() for w, n, t in zip(weights, nodes, tokens, strict=True)]


def cosine_similarities(weights: np.ndarray) -> np.ndarray:
    """Cosine similarity (layers, heads, pairs) of pairs of rows of weights (layers, heads, nodes, tokens)."""
    rows = weights / np.linalg.norm(weights, axis=-1, keepdims=True)
    first, second = np.triu_indices(weights.shape[2], k=1)
    return np.einsum("lhpt,lhpt->lhp", rows[:, :, first], rows[:, :, second]).clip(0, 1)


def similarity_histogram(model: Cast, crystals: Crystals, test: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    """Counts (layers, 1 + heads, BINS) of node pairs, the mean over heads first, and a summary.

    Streams over the test crystals; those with one node have no pair and are counted.
    """
    histogram, total, pairs, alone = None, 0.0, 0, 0
    for part in test.split(BATCH):
        for weights in attention(model, crystals.batch(part)):
            if weights.shape[2] < 2:
                alone += 1
                continue
            both = np.concatenate([weights.mean(axis=1, keepdims=True), weights], axis=1)
            similarities = cosine_similarities(both)
            if histogram is None:
                histogram = np.zeros((*similarities.shape[:2], BINS), dtype=np.int64)
            places = np.minimum((similarities * BINS).astype(np.int64), BINS - 1)
            layers, heads, _ = np.indices(places.shape)
            np.add.at(histogram, (layers, heads, places), 1)
            total = total + similarities[:, 0].sum(axis=1, dtype=np.float64)
            pairs += similarities.shape[2]
    if histogram is None:
        histogram = np.zeros((0, 0, BINS), dtype=np.int64)
    return histogram, {
        "crystals": len(test) - alone,
        "one_node": alone,
        "pairs": pairs,
        "mean_by_layer": [round(float(value), 5) for value in np.atleast_1d(total) / pairs] if pairs else [],
    }


def _frame(name: str, histogram: np.ndarray) -> pd.DataFrame:
    """The counts of a model, one row a layer, head and bin that is not empty."""
    layer, head, place = histogram.nonzero()
    return pd.DataFrame(
        {
            "model": name,
            "layer": layer + 1,
            "head": np.where(head == 0, MEAN, head),
            "low": place / BINS,
            "count": histogram[layer, head, place],
        }
    )


def _most_nodes(crystals: Crystals, test: Tensor) -> str:
    """Id of the test crystal with the most nodes, then the most elements, then the first."""
    assert crystals.nodes is not None, "CAST reads the graph"
    sizes = crystals.nodes.offsets.diff()[test]
    largest = test[sizes == sizes.max()]
    elements = [len(crystals.batch(row).atomic_numbers.unique()) for row in largest.split(1)]
    return crystals.ids(largest)[elements.index(max(elements))]


def _describe(
    crystals: Crystals,
    material: str | None,
    record: dict[str, Any],
    materials: Path,
    tokens: Path,
    encoder: Path,
) -> dict[str, Any]:
    """The crystal of the maps: id, formula, split, names of its nodes, its tokens and their words."""
    material = material or _most_nodes(crystals, crystals.rows(record["test"])[0])
    if material not in crystals.material_ids:
        raise InputError(
            f"attention.material: {material} is not in this data set; take an id of materials.parquet"
        )
    rows, without_graph = crystals.rows([material])
    if without_graph:
        raise InputError(f"attention.material: {material} has no graph; choose another crystal")
    token_ids = PackedTokens.open(tokens)[int(rows[0])].tolist()
    pieces = list(load_tokenizer(encoder).convert_ids_to_tokens(token_ids))
    words, word_of_piece = join_pieces(pieces)
    formulas = pq.read_table(materials, columns=["formula"], filters=[("material_id", "=", material)])
    splits = [part for part in ("train", "validation", "test") if material in record[part]]
    return {
        "material_id": material,
        "formula": formulas["formula"][0].as_py(),
        "split": splits[0] if splits else None,
        "nodes": node_names(crystals.batch(rows).atomic_numbers.tolist()),
        "pieces": pieces,
        "words": words,
        "word_of_piece": word_of_piece,
    }


def node_names(atomic_numbers: list[int]) -> list[str]:
    """Nodes by element and running number: Al1, Te1, Te2."""
    seen: Counter[str] = Counter()
    names = []
    for number in atomic_numbers:
        symbol = Element.from_Z(number).symbol
        seen[symbol] += 1
        names.append(f"{symbol}{seen[symbol]}")
    return names


def join_pieces(pieces: list[str]) -> tuple[list[str], list[int]]:
    """Words of word pieces ("##" continues a word), and the word that each piece belongs to."""
    words: list[str] = []
    places = []
    for piece in pieces:
        if piece.startswith("##") and words:
            words[-1] += piece[2:]
        else:
            words.append(piece.lstrip("Ġ▁"))
        places.append(len(words) - 1)
    return words, places
