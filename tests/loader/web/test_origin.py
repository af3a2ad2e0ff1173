from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from coldframe.loader.checkpoints.checkpoint import Checkpoint, Shard
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.errors import (
    CheckpointError,
    SourceChanged,
    SourceCorrupt,
    SourceCredentials,
    SourceDenied,
    SourceError,
    SourceNotFound,
)
from coldframe.loader.sources.base import Origin, Source
from coldframe.loader.web.origin import Checksums, Fetch, WebOrigin
from tests.loader.checkpoints.written import tensor, write_model
from tests.loader.web.reader_kit import FAST, nothing_left, reader_of, write_random
from tests.loader.web.servers import Fault, FaultProxy, Request, nginx
from tests.loader.weights import layered, reference


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "model", nbytes=150_000)


@pytest.fixture
def proxy(model: Path) -> Iterator[FaultProxy]:
    with nothing_left(), nginx(model.parent) as base, FaultProxy(base) as proxy:
        yield proxy


@pytest.fixture
def origin(proxy: FaultProxy) -> Iterator[WebOrigin]:
    with reader_of(f"{proxy.url}/model") as reader, closing(WebOrigin(reader)) as origin:
        yield origin


def test_it_is_what_the_loader_asks_for(origin: WebOrigin) -> None:
    place: Origin = origin
    source: Source = origin.open_source([])
    assert place.path is None
    source.close()


def test_a_checkpoint_is_the_same_as_from_its_directory(
    origin: WebOrigin, model: Path, proxy: FaultProxy
) -> None:
    remote, local = Checkpoint.open(origin), Checkpoint.open(str(model))
    assert remote.fingerprint == local.fingerprint
    assert remote.path == origin.uri == f"{proxy.url}/model"
    # No file costs more than one request, whether it is there or not.
    paths = [request.path for request in proxy.log]
    assert len(paths) == len(set(paths))

    found: dict[str, bytes] = {}
    source = origin.open_source(remote.shards)
    for info in Plan.build(remote).placements.values():
        buffer = bytearray(info.nbytes)
        tensor = remote.tensors[info.name]
        source.read_into(tensor.shard, tensor.offset, [memoryview(buffer)])
        found[info.name] = bytes(buffer)
    source.finish()
    assert found == reference(model)
    source.close()
    source.close()


def test_small_files(origin: WebOrigin, model: Path, proxy: FaultProxy) -> None:
    content = (model / "config.json").read_bytes()
    assert origin.read_small("config.json", 1000) == content
    assert len(proxy.log) == 1
    assert not origin.exists("tokenizer.json")
    assert origin.exists("config.json")
    assert origin.read_small("config.json", 1000) == content
    assert len(proxy.log) == 3  # what was looked at is not asked for again
    with pytest.raises(SourceNotFound):
        origin.read_small("tokenizer.json", 1000)
    large = write_random(model / "tokenizer.json", 700_000)
    assert origin.exists("tokenizer.json")
    with pytest.raises(CheckpointError):
        origin.read_small("tokenizer.json", 699_999)
    assert origin.exists("tokenizer.json")
    assert origin.read_small("tokenizer.json", 700_000) == large


def test_a_header_larger_than_what_is_fetched_with_the_first_request(
    tmp_path: Path, proxy: FaultProxy
) -> None:
    many = [tensor(f"tensor.{number:04}.{'x' * 500}", 3) for number in range(1500)]
    wide = write_model(tmp_path / "wide", [many])
    with reader_of(f"{proxy.url}/wide") as reader, closing(WebOrigin(reader)) as origin:
        assert Checkpoint.open(origin).tensors == Checkpoint.open(str(wide)).tensors
    assert [request.path for request in proxy.log].count("/wide/model.safetensors") == 2


def test_denied_may_mean_that_it_is_not_there(origin: WebOrigin, proxy: FaultProxy) -> None:
    """As with a bucket whose keys one may read, but not list."""

    def script(request: Request) -> Fault | None:
        return Fault(status=403) if request.path == "/model/model.safetensors" else None

    proxy.faults = script
    assert len(Checkpoint.open(origin).shards) == 2


def test_denied_is_not_not_found(origin: WebOrigin, proxy: FaultProxy) -> None:
    def script(request: Request) -> Fault | None:
        return Fault(status=403) if "safetensors" in request.path else None

    proxy.faults = script
    with pytest.raises(SourceDenied):
        Checkpoint.open(origin)
    proxy.faults = [Fault(status=401)]
    with pytest.raises(SourceCredentials):
        origin.exists("config.json")


def test_a_shard_that_is_replaced_between_its_header_and_its_weights(
    origin: WebOrigin, model: Path
) -> None:
    checkpoint = Checkpoint.open(origin)
    shard = checkpoint.shards[1]
    (model / "new").write_bytes((model / shard.name).read_bytes() + b"!")
    (model / "new").rename(model / shard.name)
    with (
        closing(origin.open_source(checkpoint.shards)) as source,
        pytest.raises(SourceChanged) as caught,
    ):
        source.read_into(1, shard.data_offset, [memoryview(bytearray(10))])
    assert shard.uri in str(caught.value)


def test_what_it_says_of_itself(origin: WebOrigin, proxy: FaultProxy) -> None:
    checkpoint = Checkpoint.open(origin)
    with closing(origin.open_source(checkpoint.shards)) as source:
        assert source.readers == FAST.connections
        assert source.note == f"{FAST.first_connections} connections to {proxy.url}/model"
        proxy.faults = [Fault(status=503)]
        source.read_into(0, 0, [memoryview(bytearray(10))])
        assert source.note == f"1 connection to {proxy.url}/model, 1 retry"


def test_without_a_version_that_is_said(origin: WebOrigin, proxy: FaultProxy) -> None:
    proxy.faults = lambda request: Fault(headers={"ETag": None, "Last-Modified": None})
    checkpoint = Checkpoint.open(origin)
    with closing(origin.open_source(checkpoint.shards)) as source:
        assert "not safe from changes" in source.note


class _Sums:
    """Checks what comes against what a store might have."""

    note = "verified by sums"

    def __init__(self, shards: Sequence[Shard], fetch: Fetch, expected: dict[str, bytes]) -> None:
        self.shards = shards
        self.fetch = fetch
        self.expected = expected
        self.told: list[str] = []

    def start(self) -> None:
        self.told.append("start")

    def seen(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        self.told.append("seen")
        for _ in range(2):
            found = b"".join(parts)
            if found == self.expected[self.shards[shard].name][offset : offset + len(found)]:
                return
            self.fetch(shard, offset, parts)
        raise SourceCorrupt("it stays wrong", where=self.shards[shard].uri)

    def finish(self) -> None:
        self.told.append("finish")

    def close(self) -> None:
        self.told.append("close")


def test_a_stores_checksums_see_all_that_comes(proxy: FaultProxy, model: Path) -> None:
    expected = {path.name: path.read_bytes() for path in model.glob("*.safetensors")}
    made: list[_Sums] = []

    def make(shards: Sequence[Shard], fetch: Fetch) -> Checksums:
        made.append(_Sums(shards, fetch, expected))
        return made[-1]

    with reader_of(f"{proxy.url}/model") as reader:
        origin = WebOrigin(reader, make)
        checkpoint = Checkpoint.open(origin)
        source = origin.open_source(checkpoint.shards)
        origin.close()  # the source goes on
        buffer = bytearray(1000)
        proxy.faults = [Fault(flip_at=500)]
        source.read_into(0, 100, [memoryview(buffer)])
        assert buffer == expected[checkpoint.shards[0].name][100:1100]
        proxy.faults = [Fault(flip_at=5)] * 3
        with pytest.raises(SourceCorrupt):
            source.read_into(0, 100, [memoryview(buffer)])
        source.finish()
        assert source.note.endswith(", verified by sums")
        source.close()
        assert made[0].told == ["start", "seen", "seen", "finish", "close"]
        with pytest.raises(SourceError, match="given up"):
            reader.open("config.json")


def test_giving_up_ends_reads(origin: WebOrigin, proxy: FaultProxy) -> None:
    checkpoint = Checkpoint.open(origin)
    with closing(origin.open_source(checkpoint.shards)) as source:
        source.abort()
        with pytest.raises(SourceError, match="given up"):
            source.read_into(0, 0, [memoryview(bytearray(10))])
