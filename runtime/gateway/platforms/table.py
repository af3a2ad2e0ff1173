"""The platforms' contracts as data: one row each, and the signs that a row is known by.

A row says what differs, `Profile` what a field means. All of them bind early: a request that
comes while the replica is cold waits in the gateway, so a bound port may count as ready. What no
source of the platform's own confirms is named in the row, and in docs/platforms.md.
"""

from __future__ import annotations

from os.path import isdir

from coldframe.runtime.gateway.platforms.profile import Profile, Route

TYPE_CHECKING = False  # `typing` itself is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["COMMON", "PROFILES", "SIGNS", "Profile", "by_name", "detect"]

_MB = 1_000_000
_MIB = 1 << 20

COMMON = (Route("POST", "/invoke", "predict", "invoke"),)
"""Translated routes that every profile has, where it has no other at that path."""

_V2 = "/v2/models/{model}"
_VERSION = _V2 + "/versions/{version}"

PROFILES = (
    Profile(
        "generic",
        why="Nothing probes; `docker stop` kills after 10 s.",
        port=8000,
        drain_s=9,
    ),
    Profile(
        "kubernetes",
        why="Probes ask /healthz and /readyz; a slow load must not look dead, so the port is "
        "bound before it. The grace period is 30 s where the pod says no other.",
        port=8000,
    ),
    Profile(
        "knative",
        why="The default probe is a TCP connection: a bound port counts as ready, and what is "
        "routed here then is held. queue-proxy ends a request after the revision's "
        "timeoutSeconds, 300 where it says no other.",
        request_s=300,
        unconfirmed="the grace period",
    ),
    Profile(
        "cloud-run",
        why="The default startup probe is a TCP connection, as Knative's. An HTTP probe passes "
        "on 200 to 399, so 204 would count as ready: loading is 503. SIGKILL follows SIGTERM "
        "after 10 s.",
        drain_s=9,
        max_body=32 * _MIB,
        request_s=300,
        unconfirmed="the limit of a body, 32 MiB in HTTP/1",
    ),
    Profile(
        "sagemaker",
        why="/ping must be answered within 2 s from the start on, connections within 250 ms; "
        "anything but 200 is not ready yet. SIGKILL follows SIGTERM after 30 s.",
        ports=("SAGEMAKER_BIND_TO_PORT",),
        models=("HF_MODEL_ID",),
        model_path="/opt/ml/model",
        max_body=25 * _MB,
        request_s=60,
        routes=(
            Route("GET", "/ping", "health"),
            Route("POST", "/invocations", "predict", "sagemaker"),
        ),
        errors="sagemaker",
        unconfirmed="the limit of a body (25 MB; it was 6 MB), and that SAGEMAKER_BIND_TO_PORT "
        "is always set",
    ),
    Profile(
        "vertex",
        why="The liveness probe is a TCP connection: after 4 failures 10 s apart the container "
        "starts over, so nothing may be loaded before the port is bound.",
        ports=("AIP_HTTP_PORT",),
        models=("AIP_STORAGE_URI",),
        max_body=10 * _MB,
        request_s=3600,
        routes=(
            Route("GET", "/health", "health", variable="AIP_HEALTH_ROUTE"),
            Route("POST", "/predict", "predict", "vertex", variable="AIP_PREDICT_ROUTE"),
        ),
        errors="vertex",
        unconfirmed="the grace period; 1.5 MB as the limit of a shared endpoint",
    ),
    Profile(
        "runpod",
        why="/ping: 200 is healthy, 204 initialising, anything else unhealthy; what it calls a "
        "cold start is the first 204 to the first 200, so the port is bound at once. Requests "
        "break off after 5.5 min.",
        port=80,
        health_port="PORT_HEALTH",
        models=("MODEL_NAME",),
        names=("OPENAI_SERVED_MODEL_NAME_OVERRIDE",),
        max_body=30 * _MB,
        request_s=330,
        routes=(Route("GET", "/ping", "health", variable="HEALTH_CHECK_PATH", loading=204),),
        unconfirmed="the grace period; that RUNPOD_POD_ID is set in load-balanced workers",
    ),
    Profile(
        "runpod-queue",
        why="Jobs are fetched, nothing comes in: the gateway listens on the loopback for the "
        "job handler (integrations/runpod.py) alone.",
        host="127.0.0.1",
        ports=(),
        port=0,
        models=("MODEL_NAME",),
        names=("OPENAI_SERVED_MODEL_NAME_OVERRIDE",),
        unconfirmed="the grace period",
    ),
    Profile(
        "kserve",
        why="Readiness is /v2/health/ready; liveness probes have killed slow loads, so "
        "/v2/health/live answers from the first moment.",
        models=("STORAGE_URI",),
        model_path="/mnt/models",
        routes=(
            Route("GET", "/v2", "v2-server"),
            Route("GET", "/v2/health/live", "v2-live"),
            Route("GET", "/v2/health/ready", "v2-ready"),
            Route("GET", _V2, "v2-model"),
            Route("GET", _V2 + "/ready", "v2-model-ready"),
            Route("POST", _V2 + "/infer", "predict", "kserve"),
            Route("GET", _VERSION, "v2-model"),
            Route("GET", _VERSION + "/ready", "v2-model-ready"),
            Route("POST", _VERSION + "/infer", "predict", "kserve"),
        ),
        errors="kserve",
        aliases=(("--http_port", "port"), ("--model_dir", "model"), ("--model_name", "name")),
    ),
    Profile(
        "huggingface",
        why="/health decides over traffic; the model is mounted, never downloaded.",
        port=80,
        model_path="/repository",
        routes=(
            Route("GET", "/health", "health"),
            Route("POST", "/", "predict", "huggingface"),
        ),
        errors="huggingface",
        unconfirmed="the port, which the endpoint's settings choose; the grace period",
    ),
    Profile(
        "azureml",
        why="Port and routes are those of the deployment's YAML: liveness /healthz, readiness "
        "/readyz, scoring /score.",
        port=5001,
        models=("AZUREML_MODEL_DIR",),
        max_body=10 * _MB,
        request_s=180,
        routes=(Route("POST", "/score", "predict", "invoke"),),
        errors="invoke",
        unconfirmed="that AZUREML_MODEL_DIR is set in custom containers too; the limits; the "
        "grace period",
    ),
    Profile(
        "cog",
        why="/health-check is 200 from the first moment, and says STARTING or READY in its body.",
        port=5000,
        drain_s=9,
        routes=(
            Route("GET", "/health-check", "cog-health"),
            Route("POST", "/predictions", "predict", "cog"),
            Route("PUT", "/predictions/{prediction_id}", "predict", "cog"),
        ),
        errors="cog",
        unconfirmed="the grace period",
    ),
    Profile(
        "baseten",
        why="Readiness and liveness endpoints, the predict endpoint and the port are those of "
        "config.yaml; 8080 is taken by its own proxy.",
        ports=(),
        port=8000,
        routes=(
            Route("GET", "/health", "health"),
            Route("POST", "/predict", "predict", "invoke"),
        ),
        errors="invoke",
        unconfirmed="the grace period",
    ),
)

SIGNS = (
    ("vertex", ("AIP_HTTP_PORT",)),
    ("sagemaker", ("SAGEMAKER_BIND_TO_PORT",)),
    ("azureml", ("AZUREML_MODEL_DIR",)),
    # Queue workers have a pod id too, and an image may set PORT by itself.
    ("runpod", ("RUNPOD_POD_ID", "PORT_HEALTH")),
    ("runpod-queue", ("RUNPOD_WEBHOOK_GET_JOB",)),
    ("runpod", ("RUNPOD_POD_ID", "PORT")),
    # KServe may run on Knative, and Knative runs on Kubernetes: the outermost contract comes first.
    ("kserve", ("STORAGE_URI", "KUBERNETES_SERVICE_HOST")),
    ("kserve", ("/mnt/models", "KUBERNETES_SERVICE_HOST")),
    # Cloud Run speaks Knative's contract, but there is no cluster around it.
    ("knative", ("K_SERVICE", "KUBERNETES_SERVICE_HOST")),
    ("cloud-run", ("K_SERVICE",)),
    # These two set no variable that is documented; what they mount is.
    ("huggingface", ("/repository",)),
    ("sagemaker", ("/opt/ml/model",)),
    ("kubernetes", ("KUBERNETES_SERVICE_HOST",)),
)
"""Profiles, and what must all be there: variables that are set, folders where it begins with /.

The first that holds decides. Cog and Baseten leave no sign, they are told with `--platform`.
"""


def detect(
    environ: Mapping[str, str],
    arguments: Sequence[str] = (),
    is_folder: Callable[[str], bool] = isdir,
) -> Profile:
    """The platform that this process runs on, as far as its surroundings say.

    Args:
        environ: The environment.
        arguments: The command line; a flag that only one platform knows gives it away.
        is_folder: Whether there is a folder at a path.
    """
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    for profile in PROFILES:
        for flag, _ in profile.aliases:
            if flag in flags:
                return profile
    for name, signs in SIGNS:
        for sign in signs:
            if not (is_folder(sign) if sign.startswith("/") else environ.get(sign)):
                break
        else:
            return by_name(name)
    return PROFILES[0]


def by_name(name: str) -> Profile:
    """The profile of that name.

    Raises:
        PlatformError: There is none.
    """
    for profile in PROFILES:
        if profile.name == name:
            return profile
    from coldframe.loader.errors import PlatformError

    known = ", ".join(profile.name for profile in PROFILES)
    raise PlatformError(
        "there is no such platform", where=repr(name), expected=known, hint="Take one of those."
    )
