"""Text to token ids, and token ids back to text as they come.

What is streamed is exactly what one decode of the whole answer would give. All state follows from
the token ids, so a worker that takes a request over replays them. Chat templates and the ids that
end a generation are left to others. Torch is not needed.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coldframe.loader.errors import CheckpointError, RequestError, SourceNotFound
from coldframe.loader.files import read_whole
from coldframe.runtime.worker.stops import StopMatcher

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Detokenizer", "StopMatcher", "Tokenizer"]

_MAX_BYTES = 500_000_000
"""The largest tokenizer.json in use is a tenth of it."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """A checkpoint's tokenizer.json; `load` reads it."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # Some checkpoints ship the truncation and padding of their training.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special = {token for token, content in added.items() if content.special}
        kinds = _decoder_kinds(inner.decoder)
        self.byte_level = kinds == ["ByteLevel"]
        """Tokens are bytes in disguise, and text is those bytes in a row (GPT-2, Llama 3, Qwen)."""
        self.byte_fallback = "ByteFallback" in kinds
        """Some tokens stand for single bytes: `<0x0A>` (Llama 2, Mistral, Gemma)."""

    @staticmethod
    def load(model: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint.

        Args:
            model: The checkpoint's directory.

        Raises:
            SourceNotFound: There is no tokenizer.json.
            SourceError: It cannot be read.
            CheckpointError: It is not a tokenizer that this version of tokenizers reads.
        """
        import tokenizers

        path = Path(model) / "tokenizer.json"
        try:
            content = read_whole(str(path), _MAX_BYTES)
        except SourceNotFound:
            raise SourceNotFound(
                "the checkpoint has no tokenizer",
                where=path,
                hint="A checkpoint with a tokenizer.model alone gets one from Transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
            ) from None
        try:
            return Tokenizer(tokenizers.Tokenizer.from_buffer(content))
        except Exception as error:  # what the library raises differs between its versions
            raise CheckpointError(
                "the tokenizer cannot be used",
                where=path,
                expected=f"a file that tokenizers {tokenizers.__version__} reads",
                got=str(error),
                hint="Fetch the file again, or update the tokenizers package.",
            ) from error

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model may have more rows than that."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def encode(
        self, text: str, *, add_special: bool = True, in_background: bool = False
    ) -> list[int]:
        """The token ids of a text.

        Args:
            text: Any text without lone surrogates.
            add_special: Put the tokens around it that the model expects, such as begin-of-text.
            in_background: Let other Python threads run meanwhile. The library starts a pool of
                threads for it, with which a worker can no longer be frozen.

        Raises:
            RequestError: The text is not Unicode text, or the vocabulary has nothing for it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                "the text cannot be encoded",
                where=f"character {error.start}",
                expected="Unicode text",
                got=ascii(text[error.start]),
                hint="Send it as UTF-8.",
            ) from None
        try:
            if in_background:  # only a batch releases the interpreter's lock
                (encoded,) = self._inner.encode_batch([text], add_special_tokens=add_special)
            else:
                encoded = self._inner.encode(text, add_special_tokens=add_special)
            return list(encoded.ids)
        except Exception as error:  # the library has no type of its own
            raise RequestError(
                "the tokenizer cannot encode this text",
                got=str(error),
                hint="Its vocabulary has no token for the unknown. Send token ids instead.",
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some token ids; special and unknown ones have none."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def token(self, token: int) -> str | None:
        """A token as it stands in the vocabulary; None for special and unknown ids."""
        return None if token in self._special else self._inner.id_to_token(token)

    def spell(self, token: int) -> bytes:
        """The bytes that a token stands for, special ones by their name; none for an unknown id."""
        text = self._inner.id_to_token(token)
        if text is None:
            return b""
        if token in self._added:
            return text.encode()
        if self.byte_level:
            return _bytes_of(text)
        if self.byte_fallback and _BYTE_TOKEN.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        # SentencePiece writes the space in front of a word as a block.
        return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


class Detokenizer:
    """Token ids in, text out, as soon as it can no longer change.

    The pieces, put together, are `decode(prompt + generated)` without `decode(prompt)`. The
    prompt matters: the space in front of a word belongs to the word's token, and decoding drops
    it at the start of a text.

    Args:
        tokenizer: The model's.
        prompt_ids: What the text follows.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        method = _Bytes if tokenizer.byte_level else _Pieces
        self._method: _Bytes | _Pieces = method(tokenizer, prompt_ids)

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is now certain, often none or one word."""
        return self._method.push(token)

    def flush(self) -> str:
        """At the end, what was held back: a character that was never completed."""
        return self._method.flush()


class _Bytes:
    """For byte-level tokenizers: a token is a few bytes, and UTF-8 has an incremental decoder."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # The prompt may end within a character: at most three bytes are pending.
        for token in _tail(tokenizer, prompt_ids, lambda texts: len("".join(texts)) >= 3):
            self.push(token)

    def push(self, token: int) -> str:
        text = self._tokenizer.token(token)
        if text is None:
            return ""
        return self._decoder.decode(_bytes_of(text))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Pieces:
    """For all other tokenizers: decode a few tokens without and with the new ones, and compare.

    `_tokens` starts with tokens that have been sent, `_sent` of them. They are there for the
    decoder to do with them what it does at the start of a text. Once new text is out, they are
    dropped and the ones behind them take their place, so that each token is decoded a few times
    and no more.

    A row of byte tokens is text only as a whole: one wrong byte turns the whole row into
    replacement characters. So it is held until it ends.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = _tail(tokenizer, prompt_ids, self._is_anchored)
        self._sent = len(self._tokens)

    def push(self, token: int) -> str:
        text = self._tokenizer.token(token)
        if text is None:
            return ""
        self._tokens.append(token)
        if self._tokenizer.byte_fallback and _BYTE_TOKEN.fullmatch(text):
            return ""
        return self._release(final=self._tokenizer.byte_fallback)

    def flush(self) -> str:
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._tokens[: self._sent])
        after = self._tokenizer.decode(self._tokens)
        if len(after) <= len(before) or (after.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return ""
        del self._tokens[: self._sent]
        self._sent = len(self._tokens)
        return after[len(before) :]

    def _is_anchored(self, texts: list[str]) -> bool:
        return len(texts) >= 5 and not _BYTE_TOKEN.fullmatch(texts[-1])


def _tail(
    tokenizer: Tokenizer, ids: Sequence[int], enough: Callable[[list[str]], bool]
) -> list[int]:
    """The last tokens of a prompt that have text: as few as are `enough`, seen from the end."""
    tail: list[int] = []
    texts: list[str] = []
    for token in reversed(ids):
        text = tokenizer.token(token)
        if text is not None:
            tail.append(token)
            texts.append(text)
            if enough(texts):
                break
    return tail[::-1]


def _decoder_kinds(decoder: tokenizers.decoders.Decoder | None) -> list[str]:
    """The types of a decoder and of those in it; its state is the JSON of tokenizer.json."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


def _bytes_of(text: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary."""
    disguises = _disguises()
    try:
        return bytes(disguises[character] for character in text)
    except KeyError:  # an added token that stands in the vocabulary as plain text
        return text.encode()


@functools.cache
def _disguises() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary, as GPT-2 defined them.

    Bytes that Latin-1 prints stand for themselves, the others for what follows from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
