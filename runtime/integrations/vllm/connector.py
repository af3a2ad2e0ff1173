"""vLLM's KV connector: the KV of prefill elsewhere comes in, and that of vLLM's own goes out.

    KVTransferConfig(
        kv_connector="ColdframeConnector",
        kv_connector_module_path="coldframe.runtime.integrations.vllm.connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"memory_service": "/path/of/memory.sock"},
    )

vLLM makes two of these, one for its scheduler and one for each worker. Here is what vLLM asks, in
its terms; `kv_schedule` and `kv_worker` answer.

Keys of `kv_connector_extra_config`, besides those of `attached.attach`: `load`, `layered` (the step
of a request begins, and each layer waits for its KV) or `async` (the KV comes beside steps, and the
request is scheduled when it is all there).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.request import RequestStatus

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import ArenaError, ColdframeError, RequestError
from coldframe.loader.memory_client.client import KvArena
from coldframe.runtime.integrations.vllm.attached import attach_late
from coldframe.runtime.integrations.vllm.fingerprint import Fingerprint, of_engine
from coldframe.runtime.integrations.vllm.kv_copier import Layer
from coldframe.runtime.integrations.vllm.kv_pages import KvPages
from coldframe.runtime.integrations.vllm.kv_schedule import KvSchedule
from coldframe.runtime.integrations.vllm.kv_step import Report, Step
from coldframe.runtime.integrations.vllm.kv_tally import KvTally
from coldframe.runtime.integrations.vllm.kv_worker import KvWorker, rank_heads

__all__ = ["ColdframeConnector", "connectors"]

_log = logging.getLogger(__name__)

LOADS = ("layered", "async")
_WHOLE = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)


@dataclass
class StepPlan(KVConnectorMetadata):
    """A `Step` on its way to the workers."""

    step: Step = field(default_factory=Step)


@dataclass
class RankReport(KVConnectorWorkerMetadata):
    """A `Report` on its way to the scheduler."""

    report: Report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, RankReport)
        self.report.add(other.report)
        return self


class ColdframeConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module.

    Attributes:
        tally: What this side has done.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        extra = dict(transfer.kv_connector_extra_config)
        layered = _layered(extra, vllm_config.device_config.device_type)
        self.tally = KvTally()
        self._client = attach_late(extra, device=_device_of(vllm_config))
        self._fingerprint: Fingerprint | None = None
        self._worker: KvWorker | None = None
        self._schedule: KvSchedule | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._schedule = KvSchedule(
                self._client,
                self.tally,
                lambda: self.fingerprint,
                unfit=_unfit(vllm_config, kv_cache_config),
                ranks=vllm_config.parallel_config.world_size,
                layered=layered,
                recompute=transfer.kv_load_failure_policy == "recompute",
                block_tokens=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
                if kv_cache_config.kv_cache_groups
                else 1,
            )

    @property
    def fingerprint(self) -> Fingerprint:
        """Of this engine, for who is to send KV to it.

        Raises:
            ReplicaError: The memory service is gone.
        """
        if self._fingerprint is None:
            plan, _ = self._client().wait_weights()
            model = _model_of(self._vllm_config, plan.fingerprint)
            layers = get_layers_from_vllm_config(self._vllm_config, Attention)
            names = {layer.get_attn_backend().get_name() for layer in layers.values()}
            self._fingerprint = of_engine(self._vllm_config, model, "+".join(sorted(names)))
        return self._fingerprint

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return _layered(extra_config, "cuda")

    def shutdown(self) -> None:
        for side in (self._schedule, self._worker):
            if side is not None:
                side.close()

    # -- in the worker ---------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Takes the caches: how they are written, and which heads they hold."""
        attention = get_layers_from_vllm_config(self._vllm_config, Attention)
        layers = [
            Layer(name, extract_layer_index(name), cache, _writer(attention[name]))
            for name, cache in kv_caches.items()
            if name in attention
        ]
        if not layers:
            return
        layers.sort(key=lambda layer: layer.index)
        parallel, groups = self._vllm_config.parallel_config, self._kv_cache_config
        model = self._vllm_config.model_config
        ranks = parallel.tensor_parallel_size
        heads = rank_heads(model.get_total_num_kv_heads(), ranks, _tp_rank(ranks))
        spec = groups.kv_cache_groups[0].kv_cache_spec
        kernel_tokens = groups.num_blocks * spec.block_size // layers[0].cache.shape[0]
        self._worker = KvWorker(
            self._pages,
            layers,
            heads,
            model.get_head_size(),
            model.dtype,
            kernel_tokens,
            self.tally,
        )

    def _pages(self) -> KvPages:
        kv: KvArena | None = self._client().kv
        if kv is None:
            raise ArenaError("the memory service has no KV arena")
        return KvPages(kv, self.fingerprint)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start(self._planned())

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kw: Any) -> None:
        """Nothing yet: a step's KV is copied at its end, in one go."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.end_step(self._planned())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        done, failed = self._worker.finished(self._planned())
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self.get_transfer_results(finished_req_ids)
        return None, results.finished_recving or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.errors()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = Report() if self._worker is None else self._worker.report()
        return RankReport(report) if report else None

    def _planned(self) -> Step:
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan)
        return plan.step

    # -- in the scheduler ------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.bind(
            lambda request: _table(kv_cache_manager.get_blocks(request)),
            kv_cache_manager.evict_blocks,
        )

    def on_new_request(self, request: Any) -> None:
        self._scheduler.came(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduler.placed(request, _table(blocks), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return StepPlan(self._scheduler.plan(scheduler_output.num_scheduled_tokens))

    def update_connector_output(self, connector_output: Any) -> None:
        said = connector_output.kv_connector_worker_meta
        if isinstance(said, RankReport):
            self._scheduler.reported(said.report)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request is over. Its blocks can be freed at once: what was to be copied out of them was
        copied by the steps that filled them, and vLLM itself keeps those that are being loaded."""
        return False, self._scheduler.over(request, whole=request.status in _WHOLE)

    @property
    def _scheduler(self) -> KvSchedule:
        assert self._schedule is not None
        return self._schedule


def connectors(engine: Any) -> tuple[ColdframeConnector, ColdframeConnector | None]:
    """The connectors of an engine whose core runs in this process.

    Args:
        engine: vLLM's `LLMEngine`.

    Returns:
        The scheduler's; and the worker's, where that is in this process, too.
    """
    core = engine.engine_core.engine_core
    return core.scheduler.connector, get_kv_transfer_group() if has_kv_transfer_group() else None


def _layered(extra: dict[str, Any], device: str) -> bool:
    wanted = extra.get("load", LOADS[device != "cpu"])
    if wanted not in LOADS:
        raise RequestError(
            "no such way to load KV",
            where="kv_connector_extra_config.load",
            expected=" or ".join(LOADS),
            got=wanted,
        )
    return bool(wanted == LOADS[0])


def _device_of(vllm_config: Any) -> str:
    """Where this process maps the arena, if nobody has done so in it.

    A worker's device is current when its connector is made, whatever its rank is on other machines.
    A scheduler in a process of its own has none yet, and takes the first that it sees.
    """
    device = torch.device(vllm_config.device_config.device or vllm_config.device_config.device_type)
    if device.type == "cpu":
        return "cpu"
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return f"{device.type}:{index}"


def _unfit(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why an engine's KV is not of the kind that travels, if so."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} kinds of KV layers, not one"
    spec = type(groups[0].kv_cache_spec).__name__
    if spec not in ("FullAttentionSpec", "SlidingWindowSpec"):
        return f"the model's KV is of another kind ({spec})"
    if vllm_config.speculative_config is not None:
        return "the engine speculates: its draft's KV is nobody else's"
    parallel = vllm_config.parallel_config
    if (
        max(getattr(parallel, f"{kind}_context_parallel_size", 1) for kind in ("decode", "prefill"))
        > 1
    ):
        return "the engine spreads a request's tokens over ranks"
    return None


def _model_of(vllm_config: Any, planned: str) -> str:
    """Fingerprint of the checkpoint that an engine's weights are of.

    Args:
        planned: That of what the memory service has loaded.
    """
    if vllm_config.load_config.load_format == "coldframe":
        return planned
    try:
        return Checkpoint.open(vllm_config.model_config.model).fingerprint
    except ColdframeError as error:
        _log.warning("coldframe: vLLM's weights are of an unknown checkpoint: %s", error)
        return ""


def _tp_rank(ranks: int) -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return 0 if ranks == 1 else get_tensor_model_parallel_rank()


def _table(blocks: Any) -> tuple[int, ...]:
    """The blocks of a request's only group; -1 for those that hold nothing of it."""
    return tuple(-1 if block.is_null else block.block_id for block in blocks.blocks[0])


def _writer(layer: Any) -> Any:
    def write(k: Any, v: Any, cache: Any, slots: Any) -> None:
        layer.impl.do_kv_cache_update(layer, k, v, cache, slots)

    return write
