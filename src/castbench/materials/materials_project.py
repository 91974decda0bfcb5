"""The Materials Project: its documents by the real client, page by page, into a snapshot and out of it.

The client (mp-api) finds the key itself, in MP_API_KEY or pymatgen's settings; nothing here holds it. One
query of `materials.summary` with the fields below and, where the configuration wants them, the descriptions
of `materials.robocrys`, is downloaded in pages that stay on disk until the table is written: a download that
was killed asks for the missing ones. The pages are packed into a snapshot, and the table is made from that,
so that a replay is the same path without a network.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from castbench.errors import InputError
from castbench.materials.readers import Record, Source
from castbench.materials.snapshot import read_documents, read_header, write_snapshot
from castbench.materials.structures import RecordError
from castbench.provenance import sha256_file

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Document = dict[str, Any]

# Deprecated materials are not for use, and GNoME's are not under CC BY.
QUERY = {"deprecated": False, "include_gnome": False}
COUNT = {"deprecated": False, "batch_id_not_eq": "gnome_r2scan_statics"}  # the same, as the service reads it
ORDER = "material_id"  # without an order, pages may overlap, which shows as repeated records
NUMBERS = ("energy_per_atom", "formation_energy_per_atom", "energy_above_hull", "band_gap")  # eV/atom, eV
MODULI = {"k": "bulk_modulus", "g": "shear_modulus"}  # mappings of voigt, reuss and vrh, GPa
LICENCE_FIELD = "builder_meta.license"
FIELDS = ("material_id", "structure", *NUMBERS, *MODULI.values(), LICENCE_FIELD)
DESCRIPTION = "description"  # of materials.robocrys
LICENCE = "CC-BY-4.0 (GNoME's materials, which are CC-BY-NC-4.0, are left out)"
CITATION = "A. Jain et al., APL Materials 1, 011002 (2013), doi:10.1063/1.4812323"

PAGE = 1_000  # documents a request, the service's limit
IDS = 200  # materials a request for descriptions: they stand in its address, which must stay short
TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 8  # each with the client's own three quick retries, which keep to Retry-After
LONGEST_WAIT = 60.0  # seconds between attempts; they double from 1


def open_materials_project(settings: Mapping[str, Any]) -> Source:
    """The documents of a snapshot. `settings`: snapshot, database_version, descriptions.

    Raises:
        InputError: it is no snapshot, or one of another query or database version.
    """
    path = Path(settings["snapshot"])
    header = read_header(path)
    wanted = requested_fields(settings)
    absent = [field for field in wanted if field not in header.get("fields", ())]
    if header.get("query") != QUERY or absent:
        what = f"lacks {', '.join(absent)}" if absent else f"was {header.get('query')}"
        raise InputError(f"{path}: is the snapshot of another query ({what}); download it anew")
    found = header["database_version"]
    if settings.get("database_version") not in (None, found):
        raise InputError(
            f"{path}: holds database version {found}, and materials.database_version asks for "
            f"{settings['database_version']}; name another snapshot or correct the version"
        )
    keys = ("database_version", "query", "fields", "documents", "client", "endpoint", "downloaded")
    return Source(
        origin="materials_project",
        records=to_records(path, wanted),
        columns={},
        # A name of its own: a replay from elsewhere gives the same manifest.
        files=[
            {
                "path": f"materials_project-{found}.jsonl.zst",
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
        ],
        licence=LICENCE,
        citation=f"{CITATION}; database version {found}",
        download={key: header[key] for key in keys},
    )


def requested_fields(settings: Mapping[str, Any]) -> list[str]:
    """Fields of the documents that a configuration needs."""
    return [*FIELDS, *([DESCRIPTION] if settings.get("descriptions") else [])]


def to_records(path: Path, fields: list[str]) -> Iterator[Record]:
    """Iterate over a snapshot's documents as records with our columns.

    Raises:
        InputError: a field is in no document, or holds something else than it used to.
    """
    seen: set[str] = set()
    for number, document in enumerate(read_documents(path), 1):
        seen.update(document)
        name = f"document {number}"
        if look_up_licence(document) == "BY-NC":
            yield name, RecordError("non-commercial licence", f"{document.get('material_id')} is CC BY-NC")
        else:
            yield name, to_record(document, DESCRIPTION in fields)
    # Not the description: the service has none for some materials, perhaps for all that were asked for.
    check_fields(seen, [field for field in fields if field != DESCRIPTION])


def to_record(document: Document, described: bool) -> dict[str, Any]:
    """Map a document's fields to our columns: the one place that knows the service's schema."""
    record = {name: document.get(name) for name in ("material_id", "structure", *NUMBERS)}
    for name in NUMBERS:
        if not isinstance(record[name], int | float | None):
            raise changed(document, name, "a number")
    for letter, name in MODULI.items():
        values = document.get(name)
        if values is None:
            continue
        if not isinstance(values, Mapping) or not {"voigt", "reuss", "vrh"} & set(values):
            raise changed(document, name, "a mapping of voigt, reuss and vrh")
        record |= {f"{letter}_{kind}": values.get(kind) for kind in ("voigt", "reuss", "vrh")}
    if described:
        record["text"] = document.get(DESCRIPTION)
    return record


def look_up_licence(document: Document) -> Any:
    """What a document says about its licence: BY-C, BY-NC, or nothing."""
    return (document.get("builder_meta") or {}).get("license")


def changed(document: Document, field: str, expected: str) -> InputError:
    """The error for a field whose type is not what it was."""
    return InputError(
        f"{document.get('material_id')}: the Materials Project's {field} is no longer {expected} but "
        f"{document[field]!r:.80}; mend the mapping in castbench/materials/materials_project.py"
    )


def check_fields(seen: set[str], fields: list[str]) -> None:
    """Refuse documents that all lack a field: it was renamed or removed, and would pass as missing values."""
    for field in fields:
        if seen and field.partition(".")[0] not in seen:
            raise InputError(
                f"the Materials Project's documents have no field {field} any more; mend the mapping in "
                "castbench/materials/materials_project.py, or replay a snapshot (materials.snapshot)"
            )


def download(settings: Mapping[str, Any], snapshot: Path, pages: Path) -> None:
    """Download what is not in `pages` yet, and pack all into `snapshot`.

    Args:
        settings: `database_version` (null: whichever is served) and `descriptions` (bool).
        snapshot: file to write.
        pages: folder of the pages, which stays; a page of another query or version is replaced.

    Raises:
        InputError: no key, a refused key or query, no network, another database version, no space.
    """
    summary, robocrys = connect()
    served = summary.db_version
    wanted = settings.get("database_version")
    if wanted not in (None, served):
        raise InputError(
            f"the Materials Project serves database version {served}, and materials.database_version asks "
            f"for {wanted}; replay a snapshot of that (materials.snapshot) or correct the version"
        )
    total = persist(lambda: summary.count(dict(COUNT)), "count")
    if not total:
        raise InputError("the Materials Project has no document for this query; try again later")
    header = {
        "database_version": served,
        "query": QUERY,
        "fields": requested_fields(settings),
        "documents": total,
        "client": f"mp-api {version('mp-api')}",
        "endpoint": summary.base_endpoint,
    }
    count = -(-total // PAGE)
    files = {number: pages / f"{number:05}.jsonl.zst" for number in range(1, count + 1)}
    missing = {
        n: file for n, file in files.items() if not is_page(file, header | {"page": f"{n} of {count}"})
    }
    log.info("database version %s: %d documents in %d pages", served, total, count)
    log.info("%d pages are there already, %d to download", count - len(missing), len(missing))
    for number, file in missing.items():
        expected = min(PAGE, total - (number - 1) * PAGE)
        documents = fetch_page(summary, number, expected)
        if number == 1:  # a renamed field shows here, not after an hour; moduli are too rare to tell
            seen = set().union(*documents)
            check_fields(seen, [field for field in FIELDS if field not in MODULI.values()])
        if settings.get("descriptions"):
            add_descriptions(robocrys, documents)
        page = f"{number} of {count}"
        write_snapshot(file, header | {"page": page, "downloaded": now()}, documents)
        log.info("page %s", page)
    if (ended := persist(open_summary, "heartbeat").db_version) != served:
        raise InputError(
            f"the Materials Project went from database version {served} to {ended} during the download; "
            "start again, and it asks for the new one"
        )
    dates = [read_header(file)["downloaded"] for file in files.values()]
    header |= {"downloaded": max(dates), "licence": LICENCE, "citation": CITATION}
    write_snapshot(snapshot, header, chain.from_iterable(map(read_documents, files.values())))
    log.info("%s: %d documents, %d bytes", snapshot, total, snapshot.stat().st_size)


def connect() -> tuple[Any, Any]:
    """The client's summary and robocrys endpoints, on one session.

    Raises:
        InputError: there is no key, it cannot be one, or the service cannot be reached.
    """
    # Imported here: it takes seconds, and a replay does not need it.
    from mp_api.client.core.exceptions import MPRestError
    from mp_api.client.core.utils import validate_api_key
    from mp_api.client.routes.materials.robocrys import RobocrysRester

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            known = bool(validate_api_key())
        except MPRestError:
            raise InputError("the Materials Project's key must have 32 characters; mend MP_API_KEY") from None
    if not known:
        raise InputError(
            "no key for the Materials Project: export MP_API_KEY (or PMG_MAPI_KEY in pymatgen's settings) as "
            "the service's dashboard shows it; a replay (materials.snapshot) needs none"
        )
    # The first contact gives up sooner: a machine without a network should say so at once.
    summary = persist(open_summary, "heartbeat", attempts=3)
    summary.session.hooks["response"].append(refuse)
    return summary, RobocrysRester(
        use_document_model=False, mute_progress_bars=True, timeout=TIMEOUT, session=summary.session
    )


def open_summary() -> Any:
    """The client's summary endpoint, which asks the service for its database version."""
    from mp_api.client.routes.materials.summary import SummaryRester

    class Summary(SummaryRester):
        # Without this the client makes its JSON schema once a field and request, a second a page.
        @cached_property
        def available_fields(self) -> list[str]:
            return super().available_fields

    Summary._get_heartbeat_info.cache_clear()  # the client asks once a process, and keeps "none" too
    summary = Summary(use_document_model=False, mute_progress_bars=True, timeout=TIMEOUT)
    if not summary.db_version:
        raise ValueError("it tells no database version")
    return summary


def refuse(response: Any, *_: Any, **__: Any) -> None:
    """Stop at an answer that asking again does not change (a hook of the client's session).

    Raises:
        InputError: status 401, 403 or another refusal.
    """
    status = response.status_code
    if status in (401, 403):  # the answer is not shown: it might repeat the key
        raise InputError(
            f"the Materials Project refuses the key (status {status}); compare MP_API_KEY with the dashboard"
        )
    if 400 <= status < 500 and status not in (408, 414, 429):
        raise InputError(
            f"the Materials Project refuses the query (status {status}: {one_line(response.text)}); "
            "mend the fields in castbench/materials/materials_project.py"
        )


def persist(ask: Callable[[], Answer], what: str, attempts: int | None = None) -> Answer:
    """Ask until there is an answer, with growing pauses.

    Raises:
        InputError: the service refuses, or does not answer in all attempts.
    """
    from mp_api.client.core.exceptions import MPRestError
    from requests.exceptions import RequestException

    attempts = attempts or ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return ask()
        except InputError:
            raise
        except (MPRestError, RequestException, ValueError, LookupError, TypeError) as error:
            reason = one_line(str(error)) or type(error).__name__
        if attempt < attempts:
            pause = min(2.0 ** (attempt - 1), LONGEST_WAIT)
            log.warning("%s: %s; attempt %d of %d in %g s", what, reason, attempt + 1, attempts, pause)
            time.sleep(pause)
    raise InputError(
        f"the Materials Project does not answer ({what}: {reason}); start again later, on a machine with a "
        "network such as a login node, and only what is missing is asked for; or replay a snapshot "
        "(materials.snapshot)"
    )


def one_line(text: str) -> str:
    """The start of a message, on one line; of the network's nested ones the innermost, which says why."""
    return " ".join(text.rpartition("Caused by ")[2].split())[:200]


def fetch_page(summary: Any, number: int, expected: int) -> list[Document]:
    """Fetch one page of the query, whole."""

    def ask() -> list[Document]:
        documents = summary.search(
            **QUERY, fields=list(FIELDS), all_fields=False, num_chunks=1, chunk_size=PAGE, _page=number,
            _sort_fields=ORDER,
        )  # fmt: skip
        if len(documents) != expected:
            raise ValueError(f"{len(documents)} documents instead of {expected}")
        return documents

    return persist(ask, f"page {number}")


def add_descriptions(robocrys: Any, documents: list[Document]) -> None:
    """Add the descriptions that the service has to these documents.

    An id has two spellings, mp-149 and mp-aaaaaaft, and endpoints may differ: the client's is compared.
    """
    from mp_api.client.core.utils import validate_ids

    by_id: dict[str, list[Document]] = {}
    for document in documents:
        try:
            by_id.setdefault(validate_ids([document["material_id"]])[0], []).append(document)
        except (LookupError, ValueError):
            continue  # no id that the client can ask for

    def ask(ids: list[str]) -> list[Document]:
        fields = ["material_id", DESCRIPTION]
        return robocrys.search_docs(material_ids=ids, fields=fields, all_fields=False, num_chunks=1)

    ids = list(by_id)
    for start in range(0, len(ids), IDS):
        found = persist(partial(ask, ids[start : start + IDS]), "descriptions")
        check_fields(set().union(*found), ["material_id", DESCRIPTION])
        for one in found:
            for document in by_id.get(validate_ids([one["material_id"]])[0], ()):
                document[DESCRIPTION] = one.get(DESCRIPTION)


def is_page(file: Path, header: dict[str, Any]) -> bool:
    """Whether a file is the whole page of this query and version."""
    if not file.exists():
        return False
    try:
        found = read_header(file)
    except InputError as error:
        log.warning("%s; it is asked for again", error)
        return False
    return all(found.get(key) == value for key, value in header.items())


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
