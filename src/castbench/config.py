"""What the configuration means for the workflow: which inputs, sections and caches each model needs."""

from pathlib import Path
from typing import Any

from castbench import labels
from castbench.errors import InputError
from castbench.labels import FOLDS, MATBENCH, fold_name
from castbench.text import ENCODERS, FILES, slug

SCHEMA = Path(__file__).resolve().parents[2] / "workflow" / "schemas" / "config.schema.yaml"

Config = dict[str, Any]

# structure encoder, which is also its architecture section: nearest neighbours of a node in its graph as
# published; None where the graph has no such number.
STRUCTURE_ENCODERS: dict[str, int | None] = {
    "cogn": 24,
    "congn": None,
    "alignn": 12,
    "cgcnn": 12,
    "megnet": None,
}
# model: (how it reads text, architecture sections, pretraining objective); the section "structure" is that of
# the structure encoder.
# Text is "none", "frozen", "lora", or "choice": the key `text` of the cross_attention section.
MODELS: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "structure_only": ("none", ("structure",), None),
    "text_only": ("lora", ("lora",), None),
    "crysmmnet_frozen": ("frozen", ("structure", "concat"), None),
    "crysmmnet_lora": ("lora", ("structure", "concat", "lora"), None),
    "multimat": ("none", ("structure",), "contrastive"),
    "cast_scratch": ("choice", ("structure", "cross_attention"), None),
    "cast": ("choice", ("structure", "cross_attention"), "masked_node"),
}
# objective: (architecture sections, how it reads text)
OBJECTIVES: dict[str, tuple[tuple[str, ...], str]] = {
    "masked_node": (("structure", "cross_attention"), "choice"),
    "contrastive": (("structure", "contrastive"), "frozen"),
}
ENERGY_FILTERS = ("max_formation_energy", "max_energy_above_hull", "min_formation_energy")
DEMO = "workflow/resources/demo/crystals.jsonl.zst"  # the crystals of the source demo
# keys of `training` that the composition study shares
DEVICE_KEYS = ("precision", "device", "devices", "num_nodes", "threads")
# model of the composition study: (sizes under `compositions`, loss of its classifications)
COMPOSITION_MODELS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "baseline": ((), None),
    "random_forest": (("random_forest",), None),
    "crabnet": (("crabnet",), "inverse_frequency"),
    "edm_cross_entropy": (("edm_transformer",), "cross_entropy"),
    "edm_alpha_report": (("edm_transformer",), "report"),
    "edm_transformer": (("edm_transformer",), "inverse_frequency"),
}


def check(config: Config) -> None:
    """Check what the schema cannot express.

    Raises:
        InputError: keys that contradict one another.
    """
    check_integers(config)
    check_known(config)
    check_matbench(config)
    target, targets = config["attention"]["target"], config["targets"]
    if target not in targets and config["study"] != "matbench":
        raise InputError(
            f"attention.target: {target} is not among targets; choose one of {', '.join(targets)}"
        )
    architecture = config["architecture"]
    width, fusion = architecture["cogn"]["width"], architecture["cross_attention"]
    fused = any("cross_attention" in MODELS[model][1] for model in config["models"])
    if fused and config["structure_encoder"] == "cogn" and fusion["width"] != width:
        raise InputError(
            f"architecture.cross_attention.width: {fusion['width']} differs from cogn.width {width}; "
            "make them equal"
        )
    if fusion["width"] % fusion["heads"]:
        raise InputError(
            f"architecture.cross_attention.heads: {fusion['heads']} does not divide "
            f"the width {fusion['width']}; choose a divisor"
        )
    if config["graphs"]["neighbours"] and not STRUCTURE_ENCODERS[config["structure_encoder"]]:
        raise InputError(
            f"graphs.neighbours: the graph of {config['structure_encoder']} has no number of neighbours; "
            "make it null"
        )
    training = config["training"]
    if training["seeds_together"] and training["devices"] * training["num_nodes"] > 1:
        raise InputError(
            "training.seeds_together: seeds share one device, and training.devices or num_nodes is above 1; "
            "change one"
        )
    materials = config["materials"]
    if materials["source"] != "materials_project":
        for key in ("snapshot", "database_version"):
            if materials[key] is not None:
                raise InputError(
                    f"materials.{key}: is for source materials_project, and materials.source is "
                    f"{materials['source']}; make it null or change the source"
                )
    elif materials["columns"]:
        raise InputError(
            "materials.columns: the Materials Project's fields have names of their own; make it {}"
        )
    if materials["source"] == "demo" and (materials["columns"] or materials["path"] != DEMO):
        raise InputError(
            "materials.source: demo reads the bundled crystals; for your own path or columns make it local"
        )
    if materials["source"] not in ("demo", "materials_project", "matbench") and materials["path"] == DEMO:
        raise InputError("materials.path: names the bundled crystals; name your own file or folder")
    fractions = materials["split"]["fractions"]
    if abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"materials.split.fractions: {fractions} do not add up to 1; make them")
    if config["study"] == "compositions":
        check_compositions(config)


def check_known(config: Config) -> None:
    """Check that this module and `labels` know what the schema lets through.

    Raises:
        InputError: a model was added to one place and not to the other.
    """
    for key, names, here, there in (
        ("models", config["models"], MODELS, labels.MODELS),
        (
            "compositions.models",
            config["compositions"]["models"],
            COMPOSITION_MODELS,
            labels.COMPOSITION_MODELS,
        ),
    ):
        for name in names:
            if name not in here or name not in there:
                where = "config.py" if name not in here else "labels.py"
                raise InputError(f"{key}: src/castbench/{where} does not know {name}; see CONTRIBUTING.md")


def check_integers(config: Config) -> None:
    """Refuse a float for an integer, which 2.0 is to JSON Schema and not to Python.

    Raises:
        InputError: there is one.
    """
    import yaml  # where Snakemake is, these are too
    from jsonschema import Draft202012Validator, validators

    kinds = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    strict = validators.extend(Draft202012Validator, type_checker=kinds)
    for error in strict(yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))).iter_errors(config):
        if isinstance(error.instance, float):
            key = error.json_path.removeprefix("$.")
            raise InputError(f"{key}: {error.instance} is no integer; write it without a point")


def check_matbench(config: Config) -> None:
    """Check that the study matbench has what its folds need, and that no other study has its tasks.

    Raises:
        InputError: a key that contradicts the study.
    """
    materials, here = config["materials"], config["study"] == "matbench"
    for target in config["targets"]:
        if (target in MATBENCH) != here:
            wanted = "the tasks of Matbench alone" if here else "no task of Matbench"
            raise InputError(f"targets: {target}, but study {config['study']} has {wanted}; change one")
    if (materials["source"] == "matbench") != here:
        raise InputError(
            f"materials.source: {materials['source']} and study {config['study']} do not go together; "
            "workflow/presets/matbench.yaml sets both to matbench"
        )
    if not here:
        return
    filters = materials["filters"]
    on = [f"filters.{key}" for key in ENERGY_FILTERS if filters[key] is not None]
    on += [f"filters.{key}" for key in ("abx3", "exclude_noble_gases") if filters[key]]
    on += ["sample"] * (materials["sample"] is not None) + ["columns"] * bool(materials["columns"])
    if on:
        raise InputError(f"materials.{on[0]}: Matbench's folds need every record as published; switch it off")
    if pretrained := [model for model in config["models"] if objective(model)]:
        raise InputError(
            f"models: {pretrained[0]} is pretrained on crystals that are for training in every "
            "target, and each crystal of Matbench is for testing in a fold; leave it out"
        )
    if not config["matbench"]["validation"] and config["training"]["selection"] != "last":
        raise InputError(
            "training.selection: best needs crystals for validation; set matbench.validation, or make it last"
        )


def check_compositions(config: Config) -> None:
    """Check what the schema cannot express of the study of compositions.

    Raises:
        InputError: what the screening and the figures need is not trained, or not every formula is taken.
    """
    section, materials = config["compositions"], config["materials"]
    on = [f"filters.{key}" for key in ENERGY_FILTERS if materials["filters"][key] is not None]
    if on := on + ["sample"] * (materials["sample"] is not None):
        raise InputError(
            f"materials.{on[0]}: the study of compositions takes every formula of the source; make it null"
        )
    if "edm_transformer" not in section["models"]:
        raise InputError("compositions.models: edm_transformer is missing, with which the screening predicts")
    if "band_gap" not in section["regression"] or "stability" not in section["classification"]:
        raise InputError(
            "compositions: the screening needs band_gap (regression) and stability (classification)"
        )
    window = section["screening"]["goldschmidt"]
    if window and window[0] > window[1]:
        raise InputError(f"compositions.screening.goldschmidt: {window} is empty; give the lowest first")
    for name in ("edm_transformer", "crabnet"):
        sizes = section[name]
        if sizes["width"] % sizes["heads"]:
            raise InputError(
                f"compositions.{name}.heads: {sizes['heads']} does not divide the width {sizes['width']}; "
                "choose a divisor"
            )


def source_settings(config: Config) -> Config:
    """The part of the configuration that the materials depend on before any filter."""
    materials = config["materials"]
    if materials["source"] == "matbench":
        folder = materials["path"] or f"results/{config['dataset']}/materials"
        return {
            "source": "matbench",
            "files": {task: f"{folder}/{task}.json.gz" for task in config["targets"]},
        }
    if materials["source"] != "materials_project":
        return {key: materials[key] for key in ("source", "path", "columns")}
    # The descriptions are part of the download, where they are asked for.
    return {
        **{key: materials[key] for key in ("source", "snapshot", "database_version")},
        "descriptions": config["text"]["source"] != "generate",
    }


def source_files(config: Config) -> list[str]:
    """The files that the materials are read from, all of a folder; none for the Materials Project."""
    settings = source_settings(config)
    if "files" in settings:
        return list(settings["files"].values())
    file = settings.get("path") or settings.get("snapshot")
    if file and Path(file).is_dir():  # its own time says nothing of theirs
        files = (path for path in Path(file).rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(map(str, files))
    return [file] if file else []


def run_targets(config: Config) -> list[str]:
    """What has a split and runs of its own: every target, or every fold of a task of Matbench."""
    if config["study"] != "matbench":
        return config["targets"]
    return [fold_name(task, fold) for task in config["targets"] for fold in range(FOLDS)]


def composition_source(config: Config) -> Config:
    """What the compositions depend on: the same source; of a download, the snapshot that it leaves."""
    settings = source_settings(config) | {"max_elements": config["compositions"]["max_elements"]}
    if settings["source"] == "materials_project" and not settings["snapshot"]:
        settings["snapshot"] = f"results/{config['dataset']}/materials/snapshot.jsonl.zst"
    return settings


def text_mode(name: str, config: Config) -> str:
    """How a model or a pretraining objective reads text: none, frozen or lora."""
    mode = OBJECTIVES[name][1] if name in OBJECTIVES else MODELS[name][0]
    return config["architecture"]["cross_attention"]["text"] if mode == "choice" else mode


def objective(model: str) -> str | None:
    """The pretraining that the model starts from, if any."""
    return MODELS[model][2]


def remaining_layers(name: str, config: Config) -> int | None:
    """Encoder layers that the model runs above the cached states; None: all, from token ids."""
    mode = text_mode(name, config)
    if mode != "lora":
        return 0
    layers = config["architecture"]["lora"]["layers"]
    return None if layers == "all" else int(layers)


def architecture(name: str, config: Config) -> Config:
    """The architecture sections that a model or an objective uses, and nothing else."""
    sections = list(OBJECTIVES[name][0] if name in OBJECTIVES else MODELS[name][1])
    if text_mode(name, config) == "lora" and "lora" not in sections:
        sections.append("lora")
    sections = [config["structure_encoder"] if name == "structure" else name for name in sections]
    return {section: config["architecture"][section] for section in sections}


def graph_settings(config: Config) -> Config:
    """The part of the configuration that the graphs depend on."""
    encoder = config["structure_encoder"]
    found = {"structure_encoder": encoder, "symprec": config["graphs"]["symprec"]}
    if published := STRUCTURE_ENCODERS[encoder]:
        found["neighbours"] = config["graphs"]["neighbours"] or published
    return found


def training_settings(model: str, config: Config) -> Config:
    """The part of the configuration that a run of `model` depends on."""
    return {
        "dataset": config["dataset"],
        "model": model,
        "text": text_mode(model, config),
        "architecture": architecture(model, config),
        "training": {key: value for key, value in config["training"].items() if key != "seeds"},
    }


def pretraining_settings(name: str, config: Config) -> Config:
    """The part of the configuration that the pretraining `name` depends on."""
    return {
        "dataset": config["dataset"],
        "objective": name,
        "text": text_mode(name, config),
        "architecture": architecture(name, config),
        "training": {
            key: value
            for key, value in config["training"].items()
            if key not in ("seeds", "seeds_together", "epochs", "batch_size")
        },
        "pretraining": config["pretraining"][name],
    }


def table_settings(config: Config) -> Config:
    """What the tables of runs depend on."""
    keys = ("dataset", "targets", "models", "structure_encoder", "text_encoder", "max_tokens")
    found = {key: config[key] for key in keys} | {"seeds": config["training"]["seeds"]}
    return found | {key: config["materials"][key] for key in ("source", "sample", "filters", "split")}


def encoder_files(config: Config) -> list[str]:
    """The files of a text encoder in a folder of the user's own; none for one that is fetched."""
    name = config["text_encoder"].partition("@")[0]
    if name in ENCODERS or not Path(name).is_dir():
        return []
    return sorted(str(path) for path in Path(name).iterdir() if path.name in FILES)


def encoder_folder(config: Config) -> Path:
    """Where the text encoder's files are kept, shared by all data sets."""
    return Path("results/encoders") / slug(config["text_encoder"])


def composition_settings(model: str, config: Config) -> Config:
    """The part of the configuration that a run of a composition model depends on."""
    section, (sizes, loss) = config["compositions"], COMPOSITION_MODELS[model]
    found = {key: section[key] for key in ("max_elements", "regression", "classification")}
    found |= {"dataset": config["dataset"], "model": model, "loss": loss}
    found["architecture"] = {name: section[name] for name in sizes}
    if loss:
        shared = {key: config["training"][key] for key in DEVICE_KEYS}
        found["training"] = section["training"] | shared
    return found


def composition_summary(config: Config) -> Config:
    """What tables and figures of the composition study depend on."""
    section = config["compositions"]
    found = {key: section[key] for key in ("models", "regression", "classification", "structures")}
    found |= {"dataset": config["dataset"], "source": config["materials"]["source"]}
    found |= {"structure_encoder": config["structure_encoder"]}
    found |= {"seeds": config["training"]["seeds"], "targets": config["targets"]}
    return found | {"structure_models": config["models"] if section["structures"] else []}
