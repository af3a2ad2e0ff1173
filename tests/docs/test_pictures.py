"""The pages' pictures: drawn from a document of cold starts, and those that are there."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from coldframe.runtime.timeline.stage_groups import GROUPS
from docs.pictures import ROWS, START, main
from tests.benchmarks.report.drawn import a_timeline, cold, cold_cell
from tests.docs.commands import ROOT

SVG = "{http://www.w3.org/2000/svg}"
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
MOST_BYTES = 200_000


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    cells = [cold_cell(START, [a_timeline(2.3), a_timeline(2.1), a_timeline(2.2)])]
    cells += [cold_cell(ident, [a_timeline(0.5), a_timeline(0.6)]) for ident in list(ROWS)[:3]]
    (tmp_path / "cold.json").write_text(json.dumps(cold(cells)))
    assert main([str(tmp_path / "cold.json"), "--into", str(tmp_path / "into")]) == 0
    return tmp_path / "into"


def words(path: Path) -> str:
    return " ".join(t.text or "" for t in ElementTree.parse(path).iter(f"{SVG}text"))


def test_pictures_stand_alone(drawn: Path) -> None:
    assert {path.name for path in drawn.iterdir()} == {path.name for path in PICTURES}
    said = words(drawn / "cold-start.svg")
    assert "first token 2.20 s" in said  # the median of the three
    assert all(told in said for told in GROUPS.values())
    assert all(name in words(drawn / "first-token.svg") for name in list(ROWS.values())[:3])


@pytest.mark.parametrize("path", PICTURES, ids=[path.name for path in PICTURES])
def test_what_is_there_is_small_and_needs_nothing(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text
    assert "url(" not in text
    assert not list(root.iter(f"{SVG}script"))


def test_a_document_without_that_start_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cold.json"
    file.write_text(json.dumps(cold([cold_cell("one/two", [a_timeline(1.0)])])))
    assert main([str(file), "--into", str(tmp_path / "into")]) == 1
    assert START in capsys.readouterr().err
    assert not (tmp_path / "into").exists()
