"""Replicas with a vLLM engine, and what is to be seen of them."""

from __future__ import annotations

from pathlib import Path

from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.vllm_spec import VllmOptions
from tests.runtime.helpers import Client, ask, finish, prompt_of, wait_for

Wish = dict[str, object]

# Of the first one's answer, two tokens at place 143 are as likely as each other but for rounding.
PROMPTS = [prompt_of(20 + 13 * seed, seed=seed) for seed in range(8)]
START_S = 120.0
"""An engine may take so long to start, beside whatever else this machine does."""


def options(
    model: Path,
    runs: Path,
    *,
    alone: bool = False,
    move: bool = False,
    snapshot: SnapshotOptions | None = None,
) -> ReplicaOptions:
    vllm = VllmOptions(alone=alone, move=move, kv_bytes=64 << 20)
    return ReplicaOptions(
        model=str(model),
        run_dir=str(runs),
        decode=0 if alone else 1,
        vllm=vllm,
        kv_bytes=64 << 20,
        threads=1,
        snapshot=snapshot or SnapshotOptions(),
    )


def spans(replica: Replica) -> list[str]:
    replica.spans += replica.recorder.drain()
    return [span.name for span in replica.spans]


def pid_of(replica: Replica, role: str) -> int:
    (pid,) = (pid for name, pid in replica.pids.items() if name.startswith(role))
    return pid


def workers_of(replica: Replica, *clients: Client) -> set[str]:
    """Who has these requests now, by role."""
    open_ones = replica._router._requests
    found = (open_ones[c.request].worker for c in clients if c.request in open_ones)
    return {name.partition("-")[0] for name in found if name}


def vllm_is_up(replica: Replica) -> None:
    wait_for(replica, lambda: replica.staff["vllm"]["up"] == 1, START_S)


def nothing_held(replica: Replica) -> None:
    """No KV block is a request's, neither here nor over there."""

    def free() -> bool:
        replica.ask_usage()
        return replica.usage.get("kv_used") == 0

    wait_for(replica, free, 10)


def answers_natively(model: Path, runs: Path) -> list[tuple[Wish, Client]]:
    """What else a client may ask for, and what the native workers answer."""
    with Replica(ReplicaOptions(model=str(model), run_dir=str(runs), threads=1)) as replica:
        plain = ask(replica, PROMPTS[2], 24)
        finish(replica, plain)
        wishes: list[Wish] = [
            {"stop": (plain.text[len(plain.text) // 2 :][:3],)},
            {"stop_token_ids": (plain.tokens[7],)},
            {"logprobs": 3},
            {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
            {"temperature": 0.9, "seed": 7},
            {"temperature": 1.2, "seed": 8, "top_k": 30, "top_p": 0.9, "presence_penalty": 0.5},
            {"logit_bias": {plain.tokens[0]: -100.0}},
        ]
        clients = [ask(replica, PROMPTS[2], 24, **wish) for wish in wishes]
        finish(replica, *clients)
    return list(zip(wishes, clients, strict=True))
