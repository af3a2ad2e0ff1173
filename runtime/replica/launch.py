"""The first instants of a replica: the memory services and the workers, started bare.

Kept apart from the rest so that it can be imported and run before the rest is: the interpreter
starts of the children, and the first read of the weights, then overlap with what the front still
has to import. Nothing here waits for anything.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING

from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import SnapshotError
from coldframe.loader.process import Child, remove_run_dir, spawn_python
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel
from coldframe.runtime.integrations.vllm.environment import (
    ENGINE_ENVIRONMENT,
    NOT_FOR_VLLM,
    places_in,
)
from coldframe.runtime.machine.cores import CORES, split_cores, to_environment
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions, TransferOptions
from coldframe.runtime.replica.tiers import Tiers
from coldframe.runtime.start.early import MemoryProcess
from coldframe.runtime.start.environment import without_secrets
from coldframe.runtime.start.first_words import FirstWords
from coldframe.snapshot.cloner import CloneChild, Cloner
from coldframe.snapshot.restorer_process import RestorerProcess

if TYPE_CHECKING:
    from coldframe.runtime.graphs.shelf import Trial

__all__ = ["Launch", "Memory", "WorkerProcess"]

_WORKER = (
    "from coldframe.runtime.worker.process import main; "
    "main(3, int(sys.argv[1]), first_ns, *sys.argv[2:])"
)
_VLLM_WORKER = (
    "from coldframe.runtime.start.build import agree; agree(3); "
    "from coldframe.runtime.integrations.vllm.worker_process import main; "
    "from coldframe.loader.process import speak_up; speak_up(); "
    "main(3, int(sys.argv[1]), first_ns, *sys.argv[2:])"
)
_REMOTE = "from coldframe.runtime.transport.remote import main; main(3, int(sys.argv[1]), first_ns)"
_FIRST_BYTE_S = 0.2
_MEMORY_END_S = 5.0


class Memory:
    """A memory service as a process.

    Args:
        name: Its own among the replica's processes.
        device: Whose memory it has.
        process: The process.
    """

    def __init__(self, name: str, device: str, process: MemoryProcess) -> None:
        self.name = name
        self.device = device
        self.run_dir = process.run_dir
        self.child = process.child
        self.channel = Channel(process.socket)
        self._lock = process.lock

    @property
    def path(self) -> str:
        """Of the socket that it listens on."""
        return os.path.join(self.run_dir, "memory.sock")

    def end(self) -> None:
        """Tells it to go."""
        # It clears up after itself when its socket ends.
        self.channel.close()

    def close(self, deadline: float) -> None:
        """Sees it gone, by force from a moment of the monotonic clock on."""
        while self.child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        self.child.kill()
        remove_run_dir(self.run_dir)
        os.close(self._lock)


class WorkerProcess:
    """A worker as a process: not told yet what it is to be."""

    def __init__(
        self,
        name: str,
        role: str,
        child: Child | CloneChild,
        channel: Channel,
        cloner: Cloner | None = None,
        group: str = "",
        words: FirstWords | None = None,
        address: str = "",
    ) -> None:
        self.name = name
        self.role = role
        self.address = address
        """Of the decode worker on another host that it stands for."""
        self.group = group
        self.child = child
        self.channel = channel
        self.cloner = cloner
        """Who makes it, where it is a clone."""
        self.told = False
        """Whether it knows what it is to be."""
        self.imported = False
        self.up = False
        self.trying: Trial | None = None
        """What it replays for the first time."""
        self.last_words: str | None = None
        self.first_words = words
        """What it says before it runs code of ours, where its interpreter is not this one."""

    @property
    def restoring(self) -> bool:
        """Whether it is a clone on its way up."""
        return self.cloner is not None and not self.up

    def end(self) -> None:
        """Ends it at once; nothing that it has is lost by that."""
        self.channel.close()
        self.child.kill()
        if self.first_words is not None:
            self.first_words.end()


class Launch:
    """Starts the processes of a replica, and tells its memory services what to load.

    There is one of these for each device. The first loads; the others take from it what it has.

    Args:
        options: What the replica is to be.
        recorder: Gets a span for each start.
        memory: The first memory service's process, where it was started before.
        restorer: The process that restores images, likewise.

    Raises:
        PlatformError: A process or the run directory cannot be made.
        DeviceError: There are not cores enough for workers that have some of their own.
    """

    def __init__(
        self,
        options: ReplicaOptions,
        recorder: Recorder,
        memory: MemoryProcess | None = None,
        restorer: RestorerProcess | None = None,
    ) -> None:
        self.options = options
        self._recorder = recorder
        self._names = 0
        self._closed = False
        self.workers: list[WorkerProcess] = []
        self.later: list[str] = []
        """The roles of workers that are still to be started."""
        self._engine_tiers: Tiers | None = None
        self._cores: dict[str, tuple[int, ...]] = {}
        if options.pin:
            halves = split_cores(os.sched_getaffinity(0))
            self._cores = dict(zip(("prefill", "decode"), halves, strict=True))
        self.memories: list[Memory] = []
        """The first of them loads."""
        try:
            # The bytes first: nothing that clones need makes them come sooner.
            for device in options.devices:
                self._add_memory(device, memory or MemoryProcess(options.run_dir))
                memory = None
                if not options.hold_load:
                    self._load_into(self.memories[-1])
            self.tiers = self.open_tiers(options.snapshot, restorer)
            if options.vllm is not None and options.snapshot.mode == "require":
                _ = self.engine_tiers  # that there is no such image is to be told at the start
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the memory services, and the workers that no replica has taken over."""
        if self._closed:
            return
        self._closed = True
        for worker in self.workers:
            worker.end()
        self.workers.clear()
        if hasattr(self, "tiers"):
            self.tiers.close()
        if self._engine_tiers is not None:
            self._engine_tiers.close()
        deadline = time.monotonic() + _MEMORY_END_S
        for memory in reversed(self.memories):  # those first that take what another one has
            memory.end()
        for memory in self.memories:
            memory.close(deadline)

    @property
    def run_dir(self) -> str:
        """The replica's private directory."""
        return self.memories[0].run_dir

    def start_load(self) -> None:
        """Tells the memory services what to load."""
        for memory in self.memories:
            self._load_into(memory)

    def memory_of(self, role: str) -> Memory:
        """The memory service of a role's workers."""
        device = self.options.device_of(role)
        return next(memory for memory in self.memories if memory.device == device)

    def _add_memory(self, device: str, process: MemoryProcess) -> None:
        name = f"memory-{len(self.memories) + 1}" if self.memories else "memory"
        self._recorder.add("process_spawn", process.started_ns, process.spawned_ns, note=name)
        self.memories.append(Memory(name, device, process))

    def _load_into(self, memory: Memory) -> None:
        options, first = self.options, self.memories[0]
        if memory is not first:
            beside = {"model": options.model, "device": memory.device, "beside": first.path}
            memory.channel.send({"type": "load", **beside})
            return
        memory.channel.send(
            {
                "type": "load",
                "model": options.model,
                "sources": list(options.sources),
                "copy": options.copy,
                "verify": options.verify,
                "throttle": options.throttle,
                "layout": options.layout_to_load,
                "cache": options.cache,
                "cache_bytes": options.cache_bytes,
                "peers": list(options.peers),
                "peers_from": list(options.peers_from),
                "peer_readers": options.peer_readers,
                "serve_peers": options.serve_peers,
                "device": memory.device,
                # An empty one is none, as where a platform sets all variables that it knows.
                "peer_token": os.environ.get("COLDFRAME_PEER_TOKEN") or None,
            }
        )
        transfer = options.transfer
        if transfer != TransferOptions():
            ways = {"transports": list(transfer.transports), "keyed": transfer.keyed}
            place = {"listen": transfer.listen, "advertise": transfer.advertise}
            memory.channel.send({"type": "transfer", **place, **ways})

    def start_workers(self) -> None:
        """Starts the workers that the first token needs; the others are to follow (`later`).

        One for prefill at once. The one for decode, or a vLLM engine that alone decodes (beside
        native workers that is started later, see `bridge`), and all that the front does next, keep
        off the cores until the memory service has asked for the first byte: on a small machine they
        would only take turns with it. Where they are clones, which are there in no time, they keep
        off until prefill waits for weights or has its first token. So do further ones of each role.
        """
        vllm = self.options.vllm
        scales = {
            role: scale
            for role, scale in self.options.scales.items()
            if role != "vllm" or (vllm is not None and vllm.alone)
        }
        first = [role for role, scale in scales.items() if scale.least]
        self.later = [role for role, scale in scales.items() for _ in range(scale.least - 1)]
        try:
            for role in first:
                if role != "prefill" and not self.options.hold_load:
                    self.memories[0].channel.wait_readable(_FIRST_BYTE_S)
                if self.workers and self.tiers.best is not None and role != "vllm":
                    self.later.insert(0, role)
                else:
                    self.workers.append(self.start_worker(role))
        except BaseException:
            self.close()
            raise

    def open_tiers(
        self, snapshot: SnapshotOptions, restorer: RestorerProcess | None = None
    ) -> Tiers:
        """The ways to start workers, got ready.

        Args:
            snapshot: Which ones.
            restorer: A process that restores images and waits to be told what.
        """
        if _of_engine(snapshot) or self.options.vllm_serves_all:
            snapshot = SnapshotOptions()
        return Tiers(
            *(snapshot, self.options.model, self._directory, self.run_dir, restorer),
            user=self.options.user,
            device=self.options.device,
        )

    @property
    def engine_tiers(self) -> Tiers:
        """The ways to start a vLLM engine, got ready by who first asks for them.

        That reads an image of some hundred megabytes, for which no first token is to wait.
        """
        if self._engine_tiers is None:
            # Not for the first instants.
            from coldframe.runtime.integrations.vllm.frozen_key import asked_for

            vllm, snapshot = self.options.vllm, self.options.snapshot
            assert vllm is not None
            if snapshot.manifest is not None and not _of_engine(snapshot):
                snapshot = SnapshotOptions()
            self._engine_tiers = Tiers(
                *(snapshot, self.options.model, self._directory, self.run_dir),
                user=self.options.user,
                device=self.options.device_of("vllm"),
                engine=asked_for(dict(vllm.args), vllm.kv_bytes),
                python=vllm.python,
            )
        return self._engine_tiers

    @property
    def _directory(self) -> str | None:
        """Where the model's files are, if they are here."""
        location = parse_location(self.options.model)
        elsewhere = self.options.sources or self.options.peers or self.options.peers_from
        here = isinstance(location, Directory) and not elsewhere
        return location.path if isinstance(location, Directory) and here else None

    def start_worker(self, role: str, tiers: Tiers | None = None, group: str = "") -> WorkerProcess:
        """Starts one worker that will have the given role, in the best way that is left.

        Args:
            role: `prefill` or `decode`, or `vllm`.
            tiers: Which ways there are; by default those of the replica for such workers.
            group: It takes requests of that group alone.

        Raises:
            PlatformError: It cannot be started.
            SnapshotError: It cannot be a clone, and nothing else is wanted.
        """
        tiers = tiers or (self.engine_tiers if role == "vllm" else self.tiers)
        name = f"{role}-{self._names}"
        self._names += 1
        cloner = tiers.best
        if cloner is None and tiers.options.mode == "require":
            raise self.no_clone(role, tiers)
        ours, theirs = Channel.pair()
        started = now()
        words = None
        child: Child | CloneChild
        try:
            if cloner is not None:
                threads, environment = self.threads_of(role), self._environment(role)
                child = tiers.clone(cloner, name, (ours, theirs), threads, environment)
            elif role == "vllm":
                assert self.options.vllm is not None
                arguments = [str(started), *self._identity()]
                words = FirstWords(self.options.vllm.python)
                child = self._spawn_vllm(arguments, theirs.fileno(), words)
                self._recorder.add("process_spawn", started, note=name)
            else:
                arguments = [str(started), *self._identity()]
                child = spawn_python(_WORKER, arguments, theirs.fileno(), self._environment(role))
                self._recorder.add("process_spawn", started, note=name)
        except BaseException:
            ours.close()
            if words is not None:
                words.end()
            raise
        finally:
            theirs.close()
        return WorkerProcess(name, role, child, ours, cloner, group, words)

    def start_remote(self, address: str) -> WorkerProcess:
        """Starts a process that stands for a decode worker on another host.

        Args:
            address: `HOST:PORT` of that one.

        Raises:
            PlatformError: It cannot be started.
        """
        name = f"remote-{self._names}"
        self._names += 1
        ours, theirs = Channel.pair()
        started = now()
        try:
            # It shows the secret, and needs nothing that is installed.
            child = spawn_python(
                *(_REMOTE, [str(started)], theirs.fileno(), dict(os.environ)), site_packages=False
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._recorder.add("process_spawn", started, note=name)
        return WorkerProcess(name, "remote", child, ours, address=address)

    def _spawn_vllm(self, arguments: list[str], fd: int, words: FirstWords) -> Child:
        assert self.options.vllm is not None
        python, environment = self.options.vllm.python, self._environment("vllm")
        if python != sys.executable:
            from coldframe.runtime.start.build import BUILD, Build  # not for the first instants

            environment[BUILD] = Build.here().to_environment()
        return spawn_python(
            *(_VLLM_WORKER, arguments, fd, environment),
            executable=python,
            leads=True,
            words=words.fd,
        )

    def no_clone(self, role: str, tiers: Tiers) -> SnapshotError:
        """That a worker of a role was to be a clone, and is none."""
        engine = " --engine vllm" if role == "vllm" else ""
        return SnapshotError(
            "a worker cannot be a clone",
            where=self.options.model if role != "vllm" else f"{self.options.model} in vLLM",
            expected="an image that fits, and CRIU",
            got="; ".join(tiers.why),
            hint=f"Make an image with `coldframe snapshot create{engine}`, or take "
            "--snapshot auto.",
        )

    @property
    def threads(self) -> int:
        """Threads of a worker's kernels, where all cores are everybody's."""
        return self.options.threads or cpu_count()

    def threads_of(self, role: str) -> int:
        """Threads of a worker's kernels."""
        cores = self._cores.get("decode" if role == "vllm" else role)
        if cores is None or self.options.threads is not None:
            return self.threads
        # Its cores, and of a quota that is less than they are the same part.
        return max(1, self.threads * len(cores) // sum(map(len, self._cores.values())))

    def _identity(self) -> list[str]:
        """Whom a worker that starts fresh is told to become; a clone is told when it wakes."""
        user = self.options.user
        return [] if user is None else [json.dumps(user.to_wire())]

    def _environment(self, role: str) -> dict[str, str]:
        if role == "vllm":
            found = {**ENGINE_ENVIRONMENT, **self._environment_of_ours("decode")}
            found |= places_in(self.run_dir, found)
            return {name: value for name, value in found.items() if name not in NOT_FOR_VLLM}
        return self._environment_of_ours(role)

    def _environment_of_ours(self, role: str) -> dict[str, str]:
        threads = str(self.threads_of(role))
        return {
            **without_secrets(),
            CORES: to_environment(self._cores.get(role, ())),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # Threads that wait must sleep: spinning ones take the cores that the other workers,
            # or the stream, need (a restored worker was seen to decode ten times slower).
            "OMP_WAIT_POLICY": "PASSIVE",
            # No look for device plug-ins among all installed packages.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            # Nor kernels that are compiled at their first call, where packages for that are there.
            "TORCH_DISABLE_NATIVE_JIT": "1",
            # Torch puts cuDNN first in its order of kernels for attention unless told beforehand;
            # why that is not wanted says `engine/device.py`.
            "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        }


def _of_engine(snapshot: SnapshotOptions) -> bool:
    """Whether the one image that is to be used is of an engine that is not ours."""
    return snapshot.manifest is not None and snapshot.manifest["engine"] is not None
