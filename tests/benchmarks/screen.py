"""How many ABX3 candidates a second pass through chemistry's tests, and how long a million takes in all.

    python tests/benchmarks/screen.py [--triples 3000] [--threads 2]

A candidate is an ordered triple (A, B, X) of different elements: 1,061,106 of the 103 that SMACT knows. All
are enumerated and tested, and what is allowed is predicted with three seeds of the EDM Transformer at its
default sizes (of random weights: the time is the same) and written. The alternative is SMACT's smact_filter,
called on each of a random sample of triples of elements with oxidation states, against ours on all of
these; it tests neutrality and electronegativities, not radii.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import smact
import yaml
from smact.screening import smact_filter

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from castbench.compositions.enumerate import enumerate_candidates, known_elements  # noqa: E402
from castbench.compositions.screen import screen_compositions  # noqa: E402
from castbench.config import composition_settings  # noqa: E402
from castbench.materials.splits import checksum  # noqa: E402
from castbench.models import build_composition_model  # noqa: E402
from castbench.provenance import peak_rss, write_json  # noqa: E402
from castbench.training.checkpoint import encode  # noqa: E402

SEEDS = [0, 1, 2]


def invent_runs(settings: dict, folder: Path) -> None:
    """Runs of random weights, and data that know one compound."""
    targets = [*settings["regression"], *settings["classification"]]
    for seed in SEEDS:
        network = build_composition_model(settings["model"], settings["architecture"], targets)
        path = folder / "runs" / str(seed)
        scale = {target: {"mean": 0.0, "std": 1.0} for target in targets}
        write_json(path / "metrics.json", {"status": "finished", "scale": scale})
        (path / "model.safetensors").write_bytes(encode(network.trained_state(), {}))
    table = pa.table({"formula": ["CaTiO3"], "energy_above_hull": [0.0]})
    pq.write_table(table, folder / "compositions.parquet")
    lists = {"train": ["CaTiO3"], "validation": [], "test": []}
    write_json(folder / "split.json", lists | {"checksum": checksum(lists)})


def smact_seconds(symbols: list[str], triples: int) -> float:
    """Seconds a triple of smact_filter called on each of a random sample."""
    chosen = random.Random(0).sample(list(itertools.permutations(symbols, 3)), triples)
    elements = {symbol: smact.Element(symbol) for symbol in symbols}
    start = time.process_time()
    for triple in chosen:
        smact_filter([elements[s] for s in triple], stoichs=[[1], [1], [3]])
    return (time.process_time() - start) / triples


def main() -> None:
    """Print a table and, last, the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triples", type=int, default=3000, help="of SMACT's sample (default 3000)")
    parser.add_argument("--threads", type=int, default=2, help="of the prediction (default 2)")
    arguments = parser.parse_args()
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    settings = composition_settings("edm_transformer", config)
    settings["training"]["threads"] = arguments.threads
    settings |= {"screening": config["compositions"]["screening"]}
    list(enumerate_candidates(settings["screening"] | {"x": ["O"]}))  # warms up the element tables
    start = time.process_time()
    n = sum(candidates.counts["enumerated"] for candidates in enumerate_candidates(settings["screening"]))
    every = (time.process_time() - start) / n
    symbols = [s for s in known_elements() if smact.Element(s).oxidation_states_icsd24]
    same = settings["screening"] | dict.fromkeys("abx", symbols)
    start = time.process_time()
    tested = sum(candidates.counts["enumerated"] for candidates in enumerate_candidates(same))
    ours = (time.process_time() - start) / tested
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        invent_runs(settings, folder)
        before = peak_rss()
        start = time.monotonic()
        screen_compositions(
            settings, SEEDS, folder / "runs", folder / "compositions.parquet", folder / "split.json",
            folder / "candidates.parquet", folder / "ranked.csv", folder / "summary.json", arguments.threads,
        )  # fmt: skip
        wall, after = time.monotonic() - start, peak_rss()
        summary = json.loads((folder / "summary.json").read_text())
    theirs = smact_seconds(symbols, arguments.triples)
    for row in summary["steps"]:
        print(f"{row['step']:36} {row['left']:>10,}")
    print(f"predicted with {len(SEEDS)} seeds: {summary['predicted']:,} formulas")
    print(f"{n:,} candidates from enumeration to ranked table: {wall:.0f} s on {arguments.threads} threads")
    print(f"peak memory {after:.0f} MiB, of which {after - before:.0f} MiB while screening")
    print(f"tests of neutrality, electronegativity, radii: {1 / every:,.0f} candidates a second and core")
    print(
        f"of the {len(symbols)} elements with oxidation states: {1 / ours:,.0f} candidates a second and core"
    )
    print(f"smact_filter on each of {arguments.triples:,}: {1 / theirs:,.0f} candidates a second and core")
    print(f"ratio {theirs / ours:.0f} (candidates tested a second and core, castbench against SMACT)")


if __name__ == "__main__":
    main()
