"""The calls in an answer, read as its text comes: text is passed on, calls when they are whole.

What looks like a call and is none stays text: nothing that the model has written is lost. A call is
only what may come back as one in the next turn.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from coldframe.runtime.gateway.openai.requests import MAX_NAME
from coldframe.runtime.gateway.openai.tools import CLOSE, MAX_TOOLS, OPEN, ToolUse

__all__ = ["Call", "CallReader"]


@dataclass(frozen=True, slots=True)
class Call:
    """A function that is to be called.

    Args:
        id: The call's.
        name: The function's.
        arguments: JSON.
    """

    id: str
    name: str
    arguments: str

    def to_openai(self) -> dict[str, Any]:
        """As it stands in a message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallReader:
    """One choice's answer.

    Args:
        use: How calls stand in it.
    """

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._held: list[str] = []
        """What has come and is not decided; of more than one piece only within a call."""
        self._tail = ""
        """The end of what is held, in which a tag that ends a call may have begun."""
        self._behind_call = False
        self.calls = 0
        """How many there were so far."""
        self._inside = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Takes what has come: the text that is none of a call, and the calls that are whole."""
        self._held.append(text)
        if self._use.format != "hermes":
            return "", []
        # A call may be long and come in many pieces: each is searched once.
        recent = self._tail + text
        self._tail = recent[1 - len(CLOSE) :]
        if self._inside and CLOSE not in recent:
            return "", []
        return self._read_tags()

    def end(self, finish: str) -> tuple[str, list[Call], str]:
        """Takes the end of the answer, for one reason or another.

        Returns:
            The text that was held back, the last calls, and how it has ended: `tool_calls` where
            the model has chosen to call, as OpenAI has it.
        """
        rest, self._held = "".join(self._held), []
        calls: list[Call] = []
        if self._use.format == "named":
            if isinstance(_parsed(rest), dict):
                calls, rest = [self._call(self._use.name or "", rest)], ""
            return rest, calls, finish
        if self._use.format == "array":
            entries = _parsed(rest)
            if isinstance(entries, list):
                rest = ""
                for entry in entries:
                    calls.append(self._call(entry["name"], _json(entry["parameters"])))
        elif rest.startswith(OPEN):  # its last tag was the end of the answer
            call = self._tagged(rest.removeprefix(OPEN))
            calls, rest = ([], rest) if call is None else ([call], "")
        if self._use.format == "hermes":
            rest = self._words(rest)
        done = finish == "stop" and self.calls > 0
        return rest, calls, "tool_calls" if done else finish

    def _read_tags(self) -> tuple[str, list[Call]]:
        words, calls = [], []
        held, place = "".join(self._held), 0
        while True:
            start = held.find(OPEN, place)
            self._inside = start >= 0
            if start < 0:
                start = max(place, len(held) - _begun(held))
                words.append(self._words(held[place:start]))
                place = start
                break
            words.append(self._words(held[place:start]))
            place, inner = start, start + len(OPEN)
            end = held.find(CLOSE, inner)
            if end < 0:
                break
            call = self._tagged(held[inner:end])
            place = end + len(CLOSE)
            if call is None:
                words.append(self._words(held[start:place]))
            else:
                calls.append(call)
                self._behind_call = True
        self._held = [held[place:]]
        self._tail = held[place:][1 - len(CLOSE) :]
        return "".join(words), calls

    def _words(self, text: str) -> str:
        """Text without the line feeds behind a call, which are nobody's words."""
        if self._behind_call:
            text = text.lstrip()
            self._behind_call = not text
        return text

    def _tagged(self, inner: str) -> Call | None:
        found = _parsed(inner)
        if not isinstance(found, dict) or self.calls >= MAX_TOOLS:
            return None
        name = found.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            return None
        # Some write them by the name that the function's schema has.
        arguments = found.get("arguments", found.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else _json(arguments)
        if not isinstance(_parsed(text), dict):
            return None
        try:
            (name + text).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can say
            return None
        return self._call(name, text)

    def _call(self, name: str, arguments: str) -> Call:
        self.calls += 1
        return Call(f"call_{secrets.token_hex(12)}", name, arguments)


def _begun(text: str) -> int:
    """How many characters at a text's end may be the beginning of a tag."""
    return next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_none_of_json)
    except (ValueError, RecursionError):
        return None


def _none_of_json(name: str) -> Any:
    raise ValueError(name)  # NaN and the like


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
