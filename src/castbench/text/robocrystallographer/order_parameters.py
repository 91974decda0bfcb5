"""Local order parameters of many sites at once.

The order parameters by which robocrystallographer names a site's geometry (Zimmermann and Jain, RSC Adv. 10,
6063, 2020): for each coordination number that CrystalNN thinks likely, how much the neighbours look like a
tetrahedron, an octahedron, ... They equal `matminer`'s CrystalNNFingerprint("ops"), which asks pymatgen's
LocalStructOrderParams for one motif of one site at a time, in loops over triples of neighbours. Here the
angles between the neighbours are computed once for all motifs and all sites of a coordination number.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from matminer.featurizers.site import CrystalNNFingerprint

Parameters = dict[Any, float]
COLLINEAR = 1e-12  # of unit vectors: no plane is defined by them
EDGE = 1e-9  # radians
BLOCK = 256  # environments at once: the angles of 12 neighbours take 14 kB each


class Angles:
    """Angles around B sites with n neighbours each.

    Neighbour j is put to the north pole, k fixes the prime meridian, m is any third one (Peters, J. Chem.
    Phys. 131, 244103, 2009).

    Attributes:
        cosine: (B, n, n) cosine between j and k.
        theta: (B, n, n) polar angle of k from j, radians.
        phi: (B, n, n, n) azimuth of m from k about j, radians.
        pairs: (n, n) j differs from k.
        triples: (B, n, n, n) j, k and m differ and k has a meridian.
        azimuths: the same, and m has one too.
        on_edge: (B,) an angle is so close to a limit where a motif's formula jumps that rounding decides.
    """

    def __init__(self, vectors: np.ndarray):
        n = vectors.shape[1]
        unit = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
        self.cosine = np.clip(unit @ unit.transpose(0, 2, 1), -1.0, 1.0)
        self.theta = np.arccos(self.cosine)
        normal = unit[:, None] - self.cosine[..., None] * unit[:, :, None]  # of k, with j to the north
        length = np.linalg.norm(normal, axis=3)
        meridian = length >= COLLINEAR
        self.on_edge = (np.abs(np.log10(np.maximum(length, 1e-30) / COLLINEAR)) < 1).any(axis=(1, 2))
        normal /= np.where(meridian, length, 1.0)[..., None]
        self.phi = np.arccos(np.clip(normal @ normal.transpose(0, 1, 3, 2), -1.0, 1.0))
        self.pairs = ~np.eye(n, dtype=bool)
        different = self.pairs[:, :, None] & self.pairs[:, None, :] & self.pairs[None]
        self.triples = different & meridian[:, :, :, None]
        self.azimuths = self.triples & meridian[:, :, None, :]

    def below(self, limit: float) -> np.ndarray:
        """Where theta is less than `limit`, radians."""
        self.on_edge |= (np.abs(self.theta - limit) < EDGE).any(axis=(1, 2))
        return self.theta < limit

    def best(self, score: np.ndarray, norm: np.ndarray) -> np.ndarray:
        """Highest mean score (B,) over the choices of j and k."""
        mean = np.divide(score, norm, out=np.zeros_like(score), where=norm > 1e-12)
        return np.where(self.pairs, mean, -np.inf).max(axis=(1, 2))


def gauss(deviation: np.ndarray) -> np.ndarray:
    """exp(-x^2 / 2)."""
    return np.exp(-0.5 * deviation * deviation)


def bent(angles: Angles, p: Parameters) -> np.ndarray:
    """Two neighbours at one target angle."""
    score = gauss(p["IGW_TA"] * (angles.theta / np.pi - p["TA"]))
    return score[:, angles.pairs].mean(axis=1)


def at_angle(angles: Angles, p: Parameters) -> np.ndarray:
    """All neighbours at one target angle from one another: trigonal planar, tetrahedral."""
    score = gauss(p["IGW_TA"] * (angles.theta / np.pi - p["TA"]))
    azimuth = np.cos(p["fac_AA"] * angles.phi) ** p["exp_cos_AA"]
    return _with_thirds(angles, score, azimuth)


def pentagonal_planar(angles: Angles, p: Parameters) -> np.ndarray:
    """Neighbours at 72 or 144 degrees, in one plane."""
    nearest = np.where(angles.below(p["TA"] * np.pi), 0.4, 0.8)
    score = gauss(p["IGW_TA"] * (angles.theta / np.pi - nearest))
    return _with_thirds(angles, score, np.cos(angles.phi) ** 2)


def pyramid(angles: Angles, p: Parameters) -> np.ndarray:
    """A pole and an equator: T, trigonal to hexagonal pyramids."""
    score = gauss(p["IGW_EP"] * (angles.theta / np.pi - 0.5))
    azimuth = np.cos(p["fac_AA"] * angles.phi) ** p["exp_cos_AA"]
    return _with_thirds(angles, score, azimuth)


def _with_thirds(angles: Angles, score: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
    thirds = np.where(angles.azimuths, score[:, :, None, :] * azimuth, 0.0)
    return angles.best(score + thirds.sum(axis=3), 1 + angles.azimuths.sum(axis=3))


def two_poles(angles: Angles, p: Parameters, hexagon: bool = False, see_saw: bool = False) -> np.ndarray:
    """Two poles and an equator: bipyramids, octahedron, square and hexagon, see-saw."""
    share = angles.theta / np.pi
    if hexagon:
        equator = gauss(p["IGW_TA"] * (np.abs(share - 0.5) - p["TA"]))
    else:
        equator = gauss(p["IGW_EP"] * (share - 0.5))
    north = angles.below(p["min_SPP"])
    south = gauss(p["IGW_SPP"] * (share - 1.0))
    poles = angles.triples & ~north[:, :, None, :]
    thirds = angles.azimuths & north[:, :, :, None] & north[:, :, None, :]
    if see_saw:
        thirds &= angles.phi < 0.75 * np.pi
        angles.on_edge |= (np.abs(angles.phi - 0.75 * np.pi) < EDGE).any(axis=(1, 2, 3))
    azimuth = np.cos(p["fac_AA"] * angles.phi) ** p["exp_cos_AA"]
    score = np.where(north, equator, 0.0)
    score += np.where(poles, south[:, :, None, :], 0.0).sum(axis=3)
    score += np.where(thirds, azimuth * equator[:, :, None, :], 0.0).sum(axis=3)
    return angles.best(score, north.astype(float) + poles.sum(axis=3) + thirds.sum(axis=3))


def hexagonal_planar(angles: Angles, p: Parameters) -> np.ndarray:
    """A hexagon."""
    return two_poles(angles, p, hexagon=True)


def see_saw(angles: Angles, p: Parameters) -> np.ndarray:
    """A see-saw with right angles."""
    return two_poles(angles, p, see_saw=True)


def body_centred(angles: Angles, p: Parameters) -> np.ndarray:
    """The corners of a cube (Peters 2009)."""
    n = angles.theta.shape[1]
    north = angles.below(p["min_SPP"])
    south = p["w_SPP"] * gauss(p["IGW_SPP"] * (angles.theta / np.pi - 1.0))
    deviation = (angles.theta - np.pi / 2) / np.arcsin(1 / 3)
    side = np.where(angles.below(np.pi / 2), -1.0, 1.0)
    wave = deviation * gauss(deviation) / np.exp(-0.5)
    thirds = side[:, :, :, None] * np.cos(3 * angles.phi) * wave[:, :, None, :]
    score = np.where(north, 0.0, south)
    score += np.where(angles.azimuths & north[:, :, :, None], thirds, 0.0).sum(axis=3)
    return np.triu(score, 1).sum(axis=(1, 2)) / (0.5 * n * (6 + (n - 2) * (n - 3)))


def cuboctahedral(angles: Angles, p: Parameters) -> np.ndarray:
    """A cuboctahedron: neighbours at 60, 90, 120 and 180 degrees."""
    share = angles.theta / np.pi
    north, below_low, below_high = (angles.below(limit) for limit in (p["min_SPP"], p[4], p[2]))
    middle = below_high & ~below_low
    cases = (
        (middle, np.cos(angles.phi) ** 2, gauss(p[5] * (share - 0.5))),
        (below_low, _sixty(angles.phi), gauss(p[6] * (share - 1 / 3))),
        (~below_high, _sixty(angles.phi), gauss(p[6] * (share - 2 / 3))),
    )
    norm = np.where(north, 0.0, p["w_SPP"])
    score = norm * gauss(p["IGW_SPP"] * (share - 1.0))
    for case, azimuth, polar in cases:
        thirds = angles.azimuths & middle[:, :, :, None] & (case & north)[:, :, None, :]
        score += np.where(thirds, azimuth * polar[:, :, None, :], 0.0).sum(axis=3)
        norm += thirds.sum(axis=3)
    return angles.best(score, norm)


def _sixty(phi: np.ndarray) -> np.ndarray:
    return gauss(0.0556 * (np.cos(phi - 0.5 * np.pi) - 0.81649658))


def _steinhardt(coefficients: tuple[float, ...]) -> Callable[[Angles, Parameters], np.ndarray]:
    """Bond-orientational order (Steinhardt et al., Phys. Rev. B 28, 784, 1983) from a Legendre polynomial.

    By the addition theorem of spherical harmonics, q_l^2 is the mean of P_l over all pairs of neighbours.
    """

    def order(angles: Angles, _: Parameters) -> np.ndarray:
        mean = np.polyval(coefficients, angles.cosine**2).mean(axis=(1, 2))
        return np.sqrt(np.maximum(mean, 0.0))

    return order


def single_bond(angles: Angles, _: Parameters) -> np.ndarray:
    """One neighbour."""
    return np.ones(len(angles.theta))


# pymatgen's type of order parameter: function of angles and parameters.
MOTIFS: dict[str, Callable[[Angles, Parameters], np.ndarray]] = {
    "sgl_bd": single_bond,
    "bent": bent,
    **dict.fromkeys(("tri_plan_max", "tet_max"), at_angle),
    "pent_plan_max": pentagonal_planar,
    **dict.fromkeys(("T", "tri_pyr", "sq_pyr", "pent_pyr", "hex_pyr"), pyramid),
    **dict.fromkeys(("tri_bipyr", "pent_bipyr", "hex_bipyr", "oct_max", "sq_plan_max"), two_poles),
    "hex_plan_max": hexagonal_planar,
    "see_saw_rect": see_saw,
    "bcc": body_centred,
    "cuboct_max": cuboctahedral,
    "q2": _steinhardt((1.5, -0.5)),
    "q4": _steinhardt((35 / 8, -30 / 8, 3 / 8)),
    "q6": _steinhardt((231 / 16, -315 / 16, 105 / 16, -5 / 16)),
}


@cache
def stock_featurizer() -> CrystalNNFingerprint:
    """The featurizer that robocrystallographer uses."""
    return CrystalNNFingerprint.from_preset("ops", cation_anion=False)


@cache
def layout() -> tuple[list[str], dict[int, int], dict[int, list[tuple[int, str, Parameters]]]]:
    """Labels of a fingerprint, the column of each coordination number's weight, and those of its motifs."""
    featurizer = stock_featurizer()
    weights: dict[int, int] = {}
    motifs: dict[int, list[tuple[int, str, Parameters]]] = {}
    column = 0
    for cn in sorted(featurizer.op_types):
        for order in featurizer.ops[cn]:
            if order == "wt":
                weights[cn] = column
            else:
                motifs.setdefault(cn, []).append((column, order.get_type(0), order.get_parameters(0) or {}))
            column += 1
    return featurizer.feature_labels(), weights, motifs


def fingerprints(
    neighbours: list[np.ndarray], cn_weights: list[dict[int, float]]
) -> tuple[np.ndarray, set[int]]:
    """Fingerprints (N, F) of N sites; column f has the label `layout()[0][f]`. And the sites on an edge.

    Args:
        neighbours: of each site the vectors (n, 3) to its neighbours, likeliest first, angstrom.
        cn_weights: of each site the weight of each coordination number; the neighbours are the first ones.
    """
    labels, weight_column, motifs = layout()
    result = np.zeros((len(neighbours), len(labels)))
    on_edge: set[int] = set()
    members: dict[int, list[int]] = {}
    for site, weights in enumerate(cn_weights):
        for cn, weight in weights.items():
            if cn in weight_column and weight != 0:
                result[site, weight_column[cn]] = weight
                members.setdefault(cn, []).append(site)
    for cn, sites in members.items():
        for start in range(0, len(sites) if cn in motifs else 0, BLOCK):
            block = sites[start : start + BLOCK]
            angles = Angles(np.stack([neighbours[site][:cn] for site in block]))
            for column, motif, parameters in motifs[cn]:
                result[block, column] = result[block, weight_column[cn]] * MOTIFS[motif](angles, parameters)
            on_edge.update(np.array(block)[angles.on_edge].tolist())
    return result, on_edge
