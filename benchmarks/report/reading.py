"""Documents that benchmarks have printed, read and held against their schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldframe.benchmarks.document import SCHEMA, VERSION, parsed
from coldframe.loader.errors import PlatformError, RequestError

__all__ = ["KINDS", "same_model", "read_document", "read_documents"]

KINDS = ("cold", "serve", "handoff", "replay", "advise", "rows")


def read_documents(files: Sequence[str]) -> list[dict[str, Any]]:
    """The documents of some files, which are about one model as far as they name it.

    Args:
        files: Paths; `-` is stdin.

    Raises:
        RequestError: One holds no such document, or they are about different models.
    """
    found = [read_document(file) for file in files]
    same_model(found, files)
    return found


def read_document(file: str) -> dict[str, Any]:
    """The document that is the whole of a file, or its last line.

    Raises:
        RequestError: There is no such file, or no document of a known kind and version in it.
    """
    text = _text(file)
    lines = text.rstrip().splitlines()
    document = parsed(text)
    if document is None:
        raise RequestError(
            "this is no benchmark's document",
            where=file,
            expected="JSON, as the whole file or as its last line",
            got=repr(lines[-1][:60]) if lines else "nothing",
            hint="Give what a benchmark printed: coldframe bench cold MODEL > FILE.",
        )
    # The older benchmarks say rows, and neither kind nor version.
    kind = document.get("kind", "rows" if "rows" in document else None)
    if kind not in KINDS:
        raise RequestError(
            "documents of this kind cannot be drawn",
            where=file,
            expected=", ".join(KINDS),
            got=repr(kind),
            hint="Give what coldframe bench or coldframe advise printed last.",
        )
    if kind != "rows" and document.get("schema") != VERSION:
        raise RequestError(
            "this document is of another version",
            where=file,
            expected=f"schema {VERSION}",
            got=repr(document.get("schema")),
            hint="Draw it with the coldframe that made it, or measure again.",
        )
    _check(document, kind, file)
    return {"kind": kind, **document}


def _text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            "a document cannot be read",
            where=file,
            got=error.strerror if isinstance(error, OSError) else "bytes that are no UTF-8",
            hint="Give a file that a benchmark's output was written to.",
        ) from error


def _check(document: dict[str, Any], kind: str, file: str) -> None:
    try:
        from jsonschema import Draft202012Validator
    except ModuleNotFoundError as error:
        raise PlatformError(
            "a document cannot be checked against its schema",
            where=file,
            expected="jsonschema",
            got=f"no module {error.name}",
            hint="Install it: pip install 'coldframe[bench]'.",
        ) from error
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    part = {"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]}
    for wrong in Draft202012Validator(part).iter_errors(document):
        raise RequestError(
            f"this {kind} document is not what its schema says",
            where=f"{file}, {wrong.json_path}",
            got=wrong.message[:200],
            hint="Give the document as it was printed.",
        )


def same_model(documents: Sequence[dict[str, Any]], files: Sequence[str]) -> None:
    """Refuses documents about different models: side by side their figures say nothing.

    The same model may be in another directory on another machine.

    Args:
        documents: Some of which name no model.
        files: What to call them.

    Raises:
        RequestError: They are about several.
    """
    first: tuple[str, object] | None = None
    for file, document in zip(files, documents, strict=True):
        model = document.get("model")
        if not isinstance(model, dict):
            continue
        told = tuple(model[key] for key in ("family", "dtype", "weights_bytes"))
        if first is not None and first[1] != told:
            raise RequestError(
                "these documents are about different models",
                where=file,
                expected=f"{first[1]}, as in {first[0]}",
                got=told,
                hint="Make a report for each model.",
            )
        first = first or (file, told)
