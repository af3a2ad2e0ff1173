"""What a model is and needs of a device's memory, and whether it has that."""

from __future__ import annotations

import contextlib

from coldframe.loader.cgroup import memory_available
from coldframe.loader.errors import DeviceError, ReplicaError
from coldframe.loader.kv.room import KvRoom
from coldframe.runtime.endpoint.room import Room, Tenant
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.options import BLOCK_TOKENS, ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.sizing import ModelFacts, context_bytes, facts_at_hand, kv_blocks
from coldframe.runtime.replica.vllm_memory import copied_bytes, default_kv
from coldframe.runtime.scaling.allotment import Need
from coldframe.runtime.scaling.policies import Level

__all__ = ["Quarters"]


class Quarters:
    """A model's place in the memory of a device.

    Args:
        tenant: Whose it is.
        options: What the model's replica is to be.
        room: The memory, where others want some of it.
    """

    def __init__(self, tenant: Tenant, options: ReplicaOptions, room: Room | None) -> None:
        self.waiting = False
        """Whether there was no room when it was asked for last."""
        self._tenant = tenant
        self._options = options
        self._room = room
        self._model: ModelFacts | None = None
        self._need: int | None = None
        """Bytes that weights and KV take, once that is known."""
        self._kept = 0
        """Of these, what stays while it is parked."""
        self._weights = 0
        """Of that, what goes where the weights leave the device."""
        self._contexts = 0
        """Likewise, where the workers' contexts leave it, too."""

    @property
    def known(self) -> bool:
        """Whether the model's config has been read."""
        return self._model is not None

    @property
    def model(self) -> ModelFacts:
        """The model's configs and shape, as they were read last.

        Raises:
            ReplicaError: They have not been yet.
        """
        if self._model is None:
            raise ReplicaError("the model's config is not there yet")
        return self._model

    @property
    def fits(self) -> bool:
        """Whether what it needs is known, and free, and nobody else waits for some."""
        if self._room is None:
            return True
        with contextlib.suppress(DeviceError):  # which is said when it is asked
            self._reckon()
        if self._need is None or self._room.awaited(self._tenant):
            return False
        return self._need - self._room.held(self._tenant) <= self._room.free

    def needs(self, held_s: float) -> dict[Level, Need]:
        """What it takes at each level, as far as that is known.

        Args:
            held_s: Seconds for which devices would be held while it is warm.
        """
        away = self._weights + self._contexts if self._options.device != CPU else 0
        return {
            "warm": Need(self._need or 0, 0, held_s),
            "parked": Need(self._kept - away, self._weights if away else 0),
        }

    def read_ahead(self) -> None:
        """Reads the model's config before a start does, where it lies in a directory.

        Raises:
            ColdframeError: It is no model that can be served.
        """
        if self._model is None:
            facts = facts_at_hand(self._options)
            if facts is not None:
                self.learn(facts)

    def learn(self, facts: ModelFacts) -> None:
        """Takes what a start has read.

        Raises:
            DeviceError: There is no memory for its KV.
        """
        if facts is not self._model:
            self._model = facts
            if facts.weights_bytes is not None:
                self._need = None
            self._reckon()

    def _reckon(self) -> None:
        """Finds out what it needs, where that can be said before it is up."""
        model, room, wanted = self._model, self._room, self._options.kv_bytes
        if self._need is not None or model is None or model.weights_bytes is None:
            return
        if room is None or room.total is None:
            return
        if self._options.device != CPU and wanted is None:
            wanted = round(self._options.kv_part * room.total)
            if self._shares_kv:
                wanted //= 2
        if not model.spec.native:
            wanted = model.spec.kv_block_bytes(model.spec.dtype_bytes, BLOCK_TOKENS)  # see `KvSize`
        # Not what there is at the moment: others may have it, who will make room.
        block_bytes, blocks = kv_blocks(model.spec, wanted, available=room.total)
        self._know(model.weights_bytes, block_bytes * blocks)

    def take(self) -> bool:
        """Whether there is room for a replica; others are sent away for it.

        Raises:
            ColdframeError: There never will be, or the model is none.
        """
        if self._room is None:
            return True
        self.read_ahead()
        self._reckon()
        if self._need is not None:
            self._room.fit(self._need, self._options.model)
        self.waiting = not self._room.take(self._tenant, self._need)
        return not self.waiting

    def settle(self, replica: Replica) -> bool:
        """Whether a replica may stay, now that the memory which it needs may be known.

        Raises:
            DeviceError: It fits no memory of this size.
        """
        if self._room is None:
            return True
        self._measure(self._room, replica)
        if self._need is not None:
            return True
        self._reckon()
        weights, kv = replica.facts.get("weights_bytes"), replica.kv_bytes
        if self._need is None and weights is not None and kv is not None:
            self._know(weights, kv)
        if self._need is None:
            return True
        self._room.fit(self._need, self._options.model)
        return self._room.settle(self._tenant, self._need)

    @staticmethod
    def _measure(room: Room, replica: Replica) -> None:
        """Takes note of what the device has, where the replica has found out.

        Raises:
            DeviceError: It has less than is to be shared.
        """
        gpu = replica.facts.get("gpu")
        if gpu is None:
            if room.total is None and replica.options.device == CPU:
                room.learn(memory_available())  # it had to do without the GPU
            return
        room.learn(round(KvRoom().share * gpu["total"]))
        if room.total is not None and room.total > gpu["total"]:
            raise DeviceError(
                "the models are to share more memory than there is",
                where="--device-memory",
                expected=f"at most {gpu['total']:,} bytes on {replica.options.device}",
                got=f"{room.total:,}",
                hint="Ask for less; most of what the device has is the default.",
            )

    def _know(self, weights: int, kv: int) -> None:
        # Host memory for KV that has left the device is of the same memory, where that is the CPU.
        store = self._options.kv_store if self._options.device == CPU else None
        # Of several devices that with the most workers: the room is what each of them has.
        contexts = max(context_bytes(self._options, device) for device in self._options.devices)
        self._kept = weights + contexts + (0 if store is None else store.memory)
        self._kept += self._engine_bytes(kv)
        self._need = self._kept + kv
        self._weights, self._contexts = weights, contexts

    @property
    def _shares_kv(self) -> bool:
        """Whether vLLM's KV is half of what the replica chooses for KV; see `KvSize`."""
        vllm = self._options.vllm
        here = vllm is not None and self._options.device_of("vllm") == self._options.device
        return here and vllm is not None and vllm.kv_bytes is None

    def _engine_bytes(self, kv: int) -> int:
        """What a vLLM engine has of its own, which stays while the replica is parked, in bytes.

        Args:
            kv: What the replica's own KV has.
        """
        options, model, room = self._options, self._model, self._room
        if options.vllm is None or model is None or room is None:
            return 0
        device = options.device_of("vllm")
        copies = copied_bytes(model.spec, model.tensors, device)
        if options.vllm.kv_bytes is not None:
            return copies + options.vllm.kv_bytes
        if device == CPU:
            return copies + default_kv(model.spec, kv, room.total or 0)
        # On another GPU than the replica's it shares with what that has chosen there.
        return copies + (kv if self._shares_kv or options.kv_bytes is not None else 0)

    def park(self) -> None:
        """Gives back what is not needed while nobody asks; `take` has it again."""
        if self._room is not None:
            self._room.shrink(self._tenant, self._kept)

    @property
    def weights_may_leave(self) -> bool:
        """Whether a replica that is parked may give the room of its weights to others."""
        return self._room is not None and self._options.device != CPU

    def weights_left(self, *, with_contexts: bool = False) -> None:
        """Its weights are where they take nothing of the device.

        Args:
            with_contexts: So are the contexts of its workers.
        """
        if self._room is not None:
            gone = self._weights + (self._contexts if with_contexts else 0)
            self._room.shrink(self._tenant, self._kept - gone)

    def withdraw(self) -> None:
        """Wants no more than it has."""
        self.waiting = False
        if self._room is not None:
            self._room.withdraw(self._tenant)

    def leave(self) -> None:
        """Gives the room back."""
        self.waiting = False
        if self._room is not None:
            self._room.leave(self._tenant)
