"""Bonds, neighbours and next neighbours of sites, each asked of a structure once."""

from functools import cached_property
from typing import Any

import numpy as np
from pymatgen.core import Structure
from pymatgen.core.graphs import ConnectedSite, StructureGraph
from pymatgen.core.local_env import CrystalNN
from pymatgen.core.sites import PeriodicSite
from robocrys.condense.site import SiteAnalyzer, geometries_match, nn_summaries_match, nnn_summaries_match

from castbench.text.robocrystallographer.environments import environments
from castbench.text.robocrystallographer.order_parameters import layout

Image = tuple[int, int, int]


class FastStructureGraph(StructureGraph):
    """A structure graph that remembers the connected sites of a site."""

    def get_connected_sites(self, n: int, jimage: Image = (0, 0, 0)) -> list[ConnectedSite]:
        """Neighbours of site n in the cell `jimage`, the nearest first."""
        if (n, jimage) not in self._connected:
            self._connected[n, jimage] = self._connect(n, jimage)
        return self._connected[n, jimage]

    @cached_property
    def _connected(self) -> dict[tuple[int, Image], list[ConnectedSite]]:
        return {}

    def _connect(self, n: int, jimage: Image) -> list[ConnectedSite]:
        edges = [(v, data["to_jimage"], data) for _, v, data in self.graph.out_edges(n, data=True)]
        edges += [
            (u, tuple(-i for i in data["to_jimage"]), data)
            for u, _, data in self.graph.in_edges(n, data=True)
        ]
        found: dict[tuple[int, Image], ConnectedSite] = {}
        lattice, start = self.structure.lattice, self.structure[n].frac_coords
        for index, relative, data in edges:
            x, y, z = map(sum, zip(relative, jimage, strict=True))
            image = (x, y, z)
            if (index, image) not in found:
                site = self.structure[index]
                moved = PeriodicSite(
                    site.species,
                    site.frac_coords + image,
                    lattice,
                    properties=site.properties,
                    label=site.label,
                    skip_checks=True,
                )
                distance = lattice.get_distance_and_image(start, site.frac_coords, jimage=relative)[0]
                found[index, image] = ConnectedSite(moved, image, index, data.get("weight"), distance)
        # Through a set, whose order decides among equal distances, as in pymatgen.
        return sorted(set(found.values()), key=lambda connected: connected.dist)


class FastCrystalNN(CrystalNN):
    """CrystalNN at its default settings, for whole structures."""

    def get_bonded_structure(self, structure: Structure, *_: Any, **__: Any) -> StructureGraph:
        """Graph of the bonds of the likeliest coordination numbers."""
        graph = FastStructureGraph.from_local_env_strategy(structure, self, weights=True)
        graph.set_node_attributes()
        return graph

    def get_all_nn_info(self, structure: Structure) -> list[list[dict[str, Any]]]:
        """Bonded neighbours of every site."""
        return [
            [
                {"site_index": int(index), "image": tuple(image.tolist()), "weight": 1}
                for index, image in zip(
                    found.sites[: found.bonded], found.images[: found.bonded], strict=True
                )
            ]
            for found in environments(structure).sites
        ]


def site_fingerprints(structure: Structure) -> list[dict[str, float]]:
    """Order parameters of the sites by label."""
    labels = layout()[0]
    return [dict(zip(labels, row, strict=True)) for row in environments(structure).fingerprints]


class FastSiteAnalyzer(SiteAnalyzer):
    """A site analyser that looks at each site once."""

    @cached_property
    def _memory(self) -> dict[tuple[str, int], Any]:
        return {}

    @cached_property
    def _elements(self) -> list[str]:
        return [str(site.specie) for site in self.bonded_structure.structure]

    def _once(self, what: str, site: int, compute: Any) -> Any:
        if (what, site) not in self._memory:
            self._memory[what, site] = compute(site)
        return self._memory[what, site]

    def get_site_geometry(self, site_index: int) -> dict[str, str | float]:
        """Name of a site's geometry and how alike it is."""
        return self._once("geometry", site_index, super().get_site_geometry)

    def get_nearest_neighbors(
        self, site_index: int, inc_inequivalent_site_index: bool = True
    ) -> list[dict[str, Any]]:
        """Element and distance of a site's neighbours."""
        connected = self.bonded_structure.get_connected_sites(site_index)
        return [
            {"element": self._elements[site.index], "dist": site.dist}
            | ({"inequiv_index": self.equivalent_sites[site.index]} if inc_inequivalent_site_index else {})
            for site in connected
        ]

    def get_next_nearest_neighbors(
        self, site_index: int, inc_inequivalent_site_index: bool = True
    ) -> list[dict[str, Any]]:
        """The neighbours of a site's neighbours, and how their polyhedra are connected with the site's."""
        found = self._once("next", site_index, self._next_neighbours)
        if not inc_inequivalent_site_index:
            return [summary for _, summary in found]
        return [summary | {"inequiv_index": self.equivalent_sites[index]} for index, summary in found]

    def _bonds(self, site: int) -> list[tuple[int, Image]]:
        return [(found.index, found.jimage) for found in self.bonded_structure.get_connected_sites(site)]

    def _next_neighbours(self, site: int) -> list[tuple[int, dict[str, Any]]]:
        """Index and summary of each next neighbour."""
        bonds = self._once("bonds", site, self._bonds)
        near = set(bonds)
        second: dict[tuple[int, Image], list[tuple[int, Image]]] = {}
        for index, image in bonds:
            for other in _shift(self._once("bonds", index, self._bonds), image):
                if other != (site, (0, 0, 0)) and other not in second:
                    back = _shift(self._once("bonds", other[0], self._bonds), other[1])
                    second[other] = [bond for bond in back if bond in near]
        places = [*second, *(bond for shared in second.values() for bond in shared)]
        if not places:
            return []
        structure = self.bonded_structure.structure
        frac = structure.frac_coords[[index for index, _ in places]] + [image for _, image in places]
        vectors = structure.lattice.get_cartesian_coords(frac) - structure[site].coords
        distances = np.linalg.norm(vectors[: len(second)], axis=1)
        corners = vectors[len(second) :]
        ends = np.repeat(vectors[: len(second)], [len(shared) for shared in second.values()], axis=0)
        angles = _angles(-corners, ends - corners)
        result, start = [], 0
        for (other, shared), distance in zip(second.items(), distances, strict=True):
            stop = start + len(shared)
            summary = {
                "element": self._elements[other[0]],
                "connectivity": {1: "corner", 2: "edge"}.get(len(shared), "face"),
                "geometry": self.get_site_geometry(other[0]),
                "angles": angles[start:stop],
                "distance": distance,
            }
            result.append((other[0], summary))
            start = stop
        return result

    def _calculate_equivalent_sites(
        self, likeness_tol: float = 0.001, bond_dist_tol: float = 0.01, bond_angle_tol: float = 0.1
    ) -> list[int]:
        """For each site the first one with the same element, geometry, neighbours and next neighbours."""
        firsts: list[int] = []
        equivalent = []
        species = self.bonded_structure.structure.species
        for site, element in enumerate(species):
            for first in firsts:
                if (
                    element == species[first]
                    and geometries_match(
                        self.get_site_geometry(site), self.get_site_geometry(first), likeness_tol
                    )
                    and nn_summaries_match(
                        self.get_nearest_neighbors(site, False),
                        self.get_nearest_neighbors(first, False),
                        bond_dist_tol,
                    )
                    and nnn_summaries_match(
                        self.get_next_nearest_neighbors(site, False),
                        self.get_next_nearest_neighbors(first, False),
                        bond_angle_tol=bond_angle_tol,
                    )
                ):
                    equivalent.append(first)
                    break
            else:
                equivalent.append(site)
                firsts.append(site)
        return equivalent


def _shift(bonds: list[tuple[int, Image]], image: Image) -> list[tuple[int, Image]]:
    """Bonds of a site's copy in another cell."""
    x, y, z = image
    return [(index, (i + x, j + y, k + z)) for index, (i, j, k) in bonds]


def _angles(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Angles (n,) between vectors (n, 3), degrees."""
    cosine = np.einsum("ij,ij->i", first, second)
    cosine /= np.linalg.norm(first, axis=1)
    cosine /= np.linalg.norm(second, axis=1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1))).tolist()
