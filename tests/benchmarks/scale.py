"""How long Snakemake plans the paper's preset and one ten times larger; and predicted against measured cost.

    python tests/benchmarks/scale.py plan [--targets 40] [--models 30] [--seeds 10]
    python tests/benchmarks/scale.py predict [--epochs 20]

plan: dry runs in a copy of the project whose lists of targets and models are made longer by copies of their
own, and whose data are a local file. The alternative is a job a seed, with the seed as a wildcard of
train_model, where castbench has a job train all seeds of a model on a target.

predict: trains the smoke preset with texts cut at 64 tokens, predicts from its records one with whole texts,
larger models and twice the epochs, runs that too, and compares.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("Snakefile", "config.yaml", "workflow", "src", "envs")
PAPER = {"targets": 4, "models": 7, "seeds": 3}
LARGER = {  # than the smoke preset's
    "cogn": {"width": 64, "depth": 3},
    "lora": {"rank": 4, "layers": 3},
    "cross_attention": {"layers": 3, "heads": 4, "width": 64, "feedforward": 128},
}
WIDE = """
# Added by tests/benchmarks/scale.py: copies of the models and targets.
for _i in range({models}):
    MODELS.setdefault(f"copy{{_i}}", MODELS[list(MODELS)[_i % 7]])
"""


def copy(folder: Path) -> Path:
    """The project without its results, and the text encoder's files if they are there."""
    folder.mkdir()
    for name in PROJECT:
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    encoders = ROOT / "results" / "encoders"
    if encoders.is_dir():
        shutil.copytree(encoders, folder / "results" / "encoders")
    return folder


def snakemake(folder: Path, *arguments: str) -> str:
    """Output of Snakemake in a folder; ends the benchmark where it fails."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "snakemake", *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if ended.returncode:
        raise SystemExit(ended.stdout[-3000:])
    return ended.stdout


def enlarge(folder: Path, targets: int, models: int, seeds: int) -> str:
    """Make the lists longer, in this copy alone; return the name of the overlay that asks for all of it."""
    schema_file = folder / "workflow/schemas/config.schema.yaml"
    schema = yaml.safe_load(schema_file.read_text())
    preset = yaml.safe_load((folder / "workflow/presets/paper.yaml").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    known = schema["properties"]
    wide = {
        "targets": [*config["targets"], *(f"copy{i}" for i in range(targets - len(config["targets"])))],
        "models": [*config["models"], *(f"copy{i}" for i in range(models - len(config["models"])))],
    }
    for name, items in wide.items():
        known[name]["items"]["enum"] = items
    schema_file.write_text(yaml.safe_dump(schema, sort_keys=False))
    with (folder / "src/castbench/config.py").open("a") as file:
        file.write(WIDE.format(models=models))
    (folder / "crystals.jsonl").write_text("")
    overlay = preset | wide | {"attention": {"target": config["targets"][0], "material": None}}
    overlay["materials"] = preset["materials"] | {"source": "local", "path": "crystals.jsonl"}
    overlay["training"] = preset["training"] | {"seeds": list(range(seeds))}
    (folder / "wide.yaml").write_text(yaml.safe_dump(overlay))
    return "wide.yaml"


def job_a_seed(folder: Path) -> None:
    """Turn the seeds of train_model into a wildcard."""
    file = folder / "workflow/rules/training.smk"
    head, tail = file.read_text().split("rule train_model:")
    changed = tail.replace("{{model}}/{seed}/{file}", "{{model}}/{{seed}}/{file}")
    changed = changed.replace('            seed=config["training"]["seeds"],\n', "")
    changed = changed.replace("{target}.{model}", "{target}.{model}.{seed}")
    changed = changed.replace('seeds=config["training"]["seeds"]', "seeds=lambda wildcards: wildcards.seed")
    if changed.count("{seed}") < 2:
        raise SystemExit("the rule train_model has changed: mend this benchmark")
    file.write_text(f"{head}rule train_model:{changed}")


def children_seconds() -> float:
    """CPU time (s) of all child processes that have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def planned(folder: Path, overlay: str, repeats: int = 3) -> tuple[int, float]:
    """Jobs of the plan, and the median CPU time (s) of a quiet dry run, which has one thread."""
    times = []
    for _ in range(repeats):
        start = children_seconds()
        output = snakemake(folder, "--cores", "8", "-n", "--quiet", "rules", "--configfile", overlay)
        times.append(children_seconds() - start)
    total = [int(line.split()[1]) for line in output.splitlines() if line.startswith("total ")]
    return total[-1], statistics.median(times)


def plan(arguments: argparse.Namespace) -> None:
    """Print the planning times and their ratio."""
    large = {"targets": arguments.targets, "models": arguments.models, "seeds": arguments.seeds}
    rows = {}
    print(f"{'plan':22}{'targets':>9}{'models':>8}{'seeds':>7}{'jobs':>8}{'seconds':>9}")
    for name, numbers, seeded in (
        ("paper", PAPER, False),
        ("large", large, False),
        ("large, a job a seed", large, True),
    ):
        with tempfile.TemporaryDirectory() as parent:
            folder = copy(Path(parent) / "castbench")
            overlay = enlarge(folder, **numbers)
            if seeded:
                job_a_seed(folder)
            rows[name] = planned(folder, overlay, 1 if seeded else 3)
        jobs, seconds = rows[name]
        print(
            f"{name:22}{numbers['targets']:>9}{numbers['models']:>8}{numbers['seeds']:>7}{jobs:>8}{seconds:>9.1f}"
        )
    ratio = rows["large, a job a seed"][1] / rows["large"][1]
    print(
        f"ratio {ratio:.1f} (planning time of a job a seed against a job that trains all seeds, large plan)"
    )


def predict(arguments: argparse.Namespace) -> None:
    """Print predicted and measured hours, and the ratio of the device hours."""
    with tempfile.TemporaryDirectory() as parent:
        folder = copy(Path(parent) / "castbench")
        presets = ["config.yaml", "workflow/presets/smoke.yaml"]
        pilot = {"training": {"epochs": arguments.epochs}, "max_tokens": 64}
        planned = {"training": {"epochs": 2 * arguments.epochs}, "max_tokens": 512, "architecture": LARGER}
        for name, overlay in (("pilot", pilot), ("planned", planned)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({"dataset": name, **overlay}))
        for name in ("pilot", "planned"):
            start = time.perf_counter()
            snakemake(folder, "training", "--cores", "2", "--configfile", *presets[1:], f"{name}.yaml")
            wall = time.perf_counter() - start
            print(f"{name}: {wall:.0f} s of wall time")
            if name == "pilot":
                command = ["predict_cost", "--results", "results/pilot", "--output", "predicted.json"]
                command += ["--plan", *presets, "planned.yaml", "--gpus", "2", "--cores", "2"]
                environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
                subprocess.run(
                    [sys.executable, "-m", "castbench", *command], cwd=folder, env=environment, check=True
                )
        predicted = json.loads((folder / "predicted.json").read_text())
        files = folder.glob("results/planned/benchmarks/train_model/*.tsv")
        measured = sum(float(file.read_text().splitlines()[1].split("\t")[0]) for file in files) / 3600
        trained = predicted["stages"]["train_model"]["hours"]
        print(f"training jobs: predicted {trained:.4f} h, measured {measured:.4f} h")
        print(f"wall time: predicted {predicted['wall']['2']['hours'] * 3600:.0f} s, measured {wall:.0f} s")
        print(f"ratio {trained / measured:.2f} (hours of training jobs, predicted against measured)")


def main() -> None:
    """Run one of the two benchmarks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    planning = commands.add_parser("plan")
    planning.add_argument("--targets", type=int, default=40)
    planning.add_argument("--models", type=int, default=30)
    planning.add_argument("--seeds", type=int, default=10)
    planning.set_defaults(run=plan)
    predicting = commands.add_parser("predict")
    predicting.add_argument("--epochs", type=int, default=20, help="of the pilot (default 20)")
    predicting.set_defaults(run=predict)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
