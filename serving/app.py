"""The REST interface: addresses, parameters, answers, errors, metrics."""

import argparse
import asyncio
import dataclasses
import hmac
import logging
import math
import secrets
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

import infer

import prometheus_client
import pydantic
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.lanes import MOST_TOPK, BusyError, Service, estimate_cost
from serving.uploads import MOST_IMAGES, Intake
from wwts import files

PAGE = Path(__file__).resolve().parent.parent / "pages" / "serve.html"
POLICY = "default-src 'none'; img-src data:; style-src 'nonce-{0}'; script-src 'nonce-{0}'; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

REQUESTS = prometheus_client.Counter("wwts_requests", "Requests by path and status", ["path", "status"])
SECONDS = prometheus_client.Histogram("wwts_request_seconds", "Time to answer POST /recognize")
BATCHES = prometheus_client.Histogram("wwts_batch_images", "Images a batch", buckets=[1, 2, 4, 8, 16, 32, 64])
QUEUE = prometheus_client.Gauge("wwts_queue_images", "Images that are taken and not answered")

log = logging.getLogger("wwts")


class Parameters(pydantic.BaseModel, extra="forbid"):
    """What a request may ask for, in its address or beside its images."""

    topk: int = pydantic.Field(5, ge=1, le=MOST_TOPK, description="最多几个标签")
    threshold: float = pydantic.Field(0.0, ge=0, le=1, description="最低置信度")


RANGES = {"topk": f"1 到 {MOST_TOPK} 的整数", "threshold": "0 到 1 之间的数"}


class Prediction(pydantic.BaseModel):
    """A label, with its index in the model's output."""

    label: str
    confidence: float
    index: int


class Record(pydantic.BaseModel):
    """What one image shows, or why that cannot be told: the record that infer.py writes."""

    path: str
    model: str
    version: str
    results: list[Prediction] | None = None
    error: str | None = None
    cached: bool | None = None


class Problem(pydantic.BaseModel):
    """Why a request is refused."""

    error: str


class Model(pydantic.BaseModel):
    """The model that answers."""

    name: str
    version: str
    num_classes: int
    device: str


def describe_body() -> dict[str, Any]:
    """The body of POST /recognize for OpenAPI."""
    image = {"type": "string", "contentMediaType": "image/*"}
    text = {"type": "string", "contentEncoding": "base64"}
    fields = Parameters.model_json_schema()["properties"]

    def form(images: dict[str, Any]) -> dict[str, Any]:
        return {"schema": {"type": "object", "required": ["image"], "properties": {"image": images} | fields}}

    content = {
        "multipart/form-data": form({"type": "array", "items": image, "maxItems": MOST_IMAGES}),
        "image/*": {"schema": image},
        "application/json": form({"anyOf": [text, {"type": "array", "items": text, "maxItems": MOST_IMAGES}]}),
    }
    return {"requestBody": {"required": True, "content": content}}


class Measured:
    """ASGI middleware that counts and times requests."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        start, status = time.perf_counter(), 500

        async def observe(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, observe)
        finally:
            path = getattr(scope.get("route"), "path", "")  # and not whatever addresses strangers try
            REQUESTS.labels(path, status).inc()
            if path == "/recognize":
                SECONDS.observe(time.perf_counter() - start)


def describe_problem(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that raised an exception."""
    status, headers, message = 500, None, "服务内部出错"
    if isinstance(error, HTTPException):
        status, headers, message = error.status_code, error.headers, error.detail
        own = {400: "multipart 的内容不完整或有误", 404: "没有这个地址", 405: f"这个地址不接受 {request.method}"}
        message = own.get(status, message)  # in place of what Starlette says
    elif isinstance(error, RequestValidationError | pydantic.ValidationError):
        name = str(error.errors()[0]["loc"][-1])
        status, message = 422, f"{name} 应为 {RANGES[name]}" if name in RANGES else f"没有 {name!r} 这个参数"
    elif isinstance(error, BusyError):
        status, headers, message = 503, {"Retry-After": "1"}, "排队的图片太多,请稍后再试"
    elif isinstance(error, infer.ModelError):
        message = str(error)
    elif isinstance(error, ClientDisconnect):
        status = 499  # for the metrics; nobody reads it
    else:
        log.error("%s %s: %s: %s", request.method, request.url.path, type(error).__name__, infer.one_line(error))
    return JSONResponse({"error": message}, status, headers)


async def unless_gone(request: Request, futures: list[Future[infer.Result]]) -> list[infer.Result]:
    """The results of futures, which are cancelled if the client closes its connection: then ClientDisconnect."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answers, gone = asyncio.gather(*map(asyncio.wrap_future, futures)), asyncio.create_task(until_gone())
    try:
        await asyncio.wait([answers, gone], return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise ClientDisconnect
        return answers.result()
    finally:
        gone.cancel()
        answers.cancel()


def build_app(arguments: argparse.Namespace) -> FastAPI:
    """Load the model that serve.py's arguments ask for, and make the application. Raises ModelError."""
    if not PAGE.is_file():
        raise infer.ModelError(f"缺少网页 {PAGE};请重新下载本项目")
    page = files.read_text(PAGE)
    service, intake, reloading = Service(arguments, BATCHES.observe), Intake(arguments.max_bytes), asyncio.Lock()
    QUEUE.set_function(lambda: sum(map(len, service.lanes)))
    bearer = HTTPBearer(auto_error=False, description="serve.py 的 --token")

    async def authorize(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        token = (given.credentials if given else "").encode("latin-1")
        if arguments.token and not hmac.compare_digest(token, arguments.token.encode()):
            raise HTTPException(401, "口令不对;请求头应是 Authorization: Bearer 口令", {"WWW-Authenticate": "Bearer"})

    # Its pages of documentation would come from other hosts.
    app = FastAPI(title="识别服务", version=infer.__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Measured)
    for kind in (HTTPException, RequestValidationError, pydantic.ValidationError, BusyError, infer.ModelError,
                 ClientDisconnect, Exception):  # fmt: skip
        app.add_exception_handler(kind, describe_problem)
    protected = {"dependencies": [Depends(authorize)], "responses": {401: {"model": Problem}}}

    refusals = dict.fromkeys((400, 401, 408, 413, 415, 422, 500, 503), {"model": Problem})
    answers = {200: {"model": Record | list[Record]}} | refusals | {422: {"model": Record | Problem}}

    @app.post("/recognize", **protected | {"responses": answers}, openapi_extra=describe_body())
    async def recognize(request: Request, parameters: Annotated[Parameters, Query()]) -> JSONResponse:
        """Recognise images: a record for one, a list of records for several."""
        async with intake.read(request) as upload:
            asked = Parameters.model_validate(parameters.model_dump(exclude_unset=True) | upload.fields)
            images = [content for _, content in upload.images if content is not None]
            costs = await asyncio.to_thread(lambda: [*map(estimate_cost, images)])
            results = iter(await unless_gone(request, service.put(images, costs)))
        name, version, _ = service.recognizer.identify()
        too_large = infer.Result("", name, version, error=f"图片超过 {arguments.max_bytes:,} 字节")
        records = []
        for path, content in upload.images:
            result = too_large if content is None else next(results)
            kept = tuple(p for p in result.predictions[: asked.topk] if p.confidence >= asked.threshold)
            records.append(dataclasses.replace(result, path=path, predictions=kept).record())
        if upload.several:
            return JSONResponse(records)
        return JSONResponse(records[0], 200 if "results" in records[0] else 413 if costs in ([], [math.inf]) else 422)

    def describe_model() -> Model:
        identity = service.recognizer.identify()
        return Model(**identity._asdict(), device=service.recognizer.load().device_name)

    @app.get("/model", **protected)
    async def model() -> Model:
        """The model that answers."""
        return describe_model()

    @app.get("/labels", **protected)
    async def labels() -> list[str]:
        """The labels by index."""
        return list(service.recognizer.load().spec.labels)

    @app.post("/reload", **protected | {"responses": dict.fromkeys((401, 403, 500, 503), {"model": Problem})})
    async def reload() -> Model:
        """Take the model anew from its file; if that fails the one before it goes on."""
        if not arguments.token:
            raise HTTPException(403, "只有用 --token 启动的服务才能重新加载")
        if reloading.locked():
            raise HTTPException(503, "正在重新加载", {"Retry-After": "5"})
        async with reloading:
            try:
                service.use(await asyncio.to_thread(service.build))
            except infer.ModelError as error:
                log.error("重新加载失败,仍用原来的模型: %s", error)
                raise HTTPException(500, f"重新加载失败,仍用原来的模型: {error}") from error
        return describe_model()

    @app.get("/metrics", **protected, response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Metrics in Prometheus' text format."""
        return PlainTextResponse(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the service can answer. It does not listen before the model has answered once."""
        return {"status": "ok"}

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        nonce = secrets.token_hex(16)
        headers = {"Content-Security-Policy": POLICY.format(nonce), "Referrer-Policy": "no-referrer"}
        return HTMLResponse(page.replace("NONCE", nonce), headers=headers)

    return app
