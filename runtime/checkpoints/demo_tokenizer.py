"""A byte-level BPE tokenizer for a demo model, trained here on the standard library's source.

Every Python installation carries a few megabytes of English prose and code: its own. The files
are read in a fixed order, so the same Python gives the same tokenizer.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["FIRST_WORD", "SPECIAL_TOKENS", "corpus", "tokenizer_config", "train"]

BOS, EOS, TURN_START, TURN_END = SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
)
"""Ids 0 to 3. A chat turn ends with the last of them, so it ends a generation as well."""

FIRST_WORD = len(SPECIAL_TOKENS) + 256
"""The first id behind the special tokens and the single bytes: from here on, ids are text."""

CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus(limit: int) -> Iterator[str]:
    """Source files of the standard library, in a fixed order.

    Args:
        limit: Stop after about this many characters.

    Yields:
        The text of one file at a time.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left = limit
    for path in sorted(root.rglob("*.py")):
        # Installed packages and the tests differ from one installation to the next.
        if {"site-packages", "dist-packages", "test", "tests"} & set(path.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")[:left]
        left -= len(text)
        yield text
        if left <= 0:
            return


def train(path: Path, vocab_size: int, *, add_bos: bool) -> int:
    """Train a tokenizer and write its tokenizer.json.

    Args:
        path: The file to write.
        vocab_size: The most tokens it may have, the special ones included.
        add_bos: Whether encoding puts the begin-of-text token in front, as Llama's does.

    Returns:
        The number of tokens, at most `vocab_size`.
    """
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(_trained(vocab_size))
    tokenizer.post_processor = (
        processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
        )
        if add_bos
        else processors.ByteLevel(trim_offsets=False)
    )
    tokenizer.save(str(path))
    return int(tokenizer.get_vocab_size())


@functools.cache
def _trained(vocab_size: int) -> str:
    """A tokenizer.json, but for what encoding puts in front: that is a model's own.

    Kept, since whoever writes several models writes them for the same few vocabularies.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # A thousand characters a token: enough to find that many merges, and over in two seconds.
    tokenizer.train_from_iterator(corpus(1000 * vocab_size), trainer)
    return str(tokenizer.to_str())


def tokenizer_config(context: int, *, add_bos: bool) -> dict[str, Any]:
    """The content of tokenizer_config.json.

    Args:
        context: The model's longest sequence in tokens.
        add_bos: As for `train`.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": BOS if add_bos else None,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [TURN_START, TURN_END],
        "chat_template": CHAT_TEMPLATE,
    }
