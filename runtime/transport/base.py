"""A request whose KV is given away, and taken over: what both replicas' fronts make of it.

    given = []
    prefill.submit(params, listener, prompt_ids=ids, give=True)
        # `on_token` gets the first token as ever. Where that does not end the answer, `on_given`
        # gets a `Given`, and the request is over for this replica, but for its blocks: the memory
        # service keeps them until they are taken, or for `ReplicaOptions.give_ttl_s`.
        # `cancel` takes a given request back as well; `Replica.given` counts those not taken yet.

    body = given.to_params()                  # JSON values, as Dynamo's `kv_transfer_params`
    given = Given.from_params(body)           # None where there is nothing of ours in it

    decode.submit(params, listener, prompt_ids=ids, kv=given)
        # Tokens from the first that `generated_ids` does not have. The KV is brought by the first
        # way that both sides can go; where none can, or the sender is gone, it is computed again:
        # slower, and the same answer.

How KV gets from one memory service to the other is `coldframe.loader.transport`'s. What a
`Given` says is held against the request that it comes with: KV of other tokens, of other weights or
in another format is never used.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from coldframe.loader.errors import RequestError, TransferRefused
from coldframe.loader.transport.base import Ticket
from coldframe.runtime.worker.handoff import Handoff, Job

__all__ = ["KEY", "Given", "Taken"]

KEY = "coldframe"
"""Under it stands in `kv_transfer_params` what is ours."""
VERSION = 1
_DO = "take"
_MOST_FIRST = 1 << 16


class Taken(Protocol):
    """A listener of a request that is given away, beside `Listener`."""

    def on_given(self, given: Given) -> None: ...


@dataclass(frozen=True, slots=True)
class Given:
    """A request that another replica is to go on with.

    Args:
        tokens: `digest_of` those that there is KV of.
        kv_tokens: How many these are: all of prompt and `first`, but for the last one.
        first: Tokens that the sender has made.
        seed: That they were drawn with; whoever goes on with it draws as the sender would have.
        fingerprint: Of the checkpoint whose weights made the KV.
        kv_format: See `coldframe.runtime.worker.prefix.kv_format`.
        ticket: For its KV; None where there is none, so that it has to be computed.
    """

    tokens: str
    kv_tokens: int
    first: tuple[int, ...]
    seed: int | None
    fingerprint: str
    kv_format: str
    ticket: Ticket | None

    @classmethod
    def of(cls, handoff: Handoff, ticket: Ticket | None) -> Given:
        """What is to be said of a request that a worker has handed over."""
        job = handoff.job
        ids = [*(job.prompt_ids or ()), *job.generated_ids]
        return cls(
            digest_of(ids[: handoff.kv_tokens]),
            handoff.kv_tokens,
            job.generated_ids,
            job.params.seed,
            handoff.fingerprint,
            handoff.kv_format,
            ticket,
        )

    @classmethod
    def nothing(cls) -> Given:
        """What stands for it where no other replica has begun with a request."""
        return cls(digest_of(()), 0, (), None, "", "", None)

    def handoff(self, job: Job) -> Handoff:
        """The request as a worker here is to get it.

        Args:
            job: What is asked for, its prompt tokenised.

        Raises:
            TransferRefused: The KV is that of other tokens.
        """
        ids = [*(job.prompt_ids or ()), *job.generated_ids]
        there = [*(job.prompt_ids or ()), *self.first]
        if self.ticket is not None and digest_of(there[: self.kv_tokens]) != self.tokens:
            raise TransferRefused(
                "this KV is that of other tokens",
                where=job.request,
                expected=self.tokens,
                got=digest_of(there[: self.kv_tokens]),
            )
        kv_tokens = 0 if self.ticket is None else min(self.kv_tokens, len(ids) - 1)
        ticket = None if self.ticket is None or not kv_tokens else self.ticket.to_wire()
        return Handoff(job, self.fingerprint, self.kv_format, (), kv_tokens, "", ticket)

    def to_params(self) -> dict[str, Any]:
        """As `kv_transfer_params`: JSON values."""
        return {
            KEY: {
                "version": VERSION,
                "do": _DO,
                "tokens": self.tokens,
                "kv_tokens": self.kv_tokens,
                "first": list(self.first),
                "seed": self.seed,
                "fingerprint": self.fingerprint,
                "kv_format": self.kv_format,
                "ticket": None if self.ticket is None else self.ticket.to_wire(),
            }
        }

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> Given | None:
        """What `kv_transfer_params` say; None where nothing of ours is in them.

        Raises:
            RequestError: They cannot be understood.
            TransferRefused: The ticket is none.
        """
        data = (params or {}).get(KEY)
        if data is None:
            return None
        if not isinstance(data, Mapping) or (data.get("version"), data.get("do")) != (VERSION, _DO):
            raise _not_understood("version and what to do", (VERSION, _DO))
        first, seed, ticket = data.get("first"), data.get("seed"), data.get("ticket")
        kv_tokens, told = data.get("kv_tokens"), [data.get(name) for name in _TEXTS]
        if not isinstance(first, list) or len(first) > _MOST_FIRST or not all(map(_is_id, first)):
            raise _not_understood("first", "token ids")
        if not _is_id(kv_tokens) or not (seed is None or _is_number(seed)):
            raise _not_understood("kv_tokens and seed", "numbers")
        if not all(isinstance(text, str) and len(text) < 512 for text in told):
            raise _not_understood(", ".join(_TEXTS), "text")
        tokens, fingerprint, kv_format = map(str, told)
        return cls(
            tokens,
            int(kv_tokens or 0),
            tuple(first),
            seed,
            fingerprint,
            kv_format,
            None if ticket is None else Ticket.from_wire(ticket),
        )


_TEXTS = ("tokens", "fingerprint", "kv_format")


def digest_of(token_ids: Sequence[int]) -> str:
    """Tells token ids from others."""
    return blake2b(array("I", token_ids).tobytes(), digest_size=16).hexdigest()


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1 << 32


def _not_understood(where: str, expected: object) -> RequestError:
    return RequestError(
        "KV transfer parameters that cannot be understood",
        where=f"kv_transfer_params.{KEY}.{where}",
        expected=expected,
        hint="Run one version of coldframe on both sides.",
    )
