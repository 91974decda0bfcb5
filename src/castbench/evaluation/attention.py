"""Cross-attention of CAST without and with pretraining: the data of the paper's Figures 2 and 3."""

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pymatgen.core import Element
from safetensors.numpy import save
from torch import Tensor

from castbench.cards import choose_device
from castbench.errors import InputError
from castbench.evaluation.records import read_errors, read_run
from castbench.evaluation.trained import load_run
from castbench.labels import MODELS as LABELLED
from castbench.materials.splits import PARTS, load_split
from castbench.models.batch import Batch
from castbench.models.cross_attention import Cast
from castbench.provenance import atomic_path, write_json
from castbench.text.reading import LABELS, Reader, Reading
from castbench.text.tokens import PackedTokens
from castbench.training.dataset import Crystals

log = logging.getLogger(__name__)

MODELS = ("cast_scratch", "cast")
BINS = 200  # of cosine similarity on [0, 1]
BATCH = 32
MEAN = -1  # in place of the number of a head: the mean over heads
SHOWN = 12  # crystals whose maps are kept
SIMILARITY = ("model", "seed", "layer", "head", "low", "count")
BY_MATERIAL = pa.schema(
    [
        ("model", pa.string()),
        ("seed", pa.int32()),
        ("material_id", pa.string()),
        ("layer", pa.int16()),  # from 1
        ("n_nodes", pa.int32()),
        ("n_tokens", pa.int32()),
        # over all pairs of nodes, null for one node; of rows averaged over heads, and within each head
        ("similarity", pa.float32()),
        ("similarity_heads", pa.float32()),
        # exponential of the entropy of a row, mean over nodes; likewise
        ("effective_tokens", pa.float32()),
        ("effective_tokens_heads", pa.float32()),
    ]
)


def extract_attention(
    settings: dict[str, Any],
    runs: Path,
    seeds: list[int],
    materials: Path,
    split: Path,
    descriptions: Path,
    graphs: Path,
    tokens: Path,
    encoder: Path,
    output: Path,
    states: Path | None = None,
    device: str = "cpu",
) -> None:
    """Write maps of a dozen test crystals, and statistics of all of them, into `output`.

    A run that did not finish is left out. Files:
        maps.json, maps.safetensors: the crystals of `pick`; of each and each model, in the first of its seeds
            that finished, attention (layers, heads, nodes, words), that of a word being the sum over its
            tokens. `note` says why the configured crystal is not among them.
        similarity.parquet: number of node pairs by model, seed, layer (from 1), head (from 1; -1 is the mean
            over heads) and bin [low, low + 1/200) of the cosine similarity of their attention rows.
        by_material.parquet: one row a model, seed, crystal and layer; see `BY_MATERIAL`.

    Args:
        settings: {target, material}; material is an id, or None for the test crystal with the most nodes.
        runs: results/{dataset}/runs.
        seeds: of the runs that are looked at.
        materials: materials.parquet.
        split: id lists of the target.
        descriptions: descriptions.parquet.
        graphs: cache of graphs.
        tokens: cache of tokens.
        encoder: folder of the text encoder.
        output: folder.
        states: cache of token states, for models that read them.
        device: cpu, cuda or auto.
    """
    chosen = choose_device(device)
    target, record = settings["target"], load_split(split)
    finished: dict[str, list[int]] = {}
    for name, seed in product(MODELS, seeds):
        if read_run(runs / target / name / str(seed))["status"] == "finished":
            finished.setdefault(name, []).append(seed)
        else:
            log.warning("%s/%s/%s: no finished run; its attention is left out", target, name, seed)
    maps: dict[str, Any] = {"target": target, "labels": LABELS, "models": list(finished), "note": None}
    maps |= {"seeds": {name: found[0] for name, found in finished.items()}}
    shown: list[dict[str, Any]] = []
    arrays, counts = {}, []
    output.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(output / "by_material.parquet") as partial,
        pq.ParquetWriter(partial, BY_MATERIAL) as by_material,
    ):
        for name, seed in ((name, seed) for name, found in finished.items() for seed in found):
            model = load_run(runs / target / name / str(seed), encoder).to(chosen)
            assert isinstance(model, Cast)
            crystals = Crystals(model, graphs, tokens, states, chosen)
            test, _ = crystals.rows(record["test"])
            if not shown:
                facts = crystal_facts(crystals, test, materials, tokens, runs.parent, target, seeds)
                maps["note"] = cannot_show(settings["material"], crystals)
                shown = pick(facts, None if maps["note"] else settings["material"])
                describe_crystals(shown, crystals, record, materials, descriptions, tokens, encoder)
            for entry in shown if seed == maps["seeds"][name] else ():
                row, _ = crystals.rows([entry["material_id"]])
                weights = entry["reading"].by_word(attention(model, crystals.batch(row))[0])
                arrays[f"{name}/{entry['material_id']}"] = np.ascontiguousarray(weights, np.float32)
            counts.append(
                _frame(name, seed, stream_statistics(name, seed, model, crystals, test, by_material))
            )
    for entry in shown:
        entry.pop("reading")
    with atomic_path(output / "maps.safetensors") as partial:
        partial.write_bytes(save(arrays))
    with atomic_path(output / "similarity.parquet") as partial:
        frame = pd.concat(counts) if counts else pd.DataFrame(columns=list(SIMILARITY))
        frame.to_parquet(partial, index=False)
    write_json(output / "maps.json", maps | {"materials": shown})


@torch.inference_mode()
def attention(model: Cast, batch: Batch) -> list[np.ndarray]:
    """Attention weights (layers, heads, nodes, tokens) of each crystal of a batch; every row sums to 1."""
    _, layers = model.attention_maps(batch)
    weights = torch.stack(layers, dim=1).cpu()  # (B, layers, heads, N, T), padded
    nodes, tokens = batch.node_offsets.diff().tolist(), batch.token_offsets.diff().tolist()
    return [w[:, :, :n, :t].numpy() for w, n, t in zip(weights, nodes, tokens, strict=True)]


def cosine_similarities(weights: np.ndarray) -> np.ndarray:
    """Cosine similarity (layers, heads, pairs) of pairs of rows of weights (layers, heads, nodes, tokens)."""
    rows = weights / np.linalg.norm(weights, axis=-1, keepdims=True)
    first, second = np.triu_indices(weights.shape[2], k=1)
    return (rows @ rows.swapaxes(-1, -2))[..., first, second].clip(0, 1)


def effective_tokens(weights: np.ndarray) -> np.ndarray:
    """Number of tokens (layers, heads) that a node effectively reads, from weights (..., nodes, tokens).

    The exponential of a row's entropy, T for even weights, mean over nodes.
    """
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(axis=-1)
    return np.exp(entropy).mean(axis=-1)


def stream_statistics(
    name: str, seed: int, model: Cast, crystals: Crystals, test: Tensor, by_material: pq.ParquetWriter
) -> np.ndarray:
    """Counts (layers, 1 + heads, BINS) of node pairs, the mean over heads first; rows for `by_material`.

    Streams over the test crystals: one batch of maps is held at a time.
    """
    histogram = np.zeros((0, 0, BINS), dtype=np.int64)
    for part in test.split(BATCH):
        rows = []
        for material_id, weights in zip(
            crystals.ids(part), attention(model, crystals.batch(part)), strict=True
        ):
            layers, heads, nodes, tokens = weights.shape
            both = np.concatenate([weights.mean(axis=1, keepdims=True), weights], axis=1)
            if not len(histogram):
                histogram = np.zeros((layers, 1 + heads, BINS), dtype=np.int64)
            similar: np.ndarray = np.full((layers, 1 + heads), np.nan)
            if nodes > 1:
                similarities = cosine_similarities(both)
                similar = similarities.mean(axis=2)
                places = np.minimum((similarities * BINS).astype(np.int64), BINS - 1)
                for layer, head in np.ndindex(places.shape[:2]):
                    histogram[layer, head] += np.bincount(places[layer, head], minlength=BINS)
            effective = effective_tokens(both)
            for layer in range(layers):
                measures = (
                    value
                    for found in (similar[layer], effective[layer])
                    for value in (found[0], found[1:].mean())
                )
                rows.append((name, seed, material_id, layer + 1, nodes, tokens, *measures))
        columns = [pa.array(column, field.type, from_pandas=True) for column, field in
                   zip(zip(*rows, strict=True), BY_MATERIAL, strict=True)]  # fmt: skip
        by_material.write_table(pa.table(columns, schema=BY_MATERIAL))
    return histogram


def _frame(name: str, seed: int, histogram: np.ndarray) -> pd.DataFrame:
    """The counts of a run, one row a layer, head and bin that is not empty."""
    layer, head, place = histogram.nonzero()
    return pd.DataFrame(
        {
            "model": name,
            "seed": seed,
            "layer": layer + 1,
            "head": np.where(head == 0, MEAN, head),
            "low": place / BINS,
            "count": histogram[layer, head, place],
        }
    )


# --- the crystals that are shown ---------------------------------------------------------------------


def cannot_show(material: str | None, crystals: Crystals) -> str | None:
    """Why the attention of the configured material cannot be shown, also as a warning; None if it can."""
    if material is None:
        return None
    if material not in crystals.material_ids:
        note = f"attention.material: {material} is not in this data set; take an id of materials.parquet"
    elif crystals.rows([material])[1]:
        note = f"attention.material: {material} has no graph; choose another crystal"
    else:
        return None
    log.warning(note)
    return note


def crystal_facts(
    crystals: Crystals,
    test: Tensor,
    materials: Path,
    tokens: Path,
    results: Path,
    target: str,
    seeds: list[int],
) -> pd.DataFrame:
    """What crystals are picked by: one row a test crystal, in the order of `test`, index material_id.

    Columns: nodes, elements, spacegroup, tokens (before the cut), cut; error of each model of `MODELS` and of
    structure_only, mean over the seeds that finished, NaN where there is none.
    """
    assert crystals.nodes is not None, "CAST reads the graph"
    ids = crystals.ids(test)
    index = PackedTokens.open(tokens).index()
    lengths = index["n_tokens_full"].to_numpy()[test.numpy()]
    numbers, offsets = crystals.nodes.arrays["atomic_numbers"], crystals.nodes.offsets
    facts = pd.DataFrame(
        {
            "nodes": offsets.diff()[test].numpy(),
            "elements": [len(numbers[offsets[row] : offsets[row + 1]].unique()) for row in test.tolist()],
            "tokens": lengths,
            "cut": lengths > index["n_tokens"].to_numpy()[test.numpy()],
        },
        index=pd.Index(ids, name="material_id"),
    )
    table = pq.read_table(materials, columns=["material_id", "spacegroup"])
    facts["spacegroup"] = pd.Series(table["spacegroup"].to_numpy(), table["material_id"].to_pylist())
    for name in (*MODELS, "structure_only"):
        facts[name] = read_errors(results, target, name, seeds)
    return facts


def pick(facts: pd.DataFrame, material: str | None) -> list[dict[str, Any]]:
    """Up to `SHOWN` crystals that differ: {material_id, why}; the configured one, if any, first.

    Each line of the list below takes the crystal that is first by it and not yet taken; then come those with
    the largest error. Lines that say nothing here (no text was cut, no other model ran) are skipped.
    """
    gain = facts["structure_only"] - facts["cast"]
    length = "most truncated text" if facts["cut"].any() else "longest text"
    structure = LABELLED["structure_only"].label
    lines = [
        ("most nodes", facts["nodes"] + facts["elements"] / 1000),
        ("largest error of CAST", facts["cast"]),
        ("smallest error of CAST", -facts["cast"]),
        (f"CAST better than {structure} by most", gain),
        (f"CAST worse than {structure} by most", -gain),
        ("pretraining changes the error most", (facts["cast"] - facts["cast_scratch"]).abs()),
        (length, facts["tokens"]),
        ("shortest text", -facts["tokens"]),
        ("most elements", facts["elements"]),
        ("fewest nodes", -facts["nodes"]),
        ("lowest symmetry", -facts["spacegroup"]),
        ("highest symmetry", facts["spacegroup"]),
        *[("next largest error of CAST", facts["cast"])] * SHOWN,
    ]
    chosen: dict[str, str] = {material: "as configured"} if material else {}
    for why, measure in lines:
        left = measure.drop(list(chosen), errors="ignore").dropna()
        if len(left) and len(chosen) < SHOWN:
            chosen[str(left.idxmax())] = why
    return [{"material_id": material_id, "why": why} for material_id, why in chosen.items()]


def describe_crystals(
    shown: list[dict[str, Any]],
    crystals: Crystals,
    record: dict[str, Any],
    materials: Path,
    descriptions: Path,
    tokens: Path,
    encoder: Path,
) -> None:
    """Add to the picked crystals: formula, split, names of the nodes, words and their parts, sizes."""
    packed, reader = PackedTokens.open(tokens), Reader.of(tokens, encoder)
    ids = [entry["material_id"] for entry in shown]
    table = pq.read_table(materials, columns=["material_id", "formula"], filters=[("material_id", "in", ids)])
    formulas = dict(zip(table["material_id"].to_pylist(), table["formula"].to_pylist(), strict=True))
    rows = {material_id: row for row, material_id in enumerate(crystals.material_ids)}
    texts = dict(read_texts(descriptions, [rows[material_id] for material_id in ids]))
    for entry in shown:
        material_id = entry["material_id"]
        row = rows[material_id]
        reading = reader.read(texts[row])
        check_tokens(reading, packed[row], material_id)
        batch = crystals.batch(torch.tensor([row]))
        splits = [part for part in PARTS if material_id in record[part]]
        entry |= {
            "formula": formulas[material_id],
            "split": splits[0] if splits else None,
            "nodes": node_names(batch.atomic_numbers.tolist()),
            "multiplicities": [int(n) for n in batch.multiplicities.tolist()],
            "words": reading.words,
            "parts": reading.part_of_word,
            "tokens": len(reading.ids),
            "tokens_full": reading.n_full,
            "reading": reading,
        }


def check_tokens(reading: Reading, packed: np.ndarray, material_id: str) -> None:
    """See that a text gives the tokens that the models read.

    Raises:
        InputError: it does not.
    """
    if not np.array_equal(reading.ids, packed):
        raise InputError(f"{material_id}: its description is not that of the tokens; run tokenize_text again")


def read_texts(descriptions: Path, rows: list[int]) -> Iterator[tuple[int, str | None]]:
    """(row, text) of some rows of descriptions.parquet, in ascending order, streamed."""
    wanted, first = sorted(rows), 0
    for batch in pq.ParquetFile(descriptions).iter_batches(1000, columns=["text"]):
        column = batch.column("text")
        while wanted and wanted[0] < first + len(batch):
            row = wanted.pop(0)
            yield row, column[row - first].as_py()
        first += len(batch)


def node_names(atomic_numbers: list[int]) -> list[str]:
    """Nodes by element and running number: Al1, Te1, Te2."""
    seen: Counter[str] = Counter()
    names = []
    for number in atomic_numbers:
        symbol = Element.from_Z(number).symbol
        seen[symbol] += 1
        names.append(f"{symbol}{seen[symbol]}")
    return names
