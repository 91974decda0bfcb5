"""A local server that speaks the Materials Project's API as its client expects it, faults on demand included.

    python tests/mp_server.py [--crystals FILE] [--port N] [--unicode] ...
    MP_API_ENDPOINT=http://127.0.0.1:N/ MP_API_KEY=<any 32 characters> snakemake ...

It answers what mp-api 0.46 asks: /heartbeat, /materials/summary/ and /materials/robocrys/, with the rules of
the service (emmet-api): a key in the header x-api-key, at most 1,000 documents a page by _page and _per_page
or _skip and _limit, _fields that nobody has silently absent, an unknown parameter refused with status 400.
Without _sort_fields the order differs from request to request, as it may. FILE holds records as castbench
reads them (the bundled crystals by default); their texts are served by robocrys. An id that is none of the
Materials Project's becomes mp-900000 and on.
"""

import argparse
import gzip
import json
import re
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Document = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "workflow/resources/demo/crystals.jsonl.zst"
MAX_LIMIT = 1_000
PAGING = {"_page", "_per_page", "_skip", "_limit", "_fields", "_all_fields"}
PARAMETERS = {
    "/materials/summary/": PAGING
    | {"deprecated", "license", "batch_id", "batch_id_not_eq", "material_ids", "_sort_fields"},
    "/materials/robocrys/": PAGING | {"material_ids"},
}
DEFAULT_FIELDS = {
    "/materials/summary/": ["material_id"],
    "/materials/robocrys/": ["material_id", "last_updated"],
}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests to `path` (for `page` only, if given).

    kind: a status ("429", "500", "422"), "slow" (`seconds` before the answer), "cut" (the connection ends in
    the middle of the body), "broken" (a page that is not JSON), "short" (the last document is missing),
    "update" (the database is `text` from now on).
    """

    kind: str
    path: str = "/materials/summary/"
    page: int | None = None
    times: int = 1
    seconds: float = 5.0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = '{"detail": "a fault of the test"}'


class MaterialsProject(ThreadingHTTPServer):
    """The service. `log` lists the requests: path, parameters, status. Use as a context manager."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        documents: Iterable[Document],
        descriptions: Mapping[str, str] | None = None,
        key: str | None = None,
        database_version: str = "2025.09.25",
        port: int = 0,
    ) -> None:
        """`key`: the only one accepted; None takes any of 32 characters. `port` 0 takes a free one."""
        super().__init__(("127.0.0.1", port), Handler)
        self.documents = list(documents)
        self.descriptions = {canonical(name): text for name, text in (descriptions or {}).items()}
        self.key = key
        self.database_version = database_version
        self.licences = {"BY-C"}  # what this user may see
        self.faults: list[Fault] = []
        self.log: list[tuple[str, dict[str, str], int]] = []
        self.log_file: Path | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """The address, as MP_API_ENDPOINT wants it."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def __enter__(self) -> "MaterialsProject":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of the server's errors."""

    def pages(self) -> list[int]:
        """Pages of the summary that were asked for, in order, also in vain."""
        with self.lock:
            return [
                int(query["_page"])
                for path, query, _ in self.log
                if path == "/materials/summary/" and "_page" in query
            ]

    def record(self, path: str, query: dict[str, str], status: int) -> None:
        """Log a request, but never a key."""
        with self.lock:
            self.log.append((path, query, status))
            if self.log_file:
                with self.log_file.open("a") as lines:
                    lines.write(json.dumps([path, query, status]) + "\n")

    def take_fault(self, path: str, query: Mapping[str, str]) -> Fault | None:
        """The fault that is due for a request, used up once."""
        with self.lock:
            for fault in self.faults:
                here = fault.page is None or query.get("_page") == str(fault.page)
                if fault.times and fault.path == path and here:
                    fault.times -= 1
                    return fault
        return None

    def find(self, path: str, query: Mapping[str, str]) -> list[Document]:
        """All documents that match a query, whole."""
        ids = {canonical(name) for name in query.get("material_ids", "").split(",") if name}
        if path == "/materials/robocrys/":
            found = [
                {"material_id": document["material_id"], "last_updated": None, "description": text}
                for document in self.documents
                if (text := self.descriptions.get(canonical(document["material_id"]))) is not None
            ]
        else:
            deprecated = query.get("deprecated", "False").lower() == "true"
            licences = {"BY-C", "BY-NC"} if query.get("license") == "All" else {query.get("license", "BY-C")}
            licences |= self.licences
            found = [
                document
                for document in self.documents
                if document["deprecated"] is deprecated
                and document["builder_meta"]["license"] in licences
                and document["builder_meta"]["batch_id"] != query.get("batch_id_not_eq", "")
            ]
        return [document for document in found if not ids or canonical(document["material_id"]) in ids]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: MaterialsProject

    def log_message(self, *_: object) -> None:
        """No line on standard error."""

    def do_GET(self) -> None:
        """Answer a request, or fail as told."""
        address = urlsplit(self.path)
        path, query = address.path, dict(parse_qsl(address.query))
        fault = self.server.take_fault(path, query)
        if fault and fault.kind.isdigit():
            return self.answer(path, query, int(fault.kind), fault.text, fault.headers)
        if fault and fault.kind == "slow":
            time.sleep(fault.seconds)
        if fault and fault.kind == "update":
            self.server.database_version = fault.text
        if fault and fault.kind == "broken":
            return self.answer(path, query, 200, "<html>Bad gateway</html>")
        status, content = self.find(path, query)
        if fault and fault.kind == "short":
            content["data"].pop()
        return self.answer(path, query, status, json.dumps(content), cut=bool(fault and fault.kind == "cut"))

    def find(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        """Status and content of the answer."""
        server = self.server
        if path in ("/heartbeat", "/heartbeat/"):
            return 200, {
                "status": "OK",
                "version": "0.87.3",
                "db_version": server.database_version,
                "access_controlled_batch_ids": ["gnome_r2scan_statics"],
            }
        if path not in PARAMETERS:
            return 404, {"detail": "Not Found"}
        key = self.headers.get("x-api-key")
        if not key:
            return 401, {"message": "No API key found in request"}
        if len(key) != 32 or (server.key and key != server.key):
            return 403, {"message": f"Invalid authentication credentials: {key}"}  # worse than the service
        unknown = sorted(set(query) - PARAMETERS[path])
        if unknown:
            wrong = f"Request contains query parameters which cannot be used: {', '.join(unknown)}"
            return 400, {"detail": wrong}
        limit = int(query.get("_per_page" if "_page" in query else "_limit", 100))
        skip = (int(query["_page"]) - 1) * limit if "_page" in query else int(query.get("_skip", 0))
        if limit > MAX_LIMIT or limit < 0 or skip < 0:
            return 400, {"detail": f"The max limit is {MAX_LIMIT} entries"}
        found = server.find(path, query)
        if order := query.get("_sort_fields"):
            found = sorted(found, key=lambda document: document[order.lstrip("-")], reverse=order[0] == "-")
        else:
            turn = str(len(server.log))
            found = sorted(found, key=lambda document: zlib.crc32((turn + document["material_id"]).encode()))
        fields = query["_fields"].split(",") if "_fields" in query else DEFAULT_FIELDS[path]
        if query.get("_all_fields", "").lower() == "true":
            fields = sorted(set().union(*found))
        data = [project(document, fields) for document in found[skip : skip + limit]]
        meta = {"api_version": "0.87.3", "time_stamp": "2025-09-25T00:00:00", "total_doc": len(found)}
        return 200, {"data": data, "meta": meta | {"max_limit": MAX_LIMIT, "default_fields": fields}}

    def answer(
        self,
        path: str,
        query: dict[str, str],
        status: int,
        text: str,
        headers: Mapping[str, str] | None = None,
        cut: bool = False,
    ) -> None:
        """Send an answer, compressed where it is long."""
        self.server.record(path, query, status)
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if len(body) > 1_000 and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, compresslevel=1)
            self.send_header("Content-Encoding", "gzip")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True


def project(document: Document, fields: list[str]) -> Document:
    """A document with these fields alone; a dot descends, and what is not there stays away."""
    result: Document = {}
    for path in fields:
        source, target = document, result
        *parents, name = path.split(".")
        for parent in parents:
            if parent not in source:
                break
            source, target = source[parent] or {}, target.setdefault(parent, {})
        else:
            if name in source:
                target[name] = source[name]
    return result


def canonical(identifier: str) -> str:
    """One spelling of an id: mp-aaaaaaft and mp-149 are the same."""
    from emmet.core.mpid import AlphaID

    try:
        return AlphaID(identifier).string
    except ValueError:
        return identifier


def read_crystals(path: Path, first: int | None = None) -> tuple[list[Document], dict[str, str]]:
    """Documents of the summary, and descriptions by id, from a file of records as castbench reads them."""
    from castbench.materials.readers import read_records
    from castbench.materials.records import Columns
    from castbench.materials.structures import RecordError

    columns, documents, descriptions = Columns({}), [], {}
    for number, (name, record) in enumerate(islice(read_records(path), first)):
        if isinstance(record, RecordError):
            raise record
        material = columns.read(record, name, "server")
        identifier = material.material_id
        if not re.fullmatch(r"(mp|mvc)-(\d+|[a-z]{8})", identifier):
            identifier = f"mp-{900_000 + number}"
        documents.append(make_document(identifier, material.crystal, material.labels))
        if material.text:
            descriptions[identifier] = material.text
    return documents, descriptions


def make_document(identifier: str, crystal: Any, labels: Mapping[str, float | None]) -> Document:
    """A document of the summary. `crystal` has lattice, species and frac_coords."""
    from pymatgen.core import Structure

    structure = Structure(crystal.lattice, crystal.species, crystal.frac_coords)
    moduli = {
        name: {kind: labels.get(f"{letter}_{kind}") for kind in ("voigt", "reuss", "vrh")}
        for letter, name in (("k", "bulk_modulus"), ("g", "shear_modulus"))
    }
    return {
        "material_id": identifier,
        "formula_pretty": structure.composition.reduced_formula,
        "structure": structure.as_dict(),
        **{
            name: labels.get(name)
            for name in ("energy_per_atom", "formation_energy_per_atom", "energy_above_hull", "band_gap")
        },
        **{name: None if None in values.values() else values for name, values in moduli.items()},
        "deprecated": False,
        "theoretical": True,
        "builder_meta": {"license": "BY-C", "batch_id": None, "emmet_version": "0.87.3"},
    }


def to_unicode(text: str) -> str:
    """A description as the service writes it: P2_1/c as P2₁/c, P-1 as P1̅, Na2O as Na₂O, Fe3+ as Fe³⁺."""
    from pymatgen.util.string import unicodeify, unicodeify_spacegroup

    raised = str.maketrans("0123456789+-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻")
    parts = (
        r"(?P<group>[PABCFIR]\S*(?= space group))",
        r"\b(?P<species>[A-Z][a-z]?(?:\(\d+(?:,\d+)*\))?)(?P<charge>\d*(?:\.\d+)?[+-])(?![\w-])",
        r"(?P<formula>(?<![\w(-])(?:[A-Z][a-z]?\d*|\((?:[A-Z][a-z]?\d*)+\)\d*)+(?![\w(]))",
    )

    def convert(found: re.Match[str]) -> str:
        if found["group"]:
            return unicodeify_spacegroup(found["group"])
        if found["species"]:
            return found["species"] + found["charge"].translate(raised)
        return unicodeify(found["formula"])

    return re.sub("|".join(parts), convert, text)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crystals", type=Path, default=DEMO, help="file of records (the bundled crystals)")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--key", help="the only key that is accepted; else any of 32 characters")
    parser.add_argument("--database-version", default="2025.09.25")
    parser.add_argument("--unicode", action="store_true", help="serve descriptions in Unicode")
    parser.add_argument("--first", type=int, help="serve this many crystals only")
    parser.add_argument("--log", type=Path, help="append every request to this file, one JSON array a line")
    arguments = parser.parse_args()
    documents, descriptions = read_crystals(arguments.crystals, arguments.first)
    if arguments.unicode:
        descriptions = {name: to_unicode(text) for name, text in descriptions.items()}
    server = MaterialsProject(
        documents, descriptions, arguments.key, arguments.database_version, arguments.port
    )
    server.log_file = arguments.log
    print(server.url, flush=True)
    print(f"{len(server.documents)} materials, {len(server.descriptions)} descriptions", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT / "src"))
    main()
