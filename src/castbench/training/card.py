"""The model card of a run, README.md of its folder, in the form that the Hugging Face Hub reads.

Everything in it comes from the run's record and settings, and it has no times: equal runs have equal cards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import yaml

from castbench.deviations import deviations
from castbench.labels import (
    CLASS_TARGETS,
    COMPOSITION_MODELS,
    MATBENCH,
    MODELS,
    STRUCTURE_ENCODERS,
    TARGETS,
    Model,
)

METRICS = {
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "accuracy": "accuracy",
    "average_precision": "average precision",
    "roc_auc": "ROC AUC",
    "brier": "Brier score",
}
OBJECTIVES = {
    "masked_node": "masked node prediction, the pretraining of CAST",
    "contrastive": "contrastive pretraining against text, that of MultiMat",
}
CRYSTAL_LIMITS = """\
- It predicts what the density-functional calculations of its data set give, at their settings and with their
  errors; it knows nothing of temperature, disorder, defects, surfaces or magnetic order that they leave out.
- It interpolates. Of elements, structure types or cell sizes that are rare among its training crystals, and
  of crystals far from their relaxed geometry, expect errors well beyond the table's.
- The error of one crystal is unknown. The spread over seeds shows how much chance in training decides, not
  the error.
- Not for decisions about safety, and no substitute for a calculation or an experiment."""
FORMULA_LIMITS = """\
- It sees the formula alone: polymorphs get one answer, that of the most stable one known to its data set.
- It predicts what density-functional calculations give. Elements that are rare in training are a guess.
- Probabilities are as well calibrated as `metrics.json` says, on formulas like those of its test set.
- Not for decisions about safety, and no substitute for a calculation or an experiment."""


class Score(NamedTuple):
    """A number of the table: of which part of the data, what of, how many, and its unit."""

    part: str
    what: str
    n: int | None
    metric: str
    label: str
    value: float
    unit: str

    @property
    def name(self) -> str:
        """Label with unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


def model_card(record: dict[str, Any], settings: dict[str, Any]) -> str:
    """The card of a run.

    Args:
        record: its metrics.json.
        settings: its config.json.
    """
    found, name = scores(record), title(record, settings)
    metadata = header(record, name, found)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)}"
        "# license: yours to choose; the data's licence may ask for attribution\n---",
        f"# {name}",
        introduction(record, settings),
    ]
    if record["status"] != "finished":
        parts.append(f"**This run is {record['status']}: {record['reason']}.** Its weights are of no use.")
    if found:
        parts.append(f"## Results\n\n{table(found)}")
    parts += [
        f"## Use\n\n{use(record)}",
        f"## Limits\n\n{FORMULA_LIMITS if is_composition(record) else CRYSTAL_LIMITS}",
        f"## Training\n\n{training(record, settings)}",
        f"## Departures from the papers\n\n{departures(record)}",
    ]
    return "\n\n".join(parts) + "\n"


def is_composition(record: dict[str, Any]) -> bool:
    """Whether the run reads formulas alone."""
    return "target" not in record and "objective" not in record


def model_of(record: dict[str, Any], settings: dict[str, Any]) -> Model:
    """The model, with the structure encoder that it has."""
    model = (COMPOSITION_MODELS | MODELS)[record["model"]]
    for name in settings.get("architecture", {}).keys() & STRUCTURE_ENCODERS.keys():
        label, source = STRUCTURE_ENCODERS[name]
        if model.name == "structure_only":
            return replace(model, label=label, source=source)
        return replace(model, inputs=f"{model.inputs} ({label})")
    return model


def title(record: dict[str, Any], settings: dict[str, Any]) -> str:
    """One line: what was trained on what."""
    if "objective" in record:
        label = OBJECTIVES[record["objective"]].partition(",")[0].capitalize()
    else:
        label = model_of(record, settings).label
    target = f", {TARGETS[record['target']].axis}" if "target" in record else ""
    return f"{label}{target}, {record['dataset']}, seed {record['seed']}"


def header(record: dict[str, Any], name: str, found: list[Score]) -> dict[str, Any]:
    """The metadata; its results are those on the test set."""
    content: dict[str, Any] = {
        "library_name": "castbench",
        "tags": ["castbench", "materials-science", "formulas" if is_composition(record) else "crystals"],
    }
    encoder = record.get("text_encoder")
    if encoder and "/" in encoder["id"]:  # an id on the Hub; of a folder the record has the name alone
        content["base_model"] = encoder["id"]
    results = []
    for what in dict.fromkeys(score.what for score in found if score.part == "test"):
        chosen = [score for score in found if (score.part, score.what) == ("test", what)]
        kind = "classification" if what in CLASS_TARGETS else TARGETS[what].task
        results.append(
            {
                "task": {"type": kind, "name": what},
                "dataset": {"name": record["dataset"], "type": record["dataset"], "split": "test"},
                "metrics": [
                    {"type": score.metric, "name": score.name, "value": score.value} for score in chosen
                ],
            }
        )
    if results:
        content["model-index"] = [{"name": name, "results": results}]
    return content


def scores(record: dict[str, Any]) -> list[Score]:
    """All scores of a record, validation before test."""
    found = []
    sizes = record.get("n", {})
    for part in ("validation", "test"):
        if "objective" in record and record.get(part):
            for metric, value in record[part].items():
                name = metric.replace("_", " ")
                found.append(Score(part, record["objective"], sizes[part], metric, name, value, ""))
        elif record.get(part):
            found += numbers(record[part], part, record["target"], sizes[part])
        for target, values in record.get("scores", {}).items():
            found += numbers(values[part], part, target, sizes[part])
    return found


def numbers(values: dict[str, Any], part: str, target: str, n: int) -> list[Score]:
    """Scores of a target, those that its kind has; errors in its unit."""
    return [
        Score(part, target, n, metric, name, values[metric], TARGETS[target].unit if error else "")
        for metric, name in METRICS.items()
        for error in [metric in ("mae", "rmse")]
        if values.get(metric) is not None
    ]


def table(found: list[Score]) -> str:
    """The scores in Markdown."""
    lines = ["| of | part | size of the part | score | value |", "|---|---|---|---|---|"]
    lines += [f"| {s.what} | {s.part} | {s.n} | {s.name} | {s.value:.6g} |" for s in found]
    return "\n".join(lines)


def introduction(record: dict[str, Any], settings: dict[str, Any]) -> str:
    """What the model reads, how large it is, what it started from."""
    if "objective" in record:
        text = f"Weights of {OBJECTIVES[record['objective']]}, on the training crystals of all targets."
    else:
        model = model_of(record, settings)
        text = f"{model.label} ({model.source}). Input: {model.inputs}."
    if record.get("text_encoder"):
        encoder = record["text_encoder"]
        text += f" Text encoder: {encoder['id']} ({encoder['revision']}), {record.get('text', 'frozen')}."
    if "parameters" in record:
        text += " {trainable:,} of its {total:,} parameters were trained.".format(**record["parameters"])
    if record.get("pretrained"):
        text += " It started from the pretraining {objective}, seed {seed}.".format(**record["pretrained"])
    sections = ", ".join(settings.get("architecture", {})) or "none"
    return f"{text} Sizes: `config.json` ({sections})."


def use(record: dict[str, Any]) -> str:
    """How to use the weights."""
    if "objective" in record:
        return "The rule `train_model` starts from them; they predict no property."
    if is_composition(record):
        given, whose = "CaTiO3 CsSnI3 ...", "ABX3 formulas"
    else:
        given, whose = "crystal.cif ...", "ordered inorganic crystals"
    return (
        f"For {whose} like those of the data set, in the project's folder:\n\n"
        f"```console\nPYTHONPATH=src python -m castbench predict THIS_FOLDER {given}\n```\n\n"
        "The folder above this one predicts with all seeds."
    )


def training(record: dict[str, Any], settings: dict[str, Any]) -> str:
    """Data, seed, code, checksums."""
    sizes = ", ".join(f"{n:,} {part}" for part, n in record.get("n", {}).items())
    unit = "formulas" if is_composition(record) else "crystals"
    dropped = {why: n for why, n in (record.get("n_dropped") or {}).items() if n}
    lines = [
        f"- Data set `{record['dataset']}`: {sizes or 'none'} {unit}"
        + "".join(f"; {n:,} dropped ({why})" for why, n in dropped.items())
    ]
    if record.get("epochs"):
        line = f"- {record['epochs']} epochs, {record['steps']:,} steps"
        if record["status"] == "finished":
            last = settings["training"].get("selection") == "last"
            line += f"; weights of epoch {record['best_epoch']} (from 0), "
            line += "the last" if last else "the best on validation"
            line += "; the test set was read once" if record.get("test") or record.get("scores") else ""
        lines.append(line)
    lines.append(f"- Seed {record['seed']}; castbench commit `{record['commit']}`")
    lines.append("- Versions: " + ", ".join(f"{name} {v}" for name, v in record["versions"].items()))
    for name, checksum in record.get("inputs", {}).items():
        many = checksum if isinstance(checksum, list) else [checksum]
        lines += [f"- SHA-256 of {name}: `{one}`" for one in many if one]
    return "\n".join(lines)


def departures(record: dict[str, Any]) -> str:
    """What castbench does otherwise than the papers, or decides for them."""
    matbench = record.get("target", "").partition(".")[0] in MATBENCH
    study = "compositions" if is_composition(record) else "matbench" if matbench else "cast"
    entries = deviations(study)
    return "\n".join(f"- {entry['id']}: {' '.join(entry['here'].split())}" for entry in entries)
