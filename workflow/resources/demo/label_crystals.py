#!/usr/bin/env python3
"""Label small prototype crystals with PBE density-functional theory (GPAW, plane waves).

For every compound of `candidates()` the cubic lattice constant and the bulk modulus come from an equation of
state, the energy and the band gap are read there, and the cubic elastic constants come from the energies of
strained cells (where they are cheap, see `wants_elastic`).  One JSON object a compound is appended to the
output file; a rerun skips what is there.

    label_crystals.py --shard 0/2 --out crystals.0.jsonl

Units: eV, angstrom, GPa.  Not spin-polarised; 600 eV cutoff; even Gamma-centred k-point grids, density 3.0 angstrom; 0.1 eV Fermi smearing.
"""
import argparse
import json
import signal
import time
import warnings
from itertools import product
from pathlib import Path

warnings.filterwarnings("ignore")
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import kpts2sizeandoffsets
from ase.data import atomic_numbers, covalent_radii
from ase.optimize import BFGS
from gpaw import GPAW, PW, FermiDirac, Mixer
from gpaw import __version__ as gpaw_version
from gpaw.utilities.gpts import get_number_of_grid_points
from gpaw.wavefunctions.arrays import PlaneWaveExpansionWaveFunctions

GPA = units.GPa
FCC = np.array([[0, .5, .5], [.5, 0, .5], [.5, .5, 0]])
SC = np.eye(3)
BCC = np.array([[-.5, .5, .5], [.5, -.5, .5], [.5, .5, -.5]])

# prototype: (lattice, fractional positions in the conventional cube by site, nearest-bond / a,
#             sites of the bond, every site is an inversion centre)
PROTOTYPES = {
    "rocksalt": (FCC, {"A": [(0, 0, 0)], "X": [(.5, .5, .5)]}, .5, "AX", True),
    "zincblende": (FCC, {"A": [(0, 0, 0)], "X": [(.25, .25, .25)]}, 3**.5 / 4, "AX", False),
    "cesium chloride": (SC, {"A": [(0, 0, 0)], "X": [(.5, .5, .5)]}, 3**.5 / 2, "AX", True),
    "fluorite": (FCC, {"A": [(0, 0, 0)], "X": [(.25, .25, .25), (.75, .75, .75)]}, 3**.5 / 4, "AX", False),
    "perovskite": (SC, {"A": [(0, 0, 0)], "B": [(.5, .5, .5)], "X": [(.5, .5, 0), (.5, 0, .5), (0, .5, .5)]}, .5, "BX", True),
    "half-Heusler": (FCC, {"A": [(0, 0, 0)], "B": [(.25, .25, .25)], "X": [(.5, .5, .5)]}, 3**.5 / 4, "AB", False),
    "Cu3Au": (SC, {"A": [(0, 0, 0)], "X": [(.5, .5, 0), (.5, 0, .5), (0, .5, .5)]}, .5**.5, "AX", True),
    "diamond": (FCC, {"A": [(0, 0, 0), (.25, .25, .25)]}, 3**.5 / 4, "AA", False),
    "fcc": (FCC, {"A": [(0, 0, 0)]}, .5**.5, "AA", True),
    "bcc": (BCC, {"A": [(0, 0, 0)]}, 3**.5 / 2, "AA", True),
}


# A first guess of the lattice constant (angstrom; rounded, mostly experimental): it saves the coarse search, the result does not depend on it.
LATTICE_CONSTANTS = {proto: dict((k, float(v)) for k, v in (pair.split(":") for pair in text.split())) for proto, text in {
    "rocksalt": "LiF:4.06 LiCl:5.14 LiBr:5.52 LiI:6.03 NaF:4.70 NaCl:5.69 NaBr:6.03 NaI:6.53 KF:5.40 KCl:6.37 KBr:6.69 KI:7.18 RbF:5.70 RbCl:6.68 "
                "RbBr:7.00 RbI:7.46 CsF:6.10 CsCl:7.1 CsBr:7.4 CsI:7.85 AgF:4.96 AgCl:5.60 AgBr:5.83 CuCl:5.1 CuBr:5.4 MgO:4.25 MgS:5.23 MgSe:5.50 MgTe:5.95 CaO:4.84 "
                "CaS:5.72 CaSe:5.96 CaTe:6.39 SrO:5.20 SrS:6.06 SrSe:6.29 SrTe:6.72 BaO:5.60 BaS:6.44 BaSe:6.67 BaTe:7.06 PbO:5.28 PbS:6.00 PbSe:6.20 "
                "PbTe:6.55 SnS:5.84 SnSe:6.05 SnTe:6.40 GeTe:6.02 GeSe:5.68 GeS:5.5 CdO:4.77 CdS:5.50 CdSe:5.75 CdTe:6.10 ZnO:4.33 ZnS:5.12 ZnSe:5.38 ZnTe:5.76 "
                "BeO:3.65 BeS:4.68 BeTe:5.38 ScN:4.52 ScSb:5.88 YN:4.91 YP:5.70 YAs:5.84 YSb:6.22 TiC:4.34 TiN:4.25 ZrC:4.71 ZrN:4.59 HfC:4.65 HfN:4.53 VC:4.16 "
                "VN:4.12 NbC:4.48 NbN:4.42 TaC:4.47 TaN:4.41 AlN:4.07 GaN:4.25 InN:4.68 AlP:5.14 AlAs:5.38 GaP:5.10 GaAs:5.32 AlSb:5.80 InP:5.50 InAs:5.72",
    "zincblende": "BN:3.63 BP:4.55 BAs:4.82 BSb:5.28 AlN:4.40 AlP:5.50 AlAs:5.73 AlSb:6.23 GaN:4.55 GaP:5.51 GaAs:5.75 GaSb:6.22 InN:5.05 InP:5.96 InAs:6.19 "
                  "InSb:6.63 ZnS:5.44 ZnSe:5.74 ZnTe:6.18 CdS:5.93 CdTe:6.62 BeS:4.88 BeSe:5.17 BeTe:5.66 MgO:4.63 MgS:5.70 MgSe:5.98 MgTe:6.50 CuF:4.29 CuCl:5.43 "
                  "CuBr:5.74 CuI:6.09 AgI:6.64 SiC:4.38 GeC:4.61 GeSi:5.6 SnC:5.13 SnSi:6.06 SnGe:6.22",
    "cesium chloride": "LiF:2.52 LiCl:3.22 LiBr:3.47 LiI:3.8 NaF:2.9 NaCl:3.48 CsF:3.75 CsCl:4.21 CsBr:4.42 CsI:4.68 RbCl:4.0 RbBr:4.2 RbI:4.5 KCl:3.83 TlCl:3.88 TlBr:4.06 TlI:4.3 CaO:2.94 CaS:3.47 CaSe:3.63 BaO:3.4 "
                       "BaS:3.9 NiAl:2.90 CoAl:2.86 TiNi:3.01 CuZn:2.97 MgAg:3.34 ZnAg:3.19 PdAl:3.08 IrAl:3.0 RuAl:3.0 OsAl:3.02 RhAl:3.01 RuTi:3.08 OsTi:3.09 RuZr:3.27 "
                       "OsZr:3.27 RhTi:3.14 LiAg:3.19 LiTl:3.45 YAg:3.64 YCu:3.48 ScPd:3.3 ScRh:3.23 ScRu:3.22",
    "fluorite": "CBe:4.34 CaF:5.51 SrF:5.87 BaF:6.28 CdF:5.49 PbF:6.03 MgF:5.13 ZnF:5.02 BaCl:7.42 ZrO:5.14 HfO:5.08 TiO:4.84 SnO:5.07 OLi:4.64 SLi:5.72 SeLi:6.02 TeLi:6.54 ONa:5.58 "
                "SNa:6.57 SeNa:6.88 OK:6.49 SK:7.46 SeK:7.77 TeK:8.26 ORb:6.82 SRb:7.77 SiMg:6.36 GeMg:6.42 SnMg:6.83 PbMg:6.92",
    "perovskite": "",
    "half-Heusler": "LiNBe:4.3 LiPBe:5.08 LiAsBe:5.3 LiNMg:5.02 LiPMg:6.03 LiAsMg:6.22 LiNZn:4.93 LiPZn:5.77 LiAsZn:5.98",
    "Cu3Au": "LiAl:4.03 AuCu:3.80 AlNi:3.57 TiAl:3.98 ZrAl:4.11 YAl:4.32 ScPd:4.0 YPd:4.13 SnCa:4.76 PbCa:4.86 PbY:4.87 InY:4.64",
    "diamond": "C:3.573 Si:5.47 Ge:5.77 Sn:6.66",
    "fcc": "Be:3.16 Mg:4.52 Ga:4.23 Zn:3.93 Li:4.33 Na:5.30 K:6.67 Rb:7.16 Cs:7.8 Ca:5.53 Sr:6.03 Ba:6.38 Al:4.04 Cu:3.64 Ag:4.15 Au:4.16 Ni:3.52 Pd:3.94 Pt:3.97 Rh:3.83 Ir:3.88 Pb:5.04",
    "bcc": "Al:3.24 Ga:3.37 Ca:4.39 Sr:4.76 Li:3.44 Na:4.20 K:5.28 Rb:5.67 Cs:6.16 Ba:5.03 V:3.00 Nb:3.31 Ta:3.32 Cr:2.85 Mo:3.16 W:3.18 Tl:3.98 Zn:3.14 Cd:3.61 Mg:3.58 Be:2.51 Ti:3.26 Zr:3.57 Hf:3.54",
}.items()}


def candidates():
    out = []
    def add(proto, **sites):
        out.append((proto, sites))
    I, II, IIb = "Li Na K Rb Cs".split(), "Be Mg Ca Sr Ba".split(), "Zn Cd Hg".split()
    halogens, chalc, pnict = "F Cl Br I".split(), "O S Se Te".split(), "N P As Sb".split()
    for a, x in product(I + ["Cu", "Ag", "Tl"], halogens):
        add("rocksalt", A=a, X=x); add("cesium chloride", A=a, X=x)
        if a in ("Li", "Na", "Cu", "Ag"): add("zincblende", A=a, X=x)
    for a, x in product(II + IIb + ["Ge", "Sn", "Pb"], chalc):
        add("rocksalt", A=a, X=x)
        if a in II + IIb: add("zincblende", A=a, X=x)
        if a in ("Ca", "Sr", "Ba", "Pb"): add("cesium chloride", A=a, X=x)
    for a, x in product("B Al Ga In Sc Y".split(), pnict):
        add("zincblende" if a in "B Al Ga In".split() else "rocksalt", A=a, X=x)
        if a in ("Al", "Ga", "In"): add("rocksalt", A=a, X=x)
    for a, x in product("Ti Zr Hf V Nb Ta".split(), "CN"): add("rocksalt", A=a, X=x)
    for a in "C Si Ge Sn".split(): add("diamond", A=a)
    for a, x in (("Si", "C"), ("Ge", "C"), ("Ge", "Si"), ("Sn", "C"), ("Sn", "Si"), ("Sn", "Ge")): add("zincblende", A=a, X=x)
    for a, x in product("Mg Ca Sr Ba Zn Cd Hg Pb Sn".split(), "F Cl".split()): add("fluorite", A=a, X=x)
    for a in "Ti Zr Hf Sn Pb Ge Si".split(): add("fluorite", A=a, X="O")
    for a, x in product("O S Se Te".split(), "Li Na K Rb".split()): add("fluorite", A=a, X=x)
    for a in "Si Ge Sn Pb".split(): add("fluorite", A=a, X="Mg")
    for a in "Li Na K Rb Cs Ca Sr Ba Al Cu Ag Au Ni Pd Pt Rh Ir Pb".split(): add("fcc", A=a)
    for a in "Li Na K Rb Cs Ba V Nb Ta Cr Mo W Tl Zn Cd Mg Be Ti Zr Hf".split(): add("bcc", A=a)
    for a, x in (("Ni", "Al"), ("Co", "Al"), ("Ti", "Ni"), ("Cu", "Zn"), ("Mg", "Ag"), ("Ca", "Cd"), ("Zn", "Ag"), ("Pd", "Al"), ("Ir", "Al"), ("Ru", "Al"), ("Os", "Al"), ("Rh", "Al"), ("Ru", "Ti"), ("Os", "Ti"), ("Ru", "Zr"), ("Os", "Zr"), ("Rh", "Ti"), ("Mg", "Hg"), ("Li", "Ag"), ("Li", "Hg"), ("Li", "Tl"), ("Sr", "Ag"), ("Ca", "Ag"), ("Y", "Ag"), ("Y", "Cu"), ("Sc", "Pd"), ("Sc", "Rh"), ("Sc", "Ru")):
        add("cesium chloride", A=a, X=x)
    for a, x in (("Au", "Cu"), ("Al", "Ni"), ("Ga", "Ni"), ("Si", "Ni"), ("Ge", "Ni"), ("Ti", "Al"), ("Zr", "Al"), ("Sc", "Al"), ("Y", "Al"), ("Ti", "Pt"), ("Sc", "Pd"), ("Y", "Pd"), ("Sn", "Ca"), ("Pb", "Ca"), ("Pb", "Y"), ("In", "Y"), ("Ti", "Rh"), ("Ti", "Ir"), ("Zr", "Rh"), ("Zr", "Ir"), ("Hf", "Ir"), ("Nb", "Ir"), ("Ta", "Ir"), ("V", "Ir"), ("Cu", "Au"), ("Cu", "Pd"), ("Ag", "Pt"), ("Cr", "Pt"), ("Mg", "In"), ("Sc", "In")):
        add("Cu3Au", A=a, X=x)
    for a, b, x in product(I, "Mg Ca Sr Zn Cd Ge Sn Pb".split(), halogens): add("perovskite", A=a, B=b, X=x)
    for a, b, x in product("Ca Sr Ba Pb".split(), "Ti Zr Hf Si Ge Sn".split(), "O S".split()): add("perovskite", A=a, B=b, X=x)
    for a, b in product("Na K Rb Ag".split(), "Nb Ta".split()): add("perovskite", A=a, B=b, X="O")
    for a, b in product("Y Bi".split(), "Al Ga In Sc".split()): add("perovskite", A=a, B=b, X="O")
    for x, a, b in product("Sn Ge Pb".split(), "Ti Zr Hf".split(), "Ni Pd Pt".split()): add("half-Heusler", A=a, B=b, X=x)
    for x, a, b in product("Sb Bi".split(), "Ti Zr Hf".split(), "Co Rh Ir".split()): add("half-Heusler", A=a, B=b, X=x)
    for x, a, b in product("Sb".split(), "V Nb Ta".split(), "Fe Ru Os".split()): add("half-Heusler", A=a, B=b, X=x)
    for x, b in product("N P As Sb".split(), "Mg Zn Cd Be".split()): add("half-Heusler", A="Li", B=x, X=b)
    for a in "Be Mg Ga Zn".split(): add("fcc", A=a)
    for a in "Al Ga Ca Sr".split(): add("bcc", A=a)
    add("fluorite", A="C", X="Be"); add("Cu3Au", A="Li", X="Al")
    seen, unique = set(), []
    for proto, s in out:
        key = (proto, tuple(sorted(s.items())))
        if key not in seen:
            seen.add(key); unique.append((proto, s))
    # interleave the prototypes so that any prefix of the list is a balanced sample
    by = {}
    for c in unique: by.setdefault(c[0], []).append(c)
    rng = np.random.default_rng(0)
    ranked = []
    for proto, cs in by.items():
        idx = rng.permutation(len(cs))
        ranked += [((i + .5) / len(cs), proto, cs[j]) for i, j in enumerate(idx)]
    return [c for _, _, c in sorted(ranked, key=lambda r: (r[0], r[1]))]


def wants_elastic(proto):
    """Strained cells lose most symmetry and cost most: only cells of one to three atoms, and half-Heuslers not even then."""
    return proto != "half-Heusler" and sum(map(len, PROTOTYPES[proto][1].values())) <= 3


def build(proto, sites, a):
    lattice, basis, *_ = PROTOTYPES[proto]
    symbols, frac = [], []
    for site, positions in basis.items():
        for p in positions:
            symbols.append(sites[site]); frac.append(p)
    atoms = Atoms(symbols, cell=a * lattice, pbc=True)
    atoms.set_positions(a * np.array(frac)); atoms.wrap()
    return atoms


def grid(atoms, density=3.0):
    """Even Gamma-centred k-point grid of at least `density` angstrom."""
    return kpts2sizeandoffsets(density=density, even=True, gamma=True, atoms=atoms)[0].tolist()


def calculator(kpts, cutoff=600, **extra):
    """Five empty bands: without them the gap of oxides of Ca, Sr... misses the d states and the iterations double.
    The mixer only saves iterations: small cells do not slosh."""
    settings = dict(mode=PW(cutoff), xc="PBE", occupations=FermiDirac(.1), kpts={"size": kpts, "gamma": True}, nbands=-5, mixer=Mixer(.6, 5, 1.0),
                    convergence={"energy": 2e-5, "density": 5e-4, "eigenstates": 4e-6}, maxiter=120, txt=None)
    return GPAW(**settings | extra)


def total_energy(atoms, kpts, **settings):
    """Total energy (eV)."""
    atoms.calc = calculator(kpts, **settings)
    return float(atoms.get_potential_energy())


def start_from(calc, atoms, old):
    """Give `calc` the wave functions of the same crystal at another volume: a third of the iterations less, the same result."""
    calc.initialize(atoms)
    calc.initialize_positions(atoms)
    wfs = calc.wfs
    box = np.empty((wfs.bd.nbands, int(np.prod(wfs.gd.N_c))), complex)
    for kpt, previous in zip(wfs.kpt_u, old.wfs.kpt_u):
        kpt.psit = PlaneWaveExpansionWaveFunctions(wfs.bd.nbands, wfs.pd, wfs.dtype, kpt=kpt.q, dist=(wfs.bd.comm, -1, 1), spin=kpt.s)
        box[:] = 0
        box[:, old.wfs.pd.Q_qG[previous.q]] = previous.psit.array
        kpt.psit.array[:] = box[:, wfs.pd.Q_qG[kpt.q]]
        kpt.f_n = previous.f_n.copy()
    wfs.orthonormalize()
    calc.density.initialize_from_wavefunctions(wfs)
    calc.hamiltonian.update(calc.density)
    wfs.eigensolver.reset()
    calc.scf.reset()


def birch_murnaghan(v, e):
    """Second-order fit: equilibrium volume (cubic angstrom) and bulk modulus (GPa); the volume is infinite without a minimum."""
    c = np.polyfit(np.array(v) ** (-2 / 3), e, 2)
    x = -c[1] / (2 * c[0])
    if c[0] <= 0 or x <= 0:
        return np.inf, np.nan
    return x ** -1.5, float(2 * c[0] * (2 / 3) ** 2 * x ** 3.5 / GPA)


def equilibrium(cell, volume, ratio, **settings):
    """Equilibrium volume from three volumes in steps of `ratio` around the minimum; the window follows it.

    Oxides and fluorides, whose energies scatter by 1 meV with the size of the basis, get two volumes more.
    `cell(volume)` builds the crystal. One k-point grid and one real-space grid serve all volumes, so that the curve has no jumps.
    Returns the volume, the points (volume, energy, gap, direct gap) by volume, and the k-point grid.
    """
    kpts = grid(cell(volume), settings.pop("density", 3.0))
    mode = PW(settings.get("cutoff", 600))
    points, shift, old = {}, 0, None
    def compute(k):
        nonlocal old
        if k not in points:
            atoms = cell(volume * ratio ** k)
            gpts = get_number_of_grid_points(cell(volume * ratio ** max(k, 2)).cell.array / units.Bohr, mode=mode, realspace=False)
            atoms.calc = calculator(kpts, gpts=gpts, **settings)
            if old is not None and (old.wfs.gd.N_c == gpts).all():
                start_from(atoms.calc, atoms, old)
            energy = float(atoms.get_potential_energy())
            points[k] = (float(atoms.get_volume()), energy, *band_gaps(atoms.calc))
            old = atoms.calc
        return points[k]
    for _ in range(24):
        _, low, high = [compute(k) for k in (shift, shift - 1, shift + 1)]
        steps = [shift - 1, shift, shift + 1]
        v0, _ = birch_murnaghan(*np.transpose([points[k] for k in steps])[:2])
        if low[0] * ratio ** .4 < v0 < high[0] * ratio ** -.4:
            if mode.ecut * units.Hartree > 500 and {"O", "F"} & set(cell(v0).get_chemical_symbols()):
                steps = [shift - 1.5, *steps, shift + 1.5]
                v0, _ = birch_murnaghan(*np.transpose([compute(k) for k in steps])[:2])
            return v0, [points[k] for k in steps], kpts
        shift += 1 if high[1] < low[1] else -1
    raise RuntimeError("the energy has no minimum near the guessed volume")


def band_gaps(calc):
    """Fundamental and direct gap on the grid (eV; negative where bands overlap). Bands are counted by electrons, since
    smearing can lift the Fermi level over the band edge of a small gap."""
    electrons = round(calc.get_number_of_electrons())
    if electrons % 2:
        return 0., 0.
    levels = np.array([calc.get_eigenvalues(kpt=k) for k in range(len(calc.get_ibz_k_points()))])
    top, bottom = levels[:, electrons // 2 - 1], levels[:, electrons // 2]
    return float(bottom.min() - top.max()), float((bottom - top).min())


def label_shape(cell, volume):
    """Row of a crystal whose shape is fixed: equation of state from a volume close to the minimum; energy and gap there come
    from the curves through its three points (against a fourth calculation: within 1 meV/atom and 0.02 eV)."""
    v0, points, kpts = equilibrium(cell, volume, 1.05)
    relaxed = cell(v0)
    v, e, *gaps = np.transpose(points)
    _, bulk = birch_murnaghan(v, e)
    x0, x = v0 ** (-2 / 3), v ** (-2 / 3)
    energy, gap, direct = (float(np.polyval(np.polyfit(x, y, 2), x0)) for y in (e, *gaps))
    return dict(formula=relaxed.get_chemical_formula("metal"), lattice=relaxed.cell.tolist(), species=relaxed.get_chemical_symbols(),
                frac_coords=relaxed.get_scaled_positions().tolist(), volume=float(v0), n_atoms=len(relaxed), energy=energy,
                energy_per_atom=energy / len(relaxed), band_gap=max(0., gap), band_gap_direct=max(0., direct), bulk_modulus=bulk,
                kpts=kpts, points=points, gpaw=gpaw_version)


def label(proto, sites, elastic=True):
    """Row of a cubic compound; a lattice constant that the table lacks is found at a lower cutoff first."""
    lattice, _, ratio, bond, _ = PROTOTYPES[proto]
    det = abs(np.linalg.det(lattice))
    def cell(volume):
        return build(proto, sites, (volume / det) ** (1 / 3))
    known = LATTICE_CONSTANTS[proto].get("".join(sites.values()))
    if known:
        volume = det * known ** 3
    else:
        guess = sum(covalent_radii[atomic_numbers[sites[s]]] for s in bond) / ratio
        volume, *_ = equilibrium(cell, det * guess ** 3, 1.1, cutoff=400, density=1.8)
    row = dict(prototype=proto, sites=sites) | label_shape(cell, volume)
    row["a"] = (row["volume"] / det) ** (1 / 3)
    return row | (shear_moduli(row) if elastic else {})


def shear_moduli(row):
    """Cubic elastic constants (GPa) from the energy of volume-conserving strains; Voigt, Reuss and Hill shear moduli."""
    relaxed = build(row["prototype"], row["sites"], row["a"])
    inversion = PROTOTYPES[row["prototype"]][-1]
    kpts = row.get("kpts") or grid(relaxed)
    volume, bulk = row["volume"], row["bulk_modulus"]
    def energy(strain):
        atoms = relaxed.copy()
        atoms.set_cell(relaxed.cell @ (np.eye(3) + strain), scale_atoms=True)
        atoms.calc = calculator(kpts)
        if not inversion:   # sites without inversion symmetry move under strain
            BFGS(atoms, logfile=None).run(fmax=.05, steps=5)
        return atoms.get_potential_energy()
    e0 = total_energy(relaxed, kpts)    # not the fitted one, whose basis differs by up to 1 meV/atom
    d = .04
    tetragonal = energy(np.diag([d, -d, d ** 2 / (1 - d ** 2)]))
    s = .06
    shear = np.diag([0., 0., s ** 2 / (4 - s ** 2)])
    shear[0, 1] = shear[1, 0] = s / 2
    monoclinic = energy(shear)
    difference = float((tetragonal - e0) / (volume * d ** 2) / GPA)           # C11 - C12
    c44 = float(2 * (monoclinic - e0) / (volume * s ** 2) / GPA)
    voigt = (difference + 3 * c44) / 5
    den = 4 * c44 + 3 * difference
    reuss = 5 * difference * c44 / den if den else 0.
    return dict(c11=bulk + 2 * difference / 3, c12=bulk - difference / 3, c44=c44, shear_voigt=voigt,
                shear_reuss=reuss, shear_vrh=(voigt + reuss) / 2)


class Timeout(Exception):
    pass


def _alarm(*_):
    raise Timeout("over the time limit")


def append_row(out, key, limit_s, work):
    """Run `work` within `limit_s` seconds and append its row, or its error, to `out`."""
    start = time.time()
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(limit_s)
    try:
        row = work()
    except Exception as error:
        row = dict(error=f"{type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
    row = key | row | dict(seconds=round(time.time() - start, 1))
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows(path):
    return [json.loads(line) for line in path.open()] if path.exists() else []


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=int, default=1200)
    parser.add_argument("--prototypes", nargs="+", choices=PROTOTYPES, default=list(PROTOTYPES))
    args = parser.parse_args()
    shard, shards = map(int, args.shard.split("/"))
    done = [(row["prototype"], row["sites"]) for row in rows(args.out)]
    for k, (proto, sites) in enumerate(candidates()):
        if k % shards == shard and (proto, sites) not in done and proto in args.prototypes:
            append_row(args.out, dict(prototype=proto, sites=sites), args.limit_s, lambda: label(proto, sites, wants_elastic(proto)))


if __name__ == "__main__":
    main()
