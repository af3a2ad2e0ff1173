"""A plain container app: FastAPI around Transformers, the model loaded when the module is imported.

As most such apps are written, so that it can be measured against; nothing of coldframe is in it.
It answers `/v1/completions` for prompts of token ids, streamed and greedy, one event a token. The
tokenizer is loaded, too, as an app for text would; each event has the token's id beside its text.

    MODEL_DIR=... DEVICE=cpu uvicorn --app-dir benchmarks/cold plain_app:app
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

__all__ = ["app"]

logging.disable_progress_bar()  # type: ignore[no-untyped-call]
_MODEL_DIR = os.environ["MODEL_DIR"]
_DEVICE = os.environ.get("DEVICE", "cpu")

tokenizer = AutoTokenizer.from_pretrained(_MODEL_DIR)
model: Any = AutoModelForCausalLM.from_pretrained(_MODEL_DIR, dtype="auto")
model.to(_DEVICE).eval()
# Not the checkpoint's: greedy, and past the end of a sequence.
greedy = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
model.generation_config = greedy
app = FastAPI()


class Completion(BaseModel):
    """What is asked for."""

    prompt: list[int]
    max_tokens: int = 16


class Tokens(BaseStreamer):
    """Token ids as they are generated, then None; what `generate` puts first is the prompt."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            self.queue.put(int(value))
        self._begun = True

    def end(self) -> None:
        self.queue.put(None)


@app.post("/v1/completions")
def complete(request: Completion) -> StreamingResponse:
    """An answer, as server-sent events."""
    ids = torch.tensor([request.prompt], device=_DEVICE)
    streamer = Tokens()

    def generate() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=request.max_tokens,
                    streamer=streamer,
                )
        finally:
            streamer.end()  # whoever listens is not left waiting

    Thread(target=generate, daemon=True).start()
    return StreamingResponse(_events(streamer), media_type="text/event-stream")


def _events(streamer: Tokens) -> Iterator[str]:
    while (token := streamer.queue.get()) is not None:
        choice: dict[str, Any] = {
            "index": 0,
            "text": tokenizer.decode([token]),
            "token_ids": [token],
            "finish_reason": None,
        }
        yield f"data: {json.dumps({'object': 'text_completion', 'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"
