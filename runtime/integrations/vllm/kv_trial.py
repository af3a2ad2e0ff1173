"""Measures what a hand-over costs inside vLLM: `coldframe bench vllm-handoff` runs this there.

One engine with the connector, its arena in a memory service of its own. A prompt is prefilled and
handed on; then the engine takes it over as if from another, nothing found of it in its own cache.
Beside each such run, in turn: a plain copy of as many bytes, and the same prompt without KV.

It prints one JSON document, in milliseconds. It is here and not with the benchmarks since vLLM is
imported by its integration alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from coldframe.loader.errors import ReplicaError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.integrations.vllm.transfer import (
    consume,
    produce,
    prompt_of,
    read_handed,
)
from coldframe.runtime.options import BLOCK_TOKENS, ReplicaOptions
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.worker.handoff import Job
from coldframe.runtime.worker.tensors import torch_dtypes

__all__ = ["main"]

_ANSWER = 8
_BLOCKS = 128
_LISTENING_S = 30.0
"""How long the memory service may take to start, in seconds."""


class _Trial:
    def __init__(self, model: Path, dtype: str, socket: str, load: str) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.config import KVTransferConfig

        from coldframe.runtime.integrations.vllm.connector import connectors

        transfer = KVTransferConfig(
            kv_connector="ColdframeConnector",
            kv_connector_module_path="coldframe.runtime.integrations.vllm.connector",
            kv_role="kv_both",
            kv_load_failure_policy="fail",
            kv_connector_extra_config={"memory_service": socket, "load": load},
        )
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model),
                dtype=dtype,  # vLLM's own choice for float32 is another
                enforce_eager=True,
                max_model_len=1024,
                disable_log_stats=True,
                enable_prefix_caching=False,
                kv_transfer_config=transfer,
            )
        )
        _, worker = connectors(self._engine)
        assert worker is not None
        self._tally = worker.tally
        self._names = 0

    def run(self, prompt: list[int]) -> dict[str, float]:
        """One hand-over, and what stands beside it.

        Raises:
            ReplicaError: It did not come about, or the tokens are others.
        """
        self._names += 1
        name = f"trial-{self._names}"
        params = SamplingParams(max_tokens=_ANSWER + 1, ignore_eos=True)
        job = Job(name, 0, params, prompt_ids=tuple(prompt))
        *_, output = self._ask(name, prompt, 1, produce(job, opens=True))
        outcome = read_handed(output.kv_transfer_params)
        if outcome is None or outcome.handoff is None:
            raise ReplicaError("vLLM did not hand its KV on", got=outcome and outcome.why)
        (saved,) = self._spans("kv_save")
        taken = prompt_of(outcome.handoff, "fast")
        started, first, _, output = self._ask(
            f"{name}-taken", taken, _ANSWER, consume(outcome.handoff, "fast")
        )
        (loaded,) = self._spans("kv_load")
        begun, first_plain, whole_plain, plain = self._ask(f"{name}-plain", prompt, _ANSWER + 1)
        if list(plain.outputs[0].token_ids[1:]) != list(output.outputs[0].token_ids):
            raise ReplicaError("the tokens are not those of vLLM alone", where=name)
        nbytes = self._tally.counts["loaded_bytes"] // self._tally.counts["loaded"]
        return {
            "bytes": nbytes,
            "copy": _copy_ms(nbytes),
            "save": (saved.end_ns - saved.start_ns) / 1e6,
            "load": (loaded.end_ns - loaded.start_ns) / 1e6,
            "ready": (loaded.end_ns - started) / 1e6,
            "first": (first - started) / 1e6,
            "first_plain": (first_plain - begun) / 1e6,
            "step": (whole_plain - first_plain) / 1e6 / _ANSWER,
        }

    def _ask(self, name: str, prompt: list[int], tokens: int, transfer: Any = None) -> Any:
        """When it was asked, when its first token and the last one came, and its output."""
        from vllm import SamplingParams as Sampling

        sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        if transfer is not None:
            sampling.extra_args = {"kv_transfer_params": transfer}
        started, first = now(), 0
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while True:
            for output in self._engine.step():
                first = first or now()
                if output.finished:
                    if output.outputs[0].finish_reason == "error":
                        raise ReplicaError("the KV was lost", where=name)
                    return started, first, now(), output

    def _spans(self, name: str) -> list[Any]:
        return [span for span in self._tally.drain() if span.name == name]


def _copy_ms(nbytes: int) -> float:
    """A plain copy of so many bytes, that nothing has in its cache."""
    import torch

    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    torch.zeros(64 << 20, dtype=torch.uint8).add_(1)
    started = now()
    target.copy_(source)
    return (now() - started) / 1e6


def main(arguments: list[str]) -> None:
    """Runs the trial; see the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--load", default="layered")
    wanted = parser.parse_args(arguments)
    config = json.loads((wanted.model / "config.json").read_text())
    spec = ModelSpec.from_config(config)
    launch = Launch(ReplicaOptions(str(wanted.model)), Recorder("front"))
    try:
        size = spec.kv_block_bytes(spec.dtype_bytes, BLOCK_TOKENS)
        launch.memories[0].channel.send(
            {"type": "kv", "block_bytes": size, "blocks": _BLOCKS, "lease_s": 30.0}
        )
        path = launch.memories[0].path
        deadline = time.monotonic() + _LISTENING_S
        while not os.path.exists(path):
            if time.monotonic() > deadline:
                raise ReplicaError("the memory service did not start", where=path)
            time.sleep(0.01)
        dtype = str(torch_dtypes()[spec.dtype]).removeprefix("torch.")
        trial = _Trial(wanted.model, dtype, path, wanted.load)
        draw = random.Random(7)
        runs = []
        for _ in range(wanted.runs + 2):
            prompt = [draw.randrange(5, spec.vocab_size) for _ in range(wanted.tokens)]
            runs.append(trial.run(prompt))
        # The first ones find everything for the first time.
        print(json.dumps(runs[2:]), flush=True)
    finally:
        launch.close()
    os._exit(0)  # an engine's threads would keep it


if __name__ == "__main__":
    main(sys.argv[1:])
