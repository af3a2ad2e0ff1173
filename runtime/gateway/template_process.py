"""The processes that chat templates run in: one that waits, and its forks, which render.

A template comes with a checkpoint. It may loop for ever, want all memory, or know a way out of the
sandbox. So it runs in a process that can compute, answer on its one socket, and nothing else, and
that is killed when it does not answer in time. The next one must be there at once, and whoever
wants it may not be able to start an interpreter any more, having become a user that may not read
one. So a first process, which never sees a template, imports all that is needed, becomes what its
forks are to be, and forks them on demand (`coldframe.snapshot.forking`).

Messages to the first: `settle`, then `fork`. Messages from it: `settled`.
Messages to a fork: `limits`, then any number of `render`; one without variables only compiles.
Messages from it: `rendered`, `refused` (the template's own words), `failed`.
"""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.packages import add_site_packages
from coldframe.loader.process import collect_garbage
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.gateway.syscalls import compute_only
from coldframe.snapshot.forking import fork_on_demand
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import drop

if TYPE_CHECKING:
    from coldframe.runtime.gateway.templates import Templates

__all__ = ["main"]

_NICE = 10
_MOST_WORDS = 1000
_FIRST_CHARS = 1 << 20
# Whatever Jinja and Python import late, they import for this.
_EVERYTHING = """
{%- macro m(x) -%}{{ x | pprint | trim }}{%- endmacro -%}
{%- for i in range(2) if i -%}{{ m(loop.index) }}{%- continue -%}{%- endfor -%}
{{- {'é': [1]} | tojson(indent=2) }}{{ strftime_now('%d %b %Y') }}{{ '%s' % 'é' | title -}}
{{- lipsum(1, false, 1, 2) | wordwrap(9) | length }}{{ [2, 1] | sort | random -}}
{{- '{:>3}'.format(1) }}{%- generation %}{{ {'a': 1} | dictsort | escape }}{% endgeneration -%}
{%- set ns = namespace(é=1) -%}{{ 1 / 0 }}
"""


def main(fd: int) -> None:
    """The process's entry.

    Args:
        fd: The inherited end of the renderer's socket pair.
    """
    os.closerange(fd + 1, 1 << 16)  # what a shell has left open is nothing for a template
    control = Channel.from_fd(fd)
    templates = _import_quietly()
    told = control.recv()
    if told is not None and _settle(control, told):
        collect_garbage()
        channel, first = fork_on_demand(control)
        if first is not None:
            _serve(channel, first, templates)
    os._exit(0)


def _import_quietly() -> Templates:
    """Imports, on a thread that gives way to whatever a cold start does meanwhile.

    The nice value is each thread's own on Linux. Set for the process it could not be taken back
    without privileges, and would be that of its forks.
    """
    made: list[Templates] = []

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        add_site_packages()
        import jinja2.constants
        import jinja2.debug  # noqa: F401 - imported late by Jinja, with the first error

        from coldframe.runtime.gateway.templates import Templates

        made.append(Templates(_FIRST_CHARS))
        _answer(made[0], {"template": _EVERYTHING, "variables": {}})

    thread = threading.Thread(target=run, name="imports")
    thread.start()
    thread.join()
    # Python has joined it when it is about to end. To change one's user, and to fork, takes that
    # it has ended.
    while len(os.listdir("/proc/self/task")) > 1:
        time.sleep(0.0002)
    return made[0]


def _settle(control: Channel, told: Message) -> bool:
    """Becomes whoever it is told to be; whether that went well, and somebody is there to know."""
    failed: dict[str, Any] = {}
    try:
        identity = told.body["identity"]
        drop(Identity.current() if identity is None else Identity.from_wire(identity))
    except ColdframeError as error:
        failed = {"failed": error.to_wire()}
    try:
        control.send({"type": "settled", **failed})
    except ReplicaError:  # the gateway has ended meanwhile
        return False
    return not failed


def _serve(channel: Channel, limits: Message, templates: Templates) -> None:
    templates.max_chars = limits.body["max_chars"]
    _shut_in(limits.body["memory_bytes"])
    while (message := channel.recv()) is not None:
        answer = _answer(templates, message.body)
        try:
            channel.send(answer)
        except MemoryError:  # as JSON it is larger, and nothing of it has gone out yet
            channel.send({"type": "failed", "why": "what it makes is too large"})


def _shut_in(memory_bytes: int) -> None:
    """Leaves this process its memory, within limits, and its socket."""
    for standard in (1, 2):
        os.dup2(0, standard)
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    compute_only()


def _answer(templates: Templates, body: dict[str, Any]) -> dict[str, Any]:
    """Renders, or compiles where there are no variables; whatever comes of it, as a message."""
    from coldframe.runtime.gateway.templates import OutputTooLong, Refused

    try:
        if "variables" not in body:
            templates.compile(body["template"])
            return {"type": "rendered", "text": ""}
        return {"type": "rendered", "text": templates.render(body["template"], body["variables"])}
    except Refused as error:
        return {"type": "refused", "why": str(error)[:_MOST_WORDS]}
    except OutputTooLong:
        return {"type": "failed", "why": f"it makes more than {templates.max_chars} characters"}
    except MemoryError:
        why = "it takes too much memory"
    except RecursionError:
        why = "it nests too deeply"
    except Exception as error:  # noqa: BLE001 - a template is a program, and may raise anything
        why = _words(error)
    gc.collect()  # of what it has built up
    return {"type": "failed", "why": why}


def _words(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    place = f"line {line}: " if isinstance(line, int) else ""
    try:
        return f"{place}{type(error).__name__}: {error}"[:_MOST_WORDS]
    except Exception:  # noqa: BLE001 - the words are the template's doing, too
        return f"{place}{type(error).__name__}"
