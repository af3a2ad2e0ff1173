"""The bodies of completion and chat requests: fields, types and bounds.

Types are strict: openai-python sends exact ones, and what else comes is a mistake. Fields that are
not here are ignored, unless `refusals` has them. A field of several types is `Any` here: it is
checked where it is used (`prompts`, `messages`, `sampling`), and `schemas` has its schema.

Sources: OpenAI's API reference (https://platform.openai.com/docs/api-reference), and for the fields
that OpenAI has not (`top_k` to `return_token_ids`, `chat_template_kwargs`) vLLM's server.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coldframe.runtime.engine.params import MAX_LOGPROBS
from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.openai.problems import from_pydantic

__all__ = [
    "MAX_BIASES",
    "MAX_CHOICES",
    "MAX_MESSAGES",
    "MAX_NAME",
    "MAX_SEQUENCES",
    "ChatRequest",
    "CompletionRequest",
    "Request",
    "as_object",
    "read",
]

MAX_CHOICES = 16
MAX_SEQUENCES = 64
"""Of one request: its choices times its prompts."""
MAX_MESSAGES = 4096
MAX_BIASES = 1024
_MAX_STOP_TOKENS = 128
MAX_NAME = 512
"""In characters; of a model, of who speaks in a chat, of a template's variable."""
_INT32 = (1 << 31) - 1
"""More than any of the numbers of tokens and the ids can be; the sampler takes no larger ones."""
_INT64 = 1 << 63


def _whole_schema(schema: dict[str, Any], model: type[BaseModel]) -> None:
    # Schemas are for the OpenAPI document, which few ask for; a cold start does not wait for them.
    from coldframe.runtime.gateway.openai.schemas import complete

    complete(schema, chat=issubclass(model, ChatRequest))


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class StreamOptions(_Model):
    """What a stream brings besides its pieces."""

    include_usage: bool | None = None


class Request(_Model):
    """What both kinds of request have."""

    model_config = ConfigDict(json_schema_extra=_whole_schema)

    model: str | None = Field(
        None, min_length=1, max_length=MAX_NAME, description="The model; the first one by default."
    )
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=_INT32, description="The newer name of max_tokens, before which it goes."
    )
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Choices for each prompt.")
    stop: Any = None
    seed: int | None = Field(
        None, ge=-_INT64, le=2 * _INT64 - 1, description="Choice i gets this plus i."
    )
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=-1, le=_INT32, description="0 and -1 for all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, le=_INT32)]] | None,
        # Else a million mistakes would be a million errors.
        Field(max_length=_MAX_STOP_TOKENS, fail_fast=True),
    ] = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = Field(
        None, description="Whether each choice has its tokens' ids, in `token_ids`."
    )
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[Any, Any] | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored: nothing is kept.")


class CompletionRequest(Request):
    """The body of POST /v1/completions."""

    prompt: Any = Field(description="Text or token ids, one or several.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="The same as n; there is no choosing among more."
    )


class ChatRequest(Request):
    """The body of POST /v1/chat/completions."""

    messages: list[Any] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Only with logprobs true."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Whether the prompt ends with the start of an answer, as it does."
    )
    chat_template_kwargs: dict[Any, Any] | None = Field(
        None, description="Further variables of the chat template, such as enable_thinking."
    )


_Kind = TypeVar("_Kind", bound=Request)


def read(kind: type[_Kind], body: dict[str, Any]) -> _Kind:
    """The request that a body is.

    Raises:
        ApiError: 400, with the first mistake in it.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise from_pydantic(error) from None


def as_object(body: object) -> dict[str, Any]:
    """A body as a JSON object.

    Raises:
        ApiError: It is another JSON value.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_type")
    return body
