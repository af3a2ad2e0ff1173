"""Which cells there are, and why others are not."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from coldframe.benchmarks.cold.matrix import (
    AXES,
    DEFAULT,
    QUICK,
    Cell,
    blocks_of,
    cells_of,
    read_matrix,
)
from coldframe.loader.errors import RequestError

NONE = dict.fromkeys([*AXES, "throttle"])


def test_a_flag_names_its_axis_and_the_others_have_what_they_have_by_default() -> None:
    cells, left_out = cells_of(blocks_of({**NONE, "tier": "fresh", "throttle": "none,200MB/s"}))
    assert [cell.id for cell in cells] == [
        "fresh/cold/disk/native/http",
        "fresh/cold/disk@200MB/s/native/http",
        "fresh/warm/disk/native/http",
        "fresh/warm/disk@200MB/s/native/http",
    ]
    assert [cell.throttle for cell in cells] == [None, 200e6, None, 200e6]
    assert left_out == []


def test_every_combination_is_a_cell_or_left_out_with_a_reason() -> None:
    every = [{**AXES, "throttle": ("none", "1GB/s")}]
    cells, left_out = cells_of(every)
    total = 2
    for values in AXES.values():
        total *= len(values)
    refused = sum(int(each["what"].rpartition("(")[2].split()[0]) for each in left_out)
    assert len(cells) + refused == total
    assert len({cell.id for cell in cells}) == len(cells)
    assert all(each["why"] for each in left_out)


def test_the_rules() -> None:
    every = product(
        AXES["tier"], AXES["cache"], AXES["source"], (None, 1e9), AXES["engine"], AXES["through"]
    )
    found = set(cells_of([{**AXES, "throttle": ("none", "1GB/s")}])[0])
    for cell in (Cell(*each) for each in every):
        fits = True
        if cell.tier in ("parked", "warm"):
            # The weights are in memory: one place, one state, and somebody who stays.
            fits = (cell.cache, cell.source, cell.throttle, cell.through) == (
                *("warm", "disk", None),
                "http",
            )
        if cell.source != "disk":  # whose files are on this machine's loopback, in memory
            fits = fits and cell.cache == "warm"
        if cell.tier == "template":
            fits = fits and cell.source == "disk" and cell.engine == "native"
        assert (cell in found) is fits, cell.id


def test_the_matrices_that_are_declared_have_every_tier_and_source() -> None:
    cells, _ = cells_of(DEFAULT)
    assert {cell.tier for cell in cells} == set(AXES["tier"])
    assert {cell.source for cell in cells} == set(AXES["source"])
    assert {cell.through for cell in cells} == {"http", "run"}
    assert any(cell.throttle for cell in cells)
    quick, _ = cells_of(QUICK)
    assert len(quick) <= 4
    assert {cell.tier for cell in quick} == {"fresh", "restored", "warm"}


def test_a_cell_that_several_blocks_have_is_measured_once() -> None:
    block = {"tier": ["fresh"], "cache": ["warm"]}
    cells, _ = cells_of([block, block, {**block, "through": ["run", "http"]}])
    assert [cell.through for cell in cells] == ["http", "run"]


@pytest.mark.parametrize(
    ("chosen", "word"),
    [
        ({"tier": "lukewarm"}, "tier"),
        ({"cache": "hot"}, "cache"),
        ({"source": "disk,ftp"}, "source"),
        ({"engine": "tensorrt"}, "engine"),
        ({"through": "grpc"}, "through"),
        ({"throttle": "fast"}, "rate"),
        ({"throttle": "0MB/s"}, "rate"),
        ({"tier": " , "}, "nothing to measure"),
    ],
)
def test_values_that_there_are_not(chosen: dict[str, str], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        blocks_of({**NONE, **chosen})


def test_a_file_of_blocks(tmp_path: Path) -> None:
    as_json, as_toml = tmp_path / "m.json", tmp_path / "m.toml"
    as_json.write_text(
        json.dumps({"matrix": [{"tier": "warm", "cache": "warm"}, {"throttle": ["1GB/s", "none"]}]})
    )
    as_toml.write_text(
        '[[matrix]]\ntier = "warm"\ncache = ["warm"]\n[[matrix]]\nthrottle = ["1GB/s", "none"]\n'
    )
    assert read_matrix(as_json) == read_matrix(as_toml)
    assert read_matrix(as_json)[0] == {"tier": ["warm"], "cache": ["warm"]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"matrix": []}',
        '{"matrix": {}}',
        '{"matrix": ["fresh"]}',
        '{"matrix": [{"tier": []}]}',
        '{"matrix": [{"tier": [1]}]}',
        '{"matrix": [{"tier": "fresh", "colour": "red"}]}',
        '{"matrix": [{"tier": "lukewarm"}]}',
        '{"matrix": [{"throttle": "soon"}]}',
    ],
)
def test_files_that_are_no_matrix(tmp_path: Path, text: str) -> None:
    file = tmp_path / "m.json"
    file.write_text(text)
    with pytest.raises(RequestError):
        read_matrix(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_matrix(tmp_path)
