"""What a request asks of the sampler, without torch, so that the front can check it at once."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.structure import Structure

__all__ = ["MAX_LOGPROBS", "MAX_STOP_LENGTH", "MAX_STOPS", "SamplingParams"]

MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
"""In characters; as much text as a stop string can hold back from a stream."""
MAX_LOGPROBS = 20

_SEEDS = (-(1 << 63), (1 << 64) - 1)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when a request ends; the defaults are greedy.

    Args:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample from this many of the likeliest tokens; 0 from all.
        top_p: Sample from the smallest set of likeliest tokens with at least this probability.
        min_p: Drop tokens less likely than this times the likeliest.
        repetition_penalty: Divides positive and multiplies negative logits of every token in the
            prompt or the text so far (https://arxiv.org/abs/1909.05858); 1 changes nothing.
        frequency_penalty: Taken off a token's logit for each time it was generated.
        presence_penalty: Taken off the logit of each token that was generated at all.
        logit_bias: Added to the logits of these token ids, before the penalties.
        seed: Of the random numbers; None until `with_seed` has drawn one.
        max_tokens: The most tokens to generate; None for what the context leaves, which the prefill
            worker puts in once it knows the prompt's length.
        stop: Texts that end the request; they are not part of the answer.
        stop_token_ids: Tokens that end the request, besides the model's own.
        ignore_eos: Go on after the model's end-of-text tokens.
        logprobs: Report log-probabilities, with those of this many likeliest tokens; None for none.
        drawn: Whether nobody asked for the seed, so that any other draw would be as good.
        structured: What form the answer must have; None for any.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    drawn: bool = False
    structured: Structure | None = None

    @property
    def needs(self) -> Literal["vllm"] | None:
        """The engine that alone can serve this; None where any can."""
        return None if self.structured is None else "vllm"

    @property
    def changes_logits(self) -> bool:
        """Whether bias or penalties move the logits at all."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.frequency_penalty
            or self.presence_penalty
        )

    def with_seed(self) -> SamplingParams:
        """These parameters with a seed, drawn from the system's randomness where there is none.

        Call it once, where the request enters: every worker that the request passes through must
        draw with the same seed.
        """
        if self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(63), drawn=True)

    def validate(self, vocab_size: int) -> None:
        """Check types and ranges.

        Args:
            vocab_size: The number of token ids of the model.

        Raises:
            RequestError: A parameter is out of its range; `where` names it.
        """
        _number("temperature", self.temperature, 0.0, math.inf)
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, *_SEEDS)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "drawn"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, "true or false", getattr(self, name))
        if self.structured is not None:
            self.structured.validate()
        self._validate_stops(vocab_size)
        if not isinstance(self.logit_bias, Mapping):
            raise _error("logit_bias", "an object from token ids to numbers", self.logit_bias)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, vocab_size - 1)
            _number(f"logit_bias[{token}]", bias, -100.0, 100.0)

    def _validate_stops(self, vocab_size: int) -> None:
        if not isinstance(self.stop, tuple) or len(self.stop) > MAX_STOPS:
            raise _error("stop", f"at most {MAX_STOPS} strings", self.stop)
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                expected = f"strings of 1 to {MAX_STOP_LENGTH} characters"
                raise _error("stop", expected, text)
        if not isinstance(self.stop_token_ids, tuple):
            raise _error("stop_token_ids", "a list of token ids", self.stop_token_ids)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, vocab_size - 1)

    def to_wire(self) -> dict[str, Any]:
        """The parameters as JSON values; the keys of `logit_bias` become strings, as JSON's are."""
        wire: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        wire["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        wire["stop"] = list(self.stop)
        wire["stop_token_ids"] = list(self.stop_token_ids)
        wire["structured"] = None if self.structured is None else self.structured.to_wire()
        return wire

    @staticmethod
    def from_wire(data: Mapping[str, Any]) -> SamplingParams:
        """Parameters from JSON values; what is missing has its default. Does not check ranges.

        Raises:
            RequestError: A name is unknown, or a value cannot be what its name says.
        """
        known = {item.name for item in fields(SamplingParams)}
        for name in data:
            if name not in known:
                raise RequestError(
                    "unknown sampling parameter", where=name, expected=", ".join(sorted(known))
                )
        values = dict(data)
        for name in ("stop", "stop_token_ids"):
            if name in values:
                if not isinstance(values[name], (list, tuple)):
                    raise _error(name, "a list", values[name])
                values[name] = tuple(values[name])
        if "logit_bias" in values:
            values["logit_bias"] = _bias_from_wire(values["logit_bias"])
        if values.get("structured") is not None:
            values["structured"] = Structure.from_wire(values["structured"])
        return SamplingParams(**values)


def _bias_from_wire(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise _error("logit_bias", "an object from token ids to numbers", bias)
    try:
        return {int(token): value for token, value in bias.items()}
    except (TypeError, ValueError):
        raise _error("logit_bias", "token ids as keys", list(bias)) from None


def _number(name: str, value: object, low: float, high: float) -> None:
    # bool is an int to Python, but `"temperature": true` is a mistake. JSON has integers that no
    # float holds, so the comparison with infinity is Python's, not `math.isfinite`.
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= min(high, sys.float_info.max):  # type: ignore[operator]
        limit = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise _error(name, f"a number {limit}", value)


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < low
        or (high is not None and value > high)
    ):
        limit = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise _error(name, f"a whole number {limit}", value)


def _error(name: str, expected: str, got: object) -> RequestError:
    shown = repr(got)
    return RequestError(
        "a sampling parameter is out of range",
        where=name,
        expected=expected,
        got=shown if len(shown) <= 100 else shown[:97] + "...",
        hint=f"Change {name} in the request.",
    )
