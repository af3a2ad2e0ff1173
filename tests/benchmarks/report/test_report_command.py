"""`bench report`: what it reads, what it refuses, what it writes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from coldframe.benchmarks.report.reading import read_document, read_documents
from coldframe.loader.errors import RequestError
from coldframe.runtime.cli import main
from tests.benchmarks.report import drawn


def a_cold() -> dict[str, Any]:
    cells = [drawn.cold_cell("one/two", [drawn.a_timeline(t) for t in (1.0, 3.0, 2.0)])]
    return drawn.cold(cells)


def kept(folder: Path, document: object, name: str = "d.json", **how: Any) -> str:
    (folder / name).write_text(json.dumps(document, **how))
    return str(folder / name)


def test_a_document_is_a_whole_file_or_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = a_cold()
    assert read_document(kept(tmp_path, document, indent=1)) == document
    log = tmp_path / "log"
    log.write_text(f"a table\n{{not it}}\n{json.dumps(document)}\n\n")
    assert read_document(str(log)) == document
    monkeypatch.setattr("sys.stdin", io.StringIO(log.read_text()))
    assert read_document("-") == document
    assert read_document(kept(tmp_path, drawn.rows()))["kind"] == "rows"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no benchmark's document"),
        ("no JSON\nat all", "no benchmark's document"),
        ('{"kind": "cold", "schema": NaN}', "no benchmark's document"),
        ("[1, 2]", "no benchmark's document"),
        ("[" * 100_000, "no benchmark's document"),
        ("{}", "this kind"),
        ('{"kind": "furlongs", "schema": 1}', "furlongs"),
        ('{"kind": ["cold"], "schema": 1}', "this kind"),
        ('{"kind": "cold"}', "another version"),
        ('{"kind": "cold", "schema": 2}', "another version"),
        ('{"kind": "cold", "schema": 1}', "not what its schema says"),
    ],
)
def test_what_is_no_document_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(RequestError, match=told) as caught:
        read_document(str(tmp_path / "d.json"))
    assert str(tmp_path) in str(caught.value)


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for file in (tmp_path, tmp_path / "nothing", tmp_path / "bytes"):
        with pytest.raises(RequestError, match="cannot be read"):
            read_document(str(file))


def test_a_cell_that_is_wrong_is_named(tmp_path: Path) -> None:
    document = a_cold()
    document["cells"][0]["ttft"]["median"] = "fast"
    with pytest.raises(RequestError, match=r"cells\[0\].ttft.median"):
        read_document(kept(tmp_path, document))


def test_different_models_are_refused(tmp_path: Path) -> None:
    first = kept(tmp_path, a_cold(), "a.json")
    moved = {**a_cold(), "model": {**drawn.MODEL, "path": "/elsewhere"}}
    assert len(read_documents([first, kept(tmp_path, moved, "b.json")])) == 2
    other = {**a_cold(), "model": {**drawn.MODEL, "weights_bytes": 1}}
    with pytest.raises(RequestError, match="different models"):
        read_documents([first, kept(tmp_path, drawn.rows(), "r.json"), kept(tmp_path, other)])


def test_the_command_writes_what_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page, trace = kept(tmp_path, a_cold()), tmp_path / "r.html", tmp_path / "r.trace.json"
    assert main(["bench", "report", file, "--html", str(page), "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    assert "one/two #3, the median run" in out
    assert "critical path" in out
    assert page.read_text().count('class="waterfall"') == 3
    whole = json.loads(trace.read_text())["traceEvents"]
    assert main(["bench", "report", file, "--trace", str(trace), "--run", "one/two:2"]) == 0
    assert "one/two #2: " in capsys.readouterr().out
    assert len(json.loads(trace.read_text())["traceEvents"]) == len(whole) / 3


def test_pictures_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page, folder = kept(tmp_path, a_cold()), tmp_path / "r.html", tmp_path / "pictures"
    assert main(["bench", "report", file, "--html", str(page), "--svg", str(folder)]) == 0
    whole = page.read_text()
    files = {made.stem: made.read_text() for made in folder.iterdir()}
    assert set(files) == set(re.findall(r'<svg id="([^"]+)"', whole))
    assert {"d0-cold-boxes", "d0-cold-roof"} <= set(files)
    for text in files.values():
        picture = ElementTree.fromstring(text)
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert text.partition("<title")[2].strip().removesuffix("</svg>") in whole
        # Every colour that is used has a value in the same file.
        assert set(re.findall(r"var\((--[a-z-]+)\)", text)) <= set(
            re.findall(r"(--[a-z-]+):", text)
        )


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, rows = kept(tmp_path, a_cold()), kept(tmp_path, drawn.rows(), "rows.json")
    nowhere = str(tmp_path / "nowhere" / "x")
    for arguments, told in (
        ([file, "--html", nowhere], "cannot write the report"),
        ([file, "--trace", nowhere], "cannot write the trace"),
        ([file, "--svg", f"{file}/in"], "no folder for the pictures"),
        ([rows, "--trace", str(tmp_path / "t")], "nothing to trace"),
        ([file, "--run", "three"], "no such run"),
    ):
        assert main(["bench", "report", *arguments]) == 1
        assert told in capsys.readouterr().err
