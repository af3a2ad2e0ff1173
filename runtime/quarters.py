"""What a model is and needs of a device's memory, and whether it has that."""

from __future__ import annotations

from coldframe.loader.errors import ReplicaError
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica import Replica
from coldframe.runtime.room import Room, Tenant
from coldframe.runtime.sizing import ModelFacts, facts_at_hand, kv_blocks

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
        """Whether what it needs is known, and free."""
        return self._room is None or (self._need is not None and self._need <= self._room.free)

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
        if facts is self._model:
            return
        self._model = facts
        if facts.weights_bytes is not None and self._room is not None:
            # Not what there is at the moment: others may have it, who will make room.
            block_bytes, blocks = kv_blocks(
                facts.spec, self._options.kv_bytes, available=self._room.total
            )
            self._know(facts.weights_bytes, block_bytes * blocks)

    def take(self) -> bool:
        """Whether there is room for a replica; others are sent away for it.

        Raises:
            ColdframeError: There never will be, or the model is none.
        """
        if self._room is None:
            return True
        self.read_ahead()
        if self._need is not None:
            self._room.fit(self._need, self._options.model)
        self.waiting = not self._room.take(self._tenant, self._need)
        return not self.waiting

    def settle(self, replica: Replica) -> bool:
        """Whether a replica may stay, now that the memory which it needs may be known.

        Raises:
            DeviceError: It fits no memory of this size.
        """
        weights = replica.facts.get("weights_bytes")
        if self._room is None or self._need is not None or weights is None or not replica.known:
            return True
        need = self._know(weights, replica.kv_bytes)
        self._room.fit(need, self._options.model)
        return self._room.settle(self._tenant, need)

    def _know(self, weights: int, kv: int) -> int:
        # Host memory for KV that has left the device is of the same memory, where that is the CPU.
        store = self._options.kv_store
        self._kept = weights + (0 if store is None else store.memory)
        self._need = self._kept + kv
        self._weights = weights
        return self._need

    def park(self) -> None:
        """Gives back what is not needed while nobody asks; `take` has it again."""
        if self._room is not None:
            self._room.shrink(self._tenant, self._kept)

    def weights_left(self) -> None:
        """Its weights are where they take nothing of the device."""
        if self._room is not None:
            self._room.shrink(self._tenant, self._kept - self._weights)

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
