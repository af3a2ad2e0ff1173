"""What only vLLM can serve, through a whole server and OpenAI's own client."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from coldframe.loader.errors import UnsupportedModel
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.vllm_spec import VllmOptions
from tests.runtime.gateway.chat_templates import TEMPLATES
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of
from tests.runtime.integrations.vllm.hosts import host
from tests.runtime.integrations.vllm.quantised import quantise
from tests.runtime.serving import Server, served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(200)]

Make = Callable[..., Path]
HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
AS_SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
MODEL = "tiny-llama-float32"
FLAGS = ("--vllm-kv", "64MiB", "--kv-memory", "64MiB", "--threads", "1")


@pytest.fixture(scope="module")
def bridged(demo_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose vLLM starts behind the first token, and whose template knows of tools."""
    template = tmp_path_factory.mktemp("t") / "template.jinja"
    template.write_text(TEMPLATES["qwen-3"])
    flags = ("--decode", "native,vllm", "--chat-template", template, *FLAGS)
    with served(demo_model(), *flags) as server:
        yield server


@pytest.fixture
def client(bridged: Server) -> Iterator[OpenAI]:
    with bridged.openai(timeout=150, max_retries=0) as made:
        yield made


def test_a_schema_is_kept_to_by_the_very_first_request(client: OpenAI) -> None:
    """It waits for vLLM, where native workers would be there at once."""
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, response_format=AS_SCHEMA, temperature=1.3, seed=3, n=2
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content or "")
        assert set(value) == {"name", "old"}
        assert value["name"] in ("ada", "bob")


def test_it_streams_and_repeats_itself(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "seed": 5, "temperature": 1.0}
    asked["response_format"] = AS_SCHEMA
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = client.chat.completions.create(**asked, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole
    json.loads(text)


TOOL: Any = {"type": "function", "function": {"name": "greet", "parameters": SCHEMA}}


def test_tools_that_have_to_be_called(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "temperature": 0.9, "seed": 2}
    required = {**asked, "tool_choice": "required", "parallel_tool_calls": False}
    choice = client.chat.completions.create(**required).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "greet"
    assert set(json.loads(call.function.arguments)) == {"name", "old"}
    named = {**asked, "tool_choice": {"type": "function", "function": {"name": "greet"}}}
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(**named, stream=True)
    ]
    (streamed,) = (call for delta in deltas for call in delta.tool_calls or ())
    assert streamed.function is not None
    assert json.loads(streamed.function.arguments or "")["name"] in ("ada", "bob")
    assert not any(delta.content for delta in deltas)
    # Whether to call one is the model's to choose, in either engine; this one writes no such words.
    free = client.chat.completions.create(**asked, tool_choice="auto", max_tokens=8).choices[0]
    assert (free.finish_reason, free.message.tool_calls) == ("length", None)


def test_completions_and_vllms_own_fields(client: OpenAI) -> None:
    def complete(**more: Any) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=40, temperature=0, extra_body=more
        )
        return answer.choices[0].text

    assert complete(guided_choice=["yes", "no"]) in ("yes", "no")
    assert complete(structured_outputs={"regex": "[ab]{3}"}) in {
        a + b + c for a in "ab" for b in "ab" for c in "ab"
    }
    assert complete(guided_grammar='root ::= "x" | "y"') in ("x", "y")


def test_a_schema_without_sense_is_refused_and_others_go_on(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=4, extra_body={"guided_regex": "(["}
        )
    assert "vLLM does not take this request" in str(caught.value)
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


# -- models that the native engine does not run ----------------------------------------------------


def foreign(base: Path, target: Path, kind: str) -> Path:
    """A tiny model of a family that is not ours, of random weights, with the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
    more: dict[str, Any] = {
        "qwen3_moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "intermediate_size": 96,
        },
        "gemma2": {"intermediate_size": 96, "query_pre_attn_scalar": 32},
    }[kind]
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        kind, vocab_size=vocab, eos_token_id=1, bos_token_id=0, pad_token_id=1, **sizes, **more
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(base / name, target)
    return target


def alone(model: Path, runs: Path) -> ReplicaOptions:
    """A replica in which vLLM does all."""
    vllm = VllmOptions(alone=True, kv_bytes=64 << 20)
    return ReplicaOptions(model=str(model), run_dir=str(runs), decode=0, vllm=vllm, threads=1)


@pytest.fixture
def runs() -> Iterator[Path]:
    """A folder for run directories; beside the server above, nothing is to be left in it."""
    made = Path(tempfile.mkdtemp(prefix="cf-"))  # a socket's path is short
    yield made
    assert list(made.iterdir()) == []
    made.rmdir()


def in_eight_bits(base: Path, target: Path) -> Path:
    """The demo model with linear layers in int8, a scale for each row: a form that vLLM runs on a
    CPU, too."""
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    quantise(base, target)
    return target


def test_quantised_weights_are_served_wholly_by_vllm(
    demo_model: Make, tmp_path: Path, runs: Path
) -> None:
    model = in_eight_bits(demo_model("llama", "bfloat16"), tmp_path / "int8")
    with pytest.raises(UnsupportedModel, match=r"a quantised checkpoint.*--decode vllm"):
        Replica(ReplicaOptions(model=str(model), run_dir=str(runs))).close()
    prompts = [prompt_of(20 + 30 * seed, seed=seed) for seed in range(3)]
    with host(model, dtype="bfloat16") as plain:
        answers = [plain.generate([prompt], max_tokens=12)[0].tokens for prompt in prompts]
    with Replica(alone(model, runs)) as replica:
        for prompt, answer in zip(prompts, answers, strict=True):
            client = ask(replica, prompt, 12)
            finish(replica, client, seconds=150)
            assert client.tokens == answer
        seeded = [ask(replica, prompts[0], 12, temperature=1.0, seed=seed) for seed in (4, 4)]
        finish(replica, *seeded)
        assert seeded[0].tokens == seeded[1].tokens
        assert {name.partition("-")[0] for name in replica.pids} == {"memory", "vllm"}
        replica.spans += replica.recorder.drain()
        (ready,) = (s for s in replica.spans if s.name == "ready" and s.process.startswith("vllm"))
        assert "post-processed by CompressedTensorsLinearMethod" in str(ready.note)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma2"])
def test_other_models_are_served_wholly_by_vllm(
    demo_model: Make, tmp_path: Path, runs: Path, kind: str
) -> None:
    model = foreign(demo_model(), tmp_path / kind, kind)
    with pytest.raises(UnsupportedModel, match="--decode vllm"):
        Replica(ReplicaOptions(model=str(model), run_dir=str(runs))).close()
    prompts = [prompt_of(20 + 30 * seed, seed=seed) for seed in range(3)]
    with Replica(alone(model, runs)) as replica:
        clients = [ask(replica, prompt, 12) for prompt in prompts]
        seeded = [ask(replica, prompts[0], 12, temperature=1.0, seed=seed) for seed in (4, 4, 5)]
        formed = Client()
        form = SamplingParams(max_tokens=40, structured=Structure("choice", '["yes", "no"]'))
        replica.submit(form, formed, prompt_ids=tuple(prompts[0]))
        finish(replica, *clients, *seeded, formed, seconds=150)
        assert {name.partition("-")[0] for name in replica.pids} == {"memory", "vllm"}
        assert not replica.spec.native
        for prompt, client in zip(prompts, clients, strict=True):
            assert client.tokens == expected(model, tuple(prompt), 12)
        assert seeded[0].tokens == seeded[1].tokens != seeded[2].tokens
        assert formed.text in ("yes", "no")
