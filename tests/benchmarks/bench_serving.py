"""Requests per second and latency of the HTTP server at 32 clients, beside the bare call of the model.

The server runs as users start it, in processes of its own, with Ray's proxy; the clients (threads with a connection
each) share the machine's cores with it. Samples are of 784 numbers, as those of MNIST.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import numpy as np
import torch

from data.manifest import Manifest, Origin
from deploy.served_model import ServedModel
from trainer.checkpoint import save_model
from trainer.models.mfa import MFA

TOKEN = "benchmark token, not secret"
SHAPE, COMPONENTS, FACTORS = (28, 28, 1), 50, 8


def small_mixture(folder: str) -> MFA:
    """A mixture of the size of MNIST's, left in a folder."""
    torch.manual_seed(0)
    model = MFA(COMPONENTS, 784, FACTORS)
    model.set_components(
        torch.full((COMPONENTS,), 1 / COMPONENTS),
        torch.rand(COMPONENTS, 784),
        0.1 * torch.randn(COMPONENTS, 784, FACTORS),
        torch.full((COMPONENTS, 784), 0.01),
    )
    manifest = Manifest(name="none", shape=SHAPE, dtype="uint8", levels=256, source=Origin(spec="none"), splits={})
    save_model(folder, model, "mfa", manifest, dequantised=True)
    return model.eval()


def load(port: int, path: str, body: bytes, clients: int, seconds: float) -> tuple[float, np.ndarray]:
    """Requests per second, and the latency of each in milliseconds, of clients that ask again and again."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    over = time.perf_counter() + seconds
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}

    def ask(mine: list[float]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (began := time.perf_counter()) < over:
            connection.request("POST", path, body, headers)
            reply = connection.getresponse()
            text = reply.read()
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {text[:200]!r}")
            mine.append(1000 * (time.perf_counter() - began))

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in latencies]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = np.concatenate([np.array(mine) for mine in latencies])
    return len(found) / (time.perf_counter() - began), found


def bare(served: ServedModel, rows: np.ndarray, params: dict[str, object], seconds: float) -> tuple[float, np.ndarray]:
    """The same, for direct calls one after the other in this process, on one thread."""
    found, over = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < over:
        served.predict(None, rows, dict(params))
        found.append(1000 * (time.perf_counter() - began))
    return 1000 * len(found) / sum(found), np.array(found)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns when the server answers."""
    until = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError("the server does not answer") from error
            time.sleep(0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the server's replica has one core
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        served = ServedModel()
        served.hold(small_mixture(folder), {"shape": list(SHAPE)})
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        x = np.random.default_rng(0).random((1, 784), np.float32)
        questions = {
            "score, 1 sample": ("/score", {"inputs": x.round(4).tolist()}, {"task": "log_prob"}, x),
            "sample, 1 sample": ("/sample", {"n": 1}, {"task": "sample", "n": 1}, x[:0]),
            "sample, seeded": ("/sample", {"n": 1, "seed": 1}, {"task": "sample", "n": 1, "seed": 1}, x[:0]),
        }
        command = [sys.executable, "-c", "from cluster.entry import main; main()", "serve", folder, "--port", str(port)]
        environment = {**os.environ, "MANYMODES_SERVE_TOKEN": TOKEN}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            load(port, "/score", json.dumps({"inputs": x.tolist()}).encode(), 4, 1)  # everything is loaded then
            print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, MFA K={COMPONENTS}, l={FACTORS}, d=784")
            print(f"{'':<20}{'clients':>8}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}")
            for name, (path, body, params, rows) in questions.items():
                for clients in (0, 1, options.clients):
                    if clients:
                        rate, ms = load(port, path, json.dumps(body).encode(), clients, options.seconds)
                    else:
                        rate, ms = bare(served, rows, params, options.seconds / 2)
                    p50, p99 = np.percentile(ms, (50, 99))
                    print(f"{name:<20}{clients or 'bare call':>9}{rate:>11.0f}{p50:>10.2f}{p99:>10.2f}", flush=True)
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGINT)
                process.wait(60)


if __name__ == "__main__":
    main()
