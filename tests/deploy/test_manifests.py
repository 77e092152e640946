"""The manifests of deploy/kubernetes: valid for every supported Kubernetes, and fit for each other and for the servers.

Every check is shown to fail on a manifest that was changed for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Final

import kubernetes_validate
import pytest
import yaml

from tests.deploy import hardening, network, running, wiring
from tests.deploy.rendered import OVERLAYS, ROOT, Container, Manifest, Manifests, pod

KUBERNETES: Final = tuple(f"1.{minor}" for minor in range(30, 38))

Check = Callable[[Manifests], Iterator[str]]
Change = Callable[[Manifests], object]

needs_etcd = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="there is no etcd: install it (Debian: etcd-server)"
)

CHECKS: Final[tuple[Check, ...]] = (
    wiring.selectors_match_pods,
    wiring.stateful_sets_have_their_service,
    wiring.ports_are_named_and_open,
    wiring.probes_hit_what_answers,
    wiring.volumes_are_mounted,
    wiring.references_exist,
    wiring.rights_are_the_least,
    wiring.budgets_let_nodes_be_emptied,
    hardening.pods_are_restricted,
    hardening.images_are_pinned,
    hardening.resources_are_bounded,
    hardening.quotas_have_room,
    running.settings_are_taken,
    running.hooks_can_run,
    running.variables_are_replaced,
    running.settings_agree_with_manifests,
    running.files_are_mounted,
    running.grace_outlasts_the_stop,
    running.missing_shards_are_named_in_time,
    running.etcd_members_agree,
    network.only_what_is_needed_passes,
    network.strangers_are_kept_out,
    network.everybody_can_look_up_names,
)


def _distinct() -> list[Manifest]:
    """All manifests, those once that differ in nothing but their namespace: a schema takes its time."""
    found: dict[str, Manifest] = {}
    rendered = [Manifests.of(overlay) for overlay in OVERLAYS]
    with_backups = Manifests.of("production", "backups")
    for manifest in [*(each for one in (*rendered, with_backups) for each in one.all), _restoring()]:
        alike = {**manifest, "metadata": {**manifest["metadata"], "namespace": ""}}
        found.setdefault(json.dumps(alike, sort_keys=True), manifest)
    return list(found.values())


@pytest.mark.parametrize("version", KUBERNETES)
def test_schemas_of_kubernetes_take_every_manifest(version: str) -> None:
    for manifest in _distinct():
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", [KUBERNETES[0], KUBERNETES[-1]])
def test_schemas_refuse_a_field_that_is_not_there(version: str) -> None:
    shard = Manifests.of("dev").the("StatefulSet", "topk-shard")
    shard["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(shard, version, strict=True)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_passes(overlay: str, check: Check) -> None:
    assert list(check(Manifests.of(overlay))) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_production_with_backups_passes(check: Check) -> None:
    assert list(check(Manifests.of("production", "backups"))) == []


@needs_etcd
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_etcd_knows_its_variables(overlay: str) -> None:
    assert list(running.etcd_knows_its_variables(Manifests.of(overlay))) == []
    changed = Manifests.of(overlay)
    _container(changed, "etcd")["env"].append({"name": "ETCD_INITIAL_CLUSTERS", "value": ""})
    assert list(running.etcd_knows_its_variables(changed)) != []


# --- Backups ----------------------------------------------------------------------------------------------------------


def _restoring() -> Manifest:
    """The pod that an operator makes to restore a shard."""
    manifest: Manifest = yaml.safe_load((ROOT / "deploy/kubernetes/restore.yaml").read_text())
    return manifest


def test_shards_and_etcd_have_the_volume_of_backups_and_nobody_else_has() -> None:
    manifests = Manifests.of("production", "backups")
    (claim,) = (each["metadata"] for each in manifests.of_kind("PersistentVolumeClaim"))
    mounted = {
        workload["metadata"]["name"]: volume["persistentVolumeClaim"]["claimName"]
        for workload in manifests.workloads()
        for volume in pod(workload).get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert mounted == {"topk-shard": claim["name"], "topk-etcd": claim["name"]}
    assert claim["namespace"] == manifests.the("StatefulSet", "topk-shard")["metadata"]["namespace"]


def test_a_restore_sees_what_its_shard_sees() -> None:
    """The same image and user, and the same volumes in the same places."""
    manifests = Manifests.of("production", "backups")
    shard, container = pod(manifests.the("StatefulSet", "topk-shard")), manifests.container("shard").manifest
    restoring = _restoring()["spec"]
    (restore,) = restoring["containers"]
    assert restore["image"] == container["image"]
    assert (restoring["securityContext"], restore["securityContext"]) == (
        shard["securityContext"],
        container["securityContext"],
    )
    at = {one["mountPath"] for one in container["volumeMounts"]} - {"/etc/topk/tls"}
    assert {one["mountPath"] for one in restore["volumeMounts"]} == at
    claims = {
        one["name"]: one["persistentVolumeClaim"]["claimName"]
        for one in restoring["volumes"]
        if "persistentVolumeClaim" in one
    }
    assert claims == {"data": "data-topk-shard-0", "backups": "topk-backups"}


# --- What has to be different in production ---------------------------------------------------------------------------


def test_production_outlives_a_node() -> None:
    production = Manifests.of("production")
    for name, replicas in {"topk-shard": 3, "topk-etcd": 3}.items():
        assert production.the("StatefulSet", name)["spec"]["replicas"] >= replicas
    assert production.the("Deployment", "topk-controller")["spec"]["replicas"] >= 2
    assert production.the("HorizontalPodAutoscaler", "topk-gateway")["spec"]["minReplicas"] >= 2
    assert len(production.of_kind("PodDisruptionBudget")) == len(production.workloads())
    for workload in production.workloads():
        assert "podAntiAffinity" in pod(workload)["affinity"]
        assert pod(workload)["topologySpreadConstraints"]


def test_production_speaks_tls_everywhere() -> None:
    for container in Manifests.of("production").containers():
        environment = container.environment
        if container.is_topk:
            assert "TOPK_PLAINTEXT" not in environment
            assert {"TOPK_TLS_CERT", "TOPK_TLS_CA", "TOPK_ETCD_CA", "TOPK_ETCD_CERT"} <= set(environment)
        else:
            tools = {name.removeprefix("ETCDCTL_"): value for name, value in environment.items() if "ETCDCTL" in name}
            assert tools == {
                "ENDPOINTS": "https://localhost:2379",
                "CACERT": environment["ETCD_TRUSTED_CA_FILE"],
                "CERT": environment["ETCD_CERT_FILE"],
                "KEY": environment["ETCD_KEY_FILE"],
            }
            assert environment["ETCD_CLIENT_CERT_AUTH"] == environment["ETCD_PEER_CLIENT_CERT_AUTH"] == "true"
            assert "http://" not in "".join(value for name, value in environment.items() if "METRICS" not in name)
    assert "TOPK_TOKENS_FILE" in Manifests.of("production").container("gateway").environment


def test_only_the_name_of_a_secret_is_in_the_manifests() -> None:
    for overlay in OVERLAYS:
        assert Manifests.of(overlay).of_kind("Secret") == []


# --- Each check can fail ----------------------------------------------------------------------------------------------


def _workload(manifests: Manifests, name: str) -> Manifest:
    return next(each for each in manifests.workloads() if each["metadata"]["name"] == f"topk-{name}")


def _spec(manifests: Manifests, name: str) -> Manifest:
    found: Manifest = _workload(manifests, name)["spec"]["template"]["spec"]
    return found


def _container(manifests: Manifests, name: str) -> Manifest:
    found: Manifest = _spec(manifests, name)["containers"][0]
    return found


def _set(name: str, variable: str, value: str) -> Change:
    def change(manifests: Manifests) -> None:
        source = _container(manifests, name)["envFrom"][0]["configMapRef"]["name"]
        manifests.the("ConfigMap", source)["data"][variable] = value

    return change


def _without(kind: str, name: str) -> Change:
    return lambda manifests: manifests.all.remove(manifests.the(kind, name))


def _other_labels(manifests: Manifests) -> None:
    _workload(manifests, "shard")["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] = "shards"


def _swap_first_variables(manifests: Manifests) -> None:
    environment = _container(manifests, "shard")["env"]
    environment.reverse()


def _open_shards(manifests: Manifests) -> None:
    manifests.the("NetworkPolicy", "topk-shard")["spec"]["ingress"][0]["from"].append({"podSelector": {}})


def _open_etcd(manifests: Manifests) -> None:
    """Shards at the port of etcd's members, let out and let in."""
    port = {"protocol": "TCP", "port": 2380}
    manifests.the("NetworkPolicy", "topk-shard")["spec"]["egress"][1]["ports"].append(port)
    manifests.the("NetworkPolicy", "topk-etcd")["spec"]["ingress"][0]["ports"].append(port)


def _cut_moves(manifests: Manifests) -> None:
    manifests.the("NetworkPolicy", "topk-shard")["spec"]["egress"].pop(0)


def _cut_names(manifests: Manifests) -> None:
    manifests.the("NetworkPolicy", "topk-dns")["spec"]["egress"][0]["ports"].pop(0)


BROKEN: Final[tuple[tuple[str, Check, Change], ...]] = (
    ("a label of pods", wiring.selectors_match_pods, _other_labels),
    (
        "a budget for nobody",
        wiring.selectors_match_pods,
        lambda m: m.the("PodDisruptionBudget", "topk-etcd")["spec"]["selector"]["matchLabels"].update(a="b"),
    ),
    (
        "serviceName",
        wiring.stateful_sets_have_their_service,
        lambda m: _workload(m, "shard")["spec"].update(serviceName="topk-shards"),
    ),
    (
        "a Service with an address",
        wiring.stateful_sets_have_their_service,
        lambda m: m.the("Service", "topk-shard")["spec"].pop("clusterIP"),
    ),
    (
        "a Service's targetPort",
        wiring.ports_are_named_and_open,
        lambda m: m.the("Service", "topk-gateway")["spec"]["ports"][0].update(targetPort="http"),
    ),
    (
        "a probe's port",
        wiring.probes_hit_what_answers,
        lambda m: _container(m, "gateway")["readinessProbe"]["grpc"].update(port=50050),
    ),
    (
        "a probe's service",
        wiring.probes_hit_what_answers,
        lambda m: _container(m, "gateway")["readinessProbe"]["grpc"].update(service="ready"),
    ),
    ("a volume", wiring.volumes_are_mounted, lambda m: _spec(m, "gateway")["volumes"].pop()),
    ("a mount", wiring.volumes_are_mounted, lambda m: _container(m, "shard")["volumeMounts"].pop()),
    (
        "a ConfigMap",
        wiring.references_exist,
        lambda m: _container(m, "shard")["envFrom"][0]["configMapRef"].update(name="topk"),
    ),
    ("an account", wiring.references_exist, _without("ServiceAccount", "topk-etcd")),
    ("a role", wiring.references_exist, _without("Role", "topk-shard")),
    (
        "the autoscaler's target",
        wiring.references_exist,
        lambda m: m.the("HorizontalPodAutoscaler", "topk-gateway")["spec"]["scaleTargetRef"].update(name="gateway"),
    ),
    (
        "replicas beside an autoscaler",
        wiring.references_exist,
        lambda m: _workload(m, "gateway")["spec"].update(replicas=2),
    ),
    ("a namespace", wiring.references_exist, lambda m: m.the("Service", "topk-etcd")["metadata"].pop("namespace")),
    (
        "a token for gateways",
        wiring.rights_are_the_least,
        lambda m: _spec(m, "gateway").pop("automountServiceAccountToken"),
    ),
    (
        "a role for all StatefulSets",
        wiring.rights_are_the_least,
        lambda m: m.the("Role", "topk-shard")["rules"][0].pop("resourceNames"),
    ),
    (
        "a role that may write",
        wiring.rights_are_the_least,
        lambda m: m.the("Role", "topk-shard")["rules"][0]["verbs"].append("update"),
    ),
    ("a missing budget", wiring.budgets_let_nodes_be_emptied, _without("PodDisruptionBudget", "topk-shard")),
    (
        "a budget that keeps nodes",
        wiring.budgets_let_nodes_be_emptied,
        lambda m: m.the("PodDisruptionBudget", "topk-shard")["spec"].update(maxUnavailable=0),
    ),
    ("root", hardening.pods_are_restricted, lambda m: _spec(m, "etcd")["securityContext"].update(runAsUser=0)),
    (
        "a file system to write to",
        hardening.pods_are_restricted,
        lambda m: _container(m, "shard")["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    (
        "a capability",
        hardening.pods_are_restricted,
        lambda m: _container(m, "shard")["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
    ),
    (
        "the host's disk",
        hardening.pods_are_restricted,
        lambda m: _spec(m, "shard")["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    ),
    (
        "latest",
        hardening.images_are_pinned,
        lambda m: _container(m, "gateway").update(image="ghcr.io/topk-grpc/topk-grpc:latest"),
    ),
    (
        "another version",
        hardening.images_are_pinned,
        lambda m: _container(m, "gateway").update(image="ghcr.io/topk-grpc/topk-grpc:99.0.0"),
    ),
    ("no tag", hardening.images_are_pinned, lambda m: _container(m, "etcd").update(image="quay.io/coreos/etcd")),
    ("no limit", hardening.resources_are_bounded, lambda m: _container(m, "shard")["resources"].pop("limits")),
    (
        "a budget of all memory",
        hardening.resources_are_bounded,
        _set("shard", "TOPK_MEMORY_BYTES_MAX", str(4 << 30)),
    ),
    (
        "a quota that is too small",
        hardening.quotas_have_room,
        lambda m: m.the("ResourceQuota", "topk")["spec"]["hard"].update(pods="3"),
    ),
    ("a flag", running.settings_are_taken, lambda m: _container(m, "shard").update(args=["shard", "--joins"])),
    ("a setting of nobody", running.settings_are_taken, _set("gateway", "TOPK_SHARD_IDS", "1")),
    ("another role's setting", running.settings_are_taken, _set("gateway", "TOPK_HEAP_SIZE", "100")),
    ("a value out of range", running.settings_are_taken, _set("shard", "TOPK_HEAP_SIZE", "100000")),
    ("a value that is no number", running.settings_are_taken, _set("shard", "TOPK_HEAP_SIZE", "many")),
    ("plaintext unsaid", running.settings_are_taken, _set("shard", "TOPK_TLS_CERT", "")),
    (
        "a hook about others",
        running.hooks_can_run,
        lambda m: _container(m, "shard")["lifecycle"]["preStop"]["exec"]["command"].__setitem__(3, "topk-etcd"),
    ),
    ("an order of variables", running.variables_are_replaced, _swap_first_variables),
    ("a port of settings", running.settings_agree_with_manifests, _set("gateway", "TOPK_HEALTH_PORT", "50061")),
    (
        "a member of etcd that is not there",
        running.settings_agree_with_manifests,
        _set("shard", "TOPK_TOPOLOGY", "etcd://a:2379,b:2379,c:2379/topk"),
    ),
    ("an address of shards", running.settings_agree_with_manifests, _without("Service", "topk-shard")),
    ("shards by other names", running.settings_agree_with_manifests, _set("controller", "TOPK_SHARD_PREFIX", "shard-")),
    ("another number of shards", running.settings_agree_with_manifests, _set("controller", "TOPK_CREATE_SHARDS", "9")),
    ("a path on no volume", running.files_are_mounted, _set("gateway", "TOPK_TOKENS_FILE", "/etc/tokens.toml")),
    ("a key of no Secret", running.files_are_mounted, _set("gateway", "TOPK_TOKENS_FILE", "/etc/topk/tokens/all.toml")),
    (
        "a Secret that nobody makes",
        running.files_are_mounted,
        lambda m: _spec(m, "gateway")["volumes"][0]["secret"].update(secretName="gateway"),
    ),
    ("a long drain", running.grace_outlasts_the_stop, _set("gateway", "TOPK_DRAIN_DELAY_SECONDS", "40")),
    (
        "no time to leave",
        running.grace_outlasts_the_stop,
        lambda m: _spec(m, "shard").update(terminationGracePeriodSeconds=90),
    ),
    ("the default of a gateway", running.missing_shards_are_named_in_time, _set("gateway", "TOPK_QUERY_SECONDS", "10")),
    ("a member more", running.etcd_members_agree, lambda m: _workload(m, "etcd")["spec"].update(replicas=5)),
    ("shards that speak as a member of etcd", network.only_what_is_needed_passes, _open_etcd),
    ("shards that cannot move slots", network.only_what_is_needed_passes, _cut_moves),
    ("no denial", network.strangers_are_kept_out, _without("NetworkPolicy", "topk-default-deny")),
    ("shards that strangers reach", network.strangers_are_kept_out, _open_shards),
    ("no names", network.everybody_can_look_up_names, _cut_names),
)


@pytest.mark.parametrize(
    ("check", "change"), [(check, change) for _, check, change in BROKEN], ids=[each[0] for each in BROKEN]
)
def test_check_sees(check: Check, change: Change) -> None:
    manifests = Manifests.of("production")
    change(manifests)
    assert list(check(manifests)) != []


def test_every_check_is_seen_to_fail() -> None:
    shown: set[Any] = {check for _, check, _ in BROKEN}
    assert shown == set(CHECKS)


def test_a_container_has_the_environment_of_its_first_pod() -> None:
    shard: Container = Manifests.of("dev").container("shard")
    assert shard.environment["TOPK_SHARD_ID"] == "topk-shard-0"
    assert shard.environment["TOPK_ADVERTISE"] == "topk-shard-0.topk-shard.topk-dev.svc.cluster.local:50051"
