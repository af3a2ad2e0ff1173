"""The port that a server would take, and the link to where a model is."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.errors import PlatformError
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.loader.sources.opening import open_origin
from coldframe.runtime.checks.finding import Case, Finding
from coldframe.runtime.gateway.listen import bind
from coldframe.runtime.gateway.platforms.table import by_name, detect
from coldframe.runtime.machine.probe import probe
from coldframe.runtime.units import human_bytes

__all__ = ["port", "source"]

_LISTENS = "0A"
_SLOW = 50e6


def port(case: Case) -> Finding:
    """Whether `coldframe serve` could listen where the platform wants it to."""
    name = os.environ.get("COLDFRAME_PLATFORM")
    profile = by_name(name) if name else detect(os.environ, [])
    number = profile.port(os.environ) if case.port is None else case.port
    host = case.host or profile.host
    facts = {"host": host, "port": number, "platform": profile.name}
    try:
        bind(host, number).close()
    except PlatformError as error:
        held = _holder(case.root, number)
        error.hint = "End what listens there, or take another --port."
        if held is not None:
            facts |= {"held_by": held}
            error.got = f"{error.got}: by process {held}"
        return Finding("port", "", facts, error, needed=case.port is not None)
    return Finding("port", f"{host} port {number} can be had ({profile.name})", facts)


def source(case: Case) -> Finding:
    """How fast a model that is elsewhere comes."""
    assert case.model is not None
    place = parse_location(case.model)
    if isinstance(place, Directory):
        return Finding("source_link", "the model is in a directory", {"bytes_per_s": None})
    with closing(open_origin(place, hurry=True)) as origin:
        checkpoint = Checkpoint.open(origin)
        plan = Plan.build(checkpoint, layout=Layout.ALIGNED)
        rate = probe(origin, checkpoint, plan, maps=False).rate
    says = f"{human_bytes(rate)}/s from {place.uri}"
    remedy = None
    if rate < _SLOW:
        remedy = "Keep a copy nearer: --cache DIR, or a peer that has it (--source peer://...)."
    facts = {"uri": place.uri, "bytes_per_s": rate}
    return Finding("source_link", says, facts, remedy=remedy)


def _holder(root: Path, number: int) -> str | None:
    """Who listens on a port, `PID (name)`, as far as this process may see it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (root / "proc/net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == number:
                inodes.add(f"socket:[{fields[9]}]")
    for process in (root / "proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                return f"{process.name} ({(process / 'comm').read_text().strip()})"
        except OSError:
            continue
    return None
