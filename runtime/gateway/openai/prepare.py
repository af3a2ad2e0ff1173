"""A body to generations, with all that is needed to shape their answer later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from coldframe.loader.errors import ColdframeError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.gateway.api import ApiError, Generation, ModelCard
from coldframe.runtime.gateway.openai.forms import structure_of
from coldframe.runtime.gateway.openai.messages import template_variables
from coldframe.runtime.gateway.openai.problems import invalid, missing
from coldframe.runtime.gateway.openai.prompts import Prompt, read_prompts, too_long
from coldframe.runtime.gateway.openai.refusals import Refusal, refuse_unsupported, unsupported
from coldframe.runtime.gateway.openai.requests import (
    MAX_SEQUENCES,
    ChatRequest,
    CompletionRequest,
    Request,
    as_object,
    read,
)
from coldframe.runtime.gateway.openai.sampling import choices
from coldframe.runtime.gateway.openai.tools import ToolUse, tool_use

__all__ = ["Kind", "Prepared", "Render", "prepare_chat", "prepare_completion"]

Kind = Literal["completion", "chat"]
Render = Callable[[str, Mapping[str, Any]], str]
"""A sandboxed template engine: a template's source and its variables to text."""

_COMPLETION_TOKENS = 16
"""What a completion gets where it does not say, as OpenAI's do."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request, ready for the engine.

    Args:
        kind: Which API it came by.
        generations: Its sequences: the choices of the first prompt, then those of the next.
        n: Choices for each prompt.
        stream: Whether the answer goes out piece by piece.
        include_usage: Whether a stream ends with the numbers of tokens.
        logprobs: Whether the answer has log-probabilities.
        tools: What tools a chat's answer may call.
        token_ids: Whether the answer has its tokens' ids.
    """

    kind: Kind
    generations: tuple[Generation, ...]
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool
    tools: ToolUse | None = None
    token_ids: bool = False


def prepare_completion(body: object, card: ModelCard) -> Prepared:
    """The generations of a body of /v1/completions.

    Args:
        body: Any JSON value.
        card: The model that it is for.

    Raises:
        ApiError: The body is wrong, or asks for what is not supported.
    """
    fields = as_object(body)
    refuse_unsupported(fields, vllm=card.vllm)
    request = read(CompletionRequest, fields)
    if request.prompt is None:
        raise missing("prompt")
    _check_best_of(request)
    params = choices(
        request,
        card,
        max_tokens=_COMPLETION_TOKENS,
        logprobs=request.logprobs,
        structured=structure_of(fields),
    )
    prompts = read_prompts(request.prompt, card)
    if len(prompts) * len(params) > MAX_SEQUENCES:
        expected = f"at most {MAX_SEQUENCES} sequences, n times the prompts"
        raise invalid("n", expected, len(prompts) * len(params))
    return _prepared("completion", request, prompts, params, card)


def prepare_chat(body: object, card: ModelCard, render: Render) -> Prepared:
    """The generations of a body of /v1/chat/completions.

    Args:
        body: Any JSON value.
        card: The model that it is for.
        render: Fills in the chat template; it may take its time.

    Raises:
        ApiError: The body is wrong, asks for what is not supported, or does not fit the template.
    """
    fields = as_object(body)
    refuse_unsupported(fields, vllm=card.vllm, chat=True)
    request = read(ChatRequest, fields)
    logprobs = _top_logprobs(request)
    structured, tools = structure_of(fields), tool_use(fields, card)
    if tools is not None:
        if structured is not None:  # which would leave no room for a call
            name = "tool_choice" if fields.get("tool_choice") is not None else "tools"
            raise invalid(name, "no other form of the answer beside tools", fields[name])
        structured = tools.structure
    params = choices(
        request,
        card,
        max_tokens=None,
        logprobs=logprobs,
        structured=structured,
        stop=None if tools is None else tools.stop,
    )
    if card.chat_template is None:
        message = (
            f"The model {card.name} has no chat template: send its prompt to /v1/completions, "
            "or start the server with --chat-template FILE."
        )
        raise ApiError(400, message, param="messages", code="no_chat_template")
    variables = template_variables(request, card, card.chat_template)
    if tools is not None:
        variables["tools"] = list(tools.tools)
    try:
        prompt = render(card.chat_template, variables)
    except ColdframeError as error:
        raise ApiError.of(error) from error
    return replace(_prepared("chat", request, (prompt,), params, card), tools=tools)


def _check_best_of(request: CompletionRequest) -> None:
    n = request.n or 1
    if request.best_of is None or request.best_of == n:
        return
    if request.best_of < n:
        raise invalid("best_of", f"at least n, which is {n}", request.best_of)
    raise unsupported("best_of", Refusal("Choosing among more than n answers", hint="ask for n"))


def _top_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise invalid("top_logprobs", "logprobs to be true with it", request.top_logprobs)
    return None


def _prepared(
    kind: Kind,
    request: Request,
    prompts: tuple[Prompt, ...],
    params: tuple[SamplingParams, ...],
    card: ModelCard,
) -> Prepared:
    _check_context(request, prompts, params[0].max_tokens or 1, card)
    if request.stream_options is not None and not request.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is true."
        raise ApiError(400, message, param="stream_options", code="unsupported")
    options = request.stream_options
    return Prepared(
        kind=kind,
        generations=tuple(
            Generation(prompt, each, add_special=kind == "completion")
            for prompt in prompts
            for each in params
        ),
        n=len(params),
        stream=bool(request.stream),
        include_usage=options is not None and bool(options.include_usage),
        logprobs=params[0].logprobs is not None,
        token_ids=bool(request.return_token_ids),
    )


def _check_context(
    request: Request, prompts: tuple[Prompt, ...], answer: int, card: ModelCard
) -> None:
    """Refuse at once what can be known not to fit; a text's length only its tokenizer knows."""
    for prompt in prompts:
        known = len(prompt) if isinstance(prompt, tuple) else 1
        if known + answer > card.context_length:
            asked = request.max_completion_tokens is not None
            param = "max_completion_tokens" if asked else "max_tokens"
            raise too_long(card, known, answer, param)
