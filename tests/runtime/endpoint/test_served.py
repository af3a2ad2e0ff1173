"""Which models a command line names, and what they share."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import ColdframeError, DeviceError, RequestError, SourceNotFound
from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.endpoint.served import memory_to_share, named_models
from coldframe.runtime.gateway.platforms.table import by_name
from coldframe.runtime.options import ReplicaOptions


def named(*models: str, environ: dict[str, str] | None = None, **more: Any) -> dict[str, str]:
    given = {"model_name": None, "source": None, "serve_peers": None, "chat_template": None}
    given |= {"peers": None, "peers_from": None}
    args = Namespace(models=list(models), **{**given, **more})
    return named_models(args, by_name("generic"), environ or {})


def test_a_model_is_called_by_the_last_part_of_its_place() -> None:
    assert named("/models/one/") == {"one": "/models/one/"}
    assert named("s3://bucket/a", "s3://bucket/b") == {"a": "s3://bucket/a", "b": "s3://bucket/b"}


def test_names_are_given_in_the_order_of_the_models() -> None:
    assert named("s3://x/a", "s3://y/a", model_name=["left", "right"]) == {
        "left": "s3://x/a",
        "right": "s3://y/a",
    }
    assert list(named("s3://x/a", "s3://y/a", model_name=["left,right"])) == ["left", "right"]


def test_the_environment_names_several_with_commas() -> None:
    found = named(environ={"COLDFRAME_MODEL": "s3://bucket/a, s3://bucket/b"})
    assert found == {"a": "s3://bucket/a", "b": "s3://bucket/b"}
    assert named("/m/c", environ={"COLDFRAME_MODEL": "/m/a"}) == {"c": "/m/c"}


def test_what_cannot_be_served(tmp_path: Path) -> None:
    wrong: list[tuple[list[str], dict[str, Any], type[ColdframeError], str]] = [
        ([], {}, RequestError, "no model is named"),
        (["s3://x/a", "s3://y/a"], {}, RequestError, "same name"),
        (["s3://x/a", "s3://x/b"], {"model_name": ["one"]}, RequestError, "name for each"),
        (["s3://x/a"], {"model_name": ["one", "two"]}, RequestError, "name for each"),
        (["s3://x/a", "s3://x/b"], {"source": ["/there"]}, RequestError, "for one model"),
        (["s3://x/a", "s3://x/b"], {"serve_peers": ":1"}, RequestError, "for one model"),
        (["s3://x/a", "s3://x/b"], {"chat_template": "f"}, RequestError, "for one model"),
        (["s3://x/a", str(tmp_path / "b")], {}, SourceNotFound, "no such directory"),
    ]
    for models, more, kind, what in wrong:
        with pytest.raises(kind, match=what):
            named(*models, **more)


def total(room: Room | None) -> int | None:
    assert room is not None
    return room.total


def test_one_model_alone_has_no_bound_unless_it_is_given() -> None:
    options = ReplicaOptions("m")
    assert memory_to_share(options, 1, None, lambda: 100) == (None, options)
    room, bounded = memory_to_share(options, 1, 80, lambda: 100)
    assert (total(room), bounded.kv_bytes) == (80, 20)


def test_several_share_what_there_is() -> None:
    room, options = memory_to_share(ReplicaOptions("m"), 2, None, lambda: 100)
    assert (total(room), options.kv_bytes) == (100, 25)
    room, options = memory_to_share(ReplicaOptions("m", kv_bytes=7), 2, 50, lambda: 100)
    assert (total(room), options.kv_bytes) == (50, 7)
    _, options = memory_to_share(ReplicaOptions("m"), 2, 1 << 40, lambda: 1 << 40)
    assert options.kv_bytes == 4 << 30
    with pytest.raises(DeviceError, match="more memory than there is"):
        memory_to_share(ReplicaOptions("m"), 2, 101, lambda: 100)


def test_what_a_gpu_has_shows_later() -> None:
    gpu = ReplicaOptions("m", device="cuda:0")
    nobody_asks = pytest.fail
    room, options = memory_to_share(gpu, 2, None, nobody_asks)
    assert (total(room), options.kv_bytes, options.kv_part) == (None, None, 0.25)
    room, options = memory_to_share(gpu, 2, 80 << 30, nobody_asks)
    assert (total(room), options.kv_bytes) == (80 << 30, 20 << 30)
    assert memory_to_share(gpu, 1, None, nobody_asks) == (None, gpu)
