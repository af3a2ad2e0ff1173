"""The prompt of a completion, in each of OpenAI's four forms: text or token ids, one or several."""

from __future__ import annotations

from collections.abc import Sequence

from coldframe.runtime.gateway.api import ApiError, ModelCard
from coldframe.runtime.gateway.openai.problems import check_text, invalid, wrong_type
from coldframe.runtime.gateway.openai.requests import MAX_SEQUENCES

__all__ = ["Prompt", "read_prompts"]

Prompt = str | tuple[int, ...]

_FORMS = "a string, an array of strings, an array of token ids or an array of such arrays"


def read_prompts(prompt: object, card: ModelCard) -> tuple[Prompt, ...]:
    """The prompts that a field is.

    Args:
        prompt: The field's value.
        card: The model, for the range of ids and for the most of them.

    Raises:
        ApiError: It is none, or has ids that the model has not.
    """
    if isinstance(prompt, str):
        return (check_text("prompt", prompt),)
    if not isinstance(prompt, list):
        raise wrong_type("prompt", _FORMS, prompt)
    if not prompt:
        raise invalid("prompt", "at least one prompt", prompt)
    if isinstance(prompt[0], int):
        return (_ids(prompt, "prompt", card),)
    if len(prompt) > MAX_SEQUENCES:
        raise invalid("prompt", f"at most {MAX_SEQUENCES} prompts", prompt)
    if isinstance(prompt[0], str):
        return tuple(check_text(f"prompt[{i}]", text) for i, text in enumerate(prompt))
    return tuple(_ids(ids, f"prompt[{i}]", card) for i, ids in enumerate(prompt))


def _ids(ids: object, path: str, card: ModelCard) -> tuple[int, ...]:
    if not isinstance(ids, list):
        raise wrong_type(path, _FORMS if path == "prompt[0]" else "an array of token ids", ids)
    if not ids:
        raise invalid(path, "at least one token id", ids)
    if len(ids) >= card.context_length:
        raise too_long(card, len(ids), 1, path)
    _check_ids(ids, path, card.vocab_size)
    return tuple(ids)


def _check_ids(ids: Sequence[object], path: str, vocab_size: int) -> None:
    for place, token in enumerate(ids):
        # bool is an int to Python.
        if type(token) is not int:
            raise wrong_type(f"{path}[{place}]", "a token id", token)
        if not 0 <= token < vocab_size:
            raise invalid(f"{path}[{place}]", f"a token id from 0 to {vocab_size - 1}", token)


def too_long(card: ModelCard, prompt: int, answer: int, param: str) -> ApiError:
    """Prompt and answer, both in tokens, do not fit the model's context."""
    message = (
        f"This model's context is {card.context_length} tokens, but {prompt + answer} were asked "
        f"for: {prompt} of prompt and {answer} to generate. Shorten the prompt or ask for fewer."
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")
