"""Every command that the README and the pages show is one that there is, with flags that there are.

That they do what the pages say is tested by running them: `test_commands_run`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import tomllib

import pytest
from markdown_it import MarkdownIt

from coldframe.benchmarks import command as bench
from coldframe.runtime import cli
from coldframe.runtime.flags.parser import Parser
from tests.docs import elsewhere
from tests.docs.commands import PAGES, ROOT, Block, Call, Line, blocks, calls, spans
from tests.docs.elsewhere import EXAMPLES, REASONS, SENTENCES, reason_for

BLOCKS = blocks()
LINES = [(block, line) for block in BLOCKS for line in block.lines]
TEXTS = [*(line.text for _, line in LINES), *(text for _, text in spans())]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
].keys()
RUN_HERE = {
    "coldframe",
    "curl",
    "dd",
    "export",
    "make",
    "mkdir",
    "openssl",
    "printf",
    "sed",
    "truncate",
}
"""What `test_commands_run` runs, where no reason is given why not."""
# What stands for a value that is a number or a quantity.
VALUES = {"N": "1", "RATE": "200MB/s", "SECONDS": "1", "SIZE": "1GiB", "TOKENS": "1"}


def parser_of(arguments: list[str]) -> tuple[Parser, list[str]]:
    """What reads a command's arguments, and those that it gets."""
    name, *rest = arguments
    assert name in cli.COMMANDS, f"there is no command {name!r}"
    if name != "bench":
        return cli.parser_of(name)[1], rest
    assert rest, "which benchmark?"
    assert rest[0] in bench.BENCHMARKS, f"there is no benchmark {rest[0]!r}"
    return bench.parser_of(rest[0])[1], rest[1:]


def complaint(arguments: list[str]) -> str | None:
    """What the command says of its arguments; None where it takes them."""
    if arguments == ["--version"]:
        return None
    parser, rest = parser_of(arguments)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            parser.parse([VALUES.get(word, word) for word in rest])
        except SystemExit:
            return said.getvalue().splitlines()[-1]
    return None


def is_ours(call: Call) -> bool:
    """Whether it is `coldframe`, or that of an environment."""
    return call.program.rpartition("/")[2] == "coldframe"


def name_of(call: Call) -> str:
    """What of coldframe is called: a command, and which part of it where it has some."""
    words = [word for word in call.arguments if not word.startswith("-")]
    return " ".join(words[: 2 if words[:1] in (["bench"], ["snapshot"]) else 1])


def ids(cases: list[tuple[Block, Line]]) -> list[str]:
    return [f"{block.where} {line.text}"[:100] for block, line in cases]


def of_coldframe() -> list[tuple[Block, Line]]:
    return [found for found in LINES if any(c.program == "coldframe" for c in calls(found[1].text))]


def test_there_are_commands_to_look_at() -> None:
    assert {page.name for page in PAGES} >= {"README.md", "quickstart.md", "serving.md"}
    assert len(of_coldframe()) > 60
    pages = {block.page.name for block in BLOCKS}
    assert pages >= {"README.md", "CONTRIBUTING.md", "sources.md", "batch.md", "troubleshooting.md"}


@pytest.mark.parametrize(("block", "line"), of_coldframe(), ids=ids(of_coldframe()))
def test_the_command_takes_its_arguments(
    block: Block, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("COLDFRAME_")]:
        monkeypatch.delenv(name)
    for call in calls(line.text):
        for assignment in call.environment:
            name, _, value = assignment.partition("=")
            monkeypatch.setenv(name, value)
        if call.program == "coldframe":
            assert complaint(list(call.arguments)) is None, f"{block.where}: {line.text}"


def flags_of(words: tuple[str, ...]) -> list[str]:
    """The flags in a sentence's command; `[--seconds 20]` is one, too."""
    return [found for word in words for found in re.findall(r"^\[?(--[a-z][a-z-]*)", word)]


@pytest.mark.parametrize(
    ("where", "text"), [pytest.param(*s, id=f"{s[0]} {s[1]}"[:100]) for s in spans()]
)
def test_what_a_sentence_names_is_there(where: str, text: str) -> None:
    """It may be a part of a command; then what it has must be of that command."""
    for call in calls(text) or [Call((), "coldframe", tuple(text.split()[1:]))]:
        arguments = [word for word in call.arguments if not word.isupper()]
        extras = re.findall(r"coldframe\[([a-z0-9,]+)\]", text) if call.program == "pip" else []
        unknown = {name for names in extras for name in names.split(",")} - EXTRAS
        assert not unknown, f"{where}: {text}"
        if call.program.startswith(("images/", "snapshot/")):
            assert os.access(ROOT / call.program, os.X_OK), f"{where}: {text}"
        if not is_ours(call) or not arguments or arguments[0] in ("--help", "--version"):
            continue
        if arguments == ["bench"]:
            continue
        parser, rest = parser_of(arguments)
        unknown = set(flags_of(tuple(rest))) - set(parser._option_string_actions)
        assert not unknown, f"{where}: {text}"


def test_a_flag_that_there_is_not_is_found() -> None:
    assert complaint(["run", "m", "-p", "x", "--throttel", "1MB/s"]) is not None
    assert complaint(["run", "m", "-p", "x", "--throttle", "fast"]) is not None
    assert complaint(["run", "m", "-p", "x", "--throttle", "RATE"]) is None
    with pytest.raises(AssertionError, match="no command"):
        complaint(["fly", "m"])


@pytest.mark.parametrize(
    "target",
    sorted({c.arguments[0] for text in TEXTS for c in calls(text) if c.program == "make"}),
)
def test_the_makefile_has_the_target(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


def test_every_command_is_run_or_has_a_reason_that_holds() -> None:
    problems = []
    for block, line in LINES:
        reason = reason_for(line)
        if reason is not None:
            wrong = reason.problem(line)
        elif not (line.program in RUN_HERE or not line.program):
            wrong = "nothing runs it: give a reason in tests/docs/elsewhere.py, or have it run"
        else:
            wrong = None
        if wrong:
            problems.append(f"{block.where}: {line.text}: {wrong}")
    assert not problems, "\n".join(problems)


def test_no_reason_is_left_over() -> None:
    used = {id(reason_for(line)) for _, line in LINES}
    left = [pattern for pattern, reason in REASONS if id(reason) not in used]
    assert left == []


def test_what_stands_in_sentences_alone_is_run_as_well() -> None:
    """The same command is in a block, or a test is named."""
    named = {
        name_of(call)
        for _, text in spans()
        for call in calls(text)
        if is_ours(call) and not any(word.isupper() for word in call.arguments[:1])
    }
    programs = {call.program for _, text in spans() for call in calls(text)}
    shown = {name_of(call) for text in TEXTS[: len(LINES)] for call in calls(text) if is_ours(call)}
    alone = (named - shown - {"", "bench"}) | {
        name for name in programs if name.startswith(("images/", "snapshot/"))
    }
    assert alone == set(SENTENCES)
    problems = {name: reason.problem(Line(name)) for name, reason in SENTENCES.items()}
    assert not any(problems.values()), problems


def test_every_benchmark_is_run_by_a_test() -> None:
    """Also those that no page shows: the reference has them all."""
    shown = {name_of(call) for text in TEXTS[: len(LINES)] for call in calls(text)}
    left = {f"bench {name}" for name in bench.BENCHMARKS} - shown - set(SENTENCES)
    assert left == {"bench snapshot"}
    reason = elsewhere.Tested(
        "tests/benchmarks/test_snapshot.py", "test_eviction_is_real", ('"snapshot"',)
    )
    assert reason.problem(Line("")) is None


def test_examples_in_other_languages_are_tested() -> None:
    """Python and YAML are run or built by tests of their own."""
    found: list[str] = []
    for page in PAGES:
        for token in MarkdownIt("commonmark").parse(page.read_text()):
            if token.type == "fence" and token.info.strip() in ("python", "yaml", "json", "toml"):
                name = f"{page.relative_to(ROOT)} {token.info.strip()}"
                before = sum(other.startswith(name) for other in found)
                found.append(f"{name} {before + 1}" if before else name)
    assert sorted(found) == sorted(EXAMPLES)
    problems = {name: reason.problem(Line(name)) for name, reason in EXAMPLES.items()}
    assert not any(problems.values()), problems
