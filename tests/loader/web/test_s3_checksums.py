from __future__ import annotations

import os
import random
import threading
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from awscrt import checksums as crt
from botocore.stub import Stubber
from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.errors import SourceCorrupt, SourceUnreachable
from coldframe.loader.sources.location import S3
from coldframe.loader.web import s3_checksums
from coldframe.loader.web.crc import crcs
from coldframe.loader.web.s3 import S3Address
from coldframe.loader.web.s3_checksums import Mended, S3Checksums
from coldframe.loader.web.s3_stored import Block, Stored, ask, by_block
from tests.loader.web.moto_server import isolate, moto

BUCKET = "models"
KINDS = ["CRC64NVME", "CRC32C", "CRC32"]
SUMS: dict[str, Callable[[bytes], int]] = {
    "crc64nvme": crt.crc64nvme,
    "crc32c": crt.crc32c,
    "crc32": zlib.crc32,
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto() as url:
        yield url


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    isolate(monkeypatch, tmp_path, server)
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    client.close()


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("checksums")]


@dataclass
class Shard:
    name: str
    size: int
    version: str = '"etag"'
    data_offset: int = 64

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}/{self.name}"


class Load:
    """An object on its way into memory: fetched at random, in ranges, as a stream does.

    Args:
        content: The object.
        spoilt: Offsets of bytes that come inverted the first time that they are fetched.
        rotten: The same, each time.
    """

    def __init__(
        self, content: bytes, *, spoilt: Sequence[int] = (), rotten: Sequence[int] = ()
    ) -> None:
        self.content = content
        self.memory = bytearray(len(content))
        self.spoilt = set(spoilt)
        self.rotten = set(rotten)
        self.fetched: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def fetch(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        at = offset
        for part in parts:
            part[:] = self.content[at : at + part.nbytes]
            with self._lock:
                for bad in [b for b in self.spoilt | self.rotten if at <= b < at + part.nbytes]:
                    part[bad - at] ^= 0xFF
                    self.spoilt.discard(bad)
            at += part.nbytes
        with self._lock:
            self.fetched.append((offset, at))

    def run(self, sums: S3Checksums, start: int, size: int, *, shard: int = 0) -> None:
        """Reads everything from an offset on, in ranges of a size, each into several buffers."""
        ranges = list(pairwise([*range(start, len(self.content), size), len(self.content)]))
        random.Random(1).shuffle(ranges)
        view = memoryview(self.memory)
        for first, end in ranges:
            middle = first + (end - first) // 3
            parts = [view[first:middle], view[middle:middle], view[middle:end]]
            self.fetch(shard, first, parts)
            sums.seen(shard, first, parts)


def stored_whole(content: bytes, kind: str = "crc64nvme") -> Stored:
    return Stored(kind, (Block(0, len(content), SUMS[kind](content)),))


def stored_parts(content: bytes, size: int, kind: str = "crc32") -> Stored:
    ranges = list(pairwise([*range(0, len(content), size), len(content)]))
    return Stored(kind, tuple(Block(a, b, SUMS[kind](content[a:b])) for a, b in ranges))


def sums_of(
    load: Load, stored: Stored, *, mended: Mended | None = None, data_offset: int = 64
) -> S3Checksums:
    shard = Shard("x", len(load.content), data_offset=data_offset)
    sums = S3Checksums(lambda _: stored, [shard], load.fetch, mended=mended)
    sums.start()
    return sums


def base64(number: int, nbytes: int) -> str:
    return b64encode(number.to_bytes(nbytes, "big")).decode()


# What S3 says


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_with_a_checksum_is_verified(client: Any, kind: str) -> None:
    load = Load(os.urandom(300_000))
    put = client.put_object(Bucket=BUCKET, Key="m/x", Body=load.content, ChecksumAlgorithm=kind)
    place = S3Address(S3(BUCKET, "m"))
    shard = Shard("x", len(load.content), put["ETag"])
    sums = place.checksums([shard], load.fetch)
    sums.start()
    load.run(sums, 64, 7001)
    sums.finish()
    assert sums.note == f"verified by S3's {kind.lower()}"
    assert load.memory[64:] == load.content[64:]
    sums.close()


def test_a_multipart_object_with_one_checksum_is_verified(client: Any) -> None:
    load = Load(os.urandom(6 << 20))
    made = client.create_multipart_upload(
        Bucket=BUCKET, Key="m/x", ChecksumAlgorithm="CRC64NVME", ChecksumType="FULL_OBJECT"
    )
    where = {"Bucket": BUCKET, "Key": "m/x", "UploadId": made["UploadId"]}
    parts = [
        {"PartNumber": n, "ETag": client.upload_part(**where, PartNumber=n, Body=body)["ETag"]}
        for n, body in enumerate([load.content[: 5 << 20], load.content[5 << 20 :]], 1)
    ]
    put = client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    place = S3Address(S3(BUCKET, "m"))
    sums = place.checksums([Shard("x", len(load.content), put["ETag"])], load.fetch)
    sums.start()
    load.run(sums, 64, 1 << 20)
    sums.finish()
    assert sums.note == "verified by S3's crc64nvme"
    sums.close()


def test_parts_are_listed_page_by_page(client: Any) -> None:
    # moto does not list them; the answers are checked against S3's own model.
    content = os.urandom(2500)
    shard = Shard("x", 2500)
    numbers = [crt.crc32c(content[at : at + 1000]) for at in (0, 1000, 2000)]
    listed = [
        {"PartNumber": n, "Size": len(content[at : at + 1000]), "ChecksumCRC32C": base64(crc, 4)}
        for n, (at, crc) in enumerate(zip((0, 1000, 2000), numbers, strict=True), 1)
    ]
    asked = {"Bucket": BUCKET, "Key": "m/x"}
    attributes = {**asked, "ObjectAttributes": ["ETag", "ObjectParts"]}
    with Stubber(client) as stub:
        stub.add_response(
            "head_object",
            {
                "ContentLength": 2500,
                "ETag": '"etag"',
                "ChecksumCRC32C": f"{base64(1, 4)}-3",
                "ChecksumType": "COMPOSITE",
            },
            {**asked, "ChecksumMode": "ENABLED"},
        )
        pages = [(listed[:2], True, 0), (listed[2:], False, 2)]
        for parts, more, marker in pages:
            stub.add_response(
                "get_object_attributes",
                {
                    "ETag": "etag",
                    "ObjectParts": {
                        "Parts": parts,
                        "IsTruncated": more,
                        "NextPartNumberMarker": marker + len(parts),
                    },
                },
                {**attributes, "PartNumberMarker": marker},
            )
        found = ask(client, BUCKET, "m/x", shard)
    assert found == stored_parts(content, 1000, "crc32c")


@pytest.mark.parametrize(
    ("head", "page", "why_not"),
    [
        ({}, None, "has no CRC"),
        ({"ChecksumSHA256": base64(7, 32)}, None, "has no CRC"),
        ({"ETag": '"other"', "ChecksumCRC32": base64(7, 4)}, None, "replaced"),
        ({"ContentLength": 2499, "ChecksumCRC32": base64(7, 4)}, None, "replaced"),
        ({"ChecksumCRC32": f"{base64(7, 4)}-2"}, {"ETag": "etag"}, "does not list"),
        (
            {"ChecksumCRC32": f"{base64(7, 4)}-2"},
            {"ETag": "etag", "ObjectParts": {"Parts": [{"PartNumber": 1, "Size": 2500}]}},
            "does not list",
        ),
        (
            {"ChecksumCRC32": f"{base64(7, 4)}-2", "ChecksumType": "COMPOSITE"},
            {
                "ETag": "etag",
                "ObjectParts": {"Parts": [{"Size": 2499, "ChecksumCRC32": base64(7, 4)}]},
            },
            "does not list",
        ),
        (
            {"ChecksumCRC32": f"{base64(7, 4)}-2"},
            {
                "ETag": "other",
                "ObjectParts": {"Parts": [{"Size": 2500, "ChecksumCRC32": base64(7, 4)}]},
            },
            "does not list",
        ),
    ],
)
def test_what_cannot_be_used_is_not(
    client: Any, head: dict[str, Any], page: dict[str, Any] | None, why_not: str
) -> None:
    with Stubber(client) as stub:
        stub.add_response("head_object", {"ContentLength": 2500, "ETag": '"etag"', **head})
        if page is not None:
            stub.add_response("get_object_attributes", page)
        found = ask(client, BUCKET, "m/x", Shard("x", 2500))
    assert not found.blocks
    assert why_not in found.why_not
    assert "s3://models/x" in found.why_not


def test_a_store_that_does_not_tell_only_leaves_it_unverified(client: Any) -> None:
    load = Load(os.urandom(1000))
    place = S3Address(S3("no-such-bucket", "m"))
    sums = place.checksums([Shard("x", 1000)], load.fetch)
    sums.start()
    load.run(sums, 64, 300)
    sums.finish()
    assert sums.note == "unverified: S3 did not tell the checksum of s3://models/x (404)"
    assert load.fetched == [r for r in load.fetched if r[0] >= 64]
    sums.close()


def test_a_store_that_is_too_slow_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_checksums, "_PATIENCE_S", 0.05)
    load = Load(os.urandom(1000))
    ended = threading.Event()

    def never(_: object) -> Stored:
        ended.wait()
        return Stored()

    sums = S3Checksums(never, [Shard("x", 1000)], load.fetch)
    sums.start()
    load.run(sums, 64, 300)
    sums.finish()
    assert sums.note.startswith("unverified: S3 did not tell")
    assert sums.note.endswith("in time")
    ended.set()
    sums.close()


def test_all_shards_are_asked_for_and_then_it_is_told() -> None:
    loads = [Load(os.urandom(1000 + n)) for n in range(20)]
    asked: list[str] = []
    done = threading.Event()

    def tell(shard: Any) -> Stored:
        asked.append(shard.name)
        load = loads[int(shard.name)]
        return stored_whole(load.content) if int(shard.name) % 2 else Stored(why_not="no CRC")

    def fetch(shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        loads[shard].fetch(shard, offset, parts)

    shards = [Shard(str(n), len(load.content)) for n, load in enumerate(loads)]
    sums = S3Checksums(tell, shards, fetch, asked=done.set)
    sums.start()
    assert done.wait(10)
    assert sorted(asked, key=int) == [str(n) for n in range(20)]
    assert sums.note == "unverified: no CRC"
    for n, load in enumerate(loads):
        load.run(sums, 64, 333, shard=n)
    sums.finish()
    assert sums.note == "verified by S3's crc64nvme: 10 of 20 shards; unverified: no CRC"
    sums.close()


# What comes


@pytest.mark.parametrize("kind", ["crc64nvme", "crc32c", "crc32"])
@pytest.mark.parametrize("size", [1, 63, 64, 1000, 10_000])
def test_sound_bytes_are_verified_however_they_come(kind: str, size: int) -> None:
    load = Load(os.urandom(2500))
    for stored in (stored_whole(load.content, kind), stored_parts(load.content, 777, kind)):
        sums = sums_of(load, stored)
        load.run(sums, 64, size)
        sums.finish()
        assert sums.note == f"verified by S3's {kind}"
        sums.close()
    # Beside the load only the header was read, once for each.
    assert [r for r in load.fetched if r[0] < 64] == [(0, 64)] * 2


def test_a_read_of_a_whole_part_ends_when_it_is_right() -> None:
    load = Load(os.urandom(4000), spoilt=[1500, 2100])
    sums = sums_of(load, stored_parts(load.content, 1000))
    load.run(sums, 1000, 1000)
    assert load.memory[1000:] == load.content[1000:]
    sums.finish()
    assert sums.note == "verified by S3's crc32"
    assert load.fetched.count((1000, 2000)) == 2
    assert load.fetched.count((3000, 4000)) == 1
    sums.close()


def test_a_part_that_stays_wrong_ends_its_read() -> None:
    load = Load(os.urandom(4000), rotten=[1500])
    sums = sums_of(load, stored_parts(load.content, 1000))
    buffer = memoryview(bytearray(1000))
    load.fetch(0, 1000, [buffer])
    with pytest.raises(SourceCorrupt) as raised:
        sums.seen(0, 1000, [buffer])
    assert raised.value.where == "s3://models/x, bytes 1000-1999"
    assert raised.value.expected == f"crc32 {zlib.crc32(load.content[1000:2000]):08x}"
    assert raised.value.got != raised.value.expected
    sums.close()


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_given_out_damaged_is_an_error(whole: bool) -> None:
    load = Load(os.urandom(4000), spoilt=[1500])
    stored = stored_whole(load.content) if whole else stored_parts(load.content, 1000)
    sums = sums_of(load, stored)
    load.run(sums, 64, 300)
    with pytest.raises(SourceCorrupt, match="damaged when they were given out"):
        sums.finish()
    assert sums.note.startswith("unverified")
    sums.close()


def test_what_was_given_out_damaged_is_mended_for_whoever_can_begin_anew() -> None:
    load = Load(os.urandom(4000), spoilt=[1500, 3900])
    told: list[tuple[int, int, int]] = []
    sums = sums_of(load, stored_whole(load.content), mended=lambda *what: told.append(what))
    load.run(sums, 100, 400)
    assert load.memory[100:] != load.content[100:]
    sums.finish()
    assert load.memory[100:] == load.content[100:]
    assert sorted(told) == [(0, 1300, 400), (0, 3700, 300)]
    assert sums.note == "verified by S3's crc64nvme"
    sums.close()


@pytest.mark.parametrize("told", [True, False])
def test_an_object_that_is_not_its_checksum_is_an_error(told: bool) -> None:
    load = Load(os.urandom(4000))
    stored = stored_whole(load.content[:-1] + bytes([load.content[-1] ^ 1]))
    sums = sums_of(load, stored, mended=(lambda *_: None) if told else None)
    load.run(sums, 64, 400)
    with pytest.raises(SourceCorrupt) as raised:
        sums.finish()
    assert raised.value.got == f"{crt.crc64nvme(load.content):016x}"
    assert "upload" in raised.value.hint
    sums.close()


def test_a_header_that_came_damaged_is_found_too() -> None:
    load = Load(os.urandom(4000), rotten=[10])
    sums = sums_of(load, stored_whole(load.content))
    load.run(sums, 64, 400)
    with pytest.raises(SourceCorrupt):
        sums.finish()
    sums.close()


def test_the_little_that_was_not_needed_is_read_at_the_end() -> None:
    load = Load(os.urandom(4000))
    sums = sums_of(load, stored_whole(load.content))
    load.run(sums, 1000, 400)
    sums.finish()
    assert (64, 1000) in load.fetched
    assert sums.note == "verified by S3's crc64nvme"
    sums.close()


def test_much_that_was_not_needed_is_not_read() -> None:
    load = Load(os.urandom(2_500_000))
    sums = sums_of(load, stored_parts(load.content, 1_000_000))
    load.run(sums, 1_400_000, 400_000)
    sums.finish()
    assert not [r for r in load.fetched if 64 <= r[0] < 1_400_000]
    assert sums.note == "unverified: 1399936 bytes of s3://models/x were not needed"
    sums.close()


def test_what_was_not_needed_hides_no_damage_elsewhere() -> None:
    load = Load(os.urandom(3_000_000), spoilt=[2_200_000])
    sums = sums_of(load, stored_parts(load.content, 1_000_000))
    load.run(sums, 2_000_000, 400_000)
    with pytest.raises(SourceCorrupt):
        sums.finish()
    sums.close()


def test_the_same_range_twice_is_the_later_one() -> None:
    load = Load(os.urandom(4000), spoilt=[700])
    sums = sums_of(load, stored_whole(load.content))
    load.run(sums, 64, 300)
    load.run(sums, 64, 300)
    sums.finish()
    assert sums.note == "verified by S3's crc64nvme"
    sums.close()


def test_a_network_that_fails_while_mending_says_so() -> None:
    load = Load(os.urandom(4000), spoilt=[1500])
    broken = threading.Event()

    def fetch(shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        if broken.is_set():
            raise SourceUnreachable("gone")
        load.fetch(shard, offset, parts)

    sums = S3Checksums(lambda _: stored_whole(load.content), [Shard("x", 4000)], fetch)
    sums.start()
    load.run(sums, 64, 300)
    broken.set()
    with pytest.raises(SourceUnreachable):
        sums.finish()
    sums.close()


# The arithmetic


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.integers(0, 399),
)
def test_bytes_are_cut_where_blocks_begin(
    sizes: list[int], lengths: list[int], offset: int
) -> None:
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    blocks = [Block(end - size, end, 0) for size, end in zip(sizes, ends, strict=True)]
    content = bytes(n % 251 for n in range(ends[-1]))
    offset = offset % len(content)
    parts, at = [], offset
    for length in lengths:
        parts.append(memoryview(content)[at : at + length])
        at = min(at + length, len(content))
    got = offset
    for number, start, cut in by_block(blocks, offset, parts):
        size = sum(part.nbytes for part in cut)
        assert size > 0
        assert start == got
        assert blocks[number].start <= start
        assert start + size <= blocks[number].end
        assert b"".join(cut) == content[start : start + size]
        got += size
    assert got == at


@given(st.lists(st.binary(max_size=40), max_size=6), st.binary(max_size=40))
def test_a_checksum_of_pieces_is_that_of_the_whole(pieces: list[bytes], last: bytes) -> None:
    for kind, crc in crcs().items():
        first = crc.sum([memoryview(piece) for piece in pieces])
        assert first == SUMS[kind](b"".join(pieces))
        whole = SUMS[kind](b"".join(pieces) + last)
        assert crc.combine(first, SUMS[kind](last), len(last)) == whole
