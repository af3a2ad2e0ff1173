"""Our sampler in vLLM: a logits processor that leaves one token of each row that it draws for.

It does all that sampling is, so that a request draws the same tokens here and in the native engine:
they depend on the logits, the parameters, the seed and the place alone. To vLLM such a request is
greedy, and takes the one token that is left. The log-probabilities that vLLM reports are those of
the model itself, taken before this. Other rows pass as they are.

vLLM finds it by the engine argument `logits_processors` (`params.ENGINE`). Speculative decoding
knows no such processors, and vLLM refuses them with it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from coldframe.loader.errors import ColdframeError
from coldframe.runtime.integrations.vllm.sampler_rows import Rows, row_of

__all__ = ["ColdframeSampler"]


class ColdframeSampler(LogitsProcessor):
    """See the module."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows = Rows()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses at the door what would end the engine in a step."""
        try:
            row_of(sampling_params.extra_args, (), ())
        except (ColdframeError, KeyError, TypeError) as error:
            raise ValueError(f"extra_args['coldframe']: {error}") from error

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.remove(index)
        for index, params, prompt_ids, made_ids in batch_update.added:
            self._rows.put(index, row_of(params.extra_args, prompt_ids, made_ids))
        for source, target, direction in batch_update.moved:
            self._rows.move(source, target, swap=direction == MoveDirectionality.SWAP)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return self._rows.leave(logits) if len(self._rows) else logits
