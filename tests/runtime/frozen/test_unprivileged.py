"""Workers that run as a user without rights: fresh, restored and forked, from start to end.

The interpreter that runs these tests may lie where that user is not let in; then a worker that
imported or opened anything after it was up would fail here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.snapshot.identity import Identity
from tests.runtime.helpers import (
    as_safetensors_saves_it,
    ask,
    expected,
    finish,
    prompt_of,
    wait_for,
)
from tests.runtime.snapshots import Made, eventually, place, resident
from tests.snapshot.tiny import gone
from tests.support import unavailable

USER = Identity(65532, 65532, ())
PROMPT = prompt_of(40)
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

Make = Callable[..., Path]
Start = Callable[..., ReplicaOptions]


@pytest.fixture(autouse=True)
def _as_root() -> None:
    if os.geteuid() != 0:
        unavailable("to become another user wants root")


@pytest.fixture
def runs() -> Iterator[str]:
    """Where run directories are; afterwards no process and no directory is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with place() as path:
        yield path
    left = {child.pid for child in psutil.Process().children(recursive=True)}
    assert left == before


@pytest.fixture(params=["fresh", "image", "template"])
def start(request: pytest.FixtureRequest, demo_model: Make, runs: str) -> Iterator[Start]:
    """The options of a replica with workers of each tier, which are that user's."""
    mode, store = "off", ""
    with ExitStack() as stack:
        if request.param == "image":
            made: Made = request.getfixturevalue("made")
            mode, store = "require", str(made.store)
        elif request.param == "template":
            mode = "require"
            stack.enter_context(resident(demo_model()))

        def options(**more: Any) -> ReplicaOptions:
            snapshot = SnapshotOptions(more.pop("mode", mode), store)
            given = {"run_dir": runs, "user": USER, "snapshot": snapshot, **more}
            return ReplicaOptions(str(demo_model()), **given)

        options.__name__ = request.param
        yield options


def rights(pid: int) -> set[tuple[str, ...]]:
    """Users, groups, capabilities and no_new_privs of all threads of a process; each once."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        lines = Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        ids = [*status["Uid"].split(), *status["Gid"].split(), status["Groups"].strip()]
        masks = {int(status[name], 16) for name in CAPABILITIES}
        found.add((*ids, *map(str, masks), status["NoNewPrivs"].strip()))
    return found


def those_of(identity: Identity) -> set[tuple[str, ...]]:
    """What is left to every thread of a process that is that user's."""
    groups = " ".join(map(str, identity.groups))
    return {(*[str(identity.uid)] * 4, *[str(identity.gid)] * 4, groups, "0", "1")}


def workers(replica: Replica) -> dict[str, int]:
    return {name: pid for name, pid in replica.pids.items() if name != "memory"}


def settle(replica: Replica) -> None:
    """Waits until both workers have answered, so that both are up."""
    finish(replica, ask(replica, prompt_of(7), 3))


# -- answers and rights ---------------------------------------------------------------------------


def test_fresh_workers_answer_without_any_right(demo_model: Make, runs: str) -> None:
    model = demo_model()
    with Replica(ReplicaOptions(str(model), run_dir=runs, user=USER)) as replica:
        client = ask(replica, PROMPT, 12)
        finish(replica, client)
        found = {name: rights(pid) for name, pid in workers(replica).items()}
    assert client.tokens == expected(model, tuple(PROMPT), 12)
    assert found == dict.fromkeys(["prefill-0", "decode-1"], those_of(USER))


@pytest.mark.heavy
def test_everything_that_can_be_asked_for_is_answered(start: Start, demo_model: Make) -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"logprobs": 3},
        {"temperature": 1.3, "seed": 7, "top_p": 0.9, "top_k": 40},
        {"temperature": 0.7, "seed": 8, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"stop": ("zz", "e")},
    ]

    def answers(user: Identity | None) -> list[tuple[list[int], str]]:
        with Replica(start(user=user)) as replica:
            clients = [ask(replica, prompt_of(40, n), 24, **what) for n, what in enumerate(asked)]
            cancelled = ask(replica, PROMPT, 200)
            wait_for(replica, lambda: len(cancelled.events) > 3)
            replica.cancel(cancelled.request)
            finish(replica, *clients)
            if user is not None:
                assert {*map(frozenset, map(rights, workers(replica).values()))} == {
                    frozenset(those_of(user))
                }
            tier = replica.facts["snapshot"]["tier"]
        assert tier == start.__name__
        return [(client.tokens, client.text) for client in clients]

    assert answers(USER) == answers(None)


@pytest.mark.heavy
@pytest.mark.parametrize("user", [Identity(0, 0, ()), Identity(0, 65532, (12,))])
def test_root_may_stay_root_without_capabilities(start: Start, user: Identity) -> None:
    with Replica(start(user=user)) as replica:
        settle(replica)
        assert [*map(rights, workers(replica).values())] == [those_of(user)] * 2


@pytest.mark.heavy
def test_without_a_user_all_is_as_it_was(demo_model: Make, runs: str) -> None:
    with Replica(ReplicaOptions(str(demo_model()), run_dir=runs)) as replica:
        settle(replica)
        (own,) = rights(os.getpid())
        assert [*map(rights, workers(replica).values())] == [{own}] * 2


# -- memory of all kinds --------------------------------------------------------------------------


@pytest.fixture
def private(demo_model: Make, in_memory: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A model that only root may read."""
    model = tmp_path / "private"
    as_safetensors_saves_it(demo_model("qwen2"), model)
    for file in model.iterdir():
        file.chmod(0o600)
    model.chmod(0o700)
    return in_memory(model)


@pytest.mark.heavy
@pytest.mark.parametrize("copy", [False, True])
def test_weights_are_moved_under_workers(private: Path, runs: str, copy: bool) -> None:
    given = ReplicaOptions(str(private), run_dir=runs, user=USER, copy=copy, realign=True)
    with Replica(given) as replica:
        client = ask(replica, PROMPT, 600)
        wait_for(replica, lambda: len(client.events) > 1)
        wait_for(replica, lambda: "laid out anew" in (replica.facts.get("why") or ""))
        assert not client.done
        finish(replica, client)
    assert client.tokens == expected(private, tuple(PROMPT), 600)


@pytest.mark.heavy
def test_a_mapped_file_is_copied_when_somebody_writes_to_it(private: Path, runs: str) -> None:
    shard = sorted(private.glob("*.safetensors"))[0]
    with Replica(ReplicaOptions(str(private), run_dir=runs, user=USER)) as replica:
        finish(replica, ask(replica, prompt_of(7), 3))
        wait_for(replica, lambda: replica.loaded and replica.facts["mode"] == "mapped")
        with subprocess.Popen([sys.executable, "-c", f"open({str(shard)!r}, 'r+b')"]) as writer:
            wait_for(replica, lambda: replica.facts["mode"] == "copied")
            wait_for(replica, lambda: writer.poll() is not None)
        client = ask(replica, PROMPT, 8)
        finish(replica, client)
    assert client.tokens == expected(private, tuple(PROMPT), 8)


# -- deaths ---------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_who_takes_a_dead_workers_place_has_no_right_either(
    start: Start, demo_model: Make, role: str
) -> None:
    with Replica(start()) as replica:
        client = ask(replica, PROMPT, 60)
        wait_for(replica, lambda: client.done or len(client.events) > 3)
        assert client.error is None
        (victim,) = [pid for name, pid in workers(replica).items() if name.startswith(role)]
        os.kill(victim, signal.SIGKILL)
        wait_for(replica, lambda: victim not in replica.pids.values())
        finish(replica, client)
        settle(replica)
        assert [*map(rights, workers(replica).values())] == [those_of(USER)] * 2
        assert replica.facts["snapshot"]["tier"] == start.__name__
    assert client.tokens == expected(demo_model(), tuple(PROMPT), 60)


FRONT = """
import json, sys
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.snapshot.identity import Identity
from tests.runtime.helpers import as_safetensors_saves_it, ask, finish
model, runs, mode, store = sys.argv[1:]
user = Identity(65532, 65532, ())
snapshot = SnapshotOptions(mode, store)
with Replica(ReplicaOptions(model, run_dir=runs, user=user, snapshot=snapshot)) as replica:
    finish(replica, ask(replica, (5, 6, 7), 3))
    print(json.dumps(replica.pids), flush=True)
    while True:
        replica.poll()
"""


@pytest.mark.heavy
def test_workers_that_hang_die_with_their_front(start: Start) -> None:
    given = start()
    arguments = [given.model, str(given.run_dir), given.snapshot.mode, given.snapshot.store]
    with subprocess.Popen(
        [sys.executable, "-c", FRONT, *arguments], stdout=subprocess.PIPE, text=True
    ) as front:
        assert front.stdout is not None
        pids: dict[str, int] = json.loads(front.stdout.readline())
        hung = [pid for name, pid in pids.items() if name != "memory"]
        for pid in hung:  # which cannot see the end of a socket any more
            assert rights(pid) == those_of(USER)
            os.kill(pid, signal.SIGSTOP)
        front.kill()
        eventually(lambda: all(gone(pid) for pid in pids.values()))


@pytest.mark.heavy
def test_forks_that_hang_die_with_their_template(demo_model: Make, runs: str) -> None:
    snapshot = SnapshotOptions("auto")
    given = ReplicaOptions(str(demo_model()), run_dir=runs, user=USER, snapshot=snapshot)
    with resident(demo_model()) as (_, said), Replica(given) as replica:
        settle(replica)
        assert replica.facts["snapshot"]["tier"] == "template"
        forks = list(workers(replica).values())
        for pid in forks:
            os.kill(pid, signal.SIGSTOP)
        os.kill(int(str(said["pid"])), signal.SIGKILL)
        eventually(lambda: all(gone(pid) for pid in forks))
        # Others take their places.
        settle(replica)
        assert replica.facts["snapshot"]["tier"] == "fresh"
        assert [*map(rights, workers(replica).values())] == [those_of(USER)] * 2


NO_ADMIN = ("setpriv", "--bounding-set", "-sys_admin")


@pytest.mark.heavy
def test_clones_of_a_front_that_may_not_mount(made: Made, runs: str) -> None:
    # The restorer takes a user namespace then, and the user has to be in it.
    if subprocess.run([*NO_ADMIN, "true"], capture_output=True, check=False).returncode != 0:
        unavailable("setpriv cannot be used here")
    arguments = [sys.executable, "-c", FRONT, str(made.model), runs, "require", str(made.store)]
    with subprocess.Popen([*NO_ADMIN, *arguments], stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        pids: dict[str, int] = json.loads(front.stdout.readline())
        clones = [pid for name, pid in pids.items() if name != "memory"]
        assert [*map(rights, clones)] == [those_of(USER)] * 2
        users = [Path(f"/proc/{pid}/ns/user").readlink() for pid in (*clones, "self")]
        assert users[2] not in users[:2]
        front.kill()
        eventually(lambda: all(gone(pid) for pid in pids.values()))


# -- where it cannot be ---------------------------------------------------------------------------

UNABLE = """
import ctypes, sys
from coldframe.loader.errors import ColdframeError
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.snapshot.identity import Identity
libc = ctypes.CDLL(None)
for capability in (6, 7):  # CAP_SETGID and CAP_SETUID, for it and what it starts
    assert libc.prctl(24, capability, 0, 0, 0) == 0
every = (1 << 41) - 1 & ~(1 << 6 | 1 << 7)
low, high = every & 0xFFFFFFFF, every >> 32
libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0))
user = Identity(65532, 65532, ())
with Replica(ReplicaOptions(sys.argv[1], run_dir=sys.argv[2], user=user)) as replica:
    while replica.error is None:
        replica.poll()
    print(type(replica.error).__name__, replica.error)
"""


@pytest.mark.heavy
def test_a_replica_that_cannot_drop_its_rights_says_so(demo_model: Make, runs: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNABLE, str(demo_model()), runs],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("PlatformError cannot become another user"), done.stderr
