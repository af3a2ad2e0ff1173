"""Pieces as they come, to OpenAI's answers: one document at the end, or chunks on the way.

Outgoing shapes are plain dicts: a chunk is made for every token, and a model class that checks
what we have written ourselves would cost more than all else here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from coldframe.runtime.gateway.api import ApiError, ModelCard, Piece
from coldframe.runtime.gateway.openai.logprobs import Columns, chat_entry
from coldframe.runtime.gateway.openai.prepare import Prepared
from coldframe.runtime.gateway.openai.tool_calls import Call, CallReader

__all__ = ["Chunks", "Document", "document", "fingerprint"]


class Document:
    """The whole answer, put together from its pieces.

    Args:
        prepared: The request.
        card: The model.
        id: The answer's.
        created: Seconds since 1970.
    """

    def __init__(self, prepared: Prepared, card: ModelCard, *, id: str, created: int) -> None:
        self._prepared = prepared
        self._head = {"id": id, "created": created, "model": card.name}
        self._fingerprint = fingerprint(card)
        self._usage = _Usage(prepared)
        self._choices = [_Choice(prepared) for _ in prepared.generations]

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        self._usage.add(piece)
        self._choices[piece.choice].add(piece)

    def finish(self) -> dict[str, Any]:
        """The answer.

        Raises:
            ApiError: A choice has no end.
        """
        chat = self._prepared.kind == "chat"
        result = {
            **self._head,
            "object": "chat.completion" if chat else "text_completion",
            "system_fingerprint": self._fingerprint,
            "choices": [choice.finish(i) for i, choice in enumerate(self._choices)],
            "usage": self._usage.to_json(),
        }
        if chat:
            result["service_tier"] = None
        return result


class Chunks:
    """An answer in chunks: what each piece adds, as soon as it is there.

    A chat's choice begins with a chunk that names its role. A choice ends with a chunk that has
    its finish_reason and no text. A piece without text is nothing to send, unless it has
    log-probabilities or its token's id. For the arguments see `Document`.
    """

    def __init__(self, prepared: Prepared, card: ModelCard, *, id: str, created: int) -> None:
        self._prepared = prepared
        self._chat = prepared.kind == "chat"
        self._head: dict[str, Any] = {
            "id": id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": created,
            "model": card.name,
            "system_fingerprint": fingerprint(card),
        }
        if self._chat:
            self._head["service_tier"] = None
        if prepared.include_usage:
            self._head["usage"] = None
        self._usage = _Usage(prepared)
        self._begun: set[int] = set()
        self._columns = [Columns() for _ in prepared.generations]
        use = prepared.tools
        self._readers = [CallReader(use) for _ in prepared.generations] if use else []

    def of(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks that a piece makes: often one, sometimes none."""
        self._usage.add(piece)
        index, made = piece.choice, []
        if self._chat and index not in self._begun:
            self._begun.add(index)
            made.append(self._chunk(index, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs(piece)
        calls: list[tuple[int, Call]] = []
        text, finish = piece.text, piece.finish
        if self._readers:
            text, finish, calls = _called(self._readers[index], piece)
        if text or logprobs is not None or self._prepared.token_ids:
            content = {"content": text} if self._chat else text
            made.append(self._chunk(index, content, logprobs))
            if self._prepared.token_ids:
                made[-1]["choices"][0]["token_ids"] = [piece.token]
        for place, call in calls:
            delta = {"tool_calls": [{"index": place, **call.to_openai()}]}
            made.append(self._chunk(index, delta))
        if finish is not None:
            made.append(self._chunk(index, {} if self._chat else "", finish=finish))
        return made

    def last(self) -> dict[str, Any] | None:
        """The chunk behind all others: the usage, where it is asked for."""
        if not self._prepared.include_usage:
            return None
        return {**self._head, "choices": [], "usage": self._usage.to_json()}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._prepared.logprobs:
            return None
        if not self._chat:
            return self._columns[piece.choice].entry(piece)
        entry = chat_entry(piece)
        return None if entry is None else {"content": [entry], "refusal": None}

    def _chunk(
        self,
        index: int,
        content: object,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta" if self._chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        return {**self._head, "choices": [choice]}


def _called(reader: CallReader, piece: Piece) -> tuple[str, str | None, list[tuple[int, Call]]]:
    """What a piece of an answer that may call tools adds: text, end, calls and their places."""
    first = reader.calls
    text, calls = reader.push(piece.text)
    finish = piece.finish
    if finish is not None:
        rest, last, finish = reader.end(finish)
        text, calls = text + rest, calls + last
    return text, finish, list(enumerate(calls, first))


def document(
    prepared: Prepared, card: ModelCard, pieces: Iterable[Piece], *, id: str, created: int
) -> dict[str, Any]:
    """The whole answer of pieces that are all there; see `Document`."""
    whole = Document(prepared, card, id=id, created=created)
    for piece in pieces:
        whole.add(piece)
    return whole.finish()


def fingerprint(card: ModelCard) -> str:
    """A word that stays the same as long as the same seed gives the same answer: the model's."""
    identity = f"{card.name}\0{card.created}\0{card.vocab_size}\0{card.context_length}"
    return "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10]


class _Usage:
    """Counts tokens: a prompt's once, however many choices it has.

    Of such a prompt those tokens were cached that no choice had to compute.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._n = prepared.n
        self._prompts = [0] * (len(prepared.generations) // prepared.n)
        self._cached = [0] * len(prepared.generations)
        self._completion = 0

    def add(self, piece: Piece) -> None:
        self._prompts[piece.choice // self._n] = piece.prompt_tokens
        self._cached[piece.choice] += piece.cached_tokens
        self._completion += 1

    def to_json(self) -> dict[str, Any]:
        prompt, n = sum(self._prompts), self._n
        cached = sum(min(self._cached[k : k + n]) for k in range(0, len(self._cached), n))
        return {
            "prompt_tokens": prompt,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens": self._completion,
            "total_tokens": prompt + self._completion,
        }


class _Choice:
    """One choice of a document."""

    def __init__(self, prepared: Prepared) -> None:
        self._chat = prepared.kind == "chat"
        self._texts: list[str] = []
        self._tokens: list[int] | None = [] if prepared.token_ids else None
        self._finish: str | None = None
        self._wants_logprobs = prepared.logprobs
        self._entries: list[dict[str, Any]] = []
        self._columns = Columns()
        self._reader = CallReader(prepared.tools) if prepared.tools else None
        self._calls: list[Call] = []

    def add(self, piece: Piece) -> None:
        if self._reader is None:
            text, self._finish = piece.text, piece.finish
        else:
            text, self._finish, calls = _called(self._reader, piece)
            self._calls += (call for _, call in calls)
        self._texts.append(text)
        if self._tokens is not None:
            self._tokens.append(piece.token)
        if self._wants_logprobs:
            entry = chat_entry(piece) if self._chat else self._columns.entry(piece)
            if entry is not None:
                self._entries.append(entry)

    def finish(self, index: int) -> dict[str, Any]:
        if self._finish is None:
            raise ApiError(500, "The answer has no end.", kind="server_error", code="model_error")
        text = "".join(self._texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message["content"] = text or None
            message["tool_calls"] = [call.to_openai() for call in self._calls]
        return {
            "index": index,
            "message" if self._chat else "text": message if self._chat else text,
            "logprobs": self._logprobs(),
            "finish_reason": self._finish,
            **({} if self._tokens is None else {"token_ids": self._tokens}),
        }

    def _logprobs(self) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        if self._chat:
            return {"content": self._entries, "refusal": None}
        return _together(self._entries)


def _together(columns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for part in columns for entry in part[name]] for name in names}
