"""What is compiled ahead of time, run as it is, operator by operator."""

from __future__ import annotations

import torch
from torch import Tensor

from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.runtime.engine.compiled import Code, Sized
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.engine.traced import TracedLayer, TracedLogits


class Traced:
    """A function that is called as compiled code is.

    Args:
        function: What it is.
        sequences: The number of sequences that it takes; compiled code takes no other.
        fails_at: The call that fails; None for none.
    """

    def __init__(
        self, function: torch.nn.Module, sequences: int, fails_at: int | None = None
    ) -> None:
        self.calls = 0
        self._function = function
        self._sequences = sequences
        self._fails_at = fails_at

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        if self.calls == self._fails_at:
            raise RuntimeError("the code has failed\nwith more lines")
        assert len(inputs[0]) == self._sequences
        assert all(tensor.is_contiguous() for tensor in inputs)
        return [self._function(*inputs)]


def traced_code(
    spec: ModelSpec,
    sequences: tuple[int, ...] = (1, 2, 4),
    *,
    vectors: str | None = None,
    fails_at: int | None = None,
) -> Code:
    """Code for a model, none of which is compiled."""
    sizes = tuple(
        Sized(n, Traced(TracedLayer(spec), n, fails_at), Traced(TracedLogits(spec), n))
        for n in sequences
    )
    shape = CodeShape.of(spec, vectors or spec.dtype, torch.get_num_threads())
    return Code(shape, sizes, "as it is traced")


def calls(code: Code) -> dict[int, int]:
    """How many steps each size has computed."""
    return {size.sequences: size.logits.calls for size in code.sizes}  # type: ignore[attr-defined]
