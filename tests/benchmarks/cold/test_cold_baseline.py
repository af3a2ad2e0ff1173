"""A new document held against an earlier one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from coldframe.benchmarks.cold.baseline import (
    check_same,
    compare,
    fails,
    read_baseline,
    share,
)
from coldframe.benchmarks.document import figure
from coldframe.loader.errors import RequestError

FILE = Path("earlier.json")


def cells(**runs: list[float]) -> list[dict[str, Any]]:
    return [{"id": name, "ttft": figure(values, "s")} for name, values in runs.items()]


def made(**runs: list[float]) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "cold",
        "model": {"family": "llama", "dtype": "BF16", "weights_bytes": 1, "read_bytes": 1},
        "fingerprint": {"cpu": "a", "cpus": 2, "torch": "2", "coldframe": "0.1.0"},
        "prompt_tokens": 64,
        "answer_tokens": 8,
        "cells": cells(**runs),
    }


WAS = made(a=[1.0, 1.1, 0.9], b=[2.0, 2.0, 2.0], gone=[1.0], fallen=[1.0])


def against(limit: float = 0.1, lost: list[str] | None = None, **runs: list[float]) -> Any:
    return compare(WAS, cells(**runs), lost or [], FILE, limit)


def test_slower_beyond_the_spread_fails() -> None:
    found = against(a=[1.2, 1.15, 1.3], b=[2.0, 1.9, 2.1], gone=[1.0], fallen=[1.0])
    (slower,) = found["slower"]
    assert slower == {"id": "a", "was_s": 1.0, "now_s": 1.2, "ratio": pytest.approx(1.2)}
    assert (found["unsure"], found["faster"], found["missing"]) == ([], [], [])
    assert fails(found)
    assert not fails(against(0.25, a=[1.2, 1.15, 1.3]))


def test_slower_within_the_spread_is_told_and_does_not_fail() -> None:
    found = against(a=[1.2, 0.95, 1.3])
    assert [entry["id"] for entry in found["unsure"]] == ["a"]
    assert found["slower"] == []
    assert not fails(found)


def test_faster_is_told() -> None:
    found = against(a=[0.5, 0.6, 0.7], b=[2.0])
    assert [entry["id"] for entry in found["faster"]] == ["a"]
    assert not fails(found)


def test_exactly_the_limit_is_not_slower() -> None:
    assert against(0.5, b=[3.0])["slower"] == []
    assert [entry["id"] for entry in against(0.49, b=[3.0])["slower"]] == ["b"]


def test_cells_that_only_one_of_them_has() -> None:
    found = against(a=[1.0], new=[1.0])
    assert found["missing"] == ["b", "gone", "fallen"]
    assert found["added"] == ["new"]
    assert not fails(found)  # they were not asked for
    found = against(a=[1.0], lost=["fallen", "never there"])
    assert found["lost"] == ["fallen"]
    assert fails(found)


def test_other_programs_are_not_tested() -> None:
    was = copy.deepcopy(WAS)
    theirs = [{**cell, "who": "vllm"} for cell in cells(vllm=[1.0])]
    was["cells"] += theirs
    now = [*cells(a=[1.0], b=[2.0], gone=[1.0], fallen=[1.0])]
    now += [{**cell, "who": "vllm"} for cell in cells(vllm=[9.0], fastapi=[9.0])]
    found = compare(was, now, [], FILE, 0.1)
    assert not any(found[name] for name in ("slower", "unsure", "missing", "added"))


def test_the_slowest_comes_first() -> None:
    found = against(a=[1.2], b=[4.0])
    assert [entry["id"] for entry in found["slower"]] == ["b", "a"]


def test_nothing_fails_without_a_baseline() -> None:
    assert not fails(None)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("fingerprint", "cpu", "b"),
        ("fingerprint", "torch", "3"),
        ("fingerprint", "device", "cuda:0"),
        ("model", "dtype", "F32"),
        ("model", "weights_bytes", 2),
        (None, "prompt_tokens", 65),
    ],
)
def test_another_machine_model_or_request(part: str | None, name: str, value: Any) -> None:
    now = copy.deepcopy(WAS)
    (now if part is None else now[part])[name] = value
    with pytest.raises(RequestError, match=name):
        check_same(WAS, now, FILE)


def test_another_version_of_coldframe_is_what_is_compared() -> None:
    now = copy.deepcopy(WAS)
    now["fingerprint"]["coldframe"] = "0.2.0"
    now["model"]["path"] = "/elsewhere"
    check_same(WAS, now, FILE)


def test_a_document_by_itself_or_behind_its_table(tmp_path: Path) -> None:
    file = tmp_path / "was.json"
    file.write_text(json.dumps(WAS))
    assert read_baseline(file) == WAS
    file.write_text(json.dumps(WAS, indent=1))
    assert read_baseline(file) == WAS
    file.write_text(f"a table\nof lines\n{json.dumps(WAS)}\n")
    assert read_baseline(file) == WAS


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"no document",
        b"[]",
        b"null",
        b'{"kind": "serve", "schema": 1}',
        json.dumps({**WAS, "schema": 2}).encode(),
        json.dumps({**WAS, "cells": None}).encode(),
        json.dumps({**WAS, "cells": [{"id": "a"}]}).encode(),
        json.dumps({**WAS, "cells": [{"id": "a", "ttft": {"median": "1"}}]}).encode(),
        json.dumps({**WAS, "model": None}).encode(),
    ],
)
def test_files_that_are_no_baseline(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "was.json"
    file.write_bytes(text)
    with pytest.raises(RequestError, match="baseline"):
        read_baseline(file)


def test_a_baseline_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_baseline(tmp_path / "none.json")


@pytest.mark.parametrize(("text", "value"), [("10%", 0.1), ("0.25", 0.25), ("150%", 1.5)])
def test_shares(text: str, value: float) -> None:
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "0", "-5%", "ten", "inf", "nan"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError):
        share(text)
