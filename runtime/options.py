"""What a replica is asked to be, from the command line or the environment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from coldframe.loader.errors import DeviceError, RequestError
from coldframe.loader.kv.options import KvStoreOptions
from coldframe.loader.transport.base import DEFAULT_WAYS
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.replica.scale_spec import Scale
from coldframe.runtime.replica.vllm_spec import VllmOptions
from coldframe.snapshot.identity import Identity

__all__ = [
    "BLOCK_TOKENS",
    "ReplicaOptions",
    "ScalingOptions",
    "SnapshotOptions",
    "TransferOptions",
    "model_name",
]

BLOCK_TOKENS = 32
"""Tokens in a KV block; the same in all processes of a replica."""
_OF_A_GPU = (
    "attention_backend",
    "attention_config",
    "compilation_config",
    "cudagraph_capture_sizes",
    "enforce_eager",
    "kv_cache_dtype",
    "max_cudagraph_capture_size",
)
"""Arguments of vLLM's that are about a device's kernels."""


@dataclass(frozen=True, slots=True)
class SnapshotOptions:
    """How workers may start, other than fresh.

    Args:
        mode: `auto` takes the best way that works, `off` starts workers fresh, `require` fails
            where a worker cannot be a clone.
        store: Where images are: a directory, or s3://bucket/prefix.
        create: Whether to make an image, where there is none, once the replica is idle.
        hash: Whether an image is held against its hashes while it is read.
        key_file: The key that images are signed with; None takes unsigned ones.
        verify: Whether clones answer the image's own prompt before any other.
        max_bytes: What all images may take together; looked at when one is made.
        max_age_s: How long ago an image may have been used last, in seconds; likewise.
        manifest: An image that is not published yet, to be used and no other.
        image: The id of an image, likewise; it has to fit.
    """

    mode: str = "off"
    store: str = ""
    create: bool = False
    hash: bool = True
    key_file: str | None = None
    verify: bool = False
    max_bytes: int = 10 << 30
    max_age_s: float = 30 * 86_400.0
    manifest: dict[str, Any] | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True)
class ScalingOptions:
    """What calls for more workers, and what for fewer.

    Args:
        prefill_tokens: A prefill worker's share: prompt tokens that are not computed yet.
        decode_blocks: A decode worker's share: KV blocks of the requests that it decodes. Its
            step reads all of them, so they are what its requests wait for together.
        down_s: For how long fewer would have done before some go, in seconds.
    """

    prefill_tokens: int = 4096
    decode_blocks: int = 512
    down_s: float = 60.0


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How KV goes to other replicas, and comes from them.

    Args:
        listen: `HOST:PORT` where other hosts can take it; None gives it to this machine alone.
        advertise: What others call that host; None finds out.
        transports: The ways that may be gone, of `loader.transport.base.TRANSPORTS`.
        keyed: Whether what comes from another host is held against a keyed hash.
        ttl_s: For how long KV is kept for who has a ticket, in seconds.
    """

    listen: str | None = None
    advertise: str | None = None
    transports: tuple[str, ...] = DEFAULT_WAYS
    keyed: bool = False
    ttl_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """One model on one machine.

    Args:
        model: A checkpoint's directory, or another place that has it (`loader.sources.location`).
        sources: Places to load from before that one is tried.
        copy: Never map weight files in place.
        cache: A directory that keeps what comes over a network; None keeps nothing.
        cache_bytes: How much it may keep.
        peers: `HOST:PORT` of nodes to take the weights from before any other place, if they have
            them.
        peers_from: Where more of them are found; see `loader.peers.directory`.
        peer_readers: How many may take the weights from here at once.
        serve_peers: `HOST:PORT` where the weights are given to peers; None gives none.
        verify: Hold the weights against the checkpoint's seal, where it has one.
        realign: Lay them out anew behind the first token, where they lie badly for the kernels.
        layout: How the weights lie in memory; None takes what measures best.
        throttle: Bytes per second to load at, at most; None for as fast as it goes.
        overlap: Whether prefill starts before all weights are in. Off only to measure what that
            is worth.
        hold_load: Start the processes and load nothing until `Replica.start_load`, to measure a
            load with workers that are up.
        prefill: How many prefill workers: a number, or the bounds between which there are as many
            as there is work for.
        decode: How many decode workers, likewise; none where vLLM alone decodes.
        vllm: A vLLM engine that decodes, too; None for none.
        scaling: What calls for more of them, and what for fewer.
        pin: Give prefill one half of the cores and decode the other.
        kv_bytes: KV memory of each device; None lets the replica choose.
        kv_part: Of a GPU's memory, what it may choose at most: a half is 0.5.
        prefix_cache: Whether a request reuses the KV of earlier ones that begin with the same
            tokens. A client can tell from the time to its first token that somebody has asked so.
        local_prefill: Tokens of a prompt, behind what of it is in KV, up to which a decode worker
            computes them between its steps where the prefill workers are busy; 0 has it compute
            none.
        graphs: Whether decode steps are captured where a device can do that, and replayed.
        kv_store: Where KV is kept that leaves its memory; None keeps none.
        transfer: How KV goes to other replicas, and comes from them.
        remotes: `HOST:PORT` of each decode worker on another host.
        remotes_from: Where more of them are listed; see `loader.peers.directory`.
        lease_s: How long KV blocks are kept while no worker holds them, in seconds.
        threads: Threads of each worker's kernels; None follows the cgroup's CPU quota, and what a
            worker has of it where they are pinned.
        device: Where weights and KV are, and where workers compute of whom nothing else is said:
            `cpu` or `cuda:N`.
        device_why: Why there, where nobody has asked for it.
        fall_back: Whether the CPU stands in for that device where it cannot be used.
        checkpoint: `auto` has the workers' contexts leave a GPU while the replica is parked, where
            the driver can do that; `off` leaves them there.
        run_dir: Where the replica's private directory is made; None chooses.
        user: Whom the workers run as, without capabilities, once they have opened what they need.
            None leaves them who the front is.
        snapshot: How workers may start, other than fresh.

    Raises:
        DeviceError: Some are to be on the CPU and some on a GPU.
        RequestError: Weights are to be laid out anew under a vLLM engine.
    """

    model: str
    sources: tuple[str, ...] = ()
    copy: bool = False
    cache: str | None = None
    cache_bytes: int = 100 << 30
    peers: tuple[str, ...] = ()
    peers_from: tuple[str, ...] = ()
    peer_readers: int = 1
    serve_peers: str | None = None
    verify: bool = True
    realign: bool = False
    layout: str | None = None
    throttle: float | None = None
    overlap: bool = True
    hold_load: bool = False
    prefill: int | Scale = 1
    decode: int | Scale = 1
    vllm: VllmOptions | None = None
    scaling: ScalingOptions = ScalingOptions()
    pin: bool = False
    kv_bytes: int | None = None
    kv_part: float = 1.0
    prefix_cache: bool = True
    local_prefill: int = 64
    graphs: bool = True
    kv_store: KvStoreOptions | None = None
    transfer: TransferOptions = TransferOptions()
    remotes: tuple[str, ...] = ()
    remotes_from: tuple[str, ...] = ()
    lease_s: float = 30.0
    threads: int | None = None
    device: str = "cpu"
    device_why: str | None = None
    fall_back: bool = False
    checkpoint: str = "auto"
    run_dir: str | None = None
    user: Identity | None = None
    snapshot: SnapshotOptions = SnapshotOptions()

    def __post_init__(self) -> None:
        wanted = {"--device": self.device}
        for role in self.scales:
            flag = "--decode vllm" if role == "vllm" else f"--{role}"
            wanted[flag] = self.device_of(role)
        if len({device == CPU for device in wanted.values()}) > 1:
            raise DeviceError(
                "a replica is on GPUs or on the CPU: neither can use the other's memory",
                where=", ".join(wanted),
                expected="cpu, or GPUs alone",
                got=", ".join(wanted.values()),
                hint="Name the CPU or GPUs for all of them, or leave them out.",
            )
        if self.vllm is not None and self.realign:
            raise RequestError(
                "weights that vLLM uses where they are cannot be laid out anew",
                where="--realign",
                got="--decode with vllm",
                hint="Take --layout aligned: they lie so from the start.",
            )

    @property
    def scales(self) -> dict[str, Scale]:
        """The bounds of each role's workers; the first token needs the first of them."""
        found = {"prefill": Scale.of(self.prefill), "decode": Scale.of(self.decode)}
        if self.vllm is not None:
            found["vllm"] = Scale(1, 1, self.vllm.device)
        return found

    def on_cpu(self, why: str) -> ReplicaOptions:
        """The same without a GPU, and why."""
        bounds = {role: replace(scale, device=None) for role, scale in self.scales.items()}
        vllm = self.vllm
        if vllm is not None and self.device_of("vllm") != CPU:
            # What was said of a GPU's memory and kernels says nothing of this one's.
            args = tuple(item for item in vllm.args if item[0] not in _OF_A_GPU)
            vllm = replace(vllm, device=None, kv_bytes=None, args=args)
        return replace(
            self,
            device="cpu",
            device_why=why,
            fall_back=False,
            prefill=bounds["prefill"],
            decode=bounds["decode"],
            vllm=vllm,
        )

    def device_of(self, role: str) -> str:
        """Where a role's workers compute; of those on other hosts, where KV goes to them from."""
        return self.scales["prefill" if role == "remote" else role].device or self.device

    @property
    def layout_to_load(self) -> str | None:
        """How the weights are to lie in memory; None leaves it to the memory service.

        On a GPU vLLM computes with the weights where they are, if they lie as it wants them. On a
        CPU it packs them anew in any case.
        """
        if self.layout is None and self.vllm is not None and self.device != CPU:
            return "aligned"
        return self.layout

    @property
    def contexts_stay(self) -> str | None:
        """Why no context leaves its device, where that is clear without a try."""
        if self.device_of("prefill") == CPU:
            return "a CPU has none"
        return "--checkpoint off" if self.checkpoint == "off" else None

    @property
    def decodes_only(self) -> bool:
        """Whether there is nobody who computes prompts as such: decode workers get all requests."""
        return self.scales["prefill"].most == 0 and not self.vllm_serves_all

    @property
    def vllm_alone(self) -> bool:
        """Whether vLLM decodes, and nobody else."""
        return self.vllm is not None and self.vllm.alone

    @property
    def vllm_serves_all(self) -> bool:
        """Whether there is nobody but vLLM, so that it computes prompts, too."""
        return self.vllm_alone and self.scales["prefill"].most == 0

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that have the weights and KV: first that of prefill."""
        return tuple(dict.fromkeys(self.device_of(role) for role in self.scales))


def model_name(model: str) -> str:
    """What clients call a model that was given no name: the last part of where it is."""
    return model.rstrip("/").rpartition("/")[2] or model
