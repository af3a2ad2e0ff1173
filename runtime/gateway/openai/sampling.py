"""A request's sampling fields as the engine's parameters, one set for each choice.

What the request does not say, the checkpoint's generation_config does, and else OpenAI's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.params import MAX_STOPS, SamplingParams
from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.gateway.api import ApiError, ModelCard
from coldframe.runtime.gateway.openai.problems import (
    check_text,
    invalid,
    out_of_range,
    wrong_type,
)
from coldframe.runtime.gateway.openai.requests import MAX_BIASES, Request

__all__ = ["choices", "seed_of"]

_LOWEST_SEED = -(1 << 63)
_SEEDS = (1 << 63) + (1 << 64)
"""How many there are, from the lowest on."""

_DEFAULTS: Mapping[str, float] = MappingProxyType(
    {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
)
"""What a checkpoint may have other defaults for."""


def choices(
    request: Request,
    card: ModelCard,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    structured: Structure | None = None,
    stop: str | None = None,
) -> tuple[SamplingParams, ...]:
    """The parameters of each choice; they differ in the seed, where one is given.

    Args:
        request: The request.
        card: The model.
        max_tokens: Where the request says none; None for what the context leaves.
        logprobs: As SamplingParams has it.
        structured: What form the answer must have.
        stop: A text that ends the answer, besides the request's own.

    Raises:
        ApiError: A field is out of range.
    """
    if request.ignore_eos and structured is not None:  # what has a form ends with it
        raise invalid("ignore_eos", "false beside a form of the answer", True)
    wanted = request.max_completion_tokens or request.max_tokens
    params = SamplingParams(
        **{name: _value(request, card, name) for name in _DEFAULTS},
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=_bias(request.logit_bias),
        seed=request.seed,
        max_tokens=wanted or max_tokens,
        stop=_stops(request.stop) + (() if stop is None else (stop,)),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        structured=structured,
    )
    try:
        params.validate(card.vocab_size)
    except RequestError as error:
        raise _told(error, request) from None
    return tuple(replace(params, seed=seed_of(request.seed, i)) for i in range(request.n or 1))


def _value(request: Request, card: ModelCard, name: str) -> Any:
    value = getattr(request, name)
    if value is None:
        value = card.defaults.get(name)
    if value is None:
        value = _DEFAULTS[name]
    # To other servers -1 is all of them.
    return 0 if name == "top_k" and value == -1 else value


def seed_of(seed: int | None, choice: int) -> int | None:
    """The seed of one of several choices, where the request has one; each draws differently."""
    return None if seed is None else (seed + choice - _LOWEST_SEED) % _SEEDS + _LOWEST_SEED


def _stops(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (check_text("stop", stop),)
    if not isinstance(stop, list):
        raise wrong_type("stop", "a string or an array of strings", stop)
    if len(stop) > MAX_STOPS:
        raise invalid("stop", f"at most {MAX_STOPS} strings", stop)
    return tuple(check_text(f"stop[{i}]", text) for i, text in enumerate(stop))


def _bias(bias: object) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, dict):
        raise wrong_type("logit_bias", "an object from token ids to numbers", bias)
    if len(bias) > MAX_BIASES:
        raise invalid("logit_bias", f"at most {MAX_BIASES} token ids", bias)
    for key in bias:
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10):
            raise invalid("logit_bias", "token ids as keys", key)
        _check_bias(f"logit_bias.{key}", bias[key])
    return {int(key): value for key, value in bias.items()}


def _check_bias(path: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong_type(path, "a number", value)
    if not -100 <= value <= 100:
        raise invalid(path, "a number from -100 to 100", value)


def _told(error: RequestError, request: Request) -> ApiError:
    """An error of the sampler's, told to who made the mistake: the client, or the checkpoint."""
    where = error.where or ""
    if where in _DEFAULTS and getattr(request, where) is None:
        message = f"The checkpoint's generation_config is wrong: {error} Or mend the file."
        return ApiError(500, message, kind="server_error", param=where, code="model_error")
    param = where.replace("[", ".").rstrip("]")
    return out_of_range(param, error.expected, error.got)
