"""The connector in vLLM's worker: what a step's plan asks for, done on this rank's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.timeline import now
from coldframe.runtime.integrations.vllm.kv_copier import KvCopier, Layer, LoadJob
from coldframe.runtime.integrations.vllm.kv_layout import KvLayout, learn
from coldframe.runtime.integrations.vllm.kv_pages import KvPages, checksum
from coldframe.runtime.integrations.vllm.kv_step import Report, Save, Step
from coldframe.runtime.integrations.vllm.kv_tally import KvTally, Loaded

__all__ = ["KvWorker", "rank_heads"]

_IDLE_S = 0.002
"""How long a step that computes nothing waits for a copy: the engine would ask again at once."""


class KvWorker:
    """One rank's side.

    Args:
        pages: Makes the arena's tensors, when they are first needed.
        layers: vLLM's that have KV on this rank.
        heads: The KV heads that this rank has.
        dim: Numbers in one.
        dtype: Of keys and values as the model computes them.
        block_tokens: Tokens in a block of its cache, as its kernels see it.
        tally: Counts.
    """

    def __init__(
        self,
        pages: Callable[[], KvPages],
        layers: Sequence[Layer],
        heads: slice,
        dim: int,
        dtype: torch.dtype,
        block_tokens: int,
        tally: KvTally,
    ) -> None:
        self._make_pages = pages
        self._layers = layers
        self._heads = heads
        self._dim = dim
        self._dtype = dtype
        self._block_tokens = block_tokens
        self._tally = tally
        self._pages: KvPages | None = None
        self._layout: KvLayout | ColdframeError | None = None
        self._copier = KvCopier(self.pages, layers, heads, tally)
        self._current: LoadJob | None = None
        self._beside: list[LoadJob] = []
        self._report = Report()
        self._errors: set[int] = set()

    def close(self) -> None:
        self._copier.close()

    def pages(self) -> KvPages:
        """The arena's tensors.

        Raises:
            ColdframeError: There is none, or it is not of this model.
        """
        if self._pages is None:
            self._pages = self._make_pages()
        return self._pages

    # -- KV comes --------------------------------------------------------------------------------

    def start(self, step: Step) -> None:
        """Begins a step's loads: those that it needs together, the others one by one."""
        needed = [load for load in step.loads if load.waits]
        if needed:
            self._current = self._copier.begin(needed)
        self._beside += [self._copier.begin([load]) for load in step.loads if not load.waits]

    def wait_layer(self, name: str) -> None:
        """Returns when a layer may be read."""
        if self._current is not None:
            self._copier.wait_layer(self._current, name)

    def end_step(self, step: Step) -> None:
        """Sees that the step's own loads are over, and does its saves."""
        job, self._current = self._current, None
        if job is not None:
            job.done.wait()
            self._errors |= self._take(job)
        for save in step.saves:
            self._save(save)

    def finished(self, step: Step) -> tuple[set[str], set[str]]:
        """The loads beside steps that are over since the last call, and those of them that failed.

        Both by vLLM's names of the requests.
        """
        if step.idle and self._beside and not any(job.done.is_set() for job in self._beside):
            self._copier.wait_any(_IDLE_S)
        done = [job for job in self._beside if job.done.is_set()]
        self._beside = [job for job in self._beside if job not in done]
        failed: set[str] = set()
        for job in done:
            self._take(job)
            failed |= set(job.failed)
        return {load.request for job in done for load in job.loads}, failed

    def errors(self) -> set[int]:
        """Blocks of vLLM's that a load of this step has left without their KV."""
        errors, self._errors = self._errors, set()
        return errors

    def report(self) -> Report:
        """What was done since the last call."""
        report, self._report = self._report, Report()
        return report

    def _take(self, job: LoadJob) -> set[int]:
        touched: set[int] = set()
        for load in job.loads:
            self._report.loaded[load.request] += 1
            if load.request in job.failed:
                touched |= load.touched
        self._report.failed |= job.failed
        return touched

    # -- KV goes ---------------------------------------------------------------------------------

    def _save(self, save: Save) -> None:
        try:
            with torch.inference_mode():
                self._copy_out(save)
        except Exception as error:  # noqa: BLE001 - it is answered all the same, and not handed on
            known = isinstance(error, ColdframeError)
            self._report.unsaved[save.request] = str(error) if known else repr(error)
        self._report.saved[save.request] += 1

    def _copy_out(self, save: Save) -> None:
        started = now()
        layout, pages = self.layout(), self.pages()
        span = layout.block_tokens
        # A block of the scheduler's may be several of the kernels'.
        parts = save.block_tokens // span
        first, last = save.start // span, (save.end - 1) // span
        wanted = [save.table[i // parts] * parts + i % parts for i in range(first, last + 1)]
        device = self._layers[0].cache.device
        blocks = torch.tensor(wanted, dtype=torch.int64, device=device)
        within = slice(save.start - first * span, save.end - first * span)
        rows = pages.rows(save.blocks, save.start, save.end)
        for layer in self._layers:
            k, v = (part[within] for part in layout.read(layer.cache, blocks))
            pages.write(layer.index, rows, k, v, self._heads)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        if save.sums:
            every = pages.rows(save.blocks, 0, save.end)
            whole = slice(0, pages.heads)
            self._report.checksums[save.request] = tuple(
                checksum(*pages.read(layer, every, whole)) for layer in range(pages.layers)
            )
        tokens = save.end - save.start
        nbytes = tokens * pages.token_bytes // pages.layers * len(self._layers)
        self._tally.saved(Loaded(save.name, tokens, nbytes, started, now()))

    def layout(self) -> KvLayout:
        """How this rank's cache holds KV, found out once.

        Raises:
            ReplicaError: It does not hold it as it is written.
        """
        if self._layout is None:
            heads = self._heads.stop - self._heads.start
            layer = self._layers[0]
            try:
                self._layout = learn(
                    *(layer.write, layer.cache, heads, self._dim, self._block_tokens),
                    dtype=self._dtype,
                )
            except ColdframeError as error:
                self._layout = error
            except Exception as error:  # noqa: BLE001 - requests are served all the same
                self._layout = ReplicaError("vLLM's KV cache cannot be tried out", got=repr(error))
        if isinstance(self._layout, ColdframeError):
            raise self._layout
        return self._layout


def rank_heads(total: int, ranks: int, rank: int) -> slice:
    """The KV heads of a rank: a part of them, or one that it shares with others."""
    if total >= ranks:
        each = total // ranks
        return slice(rank * each, (rank + 1) * each)
    head = rank * total // ranks
    return slice(head, head + 1)
