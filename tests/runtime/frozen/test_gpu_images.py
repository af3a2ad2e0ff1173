"""Images of workers on an emulated GPU: frozen by CRIU, thawed by the memory service."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from coldframe.loader.devices.checkpoint_calls import CALLS
from coldframe.loader.errors import (
    ColdframeError,
    ContextPoisoned,
    DeviceError,
    DeviceLost,
    NoCheckpoint,
    ReplicaError,
    SnapshotError,
)
from coldframe.runtime import cli
from coldframe.runtime.frozen.creating import image_for_next_time
from coldframe.runtime.frozen.freezing import Freezing
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica import thaws
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.scale_spec import Scale
from coldframe.snapshot import reach
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.gpus import FOLDER
from coldframe.snapshot.identity import Identity
from tests.runtime.emulated import emulate, replays
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for
from tests.runtime.snapshots import eventually, left_behind
from tests.snapshot.nvidia import kernel_says
from tests.support import unavailable

Make = Callable[..., Path]
CUDA = "cuda:0"
CONTEXT = 200 << 20
"""What the context of a worker takes that was frozen; those that start fresh take less."""
SMALL = 16 << 20
DRIVERS_THREADS = 2
"""What the driver has in a worker that was frozen, and in its clones: not Python's."""
PROMPT = prompt_of(64, seed=1)
TOKENS = 12

pytestmark = pytest.mark.heavy


class GpuImage(NamedTuple):
    """An image in a store, and where its clones count what they replay."""

    model: Path
    store: Path
    graphs: Path
    manifest: dict[str, Any]

    @property
    def frozen(self) -> dict[str, Any]:
        """What `emulated.install` was called with in the process that was frozen."""
        return _frozen(self.graphs)


def _frozen(graphs: Path) -> dict[str, Any]:
    more = {"context_bytes": CONTEXT, "threads": DRIVERS_THREADS}
    return {"graphs": str(graphs), "ledger": f"{graphs}-ledger", **more}


def options(model: Path, runs: Path, **more: Any) -> ReplicaOptions:
    given = {"device": CUDA, **more}
    return ReplicaOptions(model=str(model), run_dir=str(runs), **given)


def made_on(
    base: Path, model: Path, runs: Path, patch: pytest.MonkeyPatch, **memory: Any
) -> GpuImage:
    """Makes an image with a replica that has nothing else to do."""
    graphs = base / "graphs"
    graphs.mkdir()
    ours = _frozen(graphs)
    common = {"context_bytes": SMALL, "ledger": ours["ledger"], **memory}
    emulate(patch, memory=common, worker=common, frozen=ours | memory)
    patch.setenv(FOLDER, str(kernel_says(base / "nvidia")))
    snapshot = SnapshotOptions("auto", str(base / "store"))
    with Replica(options(model, runs, prefill=0, decode=0)) as replica:
        replica.run_until(lambda: replica.sized)
        freezing = Freezing(replica, snapshot)
        freezing.follow()
    assert freezing.error is None
    assert freezing.manifest is not None
    return GpuImage(model, base / "store", graphs, freezing.manifest)


@pytest.fixture(scope="module")
def image(criu: Criu, demo_model: Make, tmp_path_factory: pytest.TempPathFactory) -> GpuImage:
    """An image for one GPU, made once."""
    base = tmp_path_factory.mktemp("gpu")
    runs = base / "runs"
    runs.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        found = made_on(base, demo_model("llama"), runs, patch)
    assert list(runs.iterdir()) == []
    return found


class Starts:
    """Replicas with an emulated GPU that may be faulty."""

    def __init__(self, image: GpuImage, runs: Path) -> None:
        self.image, self.runs = image, runs
        self.patch = pytest.MonkeyPatch()

    def emulate(self, **memory: Any) -> None:
        """Has memory services find such a GPU; that of clones is the one they were frozen with."""
        ours = {"context_bytes": SMALL, "ledger": self.image.frozen["ledger"]}
        self.patch.undo()  # there is one GPU, not one within the other
        emulate(
            self.patch,
            memory=ours | memory,
            worker=ours | {n: v for n, v in memory.items() if n in ("memory", "devices")},
            frozen=self.image.frozen,
        )

    def options(self, **more: Any) -> ReplicaOptions:
        mode = more.pop("mode", "auto")
        given = {"snapshot": SnapshotOptions(mode, str(self.image.store)), **more}
        return options(self.image.model, self.runs, **given)

    def answer(self, replica: Replica, prompt: list[int] = PROMPT) -> Client:
        client = ask(replica, prompt, TOKENS)
        finish(replica, client)
        return client

    def is_right(self, client: Client, prompt: list[int] = PROMPT) -> None:
        assert client.error is None
        assert client.tokens == expected(self.image.model, tuple(prompt), TOKENS)


@pytest.fixture
def starts(image: GpuImage, no_leaks: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starts]:
    """Replicas that have that image's store; afterwards nothing of them is left."""
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))
    monkeypatch.setenv(FOLDER, str(image.store.parent / "nvidia"))
    found = Starts(image, no_leaks)
    found.emulate()
    yield found
    found.patch.undo()
    eventually(lambda: not left_behind(no_leaks))
    assert str(no_leaks) not in Path("/proc/self/mountinfo").read_text()


def spans(replica: Replica, name: str) -> list[Any]:
    return [span for span in replica.spans if span.name == name]


# -- what goes well ------------------------------------------------------------------------------


def test_what_the_manifest_says_of_the_gpu(image: GpuImage) -> None:
    machine, gpu = image.manifest["machine"], image.manifest["gpu"]
    assert (machine["device"], machine["gpu"], machine["driver"]) == (
        "cuda",
        "Emulated GPU",
        "580.1.2",
    )
    assert gpu["context_bytes"] >= CONTEXT
    assert [name for _, name in gpu["gpus"]] == ["Emulated GPU 0"]
    assert gpu["blocks"] * gpu["block_bytes"] <= image.manifest["arena"]["kv"][1]
    assert len(gpu["graphs"]) == 8
    assert [1, 8] in gpu["graphs"]
    # Weights and KV are not in it, nor anything of the replica that made it.
    size = sum(file["size"] for file in image.manifest["files"])
    assert size < 300e6


def test_clones_decode_with_the_graphs_that_they_came_with(starts: Starts) -> None:
    before = sum(replays(starts.image.graphs).values())
    prompts = [prompt_of(length, seed=length) for length in (1, 30, 200)]
    with Replica(starts.options(mode="require")) as replica:
        clients = [ask(replica, prompt, TOKENS) for prompt in prompts]
        finish(replica, *clients)
        assert replica.facts["snapshot"]["tier"] == "image"
        assert replica.facts["snapshot"]["why"] is None
        workers = {name for name in replica.pids if not name.startswith("memory")}
        for stage in ("snapshot_restore", "hooks", "graph_restore"):
            assert {span.process for span in spans(replica, stage)} == workers
        restored = spans(replica, "cuda_restore")
        assert {str(span.note).partition(":")[0] for span in restored} == workers
        assert {span.process for span in restored} == {"memory"}
        # Nobody touches a clone that is about to change its user.
        ran = {span.process: span.end_ns for span in spans(replica, "hooks")}
        assert all(s.start_ns > ran[str(s.note).partition(":")[0]] for s in restored)
        count = len(starts.image.manifest["gpu"]["graphs"])
        assert spans(replica, "graph_restore")[0].note == f"{count} captured steps came back"
        for stage in ("graph_capture", "cuda_context", "attention_trial", "warmup", "imports"):
            assert [s for s in spans(replica, stage) if s.process in workers] == []
    for prompt, client in zip(prompts, clients, strict=True):
        starts.is_right(client, prompt)
    assert sum(replays(starts.image.graphs).values()) > before + TOKENS // 2


def test_clones_rest_and_decode_with_the_same_graphs_again(starts: Starts) -> None:
    with Replica(starts.options(mode="require")) as replica:
        starts.is_right(starts.answer(replica))
        wait_for(replica, lambda: replica.loaded)
        replica.park()
        wait_for(replica, lambda: replica.resting.left and replica.contexts.left)
        assert len(spans(replica, "cuda_checkpoint")) == 2
        before, pids = sum(replays(starts.image.graphs).values()), replica.pids
        other = prompt_of(30, seed=5)
        starts.is_right(starts.answer(replica, other), other)
        assert sum(replays(starts.image.graphs).values()) > before
        assert replica.pids == pids
        assert spans(replica, "graph_capture") == []


def test_clones_have_become_another_user_by_then(starts: Starts) -> None:
    with Replica(starts.options(user=Identity(65532, 65532, ()))) as replica:
        starts.is_right(starts.answer(replica))
        assert replica.facts["snapshot"]["tier"] == "image"
        for name, pid in replica.pids.items():
            assert psutil.Process(pid).uids().real == (0 if name == "memory" else 65532)
            if name != "memory":
                uids = {status["Uid"] for status in rights(pid)}
                assert uids == {"\t".join(["65532"] * 4)}
                assert [has(status) for status in rights(pid)] == [0] * len(rights(pid))


@pytest.mark.parametrize("user", [None, Identity(0, 0, ())])
def test_clones_that_stay_roots_have_no_way_to_more(starts: Starts, user: Identity | None) -> None:
    if os.geteuid() != 0:
        unavailable("this is about root's processes")
    with Replica(starts.options(user=user)) as replica:
        starts.is_right(starts.answer(replica))
        assert replica.facts["snapshot"]["tier"] == "image"
        for name, pid in replica.pids.items():
            if name == "memory":
                continue
            threads = rights(pid)
            # The driver's have what each would have needed to become another user's.
            kept = [has(status) for status in threads if has(status)]
            assert kept == [1 << 6 | 1 << 7] * DRIVERS_THREADS
            assert {int(status["CapBnd"], 16) for status in threads} == {0}
            assert {status["NoNewPrivs"] for status in threads} == {"1"}


def rights(pid: int) -> list[dict[str, str]]:
    """What the kernel says of each thread of a process; its first thread's first."""
    found = []
    for thread in sorted(os.listdir(f"/proc/{pid}/task"), key=int):
        lines = Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
        pairs = (line.partition(":") for line in lines)
        found.append({name: value.strip() for name, _, value in pairs})
    assert len(found) > DRIVERS_THREADS
    return found


def has(status: dict[str, str]) -> int:
    """The capabilities that a thread has, as bits."""
    return int(status["CapPrm"], 16) | int(status["CapEff"], 16) | int(status["CapInh"], 16)


def test_a_context_that_comes_late_is_waited_for(starts: Starts) -> None:
    starts.emulate(slow=("cuCheckpointProcessRestore", 0.5))
    with Replica(starts.options()) as replica:
        starts.is_right(starts.answer(replica))
        assert replica.facts["snapshot"]["tier"] == "image"
        attached = [span for span in spans(replica, "attach") if span.process == "prefill-0"]
        (restored,) = [s for s in spans(replica, "cuda_restore") if "prefill-0" in str(s.note)]
        assert attached[0].end_ns > restored.start_ns + 500_000_000


def test_the_image_is_made_behind_the_first_answer(
    starts: Starts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = SnapshotOptions("auto", str(tmp_path / "store"), create=True)
    with Replica(starts.options(snapshot=snapshot)) as replica:
        starts.is_right(starts.answer(replica))
        assert replica.facts["snapshot"]["tier"] == "fresh"
        assert replica.wants_image
        outcome = image_for_next_time(replica)
        assert set(outcome) == {"created"}, outcome
        starts.is_right(starts.answer(replica))
    with Replica(starts.options(snapshot=snapshot)) as replica:
        starts.is_right(starts.answer(replica))
        assert replica.facts["snapshot"]["image"] == outcome["created"]


def test_the_commands(starts: Starts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--snapshot-store", str(tmp_path / "store"), "--json"]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for action in ("create", "verify"):
            asked = ["snapshot", action, str(starts.image.model), "--device", CUDA, *store]
            assert cli.main(asked) == 0
        assert cli.main(["snapshot", "list", *store]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    created, verified, listed = map(json.loads, capsys.readouterr().out.splitlines())
    assert verified["images"] == [{"image": created["image"], "ok": True, "error": None}]
    (row,) = listed["images"]
    assert (row["image"], row["device"], row["fits"]) == (created["image"], "cuda", True)


def test_one_image_for_two_gpus(
    criu: Criu,
    demo_model: Make,
    no_leaks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill is where the image was made, and decode on the other one."""
    image = made_on(tmp_path, demo_model("llama"), no_leaks, monkeypatch, devices=2, alike=True)
    assert len(image.manifest["gpu"]["gpus"]) == 2
    decode = Scale(1, 1, "cuda:1")
    more = {"snapshot": SnapshotOptions("auto", str(image.store)), "decode": decode}
    with Replica(options(image.model, no_leaks, **more)) as replica:
        client = ask(replica, PROMPT, TOKENS)
        finish(replica, client)
        assert replica.facts["snapshot"]["why"] is None
        assert replica.facts["snapshot"]["tier"] == "image"
        by = {str(s.note).partition("-")[0]: s.process for s in spans(replica, "cuda_restore")}
        assert by == {"prefill": "memory", "decode": "memory-2"}
        assert spans(replica, "graph_capture") == []
    assert client.tokens == expected(image.model, tuple(PROMPT), TOKENS)


# -- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "word"),
    [
        ({"names": ["Another GPU"]}, "gpu: expected Emulated GPU, got Another GPU"),
        ({"names": ["Emulated GPU"] * 2}, "gpu: expected Emulated GPU, got 2 x Emulated GPU"),
        ({"driver": "580.1.3"}, "driver: expected 580.1.2, got 580.1.3"),
        (None, "gpu: expected Emulated GPU, got none"),
    ],
)
def test_another_gpu_or_driver(
    starts: Starts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    says: dict[str, Any] | None,
    word: str,
) -> None:
    folder = tmp_path / "nvidia"
    monkeypatch.setenv(FOLDER, str(folder if says is None else kernel_says(folder, **says)))
    with Replica(starts.options()) as replica:
        starts.is_right(starts.answer(replica))
        assert replica.facts["snapshot"]["tier"] == "fresh"
        assert word in replica.facts["snapshot"]["why"]


def test_another_number_of_gpus(starts: Starts) -> None:
    starts.emulate(devices=2)
    is_fresh(starts, "a context was frozen on another GPU", "Emulated GPU 1")


def test_more_kv_than_the_graphs_know_of(starts: Starts) -> None:
    gpu = starts.image.manifest["gpu"]
    starts.emulate(memory=8 << 30)
    more = (gpu["blocks"] + 64) * gpu["block_bytes"]
    with Replica(starts.options(kv_bytes=more)) as replica:
        starts.is_right(starts.answer(replica))
        assert replica.facts["snapshot"]["tier"] == "image"
        note = str(spans(replica, "graph_restore")[0].note)
        assert note.startswith(f"{len(gpu['graphs'])} captured steps are dropped: KV blocks: ")


# -- what goes wrong when it is restored ---------------------------------------------------------


def is_fresh(starts: Starts, *words: str) -> Replica:
    """The right tokens, of workers that started fresh; the reason names those words."""
    with Replica(starts.options()) as replica:
        starts.is_right(starts.answer(replica))
        found = replica.facts["snapshot"]
        assert (found["tier"], found["image"]) == ("fresh", None)
        for word in words:
            assert word in str(found["why"])
        # A clone that is of no use is gone, not left to wait; one that starts anew counts anew.
        assert "restarted" in replica.facts or "prefill-0" not in replica.pids
    return replica


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"missing": CALLS}, ("cuCheckpointProcess",)),
        (
            {"fail": ("cuCheckpointProcessRestore", 1, "CUDA_ERROR_NOT_SUPPORTED")},
            ("CUDA_ERROR_NOT_SUPPORTED",),
        ),
        (
            {"fail": ("cuCheckpointProcessRestore", 1, "CUDA_ERROR_OUT_OF_MEMORY")},
            ("CUDA_ERROR_OUT_OF_MEMORY",),
        ),
        (
            {"fail": ("cuCheckpointProcessUnlock", 1, "CUDA_ERROR_UNKNOWN")},
            ("CUDA_ERROR_UNKNOWN", "of no use any more"),
        ),
        ({"memory": 160 << 20}, ("no room for a context", "bytes available")),
    ],
    ids=["no API", "not supported", "out of memory", "poisoned", "no room"],
)
def test_a_context_that_does_not_come_back(
    starts: Starts, fault: dict[str, Any], words: tuple[str, ...]
) -> None:
    starts.emulate(**fault)
    is_fresh(starts, *words)


def test_a_context_that_is_not_back_in_time(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thaws, "THAW_S", 0.2)
    starts.emulate(slow=("cuCheckpointProcessRestore", 8.0))
    is_fresh(starts, "a clone's context was not back in time")


def test_a_memory_service_that_dies_while_it_restores(starts: Starts) -> None:
    starts.emulate(dies_at=("cuCheckpointProcessRestore", 1))
    replica = is_fresh(starts)
    assert "the memory service died while workers were restored" in replica.facts["restarted"]


def test_a_clone_that_is_killed_while_it_waits_for_its_context(starts: Starts) -> None:
    starts.emulate(slow=("cuCheckpointProcessRestore", 8.0))
    with Replica(starts.options()) as replica:
        client = ask(replica, PROMPT, TOKENS)

        def waiting() -> bool:
            worker = replica._workforce.workers.get("prefill-0")
            return worker is not None and worker.imported and bool(worker.child.pid)

        wait_for(replica, waiting)
        os.kill(replica.pids["prefill-0"], signal.SIGKILL)
        finish(replica, client)
        assert replica.facts["snapshot"]["tier"] == "fresh"
        starts.is_right(client)


def test_required_and_not_to_be_had(starts: Starts) -> None:
    starts.emulate(fail=("cuCheckpointProcessRestore", 1, "CUDA_ERROR_OUT_OF_MEMORY"))
    with Replica(starts.options(mode="require")) as replica:
        client = starts.answer(replica)
        assert isinstance(client.error, SnapshotError)
        assert "CUDA_ERROR_OUT_OF_MEMORY" in str(client.error.got)


# -- what goes wrong when it is made -------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind", "word"),
    [
        ({"missing": CALLS}, NoCheckpoint, "cuCheckpointProcess"),
        (
            {"fail": ("cuCheckpointProcessLock", 1, "CUDA_ERROR_NOT_SUPPORTED")},
            NoCheckpoint,
            "CUDA_ERROR_NOT_SUPPORTED",
        ),
        (
            {"fail": ("cuCheckpointProcessCheckpoint", 1, "CUDA_ERROR_INVALID_VALUE")},
            DeviceError,
            "CUDA_ERROR_INVALID_VALUE",
        ),
    ],
    ids=["no API", "not supported", "fails"],
)
def test_no_image_can_be_made(
    starts: Starts, tmp_path: Path, fault: dict[str, Any], kind: type[ColdframeError], word: str
) -> None:
    starts.emulate(**fault)
    snapshot = SnapshotOptions("auto", str(tmp_path / "store"))
    with Replica(starts.options(snapshot=snapshot)) as replica:
        starts.is_right(starts.answer(replica))
        before = replica.pids
        freezing = Freezing(replica, snapshot)
        freezing.follow()
        assert type(freezing.error) is kind
        assert word in str(freezing.error)
        assert freezing.image is None
        # Who made it serves on, with the processes that it had.
        starts.is_right(starts.answer(replica, prompt_of(40, seed=9)), prompt_of(40, seed=9))
        assert replica.pids == before
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_no_image_is_made_where_clones_would_be_out_of_reach(
    starts: Starts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "_CAP_SYS_PTRACE", 62)  # which nobody has
    snapshot = SnapshotOptions("auto", str(tmp_path / "store"))
    user = Identity(65532, 65532, ())
    with Replica(starts.options(snapshot=snapshot, user=user, prefill=0, decode=0)) as replica:
        replica.run_until(lambda: replica.sized)
        freezing = Freezing(replica, snapshot)
        freezing.follow()
        assert isinstance(freezing.error, NoCheckpoint)
        assert "may not reach workers of another user" in freezing.error.what


def test_a_replica_that_starts_anew_meanwhile(starts: Starts, tmp_path: Path) -> None:
    snapshot = SnapshotOptions("auto", str(tmp_path / "store"))
    with Replica(starts.options(snapshot=snapshot)) as replica:
        starts.is_right(starts.answer(replica))
        freezing = Freezing(replica, snapshot)
        replica.fail(DeviceLost("the GPU is gone", got="CUDA_ERROR_ECC_UNCORRECTABLE"))
        freezing.follow()
        assert isinstance(freezing.error, SnapshotError)
        assert "started anew" in str(freezing.error)
        starts.is_right(starts.answer(replica))


def test_a_driver_that_cannot_be_seen(
    starts: Starts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "nothing"))
    snapshot = SnapshotOptions("auto", str(tmp_path / "store"))
    with Replica(starts.options(snapshot=snapshot, prefill=0, decode=0)) as replica:
        replica.run_until(lambda: replica.sized)
        freezing = Freezing(replica, snapshot)
        freezing.follow()
        assert isinstance(freezing.error, SnapshotError)
        assert freezing.error.where == FOLDER


def test_a_memory_service_that_dies_while_it_checkpoints(starts: Starts, tmp_path: Path) -> None:
    starts.emulate(dies_at=("cuCheckpointProcessCheckpoint", 1))
    snapshot = SnapshotOptions("auto", str(tmp_path / "store"))
    with Replica(starts.options(snapshot=snapshot, prefill=0, decode=0)) as replica:
        replica.run_until(lambda: replica.sized)
        freezing = Freezing(replica, snapshot)
        with pytest.raises(ReplicaError, match="the memory service died"):
            freezing.follow()
        assert freezing.error is not None
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_an_image_whose_clones_do_not_come_up_is_not_published(
    starts: Starts, tmp_path: Path
) -> None:
    starts.emulate(fail=("cuCheckpointProcessRestore", 1, "CUDA_ERROR_OUT_OF_MEMORY"))
    snapshot = SnapshotOptions("auto", str(tmp_path / "store"))
    with Replica(starts.options(snapshot=snapshot, prefill=0, decode=0)) as replica:
        replica.run_until(lambda: replica.sized)
        freezing = Freezing(replica, snapshot)
        freezing.follow()
        assert isinstance(freezing.error, ContextPoisoned)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
