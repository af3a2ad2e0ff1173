from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from coldframe.loader.errors import (
    CheckpointError,
    ColdframeError,
    SourceError,
    SourceNotFound,
)
from coldframe.runtime.gateway.api import ModelCard
from coldframe.runtime.gateway.card import read_card

TOKENIZER = {"chat_template": "of the tokenizer", "eos_token": "</s>"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "m"
    root.mkdir()
    write(root, "config.json", {})
    return root


def write(root: Path, name: str, content: object) -> Path:
    path = root / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def card(root: Path, file: str | None = None) -> ModelCard:
    return read_card(str(root), "m", 64, 100, file)


def test_a_demo_model_s_card_is_what_transformers_reads(demo_model: Callable[..., Path]) -> None:
    root = demo_model()
    found = read_card(str(root), "demo", 512, 600)
    tokenizer = AutoTokenizer.from_pretrained(root)
    assert found.chat_template == tokenizer.chat_template
    assert found.special_tokens == tokenizer.special_tokens_map
    assert found.created == int((root / "config.json").stat().st_mtime)
    assert (found.name, found.context_length, found.vocab_size) == ("demo", 512, 600)
    assert ModelCard.from_wire(json.loads(json.dumps(found.to_wire()))) == found


def test_a_model_may_have_nothing_but_its_config(model: Path) -> None:
    os.utime(model / "config.json", (7, 1_700_000_000.9))
    assert card(model) == ModelCard("m", 1_700_000_000, 64, 100)


def test_without_a_config_there_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"config\.json"):
        card(tmp_path)


# -- the chat template -------------------------------------------------------------------------


def test_the_operator_s_template_comes_first_then_the_checkpoint_s_own_file(model: Path) -> None:
    own = write(model.parent, "own.jinja", "of the operator")
    write(model, "chat_template.json", {"chat_template": "of the processor"})
    assert card(model).chat_template == "of the processor"
    write(model, "tokenizer_config.json", TOKENIZER)
    assert card(model).chat_template == "of the tokenizer"
    write(model, "chat_template.jinja", "of the file: ü\n")
    assert card(model).chat_template == "of the file: ü\n"
    assert card(model, str(own)).chat_template == "of the operator"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ({"default": "d", "tool_use": "t"}, "d"),
        ([{"name": "rag", "template": "r"}], None),
        ([], None),
        (None, None),
        ("", ""),
    ],
)
def test_of_several_templates_the_default_one_is_taken(
    held: object, expected: str | None, name: str, model: Path
) -> None:
    write(model, name, {"chat_template": held})
    assert card(model).chat_template == expected


@pytest.mark.parametrize(
    "held", [3, True, ["a"], [{"template": "x"}], [{"name": "default", "template": 3}]]
)
def test_a_template_that_is_no_text_is_an_error(held: object, model: Path) -> None:
    write(model, "tokenizer_config.json", {"chat_template": held})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template"):
        card(model)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b"x" * 1_000_001),
        ("tokenizer_config.json", {"chat_template": "x" * 1_000_001}),
        ("tokenizer_config.json", b" " * 20_000_001),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"a": 1, "a": 2}'),
        ("special_tokens_map.json", b"[" * 100_000),
        ("chat_template.json", b'{"chat_template": "\\ud800"}'),
        ("generation_config.json", b"[]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_broken_or_too_large_is_an_error(
    name: str, content: object, model: Path
) -> None:
    write(model, name, content)
    with pytest.raises(CheckpointError) as caught:
        card(model)
    assert name in str(caught.value.where)


def test_what_is_no_file_is_an_error(model: Path) -> None:
    os.mkfifo(model / "chat_template.jinja")
    with pytest.raises(CheckpointError, match="not a regular file"):
        card(model)


@pytest.mark.parametrize("file", ["missing.jinja", "nul\0"])
def test_an_operator_s_template_must_be_there(file: str, model: Path) -> None:
    write(model, "chat_template.jinja", "x")
    with pytest.raises(SourceError):
        card(model, str(model / file))


# -- special tokens ----------------------------------------------------------------------------


def added(text: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": text, "lstrip": False, "special": True}


def test_special_tokens_are_texts_or_describe_themselves(model: Path) -> None:
    values = {
        "bos_token": "<s>",
        "eos_token": added("</s>"),
        "pad_token": None,
        "image_token": "<image>",
        "add_bos_token": True,
        "additional_special_tokens": ["<x>"],
        "extra_special_tokens": {"boi_token": "<boi>"},
        "added_tokens_decoder": {},
        "model_max_length": 1000000000000000019884624838656,
    }
    write(model, "tokenizer_config.json", values)
    write(model, "special_tokens_map.json", {"eos_token": "<other>"})
    assert card(model).special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "image_token": "<image>",
        "boi_token": "<boi>",
    }


def test_an_older_tokenizer_has_them_in_a_file_of_their_own(
    demo_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((demo_model() / name).read_bytes())
    held = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "unk_token": "<|endoftext|>"}
    write(model, "special_tokens_map.json", held)
    expected = AutoTokenizer.from_pretrained(model).special_tokens_map
    assert expected["eos_token"] == "<|im_end|>"
    assert card(model).special_tokens == expected


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", [3, False, ["<s>"], {}, {"content": 3}])
def test_a_token_that_is_no_text_is_an_error(token: object, name: str, model: Path) -> None:
    write(model, name, {"bos_token": token})
    with pytest.raises(CheckpointError, match="bos_token") as caught:
        card(model)
    assert f"{name}: bos_token" in str(caught.value.where)


# -- sampling ----------------------------------------------------------------------------------


def test_the_checkpoint_s_sampling_is_the_default(model: Path) -> None:
    wanted = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
    GenerationConfig(do_sample=True, repetition_penalty=1.05, **wanted).save_pretrained(model)
    assert card(model).defaults == {**wanted, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({"do_sample": False}, {"temperature": 0.0}),
        (
            {"do_sample": False, "temperature": 0.7, "top_p": 0.5},
            {"temperature": 0.0, "top_p": 0.5},
        ),
        ({"do_sample": True, "temperature": 1}, {"temperature": 1}),
        ({"do_sample": None, "temperature": None, "eos_token_id": [1]}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({}, {}),
    ],
)
def test_what_it_does_not_say_is_not_said(
    held: dict[str, Any], expected: dict[str, Any], model: Path
) -> None:
    write(model, "generation_config.json", held)
    assert card(model).defaults == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.6"),
        ("temperature", -1),
        ("temperature", True),
        ("top_k", 2.5),
        ("top_k", -2),
        ("top_p", 2),
        ("min_p", [0.1]),
        ("repetition_penalty", 0),
        ("repetition_penalty", {}),
        ("do_sample", "no"),
        ("do_sample", 0),
    ],
)
def test_sampling_of_the_wrong_type_is_an_error(name: str, value: object, model: Path) -> None:
    write(model, "generation_config.json", {name: value})
    with pytest.raises(CheckpointError) as caught:
        card(model)
    assert str(caught.value.where).endswith(f"generation_config.json: {name}")


def test_an_infinite_temperature_is_an_error(model: Path) -> None:
    write(model, "generation_config.json", '{"temperature": Infinity}')
    with pytest.raises(ColdframeError, match="temperature"):
        card(model)
