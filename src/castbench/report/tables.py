"""Table 1 as people read it: mean (std) over seeds, best bold, second underlined, units in every header."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from castbench.labels import MODELS, STRUCTURE_ENCODERS, TARGETS

BASELINE = "training_mean"
NOTE = (
    "Test MAE, mean (sample standard deviation, ddof = 1) over {seeds} seeds. Best in bold, second "
    "underlined; a cell with missing runs says how many finished and takes no part in the ranking. "
)
COMPARED = "Below: the paper's value and our difference to it."
REFERENCE = (
    "The paper's values are for reference only: data or encoders here are not the paper's, "
    "so no difference is formed."
)


def model_label(model: str) -> str:
    """Name of a model, or of the baseline, as the tables show it."""
    return (
        "Training mean (baseline)" if model == BASELINE else MODELS[model].label if model in MODELS else model
    )


def note(cells: pd.DataFrame) -> str:
    """What the reader must know to read Table 1."""
    known = cells["paper_mean"].notna().any()
    text = NOTE.format(seeds=int(cells["expected"].max()))
    return text + (COMPARED if cells["comparable"].eq(True).any() else REFERENCE if known else "")


def mean_std(mean: float, std: float) -> str:
    """`0.256 (0.045)`: three decimals, more for a smaller std; a dash where there is no mean or std."""
    if math.isnan(mean):
        return "–"
    if math.isnan(std):
        return f"{mean:.3f} (–)"
    return f"{mean:.3f} ({std:.3f})" if std >= 0.0005 or std == 0 else f"{mean:.3f} ({std:.1g})"


def cell_text(cell: dict[str, Any]) -> str:
    """Text of a cell without emphasis; `[2/3 runs]` where runs are missing."""
    if cell["model"] == BASELINE:
        return "–" if math.isnan(cell["mean"]) else f"{cell['mean']:.3f}"
    text = mean_std(cell["mean"], cell["std"])
    if cell["finished"] < cell["expected"]:
        text += f" [{cell['finished']:.0f}/{cell['expected']:.0f} runs]"
    return text


def paper_text(cell: dict[str, Any]) -> str:
    """The paper's value, with the difference where it can be compared; empty where the paper has none."""
    if math.isnan(cell["paper_mean"]):
        return ""
    text = f"paper {mean_std(cell['paper_mean'], cell['paper_std'])}"
    judged = cell["comparable"] is True and not math.isnan(cell["difference"])
    return f"{text}, difference {cell['difference']:+.3f}" if judged else text


def header(cells: pd.DataFrame, target: str) -> tuple[str, str]:
    """A target's header with unit, and the sizes of its splits."""
    sizes = cells.loc[cells["target"] == target, ["n_train", "n_validation", "n_test"]].max()
    if sizes.isna().any():
        return TARGETS[target].axis, "no run"
    return TARGETS[target].axis, "n = {:,.0f} / {:,.0f} / {:,.0f}".format(*sizes)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def rows(cells: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """(model, its cells in order of the targets), in the table's order."""
    return [(str(model), records(group)) for model, group in cells.groupby("model", sort=False)]


def targets_of(cells: pd.DataFrame) -> list[str]:
    """Targets in the table's order."""
    return list(dict.fromkeys(cells["target"]))


def table1_wide(cells: pd.DataFrame) -> pd.DataFrame:
    """Table 1 for `table1.csv`: one row a model, columns for each target, with the unit in the header."""
    wide = []
    for model, group in rows(cells):
        row: dict[str, Any] = {"model": model, "label": model_label(model)}
        for cell in group:
            target = TARGETS[cell["target"]]
            row |= {
                f"{target.label} MAE mean ({target.unit})": cell["mean"],
                f"{target.label} MAE std, ddof 1 ({target.unit})": cell["std"],
                f"{target.label} rank": cell["rank"],
                f"{target.label} runs finished": cell["finished"],
                f"{target.label} runs expected": cell["expected"],
                f"{target.label} n train": cell["n_train"],
                f"{target.label} n validation": cell["n_validation"],
                f"{target.label} n test": cell["n_test"],
                f"{target.label} paper MAE mean, reference only ({target.unit})": cell["paper_mean"],
                f"{target.label} paper MAE std, reference only ({target.unit})": cell["paper_std"],
                f"{target.label} MAE minus paper ({target.unit})": cell["difference"],
            }
            if cells["comparable"].eq(True).any():
                row = {key.replace(", reference only", ""): value for key, value in row.items()}
        wide.append(row)
    return pd.DataFrame(wide)


def _body(
    cells: pd.DataFrame, best: Callable[[str], str], second: Callable[[str], str]
) -> list[tuple[str, list[str], list[str]]]:
    """(label, emphasised cells, the paper's values) of every row."""
    body = []
    for model, group in rows(cells):
        ours = []
        for cell in group:
            emphasis = {1: best, 2: second}.get(cell["rank"], str)
            ours.append(emphasis(cell_text(cell)))
        body.append((model_label(model), ours, [paper_text(cell) for cell in group]))
    return body


def table1_markdown(cells: pd.DataFrame, settings: dict[str, Any]) -> str:
    """Table 1 in GitHub's Markdown, which knows <ins> but not <u>, with its caption."""
    headers = [f"{label}<br>{sizes}" for label, sizes in (header(cells, t) for t in targets_of(cells))]
    lines = [
        f"**Table 1.** {caption(settings)} {note(cells)} n: train / validation / test.",
        "",
        "| Model | " + " | ".join(headers) + " |",
        "|---" * (len(headers) + 1) + "|",
    ]
    for label, ours, paper in _body(cells, best="**{}**".format, second="<ins>{}</ins>".format):
        both = [f"{a}<br>{b}" if b else a for a, b in zip(ours, paper, strict=True)]
        lines.append(f"| {label} | " + " | ".join(both) + " |")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Escape what is special in LaTeX."""
    for sign in "&%_#":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("–", "--")


def table1_latex(cells: pd.DataFrame, settings: dict[str, Any]) -> str:
    """Table 1 in LaTeX, for the package booktabs, with its caption."""
    targets = targets_of(cells)
    labels, sizes = zip(*(header(cells, t) for t in targets), strict=True)
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escape(f'{caption(settings)} {note(cells)} n: train / validation / test.')}}}",
        rf"\begin{{tabular}}{{l{'r' * len(targets)}}}",
        r"\toprule",
        "Model & " + " & ".join(_escape(label) for label in labels) + r" \\",
        " & " + " & ".join(_escape(size) for size in sizes) + r" \\",
        r"\midrule",
    ]
    for label, ours, paper in _body(cells, best=r"\textbf{{{}}}".format, second=r"\underline{{{}}}".format):
        lines.append(_escape(label) + " & " + " & ".join(_escape(cell) for cell in ours) + r" \\")
        if any(paper):
            small = (rf"{{\footnotesize {_escape(cell)}}}" if cell else "" for cell in paper)
            lines.append(" & " + " & ".join(small) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def caption(settings: dict[str, Any]) -> str:
    """What was run on what, in one sentence."""
    dataset, source, encoder = (settings[key] for key in ("dataset", "source", "text_encoder"))
    structure = STRUCTURE_ENCODERS[settings["structure_encoder"]][0]
    return f"Dataset {dataset} (source {source}), encoders {structure} and {encoder}."
