"""The command line: one verb a rule. A verb is a typed function, and its signature is its arguments."""

import argparse
import importlib
import inspect
import json
import logging
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from castbench.errors import InputError
from castbench.labels import name_structure_encoder

# verb: module:function, in the order of the data flow. Modules are imported when their verb runs.
VERBS = {
    "fetch_matbench": "castbench.materials.matbench",
    "collect_materials": "castbench.materials.sources",
    "filter_materials": "castbench.materials.filters",
    "split_materials": "castbench.materials.splits",
    "split_matbench": "castbench.materials.folds",
    "describe_shard": "castbench.text.descriptions",
    "describe_crystal": "castbench.text.descriptions",
    "gather_descriptions": "castbench.text.descriptions",
    "build_graphs": "castbench.graphs.build",
    "prefetch_encoder": "castbench.text.encoders",
    "tokenize_text": "castbench.text.tokens",
    "embed_text": "castbench.text.states",
    "pretrain_model": "castbench.training.pretrain",
    "train_model": "castbench.training.train",
    "extract_attention": "castbench.evaluation.attention",
    "extract_text_attention": "castbench.evaluation.text_attention",
    "probe_text": "castbench.evaluation.probes",
    "tabulate_evidence": "castbench.evaluation.evidence",
    "aggregate_runs": "castbench.evaluation.aggregate",
    "aggregate_matbench": "castbench.evaluation.matbench",
    "plot_dataset": "castbench.report.figures",
    "plot_results": "castbench.report.figures",
    "plot_attention": "castbench.report.attention",
    "plot_evidence": "castbench.report.attention",
    "render_report": "castbench.report.html",
    "render_matbench_report": "castbench.report.matbench",
    "archive_results": "castbench.report.archive",
    "predict_cost": "castbench.report.prediction",
    "predict": "castbench.evaluation.predict",
    "explain": "castbench.report.explain",
    "collect_compositions": "castbench.compositions.collect",
    "aggregate_compositions": "castbench.compositions.collect",
    "split_compositions": "castbench.compositions.splits",
    "split_structures": "castbench.compositions.splits",
    "featurize_compositions": "castbench.compositions.magpie",
    "fit_baseline": "castbench.training.baselines",
    "train_compositions": "castbench.training.compositions",
    "explain_compositions": "castbench.evaluation.composition_attention",
    "screen_compositions": "castbench.compositions.screen",
    "validate_screening": "castbench.compositions.screen",
    "tabulate_compositions": "castbench.evaluation.compositions",
    "plot_compositions": "castbench.report.composition_figures",
    "render_composition_report": "castbench.report.composition_html",
}
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # of a process, where there are several
ONLINE = ("prefetch_encoder",)  # the verbs that ask the Hugging Face Hub
log = logging.getLogger("castbench")


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object given on the command line."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return content


def add_arguments(parser: argparse.ArgumentParser, function: Callable[..., None]) -> None:
    """Turn the parameters of `function` into options: `Path`, `str`, numbers, lists of these, `dict`.

    Those that the signature has before a / are given without a name.
    """
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, many, default = hints[name], False, parameter.default
        if isinstance(kind, types.UnionType):  # X | None
            default = None if default is inspect.Parameter.empty else default
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        if typing.get_origin(kind) is list:
            kind, many = typing.get_args(kind)[0], True
        if typing.get_origin(kind) is dict:
            kind = dict
        required = default is inspect.Parameter.empty
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            parser.add_argument(name, type=kind, metavar=name.upper(), nargs="+" if many else None)
            continue
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            type=json_object if kind is dict else kind,
            nargs="*" if many else None,
            required=required,
            default=None if required else default,
        )


def configure_logging(file: Path | None) -> None:
    """Log to `file`, and only warnings to standard error; without a file, everything to standard error.

    Of processes that train together, the first alone: the others say what it says.
    """
    first = not any(int(os.environ.get(name, "0")) for name in RANKS)
    terminal = logging.StreamHandler()
    terminal.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    terminal.setLevel(logging.INFO if first else logging.ERROR)
    handlers: list[logging.Handler] = [terminal]
    if file is not None and first:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = logging.FileHandler(file, mode="w", encoding="utf-8")
        written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(written)
        terminal.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.captureWarnings(True)
    for noisy in ("py.warnings", "httpx", "httpcore", "fontTools", "matplotlib", "filelock"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> int:
    """Run a verb. Returns 0, or 2 when the input is bad: then one line on standard error says why."""
    arguments = sys.argv[1:] if arguments is None else arguments
    told = f"Verbs: {', '.join(VERBS)}. What one takes: python -m castbench VERB --help"
    parser = argparse.ArgumentParser(prog="python -m castbench", description=__doc__, epilog=told)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    chosen = next((word for word in arguments if word in VERBS), None)
    if chosen not in ONLINE:  # read by the Hub's client when it is imported
        os.environ["HF_HUB_OFFLINE"] = "1"
    function: Callable[..., None] | None = None
    for verb in VERBS:
        child = verbs.add_parser(verb)
        if verb == chosen:
            function = getattr(importlib.import_module(VERBS[verb]), verb)
            child.description = inspect.getdoc(function)
            child.add_argument("--log", type=Path, default=None, help="write the log here")
            add_arguments(child, function)
    given = vars(parser.parse_args(arguments))
    configure_logging(given.pop("log"))
    given.pop("verb")
    assert function is not None
    parameters = inspect.signature(function).parameters.values()
    unnamed = [given.pop(p.name) for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    if "structure_encoder" in (given.get("settings") or {}):
        name_structure_encoder(given["settings"]["structure_encoder"])
    try:
        function(*unnamed, **given)
    except InputError as error:
        log.error("%s: %s", chosen, error)
        return 2
    except Exception as error:
        if full := out_of_memory(error):
            log.error("%s: %s; lower training.batch_size, or let no other job use this GPU", chosen, full)
            return 2
        log.exception("%s failed", chosen)
        return 1
    return 0


def out_of_memory(error: BaseException | None) -> str:
    """What a GPU said whose memory was full, whatever other error came of that; empty if none did."""
    torch = sys.modules.get("torch")
    while torch is not None and error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return str(error).partition(". ")[0]
        error = error.__cause__ or error.__context__
    return ""
