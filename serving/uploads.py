"""Images out of HTTP requests, with bounds to what a request may send, and how long it may take."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import h11
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_IMAGES = 64  # of one request
READ_SECONDS = 60  # for a request to arrive
# Bytes of a request with several images, and of all requests together, in times of those of an image.
REQUEST, TOGETHER = 8, 16


class Protocol(H11Protocol):
    """uvicorn's, but a connection is closed whose request takes too long to arrive, its headers included."""

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.deadline = self.loop.call_later(READ_SECONDS + 1, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        arriving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if self.deadline is None and arriving:
            self.deadline = self.loop.call_later(READ_SECONDS + 1, self.transport.close)
        elif self.deadline is not None and not arriving:
            self.deadline.cancel()
            self.deadline = None

    def connection_lost(self, error: Exception | None) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        super().connection_lost(error)

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(json.dumps({"error": "不是有效的 HTTP 请求"}))


class Upload(NamedTuple):
    """What a request brings: name and content of each image, other fields by name, and whether it asks for a list.

    The content is None for an image that is too large.
    """

    images: list[tuple[str, bytes | None]]
    fields: dict[str, Any]
    several: bool


class Intake:
    """Reads requests, and knows how many bytes of them are held in memory. ``max_bytes`` is of one image."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._held = max_bytes, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Upload]:
        """Read a request's images, which count as held until the context ends.

        Raises HTTPException (400, 408, 413, 415, 422, 503) for what cannot be taken, and ClientDisconnect.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        readers = {"multipart/form-data": _read_form, "application/json": _read_json}
        reader = _read_raw if kind.startswith("image/") else readers.get(kind)
        if reader is None:
            raise HTTPException(415, "请求应是 multipart/form-data、image/* 或 application/json")
        limit, size = self._max_bytes * (1 if reader is _read_raw else REQUEST), 0
        too_large = HTTPException(413, f"请求超过 {limit:,} 字节")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large

        async def receive() -> dict[str, Any]:
            nonlocal size
            message = await request.receive()
            received = len(message.get("body", b""))
            size += received
            self._held += received
            if size > limit:
                raise too_large
            if self._held > TOGETHER * self._max_bytes:
                raise HTTPException(503, "服务正忙,请稍后再试", {"Retry-After": "1"})
            return message

        try:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    upload = await reader(Request(request.scope, receive))
            except TimeoutError:
                raise HTTPException(408, f"请求在 {READ_SECONDS} 秒内没有传完") from None
            if not upload.images:
                raise HTTPException(422, "请求里没有图片,应在 image 里")
            if len(upload.images) > MOST_IMAGES:
                raise HTTPException(413, f"一个请求最多 {MOST_IMAGES} 张图片")
            most = self._max_bytes
            images = [(name, content if len(content) <= most else None) for name, content in upload.images]
            yield upload._replace(images=images)
        finally:
            self._held -= size


async def _read_raw(request: Request) -> Upload:
    return Upload([("", await request.body())], {}, False)


async def _read_form(request: Request) -> Upload:
    images, fields = [], {}
    async with request.form() as form:
        for name, value in form.multi_items():
            if name != "image":
                fields[name] = value
            elif isinstance(value, UploadFile):
                images.append((value.filename or "", await value.read()))
            else:
                raise HTTPException(422, "image 应是文件,如 curl -F image=@cat.jpg")
    return Upload(images, fields, len(images) > 1)


async def _read_json(request: Request) -> Upload:
    body = await request.body()

    def parse() -> Upload:
        fields = json.loads(body)
        given = fields.pop("image", [])
        texts = given if isinstance(given, list) else [given]
        # Browsers put "data:image/jpeg;base64," in front; some programs break lines.
        contents = (base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True) for text in texts)
        return Upload([("", content) for content in contents], fields, isinstance(given, list))

    try:
        return await asyncio.to_thread(parse)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise HTTPException(422, '应是 JSON,如 {"image": "图片的 base64"};几张图片则是它们的列表') from None
