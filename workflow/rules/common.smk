"""Configuration, wildcards and input functions: the only file with functions.

Rules pass `settings`, the part of the configuration that they depend on, as JSON: a changed key reruns its users only.
"""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import validate

try:
    validate(config, "../schemas/config.schema.yaml")
except WorkflowError as error:  # a page, of which two lines matter
    wrong = re.search(r"ValidationError: (.*)", str(error))
    where = re.search(r"On instance(.*):", str(error))
    if not (wrong and where):
        raise
    raise WorkflowError(
        f"config{where[1]}: {wrong[1]}; workflow/schemas/config.schema.yaml lists what is allowed"
    )

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
shell.prefix(
    f"set -euo pipefail; export PYTHONHASHSEED=0 PYTHONPATH={shlex.quote(sys.path[0])}; "
)

deployment = workflow.deployment_settings
if DeploymentMethod.CONDA in deployment.deployment_method and not (
    deployment.conda_base_path or shutil.which("conda")
):
    raise WorkflowError(
        "--use-conda: there is no conda on the PATH; install or activate it, or leave --use-conda out and run"
        " in the environment that `make venv` makes"
    )

SEEDS, DEVICE = config["training"]["seeds"], config["training"]["device"]
DEVICES, THREADS = config["training"]["devices"], config["training"]["threads"]
NODES = config["training"]["num_nodes"]
# No two jobs on one GPU, also without a profile; a profile or --resources gpu=N raises it.
workflow.global_resources.setdefault("gpu", NODES * DEVICES)

RUN_FILES = [
    "metrics.json",
    "cost.json",
    "config.json",
    "history.csv",
    "predictions.parquet",
    "model.safetensors",
    "README.md",
]
PRETRAINING_FILES = [file for file in RUN_FILES if file != "predictions.parquet"]
TABLES = [
    "table1.csv",
    "table1.md",
    "table1.tex",
    "table2.csv",
    "comparisons.csv",
    "pretraining.csv",
    "text_gain.csv",
    "runs.csv",
    "runs.jsonl",
]
# file name: title in Snakemake's report; captions stand in workflow/report/
DATASET_FIGURES = {
    "dataset_funnel": "What the filters removed",
    "target_histograms": "Distribution of the targets",
    "token_lengths": "Length of the descriptions",
}
RESULT_FIGURES = {
    "results_by_seed": "Test error of every seed",
    "learning_curves": "Learning curves",
    "parity": "Predicted against true",
    "error_by_crystal_system": "Error by crystal system",
    "error_by_sites": "Error by number of sites",
    "cost": "Parameters, time and memory",
}
ATTENTION_FIGURES = {
    "attention_maps": "Cross-attention of one crystal (Figure 2)",
    "attention_heads": "Cross-attention by head",
    "attention_similarity": "Similarity of the nodes' attention (Figure 3)",
}
TEXT_FIGURES = {
    "text_attention": "Attention of [CLS] in the text encoder (CrysMMNet's supplement)",
    "attention_by_part": "What attention, gradients and predictions care for",
    "text_changes": "Predictions with other texts",
    "deletion_curves": "Predictions without the most attended words",
}
# of the composition study
COMPOSITION_TABLES = {
    "composition_gap": "Error of the regressions of every model",
    "composition_stability": "Scores of the classifications of every model",
    "composition_runs": "Every run",
    "composition_calibration": "Reliability of the probabilities",
    "enrichment": "How the screening finds hidden stable compounds",
}
COMPOSITION_FIGURES = {
    "class_balance": "Class balance, focal and cross-entropy loss (report's Figure 1)",
    "edm_heatmap": "Element descriptor matrix (Figure 2)",
    "confusion": "Confusion matrices (Figure 3)",
    "composition_parity": "Predicted against true (Figure 4)",
    "composition_curves": "Learning curves (Figure 5)",
    "composition_epochs": "Metrics over epochs (Figure 6)",
    "composition_attention": "Attention of every head (Figure 7)",
    "reliability": "Reliability of the stability probability",
    "hidden_compounds": "Hidden stable compounds found by the screening",
}
# A training that was killed continues from its checkpoint: once more also without a profile's retries. But not
# inside of a cluster's job, which is out of time or of memory then: it is submitted again.
RETRIES = (
    max(1, getattr(workflow.execution_settings, "retries", 0))
    if workflow.is_main_process
    else 0
)
GPUS = 0 if DEVICE == "cpu" else 1
# A training job may have several, over several nodes, where Slurm starts its processes.
TRAINING_GPUS = GPUS * NODES * DEVICES
CARDS = workflow.global_resources["gpu"].value
if workflow.is_main_process and TRAINING_GPUS > CARDS:
    raise WorkflowError(  # Snakemake would give the job fewer without a word
        f"training.devices, training.num_nodes: a training takes {TRAINING_GPUS} GPUs, and the resource gpu is"
        f" {CARDS}; raise it (--resources gpu={TRAINING_GPUS}, or in the profile)"
    )
LAUNCHER, SEVERAL_NODES = "", {}
if NODES > 1:
    LAUNCHER = (
        f"srun --overlap --kill-on-bad-exit=1 --nodes={NODES} --ntasks-per-node={DEVICES}"
        f" --cpus-per-task={THREADS} "
    )
    # Slurm's executor starts such a job once, on its first node, and the job starts its processes.
    SEVERAL_NODES = {"mpi": "srun", "tasks_per_gpu": 0, "cpus_per_task": THREADS}
    SEVERAL_NODES |= {"tasks_per_node": DEVICES} if DEVICES > 1 else {"tasks": NODES}
    SEVERAL_NODES |= {"gres": f"gpu:{DEVICES}"} if GPUS else {}  # of each node
ENCODER = str(meaning.encoder_folder(config))
TARGETS = meaning.run_targets(config)
SPLITS = [f"results/{{dataset}}/splits/{target}.json" for target in TARGETS]
SHARDS = range(config["text"]["shards"])


# Models that read text and so are asked what they make of other texts; so is CAST's pretraining.
PROBED = [
    model for model in config["models"] if meaning.text_mode(model, config) != "none"
]
if "cast" in PROBED:
    PROBED.append("masked_node")
# Whether the attention of CAST is shown with and without pretraining.
CAST_COMPARED = {"cast", "cast_scratch"} <= set(config["models"])
# (model of the composition study, whether it is a network)
COMPOSITION_NETWORKS = [
    (name, bool(loss)) for name, (_, loss) in meaning.COMPOSITION_MODELS.items()
]
# The crystal of the text encoder's attention: a file to describe, or an id of the data set.
TEXT_FILE = Path(config["attention"]["text"])
if not TEXT_FILE.suffix:
    TEXT_FILE = None


wildcard_constraints:
    probed="|".join(PROBED) or "none",
    dataset=config["dataset"],
    target="|".join(map(re.escape, TARGETS)),
    task="|".join(config["targets"]),
    model="|".join(config["models"]),
    objective="|".join(meaning.OBJECTIVES),
    shard=r"\d+",
    remaining=r"\d+",
    seed=r"\d+",
    baseline="|".join(name for name, trained in COMPOSITION_NETWORKS if not trained),
    network="|".join(name for name, trained in COMPOSITION_NETWORKS if trained),


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
    # Also without a graph encoder: all models see the crystals that have a graph.
    inputs["graphs"] = f"results/{wildcards.dataset}/graphs/manifest.json"
    objective = meaning.objective(wildcards.model)
    if objective:
        inputs["pretrained"] = expand(
            "results/{dataset}/pretrain/{objective}/{seed}/model.safetensors",
            dataset=wildcards.dataset,
            objective=objective,
            seed=SEEDS,
        )
    return inputs


def states_option(name, wildcards):
    """`--states FOLDER` for a model or an objective that reads cached token states."""
    states = text_inputs(name, wildcards).get("states")
    return f"--states {Path(states).parent}" if states else ""


def pretrained_option(wildcards):
    """`--pretrained FOLDER ...`, one a seed, for a model that starts from pretrained weights."""
    weights = model_inputs(wildcards).get("pretrained", [])
    return " ".join(["--pretrained", *(str(Path(file).parent) for file in weights)])


def all_metrics(wildcards):
    """The record of every run."""
    return expand(
        "results/{dataset}/runs/{target}/{model}/{seed}/metrics.json",
        dataset=config["dataset"],
        target=TARGETS,
        model=config["models"],
        seed=SEEDS,
    )


def all_pretraining_metrics(wildcards):
    """The record of every pretraining."""
    objectives = filter(None, map(meaning.objective, config["models"]))
    return expand(
        "results/{dataset}/pretrain/{objective}/{seed}/metrics.json",
        dataset=wildcards.dataset,
        objective=sorted(objectives),
        seed=SEEDS,
    )


def figures(wildcards):
    """Every figure of the report; those of attention where CAST is trained with and without pretraining."""
    names = [*DATASET_FIGURES, *RESULT_FIGURES]
    if CAST_COMPARED:
        names += ATTENTION_FIGURES
    if PROBED:
        names += TEXT_FIGURES
    return expand(
        "results/{dataset}/figures/{name}.svg", dataset=wildcards.dataset, name=names
    )


def probed_runs(wildcards):
    """Folder of the runs or pretrainings that are probed, with a folder a seed."""
    if wildcards.probed == "masked_node":
        return f"results/{wildcards.dataset}/pretrain/masked_node"
    target = config["attention"]["target"]
    return f"results/{wildcards.dataset}/runs/{target}/{wildcards.probed}"


def evidence_inputs(wildcards):
    """What is known of the models' attention."""
    folder = f"results/{wildcards.dataset}/attention"
    inputs = {"probes": [f"{folder}/probes/{name}.parquet" for name in PROBED]}
    if CAST_COMPARED:
        inputs["maps"] = f"{folder}/maps.json"
        inputs["by_material"] = f"{folder}/by_material.parquet"
    return inputs


def shown_attention(wildcards):
    """What the report shows of attention beside its figures."""
    folder = f"results/{wildcards.dataset}"
    return [f"{folder}/attention/text.json", f"{folder}/tables/evidence.csv"] * bool(
        PROBED
    )


def attention_inputs(wildcards):
    """Runs and caches that the attention figures need."""
    inputs = text_inputs("cast", wildcards)
    inputs["graphs"] = f"results/{wildcards.dataset}/graphs/manifest.json"
    inputs["runs"] = expand(
        "results/{dataset}/runs/{target}/{model}/{seed}/model.safetensors",
        dataset=wildcards.dataset,
        target=config["attention"]["target"],
        model=["cast_scratch", "cast"],
        seed=SEEDS,
    )
    return inputs


def composition_metrics(wildcards):
    """The record of every run of the composition study."""
    return expand(
        "results/{dataset}/composition_runs/{model}/{seed}/metrics.json",
        dataset=wildcards.dataset,
        model=config["compositions"]["models"],
        seed=SEEDS,
    )


def structure_metrics(wildcards):
    """The record of every run that reads structures, where the source has them."""
    return all_metrics(wildcards) if config["compositions"]["structures"] else []
