"""Prefill before all weights are in, inside vLLM: a model that is given out empty, behind gates.

A thread fills it, stage by stage in the order of use (`filling`), has each stage post-processed as
vLLM would have, and opens its gate (`gates`). Meanwhile vLLM goes on with its start, and takes
requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import CheckpointError, RequestError
from coldframe.loader.memory_client.client import STALL_S, MemoryClient
from coldframe.loader.timeline import Recorder, Span, now
from coldframe.runtime.integrations.vllm.gates import Gates
from coldframe.runtime.integrations.vllm.staged import Staged

if TYPE_CHECKING:
    from coldframe.runtime.integrations.vllm.filling import Filling

__all__ = ["GatedLoad", "gated_load", "may_gate", "refusal"]

_log = logging.getLogger("vllm.coldframe")

_LOAD = "coldframe_gated_load"
"""The attribute of a model that has its `GatedLoad`."""


def refusal(vllm_config: Any) -> str | None:
    """Why an engine of that configuration must not start before its weights are in.

    Args:
        vllm_config: vLLM's `VllmConfig`.

    Returns:
        None where it may. Whether the model can is another question: `Staged.unfit`.
    """
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    offload = getattr(vllm_config, "offload_config", None)
    uva, prefetch = getattr(offload, "uva", None), getattr(offload, "prefetch", None)
    reasons = {
        "the model is compiled, which runs it first (take enforce_eager)": (
            compilation.mode not in (None, CompilationMode.NONE)
            or compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
        ),
        "the KV cache is sized by what weights leave (set kv_cache_memory_bytes)": (
            cache.kv_cache_memory_bytes is None
        ),
        "there is speculative decoding": vllm_config.speculative_config is not None,
        "LoRA wraps layers that are loaded": vllm_config.lora_config is not None,
        "the weights are quantised": vllm_config.quant_config is not None,
        "the model makes no text": model.runner_type != "generate",
        "the model is multimodal": model.is_multimodal_model,
        "there is pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "there is data parallelism": parallel.data_parallel_size > 1,
        "experts are moved between ranks": parallel.enable_eplb or parallel.enable_expert_parallel,
        "sleep mode needs weights in a pool of its own": model.enable_sleep_mode,
        "weights are exchanged at run time": (
            getattr(vllm_config, "weight_transfer_config", None) is not None
        ),
        "weights are offloaded": bool(
            getattr(uva, "cpu_offload_gb", 0) or getattr(prefetch, "offload_group_size", 0)
        ),
    }
    return next((reason for reason, there in reasons.items() if there), None)


def may_gate(wanted: str | bool, reason: str | None) -> bool:
    """Whether to gate, after what the user wants and what there is against it.

    Args:
        wanted: `auto`, true or false, as `gated` is set.
        reason: What is against it, or None. It is logged where nobody insists.

    Raises:
        RequestError: Gates were demanded, and cannot be.
    """
    if wanted is False:
        return False
    if reason is None:
        return True
    if wanted is True:
        raise RequestError(
            "this engine cannot start before its weights are in",
            where="model_loader_extra_config: gated",
            expected="an engine for which that is safe",
            got=reason,
            hint='Change that, or set "gated" to "auto" or false.',
        )
    _log.info("Waiting for all weights before the engine starts: %s.", reason)
    return False


class GatedLoad:
    """A model that is being filled behind gates. The thread starts at once.

    Args:
        staged: The model, made and empty.
        filling: What fills it.
        client: Where its weights come in.
        model_config: vLLM's of it.
        device: Where it computes; with its number, where it is not the CPU.
        stall_s: See `Gates`.
        then: Called when it is whole, by the thread, while nothing of it is running.
    """

    def __init__(
        self,
        staged: Staged,
        filling: Filling,
        client: MemoryClient,
        model_config: Any,
        device: Any,
        *,
        stall_s: float = STALL_S,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self._staged = staged
        self._filling = filling
        self._device = device
        self._then = then
        self._recorder = Recorder("vllm")
        self._spans: list[Span] = []
        self._opened = 0
        self.gates = Gates(
            staged,
            model_config,
            lambda: client.progress[0],
            stall_s=stall_s,
            recorder=self._recorder,
        )
        self._thread = threading.Thread(target=self._run, name="gated-load", daemon=True)
        setattr(staged.model, _LOAD, self)
        # The model is being made by what is queued here; it is filled on a stream of its own.
        self._made: Any = None if device.type == "cpu" else _event_on(device)
        self._thread.start()

    @property
    def complete(self) -> bool:
        """Whether the model is whole, and the gates are gone."""
        return self.gates.gone

    @property
    def error(self) -> BaseException | None:
        """Why it never will be, where that is so."""
        return self.gates.error

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until the model is whole; see `Gates.wait_all`."""
        return self.gates.wait_all(seconds)

    def spans(self) -> tuple[Span, ...]:
        """What was done so far: `fill[STAGE]`, from when it was waited for, and `gate[STAGE]`."""
        self._spans += self._recorder.drain()
        return tuple(self._spans)

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        # Torch's default dtype is left alone: it is the whole process', and by now another thread
        # computes. Post-processing of plain weights (`Staged.unfit`) does not look at it.
        try:
            if self._device.type == "cpu":
                self._fill()
            else:
                self._fill_on_stream()
            self.gates.remove(self._then)
            _log.info("%s", self._filling.summary())
        except BaseException as error:  # noqa: BLE001 - whoever waits at a gate must hear of it
            _log.error("The weights cannot be loaded: %s", error)
            self.gates.fail(error)

    def _fill_on_stream(self) -> None:
        import torch

        torch.accelerator.set_device_index(self._device.index)
        # Beside whatever computes, and behind what makes the parameters.
        stream = torch.Stream(self._device)
        stream.wait_event(self._made)
        with stream:
            self._fill()

    def _fill(self) -> None:
        for stage in self._filling.stages:
            started = now()
            self._filling.fill(stage)
            # That need not be the stage that opens: a tensor may come with a later one than the
            # model's own names tell, as that of an embedding which is stored as the head.
            while not self.gates.all_open and not self._missing():
                self._open(started)
        if not self.gates.all_open:
            raise self._incomplete()

    def _missing(self) -> list[str]:
        """Parameters of the next stage to open that nothing has come for."""
        parameters = self._staged.parameters(self._opened)
        return [name for name in parameters if not self._filling.has(name)]

    def _open(self, started: int) -> None:
        name = self._staged.names[self._opened]
        self._filling.process(self._opened)
        if self._opened == len(self._staged.names) - 1:
            self._filling.finish()
        if self._device.type != "cpu":
            self._settle()
        self._recorder.add(f"fill[{name}]", started)
        self.gates.open(self._opened)
        self._opened += 1

    def _settle(self) -> None:
        """Waits until all that was queued for a stage is done, so that no other stream need."""
        import torch

        torch.accelerator.current_stream(self._device).synchronize()

    def _incomplete(self) -> CheckpointError:
        missing = self._missing()
        return CheckpointError(
            "the checkpoint lacks weights of the model",
            where=self._staged.names[self._opened],
            expected=", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""),
            got="no tensors for them",
        )


def gated_load(model: Any) -> GatedLoad | None:
    """The load behind whose gates a model was given out, or None where it was loaded before."""
    return getattr(model, _LOAD, None)


def _event_on(device: Any) -> Any:
    """What comes when all that is queued on a device's current stream is done."""
    import torch

    return torch.accelerator.current_stream(device).record_event()
