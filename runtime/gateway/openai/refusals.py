"""What a request may ask for that is not done here: a table, and the error, with who or what can.

To ignore one of these would be to answer another question than the one asked. Values that change
nothing are let through: clients send them without meaning it. Fields in neither this table nor the
models are hints, and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from coldframe.runtime.engine.params import MAX_LOGPROBS
from coldframe.runtime.gateway.api import ApiError

__all__ = ["REFUSALS", "Refusal", "refuse_unsupported", "unsupported"]

_SERVED = "the vLLM engine can: start the server with --decode native,vllm"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that is not supported.

    Args:
        what: What it asks for.
        harmless: The values that ask for nothing, besides null.
        hint: What can, or what to do instead; empty where there is neither.
        vllm: Whether it is served where the replica has a vLLM engine.
    """

    what: str
    harmless: tuple[Any, ...] = ()
    hint: str = ""
    vllm: bool = False

    def sentence(self) -> str:
        """What a client is told."""
        return f"{self.what} is not supported here" + (f"; {self.hint}." if self.hint else ".")


_STRUCTURED = Refusal("Structured output", hint=_SERVED, vllm=True)
_BACKEND = Refusal("Choosing how structured output is made", hint="leave it to the server")

_TOOLS_ELSEWHERE = Refusal("Tool calling", ("none",), hint="send it to /v1/chat/completions")

REFUSALS: Mapping[str, Refusal] = {
    "allowed_token_ids": Refusal("Restricting the vocabulary", hint="see logit_bias"),
    "audio": Refusal("Audio"),
    "bad_words": Refusal("Banning words", ([],)),
    "chat_template": Refusal(
        "A chat template in a request",
        hint="start the server with --chat-template FILE: nothing is run for a request",
    ),
    "continue_final_message": Refusal("Continuing the last message", (False,)),
    "documents": Refusal("Retrieval by the template", ([],), hint="put the texts in a message"),
    "echo": Refusal("Echoing the prompt", (False,)),
    "function_call": Refusal("Function calling", ("none",), hint="use tool_choice"),
    "functions": Refusal("Function calling", ([],), hint="use tools"),
    "guided_choice": _STRUCTURED,
    "guided_decoding_backend": _BACKEND,
    "guided_grammar": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_whitespace_pattern": _BACKEND,
    "include_stop_str_in_output": Refusal("A stop string in the answer", (False,)),
    "logits_processors": Refusal("A logits processor", ([],), hint="nothing is run for a request"),
    "min_tokens": Refusal("A least number of tokens", (0,)),
    "modalities": Refusal("An answer other than text", (["text"],)),
    "prompt_embeds": Refusal("A prompt of embeddings"),
    "prompt_logprobs": Refusal("Reporting log-probabilities of the prompt"),
    "response_format": replace(_STRUCTURED, harmless=({"type": "text"},)),
    "skip_special_tokens": Refusal("Showing special tokens in the answer", (True,)),
    "structured_outputs": _STRUCTURED,
    "suffix": Refusal("Filling in before a suffix", ("",), hint="send the text before it alone"),
    "tool_choice": _TOOLS_ELSEWHERE,
    "tools": replace(_TOOLS_ELSEWHERE, harmless=([],)),
    "truncate_prompt_tokens": Refusal("Cutting the prompt", hint="send a shorter one"),
    "use_beam_search": Refusal("Beam search", (False,)),
    "web_search_options": Refusal("Web search"),
}
"""Most are asked of one kind of request only; asked of the other, they are not meant otherwise."""


def refuse_unsupported(body: Mapping[str, Any], *, vllm: bool = False, chat: bool = False) -> None:
    """Refuse a body that asks for what there is not.

    Args:
        body: The request.
        vllm: Whether the replica has a vLLM engine.
        chat: Whether it is a chat, which may offer tools.

    Raises:
        ApiError: 400, code `unsupported`.
    """
    for name, refusal in REFUSALS.items():
        if (refusal.vllm and vllm) or (chat and name in ("tools", "tool_choice")):
            continue
        value = body.get(name)
        if value is not None and not any(_same(value, good) for good in refusal.harmless):
            raise unsupported(name, refusal)
    for name in ("logprobs", "top_logprobs"):
        value = body.get(name)
        if isinstance(value, int) and value > MAX_LOGPROBS:
            raise unsupported(name, _too_many(name))


def unsupported(param: str, refusal: Refusal) -> ApiError:
    """The error of a field, by its dotted path, that asks for what there is not."""
    return ApiError(400, refusal.sentence(), param=param, code="unsupported")


def _same(value: object, good: object) -> bool:
    # To Python, 0 is False and 1 is True.
    return type(value) is type(good) and value == good


def _too_many(name: str) -> Refusal:
    return Refusal(f"'{name}' over {MAX_LOGPROBS}", hint=f"ask for at most {MAX_LOGPROBS}")
