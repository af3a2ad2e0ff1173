"""A prompt as a worker takes it: its token ids, and how much may come of it."""

from __future__ import annotations

from dataclasses import replace

from coldframe.loader.errors import RequestError
from coldframe.runtime.worker.handoff import Job
from coldframe.runtime.worker.worker import Worker

__all__ = ["bounded", "token_ids"]

_MOST_UNASKED = 4096
"""Tokens that an answer gets at most where the request says no number."""
_SHARES = 8
"""Of all KV such a request gets at most so small a part..."""
_FEW = 256
"""... unless that is less than this many tokens."""


def token_ids(worker: Worker, job: Job, *, in_background: bool = False) -> tuple[int, ...]:
    """The prompt's ids, checked against the model.

    Raises:
        RequestError: There are none, too many, or some that the model does not have.
    """
    spec = worker.spec
    ids = job.prompt_ids
    if ids is None:
        encode = worker.tokenizer.encode
        text, special = job.prompt or "", job.add_special
        ids = tuple(encode(text, add_special=special, in_background=in_background))
    if not ids:
        raise RequestError(
            "the prompt has no tokens", where="prompt", expected="at least one", got="none"
        )
    job.params.validate(spec.vocab_size)
    outside = [i for i in ids if type(i) is not int or not 0 <= i < spec.vocab_size]
    if outside:
        raise RequestError(
            "a token id is out of range",
            where="prompt",
            expected=f"0 to {spec.vocab_size - 1}",
            got=repr(outside[0]),
            hint="Tokenise the prompt with this model's tokenizer.",
        )
    return ids


def bounded(job: Job, prompt_tokens: int, context: int, room: int | None = None) -> Job:
    """The job with a number of tokens to generate that the context has room for.

    Where none was asked for it is what there is room for, up to a limit. What has a token already
    is not refused any more: its answer ends at the context.

    Args:
        job: The request.
        prompt_tokens: Of its prompt.
        context: The longest sequence that can be served, in tokens.
        room: Tokens in all KV of an engine that gives a request at its start all the KV that it
            can come to need, where a whole context for each would let few in; None where KV is
            given as it is filled.

    Raises:
        RequestError: There is no room.
    """
    left = context - prompt_tokens
    wanted = job.params.max_tokens
    if wanted is not None and wanted > left > len(job.generated_ids) > 0:
        return replace(job, params=replace(job.params, max_tokens=left))
    if left < (wanted or 1):
        raise RequestError(
            "prompt and answer do not fit the model's context",
            where="prompt",
            expected=f"at most {context} tokens",
            got=f"{prompt_tokens} of prompt + {wanted or 1} to generate",
            hint="Shorten the prompt or ask for fewer tokens.",
        )
    if wanted is not None:
        return job
    most = min(left, _MOST_UNASKED)
    if room is not None:
        most = min(most, max(room // _SHARES, min(_FEW, room - prompt_tokens), 1))
    return replace(job, params=replace(job.params, max_tokens=most))
