"""Commands of the pages that are not run here: which test runs them, or what they need.

Each reason is checked: a test that is named exists and names the command, a lane is one that
continuous integration runs, and a program that is not ours is one that nothing here installs.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Protocol

from tests.docs.commands import ROOT, Line

__all__ = ["EXAMPLES", "REASONS", "SENTENCES", "Reason", "Tested", "reason_for"]


class Reason(Protocol):
    """Why a command is not run here."""

    def problem(self, line: Line) -> str | None:
        """What is wrong with the reason, for this line; None where it holds."""


@dataclass(frozen=True)
class Tested:
    """A test runs it, with other arguments.

    Args:
        file: The test's, from the repository's root.
        test: Its name.
        words: What the file must say, to be about this command.
    """

    file: str
    test: str
    words: tuple[str, ...]

    def problem(self, line: Line) -> str | None:
        path = ROOT / self.file
        if not path.exists():
            return f"there is no {self.file}"
        text = path.read_text()
        tree = ast.parse(text)
        names = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        if self.test not in names:
            return f"there is no {self.test} in {self.file}"
        missing = [word for word in self.words if word not in text]
        return f"{self.file} does not say {missing}" if missing else None


@dataclass(frozen=True)
class Lane:
    """Continuous integration runs it itself, or a target that needs it.

    Args:
        target: Of the Makefile, as `.ci/run` calls it.
    """

    target: str

    def problem(self, line: Line) -> str | None:
        if f"make {self.target}\n" not in (ROOT / ".ci" / "run").read_text():
            return f".ci/run does not make {self.target}"
        wanted = line.text.removeprefix("make ").split()[0]
        if wanted == self.target:
            return None
        return None if wanted in _needed(self.target) else f"{self.target} needs no {wanted}"


def _needed(target: str) -> set[str]:
    """What the Makefile makes before a target, and before that."""
    found: set[str] = set()
    left = [target]
    while left:
        rule = rf"^{re.escape(left.pop())}:(.*)$"
        line = re.search(rule, (ROOT / "Makefile").read_text(), re.MULTILINE)
        more = set(line[1].split()) - found if line else set()
        found |= more
        left += more
    return found


@dataclass(frozen=True)
class Recipe:
    """Its recipe is of commands that are tested: what it runs is looked at, and not run.

    Args:
        target: Of the Makefile.
        says: What its recipe must contain.
        like: How that is tested.
    """

    target: str
    says: str
    like: Reason

    def problem(self, line: Line) -> str | None:
        found = re.search(
            rf"^{self.target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE
        )
        if found is None or self.says not in found[1]:
            return f"make {self.target} does not say {self.says!r}"
        lane = self.like if isinstance(self.like, Lane) else None
        return self.like.problem(line if lane is None else Line(f"make {lane.target}"))


@dataclass(frozen=True)
class Foreign:
    """It is a program of others for a service of others, that nothing of ours installs.

    Args:
        program: Its name.
        why: What it needs besides.
    """

    program: str
    why: str

    def problem(self, line: Line) -> str | None:
        if line.program != self.program:
            return f"it runs {line.program}, not {self.program}"
        system = re.search(
            r"^system:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE
        )
        assert system is not None
        # What is installed for the tests could be run here.
        if re.search(rf"(?<![\w-]){self.program}(?![\w-])", system[1]):
            return f"{self.program} is installed for the tests"
        return None if self.why else "what else does it need?"


@dataclass(frozen=True)
class Unbuilt:
    """An image that nothing builds here; its Dockerfile is held against rules, step by step.

    Args:
        kind: As `images/build.sh` has it.
        why: What building it takes.
    """

    kind: str
    why: str

    def problem(self, line: Line) -> str | None:
        if line.text.split()[:2] != ["images/build.sh", self.kind]:
            return f"it does not build {self.kind}"
        if not (ROOT / "images" / f"{self.kind}.Dockerfile").exists():
            return f"there is no images/{self.kind}.Dockerfile"
        folder = ROOT / "tests" / "images"
        checked = re.search(r"^SERVING = .*$", (folder / "test_dockerfiles.py").read_text(), re.M)
        if checked is None or f'"{self.kind}"' not in checked[0]:
            return f"no test looks at images/{self.kind}.Dockerfile"
        if f'_build("{self.kind}"' in (folder / "building.py").read_text():
            return f"a test builds {self.kind}: name it"
        return None if self.why else "what does it take?"


def _bench(file: str, test: str, name: str) -> Tested:
    return Tested(f"tests/benchmarks/{file}", test, (f'"bench", "{name}"',))


_WHOLE = "test_the_benchmark_runs_and_ends_in_one_document"
_SPINE = _bench("test_spine.py", _WHOLE, "spine")
_DYNAMO = "tests/runtime/integrations/dynamo"
_VLLM = "tests/runtime/integrations/vllm"
_GPU = Tested(
    "tests/benchmarks/test_gpu_budget.py",
    "test_without_a_gpu_it_says_so_and_writes_nothing",
    ("coldframe.benchmarks.gpu",),
)

REASONS: list[tuple[str, Reason]] = [
    # Targets.
    (r"make (setup|lint)$", Lane("lint")),
    (r"make criu$", Lane("criu")),
    (r"make test$", Lane("test")),
    (r"make test-heavy$", Lane("test-heavy")),
    (r"make test-vllm$", Lane("test-vllm")),
    (r"make test-images$", Lane("test-images")),
    (r"make test-dynamo$", Lane("test-dynamo")),
    (r"make docs$", Lane("docs")),
    (r"make format$", Recipe("format", "ruff format .", Lane("lint"))),
    (
        r"make docs-pictures$",
        Recipe(
            "docs-pictures",
            "docs/pictures.py build/cold.json",
            Tested("tests/docs/test_pictures.py", "test_pictures_stand_alone", ("docs.pictures",)),
        ),
    ),
    (r"make bench$", Recipe("bench", "coldframe bench spine", _SPINE)),
    (r"make gpu( ARGS=.*)?$", Recipe("gpu", "-m coldframe.benchmarks.gpu $(ARGS)", _GPU)),
    # Benchmarks: with less to do, in tests of their own.
    (r"coldframe bench batching ", _bench("test_batching.py", _WHOLE, "batching")),
    (
        r"coldframe bench cold ",
        Tested(
            "tests/benchmarks/cold/test_cold_command.py",
            "test_a_wide_matrix_and_then_against_itself",
            ('"bench", "cold"', "--baseline", "--output"),
        ),
    ),
    (r"coldframe bench endpoint ", _bench("test_endpoint.py", _WHOLE, "endpoint")),
    (r"coldframe bench gpu", _GPU),
    (r"coldframe bench handoff ", _bench("test_handoff_bench.py", _WHOLE, "handoff")),
    (r"coldframe bench interference ", _bench("test_interference.py", _WHOLE, "interference")),
    (
        r"coldframe bench kills ",
        _bench("test_kills.py", "test_arrivals_are_answered_while_processes_are_killed", "kills"),
    ),
    (
        r"coldframe bench load ",
        _bench("test_load.py", "test_the_benchmark_leaves_out_what_is_not_installed", "load"),
    ),
    (r"coldframe bench prefix ", _bench("test_prefix_bench.py", _WHOLE, "prefix")),
    (
        r"coldframe bench replay ",
        _bench("traffic/test_replay.py", "test_a_simulation_is_as_the_replay", "replay"),
    ),
    (
        r"coldframe bench report ",
        _bench(
            "report/test_report_command.py",
            "test_the_command_writes_what_it_is_asked_for",
            "report",
        ),
    ),
    (r"coldframe bench rest ", _bench("test_rest.py", _WHOLE, "rest")),
    (
        r"coldframe bench serve ",
        _bench(
            "traffic/test_serve_bench.py", "test_rates_are_offered_to_each_way_in_turn", "serve"
        ),
    ),
    (r"coldframe bench spine ", _SPINE),
    (r"coldframe bench swap ", _bench("test_swap.py", _WHOLE, "swap")),
    (r"coldframe bench turns ", _bench("test_turns.py", _WHOLE, "turns")),
    # With vLLM, in its environment.
    (
        r"vllm serve MODEL --load-format coldframe$",
        Tested(
            f"{_VLLM}/test_real_serve.py",
            "test_the_command_with_weights_from_a_web_server",
            ("vllm_servers",),
        ),
    ),
    (
        r"vllm serve .*\"source\": \"s3://bucket/model\"",
        Tested(f"{_VLLM}/test_real_serve.py", "test_weights_from_elsewhere", ("s3://",)),
    ),
    (
        r"vllm serve .*\"memory_service\"",
        Tested(
            f"{_VLLM}/test_real_serve.py",
            "test_the_command_beside_a_replica_that_has_the_weights",
            ("memory_service",),
        ),
    ),
    (
        r"coldframe serve .*--decode native,vllm",
        Tested(
            f"{_VLLM}/test_real_bridge_served.py",
            "test_a_server_whose_decode_is_taken_over",
            ("--decode", "native,vllm"),
        ),
    ),
    (
        r"coldframe snapshot create .*--engine vllm",
        Tested(
            f"{_VLLM}/test_real_frozen.py",
            "test_a_clone_answers_as_a_fresh_engine_with_the_weights_that_it_is_given",
            ("--engine",),
        ),
    ),
    # Behind Dynamo and between hosts, in lanes of their own.
    (
        r"coldframe worker .*--peers-from dynamo",
        Tested(
            f"{_DYNAMO}/test_peers.py",
            "test_workers_feed_one_another",
            ("--serve-peers", "--peers-from", "PATIENCE"),
        ),
    ),
    (r"make build/dynamo/\.ready$", Lane("test-dynamo")),
    (
        r"build/dynamo/bin/python -m dynamo\.frontend ",
        Tested(
            f"{_DYNAMO}/cluster.py",
            "cluster",
            ('"dynamo.frontend"', '"--http-port"', '"--router-mode", "kv"', '"--migration-limit"'),
        ),
    ),
    (
        r"(build/dynamo/bin/)?coldframe bench dynamo ",
        Tested(
            "tests/benchmarks/test_dynamo_benchmark.py",
            _WHOLE,
            ('"bench", "dynamo"', "mark.dynamo"),
        ),
    ),
    (
        r"coldframe worker --dynamo --role prefill --kv-listen ",
        Tested(
            f"{_DYNAMO}/test_kv.py",
            "test_a_ticket_is_taken_and_one_whose_sender_is_gone_is_not_needed",
            ('"--kv-listen"', "front.worker(model, *WAY, role=role", "mark.dynamo"),
        ),
    ),
    (
        r"coldframe worker --dynamo --role (prefill|decode) ",
        Tested(
            f"{_DYNAMO}/conftest.py",
            "pair",
            ("front.worker(model, role=role)", '("prefill", "decode")'),
        ),
    ),
    (
        r"(coldframe worker (.* )?--dynamo |curl localhost:8123/v1/completions )",
        Tested(
            f"{_DYNAMO}/test_aggregated.py",
            "test_a_completion_is_that_of_our_gateway",
            ("front.worker(model)", 'front.post("/v1/completions"', "mark.dynamo"),
        ),
    ),
    (
        r"coldframe (worker --role decode --listen |serve MODEL --decode tcp://)",
        Tested(
            "tests/runtime/transport/test_remote.py",
            "test_another_host_decodes",
            ("--listen", "tcp://"),
        ),
    ),
    (
        r"coldframe serve MODEL --decode (dns|file)://",
        Tested(
            "tests/runtime/transport/test_listed.py",
            "test_the_command_finds_them_too",
            ("--decode", "dns://", "file://"),
        ),
    ),
    (
        r"images/build\.sh cpu\b",
        Tested("tests/images/test_image.py", "test_it_is_within_its_budget", ('"cpu"',)),
    ),
    (
        r"BUILDER_FLAGS=--target=torch images/build\.sh cpu |images/build\.sh compiler\b",
        Tested(
            "tests/images/test_snapshots.py",
            "test_steps_that_a_compiler_beside_the_image_made_are_used_in_it",
            ("builder.compiler()",),
        ),
    ),
    (
        r"images/build\.sh dynamo\b",
        Tested("tests/images/test_dynamo_image.py", "test_it_is_within_its_budget", ('"dynamo"',)),
    ),
    (r"images/build\.sh cuda\b", Unbuilt("cuda", "gigabytes of CUDA's libraries, for a GPU")),
    (r"images/build\.sh vllm\b", Unbuilt("vllm", "the same, and vLLM")),
    (
        r"kubectl ",
        Tested(
            "tests/docs/test_kubectl.py",
            "test_secrets_are_those_that_pods_ask_for",
            ('line.program == "kubectl"', "applied(block)"),
        ),
    ),
    (
        r"docker (run|build) .*coldframe:cpu",
        Tested(
            "tests/images/test_guide.py",
            "test_what_docker_is_told_to_do_is_done",
            ('line.program == "docker"',),
        ),
    ),
    (
        r"coldframe bench peers ",
        _bench(
            "test_fan_out.py", "test_the_last_of_several_is_ready_little_after_one_alone", "peers"
        ),
    ),
]
"""Lines, as regular expressions of their beginnings, and why they are not run; the first counts."""


SENTENCES: dict[str, Reason] = {
    "bench graphs": Tested(
        "tests/benchmarks/test_graph_archive.py",
        "test_every_figure_is_taken",
        ("benchmarks.graph_archive import run",),
    ),
    **{
        f"bench vllm-{name}": Tested(
            "tests/benchmarks/test_vllm_benchmarks.py", test, (f'"vllm-{name}"',)
        )
        for name, test in {
            "bridge": "test_a_bridge",
            "gated": "test_gates",
            "handoff": "test_a_handoff",
            "load": "test_a_load",
        }.items()
    },
    "snapshot template": Tested(
        "tests/runtime/planning/test_tiers_rehearsed.py",
        "test_a_template_that_is_resident_is_rehearsed",
        ('"snapshot", "template"',),
    ),
    "images/base.sh": Tested("tests/images/building.py", "base", ('"base.sh"',)),
    "images/check_budget.py": Tested(
        "tests/images/test_image.py", "test_it_is_within_its_budget", ('*CHECK, "cpu"',)
    ),
}
"""Commands of ours that pages name in sentences, and in no block of commands."""

EXAMPLES: dict[str, Reason] = {
    "docs/serving.md python": Tested(
        "tests/runtime/commands/test_serving_doc.py", "test_the_example", ("serving.md",)
    ),
    "docs/vllm.md python": Tested(
        f"{_VLLM}/test_real_doc.py", "test_the_connectors_settings", ("vllm.md",)
    ),
    "docs/kubernetes.md yaml": Tested(
        "tests/images/test_k8s_schemas.py", "test_the_guides_own_overlay_is_one", ("kubernetes.md",)
    ),
    "docs/kubernetes.md yaml 2": Tested(
        "tests/images/test_k8s_metrics.py",
        "test_the_guides_adapter_brings_each_of_them",
        ("kubernetes.md",),
    ),
}
"""Blocks of other languages than the shell's, by page, and which there: tests read them."""


FOREIGN: dict[str, Reason] = {
    program: Foreign(program, why)
    for program, why in {
        "aws": "an account",
        "docker": "an engine",
        "gcloud": "an account",
        "helm": "a cluster",
        "podman": "an engine",
    }.items()
}
"""Programs for what tests have none of, whatever they are told to do."""


def reason_for(line: Line) -> Reason | None:
    """Why a line is not run here; None for those that are."""
    for pattern, reason in REASONS:
        if re.match(pattern, line.text):
            return reason
    return FOREIGN.get(line.program)
