"""A vLLM model being filled from the arena: stage by stage, each of them loaded and post-processed.

    filling = Filling(model, vllm_config, client)
    for stage in filling.stages:       # or from several threads, as long as each stage is one's
        filling.fill(stage)            # waits for the bytes, then vLLM's own loaders take them
        filling.process(stage)         # vLLM's own post-processing of that stage's modules
    filling.finish()

`fill_all` is the same with one call of the model's `load_weights` for all stages, for models that
must see all of their weights in one go, and no post-processing.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings

from coldframe.loader.checkpoints.plan import Placement
from coldframe.loader.checkpoints.stages import EMBEDDING, is_embedding, layer_of
from coldframe.loader.errors import CheckpointError, ColdframeError
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.runtime.integrations.vllm.alias_copies import Copies, Fate, Reason, Shown
from coldframe.runtime.integrations.vllm.alias_layers import (
    is_packed,
    keep_in_place,
    owners,
    why_apart,
)
from coldframe.runtime.integrations.vllm.witness import Witness
from coldframe.runtime.worker.tensors import tensor_over

if TYPE_CHECKING:
    from vllm.config import ModelConfig

__all__ = ["Filling", "import_post_processing"]

_LATE = (
    "vllm.model_executor.layers.quantization.online.fp8",
    "vllm.model_executor.layers.quantization.online.moe_base",
)


def import_post_processing() -> None:
    """Imports what vLLM's post-processing does when it is first called.

    For those who call it in another thread than that in which the engine goes on with its start:
    two threads that import parts of one another's packages may find them half made.
    """
    for name in _LATE:
        with contextlib.suppress(ImportError):  # another vLLM has them elsewhere
            importlib.import_module(name)


class Filling:
    """One model and the arena that its weights come from.

    Args:
        model: As vLLM has made it, nothing loaded yet.
        model_config: Its.
        client: Where the weights come in.
        alias: Whether parameters may be the arena itself. Where not, `leave_arena` must be called
            when all of them are processed.
        packed: Whether linear layers on the CPU get packed copies of their weights (see
            `alias_layers`).
        device: Where the model is.
        witness: What the weights are held against as they come in, if anything; closed with that.

    Attributes:
        client: As given.
        device: As given.
        stages: All of them, in the order in which they come in.

    Raises:
        ColdframeError: The weights will not come.
    """

    def __init__(
        self,
        model: Any,
        model_config: ModelConfig,
        client: MemoryClient,
        *,
        alias: bool,
        packed: bool,
        device: torch.device,
        witness: Witness | None = None,
    ) -> None:
        self._model = model
        self._config = model_config
        self.client = client
        self.device = device
        self._alias = alias
        self._in_place = alias and device.type == "cpu"
        self._packed = packed
        self._plan, self._arena = client.wait_weights()
        self._owners = owners(model)
        self._one = threading.Lock()
        self._loaded: set[str] | None = set()
        self._by_stage: list[list[Placement]] = [[] for _ in self._plan.stages]
        for placement in self._plan.placements.values():
            self._by_stage[placement.stage].append(placement)
        parameters = {
            name: getattr(modules[0], name.rpartition(".")[2])
            for name, modules in self._owners.items()
        }
        self._free_of_arena(parameters)
        self._copies = Copies(self._plan, self._arena, parameters, self._why_apart)
        self.stages = range(len(self._plan.stages))
        self._modules = self._modules_by_stage()
        if witness is not None and witness.vouches_for(self._plan):
            witness = None
        self._witness = witness
        if witness is not None:
            witness.announce(self._plan.placements.values())

    def _free_of_arena(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Takes parameters of a model that is filled anew off memory that is not to be written."""
        within = range(self._arena.address, self._arena.address + self._arena.size)
        for parameter in parameters.values():
            if parameter.data_ptr() in within:
                parameter.data = torch.empty_like(parameter.data)

    # -- weights ---------------------------------------------------------------------------------

    def fill(self, stage: int) -> None:
        """Fills the parameters of one stage, once its weights are in.

        Raises:
            ColdframeError: They will not come.
            CheckpointError: They do not fit the model.
        """
        self.client.wait_stage(stage)
        with self._one:
            self._hear_witness(stage)
            self._load(self._stage(stage))

    def fill_all(self) -> None:
        """Fills all parameters, in the order in which the weights come in.

        Raises:
            ColdframeError: They will not come.
            CheckpointError: They do not fit the model.
        """
        with self._one:
            self._load(self._in_order())

    def _in_order(self) -> Iterator[tuple[str, torch.Tensor]]:
        for stage in self.stages:
            self.client.wait_stage(stage)
            self._hear_witness(stage)
            yield from self._stage(stage)
            # While the next stage is on its way, this one's copies are made.
            self._copies.settle()

    def _hear_witness(self, stage: int) -> None:
        if self._witness is None:
            return
        try:
            with self._copies.unwatched():
                self._witness.check(self._by_stage[stage], self._bytes)
        except BaseException:
            self._witness.close()
            raise
        if stage == self.stages[-1]:
            self._witness.close()

    def _bytes(self, offset: int, length: int) -> bytes:
        """Bytes of the arena, wherever that is."""
        at = self._arena.address + offset
        found: bytes = tensor_over(at, length, self._arena.dlpack_device).cpu().numpy().tobytes()
        return found

    def _stage(self, stage: int) -> Iterator[tuple[str, torch.Tensor]]:
        for placement in self._by_stage[stage]:
            whole = placement.whole or placement.shape
            begin = placement.begin or (0,) * len(whole)
            self._last = placement
            yield placement.name, self._copies.show(Shown(placement, whole, begin))

    def _load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        try:
            with torch.no_grad(), self._copies:
                loaded = self._model.load_weights(weights)
        except ColdframeError:
            raise
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            raise self._unfit(error) from error
        self._copies.settle()
        if loaded is None or self._loaded is None:
            self._loaded = None
        else:
            self._loaded |= loaded

    def _unfit(self, error: BaseException) -> CheckpointError:
        last = getattr(self, "_last", None)
        got = next(iter(str(error).splitlines()), "") or type(error).__name__
        shape = "" if last is None else f" (its shape is {list(last.whole or last.shape)})"
        return CheckpointError(
            "the weights do not fit the model that vLLM has made",
            where=None if last is None else f"tensor {last.name}",
            expected=f"those of {self._config.model}",
            got=f"{got}{shape}",
            hint="Give vLLM's MODEL and the source, or the memory service, one and the same model.",
        )

    def check_complete(self) -> None:
        """Makes sure that every parameter has got something.

        Raises:
            CheckpointError: Some have not.
        """
        if self._loaded is None or self._config.quantization is not None:
            return  # vLLM does not say, or makes parameters that no checkpoint has
        missing = [
            name
            for name, fate in self.fates.items()
            if fate.nbytes and not fate.loaded and name not in self._loaded
            if why_apart(self._owners[name]) is None
        ]
        if missing:
            raise CheckpointError(
                "the weights do not fit the model that vLLM has made",
                where=missing[0],
                expected=f"all parameters of {self._config.model}",
                got=f"no weights for {len(missing)} of them",
                hint="Give vLLM's MODEL and the source, or the memory service, one and the same"
                " model.",
            )

    # -- post-processing -------------------------------------------------------------------------

    def process(self, stage: int) -> None:
        """Post-processes the modules of one stage, as vLLM does after a load.

        Nothing of them may run before, and `fill` of the stage must have ended.
        """
        for module in self._modules[stage]:
            self._prepare(module)
            process_weights_after_loading(module, self._config, self.device)

    def finish(self) -> None:
        """What vLLM does with the model as a whole, once all stages are processed."""
        maybe_retie_word_embeddings(self._model, self._config)
        if hasattr(self._model, "process_weights_after_loading"):
            self._model.process_weights_after_loading()

    def process_all(self) -> None:
        """Post-processes the whole model as vLLM does it."""
        self._prepare(self._model)
        process_weights_after_loading(self._model, self._config, self.device)

    def _prepare(self, root: torch.nn.Module) -> None:
        if self._in_place:
            laid = {fate.address for fate in self.fates.values()}
            for module in root.modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, torch.Tensor) and weight.data_ptr() in laid:
                    keep_in_place(module, packed=self._packed)

    def _modules_by_stage(self) -> list[list[torch.nn.Module]]:
        """Of each stage the modules to post-process, none of them within another one."""
        found: list[list[torch.nn.Module]] = [[] for _ in self.stages]
        last, covered = self.stages[-1], set[str]()
        for name, module in self._model.named_modules():
            if any(name.startswith(f"{above}.") for above in covered):
                continue
            layer = layer_of(f"{name}.")
            if layer is not None and layer + 1 < last:
                stage = layer + 1
            elif hasattr(module, "quant_method") or is_deferred_attention_layer(module):
                stage = EMBEDDING if is_embedding(f"{name}.") else last
            else:
                continue
            covered.add(name)
            found[stage].append(module)
        return found

    def leave_arena(self, why: Reason = "the arena is not shared") -> None:
        """Copies what is left of the arena in the model, so that nobody need keep it."""
        within = range(self._arena.address, self._arena.address + self._arena.size)
        for name, modules in self._owners.items():
            for module in modules[:1]:
                parameter = getattr(module, name.rpartition(".")[2])
                if parameter is not None and parameter.data_ptr() in within:
                    parameter.data = parameter.data.clone()
        for fate in self.fates.values():
            if fate.address is not None:
                fate.address, fate.why = None, why

    # -- what has become of it -------------------------------------------------------------------

    def has(self, parameter: str) -> bool:
        """Whether a parameter has got its weights, or part of them, as far as the model says.

        Where it does not say, nothing has before all of it was filled.
        """
        fate = self.fates.get(parameter)
        told = self._loaded is not None and parameter in self._loaded
        return told or (fate is not None and fate.loaded)

    def _why_apart(self, name: str, parameter: torch.nn.Parameter) -> Reason | None:
        if not self._alias:
            # vLLM packs it in a moment: to copy it before that would be for nothing. What it leaves
            # as it is, is copied then (`leave_arena`).
            packed = self.device.type == "cpu" and is_packed(name, self._owners[name])
            if not packed:
                return "as asked"
        if hasattr(self._model, "process_weights_after_loading"):
            return f"post-processed by {type(self._model).__name__}"
        return why_apart(self._owners[name])

    @property
    def fates(self) -> dict[str, Fate]:
        """What has become of each parameter, by its name in vLLM's model."""
        return self._copies.fates

    def summary(self) -> str:
        """The fates in one line."""
        fates = [fate for fate in self.fates.values() if fate.loaded]
        aliased = [fate for fate in fates if fate.address is not None]
        text = f"{len(aliased)} of {len(fates)} parameters are the arena itself"
        text += f" ({_mb(aliased)} of {_mb(fates)} MB)"
        why = Counter(fate.why for fate in fates if fate.address is None)
        if why:
            text += "; copied: " + ", ".join(f"{n} {reason}" for reason, n in why.most_common())
        return text


def _mb(fates: Sequence[Fate]) -> str:
    return f"{sum(fate.nbytes for fate in fates) / 1e6:.1f}"
