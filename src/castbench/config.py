"""What the configuration means for the workflow: which inputs, sections and caches each model needs."""

from pathlib import Path
from typing import Any

from castbench.errors import InputError
from castbench.text import slug

Config = dict[str, Any]

# model: (how it reads text, architecture sections, pretraining objective).
# Text is "none", "frozen", "lora", or "choice": the key `text` of the cross_attention section.
MODELS: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "structure_only": ("none", ("cogn",), None),
    "text_only": ("lora", ("lora",), None),
    "crysmmnet_frozen": ("frozen", ("cogn", "concat"), None),
    "crysmmnet_lora": ("lora", ("cogn", "concat", "lora"), None),
    "multimat": ("none", ("cogn",), "contrastive"),
    "cast_scratch": ("choice", ("cogn", "cross_attention"), None),
    "cast": ("choice", ("cogn", "cross_attention"), "masked_node"),
}
# objective: (architecture sections, how it reads text)
OBJECTIVES: dict[str, tuple[tuple[str, ...], str]] = {
    "masked_node": (("cogn", "cross_attention"), "choice"),
    "contrastive": (("cogn", "contrastive"), "frozen"),
}
# model of the composition study: (sizes under `compositions`, loss of its classifications)
COMPOSITION_MODELS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "baseline": ((), None),
    "random_forest": (("random_forest",), None),
    "crabnet": (("crabnet",), "inverse_frequency"),
    "edm_cross_entropy": (("edm_transformer",), "cross_entropy"),
    "edm_alpha_report": (("edm_transformer",), "report"),
    "edm_transformer": (("edm_transformer",), "inverse_frequency"),
}


def _text(choice: str, config: Config) -> str:
    return config["architecture"]["cross_attention"]["text"] if choice == "choice" else choice


def check(config: Config) -> None:
    """Check what the schema cannot express.

    Raises:
        InputError: keys that contradict one another.
    """
    target, targets = config["attention"]["target"], config["targets"]
    if target not in targets:
        raise InputError(
            f"attention.target: {target} is not among targets; choose one of {', '.join(targets)}"
        )
    architecture = config["architecture"]
    width, fusion = architecture["cogn"]["width"], architecture["cross_attention"]
    if fusion["width"] != width:
        raise InputError(
            f"architecture.cross_attention.width: {fusion['width']} differs from cogn.width {width}; "
            "make them equal"
        )
    if fusion["width"] % fusion["heads"]:
        raise InputError(
            f"architecture.cross_attention.heads: {fusion['heads']} does not divide "
            f"the width {fusion['width']}; choose a divisor"
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
    fractions = materials["split"]["fractions"]
    if abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"materials.split.fractions: {fractions} do not add up to 1; make them")
    if config["study"] == "compositions":
        check_compositions(config["compositions"])


def check_compositions(section: Config) -> None:
    """Check what the schema cannot express of the section `compositions`.

    Raises:
        InputError: what the screening and the figures need is not trained.
    """
    if "edm_transformer" not in section["models"]:
        raise InputError("compositions.models: edm_transformer is missing, with which the screening predicts")
    if "band_gap" not in section["regression"] or "stability" not in section["classification"]:
        raise InputError(
            "compositions: the screening needs band_gap (regression) and stability (classification)"
        )
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
    if materials["source"] != "materials_project":
        return {key: materials[key] for key in ("source", "path", "columns")}
    # The descriptions are part of the download, where they are asked for.
    return {
        **{key: materials[key] for key in ("source", "snapshot", "database_version")},
        "descriptions": config["text"]["source"] != "generate",
    }


def source_files(config: Config) -> list[str]:
    """The files that the materials are read from; none for a download."""
    settings = source_settings(config)
    file = settings.get("path") or settings.get("snapshot")
    return [file] if file else []


def composition_source(config: Config) -> Config:
    """What the compositions depend on: the same source; of a download, the snapshot that it leaves."""
    settings = source_settings(config) | {"max_elements": config["compositions"]["max_elements"]}
    if settings["source"] == "materials_project" and not settings["snapshot"]:
        settings["snapshot"] = f"results/{config['dataset']}/materials/snapshot.jsonl.zst"
    return settings


def text_mode(name: str, config: Config) -> str:
    """How a model or a pretraining objective reads text: none, frozen or lora."""
    return _text(OBJECTIVES[name][1] if name in OBJECTIVES else MODELS[name][0], config)


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
    return {section: config["architecture"][section] for section in sections}


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
        shared = {key: config["training"][key] for key in ("precision", "device", "threads")}
        found["training"] = section["training"] | shared
    return found


def composition_summary(config: Config) -> Config:
    """What tables and figures of the composition study depend on."""
    section = config["compositions"]
    found = {key: section[key] for key in ("models", "regression", "classification", "structures")}
    found |= {"dataset": config["dataset"], "source": config["materials"]["source"]}
    found |= {"seeds": config["training"]["seeds"], "targets": config["targets"]}
    return found | {"structure_models": config["models"] if section["structures"] else []}
