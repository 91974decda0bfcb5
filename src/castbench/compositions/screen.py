"""Screening: gap and stability of every allowed candidate, and how well hidden compounds are found."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pymatgen.core import Composition, Element
from scipy.stats import hypergeom

from castbench.compositions.descriptors import embedded_elements
from castbench.compositions.enumerate import STEPS, Candidates, enumerate_candidates, known_elements
from castbench.errors import InputError
from castbench.evaluation.classification import roc_auc
from castbench.evaluation.ensemble import Ensemble
from castbench.materials.splits import PARTS, load_split
from castbench.provenance import atomic_path, write_json
from castbench.training.session import ONE_DEVICE, open_session

log = logging.getLogger(__name__)
FRACTIONS = (0.2, 0.2, 0.6)  # of A, B and X
CHUNK = 8192  # candidates predicted and written at once
SHARES = (0.01, 0.05, 0.10)  # of the list, for enrichment
POINTS = 200  # of the curve of hits


def screen_compositions(
    settings: dict[str, Any],
    seeds: list[int],
    runs: Path,
    compositions: Path,
    split: Path,
    output: Path,
    ranked: Path,
    summary: Path,
    threads: int,
) -> None:
    """Enumerate ABX3, keep what chemistry allows, predict it with every seed, and rank it by stability.

    All that is allowed and has known radii is predicted; what lies outside the windows of the tolerance
    factors is ranked behind what lies inside, and is not in the ranked table. Memory does not grow with the
    number of candidates but for some 20 bytes each of those that are predicted, to rank them.

    Args:
        settings: {model, architecture, regression, classification, training, screening}.
        seeds: whose runs predict, those that finished.
        runs: folder of the model, with a folder a seed.
        compositions: table of aggregate_compositions: what is known.
        split: of split_compositions: which part of it was for training.
        output: Parquet file, a row an allowed formula: the assignment to sites, tolerance factors, means and
            sample standard deviations over seeds, `rank`, and `known`, the part of the split that has it.
        ranked: CSV file of the first `screening.top` rows inside the windows.
        summary: JSON file: candidates left after each step.
        threads: cores that the job has.

    Raises:
        InputError: an unknown element, no finished run, or nothing is left to predict.
    """
    screening = settings["screening"]
    fabric = open_session(settings["training"] | ONE_DEVICE, threads)
    ensemble = Ensemble(settings, runs, seeds, fabric)
    known = read_known(compositions, split, settings["classification"]["stability"])
    counts: Counter[str] = Counter(dict.fromkeys(STEPS, 0))
    scores: list[np.ndarray] = []
    windows: list[np.ndarray] = []
    unranked = output.with_suffix(".unranked")
    unranked.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(unranked, schema(settings, ensemble.seeds), compression="zstd") as writer:
            for candidates in embedded(enumerate_candidates(screening), counts):
                for start in range(0, len(candidates.a), CHUNK):
                    chunk = pieces(candidates, slice(start, start + CHUNK))
                    table = predict_chunk(chunk, ensemble, known, writer.schema)
                    writer.write_table(table)
                    scores.append(table["stability_mean"].to_numpy())
                    windows.append(chunk.in_window)
        if not scores:
            raise InputError("compositions.screening: no candidate is left; widen its elements or windows")
        every, fits = np.concatenate(scores), np.concatenate(windows)
        ranks = np.empty(len(every), dtype=np.int64)
        ranks[np.lexsort((-every, ~fits))] = np.arange(1, len(every) + 1)
        top = write_ranked(unranked, ranks, min(screening["top"], int(fits.sum())), output)
    finally:
        unranked.unlink(missing_ok=True)
    with atomic_path(ranked) as partial:
        top.to_csv(partial, index=False, float_format="%.6g", lineterminator="\n")
    found = {
        "steps": [{"step": step, "left": counts[step]} for step in STEPS],
        "predicted": len(every),
        "in_window": int(fits.sum()),
        "seeds": ensemble.seeds,
        "known": known_counts(output),
    }
    sizes = {name: len(screening[name] or known_elements()) for name in ("a", "b", "x")}
    write_json(summary, found | {"elements": sizes, "model": settings["model"], "settings": screening})
    log.info("%s: %d formulas predicted, %d inside the windows", dict(counts), len(every), fits.sum())


def schema(settings: dict[str, Any], seeds: list[int]) -> pa.Schema:
    """Columns of the candidates before they are ranked."""
    kinds = (("site", pa.string()), ("state", pa.int8()))
    sites = [(f"{site}_{what}", kind) for site in "abx" for what, kind in kinds]
    targets = [*settings["regression"], *settings["classification"]]
    numbers = [(f"{target}_{what}", pa.float32()) for target in targets for what in ("mean", "std")]
    by_seed = [(f"stability_seed_{seed}", pa.float32()) for seed in seeds]
    factors = [("goldschmidt", pa.float32()), ("bartel", pa.float32()), ("in_window", pa.bool_())]
    known = [("known", pa.string()), ("known_stable", pa.bool_())]
    return pa.schema([("formula", pa.string()), *sites, *factors, *numbers, *by_seed, *known])


def embedded(found: Iterator[Candidates], counts: Counter[str]) -> Iterator[Candidates]:
    """Count the candidates of every X, and leave out those with an element that mat2vec does not know."""
    lacking = [Element(symbol).Z for symbol in known_elements() if symbol not in embedded_elements()]
    for candidates in found:
        counts.update(candidates.counts)
        has = ~np.isin(np.stack([candidates.a, candidates.b, candidates.x]), lacking).any(axis=0)
        if has.any():
            yield candidates if has.all() else pieces(candidates, np.asarray(has))


def pieces(candidates: Candidates, chosen: slice | np.ndarray) -> Candidates:
    """Some of the candidates, without counts."""
    names = ("a", "b", "x", "states", "goldschmidt", "bartel", "in_window")
    return Candidates(*(getattr(candidates, name)[chosen] for name in names))


def read_known(
    compositions: Path, split: Path, threshold: float
) -> dict[tuple[int, int, int], tuple[str, bool]]:
    """(lower and higher Z of the single elements, Z of the triple one) -> (part of the split, stable)."""
    table, lists = pq.read_table(compositions, columns=["formula", "energy_above_hull"]), load_split(split)
    part_of = {formula: part for part in PARTS for formula in lists[part]}
    stable = pc.less_equal(table["energy_above_hull"], threshold).to_pylist()
    formulas = table["formula"].to_pylist()
    return {
        formula_key(Composition(formula)): (part_of[formula], is_stable)
        for formula, is_stable in zip(formulas, stable, strict=True)
        if formula in part_of
    }


def formula_key(composition: Composition) -> tuple[int, int, int]:
    """What names an ABX3 formula whatever the order of A and B."""
    (first, second), (triple,) = (
        sorted(element.Z for element, amount in composition.items() if (amount == 3) is is_triple)
        for is_triple in (False, True)
    )
    return first, second, triple


def predict_chunk(
    candidates: Candidates,
    ensemble: Ensemble,
    known: dict[tuple[int, int, int], tuple[str, bool]],
    columns: pa.Schema,
) -> pa.Table:
    """Predict candidates and describe them, as a table of `columns`."""
    numbers = np.stack([candidates.a, candidates.b, candidates.x], axis=1)
    fractions = np.tile(np.array(FRACTIONS, dtype=np.float32), (len(numbers), 1))
    symbols = [[Element.from_Z(int(z)).symbol for z in row] for row in numbers]
    keys = [(min(int(a), int(b)), max(int(a), int(b)), int(x)) for a, b, x in numbers]
    nothing: tuple[str | None, bool | None] = (None, None)
    matches = [known.get(key) or nothing for key in keys]
    content: dict[str, Any] = {
        "formula": [Composition({a: 1, b: 1, x: 3}).reduced_formula for a, b, x in symbols],
        "goldschmidt": candidates.goldschmidt,
        "bartel": np.where(np.isfinite(candidates.bartel), candidates.bartel, np.nan),
        "in_window": candidates.in_window,
        "known": [part for part, _ in matches],
        "known_stable": [is_stable for _, is_stable in matches],
    }
    for place, site in enumerate("abx"):
        content[f"{site}_site"] = [row[place] for row in symbols]
        content[f"{site}_state"] = candidates.states[:, place]
    for target, values in ensemble.predict(numbers, fractions).items():
        content[f"{target}_mean"] = values.mean(axis=0)
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)
        content[f"{target}_std"] = spread
        if target == "stability":
            content |= {f"stability_seed_{seed}": v for seed, v in zip(ensemble.seeds, values, strict=True)}
    return pa.table(
        {name: pa.array(content[name], columns.field(name).type, from_pandas=True) for name in columns.names},
        schema=columns,
    )


def write_ranked(unranked: Path, ranks: np.ndarray, top: int, output: Path) -> pd.DataFrame:
    """Add `rank` to every row, row group by row group, and return the first `top` rows by rank."""
    first, start = [], 0
    with pq.ParquetFile(unranked) as source, atomic_path(output) as partial:
        columns = source.schema_arrow.insert(0, pa.field("rank", pa.int64()))
        with pq.ParquetWriter(partial, columns, compression="zstd") as writer:
            for group in range(source.num_row_groups):
                table = source.read_row_group(group)
                own = ranks[start : start + len(table)]
                start += len(table)
                table = table.add_column(0, columns.field("rank"), pa.array(own))
                writer.write_table(table)
                first.append(table.filter(pc.less_equal(table["rank"], top)).to_pandas())
    return pd.concat(first, ignore_index=True).sort_values("rank")


def known_counts(output: Path) -> dict[str, int]:
    """How many candidates each part of the split has."""
    column = pq.read_table(output, columns=["known"])["known"]
    return {str(item["values"]): item["counts"] for item in column.drop_null().value_counts().to_pylist()}


def validate_screening(
    settings: dict[str, Any], candidates: Path, compositions: Path, split: Path, output: Path
) -> None:
    """How well the screening ranks known stable compounds that training has not seen.

    The test part of the split is a random tenth of all known compounds (with the default fractions), stable
    and unstable alike, hidden from training and from the selection of weights. A user who had only the other
    nine tenths would screen all candidates that are not among them; this is that list, in which the hidden
    stable compounds are what is to be found. Everything else in it counts as not found, also what is stable
    but in no database, so that the enrichment is a lower bound. The same is done without the windows of the
    tolerance factors, since many ABX3 compounds are stable in other structures than perovskite's.

    Args:
        settings: `seeds`, `classification` with the threshold of `stability` (eV/atom).
        candidates: table of screen_compositions.
        compositions: table of aggregate_compositions.
        split: of split_compositions.
        output: JSON file to write.
    """
    table = pd.read_parquet(candidates)
    lists = load_split(split)
    known = read_known(compositions, split, settings["classification"]["stability"])
    hidden = sum(part == "test" and stable for part, stable in known.values())
    share = len(lists["test"]) / sum(len(lists[part]) for part in PARTS)
    seeds = [seed for seed in settings["seeds"] if f"stability_seed_{seed}" in table]  # that finished
    unseen = table[~table["known"].isin(["train", "validation"])]
    pools = {
        "in_window": validate_pool(unseen[unseen["in_window"]], seeds),
        "allowed": validate_pool(unseen, seeds),
    }
    write_json(output, {"n_hidden_stable": hidden, "hidden_share": share, "pools": pools})
    for name, pool in pools.items():
        log.info("%s: %d of %d hidden stable, %d candidates", name, pool["n_hidden"], hidden, pool["n"])


def validate_pool(pool: pd.DataFrame, seeds: list[int]) -> dict[str, Any]:
    """Rank a pool of candidates by the seeds' mean stability, and by every seed's, and see who comes first.

    Returns:
        Sizes, `enrichment`, the share of hits found along the list (`curve`), and areas under the ROC curve:
        `roc_auc_pool` of the hidden stable ones against all others, `roc_auc_hidden` against the hidden
        unstable ones alone.
    """
    tested = (pool["known"] == "test").to_numpy()
    hits = tested & pool["known_stable"].eq(True).to_numpy()
    found: dict[str, Any] = {"n": len(pool), "n_hidden": int(hits.sum())}
    found["n_hidden_unstable"] = int(tested.sum() - hits.sum())
    columns = {"mean": "stability_mean"} | {str(seed): f"stability_seed_{seed}" for seed in seeds}
    for name, column in columns.items():
        score = pool[column].to_numpy()
        order = np.argsort(-score, kind="stable")
        found[name] = {
            "enrichment": enrichment(hits[order]),
            "roc_auc_pool": roc_auc(hits, score),
            "roc_auc_hidden": roc_auc(hits[tested], score[tested]),
            "curve": curve(hits[order]),
        }
    return found


def enrichment(hits: np.ndarray) -> list[dict[str, Any]]:
    """Hits in the first 1, 5 and 10 % of a ranked list (n,) of bools, against what chance gives.

    Returns:
        For each share: candidates looked at, hits among them, hits expected by chance, `factor`, the ratio of
        the two (None without a hit in the list), and the chance of at least as many (hypergeometric).
    """
    rows, total = [], int(hits.sum())
    for share in SHARES:
        n = max(1, round(share * len(hits))) if len(hits) else 0
        got, expected = int(hits[:n].sum()), n * total / len(hits) if len(hits) else 0.0
        chance = float(hypergeom.sf(got - 1, len(hits), total, n)) if total else None
        factor = got / expected if expected else None
        rows.append(
            {"share": share, "n": n, "hits": got, "expected": expected, "factor": factor, "p": chance}
        )
    return rows


def curve(hits: np.ndarray) -> dict[str, list[float]]:
    """Share of the hits found against the share of the list looked at, at up to `POINTS` places."""
    total = hits.sum()
    if not total:
        return {"looked_at": [], "found": []}
    places = np.unique(np.linspace(0, len(hits), POINTS + 1).astype(int))
    gained = np.concatenate([[0], np.cumsum(hits)])[places]
    return {"looked_at": (places / len(hits)).tolist(), "found": (gained / total).tolist()}
