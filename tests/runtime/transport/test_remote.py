"""Decode workers on another host: `coldframe worker --listen` and a replica that names it."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.runtime.commands import worker as worker_command
from coldframe.runtime.commands.run import add_replica_arguments, replica_options
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.options import ReplicaOptions, TransferOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.scale_spec import DecodeSpec, Scale
from coldframe.runtime.transport.takeover import open_listener
from tests.runtime.helpers import ask, expected, finish, prompt_of, wait_for
from tests.runtime.serving import COLDFRAME, Server
from tests.runtime.snapshots import eventually, left_behind
from tests.support import without_settings

SECRET = "the secret of these two hosts"
COUNT = 12


@contextmanager
def decode_worker(
    model: Path,
    *flags: object,
    listen: str = "127.0.0.1",
    port: int = 0,
    under: Sequence[str] = (),
) -> Iterator[Worker]:
    """The command, on ports of its own; afterwards it has ended well and left nothing."""
    base = Path(tempfile.mkdtemp(prefix="cf-"))
    runs, log = base / "r", base / "log"
    runs.mkdir()
    mine = {"COLDFRAME_RUN_DIR": str(runs), "COLDFRAME_SNAPSHOT": "off"}
    http = 8000 if port else 0
    place = ("--host", listen, "--port", http, "--listen", f"{listen}:{port}")
    command = [*under, COLDFRAME, "worker", "--role", "decode", model, *place, *flags]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=without_settings() | mine | {"COLDFRAME_KV_SECRET": SECRET},
            stderr=stderr,
            stdout=stderr,
        )
    worker = Worker(process, runs, log)
    try:
        yield worker
        if not worker.killed:
            process.terminate()
            assert process.wait(60) == 0, worker.log
        eventually(lambda: not left_behind(runs))
        assert "Traceback" not in worker.log, worker.log
    except BaseException:
        print(worker.log, file=sys.stderr)
        raise
    finally:
        process.kill()
        process.wait(30)
        shutil.rmtree(base, ignore_errors=True)


class Worker(Server):
    killed = False

    @property
    def port(self) -> int:
        """That of HTTP."""
        if not self._port:
            self._port = self._told_of('"listening"')
        return self._port

    @property
    def listens_at(self) -> int:
        """The port where requests are passed on."""
        return self._told_of('"takes requests over"')

    def _told_of(self, what: str) -> int:
        found: list[int] = []

        def told() -> bool:
            assert self.process.poll() is None, self.log
            for line in self.log.splitlines():
                if what in line:
                    found.append(int(line.partition(" port ")[2].partition('"')[0]))
            return bool(found)

        eventually(told, seconds=60)
        return found[0]

    def kill(self) -> None:
        """All of it at once, as when a machine goes."""
        self.killed = True
        for child in psutil.Process(self.process.pid).children(recursive=True):
            child.kill()
        self.process.kill()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def model(demo_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLDFRAME_KV_SECRET", SECRET)
    return demo_model("llama")


def front(
    stack: ExitStack, model: Path, runs: Path, *remotes: str, decode: int = 0, **more: object
) -> Replica:
    """A replica whose requests are decoded elsewhere."""
    options = ReplicaOptions(
        str(model),
        run_dir=str(runs),
        decode=Scale(decode, decode),
        remotes=remotes,
        threads=1,
        transfer=TransferOptions("127.0.0.1:0", "", ("tcp",)),
        **more,  # type: ignore[arg-type]
    )
    return stack.enter_context(Replica(options))


def connected(replica: Replica, count: int = 1) -> bool:
    return replica.remotes_up == count


def test_another_host_decodes(model: Path, no_leaks: Path, stack: ExitStack) -> None:
    worker = stack.enter_context(decode_worker(model))
    replica = front(stack, model, no_leaks, f"127.0.0.1:{worker.listens_at}")
    wait_for(replica, lambda: replica.known)
    prompts = [prompt_of(length, seed=length) for length in (1, 40, 100)]
    clients = [ask(replica, prompt, COUNT) for prompt in prompts]  # before it is there
    finish(replica, *clients)
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.tokens == expected(model, tuple(prompt), COUNT)
    gone = ask(replica, prompt_of(60), 400)
    wait_for(replica, lambda: len(gone.events) > 2)
    replica.cancel(gone.request)

    def free() -> bool:
        replica.ask_usage()
        used = worker.metrics()["coldframe_kv_blocks{used}"]
        return replica.usage.get("kv_used", 1) == 0 and used == 0

    wait_for(replica, free)


@pytest.mark.heavy
def test_its_death_is_a_pause(model: Path, no_leaks: Path, stack: ExitStack) -> None:
    """What one of two had in hand goes on in the other, at the token that is due."""
    workers = [stack.enter_context(decode_worker(model)) for _ in range(2)]
    places = [f"127.0.0.1:{worker.listens_at}" for worker in workers]
    replica = front(stack, model, no_leaks, *places)
    wait_for(replica, lambda: connected(replica, 2))
    prompts = [prompt_of(50, seed=seed) for seed in (1, 2, 3, 4)]
    clients = [ask(replica, prompt, 200) for prompt in prompts]
    wait_for(replica, lambda: all(len(client.events) > 3 for client in clients))
    workers[0].kill()
    finish(replica, *clients)
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.tokens == expected(model, tuple(prompt), 200)


@pytest.mark.heavy
def test_one_that_loses_what_decodes_passes_on_what_it_has(
    model: Path, no_leaks: Path, stack: ExitStack
) -> None:
    """Its process lives, and has no answer any more: to the client that is a pause, too."""
    worker = stack.enter_context(decode_worker(model))
    replica = front(stack, model, no_leaks, f"127.0.0.1:{worker.listens_at}")
    wait_for(replica, lambda: connected(replica))
    prompts = [prompt_of(50, seed=seed) for seed in (1, 2)]
    clients = [ask(replica, prompt, 400) for prompt in prompts]
    wait_for(replica, lambda: all(len(client.events) > 3 for client in clients))
    (memory,) = worker.memory_services()
    memory.kill()
    assert not any(client.done for client in clients)
    finish(replica, *clients)
    assert "its requests cannot go on here" in worker.log
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.error is None
        assert client.tokens == expected(model, tuple(prompt), 400)


@pytest.mark.heavy
def test_one_that_is_told_to_go_ends_what_it_has(
    model: Path, no_leaks: Path, stack: ExitStack
) -> None:
    worker = stack.enter_context(decode_worker(model))
    replica = front(stack, model, no_leaks, f"127.0.0.1:{worker.listens_at}")
    wait_for(replica, lambda: connected(replica))
    client = ask(replica, prompt_of(20), 100)
    wait_for(replica, lambda: len(client.events) > 2)
    worker.process.send_signal(signal.SIGTERM)
    finish(replica, client)
    assert client.tokens == expected(model, tuple(prompt_of(20)), 100)


@pytest.mark.heavy
def test_strangers_get_nothing(model: Path, stack: ExitStack) -> None:
    worker = stack.enter_context(decode_worker(model))
    with socket.create_connection(("127.0.0.1", worker.listens_at), timeout=30) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".ljust(56))  # as long as a greeting
        assert stranger.recv(100) == b""
    worker.ready()
    assert worker.complete(max_tokens=4)


def test_what_decode_says() -> None:
    spec = DecodeSpec.parse("native,tcp://10.0.0.1:7000,tcp://[::1]:7001")
    assert spec.native == Scale()
    assert spec.remotes == ("10.0.0.1:7000", "[::1]:7001")
    assert DecodeSpec.parse("tcp://h:1") == DecodeSpec(None, remotes=("h:1",))
    assert DecodeSpec.parse("tcp://h:1").scale == Scale(0, 0)
    found = DecodeSpec.parse("1-2,dns://decode:7000,tcp://h:1, file:///run/decode")
    assert found.native == Scale(1, 2)
    assert found.remotes == ("h:1",)
    assert found.listed == ("dns://decode:7000", "file:///run/decode")
    assert DecodeSpec.parse("dns://decode:7000").scale == Scale(0, 0)
    assert DecodeSpec.parse("vllm,dns://decode:7000").listed == ("dns://decode:7000",)


@pytest.mark.parametrize(
    "text",
    [
        *("tcp://", "tcp://h", "tcp://h:x", "udp://h:1", "tcp://h:1,"),
        *("dns://", "dns://name", "dns://name:0", "dns://:1", "dns://name:99999"),
        *("file://", "file://relative", "file:///", "file:///a%00b"),
        *("etcd://x:1", "native,consul://x:1", "dns://name:1,"),
    ],
)
def test_what_says_nothing_of_who_decodes(text: str) -> None:
    with pytest.raises(RequestError) as raised:
        DecodeSpec.parse(text)
    assert raised.value.where == "--decode"


@pytest.mark.parametrize(
    ("decode", "remotes", "places", "listen"),
    [
        ("native", (), (), None),
        ("tcp://h:1", ("h:1",), (), "0.0.0.0:0"),
        ("dns://decode:1", (), ("dns://decode:1",), "0.0.0.0:0"),
        ("native,file:///run/decode", (), ("file:///run/decode",), "0.0.0.0:0"),
    ],
)
def test_who_decodes_elsewhere_can_fetch_kv(
    decode: str, remotes: tuple[str, ...], places: tuple[str, ...], listen: str | None
) -> None:
    parser = Parser()
    add_replica_arguments(parser)
    args = parser.parse(["--decode", decode])
    args.model = "m"
    options = replica_options(args)
    assert (options.remotes, options.remotes_from) == (remotes, places)
    assert options.transfer.listen == listen


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["m"], "--listen"),
        (["m", "n", "--listen", "127.0.0.1:0"], "one model"),
    ],
)
def test_a_worker_that_is_nobodys_is_refused(arguments: list[str], word: str) -> None:
    parser = Parser()
    worker_command.add_arguments(parser)
    with pytest.raises(RequestError, match=word):
        worker_command.run(parser.parse(arguments))


@pytest.mark.parametrize(
    ("address", "secret", "word"),
    [
        ("nowhere", SECRET, "no address"),
        ("127.0.0.1:0", "", "there is none"),
        ("127.0.0.1:0", "short", "no secret"),
        ("192.0.2.1:7000", SECRET, "cannot be reached at this address"),
    ],
)
def test_nobody_listens_who_could_not_tell_friend_from_stranger(
    address: str, secret: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_KV_SECRET", secret)
    with pytest.raises(ColdframeError, match=word):
        open_listener(address)
