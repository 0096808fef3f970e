"""RayJobs: valid against KubeRay's schema, sized for the recipe, with words that no shell on the way reads as code."""

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.errors import UserError
from deploy.kubernetes_job import apply_manifest, render_ray_job

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
HOSTILE = [
    "a=$(touch pwned)",
    "a=`touch pwned`",
    "a=b; touch pwned #",
    "a=b' ; touch pwned ; '",
    'a=b" ; touch pwned ; "',
    "a=$HOME $$ $$$ $(RAY_AUTH_TOKEN) $$(RAY_AUTH_TOKEN)",
    "a=b && touch pwned | tee pwned > pwned",
    "a=\\$(touch pwned) \\",
    "a=* ? [a-z] ~ {b,c} !!",
    "a={b: [1, 2], c: 'd e'}",
    "--out=elsewhere",
    "a=ü –",
    "",
]


def job_of(text):
    return next(document for document in yaml.safe_load_all(text) if document["kind"] == "RayJob")


def rendered(recipe="digits", **options):
    return render_ray_job(recipe, **{"out": "s3://bucket/runs/d", "image": "registry.example/m:1", **options})


@pytest.fixture
def arrives(monkeypatch, tmp_path):
    """The arguments that `manymodes` gets for an entrypoint, by every step that KubeRay's way has."""
    from click.testing import CliRunner
    from ray.dashboard.modules.job import cli

    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("submit", "manymodes"):
        script = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
        (tools / name).write_text(script)
        (tools / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    folder = tmp_path / "empty"
    folder.mkdir()

    def shell(name, text):
        return json.loads(subprocess.check_output([name, "-c", text], cwd=folder, env=environment, text=True))

    class Client:
        def submit_job(self, entrypoint, **_):
            self.entrypoint = entrypoint
            return "id"

    def steps(entrypoint):
        # The kubelet replaces references to variables in a container's arguments; $$ stands for $.
        argument = re.sub(r"\$\$|\$\(\w+\)", lambda m: "$" if m[0] == "$$" else "EXPANDED", entrypoint)
        words = shell("bash", f"submit {argument} ;")
        client = Client()
        monkeypatch.setattr(cli, "_get_sdk_client", lambda *a, **k: client)
        result = CliRunner().invoke(cli.submit, ["--no-wait", "--address", "http://head:8265", "--", *words])
        assert hasattr(client, "entrypoint"), result.output
        found = shell("sh", client.entrypoint)
        assert list(folder.iterdir()) == []
        return found

    return steps


def test_every_word_arrives_as_it_was(arrives):
    text = rendered(overrides=HOSTILE, out="s3://bucket/it's $(x) here")
    words = ["run", "digits", "--out", "s3://bucket/it's $(x) here"]
    assert arrives(job_of(text)["spec"]["entrypoint"]) == words + [w for o in HOSTILE for w in ("--set", o)]


def test_a_recipe_of_ones_own_travels_beside_the_job_whatever_its_name(arrives, tmp_path):
    path = tmp_path / "$(touch pwned); 'My' Recipe.yaml"
    path.write_text("name: mine # ü\n")
    text = rendered(str(path))
    config, job = yaml.safe_load_all(text)
    assert config["kind"] == "ConfigMap"
    assert config["data"]["recipe.yaml"] == path.read_text()
    assert config["metadata"] == {"name": job["metadata"]["name"], "namespace": "manymodes"}
    assert re.fullmatch(r"touch-pwned-my-recipe-[0-9a-f]{6}", job["metadata"]["name"])
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "recipe", "configMap": {"name": config["metadata"]["name"]}} in head["volumes"]
    assert arrives(job["spec"]["entrypoint"])[:2] == ["run", "/etc/manymodes/recipe.yaml"]
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert all(volume["name"] != "recipe" for volume in workers["volumes"])


@pytest.mark.parametrize(
    ("options", "group", "pods"),
    [
        ({"workers": 1}, "cpu", 1),
        ({"workers": 9, "cpus_per_worker": 1}, "cpu", 3),
        ({"workers": 3, "cpus_per_worker": 2.5}, "cpu", 3),
        ({"workers": 40, "cpus_per_worker": 4}, "cpu", 40),
        ({"workers": 3, "gpus_per_worker": 1, "cpus_per_worker": 2}, "gpu", 3),
        ({"workers": 4, "gpus_per_worker": 0.5}, "gpu", 2),
    ],
)
def test_the_cluster_has_room_for_the_workers_from_the_beginning(options, group, pods):
    groups = job_of(rendered(**options))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for found in groups:
        assert found["replicas"] == found["minReplicas"] == (pods if found["groupName"] == group else 0)
        assert found["maxReplicas"] >= found["replicas"]


def test_it_passes_the_schema_and_the_operators_rules(tmp_path, monkeypatch):
    if not (SHARED / "kuberay").is_dir() or not (SHARED / "tools" / "validate_crd.py").exists():
        pytest.skip("NOT CHECKED: needs KubeRay's CRDs and tools (../shared)")
    tools = {}
    for name in ("validate_crd", "kuberay_rules"):
        spec = importlib.util.spec_from_file_location(name, SHARED / "tools" / f"{name}.py")
        tools[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tools[name])
    crds = tools["validate_crd"].load_crds(SHARED / "kuberay")
    own = tmp_path / "mine.yaml"
    own.write_text("name: mine\n")
    for text in (rendered(), rendered(str(own), workers=8, gpus_per_worker=1, overrides=HOSTILE)):
        job = job_of(text)
        assert tools["validate_crd"].check(job, crds) == []
        assert list(tools["kuberay_rules"].rules(job)) == []
        assert "&id" not in text  # shared parts of the template are written out
        assert {c["image"] for c in containers(job)} == {"registry.example/m:1"}
        broken = {**job, "spec": {**job["spec"], "entryPoint": "x"}}
        assert tools["validate_crd"].check(broken, crds) != []


def containers(value):
    if isinstance(value, dict):
        yield from value.get("containers", [])
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from containers(part)


def test_it_takes_the_cluster_of_an_overlay_with_its_queue():
    cluster = yaml.safe_load((ROOT / "deploy/kubernetes/base/raycluster.yaml").read_text())
    cluster["metadata"] = {"name": "c", "namespace": "team", "labels": {"kueue.x-k8s.io/queue-name": "q"}}
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = "a/b:c"
    share = {"name": "share", "mountPath": "/mnt/share"}
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"].append(share)
    others = yaml.safe_dump({"kind": "Service", "metadata": {"name": "s"}})
    text = rendered(image=None, cluster=f"{others}---\n{yaml.safe_dump(cluster)}", out="/mnt/share/runs")
    job = job_of(text)
    assert job["metadata"]["namespace"] == "team"
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"] == "a/b:c"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"recipe": "digitz"}, ["unknown recipe 'digitz'", "digits"]),
        ({"recipe": "a\0b"}, ["unknown recipe"]),
        ({"name": "Digits"}, ["job name 'Digits'"]),
        ({"name": "a" * 48}, ["at most 47"]),
        ({"name": "a\nb: c"}, ["job name"]),
        ({"namespace": "-x"}, ["namespace '-x'"]),
        ({"image": "m 1"}, ["image 'm 1'"]),
        ({"image": "$(id)"}, ["image"]),
        ({"image": None}, ["--image", "--cluster"]),
        ({"out": "runs/d"}, ["do not share", "s3://"]),
        ({"out": "/tmp/d"}, ["do not share"]),
        ({"out": "pipe:cat >x"}, ["pipe"]),
        ({"overrides": ["a=b\nc"]}, ["no text"]),
        ({"overrides": ["tracking.uri=http://me:hunter2@mlflow"]}, ["password", "Secret"]),
        ({"cpus_per_worker": 5}, ["5 CPUs", "cpu: 4 CPUs", "scaling.cpus_per_worker"]),
        ({"gpus_per_worker": 2}, ["2 GPUs", "gpu: 8 CPUs, 1 GPUs"]),
        ({"cluster": "kind: Service"}, ["0 RayClusters"]),
        ({"cluster": "a: [b"}, ["YAML"]),
    ],
)
def test_refusals_are_one_line(options, parts):
    options = dict(options)
    with pytest.raises(UserError) as caught:
        rendered(options.pop("recipe", "digits"), **options)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_apply_gives_kubectl_the_manifest_and_tells_its_refusal(tmp_path, monkeypatch):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\nprintf "%s " "$@" > "$0.arguments"\ncat > "$0.input"\n[ ! -e "$0.refuse" ] || '
                       '{ echo warning >&2; echo "Error: already exists" >&2; exit 1; }\n')  # fmt: skip
    kubectl.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    apply_manifest("kind: $(x)\n")
    assert (tmp_path / "kubectl.input").read_text() == "kind: $(x)\n"
    assert (tmp_path / "kubectl.arguments").read_text() == "create --filename - "
    (tmp_path / "kubectl.refuse").touch()
    with pytest.raises(UserError, match="refused the job: Error: already exists$"):
        apply_manifest("kind: x\n")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="not on the PATH"):
        apply_manifest("kind: x\n")


def test_a_password_in_a_recipe_file_stays_out_of_the_manifest(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text('name: own\ndata: {source: digits}\ntracking: {uri: "http://me:hunter2@mlflow:5000"}\n')
    with pytest.raises(UserError, match="password would stand in the manifest") as refused:
        rendered(str(recipe))
    assert "hunter2" not in str(refused.value)


def test_a_cluster_that_is_none_is_told():
    whole = yaml.safe_load((ROOT / "deploy/kubernetes/base/raycluster.yaml").read_text())
    aliases = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for name, before in zip("bcdefghij", "abcdefghi"):
        aliases += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    group = {"template": {"spec": {"containers": [{"resources": {"limits": {"cpu": "4x"}}}]}}}
    for cluster, words in (
        ("", "0 RayClusters"),
        ("kind: RayCluster\n", "'metadata'"),
        ("kind: RayCluster\nmetadata: {}\nspec: &a {x: *a}\n", "Circular"),
        (f"kind: RayCluster\n{aliases}", "too large"),
        (yaml.safe_dump({**whole, "spec": {**whole["spec"], "headGroupSpec": {}}}), "'template'"),
        (yaml.safe_dump({**whole, "spec": {**whole["spec"], "workerGroupSpecs": "x"}}), "lacks a field"),
        (yaml.safe_dump({**whole, "spec": {**whole["spec"], "workerGroupSpecs": [group]}}), "no quantity"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            rendered(cluster=cluster)
    assert job_of(rendered(cluster=yaml.safe_dump({**whole, "built": "DATE"}).replace("DATE", "2024-01-01")))
