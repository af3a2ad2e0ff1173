from __future__ import annotations

import hashlib
import struct

import pytest

from coldframe.runtime.commands.run import add_replica_arguments, replica_options
from coldframe.runtime.engine.ropespec import RopeSpec
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.worker.prefix import PrefixKeys
from tests.runtime.helpers import prompt_of

ROPE = RopeSpec("default", 10000.0, 4096, 4096)


def made(fingerprint: str = "m", kv_format: str = "f", rope: RopeSpec = ROPE) -> PrefixKeys:
    return PrefixKeys(fingerprint, kv_format, 32, rope)


def test_a_key_is_the_hash_of_the_block_behind_the_key_before_it() -> None:
    ids = prompt_of(100)
    parent = hashlib.blake2b(b"m\0f", digest_size=32).digest()
    expected = []
    for start in (0, 32, 64):
        data = struct.pack("<32I", *ids[start : start + 32])
        parent = hashlib.blake2b(parent + data, digest_size=32).digest()
        expected.append(parent.hex())
    assert made().of(ids, 100) == expected


def test_only_full_blocks_have_keys() -> None:
    ids = prompt_of(64)
    assert [len(made().of(ids[:n], n)) for n in (0, 1, 31, 32, 33, 63, 64)] == [0, 0, 0, 1, 1, 1, 2]


def test_a_key_stands_for_all_that_is_before_it() -> None:
    ids = prompt_of(96)
    keys = made().of(ids, 96)
    for place in (0, 31, 32, 95):
        other = made().of([*ids[:place], ids[place] ^ 1, *ids[place + 1 :]], 96)
        assert [a == b for a, b in zip(keys, other, strict=True)] == [
            block < place // 32 for block in range(3)
        ]


def test_models_and_layouts_have_nothing_in_common() -> None:
    ids = prompt_of(64)
    keys = {key for made_by in (made(), made("n"), made("m", "g")) for key in made_by.of(ids, 64)}
    assert len(keys) == 6


def test_ids_of_any_vocabulary() -> None:
    assert len(made().of([0, 2**32 - 1] * 16, 32)) == 1


def test_what_dynamic_scaling_rotates_by_the_length_has_no_key() -> None:
    rope = RopeSpec("dynamic", 10000.0, 64, 256, factor=4.0)
    ids = prompt_of(200)
    # Up to 64 tokens nothing is scaled; in a longer prompt all tokens are, by its length.
    assert len(made(rope=rope).of(ids[:64], 64)) == 2
    assert len(made(rope=rope).of(ids[:150], 40)) == 2  # an answer that goes on beyond them
    assert made(rope=rope).of(ids[:65], 65) == []
    assert made(rope=rope).of(ids, 200) == []


@pytest.mark.parametrize(("flags", "reuse"), [([], True), (["--no-prefix-cache"], False)])
def test_reuse_can_be_switched_off(flags: list[str], reuse: bool) -> None:
    parser = Parser(prog="coldframe")
    parser.add_argument("model")
    add_replica_arguments(parser)
    assert replica_options(parser.parse(["m", *flags])).prefix_cache is reuse
