from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coldframe.loader.errors import ColdframeError, DeviceError, PlatformError, RequestError
from coldframe.loader.kv.options import DEFAULT_BYTES, KvStoreOptions
from coldframe.runtime.commands.run import add_replica_arguments, replica_options
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.options import ReplicaOptions


def options(*flags: object) -> ReplicaOptions:
    parser = Parser()
    parser.add_argument("model")
    add_replica_arguments(parser)
    return replica_options(parser.parse(["m", *map(str, flags)]))


def test_nothing_is_kept_unless_somebody_says_where() -> None:
    assert options().kv_store is None
    assert options("--kv-store-memory", "0", "--kv-store-bytes", "1GiB").kv_store is None
    assert options("--kv-store", "").kv_store is None  # and not the working directory


def test_where_and_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "new" / "kv"
    assert options("--kv-store", place).kv_store == KvStoreOptions(str(place), DEFAULT_BYTES, 0)
    assert place.is_dir()
    found = options("--kv-store", place, "--kv-store-bytes", "3MiB", "--kv-store-memory", "2MiB")
    assert found.kv_store == KvStoreOptions(str(place), 3 << 20, 2 << 20)
    assert options("--kv-store-memory", "2MiB").kv_store == KvStoreOptions(memory=2 << 20)
    monkeypatch.setenv("COLDFRAME_KV_STORE", str(place))
    monkeypatch.chdir(place)
    assert options().kv_store == KvStoreOptions(str(place))
    assert options("--kv-store", ".").kv_store == KvStoreOptions(str(place))


@pytest.mark.parametrize(
    ("flags", "kind", "words"),
    [
        (("--kv-store", "DIR", "--no-prefix-cache"), RequestError, "--no-prefix-cache"),
        (("--kv-store-memory", "1MiB", "--no-prefix-cache"), RequestError, "--no-prefix-cache"),
        (("--kv-store-memory", "1000TiB"), DeviceError, "--kv-store-memory"),
        (("--kv-store", "FILE"), PlatformError, "--kv-store"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: tuple[str, ...], kind: type[ColdframeError], words: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    places = {"DIR": str(tmp_path / "kv"), "FILE": str(tmp_path / "file")}
    with pytest.raises(kind, match=words):
        options(*(places.get(flag, flag) for flag in flags))


def test_a_command_says_so_at_once(tmp_path: Path, no_leaks: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "coldframe", "run", tmp_path, "-p", "x"),
            *("--kv-store", tmp_path / "file"),
        ],
        capture_output=True,
        text=True,
        env={"COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.returncode == 1
    assert "the KV store's directory cannot be used" in done.stderr
    assert "Give --kv-store a directory" in done.stderr
