"""Results files: what is one, what it looks like in the log, and that the log says the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.benchmarks.gpu.budget import Outcome, Part
from coldframe.benchmarks.gpu.document import build, problems, read, succeeded, write
from coldframe.benchmarks.gpu.report import Check, Found
from coldframe.benchmarks.gpu.table import into_log, render, sections
from coldframe.benchmarks.harness import Row
from coldframe.loader.errors import PlatformError

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"

MACHINE = {
    "gpu": "NVIDIA H999 80GB",
    "gpu_memory": 80 << 30,
    "cuda": "13.0",
    "torch": "2.11.0",
    "coldframe": "0.1.0",
    "python": "3.12.3",
    "kernel": "6.18",
    "cpu": "some",
    "cpus": 16,
    "memory": 128 << 30,
}


def made() -> dict[str, Any]:
    found = Found(
        [
            Row("rate", [50.0, 52.0, 51.0], "GB/s"),
            Row("ours / theirs", [0.5, 0.9, 0.7], "ratio", 0.8, True),
        ],
        {"which": {"best": "2 readers"}},
        {"disk": "there is none"},
        [Check("one", "passed"), Check("two", "skipped", "not here")],
    )
    part = Part("copies", "Rates", "m", 10, 1)
    gone = Part("cold", "Cold starts", "m", 10, 1)
    return build(
        MACHINE,
        "2026-11-30",
        12.34,
        [Outcome(part, "done", None, 3.0, found), Outcome(gone, "failed", "no", 1.0, Found())],
    )


def test_a_document_is_written_and_read(tmp_path: Path) -> None:
    document = made()
    assert problems(document) == []
    file = write(document, tmp_path / "new")
    assert file.name == "nvidia-h999-80gb-2026-11-30.json"
    assert read(file) == json.loads(json.dumps(document))
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    ratio = document["parts"][0]["rows"][1]
    assert (ratio["median"], ratio["met"], ratio["runs"]) == (0.7, False, [0.5, 0.9, 0.7])


def test_it_succeeds_where_nothing_failed_and_every_aim_is_met() -> None:
    document = made()
    assert not succeeded(document)
    rates, cold = document["parts"]
    cold["status"] = "left out"
    assert not succeeded(document)  # an aim is missed
    rates["rows"][1]["met"] = True
    assert succeeded(document)
    rates["checks"][0]["outcome"] = "failed"
    assert not succeeded(document)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        *way, last = path
        for step in way:
            document = document[step]
        if to is ...:
            del document[last]
        else:
            document[last] = to

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("format", to=2), "format is 2"),
        (_set("parts", to=...), "parts is missing"),
        (_set("date", to="today"), "date is 'today'"),
        (_set("fingerprint", "gpu", to=...), "fingerprint.gpu is missing"),
        (_set("fingerprint", "cpus", to="16"), "fingerprint.cpus is '16', which is no int"),
        (_set("parts", 0, to=[]), "parts[0] is no object"),
        (_set("parts", 1, "status", to="well"), "parts[1].status is 'well'"),
        (_set("parts", 1, "reason", to=None), "parts[1].reason is missing, and it is failed"),
        (_set("parts", 1, "name", to="copies"), "there are two parts 'copies'"),
        (_set("parts", 0, "rows", 0, "runs", to=[]), "parts[0].rows[0].runs are []"),
        (_set("parts", 0, "rows", 0, "runs", to=[1.0]), "do not follow from its runs"),
        (_set("parts", 0, "rows", 1, "met", to=True), "do not follow from its runs"),
        (_set("parts", 0, "checks", 1, "reason", to=None), "checks[1].reason is missing"),
        (_set("parts", 0, "checks", 1, "outcome", to="?"), "checks[1].outcome is '?'"),
        (_set("parts", 0, "left_out", "disk", to=""), "left_out['disk'] has no reason"),
    ],
)
def test_what_is_no_document_is_neither_written_nor_read(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    document = copy.deepcopy(made())
    change(document)
    assert said in "; ".join(problems(document))
    with pytest.raises(PlatformError, match="no document"):
        write(document, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    (tmp_path / "f.json").write_text(json.dumps(document))
    with pytest.raises(PlatformError, match="not as it has to be"):
        read(tmp_path / "f.json")


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text("{")
    for name in ("f.json", "none.json"):
        with pytest.raises(PlatformError, match="cannot be read"):
            read(tmp_path / name)
    assert problems([]) == ["it is no object"]


def test_the_table_has_every_figure_and_every_reason() -> None:
    document = made()
    assert "note:" not in render(document)
    document["fingerprint"] = {**MACHINE, "notes": ["cold is not cold"]}
    text = render(document)
    assert "\n- note: cold is not cold\n" in text
    assert "NVIDIA H999 80GB, 86 GB, driver unknown, CUDA 13.0; 16 processors" in text
    assert "| rate | 51 | 50 | 52 | GB/s |  |  |" in text
    assert "| ours / theirs | 0.7 | 0.5 | 0.9 | ratio | at least 0.8 | **missed** |" in text
    assert "1 of 2 checks passed." in text
    assert "- skipped: two: not here" in text
    assert "- left out: disk: there is none" in text
    assert "- which: best 2 readers" in text
    assert "**Cold starts**: **failed**, no" in text


def test_a_log_gets_it_on_top_and_again_in_its_place(tmp_path: Path) -> None:
    log = tmp_path / "LOG.md"
    log.write_text("# Log\n\nNewest first.\n\n## 2026-11-01: older\n\nText.\n")
    document = made()
    into_log(log, "a.json", document)
    first = log.read_text()
    assert first.startswith("# Log\n\nNewest first.\n\n## 2026-11-30: NVIDIA H999 80GB, measured")
    assert first.endswith("\n\n## 2026-11-01: older\n\nText.\n")
    assert sections(first)["a.json"].strip() == render(document).strip()
    into_log(log, "a.json", document)
    assert log.read_text() == first
    document["seconds"] = 99.0
    into_log(log, "a.json", document)
    into_log(log, "b.json", document)
    both = sections(log.read_text())
    assert list(both) == ["b.json", "a.json"]
    assert "took 99 s" in both["a.json"]
    (tmp_path / "EMPTY.md").write_text("# Log\n")
    with pytest.raises(PlatformError, match="no entry yet"):
        into_log(tmp_path / "EMPTY.md", "a.json", document)


def test_the_log_says_what_the_results_files_say() -> None:
    """`coldframe bench gpu --from FILE --log` mends it."""
    files = {file.name: read(file) for file in RESULTS.glob("*.json")}
    logged = sections((ROOT / "docs" / "LOG.md").read_text())
    assert set(logged) == set(files)
    for name, document in files.items():
        assert logged[name].strip() == render(document).strip(), name
