"""`coldframe serve`: the container's entrypoint. It listens at once and answers when it can."""

from __future__ import annotations

import argparse
import socket
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from coldframe.loader.cgroup import memory_available
from coldframe.loader.errors import ColdframeError
from coldframe.loader.timeline import Recorder, now, process_start_ns
from coldframe.runtime.commands.run import replica_options
from coldframe.runtime.endpoint.served import memory_to_share, named_models
from coldframe.runtime.flags.serve import add_arguments, policy_for, settings_for
from coldframe.runtime.gateway.keys import load_keys
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.replica.scale_spec import Scale
from coldframe.snapshot.identity import Identity, service_identity

# The rest is imported when the processes are on their way: see `run`.
if TYPE_CHECKING:
    from coldframe.runtime.gateway.platforms.table import Profile
    from coldframe.runtime.integrations.dynamo.settings import DynamoSettings

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace, listen: str | None = None) -> int:
    """Runs the command: until it is told to end, or the replica cannot go on.

    Args:
        args: The flags.
        listen: `HOST:PORT` where requests are taken over from other replicas, to be decoded; none
            of this one's workers computes prompts then.

    Raises:
        ColdframeError: It cannot go on.
    """
    started = now()
    recorder = Recorder("front")
    exec_ns = min(process_start_ns(), started)
    recorder.add("interpreter", exec_ns, started, note="and imports")
    listeners: list[socket.socket] = args.listeners
    bound = ", ".join(map(_address, listeners))
    recorder.add("listen", args.listening_ns, args.listening_ns, note=bound)
    profile: Profile = args.profile
    models = named_models(args, profile)
    args.model = next(iter(models.values()))
    user = service_identity(args.user)
    options = replace(replica_options(args), user=user)
    dynamo: DynamoSettings | None = getattr(args, "dynamo_settings", None)
    if dynamo is not None and not args.user:
        # What it registers with is its own: a directory, an account's token.
        user = Identity.current()
    room, options = memory_to_share(options, len(models), args.device_memory, memory_available)
    keys = load_keys(args.secrets, loopback=_is_loopback(listeners))
    settings = replace(
        settings_for(args, profile, tuple(models)),
        user=user.to_wire(),
        keys=keys.keys,
        dynamo=None if dynamo is None else dynamo.to_wire(),
    )
    log = Log(args.log_format, args.log_level, process="front", secrets=keys.keys)
    log.info("listening", address=bound, platform=profile.name, model=", ".join(models))
    for warning in keys.warnings:
        log.warning("access", why=warning)
    taking = None
    if listen is not None:
        from coldframe.runtime.transport.takeover import open_listener

        options = replace(options, prefill=Scale(0, 0))
        taking = open_listener(listen)
    launch = Launch(options, recorder, args.memory, args.restorer)
    launch.start_workers()
    imported = now()
    from coldframe.runtime.endpoint.endpoint import Endpoint
    from coldframe.runtime.endpoint.fleet import Fleet
    from coldframe.runtime.endpoint.supervisor import Supervisor
    from coldframe.runtime.replica.kvwatch import KvWatch
    from coldframe.runtime.replica.loop import Loop
    from coldframe.runtime.scaling.budget import Budget
    from coldframe.runtime.scaling.policy_state import PolicyState

    recorder.add("imports", imported)
    policy = policy_for(args)
    budget = None if args.budget is None else Budget(args.budget)
    state = None if args.policy_state is None else PolicyState(args.policy_state, log)
    with closing(Loop()) as loop:
        supervisors: dict[str, Supervisor] = {}
        fleet = Fleet(supervisors, loop, room, args.pool, budget, state)
        for name, place in models.items():
            first = not supervisors
            try:
                supervisors[name] = Supervisor(
                    replace(options, model=place),
                    policy(),
                    recorder if first else Recorder("front"),
                    log if len(models) == 1 else log.about(model=name),
                    loop,
                    launch if first else None,
                    exec_ns if first else None,
                    room,
                    alone=len(models) == 1,
                    watch=None if dynamo is None or dynamo.role == "decode" else KvWatch(),
                )
            except ColdframeError as error:
                from coldframe.runtime.endpoint.farewell import turn_away

                log.error("failed", error=str(error))
                turn_away(args.gateway, listeners, settings, error)
                raise
        if state is not None:
            state.restore({name: model.unasked for name, model in fleet})
        with closing(fleet):
            jobs = None
            if profile.name == "runpod-queue":
                from coldframe.runtime.endpoint.jobs import JobFetcher

                key = keys.keys[0] if keys.keys else None
                jobs = JobFetcher(listeners[0].getsockname()[1], key, user)
            takeover = None
            if taking is not None:
                from coldframe.runtime.transport.takeover import Takeover

                takeover = Takeover(*taking, fleet.first, log)
            endpoint = Endpoint(
                fleet,
                listeners,
                args.gateway,
                settings,
                recorder,
                log,
                args.chat_template,
                jobs,
                takeover=takeover,
                peers=getattr(args, "peer_finder", None),
                exit_at_zero=args.on_idle == "exit",
            )
            args.ending.follow(loop.watch, endpoint.drain)
            endpoint.serve()
    return 0


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{host} port {port}"


def _is_loopback(listeners: list[socket.socket]) -> bool:
    return all(_address(listener).startswith(("127.", "::1 ")) for listener in listeners)
