"""The HTTP server: what it answers, what it refuses, and how it ends. One server for the module, on loopback."""

import asyncio
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deploy.served_model import ServedModel
from deploy.serving.jobs import Job, Limits, Refused, answer, read_job

TOKEN = "a token of the tests, and long enough"
LIMITS = Limits(body_bytes=100_000, rows=50, values=3000)
SECONDS = 120  # for a server to come up on a busy machine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(url, body=None, headers=None, method=None):
    """Status, headers and parsed reply."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, {k: v for k, v in sent.items() if v is not None}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def wait_for(url, process):
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, "the server ended early"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail("the server did not come up")


def end(process, number, group=False):
    """Ends a process that we started, by its id."""
    if process.poll() is not None:
        return
    (os.killpg if group else os.kill)(process.pid, number)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


@pytest.fixture(scope="module")
def server(shelf, tmp_path_factory):
    """`manymodes serve` in a process of its own; ended by SIGINT, as by Ctrl-C."""
    model, folder, port = shelf.mixture(), tmp_path_factory.mktemp("serving"), free_port()
    shelf.put(model, "served")
    code = "from cluster.entry import main; main()"
    command = [sys.executable, "-c", code, "serve", "models:/served@candidate", "--port", str(port)]
    command += ["--max-body-mb", "0.1", "--max-rows", "50", "--tracking-uri", shelf.uri]
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env={**os.environ, "MANYMODES_SERVE_TOKEN": TOKEN}, start_new_session=True,
            # Tests that run in the background may have been told to ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health", process)
        yield SimpleNamespace(url=url, model=model, process=process)
    finally:
        end(process, signal.SIGINT)
    assert process.returncode == 0
    assert (folder / "out").read_text().endswith("ended\n")
    assert (folder / "err").read_text() == ""


def test_it_answers_as_the_model_does(server):
    x = np.random.default_rng(0).random((5, 64), np.float32)
    status, _, text = ask(f"{server.url}/score", {"inputs": x.tolist()})
    assert status == 200, text
    with torch.no_grad():
        expected = server.model.log_prob(torch.from_numpy(x)).numpy()
        half = server.model.inpaint(torch.from_numpy(x), torch.arange(64) >= 20, mode="mean").numpy()
    np.testing.assert_allclose(json.loads(text)["log_prob"], expected, rtol=1e-5)
    images = np.where(np.arange(64) >= 20, x, None).reshape(5, 8, 8, 1).tolist()
    mask = (np.arange(64) >= 20).tolist()
    for body in ({"inputs": images, "mode": "mean"}, {"inputs": x.tolist(), "mask": mask, "mode": "mean"}):
        status, _, text = ask(f"{server.url}/inpaint", body)
        assert status == 200, text
        np.testing.assert_allclose(np.array(json.loads(text)["completions"]).reshape(5, 64), half, atol=1e-5)
    status, _, text = ask(f"{server.url}/inpaint", {"inputs": images, "mode": "sample", "n": 3, "seed": 1})
    assert np.array(json.loads(text)["completions"]).shape == (5, 3, 8, 8, 1)
    assert ask(f"{server.url}/score", {"inputs": []})[2] == '{"log_prob":[]}'


def test_requests_that_are_answered_together_do_not_mix(server):
    def sample(seed):
        return json.loads(ask(f"{server.url}/sample", {"n": 2, "seed": seed})[2])["samples"]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(sample, [1, 2, None, None] * 8))
    assert all(each == found[0] for each in found[0::4])
    assert all(each == found[1] for each in found[1::4])
    drawn = [json.dumps(each) for each in found[2::4] + found[3::4]]
    assert len(set(drawn)) == len(drawn) == 16
    expected = server.model.sample(2, torch.Generator().manual_seed(1)).numpy().reshape(2, 8, 8, 1)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    metrics = ask(f"{server.url}/metrics")[2]
    assert 'manymodes_requests_total{route="/sample",status="200"}' in metrics
    assert "manymodes_batch_requests_sum" in metrics


def test_what_is_refused_gets_a_status_and_a_message(server):
    row = [0.5] * 64
    refused = [
        (401, "/score", {"inputs": [row]}, {"Authorization": None}),
        (401, "/score", {"inputs": [row]}, {"Authorization": "Bearer wrong"}),
        (401, "/metrics", None, {"Authorization": f"Basic {TOKEN}"}),
        (404, "/nothing", {}, {}),
        (405, "/score", None, {}),
        (415, "/score", {"inputs": [row]}, {"Content-Type": "text/plain"}),
        (413, "/score", b"[" * 200_000, {}),
        (413, "/score", {"inputs": [[0] * 64] * 51}, {}),
        (413, "/sample", {"n": 10**9}, {}),
        (400, "/score", b"[" * 90_000, {}),
        (400, "/score", b'{"inputs": ', {}),
        (400, "/score", b"\xff\xfe", {}),
        (400, "/score", {"inputs": [row, row[:5]]}, {}),
    ]
    for status, path, body, headers in refused:
        found, answered, text = ask(server.url + path, body, headers)
        assert found == status, (path, text)
        assert answered["Content-Type"] == "application/json"
        error = json.loads(text)["error"]
        assert error["status"] == status
        assert len(error["message"]) > 10
    assert ask(f"{server.url}/health", headers={"Authorization": None})[0] == 200


@pytest.mark.parametrize(
    ("task", "body", "message"),
    [
        ("log_prob", {"inputs": [["1"] * 64]}, "numbers"),
        ("log_prob", {"inputs": [[True] * 64]}, "numbers"),
        ("log_prob", {"inputs": [[1e39] * 64]}, "too large"),
        ("log_prob", {"inputs": [[10**400] * 64]}, "numbers|too large"),
        ("log_prob", {"inputs": [[None] * 64]}, "only /inpaint"),
        ("log_prob", {"inputs": [0.5] * 64}, r"shape \[64\]: give \[n, 64\] or \[n, 8, 8, 1\]"),
        ("log_prob", {"inputs": {"a": 1}}, "list of samples"),
        ("log_prob", {"input": []}, "unknown field 'input'"),
        ("log_prob", [], "JSON object"),
        ("sample", {"n": 0}, "whole number from 1"),
        ("sample", {"n": 1.5}, "whole number"),
        ("sample", {"seed": -1}, "seed must be"),
        ("inpaint", {"inputs": [[0] * 64], "mode": "best"}, "map, mean, sample"),
        ("inpaint", {"inputs": [[0] * 64], "mask": [1] * 64}, "booleans"),
        ("inpaint", {"inputs": [[0] * 64], "noise": 1}, "true or false"),
        ("log_prob", b'{"inputs": [[NaN]]}', "no JSON"),
    ],
)
def test_malformed_bodies(task, body, message):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refused, match=message) as caught:
        read_job(task, raw, (8, 8, 1), LIMITS)
    assert caught.value.status == 400


def test_no_sample_cannot_be_completed_without_end():
    body = json.dumps({"inputs": [], "mode": "sample", "n": 10**30}).encode()
    with pytest.raises(Refused, match="at most") as caught:
        read_job("inpaint", body, (8, 8, 1), LIMITS)
    assert caught.value.status == 413


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    """Else some hundred of them would keep everybody waiting."""
    from starlette.requests import Request

    from deploy.serving import application

    async def never():
        await asyncio.Event().wait()

    monkeypatch.setattr(application, "_BODY_SECONDS", 0.05)
    server = object.__new__(application.ModelServer)
    server.token, server.limits, server.served = None, LIMITS, SimpleNamespace(tasks=["log_prob"])
    scope = {"type": "http", "method": "POST", "path": "/score", "headers": [(b"content-length", b"9")]}
    with pytest.raises(Refused, match="has not come") as caught:
        asyncio.run(asyncio.wait_for(server._respond(Request(scope, never), "/score"), 20))
    assert caught.value.status == 408


def test_health_names_the_tasks_that_have_a_route():
    from starlette.requests import Request

    from deploy.serving import application

    server = object.__new__(application.ModelServer)
    server.label, server.served = "m", SimpleNamespace(tasks=["log_prob", "responsibilities", "sample"])
    scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
    found = asyncio.run(server._respond(Request(scope), "/health"))
    assert json.loads(found.body)["tasks"] == ["sample", "score"]


def test_one_bad_job_of_a_batch_fails_alone(shelf):
    served = ServedModel()
    served.hold(shelf.mixture(), {"shape": [8, 8, 1]})
    x = np.full((2, 64), 0.5, np.float32)
    jobs = [
        Job("log_prob", x, {"task": "log_prob"}),
        Job("sample", x[:0], {"task": "sample", "n": 3}),
        Job("nothing", x, {"task": "nothing"}),
        Job("log_prob", x[:1], {"task": "log_prob"}),
        Job("sample", x[:0], {"task": "sample", "n": 2}),
    ]
    found = answer(served, jobs, 0)
    assert [getattr(each, "shape", None) for each in found] == [(2,), (3, 8, 8, 1), None, (1,), (2, 8, 8, 1)]
    assert isinstance(found[2], ValueError)


def test_it_does_not_start_where_it_should_not(call, monkeypatch, tmp_path):
    monkeypatch.delenv("MANYMODES_SERVE_TOKEN", raising=False)
    assert "MANYMODES_SERVE_TOKEN is not set" in call("serve", "model").err
    assert "--no-token" in call("serve", "model", "--no-token", "--host", "0.0.0.0").err
    monkeypatch.setenv("MANYMODES_SERVE_TOKEN", "short")
    assert "too short" in call("serve", "model").err
    monkeypatch.setenv("MANYMODES_SERVE_TOKEN", TOKEN)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen" in call("serve", "model", "--port", taken.getsockname()[1]).err
    found = call("serve", tmp_path / "nothing", "--port", free_port())
    assert found.code == 2
    assert "no model there" in found.err


def test_mlflow_serves_it_as_it_is(shelf, tmp_path):
    shelf.put(shelf.mixture(), "plain")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/plain@candidate"]
    command += ["--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    # MLflow calls uvicorn by name, as in an environment that is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "MLFLOW_TRACKING_URI": shelf.uri, "PATH": path}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/ping", process)
        rows = [[0.5] * 64, [None] * 20 + [0.5] * 44]
        for body, shape in (
            ({"inputs": rows, "params": {"task": "inpaint"}}, (2, 8, 8, 1)),
            ({"inputs": rows[:1]}, (1,)),
            ({"inputs": [], "params": {"task": "sample", "n": 2, "seed": 1}}, (2, 8, 8, 1)),
        ):
            status, _, text = ask(f"{url}/invocations", body)
            assert status == 200, text
            assert np.array(json.loads(text)["predictions"]).shape == shape
        assert ask(f"{url}/invocations", {"inputs": rows[:1], "params": {"task": "features"}})[0] == 400
    finally:
        end(process, signal.SIGTERM, group=True)
