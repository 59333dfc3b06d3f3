"""What a network without its classifier sees in photos, remembered by content of photo and version of network."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import importlib.util
import io
import logging
import math
import os
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import infer
from infer import HubModel, ModelError, Spec, TorchEngine

import numpy
from PIL import Image, ImageOps

from export import write_graph

log = logging.getLogger("wwts")
WORTH_EXPORTING = 200  # photos, whose features regain the time that exporting the network takes
NEARER = 1.2  # how much larger a photo is at a second look, for which it is mirrored too
AHEAD = 64  # photos decoded before the network runs

Run = Callable[[list[numpy.ndarray]], numpy.ndarray]


class Backbone(NamedTuple):
    """A network without its classifier.

    ``run`` turns N crop×crop×3 uint8 arrays into N×width float32; ``parameters`` is HubModel's digest of that name.
    """

    name: str
    version: str
    parameters: str
    spec: Spec
    run: Run


def load_model(arguments: argparse.Namespace, name: str) -> HubModel:
    """The hub model of the command line."""
    return infer.load_hub_model(
        name, arguments.repo, arguments.trust_repo, arguments.weights, offline=arguments.offline
    )


def run_torch(engine: TorchEngine) -> Run:
    """The function from pixels to the outputs of an engine's network."""

    def run(batch: list[numpy.ndarray]) -> numpy.ndarray:
        with infer.import_torch().inference_mode():
            return engine.model(engine.normalize(numpy.stack(batch)).to(engine.dtype)).float().cpu().numpy()

    return run


def open_backbone(arguments: argparse.Namespace, photos: int) -> Backbone:
    """The network that was asked for, in ONNX Runtime where that is the faster one and installed.

    Its graph stays in the cache folder; it is first written when there are enough ``photos`` for that to pay.
    """
    recognizer = infer.build_recognizer(arguments)
    name, version, _ = recognizer.identify()
    folder = infer.cache_folder() / f"features-{name}-{version}"
    onnx = recognizer.device in ("auto", "cpu") and recognizer.dtype in ("auto", "float32")
    onnx = onnx and recognizer.engine != "torch" and importlib.util.find_spec("onnxruntime")

    def run_graph() -> Run:
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, {"pixels": numpy.stack(batch)})[0]

    if onnx and (known := infer.recall(folder.name)):
        return Backbone(name, version, known["parameters"], Spec.parse(known["spec"], name), run_graph())
    model, torch = load_model(arguments, name), infer.import_torch()
    model.module.set_submodule(infer.find_classifier(model), torch.nn.Identity())
    engine = TorchEngine(model, recognizer.device, recognizer.dtype)
    backbone = Backbone(name, version, model.parameters, model.spec, run_torch(engine))
    pays = photos >= WORTH_EXPORTING or recognizer.engine == "onnx"
    if onnx and pays and engine.device.type == "cpu" and model.files and importlib.util.find_spec("onnxscript"):
        log.info("正在导出网络,需要十几秒到一分钟,以后不再需要")
        with infer.replacing(folder) as target:
            target.mkdir()
            write_graph(engine, target / "graph.onnx", separate_weights=True, softmax=False)
        states = {str(file): infer.file_state(file) for file in folder.iterdir()}
        infer.remember(folder.name, states, parameters=model.parameters, spec=model.spec.record())
        return backbone._replace(run=run_graph())
    return backbone


class Features:
    """Rows of features by content of photo and version of backbone, kept in an SQLite file of the cache folder.

    Without ``kept``, or where there is no writing, they are forgotten at the end.
    """

    def __init__(self, backbone: Backbone, kept: bool = True):
        self.backbone, path = backbone, infer.cache_folder() / "features.sqlite"
        try:
            os.makedirs(path.parent, exist_ok=True)
            self._file = sqlite3.connect(path if kept else ":memory:", timeout=30, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._create()
        except (OSError, sqlite3.Error) as error:
            log.warning("%s 不能使用(%s),下次学习要重新计算", path, error)
            self._file = sqlite3.connect(":memory:", isolation_level=None)
            self._create()
        query = "SELECT photo, copy FROM features WHERE version = ?"
        self._known = set(self._file.execute(query, [backbone.version]))

    def _create(self) -> None:
        columns = "version TEXT, photo BLOB, copy INTEGER, time REAL, row BLOB, PRIMARY KEY (version, photo, copy)"
        self._file.execute(f"CREATE TABLE IF NOT EXISTS features ({columns})")

    def compute(self, paths: list[str], copies: float, arguments: argparse.Namespace) -> dict[str, bytes | str]:
        """Compute what is missing; give path → digest of content, or in words why the photo cannot be read.

        A share of the photos, ``copies``, is looked at a second time. Raises ModelError for outputs not finite.
        """
        spec = self.backbone.spec
        nearer = dataclasses.replace(spec, resize=round(NEARER * spec.resize))

        def prepare(path: str) -> tuple:
            try:
                with infer.open_image(path) as file:
                    data = file.read()
                photo = hashlib.sha256(data).digest()
                kinds = [0, 1] if int.from_bytes(photo[:4], "big") < copies * 2**32 else [0]
                kinds = [kind for kind in kinds if (photo, kind) not in self._known]
                if not kinds:
                    return path, photo, []
                image, time = infer.decode_image(io.BytesIO(data)), time_taken(data)
                views = {0: (image, spec), 1: (ImageOps.mirror(image), nearer)}
                return path, photo, [(photo, kind, time, infer.preprocess(*views[kind])) for kind in kinds]
            except Exception as error:  # a broken file can make a decoder raise anything: it is left out
                return path, infer.describe_image_error(error), []

        seen, batch, size = {}, [], arguments.batch_size or 8
        with infer.progress_bar(len(paths), "张") as bar, ThreadPoolExecutor(arguments.workers) as pool:
            prepared: Iterable = ()
            for start in range(0, len(paths) + AHEAD, AHEAD):
                # While the network sees to these, the next ones are decoded.
                current, prepared = prepared, pool.map(prepare, paths[start : start + AHEAD])
                for path, photo, rows in current:
                    seen[path] = photo
                    batch += rows
                    if len(batch) >= size:
                        self._add(batch)
                        batch = []
                    bar.update(1)
        self._add(batch)
        return seen

    def _add(self, batch: list[tuple]) -> None:
        if not batch:
            return
        outputs = numpy.float32(self.backbone.run([pixels for *_, pixels in batch]))
        if outputs.ndim != 2 or not numpy.isfinite(outputs).all():
            raise ModelError("网络的特征不是有限的数,或者不是每张照片一行;请换一个模型,或用 --dtype float32")
        rows = [(self.backbone.version, *key, row.tobytes()) for (*key, _), row in zip(batch, outputs, strict=True)]
        self._file.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?)", rows)

    def read(self, photos: list[bytes], copy: int = 0) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Which of the photos there are, their features (N×width float32), and when they were taken (seconds)."""
        query = "SELECT time, row FROM features WHERE version = ? AND photo = ? AND copy = ?"
        found = [self._file.execute(query, [self.backbone.version, photo, copy]).fetchone() for photo in photos]
        rows = [(index, *row) for index, row in enumerate(found) if row]
        features = numpy.frombuffer(b"".join(row for *_, row in rows), numpy.float32)
        times = numpy.array([math.nan if time is None else time for _, time, _ in rows])
        size = "SELECT length(row) FROM features WHERE version = ?"
        width = self._file.execute(size, [self.backbone.version]).fetchone()[0] // 4
        return numpy.array([row[0] for row in rows], int), features.reshape(len(rows), width), times


def time_taken(data: bytes) -> float | None:
    """Seconds since 1970, of the camera's clock, at which a photo says that it was taken."""
    exif = Image.open(io.BytesIO(data)).getexif()
    text = exif.get_ifd(0x8769).get(0x9003) or exif.get(0x0132)  # DateTimeOriginal in its own directory, or DateTime
    try:
        return datetime.datetime.strptime(str(text), "%Y:%m:%d %H:%M:%S").timestamp()
    except (ValueError, OverflowError, OSError):
        return None
