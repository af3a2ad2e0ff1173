"""The first token of a request that was prefilled elsewhere: taken as it is, or drawn once more.

For those who use the KV connector with vLLM's own sampler; which way is right for a request says
`transfer.mode_of`. In a replica both engines draw alike, and all hand-offs go the fast way.

*Fast*: the token that prefill has drawn is appended to the prompt, and vLLM computes what follows.
That is exact for greedy decoding. Where an answer depends on what of it is prompt and what was
generated (penalties), or on how often a request's random numbers were drawn, it is not.

*Exact*: vLLM gets the prompt alone, with its KV, and draws the same token again; it must be the
one that the client has already. That one is dropped. Where it is another, what the client has
stands: the request is begun again in the fast way, and the mismatch counted. Its KV has been let
go by then: what is missing of it in vLLM's own prefix cache is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.runtime.integrations.vllm.fingerprint import Fingerprint
from coldframe.runtime.integrations.vllm.transfer import Mode, consume, prompt_of
from coldframe.runtime.worker.handoff import Handoff

__all__ = ["FirstToken", "FirstTokens"]


@dataclass(slots=True)
class FirstTokens:
    """What has come of the first tokens.

    Args:
        matched: Drawn again, and the same.
        mismatched: Drawn again, and another; begun again in the fast way.
    """

    matched: int = 0
    mismatched: int = 0


class FirstToken:
    """One request's way into vLLM.

    Args:
        handoff: What prefill has handed over.
        mode: See `transfer.Mode`; without a token to draw again it is fast.
        counts: Gets what came of it.
        made_by, made_for: See `transfer.consume`.
    """

    def __init__(
        self,
        handoff: Handoff,
        mode: Mode,
        counts: FirstTokens,
        *,
        made_by: Fingerprint | None = None,
        made_for: Fingerprint | None = None,
    ) -> None:
        self.mode: Mode = mode if handoff.job.generated_ids else "fast"
        self._handoff = handoff
        self._counts = counts
        self._made = (made_by, made_for)
        exact = self.mode == "exact"
        self._expected = handoff.job.generated_ids[-1] if exact else None

    @property
    def prompt(self) -> list[int]:
        """Token ids for vLLM."""
        return prompt_of(self._handoff, self.mode)

    @property
    def kv_transfer_params(self) -> dict[str, Any]:
        """Its KV, for vLLM."""
        made_by, made_for = self._made
        return consume(self._handoff, self.mode, made_by=made_by, made_for=made_for)

    @property
    def max_tokens(self) -> int:
        """How many tokens vLLM is to generate.

        Zero or less: the answer is over, and the request is not for vLLM at all.
        """
        most = self._handoff.job.params.max_tokens
        assert most is not None  # whoever tokenised the prompt has put a number there
        return most - len(self._handoff.job.generated_ids) + (self.mode == "exact")

    def take(self, tokens: Sequence[int]) -> list[int] | None:
        """Takes tokens that vLLM has drawn.

        Returns:
            Those that are new to the client; None where the first of them is not what prefill has
            drawn. Then abort the request and add it again: `prompt`, `kv_transfer_params` and
            `max_tokens` are now those of the fast way.
        """
        if self._expected is None or not tokens:
            return list(tokens)
        first, self._expected = self._expected, None
        if tokens[0] == first:
            self._counts.matched += 1
            return list(tokens[1:])
        self._counts.mismatched += 1
        self.mode = "fast"
        return None
