"""What pods of images/k8s may, who reaches them, and when they are killed."""

from __future__ import annotations

from typing import Any

import pytest

from coldframe.snapshot import identity, linux
from tests.images.k8s import (
    COMBINED,
    OVERLAYS,
    Document,
    Pod,
    built,
    is_privileged,
    one,
    ours,
    pods,
)

SETS = [*((name,) for name in OVERLAYS), *COMBINED]
RESTRICTED = [names for names in SETS if not is_privileged(names)]
PRIVILEGED = [names for names in SETS if is_privileged(names)]

_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def label(names: tuple[str, ...]) -> str:
    return "+".join(name.removeprefix("components/") for name in names)


def beyond_restricted(pod: Pod) -> list[str]:
    """What the Pod Security Standard "restricted" (v1.36) forbids of a pod, each by its control."""
    spec, around = pod.spec, pod.spec.get("securityContext", {})
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    if around.get("sysctls"):
        found.append("sysctls")
    for volume in spec.get("volumes", ()):
        if not set(volume) - {"name"} <= _VOLUMES:
            found.append(f"volume {volume['name']}")
    for container in pod.containers:
        inside = container.get("securityContext", {})
        both = {**around, **inside}
        capabilities = inside.get("capabilities", {})
        rules = {
            "privileged": not inside.get("privileged"),
            "allowPrivilegeEscalation": inside.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": both.get("runAsNonRoot") is True,
            "runAsUser": both.get("runAsUser") != 0,
            "seccompProfile": both.get("seccompProfile", {}).get("type")
            in ("RuntimeDefault", "Localhost"),
            "capabilities.drop": "ALL" in capabilities.get("drop", ()),
            "capabilities.add": set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"},
            "procMount": inside.get("procMount", "Default") == "Default",
            "appArmorProfile": both.get("appArmorProfile", {}).get("type", "RuntimeDefault")
            in ("RuntimeDefault", "Localhost"),
            "seLinuxOptions": "seLinuxOptions" not in both,
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", ())),
        }
        found += [name for name, kept in rules.items() if not kept]
    return found


@pytest.mark.parametrize("names", RESTRICTED, ids=label)
def test_without_snapshots_pods_are_restricted(names: tuple[str, ...]) -> None:
    found = list(pods(built(*names)))
    assert found
    for pod in found:
        assert beyond_restricted(pod) == [], pod.name
        for container in ours(pod):
            # Beyond the standard: what is written is on a volume.
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_restricted_is_asked_for_rule_by_rule() -> None:
    pod = next(pods(built("deployment")))
    spec: dict[str, Any] = {
        "hostPID": True,
        "securityContext": {"sysctls": [{"name": "a", "value": "b"}]},
        "volumes": [{"name": "all", "hostPath": {"path": "/"}}],
        "containers": [
            {
                "ports": [{"containerPort": 1, "hostPort": 1}],
                "securityContext": {
                    "privileged": True,
                    "procMount": "Unmasked",
                    "runAsUser": 0,
                    "appArmorProfile": {"type": "Unconfined"},
                    "seLinuxOptions": {"type": "spc_t"},
                    "capabilities": {"add": ["SYS_ADMIN"]},
                },
            }
        ],
    }
    broken = Pod(pod.name, pod.kind, pod.labels, spec)
    assert len(beyond_restricted(broken)) == 14


@pytest.mark.parametrize("names", PRIVILEGED, ids=label)
def test_with_snapshots_they_may_what_our_code_asks_for_and_no_more(names: tuple[str, ...]) -> None:
    # CRIU restores; workers become another user; a freeze, and a GPU's contexts.
    needed = {*linux._NEEDED, *identity._NEEDED, "CAP_SYS_PTRACE"}
    in_user_namespace = "components/user-namespace" in names
    read_only = "components/snapshots-read-only" in names
    for pod in pods(built(*names)):
        allowed = {"runAsNonRoot", "runAsUser", "allowPrivilegeEscalation", "capabilities.add"}
        if not (read_only and pod.kind != "Service"):
            allowed |= {"seccompProfile"}  # no process under a filter can be frozen
        if pod.kind != "Service":
            allowed |= {"appArmorProfile"}
            if in_user_namespace:
                allowed |= {"procMount"}
        assert set(beyond_restricted(pod)) == allowed
        for container in pod.containers:
            context = container["securityContext"]
            added = {f"CAP_{name}" for name in context["capabilities"]["add"]}
            # Knative's has no patch that takes it away.
            used_alone = read_only and pod.kind != "Service"
            assert added == needed - ({"CAP_SYS_PTRACE"} if used_alone else set())
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == "snapshots"]
            assert mount.get("readOnly", False) is used_alone
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is True
            # Images are what runs: no group of the pod's may write them.
            assert "fsGroup" not in pod.spec.get("securityContext", {})
        if pod.kind != "Service":
            assert pod.spec.get("hostUsers", True) is not in_user_namespace


@pytest.mark.parametrize("names", SETS, ids=label)
def test_pods_are_told_nothing_that_they_need_not_know(names: tuple[str, ...]) -> None:
    for pod in pods(built(*names)):
        if pod.kind != "DynamoGraphDeployment":  # whose discovery asks the API server
            assert pod.spec["automountServiceAccountToken"] is False
        # COLDFRAME_PORT of a Service called coldframe is a flag's twin.
        assert pod.spec["enableServiceLinks"] is False


@pytest.mark.parametrize("names", SETS, ids=label)
def test_what_is_mounted_is_there(names: tuple[str, ...]) -> None:
    documents = built(*names)
    claims = {
        document["metadata"]["name"]
        for document in documents
        if document["kind"] == "PersistentVolumeClaim"
    }
    for pod in pods(documents):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
        assert len(volumes) == len(pod.spec.get("volumes", ()))
        mounted = set()
        for container in pod.containers:
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            assert len(paths) == len(set(paths))
            mounted |= {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounted == set(volumes)
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim")
            assert claim is None or claim["claimName"] in claims


def _selected(documents: tuple[Document, ...], selector: dict[str, str]) -> list[Pod]:
    return [pod for pod in pods(documents) if selector.items() <= pod.labels.items()]


def _ports(pod: Pod) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for container in pod.containers
        for port in container.get("ports", ())
        if "name" in port
    }


@pytest.mark.parametrize("names", SETS, ids=label)
def test_services_policies_and_budgets_mean_pods_and_ports_that_there_are(
    names: tuple[str, ...],
) -> None:
    documents = built(*names)
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service" and document["apiVersion"] == "v1":
            chosen = _selected(documents, spec["selector"])
            wanted = {port["targetPort"] for port in spec["ports"]}
        elif document["kind"] == "NetworkPolicy":
            chosen = _selected(documents, spec["podSelector"]["matchLabels"])
            wanted = {port["port"] for rule in spec["ingress"] for port in rule.get("ports", ())}
            for rule in spec["ingress"]:
                for peer in rule.get("from", ()):
                    if "namespaceSelector" in peer:  # others' pods
                        continue
                    assert _selected(documents, peer["podSelector"]["matchLabels"])
        elif document["kind"] == "PodDisruptionBudget":
            chosen, wanted = _selected(documents, spec["selector"]["matchLabels"]), set()
        elif document["kind"] == "Deployment":
            labels = spec["selector"]["matchLabels"]
            chosen, wanted = _selected(documents, labels), set()
            assert [pod.name for pod in chosen] == [document["metadata"]["name"]]
        else:
            continue
        assert chosen, document["metadata"]["name"]
        for pod in chosen:
            assert wanted <= set(_ports(pod)), document["metadata"]["name"]


@pytest.mark.parametrize("names", SETS, ids=label)
def test_probes_ask_ports_that_there_are(names: tuple[str, ...]) -> None:
    for pod in pods(built(*names)):
        for container in ours(pod):
            ports = _ports(pod)
            probes = [value for name, value in container.items() if name.endswith("Probe")]
            assert probes
            for probe in probes:
                (how,) = [probe[name] for name in ("httpGet", "tcpSocket") if name in probe]
                # Knative has one port, and asks it.
                assert how.get("port") in ports or pod.kind == "Service"


def test_scalers_mean_what_there_is() -> None:
    documents = built("keda-http")
    scaled = one(documents, "HTTPScaledObject")["spec"]
    target = scaled["scaleTargetRef"]
    deployment = one(documents, target["kind"], target["name"])
    service = one(documents, "Service", target["service"])
    assert deployment["apiVersion"] == target["apiVersion"]
    assert ("port" in target) != ("portName" in target)  # a rule of its CRD's
    assert target["port"] in [port["port"] for port in service["spec"]["ports"]]
    # What says how many there are is KEDA alone; an update must not start or end any.
    assert "replicas" not in deployment["spec"]
    assert scaled["replicas"]["min"] == 0


@pytest.mark.parametrize("names", SETS, ids=label)
def test_autoscalers_mean_what_there_is_and_are_alone(names: tuple[str, ...]) -> None:
    documents = built(*names)
    for document in documents:
        if document["kind"] != "HorizontalPodAutoscaler":
            continue
        spec = document["spec"]
        target = one(documents, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
        assert target["apiVersion"] == spec["scaleTargetRef"]["apiVersion"]
        assert "replicas" not in target["spec"]
        assert 1 <= spec["minReplicas"] <= spec["maxReplicas"]
