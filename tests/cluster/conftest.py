"""What the tests of the cluster share."""

import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers in this folder are imported by name

from scored import blobs


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Known samples with labels, others of the same distribution, and some that lack a mode; in this folder."""
    monkeypatch.chdir(tmp_path)
    x = blobs(1200)
    np.savez("known.npz", x=x, y=np.arange(1200) % 4)
    np.save("same.npy", blobs(500, 1))
    near = np.square(blobs(500, 2) - x[:1, ...]).sum((1, 2, 3)) < 2.5
    np.save("part.npy", blobs(500, 2)[~near])
    return tmp_path


@dataclass
class Nodes:
    """A Ray cluster with tokens on, on the loopback address; its nodes are processes of two CPUs each."""

    folder: str
    address: str
    environment: dict[str, str]
    nodes: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *options):
        """Starts a node: a head, or one that joins it."""
        ray = os.path.join(os.path.dirname(sys.executable), "ray")
        with open(f"{self.folder}/ray{len(self.nodes)}.log", "w") as log:
            options = ["--num-cpus=2", "--block", *options]
            node = subprocess.Popen([ray, "start", *options], env=self.environment, stdout=log, stderr=log)
        self.nodes.append(node)
        return node

    def add_node(self):
        """Joins another node and waits until the cluster knows it; returns its process."""
        node = self.start(f"--address={self.address}")
        count = f"import ray; ray.init('{self.address}'); print(sum(n['Alive'] for n in ray.nodes()))"
        for _ in range(30):
            found = subprocess.run(
                [sys.executable, "-c", count], env=self.environment, capture_output=True, text=True, timeout=60
            )
            if found.stdout.strip() == str(len(self.nodes)):
                return node
            assert node.poll() is None
            time.sleep(1)
        raise AssertionError("the node did not join")

    def kill(self, node):
        """Ends a node as a power cut would, with all processes that it started."""
        if node.poll() is None:
            for process in (*psutil.Process(node.pid).children(recursive=True), node):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            node.wait(timeout=30)


@pytest.fixture
def cluster(tmp_path):
    """A head node; ended, with the nodes that a test adds, by their own processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    found = Nodes(str(tmp_path), f"127.0.0.1:{port}", environment)
    head = found.start("--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false")
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert head.poll() is None, (tmp_path / "ray0.log").read_text()
            time.sleep(0.1)
        yield found
    finally:
        for node in reversed(found.nodes):
            found.kill(node)
