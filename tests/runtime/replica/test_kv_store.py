"""KV that outlives its arena, in replicas of real processes: answers are those of Transformers."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coldframe.loader.kv.options import KvStoreOptions
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.sizing import ModelFacts, kv_blocks
from tests.loader.kv.test_disk import mounted
from tests.runtime.helpers import ask, finish, prompt_of, wait_for
from tests.runtime.worker.test_prefix_reuse import (
    SHARED,
    cached,
    check,
    kill,
    options,
    settled,
    usage,
    variant,
)

pytestmark = pytest.mark.timeout(300)

Make = Callable[..., Path]


def kept(model: Path, runs: Path, store: Path, memory: int = 0, **more: object) -> ReplicaOptions:
    """A replica with a store, and with host memory for so many blocks."""
    place = KvStoreOptions(str(store), memory=memory * block_bytes(model))
    return options(model, runs, **{"kv_store": place, **more})


def block_bytes(model: Path) -> int:
    return kv_blocks(ModelFacts(str(model)).spec, None)[0]


def files(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if len(path.name) == 64 and path.is_file())


def written(replica: Replica, count: int) -> None:
    wait_for(replica, lambda: usage(replica)["kv_store_disk_stored"] >= count)


def parked(replica: Replica) -> None:
    """Puts it to rest, and waits until its memory for KV is given back."""
    settled(replica)
    replica.park()
    wait_for(replica, lambda: usage(replica)["kv_cached"] == 0)


@pytest.fixture
def model(demo_model: Make) -> Path:
    return demo_model("llama")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def test_a_prefix_survives_the_way_to_zero_and_back(
    model: Path, no_leaks: Path, store: Path
) -> None:
    with Replica(kept(model, no_leaks, store)) as replica:
        first = ask(replica, prompt_of(100), 9)
        finish(replica, first)
        check(model, prompt_of(100), first, 9)
        assert cached(first) == 0
    assert len(files(store)) == 3
    with Replica(kept(model, no_leaks, store)) as replica:
        clients = [(shared, ask(replica, variant(shared), 9)) for shared in (0, 33, 100)]
        finish(replica, *[client for _, client in clients])
        for shared, client in clients:
            check(model, variant(shared), client, 9)
            assert cached(client) == shared // 32 * 32
        told = usage(replica)
        assert told["kv_store_disk_loaded"] == 3
        assert told["kv_reused"] == 4
        settled(replica)


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("memory", [0, 100])
def test_a_prefix_survives_being_parked(
    demo_model: Make, no_leaks: Path, store: Path, family: str, memory: int
) -> None:
    model = demo_model(family)
    with Replica(kept(model, no_leaks, store, memory)) as replica:
        finish(replica, ask(replica, prompt_of(100), 9))
        for shared in SHARED:
            parked(replica)
            client = ask(replica, variant(shared), 9)
            finish(replica, client)
            check(model, variant(shared), client, 9)
            assert cached(client) == shared // 32 * 32
        told = usage(replica)
        assert (told["kv_store_memory_loaded"] > 0) == (memory > 0)
        assert (told["kv_store_disk_loaded"] > 0) == (memory == 0)


@pytest.mark.heavy
def test_a_prefix_survives_the_kill_of_everything(model: Path, no_leaks: Path, store: Path) -> None:
    with Replica(kept(model, no_leaks, store)) as replica:
        client = ask(replica, prompt_of(100), 40)
        wait_for(replica, lambda: len(client.events) > 3)
        written(replica, 3)  # behind the first token, not at the end
        for pid in replica.pids.values():
            os.kill(pid, signal.SIGKILL)
        wait_for(replica, lambda: replica.error is not None)
    with Replica(kept(model, no_leaks, store)) as replica:
        client = ask(replica, variant(100), 9)
        finish(replica, client)
        check(model, variant(100), client, 9)
        assert cached(client) == 96


@pytest.mark.heavy
def test_a_chat_goes_on_after_the_way_to_zero(model: Path, no_leaks: Path, store: Path) -> None:
    prompt = prompt_of(50)
    for turn in range(3):
        with Replica(kept(model, no_leaks, store)) as replica:
            client = ask(replica, prompt, 40)
            finish(replica, client)
            check(model, prompt, client, 40)
            known = 0 if not turn else (len(prompt) - 9 - 1) // 32 * 32
            assert cached(client) == known
            prompt = [*prompt, *client.tokens, *prompt_of(9, seed=turn)]
            settled(replica)


@pytest.mark.heavy
def test_it_is_read_while_the_weights_come(model: Path, no_leaks: Path, store: Path) -> None:
    with Replica(kept(model, no_leaks, store)) as replica:
        finish(replica, ask(replica, prompt_of(900), 2))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with Replica(kept(model, no_leaks, store, throttle=size / 60)) as replica:
        wait_for(replica, lambda: replica.board is not None and replica.board.progress.done > 0)
        ask(replica, prompt_of(900), 9)
        wait_for(replica, lambda: usage(replica)["kv_reused"] == 28)
        assert not replica.loaded


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _foreign(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def _unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)  # whoever may do all cannot open that either


@pytest.mark.heavy
def test_files_that_are_not_right_are_computed_instead(
    model: Path, no_leaks: Path, store: Path
) -> None:
    with Replica(kept(model, no_leaks, store)) as replica:
        for number, damage in enumerate((_cut, _empty, _altered, _foreign, _unreadable)):
            prompt, before = prompt_of(100, seed=number), set(files(store))
            finish(replica, ask(replica, prompt, 2))
            many = 3 * (number + 1)
            wait_for(replica, lambda many=many: len(files(store)) == many)  # type: ignore[misc]
            parked(replica)
            for path in set(files(store)) - before:
                damage(path)
            client = ask(replica, prompt, 9)
            finish(replica, client)
            check(model, prompt, client, 9)
            assert cached(client) == 0
            told = settled(replica)
            assert told["kv_store_corrupt"] + told["kv_store_unreadable"] >= number + 1
            # Each that was found out is right again, and so in the end are all.
            for _ in range(3):
                parked(replica)
                client = ask(replica, prompt, 2)
                finish(replica, client)
            assert cached(client) == 96
            wait_for(replica, lambda many=many: len(files(store)) == many)  # type: ignore[misc]
        assert told["kv_store_unreadable"] > 0
        assert told["kv_store_pauses"] == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small") as place:
        yield place


@pytest.mark.heavy
def test_a_full_disk_fails_nobody(
    model: Path, no_leaks: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Replica(kept(model, no_leaks, small_disk)) as replica:
        finish(replica, ask(replica, prompt_of(100), 2))
        written(replica, 3)
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space"):
            ballast.write_bytes(bytes(8 << 20))
        for seed in range(1, 4):
            prompt = prompt_of(200, seed=seed)
            client = ask(replica, prompt, 9)
            finish(replica, client)
            check(model, prompt, client, 9)
        wait_for(replica, lambda: usage(replica)["kv_store_paused"] == 1)
        parked(replica)  # what is written can be read, and the rest waits in host memory
        for seed, length in ((0, 100), (1, 200), (3, 200)):
            client = ask(replica, prompt_of(length, seed=seed), 9)
            finish(replica, client)
            assert cached(client) == (length - 1) // 32 * 32
        ballast.unlink()
        wait_for(replica, lambda: usage(replica)["kv_store_paused"] == 0, seconds=90)
        told = settled(replica)
        assert (told["kv_store_pauses"], told["kv_store_unwritten"]) == (1, 0)
    said = capfd.readouterr().err
    assert said.count("the KV store cannot be written: No space left") == 1
    with Replica(kept(model, no_leaks, small_disk)) as replica:
        client = ask(replica, prompt_of(200, seed=2), 9)
        finish(replica, client)
        check(model, prompt_of(200, seed=2), client, 9)
        assert cached(client) == 192


@pytest.mark.heavy
def test_two_replicas_share_a_store(model: Path, no_leaks: Path, store: Path) -> None:
    with (
        Replica(kept(model, no_leaks, store)) as one,
        Replica(kept(model, no_leaks, store)) as other,
    ):
        first = ask(one, prompt_of(100), 9)
        finish(one, first)
        written(one, 3)
        second = ask(other, variant(64), 9)
        finish(other, second)
        check(model, variant(64), second, 9)
        assert cached(second) == 64
        # Both write the same at once.
        prompt = prompt_of(300, seed=1)
        both = [(replica, ask(replica, prompt, 9)) for replica in (one, other)]
        for replica, client in both:
            finish(replica, client)
            check(model, prompt, client, 9)
        for replica, _ in both:
            assert settled(replica)["kv_store_corrupt"] == 0


@pytest.mark.heavy
def test_the_store_keeps_to_its_size(model: Path, no_leaks: Path, store: Path) -> None:
    most = 10 * (block_bytes(model) + 64)
    place = KvStoreOptions(str(store), max_bytes=most)
    with Replica(options(model, no_leaks, kv_store=place)) as replica:
        for seed in range(6):
            finish(replica, ask(replica, prompt_of(100, seed=seed), 2))
            finish(replica, ask(replica, prompt_of(100), 2))
            written(replica, 3 * (seed + 1))
        wait_for(replica, lambda: sum(path.stat().st_size for path in files(store)) <= most)
    with Replica(options(model, no_leaks, kv_store=place)) as replica:
        client = ask(replica, prompt_of(100, seed=5), 2)
        finish(replica, client)
        assert cached(client) == 96
        gone = ask(replica, prompt_of(100, seed=1), 2)
        finish(replica, gone)
        assert cached(gone) == 0


@pytest.mark.heavy
def test_little_memory_is_made_room_in_from_host_memory(
    model: Path, no_leaks: Path, store: Path
) -> None:
    more = {"kv_bytes": 12 * block_bytes(model)}
    with Replica(kept(model, no_leaks, store, 100, **more)) as replica:
        for turn in range(2):
            for seed in range(4):
                prompts = [[*prompt_of(100, seed=seed), *prompt_of(k, seed=9)] for k in (0, 40)]
                clients = [ask(replica, prompt, 9) for prompt in prompts]
                finish(replica, *clients)
                for prompt, client in zip(prompts, clients, strict=True):
                    check(model, prompt, client, 9)
                if turn:
                    assert cached(clients[0]) == 96
        told = settled(replica)
        assert told["kv_store_memory_loaded"] > 0
        large = prompt_of(12 * 32 - 8, seed=11)
        client = ask(replica, large, 9)
        finish(replica, client)
        check(model, large, client, 9)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_dies_and_rests(model: Path, no_leaks: Path, store: Path, seed: int) -> None:
    """Little memory, a few beginnings; workers die, requests go, files break, it is parked."""
    chance = random.Random(seed)
    prompts = [
        [*prompt_of(shared, seed=start), *prompt_of(end, seed=100 + end)]
        for start in range(3)
        for shared in (64, 150)
        for end in (1, 33)
    ]
    more = {"kv_bytes": 30 * block_bytes(model), "lease_s": 0.05, "prefill": 2}
    asked = []
    with Replica(kept(model, no_leaks, store, 10, **more)) as replica:
        finish(replica, ask(replica, prompt_of(3), 2))
        end, kill_at = time.monotonic() + 10, time.monotonic() + 2
        while time.monotonic() < end:
            replica.poll(0.01)
            assert replica.error is None
            waiting = [client for _, client, gone in asked if not client.done and not gone]
            if len(waiting) < 4:
                prompt = chance.choice(prompts)
                asked.append((prompt, ask(replica, prompt, 12), chance.random() < 0.1))
                if asked[-1][2]:
                    replica.poll(chance.uniform(0, 0.02))
                    replica.cancel(asked[-1][1].request)
            if chance.random() < 0.02:
                finish(replica, *waiting)
                replica.park()
                broken = files(store)
                if broken and chance.random() < 0.5:
                    path = chance.choice(broken)
                    path.write_bytes(b"broken")
            if time.monotonic() > kill_at:
                kill_at = time.monotonic() + chance.uniform(4, 6)
                kill(replica, chance.choice(["prefill", "decode"]))
        finish(replica, *[client for _, client, gone in asked if not gone])
        told = settled(replica)
        assert told["kv_store_disk_loaded"] + told["kv_store_memory_loaded"] > 0
    for prompt, client, gone in asked:
        if not gone:
            check(model, prompt, client, 12)
