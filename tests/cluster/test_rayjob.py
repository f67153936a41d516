"""The cluster's definitions, checked offline against what will read them.

Pods and the network policy against the schemas of Kubernetes, Ray's kinds against the fields of the API, the options of
`ray start` against the command itself, the entrypoint against our own configuration.
"""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.runtime_env import RuntimeEnv

from kmtr.config import RunConfig, parse
from kmtr.config.recipes import RECIPES

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "cluster" / "rayjob-pretrain.yaml"
DOCKERFILE = ROOT / "cluster" / "Dockerfile"

# Field -> type of ray.io/v1, from the Go types of KubeRay 1.7. `*` ends a field that must be given, [X] is a list of X,
# a tuple the allowed values. A type that isn't a key here is a leaf (LEAVES) or a part of Kubernetes (POD).
POD = "PodTemplateSpec"
LEAVES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "int32": int,
    "float32": (int, float),
    "map": dict,
    "metadata": dict,
}
API: dict[str, dict[str, Any]] = {
    "RayJob": {"apiVersion*": ("ray.io/v1",), "kind*": ("RayJob",), "metadata*": "metadata", "spec*": "RayJobSpec"},
    "RayJobSpec": {
        "activeDeadlineSeconds": "int32",
        "backoffLimit": "int32",
        "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": POD,
        "metadata": "map",
        "clusterSelector": "map",
        "submitterConfig": "SubmitterConfig",
        "managedBy": ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        "entrypoint": "string",
        "runtimeEnvYAML": "string",
        "jobId": "string",
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "entrypointResources": "string",
        "entrypointNumCpus": "float32",
        "entrypointNumGpus": "float32",
        "ttlSecondsAfterFinished": "int32",
        "preRunningDeadlineSeconds": "int32",
        "shutdownAfterJobFinishes": "boolean",
        "suspend": "boolean",
    },
    "SubmitterConfig": {"backoffLimit": "int32"},
    "RayClusterSpec": {
        "upgradeStrategy": "RayClusterUpgradeStrategy",
        "authOptions": "AuthOptions",
        "suspend": "boolean",
        "managedBy": ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        "headServiceAnnotations": "map",
        "enableInTreeAutoscaling": "boolean",
        "headGroupSpec*": "HeadGroupSpec",
        "rayVersion": "string",
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "RayClusterUpgradeStrategy": {"type": ("Recreate", "None")},
    "AuthOptions": {"enableK8sTokenAuth": "boolean", "secretName": "string", "mode": ("disabled", "token")},
    "HeadGroupSpec": {
        "template*": POD,
        "enableIngress": "boolean",
        "resources": "map",
        "labels": "map",
        "rayStartParams*": "map",
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer"),
    },
    "WorkerGroupSpec": {
        "suspend": "boolean",
        "groupName*": "string",
        "replicas": "int32",
        "minReplicas*": "int32",
        "maxReplicas*": "int32",
        "idleTimeoutSeconds": "int32",
        "priority": "int32",
        "resources": "map",
        "labels": "map",
        "rayStartParams*": "map",
        "template*": POD,
        "scaleStrategy": "ScaleStrategy",
        "numOfHosts": "int32",
    },
    "ScaleStrategy": {"workersToDelete": ["string"]},
}


def problems(value: Any, kind: Any, path: str) -> Iterator[str]:
    """What is wrong with `value` as a `kind` of API, one line each."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{path}: expected a list, got {value!r}"
            return
        for i, item in enumerate(value):
            yield from problems(item, kind[0], f"{path}[{i}]")
    elif isinstance(kind, tuple):
        if value not in kind:
            yield f"{path}: expected one of {kind}, got {value!r}"
    elif kind == POD:
        yield from pod_problems(value, path)
    elif kind in LEAVES:
        wrong_bool = isinstance(value, bool) and kind != "boolean"
        if wrong_bool or not isinstance(value, LEAVES[kind]):
            yield f"{path}: expected {kind}, got {value!r}"
        elif kind == "map":
            yield from (f"{path}.{k}: expected a string, got {v!r}" for k, v in value.items() if not isinstance(v, str))
    elif not isinstance(value, dict):
        yield f"{path}: expected {kind}, got {value!r}"
    else:
        fields = {name.removesuffix("*"): kind_ for name, kind_ in API[kind].items()}
        required = (name[:-1] for name in API[kind] if name.endswith("*"))
        yield from (f"{path}.{name}: missing" for name in required if name not in value)
        for name, item in value.items():
            if name in fields:
                yield from problems(item, fields[name], f"{path}.{name}")
            else:
                yield f"{path}.{name}: unknown field of {kind}"


def pod_problems(template: dict[str, Any], path: str) -> Iterator[str]:
    """A PodTemplateSpec is a Pod without kind and name: wrapped in one, it has a schema."""
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"] = {"name": "wrapped", **template.get("metadata", {})}
    yield from kubernetes_problems(pod, path)


def kubernetes_problems(resource: dict[str, Any], path: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{path}: {'.'.join(map(str, error.path))}: {error.message}"


def start_problems(cluster: dict[str, Any]) -> Iterator[str]:
    """rayStartParams against the options of the installed `ray start`."""
    with warnings.catch_warnings():  # the command line pulls in Ray Serve, which uses deprecated parts of pydantic
        warnings.simplefilter("ignore")
        from ray.scripts.scripts import start as ray_start

    known = {option.removeprefix("--"): param for param in ray_start.params for option in param.opts}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for name, text in group["rayStartParams"].items():
            if name not in known:
                yield f"ray start: no option --{name}"
            elif known[name].type.name == "integer" and not text.isdigit():
                yield f"ray start: --{name} expects an integer, got {text!r}"


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    """Kind -> document of the manifest."""
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture
def job(documents: dict[str, Any]) -> dict[str, Any]:
    """The RayJob; the test's own, to break as it likes. YAML aliases are resolved to copies."""
    return yaml.safe_load(yaml.dump(documents["RayJob"], Dumper=_Plain))


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@pytest.fixture
def config(job: dict[str, Any]) -> RunConfig:
    """What the entrypoint asks for, by our own parser: an unknown key or recipe fails here."""
    python, script, recipe, *words = shlex.split(job["spec"]["entrypoint"])
    assert (python, script) == ("python", "jobs/pretrain.py")
    return parse(words, recipe, RECIPES)


def pods(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi"), quantity
    return float(quantity[:-2])


def pins() -> dict[str, str]:
    """Package -> pinned version of pyproject.toml."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {m[1]: m[2] for d in dependencies if (m := re.fullmatch(r"([\w-]+)(?:\[.*\])?==([\d.]+)", d))}


def test_manifest_holds_nothing_unknown(documents: dict[str, Any]) -> None:
    assert set(documents) == {"RayJob", "NetworkPolicy"}
    assert list(problems(documents["RayJob"], "RayJob", "RayJob")) == []
    assert list(kubernetes_problems(documents["NetworkPolicy"], "NetworkPolicy")) == []
    assert list(start_problems(documents["RayJob"]["spec"]["rayClusterSpec"])) == []


SPEC = ("spec",)
CLUSTER = (*SPEC, "rayClusterSpec")
WORKERS = (*CLUSTER, "workerGroupSpecs", 0)
CONTAINER = (*WORKERS, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ((*SPEC, "entryPoint"), "python", r"spec.entryPoint: unknown field of RayJobSpec"),
        ((*SPEC, "ttlSecondsAfterFinished"), "600", r"ttlSecondsAfterFinished: expected int32, got '600'"),
        ((*SPEC, "backoffLimit"), True, r"backoffLimit: expected int32, got True"),
        ((*SPEC, "submissionMode"), "Http", r"submissionMode: expected one of"),
        ((*SPEC, "runtimeEnvYAML"), {"env_vars": {}}, r"runtimeEnvYAML: expected string"),
        ((*CLUSTER, "authOptions", "mode"), "none", r"authOptions.mode: expected one of"),
        ((*CLUSTER, "workerGroupSpecs"), {}, r"workerGroupSpecs: expected a list"),
        ((*WORKERS, "minReplicas"), None, r"minReplicas: expected int32, got None"),
        ((*WORKERS, "rayStartParams", "num-gpus"), 4, r"num-gpus: expected a string, got 4"),
        ((*CONTAINER, "imag"), "kmtr", r"'imag' was unexpected"),
        ((*CONTAINER, "env", 0, "value"), 1, r"1 is not of type|not valid under any"),
        ((*CONTAINER, "resources", "limits", "memory"), [1], r"not valid under any|is not of type"),
        ((*WORKERS, "template", "spec", "volumes", 0, "pvc"), {}, r"'pvc' was unexpected"),
    ],
)
def test_a_broken_copy_is_refused(job: dict[str, Any], path: tuple[Any, ...], value: Any, expected: str) -> None:
    node = job
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    found = list(problems(job, "RayJob", "RayJob"))
    assert len(found) == 1
    assert re.search(expected, found[0])


def test_missing_fields_and_wrong_start_options_are_refused(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    del cluster["workerGroupSpecs"][0]["groupName"]
    assert list(problems(job, "RayJob", "RayJob")) == [
        "RayJob.spec.rayClusterSpec.workerGroupSpecs[0].groupName: missing"
    ]
    cluster["headGroupSpec"]["rayStartParams"] = {"num-cpu": "0", "num-cpus": "none"}
    assert list(start_problems(cluster)) == [
        "ray start: no option --num-cpu",
        "ray start: --num-cpus expects an integer, got 'none'",
    ]


def test_every_type_of_the_table_is_known() -> None:
    kinds = [kind[0] if isinstance(kind, list) else kind for fields in API.values() for kind in fields.values()]
    assert {k for k in kinds if isinstance(k, str)} <= {*API, *LEAVES, POD}


def test_runtime_environment_is_accepted_by_ray(job: dict[str, Any]) -> None:
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert set(environment) <= RuntimeEnv.known_fields
    assert RuntimeEnv(**environment).env_vars() == environment["env_vars"]
    broken = copy.deepcopy(environment)
    broken["env_vars"]["PYTHONUNBUFFERED"] = 1
    with pytest.raises(TypeError, match="env_vars"):
        RuntimeEnv(**broken)


def test_versions_follow_the_pins(job: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins()["ray"]
    dockerfile = DOCKERFILE.read_text()
    assert re.findall(r"torch==(\S+)", dockerfile) == [pins()["torch"]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {c["image"] for pod in pods(job) for c in pod["containers"]} == {f"{project['name']}:{project['version']}"}
    workdir = re.search(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)
    assert workdir
    assert {c["workingDir"] for pod in pods(job) for c in pod["containers"]} == {workdir[1]}
    for source in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


def test_one_training_worker_per_gpu(job: dict[str, Any], config: RunConfig) -> None:
    gpus = cpus = 0
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus += group["replicas"] * int(limits["nvidia.com/gpu"])
        cpus += group["replicas"] * int(limits["cpu"])
    assert gpus == config.train.workers.most
    assert config.train.device == "cuda"
    assert config.train.workers.most * config.train.cpus_per_worker < cpus, "no CPU is left for Ray Data's readers"
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_what_a_run_keeps_lies_on_the_shared_volume(job: dict[str, Any], config: RunConfig) -> None:
    for pod in pods(job):
        claims = [v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert claims == [mounts["/mnt/kmtr"]]
    for path in (config.data.root, config.storage.root):
        assert path.startswith("/mnt/kmtr/")


def test_resources_are_guaranteed_and_hold_the_object_store(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert shm["medium"] == "Memory"
        store = int(group["rayStartParams"]["object-store-memory"]) / 2**30
        assert store < gibibytes(shm["sizeLimit"]) < gibibytes(container["resources"]["limits"]["memory"])


def test_nobody_outside_runs_code(documents: dict[str, Any], job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    assert cluster["authOptions"]["mode"] == "token"
    for pod in pods(job):
        (container,) = pod["containers"]
        env = {e["name"]: e for e in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == cluster["authOptions"]["secretName"]
        assert env["MLFLOW_TRACKING_URI"]["value"].startswith("http")
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert "hostNetwork" not in pod
    policy = documents["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    selected = policy["podSelector"]["matchLabels"].items()
    for group in (head, *cluster["workerGroupSpecs"]):
        assert selected <= group["template"]["metadata"]["labels"].items()
