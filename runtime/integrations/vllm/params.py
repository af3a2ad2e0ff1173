"""A request of ours as vLLM takes one, and what vLLM makes of it as ours.

Text, stop strings and the end of an answer stay ours (`runtime/engine/sequence.py`): vLLM gets
token ids and the ids that end, and gives token ids. Seeds, penalties and biases are our sampler's
(`sampler`), so that it draws what the native engine would, wherever the answer was cut; requests
for which any draw is as good, and greedy ones without any of that, vLLM samples itself.

Neither torch nor vLLM is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.params import MAX_LOGPROBS, SamplingParams
from coldframe.runtime.integrations.vllm.transfer import Mode, mode_of
from coldframe.runtime.worker.handoff import Job

if TYPE_CHECKING:
    from coldframe.runtime.engine.sampling import Sampled

__all__ = [
    "ENGINE",
    "Asked",
    "ask",
    "own_way",
    "refusal",
    "refusing",
    "sampled",
]

SAMPLER = "coldframe.runtime.integrations.vllm.sampler:ColdframeSampler"

ENGINE: Mapping[str, Any] = MappingProxyType(
    {
        "logits_processors": [SAMPLER],
        # The sampler looks at the tokens made so far, which a step that is scheduled ahead of the
        # one before it does not know yet; vLLM would wait for them then, and win nothing.
        "async_scheduling": False,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": MAX_LOGPROBS,
        # What a checkpoint asks for where a request does not is put in at the gateway.
        "generation_config": "vllm",
        # One grammar engine serves all requests of a vLLM; where vLLM chooses by the request, the
        # first one decides for those behind it. And a model that may, writes blanks without end.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
)
"""What the engine has to be started with, of vLLM's `EngineArgs`."""

VERSION = 1

_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.01, 2.0
"""What vLLM takes; it would change what is less, and refuse what is more."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to vLLM.

    Args:
        prompt_token_ids: Its prompt.
        sampling: Arguments of vLLM's `SamplingParams`.
        known: So many tokens at the beginning of what it makes are known: they repeat what the
            client has, and are to be dropped.
    """

    prompt_token_ids: list[int]
    sampling: dict[str, Any]
    known: int

    def sampling_params(self) -> Any:
        """vLLM's `SamplingParams`.

        Raises:
            RequestError: vLLM does not take them, for instance a schema without sense.
        """
        from vllm import SamplingParams as Theirs
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        arguments = dict(self.sampling, output_kind=RequestOutputKind.DELTA)
        structured = arguments.pop("structured_outputs", None)
        with refusing():
            if structured is not None:
                arguments["structured_outputs"] = StructuredOutputsParams(**structured)
            return Theirs(**arguments)


def ask(
    job: Job,
    eos_ids: Sequence[int],
    *,
    kv_transfer_params: Mapping[str, Any] | None = None,
    mode: Mode | None = None,
) -> Asked:
    """What to ask of vLLM for a job.

    Args:
        job: The request, with the prompt's ids and a number of tokens to generate.
        eos_ids: The model's own end-of-text tokens.
        kv_transfer_params: For the KV connector.
        mode: How vLLM gets the part of the answer that is there; by default `mode_of` for our
            sampler. *Exact*, it draws all of that part again.

    Returns:
        vLLM ends where `Sequence.accept` does, but for stop strings, which it does not know.

    Raises:
        RequestError: There is nothing left to generate, or the form of the answer is none.
    """
    params, prompt, made = job.params, job.prompt_ids, job.generated_ids
    if prompt is None or params.max_tokens is None:
        raise ValueError("a job's prompt ids and max_tokens are to be set first")
    left = params.max_tokens - len(made)
    if left < 1:
        raise RequestError(
            "an answer is as long as it may be",
            where="max_tokens",
            expected=f"fewer than {params.max_tokens} tokens",
            got=len(made),
        )
    exact = (mode or mode_of(params, shared_sampler=True)) == "exact"
    known = made if exact else ()
    sampling: dict[str, Any] = {
        "max_tokens": params.max_tokens if exact else left,
        "detokenize": False,
        "ignore_eos": True,  # they are among the ids that stop
        "stop_token_ids": sorted(
            {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)},
        ),
        "logprobs": params.logprobs,
        **(_own(params) if own_way(params) else {"temperature": 0.0}),
    }
    if params.structured is not None:
        sampling["structured_outputs"] = {
            # vLLM's names are the same.
            params.structured.kind: params.structured.kind == "json_object"
            or params.structured.value()
        }
    extra: dict[str, Any] = {}
    if known or not own_way(params):
        extra["coldframe"] = {
            "version": VERSION,
            "prompt_tokens": len(prompt),
            "params": None if own_way(params) else _travelling(params),
            "known": list(known),
        }
    if kv_transfer_params is not None:
        extra["kv_transfer_params"] = dict(kv_transfer_params)
    if extra:
        sampling["extra_args"] = extra
    return Asked([*prompt, *(() if exact else made)], sampling, len(known))


def own_way(params: SamplingParams) -> bool:
    """Whether vLLM's own sampler does as well as ours.

    It does where the likeliest token is asked for, as the logits have it, and where nobody has
    asked for a seed. Penalties are ours, since it would not count what stands in its prompt.
    """
    if params.changes_logits:
        return False
    if params.temperature == 0:
        return True
    fits = _LEAST_TEMPERATURE <= params.temperature <= _MOST_TEMPERATURE and params.top_p > 0
    return fits and (params.drawn or params.seed is None)


def sampled(params: SamplingParams, token: int, logprobs: Mapping[int, Any] | None) -> Sampled:
    """A token that vLLM has made, as the native engine would have told it.

    Args:
        params: The request's.
        token: Its id.
        logprobs: vLLM's `Logprob`s of this token and of the likeliest ones, by id.
    """
    from coldframe.runtime.engine.sampling import Sampled

    if params.logprobs is None or logprobs is None:
        return Sampled(token)
    likeliest = sorted((-each.logprob, other) for other, each in logprobs.items())
    top = tuple((other, -negative) for negative, other in likeliest[: params.logprobs])
    finite = tuple((other, logprob) for other, logprob in top if logprob > float("-inf"))
    return Sampled(token, float(logprobs[token].logprob), finite)


@contextmanager
def refusing() -> Iterator[None]:
    """Around vLLM's `SamplingParams` and `add_request`: what they do not take is the client's.

    Raises:
        RequestError: vLLM does not take the request.
    """
    from vllm.exceptions import VLLMValidationError  # no ValueError

    try:
        yield
    except (VLLMValidationError, ValueError, TypeError) as error:
        raise refusal(error) from error


def refusal(error: Exception) -> RequestError:
    """What a client is told of a request that vLLM does not take."""
    return RequestError(
        "vLLM does not take this request",
        got=str(error)[:500],
        hint="Of a schema or a grammar its engine may not know every part.",
    )


def _own(params: SamplingParams) -> dict[str, Any]:
    if params.temperature == 0:
        return {"temperature": 0.0}
    return {
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }


def _travelling(params: SamplingParams) -> dict[str, Any]:
    """What the sampler needs of them; `extra_args` hold JSON values."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "logit_bias")
    wire = params.to_wire()
    penalties = (name for name in wire if name.endswith("_penalty"))
    return {name: wire[name] for name in (*names, *penalties)}
