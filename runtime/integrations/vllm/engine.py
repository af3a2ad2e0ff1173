"""vLLM's engine in this process, as a worker of a replica uses it: requests in, tokens out.

One process has all of it, core and model included: it shares one connection to the memory service,
and between two steps nothing of it runs. It is given token ids and gives token ids.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import count
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import ColdframeError, DeviceFull, ReplicaError, RequestError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.integrations.vllm.params import ENGINE, Asked, refusing
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.replica.vllm_spec import BLOCK_TOKENS, longest_in

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.v1.engine import EngineCoreRequest

    from coldframe.runtime.engine.spec import ModelSpec

__all__ = [
    "Engine",
    "Made",
    "engine_arguments",
    "longest_sequence",
    "start_engine",
    "untouched_zeros",
]

_CONNECTOR = "coldframe.runtime.integrations.vllm.connector"
_MOST_REQUESTS = 256
_LARGE = 1 << 20
_VLLM_DECIDES = -1
"""As the longest sequence: what the KV has room for, which vLLM alone knows of such a model."""
_TOO_LITTLE = re.compile(
    "out of memory"  # a device's, from whichever process of vLLM's
    "|can't allocate memory"  # torch's on the host
    "|No available memory for the cache blocks"
    "|larger than the available KV cache memory"
    "|Free memory on device .* is less than"
    "|Available memory on node .* is less than"
)
"""How it is said that there is too little memory, where no type says so."""
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Made:
    """What a step has made for one request.

    Args:
        request: Its name.
        tokens: Token ids, in order.
        logprobs: Of each, vLLM's `Logprob`s by token id; None where none were asked for.
        over: Whether there is no more to come: `stop`, `length`, or why else.
        cached: Tokens of its prompt that there was KV of when the engine began with it.
    """

    request: str
    tokens: Sequence[int]
    logprobs: Sequence[Mapping[int, Any]] | None
    over: str | None = None
    cached: int = 0


def longest_sequence(spec: ModelSpec, kv_bytes: int) -> int:
    """How long a sequence may be where vLLM has so much KV, as `engine_arguments` takes it.

    Raises:
        RequestError: Not one fits.
    """
    if not spec.native:
        return _VLLM_DECIDES
    context = longest_in(spec, kv_bytes)
    if context < 1:
        per_token = spec.kv_block_bytes(spec.dtype_bytes, 1)
        raise RequestError(
            "vLLM's KV holds not one block",
            where="--vllm-kv",
            expected=f"more than {2 * BLOCK_TOKENS * per_token:,} bytes",
            got=f"{kv_bytes:,}",
        )
    return context


def engine_arguments(
    model: str,
    device: str,
    dtype: str,
    context: int,
    kv_bytes: int,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for an engine that decodes for a replica.

    Args:
        model: The directory with the model's config and tokenizer; the weights may be elsewhere.
        device: Where it computes.
        dtype: Of weights and KV, as in `ModelSpec`.
        context: The longest sequence, in tokens.
        kv_bytes: Memory for its KV.
        more: What the command line says; wins over what is no matter of correctness.
    """
    arguments: dict[str, Any] = {
        "max_num_seqs": _MOST_REQUESTS,
        "max_model_len": context,
        "dtype": _DTYPES[dtype],
        # On a CPU compiling takes longer than a cold start may, and wins little.
        "enforce_eager": device == CPU,
        "skip_tokenizer_init": False,  # grammars need it
        **more,
        **ENGINE,
        "model": model,
        "load_format": "coldframe",
        # Prefill in mid-load is the native worker's. An engine that is up takes the load over, and
        # it is not to do so before it can compute.
        "model_loader_extra_config": {"gated": False},
        "kv_cache_memory_bytes": kv_bytes,
        "disable_log_stats": True,
    }
    return arguments


def start_engine(
    arguments: Mapping[str, Any], device: str, recorder: Recorder, *, takes_kv: bool = True
) -> LLMEngine:
    """Starts an engine; returns when it can answer.

    Args:
        arguments: See `engine_arguments`.
        device: Where it computes.
        recorder: Gets a span for each of its stages.
        takes_kv: Whether requests may come with KV that native workers have made.

    Raises:
        RequestError: vLLM does not know an argument, or does not take its value.
        DeviceFull: There is not so much memory.
        ReplicaError: It does not start for any other reason.
    """
    import torch
    from vllm import EngineArgs, LLMEngine
    from vllm.config import KVTransferConfig
    from vllm.v1.executor.abstract import Executor

    unknown = sorted(set(arguments) - {field.name for field in fields(EngineArgs)})
    if unknown:
        raise RequestError(
            "vLLM knows no such argument",
            where="--vllm-args",
            got=", ".join(unknown),
            hint="See the arguments of vllm.EngineArgs in the version that is installed.",
        )
    transfer = (
        KVTransferConfig(
            kv_connector="ColdframeConnector",
            kv_connector_module_path=_CONNECTOR,
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        )
        if takes_kv
        else None
    )
    try:
        with recorder.span("vllm_config"):
            config = EngineArgs(**arguments, kv_transfer_config=transfer).create_engine_config()
        if device != CPU:
            # One that is not the first is told by its number here, as the memory service has it.
            config.device_config.device = torch.device(device)
        started = now()
        executor = _timed(Executor.get_class(config), recorder)
        engine = LLMEngine(config, executor, log_stats=False)
        recorder.add("vllm_engine", started, note="all of it, but for its config")
    except ColdframeError:
        raise
    except Exception as error:
        raise _why_not(error) from error
    from coldframe.runtime.integrations.vllm.connector import connectors

    for connector in connectors(engine):
        if connector is not None:
            connector.tally.recorder = recorder
    return engine


def _timed(executor: type[Any], recorder: Recorder) -> type[Any]:
    """An executor that says what of its start takes how long."""

    class Timed(executor):
        def _init_executor(self) -> None:
            with recorder.span("vllm_weights"):
                super()._init_executor()

        def initialize_from_config(self, *arguments: Any, **named: Any) -> Any:
            with recorder.span("vllm_kv"), untouched_zeros():
                return super().initialize_from_config(*arguments, **named)

        def compile_or_warm_up_model(self) -> Any:
            with recorder.span("vllm_warmup"):
                return super().compile_or_warm_up_model()

    return Timed


@contextmanager
def untouched_zeros() -> Iterator[None]:
    """Large CPU tensors of zeros are pages that nobody has touched, while the context lasts.

    Torch writes each of their bytes, which for a gigabyte of KV takes seconds, and memory that
    requests may never need. The kernel's own zeros cost nothing before they are used.
    """
    import torch

    zeros = torch.zeros

    def lazily(*size: Any, **named: Any) -> Any:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = named.get("dtype") or torch.get_default_dtype()
        if not isinstance(dtype, torch.dtype):  # Python's own bool, say
            return zeros(*size, **named)
        nbytes = shape.numel() * dtype.itemsize
        elsewhere = torch.device(named.get("device") or "cpu").type != "cpu"
        if elsewhere or nbytes < _LARGE or set(named) - {"dtype", "device"}:
            return zeros(*size, **named)
        # Private: shared memory cannot be in an image.
        memory = mmap(-1, nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    torch.zeros = lazily
    try:
        yield
    finally:
        torch.zeros = zeros


class Engine:
    """Requests of a replica in an engine.

    Args:
        engine: The engine. Nobody else may give it requests.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._names: dict[str, str] = {}
        """Of each request here, what the engine calls it."""
        self._numbers = count(1)
        self._first_grammar = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def sharing(self) -> str:
        """What of its weights is the arena itself, and why what else is not; in words."""
        return "; ".join(dict.fromkeys(self.engine.apply_model(_sharing)))

    @property
    def busy(self) -> bool:
        """Whether a step would do something, be it only to let go of what was aborted.

        What copies KV for a request that is over is no request of the engine's, but of its
        scheduler's, whose blocks it holds.
        """
        return bool(self._names) or self.engine.engine_core.engine_core.scheduler.has_requests()

    def add(self, request: str, asked: Asked | EngineCoreRequest) -> None:
        """Takes a request, one that was `checked` or else as it is.

        Raises:
            RequestError: The engine does not take it: it is too long, for instance.
        """
        if isinstance(asked, Asked):
            name, sampling = self._name(request), asked.sampling_params()
            with refusing():
                self.engine.add_request(name, _prompt(asked), sampling)
        else:
            name = asked.request_id
            self.engine.add_request(name, asked, asked.params)
        self._names[request] = name

    def checked(self, request: str, asked: Asked) -> EngineCoreRequest:
        """A request as `add` takes it without another look at it; may be called in any thread.

        Raises:
            RequestError: The engine does not take it.
        """
        sampling = asked.sampling_params()
        with refusing():
            return self.engine.input_processor.process_inputs(
                *(self._name(request), _prompt(asked), sampling),
                supported_tasks=self.engine.get_supported_tasks(),
            )

    def compile_grammar(self, checked: EngineCoreRequest) -> None:
        """Compiles a request's grammar for when it is added; may be called in any thread.

        xgrammar keeps what it has compiled, and waits where another thread compiles the same.
        """
        from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
        from vllm.v1.structured_output.request import get_structured_output_key

        manager = self.engine.engine_core.engine_core.structured_output_manager
        with self._first_grammar:
            if manager.backend is None:
                config = manager.vllm_config
                vocabulary = config.model_config.get_vocab_size()
                manager.backend = XgrammarBackend(config, manager.tokenizer, vocabulary)
        params = checked.sampling_params
        kind, spec = get_structured_output_key(params.structured_outputs)
        manager.backend.compile_grammar(kind, spec, stop_token_ids=params.all_stop_token_ids)

    def _name(self, request: str) -> str:
        # One of its own for each try: what of the last one is still under way is not this one.
        return f"{request}-{next(self._numbers)}"

    def remove(self, request: str) -> None:
        """Forgets a request, where it is here, and all that it holds."""
        name = self._names.pop(request, None)
        if name is not None:
            self.engine.abort_request([name])

    def step(self) -> list[Made]:
        """Computes a step: what came of it for the requests that are still here."""
        made = []
        for output in self.engine.step():
            request = output.request_id.rpartition("-")[0]
            if self._names.get(request) != output.request_id:
                continue  # of a try that is over
            completion = output.outputs[0]
            over = None
            if output.finished:
                del self._names[request]
                over = completion.finish_reason or "abort"
            cached = output.num_cached_tokens or 0
            made.append(Made(request, completion.token_ids, completion.logprobs, over, cached))
        return made


def _prompt(asked: Asked) -> Any:
    return {"prompt_token_ids": asked.prompt_token_ids}


def _sharing(model: Any) -> str:
    from coldframe.runtime.integrations.vllm.loader import FILLED

    filling = getattr(model, FILLED, None)
    return "nothing is known of its weights" if filling is None else str(filling.summary())


def _why_not(error: Exception) -> ColdframeError:
    import torch

    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _TOO_LITTLE.search(text):
        return DeviceFull(
            "there is not memory enough for vLLM",
            where="--vllm-kv",
            got=text[:1000],
            hint="Give its KV less, or the replica's own (--kv-memory).",
        )
    if isinstance(error, ValueError | TypeError | NotImplementedError):
        return RequestError("vLLM does not start so", where="--vllm-args", got=text[:1000])
    return ReplicaError("vLLM does not start", got=f"{type(error).__name__}: {text[:1000]}")
