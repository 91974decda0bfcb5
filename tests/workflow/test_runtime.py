"""How jobs are started: one on a card, and a clear line where conda is missing."""

import os
import re
from pathlib import Path

import pytest

GUARD = """
configfile: "config.yaml"
include: "workflow/rules/common.smk"
rule everything:
    default_target: True
    input:
        expand("guard/{i}", i=range(4)),
rule card_job:
    output:
        "guard/{i}",
    resources:
        gpu=1,
    shell:
        "echo start >> guard.log; sleep 0.4; echo end >> guard.log; touch {output}"
"""


@pytest.fixture(scope="module")
def folder(clone) -> Path:
    return clone()


@pytest.mark.parametrize(("options", "most"), [((), 1), (("--resources", "gpu=2"), 2)])
def test_no_two_jobs_on_one_card_without_a_profile(
    folder: Path, snakemake, options: tuple[str, ...], most: int
):
    (folder / "guard.smk").write_text(GUARD)
    (folder / "guard.log").unlink(missing_ok=True)
    ended = snakemake(folder, "--snakefile", "guard.smk", "--cores", "8", "--forceall", *options)
    assert ended.returncode == 0, ended.stdout[-3000:]
    running, seen = 0, 0
    for line in (folder / "guard.log").read_text().split():
        running += 1 if line == "start" else -1
        seen = max(seen, running)
    assert seen == most


@pytest.mark.parametrize(
    ("preset", "rules"),
    [
        ((), {"embed_text", "pretrain_model", "train_model", "extract_attention", "probe_text"}),
        (("workflow/presets/perovskite.yaml",), {"train_model", "train_compositions", "screen_compositions"}),
    ],
)
def test_every_job_that_uses_a_card_asks_for_one(
    folder: Path, snakemake, preset: tuple[str, ...], rules: set[str]
):
    (folder / "gpu.yaml").write_text("training: {device: cuda}")
    shown = snakemake(folder, "--cores", "8", "-n", "--configfile", *preset, "gpu.yaml").stdout
    jobs = re.findall(r"^rule (\w+):\n(.*?)^(?=\S)", shown, re.M | re.S)
    asked = {rule for rule, text in jobs if re.search(r"resources: .*\bgpu=1\b", text)}
    assert asked >= rules
    assert all("gpu=1" in text for rule, text in jobs if rule in asked)


def test_use_conda_without_conda_is_one_clear_line(folder: Path, snakemake, monkeypatch: pytest.MonkeyPatch):
    places = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(p for p in places if not (Path(p) / "conda").exists()))
    ended = snakemake(folder, "--cores", "8", "-n", "--use-conda")
    assert ended.returncode != 0
    assert ended.stdout.count("there is no conda on the PATH") == 1
    assert "Traceback" not in ended.stdout
    assert len(ended.stdout.splitlines()) <= 5, ended.stdout


@pytest.mark.parametrize("profile", ["workstation", "slurm"])
def test_profiles_plan_the_presets(folder: Path, snakemake, profile: str):
    options = ("--workflow-profile", f"workflow/profiles/{profile}")
    preset = ("--configfile", "workflow/presets/smoke.yaml")
    ended = snakemake(folder, "-n", "--cores", "8", *options, *preset)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "rule train_model" in ended.stdout
