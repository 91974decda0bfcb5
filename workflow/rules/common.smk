"""Configuration, wildcards and input functions: the only file with functions.

Rules pass `settings`, the part of the configuration that they depend on, as JSON: a changed key reruns its users only.
"""

import json
import sys

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

validate(config, "../schemas/config.schema.yaml")
sys.path.insert(
    0, str(workflow.current_basedir.join("../../src").get_path_or_uri(secret_free=True))
)

from castbench import config as meaning
from castbench.errors import InputError

try:
    meaning.check(config)
except InputError as error:
    raise WorkflowError(f"config: {error}")

# Robocrystallographer's word order depends on the hash seed; the package is imported from src/.
shell.prefix(f"set -euo pipefail; export PYTHONHASHSEED=0 PYTHONPATH={sys.path[0]}; ")

# No two jobs on one GPU, also without a profile; a profile or --resources gpu=N raises it.
workflow.global_resources.setdefault("gpu", 1)

RUN_FILES = [
    "metrics.json",
    "cost.json",
    "config.json",
    "history.csv",
    "predictions.parquet",
    "model.safetensors",
]
PRETRAINING_FILES = [file for file in RUN_FILES if file != "predictions.parquet"]
GPUS = 0 if config["training"]["device"] == "cpu" else 1
ENCODER = str(meaning.encoder_folder(config))
SHARDS = range(config["text"]["shards"])


wildcard_constraints:
    dataset=config["dataset"],
    target="|".join(config["targets"]),
    model="|".join(config["models"]),
    objective="masked_node|contrastive",
    shard=r"\d+",
    remaining=r"\d+",
    seed=r"\d+",


def settings(*keys):
    """The values at these dotted keys of the configuration, as one JSON object."""
    found = {}
    for key in keys:
        value = config
        for part in key.split("."):
            value = value[part]
        found[key.split(".")[-1]] = value
    return json.dumps(found, sort_keys=True)


def text_inputs(name, wildcards):
    """Caches of the text that a model or an objective reads."""
    if meaning.text_mode(name, config) == "none":
        return {}
    inputs = {
        "encoder": f"{ENCODER}/manifest.json",
        "tokens": f"results/{wildcards.dataset}/tokens/manifest.json",
    }
    remaining = meaning.remaining_layers(name, config)
    if remaining is not None:
        inputs["states"] = (
            f"results/{wildcards.dataset}/text_states/{remaining}/manifest.json"
        )
    return inputs


def model_inputs(wildcards):
    """Caches and pretrained weights that a model reads."""
    inputs = text_inputs(wildcards.model, wildcards)
    if meaning.reads_graph(wildcards.model):
        inputs["graphs"] = f"results/{wildcards.dataset}/graphs/manifest.json"
    objective = meaning.objective(wildcards.model)
    if objective:
        inputs["pretrained"] = expand(
            "results/{dataset}/pretrain/{objective}/{seed}/model.safetensors",
            dataset=wildcards.dataset,
            objective=objective,
            seed=config["training"]["seeds"],
        )
    return inputs


def objective_inputs(wildcards):
    """Caches that a pretraining reads."""
    return text_inputs(wildcards.objective, wildcards)


def states_option(name, wildcards):
    """`--states FOLDER` for a model or an objective that reads cached token states."""
    states = text_inputs(name, wildcards).get("states")
    return f"--states {states.removesuffix('/manifest.json')}" if states else ""


def pretrained_option(wildcards):
    """`--pretrained FOLDER ...`, one a seed, for a model that starts from pretrained weights."""
    folders = [
        path.rsplit("/", 1)[0] for path in model_inputs(wildcards).get("pretrained", [])
    ]
    return " ".join(["--pretrained", *folders])


def all_metrics(wildcards):
    """The record of every run."""
    dataset = wildcards["dataset"] if isinstance(wildcards, dict) else wildcards.dataset
    return expand(
        "results/{dataset}/runs/{target}/{model}/{seed}/metrics.json",
        dataset=dataset,
        target=config["targets"],
        model=config["models"],
        seed=config["training"]["seeds"],
    )


def all_pretraining_metrics(wildcards):
    """The record of every pretraining."""
    objectives = filter(None, map(meaning.objective, config["models"]))
    return expand(
        "results/{dataset}/pretrain/{objective}/{seed}/metrics.json",
        dataset=wildcards.dataset,
        objective=sorted(objectives),
        seed=config["training"]["seeds"],
    )


def attention_inputs(wildcards):
    """Runs and caches that the attention figures need; none where CAST is not among the models."""
    models = [model for model in ("cast_scratch", "cast") if model in config["models"]]
    if not models:
        return {}
    inputs = text_inputs(models[0], wildcards)
    inputs["graphs"] = f"results/{wildcards.dataset}/graphs/manifest.json"
    inputs["runs"] = expand(
        "results/{dataset}/runs/{target}/{model}/{seed}/model.safetensors",
        dataset=wildcards.dataset,
        target=config["attention"]["target"],
        model=models,
        seed=config["training"]["seeds"][0],
    )
    return inputs
