"""The configuration: presets fit the schema, models fit the registry, environments fit the lock file."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from castbench import config as meaning
from castbench.errors import InputError
from castbench.labels import CLASS_TARGETS, COMPOSITION_MODELS, MATBENCH, MODELS, TARGET_ORDER, TARGETS
from castbench.materials.records import LABELS


@pytest.fixture
def schema(root: Path) -> dict:
    return yaml.safe_load((root / "workflow/schemas/config.schema.yaml").read_text())


@pytest.fixture
def config(root: Path) -> dict:
    return yaml.safe_load((root / "config.yaml").read_text())


def merged(base: dict, overlay: dict) -> dict:
    result = copy.deepcopy(base)
    for key, value in overlay.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and key in result else value
    return result


def properties(schema: dict, path: str = ""):
    for key, value in schema.get("properties", {}).items():
        yield f"{path}{key}", value
        yield from properties(value, f"{path}{key}.")


@pytest.mark.parametrize(
    "overlay",
    [None, *(f"presets/{preset}" for preset in ("smoke", "paper", "perovskite", "matbench")),
     *(f"resources/reference_runs/elastic4/{name}" for name in ("config", "published_schedule")),
     "resources/reference_runs/mp36k/config"],
)  # fmt: skip
def test_overlays_fit_the_schema(root: Path, schema: dict, config: dict, overlay: str | None):
    if overlay:
        config = merged(config, yaml.safe_load((root / f"workflow/{overlay}.yaml").read_text()))
    jsonschema.validate(config, schema)
    meaning.check(config)


def test_every_key_is_described_and_listed_in_the_default_config(schema: dict, config: dict):
    for path, value in properties(schema):
        assert "description" in value, path
        section = config
        for part in path.split("."):
            assert part in section, f"config.yaml lacks {path}"
            section = section[part]


def value_at(config: dict, path: str):
    for part in path.split("."):
        config = config[part]
    return config


def test_the_paper_preset_takes_nothing_from_the_default_config(root: Path, schema: dict):
    preset = yaml.safe_load((root / "workflow/presets/paper.yaml").read_text())
    for path, _ in properties(schema):
        if path.split(".")[0] not in ("compositions", "matbench"):  # the other studies'
            value_at(preset, path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("materials.source", "materials_project"),
        ("materials.path", None),
        ("materials.sample", None),
        ("materials.filters.max_formation_energy", 0.15),
        ("materials.filters.max_energy_above_hull", 0.15),
        ("materials.filters.min_formation_energy", -10),
        ("materials.filters.max_modulus", 1000),
        ("text.source", "generate"),
        ("text_encoder", "matscibert"),
        ("max_tokens", 512),
        ("training.batch_size", 64),
        ("training.warmup_steps", 1000),
        ("pretraining.masked_node.batch_size", 64),
        ("pretraining.masked_node.mask_probability", 0.5),
        ("pretraining.contrastive.batch_size", 360),
        ("architecture.cross_attention.layers", 4),
        ("architecture.cross_attention.heads", 8),
        ("architecture.cross_attention.width", 128),
        ("architecture.cogn.width", 128),
        ("architecture.lora.layers", "all"),
    ],
)
def test_the_paper_preset_has_the_papers_values(root: Path, path: str, value: object):
    preset = yaml.safe_load((root / "workflow/presets/paper.yaml").read_text())
    assert value_at(preset, path) == value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"models": ["castt"]}, "castt"),
        ({"epochs": 3}, "epochs"),
        ({"training": {"lr": 1}}, "lr"),
        ({"materials": {"source": "icsd"}}, "icsd"),
        ({"materials": {"filters": {"ordered_moduli": "loose"}}}, "loose"),
        ({"targets": []}, "[]"),
        ({"training": {"seeds": [0, 0]}}, "[0, 0]"),
    ],
)
def test_unknown_names_and_keys_are_named(schema: dict, config: dict, change: dict, named: str):
    with pytest.raises(jsonschema.ValidationError, match=re.escape(named)):
        jsonschema.validate(merged(config, change), schema)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention": {"target": "formation_energy"}}, "attention.target"),
        ({"architecture": {"cogn": {"width": 64}}}, "cogn.width"),
        ({"architecture": {"cross_attention": {"heads": 7}}}, "heads"),
        ({"materials": {"split": {"fractions": [0.8, 0.1, 0.2]}}}, "fractions"),
        ({"structure_encoder": "megnet", "graphs": {"neighbours": 12}}, "graphs.neighbours"),
        ({"training": {"seeds_together": True, "devices": 2}}, "training.seeds_together"),
        ({"training": {"seeds_together": True, "num_nodes": 2}}, "training.seeds_together"),
        ({"training": {"epochs": 2.0}}, "training.epochs: 2.0 is no integer"),
        ({"training": {"seeds": [0, 1.0]}}, "training.seeds[1]: 1.0 is no integer"),
        ({"materials": {"sample": 48.0}}, "materials.sample: 48.0 is no integer"),
        (
            {"study": "compositions", "compositions": {"screening": {"goldschmidt": [1.06, 0.8]}}},
            "compositions.screening.goldschmidt",
        ),
        ({"materials": {"snapshot": "a.jsonl.zst"}}, "materials.snapshot"),
        ({"materials": {"source": "local", "database_version": "2025.09.25"}}, "materials.database_version"),
        ({"materials": {"source": "materials_project", "columns": {"text": "t"}}}, "materials.columns"),
        ({"materials": {"path": "my.jsonl"}}, "materials.source: demo"),
        ({"materials": {"columns": {"text": "t"}}}, "materials.source: demo"),
        ({"materials": {"source": "local"}}, "materials.path: names the bundled"),
        ({"materials": {"source": "laboratory"}}, "materials.path: names the bundled"),
        ({"models": ["gated"]}, "models: src/castbench/config.py does not know gated"),
        ({"compositions": {"models": ["sets"]}}, "compositions.models: src/castbench/config.py does not"),
        ({"study": "compositions", "materials": {"sample": 10}}, "materials.sample"),
        (
            {"study": "compositions", "materials": {"filters": {"max_energy_above_hull": 0.05}}},
            "materials.filters.max_energy_above_hull",
        ),
    ],
)
def test_contradictions_are_named(config: dict, change: dict, named: str):
    with pytest.raises(InputError, match=re.escape(named)):
        meaning.check(merged(config, change))


@pytest.mark.parametrize(
    ("encoder", "chosen", "neighbours"), [("cogn", None, 24), ("cgcnn", None, 12), ("alignn", 16, 16)]
)
def test_graphs_are_as_published_unless_it_is_said(config: dict, encoder: str, chosen: int, neighbours: int):
    changed = merged(config, {"structure_encoder": encoder, "graphs": {"neighbours": chosen}})
    meaning.check(changed)
    expected = {"structure_encoder": encoder, "symprec": 1e-4, "neighbours": neighbours}
    assert meaning.graph_settings(changed) == expected
    assert meaning.architecture("crysmmnet_frozen", changed).keys() == {encoder, "concat"}


@pytest.mark.parametrize("overlay", ["paper", "matbench"])
def test_every_preset_gives_every_encoder_its_published_graph(root: Path, config: dict, overlay: str):
    preset = yaml.safe_load((root / f"workflow/presets/{overlay}.yaml").read_text())
    for encoder, neighbours in meaning.STRUCTURE_ENCODERS.items():
        settings = meaning.graph_settings(config | preset | {"structure_encoder": encoder})
        assert settings.get("neighbours") == neighbours


def test_structure_encoders_have_the_same_names_everywhere(schema: dict, config: dict):
    from castbench.labels import STRUCTURE_ENCODERS

    names = schema["properties"]["structure_encoder"]["enum"]
    assert names == list(STRUCTURE_ENCODERS) == list(meaning.STRUCTURE_ENCODERS)
    assert set(names) <= config["architecture"].keys()


def test_what_is_known_in_one_place_only_is_named(config: dict, monkeypatch):
    monkeypatch.setitem(meaning.MODELS, "gated", ("frozen", ("structure", "concat"), None))
    with pytest.raises(InputError, match=r"models: src/castbench/labels.py does not know gated"):
        meaning.check(config | {"models": ["gated"]})


def test_widths_of_a_fusion_that_is_not_trained_do_not_matter(config: dict):
    meaning.check(merged(config, {"architecture": {"cogn": {"width": 16}}}) | {"models": ["structure_only"]})


def test_every_targets_values_stand_in_a_column_that_is_read():
    assert {TARGETS[name].column for name in TARGET_ORDER} <= set(LABELS)


def test_names_agree_everywhere(schema: dict):
    from castbench.models import REGISTRY

    assert (
        set(meaning.MODELS)
        == set(MODELS)
        == set(schema["properties"]["models"]["items"]["enum"])
        == set(REGISTRY)
    )
    assert {*TARGET_ORDER, *MATBENCH} == set(schema["properties"]["targets"]["items"]["enum"])


def test_names_of_the_composition_study_agree_everywhere(schema: dict):
    from castbench.models import COMPOSITION_REGISTRY

    section = schema["properties"]["compositions"]["properties"]
    names = set(section["models"]["items"]["enum"])
    assert names == set(meaning.COMPOSITION_MODELS)
    assert names == set(COMPOSITION_MODELS) - set(MODELS)
    assert set(COMPOSITION_REGISTRY) == {n for n, (_, loss) in meaning.COMPOSITION_MODELS.items() if loss}
    assert set(section["classification"]["propertyNames"]["enum"]) == set(CLASS_TARGETS)
    assert set(section["regression"]["items"]["enum"]) <= set(TARGETS)


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ({"crabnet": {"layers": 1}}, {"crabnet"}),
        ({"random_forest": {"trees": 9}}, {"random_forest"}),
        ({"training": {"epochs": 9}}, {n for n, (_, loss) in meaning.COMPOSITION_MODELS.items() if loss}),
        ({"screening": {"top": 9}}, set()),
    ],
)
def test_a_composition_section_changes_its_models_only(config: dict, change: dict, rerun: set[str]):
    changed = merged(config, {"compositions": change})
    names = meaning.COMPOSITION_MODELS
    differ = {
        n
        for n in names
        if meaning.composition_settings(n, config) != meaning.composition_settings(n, changed)
    }
    assert differ == rerun


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"models": ["baseline"]}, "compositions.models"),
        ({"regression": ["formation_energy"]}, "band_gap"),
        ({"classification": {"metallicity": 0.0}}, "stability"),
        ({"crabnet": {"heads": 7}}, "compositions.crabnet.heads"),
    ],
)
def test_contradictions_of_the_composition_study_are_named(config: dict, change: dict, named: str):
    meaning.check(merged(config, {"study": "compositions"}))
    changed = merged(config, {"compositions": change})
    if "classification" in change:
        changed["compositions"]["classification"] = change["classification"]
    meaning.check(changed)  # of no concern to the other study
    with pytest.raises(InputError, match=re.escape(named)):
        meaning.check(changed | {"study": "compositions"})


def test_a_section_changes_the_settings_of_its_models_only(config: dict):
    changed = merged(config, {"architecture": {"concat": {"width": 32}}})
    rerun = {
        m for m in MODELS if meaning.training_settings(m, config) != meaning.training_settings(m, changed)
    }
    assert rerun == {"crysmmnet_frozen", "crysmmnet_lora"}
    changed = merged(config, {"architecture": {"lora": {"rank": 4}}})
    rerun = {
        m for m in MODELS if meaning.training_settings(m, config) != meaning.training_settings(m, changed)
    }
    assert rerun == {"text_only", "crysmmnet_lora"}


def test_one_key_gives_cast_a_trained_text_encoder(config: dict):
    assert meaning.text_mode("cast", config) == meaning.text_mode("masked_node", config) == "frozen"
    changed = merged(config, {"architecture": {"cross_attention": {"text": "lora"}}})
    for name in ("cast", "cast_scratch", "masked_node"):
        assert meaning.text_mode(name, changed) == "lora"
        assert "lora" in meaning.architecture(name, changed)
        assert meaning.remaining_layers(name, changed) == 1
    changed = merged(changed, {"architecture": {"lora": {"layers": "all"}}})
    assert meaning.remaining_layers("cast", changed) is None


def test_environments_agree_with_the_lock_file(root: Path):
    def pins(lines: list[str]) -> dict[str, str]:
        return dict(line.split(" ;")[0].strip().lower().split("==") for line in lines if "==" in line)

    lock = pins((root / "requirements.lock").read_text().splitlines())
    required = pins((root / "envs/requirements.in").read_text().splitlines())
    assert required.items() <= lock.items()
    for file in (root / "envs").glob("*.yaml"):
        packages = yaml.safe_load(file.read_text())["dependencies"][-1]["pip"]
        assert pins(packages).items() <= lock.items(), file.name


def test_the_source_depends_on_its_own_keys(config: dict):
    """A change of the text reruns a download that brings it, and no other source."""
    provided = {"text": {"source": "provided"}}
    assert meaning.source_settings(merged(config, provided)) == meaning.source_settings(config)
    assert meaning.source_files(config) == [config["materials"]["path"]]
    config = merged(config, {"materials": {"source": "materials_project"}})
    assert not meaning.source_settings(config)["descriptions"]
    assert meaning.source_settings(merged(config, provided))["descriptions"]
    assert meaning.source_files(config) == []
    assert meaning.source_files(merged(config, {"materials": {"snapshot": "a.zst"}})) == ["a.zst"]


def test_the_files_of_ones_own_encoder_are_inputs(config: dict, tmp_path: Path):
    assert meaning.encoder_files(config) == []
    for name in ("config.json", "model.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    own = merged(config, {"text_encoder": f"{tmp_path}@r1"})
    assert meaning.encoder_files(own) == [
        str(tmp_path / name) for name in ("config.json", "model.safetensors")
    ]


def test_every_file_of_a_folder_is_an_input(config: dict, tmp_path: Path):
    """A file that is written again leaves its folder's time as it was."""
    for name in ("b.cif", "more/a.cif", "labels.csv", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = merged(config, {"materials": {"source": "local", "path": str(tmp_path)}})
    names = ("b.cif", "labels.csv", "more/a.cif")
    assert meaning.source_files(folder) == [str(tmp_path / name) for name in names]


@pytest.fixture
def folds(root: Path, config: dict) -> dict:
    """The configuration of the preset for Matbench."""
    return merged(config, yaml.safe_load((root / "workflow/presets/matbench.yaml").read_text()))


def test_every_fold_of_a_task_has_runs_of_its_own(config: dict, folds: dict):
    assert meaning.run_targets(config) == config["targets"]
    names = meaning.run_targets(folds)
    assert len(names) == 45 and names[:2] == ["matbench_jdft2d.fold_0", "matbench_jdft2d.fold_1"]
    assert set(names) <= set(TARGETS)
    assert meaning.source_files(folds)[0] == "results/matbench/materials/matbench_jdft2d.json.gz"
    here = merged(folds, {"materials": {"path": "files"}, "targets": ["matbench_phonons"]})
    assert meaning.source_files(here) == ["files/matbench_phonons.json.gz"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"study": "cast"}, "targets: matbench_jdft2d, but study cast has no task of Matbench"),
        ({"targets": ["band_gap"]}, "targets: band_gap, but study matbench has the tasks of Matbench alone"),
        ({"materials": {"source": "local"}}, "materials.source: local and study matbench"),
        ({"materials": {"sample": 10}}, "materials.sample: Matbench's folds need every record"),
        ({"materials": {"filters": {"exclude_noble_gases": True}}}, "materials.filters.exclude_noble_gases"),
        ({"materials": {"filters": {"max_formation_energy": 0.1}}}, "materials.filters.max_formation_energy"),
        ({"models": ["structure_only", "cast"]}, "models: cast is pretrained"),
        ({"training": {"selection": "best"}}, "set matbench.validation"),
    ],
)
def test_what_matbenchs_folds_forbid_is_named(folds: dict, change: dict, named: str):
    with pytest.raises(InputError, match=re.escape(named)):
        meaning.check(merged(folds, change))
    meaning.check(merged(folds, {"matbench": {"validation": 0.1}, "training": {"selection": "best"}}))


def test_pretraining_depends_on_none_of_the_keys_that_it_has_of_its_own(config: dict):
    own = {"seeds": [7], "seeds_together": True, "epochs": 9, "batch_size": 9}
    changed = merged(config, {"training": own})
    faster = merged(config, {"training": {"learning_rate": 0.5}})
    for name in meaning.OBJECTIVES:
        before = meaning.pretraining_settings(name, config)
        assert meaning.pretraining_settings(name, changed) == before
        assert meaning.pretraining_settings(name, faster) != before


def test_the_width_of_cogn_is_of_no_concern_to_other_encoders(config: dict):
    meaning.check(merged(config, {"structure_encoder": "cgcnn", "architecture": {"cogn": {"width": 64}}}))


def test_the_transformers_differ_by_their_loss(config: dict):
    losses = {n: meaning.composition_settings(n, config)["loss"] for n in meaning.COMPOSITION_MODELS}
    assert losses == {
        "baseline": None, "random_forest": None, "crabnet": "inverse_frequency",
        "edm_cross_entropy": "cross_entropy", "edm_alpha_report": "report",
        "edm_transformer": "inverse_frequency",
    }  # fmt: skip


def test_compositions_of_a_download_are_read_from_the_snapshot_that_it_leaves(config: dict):
    live = merged(config, {"materials": {"source": "materials_project"}})
    left = f"results/{config['dataset']}/materials/snapshot.jsonl.zst"
    assert meaning.composition_source(live)["snapshot"] == left
    given = merged(live, {"materials": {"snapshot": "a.jsonl.zst"}})
    assert meaning.composition_source(given)["snapshot"] == "a.jsonl.zst"
