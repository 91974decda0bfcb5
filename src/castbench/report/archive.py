"""One file from which the report rebuilds without training: records, configuration, environment, code."""

import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from castbench.errors import InputError
from castbench.provenance import atomic_path, code_version, sha256_file

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[3]
CODE = ("Snakefile", "config.yaml", "pyproject.toml", "requirements.lock", "Makefile", "README.md",
        "CONTRIBUTING.md", "LICENSE", "envs", "workflow", "src")  # fmt: skip
# Under the results: what the rules below read or write. Weights, checkpoints and caches are left out.
RUNS = ("runs/*/*/[0-9]*", "pretrain/*/[0-9]*", "composition_runs/*/[0-9]*")
RECORDS = ("metrics.json", "cost.json", "config.json", "history.csv", "predictions.parquet", "README.md")
RESULTS = (
    "report.html", "tables/*", "figures/*", "attention/*", "attention/probes/*", "splits/*.json",
    "materials.parquet", "materials/manifest.json", "funnel.json", "descriptions.json",
    "graphs/manifest.json", "graphs/index.parquet", "tokens/manifest.json", "tokens/index.parquet",
    "compositions.parquet", "compositions/manifest.json", "screening/*", "matbench/*", "matbench/*/*/*",
    *(f"{runs}/{file}" for runs in RUNS for file in RECORDS),
)  # fmt: skip
# From records to the report, by study.
RULES = {
    "cast": "aggregate_runs tabulate_evidence plot_dataset plot_results plot_attention plot_evidence"
    " render_report",
    "compositions": "tabulate_compositions plot_compositions render_composition_report",
    "matbench": "aggregate_matbench render_matbench_report",
}
READ_ME = """\
# {dataset}: an archive of castbench {commit}

Records of every run, tables, figures, splits and manifests stand in `results/{dataset}/`, the configuration
in `configuration.yaml`, every version of the environment in `requirements.lock`, the code in `src/` and
`workflow/`; `archive.json` has the SHA-256 of every file. Make the environment (`make venv`, or
`envs/Dockerfile`), then rebuild tables, figures and report from the records, without training:

    {command}
"""


def archive_results(settings: dict[str, Any], results: Path, output: Path) -> None:
    """Pack a finished run into a zip file whose bytes are a function of what is in it.

    Args:
        settings: the whole configuration.
        results: results/{dataset}/.
        output: the zip file.

    Raises:
        InputError: there is no report.
    """
    if not (results / "report.html").is_file():
        raise InputError(f"{results}: there is no report to archive; run the workflow first")
    dataset, commit = settings["dataset"], code_version()
    files = {str(path.relative_to(ROOT)): path for path in code_files()}
    packed = sorted(path for pattern in RESULTS for path in results.glob(pattern) if path.is_file())
    files |= {f"results/{dataset}/{path.relative_to(results)}": path for path in packed}
    rules = RULES[settings["study"]]
    command = (
        f"snakemake --cores 1 --configfile configuration.yaml --allowed-rules {rules} --forcerun {rules}"
        f" -- results/{dataset}/report.html"
    )
    checksums = {name: sha256_file(path) for name, path in sorted(files.items())}
    texts = {
        "ARCHIVE.md": READ_ME.format(dataset=dataset, commit=commit, command=command),
        "configuration.yaml": yaml.safe_dump(settings, sort_keys=True, allow_unicode=True),
        "archive.json": json.dumps({"dataset": dataset, "commit": commit, "files": checksums}, indent=1)
        + "\n",
    }
    top = f"castbench-{dataset}"
    with atomic_path(output) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(entry(f"{top}/{name}"), text)
        for name, path in sorted(files.items()):
            with (
                path.open("rb") as source,
                archive.open(entry(f"{top}/{name}"), "w", force_zip64=True) as target,
            ):
                shutil.copyfileobj(source, target, 2**20)
    log.info("%d files, %.1f MB in %s", len(files) + len(texts), output.stat().st_size / 1e6, output)


def code_files() -> Iterator[Path]:
    """Files of the code: no hidden ones, nothing compiled."""
    for name in CODE:
        path = ROOT / name
        for file in path.rglob("*") if path.is_dir() else [path]:
            parts = file.relative_to(ROOT).parts
            if file.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
                yield file


def entry(name: str) -> zipfile.ZipInfo:
    """An entry without a time of its own: unpacked files are equally old, so that none looks out of date."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    return info
