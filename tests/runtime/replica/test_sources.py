"""Replicas whose weights come from elsewhere: the same tokens, or none and an error that says why.

Servers and processes are real; so is what goes wrong between them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from huggingface_hub import hf_hub_download

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import (
    ColdframeError,
    ReplicaError,
    SourceChanged,
    SourceCorrupt,
)
from coldframe.loader.memory_service.board import StageState
from coldframe.loader.sources.base import SEALED
from coldframe.runtime.cli import main
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.loader.web.hub_server import FakeHub, Repo
from tests.loader.web.moto_server import KEY, SECRET, isolate, moto, upload
from tests.loader.web.servers import Fault, FaultProxy, Request, nginx
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for

Make = Callable[..., Path]
COLDFRAME = str(Path(sys.executable).parent / "coldframe")
PROMPT, TOKENS = prompt_of(40), 12
PASSWORD, PEER_TOKEN = "hunter2secret", "correct-horse"
REPO = "org/name"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("COLDFRAME_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLDFRAME_SNAPSHOT", "off")
    isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COLDFRAME_PEER_TOKEN", PEER_TOKEN)


@pytest.fixture
def model(demo_model: Make, tmp_path: Path) -> Path:
    """A copy of the demo model that a web server can serve as `m`."""
    return Path(shutil.copytree(demo_model("llama"), tmp_path / "www" / "m"))


@pytest.fixture
def answer(demo_model: Make) -> list[int]:
    return expected(demo_model("llama"), tuple(PROMPT), TOKENS)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def options(model: object, runs: Path, **more: Any) -> ReplicaOptions:
    return ReplicaOptions(model=str(model), run_dir=str(runs), **more)


def memory_only(model: object, runs: Path, **more: Any) -> Replica:
    """A replica without workers: a memory service that loads and serves peers."""
    return Replica(options(model, runs, prefill=0, decode=0, **more))


def ask_once_known(replica: Replica, count: int = TOKENS) -> Client:
    """Asks as soon as the config has come; until then, a request is refused."""
    if not replica.known:
        with pytest.raises(ReplicaError, match="config is not there yet"):
            ask(replica, PROMPT, count)
    replica.run_until(lambda: replica.known)
    return ask(replica, PROMPT, count)


def tokens_of(replica: Replica) -> list[int]:
    client = ask_once_known(replica)
    finish(replica, client)
    assert client.error is None, client.error
    wait_for(replica, lambda: replica.loaded)
    return client.tokens


def fails(replica: Replica, kind: type[ColdframeError]) -> ColdframeError:
    """The error in which the whole replica ends, and no request gets a token."""
    try:
        client = ask_once_known(replica)
        finish(replica, client)
        assert client.events == []
        assert client.error is replica.error
    except ColdframeError:  # it came before the config
        pass
    assert type(replica.error) is kind, replica.error
    return replica.error


def of_weights(request: Request) -> bool:
    return "if-match" in request.headers and request.range is not None and request.range[0] > 0


def size_of(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def seal(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seal", str(model)]) == 0
    capsys.readouterr()


# -- from everywhere --------------------------------------------------------------------------


def on_http(model: Path, stack: ExitStack, _: pytest.MonkeyPatch) -> str:
    return f"{stack.enter_context(nginx(model.parent))}/m"


def on_s3(model: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> str:
    url = stack.enter_context(moto())
    patch.setenv("AWS_ENDPOINT_URL", url)
    client = botocore.session.get_session().create_client("s3")
    upload(client, model, "models", "some/m/", ChecksumAlgorithm="CRC64NVME")
    client.close()
    return "s3://models/some/m"


def on_hub(model: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> str:
    hub = stack.enter_context(FakeHub())
    hub.repos[REPO] = Repo()
    hub.repos[REPO].push({path.name: path.read_bytes() for path in model.iterdir()})
    patch.setenv("HF_ENDPOINT", hub.url)
    return REPO


def in_the_hubs_cache(model: Path, _: ExitStack, patch: pytest.MonkeyPatch) -> str:
    with ExitStack() as stack, patch.context() as inner:
        on_hub(model, stack, inner)
        for path in model.iterdir():
            hf_hub_download(
                REPO,
                path.name,
                endpoint=os.environ["HF_ENDPOINT"],
                cache_dir=os.environ["HF_HUB_CACHE"],
                token=False,
            )
    patch.setenv("HF_HUB_OFFLINE", "1")
    return REPO


@pytest.mark.parametrize(
    ("place", "mode", "verified"),
    [
        (on_http, "copied", "unverified: the checkpoint is not sealed"),
        (on_s3, "copied", "verified by S3's crc64nvme"),
        (on_hub, "copied", "unverified: the checkpoint is not sealed"),
        (in_the_hubs_cache, "mapped", "unverified: the checkpoint is not sealed"),
    ],
)
def test_the_tokens_are_the_same_from_everywhere(
    place: Callable[[Path, ExitStack, pytest.MonkeyPatch], str],
    mode: str,
    verified: str,
    model: Path,
    answer: list[int],
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    no_leaks: Path,
) -> None:
    uri = place(model, stack, monkeypatch)
    with Replica(options(uri, no_leaks)) as replica:
        assert tokens_of(replica) == answer
        assert replica.facts["mode"] == mode
        assert replica.facts["verified"].startswith(verified)
        name = "weight_read" if mode == "mapped" else "weight_fetch"
        assert any(span.name == name for span in replica.spans)


# -- peers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True], ids=["mapped", "copied"])
def test_from_a_peer_that_has_it(
    copy: bool, model: Path, answer: list[int], no_leaks: Path
) -> None:
    with memory_only(model, no_leaks, serve_peers="127.0.0.1:0", copy=copy) as peer:
        wait_for(peer, lambda: peer.loaded)
        with Replica(options(f"peer://{peer.facts['peers_at']}", no_leaks)) as replica:
            assert tokens_of(replica) == answer


def test_a_new_replica_is_fed_by_a_warm_one(model: Path, answer: list[int], no_leaks: Path) -> None:
    with memory_only(model, no_leaks, serve_peers="127.0.0.1:0") as warm:
        wait_for(warm, lambda: warm.loaded)
        at = warm.facts["peers_at"]
        more = {"peers": (f"127.0.0.1:{free_port()}", at), "serve_peers": "127.0.0.1:0"}
        with Replica(options(model, no_leaks, **more)) as replica:
            assert tokens_of(replica) == answer
            assert replica.facts["why"].startswith(f"from peer://{at}; ")
            assert replica.facts["mode"] == "copied"


@pytest.mark.heavy
def test_from_a_peer_of_a_peer_that_is_still_loading(
    model: Path, answer: list[int], no_leaks: Path
) -> None:
    first, second = (f"127.0.0.1:{free_port()}" for _ in range(2))
    slow = size_of(model) / 6.0
    with (
        memory_only(model, no_leaks, serve_peers=first, throttle=slow) as one,
        memory_only(f"peer://{first}", no_leaks, serve_peers=second) as two,
        Replica(options(f"peer://{second}", no_leaks)) as replica,
    ):
        client = ask_once_known(replica)
        wait_for(replica, lambda: replica.board is not None and replica.board.progress.done > 0)
        one.poll(0)
        two.poll(0)
        assert one.board is not None
        # A stage has come all the way while the first is still at it.
        wait_for(replica, lambda: _state(replica, 0) is StageState.READY)
        last = one.board.stages - 1
        assert one.board.state(last) is StageState.PENDING
        finish(replica, client)
        assert client.tokens == answer
        wait_for(one, lambda: one.loaded)
        wait_for(two, lambda: two.loaded)


def _state(replica: Replica, stage: int) -> StageState:
    assert replica.board is not None
    return replica.board.state(stage)


@pytest.mark.heavy
def test_a_dead_peer_hands_over_to_a_server(
    model: Path, answer: list[int], stack: ExitStack, no_leaks: Path
) -> None:
    base = stack.enter_context(nginx(model.parent))
    dead = f"peer://127.0.0.1:{free_port()}"
    with Replica(options(f"{base}/m", no_leaks, sources=(dead,))) as replica:
        assert tokens_of(replica) == answer
        assert dead in replica.facts["why"]


# -- the cache ----------------------------------------------------------------------------------


@pytest.mark.heavy
def test_what_came_over_a_network_is_there_without_it(
    model: Path, answer: list[int], tmp_path: Path, no_leaks: Path
) -> None:
    cache = str(tmp_path / "cache")
    with nginx(model.parent) as base, FaultProxy(base) as proxy:
        uri = f"{proxy.url}/m"
        with Replica(options(uri, no_leaks, cache=cache)) as replica:
            assert tokens_of(replica) == answer
            wait_for(replica, lambda: "kept" in replica.facts)
            assert replica.facts["kept_why_not"] is None
        proxy.log.clear()
        with memory_only(uri, no_leaks, cache=cache) as again:
            wait_for(again, lambda: again.loaded)
            assert again.facts["why"].startswith("from the cache")
        assert proxy.log
        assert not any(of_weights(request) for request in proxy.log)
    with Replica(options(uri, no_leaks, cache=cache)) as replica:
        client = ask_once_known(replica)
        finish(replica, client, seconds=25)
        assert client.tokens == answer
        wait_for(replica, lambda: replica.loaded)
        assert replica.facts["why"].startswith(f"from the cache: {uri}")
        assert replica.facts["verified"] == SEALED


# -- bytes that are wrong -------------------------------------------------------------------------


def test_a_byte_that_flips_on_the_way_is_mended(
    model: Path, answer: list[int], no_leaks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seal(model, capsys)
    flipped: list[Request] = []

    def script(request: Request) -> Fault | None:
        if flipped or not of_weights(request):
            return None
        flipped.append(request)
        return Fault(flip_at=1000)

    with nginx(model.parent) as base, FaultProxy(base, script) as proxy:
        with Replica(options(f"{proxy.url}/m", no_leaks)) as replica:
            assert tokens_of(replica) == answer
            assert replica.facts["verified"] == SEALED
        assert flipped


def test_a_byte_that_stays_wrong_gives_no_token(
    model: Path, no_leaks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seal(model, capsys)
    checkpoint = Checkpoint.open(model)
    norm = checkpoint.tensors["model.norm.weight"]
    shard = checkpoint.shards[norm.shard].name

    def script(request: Request) -> Fault | None:
        if request.range is None or not (of_weights(request) and request.path.endswith(shard)):
            return None
        first, last = request.range
        return Fault(flip_at=norm.offset - first) if first <= norm.offset <= last else None

    with nginx(model.parent) as base, FaultProxy(base, script) as proxy:
        slow = size_of(model) / 1.0
        with Replica(options(f"{proxy.url}/m", no_leaks, throttle=slow)) as replica:
            error = fails(replica, SourceCorrupt)
        assert f"{proxy.url}/m/{shard}" in str(error)
        assert "model.norm.weight" in str(error)


def test_a_byte_that_flipped_in_a_mapped_file_ends_the_replica(
    model: Path,
    in_memory: Callable[[Path], Path],
    no_leaks: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seal(model, capsys)
    checkpoint = Checkpoint.open(model)
    found = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    path = model / checkpoint.shards[found.shard].name
    content = bytearray(path.read_bytes())
    content[found.offset] ^= 1
    path.write_bytes(content)
    with Replica(options(in_memory(model), no_leaks)) as replica:
        client = ask_once_known(replica, 400)
        wait_for(replica, lambda: replica.error is not None, seconds=30)
        assert replica.facts["mode"] == "mapped"
        assert client.events
        assert type(replica.error) is SourceCorrupt
        assert "model.layers.1.mlp.up_proj.weight" in str(replica.error)
        assert str(path) in str(replica.error)
        with pytest.raises(SourceCorrupt):
            ask(replica, PROMPT, 2)


def test_an_object_that_is_replaced_while_it_is_loaded(
    model: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, no_leaks: Path
) -> None:
    uri = on_s3(model, stack, monkeypatch)
    server = os.environ["AWS_ENDPOINT_URL"]
    client = botocore.session.get_session().create_client("s3")
    path = sorted(model.glob("*.safetensors"))[0]
    seen: list[Request] = []

    def script(request: Request) -> None:
        if of_weights(request) and request.path.endswith(path.name):
            seen.append(request)
            if len(seen) == 2:
                body = bytes(reversed(path.read_bytes()))
                client.put_object(Bucket="models", Key=f"some/m/{path.name}", Body=body)

    with FaultProxy(server, script) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with Replica(options(uri, no_leaks)) as replica:
            error = fails(replica, SourceChanged)
    client.close()
    assert f"{uri}/{path.name}, bytes " in str(error)


# -- secrets ------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_no_credentials_are_in_what_is_printed(
    model: Path,
    answer: list[int],
    stack: ExitStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_leaks: Path,
) -> None:
    uri = on_s3(model, stack, monkeypatch)
    base = stack.enter_context(nginx(model.parent))
    given: list[Request] = []

    def script(request: Request) -> Fault | None:
        given.append(request)
        return Fault(status=403, body=PASSWORD.encode()) if of_weights(request) else None

    proxy = stack.enter_context(FaultProxy(base, script))
    store = stack.enter_context(FaultProxy(os.environ["AWS_ENDPOINT_URL"]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.setenv("HF_TOKEN", "hf_SECRETSECRET")
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))
    host = proxy.url.removeprefix("http://")
    web = f"http://me:{PASSWORD}@{host}/m?sig={PASSWORD}"
    ids = ",".join(map(str, PROMPT))

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [COLDFRAME, "run", *arguments, "--prompt-ids", ids, "-n", str(TOKENS)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    page, trace = tmp_path / "timeline.html", tmp_path / "timeline.trace.json"
    common = (uri, "--source", web, "--serve-peers", "127.0.0.1:0")
    told = [
        run(*common, "--json", "--ignore-eos", "--timeline", str(trace)),
        run(*common, "--timeline", str(page)),
        run(web, code=1),
        run(web, "--json", code=1),
    ]
    document = json.loads(told[0])
    assert document["token_ids"] == answer
    # Both places were asked, each with what it wants to hear.
    assert f"http://{host}/m/" in document["load_mode_reason"]
    assert f"went on with {uri}" in document["load_mode_reason"]
    assert all("authorization" in request.headers for request in [*given, *store.log])
    assert f"http://{host}/m/" in told[2]
    for text in [*told, page.read_text(), trace.read_text()]:
        for secret in (PASSWORD, KEY, SECRET, PEER_TOKEN, "hf_SECRET", "AWS4-HMAC", "Signature="):
            assert secret not in text
