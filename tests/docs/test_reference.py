"""What is made from the code has all of it in it, and what is said beside it is about that."""

from __future__ import annotations

import ast
import re

import pytest

from coldframe.benchmarks.command import BENCHMARKS
from coldframe.loader.errors import ColdframeError
from coldframe.runtime.cli import COMMANDS
from docs.generate import MADE, filled
from docs.generate.errors import CODES, family
from docs.generate.flags import benchmarks, commands, parsers, twins
from docs.generate.metrics import families, metrics
from docs.generate.settings import INTERNAL, OTHERS, SETTINGS, named, read_by_code
from tests.docs.commands import ROOT

DOCS = ROOT / "docs"
TROUBLE = (DOCS / "troubleshooting.md").read_text()


# -- flags ------------------------------------------------------------------------------------


def test_every_command_has_a_section_with_all_its_flags() -> None:
    parts = re.split(r"^## (.+)$", commands() + benchmarks(), flags=re.MULTILINE)[1:]
    told = dict(zip(parts[::2], parts[1::2], strict=True))
    assert set(told) == {
        *(f"coldframe {name}" for name in COMMANDS),
        *(f"coldframe bench {name}" for name in BENCHMARKS),
    }
    for name, _, parser in parsers():
        for action in parser._actions:
            for flag in action.option_strings:
                if action.help != "==SUPPRESS==" and flag not in ("-h", "--help"):
                    assert re.search(rf"`[^`]*{re.escape(flag)}[ ,`]", told[name]), (name, flag)
        for twin in parser.twins().values():
            assert f"| `{twin}` |" in told[name]


def test_defaults_are_as_people_write_them() -> None:
    (row,) = {line for line in commands().splitlines() if line.startswith("| `--cache-size ")}
    assert "| `COLDFRAME_CACHE_SIZE` | `100GiB` |" in row
    assert "[COLDFRAME" not in row


def test_a_table_is_one() -> None:
    for made in (commands(), benchmarks(), metrics()):
        columns = 0
        for line in made.splitlines():
            bars = len(re.findall(r"(?<!\\)\|", line))
            if line.startswith("| ---"):
                columns = bars
            elif line.startswith("|") and columns:
                assert bars == columns, line
            else:
                columns = 0


# -- the environment --------------------------------------------------------------------------


def test_every_variable_that_the_code_reads_is_told() -> None:
    """A new one is to be described in docs/generate/settings.py."""
    assert read_by_code() == set(SETTINGS) | INTERNAL
    assert not set(SETTINGS) & twins()


@pytest.mark.parametrize("name", OTHERS)
def test_variables_of_others_are_read(name: str) -> None:
    assert named(name)


def test_what_is_read_of_others_is_told() -> None:
    found = set()
    for folder in ("loader", "snapshot", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            read = r"\benviron(?:\.get\(|\.pop\(|\[)\s*\"(\w+)\""
            found |= set(re.findall(read, path.read_text()))
    told = " ".join([*OTHERS, *OTHERS.values()])
    for name in sorted(found - {"PATH"}):
        if not name.startswith("COLDFRAME_"):
            family = f"{name.partition('_')[0]}_*"
            assert re.search(rf"\b{name}\b", told) or family in OTHERS, name


# -- metrics ----------------------------------------------------------------------------------


def test_every_family_is_told_with_its_labels() -> None:
    told = metrics()
    for family_ in families():
        name = f"{family_.name}_total" if family_.type == "counter" else family_.name
        (line,) = [line for line in told.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"| {family_.type} |" in line
        if family_.name != "coldframe_http_requests":
            assert "`model`" in line
    source = (ROOT / "runtime" / "gateway" / "exposition.py").read_text()
    written = re.findall(r"_(?:gauge|counter)\(\s*\"(\w+)\"", source)
    assert len(written) > 20
    assert {f"coldframe_{name}" for name in written} <= {found.name for found in families()}


def test_metrics_that_pages_name_are_there() -> None:
    known = {sample.name for found in families() for sample in found.samples}
    for page in DOCS.glob("*.md"):
        if page.name != "LOG.md":
            for name in re.findall(r"\bcoldframe_[a-z_]+[a-z]\b", page.read_text()):
                assert name in known, (page.name, name)


# -- errors -----------------------------------------------------------------------------------


def test_every_class_of_errors_has_an_entry_and_every_entry_a_class() -> None:
    """A new class is to be explained in docs/troubleshooting.md."""
    entries = re.findall(r"^###? ([A-Z]\w+)\n\n<!-- made: error (\w+) -->$", TROUBLE, re.MULTILINE)
    assert all(title == name for title, name in entries)
    names = [name for name, _ in entries]
    assert len(names) == len(set(names))
    assert set(names) == set(family())


def test_every_entry_says_more_than_the_code() -> None:
    for part in re.split(r"^###? ", TROUBLE, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        if "<!-- made: error " in text:
            said = re.sub(r"<!--.*?-->", "", text).split()
            assert len(said) > 10, title


def test_the_family_is_that_of_the_running_code() -> None:
    def below(kind: type[ColdframeError]) -> set[str]:
        return {kind.__name__}.union(*(below(child) for child in kind.__subclasses__()))

    mine = {name for name in below(ColdframeError) if not name.startswith("_")}
    # What tests define for themselves is none of the code's.
    assert set(family()) >= {
        name for name in mine if name in (ROOT / "loader/errors.py").read_text()
    }
    assert {"MemoryServiceGone", "NoPlan"} <= set(family())


def _codes_in_gateway() -> dict[str, set[str]]:
    """Codes that the gateway gives, each with the statuses that stand beside it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "runtime" / "gateway").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            code = next((k.value for k in node.keywords if k.arg == "code"), None)
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            if called == "loading" and len(node.args) == 2:
                code = node.args[1]
            if isinstance(code, ast.Constant) and isinstance(code.value, str):
                statuses = found.setdefault(code.value, set())
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, int):
                    statuses.add(str(first.value))
    return found


def test_every_code_of_the_gateway_is_told_with_its_status() -> None:
    """A new one is to be described in docs/generate/errors.py."""
    found = _codes_in_gateway()
    # These two stand in a pair there, without a name.
    api = (ROOT / "runtime" / "gateway" / "api.py").read_text()
    assert '(500, "model_error")' in api
    assert '(503, "replica_error")' in api
    assert set(found) | {"model_error", "replica_error"} == set(CODES)
    for code, statuses in found.items():
        assert statuses <= set(CODES[code][0].split(", ")), code


# -- pages ------------------------------------------------------------------------------------


def test_all_that_is_made_is_on_a_page() -> None:
    asked = {
        name
        for page in DOCS.glob("*.md")
        for name in re.findall(r"^<!-- made: ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert asked == set(MADE)


def test_a_page_that_asks_for_what_is_not_made_is_wrong() -> None:
    assert filled("a\n\n<!-- made: settings -->\n\nb").count("COLDFRAME_RUN_DIR") > 0
    assert filled("`<!-- made: nothing -->`") == "`<!-- made: nothing -->`"
    with pytest.raises(KeyError):
        filled("<!-- made: nothing -->")


def test_a_link_to_a_folder_is_its_words() -> None:
    assert (
        filled("[all](../loader) of [it](../loader/arena.py)") == "all of [it](../loader/arena.py)"
    )
    assert filled("[none](../nowhere)") == "[none](../nowhere)"


def test_a_page_that_need_not_be_there_is_in_the_contents_once_it_is() -> None:
    assert filled("serving?\nnowhere?\nvllm\n") == "serving\nvllm\n"
    assert filled("Is it?\n") == "Is it?\n"


def test_the_landing_pages_figures_are_the_readmes() -> None:
    readme = (ROOT / "README.md").read_text()
    minute = (DOCS / "index.md").read_text().partition("## In a minute")[2].partition("\n## ")[0]
    figures = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?: (?:ms|s|MB/s|times))?(?![\w.]*\w)", minute)
    assert len(figures) >= 4
    for figure in figures:
        assert figure.replace(" times", " x") in readme, figure
