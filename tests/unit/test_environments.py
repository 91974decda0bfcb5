"""The lock file serves every platform, the container and the rules use what it pins, nothing names a host."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PLATFORMS = {
    "Linux, with or without a GPU": {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    },
    "Linux on ARM": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "macOS on ARM": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}
PYTHONS = ("3.11", "3.12", "3.13")


def requirements(file: Path) -> list[Requirement]:
    lines = file.read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def lock(root: Path) -> list[Requirement]:
    return requirements(root / "requirements.lock")


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_lock_file_has_one_version_of_everything_on_every_platform(
    root: Path, lock: list[Requirement], platform: str, python: str
):
    where = PLATFORMS[platform] | {"python_version": python, "python_full_version": f"{python}.5"}
    where |= {"platform_python_implementation": "CPython", "os_name": "posix"}
    chosen = [line for line in lock if line.marker is None or line.marker.evaluate(where)]
    names = [canonicalize_name(line.name) for line in chosen]
    assert len(names) == len(set(names))
    needed = {canonicalize_name(line.name) for line in requirements(root / "envs/requirements.in")}
    assert needed <= set(names)


def test_the_lock_file_leaves_the_build_of_torch_to_the_platform(lock: list[Requirement]):
    for line in lock:
        assert re.fullmatch(r"==[^+*,]+", str(line.specifier)), line  # exact, and no build such as +cpu
        assert not re.match(r"nvidia-|cuda-", line.name), line


def test_the_conda_environments_have_the_python_of_the_container(root: Path):
    base = re.search(r"^FROM python:(\d+\.\d+)\.\d+-[\w-]+$", (root / "envs/Dockerfile").read_text(), re.M)
    assert base
    for file in sorted((root / "envs").glob("*.yaml")):
        assert f"python={base[1]}" in yaml.safe_load(file.read_text())["dependencies"], file.name


def test_the_container_installs_the_lock_file_alone(root: Path):
    text = (root / "envs/Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) (\S+)$", text, re.M)
    assert [source for source, _ in copied] == ["requirements.lock"]
    assert (root / "requirements.lock").is_file()
    installed = re.findall(r"pip install (.*)", text)
    assert len(installed) == 1
    assert f"--requirement {copied[0][1]}" in installed[0]


def test_every_rule_has_an_environment_that_exists_and_a_log_of_its_own(root: Path):
    logs: dict[str, str] = {}
    for file in sorted((root / "workflow/rules").glob("*.smk")):
        for rule in re.split(r"^rule ", file.read_text(), flags=re.M)[1:]:
            name = rule.split(":")[0]
            named = re.findall(r'^    conda:\n        "../../(envs/\w+\.yaml)"', rule, re.M)
            assert len(named) == 1, name
            assert (root / named[0]).is_file()
            log = re.findall(r'^    log:\n        f?"([^"]+\.log)",', rule, re.M)
            assert len(log) == 1, name
            assert logs.setdefault(log[0], name) == name
    assert len(logs) > 30


PROFILES = ("workstation", "slurm")


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_hold_runtime_only(root: Path, name: str):
    profile = yaml.safe_load((root / f"workflow/profiles/{name}/config.yaml").read_text())
    assert not {"config", "configfile", "configfiles", "snakefile", "directory"} & set(profile)
    assert profile["resources"]["gpu"] >= 1
    assert profile["retries"] >= 1
    rules = {*profile.get("set-resources", {}), *profile.get("set-threads", {}), *profile.get("groups", {})}
    known = "".join(file.read_text() for file in (root / "workflow/rules").glob("*.smk"))
    assert all(f"\nrule {rule}:" in known for rule in rules)


def test_the_slurm_profile_knows_every_rule_that_asks_for_a_card(root: Path):
    """There a GPU partition is named, and what has checkpoints is told before its time is up."""
    text = (root / "workflow/profiles/slurm/config.yaml").read_text()
    sections = dict(re.findall(r"^  (\w+):\n((?:    .*\n)+)", text, re.M))
    asking = set()
    for file in (root / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"^rule ", file.read_text(), flags=re.M)[1:]:
            name = rule.split(":")[0]
            if re.search(r"gpu=\w*GPUS", rule):
                asking.add(name)
                assert "# slurm_partition: gpu\n" in sections[name], name
                assert ("--signal=TERM@90" in sections[name]) == ("retries: RETRIES" in rule), name
    assert asking == set(sections)


def test_a_job_asks_for_more_memory_and_time_when_it_starts_again(root: Path):
    profile = yaml.safe_load((root / "workflow/profiles/slurm/config.yaml").read_text())
    asked = [profile["default-resources"], *profile["set-resources"].values()]
    values = [section[key] for section in asked for key in ("mem_mb", "runtime") if key in section]
    assert len(values) >= 6
    assert all(re.fullmatch(r"\d+ \* attempt", value) for value in values)


def test_the_workflow_catalogue_knows_how_it_is_deployed(root: Path):
    catalogue = yaml.safe_load((root / ".snakemake-workflow-catalog.yml").read_text())
    assert catalogue["usage"]["software-stack-deployment"]["conda"] is True
