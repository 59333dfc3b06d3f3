"""Runs that nobody watches: their share of the images under torchrun, and files that are locked, resumed and mended."""

from __future__ import annotations

import argparse
import contextlib
import csv
import glob
import json
import logging
import os
import re
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import infer
from infer import Form, Identity, Result, StandardOutput, UsageError

from wwts.files import replacing, unescape_cell
from wwts.memory import recall, remember

log = logging.getLogger("wwts")


class Share(NamedTuple):
    """The part of the images that this process does under torchrun; one process alone does all."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Share:
        """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; raises UsageError where they make no sense."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        values = [os.environ.get(key, "0") for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        if not all(re.fullmatch(r"-?\d+", value) for value in values):
            raise UsageError(f"环境变量 RANK、WORLD_SIZE、LOCAL_RANK 应是整数,而不是 {'、'.join(values)}")
        share = cls(*map(int, values))
        if not 0 <= share.rank < share.world_size:
            raise UsageError(f"环境变量 RANK={share.rank} 应不小于 0 并小于 WORLD_SIZE={share.world_size}")
        return share

    def has(self, path: str) -> bool:
        """Whether an image is of this share: by its path, so that what arrives later moves no other image."""
        return zlib.crc32(os.fsencode(os.path.normpath(path))) % self.world_size == self.rank


def open_output(arguments: argparse.Namespace, named: bool) -> OutputFile | StandardOutput:
    """Where results of this process's share go: standard output, or the file of -o, or its part of that file.

    What an earlier run left in the file is taken in; under torchrun ``arguments.device`` becomes a GPU of its own.
    """
    share = Share.of_environment()
    if share.world_size > 1:
        if "-" in arguments.inputs:
            raise UsageError("用 torchrun 时不能从标准输入读路径,请改用文件夹或通配符")
        _take_own_gpu(arguments, share)
    if arguments.output is None:
        return StandardOutput(infer.make_form(arguments.format or "text", arguments.topk, named), share.has)
    path, resume = Path(arguments.output), arguments.resume or arguments.retry_failed
    _check_usage(arguments, path, resume)
    output = OutputFile(path, infer.make_form(path.suffix[1:].lower(), arguments.topk, named), share)
    if share.world_size > 1:
        _open_part(output, resume, arguments.overwrite)
    output.lock()
    try:
        if resume:
            output.resume(arguments.retry_failed)
        elif not arguments.overwrite and output.path.stat().st_size:
            raise UsageError(f"{output.path} 已存在。接着做用 --resume,重新做用 --overwrite")
    except UsageError:
        output.close()
        raise
    arguments.hint = f"。已写的都完好,加上 --resume 再运行会接着写 {output.path}"
    return output


def _check_usage(arguments: argparse.Namespace, path: Path, resume: bool) -> None:
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UsageError(f"-o 的文件名应以 .jsonl 或 .csv 结尾,格式由它决定,而不是 {path.name}")
    if arguments.format:
        raise UsageError("-o 的格式由文件名决定,不要再用 -f")
    if resume and arguments.overwrite:
        raise UsageError("--overwrite 不能与 --resume、--retry-failed 同用")
    if not path.parent.is_dir():
        raise UsageError(f"文件夹 {path.parent} 不存在")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} 不是普通文件")


def _take_own_gpu(arguments: argparse.Namespace, share: Share) -> None:
    graph = arguments.engine == "onnx" or str(arguments.model).endswith(".onnx")
    on_gpu = arguments.device == "cuda" or arguments.device == "auto" and not graph and infer.has_nvidia_gpu()
    if on_gpu and (graph or infer.import_part("torch_engine").import_torch().cuda.is_available()):
        arguments.device = f"cuda:{share.local_rank}"


def _open_part(output: OutputFile, resume: bool, overwrite: bool) -> None:
    """Let an output be a share's part of its file, and know what the parts of an earlier run have."""
    path, share = output.path, output.share
    output.path = path.with_suffix(f".rank{share.rank}{path.suffix}")
    for other in path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}"):
        number = other.name[len(path.stem) + 5 : -len(path.suffix)]
        if resume and other != output.path:  # of another number of processes, or with photos of ours
            part = OutputFile(other, output.form, share)
            part.resume()
            output.done, output.models = output.done | part.done, output.models | part.models
        elif overwrite and share.rank == 0 and number.isdigit() and int(number) >= share.world_size:
            other.unlink()


def parse_record(form: Form, line: str) -> tuple[str, str, str, list[float] | None]:
    """Path, model, version and confidences (None for an error) of a line; raises at what is none."""
    if form.head:
        (row,) = csv.reader([line], strict=True)
        if len(row) != form.head.count(",") + 1:
            raise ValueError
        confidences = [float(value) for value in row[4:-1:2] if value]
        return unescape_cell(row[0]), row[1], row[2], None if row[-1] else confidences
    record = json.loads(line)
    names = [record[key] for key in ("path", "model", "version")]
    if set(map(type, names)) != {str}:
        raise TypeError
    return *names, None if "error" in record else [float(p["confidence"]) for p in record["results"]]


class OutputFile:
    """A file of whole records, which one process at a time writes.

    What a full disk or a power cut left half written is taken back. Attributes: ``size``, where its last whole
    record ends; ``done`` and ``failed``, the absolute paths of the images that have a record, or one of an error.
    Raises UsageError if another process is writing it.
    """

    def __init__(self, path: Path, form: Form, share: Share):
        self.path, self.form, self.share, self.size = path, form, share, 0
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self.models: set[tuple[str, str]] = set()
        self._retried: set[str] = set()  # of those that failed
        self._counts: set[int] = set()  # of predictions
        self._least = 1.0  # of all confidences
        self._replacements: dict[str, str] = {}
        self._settings = f"output-{infer.digest(os.path.abspath(path))[:16]}"
        self._file: BinaryIO | None = None

    def lock(self) -> None:
        """Open the file and keep others from writing it; the lock goes with the process."""
        self._file = open(self.path, "a+b", buffering=0)
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            inode, who = os.fstat(self._file.fileno()).st_ino, ""
            with contextlib.suppress(OSError, IndexError):  # who it is can be read on Linux
                who = re.findall(rf"FLOCK .* (\d+) \S+:{inode} ", Path("/proc/locks").read_text())[0]
            raise UsageError(f"{self.path} 正由另一个进程{who}写入。等它做完,或换一个文件名") from error
        except (ImportError, OSError) as error:  # not on Windows, nor on every file system
            log.debug("no lock: %s", error)
        if os.fstat(self._file.fileno()).st_ino != os.stat(self.path).st_ino:  # replaced since by --retry-failed
            self.lock()

    def resume(self, retry_failed: bool = False) -> None:
        """Take in the records of an earlier run; raises UsageError at what was not written in this format."""
        begins, foreign = self.form.head.encode() or b'{"path": "', False
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            head = file.read(len(begins)).rstrip(b"\0")
            foreign = not begins.startswith(head)
            file.seek(0)
            while not foreign and (line := file.readline(infer.MOST_TEXT)):
                if not line.endswith(b"\n") or b"\0" in line:  # torn, as only the last can be
                    foreign = bool(file.read(1))
                    break
                try:
                    if self.size or not self.form.head:
                        self._take_in(*parse_record(self.form, line.decode()))
                    self.size += len(line)
                except (ValueError, LookupError, TypeError, RecursionError, csv.Error):
                    foreign = True
        if foreign and (columns := head.count(b"label_")) and not self.size:
            self._refuse(f"是用 -k {columns} 或更大的 -k 写的,现在是 -k {begins.count(b'label_')}")
        if foreign:
            self._refuse(f"的第 {self.size} 字节之后不是这一版以同样的格式和 -k 写出的记录")
        self._retried = set(self.failed) if retry_failed else set()

    def _take_in(self, path: str, model: str, version: str, confidences: list[float] | None) -> None:
        self.done.add(os.path.abspath(path))
        self.models.add((model, version))
        if confidences is None:
            self.failed.add(os.path.abspath(path))
        else:
            self._counts.add(len(confidences))
            self._least = min([self._least, *confidences])

    def _refuse(self, reason: str) -> None:
        raise UsageError(f"{self.path} {reason},不能续写。换一个文件名,或用 --overwrite")

    def check(self, identity: Identity, topk: int, threshold: float) -> None:
        """Raise UsageError unless the records are of the same model's version, with the same -k and -t."""
        if others := self.models - {identity[:2]}:
            model, version = min(others)
            cause = ":权重、标签、精度或仓库的代码变了" if model == identity.name else ""
            self._refuse(f"是 {model}(版本 {version})的结果,现在是 {identity.name}(版本 {identity.version}){cause}")
        most, now = min(topk, identity.num_classes), {"topk": topk, "threshold": threshold}
        then = (recall(self._settings) if self.models else None) or {"files": {}, **now}
        wrong = any(count > most or threshold == 0 and count < most for count in self._counts)
        wrong = wrong or self._least < threshold - 1e-6  # half of the last decimal, and a little
        if wrong or then != {"files": {}, **now}:
            self._refuse(
                f"是用 -k {then['topk']} -t {then['threshold']:g} 写的,现在是 -k {topk} -t {threshold:g}"
                if then["topk"] != topk or then["threshold"] != threshold
                else "是用别的 -k 或 -t 写的"
            )
        remember(self._settings, {}, **now)

    @property
    def recorded(self) -> tuple[int, int]:
        """How many images have a record of an earlier run that stays, and how many of these one of an error."""
        return len(self.done - self._retried), len(self.failed - self._retried)

    def is_due(self, path: str) -> bool:
        """Whether an image is of this share, and has no record that stays."""
        absolute = os.path.abspath(path)
        return self.share.has(path) and (absolute not in self.done or absolute in self._retried)

    def write(self, result: Result) -> None:
        """Append a record, or keep it for ``close`` if it replaces a failure; on an OSError the file is as before."""
        text, path = self.form.format(result), os.path.abspath(result.path)
        if path in self._retried:
            self._replacements[path] = text
            return
        # A file name that is no text is written as JSON would escape it.
        data = (self.form.head * (not self.size) + text).encode("utf-8", "backslashreplace")
        try:
            self._file.truncate(self.size)
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        """Put records in the place of failures, in one step, and let others write."""
        if self._replacements:
            with replacing(self.path) as path, open(self.path, "rb") as old, open(path, "wb") as new:
                for number, line in enumerate(iter(lambda: old.readline(infer.MOST_TEXT), b"")):
                    if number or not self.form.head:
                        key = os.path.abspath(parse_record(self.form, line.decode())[0])
                        line = self._replacements.get(key, "").encode("utf-8", "backslashreplace") or line
                    new.write(line)
        self._replacements = {}
        if self._file is not None and not self._file.closed:
            self._file.close()
            if not self.size and not self.path.stat().st_size:  # made by ``lock`` for nothing
                self.path.unlink()
