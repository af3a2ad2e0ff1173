"""The commands that the README and the pages show, as they stand there.

A command is a line of a block of shell (fenced as `sh`, `bash` or `console`, or indented and
beginning with a program), or a span of code in a sentence that begins with a program of ours, or
with one that the pages ask to be called.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

__all__ = ["PAGES", "ROOT", "Block", "Call", "Line", "blocks", "calls", "spans"]

ROOT = Path(__file__).parents[2]
_HISTORY = {"LOG.md"}  # what was done on a day, by the flags of that day
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in _HISTORY),
]

_FENCED = {"sh", "bash", "shell", "console"}
_PROGRAMS = {
    *(
        "aws",
        "coldframe",
        "curl",
        "docker",
        "export",
        "gcloud",
        "helm",
        "kubectl",
        "make",
        "podman",
    ),
    *("pip", "python", "python3", "vllm"),
}
"""What an indented block begins with, if it is one of commands."""
_IN_SENTENCES = re.compile(r"(coldframe|make|pip|kubectl|(images|build|snapshot)/[\w./-]+) ")
_ASSIGNED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_SUBSTITUTED = re.compile(r"\$\([^()]*\)")


@dataclass(frozen=True)
class Line:
    """A command.

    Args:
        text: Without prompt and comment, on one line.
        output: What the page says that it prints; of blocks of `console` alone.
    """

    text: str
    output: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        """What is run first."""
        return next(iter(calls(self.text)), Call((), "", ())).program


@dataclass(frozen=True)
class Block:
    """Commands that belong together.

    Args:
        page: The file.
        number: Its line in the file.
        language: As it is fenced; empty for an indented one.
        lines: The commands.
    """

    page: Path
    number: int
    language: str
    lines: tuple[Line, ...]

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"


@dataclass(frozen=True)
class Call:
    """One program with its arguments, of a line that may have several.

    Args:
        environment: `NAME=VALUE` before it.
        program: Its name.
        arguments: Behind it, without what is redirected.
    """

    environment: tuple[str, ...]
    program: str
    arguments: tuple[str, ...]


def blocks() -> list[Block]:
    """All blocks of commands on all pages."""
    return [block for page in PAGES for block in _of_page(page)]


def spans() -> Iterator[tuple[str, str]]:
    """Each span of code in a sentence that is a command, with where it is."""
    for page in PAGES:
        for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
            for child in token.children or ():
                if child.type == "code_inline" and _IN_SENTENCES.match(child.content):
                    number = token.map[0] + 1 if token.map else 0
                    yield f"{page.relative_to(ROOT)}:{number}", " ".join(child.content.split())


def _of_page(page: Path) -> Iterator[Block]:
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        language = token.info.strip() if token.type == "fence" else ""
        if not (token.type == "code_block" or language in _FENCED):
            continue
        lines = tuple(_console(token.content) if language == "console" else _plain(token.content))
        shell = language or (lines and lines[0].program in _PROGRAMS)
        if shell and lines:
            yield Block(page, token.map[0] + 1 if token.map else 0, language, lines)


def _plain(text: str) -> Iterator[Line]:
    for line in text.replace("\\\n", " ").splitlines():
        if bare := " ".join(_uncommented(line).split()):
            yield Line(bare)


def _console(text: str) -> Iterator[Line]:
    command: str | None = None
    output: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            if command is not None:
                yield Line(command, tuple(output))
            command, output = line[2:], []
        else:
            output.append(line)
    if command is not None:
        yield Line(command, tuple(output))


def _uncommented(line: str) -> str:
    """Without the comment, which begins with a # that stands alone and in no quotes."""
    for found in re.finditer(r"(?:^|\s)#(?=\s|$)", line):
        before = line[: found.start()]
        if before.count('"') % 2 == 0 and before.count("'") % 2 == 0:
            return before
    return line


def calls(text: str) -> list[Call]:
    """The programs that a line runs, one after the other or at once."""
    # What is put in by the shell is one word, whatever it is.
    lexer = shlex.shlex(_SUBSTITUTED.sub("SUBSTITUTED", text), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError:  # quotes that do not end: no line of shell
        return []
    found: list[list[str]] = [[]]
    skipping = False
    for word in words:
        if set(word) <= set(";|&"):
            found.append([])
        elif set(word) <= set("<>&"):
            skipping = True
        elif skipping:
            skipping = False
        else:
            found[-1].append(word)
    return [_call(part) for part in found if part]


def _call(words: list[str]) -> Call:
    count = next((i for i, word in enumerate(words) if not _ASSIGNED.match(word)), len(words))
    environment, rest = words[:count], words[count:]
    return Call(tuple(environment), rest[0] if rest else "", tuple(rest[1:]))
