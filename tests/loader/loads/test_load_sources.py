"""Whole loads from every kind of place, and what becomes of each that is bad or goes bad."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import trustme

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.seal import SEAL_NAME
from coldframe.loader.checkpoints.sealing import seal_checkpoint
from coldframe.loader.errors import (
    CheckpointError,
    ColdframeError,
    SourceBusy,
    SourceChanged,
    SourceCorrupt,
    SourceCredentials,
    SourceDenied,
    SourceElsewhere,
    SourceError,
    SourceNotFound,
    SourceProtocol,
    SourceUnreachable,
    SourceUntrusted,
)
from coldframe.loader.memory_service.board import StageState
from coldframe.loader.sources import opening
from coldframe.loader.sources.base import SEALED
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.file import FileSource
from coldframe.loader.web.limits import Limits
from tests.loader.checkpoints.written import header_of, tensor, write_index, write_shard
from tests.loader.loads.test_load import Watched
from tests.loader.web.moto_server import KEY, SECRET, isolate, moto, upload
from tests.loader.web.reader_kit import nothing_left
from tests.loader.web.servers import Fault, FaultProxy, Request, nginx
from tests.loader.weights import layered, reference, shard_files

LIMITS = Limits(patience_s=5.0, connect_s=5.0, stall_s=5.0, backoff_s=0.01, hedges=0)
NUMBERS = itertools.count()
PASSWORD = "hunter2secret"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    isolate(monkeypatch, tmp_path)
    impatient(monkeypatch, LIMITS)
    before = signal.signal(signal.SIGIO, lambda *_: None)
    files = open_memory()
    with nothing_left():
        yield
    assert open_memory() == files
    signal.signal(signal.SIGIO, before)


def open_memory() -> list[str]:
    """Files and memory that this process has open; of sockets, the S3 server has some, too."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.startswith("/") and "/proc/" not in name)


def impatient(monkeypatch: pytest.MonkeyPatch, limits: Limits) -> None:
    monkeypatch.setattr(opening, "_limits", lambda hurry: limits)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with moto() as url:
        yield url


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "www" / "m")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()


@dataclass
class Store:
    """A place that has what a local directory has.

    Attributes:
        uri: As a user writes it.
        shown: As it is in errors: without a password.
        proxy: What stands before it, where it is on a network.
        change: Puts another content there in a file's place.
    """

    uri: str
    shown: str
    proxy: FaultProxy | None
    change: Callable[[str, bytes], None]


Publish = Callable[..., Store]


@pytest.fixture(params=["directory", "http", "s3"])
def publish(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: str
) -> Iterator[Publish]:
    """Makes what is in `www/m` to be had from a place of the kind that is the parameter."""
    if request.param == "directory":
        root = tmp_path / "www" / "m"
        yield lambda **_: Store(str(root), str(root), None, _replace_in(root))
    elif request.param == "http":
        with nginx(tmp_path / "www") as base, FaultProxy(base) as proxy:
            host = proxy.url.removeprefix("http://")
            yield lambda **_: Store(
                f"http://me:{PASSWORD}@{host}/m",
                f"http://{host}/m",
                proxy,
                _replace_in(tmp_path / "www" / "m"),
            )
    else:
        with FaultProxy(s3_server) as proxy:
            prefix = f"m{next(NUMBERS)}"
            client = botocore.session.get_session().create_client("s3", endpoint_url=s3_server)
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)

            def put(**arguments: Any) -> Store:
                upload(client, tmp_path / "www" / "m", "models", f"{prefix}/", **arguments)
                uri = f"s3://models/{prefix}"
                return Store(
                    uri,
                    uri,
                    proxy,
                    lambda name, body: client.put_object(
                        Bucket="models", Key=f"{prefix}/{name}", Body=body
                    ),
                )

            yield put
            client.close()


network = pytest.mark.parametrize("publish", ["http", "s3"], indirect=True)
over_http = pytest.mark.parametrize("publish", ["http"], indirect=True)
over_s3 = pytest.mark.parametrize("publish", ["s3"], indirect=True)
local = pytest.mark.parametrize("publish", ["directory"], indirect=True)


def _replace_in(root: Path) -> Callable[[str, bytes], None]:
    def change(name: str, content: bytes) -> None:
        fresh = root / "fresh"
        fresh.write_bytes(content)
        os.utime(fresh, ns=(0, 10**18))
        fresh.rename(root / name)

    return change


def seal(root: Path) -> None:
    checkpoint = Checkpoint.open(root, sealed=False)
    source = FileSource(checkpoint.shards)
    seal_checkpoint(checkpoint, DirectoryOrigin(str(root)), source).write(str(root))
    source.close()


def load(store: Store, files: Path, **options: Any) -> tuple[Watched, dict[str, bytes]]:
    """A load that must end well; it is closed."""
    watched = Watched(store.uri, files, **options)
    try:
        watched.load.run()
        watched.wait()
        assert watched.ends == [None], watched.ends
        return watched, watched.tensors()
    finally:
        watched.close()


def fails(place: Store | str, files: Path, **options: Any) -> tuple[ColdframeError, Watched]:
    """The error in which a load ends, at whatever point it does; it is closed."""
    watched = Watched(place if isinstance(place, str) else place.uri, files, **options)
    try:
        watched.load.run()
        watched.wait()
    except ColdframeError as error:
        watched.load.close()
        assert "plan" not in watched.said
        found = error
    else:
        (ended,) = watched.ends
        assert ended is not None
        found = ended
        # Some stage is missing for good, and was never given out.
        stages = range(len(watched.load.weights.plan.stages))
        missing = {s for s in stages if watched.load.board.state(s) is StageState.FAILED}
        assert missing
        assert not missing & set(watched.said)
        watched.close()
    for secret in (PASSWORD, KEY, SECRET):
        assert secret not in f"{found} {found.to_wire()}"
    return found, watched


def of_weights(request: Request) -> bool:
    """Whether it asks for weights: headers are at the beginning of a file."""
    return "if-match" in request.headers and request.range is not None and request.range[0] > 0


# -- sound ones ---------------------------------------------------------------------------------


def test_the_bytes_are_those_of_the_files(publish: Publish, model: Path, tmp_path: Path) -> None:
    store = publish()
    watched, found = load(store, tmp_path / "files")
    assert found == reference(model)
    assert watched.load.local == (store.proxy is None)
    assert watched.said[0] == f"files in {store.uri}" or store.proxy is not None
    assert watched.load.weights.why is None


def test_a_sealed_one_is_verified(publish: Publish, model: Path, tmp_path: Path) -> None:
    seal(model)
    watched, found = load(publish(), tmp_path / "files", copy=True)
    assert found == reference(model)
    assert watched.load.weights.verified == SEALED
    if not watched.load.local:
        # Not among the small files that a replica reads.
        assert SEAL_NAME not in os.listdir(tmp_path / "files")


@over_http
def test_what_nobody_vouches_for_is_called_so(
    publish: Publish, model: Path, tmp_path: Path
) -> None:
    watched, _ = load(publish(), tmp_path / "files")
    assert watched.load.weights.verified.startswith("unverified: the checkpoint is not sealed")
    seal(model)
    watched, _ = load(publish(), tmp_path / "files", verify=False)
    assert watched.load.weights.verified == "unverified, as asked"


@over_s3
def test_s3s_own_checksums_vouch_where_there_is_no_seal(
    publish: Publish, model: Path, tmp_path: Path
) -> None:
    watched, found = load(publish(ChecksumAlgorithm="CRC64NVME"), tmp_path / "files")
    assert found == reference(model)
    assert watched.load.weights.verified == "verified by S3's crc64nvme"


# -- bad checkpoints, wherever they are -----------------------------------------------------------


def cut(model: Path) -> list[str]:
    path = shard_files(model)[1]
    size = path.stat().st_size
    os.truncate(path, size - 100)
    return [path.name, f"{size} bytes", f"{size - 100} bytes"]


def lengthened(model: Path) -> list[str]:
    path = shard_files(model)[0]
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"x" * 100)
    return [path.name, f"{size} bytes", f"{size + 100} bytes"]


def without_a_shard(model: Path) -> list[str]:
    path = shard_files(model)[1]
    path.unlink()
    return [path.name]


def with_a_tensor_twice(model: Path) -> list[str]:
    names = []
    for number in range(2):
        names.append(f"model-{number}.safetensors")
        same = tensor("model.norm.weight", 100, number)
        write_shard(model / names[-1], header_of([same]), same[3])
    write_index(model, {"model.norm.weight": names[0], "lm_head.weight": names[1]})
    return ["model.norm.weight", *names]


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (cut, CheckpointError),
        (lengthened, CheckpointError),
        (without_a_shard, SourceNotFound),
        (with_a_tensor_twice, CheckpointError),
    ],
)
def test_a_bad_checkpoint_is_an_error_that_names_what_is_bad(
    spoil: Callable[[Path], list[str]],
    kind: type[ColdframeError],
    publish: Publish,
    model: Path,
    tmp_path: Path,
) -> None:
    told = spoil(model)
    store = publish()
    error, _ = fails(store, tmp_path / "files")
    assert type(error) is kind
    assert store.shown in str(error.where)
    for text in told:
        assert text in str(error)


@local
def test_no_such_directory_says_what_a_model_can_be(publish: Publish, tmp_path: Path) -> None:
    error, _ = fails(str(tmp_path / "nowhere"), tmp_path / "files")
    assert type(error) is SourceNotFound
    assert str(tmp_path / "nowhere") in str(error)
    assert "s3://bucket/prefix" in error.hint


# -- faults on the way ----------------------------------------------------------------------------


@network
def test_only_what_was_lost_is_asked_for_again(
    publish: Publish, model: Path, tmp_path: Path
) -> None:
    store = publish()
    assert store.proxy is not None
    bad: list[tuple[Request, Fault]] = []

    def script(request: Request) -> Fault | None:
        if not of_weights(request) or len(bad) == 5:
            return None
        fault = Fault(status=503) if len(bad) < 3 else Fault(cut_after=1000)
        bad.append((request, fault))
        return fault

    store.proxy.faults = script
    watched, found = load(store, tmp_path / "files")
    assert found == reference(model)
    asked = [request for request in store.proxy.log if of_weights(request)]
    for request, fault in bad:
        assert request.range is not None
        first, last = request.range
        again = (first + (fault.cut_after or 0), last)
        assert [r.range for r in asked if r.path == request.path].count(again) >= 1
    # Not a byte came twice.
    assert sum(request.sent for request in asked if request.status == 206) == (
        watched.load.weights.plan.read_bytes
    )


@network
def test_a_byte_that_flips_on_the_way_is_mended(
    publish: Publish, model: Path, tmp_path: Path
) -> None:
    seal(model)
    store = publish()
    assert store.proxy is not None
    flipped: list[Request] = []

    def script(request: Request) -> Fault | None:
        if flipped or not of_weights(request):
            return None
        flipped.append(request)
        return Fault(flip_at=17)

    store.proxy.faults = script
    watched, found = load(store, tmp_path / "files")
    assert flipped
    assert found == reference(model)
    assert watched.load.weights.verified == SEALED


def always_flipped(store: Store, model: Path, tensor: str) -> int:
    """A byte of a tensor comes inverted however often it is asked for; its offset in the file."""
    checkpoint = Checkpoint.open(model)
    found = checkpoint.tensors[tensor]
    name, at = checkpoint.shards[found.shard].name, found.offset + 5

    def script(request: Request) -> Fault | None:
        if request.range is None or not (of_weights(request) and request.path.endswith(name)):
            return None
        first, last = request.range
        return Fault(flip_at=at - first) if first <= at <= last else None

    assert store.proxy is not None
    store.proxy.faults = script
    return at


@network
def test_a_byte_that_stays_wrong_is_an_error_that_names_the_tensor(
    publish: Publish, model: Path, tmp_path: Path
) -> None:
    seal(model)
    store = publish()
    at = always_flipped(store, model, "model.layers.1.mlp.weight")
    error, watched = fails(store, tmp_path / "files")
    assert type(error) is SourceCorrupt
    assert store.shown in str(error)
    assert "model.layers.1.mlp.weight" in str(error)
    assert "xxh3-128" in str(error)
    assert "good copy" in error.hint
    first, stop = (
        int(word) for word in str(error.where).split("bytes ")[1].split(",")[0].split(" to ")
    )
    assert first <= at < stop
    # Neither this stage nor any behind it was given out.
    assert 2 not in watched.said


@over_s3
def test_a_byte_that_is_not_what_s3_has_is_an_error_before_the_last_stage(
    publish: Publish, model: Path, tmp_path: Path
) -> None:
    store = publish(ChecksumAlgorithm="CRC64NVME")
    always_flipped(store, model, "model.layers.1.mlp.weight")
    error, _ = fails(store, tmp_path / "files")
    assert type(error) is SourceCorrupt
    assert store.shown in str(error)


@local
@pytest.mark.parametrize("copy", [True, False])
def test_a_byte_that_flipped_on_the_disk(
    copy: bool, publish: Publish, model: Path, tmp_path: Path
) -> None:
    seal(model)
    found = Checkpoint.open(model).tensors["lm_head.weight"]
    path = shard_files(model)[found.shard]
    content = bytearray(path.read_bytes())
    content[found.offset + 100] ^= 1
    path.write_bytes(content)
    if copy:
        error, _ = fails(publish(), tmp_path / "files", copy=True)
    else:
        # What is mapped is in use at once, and checked behind that.
        watched = Watched(model)
        watched.load.run()
        watched.wait()
        assert watched.load.weights.mode == "mapped"
        assert watched.load.weights.must_verify
        with pytest.raises(SourceCorrupt) as caught:
            watched.load.weights.verify()
        watched.close()
        error = caught.value
    assert type(error) is SourceCorrupt
    assert str(path) in str(error)
    assert "lm_head.weight" in str(error)


@network
def test_a_file_that_is_replaced_while_it_is_loaded(
    publish: Publish, model: Path, tmp_path: Path
) -> None:
    store = publish()
    assert store.proxy is not None
    path = shard_files(model)[0]
    other = bytes(reversed(path.read_bytes()))
    seen: list[Request] = []

    def script(request: Request) -> None:
        if of_weights(request) and request.path.endswith(path.name):
            seen.append(request)
            if len(seen) == 2:
                store.change(path.name, other)

    store.proxy.faults = script
    error, _ = fails(store, tmp_path / "files")
    assert type(error) is SourceChanged
    assert f"{store.shown}/{path.name}, bytes " in str(error)
    assert "412" in str(error)


@local
def test_a_local_file_that_is_written_while_it_is_loaded(
    publish: Publish, model: Path, tmp_path: Path
) -> None:
    path = shard_files(model)[0]

    def written(stage: int) -> None:
        if stage == 0:
            os.utime(path, ns=(0, 1))

    # The one reader that there is goes on when the file has been written to, however long that
    # takes: a link that is slow enough is one on a machine that is not too busy only.
    watched = Watched(model, on_stage=written, copy=True, threads=1)
    watched.load.run()
    watched.wait()
    (error,) = watched.ends
    assert type(error) is SourceChanged
    assert error.where == str(path)
    assert len(watched.load.weights.plan.stages) - 1 not in watched.said
    watched.close()


# -- refusals -------------------------------------------------------------------------------------


def xml(code: str, more: str = "") -> bytes:
    return f"<Error><Code>{code}</Code><Message>No.</Message>{more}</Error>".encode()


HTTP_REFUSALS = {
    "denied": (Fault(status=403), SourceDenied, "403", "may"),
    "credentials": (Fault(status=401), SourceCredentials, "401", ""),
    "not found": (Fault(status=404), SourceNotFound, "404", ""),
    "busy for ever": (Fault(status=503), SourceBusy, "503", "later"),
    "broken for ever": (Fault(status=500), SourceUnreachable, "500", ""),
    "always cut": (Fault(cut_after=0), SourceUnreachable, "", ""),
    "no ranges": (Fault(whole=True), SourceProtocol, "200", "Range"),
    "another range": (
        Fault(headers={"Content-Range": "bytes 1-100/300000"}),
        SourceProtocol,
        "bytes 1-100/300000",
        "",
    ),
}

S3_REFUSALS = {
    "denied": (Fault(status=403, body=xml("AccessDenied")), SourceDenied, "403", "s3:GetObject"),
    "expired": (Fault(status=400, body=xml("ExpiredToken")), SourceCredentials, "400", "Log in"),
    "no such key": (
        Fault(status=403, body=xml("InvalidAccessKeyId")),
        SourceCredentials,
        "403",
        "AWS_ACCESS_KEY_ID",
    ),
    "wrong secret": (
        Fault(status=403, body=xml("SignatureDoesNotMatch")),
        SourceCredentials,
        "403",
        "secret key",
    ),
    "another region": (
        Fault(status=301, headers={"x-amz-bucket-region": "eu-west-2"}),
        SourceElsewhere,
        "eu-west-2",
        "AWS_REGION",
    ),
    "no such bucket": (
        Fault(status=404, body=xml("NoSuchBucket")),
        SourceNotFound,
        "404",
        "AWS_ENDPOINT_URL",
    ),
    "no such object": (Fault(status=404, body=xml("NoSuchKey")), SourceNotFound, "404", "prefix"),
    "slow down": (Fault(status=503, body=xml("SlowDown")), SourceBusy, "503", "later"),
    "archived": (
        Fault(status=403, body=xml("InvalidObjectState")),
        SourceError,
        "403",
        "Glacier",
    ),
}


def refused(
    store: Store,
    files: Path,
    row: tuple[Fault, type[ColdframeError], str, str],
    in_the_middle: bool,
) -> None:
    fault, kind, status, remedy = row
    assert store.proxy is not None
    store.proxy.faults = (
        (lambda request: fault if of_weights(request) else None)
        if in_the_middle
        else (lambda request: fault)
    )
    error, watched = fails(store, files)
    assert type(error) is kind, error
    assert store.shown in str(error.where), error
    assert status in str(error)
    assert remedy in error.hint
    if in_the_middle:
        assert ", bytes " in str(error.where)
        assert watched.said.count(0) == 0


@pytest.mark.parametrize("in_the_middle", [False, True], ids=["at once", "in the middle"])
@pytest.mark.parametrize("row", HTTP_REFUSALS)
@over_http
def test_each_refusal_of_a_server_has_an_error_of_its_own(
    publish: Publish,
    row: str,
    in_the_middle: bool,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    impatient(monkeypatch, replace(LIMITS, patience_s=0.1))
    refused(publish(), tmp_path / "files", HTTP_REFUSALS[row], in_the_middle)


@pytest.mark.heavy
@pytest.mark.parametrize("in_the_middle", [False, True], ids=["at once", "in the middle"])
@pytest.mark.parametrize("row", S3_REFUSALS)
@over_s3
def test_each_refusal_of_s3_has_an_error_of_its_own(
    publish: Publish,
    row: str,
    in_the_middle: bool,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    impatient(monkeypatch, replace(LIMITS, patience_s=0.1))
    refused(publish(), tmp_path / "files", S3_REFUSALS[row], in_the_middle)


@network
def test_a_wrong_endpoint(
    publish: Publish, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch, replace(LIMITS, patience_s=0.1))
    store = publish()
    with socket.socket() as nobody:  # bound, and listening to nobody
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        place = store.uri if store.uri.startswith("s3:") else f"{url}/m"
        error, _ = fails(place, tmp_path / "files")
    assert type(error) is SourceUnreachable
    assert place in str(error.where)
    assert "refused" in str(error)


@network
def test_a_certificate_that_nobody_trusts(
    publish: Publish,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = publish()
    assert store.proxy is not None
    authority = trustme.CA()
    with FaultProxy(store.proxy.upstream, tls=authority.issue_cert("127.0.0.1")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3 = store.uri.startswith("s3:")
        place = store.uri if s3 else f"{proxy.url}/m"
        error, _ = fails(place, tmp_path / "files")
        assert type(error) is SourceUntrusted
        assert proxy.url in str(error.where)
        assert "SSL_CERT_FILE" in error.hint
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("AWS_CA_BUNDLE" if s3 else "SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        _, found = load(replace(store, uri=place), tmp_path / "files")
    assert found == reference(model)


# -- one place after the other --------------------------------------------------------------------


@network
def test_another_place_goes_on_with_what_is_missing(
    publish: Publish, model: Path, tmp_path: Path
) -> None:
    store = publish()
    assert store.proxy is not None
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    given: list[Request] = []

    def script(request: Request) -> Fault | None:
        if not of_weights(request):
            return None
        given.append(request)
        return None if len(given) == 1 else Fault(status=403, body=xml("AccessDenied"))

    store.proxy.faults = script
    watched, found = load(
        Store(str(copy), "", None, store.change), tmp_path / "files", sources=(store.uri,)
    )
    assert found == reference(model)
    assert watched.load.weights.why is not None
    assert f"went on with {copy}" in watched.load.weights.why
    assert ", bytes " in watched.load.weights.why
    assert PASSWORD not in watched.load.weights.why


@network
def test_a_place_that_cannot_be_reached_hands_over(
    publish: Publish, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch, replace(LIMITS, patience_s=0.1))
    watched, found = load(publish(), tmp_path / "files", sources=("http://127.0.0.1:9/m",))
    assert found == reference(model)
    assert "http://127.0.0.1:9/m" in str(watched.load.weights.why)
