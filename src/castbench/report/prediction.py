"""What a planned run will take (device hours, disk, wall time), and what limits it, from a finished run.

Every number is measured on the finished run and scaled: descriptions, graphs and token states by crystals,
training by crystals and epochs. Sizes of models and texts are not scaled: where plan and measurement differ,
a note says so, and a pilot (the plan on a sample, for few epochs, on the planned hardware) gives sound rates.
"""

import heapq
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from castbench import config as meaning
from castbench.errors import InputError
from castbench.evaluation.aggregate import RESOURCES, read_json
from castbench.provenance import write_json

log = logging.getLogger(__name__)

HOUR = 3600
# Settings that change neither the work of a step nor its size.
FREE = ("dataset", "model", "objective", "seed", "target", "epochs", "learning_rate",
        "lora_learning_rate", "weight_decay", "loss", "warmup_steps", "cycles",
        "mask_probability", "temperature", "alpha")  # fmt: skip


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
        InputError: the run lacks what a prediction needs.
    """
    config: dict[str, Any] = {}
    for file in plan:
        if not file.is_file():
            raise InputError(f"{file}: no such configuration file")
        config = merged(config, yaml.safe_load(file.read_text(encoding="utf-8")))
    rates = measure(results)
    sizes = planned_sizes(config, rates, results, crystals)
    jobs = planned_jobs(config, rates, sizes, speedup)
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
        "stages": stages,
        "device_hours": sum(job.seconds for job in jobs if job.device) / HOUR,
        "core_hours": sum(job.seconds * job.cores for job in jobs if not job.device) / HOUR,
        "disk_gb": planned_disk(config, rates, sizes),
        "wall": walls,
        "notes": differences(config, rates, speedup),
    }
    write_json(output, prediction)
    print(text(prediction, cores), end="")


@dataclass
class Rates:
    """What the finished run took."""

    crystals: int
    device: str
    describe: float  # core seconds a crystal
    graphs: float  # core seconds a crystal
    tokenize: float  # seconds a crystal
    embed: float  # seconds a crystal; 0 where nothing is embedded
    start: float  # seconds of a training job outside of its training: imports, opening caches
    start_describe: float  # likewise of a shard of descriptions
    train: dict[str, float] = field(default_factory=dict)  # seconds a crystal and epoch, by model
    pretrain: dict[str, float] = field(default_factory=dict)  # likewise, by objective
    share: float = 0.0  # of the crystals that are pretrained on
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # config.json by model or objective
    n: dict[str, int] = field(default_factory=dict)  # training crystals by target
    caches: float = 0.0  # bytes a crystal of data and caches
    run: float = 0.0  # bytes of a run folder and its checkpoints
    encoder: str = ""
    tokens: float = 0.0  # mean length of a text, uncut


def measure(results: Path) -> Rates:
    """Read what a finished run took.

    Raises:
        InputError: it has no records, or lacks a file that a prediction needs.
    """
    descriptions = needed(results / "descriptions.json")
    tokens, graphs = needed(results / "tokens/manifest.json"), needed(results / "graphs/manifest.json")
    crystals = descriptions["n"]
    rates = Rates(
        crystals=crystals,
        device="",
        describe=descriptions["seconds"]["total"] / crystals,
        graphs=needed(results / "graphs/cost.json")["cpu_seconds"] / graphs["n_graphs"],
        tokenize=needed(results / "tokens/cost.json")["seconds"] / crystals,
        embed=0.0,
        start=0.0,
        start_describe=0.0,
        encoder=tokens["encoder"]["id"],
        tokens=tokens["n_tokens_full_mean"],
    )
    embedded = [read_json(file)["seconds"] for file in results.glob("text_states/*/cost.json")]
    rates.embed = max(embedded, default=0.0) / crystals
    records = list(finished(results / "runs", "*/*")) + list(finished(results / "pretrain", "*"))
    if not records:
        raise InputError(f"{results}: no finished training to predict from; run the workflow first")
    spent: dict[str, tuple[float, float]] = {}
    for folder, record, cost, settings in records:
        name = record.get("model") or record["objective"]
        seconds, work = spent.get(name, (0.0, 0.0))
        spent[name] = seconds + cost["seconds"], work + record["n"]["train"] * record["epochs"]
        rates.settings[name] = settings
        rates.device = device_name(cost["hardware"])
        if "target" in record:
            rates.n[record["target"]] = record["n"]["train"]
        else:
            rates.share = record["n"]["train"] / crystals
        rates.run = max(rates.run, size(folder) + size(folder.parent / "checkpoints" / folder.name))
    for name, (seconds, work) in spent.items():
        (rates.train if name in meaning.MODELS else rates.pretrain)[name] = seconds / work
    jobs: dict[str, float] = {}
    for _, record, cost, _ in records:
        if "target" in record:
            name = f"{record['target']}.{record['model']}"
            jobs[name] = jobs.get(name, 0.0) + cost["seconds"]
    rates.start = overhead(results, "train_model", jobs)
    shards = len(list((results / "descriptions").glob("*.parquet")))
    each = descriptions["seconds"]["total"] / max(shards, 1)
    rates.start_describe = overhead(results, "describe_shard", {str(i): each for i in range(shards)})
    folders = ("graphs", "tokens", "text_states", "descriptions", "materials")
    files = ("materials.parquet", "descriptions.parquet")
    rates.caches = sum(size(results / name) for name in (*folders, *files)) / crystals
    return rates


def needed(file: Path) -> dict[str, Any]:
    """A JSON file of the run.

    Raises:
        InputError: it is missing.
    """
    if not file.is_file():
        raise InputError(f"{file}: missing; a prediction needs a run that has finished")
    return read_json(file)


Record = tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]


def finished(folder: Path, pattern: str) -> Iterator[Record]:
    """Folder, metrics, cost and settings of every finished run."""
    for file in sorted(folder.glob(f"{pattern}/[0-9]*/metrics.json")):
        record, cost = read_json(file), read_json(file.with_name("cost.json"))
        if record.get("status") == "finished" and cost.get("seconds"):
            yield file.parent, record, cost, read_json(file.with_name("config.json"))


def overhead(results: Path, rule: str, inside: dict[str, float]) -> float:
    """Mean seconds of a job of `rule` beside those in `inside`, by name: imports, opening of caches."""
    files = {file.stem: file for file in (results / "benchmarks" / rule).glob("*.tsv")}
    walls = {name: float(pd.read_csv(file, sep="\t").iloc[-1]["s"]) for name, file in files.items()}
    outside = [max(0.0, wall - inside[name]) for name, wall in walls.items() if name in inside]
    return sum(outside) / len(outside) if outside else 0.0


def device_name(hardware: dict[str, Any]) -> str:
    """The card, or the processor and its threads."""
    if hardware["device"].startswith("cuda") and hardware["gpus"]:
        return str(hardware["gpus"][0])
    return f"{hardware['cpu']}, {hardware['threads']} thread(s)"


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    return sum(file.stat().st_size for file in files if file.is_file())


@dataclass
class Sizes:
    """Crystals of the plan: all, and those of each target's training part."""

    crystals: int
    train: dict[str, int]


def planned_sizes(config: dict[str, Any], rates: Rates, results: Path, crystals: int | None) -> Sizes:
    """Numbers of crystals of the plan.

    Raises:
        InputError: a target of the plan was not measured, so that its number of crystals is not known.
    """
    if crystals is None and config["materials"]["source"] == "materials_project":
        table = pd.read_csv(RESOURCES / "paper" / "table2.csv")
        train = table[table["split"] == "train"].set_index("target")["n"]
        lacking = sorted(set(config["targets"]) - set(train.index))
        if not lacking:
            total = table.groupby("target")["n"].sum()[config["targets"]].max()
            return Sizes(int(total), {target: int(train[target]) for target in config["targets"]})
    lacking = sorted(set(config["targets"]) - set(rates.n))
    if lacking:
        raise InputError(
            f"{results}: no finished run of {', '.join(lacking)}; its number of crystals is not known"
        )
    total = crystals or config["materials"]["sample"] or rates.crystals
    return Sizes(total, {t: round(rates.n[t] * total / rates.crystals) for t in config["targets"]})


def planned_disk(config: dict[str, Any], rates: Rates, sizes: Sizes) -> float:
    """GB of caches and run folders."""
    runs = len(config["targets"]) * len(config["models"]) * len(config["training"]["seeds"])
    runs += len(objectives(config)) * len(config["training"]["seeds"])
    return (rates.caches * sizes.crystals + rates.run * runs) / 1e9


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


def planned_jobs(config: dict[str, Any], rates: Rates, sizes: Sizes, speedup: float) -> list[Job]:
    """The jobs of the workflow as its rules cut them: one trains all seeds of a model on a target.

    Raises:
        InputError: a model or a pretraining of the plan was not measured.
    """
    lacking = [m for m in config["models"] if m not in rates.train]
    lacking += [o for o in objectives(config) if o not in rates.pretrain]
    if lacking:
        raise InputError(f"no finished run of {', '.join(lacking)} to predict from; train it in a pilot")
    seeds, shards, n = config["training"]["seeds"], config["text"]["shards"], sizes.crystals
    jobs = [
        Job("describe_shard", "texts", rates.start_describe + rates.describe * n / shards)
        for _ in range(shards)
    ]
    jobs.append(Job("build_graphs", "graphs", rates.start_describe + rates.graphs * n / 8, cores=8))
    jobs.append(Job("tokenize_text", "tokens", rates.start + rates.tokenize * n, ("texts",)))
    names = (*config["models"], *objectives(config))
    readers = [name for name in names if meaning.text_mode(name, config) != "none"]
    for layers in sorted({meaning.remaining_layers(name, config) for name in readers} - {None}, key=str):
        jobs.append(
            Job(
                "embed_text",
                f"states {layers}",
                rates.start + rates.embed * n / speedup,
                ("tokens",),
                device=True,
            )
        )

    def reads(name: str) -> tuple[str, ...]:
        if name not in readers:
            return ("graphs",)
        layers = meaning.remaining_layers(name, config)
        return ("graphs", "tokens", *([f"states {layers}"] if layers is not None else []))

    for name in objectives(config):
        work = rates.pretrain[name] * rates.share * n * config["pretraining"][name]["epochs"] / speedup
        jobs += [Job("pretrain_model", name, rates.start + work, reads(name), device=True) for _ in seeds]
    for model in config["models"]:
        for target in config["targets"]:
            work = (
                rates.train[model] * sizes.train[target] * config["training"]["epochs"] * len(seeds) / speedup
            )
            start = meaning.objective(model)
            needs = (*reads(model), *([start] if start else []))
            jobs.append(Job("train_model", f"{model} {target}", rates.start + work, needs, device=True))
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
    one whose end freed its card or its cores.
    """
    open_jobs = {job.group: sum(other.group == job.group for other in jobs) for job in jobs}
    waiting = sorted(range(len(jobs)), key=lambda i: (jobs[i].stage != "pretrain_model", -jobs[i].seconds))
    free = {True: devices, False: max(cores, max(job.cores for job in jobs))}
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


def differences(config: dict[str, Any], rates: Rates, speedup: float) -> list[str]:
    """Notes on what the measured rates do not know of the plan."""
    found: dict[str, set[str]] = {}
    for name in (*config["models"], *objectives(config)):
        settings = meaning.training_settings if name in meaning.MODELS else meaning.pretraining_settings
        for key, planned, measured in unequal(settings(name, config), rates.settings[name]):
            if key.split(".")[-1] not in FREE and key != "training.device":
                found.setdefault(f"{key}: planned {planned}, measured {measured}", set()).add(name)
    notes = [f"{change} ({', '.join(sorted(names))})" for change, names in sorted(found.items())]
    encoder = config["text_encoder"]
    if encoder.split("@")[0].lower() not in rates.encoder.lower().replace("-", ""):
        notes.append(f"text_encoder: planned {encoder}, measured {rates.encoder}")
    notes.append(f"measured texts have {rates.tokens:.0f} tokens on average; longer ones take longer")
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
