"""Does a trained model read its text, and what in it: what becomes of its predictions when the text changes.

Everything is done to the text, not to its cached states: tokens are taken out of what the model reads, [CLS]
and [SEP] stay, and the whole text encoder runs again on the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from castbench.cards import choose_device
from castbench.evaluation.attention import check_tokens, read_texts
from castbench.evaluation.records import read_run
from castbench.evaluation.trained import load_run, read_config
from castbench.labels import TARGETS
from castbench.materials.splits import load_split
from castbench.materials.targets import target_values
from castbench.models.base import Network
from castbench.models.batch import GROUP, Batch, with_text
from castbench.models.cross_attention import Cast, MaskedNodePretraining
from castbench.provenance import atomic_path
from castbench.text.parts import PARTS
from castbench.text.reading import LABELS, SPECIAL, Reader, Reading
from castbench.text.tokens import PackedTokens
from castbench.training.dataset import Crystals
from castbench.training.objectives import random_mask

log = logging.getLogger(__name__)

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the tokens that a deletion curve takes out
DRAWS = 3  # of anything random
STEPS = 32  # of the path that gradients are integrated over; with 8 their sum is off by up to a half
BATCH = 64  # texts of one crystal that are run at once
SCHEMA = pa.schema(
    [
        ("seed", pa.int32()),
        ("material_id", pa.string()),
        # "own", "without" a part, "random" (as many tokens anywhere), "only formula", "sentences shuffled",
        # "another crystal's", "none"; "delete attended", "delete random",
        # "delete attributed"; "attention", "attribution" (their shares by part), "rank correlation"
        ("condition", pa.string()),
        ("part", pa.string()),  # of LABELS, where the condition is about one
        # of the tokens that are meant or taken out; [CLS] and [SEP] count for "attention" alone
        ("share", pa.float32()),
        ("draw", pa.int16()),
        # predicted value in the target's unit; masked nodes named right; share of attention; correlation
        ("value", pa.float64()),
        ("truth", pa.float64()),  # the target's value; number of masked nodes
    ]
)


def probe_text(
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
    device: str = "cpu",
) -> None:
    """Change the texts of test crystals and write what a model makes of them, trained with each seed.

    Args:
        settings: {probes}: how many test crystals at most, drawn at random; None takes all.
        runs: folder of a model that reads text, or of masked node pretraining, with a folder a seed.
        seeds: whose runs are asked, all about the same crystals and the same texts.
        materials: materials.parquet.
        split: id lists of the target (of a pretraining: of any target; it saw no test crystal).
        descriptions: descriptions.parquet.
        graphs: cache of graphs.
        tokens: cache of tokens.
        encoder: folder of the text encoder.
        output: Parquet file, see `SCHEMA`; without rows of runs that did not finish.
        device: cpu, cuda or auto.
    """
    wanted = load_split(split)["test"]
    packed, reader = PackedTokens.open(tokens), Reader.of(tokens, encoder)
    with atomic_path(output) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
        for seed in seeds:
            run = runs / str(seed)
            record = read_run(run)
            if record["status"] != "finished":
                log.warning("%s: %s; nothing to probe", run, record["status"])
                continue
            torch.manual_seed(0)
            subject = Subject(run, record, graphs, tokens, encoder, device)
            crystals = subject.crystals
            rows = choose(crystals, wanted, settings["probes"])
            donors = dict(zip(rows, [*rows[1:], *rows[:1]], strict=True)) if len(rows) > 1 else {}
            truths = truth_of(record, materials)
            for row, text in read_texts(descriptions, rows):
                reading, material_id = reader.read(text), crystals.material_ids[row]
                check_tokens(reading, packed[row], material_id)
                other = packed[donors[row]].astype(np.int64) if row in donors else None
                truth = float(truths[row]) if truths is not None else float(subject.hide(row).sum())
                found = subject.probe(row, reading, other, np.random.default_rng(row))
                columns = zip(*[(seed, material_id, *r, truth) for r in found], strict=True)
                arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
                writer.write_table(pa.table(arrays, schema=SCHEMA))
            log.info("%s: %d crystals probed", run, len(rows))


def choose(crystals: Crystals, test: list[str], most: int | None) -> list[int]:
    """Rows of test crystals with a graph and a text, ascending; at most so many, drawn at random."""
    rows, _ = crystals.rows(test)
    assert crystals.has_text is not None
    rows = rows[torch.from_numpy(crystals.has_text[rows.numpy()])]
    if most is not None and len(rows) > most:
        rows = rows[np.random.default_rng(0).permutation(len(rows))[:most]]
    return sorted(rows.tolist())


def truth_of(record: dict[str, Any], materials: Path) -> np.ndarray | None:
    """Values (G,) of the target of a run; None for a pretraining."""
    if "target" not in record:
        return None
    table = pq.read_table(materials, columns=[TARGETS[record["target"]].column])
    return target_values(table, record["target"])


class Row(NamedTuple):
    """What one text of a crystal gave; see `SCHEMA`."""

    condition: str
    part: str | None
    share: float | None
    draw: int
    value: float


class Subject:
    """A trained network that reads any text, and the crystals that it is asked about."""

    def __init__(
        self,
        run: Path,
        record: dict[str, Any],
        graphs: Path,
        tokens: Path,
        encoder: Path,
        device: str = "cpu",
    ):
        self.device = choose_device(device)
        self.network: Network = load_run(run, encoder)
        self.network.text.read_ids(encoder)
        self.network.requires_grad_(False).to(self.device)
        self.crystals = Crystals(self.network, graphs, tokens, None, self.device)
        self.mean, self.std = record.get("target_mean", 0.0), record.get("target_std", 1.0)
        self.masked = isinstance(self.network, MaskedNodePretraining)
        if self.masked:
            self.hidden: float = read_config(run)["pretraining"]["mask_probability"]

    def hide(self, row: int) -> Tensor:
        """The nodes (N,) of a crystal that are hidden: as many as in pretraining, the same each time."""
        offsets = self.crystals.batch(torch.tensor([row])).node_offsets.cpu()
        return random_mask(offsets, self.hidden, "probe", row)

    def batch(self, row: int, texts: list[np.ndarray]) -> Batch:
        """The crystal once for each text."""
        batch = self.crystals.batch(torch.full((len(texts),), row))
        if self.masked:
            batch = replace(batch, masked_nodes=self.hide(row).repeat(len(texts)).to(self.device))
        lengths = torch.tensor([len(text) for text in texts])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        ids = torch.from_numpy(np.concatenate(texts)).long()
        return with_text(batch, Batch(len(texts), token_ids=ids, token_offsets=offsets).to(self.device))

    @torch.inference_mode()
    def values(self, row: int, texts: list[np.ndarray]) -> np.ndarray:
        """Predictions (texts,) in the target's unit; of a pretraining, the hidden nodes named right."""
        found = []
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            batch = self.batch(row, part)
            if isinstance(self.network, MaskedNodePretraining):
                right = self.network.logits(batch).argmax(dim=1) + 1 == batch.atomic_numbers
                found.append((right & batch.masked_nodes).view(len(part), -1).sum(dim=1).double())
            else:
                found.append(self.network(batch).double() * self.std + self.mean)
        return torch.cat(found).cpu().numpy()

    @torch.inference_mode()
    def attention(self, row: int, reading: Reading) -> np.ndarray:
        """Attention to each token (T,), sum 1: CAST's over layers, heads and nodes; else the last [CLS]'s."""
        batch = self.batch(row, [reading.ids])
        network: Any = self.network
        if isinstance(network, Cast):
            _, maps = network.attention_maps(batch)
            return torch.stack(maps).mean(dim=(0, 1, 2, 3)).double().cpu().numpy()
        return network.attention_maps(batch)[1][-1][0].mean(dim=0).double().cpu().numpy()

    def attribution(self, row: int, reading: Reading) -> np.ndarray:
        """Integrated gradients of the prediction by the input embedding of each token (T,), standardised.

        From the embedding of [PAD] in every place but those of [CLS] and [SEP] to the text's own. The sum is
        the difference between the predictions for the two.
        """
        from captum.attr import LayerIntegratedGradients

        def predict(ids_BT: Tensor) -> Tensor:
            return self.network(self.batch(row, list(ids_BT.cpu().numpy())))

        ids = torch.from_numpy(reading.ids)[None].to(self.device)
        special = torch.from_numpy(reading.part == SPECIAL).to(self.device)
        blank = torch.where(special, ids, self.pad_id)
        method = LayerIntegratedGradients(predict, self.network.text.encoder.embeddings)
        # The output of the embeddings is replaced, which are called once for a batch.
        gradients = method.attribute(ids, baselines=blank, n_steps=STEPS, internal_batch_size=GROUP)
        return gradients[0].sum(dim=-1).detach().double().cpu().numpy()

    @property
    def pad_id(self) -> int:
        """The padding token of the text encoder."""
        return self.network.text.encoder.config.pad_token_id or 0

    def probe(
        self, row: int, reading: Reading, other: np.ndarray | None, rng: np.random.Generator
    ) -> Iterator[Row]:
        """All rows of one crystal; `other` is the text of another."""
        asked: list[tuple[str, str | None, float | None, int]] = []
        texts: list[np.ndarray] = []

        def ask(text: np.ndarray, *what: Any) -> None:
            asked.append(what)  # type: ignore[arg-type]
            texts.append(text)

        ask(reading.ids, "own", None, 0.0, 0)
        if other is not None:
            ask(other, "another crystal's", None, 1.0, 0)
        ask(reading.ids[:1], "none", None, 1.0, 0)
        for draw in range(DRAWS):
            ask(shuffle_sentences(reading, rng), "sentences shuffled", None, 0.0, draw)
        for part in parts_of(reading):
            places = np.flatnonzero(reading.part == PARTS.index(part))
            share = len(places) / len(reading.inner)
            ask(np.delete(reading.ids, places), "without", part, share, 0)
            for draw in range(DRAWS):
                anywhere = rng.choice(reading.inner, len(places), replace=False)
                ask(np.delete(reading.ids, anywhere), "random", part, share, draw)
        if "formula" in parts_of(reading):
            others = np.flatnonzero((reading.part != PARTS.index("formula")) & (reading.part != SPECIAL))
            ask(np.delete(reading.ids, others), "only formula", None, None, 0)
        if not self.masked:
            yield from self.deletions(row, reading, rng, ask)
        for what, value in zip(asked, self.values(row, texts), strict=True):
            yield Row(*what, float(value))

    def deletions(
        self, row: int, reading: Reading, rng: np.random.Generator, ask: Callable[..., None]
    ) -> Iterator[Row]:
        """Ask for deletion curves; yield what attention and gradients say, by part and by rank."""
        inner = reading.inner
        attention, attribution = self.attention(row, reading), np.abs(self.attribution(row, reading))
        counts = np.bincount(reading.part, minlength=len(LABELS))
        read = np.where(np.arange(len(LABELS)) == SPECIAL, 0, counts)  # where there may be gradients
        for name, weights, of in (
            ("attention", attention, counts),
            ("attribution", attribution / attribution.sum(), read),
        ):
            for part, mass, share in zip(LABELS, reading.by_part(weights), of / of.sum(), strict=True):
                yield Row(name, part, float(share), 0, float(mass))
        yield Row("rank correlation", None, None, 0, spearman(attention[inner], attribution[inner]))
        orders = [("delete attended", inner[np.argsort(-attention[inner], kind="stable")], 0)]
        orders += [("delete attributed", inner[np.argsort(-attribution[inner], kind="stable")], 0)]
        orders += [("delete random", rng.permutation(inner), draw) for draw in range(DRAWS)]
        for condition, order, draw in orders:
            for share in SHARES:
                gone = order[: round(share * len(inner))]
                ask(np.delete(reading.ids, gone), condition, None, share, draw)


def parts_of(reading: Reading) -> list[str]:
    """The parts that a text has."""
    return [part for number, part in enumerate(PARTS) if (reading.part == number).any()]


def shuffle_sentences(reading: Reading, rng: np.random.Generator) -> np.ndarray:
    """Tokens with the sentences in another order, [CLS] first and [SEP] last."""
    inner = reading.inner
    sentences = reading.sentence[inner]
    order = rng.permutation(np.unique(sentences))
    moved = np.concatenate([inner[sentences == sentence] for sentence in order])
    ids = reading.ids.copy()
    ids[inner] = reading.ids[moved]
    return ids


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two vectors (n,), ties by their mean rank; NaN where one does not vary."""
    one, other = (pd.Series(values).rank().to_numpy() for values in (first, second))
    if one.std() == 0 or other.std() == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])
