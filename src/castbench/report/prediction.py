"""What a planned run will take (device hours, disk, wall time), and what limits it, from a finished run.

Every rate is measured (rates.py). Training: seconds a step and seconds a multiply-add (work.py) are fitted to
all runs, and what a model takes beyond that fit stays its own factor; they are multiplied by the steps and
multiply-adds of the plan's models, texts and graphs. Token states grow with multiply-adds too, describing and
graphs with nodes, tokenizing with tokens. Notes say how far that extrapolates; a pilot (the plan on a sample,
for few epochs, on the planned hardware) extrapolates least.
"""

import heapq
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from castbench import config as meaning
from castbench.errors import InputError
from castbench.evaluation.records import RESOURCES
from castbench.evaluation.statistics import read_split
from castbench.provenance import write_json
from castbench.report.rates import Rates, crystal_sizes, mean_size, measure, read_shape
from castbench.report.work import CrystalSize, EncoderShape, embedding_work, mean_of_cut, step_work

log = logging.getLogger(__name__)

HOUR = 3600
SMALL = 1000  # crystals
GRAPH_CORES = 8  # of build_graphs in the profiles
# Settings that change neither the time of a step nor its size, and those that steps and multiply-adds follow.
FREE = ("dataset", "model", "objective", "seed", "target", "learning_rate", "lora_learning_rate",
        "weight_decay", "loss", "warmup_steps", "cycles", "mask_probability", "temperature", "alpha",
        "dropout", "device", "schedule", "final_learning_rate", "max_gradient_norm", "selection")  # fmt: skip
SCALED = (
    "epochs",
    "batch_size",
    "text",
    "width",
    "depth",
    "layers",
    "feedforward",
    "heads",
    "hidden",
    "rank",
)
SHAPES = {"minilm": EncoderShape(6, 384, 1536), "matscibert": EncoderShape(12, 768, 3072)}


def predict_cost(
    plan: list[Path],
    results: Path,
    output: Path,
    gpus: list[int] | None = None,
    cores: int = 64,
    crystals: int | None = None,
    speedup: float = 1.0,
) -> None:
    """Predict device hours, disk and wall time of a planned run; write them as JSON and print a table.

    Args:
        plan: configuration files, each on top of the one before: config.yaml, a preset, your own.
        results: results/{dataset}/ of a finished run.
        output: the JSON file.
        gpus: numbers of cards (of cores, for a plan on the CPU) that train at once; None: 1, 8 and 64.
        cores: that describe crystals and build graphs.
        crystals: of the plan; None: the paper's for the Materials Project, else the finished run's.
        speedup: how many times faster the planned device trains than the measured one.

    Raises:
        InputError: the run lacks what a prediction needs, or the plan is of another study than cast.
    """
    config: dict[str, Any] = {}
    for file in plan:
        if not file.is_file():
            raise InputError(f"{file}: no such configuration file")
        config = merged(config, yaml.safe_load(file.read_text(encoding="utf-8")))
    if config["study"] != "cast":
        raise InputError(
            f"study {config['study']}: only the study cast is foreseen; of others, the cost.json of a short "
            "run's folders say how long an epoch takes"
        )
    rates = measure(results)
    shape = planned_shape(config, results)
    sizes = planned_sizes(config, rates, results, crystals)
    jobs = planned_jobs(config, rates, sizes, shape, speedup)
    stages = stage_hours(jobs)
    walls = {}
    for n in gpus or (1, 8, 64):
        seconds, chain = schedule(jobs, n, cores)
        walls[n] = {
            "hours": seconds / HOUR,
            "limited_by": max(chain, key=lambda stage: chain[stage]),
            "critical_path_hours": {stage: spent / HOUR for stage, spent in chain.items()},
        }
    prediction = {
        "dataset": config["dataset"],
        "measured": {"results": results.name, "device": rates.device, "crystals": rates.crystals},
        "crystals": sizes.crystals,
        "trained_on": sizes.train,
        "mean_size": {target: asdict(size) for target, size in sizes.of.items()},
        "stages": stages,
        "device_hours": sum(job.seconds for job in jobs if job.device) / HOUR,
        "core_hours": sum(job.seconds * job.cores for job in jobs if not job.device) / HOUR,
        "disk_gb": planned_disk(config, rates, sizes, shape),
        "wall": walls,
        "notes": differences(config, rates, sizes, shape, speedup),
    }
    write_json(output, prediction)
    print(text(prediction, cores), end="")


def planned_shape(config: dict[str, Any], results: Path) -> EncoderShape:
    """Sizes of the plan's text encoder: of its files, or as published.

    Raises:
        InputError: neither is known.
    """
    folder = results.parent / "encoders" / meaning.encoder_folder(config).name
    if (folder / "config.json").is_file():
        return read_shape(folder)
    if config["text_encoder"] in SHAPES:
        return SHAPES[config["text_encoder"]]
    raise InputError(
        f"text_encoder {config['text_encoder']}: its size is not known; run prefetch_encoder first"
    )


@dataclass
class Sizes:
    """Crystals of the plan: how many in all and in each target's training part, and how large they are."""

    crystals: int
    train: dict[str, int]
    all: CrystalSize
    of: dict[str, CrystalSize]


def planned_sizes(config: dict[str, Any], rates: Rates, results: Path, crystals: int | None) -> Sizes:
    """Numbers and sizes of the plan's crystals: for the Materials Project the paper's, else the run's.

    The paper's are those of Table 2, for what it lacks those of the total energy; the mean length of its
    texts after the cut is that of a log-normal distribution.

    Raises:
        InputError: a target of the plan was not measured, so that its number of crystals is not known.
    """
    targets, max_tokens = config["targets"], config["max_tokens"]
    planned = config["graphs"]["neighbours"]
    denser = planned / rates.neighbours if planned and rates.neighbours else 1.0
    edges = denser * rates.size.edges / rates.size.nodes
    if crystals is None and config["materials"]["source"] == "materials_project":
        table = pd.read_csv(RESOURCES / "paper" / "table2.csv")
        rows = table[table["split"] == "train"].set_index("target").to_dict("index")
        # Its other targets are known of all crystals, as the total energy is.
        known_as = {target: target if target in rows else "total_energy" for target in targets}
        of = {}
        for target, name in known_as.items():
            row = rows[name]
            cut = mean_of_cut(row["tokens_mean"], row["tokens_std"], max_tokens)
            of[target] = CrystalSize(row["nodes_mean"], edges * row["nodes_mean"], row["tokens_mean"], cut)
        counts = table.groupby("target")["n"].sum().to_dict()
        most = max(targets, key=lambda target: counts[known_as[target]])
        total = counts[known_as[most]]
        share = min(1.0, (config["materials"]["sample"] or total) / total)
        train = {target: round(share * rows[name]["n"]) for target, name in known_as.items()}
        return Sizes(round(share * total), train, of[most], of)
    lacking = sorted(set(targets) - set(rates.n))
    if lacking:
        raise InputError(
            f"{results}: no finished run of {', '.join(lacking)}; its number of crystals is not known"
        )
    total = crystals or config["materials"]["sample"] or rates.crystals
    known = crystal_sizes(results)
    known["n_edges"] *= denser
    return Sizes(
        total,
        {t: round(rates.n[t] * total / rates.crystals) for t in targets},
        mean_size(known, max_tokens),
        {
            t: mean_size(known.loc[known.index.intersection(read_split(results, t)["train"])], max_tokens)
            for t in targets
        },
    )


def planned_disk(config: dict[str, Any], rates: Rates, sizes: Sizes, shape: EncoderShape) -> float:
    """GB of caches and run folders; a token state is a row of float16."""
    runs = len(config["targets"]) * len(config["models"]) * len(config["training"]["seeds"])
    runs += len(objectives(config)) * len(config["training"]["seeds"])
    states = len(state_layers(config)) * 2 * shape.width * sizes.all.tokens
    each = rates.node_bytes * sizes.all.nodes + rates.token_bytes * sizes.all.tokens_full + states
    return (each * sizes.crystals + rates.run_bytes * runs) / 1e9


def settings_of(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the plan's runs of a model or an objective, as in their config.json."""
    settings = meaning.training_settings if name in meaning.MODELS else meaning.pretraining_settings
    return settings(name, config)


def readers(config: dict[str, Any]) -> list[str]:
    """Models and objectives of the plan that read text."""
    names = (*config["models"], *objectives(config))
    return [name for name in names if meaning.text_mode(name, config) != "none"]


def state_layers(config: dict[str, Any]) -> list[int]:
    """Caches of token states of the plan, by the layers that they leave to the models."""
    found = {meaning.remaining_layers(name, config) for name in readers(config)}
    return sorted(layers for layers in found if layers is not None)


def objectives(config: dict[str, Any]) -> list[str]:
    """Pretrainings of the plan."""
    return sorted(filter(None, {meaning.objective(model) for model in config["models"]}))


@dataclass
class Job:
    """A job of the plan; `needs` are names of jobs or of groups of them."""

    stage: str
    group: str
    seconds: float
    needs: tuple[str, ...] = ()
    cores: int = 1
    device: bool = False  # a card for a plan on GPUs


def planned_jobs(
    config: dict[str, Any], rates: Rates, sizes: Sizes, shape: EncoderShape, speedup: float
) -> list[Job]:
    """The jobs of the workflow as its rules cut them: one trains all seeds of a model on a target.

    Raises:
        InputError: a model or a pretraining of the plan was not measured.
    """
    lacking = [name for name in (*config["models"], *objectives(config)) if name not in rates.factor]
    if lacking:
        raise InputError(f"no finished run of {', '.join(lacking)} to predict from; train it in a pilot")
    seeds, shards, n = config["training"]["seeds"], config["text"]["shards"], sizes.crystals
    describe = rates.start_describe + rates.describe * n * sizes.all.nodes / shards
    jobs = [Job("describe_shard", "texts", describe) for _ in range(shards)]
    build = rates.start_describe + rates.graphs * n * sizes.all.nodes / GRAPH_CORES
    jobs.append(Job("build_graphs", "graphs", build, cores=GRAPH_CORES))
    tokenize = rates.start + rates.tokenize * n * sizes.all.tokens_full
    jobs.append(Job("tokenize_text", "tokens", tokenize, ("texts",)))
    for layers in state_layers(config):
        embed = rates.start + rates.embed * n * embedding_work(layers, shape, sizes.all) / speedup
        jobs.append(Job("embed_text", f"states {layers}", embed, ("tokens",), device=True))

    def reads(name: str) -> tuple[str, ...]:
        if name not in readers(config):
            return ("graphs",)
        layers = meaning.remaining_layers(name, config)
        return ("graphs", "tokens", *([f"states {layers}"] if layers is not None else []))

    def seconds(name: str, crystals: int, size: CrystalSize, section: dict[str, Any]) -> float:
        epochs, batch = section["epochs"], section["batch_size"]
        work = crystals * step_work(settings_of(name, config), shape, size)
        return rates.seconds(name, epochs * math.ceil(crystals / batch), epochs * work) / speedup

    for name in objectives(config):
        once = seconds(name, round(rates.share * n), sizes.all, config["pretraining"][name])
        jobs += [Job("pretrain_model", name, rates.start + once, reads(name), device=True) for _ in seeds]
    for model in config["models"]:
        for target in config["targets"]:
            once = seconds(model, sizes.train[target], sizes.of[target], config["training"])
            start = meaning.objective(model)
            needs = (*reads(model), *([start] if start else []))
            job = Job("train_model", f"{model} {target}", rates.start + once * len(seeds), needs, device=True)
            jobs.append(job)
    return jobs


def stage_hours(jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """Number of jobs of each stage, and their hours of a device or of a core."""
    stages: dict[str, dict[str, Any]] = {}
    for job in jobs:
        empty = {"jobs": 0, "hours": 0.0, "of": "device" if job.device else "core"}
        stage = stages.setdefault(job.stage, empty)
        stage["jobs"] += 1
        stage["hours"] += job.seconds * job.cores / HOUR
    return stages


def schedule(jobs: list[Job], devices: int, cores: int) -> tuple[float, dict[str, float]]:
    """Wall time (s) of a list schedule, pretraining first, then the longest; and its critical path by stage.

    The critical path goes back from the last job, each time to the job that it waited for: an input, or the
    one whose end freed its card or its cores. A job that wants more cores than there are takes these, for
    longer.
    """
    jobs = [
        replace(job, cores=cores, seconds=job.seconds * job.cores / cores) if job.cores > cores else job
        for job in jobs
    ]
    open_jobs = {job.group: sum(other.group == job.group for other in jobs) for job in jobs}
    waiting = sorted(range(len(jobs)), key=lambda i: (jobs[i].stage != "pretrain_model", -jobs[i].seconds))
    free = {True: devices, False: cores}
    running: list[tuple[float, int]] = []
    cause: dict[int, int | None] = {}
    now = 0.0
    last: int | None = None
    while waiting or running:
        for i in list(waiting):
            job = jobs[i]
            want = 1 if job.device else job.cores
            if free[job.device] >= want and not any(open_jobs[need] for need in job.needs):
                free[job.device] -= want
                cause[i] = last
                heapq.heappush(running, (now + job.seconds, i))
                waiting.remove(i)
        now, last = heapq.heappop(running)
        free[jobs[last].device] += 1 if jobs[last].device else jobs[last].cores
        open_jobs[jobs[last].group] -= 1
    chain: dict[str, float] = {}
    while last is not None:
        chain[jobs[last].stage] = chain.get(jobs[last].stage, 0.0) + jobs[last].seconds
        last = cause[last]
    return now, dict(sorted(chain.items(), key=lambda item: -item[1]))


def differences(
    config: dict[str, Any], rates: Rates, sizes: Sizes, shape: EncoderShape, speedup: float
) -> list[str]:
    """Notes on how far the prediction goes beyond what was measured, and what it leaves out."""
    found: dict[str, set[str]] = {}
    growth = {}
    for name in (*config["models"], *objectives(config)):
        for key, planned, measured in unequal(settings_of(name, config), rates.settings[name]):
            if key.split(".")[-1] not in (*FREE, *SCALED):
                found.setdefault(f"{key}: planned {planned}, measured {measured}", set()).add(name)
        parts = (
            [(1, sizes.all)]
            if name not in meaning.MODELS
            else [(sizes.train[t], sizes.of[t]) for t in sizes.of]
        )
        work = sum(n * step_work(settings_of(name, config), shape, size) for n, size in parts) / sum(
            n for n, _ in parts
        )
        growth[name] = work / rates.done[name]
    notes = [f"{change}, not scaled ({', '.join(sorted(names))})" for change, names in sorted(found.items())]
    notes.append(
        "multiply-adds of a crystal's step, planned over measured: "
        + ", ".join(f"{name} {value:.3g}" for name, value in growth.items())
    )
    old, new = rates.size, sizes.all
    notes.append(
        f"a crystal has {new.nodes:.1f} nodes and {new.tokens:.0f} of {new.tokens_full:.0f} tokens, measured "
        f"{old.nodes:.1f} and {old.tokens:.0f} of {old.tokens_full:.0f}; describing and graphs by nodes"
    )
    if rates.crystals < SMALL:
        notes.append(
            f"measured on {rates.crystals} crystals: what describing, tokens and token states cost once is"
            " scaled too, so theirs are upper bounds"
        )
    notes.append("attention, probes, tables and figures are left out")
    if config["training"]["device"] != "cpu" and "thread" in rates.device and speedup == 1:
        notes.append(
            f"the plan trains on a GPU; device hours are of {rates.device}: give --speedup, or a pilot"
        )
    return notes


def unequal(a: dict[str, Any], b: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys in both whose values differ, with the values."""
    for key in sorted(set(a) & set(b)):
        if isinstance(a[key], dict) and isinstance(b[key], dict):
            yield from unequal(a[key], b[key], f"{path}{key}.")
        elif a[key] != b[key]:
            yield f"{path}{key}", a[key], b[key]


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`overlay` on top of `base`, as Snakemake merges configuration files."""
    result = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def text(prediction: dict[str, Any], cores: int) -> str:
    """The prediction as a table."""
    measured = prediction["measured"]
    lines = [
        f"{prediction['dataset']}: {prediction['crystals']:,} crystals, from {measured['results']} "
        f"({measured['crystals']:,} crystals, {measured['device']})",
        f"{'stage':16}{'jobs':>6}{'hours':>12}",
    ]
    for name, stage in prediction["stages"].items():
        lines.append(f"{name:16}{stage['jobs']:>6}{stage['hours']:>12.3f} of a {stage['of']}")
    lines.append(f"{prediction['device_hours']:.3f} device hours, {prediction['core_hours']:.3f} core hours, "
                 f"{prediction['disk_gb']:.2f} GB")  # fmt: skip
    for n, wall in prediction["wall"].items():
        parts = ", ".join(f"{stage} {hours:.3f} h" for stage, hours in wall["critical_path_hours"].items())
        lines.append(
            f"{n:>4} at once, {cores} cores: {wall['hours']:.3f} h; {wall['limited_by']} limits ({parts})"
        )
    lines += [f"note: {note}" for note in prediction["notes"]]
    return "\n".join(lines) + "\n"
