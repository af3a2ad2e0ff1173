"""The flags that say how many workers there are, where, and on which cores."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.flags.vllm import add_vllm_arguments, vllm_options
from coldframe.runtime.machine.device_choice import add_device_argument, choose_device
from coldframe.runtime.options import ReplicaOptions, ScalingOptions
from coldframe.runtime.replica.scale_spec import DecodeSpec, Scale

__all__ = ["add_worker_arguments", "worker_options"]

_COUNT = (
    "how many {} workers: so many, or as many between two numbers as there is work for; where, "
    "behind an @, as 1-4@cuda:0, also each role on a GPU of its own"
)
_DECODERS = "vllm|native,vllm|tcp://HOST:PORT|dns://NAME:PORT|file:///PATH"


def add_worker_arguments(parser: Parser) -> None:
    """The flags that say which workers there are to be."""
    add_device_argument(parser)
    flag = partial(parser.flag, group=parser.add_argument_group("workers"))
    flag(
        "--prefill",
        metavar="N|MIN-MAX",
        default="1",
        help=f"{_COUNT.format('prefill')} (1)",
    )
    flag(
        "--decode",
        metavar=f"N|MIN-MAX|{_DECODERS}",
        default="1",
        help=f"{_COUNT.format('decode')}; vllm has a vLLM engine decode, native,vllm once that is "
        "up; tcp://HOST:PORT a worker on another host, dns://NAME:PORT those at all addresses of a "
        "name, file:///PATH those of a file of HOST:PORT lines, as long as they are listed; beside "
        "others where commas are between them (1)",
    )
    flag(
        "--prefill-share",
        metavar="TOKENS",
        type=int,
        default=ScalingOptions().prefill_tokens,
        help="prompt tokens to compute that call for one prefill worker (4096)",
    )
    flag(
        "--decode-share",
        metavar="BLOCKS",
        type=int,
        default=ScalingOptions().decode_blocks,
        help="KV blocks of running requests that call for one decode worker (512)",
    )
    flag(
        "--scale-down",
        metavar="SECONDS",
        type=float,
        default=ScalingOptions().down_s,
        help="for how long fewer workers would have done before some go (60)",
    )
    flag(
        "--local-prefill",
        metavar="TOKENS",
        type=int,
        default=ReplicaOptions("").local_prefill,
        help="tokens of a prompt, behind what of it is in KV, up to which a decode worker computes "
        "them while the prefill workers are busy (64); 0 for none",
    )
    flag(
        "--graphs",
        choices=("auto", "off"),
        default="auto",
        help="decode steps captured on a GPU and replayed, on a CPU by the compiled code of an "
        "image (auto), or computed kernel by kernel",
    )
    flag(
        "--pin", action="store_true", help="one half of the cores for prefill, the other for decode"
    )
    flag("--threads", metavar="N", type=int, help="threads of each worker (the CPU quota)")
    flag(
        "--checkpoint",
        choices=("auto", "off"),
        default="auto",
        help="whether the workers' contexts leave a GPU while the model is parked: where the "
        "driver can do that, or never (auto)",
    )
    add_vllm_arguments(parser)


def worker_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ReplicaOptions` that the flags stand for.

    Raises:
        RequestError: A value says nothing that can be.
    """
    if args.threads is not None and args.threads < 1:
        raise RequestError(
            "there must be a thread",
            where="--threads",
            got=args.threads,
            hint="Ask for at least 1.",
        )
    if args.local_prefill < 0:
        raise RequestError(
            "this must be some amount, or none",
            where="--local-prefill",
            expected="at least 0",
            got=args.local_prefill,
        )
    prefill, decode = Scale.parse(args.prefill, "--prefill"), DecodeSpec.parse(args.decode)
    named = (prefill.device, decode.scale.device, decode.vllm_device)
    choice = choose_device(args.device, named)
    return {
        "prefill": prefill,
        "decode": decode.scale,
        "remotes": decode.remotes,
        "remotes_from": decode.listed,
        "vllm": vllm_options(args, decode),
        "device": choice.device,
        "device_why": choice.why,
        "fall_back": choice.fall_back,
        "scaling": _scaling_options(args),
        "local_prefill": args.local_prefill,
        "graphs": args.graphs == "auto",
        "pin": args.pin,
        "threads": args.threads,
        "checkpoint": args.checkpoint,
    }


def _scaling_options(args: argparse.Namespace) -> ScalingOptions:
    for name in ("prefill_share", "decode_share", "scale_down"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise RequestError(
                "this must be some amount",
                where=f"--{name.replace('_', '-')}",
                expected="more than 0",
                got=value,
            )
    return ScalingOptions(args.prefill_share, args.decode_share, args.scale_down)
