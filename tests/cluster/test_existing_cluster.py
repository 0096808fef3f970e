"""A job on a cluster that was there before: tokens, DeepSpeed, too little room, and nodes that die."""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import load_model


def command(address, out, *overrides):
    found = [os.path.join(os.path.dirname(sys.executable), "manymodes"), "train", "digits", "--out", str(out)]
    return [*found, "--ray-address", address, *(part for key in overrides for part in ("--set", key))]


def train(cluster, out, *overrides, **environment):
    return subprocess.run(
        command(cluster.address, out, *overrides),
        env={**cluster.environment, **environment}, cwd=out.parent, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def test_deepspeed_on_an_existing_cluster_and_a_wrong_token(cluster, tmp_path):
    small = ["training.steps=12", "hierarchy=null", "training.engine=deepspeed", "training.zero_stage=2"]
    done = train(cluster, tmp_path / "out", *small, "scaling.placement=strict_pack", "scaling.threads_per_worker=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_model(str(tmp_path / "out" / "model"))[0].n_components == 10

    for overrides, words in (
        (("scaling.workers=3", "training.batch_size=255"), "the workers ask for 3 CPUs, the Ray cluster has 2"),
        (("scaling.placement=strict_spread",), "a node each, 2 in all, the Ray cluster has 1"),
        (("scaling.workers_per_node=1",), "the workers ask for 4 CPUs, the Ray cluster has 2"),
    ):
        refused = train(cluster, tmp_path / "many", *overrides)
        assert refused.returncode == 2
        assert words in refused.stderr

    refused = train(cluster, tmp_path / "other", *small, RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "cannot be used" in refused.stderr


def test_a_full_cluster_is_waited_for_and_told(cluster, tmp_path):
    hold = (
        f"import ray, time; ray.init('{cluster.address}'); hold = ray.remote(num_cpus=2)(lambda: time.sleep(99))\n"
        "held = hold.remote(); print('held', flush=True); ray.get(held)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], env=cluster.environment, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "held"
        time.sleep(2)
        refused = train(cluster, tmp_path / "out", "scaling.start_timeout_seconds=8", "hierarchy=null")
    finally:
        holder.kill()
        holder.wait()
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "no room for the workers on the cluster within 8 s" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_an_elastic_job_goes_on_without_a_node(cluster, tmp_path):
    """Two workers on two nodes, one of which dies: the other trains what both would have trained."""
    second = cluster.add_node()
    small = [
        *("hierarchy=null", "training.steps=400", "training.checkpoint_every=20", "training.batch_size=1024"),
        *("scaling.min_workers=1", "scaling.workers_per_node=1", "scaling.start_timeout_seconds=60"),
    ]
    whole = train(cluster, tmp_path / "whole", *small)
    assert whole.returncode == 0, whole.stderr[-3000:]
    job = subprocess.Popen(
        command(cluster.address, tmp_path / "cut", *small),
        env=cluster.environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _wait_for(tmp_path / "cut", "*/root/checkpoints/*/step_00000040*", job)
        cluster.kill(second)
        _, told = job.communicate(timeout=240)
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 0, told[-3000:]
    for name, value in load_model(str(tmp_path / "whole" / "model"))[0].state_dict().items():
        found = load_model(str(tmp_path / "cut" / "model"))[0].state_dict()[name]
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4)


def _wait_for(out: Path, pattern: str, job) -> None:
    for _ in range(900):
        if list((out / "work").glob(pattern)):
            return
        assert job.poll() is None, job.stderr.read()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} in 90 s")
