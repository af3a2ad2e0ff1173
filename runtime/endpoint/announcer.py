"""What the gateway is told of the models: once when it starts, then whenever something changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from coldframe.loader.errors import ColdframeError
from coldframe.runtime.endpoint.fleet import Fleet
from coldframe.runtime.replica.sizing import ModelFacts

__all__ = ["Announcer"]


class Announcer:
    """Tells cards and states of all models.

    Args:
        fleet: The models.
        chat_template: A file with the operator's own, in place of the checkpoint's.
    """

    def __init__(self, fleet: Fleet, chat_template: str | None) -> None:
        self._fleet = fleet
        self._chat_template = chat_template
        self._cards: dict[str, dict[str, Any]] = {}
        self._read: dict[str, ModelFacts] = {}
        """Of which the cards are."""
        self._states: dict[str, dict[str, Any]] = {}

    def begin(self, send: Callable[[dict[str, Any]], None]) -> None:
        """Tells a new gateway what is known so far."""
        self._states.clear()
        for name, card in self._cards.items():
            send({"type": "model", "model": name, "card": card})

    def tell(
        self,
        send: Callable[[dict[str, Any]], None],
        phase: str | None,
        error: ColdframeError | None,
    ) -> None:
        """Tells what has changed.

        Args:
            send: Takes a message to the gateway.
            phase: What all of them are in, where this is about to end.
            error: Why.
        """
        for name, model in self._fleet:
            if model.known and self._read.get(name) is not model.model:
                try:
                    self._introduce(name, model.model, send, vllm=model.has_vllm)
                except ColdframeError as wrong:
                    model.give_up(wrong)
            state = model.load_state()
            if phase is not None:
                why = state.error if error is None else error.to_wire()
                state = replace(state, phase=phase, stage=None, open=False, error=why)
            body = state.to_wire()
            told = {**body, "elapsed_s": 0.0}
            if told != self._states.get(name):
                self._states[name] = told
                send({"type": "state", "model": name, **body})

    def _introduce(
        self,
        name: str,
        model: ModelFacts,
        send: Callable[[dict[str, Any]], None],
        *,
        vllm: bool,
    ) -> None:
        """Tells what a model is, as soon as its config is there.

        Raises:
            ColdframeError: The small files beside its weights are not what they should be.
        """
        # Imported here: it is not needed before the first config is there.
        from coldframe.runtime.gateway.card import read_card

        self._read[name] = model
        card = read_card(
            model.directory,
            name,
            model.spec.context_length,
            model.spec.vocab_size,
            self._chat_template,
            vllm=vllm,
        ).to_wire()
        if card != self._cards.get(name):
            self._cards[name] = card
            send({"type": "model", "model": name, "card": card})
