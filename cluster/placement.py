"""Where workers and tasks may run: what a worker asks of a node, and whether the cluster can ever give it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import ray

from data.errors import UserError

if TYPE_CHECKING:
    from cluster.recipe import ScalingSettings


def worker_resources(scaling: ScalingSettings) -> dict[str, float]:
    """What one training worker reserves on its node.

    With `workers_per_node` it is so large a share of the largest node's CPUs that no node holds more workers.
    """
    cpus = scaling.cpus_per_worker
    if scaling.workers_per_node is not None:
        cpus = max(cpus, max((node["CPU"] for node in _nodes()), default=0.0) / scaling.workers_per_node)
    return {"CPU": cpus, **({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {})}


def require_workers(scaling: ScalingSettings) -> None:
    """Refuses a training job whose workers the cluster can never hold.

    Raises:
        UserError: with what is asked for and what is there.
    """
    fewest = scaling.min_workers or scaling.workers
    if scaling.workers_per_node is not None and not any(node["CPU"] for node in _nodes()):
        raise UserError(
            "scaling.workers_per_node needs nodes to count: there are none yet; set cpus_per_worker instead"
        )
    require_resources("the workers", worker_resources(scaling), fewest)
    one_each = scaling.placement == "strict_spread" or scaling.workers_per_node == 1
    if one_each and not autoscales() and len(_nodes()) < fewest:
        raise UserError(
            f"the workers ask for a node each, {fewest} in all, the Ray cluster has {len(_nodes())}: add nodes, lower "
            "scaling.workers, or set scaling.placement to spread"
        )


def require_resources(what: str, resources: dict[str, float], n: int = 1) -> None:
    """Refuses work that the cluster can never place; Ray itself would wait for ever.

    A cluster that an autoscaler may enlarge is taken to be large enough.

    Args:
        what: the work, in the plural.
        resources: what one piece of it reserves, CPU and GPU.
        n: pieces that run at once.

    Raises:
        UserError: with what is asked for and what is there.
    """
    nodes = _nodes()
    if autoscales():
        return
    for name, each in resources.items():
        there = sum(node[name] for node in nodes)
        if n * each > there:
            raise UserError(f"{what} ask for {n * each:g} {name}s, the Ray cluster has {there:g}: {_remedy(name)}")
    room = sum(math.floor(min(node[name] / each for name, each in resources.items() if each)) for node in nodes)
    if n > room:
        asked = " and ".join(f"{each:g} {name}s" for name, each in resources.items())
        raise UserError(
            f"{what} ask for {asked} on one node, {n} times; the Ray cluster's {len(nodes)} nodes have room for "
            f"{room}: {_remedy('CPU')}"
        )


def _remedy(name: str) -> str:
    return (
        f"add nodes, or lower scaling.workers, scaling.{name.lower()}s_per_worker or hierarchy.{name.lower()}s_per_task"
    )


def _nodes() -> list[dict[str, float]]:
    """CPUs and GPUs of every living node."""
    found = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [{name: float(resources.get(name, 0)) for name in ("CPU", "GPU")} for resources in found]


def autoscales() -> bool:
    """Whether an autoscaler may add nodes to the cluster.

    It names the groups of nodes that it may enlarge; where there is none, Ray's monitor invents a group `node_ID` for
    each node. An answer that is not understood counts as none.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        if int(status.stats.autoscaler_version or 0) == 0:  # the second version has never run here
            return False
        nodes = [*status.active_nodes, *status.idle_nodes]
        return any(node.ray_node_type_name not in ("", f"node_{node.node_id}") for node in nodes)
    except Exception:  # Ray promises no type
        return False
