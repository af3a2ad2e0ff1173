"""What is asked of a model: held while no replica can answer it, and behind one that has died."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from coldframe.loader.errors import ColdframeError, ReplicaError, TransferRefused
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import Listener, TokenEvent
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.transport.base import Given, Taken

__all__ = ["SOON_S", "Asks", "FirstToken"]

_TRIES = 3
"""How many replicas may die under a request that has had no token, before it is given up."""
SOON_S = 1.0
"""Whose replica has died may come again so soon, in seconds: the next one is started, and whoever
comes is held until it answers."""
_PROBES = 3
"""How often the first token is tried for nobody, before the replica is given up."""


class Asks:
    """The requests for a model, in the order in which they came.

    Args:
        died: Whether the replica that there is has died, so that what fails may be of that.
    """

    def __init__(self, died: Callable[[], bool]) -> None:
        self._died = died
        self._open: OrderedDict[str, _Ask] = OrderedDict()
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._open)

    def add(
        self,
        params: SamplingParams,
        listener: Listener,
        *,
        prompt: str | None,
        prompt_ids: tuple[int, ...] | None,
        add_special: bool,
        generated_ids: tuple[int, ...] = (),
        give: bool = False,
        kv: Given | None = None,
    ) -> str:
        """Holds a request: its name; see `Replica.submit`."""
        self._numbers += 1
        name = f"s{self._numbers}"
        self._open[name] = _Ask(
            *(self, name, params, listener, prompt, prompt_ids, add_special, generated_ids),
            *(give, kv),
        )
        return name

    def cancel(self, name: str, replica: Replica | None) -> None:
        """Forgets a request."""
        ask = self._open.pop(name, None)
        if ask is not None and ask.request is not None and replica is not None:
            replica.cancel(ask.request)

    def clear(self) -> None:
        """Forgets all of them; nobody gets word of it."""
        self._open.clear()

    def pass_on(self, replica: Replica) -> None:
        """Gives the workers what is held, in its order."""
        for ask in [ask for ask in self._open.values() if ask.request is None]:
            try:
                ask.request = replica.submit(
                    ask.params,
                    ask,
                    prompt=ask.prompt,
                    prompt_ids=ask.prompt_ids,
                    add_special=ask.add_special,
                    generated_ids=ask.generated_ids,
                    give=ask.give,
                    kv=ask.kv,
                )
            except TransferRefused as refusal:
                del self._open[ask.name]
                ask.listener.on_error(refusal)
            except ColdframeError:
                return  # the replica's own, which is handled as that

    def take_back(self) -> None:
        """The replica has been left: all are held again."""
        for ask in self._open.values():
            ask.request = None

    def lose(self, error: ColdframeError, *, for_good: bool) -> None:
        """The replica was lost: those that another one may answer are held, the others fail.

        Args:
            error: Of what.
            for_good: Whether there will be no other.
        """
        for name, ask in list(self._open.items()):
            ask.request, ask.deaths = None, ask.deaths + 1
            if (
                for_good
                or not isinstance(error, ReplicaError)
                or ask.tokens
                or ask.deaths >= _TRIES
            ):
                del self._open[name]
                ask.listener.on_error(error if for_good or ask.tokens else _of(ask, error))

    def given_up(self, name: str, error: ColdframeError) -> None:
        """A request has failed; it is held for the next replica where it is this one that died."""
        ask = self._open[name]
        if self._died() and isinstance(error, ReplicaError):
            if not ask.tokens:
                ask.request = None
                return
            error.retry_after_s = SOON_S
        del self._open[name]
        ask.listener.on_error(error)

    def answered(self, name: str) -> None:
        """A request is done."""
        del self._open[name]


def _of(ask: _Ask, error: ColdframeError) -> ColdframeError:
    """What a request is told that has had no token: it may be the cause, where it was tried often.

    That is an error of its own then, and not the replica's (`Supervisor.is_lost_to`): nobody is to
    try it elsewhere.
    """
    if ask.deaths < _TRIES or not isinstance(error, ReplicaError):
        return error
    return ReplicaError(
        "replicas die under this request again and again",
        where=ask.name,
        expected=f"fewer than {_TRIES} deaths",
        got=error.what,
        hint="What they said last is on standard error.",
    )


@dataclass(slots=True)
class _Ask:
    """A request, and its place with the replica that there is."""

    asks: Asks
    name: str
    params: SamplingParams
    listener: Listener
    prompt: str | None
    prompt_ids: tuple[int, ...] | None
    add_special: bool
    generated_ids: tuple[int, ...]
    give: bool
    kv: Given | None
    request: str | None = field(default=None, init=False)
    """Its id with the replica; None while it is held."""
    tokens: int = field(default=0, init=False)
    deaths: int = field(default=0, init=False)

    def on_token(self, event: TokenEvent) -> None:
        self.tokens += 1
        if event.finish is not None:
            self.asks.answered(self.name)
        self.listener.on_token(event)

    def on_given(self, given: Given) -> None:
        self.asks.answered(self.name)
        cast("Taken", self.listener).on_given(given)

    def on_error(self, error: ColdframeError) -> None:
        self.asks.given_up(self.name, error)


class FirstToken:
    """The first token of a replica, which is asked for where no client does."""

    def __init__(self) -> None:
        self.why: ColdframeError | None = None
        """What the last try has failed of."""
        self._tries = 0
        self._trying = False

    @property
    def hopeless(self) -> bool:
        """Whether it has been tried often enough."""
        return self._tries >= _PROBES and not self._trying

    def step(self, replica: Replica) -> None:
        """Asks for it, where nobody does.

        Raises:
            ColdframeError: The replica cannot go on.
        """
        if self._trying or not replica.idle or not replica.known:
            return
        self._trying = True
        self._tries += 1
        # Two tokens, so that decode is known to work as well.
        replica.submit(SamplingParams(max_tokens=2, ignore_eos=True), self, prompt_ids=(0,))

    def on_token(self, event: TokenEvent) -> None: ...

    def on_error(self, error: ColdframeError) -> None:
        self.why, self._trying = error, False
