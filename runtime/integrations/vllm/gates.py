"""Gates in a vLLM model: a forward pass waits before each stage until its weights are in.

They are pre-hooks of the modules that look at a stage's weights first, and stand-ins for the
model's `forward` and `compute_logits`. Each goes away as its stage opens, so that a model whose
weights are all in is again what vLLM made: no hook, no stand-in, nothing to be called.

**Rehearsals.** While it starts, vLLM runs the model on inputs of no request's, for memory profiles
and kernels' first uses. Such a run has no metadata for attention. It must not wait, or the engine
would be up no sooner than the weights; nor may it go through layers that are not made ready. So it
is answered with zeros of the right shape.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from coldframe.loader.awake import AwakeClock
from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.memory_client.client import STALL_S
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.integrations.vllm.staged import Staged

__all__ = ["Gates"]

_LOOK_S = 0.5


class Gates:
    """The gates of one model, all shut.

    Args:
        staged: The model by stages.
        model_config: vLLM's of it.
        progress: Bytes of the weights that are in; it is asked by whoever waits.
        stall_s: How long a wait goes on in which neither a byte comes in nor a stage opens, in
            seconds. Twice that, in fact: who fills the stages gives up first, and knows why.
        recorder: Gets a span `gate[STAGE]` for the first passage through each gate: from when it
            was reached to when it let through.
    """

    def __init__(
        self,
        staged: Staged,
        model_config: Any,
        progress: Callable[[], int],
        *,
        stall_s: float = STALL_S,
        recorder: Recorder | None = None,
    ) -> None:
        self._staged = staged
        self._model = staged.model
        self._model_config = model_config
        self._progress = progress
        self._stall_s = stall_s
        self._recorder = recorder or Recorder("vllm")
        self._changed = threading.Condition()
        self._open: set[int] = set()
        self._passed: set[int] = set()
        self._error: BaseException | None = None
        self._rehearsing = False
        self._running = threading.Lock()
        self._stand_ins: list[str] = []
        self._hooks = {
            stage: [
                module.register_forward_pre_hook(self._hook(stage))
                for module in staged.doors(stage)
            ]
            for stage in range(len(staged.names))
        }
        self._stand_in("forward", self._forward)
        for name in ("compute_logits", "compute_logits_local"):
            if hasattr(self._model, name):
                self._stand_in(name, self._logits(getattr(self._model, name)))

    # -- what the filling thread says ------------------------------------------------------------

    def open(self, stage: int) -> None:
        """Lets everybody through to a stage, whose weights are in and made ready."""
        for hook in self._hooks.pop(stage):
            hook.remove()
        with self._changed:
            self._open.add(stage)
            self._changed.notify_all()

    def remove(self, then: Callable[[], None]) -> None:
        """Takes away what is left of the gates, once all are open.

        Args:
            then: Called first, while nothing of the model is running: it may move weights.
        """
        with self._running:
            then()
            for name in self._stand_ins:
                delattr(self._model, name)
            self._stand_ins.clear()
        with self._changed:
            self._changed.notify_all()

    @property
    def gone(self) -> bool:
        """Whether the model is again as vLLM has made it."""
        return self.all_open and not self._stand_ins

    def fail(self, error: BaseException) -> None:
        """Ends all waits, and those to come, with an error. What is open stays open."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def all_open(self) -> bool:
        return len(self._open) == len(self._staged.names)

    @property
    def error(self) -> BaseException | None:
        """Why no other gate will open, where that is so."""
        return self._error

    # -- waiting ---------------------------------------------------------------------------------

    def wait(self, stage: int) -> None:
        """Waits until a stage is open.

        Raises:
            ColdframeError: It will not open: its weights cannot be had, or nothing at all has come
                for too long.
        """
        if stage in self._open:
            return
        clock = AwakeClock()
        last, seen = clock(), (-1, -1)
        with self._changed:
            while stage not in self._open:
                if self._error is not None:
                    raise _raised(self._error)
                if seen != (found := (len(self._open), self._progress())):
                    seen, last = found, clock()
                waited = clock() - last
                if waited > 2 * self._stall_s:
                    raise ReplicaError(
                        "the weights that a request waits for do not come",
                        where=f"stage {self._staged.names[stage]}",
                        got=f"nothing for {waited:.0f} s",
                        hint="The engine must start again; see what it printed before.",
                    )
                self._changed.wait(min(_LOOK_S, self._stall_s / 2))

    def wait_all(self, seconds: float | None = None) -> bool:
        """Waits until all gates are open and gone; whether they are.

        Args:
            seconds: How long at most; None is for as long as anything comes.

        Raises:
            ColdframeError: It never will be.
        """
        if seconds is None:
            for stage in range(len(self._staged.names)):
                self.wait(stage)
        with self._changed:
            self._changed.wait_for(lambda: self.gone or self._error is not None, seconds)
        if self._error is not None and not self.gone:
            raise _raised(self._error)
        return self.gone

    # -- in the model ----------------------------------------------------------------------------

    def _hook(self, stage: int) -> Callable[[Any, Any], None]:
        def gate(_module: Any, _inputs: Any) -> None:
            reached = now()
            self.wait(stage)
            if stage not in self._passed:
                self._passed.add(stage)
                self._recorder.add(
                    f"gate[{self._staged.names[stage]}]",
                    reached,
                    waits_for=f"fill[{self._staged.names[stage]}]",
                )

        return gate

    def _stand_in(self, name: str, function: Callable[..., Any]) -> None:
        # In the instance's own dictionary, before the class's: gone, it has never been there.
        object.__setattr__(self._model, name, function)
        self._stand_ins.append(name)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self._rehearsing = _is_rehearsal()
        if not self._rehearsing:
            with self._running:
                return type(self._model).forward(self._model, *args, **kwargs)
        import torch

        config = self._model_config
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        shape = (positions.shape[-1], config.get_hidden_size())
        return torch.zeros(shape, dtype=config.dtype, device=positions.device)

    def _logits(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def gated(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if self._rehearsing:
                shape = (len(hidden_states), self._model_config.get_vocab_size())
                return hidden_states.new_zeros(shape)
            self.wait(len(self._staged.names) - 1)
            with self._running:
                return original(hidden_states, *args, **kwargs)

        return gated


def _is_rehearsal() -> bool:
    from vllm.forward_context import get_forward_context, is_forward_context_available

    return is_forward_context_available() and get_forward_context().attn_metadata is None


def _raised(error: BaseException) -> BaseException:
    """An error that may be raised once more: as another object, which has no other's traceback."""
    if isinstance(error, ColdframeError):
        return ColdframeError.from_wire(error.to_wire())
    return ReplicaError("the weights could not be loaded", got=repr(error))
