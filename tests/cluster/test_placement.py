"""What a cluster can hold: refused at once where it never will, taken where nodes may come."""

from types import SimpleNamespace

import pytest

from cluster import placement
from cluster.recipe import ScalingSettings, load_recipe
from data.errors import UserError


def node(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus), "memory": 1e9}}


@pytest.fixture
def cluster(monkeypatch):
    """Sets the cluster's nodes, and what its autoscaler says."""

    def make(*nodes, version="0", groups=("node_0",)):
        monkeypatch.setattr("ray.nodes", lambda: list(nodes))
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="none"))
        found = [SimpleNamespace(ray_node_type_name=name, node_id=str(i)) for i, name in enumerate(groups)]
        status = SimpleNamespace(
            stats=SimpleNamespace(autoscaler_version=version), active_nodes=found[1:], idle_nodes=found[:1]
        )
        monkeypatch.setattr("ray.autoscaler.v2.sdk.get_cluster_status", lambda address: status)

    return make


def test_workers_that_never_fit_are_refused(cluster):
    cluster(node(4), node(4, gpus=1), node(64, alive=False))
    for scaling, words in (
        ({"workers": 9}, "ask for 9 CPUs, the Ray cluster has 8"),
        ({"workers": 3, "cpus_per_worker": 2.5}, "on one node, 3 times; the Ray cluster's 2 nodes have room for 2"),
        ({"workers": 2, "gpus_per_worker": 1}, "ask for 2 GPUs"),
        ({"workers": 3, "placement": "strict_spread"}, "a node each, 3 in all, the Ray cluster has 2"),
    ):
        with pytest.raises(UserError, match=words):
            placement.require_workers(ScalingSettings(**scaling))
    placement.require_workers(ScalingSettings(workers=8))
    placement.require_workers(ScalingSettings(workers=12, min_workers=8))


def test_no_node_holds_more_workers_than_asked(cluster):
    cluster(node(4), node(8))
    scaling = ScalingSettings(workers=4, workers_per_node=2)
    assert placement.worker_resources(scaling) == {"CPU": 4}
    with pytest.raises(UserError, match="16 CPUs"):
        placement.require_workers(scaling)
    placement.require_workers(ScalingSettings(workers=3, workers_per_node=2))


def test_a_cluster_that_scales_is_waited_for(cluster):
    """Ray's own monitor calls a node's group by its id; an autoscaler knows groups."""
    asked = ScalingSettings(workers=8, gpus_per_worker=1)
    cluster(node(0), version="3", groups=("headgroup",))
    placement.require_workers(asked)
    for version, groups in (("0", ("headgroup",)), ("3", ("node_0",)), ("", ())):
        cluster(node(0), version=version, groups=groups)
        with pytest.raises(UserError, match="the Ray cluster has 0"):
            placement.require_workers(asked)


def test_lanes_suit_every_number_of_workers():
    recipe = load_recipe("digits", ["scaling.workers=4", "scaling.min_workers=2", "training.batch_size=240",
                                    "hierarchy=null"])  # fmt: skip
    assert recipe.scaling.lanes == 12
    with pytest.raises(UserError, match=r"multiple of the lanes \(12\)"):
        load_recipe("digits", ["scaling.workers=4", "scaling.min_workers=2", "training.batch_size=256"])
    with pytest.raises(UserError, match="must not be above workers"):
        load_recipe("digits", ["scaling.min_workers=3"])
