"""Rates that are kept: medians, staleness, and files that are none of ours."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from coldframe.runtime.planning.kept import Kept


def test_medians_of_the_last_few(tmp_path: Path) -> None:
    for number in (9, 1, 2, 3, 4, 100):
        Kept("key", str(tmp_path)).add({"a": number, "b": {"c": 2 * number}})
    kept = Kept("key", str(tmp_path))
    assert kept.count == 5  # the first one is gone
    assert kept.medians() == {"a": 3, "b": {"c": 6}}
    assert kept.fresh
    assert kept.age_s is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_another_key_is_another_file(tmp_path: Path) -> None:
    Kept("key", str(tmp_path)).add({"a": 1})
    other = Kept("other", str(tmp_path))
    assert (other.count, other.fresh, other.age_s) == (0, False, None)
    with pytest.raises(LookupError):
        other.medians()


def test_what_is_old_does_not_count(tmp_path: Path) -> None:
    kept = Kept("key", str(tmp_path))
    kept.add({"a": 1})
    for age_s, count, fresh in ((300, 1, True), (4000, 1, False), (90_000, 0, False)):
        document = json.loads(Path(kept.path).read_text())
        document[0]["at"] = time.time() - age_s
        Path(kept.path).write_text(json.dumps(document))
        found = Kept("key", str(tmp_path))
        assert (found.count, found.fresh) == (count, fresh)


def test_other_figures_take_the_place_of_those_before(tmp_path: Path) -> None:
    kept = Kept("key", str(tmp_path))
    kept.add({"a": 1})
    kept.add({"a": 5, "b": 7})
    assert kept.medians() == {"a": 5, "b": 7}
    assert Kept("key", str(tmp_path)).medians() == {"a": 5, "b": 7}
    kept.forget()
    assert kept.count == 0


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '[{"at": "x", "figures": {}}]'])
def test_a_file_that_is_none_of_ours(tmp_path: Path, content: str) -> None:
    path = Path(Kept("key", str(tmp_path)).path)
    path.write_text(content)
    kept = Kept("key", str(tmp_path))
    assert kept.count == 0
    kept.add({"a": 1})
    assert Kept("key", str(tmp_path)).medians() == {"a": 1}


def test_where_nothing_can_be_written_it_is_kept_here(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = Kept("key", str(tmp_path / "file" / "below"))
    kept.add({"a": 1})
    assert kept.medians() == {"a": 1}


def test_words_are_kept_as_they_were_said_last(tmp_path: Path) -> None:
    for number, why in ((1, "no room"), (5, "no CRIU")):
        Kept("key", str(tmp_path)).add({"a": number, "why": {"restored": why}})
    assert Kept("key", str(tmp_path)).medians() == {"a": 3, "why": {"restored": "no CRIU"}}
