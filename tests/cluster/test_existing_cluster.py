"""A job on a cluster that was there before: token authentication, DeepSpeed under Ray Train, one worker."""

import os
import secrets
import socket
import subprocess
import sys
import time

import pytest

from trainer.checkpoint import load_model


@pytest.fixture
def cluster(tmp_path):
    """A head node with tokens on, on the loopback address; ended by its own process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    options = ["--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--block"]
    with open(tmp_path / "ray.log", "w") as log:
        head = subprocess.Popen([ray, "start", "--head", *options], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert head.poll() is None, (tmp_path / "ray.log").read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", environment
    finally:
        head.terminate()
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait(timeout=30)


def train(address, environment, out, *overrides):
    command = [os.path.join(os.path.dirname(sys.executable), "manymodes"), "train", "digits", "--out", str(out)]
    command += ["--ray-address", address, *(part for key in overrides for part in ("--set", key))]
    return subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, timeout=180)


def test_deepspeed_on_an_existing_cluster_and_a_wrong_token(cluster, tmp_path):
    address, environment = cluster
    small = ["training.steps=12", "hierarchy=null", "training.engine=deepspeed", "training.zero_stage=2"]
    done = train(address, environment, tmp_path / "out", *small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_model(str(tmp_path / "out" / "model"))[0].n_components == 10

    too_many = train(address, environment, tmp_path / "many", "scaling.workers=3", "training.batch_size=255")
    assert too_many.returncode == 2
    assert "the workers ask for 3 CPUs, the Ray cluster has 2" in too_many.stderr

    stranger = {**environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = train(address, stranger, tmp_path / "other", *small)
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "cannot be used" in refused.stderr
