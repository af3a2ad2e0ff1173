"""The calls in an answer, read as its text comes: text is passed on, calls when they are whole.

What looks like a call and is none stays text: nothing that the model has written is lost.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from coldframe.runtime.gateway.openai.tools import ToolUse

__all__ = ["Call", "CallReader"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


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
        self._held = ""
        self._behind_call = False
        self.calls = 0
        """How many there were so far."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Takes what has come: the text that is none of a call, and the calls that are whole."""
        self._held += text
        return self._read_tags() if self._use.format == "hermes" else ("", [])

    def end(self, finish: str) -> tuple[str, list[Call], str]:
        """Takes the end of the answer, for one reason or another.

        Returns:
            The text that was held back, the last calls, and how it has ended: `tool_calls` where
            the model has chosen to call, as OpenAI has it.
        """
        rest, self._held = self._held, ""
        calls: list[Call] = []
        if self._use.format == "named":
            if _parsed(rest) is not None:
                calls, rest = [self._call(self._use.name or "", rest)], ""
            return rest, calls, finish
        if self._use.format == "array":
            entries = _parsed(rest)
            if isinstance(entries, list):
                rest = ""
                for entry in entries:
                    calls.append(self._call(entry["name"], _json(entry["parameters"])))
        elif rest.startswith(_OPEN):  # its last tag was the end of the answer
            call = self._tagged(rest.removeprefix(_OPEN))
            calls, rest = ([], rest) if call is None else ([call], "")
        if self._use.format == "hermes":
            rest = self._words(rest)
        done = finish == "stop" and self.calls > 0
        return rest, calls, "tool_calls" if done else finish

    def _read_tags(self) -> tuple[str, list[Call]]:
        text, calls = "", []
        while True:
            before, tag, behind = self._held.partition(_OPEN)
            if not tag:
                keep = _begun(self._held)
                text += self._words(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                break
            inner, end, rest = behind.partition(_CLOSE)
            text += self._words(before)
            if not end:
                self._held = tag + behind
                break
            call = self._tagged(inner)
            if call is None:
                text += self._words(tag + inner + end)
            else:
                calls.append(call)
                self._behind_call = True
            self._held = rest
        return text, calls

    def _words(self, text: str) -> str:
        """Text without the line feeds behind a call, which are nobody's words."""
        if self._behind_call:
            text = text.lstrip()
            self._behind_call = not text
        return text

    def _tagged(self, inner: str) -> Call | None:
        found = _parsed(inner)
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get("arguments", {})
        return self._call(
            found["name"], arguments if isinstance(arguments, str) else _json(arguments)
        )

    def _call(self, name: str, arguments: str) -> Call:
        self.calls += 1
        return Call(f"call_{secrets.token_hex(12)}", name, arguments)


def _begun(text: str) -> int:
    """How many characters at a text's end may be the beginning of a tag."""
    return next((n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n])), 0)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
