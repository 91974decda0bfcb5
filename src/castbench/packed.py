"""Folders of packed arrays with a manifest: written last, and checked before the arrays are trusted."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from castbench.errors import InputError
from castbench.provenance import atomic_path, sha256_file, write_json

# verb that makes the folder: raise it whenever the files or what is in them change
FORMATS = {"build_graphs": 2, "tokenize_text": 1, "embed_text": 1}


@contextmanager
def growing_array(
    path: Path, dtype: type, columns: tuple[int, ...] = ()
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends values (n, *columns) to a .npy file, in constant memory."""
    kind = np.dtype(dtype)
    length = 0
    with atomic_path(path) as partial, partial.open("wb") as handle:

        def write_header() -> None:
            # numpy pads the header, so that a longer shape fits in its place
            header = {"descr": kind.str, "fortran_order": False, "shape": (length, *columns)}
            np.lib.format.write_array_header_1_0(handle, header)

        def append(values: np.ndarray) -> None:
            nonlocal length
            handle.write(np.ascontiguousarray(values, kind).data)
            length += len(values)

        write_header()
        yield append
        handle.seek(0)
        write_header()
        handle.flush()


def write_manifest(folder: Path, verb: str, content: dict[str, Any], files: Sequence[str]) -> None:
    """Write manifest.json: `content`, the format of what `verb` makes, and the size and hash of each file."""
    recorded = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in files
    }
    write_json(folder / "manifest.json", content | {"format": FORMATS[verb], "files": recorded})


def read_manifest(folder: Path, verb: str, verify: bool = False) -> dict[str, Any]:
    """Manifest of a folder made by `verb`, after checking that its files have the recorded sizes.

    With `verify` their hashes are checked too.

    Raises:
        InputError: the folder is missing, unfinished, damaged or of another format.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no readable manifest.json; run {verb} again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMATS[verb]:
        raise InputError(f"{folder}: not of format {FORMATS[verb]}; run {verb} again")
    for name, recorded in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != recorded["bytes"]:
            raise InputError(f"{path}: missing or cut short; run {verb} again")
        if verify and sha256_file(path) != recorded["sha256"]:
            raise InputError(f"{path}: does not match its hash; run {verb} again")
    return manifest
