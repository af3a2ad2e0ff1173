"""The flags of a vLLM engine that decodes for a replica; vLLM itself is not imported here."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.replica.scale_spec import DecodeSpec
from coldframe.runtime.replica.vllm_spec import VllmOptions
from coldframe.runtime.units import byte_count

__all__ = [
    "add_engine_arguments",
    "add_vllm_arguments",
    "engine_settings",
    "interpreter",
    "vllm_options",
]

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_OURS = {
    "model": "MODEL says that.",
    "tokenizer": "It is the model's.",
    "dtype": "It is the checkpoint's: weights and KV are those of the native workers.",
    "load_format": "The weights are coldframe's.",
    "model_loader_extra_config": "The weights are coldframe's.",
    "kv_transfer_config": "The KV comes from coldframe's prefill.",
    "kv_cache_memory_bytes": "Use --vllm-kv.",
    "gpu_memory_utilization": "Use --vllm-kv: the memory is shared with the other workers.",
    "logits_processors": "Sampling is coldframe's, so that all engines draw the same tokens.",
    "logprobs_mode": "Log-probabilities are those of the native workers.",
    "max_logprobs": "There are as many as native workers give.",
    "structured_outputs_config": "Grammars are xgrammar's, without blanks of the model's choice.",
    "speculative_config": "Tokens are drawn one by one, by their seed and position.",
    "generation_config": "Each request comes with all that it asks for.",
    "async_scheduling": "Requests come and go between two steps.",
    "disable_log_stats": "The replica has metrics of its own.",
    "tensor_parallel_size": "Its ranks would be processes without a connection to the memory; "
    "`vllm serve --load-format coldframe` by itself has ranks.",
    "distributed_executor_backend": "One process has the whole engine, and the weights with it.",
    "worker_cls": "One process has the whole engine, and its worker is vLLM's own.",
    "data_parallel_size": "Start one replica for each.",
    "pipeline_parallel_size": "One process has the whole engine.",
}
"""Arguments of vLLM's that are not to be given, and what to do instead."""


def add_vllm_arguments(parser: Parser) -> None:
    """The flags that are of use where vLLM decodes (`--decode vllm`, `--decode native,vllm`)."""
    group = parser.add_argument_group("vLLM (--decode vllm)")
    parser.flag(
        "--bridge",
        choices=("stay", "move"),
        default="stay",
        group=group,
        help="with --decode native,vllm: what native workers decode when vLLM is up stays with "
        "them to its end, or moves over with its KV (stay)",
    )
    add_engine_arguments(parser, group)


def add_engine_arguments(parser: Parser, group: Any) -> None:
    """Those of them that say what the engine is."""
    flag = partial(parser.flag, group=group)
    flag(
        "--vllm-python",
        metavar="PATH",
        help="the Python that has vLLM and coldframe (this one, where it has vLLM)",
    )
    flag(
        "--vllm-kv",
        metavar="SIZE",
        type=byte_count,
        help="memory of its own for vLLM's KV, as 2GiB (what the replica's own KV has; of a clone "
        "what its image has)",
    )
    flag(
        "--vllm-args",
        metavar="NAME=VALUE",
        action="append",
        help="arguments of vLLM's EngineArgs, several apart by blanks; may be given again",
    )


def vllm_options(args: argparse.Namespace, spec: DecodeSpec) -> VllmOptions | None:
    """What the flags stand for; None where vLLM decodes nothing.

    Args:
        args: The command line.
        spec: Who decodes.

    Raises:
        RequestError: Flags do not go together, or there is no vLLM.
        PlatformError: There is no such interpreter.
    """
    if not spec.vllm:
        for name in ("vllm_python", "vllm_kv", "vllm_args"):
            # From the environment they may be meant for another command.
            if getattr(args, name) is not None and not _from_environment(name):
                raise RequestError(
                    "this is for a vLLM engine, and there is none",
                    where=f"--{name.replace('_', '-')}",
                    got="--decode without vllm",
                    hint="Say --decode vllm or --decode native,vllm, or leave it out.",
                )
        if args.bridge == "move" and not _from_environment("bridge"):
            raise RequestError(
                "nothing can move where there is no vLLM engine",
                where="--bridge",
                hint="Say --decode native,vllm, or leave it out.",
            )
        return None
    if spec.native is None and args.bridge == "move" and not _from_environment("bridge"):
        raise RequestError(
            "nothing can move where nobody decodes natively",
            where="--bridge",
            expected="--decode native,vllm",
            got="--decode vllm",
        )
    return VllmOptions(
        interpreter(args.vllm_python),
        spec.vllm_device,
        spec.native is None,
        args.bridge == "move",
        args.vllm_kv,
        engine_settings(args.vllm_args or ()),
    )


def _from_environment(name: str) -> bool:
    return "COLDFRAME_" + name.upper() in os.environ


def interpreter(wanted: str | None, where: str = "--decode") -> str:
    """The interpreter's path; that it has vLLM shows here only of this one.

    Args:
        wanted: What `--vllm-python` says.
        where: Who wants it, for the error.

    Raises:
        RequestError: None is named, and this one has no vLLM.
        PlatformError: There is no such interpreter.
    """
    if not wanted:
        if find_spec("vllm") is None:
            raise RequestError(
                "vLLM is wanted, and this Python has none",
                where=where,
                got=sys.executable,
                hint="Install it here (pip install 'coldframe[vllm]'), or name the Python that "
                "has it and coldframe with --vllm-python.",
            )
        return sys.executable
    # Not resolved: a virtual environment's interpreter is a link, and is known by its own name.
    path = os.path.abspath(os.path.expanduser(wanted))
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise PlatformError(
            "there is no such interpreter",
            where="--vllm-python",
            got=wanted,
            hint="Name the Python of an environment that has vLLM and coldframe.",
        )
    return path


def engine_settings(given: Iterable[str]) -> tuple[tuple[str, Any], ...]:
    """What `--vllm-args` stands for.

    Raises:
        RequestError: Something in it is no argument, or none that the user may set.
    """
    found: dict[str, Any] = {}
    for text in given:
        try:
            items = shlex.split(text)
        except ValueError as error:
            raise _bad_argument(text, str(error)) from error
        for item in items:
            name, equals, value = item.partition("=")
            name = name.removeprefix("--").replace("-", "_")
            if not equals or not _NAME.fullmatch(name):
                raise _bad_argument(item, "write NAME=VALUE")
            if name in _OURS:
                raise RequestError(
                    "this argument of vLLM's is set by the replica",
                    where="--vllm-args",
                    got=item,
                    hint=_OURS[name],
                )
            if name in found:
                raise _bad_argument(item, "it is given twice")
            found[name] = _value(value)
    return tuple(found.items())


def _value(text: str) -> Any:
    """A number, a truth value or any other JSON as such, and all else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _bad_argument(item: str, why: str) -> RequestError:
    return RequestError(
        "this is no argument for vLLM",
        where="--vllm-args",
        expected="NAME=VALUE",
        got=f"{item!r}: {why}",
    )
