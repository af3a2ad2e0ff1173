"""What travels when a request goes from one worker to another.

A `Job` is a request on its way into a worker that will compute: everything that is needed to go
on with it from its token ids alone. A `Handoff` is a job whose keys and values are in the KV arena
of a device already, up to its last token. As sampling depends on (seed, position) only, and text on
the token ids only, neither carries any other state.

The protocol, with the front's router between the workers:

    prefill  drops its hold on the KV (a lease starts), sends `handoff`
    router   forwards it to a decode worker
    decode   claims the blocks, or has them brought to its own device where they are on another;
             answers `ack`; a repeated (request, attempt) is answered again
    router   tells the prefill worker, which stops renewing the lease

Where the receiver dies before its `ack`, the router sends the same hand-off to another with the
next attempt. A decode worker that is to give a request to another engine (`move`) is a sender like
a prefill worker. Where it dies later, the router adds the tokens it has seen, and does the same.
Where the KV is gone, whoever gets the request computes it again from the ids. A token that the
router has seen says that all before it is in the KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import ReplicaError
from coldframe.runtime.engine.params import SamplingParams

__all__ = ["Handoff", "Job", "RENEW_S", "VERSION"]

VERSION = 4
RENEW_S = 5.0
"""How often a sender renews the leases of what was not acknowledged yet, in seconds."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request, as a worker gets it.

    Args:
        request: Its id.
        attempt: Counts the times that it was given to a worker; the latest one is the true one.
        params: Sampling, with the seed drawn.
        prompt: The prompt as text, where it has not been tokenised yet.
        prompt_ids: The prompt's token ids, where it has.
        generated_ids: Tokens that the client has, or is about to get.
        add_special: Whether the tokenizer puts its own tokens around the prompt's text; a chat
            template has put them there already.
    """

    request: str
    attempt: int
    params: SamplingParams
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    generated_ids: tuple[int, ...] = ()
    add_special: bool = True

    def to_wire(self) -> dict[str, Any]:
        return {
            "request": self.request,
            "attempt": self.attempt,
            "params": self.params.to_wire(),
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            "generated_ids": self.generated_ids,
            "add_special": self.add_special,
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Job:
        ids = data["prompt_ids"]
        return cls(
            data["request"],
            data["attempt"],
            SamplingParams.from_wire(data["params"]),
            data["prompt"],
            None if ids is None else tuple(ids),
            tuple(data["generated_ids"]),
            data["add_special"],
        )


@dataclass(frozen=True, slots=True)
class Handoff:
    """A job with its KV.

    Args:
        job: The request, its prompt tokenised.
        fingerprint: Of the checkpoint whose weights made the KV, however they lay in memory.
        kv_format: Layout, dtype and block size of the KV.
        blocks: The KV blocks, from the first token on.
        kv_tokens: Tokens whose keys and values are in them: all but the last one, where the request
            has been computed so far.
        domain: The device that has them: a worker on another one reaches them by a copy only. Empty
            where they are in another replica.
        ticket: For its KV in another replica (`coldframe.loader.transport`), where it is there.
    """

    job: Job
    fingerprint: str
    kv_format: str
    blocks: tuple[int, ...]
    kv_tokens: int
    domain: str
    ticket: dict[str, Any] | None = None

    @property
    def whole(self) -> bool:
        """Whether no more than the last token is to be computed."""
        return self.kv_tokens == len(self.job.prompt_ids or ()) + len(self.job.generated_ids) - 1

    @property
    def foreign(self) -> bool:
        """Whether it comes from another replica, so that nobody of this one vouches for it."""
        return not self.domain

    def to_wire(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "job": self.job.to_wire(),
            "fingerprint": self.fingerprint,
            "kv_format": self.kv_format,
            "blocks": self.blocks,
            "kv_tokens": self.kv_tokens,
            "domain": self.domain,
            "ticket": self.ticket,
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Handoff:
        """The hand-off that another process sent.

        Raises:
            ReplicaError: It speaks another version.
        """
        if data.get("version") != VERSION:
            raise ReplicaError(
                "a hand-off of another version",
                expected=VERSION,
                got=data.get("version"),
                hint="Run one version of coldframe in the whole replica.",
            )
        return cls(
            Job.from_wire(data["job"]),
            data["fingerprint"],
            data["kv_format"],
            tuple(data["blocks"]),
            data["kv_tokens"],
            data["domain"],
            data["ticket"],
        )
