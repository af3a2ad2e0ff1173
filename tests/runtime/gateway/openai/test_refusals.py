"""What is not done here is refused, and the error says what can, where something can."""

from __future__ import annotations

from typing import Any

import pytest

from coldframe.runtime.gateway.openai.refusals import REFUSALS

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}

ASKED: dict[str, list[Any]] = {
    "allowed_token_ids": [[1]],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "bad_words": [["x"]],
    "chat_template": ["{{ messages }}", ""],
    "continue_final_message": [True],
    "documents": [[{"title": "x", "text": "y"}]],
    "echo": [True, 1, "false", 0],
    "function_call": ["auto", {"name": "f"}],
    "functions": [[{"name": "f"}]],
    "guided_choice": [["a", "b"]],
    "guided_decoding_backend": ["outlines"],
    "guided_grammar": ["root ::= 'x'"],
    "guided_json": [{}],
    "guided_regex": ["x+"],
    "guided_whitespace_pattern": [" *"],
    "include_stop_str_in_output": [True],
    "logits_processors": [["os.system"]],
    "min_tokens": [5, False],
    "modalities": [["text", "audio"], []],
    "prompt_embeds": ["AAAA"],
    "prompt_logprobs": [0, 5],
    "response_format": [{"type": "json_object"}, SCHEMA, {}, "text"],
    "skip_special_tokens": [False],
    "structured_outputs": [{"json": {}}],
    "suffix": ["end"],
    "tool_choice": ["auto", "required", {"type": "function"}],
    "tools": [[TOOL], TOOL],
    "truncate_prompt_tokens": [100],
    "use_beam_search": [True],
    "web_search_options": [{}],
}


def test_every_refusal_is_tested() -> None:
    assert set(ASKED) == set(REFUSALS)


@pytest.mark.parametrize("name", sorted(ASKED))
def test_what_is_not_supported(completion: Any, chat: Any, refusal: Any, name: str) -> None:
    kinds = (completion,) if name in ("tools", "tool_choice") else (completion, chat)
    for ready in kinds:
        for value in ASKED[name]:
            error = refusal(ready, **{name: value})
            assert (error.status, error.kind) == (400, "invalid_request_error")
            assert (error.param, error.code) == (name, "unsupported")
            assert "not supported" in error.message


@pytest.mark.parametrize("name", sorted(ASKED))
def test_what_asks_for_nothing(completion: Any, chat: Any, name: str) -> None:
    for value in (None, *REFUSALS[name].harmless):
        assert completion(**{name: value}) == completion()
        assert chat(**{name: value}) == chat()


@pytest.mark.parametrize("name", sorted(ASKED))
def test_vllm_is_named_where_it_serves_the_field_here(
    completion: Any, refusal: Any, name: str
) -> None:
    told = refusal(completion, **{name: ASKED[name][0]}).message
    assert ("the vLLM engine can" in told) is REFUSALS[name].vllm


def test_best_of(completion: Any, refusal: Any) -> None:
    assert completion(n=2, best_of=2) == completion(n=2)
    assert refusal(completion, best_of=2).code == "unsupported"
    error = refusal(completion, n=3, best_of=2)
    assert (error.param, error.code) == ("best_of", "invalid_value")
