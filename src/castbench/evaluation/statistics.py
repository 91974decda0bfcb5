"""Statistics of the data that the models saw: the paper's Table 2, and the groups that errors fall into."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from castbench.labels import TARGETS
from castbench.materials.splits import PARTS, load_split
from castbench.materials.targets import target_values

# Rows of Table 2 for each target: our splits, the two that are one column in the paper, and the whole.
TABLE2 = {**{part: (part,) for part in PARTS}, "val/test": ("validation", "test"), "all": PARTS}
CRYSTAL_SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")
SITE_BINS = (1, 2, 4, 8, 16, 32)  # upper ends; the last group is open
FEWEST = 5  # crystals that a mean is given for: a bootstrap of fewer gives no interval
REPEATS = 2000  # of the bootstrap
_LAST_SPACEGROUPS = (2, 15, 74, 142, 167, 194, 230)


def crystal_systems(spacegroups: np.ndarray) -> np.ndarray:
    """Crystal system (n,) of international space group numbers 1 to 230."""
    return np.array(CRYSTAL_SYSTEMS)[np.searchsorted(_LAST_SPACEGROUPS, spacegroups)]


def site_labels() -> list[str]:
    """Names of the groups by number of sites."""
    lower = [1, *(end + 1 for end in SITE_BINS)]
    names = [str(a) if a == b else f"{a}–{b}" for a, b in zip(lower, SITE_BINS, strict=False)]
    return [*names, f"> {SITE_BINS[-1]}"]


def site_groups(sites: np.ndarray) -> np.ndarray:
    """Group names (n,) of numbers of sites (n,)."""
    return np.array(site_labels())[np.searchsorted(SITE_BINS, sites)]


def read_split(results: Path, target: str) -> dict[str, Any]:
    """The split of a target, see `load_split`."""
    return load_split(results / "splits" / f"{target}.json")


def read_crystals(results: Path) -> pd.DataFrame:
    """By material id: formula, n_sites, crystal_system, n_nodes (NaN: no graph), n_tokens_full, has_text."""
    columns = ["material_id", "formula", "spacegroup", "n_sites"]
    crystals = (
        pq.read_table(results / "materials.parquet", columns=columns).to_pandas().set_index("material_id")
    )
    crystals["crystal_system"] = crystal_systems(crystals.pop("spacegroup").to_numpy())
    nodes = pd.read_parquet(
        results / "graphs" / "index.parquet", columns=["material_id", "status", "n_nodes"]
    )
    nodes["n_nodes"] = nodes["n_nodes"].where(nodes.pop("status") == "ok")
    tokens = pd.read_parquet(
        results / "tokens" / "index.parquet", columns=["material_id", "n_tokens_full", "has_text"]
    )
    return crystals.join(nodes.set_index("material_id")).join(tokens.set_index("material_id"))


def read_values(results: Path, target: str) -> pd.Series:
    """Values of a target in its unit, NaN where missing. Index material_id."""
    table: pa.Table = pq.read_table(
        results / "materials.parquet", columns=["material_id", TARGETS[target].column]
    )
    return pd.Series(target_values(table, target), index=table["material_id"].to_pylist(), name=target)


def dataset_statistics(results: Path, targets: list[str]) -> pd.DataFrame:
    """The paper's Table 2 for this data, one row a target and split. Every std is the sample's (ddof = 1).

    Beside train, validation and test a target has the rows "val/test", both as the paper has them, and "all".
    Token counts are those before truncation; a crystal without text counts with its [CLS] alone. `y_mean` and
    `y_std` are in `unit`.
    """
    crystals = read_crystals(results)
    rows = []
    for target in targets:
        split, values = read_split(results, target), read_values(results, target)
        for name, parts in TABLE2.items():
            ids = [material for part in parts for material in split[part]]
            chosen, y = crystals.loc[ids], values.loc[ids]
            rows.append(
                {
                    "target": target,
                    "unit": TARGETS[target].unit,
                    "split": name,
                    "n": len(chosen),
                    "nodes_mean": chosen["n_nodes"].mean(),
                    "nodes_std": chosen["n_nodes"].std(),
                    "tokens_mean": chosen["n_tokens_full"].mean(),
                    "tokens_std": chosen["n_tokens_full"].std(),
                    "text_percent": 100 * chosen["has_text"].mean(),
                    "text_count": int(chosen["has_text"].sum()),
                    "y_mean": y.mean(),
                    "y_std": y.std(),
                }
            )
    return pd.DataFrame(rows)


def mean_baseline(results: Path, target: str) -> float:
    """Test MAE, in the target's unit, of always predicting the training mean: NaN for an empty split."""
    split, values = read_split(results, target), read_values(results, target)
    if not split["train"] or not split["test"]:
        return float("nan")
    return float((values.loc[split["test"]] - values.loc[split["train"]].mean()).abs().mean())


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of values (n,), one a crystal, and its 95 % bootstrap interval over the n crystals.

    All three are NaN for fewer than `FEWEST` crystals: a mean without an interval would be read as a result.
    """
    if len(values) < FEWEST:
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(0)
    size = (100, len(values))  # a few repeats at a time: memory stays small
    means = [values[rng.integers(len(values), size=size)].mean(axis=1) for _ in range(REPEATS // 100)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
