"""What a finished run took, as rates: seconds a step, a multiply-add, a node, a token; bytes likewise."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from castbench.errors import InputError
from castbench.evaluation.records import read_json
from castbench.evaluation.statistics import read_split
from castbench.report.work import CrystalSize, EncoderShape, embedding_work, step_work
from castbench.text import find_encoder


@dataclass
class Rates:
    """What the finished run took."""

    crystals: int
    device: str
    shape: EncoderShape
    size: CrystalSize  # of all its crystals that have a graph
    describe: float  # core seconds a node
    graphs: float  # core seconds a node
    tokenize: float  # seconds a token before the cut
    embed: float  # seconds a multiply-add; 0 where nothing is embedded
    start: float  # seconds of a training job outside of its training: imports, opening caches
    start_describe: float  # likewise of a shard of descriptions
    step: float = 0.0  # seconds a training step, whatever it does
    work: float = 0.0  # seconds a multiply-add of a training step
    factor: dict[str, float] = field(default_factory=dict)  # of a model or objective, beyond steps and work
    done: dict[str, float] = field(default_factory=dict)  # its multiply-adds a crystal and step
    share: float = 0.0  # of the crystals that are pretrained on
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # config.json by model or objective
    n: dict[str, int] = field(default_factory=dict)  # training crystals by target
    node_bytes: float = 0.0  # of materials and graphs, a node
    token_bytes: float = 0.0  # of descriptions and tokens, a token before the cut
    run_bytes: float = 0.0  # of a run folder and its checkpoints
    neighbours: int | None = None

    def seconds(self, name: str, steps: float, work: float) -> float:
        """Time of a run of `name` that takes `steps` steps of `work` multiply-adds together."""
        return self.factor[name] * (self.step * steps + self.work * work)


@dataclass
class Spent:
    """What the runs of a model or an objective took."""

    seconds: float = 0.0
    steps: float = 0.0
    work: float = 0.0
    crystals: float = 0.0  # seen, each as often as it was


def measure(results: Path) -> Rates:
    """Read what a finished run took.

    Raises:
        InputError: it has no records, or lacks a file that a prediction needs.
    """
    descriptions = needed(results / "descriptions.json")
    tokens, graphs = needed(results / "tokens/manifest.json"), needed(results / "graphs/manifest.json")
    table, max_tokens = crystal_sizes(results), tokens["max_tokens"]
    n, size = len(table), mean_size(table, max_tokens)
    rates = Rates(
        crystals=descriptions["n"],
        device="",
        shape=read_shape(find_encoder(results.parent / "encoders", tokens["encoder"]["checksum"])),
        size=size,
        describe=descriptions["seconds"]["total"] / (n * size.nodes),
        graphs=needed(results / "graphs/cost.json")["cpu_seconds"] / (n * size.nodes),
        tokenize=needed(results / "tokens/cost.json")["seconds"] / (n * size.tokens_full),
        embed=0.0,
        start=0.0,
        start_describe=0.0,
        neighbours=graphs["settings"].get("neighbours"),
    )
    for file in results.glob("text_states/*/cost.json"):
        work = n * embedding_work(int(file.parent.name), rates.shape, size)
        rates.embed = max(rates.embed, read_json(file)["seconds"] / work)
    records = list(finished(results / "runs", "*/*")) + list(finished(results / "pretrain", "*"))
    if not records:
        raise InputError(f"{results}: no finished training to predict from; run the workflow first")
    spent: dict[str, Spent] = {}
    jobs: dict[str, float] = {}
    for folder, record, cost, settings in records:
        name, target, trained = (
            record.get("model") or record["objective"],
            record.get("target"),
            record["n"]["train"],
        )
        own = size
        if target:
            own = mean_size(
                table.loc[table.index.intersection(read_split(results, target)["train"])], max_tokens
            )
            rates.n[target] = trained
            job = f"{target}.{name}"
            jobs[job] = jobs.get(job, 0.0) + cost["seconds"]
        else:
            rates.share = trained / rates.crystals
        sum_of = spent.setdefault(name, Spent())
        sum_of.seconds += cost["seconds"]
        sum_of.steps += record["steps"]
        sum_of.crystals += trained * record["epochs"]
        sum_of.work += trained * record["epochs"] * step_work(settings, rates.shape, own)
        rates.settings[name], rates.device = settings, device_name(cost["hardware"])
        folders = (folder, folder.parent / "checkpoints" / folder.name)
        rates.run_bytes = max(rates.run_bytes, sum(map(total_bytes, folders)))
    rates.step, rates.work = fit(list(spent.values()))
    for name, took in spent.items():
        rates.factor[name] = took.seconds / (rates.step * took.steps + rates.work * took.work)
        rates.done[name] = took.work / took.crystals
    rates.start = overhead(results, "train_model", jobs)
    shards = len(list((results / "descriptions").glob("*.parquet")))
    each = descriptions["seconds"]["total"] / max(shards, 1)
    rates.start_describe = overhead(results, "describe_shard", {str(i): each for i in range(shards)})
    by_node, by_token = (
        ("materials", "materials.parquet", "graphs"),
        ("descriptions", "descriptions.parquet", "tokens"),
    )
    rates.node_bytes = sum(total_bytes(results / name) for name in by_node) / (n * size.nodes)
    rates.token_bytes = sum(total_bytes(results / name) for name in by_token) / (n * size.tokens_full)
    return rates


def fit(spent: list[Spent]) -> tuple[float, float]:
    """Seconds a step and seconds a multiply-add that explain all runs: least squares of the relative error.

    Neither is negative: where one would be, the other explains it all.
    """
    table = np.array([[took.steps / took.seconds, took.work / took.seconds] for took in spent])
    scale = table.max(axis=0)
    found = np.linalg.lstsq(table / scale, np.ones(len(table)), rcond=None)[0] / scale
    if (found < 0).any() or len(spent) == 1:
        kept = 1 if len(spent) == 1 or found[1] >= 0 else 0
        found = np.zeros(2)
        found[kept] = table[:, kept].sum() / (table[:, kept] ** 2).sum()
    return float(found[0]), float(found[1])


def crystal_sizes(results: Path) -> pd.DataFrame:
    """Nodes, edges and tokens before the cut of every crystal that has a graph, by id."""
    graphs = pd.read_parquet(results / "graphs/index.parquet").set_index("material_id")
    tokens = pd.read_parquet(results / "tokens/index.parquet").set_index("material_id")
    return graphs[graphs["n_nodes"] > 0][["n_nodes", "n_edges"]].join(tokens["n_tokens_full"])


def mean_size(table: pd.DataFrame, max_tokens: int) -> CrystalSize:
    """Means over crystals, their texts cut at `max_tokens`."""
    full = table["n_tokens_full"]
    means = (
        table["n_nodes"].mean(),
        table["n_edges"].mean(),
        full.mean(),
        full.clip(upper=max_tokens).mean(),
    )
    return CrystalSize(*map(float, means))


def read_shape(folder: Path) -> EncoderShape:
    """Sizes in a text encoder's config.json."""
    sizes = read_json(folder / "config.json")
    return EncoderShape(sizes["num_hidden_layers"], sizes["hidden_size"], sizes["intermediate_size"])


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


def total_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    return sum(file.stat().st_size for file in files if file.is_file())
