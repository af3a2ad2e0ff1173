from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coldframe.loader.errors import ColdframeError, DeviceError, PlatformError, RequestError
from coldframe.runtime.commands.run import add_replica_arguments, for_one_answer, replica_options
from coldframe.runtime.flags import vllm as vllm_options
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.integrations.vllm.params import ENGINE
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.scale_spec import DecodeSpec, Scale

THERE = ("--vllm-python", sys.executable)


@pytest.fixture(autouse=True)
def _nobody_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDFRAME_DEVICE")


def options(*arguments: str) -> ReplicaOptions:
    parser = Parser()
    add_replica_arguments(parser)
    args = parser.parse(arguments)
    args.model = "m"
    return replica_options(args)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("2", DecodeSpec(Scale(2, 2))),
        ("1-4@cuda:1", DecodeSpec(Scale(1, 4, "cuda:1"))),
        ("native", DecodeSpec(Scale(1, 1))),
        ("vllm", DecodeSpec(None, True)),
        ("vllm@cuda", DecodeSpec(None, True, "cuda:0")),
        ("native,vllm", DecodeSpec(Scale(1, 1), True)),
        (" 1-4 , vllm@cpu ", DecodeSpec(Scale(1, 4), True, "cpu")),
        ("vllm,2@cpu", DecodeSpec(Scale(2, 2, "cpu"), True)),
    ],
)
def test_who_decodes(text: str, spec: DecodeSpec) -> None:
    assert DecodeSpec.parse(text) == spec


@pytest.mark.parametrize(
    "text",
    [
        "vllm,vllm",
        "native,2",
        "native,",
        ",vllm",
        "vllm@",
        "vllm@gpu",
        "vllm2",
        "native@cpu",
        "1,2",
    ],
)
def test_who_does_not(text: str) -> None:
    with pytest.raises(RequestError) as raised:
        DecodeSpec.parse(text)
    assert raised.value.where == "--decode"


def test_what_is_said_of_an_engine() -> None:
    assert options().vllm is None
    found = options(
        *("--device", "cuda:0", "--decode", "1-2,vllm@cuda:1", "--bridge", "move", *THERE),
        *("--vllm-kv", "2GiB", "--vllm-args", "max_num_seqs=16 enforce-eager=true"),
        *("--vllm-args", """compilation_config='{"level": 0}' --quantization=fp8"""),
    )
    vllm = found.vllm
    assert vllm is not None
    assert (vllm.alone, vllm.move, vllm.kv_bytes) == (False, True, 2 << 30)
    assert vllm.python == sys.executable
    assert dict(vllm.args) == {
        "max_num_seqs": 16,
        "enforce_eager": True,
        "compilation_config": {"level": 0},
        "quantization": "fp8",
    }
    assert found.scales == {
        "prefill": Scale(1, 1),
        "decode": Scale(1, 2),
        "vllm": Scale(1, 1, "cuda:1"),
    }
    assert found.devices == ("cuda:0", "cuda:1")
    assert found.layout_to_load == "aligned"
    cpu = found.on_cpu("no driver")
    assert cpu.devices == ("cpu",)
    assert cpu.vllm is not None
    # What was said of the GPU's memory and kernels is gone with it.
    assert cpu.vllm.kv_bytes is None
    assert dict(cpu.vllm.args) == {"max_num_seqs": 16, "quantization": "fp8"}
    assert cpu.vllm.move
    alone = options("--decode", "vllm", *THERE)
    assert alone.vllm is not None
    assert alone.vllm.alone
    assert alone.scales["decode"] == Scale(0, 0)


def test_the_environment_may_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("COLDFRAME_VLLM_ARGS", "max_num_seqs=4")
    assert options().vllm is None  # they are for whoever has an engine
    monkeypatch.setenv("COLDFRAME_DECODE", "native,vllm")
    found = options()
    assert found.vllm is not None
    assert (found.vllm.python, found.vllm.args) == (sys.executable, (("max_num_seqs", 4),))


def test_one_answer_has_no_engine_beside_it_unless_the_command_line_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = "native,vllm"
    asked = options("--decode", both, *THERE)
    assert for_one_answer(asked, both) is asked
    monkeypatch.setenv("COLDFRAME_DECODE", both)
    found = for_one_answer(options(*THERE), both)
    assert found.vllm is None
    assert found.scales["decode"] == Scale(1, 1)
    alone = options("--decode", "vllm", *THERE)
    assert for_one_answer(alone, "vllm") is alone
    monkeypatch.setenv("COLDFRAME_DECODE", "vllm")
    assert for_one_answer(alone, "vllm") is alone


@pytest.mark.parametrize(
    ("arguments", "kind", "where"),
    [
        (("--vllm-kv", "1GiB"), RequestError, "--vllm-kv"),
        (THERE, RequestError, "--vllm-python"),
        (("--vllm-args", "a=1"), RequestError, "--vllm-args"),
        (("--bridge", "move"), RequestError, "--bridge"),
        (("--decode", "vllm", "--bridge", "move", *THERE), RequestError, "--bridge"),
        (("--decode", "vllm", "--realign", *THERE), RequestError, "--realign"),
        (("--decode", "vllm", "--vllm-python", "/no/python"), PlatformError, "--vllm-python"),
        (("--decode", "vllm@cuda:0", "--device", "cpu", *THERE), DeviceError, None),
        *(
            (("--decode", "vllm", "--vllm-args", argument, *THERE), RequestError, "--vllm-args")
            for argument in (
                *("model=m", "load-format=auto", "kv_cache_memory_bytes=1", "a", "=1", "A=1"),
                *("a=1 a=2", "a='1", "logits_processors=x", "pipeline_parallel_size=2"),
                *("tensor-parallel-size=2", "dtype=float16", "worker_cls=x.Y"),
                *("distributed_executor_backend=mp", "speculative_config={}"),
            )
        ),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[str, ...], kind: type[ColdframeError], where: str | None
) -> None:
    with pytest.raises(kind) as raised:
        options(*arguments)
    assert where is None or raised.value.where == where


def test_what_the_engine_is_started_with_is_never_overwritten_in_silence() -> None:
    for name in ENGINE:
        with pytest.raises(RequestError) as raised:
            options("--decode", "vllm", "--vllm-args", f"{name}=1", *THERE)
        assert raised.value.hint


def test_no_process_imports_flags_for_what_a_replica_is() -> None:
    """Each worker imports it, before its first token."""
    code = (
        "import sys; import coldframe.runtime.options, coldframe.runtime.replica.scale_spec; "
        "print(sorted({'argparse', 'shlex', 'coldframe.runtime.flags.parser'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"


def test_this_python_has_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_options, "find_spec", lambda _: None)
    with pytest.raises(RequestError, match="has none") as raised:
        options("--decode", "native,vllm")
    assert "--vllm-python" in str(raised.value.hint)


def test_an_interpreter_is_known_by_its_own_name(tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    found = options("--decode", "vllm", "--vllm-python", str(link)).vllm
    assert found is not None
    assert found.python == str(link)
