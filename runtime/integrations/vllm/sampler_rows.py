"""The rows of vLLM's batch that our sampler draws for, and the tokens that it draws.

vLLM says which request has which row when that changes, and hands over each request's list of the
tokens made so far once: the list grows as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coldframe.loader.errors import ReplicaError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.sampling import SampleInput, sample
from coldframe.runtime.integrations.vllm.params import VERSION

__all__ = ["Row", "Rows", "row_of"]

_NOT_YET = -1
"""What vLLM has in place of a token that was scheduled and is not known yet."""


@dataclass(frozen=True, slots=True)
class Row:
    """A request whose tokens are drawn here.

    Args:
        params: How; None where only the known ones are given out, and vLLM draws the others.
        prompt_ids: vLLM's prompt, which may hold the beginning of the answer.
        prompt_tokens: How many of them are prompt to the client.
        made_ids: What vLLM has made so far; it grows.
        known_ids: The answer's first tokens, where they are to be made again.
    """

    params: SamplingParams | None
    prompt_ids: Sequence[int]
    prompt_tokens: int
    made_ids: Sequence[int]
    known_ids: Sequence[int]

    def known(self) -> int | None:
        """The next token, where it is known."""
        made = len(self.made_ids)
        return self.known_ids[made] if made < len(self.known_ids) else None

    def sample_input(self) -> SampleInput | None:
        """What the next token is drawn by; None where vLLM is to draw it.

        Raises:
            ReplicaError: vLLM has not told the token before it.
        """
        params, made = self.params, self.made_ids
        if params is None:
            return None
        if made and made[-1] == _NOT_YET:
            raise ReplicaError(
                "vLLM asks for a token before it has told the one before it",
                expected="a step scheduled after the one before it",
                got=f"token {len(made) - 1} of an answer to come",
                hint="Start the engine with async_scheduling off.",
            )
        position = len(self.prompt_ids) + len(made)
        if not params.changes_logits:
            return SampleInput(params, (), (), position)  # nothing looks at the tokens
        prompt, rest = self.prompt_ids[: self.prompt_tokens], self.prompt_ids[self.prompt_tokens :]
        return SampleInput(params, prompt, [*rest, *made], position)


def row_of(
    extra: Mapping[str, Any] | None, prompt_ids: Sequence[int] | None, made_ids: Sequence[int]
) -> Row | None:
    """A request's row, where it asks for our sampler.

    Args:
        extra: Its `extra_args`; see `params.ask`.
        prompt_ids: vLLM's prompt.
        made_ids: vLLM's list of what it makes.

    Raises:
        ReplicaError: It is of another version than this one.
    """
    told = (extra or {}).get("coldframe")
    if told is None:
        return None
    if told.get("version") != VERSION or prompt_ids is None:
        raise ReplicaError(
            "a request to the sampler that this version does not know",
            where="extra_args['coldframe']",
            expected=f"version {VERSION}, with a prompt of token ids",
            got=f"version {told.get('version')!r}",
            hint="Run one version of coldframe in the whole replica.",
        )
    params = told["params"]
    return Row(
        None if params is None else SamplingParams.from_wire(params),
        prompt_ids,
        told["prompt_tokens"],
        made_ids,
        tuple(told["known"]),
    )


class Rows:
    """Which rows are drawn here. What vLLM says of its batch comes in its order: what has left,
    what has come, what has moved."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def remove(self, index: int) -> None:
        self._rows.pop(index, None)

    def put(self, index: int, row: Row | None) -> None:
        """A request has come; one that had its place before has left."""
        if row is None:
            self._rows.pop(index, None)
        else:
            self._rows[index] = row

    def move(self, source: int, target: int, *, swap: bool) -> None:
        moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
        self.put(target, moved)
        if swap:
            self.put(source, other)

    def draw(self, logits: torch.Tensor) -> dict[int, int]:
        """The next tokens, by row.

        Args:
            logits: `[rows, vocab]` float32, on any device.

        Raises:
            ReplicaError: The model has computed what is no number.
        """
        tokens: dict[int, int] = {}
        asked: dict[int, SampleInput] = {}
        for index, row in self._rows.items():
            if index >= len(logits):
                continue
            known = row.known()
            if known is not None:
                tokens[index] = known
                continue
            wanted = row.sample_input()
            if wanted is not None:
                asked[index] = wanted
        if asked:
            chosen = _rows(logits, asked)
            drawn = sample(chosen, list(asked.values()))
            tokens.update(zip(asked, (each.token for each in drawn), strict=True))
        return tokens

    def leave(self, logits: torch.Tensor) -> torch.Tensor:
        """Draws, and leaves nothing else to be drawn in those rows. `logits` are changed."""
        tokens = self.draw(logits)
        if tokens:
            place = torch.tensor([list(tokens), list(tokens.values())])
            rows, columns = place.to(logits.device, non_blocking=True)
            logits.index_fill_(0, rows, float("-inf"))
            logits[rows, columns] = 0.0
        return logits


def _rows(logits: torch.Tensor, wanted: Iterable[int]) -> torch.Tensor:
    indices = list(wanted)
    if indices == list(range(len(logits))):
        return logits
    return logits[torch.tensor(indices).to(logits.device, non_blocking=True)]
