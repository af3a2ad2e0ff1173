"""The gateway as a process: it is imported, told what it serves, becomes nobody, and serves.

Nothing is loaded in uvicorn's lifespan: the listener was bound before this process was started, and
accepts as soon as the imports are done, whatever the replica is doing.
"""

from __future__ import annotations

import os
import socket
from time import monotonic_ns
from typing import TYPE_CHECKING

from coldframe.loader.process import collect_garbage, die_with_parent
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel, Message

if TYPE_CHECKING:
    from coldframe.runtime.gateway.renderer import Renderer
    from coldframe.runtime.gateway.settings import GatewaySettings

__all__ = ["main"]


def main(control_fd: int, spawned_ns: int, first_ns: int) -> None:
    """The process's entry.

    Args:
        control_fd: The inherited end of the front's socket pair.
        spawned_ns: When the front started this process (CLOCK_MONOTONIC).
        first_ns: When its first line of Python ran.
    """
    recorder = Recorder("gateway")
    recorder.add("interpreter", spawned_ns, first_ns)
    channel = Channel.from_fd(control_fd)
    import asyncio

    import coldframe.runtime.gateway.app  # noqa: F401 - what takes long, while the front parses
    from coldframe.runtime.gateway.preload import may_import, preload
    from coldframe.runtime.gateway.renderer import Renderer
    from coldframe.runtime.gateway.settings import GatewaySettings
    from coldframe.snapshot.identity import Identity
    from coldframe.snapshot.privileges import become, confine

    recorder.add("imports", first_ns)
    told = channel.recv()
    if told is None or told.kind != "settings":
        os._exit(1)  # the front found a wrong flag, say
    settings = GatewaySettings.from_wire(told.body["settings"])
    die_with_parent(told.body["parent"])
    renderer = Renderer()
    renderer.start()  # before this process is confined, or it could become nobody else
    confine()
    if settings.user is not None:
        identity = Identity.from_wire(settings.user)
        renderer.settle(identity)
        if not may_import(identity.seen_here()):
            preload(tracing=any(name.startswith("OTEL_EXPORTER_OTLP") for name in os.environ))
        become(identity)
    asyncio.run(_serve(channel, told, settings, renderer, recorder))
    os._exit(0)


async def _serve(
    channel: Channel,
    told: Message,
    settings: GatewaySettings,
    renderer: Renderer,
    recorder: Recorder,
) -> None:
    import asyncio

    from coldframe.runtime.gateway.app import Gateway

    listeners = [socket.socket(fileno=fd) for fd in told.fds]
    gateway = Gateway(channel, settings, listeners, renderer)
    serving = asyncio.ensure_future(gateway.serve())
    started = monotonic_ns()
    await gateway.accepting.wait()
    recorder.add("listen", started, note="accepting")
    gateway.engine.say({"type": "spans", "spans": [s.to_wire() for s in recorder.drain()]})
    collect_garbage()
    await serving
    gateway.engine.say({"type": "drained"})
