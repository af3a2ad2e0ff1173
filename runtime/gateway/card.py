"""What the gateway is told of a model, read from the small files beside its weights.

The front reads them, once, so that the gateway need not open a file. They come with the checkpoint:
each has a limit to its size, and a value of the wrong type is an error that names it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from coldframe.loader.checkpoints.checkpoint import read_generation_config
from coldframe.loader.errors import CheckpointError, RequestError, SourceNotFound
from coldframe.loader.files import read_whole, source_error
from coldframe.loader.strict_json import describe, parse_object
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.gateway.api import ModelCard

__all__ = ["read_card"]

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"

_MOST_JSON = 20_000_000
_MOST_TEMPLATE = 1_000_000
_HINT = "Download or save the model again."
_NAMED = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_card(
    directory: str,
    name: str,
    context_length: int,
    vocab_size: int,
    chat_template_file: str | None = None,
    *,
    vllm: bool = False,
) -> ModelCard:
    """Reads a model's card.

    Args:
        directory: Where its small files are.
        name: As clients call it.
        context_length: Tokens of prompt and answer together, at most.
        vocab_size: Token ids.
        chat_template_file: The operator's own template, in place of the checkpoint's.
        vllm: Whether its replica has a vLLM engine.

    Raises:
        CheckpointError: One of the files is not what it should be.
        SourceError: The config or the operator's template is not there, or a file cannot be read.
    """
    config = os.path.join(directory, _CONFIG)
    try:
        created = int(os.stat(config).st_mtime)
    except OSError as error:
        raise source_error(error, config, "The model is incomplete; download it again.") from None
    tokenizer = _json(directory, _TOKENIZER)
    if chat_template_file is not None:
        template: str | None = _text(chat_template_file, "Save the template as UTF-8.")
    else:
        template = _chat_template(directory, tokenizer)
    return ModelCard(
        name=name,
        created=max(0, created),
        context_length=context_length,
        vocab_size=vocab_size,
        chat_template=template,
        special_tokens=_special_tokens(directory, tokenizer),
        defaults=_defaults(directory),
        vllm=vllm,
    )


def _chat_template(directory: str, tokenizer: Mapping[str, Any]) -> str | None:
    """The checkpoint's template: a file of its own before an entry of the tokenizer's."""
    with contextlib.suppress(SourceNotFound):
        return _text(os.path.join(directory, _TEMPLATE), _HINT)
    name, found = _TOKENIZER, tokenizer.get("chat_template")
    if found is None:
        name, found = _OLD_TEMPLATE, _json(directory, _OLD_TEMPLATE).get("chat_template")
    where = f"{os.path.join(directory, name)}: chat_template"
    template = _default_of(found, where)
    if template is not None and len(template) > _MOST_TEMPLATE:
        raise _wrong(where, f"at most {_MOST_TEMPLATE} characters", f"{len(template)} of them")
    return template


def _default_of(found: object, where: str) -> str | None:
    """Of several templates the one for those who name none; None where there is no such."""
    if isinstance(found, list):
        for entry in found:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise _wrong(where, "entries with a name and a template", describe(entry))
        found = {entry["name"]: entry.get("template") for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    if found is not None and not isinstance(found, str):
        raise _wrong(where, "a string, or named templates", describe(found))
    return found


def _special_tokens(directory: str, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have a name, as Transformers gives them to a template."""
    # Older tokenizers have no such entry; then a file of their own says which tokens they are.
    special = {} if "added_tokens_decoder" in tokenizer else _json(directory, _SPECIAL)
    values = {**tokenizer, **special}
    extra = values.get("extra_special_tokens")
    found = {}
    for name, token in {**(extra if isinstance(extra, dict) else {}), **values}.items():
        if not name.endswith("_token") or token is None:
            continue
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
        elif name in _NAMED:  # `add_bos_token` is no token
            at = f"{os.path.join(directory, _SPECIAL if name in special else _TOKENIZER)}: {name}"
            raise _wrong(at, "a token's text", describe(token))
    return found


def _defaults(directory: str) -> dict[str, Any]:
    """The sampling that the checkpoint asks for where a request does not say."""
    values = read_generation_config(directory)
    where = os.path.join(directory, _GENERATION)
    found = {name: values[name] for name in _SAMPLING if values.get(name) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0  # two names for all of them
    try:
        SamplingParams(**found).validate(vocab_size=1)
    except RequestError as error:
        at = f"{where}: {error.where}"
        raise _wrong(at, error.expected, error.got) from None
    sampled = values.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise _wrong(f"{where}: do_sample", "true or false", describe(sampled))
    return found | ({"temperature": 0.0} if sampled is False else {})


def _json(directory: str, name: str) -> dict[str, Any]:
    """One of the files; empty where it is not there."""
    path = os.path.join(directory, name)
    try:
        raw = read_whole(path, _MOST_JSON)
    except SourceNotFound:
        return {}
    # Python writes Infinity, and some tokenizers' longest sequence is that.
    return parse_object(raw, where=path, hint=_HINT, allow_constants=True)


def _text(path: str, hint: str) -> str:
    try:
        return read_whole(path, _MOST_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "the chat template is not UTF-8", where=path, got=error, hint=hint
        ) from None


def _wrong(where: str, expected: object, got: object) -> CheckpointError:
    return CheckpointError(
        "a file beside the weights holds a bad value",
        where=where,
        expected=expected,
        got=got,
        hint="Mend the entry, or save the model again.",
    )
