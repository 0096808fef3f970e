"""A registered model behind HTTP, as a Ray Serve application: sampling, scoring and in-painting.

    POST /sample   {"n": 4, "seed": 1}                                   -> {"samples": [[...], ...]}
    POST /score    {"inputs": [[...], ...]}                              -> {"log_prob": [...]}
    POST /inpaint  {"inputs": [[0.1, null, ...], ...], "mode": "map"}    -> {"completions": [...]}
    GET  /health   without a token; GET /metrics for Prometheus

Requests that wait are answered together. What is refused gets 4xx and {"error": {"status": ..., "message": ...}}.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import prometheus_client
from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from data.errors import UserError
from data.limits import MAX_SEED
from deploy.serving.jobs import ROUTES, Job, Limits, Refused, answer, read_job, reply

TOKEN_VARIABLE = "MANYMODES_SERVE_TOKEN"
# A batch is what came while the model was busy, and a little longer.
_BATCH, _WAIT_SECONDS = 64, 0.002
# Waiting requests beyond these are told to come back (503).
_ONGOING, _QUEUED = 256, 1024
# A body that takes longer to come is given up: slow clients would else keep all others waiting.
_BODY_SECONDS = 30.0
# JSON of more bytes is read and written beside the event loop.
_LARGE = 1 << 16


class ModelServer:
    """One replica: the model, its queue, and its counters."""

    def __init__(self, place: str, tracking_uri: str | None, label: str, token: str | None, limits: Limits) -> None:
        """Loads the model.

        Args:
            place: a folder with a model, or its URI in the registry at `tracking_uri`.
            label: what /health calls it.
            token: SHA-256 of the bearer token in hexadecimal digits; None lets everybody in.
            limits: of one request.
        """
        from deploy.registry import fetch_model
        from deploy.served_model import ServedModel
        from trainer.checkpoint import load_model
        from trainer.tracking import resolve_uri

        folder = fetch_model(place, resolve_uri(tracking_uri)) if place.startswith("models:") else place
        network, document = load_model(folder)
        self.served = ServedModel()
        self.served.hold(network, document["data"])
        self.label, self.token, self.limits = label, token, limits
        self.worker = ThreadPoolExecutor(1, "model")
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "manymodes_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = prometheus_client.Histogram(
            "manymodes_request_seconds", "Time to answer, by route", ["route"], registry=self.registry
        )
        self.batches = prometheus_client.Histogram(
            *("manymodes_batch_requests", "Requests answered together"),
            buckets=[2**i for i in range(7)],
            registry=self.registry,
        )

    async def __call__(self, request: Request) -> Response:
        began, path = time.perf_counter(), request.url.path
        try:
            response = await self._respond(request, path)
        except Refused as refused:
            response = _error(refused.status, str(refused))
        except ClientDisconnect:
            response = _error(400, "the request ended early")
        except Exception as error:  # what it was is for the log, not for the client
            print(f"manymodes: {path}: {type(error).__name__}: {error}", flush=True)
            response = _error(500, "the model failed on this request")
        route = path if path in (*ROUTES, "/health", "/metrics") else "other"
        self.requests.labels(route, response.status_code).inc()
        self.seconds.labels(route).observe(time.perf_counter() - began)
        return response

    async def _respond(self, request: Request, path: str) -> Response:
        if path == "/health":
            _method(request, "GET")
            return _json({"status": "ok", "model": self.label, "tasks": self._tasks()})
        self._authorise(request)
        if path == "/metrics":
            _method(request, "GET")
            return Response(prometheus_client.generate_latest(self.registry), media_type="text/plain; version=0.0.4")
        if path not in ROUTES:
            raise Refused(404, f"no such place: there are {', '.join(ROUTES)}, /health and /metrics")
        _method(request, "POST")
        task, name = ROUTES[path]
        if task not in self.served.tasks:
            raise Refused(404, f"this model cannot do {task}: it can do {', '.join(self._tasks())}")
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"the body is {kind}: send application/json")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._body(request)
        except TimeoutError as error:
            raise Refused(408, f"the body has not come within {_BODY_SECONDS:g} s: send it faster, or less") from error
        job = await _beside(len(body), read_job, task, body, self.served.shape, self.limits)
        found = await self.ask(job)
        if isinstance(found, Exception):
            raise found
        return Response(await _beside(20 * found.size, reply, name, found), media_type="application/json")

    def _tasks(self) -> list[str]:
        """What the model can do and a route asks for, by the routes' names."""
        return [route.removeprefix("/") for route, (task, _) in ROUTES.items() if task in self.served.tasks]

    def _authorise(self, request: Request) -> None:
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self.token):
            raise Refused(401, "send the server's token in a header Authorization: Bearer TOKEN")

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        declared = request.headers.get("content-length", "")
        parts, size = [], int(declared) if declared.isdecimal() else 0
        if size <= most:
            size = 0
            async for part in request.stream():
                size += len(part)
                if size > most:
                    break
                parts.append(part)
        if size > most:
            raise Refused(413, f"the body exceeds {most:,} bytes: ask for fewer samples at a time")
        return b"".join(parts)

    @serve.batch(max_batch_size=_BATCH, batch_wait_timeout_s=_WAIT_SECONDS)
    async def ask(self, jobs: list[Job]) -> Any:
        """Answers what waits, all at once, in the model's own thread."""
        self.batches.observe(len(jobs))
        seed = secrets.randbelow(MAX_SEED)
        return await asyncio.get_running_loop().run_in_executor(self.worker, answer, self.served, jobs, seed)


async def _beside(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function, in a thread where much is to be read or written."""
    return await asyncio.to_thread(function, *arguments) if size > _LARGE else function(*arguments)


def _method(request: Request, method: str) -> None:
    if request.method not in (method, "HEAD" if method == "GET" else method):
        raise Refused(405, f"{request.url.path} takes {method}")


def _json(document: Any, status: int = 200) -> Response:
    return Response(json.dumps(document), status, media_type="application/json")


def _error(status: int, message: str) -> Response:
    response = _json({"error": {"status": status, "message": message}}, status)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def application(place: str, tracking_uri: str | None, *, label: str, token: str | None, limits: Limits) -> Any:
    """The Ray Serve application of one model (see `ModelServer`); only a digest of the token leaves this process."""
    deployment = serve.deployment(
        ModelServer,
        name="model",
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_QUEUED,
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    digest = None if token is None else hashlib.sha256(token.encode()).hexdigest()
    return deployment.bind(place, tracking_uri, label, digest, limits)


def build(arguments: dict[str, str]) -> Any:
    """For `serve run deploy.serving.application:build model=models:/NAME@champion`, and for a RayService.

    Raises:
        UserError: no model, or no token in MANYMODES_SERVE_TOKEN (open=true goes without one).
    """
    place = arguments.get("model")
    if not place:
        raise UserError("name the model: model=models:/NAME@ALIAS")
    token = None if arguments.get("open") == "true" else required_token()
    return application(place, arguments.get("tracking_uri"), label=place, token=token, limits=Limits())


def required_token() -> str:
    """The bearer token from the environment.

    Raises:
        UserError: there is none, or a short one.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if len(token) < 16:
        state = "is too short (16 characters at least)" if token else "is not set"
        raise UserError(f"{TOKEN_VARIABLE} {state}: export {TOKEN_VARIABLE}=$(openssl rand -hex 32)")
    return token
