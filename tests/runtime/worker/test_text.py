"""Tokenizer and detokeniser against the tokenizers library's own one-shot decode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from coldframe.loader.errors import CheckpointError, RequestError, SourceNotFound
from coldframe.runtime.checkpoints.demo_tokenizer import train
from coldframe.runtime.worker.text import Detokenizer, Tokenizer

TEXTS = [
    "Once upon a time, a replica slept at zero.",
    " leading and  double  spaces\n\n\ttabs ",
    "naïve café, 日本語, العربية, ไทย, 🦀👩‍👩‍👧‍👦, \N{REPLACEMENT CHARACTER} ok",
    "",
]
WORDS = ["▁", "▁the", "▁cat", "the", "s", "▁▁", "\N{REPLACEMENT CHARACTER}", "é", "!", "\n"]


def byte_level(folder: Path) -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen: bytes in disguise, with added tokens special and plain."""
    train(folder / "tokenizer.json", 500, add_bos=True)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens(["<|more|>"])
    inner.add_tokens(["<tool_call>", "two words", "日本"])
    return inner


def byte_fallback(decoder: tokenizers.decoders.Decoder) -> tokenizers.Tokenizer:
    """As Llama 2, Mistral and Gemma: pieces with a visible space, and a token for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz"} - set(pieces))
    vocab = {piece: place for place, piece in enumerate([*pieces, *letters])}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoder
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.add_tokens([AddedToken("<plain>", normalized=False)])
    return inner


def metaspace() -> tokenizers.Tokenizer:
    """As T5: pieces with a visible space and no bytes."""
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *((word, -1.0) for word in WORDS)]
    inner = tokenizers.Tokenizer(models.Unigram(vocab, 0, False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["</s>"])
    return inner


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    plain = byte_level(tmp_path_factory.mktemp("byte-level"))
    plain.decoder = None
    found = {
        "byte-level": byte_level(tmp_path_factory.mktemp("byte-level")),
        "llama": byte_fallback(decoders.Sequence([*llama, decoders.Strip(" ", 1, 0)])),
        "gemma": byte_fallback(decoders.Sequence(llama)),
        "metaspace": metaspace(),
        "no-decoder": plain,
    }
    return {name: Tokenizer(inner) for name, inner in found.items()}


KINDS = pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma", "metaspace", "no-decoder"])


def find(tokenizer: Tokenizer, piece: str) -> int:
    return next(place for place in range(tokenizer.vocab_size) if tokenizer.token(place) == piece)


def stream(tokenizer: Tokenizer, prompt: list[int], generated: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.push(token) for token in generated]
    return "".join(pieces) + detokenizer.flush()


@KINDS
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_tokens_give_the_text_of_one_decode(
    every: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = every[kind]
    # Three ids beyond the vocabulary: models have more rows than tokens.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    assert stream(tokenizer, [], ids) == tokenizer.decode(ids)


@KINDS
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_the_text_goes_on_where_the_prompt_ends(
    every: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = every[kind]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    prompt = data.draw(st.lists(ids, max_size=20))
    generated = data.draw(st.lists(ids, max_size=20))
    before, after = tokenizer.decode(prompt), tokenizer.decode(prompt + generated)
    if after.startswith(before) and not before.endswith("\N{REPLACEMENT CHARACTER}"):
        assert stream(tokenizer, prompt, generated) == after[len(before) :]


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
@pytest.mark.parametrize("text", TEXTS)
def test_real_text_comes_back(every: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = every[kind]
    ids = tokenizer.encode(text)
    assert stream(tokenizer, [], ids) == text
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut])
        if text.startswith(before) and not before.endswith("\N{REPLACEMENT CHARACTER}"):
            assert stream(tokenizer, ids[:cut], ids[cut:]) == text[len(before) :]


def test_the_space_in_front_of_the_first_word_depends_on_the_prompt(
    every: dict[str, Tokenizer],
) -> None:
    llama = every["llama"]
    the, cat = find(llama, "▁the"), find(llama, "▁cat")
    assert stream(llama, [], [cat]) == "cat"
    assert stream(llama, [the], [cat]) == " cat"


def test_a_character_comes_out_with_its_last_byte(every: dict[str, Tokenizer]) -> None:
    tokenizer = every["byte-level"]
    crab = tokenizer.encode("🦀", add_special=False)
    assert len(crab) == 4
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"))
    assert [detokenizer.push(token) for token in crab] == ["", "", "", "🦀"]
    # The prompt may end within a character, too.
    assert stream(tokenizer, crab[:2], crab[2:]) == "🦀"
    assert stream(tokenizer, [], crab[:3]) == "\N{REPLACEMENT CHARACTER}"


def test_words_are_not_held_back(every: dict[str, Tokenizer]) -> None:
    for kind in ("byte-level", "llama", "metaspace"):
        tokenizer = every[kind]
        detokenizer = Detokenizer(tokenizer)
        ids = tokenizer.encode("the the the", add_special=False)
        sent = ""
        for count, token in enumerate(ids, 1):
            sent += detokenizer.push(token)
            assert sent == tokenizer.decode(ids[:count])


def test_special_tokens_have_no_text_but_added_ones_do(every: dict[str, Tokenizer]) -> None:
    tokenizer = every["byte-level"]
    ids = tokenizer.encode("a<|more|><tool_call>b<|im_end|>")
    assert ids[0] == 0  # begin-of-text
    assert stream(tokenizer, [], ids) == "a<tool_call>b"
    assert tokenizer.encode("a", add_special=False) == ids[1:2]


def test_decoding_is_linear(every: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the tokens given to the library, for the tokenizers that need it, at their worst."""
    tokenizer = every["llama"]
    decoded = 0
    original = Tokenizer.decode

    def counting(self: Tokenizer, ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return original(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    byte, word = find(tokenizer, "<0xE9>"), find(tokenizer, "▁the")
    for ids in ([word] * 1000, [byte] * 1000, ([byte] * 9 + [word]) * 100):
        decoded = 0
        stream(tokenizer, [], ids)
        assert decoded <= 4 * len(ids)


def test_the_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    inner = byte_level(tmp_path)
    # As some checkpoints come: with the truncation and padding of their training.
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == inner.get_vocab_size() == 504
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert Tokenizer.load(str(tmp_path)).encode("") == [0]


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="save_pretrained") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.where == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "New"}}']
)
def test_a_broken_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.got
    assert tokenizers.__version__ in str(caught.value)


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_a_tokenizer_that_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        Tokenizer.load(tmp_path)


def test_text_that_the_vocabulary_cannot_spell() -> None:
    # Without a token for the unknown the library raises a bare Exception.
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]")))
    assert tokenizer.encode("a") == [0]
    with pytest.raises(RequestError, match="cannot encode"):
        tokenizer.encode("b")


def test_text_that_is_not_unicode(every: dict[str, Tokenizer]) -> None:
    with pytest.raises(RequestError) as caught:
        every["byte-level"].encode("caf\udce9")
    assert caught.value.where == "character 3"
    assert str(caught.value).isascii()


def test_torch_is_not_needed() -> None:
    code = "import sys, coldframe.runtime.worker.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_a_long_text_has_the_same_tokens_in_the_background(
    every: dict[str, Tokenizer], kind: str
) -> None:
    text = " ".join(TEXTS) * 50
    tokenizer = every[kind]
    for special in (False, True):
        expected = tokenizer.encode(text, add_special=special)
        assert tokenizer.encode(text, add_special=special, in_background=True) == expected
