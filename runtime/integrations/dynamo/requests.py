"""A request as Dynamo's preprocessor makes it, to generations; what there is not, is refused.

The front end has tokenised the prompt, filled in the chat template and put in the model's own
end-of-text tokens. What a request does not say, the checkpoint's generation_config does, and else
OpenAI's defaults, as with our own gateway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.gateway.api import ApiError, Generation, ModelCard
from coldframe.runtime.gateway.openai.sampling import seed_of

__all__ = ["generations_of"]

_DEFAULTS: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What a checkpoint may have other defaults for."""

_UNSUPPORTED: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "sampling_options": {
        "best_of": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "include_stop_str_in_output": (False,),
        "allowed_token_ids": ([],),
        "bad_words_token_ids": ([],),
    },
    "stop_conditions": {"min_tokens": (0,), "max_thinking_tokens": ()},
    "output_options": {"prompt_logprobs": ()},
    "": {
        "prompt_embeds": (),
        "multi_modal_data": ({},),
        "encoder_result": (),
        "generate_request": (),
    },
}
"""By the object that they stand in: what is not supported, with values that ask for nothing."""
_STRUCTURED = ("json", "regex", "choice", "grammar")
_OTHER_FORMS = ("structural_tag", "whitespace_pattern", "backend")


def generations_of(request: Mapping[str, Any], card: ModelCard) -> tuple[Generation, ...]:
    """The sequences that a request asks for: one for each choice.

    Args:
        request: Dynamo's `PreprocessedRequest`, as JSON values.
        card: The model.

    Raises:
        ApiError: It asks for what there is not, or is none (400).
    """
    prompt = request.get("token_ids")
    if not isinstance(prompt, list) or not prompt:
        raise _wrong("token_ids", "the prompt's token ids, at least one", prompt)
    _refuse(request)
    try:
        params = _params(request, card)
        params.validate(card.vocab_size)
    except RequestError as error:
        raise ApiError.of(error) from None
    answer = params.max_tokens or 1
    if len(prompt) + answer > card.context_length:
        raise ApiError(
            400,
            f"This model's context is {card.context_length} tokens; the prompt has {len(prompt)} "
            f"and the answer may have {answer}.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    ids = tuple(prompt)
    count = _part(request, "sampling_options").get("n") or 1
    seeds = [seed_of(params.seed, choice) for choice in range(count)]
    return tuple(Generation(ids, replace(params, seed=seed)) for seed in seeds)


def _params(request: Mapping[str, Any], card: ModelCard) -> SamplingParams:
    sampling, stops = _part(request, "sampling_options"), _part(request, "stop_conditions")
    hidden = stops.get("stop_token_ids_hidden") or ()
    ignore_eos = bool(stops.get("ignore_eos"))
    return SamplingParams(
        **{name: _value(sampling, card, name) for name in _DEFAULTS},
        frequency_penalty=sampling.get("frequency_penalty") or 0.0,
        presence_penalty=sampling.get("presence_penalty") or 0.0,
        logit_bias=_bias(sampling.get("logit_bias")),
        seed=sampling.get("seed"),
        max_tokens=stops.get("max_tokens"),
        stop=tuple(stops.get("stop") or ()),
        stop_token_ids=tuple(
            dict.fromkeys([*(stops.get("stop_token_ids") or ()), *(() if ignore_eos else hidden)])
        ),
        ignore_eos=ignore_eos,
        logprobs=_part(request, "output_options").get("logprobs"),
        structured=_structure(sampling.get("guided_decoding"), card),
    )


def _value(sampling: Mapping[str, Any], card: ModelCard, name: str) -> Any:
    value = sampling.get(name)
    if value is None:
        value = card.defaults.get(name)
    if value is None:
        value = _DEFAULTS[name]
    # To other servers -1 is all of them.
    return 0 if name == "top_k" and value == -1 else value


def _bias(bias: object) -> dict[int, float]:
    if bias is None:
        return {}
    try:
        return {int(token): value for token, value in dict(bias).items()}  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise _wrong("sampling_options.logit_bias", "numbers by token id", bias) from None


def _structure(guided: object, card: ModelCard) -> Structure | None:
    if not isinstance(guided, Mapping):
        return None
    for name in _OTHER_FORMS:
        if guided.get(name) is not None:
            raise _unsupported(f"guided_decoding.{name}")
    wanted = [name for name in _STRUCTURED if guided.get(name) is not None]
    if not wanted:
        return None
    if not card.vllm:
        raise _unsupported("guided_decoding", "Start the worker with --decode native,vllm.")
    if len(wanted) > 1:
        raise _wrong("guided_decoding", "one form of the answer", ", ".join(wanted))
    (name,), value = wanted, guided[wanted[0]]
    spec = value if isinstance(value, str) else json.dumps(value)
    return Structure(name, spec)  # type: ignore[arg-type]


def _refuse(request: Mapping[str, Any]) -> None:
    for part, names in _UNSUPPORTED.items():
        values = _part(request, part) if part else request
        for name, harmless in names.items():
            value = values.get(name)
            if value is not None and value not in harmless:
                raise _unsupported(f"{part}.{name}" if part else name)
    if _part(request, "routing").get("lora_name"):
        raise _unsupported("routing.lora_name")


def _part(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = request.get(name)
    return part if isinstance(part, Mapping) else {}


def _unsupported(where: str, hint: str = "Leave it out.") -> ApiError:
    name = where.rpartition(".")[2]
    message = f"{name!r} is not supported here. {hint}"
    return ApiError(400, message, param=where, code="unsupported")


def _wrong(where: str, expected: str, got: object) -> ApiError:
    shown = repr(got)[:100]
    return ApiError(
        400, f"{where}: expected {expected}, got {shown}", param=where, code="invalid_value"
    )
