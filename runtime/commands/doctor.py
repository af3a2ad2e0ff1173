"""`coldframe doctor`: what this machine can do, and what it lacks for the rest.

Each finding is what was tried, not what a version promises: memory is mapped, namespaces are taken,
disks and links are read from for a moment, a port is bound, a context is made on each GPU. What
might take this process down is asked of another one. Nothing of torch is imported.

    {"ok": true, "checks": [{"name": "cpu", "status": "ok" | "warning" | "fail", "says": "...",
                             "remedy": "..." | null, "facts": {..., "error": {...} | null}}, ...]}

`ok` is that nothing failed: whatever is named runs here, on the CPU at least.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from coldframe.loader.errors import ColdframeError, PlatformError, RequestError
from coldframe.runtime.checks import (
    credentials,
    devices,
    kernel,
    machine,
    network,
    software,
    storage,
)
from coldframe.runtime.checks.finding import FAIL, Case, Finding
from coldframe.runtime.commands.run import MODEL_HELP
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.machine.device_choice import add_device_argument, choose_device
from coldframe.snapshot.places import default_store, expanded

__all__ = ["Finding", "add_arguments", "examine", "run"]

_Check = Callable[[Case], Finding]

_NEEDED = {"cpu", "memory", "torch", "api_keys"}
"""What every replica takes: what is missing there is a failure."""
_OF_MODEL: dict[str, _Check] = {
    "model": machine.model_memory,
    "model_disk": storage.model_disk,
    "source_link": network.source,
}
"""Looked into where a MODEL is named, which is to be run then."""
_CHECKS: dict[str, _Check] = {
    "cpu": machine.cpu,
    "memory": machine.memory,
    "shm": machine.shm,
    "huge_pages": machine.huge_pages,
    "io_uring": kernel.io_uring,
    "userfaultfd": kernel.userfaultfd,
    "namespaces": kernel.namespaces,
    "capabilities": kernel.capabilities,
    "ptrace": kernel.ptrace,
    "seccomp": kernel.seccomp,
    "clock": kernel.clock,
    "versions": software.versions,
    "torch": software.torch,
    "compiler": software.compiler,
    "snapshots": devices.snapshots,
    "gpus": devices.gpus,
    "host_to_device": devices.link,
    "auto": devices.auto,
    "store_disk": storage.store_disk,
    "cache_disk": storage.cache_disk,
    "port": network.port,
    "s3_credentials": credentials.s3,
    "hub_token": credentials.hub,
    "peer_token": credentials.peer,
    "api_keys": credentials.api_keys,
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help=f"what is to be run here: {MODEL_HELP}"
    )
    parser.flag("--host", help="where a server would listen (the platform's address)")
    parser.flag("--port", metavar="N", help="its port (the platform's)")
    parser.flag(
        "--snapshot-store", metavar="PLACE", help="where images are (~/.cache/coldframe/snapshots)"
    )
    parser.flag("--cache", metavar="DIR", help="where weights from a network are to be kept")
    add_device_argument(parser)
    parser.flag("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command: 0 where nothing failed, whatever else is missing."""
    store = default_store() if args.snapshot_store is None else expanded(args.snapshot_store)
    case = Case(Path("/"), args.model, args.host, _port(args.port), store, args.cache, args.device)
    choose_device(case.device)  # a name that is none is no finding
    findings = list(examine(case))
    works = all(finding.status != FAIL for finding in findings)
    if args.json:
        checks = [finding.to_json() for finding in findings]
        print(json.dumps({"ok": works, "checks": checks}))
    else:
        print(_table(findings))
    return 0 if works else 1


def _port(text: str | None) -> int | None:
    # Kubernetes sets COLDFRAME_PORT to tcp://... where a Service is called coldframe.
    if text is None or text.startswith("tcp://"):
        return None
    if not (text.isascii() and text.isdecimal() and int(text) < 1 << 16):
        raise RequestError("there is no such port", where="--port", expected="0 to 65535", got=text)
    return int(text)


def examine(case: Case) -> Iterator[Finding]:
    """Looks into everything, in the order of the table.

    Args:
        case: What is asked about.
    """
    checks = {**_CHECKS, **(_OF_MODEL if case.model is not None else {})}
    for name, look in checks.items():
        needed = name in _NEEDED or name in _OF_MODEL
        try:
            yield look(case)
        except ColdframeError as error:
            yield Finding(name, "", {}, error, needed=needed)
        except OSError as error:
            what = "this cannot be looked into"
            broken = PlatformError(what, where=error.filename, got=error.strerror)
            yield Finding(name, "", {}, broken, needed=needed)


def _table(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings) + 1
    lines = []
    for finding in findings:
        document = finding.to_json()
        says = document["says"].splitlines() or [""]
        if document["remedy"] is not None:
            says.append(f"-> {document['remedy']}")
        lines.append(f"{finding.name:<{width}}{finding.status:<9}{says[0]}")
        lines += [f"{'':<{width + 9}}{line}" for line in says[1:]]
    return "\n".join(lines)
