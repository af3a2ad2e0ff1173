"""Chat templates as Transformers renders them: the same Jinja environment, nothing else.

What templates of the hub may use is what `transformers.utils.chat_template_utils` offers: trimmed
blocks, `break` and `continue`, `{% generation %}`, `raise_exception`, `strftime_now`, `tojson`
without HTML's escapes, and sandboxed `dict` and `namespace`. A template is code of whoever made the
checkpoint; what keeps it from doing harm is the process that this runs in (`template_process`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["OutputTooLong", "Refused", "Templates"]

_KEPT = 16


class Refused(TemplateError):
    """The template's own words: what it gave to `raise_exception`."""


class OutputTooLong(Exception):
    """What the template makes is longer than it may be."""


class Templates:
    """Renders templates, and keeps those that it has compiled.

    Args:
        max_chars: The most characters that one may make.
    """

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars
        self._compiled: Callable[[str], jinja2.Template] = lru_cache(_KEPT)(
            _environment().from_string
        )

    def compile(self, source: str) -> None:
        """Compiles a template, for when it will be needed.

        Raises:
            jinja2.TemplateError: It is none.
        """
        self._compiled(source)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Fills in a template.

        Args:
            source: Jinja.
            variables: By name; plain JSON values.

        Raises:
            Refused: The template does not take these variables, and says so.
            OutputTooLong: It makes more than it may.
            Exception: Whatever else its code runs into.
        """
        parts: list[str] = []
        left = self.max_chars
        for part in self._compiled(source).generate(variables):
            left -= len(part)
            if left < 0:
                raise OutputTooLong
            parts.append(part)
        return "".join(parts)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks for training what an assistant says; here its content is all.

    The content is a call block, as in Transformers: what it sets, it sets for itself.
    """

    tags = {"generation"}  # noqa: RUF012 - the base class has it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("content")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` for templates, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates; names that begin with an underscore are Python's, not theirs."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Without a name for itself, so that a template may have a `self` in it.
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace's names may not begin with an underscore, as {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
