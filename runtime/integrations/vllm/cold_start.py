"""A cold start of a vLLM engine to its first tokens, timed: for benchmarks, in its interpreter.

    python -m coldframe.runtime.integrations.vllm.cold_start JSON

It is here and not with the benchmarks since vLLM is imported by its integration alone.

The argument has `engine`, arguments of vLLM's `EngineArgs`; `prompt`, token ids; and `tokens`, how
many to make. What comes of it is a line of JSON on standard output, with seconds since the exec
that `COLDFRAME_EXEC_NS` says.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from coldframe.loader.timeline import now, process_start_ns
from coldframe.runtime.integrations.vllm.environment import LEAN_ENVIRONMENT
from coldframe.runtime.integrations.vllm.lean import collected_late, look_at_model_here

__all__ = ["main"]


def main() -> None:
    """Runs it, and exits."""
    asked = json.loads(sys.argv[1])
    for name, value in LEAN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    print(json.dumps(_measure(asked["engine"], asked["prompt"], asked["tokens"])), flush=True)
    os._exit(0)  # an engine's threads would keep it


def _measure(arguments: dict[str, Any], prompt: list[int], count: int) -> dict[str, Any]:
    started = process_start_ns()

    def since() -> float:
        return (now() - started) / 1e9

    times: dict[str, Any] = {}
    with collected_late():
        from vllm import EngineArgs, LLMEngine, SamplingParams

        look_at_model_here(arguments["model"])
        times["imported_s"] = since()
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    times["up_s"] = since()
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    engine.add_request("0", {"prompt_token_ids": prompt}, params)
    tokens: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            times.setdefault("first_token_s", since())
    return {**times, "last_token_s": since(), "tokens": tokens}


if __name__ == "__main__":
    main()
