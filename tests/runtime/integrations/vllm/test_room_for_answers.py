"""How long an answer may be where vLLM makes it; without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import tokenizers
import tokenizers.models

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.foreign import foreign_spec
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.integrations.vllm.engine import Engine
from coldframe.runtime.integrations.vllm.params import Asked
from coldframe.runtime.integrations.vllm.requests import Requests
from coldframe.runtime.integrations.vllm.worker import VllmWorker
from coldframe.runtime.replica.vllm_spec import BLOCK_TOKENS, VllmOptions
from coldframe.runtime.worker.handoff import Handoff, Job
from coldframe.runtime.worker.prompts import bounded
from coldframe.runtime.worker.text import Tokenizer

CONTEXT = 2048


def job(prompt: int, most: int | None, *made: int) -> Job:
    params = SamplingParams(max_tokens=most, temperature=0.0)
    return Job("r", 0, params, prompt_ids=(5,) * prompt, generated_ids=made)


class Said:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)


class Asks:
    """What an engine is asked, as far as that shows here."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def add(self, request: str, asked: Asked) -> None:
        self.asked.append(asked)

    def remove(self, request: str) -> None: ...


def worker() -> VllmWorker:
    found = object.__new__(VllmWorker)
    found.spec = foreign_spec(
        {"vocab_size": 100, "max_position_embeddings": 8192, "torch_dtype": "float32"}
    )
    found.context = CONTEXT
    found.kv = cast(Any, SimpleNamespace(blocks=1))  # the replica's, of which it needs nothing
    words = {f"w{number}": number for number in range(100)}
    found.tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0")))
    found.plan = cast(Any, SimpleNamespace(fingerprint="other"))
    found.control = cast(Any, Said())
    return found


def test_an_answer_without_a_number_gets_what_vllm_has_room_for() -> None:
    assert worker().job_of(job(48, None)).params.max_tokens == 2000
    found = worker()
    found.context = 8192
    assert found.job_of(job(48, None)).params.max_tokens == 4096


def test_a_native_answer_without_a_number_gets_a_share_of_the_kv() -> None:
    assert bounded(job(48, None), 48, 8192, 16384).params.max_tokens == 2048
    assert bounded(job(8, None), 8, 8192, 32).params.max_tokens == 24


def test_too_much_is_refused_before_the_first_token_and_cut_behind_it() -> None:
    with pytest.raises(RequestError, match="at most 2048 tokens"):
        worker().job_of(job(2000, 49))
    assert worker().job_of(job(2000, 48)).params.max_tokens == 48
    assert worker().job_of(job(2000, 100, 7)).params.max_tokens == 48


def test_what_was_handed_over_and_is_too_long_ends_at_the_context() -> None:
    found, engine = worker(), Asks()
    requests = Requests(found, cast(Engine, engine), CONTEXT)
    handed = job(2000, 100, 7)
    requests.take(handed, Handoff(handed, "f", "k", (0,), 2000, "cpu"))
    (asked,) = engine.asked
    assert (len(asked.prompt_token_ids), asked.sampling["max_tokens"]) == (2001, 47)
    assert [message["type"] for message in cast(Said, found.control).messages] == ["ack"]


@pytest.mark.parametrize("prompt", [CONTEXT - 1, CONTEXT, CONTEXT + 1])
def test_what_fills_the_context_already_ends_with_an_error(prompt: int) -> None:
    """It has its first token, and there will be no second: nobody is to wait for that."""
    found, engine = worker(), Asks()
    handed = job(prompt, 100, 7)
    requests = Requests(found, cast(Engine, engine), CONTEXT)
    requests.take(handed, Handoff(handed, "f", "k", (0,), prompt, "cpu"))
    assert engine.asked == []
    failed, ack = cast(Said, found.control).messages
    assert (failed["type"], failed["request"], ack["type"]) == ("failed", "r", "ack")
    assert failed["error"]["error"] == "RequestError"
    assert failed["error"]["expected"] == f"at most {CONTEXT} tokens"


def test_how_long_a_sequence_may_be_is_known_where_the_kv_is_said() -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": 100,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "torch_dtype": "float32",
    }
    native = ModelSpec.from_config(config)
    per_token = native.kv_block_bytes(4, 1)
    given = VllmOptions(kv_bytes=1000 * per_token)
    assert given.longest(native) == 1000 - BLOCK_TOKENS
    assert VllmOptions(kv_bytes=1 << 40).longest(native) == 8192
    assert VllmOptions(kv_bytes=1 << 40, args=(("max_model_len", 50),)).longest(native) == 50
    assert VllmOptions().longest(native) is None
    assert given.longest(worker().spec) is None  # of another model vLLM decides
