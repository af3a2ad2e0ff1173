"""What a request says to vLLM of its KV: where it comes from, and that it is to be handed on.

vLLM passes a request's `kv_transfer_params`, a dict of JSON values, on to its KV connector. Ours
has one key, `coldframe`, whose value is one of these, by its `do`:

    consume    the request's KV is in the arena under (request, attempt): claim and copy it
    produce    once the request is over its KV is to be in the arena, for whoever takes it next
    handoff    on the output of such a request: a `Handoff`, as another worker takes it

The prompt that vLLM is given is not told by the parameters but by `prompt_of`; both must be of the
same mode. A digest of the tokens goes along, so that KV never answers for other tokens than it is
of. Without torch and vLLM: the front makes and reads these.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.integrations.vllm.fingerprint import Fingerprint
from coldframe.runtime.worker.handoff import Handoff, Job

__all__ = [
    "Consume",
    "KEY",
    "Mode",
    "Outcome",
    "Produce",
    "VERSION",
    "consume",
    "digest_of",
    "handed",
    "mode_of",
    "parse",
    "produce",
    "prompt_of",
    "read_handed",
]

KEY = "coldframe"
VERSION = 1

Mode = Literal["fast", "exact"]
"""How vLLM gets the part of an answer that is there. *Fast*: it stands behind the prompt, and the
next token is computed. *Exact*: vLLM draws again what prefill has drawn, in its own way, and counts
it as answer itself; of a hand-off the last token is left out of the prompt, and there is KV of all
that stands before it."""


@dataclass(frozen=True, slots=True)
class Consume:
    """A request whose KV is in the arena.

    Args:
        request: The ledger's name of it.
        attempt: The receiver's.
        kv_tokens: Tokens from the first that there is KV of, and that this prompt has.
        tokens: `digest_of` those.
        model: Fingerprint of the checkpoint whose weights made the KV.
        kv_format: See `prefix.kv_format`.
        domain: The device whose arena has it.
        made_by: Of the engine that made the KV, where it says so.
        made_for: Of the engine that is to take it, as the sender knows it.
        checksums: xxh3 of each layer's keys and values, where the maker gives them; see
            `kv_pages.checksum`.
    """

    request: str
    attempt: int
    kv_tokens: int
    tokens: str
    model: str
    kv_format: str
    domain: str
    made_by: Fingerprint | None = None
    made_for: Fingerprint | None = None
    checksums: tuple[str, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "do": "consume",
            "request": self.request,
            "attempt": self.attempt,
            "kv_tokens": self.kv_tokens,
            "tokens": self.tokens,
            "model": self.model,
            "kv_format": self.kv_format,
            "domain": self.domain,
            "made_by": None if self.made_by is None else self.made_by.to_wire(),
            "made_for": None if self.made_for is None else self.made_for.to_wire(),
            "checksums": list(self.checksums),
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Consume:
        return cls(
            str(data["request"]),
            int(data["attempt"]),
            int(data["kv_tokens"]),
            str(data["tokens"]),
            str(data["model"]),
            str(data["kv_format"]),
            str(data["domain"]),
            _fingerprint(data.get("made_by")),
            _fingerprint(data.get("made_for")),
            tuple(str(checksum) for checksum in data.get("checksums") or ()),
        )


@dataclass(frozen=True, slots=True)
class Produce:
    """A request whose KV is to be handed on.

    Args:
        job: It, as the next worker is to get it; what vLLM generates is added to its tokens. Its
            `max_tokens` is the whole answer's, whatever vLLM is asked for: blocks for all of it are
            got at once.
        opens: Whether vLLM's process is to open the request with the ledger. Where a router has
            done that already it is not. What it opens is over when its process ends.
        checksums: Whether the hand-off is to have them.
    """

    job: Job
    opens: bool = False
    checksums: bool = False

    def to_wire(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "do": "produce",
            "job": self.job.to_wire(),
            "opens": self.opens,
            "checksums": self.checksums,
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Produce:
        checksums = bool(data.get("checksums", False))
        return cls(Job.from_wire(dict(data["job"])), bool(data.get("opens", False)), checksums)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has come of a request that was to be handed on.

    Args:
        handoff: For the next worker; None where the KV could not be put into the arena.
        made_by: The engine that made it.
        why: Why there is none, for people.
        checksums: See `Consume`.
    """

    handoff: Handoff | None
    made_by: Fingerprint | None = None
    why: str | None = None
    checksums: tuple[str, ...] = ()


def consume(
    handoff: Handoff,
    mode: Mode,
    *,
    made_by: Fingerprint | None = None,
    made_for: Fingerprint | None = None,
    checksums: Sequence[str] = (),
) -> dict[str, Any]:
    """A request's `kv_transfer_params` that have vLLM take its KV over.

    Args:
        handoff: What another worker has handed over; its KV may be of a part of its tokens.
        mode: See `Mode`; the prompt is that of `prompt_of` with the same one.
        made_by: The engine that made the KV, where it is known. What the hand-off says of the model
            and the format is looked at in any case.
        made_for: What the taker has told of itself at its start. Where another engine gets the
            request instead it computes the KV itself.
        checksums: See `Consume`.

    Returns:
        JSON values.
    """
    prompt = prompt_of(handoff, mode)
    kv_tokens = min(handoff.kv_tokens, len(prompt) - 1)
    asked = Consume(
        handoff.job.request,
        handoff.job.attempt,
        kv_tokens,
        digest_of(prompt[:kv_tokens]),
        handoff.fingerprint,
        handoff.kv_format,
        handoff.domain,
        made_by,
        made_for,
        # They are of all tokens; of fewer they say nothing.
        tuple(checksums) if kv_tokens == handoff.kv_tokens else (),
    )
    return {KEY: asked.to_wire()}


def prompt_of(handoff: Handoff, mode: Mode) -> list[int]:
    """The token ids that vLLM gets as its prompt.

    Raises:
        RequestError: The request's prompt has not been tokenised.
    """
    job = handoff.job
    if not job.prompt_ids:
        raise RequestError("a hand-off without its prompt's tokens", where=job.request)
    ids = [*job.prompt_ids, *job.generated_ids]
    return ids[:-1] if mode == "exact" and job.generated_ids else ids


def mode_of(params: SamplingParams, *, shared_sampler: bool) -> Mode:
    """The mode in which a request's tokens are those that one engine alone would have drawn.

    A grammar begins with the answer, so it has to see all of it. Our sampler need not: it is told
    which tokens of vLLM's prompt are the answer's, and draws by their positions. To vLLM's own what
    stands in the prompt is no answer; so where it counts tokens (penalties), or draws, all of the
    answer must be its own.

    Args:
        params: The request's.
        shared_sampler: Whether vLLM draws with our sampler (`sampler`), as in a replica.
    """
    if params.structured is not None:
        return "exact"
    greedy = params.temperature == 0 and not params.changes_logits
    return "fast" if shared_sampler or greedy else "exact"


def produce(job: Job, *, opens: bool = False, checksums: bool = False) -> dict[str, Any]:
    """A request's `kv_transfer_params` that have vLLM hand it on when it is over; see `Produce`."""
    return {KEY: Produce(job, opens, checksums).to_wire()}


def handed(outcome: Outcome) -> dict[str, Any]:
    """The `kv_transfer_params` of an output."""
    made = None if outcome.made_by is None else outcome.made_by.to_wire()
    return {
        KEY: {
            "version": VERSION,
            "do": "handoff",
            "handoff": None if outcome.handoff is None else outcome.handoff.to_wire(),
            "made_by": made,
            "why": outcome.why,
            "checksums": list(outcome.checksums),
        }
    }


def read_handed(params: Mapping[str, Any] | None) -> Outcome | None:
    """What an output's `kv_transfer_params` say; None where they say nothing of ours.

    Raises:
        RequestError: They are not as they should be.
        ReplicaError: The hand-off is of another version.
    """
    data = _ours(params)
    if data is None or data.get("do") != "handoff":
        return None
    handoff = data.get("handoff")
    return Outcome(
        None if handoff is None else Handoff.from_wire(handoff),
        _fingerprint(data.get("made_by")),
        data.get("why"),
        tuple(data.get("checksums") or ()),
    )


def parse(params: Mapping[str, Any] | None) -> Consume | Produce | None:
    """What a request's `kv_transfer_params` ask for; None where they ask nothing of us.

    Raises:
        RequestError: They cannot be understood.
    """
    data = _ours(params)
    if data is None:
        return None
    kinds: dict[str, type[Consume] | type[Produce]] = {"consume": Consume, "produce": Produce}
    kind = kinds.get(str(data.get("do")))
    if kind is None:
        raise RequestError(
            "unknown KV transfer",
            where=f"kv_transfer_params.{KEY}.do",
            expected=" or ".join(kinds),
            got=data.get("do"),
        )
    try:
        return kind.from_wire(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(
            "KV transfer parameters that cannot be understood",
            where=f"kv_transfer_params.{KEY}",
            got=repr(error),
        ) from error


def digest_of(token_ids: Sequence[int]) -> str:
    """Tells token ids from others."""
    return blake2b(array("I", token_ids).tobytes(), digest_size=16).hexdigest()


def _ours(params: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    data = (params or {}).get(KEY)
    if data is None:
        return None
    if not isinstance(data, Mapping) or data.get("version") != VERSION:
        raise RequestError(
            "KV transfer parameters of another version",
            where=f"kv_transfer_params.{KEY}",
            expected=f"version {VERSION}",
            got=data.get("version") if isinstance(data, Mapping) else repr(data)[:100],
            hint="Run one version of coldframe in the whole replica.",
        )
    return data


def _fingerprint(data: Any) -> Fingerprint | None:
    return None if data is None else Fingerprint.from_wire(data)
