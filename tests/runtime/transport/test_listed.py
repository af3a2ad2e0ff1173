"""Decode workers that come and go, found by `--decode file:///PATH` and `dns://NAME:PORT`."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.transport.remotes import ROLE
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for
from tests.runtime.serving import greedy, ids_of, served
from tests.runtime.transport.test_remote import SECRET, Worker, connected, decode_worker, front

COUNT = 12
LONG = 200


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def model(demo_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLDFRAME_KV_SECRET", SECRET)
    return demo_model("llama")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    return tmp_path / "decode"


def write(path: Path, *workers: Worker) -> None:
    beside = path.with_suffix(".new")
    beside.write_text("".join(f"127.0.0.1:{worker.listens_at}\n" for worker in workers))
    beside.rename(path)


def idle(replica: Replica) -> bool:
    replica.ask_usage()
    return replica.usage.get("kv_used", 1) == 0


@contextmanager
def held(worker: Worker) -> Iterator[None]:
    """What it has begun goes on behind this, however quick the machine."""
    processes = worker._children("coldframe.runtime.worker.process")
    assert processes
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def check(model: Path, prompt: list[int], client: Client, count: int) -> None:
    assert client.error is None
    assert client.tokens == expected(model, tuple(prompt), count)


def test_a_worker_is_found_when_it_is_listed(
    model: Path, listed: Path, no_leaks: Path, stack: ExitStack
) -> None:
    replica = front(stack, model, no_leaks, remotes_from=(f"file://{listed}",))
    wait_for(replica, lambda: replica.known)
    prompt = prompt_of(40)
    client = ask(replica, prompt, COUNT)
    wait_for(replica, lambda: bool(client.events))  # and no more: nobody is there who decodes
    assert not client.done
    worker = stack.enter_context(decode_worker(model))
    write(listed, worker)
    finish(replica, client)
    check(model, prompt, client, COUNT)
    assert replica.staff["remote"] == {"starting": 0, "up": 1, "leaving": 0}
    write(listed)
    wait_for(replica, lambda: connected(replica, 0))
    wait_for(replica, lambda: "a replica went" in worker.log)
    assert sum(replica.staff["remote"].values()) == 0


def test_one_that_dies_behind_its_replica_is_known_to_be_gone(
    model: Path, listed: Path, no_leaks: Path, stack: ExitStack
) -> None:
    silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # it is connected to
    listed.write_text(f"127.0.0.1:{silent.getsockname()[1]}\n")
    replica = front(stack, model, no_leaks, remotes_from=(f"file://{listed}",))
    there, places = replica._workforce.workers, replica._workforce._remotes._places
    wait_for(replica, lambda: any(worker.role == ROLE for worker in there.values()))
    (remote,) = (worker for worker in there.values() if worker.role == ROLE)
    replica.fail(RequestError("this replica cannot go on"))
    assert replica.error is not None
    remote.child.kill()
    wait_for(replica, lambda: remote.name not in there)
    assert [place.name for place in places.values()] == [None]
    write(listed)
    wait_for(replica, lambda: not places)


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_workers_come_and_go_under_running_streams(
    model: Path, listed: Path, no_leaks: Path, stack: ExitStack
) -> None:
    first, second = (stack.enter_context(decode_worker(model)) for _ in range(2))
    write(listed, first)
    replica = front(stack, model, no_leaks, remotes_from=(f"file://{listed}",))
    wait_for(replica, lambda: connected(replica))

    def begin(*seeds: int) -> dict[int, Client]:
        return {seed: ask(replica, prompt_of(50, seed=seed), LONG) for seed in seeds}

    def end(clients: dict[int, Client]) -> None:
        finish(replica, *clients.values())
        for seed, client in clients.items():
            check(model, prompt_of(50, seed=seed), client, LONG)

    # One is added, and takes requests.
    write(listed, first, second)
    wait_for(replica, lambda: connected(replica, 2))
    with held(first):
        streams = begin(1, 2, 3, 4)
        wait_for(replica, lambda: sum(client.done for client in streams.values()) == 2)
        wait_for(replica, lambda: all(client.events for client in streams.values()))
        # One is removed: it gets no more,
        write(listed, second)
        wait_for(replica, lambda: replica.staff["remote"]["leaving"] == 1)
        end(begin(5, 6))
        assert sum(client.done for client in streams.values()) == 2
    # and ends what it has.
    end(streams)
    wait_for(replica, lambda: connected(replica))
    wait_for(replica, lambda: "a replica went" in first.log)
    # One is killed, and another is in its place at another address.
    for seed in range(7, 27):
        streams = begin(seed)
        (client,) = streams.values()
        wait_for(replica, lambda client=client: len(client.events) > 3)  # type: ignore[misc]
        with held(second):
            if not client.done:
                second.kill()
                break
        end(streams)
    third = stack.enter_context(decode_worker(model))
    write(listed, third)
    end(streams)
    wait_for(replica, lambda: connected(replica))
    wait_for(replica, lambda: sum(replica.staff["remote"].values()) == 1)  # nobody looks for it
    wait_for(replica, lambda: idle(replica))


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_the_command_finds_them_too(model: Path, listed: Path, stack: ExitStack) -> None:
    """By a file, by all addresses of a name, beside named ones and its own; each time as alone."""
    worker = stack.enter_context(decode_worker(model))
    place = f"127.0.0.1:{worker.listens_at}"
    write(listed, worker)
    text = "Once upon a time"
    answer = greedy(model, ids_of(model, text), COUNT)
    for decode in (
        f"file://{listed}",
        f"dns://{place}",
        f"native,dns://{place},file://{listed}.none,tcp://{place}",
    ):
        with served(model, "--decode", decode, COLDFRAME_KV_SECRET=SECRET) as server:
            server.ready()
            body = {"prompt": text, "max_tokens": COUNT, "ignore_eos": True}
            assert server.complete(**body) == answer
            server.get("/metrics")
            assert "coldframe_prefill_tokens_waiting" in server.metrics()
            told = f"no decode worker is found at file://{listed}.none"
            assert (told in server.log) is (".none" in decode)
