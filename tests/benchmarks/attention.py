"""Peak memory of extract_attention by number of test crystals, against holding all maps.

    python tests/benchmarks/attention.py [--crystals 700 20000]

Crystals are invented: 1 to 12 nodes, descriptions of 80 to 150 tokens, CAST of random weights with the
fusion layers of the default configuration (4 layers of 8 heads) behind a small text encoder; every run is a
process of its own. The alternative does the obvious: the maps of all crystals into a list, then the same
statistics. Memory is the most that the process has for itself (a sample every 10 ms), above that with the
model loaded; pages of the memory-mapped caches, which the kernel lends and takes back, are not in it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import small_study  # noqa: E402
from castbench import config as meaning  # noqa: E402
from castbench.graphs.crystal_graph import CrystalGraph  # noqa: E402
from castbench.graphs.packed import PackedWriter  # noqa: E402
from castbench.materials.splits import write_split  # noqa: E402
from castbench.provenance import sha256_file  # noqa: E402
from castbench.text.encoders import prefetch_encoder  # noqa: E402
from castbench.text.states import embed_text  # noqa: E402
from castbench.text.tokens import tokenize_text  # noqa: E402

LOAD = """
import json, sys, threading, time
from pathlib import Path
import torch
from castbench.evaluation import attention
from castbench.evaluation.trained import load_run
from castbench.training.dataset import Crystals

root, split = Path(sys.argv[1]), Path(sys.argv[2])
caches = (root / "graphs", root / "tokens")
encoder = root.parent / "encoder"

highest, ended = 0, threading.Event()

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    global highest
    while not ended.wait(0.01):
        highest = max(highest, private())

model = load_run(root / "runs" / "band_gap" / "cast" / "0", encoder)
crystals = Crystals(model, *caches, root / "text_states" / "0", torch.device("cpu"))
attention.attention(model, crystals.batch(torch.arange(attention.BATCH)))
before, start = private(), time.perf_counter()
watcher = threading.Thread(target=watch)
watcher.start()
"""
OURS = """
attention.extract_attention(
    {"target": "band_gap", "material": None}, root / "runs", [0], root / "materials.parquet", split,
    root / "descriptions.parquet", *caches, encoder, root / "attention", root / "text_states" / "0",
)
"""
HELD = """
test, _ = crystals.rows(json.loads(split.read_text())["test"])
batches = (crystals.batch(part) for part in test.split(attention.BATCH))
maps = [m.copy() for batch in batches for m in attention.attention(model, batch)]  # without their padding
for weights in maps:
    attention.cosine_similarities(weights), attention.effective_tokens(weights)
"""
TOLD = """
spent = time.perf_counter() - start
ended.set()
watcher.join()
print(json.dumps([highest - before, spent]))
"""


def invent(root: Path, count: int) -> None:
    """A data set of `count` crystals with its caches, and one run of CAST that nobody trained."""
    rng = np.random.default_rng(0)
    ids = [f"m-{i}" for i in range(count)]
    root.mkdir()
    spacegroups = pa.array(rng.integers(1, 231, count), pa.int16())
    table = {"material_id": ids, "formula": ids, "spacegroup": spacegroups}
    pq.write_table(pa.table(table), root / "materials.parquet")
    settings = {"structure_encoder": "cogn", "neighbours": 24, "symprec": 1e-4, "spglib": "any"}
    with PackedWriter(root / "graphs", settings, sha256_file(root / "materials.parquet")) as writer:
        for material_id in ids:
            nodes = int(rng.integers(1, 13))
            edges = 24 * nodes
            source = rng.integers(0, nodes, edges).astype(np.int32)
            target = np.repeat(np.arange(nodes, dtype=np.int32), 24)
            ones, distances = np.ones(edges, np.float32), rng.uniform(2, 5, edges).astype(np.float32)
            elements = rng.integers(1, 95, nodes).astype(np.uint8)
            graph = CrystalGraph(elements, np.ones(nodes, np.float32), source, target, distances, ones, 1)
            writer.append([material_id], [graph])
    texts = [f"{small_study.TEXTS[i % 2]} All Mg({i % 499})-O bonds are alike." for i in range(count)]
    pq.write_table(pa.table({"material_id": ids, "text": texts}), root / "descriptions.parquet")
    small_study.write_encoder(root.parent / "bert")
    encoder = root.parent / "encoder"
    prefetch_encoder(str(root.parent / "bert"), encoder)
    limit = {"max_tokens": small_study.MAX_TOKENS}
    tokenize_text(limit, root / "descriptions.parquet", encoder, root / "tokens")
    embed_text(root / "tokens", encoder, 0, root / "text_states" / "0")
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    small_study.ARCHITECTURE = meaning.architecture("cast", config)
    small_study.write_run(root / "runs" / "band_gap" / "cast" / "0", "cast", encoder)
    frame = pa.table({"material_id": ids, "split": ["test"] * count, "y_true": np.zeros(count),
                      "y_pred": rng.normal(size=count)})  # fmt: skip
    pq.write_table(frame, root / "runs" / "band_gap" / "cast" / "0" / "predictions.parquet")


def measure(script: str, root: Path, split: Path) -> tuple[float, float]:
    """Peak of private memory in MiB above that with the model loaded, and seconds, of a script."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD + script + TOLD, root, split],
        env=environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return tuple(json.loads(ended.stdout))


def main() -> None:
    """Print a table and, last, the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crystals", type=int, nargs="+", default=[700, 20_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "invented"
        invent(root, max(arguments.crystals))
        print(f"{'crystals':>9} {'castbench':>18} {'all maps held':>18}")
        for count in sorted(arguments.crystals):
            split = root / f"{count}.json"
            lists = {"train": [], "validation": [], "test": [f"m-{i}" for i in range(count)]}
            write_split(split, {"target": "band_gap"}, lists)
            found = [measure(script, root, split) for script in (OURS, HELD)]
            cells = [f"{memory:>7.0f} MiB {seconds:>4.0f} s" for memory, seconds in found]
            print(f"{count:>9,} {cells[0]:>18} {cells[1]:>18}", flush=True)
    ratio = found[1][0] / found[0][0]
    print(f"ratio {ratio:.1f} (added memory for {count:,} crystals, all maps held against castbench)")


if __name__ == "__main__":
    main()
