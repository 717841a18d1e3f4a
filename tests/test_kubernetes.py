"""Kubernetes accepts the manifests in etc/kubernetes, which match each other, the image, and the settings."""

from __future__ import annotations

import re
import tomllib
from pathlib import PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml

from rtservice.process import server
from tests.support.container import stages_of
from tests.support.repository import ETC, PACKAGE

DIRECTORY = ETC / "kubernetes"

# The first version with all fields that the manifests use, as kustomization.yaml says, and the newest known one.
VERSIONS = ["1.30", kubernetes_validate.latest_version()]

MANIFESTS: dict[str, dict[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted(DIRECTORY.glob("*.yaml"))
}
KUSTOMIZATION = MANIFESTS.pop("kustomization")
LABELS = {"app.kubernetes.io/name": "rtservice"}

POD = MANIFESTS["deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
SETTINGS = tomllib.loads(MANIFESTS["configmap"]["data"]["rtservice.toml"])
IMAGE = stages_of((ETC / "Containerfile").read_text())[-1]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_each_manifest_is_valid_and_has_no_unknown_field(name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_the_kustomization_lists_every_manifest_and_the_version() -> None:
    assert sorted(KUSTOMIZATION["resources"]) == [f"{name}.yaml" for name in MANIFESTS]
    assert f"version {VERSIONS[0]} or later" in (DIRECTORY / "kustomization.yaml").read_text()
    assert KUSTOMIZATION["namespace"] == MANIFESTS["namespace"]["metadata"]["name"]
    assert [image["name"] for image in KUSTOMIZATION["images"]] == [CONTAINER["image"]]


def test_all_selectors_select_the_pods() -> None:
    assert MANIFESTS["deployment"]["spec"]["template"]["metadata"]["labels"] == LABELS
    assert MANIFESTS["service"]["spec"]["selector"] == LABELS
    selectors = [
        MANIFESTS["deployment"]["spec"]["selector"],
        MANIFESTS["poddisruptionbudget"]["spec"]["selector"],
        MANIFESTS["networkpolicy"]["spec"]["podSelector"],
        *(constraint["labelSelector"] for constraint in POD["topologySpreadConstraints"]),
    ]
    assert [selector["matchLabels"] for selector in selectors] == [LABELS] * 5


# --- settings ---


def test_rtservice_accepts_the_settings_of_the_config_map(run, environment, tmp_path) -> None:
    (tmp_path / "hub").write_text(MANIFESTS["secret"]["stringData"]["url"])
    environment["RTSERVICE_HUB_FILE"] = str(tmp_path / "hub")
    (tmp_path / "rtservice.toml").write_text(MANIFESTS["configmap"]["data"]["rtservice.toml"])
    checked = run("--nodaemon", "rtservice", "--config", str(tmp_path / "rtservice.toml"), "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_files_that_options_and_settings_name_are_mounted() -> None:
    (option,) = CONTAINER["args"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    files = {}
    for mount in CONTAINER["volumeMounts"]:
        volume = volumes[mount["name"]]
        source = "secret" if "secret" in volume else "configmap"
        manifest = MANIFESTS[source]
        reference = volume["secret"]["secretName"] if source == "secret" else volume["configMap"]["name"]
        assert reference == manifest["metadata"]["name"]
        content = manifest.get("data") or manifest["stringData"]
        files.update({str(PurePosixPath(mount["mountPath"], key)): text for key, text in content.items()})
    assert option.removeprefix("--config=") in files
    assert SETTINGS["hub-file"] in files


def test_the_ports_are_those_of_the_settings_and_the_image() -> None:
    assert SETTINGS["listen"] == [f"tcp:{PORTS['clients']}"]
    assert SETTINGS["status"] == f"*:{PORTS['status']}"
    assert IMAGE.last("EXPOSE").split() == [str(port) for port in PORTS.values()]
    (service,) = MANIFESTS["service"]["spec"]["ports"]
    assert service["targetPort"] == "clients"
    clients, status = (rule["ports"] for rule in MANIFESTS["networkpolicy"]["spec"]["ingress"])
    assert [clients, status] == [[{"port": "clients"}], [{"port": "status"}]]
    probes = [CONTAINER[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert [(probe["path"], probe["port"]) for probe in probes] == [
        ("/healthz", "status"),
        ("/healthz", "status"),
        ("/readyz", "status"),
    ]


def test_the_termination_grace_period_is_longer_than_the_drain() -> None:
    sleep = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    longest = sleep + SETTINGS["drain-timeout"] + server._FLUSH_LIMIT + server._FLUSH_STEP
    assert POD["terminationGracePeriodSeconds"] >= longest + 10
    # The comment beside it names the terms.
    comment = (DIRECTORY / "deployment.yaml").read_text()
    assert f"preStop {sleep} s, drain-timeout {SETTINGS['drain-timeout']} s, {server._FLUSH_LIMIT:.0f} s" in comment


def test_the_pod_runs_with_the_least_privileges() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # The group of the process can read the Secret.
    assert IMAGE.last("USER").endswith(f":{POD['securityContext']['fsGroup']}")
    # Kubernetes can check runAsNonRoot only for a user that is a number.
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", IMAGE.last("USER"))


# --- scaling ---


def test_the_autoscaler_uses_a_metric_of_rtservice_and_scales_before_the_limit() -> None:
    spec = MANIFESTS["horizontalpodautoscaler"]["spec"]
    deployment = MANIFESTS["deployment"]
    assert spec["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    (metric,) = spec["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f'"{name}", "Open connections' in (PACKAGE / "observe/metrics.py").read_text()
    # The rule for prometheus-adapter is a comment, since it is part of another installation.
    text = re.sub(r"^# ?", "", (DIRECTORY / "horizontalpodautoscaler.yaml").read_text(), flags=re.MULTILINE)
    rules = yaml.safe_load(text[text.index("  rules:") : text.index("Check it with")])["rules"]
    assert rules["custom"][0]["name"] == {"as": name}
    assert int(metric["pods"]["target"]["averageValue"]) < SETTINGS["max-connections"]


def test_a_rollout_and_a_disruption_leave_pods_that_serve() -> None:
    rolling = MANIFESTS["deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert (rolling["maxUnavailable"], rolling["maxSurge"]) == (0, 1)
    disrupted = MANIFESTS["poddisruptionbudget"]["spec"]["maxUnavailable"]
    assert disrupted < MANIFESTS["horizontalpodautoscaler"]["spec"]["minReplicas"]
