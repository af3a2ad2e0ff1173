"""A plain script: Transformers loads a model and generates, each token printed when it is there.

As the shortest way to a first token that most people know; nothing of coldframe is in it. Its
prompt comes as token ids, so that it needs no tokenizer, which is to its advantage.

    python plain_script.py '{"model": DIR, "prompt": [...], "tokens": N, "device": "cpu"}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging


class _Printed(BaseStreamer):
    """Prints token ids; what `generate` puts first is the prompt."""

    def __init__(self) -> None:
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            print(int(value), flush=True)
        self._begun = True

    def end(self) -> None:
        """There is no more."""


def _main() -> None:
    asked = json.loads(sys.argv[1])
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(asked["model"], dtype="auto")
    model.to(asked["device"]).eval()
    # Not the checkpoint's: greedy, and past the end of a sequence.
    greedy = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    model.generation_config = greedy
    ids = torch.tensor([asked["prompt"]], device=asked["device"])
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked["tokens"],
            streamer=_Printed(),
        )
    sys.stdin.readline()  # it stays until it has been looked at


if __name__ == "__main__":
    _main()
