"""A prompt as a worker takes it: its token ids, and how much may come of it."""

from __future__ import annotations

from dataclasses import replace

from coldframe.loader.errors import RequestError
from coldframe.runtime.handoff import Job
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker import Worker

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


def bounded(worker: Worker, job: Job, prompt_tokens: int) -> Job:
    """The job with a number of tokens to generate that the model's context has room for.

    Where none was asked for it is what there is room for, up to a limit: a request gets at its
    start all the KV that it can come to need, and a whole context for each would let few in.

    Raises:
        RequestError: There is no room.
    """
    left = worker.spec.context_length - prompt_tokens
    wanted = job.params.max_tokens
    if left < (wanted or 1):
        raise RequestError(
            "prompt and answer do not fit the model's context",
            where="prompt",
            expected=f"at most {worker.spec.context_length} tokens",
            got=f"{prompt_tokens} of prompt + {wanted or 1} to generate",
            hint="Shorten the prompt or ask for fewer tokens.",
        )
    if wanted is not None:
        return job
    room = worker.kv.blocks * BLOCK_TOKENS
    share = max(room // _SHARES, min(_FEW, room - prompt_tokens), 1)
    params = replace(job.params, max_tokens=min(left, share, _MOST_UNASKED))
    return replace(job, params=params)
