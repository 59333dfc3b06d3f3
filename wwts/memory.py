"""What is kept for the next time: answers by image and model, and facts that hold while files stay as they are."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from infer import Identity, ModelError, UsageError, cache_folder, explaining, one_line

from wwts.files import read_text, replacing

log = logging.getLogger("wwts")


def file_state(path: str | os.PathLike) -> list[int] | None:
    """Size, and times of last change of content and entry, of a file; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def remember(key: str, states: Mapping[str, Any], **facts: Any) -> None:
    """Keep facts that hold as long as files are in the states that ``file_state`` gave before they were read."""
    try:
        with replacing(cache_folder() / f"{key}.json") as path:
            path.write_text(json.dumps({**facts, "files": dict(states)}), encoding="utf-8")
    except ModelError as error:  # which costs time at the next start, no more
        log.debug("%s", error)


def recall(key: str) -> dict[str, Any] | None:
    """Facts kept under a key, if every file that they depend on is still in the state that it had."""
    try:
        facts = json.loads(read_text(cache_folder() / f"{key}.json"))
        return facts if all(file_state(path) == state for path, state in facts["files"].items()) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # nothing there, or not written by this program


def kept_graph(name: str, version: str) -> Path:
    """Where export.py keeps the graph of a model's version; ``recall(its folder's name)`` vouches for it."""
    return cache_folder() / f"graph-{name}-{version}" / "graph.onnx"


# ---------------------------------------------------------------- answers


class Cache:
    """Texts by key, in an SQLite file or a Redis server; one that breaks costs a warning, no more."""

    def __init__(self, location: str):
        self._lock, self._location, self._functions = threading.Lock(), location, None
        self._shown = re.sub("//[^/@]*@", "//***@", location)  # without a password
        self._is_redis = location.startswith(("redis://", "rediss://", "unix://"))
        if self._is_redis:
            with explaining("--cache redis://… 需要 redis 包({}),请运行: pip install redis", ImportError):
                import redis  # noqa: F401
        elif "://" in location:
            raise UsageError(f"--cache {self._shown} 应是文件,或以 redis://、rediss://、unix:// 开头的地址")

    def get(self, key: str) -> str | bytes | None:
        """The text kept under a key."""
        return self._call(0, key)

    def put(self, key: str, text: str) -> None:
        """Keep a text under a key."""
        self._call(1, key, text)

    def _call(self, function: int, *arguments: str) -> Any:
        with self._lock:
            try:
                self._functions = self._functions or self._open()
                return self._functions[function](*arguments)
            except ModelError:
                raise
            except Exception as error:  # SQLite, Redis, disks and networks fail in their own ways
                log.warning("缓存 %s 不能使用(%s),本次不用缓存", self._shown, one_line(error))
                self._functions = (lambda *_: None,) * 2

    def _open(self) -> tuple[Callable, Callable]:
        """Functions that read and write a text by key."""
        if self._is_redis:
            import redis

            client = redis.Redis.from_url(self._location, socket_timeout=5, socket_connect_timeout=2)
            return client.get, client.set
        import sqlite3

        os.makedirs(os.path.dirname(os.path.abspath(self._location)), exist_ok=True)
        connection = sqlite3.connect(self._location, timeout=30, isolation_level=None, check_same_thread=False)
        # A write-ahead log lets some read while one writes; what a power cut loses can be had again.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("CREATE TABLE IF NOT EXISTS cache (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        select, insert = "SELECT value FROM cache WHERE key = ?", "INSERT OR REPLACE INTO cache VALUES (?, ?)"
        return (
            lambda key: next(iter(connection.execute(select, (key,)).fetchone() or ()), None),
            lambda key, text: connection.execute(insert, (key, text)),
        )


class AnswerCache:
    """Answers to images: label, confidence and index of the top-k, by content of the image and version of the model."""

    def __init__(self, location: str):
        self._texts = Cache(location)

    @staticmethod
    def key(file: BinaryIO, identity: Identity) -> str:
        """The key of a model's answers to an image file, which is read and left at its beginning."""
        content = hashlib.sha256()
        file.seek(0)
        while chunk := file.read(2**20):
            content.update(chunk)
        file.seek(0)
        return f"wwts:{content.hexdigest()}:{identity.version}"

    def get(self, key: str, least: int) -> list[tuple[str, float, int]] | None:
        """The first ``least`` predictions kept under a key; None where there are fewer, or what is there is none."""
        try:
            rows = json.loads(self._texts.get(key) or "null")
            kinds = {tuple(map(type, row)) for row in rows}
            right = kinds == {(str, float, int)} and len(rows) >= least and all(0 <= row[1] <= 1 for row in rows)
        except (ValueError, TypeError, RecursionError):  # this program did not put that there
            return None
        return rows[:least] if right else None

    def put(self, key: str, rows: list[tuple[str, float, int]]) -> None:
        """Keep the predictions for an image."""
        self._texts.put(key, json.dumps(rows))
