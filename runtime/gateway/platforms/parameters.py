"""Parameters by the names that Hugging Face's and vLLM's servers take, as OpenAI's.

What is unknown passes on, to be ignored or refused where OpenAI's bodies are read. What is known
and cannot be done here is refused, unless its value says that it is not wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldframe.runtime.gateway.api import ApiError

__all__ = [
    "choice_text",
    "mapping",
    "messages",
    "openai_parameters",
    "prompts",
    "refused",
    "single",
    "switch",
]

_NAMES = {"max_new_tokens": "max_tokens", "stop_sequences": "stop", "num_return_sequences": "n"}

_NOT_PARAMETERS = {"model", "prompt", "messages", "stream", "stream_options"}
"""Fields of a body; inside `parameters` they have no meaning."""

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "adapter_id": (),
    "decoder_input_details": (False,),
    "grammar": (),
    "max_length": (),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "return_full_text": (False,),
    "top_n_tokens": (0,),
    "truncate": (),
    "typical_p": (1,),
    "watermark": (False,),
}
"""Names, and the values that ask for nothing (null is one everywhere)."""

_INSTEAD = {
    "adapter_id": "LoRA needs the vLLM engine.",
    "grammar": "Structured output needs the vLLM engine.",
    "max_length": "Give max_new_tokens.",
    "truncate": "Cut the prompt.",
}

MAX_PROMPTS = 64
"""In one body."""


def openai_parameters(given: Mapping[str, Any], *, greedy: bool = False) -> dict[str, Any]:
    """OpenAI's parameters for a platform's.

    Args:
        given: Names and values; null means that it is not given.
        greedy: Whether the likeliest tokens are taken where nothing asks to sample; else that is
            the model's default. This and `do_sample` are as in text-generation-inference
            (`NextTokenChooser`): whatever shapes the distribution asks to sample.

    Raises:
        ApiError: A parameter asks for what cannot be done, or two contradict one another.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or name in _NOT_PARAMETERS or name == "do_sample":
            continue
        if name in _UNSUPPORTED:
            if value not in _UNSUPPORTED[name]:
                raise refused(
                    f"{name} is not supported. {_INSTEAD.get(name, 'Leave it out.')}", name
                )
            continue
        known = _NAMES.get(name, name)
        if found.get(known, value) != value:
            raise refused(f"{name} contradicts another name of {known}.", name)
        found[known] = value
    sample = given.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise refused("do_sample must be true or false.", "do_sample")
    temperature = found.get("temperature")
    # Clients send do_sample false beside a temperature that they mean.
    sampled = sample or "top_k" in found or "top_p" in found
    if temperature is None and (greedy or sample is not None):
        found["temperature"] = 1 if sampled else 0
    elif temperature == 1 and sample is False and not sampled:
        found["temperature"] = 0
    return found


def mapping(value: object, name: str) -> dict[str, Any]:
    """A JSON object, empty where there is none.

    Raises:
        ApiError: It is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refused(f"{name} must be a JSON object.", name)
    return value


def switch(values: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false, false where there is none.

    Raises:
        ApiError: It is something else.
    """
    value = values.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise refused(f"{name} must be true or false.", name)
    return value


def prompts(value: object, name: str) -> list[str]:
    """One text or a list of texts.

    Raises:
        ApiError: It is something else, nothing, or too many.
    """
    items: list[Any] = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str) for item in items):
        raise refused(f"{name} must be a string or a list of strings.", name)
    if len(items) > MAX_PROMPTS:
        raise refused(f"{name} may have at most {MAX_PROMPTS} strings.", name)
    return items


def messages(value: object) -> bool:
    """Whether this looks like the messages of a chat."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and "role" in item for item in value)
    )


def single(items: int, body: Mapping[str, Any]) -> None:
    """Checks that a stream has one sequence in it.

    Raises:
        ApiError: It has several, and the platform's frames cannot tell them apart.
    """
    if items != 1 or body.get("n", 1) != 1:
        raise refused("A stream takes one prompt, and n = 1.", "stream")


def choice_text(choice: Mapping[str, Any]) -> str:
    """The text of a choice, of a chat's or a completion's answer or chunk."""
    if "text" in choice:
        return str(choice["text"] or "")
    message = choice.get("message") or choice.get("delta") or {}
    return str(message.get("content") or "")


def refused(message: str, name: str | None = None) -> ApiError:
    """The error for a body that is not as it must be."""
    return ApiError(400, message, param=name, code="invalid_value")
