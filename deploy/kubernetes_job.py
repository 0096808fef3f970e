"""Jobs on Kubernetes: a recipe as a RayJob manifest, and its creation by kubectl."""

from __future__ import annotations

import json
import math
import re
import secrets
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from data import storage
from data.errors import UserError, one_line

# The operator refuses longer ones: names of pods and services are made from them.
_LONGEST_NAME = 47
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# HOST[:PORT]/PATH:TAG@DIGEST; the container runtime knows the rest.
_IMAGE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._/:@-]*")
_CREDENTIALS = re.compile(r"://[^/@\s]+:[^/@\s]+@")
_NO_PASSWORD = "would stand in the manifest: put it into the Secret of the jobs"
# Characters of a cluster's manifest, its aliases written out: nine lines of aliases can be a billion values.
_LARGEST_MANIFEST = 3_000_000
_RECIPE_FOLDER = "/etc/manymodes"
_KUBECTL_SECONDS = 120


def render_ray_job(
    recipe: str,
    *,
    out: str,
    overrides: Sequence[str] = (),
    workers: int = 1,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    name: str | None = None,
    namespace: str | None = None,
    image: str | None = None,
    cluster: str | None = None,
) -> str:
    """The YAML of a RayJob that runs a recipe on a cluster of its own, with the pods that its workers need.

    MLflow's address, storage keys and passwords are not in it: the pods take them from the ConfigMap and the Secrets
    that the cluster's manifest names.

    Args:
        recipe: a shipped recipe's name, or a YAML file, which travels in a ConfigMap beside the job.
        out: URL that all pods reach, or a path in a volume that the head mounts.
        overrides: `key=value` texts for --set.
        workers: training workers, as `cpus_per_worker` and `gpus_per_worker` of the recipe's scaling.
        name: of the RayJob; the recipe's with a random ending if None.
        namespace: None takes that of `cluster`, else `manymodes`.
        image: of all Ray containers; None keeps those of `cluster`.
        cluster: manifests with one RayCluster, such as `kubectl kustomize` prints for an overlay; its spec and labels
            (queues) become the job's. None takes the RayCluster of deploy/kubernetes/base.

    Raises:
        UserError: an unknown recipe, a name that Kubernetes refuses, an `out` that the pods do not share, a password
            in a text that would stand in the manifest, or workers that fit into no pod.
    """
    manifests = Path(str(files("deploy"))) / "kubernetes"
    if cluster is None and image is None:
        raise UserError("the job needs an image: give --image, or --cluster with the manifests of an overlay")
    base = (manifests / "base" / "raycluster.yaml").read_text()
    found = _ray_cluster(base if cluster is None else cluster)
    job = _document((manifests / "components" / "job" / "rayjob.yaml").read_text())
    own_recipe = _recipe_file(recipe)
    name = name or f"{_slug(own_recipe.stem if own_recipe else recipe)}-{secrets.token_hex(3)}"
    namespace = namespace or found["metadata"].get("namespace") or "manymodes"
    _check_names(name, namespace, image)

    spec = found["spec"]
    head = spec["headGroupSpec"]["template"]["spec"]
    _check_shared(out, head)
    _place(spec.get("workerGroupSpecs") or [], workers, cpus_per_worker, gpus_per_worker)
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    job["metadata"] = {**metadata, "labels": found["metadata"].get("labels") or {}}
    job["spec"]["rayClusterSpec"] = spec
    documents = [job]
    if own_recipe:
        text = own_recipe.read_text(encoding="utf-8")
        if _CREDENTIALS.search(text):
            raise UserError(f"{own_recipe}: a URL with a password {_NO_PASSWORD}")
        documents.insert(
            0, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"recipe.yaml": text}}
        )
        head.setdefault("volumes", []).append({"name": "recipe", "configMap": {"name": name}})
        mount = {"name": "recipe", "mountPath": _RECIPE_FOLDER, "readOnly": True}
        head["containers"][0].setdefault("volumeMounts", []).append(mount)
        recipe = f"{_RECIPE_FOLDER}/recipe.yaml"
    job["spec"]["entrypoint"] = _entrypoint(recipe, out, overrides)
    submitter = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]
    submitter["image"] = image or head["containers"][0]["image"]
    if image:
        for container in _ray_containers(spec):
            container["image"] = image
    return yaml.safe_dump_all(documents, sort_keys=False, width=120, allow_unicode=True)


def apply_manifest(text: str) -> None:
    """Creates what a manifest describes, by kubectl and whatever cluster it is set to.

    Creates and does not change: a RayJob that is there already would not run again.

    Raises:
        UserError: no kubectl, no answer, or what the cluster says against it.
    """
    try:
        done = subprocess.run(
            ["kubectl", "create", "--filename", "-"],
            input=text,
            capture_output=True,
            text=True,
            timeout=_KUBECTL_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise UserError("kubectl is not on the PATH: install it, or create the printed manifest elsewhere") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"kubectl got no answer in {_KUBECTL_SECONDS} s: check `kubectl config current-context`"
        ) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"kubectl refused the job: {one_line(RuntimeError(said[-1] if said else 'no reason given'))}")


def _entrypoint(recipe: str, out: str, overrides: Sequence[str]) -> str:
    """The command as shell text for `spec.entrypoint`.

    On its way it is an argument of a container, where Kubernetes replaces $(NAME) and reads $$ as $; a line of bash,
    which calls `ray job submit`; and, quoted anew by that, a line of sh.
    """
    words = ["manymodes", "run", recipe, "--out", out]
    for override in overrides:
        words += ["--set", override]
    for word in words:
        if not word.isprintable():
            raise UserError(f"{word!r} holds characters that are no text: leave them out")
        if _CREDENTIALS.search(word):
            raise UserError(f"a URL with a password {_NO_PASSWORD}")
    return shlex.join(words).replace("$", "$$")


def _document(text: str) -> dict[str, Any]:
    """One YAML document without shared parts: what is changed in one place stays there."""
    return json.loads(json.dumps(yaml.safe_load(text)))


def _ray_cluster(text: str) -> dict[str, Any]:
    try:
        found = [doc for doc in yaml.safe_load_all(text) if isinstance(doc, dict) and doc.get("kind") == "RayCluster"]
    except yaml.YAMLError as error:
        raise UserError(f"the cluster's manifests cannot be read as YAML: {one_line(error)}") from error
    if len(found) != 1:
        raise UserError(f"the cluster's manifests hold {len(found)} RayClusters: give those of one overlay")
    try:
        parts, size = [], 0
        for part in json.JSONEncoder(default=str).iterencode(found[0]):  # a date that stands without quotes
            parts.append(part)
            size += len(part)
            if size > _LARGEST_MANIFEST:
                raise UserError("the cluster's manifest is too large, or its aliases are: give one overlay's")
        manifest = json.loads("".join(parts))
        _check_shape(manifest)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        told = repr(error) if isinstance(error, LookupError) else one_line(error)
        raise UserError(
            f"the cluster's RayCluster lacks a field, or has one of another kind ({told}): give an overlay's "
            "manifests, as `kubectl kustomize` prints them"
        ) from error
    return manifest


def _check_shape(manifest: dict[str, Any]) -> None:
    """Reads what is used of a RayCluster; an exception says what cannot be."""
    manifest["metadata"].get("namespace"), (manifest["metadata"].get("labels") or {}).items()
    (manifest["spec"]["headGroupSpec"]["template"]["spec"].get("volumes") or [])[:0]
    for container in _ray_containers(manifest["spec"]):
        limits = container.get("resources", {}).get("limits", {})
        for name in ("cpu", "nvidia.com/gpu"):
            _quantity(limits.get(name, 0))


def _ray_containers(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The container of Ray, by contract the first, of every pod of a cluster."""
    for group in [spec["headGroupSpec"], *(spec.get("workerGroupSpecs") or [])]:
        yield group["template"]["spec"]["containers"][0]


def _recipe_file(recipe: str) -> Path | None:
    """The user's own recipe; None for one that the image has too."""
    shipped = sorted(path.stem for path in (Path(str(files("trainer"))) / "recipes").glob("*.yaml"))
    if recipe in shipped:
        return None
    path = Path(recipe)
    if "\0" in recipe or not path.is_file():
        raise UserError(f"unknown recipe {recipe!r}: give a YAML file or one of {', '.join(shipped)}")
    return path


def _slug(text: str) -> str:
    """A beginning for a name, of what Kubernetes allows."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[: _LONGEST_NAME - 7].strip("-")
    return slug if slug[:1].isalpha() else f"job-{slug}".rstrip("-")[: _LONGEST_NAME - 7]


def _check_names(name: str, namespace: str, image: str | None) -> None:
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise UserError(
            f"job name {name!r}: at most {_LONGEST_NAME} small letters, digits, hyphens; a letter first, no hyphen last"
        )
    if not _NAMESPACE.fullmatch(namespace):
        raise UserError(f"namespace {namespace!r}: at most 63 small letters, digits and hyphens, no hyphen at the ends")
    if image is not None and not _IMAGE.fullmatch(image):
        raise UserError(f"image {image!r} is not understood: give REGISTRY/NAME:TAG")


def _check_shared(out: str, head: dict[str, Any]) -> None:
    """Refuses a place for results that ends with the pod."""
    if not storage.is_local(storage.check_url(out)):
        return
    lost = {volume["name"] for volume in head.get("volumes") or [] if "emptyDir" in volume}
    mounts = [mount for mount in head["containers"][0].get("volumeMounts") or [] if mount["name"] not in lost]
    place = Path(storage.check_url(out))
    if not any(out.startswith(("/", "file:")) and place.is_relative_to(mount["mountPath"]) for mount in mounts):
        raise UserError(f"--out {out}: the pods do not share this folder; give a URL, as s3://BUCKET/runs/NAME")


def _place(groups: list[dict[str, Any]], workers: int, cpus: float, gpus: float) -> None:
    """Gives the group that fits as many pods as the workers need, from the beginning: the job counts them at its start.

    Ray takes the size of a node from its container's limits; the first group that fits is taken, groups with GPUs
    only for workers that ask for some.
    """
    sizes = []
    for group in groups:
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        cpu, gpu = math.ceil(_quantity(limits.get("cpu", 0))), int(_quantity(limits.get("nvidia.com/gpu", 0)))
        sizes.append(f"{group['groupName']}: {cpu} CPUs, {gpu} GPUs")
        if bool(gpu) != bool(gpus):
            continue
        per_pod = math.floor(cpu / cpus + 1e-9)
        if gpus:
            per_pod = min(per_pod, math.floor(gpu / gpus + 1e-9))
        if per_pod:
            group["replicas"] = group["minReplicas"] = math.ceil(workers / per_pod)
            group["maxReplicas"] = max(group.get("maxReplicas", 0), group["replicas"])
            return
    raise UserError(
        f"a worker asks for {cpus:g} CPUs and {gpus:g} GPUs, which no pod has ({'; '.join(sizes) or 'no groups'}): "
        "lower scaling.cpus_per_worker or scaling.gpus_per_worker, or give a --cluster with larger limits"
    )


def _quantity(text: str | int | float) -> Decimal:
    """A Kubernetes quantity of CPUs or devices: 4, "4" or "500m"."""
    number = str(text)
    try:
        return Decimal(number[:-1]) / 1000 if number.endswith("m") else Decimal(number)
    except ArithmeticError as error:
        raise ValueError(f"{number!r} is no quantity: write 4 or 500m") from error
