"""The benchmark of the graph archive takes its figures, whatever they are."""

from __future__ import annotations

import argparse
import json

import pytest

from coldframe.benchmarks.graph_archive import run


def test_every_figure_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argparse.Namespace(runs=2, graphs=3, layers=4)) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["graphs"], document["nodes"], document["driver"]) == (3, 40, "none")
    names = [row["name"] for row in document["rows"]]
    assert names[0] == "save, a node"
    assert "rebuild, a node, regions elsewhere" in names
    assert all(len(row["runs"]) == 2 and min(row["runs"]) > 0 for row in document["rows"])
