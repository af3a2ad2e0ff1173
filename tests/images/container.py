"""A root file system run by runc as a platform runs a container: its limits, rights and signals.

The container has a network of its own with nothing but a loopback in it; who asks it something does
so from a thread that has entered that network.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.images.networks import within
from tests.runtime.snapshots import eventually

__all__ = ["DEFAULT", "FOR_CRIU", "Container", "Platform", "container", "layers_of"]

_END_S = 60.0
_DEFAULT = (
    *("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP"),
    *("SETGID", "SETPCAP", "SETUID", "SYS_CHROOT", "AUDIT_WRITE"),
)
_MORE = ("SYS_ADMIN", "SYS_PTRACE", "NET_ADMIN", "SYS_TIME", "CHECKPOINT_RESTORE")
DEFAULT = tuple(f"CAP_{name}" for name in _DEFAULT)
"""What root has in a container by default."""
FOR_CRIU = (*DEFAULT, *(f"CAP_{name}" for name in _MORE))
"""That, and what docs/snapshots.md asks for besides."""
_OWN_NAMESPACES = 0x7E020000  # of clone(2): mounts, cgroups, hostname, IPC, users, PIDs, network
_REFUSED = [
    *("mount", "umount2", "move_mount", "open_tree", "fsopen", "fsmount", "pivot_root"),
    *("unshare", "setns", "ptrace", "process_vm_readv", "kcmp"),
    *("bpf", "keyctl", "perf_event_open", "userfaultfd", "fanotify_init"),
]
_MASKED = [
    *("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"),
    *("/proc/sched_debug", "/proc/scsi", "/sys/firmware"),
]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


@dataclass(frozen=True, slots=True)
class Platform:
    """What a platform grants a container.

    Args:
        env: Variables that it sets.
        args: In place of the image's CMD; None leaves that.
        mounts: Folders of this machine by where they are in the container, read-only.
        writable: The same, to be written to.
        user: uid and gid; None takes the image's.
        capabilities: Those that it has.
        confined: Whether the seccomp filter refuses what Docker's refuses a container without
            CAP_SYS_ADMIN: mounts, and namespaces of its own.
        memory: Bytes.
        cpus: CPUs, of each period.
        network: A descriptor of the network that it is in; None makes one for it.
        masked: Whether parts of /proc are hidden or read-only, as in most containers: then no
            process in it may mount another one in a user namespace.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    args: Sequence[str] | None = None
    mounts: Mapping[str, Path] = field(default_factory=dict)
    writable: Mapping[str, Path] = field(default_factory=dict)
    user: tuple[int, int] | None = None
    capabilities: Sequence[str] = ()
    confined: bool = True
    memory: int = 3 << 30
    cpus: float = 1.5
    network: int | None = None
    masked: bool = True


class Container:
    """A container that runs.

    Args:
        name: Of it and its cgroup.
        process: runc, which ends as it does.
        base: Its bundle, its log and runc's state.
        pid: Its first process, as this machine numbers it.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], base: Path, pid: int) -> None:
        self.name = name
        self.process = process
        self.pid = pid
        self._base = base
        self._network: int | None = None
        with suppress(FileNotFoundError):  # a command that has ended already
            self._network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def log(self) -> str:
        """What it has written to both of its standard outputs."""
        return (self._base / "log").read_text(errors="replace")

    def inside(self, ask: Callable[[], Any]) -> Any:
        """Calls something in a thread that is in the container's network."""
        assert self._network is not None, self.log
        return within(self._network, ask)

    def get(self, port: int, path: str) -> httpx.Response:
        return self.inside(lambda: httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30))

    def post(self, port: int, path: str, body: Any) -> httpx.Response:
        url = f"http://127.0.0.1:{port}{path}"
        return self.inside(lambda: httpx.post(url, json=body, timeout=120))

    def listens(self, port: int) -> None:
        """Waits until somebody takes connections at a port."""

        def taken() -> bool:
            assert self.process.poll() is None, self.log
            with suppress(httpx.TransportError):
                return bool(self.get(port, "/healthz").status_code)
            return False

        eventually(taken, seconds=60)

    def signal(self, name: str) -> None:
        """Sends its first process a signal, as platforms do."""
        self.runc("kill", self.name, name)

    def end(self, limit: float = _END_S) -> int:
        """Its exit status, once it has ended.

        Args:
            limit: How long that may take, in seconds.
        """
        return self.process.wait(limit)

    def pids(self) -> list[int]:
        """All of its processes, as this machine numbers them."""
        return [int(word) for word in json.loads(self.runc("ps", "--format", "json", self.name))]

    def status(self, pid: int) -> dict[str, str]:
        """What /proc has of one of its processes."""
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def runc(self, *arguments: str) -> str:
        words = [*_runc(self._base), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Ends it at once, where it runs, with all that it has started."""
        words = [*_runc(self._base), "delete", "--force", self.name]
        subprocess.run(words, capture_output=True, check=False, timeout=60)
        self.process.kill()
        self.process.wait(_END_S)
        if self._network is not None:
            os.close(self._network)


@contextmanager
def container(root: Path, config: Mapping[str, Any], platform: Platform) -> Iterator[Container]:
    """Runs an image while the context lasts.

    Args:
        root: Its root file system; it stays as it is.
        config: The image's own configuration, as OCI has it.
        platform: What it is granted.
    """
    # A socket's path is short, and pytest's own folders are not.
    with tempfile.TemporaryDirectory(prefix="cf-") as place, _copied(root, Path(place)) as own:
        yield from _run(own, config, platform, Path(place))


@contextmanager
def _copied(root: Path, base: Path) -> Iterator[Path]:
    """A root file system of its own over the image's: mount points are made in it."""
    upper, work, merged = (base / name for name in ("upper", "work", "root"))
    for folder in (upper, work, merged):
        folder.mkdir()
    # One overlay over another is what no container has; there a mapped file has a mount that its
    # process does not know, and CRIU cannot tell where it is.
    lower = ":".join(map(str, layers_of(root)))
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=True)
    try:
        yield merged
    finally:
        subprocess.run(["umount", "--lazy", merged], check=True)


def layers_of(root: Path) -> list[Path]:
    """The folders that an image's root file system lies over, the uppermost first."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        if mount.split()[4] == str(root):
            options = dict(part.partition("=")[::2] for part in rest.split()[2].split(","))
            # Where they are many, buildah names them from its own folder on.
            layers = [options["upperdir"], *options["lowerdir"].split(":")]
            return [root.parents[1] / layer for layer in layers]
    raise AssertionError(f"{root} is no mount")


def _run(
    root: Path, config: Mapping[str, Any], platform: Platform, base: Path
) -> Iterator[Container]:
    name = base.name
    (base / "state").mkdir()
    (base / "bundle").mkdir()
    (base / "bundle" / "config.json").write_text(json.dumps(_spec(root, config, platform, name)))
    words = ["run", "--bundle", str(base / "bundle"), "--pid-file", str(base / "pid"), name]
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(
            [*_runc(base), *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    running = None
    try:
        pid = _started(process, base)
        running = Container(name, process, base, pid)
        yield running
    except BaseException:
        print((base / "log").read_text(errors="replace"))  # pytest shows it with the failure
        raise
    finally:
        if running is not None:
            running.close()
        else:
            process.kill()
            process.wait(_END_S)


def _runc(base: Path) -> list[str]:
    return ["runc", "--root", str(base / "state")]


def _started(process: subprocess.Popen[bytes], base: Path) -> int:
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError, ValueError):
            return int((base / "pid").read_text())
        assert process.poll() is None, (base / "log").read_text(errors="replace")
        time.sleep(0.005)
    raise AssertionError("runc does not start the container")


def _spec(root: Path, config: Mapping[str, Any], platform: Platform, name: str) -> dict[str, Any]:
    """The container as runc is told of it: config.json of the OCI runtime's specification."""
    entrypoint, command = config["Entrypoint"], config.get("Cmd") or []
    user = platform.user
    if user is None:
        uid, _, gid = config["User"].partition(":")
        user = int(uid), int(gid)
    own = dict(line.split("=", 1) for line in config["Env"])
    capabilities = list(platform.capabilities)
    return {
        "ociVersion": "1.0.2",
        "hostname": name,
        "root": {"path": str(root), "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": user[0], "gid": user[1]},
            "args": [*entrypoint, *(command if platform.args is None else platform.args)],
            "env": [f"{key}={value}" for key, value in {**own, **platform.env}.items()],
            "cwd": config.get("WorkingDir") or "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": not capabilities,
        },
        "mounts": [
            *_SYSTEM_MOUNTS,
            *_bound(platform.mounts, "ro"),
            *_bound(platform.writable, "rw"),
        ],
        "linux": {
            "namespaces": [
                *({"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")),
                {"type": "network", **_path_of(platform.network)},
            ],
            "cgroupsPath": f"/{name}",
            "resources": {
                "memory": {"limit": platform.memory},
                "cpu": {"quota": int(platform.cpus * 100_000), "period": 100_000},
                "pids": {"limit": 512},
                "devices": [{"allow": False, "access": "rwm"}],
            },
            "maskedPaths": _MASKED if platform.masked else [],
            "readonlyPaths": _READ_ONLY if platform.masked else [],
            "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
            **({"seccomp": _filter()} if platform.confined else {}),
        },
    }


def _path_of(network: int | None) -> dict[str, str]:
    return {} if network is None else {"path": f"/proc/{os.getpid()}/fd/{network}"}


_SYSTEM_MOUNTS: list[dict[str, Any]] = [
    {"destination": to, "type": kind, "source": kind, "options": options.split()}
    for to, kind, options in (
        ("/proc", "proc", "nosuid noexec nodev"),
        ("/dev", "tmpfs", "nosuid strictatime mode=755 size=64k"),
        ("/dev/pts", "devpts", "nosuid noexec newinstance ptmxmode=0666 mode=0620"),
        ("/dev/shm", "tmpfs", "nosuid noexec nodev mode=1777 size=64m"),
        ("/dev/mqueue", "mqueue", "nosuid noexec nodev"),
        ("/sys", "sysfs", "nosuid noexec nodev ro"),
        ("/sys/fs/cgroup", "cgroup", "nosuid noexec nodev relatime ro"),
        ("/tmp", "tmpfs", "nosuid nodev mode=1777 size=256m"),
    )
]


def _bound(folders: Mapping[str, Path], access: str) -> list[dict[str, Any]]:
    return [
        {"destination": to, "type": "bind", "source": str(folder), "options": ["rbind", access]}
        for to, folder in folders.items()
    ]


def _filter() -> dict[str, Any]:
    """All is allowed but what Docker's own profile refuses those without CAP_SYS_ADMIN."""
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": [
            "SCMP_ARCH_X86_64" if os.uname().machine == "x86_64" else "SCMP_ARCH_AARCH64"
        ],
        "syscalls": [
            {"names": _REFUSED, "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
            # Its flags lie in memory, where a filter cannot look; so libc takes clone.
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            *(
                {
                    "names": ["clone"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 1,
                    "args": [
                        {
                            "index": 0,
                            "value": 1 << bit,
                            "valueTwo": 1 << bit,
                            "op": "SCMP_CMP_MASKED_EQ",
                        }
                    ],
                }
                for bit in range(32)
                if _OWN_NAMESPACES >> bit & 1
            ),
        ],
    }
