"""What a network sees in photos: its features, in torch or ONNX Runtime, remembered by content."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import datetime
import hashlib
import importlib.util
import io
import logging
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import infer

import numpy
from PIL import Image, ImageOps

import export
from wwts import files, learned, memory, repositories, torch_engine

log = logging.getLogger("wwts")
WORTH_EXPORTING = 200  # photos, whose features regain the time that exporting the network takes
NEARER = 1.2  # times larger is a photo that is looked at again


class Network(NamedTuple):
    """``run`` turns N crop×crop×3 uint8 arrays into N×width float32; ``parameters`` is HubModel's digest."""

    spec: infer.Spec
    version: str
    parameters: str
    run: Callable[[list[numpy.ndarray]], numpy.ndarray]


class Look(NamedTuple):
    """What is known of a photo: SHA-256, seconds since 1970 when it was taken (or NaN), features at each look."""

    digest: str
    time: float
    rows: list[numpy.ndarray]


def run_torch(engine: torch_engine.TorchEngine) -> Callable[[list[numpy.ndarray]], numpy.ndarray]:
    """The function from pixels to the outputs of an engine's network, for any number of threads."""
    lock = threading.Lock()

    def run(batch: list[numpy.ndarray]) -> numpy.ndarray:
        with lock, torch_engine.import_torch().inference_mode():
            return engine.model(engine.normalize(numpy.stack(batch)).to(engine.dtype)).float().cpu().numpy()

    return run


def open_backbone(arguments: argparse.Namespace, photos: int) -> Network:
    """The network that was asked for, without its classifier; in ONNX Runtime where that is the faster one.

    Its graph stays in the cache folder; it is first written when there are enough ``photos`` for that to pay.
    """
    recognizer = infer.build_recognizer(arguments)
    name, version, _ = recognizer.identify()
    path = infer.cache_folder() / f"features-{name}-{version}" / "graph.onnx"
    on_cpu = recognizer.device == "cpu" or recognizer.device == "auto" and not infer.has_nvidia_gpu()
    onnx = on_cpu and recognizer.engine != "torch" and importlib.util.find_spec("onnxruntime")
    known = memory.recall(path.parent.name) if onnx else None
    if known is None:
        model, torch = repositories.load_hub_model(name, *arguments.source), torch_engine.import_torch()
        model.module.set_submodule(learned.find_classifier(model), torch.nn.Identity())
        model = model._replace(spec=dataclasses.replace(model.spec, draft=recognizer.draft or model.spec.draft))
        engine = torch_engine.TorchEngine(model, recognizer.device, recognizer.dtype)
        onnx = onnx and importlib.util.find_spec("onnxscript") and model.files and engine.dtype == torch.float32
        arguments.batch_size = recognizer.batch_size or (64 if engine.device.type == "cuda" else 8)
        slow = Network(model.spec, version, model.parameters, run_torch(engine))
        if not onnx or photos < WORTH_EXPORTING and recognizer.engine != "onnx":
            return slow
        log.info("正在导出网络,需要十几秒到一分钟,以后不再需要")
        try:
            with files.replacing(path.parent) as folder:
                folder.mkdir()
                export.write_graph(engine, folder / path.name, separate_weights=True, softmax=False)
        except infer.ModelError as error:
            log.warning("%s。这次用 torch", error)
            return slow
        known = {"parameters": model.parameters, "spec": model.spec.record()}
        memory.remember(
            path.parent.name, {str(part): memory.file_state(part) for part in path.parent.iterdir()}, **known
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Each batch in a thread of its own: threads that share one wait for each other.
    options.intra_op_num_threads = max((os.cpu_count() or 1) // recognizer.workers, 1)
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def run(batch: list[numpy.ndarray]) -> numpy.ndarray:
        return session.run(None, {"pixels": numpy.stack(batch)})[0]

    return Network(infer.Spec.parse(known["spec"], name), version, known["parameters"], run)


def time_taken(data: bytes) -> float:
    """Seconds since 1970, of the camera's clock, at which a photo says that it was taken; NaN if it does not."""
    try:
        exif = Image.open(io.BytesIO(data)).getexif()
        text = exif.get_ifd(0x8769).get(0x9003) or exif.get(0x0132)  # DateTimeOriginal, or DateTime
        return datetime.datetime.strptime(text or "", "%Y:%m:%d %H:%M:%S").timestamp()
    except Exception as error:  # whatever is wrong with the tags, the photo may be sound
        log.debug("EXIF: %s", error)
        return math.nan


def look_at(
    paths: list[str], network: Network, arguments: argparse.Namespace, store: memory.Cache, share: float = 0
) -> dict[str, Look | str]:
    """Path → what the network sees, with a second look for this share of the photos; or why it cannot be read."""
    nearer = dataclasses.replace(network.spec, resize=round(NEARER * network.spec.resize))

    def examine(batch: list[str]) -> dict[str, Look | str]:
        seen, missing, pixels = {}, [], []
        for path in batch:
            try:
                with infer.open_image(path) as file:
                    data = file.read()
                digest = hashlib.sha256(data).hexdigest()
                looks = 2 if int(digest[:8], 16) < share * 2**32 else 1
                keys = [f"{network.version}-{digest}-{look}" for look in range(looks)]
                known = [store.get(key) for key in keys]
                rows = [found and numpy.frombuffer(base64.b64decode(found), numpy.float32) for found in known]
                image = None if all(known) else infer.decode_image(io.BytesIO(data), network.spec)
                for look in (look for look in range(looks) if not known[look]):
                    view = (ImageOps.mirror(image), nearer) if look else (image, network.spec)
                    pixels.append(infer.preprocess(*view))
                    missing.append((rows, look, keys[look]))
                seen[path] = Look(digest, time_taken(data), rows)
            except Exception as error:  # a broken file can make a decoder raise anything
                seen[path] = infer.describe_image_error(error)
        try:
            outputs = numpy.float32(network.run(pixels)) if pixels else numpy.zeros((0, 1))
        except Exception as error:  # networks and what runs them fail in their own ways
            raise infer.ModelError(f"网络运行出错: {infer.one_line(error)}。请试试 -b 1 或 -d cpu") from error
        if outputs.ndim != 2 or not numpy.isfinite(outputs).all():
            raise infer.ModelError("网络的特征不是每张照片一行有限的数;请换一个模型,或用 --dtype float32")
        for (rows, look, key), row in zip(missing, outputs, strict=True):
            rows[look] = row
            store.put(key, base64.b64encode(row.tobytes()).decode())
        return seen

    seen, size = {}, arguments.batch_size or 8
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    with infer.progress_bar(len(paths), "张") as bar, ThreadPoolExecutor(arguments.workers) as pool:
        for found in pool.map(examine, batches):
            seen |= found
            bar.update(len(found))
    return seen
