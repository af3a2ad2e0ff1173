"""What the gateway's parts tell one another: what to generate, and the pieces of an answer.

A route turns a body into `Generation`s; the engine (the front's workers, at the other end of a
socket) gives `Piece`s back as they come; the route makes its own shape of them. Whatever goes
wrong on the way is an `ApiError`, to which each route gives its platform's shape.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from coldframe.loader.errors import (
    CheckpointError,
    ColdframeError,
    DeviceError,
    DeviceLost,
    PlatformError,
    RequestError,
    SourceCorrupt,
    SourceDenied,
    SourceNotFound,
)
from coldframe.runtime.engine.params import SamplingParams

__all__ = ["ApiError", "Engine", "Generation", "ModelCard", "Piece", "Stream", "TokenLogprob"]


_PERMANENT = (
    CheckpointError,
    DeviceError,
    PlatformError,
    SourceCorrupt,
    SourceDenied,
    SourceNotFound,
)


class ApiError(Exception):
    """An error that a client gets, before it has a platform's shape.

    Args:
        status: The HTTP status.
        message: What is wrong, and what to do.
        kind: OpenAI's `type`.
        param: The field of the request that is wrong, where it is one.
        code: A word for programs.
        retry_after_s: When to try again, in seconds, where that may help.
        more: Further fields for the error's body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.more = dict(more or {})
        self.counted = False
        """Whether the metrics know of it."""

    @staticmethod
    def of(error: ColdframeError) -> ApiError:
        """What a client is told of an error of ours: its own mistakes in full, others in short."""
        if isinstance(error, RequestError):
            return ApiError(400, str(error), param=error.where, code="invalid_value")
        # What no later try will find mended. OpenAI's clients do try again, after any of them.
        gone = isinstance(error, _PERMANENT) and not isinstance(error, DeviceLost)
        status, code = (500, "model_error") if gone else (503, "replica_error")
        after_s = None if gone else error.retry_after_s
        return ApiError(status, error.what, kind="server_error", code=code, retry_after_s=after_s)

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
                **self.more,
            }
        }


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the gateway knows of a model; no file of it is ever opened there.

    Args:
        name: As clients call it.
        created: Seconds since 1970, of its config.
        context_length: Tokens of prompt and answer together, at most.
        vocab_size: Token ids.
        chat_template: Jinja source, where it has one.
        special_tokens: `bos_token`, `eos_token` and the like, for the template.
        defaults: What the checkpoint's generation_config says: `temperature`, `top_p`, ...
        vllm: Whether its replica has a vLLM engine, which serves what the native one does not.
    """

    name: str
    created: int
    context_length: int
    vocab_size: int
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    vllm: bool = False

    def to_wire(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def from_wire(data: Mapping[str, Any]) -> ModelCard:
        return ModelCard(**data)


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence to generate.

    Args:
        prompt: Text, or token ids.
        params: Sampling.
        add_special: Whether the tokenizer puts its own tokens around the text; a chat template
            has put them there already.
        generated: Tokens of the answer that the client has from elsewhere, behind a prompt of ids.
        give: Whether another replica goes on with it behind its first token (`Stream.given`).
        kv: What another replica has given with it; see `coldframe.runtime.transport.base`.
    """

    prompt: str | tuple[int, ...]
    params: SamplingParams
    add_special: bool = True
    generated: tuple[int, ...] = ()
    give: bool = False
    kv: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural log-probability and the bytes that it stands for."""

    token: int
    logprob: float
    text: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an answer.

    Args:
        choice: The index of its generation among those submitted together.
        token: Its id.
        text: What it adds to the answer; often empty, or what earlier tokens held back.
        finish: `stop` or `length` with the last token, else None.
        prompt_tokens: Of the generation's prompt.
        logprob: Where asked for.
        top: The likeliest tokens, the likeliest first.
        cached_tokens: How many tokens of the prompt were found in the KV instead of computed;
            known of the first token alone.
    """

    choice: int
    token: int
    text: str
    finish: str | None
    prompt_tokens: int
    logprob: TokenLogprob | None = None
    top: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0


class Stream(Protocol):
    """The pieces of generations that were submitted together, as they come, until all are done.

    Iterating raises ApiError where one of them failed. Leaving the iteration early, or `cancel`,
    frees all that they hold.

    Attributes:
        given: What is to be said to the replica that goes on with it, where it was given away and
            its last piece has come.
    """

    given: Mapping[str, Any] | None

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    def cancel(self) -> None: ...

    def timing(self) -> dict[str, float]:
        """What it has waited for so far, by name, in seconds: `queue`, `first_token`, `total`."""
        ...


class Engine(Protocol):
    """Who computes."""

    async def card(self, name: str | None, *, size: int = 0) -> ModelCard:
        """The model of that name, or the first one; waits while its config is on the way.

        Args:
            name: As clients call it.
            size: Bytes of the request, which are held while it waits.

        Raises:
            ApiError: There is none of that name (404), or it cannot be had.
        """
        ...

    def submit(self, model: str, generations: Sequence[Generation], *, size: int) -> Stream:
        """Takes generations; each waits its turn, first come first served.

        Args:
            model: The card's name.
            generations: The sequences.
            size: Bytes of the request, which are held while it waits.

        Raises:
            ApiError: There is no place for them (503 while cold, 429 once warm).
        """
        ...
