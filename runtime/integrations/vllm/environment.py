"""Variables of a process with an engine of vLLM's in it, as all of ours have them.

Without torch and vLLM: whoever starts such a process sets them before it imports anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from coldframe.loader.errors import PlatformError
from coldframe.loader.process import make_run_dir, remove_run_dir

__all__ = [
    "ENGINE_ENVIRONMENT",
    "LEAN_ENVIRONMENT",
    "NOT_FOR_VLLM",
    "SAMPLER_ENVIRONMENT",
    "own_places",
    "places_in",
]

_MOST_FOLDER_BYTES = 107 - len("/") - 36
"""Of a folder with sockets of vLLM's in it, which are called by UUIDs, that the kernel takes."""

ENGINE_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        # One process: its core shares the weights' and the KV's addresses with whoever asks it, and
        # a second one would import everything again.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # A thread that asks subprocesses about the machine.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # All that it reads is there, and it is to ask nobody.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # What it says on the way is for those who look into it.
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
)
"""Of any of them; what its user has set goes first."""

SAMPLER_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        # The newer runner has another interface for logits processors.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        # `grammars` has a limit for expressions, too. Behind vLLM's own, threads go on that nobody
        # counts.
        "VLLM_REGEX_COMPILATION_TIMEOUT_S": "0",
    }
)
"""Where it draws with our sampler, whatever its user has set. An engine that is there does not
look at its variables any more, so it is set before."""

LEAN_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {**ENGINE_ENVIRONMENT, "VLLM_PLUGINS": "coldframe"}
)
"""Of one that is to start as soon as can be: of all plug-ins that are installed, ours alone."""

NOT_FOR_VLLM = (
    # What is set for our own workers' sake, and decides what vLLM finds and may compile.
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TORCH_DISABLE_NATIVE_JIT",
    # It would win over the size that it is given.
    "VLLM_CPU_KVCACHE_SPACE",
)
"""What an engine of a replica's does not get of its environment."""


def places_in(folder: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables by which what vLLM leaves behind lies in a folder, and goes with it.

    It makes a file for each process group (`vllm_dist_*`) and sockets where it is several
    processes, and removes neither where it is killed. What torch has compiled is no such thing: it
    is to be found again, and stays where torch keeps it.

    Args:
        folder: The folder.
        environment: What the process has otherwise.
    """
    cache = environment.get("TORCHINDUCTOR_CACHE_DIR") or _inductor_cache()
    return {
        "TMPDIR": folder,
        "VLLM_RPC_BASE_PATH": folder,
        "TORCHINDUCTOR_CACHE_DIR": cache,
    }


@contextmanager
def own_places(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The same for a folder of its own, while the context lasts; a replica has its own for that.

    Should nobody come to remove it, the next replica does.

    Args:
        environment: What the process has otherwise.

    Raises:
        PlatformError: There can be none, or its path is too long for vLLM's sockets.
    """
    path, lock = make_run_dir()
    try:
        length = len(os.fsencode(path))
        if length > _MOST_FOLDER_BYTES:
            raise PlatformError(
                "the folder's path is too long for sockets of vLLM's in it",
                where=path,
                expected=f"at most {_MOST_FOLDER_BYTES} bytes",
                got=f"{length} bytes",
                hint="Set COLDFRAME_RUN_DIR to a directory with a shorter path.",
            )
        yield places_in(path, environment)
    finally:
        remove_run_dir(path)
        os.close(lock)


def _inductor_cache() -> str:
    """Where torch keeps what it compiles unless it is told; it goes by the temporary directory."""
    import getpass  # not for the first instants of a replica
    import tempfile

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # one without a name
        user = f"uid_{os.getuid()}"
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")
