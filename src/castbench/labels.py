"""Names, labels, units and colours of targets and models: the only place that has them."""

from dataclasses import dataclass, replace
from typing import Literal, TypeVar


@dataclass(frozen=True)
class Target:
    """A property to predict: `transform` of the materials column `column`, in `unit`.

    Of a `classification` the values are classes 0 and 1, and the predictions probabilities of 1.
    """

    name: str
    label: str
    unit: str
    column: str
    transform: Literal["identity", "log10"] = "identity"
    task: Literal["regression", "classification"] = "regression"

    @property
    def axis(self) -> str:
        """Label with unit, for axes and headers."""
        return f"{self.label} ({self.unit})"


@dataclass(frozen=True)
class Model:
    """A published method, as tables and figures show it."""

    name: str
    label: str
    colour: str
    inputs: str
    source: str


Named = TypeVar("Named", bound="Target | Model | ClassTarget")


def by_name(*named: Named) -> dict[str, Named]:
    """Things by their names, in this order."""
    return {one.name: one for one in named}


TARGETS = by_name(
    Target("total_energy", "Total energy", "eV/atom", "energy_per_atom"),
    Target("formation_energy", "Formation energy", "eV/atom", "formation_energy_per_atom"),
    Target("band_gap", "Band gap", "eV", "band_gap"),
    Target("energy_above_hull", "Energy above hull", "eV/atom", "energy_above_hull"),
    Target("log_shear_modulus", "log10 shear modulus", "log10 GPa", "g_vrh", "log10"),
    Target("log_bulk_modulus", "log10 bulk modulus", "log10 GPa", "k_vrh", "log10"),
)
TARGET_ORDER = tuple(TARGETS)

# The tasks of Matbench v0.1 (Dunn et al. 2020) whose input is a structure; the values are in the task's unit.
MATBENCH = by_name(
    Target("matbench_jdft2d", "Exfoliation energy", "meV/atom", "matbench_jdft2d"),
    Target("matbench_phonons", "Last phonon peak", "1/cm", "matbench_phonons"),
    Target("matbench_dielectric", "Refractive index", "unitless", "matbench_dielectric"),
    Target("matbench_log_gvrh", "log10 shear modulus", "log10 GPa", "matbench_log_gvrh"),
    Target("matbench_log_kvrh", "log10 bulk modulus", "log10 GPa", "matbench_log_kvrh"),
    Target("matbench_perovskites", "Perovskite formation energy", "eV/unit cell", "matbench_perovskites"),
    Target("matbench_mp_gap", "Band gap", "eV", "matbench_mp_gap"),
    Target("matbench_mp_is_metal", "Metal", "probability", "matbench_mp_is_metal", task="classification"),
    Target("matbench_mp_e_form", "Formation energy", "eV/atom", "matbench_mp_e_form"),
)
FOLDS = 5


def fold_name(task: str, fold: int) -> str:
    """Name of a Matbench task's fold, which is a target with a split and runs of its own."""
    return f"{task}.fold_{fold}"


TARGETS |= MATBENCH
TARGETS |= {
    name: replace(target, name=name, label=f"{target.label}, fold {fold}")
    for target in MATBENCH.values()
    for fold in range(FOLDS)
    for name in [fold_name(target.name, fold)]
}

# Okabe and Ito's colour-blind safe palette; the order is that of Table 1 of the CAST paper.
MODELS = by_name(
    Model("structure_only", "coGN", "#0072B2", "graph", "Ruff et al. 2024"),
    Model("text_only", "Text encoder (LoRA)", "#E69F00", "text", "Lee et al. 2025"),
    Model("crysmmnet_frozen", "CrysMMNet (frozen)", "#56B4E9", "graph + text", "Das et al. 2023"),
    Model("crysmmnet_lora", "CrysMMNet (LoRA)", "#009E73", "graph + text", "Das et al. 2023"),
    Model("multimat", "MultiMat", "#999999", "graph (pretrained with text)", "Moro et al. 2024"),
    Model("cast_scratch", "CAST (no pretraining)", "#CC79A7", "graph + text", "Lee et al. 2025"),
    Model("cast", "CAST", "#D55E00", "graph + text", "Lee et al. 2025"),
)
# structure encoder: (label, source)
STRUCTURE_ENCODERS = {
    "cogn": ("coGN", "Ruff et al. 2024"),
    "congn": ("coNGN", "Ruff et al. 2024"),
    "alignn": ("ALIGNN", "Choudhary and DeCost 2021"),
    "cgcnn": ("CGCNN", "Xie and Grossman 2018"),
    "megnet": ("MEGNet", "Chen et al. 2019"),
}


# --- compositions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassTarget:
    """Two classes of compositions: `positive` (1) where `column` is at or below a threshold in `unit`."""

    name: str
    label: str
    positive: str
    negative: str
    column: str
    unit: str


CLASS_TARGETS = by_name(
    ClassTarget("stability", "Stability", "stable", "unstable", "energy_above_hull", "eV/atom"),
    ClassTarget("metallicity", "Metallicity", "metal", "non-metal", "band_gap", "eV"),
)

# Models of the composition study, from what knows least to what knows most.
COMPOSITION_MODELS = by_name(
    Model("baseline", "Training mean, majority class", "#6e7781", "nothing", "baseline"),
    Model("random_forest", "Random forest (Magpie)", "#8C6D31", "formula", "Ward et al. 2016"),
    Model("crabnet", "CrabNet-style attention", "#009E73", "formula", "Wang et al. 2021"),
    Model("edm_cross_entropy", "EDM, cross-entropy", "#56B4E9", "formula", "EDM report"),
    Model("edm_alpha_report", "EDM, focal, alpha 0.25", "#E69F00", "formula", "EDM report"),
    Model("edm_transformer", "EDM, focal, alpha by frequency", "#CC79A7", "formula", "EDM report"),
    MODELS["structure_only"],
    MODELS["cast"],
)
COMPOSITION_ORDER = tuple(COMPOSITION_MODELS)


def name_structure_encoder(encoder: str) -> None:
    """Show the model structure_only under the name of its encoder, from now on in this process."""
    label, source = STRUCTURE_ENCODERS[encoder]
    MODELS["structure_only"] = replace(MODELS["structure_only"], label=label, source=source)
    COMPOSITION_MODELS["structure_only"] = MODELS["structure_only"]
