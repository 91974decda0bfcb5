"""How many crystals a second one core describes, against the unpatched robocrystallographer.

    PYTHONHASHSEED=0 python tests/benchmarks/text.py [--crystals 60] [--memory 1000]

Evenly spread real crystals of ../shared/data (three files, 1 to 138 sites), CPU seconds of a process that has
imported everything, and whether the texts are the same. `--memory N` also describes N crystals in one process
and prints its memory on the way.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from castbench.text import robocrystallographer  # noqa: E402
from real_crystals import sample  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
SIZES = (1, 5, 10, 20, 50, 1000)  # sites; bounds of the rows of the table


def ours(crystals: list[dict]) -> list[tuple[str | None, float]]:
    """Text, or None where it fails, and CPU seconds."""
    robocrystallographer.prepare()
    answers = []
    for crystal in crystals:
        start, text = time.process_time(), None
        try:
            text = robocrystallographer.describe(crystal["structure"])
        except Exception as error:
            print(f"{crystal['material_id']}: {error!r}", file=sys.stderr)
        answers.append((text, time.process_time() - start))
    return answers


def stock(crystals: list[dict]) -> list[tuple[str | None, float]]:
    """The same of the unpatched package, in a process of its own."""
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "reference" / "describe_stock.py")],
        input="\n".join(map(json.dumps, crystals)), text=True, stdout=subprocess.PIPE, check=True,
        env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = map(json.loads, answer.stdout.splitlines())
    return [(row.get("text"), row["seconds"]) for row in rows]


def memory() -> float:
    """Resident memory of this process, MB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1e3


def print_memory(count: int) -> None:
    """Memory of a worker while it describes as many crystals, all different."""
    robocrystallographer.prepare()
    for number, crystal in enumerate(sample(DATA, {"elastic4": count})):
        with suppress(Exception):  # it has no text for a few
            robocrystallographer.describe(crystal["structure"])
        if number % max(count // 10, 1) == 0:
            print(f"memory after {number + 1} crystals: {memory():.0f} MB", flush=True)


def main() -> None:
    """Print a table and, last, the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crystals", type=int, default=60, help="in all (default 60)")
    parser.add_argument("--memory", type=int, default=0, help="crystals for the memory of a worker")
    arguments = parser.parse_args()
    third = max(arguments.crystals // 3, 1)
    crystals = sample(DATA, {"elastic4": third, "mp36k": third, "phonons_text": third})
    if arguments.memory:
        print_memory(arguments.memory)
    described, reference = ours(crystals), stock(crystals)
    sites = np.array([crystal["nsites"] for crystal in crystals])
    seconds = np.array([[mine[1], theirs[1]] for mine, theirs in zip(described, reference, strict=True)])
    print(f"{'sites':>9} {'n':>4} {'castbench, median s':>20} {'stock, median s':>16} {'ratio of sums':>14}")
    for low, high in itertools.pairwise(SIZES):
        chosen = seconds[(low <= sites) & (sites < high)]
        if len(chosen):
            mine, theirs = np.median(chosen, axis=0)
            ratio = chosen[:, 1].sum() / chosen[:, 0].sum()
            print(f"{low:>4}-{high - 1:<4} {len(chosen):>4} {mine:>20.3f} {theirs:>16.2f} {ratio:>14.1f}")
    mine, theirs = np.median(seconds, axis=0)
    same = sum(a[0] == b[0] for a, b in zip(described, reference, strict=True))
    print(f"{'all':>9} {len(seconds):>4} {mine:>20.3f} {theirs:>16.2f}")
    print(f"the same text: {same} of {len(seconds)}")
    ratio = seconds[:, 1].sum() / seconds[:, 0].sum()
    print(f"ratio {ratio:.1f} (crystals a second and core, castbench against robocrystallographer 0.2.13)")


if __name__ == "__main__":
    main()
