#!/usr/bin/env python3
"""用中文说出图片里有什么:单文件推理脚本。

用法: python infer.py 图片 [图片 ...] [选项]

  图片                    图片文件、文件夹(含子文件夹)、通配符,
                          或 - (从标准输入读路径,每行一个)
模型:
  -m, --model NAME        入口名,或 export.py、learn.py 写的 .onnx、.safetensors
                          [wwts_cn_base,没有权重时 wwts_cn_lite]
  --repo REPO             torch.hub 仓库: 文件夹或 OWNER/NAME[:REF]
                          [infer.py 所在文件夹]
  --trust-repo            允许运行远程仓库的代码
  --weights PATH          权重文件,或它和 meta_info.txt 所在的文件夹
  --labels FILE           改用此标签文件: JSON、每行一个名称、meta_info.txt
  --offline               不访问网络(同环境变量 WWTS_OFFLINE=1)
  -d, --device DEV        auto、cpu、cuda、cuda:N、mps [auto]
  --dtype TYPE            auto、float32、float16、bfloat16
                          [auto: CUDA 用 float16,其余 float32]
  --engine ENGINE         auto、torch、onnx
                          [auto: 导出过并且没有 NVIDIA 显卡时用 onnx]
  -b, --batch-size N      每批最多几张 [CUDA 64,其余 8]
  -j, --workers N         解码线程数 [处理器核数,最多 16]
  --draft                 大照片按缩小的尺寸解码,快几倍;置信度略有出入
输出:
  -k, --topk N            每张图最多几个标签 [5]
  -t, --threshold P       最低置信度,0 到 1 [0]
  -f, --format FMT        标准输出的格式: text、jsonl、csv [text]
  -o, --output FILE       结果写入这个 .jsonl 或 .csv 文件
  --resume                接着写 -o 的文件,跳过已有记录的图片
  --retry-failed          同 --resume,并重做记录为失败的图片
  --overwrite             覆盖 -o 的文件
  --expect LABEL          前 K 个标签里没有它就退出 1(可写多个,有一个即可)
  --cache [FILE]          缓存结果,同图不再算;可为 redis://… [用户缓存文件夹]
  -q, --quiet             不显示 [INFO] 信息和进度
  --log-time              每行信息前写上时间
  --version               显示版本
  -h, --help              显示本说明

示例:
  python infer.py samples/cat.jpg                   识别一张图片
  python infer.py 照片文件夹 -o 结果.csv            Excel 可直接打开结果
  python infer.py 照片文件夹 -o 结果.csv --resume   中断后接着做
  find . -name '*.jpg' | python infer.py - -f jsonl
  python infer.py --repo 文件夹 -m resnet18 x.jpg   任何 ImageNet 模型

退出状态: 0 全部识别  1 有图片失败,其余已完成  2 用法错误
          3 模型、权重或标签不可用,或写不进去  130 被中断
"""

# arguments → paths → images (decoded in threads) → engine → top-k with labels → writer
from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (before the first line that an older one does not understand)
    sys.stderr.write("[ERROR] 需要 Python 3.11 以上,现在是 %s\n" % sys.version.split()[0])  # noqa: UP031
    sys.exit(3)

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import mmap
import os
import queue
import re
import signal
import stat
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

try:
    import numpy
    from PIL import EpsImagePlugin, Image, UnidentifiedImageError
except ImportError as missing:
    sys.stderr.write(f"[ERROR] Pillow 或 NumPy 不能使用({missing})。请运行: pip install -r requirements.txt\n")
    sys.exit(3)

__version__ = "2.0.0"
__all__ = [
    "MOST_TEXT", "DeviceMemoryError", "Form", "Identity", "ModelError", "OnnxEngine", "Parser", "Prediction",
    "Recognizer", "Result", "Spec", "StandardOutput", "UsageError", "add_model_options", "build_recognizer",
    "cache_folder", "compute_version", "decode_image", "describe_image_error", "digest", "explaining",
    "find_images", "has_nvidia_gpu", "import_part", "make_form", "one_line", "open_image", "preprocess",
    "printable", "progress_bar", "run_command",
]  # fmt: skip

# The parts of this program in the folder wwts import this file by its name, also where it is the program that runs.
sys.modules.setdefault("infer", sys.modules[__name__])

# Far beyond what is meant so: bytes of a text file, a record or a path; bytes of an image file; scans of a JPEG.
MOST_TEXT, MOST_IMAGE, MOST_SCANS = 2**26, 2**30, 100
# Against full decoding, over 110 camera photos, the top-1 label was the same for 93.6, 98.2 and 99.1 % at 1, 2 and 3.
DRAFT_MARGIN = 2
# What cameras and phones write and Pillow by itself does not read; and what to do about it.
UNREAD = dict.fromkeys((".heic", ".heif"), "要识别请运行: pip install pillow-heif")
UNREAD |= dict.fromkeys(".jxl .avif .dng .cr2 .cr3 .nef .arw .raf .orf .rw2".split(), "要识别请先转成 .jpg")
USE_GPU = "请运行: pip uninstall onnxruntime,再运行: pip install onnxruntime-gpu;或改用 -d cpu"

log = logging.getLogger("wwts")
CACHE_HIT = logging.INFO + 1  # a level of its own, for its own word in brackets

# EPS is a program, and Ghostscript would run it. Pillow warns of odd tags, and of large photos, which phones take.
EpsImagePlugin.gs_binary = False
warnings.filterwarnings("ignore", module=r"PIL\.")


class ModelError(Exception):
    """Model, weights, labels or device cannot be used; the message says what to do."""

    exit_status = 3


class DeviceMemoryError(ModelError):
    """The device has not enough memory for what was asked of it at once."""


class UsageError(ModelError):
    """The request itself makes no sense."""

    exit_status = 2


class ImageError(OSError):
    """An image is refused for a reason that the message tells in Chinese."""


def one_line(error: BaseException) -> str:
    """The text of an exception, or else its class, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def explaining(message: str, kinds: type | tuple[type, ...] = (Exception, SystemExit)) -> Iterator[None]:
    """Turn exceptions (of some kinds, or any) into a ModelError, ``{}`` in whose message stands for the reason."""
    try:
        yield
    except ModelError:
        raise
    except kinds as error:
        raise ModelError(message.replace("{}", one_line(error))) from error


def import_part(name: str) -> Any:
    """A module of the folder wwts, without which this file runs .onnx files and no more; or raise ModelError."""
    with explaining("infer.py 旁边没有文件夹 wwts({}),只能用 -m 文件.onnx 识别并打印结果。请复制整个项目", ImportError):
        return importlib.import_module(f"wwts.{name}")


def cache_folder() -> Path:
    """The folder for what this program keeps for the user: results, exported graphs and what it remembers."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "wwts"


# ---------------------------------------------------------------- what a model is, and what it answers


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One label with its softmax probability (0 to 1) and its index in the model's output."""

    label: str
    confidence: float
    index: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What one image shows: predictions by falling confidence, or else an error; and which model said so."""

    path: str
    model: str
    version: str
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None
    cached: bool = False

    def record(self) -> dict[str, Any]:
        """The JSON-able record that is written to JSONL, confidences with 6 decimals."""
        record: dict[str, Any] = {"path": self.path, "model": self.model, "version": self.version}
        if self.error is not None:
            return record | {"error": self.error}
        record["results"] = [vars(p) | {"confidence": round(p.confidence, 6)} for p in self.predictions]
        return record | {"cached": True} if self.cached else record


class Identity(NamedTuple):
    """Which model answers: its name, its version (see compute_version) and its number of classes."""

    name: str
    version: str
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Spec:
    """How images are prepared for a model, and how its outputs are read.

    ``resize`` (shorter side) and ``crop`` are in pixels, ``mean`` and ``std`` refer to values of 0 to 1,
    ``draft`` allows JPEGs to be decoded at a reduced size, ``labels`` are in the order of the outputs.
    """

    name: str
    num_classes: int
    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    draft: bool
    labels: tuple[str, ...]

    @classmethod
    def parse(cls, given: Any, source: str, labels: list[str] | None = None) -> Spec:
        """Check what a repository or a file says of itself; ``labels`` replace its own.

        Raises ModelError if images cannot be prepared by it, or if the labels are not as many as the outputs.
        """

        def are(values: Any, length: int, *kinds: type) -> bool:
            right = isinstance(values, (list, tuple)) and len(values) == length
            return right and all(type(v) in kinds and (kinds == (str,) or math.isfinite(v)) for v in values)

        given = given if isinstance(given, Mapping) else {}
        v = {field.name: given.get(field.name) for field in dataclasses.fields(cls)}
        sizes, own = [v["num_classes"], v["crop"], v["resize"]], v["labels"]
        v["draft"] = bool(v["draft"])
        right = are(sizes, 3, int) and sizes[0] > 0 and 0 < sizes[1] <= sizes[2] <= 4096
        right = right and are([v["name"], v["interpolation"]], 2, str) and v["interpolation"] in ("bilinear", "bicubic")
        right = right and are(v["mean"], 3, int, float) and are(v["std"], 3, int, float) and all(v["std"])
        if not right or own is not None and not (isinstance(own, (list, tuple)) and are(own, len(own), str)):
            raise ModelError(f"{source} 的 spec 有误,无法得知怎样准备图片和读取结果")
        labels = own if labels is None else labels
        if labels is None:
            raise ModelError(f"{source} 有 {v['num_classes']} 个输出,但没有自带标签,请用 --labels 指定标签文件")
        if len(labels) != v["num_classes"]:
            raise ModelError(f"标签有 {len(labels)} 个,而 {source} 有 {v['num_classes']} 个输出。请换用配套的标签文件")
        return cls(**v | {"mean": tuple(v["mean"]), "std": tuple(v["std"]), "labels": tuple(labels)})

    def record(self) -> dict[str, Any]:
        """The JSON-able dict that ``parse`` reads back."""
        return dataclasses.asdict(self)


def digest(*parts: Any) -> str:
    """SHA-256, in hex digits, of anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compute_version(weights: str, spec: Spec, precision: str) -> str:
    """The 8 hex digits that alone identify a model: of weights and code, the whole spec, and the precision.

    ``weights`` is a digest of all that decides the answers besides the spec; ``precision`` is the type that
    they are computed in, such as float32.
    """
    return digest(weights, spec.record(), precision)[:8]


# ---------------------------------------------------------------- images

# Each takes up to 3 GiB while it is decoded.
_one_large_image = threading.Lock()


def open_image(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file of at most 1 GiB; raises ``OSError`` for anything else (a FIFO would block for ever)."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("是文件夹(没有权限列出其中的文件?)" if os.path.isdir(path) else "不是普通文件")
    if status.st_size > MOST_IMAGE:
        raise ImageError(f"文件超过 {MOST_IMAGE >> 30} GiB")
    return open(path, "rb")


def decode_image(source: BinaryIO | Image.Image, spec: Spec | None = None) -> Image.Image:
    """Decode an image file, or an opened ``PIL.Image``, into RGB: first frame, upright, transparency over white.

    If the spec allows drafts, a JPEG may come at 1/2, 1/4 or 1/8 of its size, its shorter side being at least
    DRAFT_MARGIN times what it will be resized to: libjpeg then leaves out most of the work.

    Raises whatever Pillow raises for a file that is broken, truncated, of an unknown format or beyond its
    decompression-bomb limit.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
    except UnidentifiedImageError:
        source.seek(4)
        if source.read(4) != b"ftyp":  # the family of HEIC, whatever the file is called
            raise
        if not _register_heif():
            raise ImageError("是 HEIC 一类的照片,要识别请运行: pip install pillow-heif") from None
        source.seek(0)
        image = Image.open(source)
    if image is not source and image.info.get("progressive"):
        # Each scan goes over the whole image and may take but a few bytes. Markers: ITU T.81, table B.1.
        source.seek(0)
        data, position, scans = source.read(), 2, 0
        while (match := re.compile(rb"\xff[\x01-\xcf\xd9-\xfe]").search(data, position)) and match[0] != b"\xff\xd9":
            scans += match[0] == b"\xff\xda"
            position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
            if scans > MOST_SCANS:
                raise ImageError(f"JPEG 超过 {MOST_SCANS} 次扫描")
    if spec is not None and spec.draft and image is not source:
        image.draft(image.mode, (DRAFT_MARGIN * spec.resize,) * 2)
    large = image.width * image.height > _pixel_limit() / 2
    with _one_large_image if large else contextlib.nullcontext():
        image.load()
        try:
            orientation = image.getexif().get(0x0112)
        except Exception as error:  # whatever is wrong with the tags, the photo is sound
            log.debug("EXIF: %s", error)
            orientation = None
        # EXIF's orientations 2 to 8; Pillow's own function fails at odd values of other tags.
        turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
        if orientation in range(2, 9):
            image = image.transpose(Image.Transpose[turns[orientation - 2]])
        return to_rgb(image)


@functools.cache
def _register_heif() -> bool:
    """Let Pillow read HEIC, which iPhones write, if the optional package for it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency over white, 16 and 32 bits and floating point scaled to 8 bits.

    What they are scaled from is 0 to 1, 255 or 65,535 where the values fit, else their own range; one value
    in a thousand at either end may lie outside, as broken pixels do.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = numpy.asarray(image.convert("F"))
        finite = values[numpy.isfinite(values)] if numpy.isfinite(values).any() else numpy.zeros(1)
        low, high = numpy.percentile(finite, 0.1, method="lower"), numpy.percentile(finite, 99.9, method="higher")
        ranges = [65535] if ";16" in image.mode else [1, 255] if image.mode == "F" else [255, 65535]
        if low >= 0 and high <= ranges[-1]:
            low, high = 0, next(most for most in ranges if high <= most)
        values = (numpy.nan_to_num(values, posinf=high, neginf=low) - low) * (255 / ((high - low) or 1))
        image = Image.fromarray(numpy.round(values.clip(0, 255)).astype(numpy.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert(image.mode.upper()).convert("RGBA")  # from RGBa only to RGBA, from La only to LA
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixel_limit() -> int:
    """Pillow's limit for decoding without a warning; its default where somebody lifted it."""
    return Image.MAX_IMAGE_PIXELS or 2**30 // 12


def preprocess(image: Image.Image, spec: Spec) -> numpy.ndarray:
    """Resize and centre-crop an RGB image as the spec says into crop×crop×3 uint8.

    Bit-identical to torchvision.transforms' Resize and CenterCrop, without the second and a half that
    importing torchvision takes. Only an image so long and thin that the resized one would be beyond
    Pillow's limit for decoding loses its far ends first.
    """
    resize, crop = spec.resize, spec.crop
    width, height = image.size
    longest = max(_pixel_limit() // resize**2, 1) * min(width, height)
    if max(width, height) > longest:
        left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = image.size
    short = min(width, height)
    new_width, new_height = (resize if side == short else int(resize * side / short) for side in (width, height))
    left, top = round((new_width - crop) / 2), round((new_height - crop) / 2)
    image = image.resize((new_width, new_height), Image.Resampling[spec.interpolation.upper()])
    return numpy.asarray(image.crop((left, top, left + crop, top + crop)))


def describe_image_error(error: Exception) -> str:
    """Say in Chinese, in one line, why an image could not be read."""
    text = one_line(error)
    reasons: dict[type[Exception], str] = {
        ImageError: text,
        UnidentifiedImageError: "无法识别的图像格式,或文件已损坏",
        Image.DecompressionBombError: f"图像过大,超过 {2 * _pixel_limit():,} 像素",
        FileNotFoundError: "文件不存在",
        PermissionError: "没有读取权限",
        MemoryError: "内存不足,无法解码",
    }
    if reason := next((reason for kind, reason in reasons.items() if isinstance(error, kind)), None):
        return reason
    if "Ghostscript" in text or "cannot find loader" in text:
        return "不支持 EPS、WMF 等矢量图"
    if isinstance(error, OSError) and error.errno:  # said by the system
        return f"无法读取图像: {error.strerror}"
    return f"图像数据不完整或已损坏({text})"


# ---------------------------------------------------------------- engine


@functools.cache
def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver has a GPU for this process, without asking torch."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


class OnnxEngine:
    """A graph that export.py wrote, run by ONNX Runtime on the CPU or on CUDA in float32; torch is not imported.

    Attributes: ``spec``, ``version`` and ``device_name`` for people. Those of a file of ``labels`` replace the graph's
    own. The version is that of the file's content, unless it is known of which model the graph was made.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        labels: str | None = None,
        version: str | None = None,
        draft: bool = False,
        device: str = "cpu",
    ):
        if not os.path.isfile(path):
            raise ModelError(f"找不到 ONNX 文件 {path}")
        with explaining("onnxruntime 不能使用({}),请运行: pip install -U onnxruntime"):
            import onnxruntime
        with explaining(f"ONNX 文件 {path} 无法读取: {{}}。请重新导出"):
            if os.path.getsize(path) > 2**31:
                raise ModelError(f"ONNX 文件 {path} 超过 2 GiB,不是 export.py 导出的")
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # what goes wrong is said here, in one line
            # Threads that wait by spinning take the cores from decoding: 200 photos of 12 megapixels, as drafts, took a
            # third longer. One image by itself takes a millisecond more so.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            provider: Any = "CPUExecutionProvider"
            if device.startswith("cuda"):
                name = "CUDAExecutionProvider"
                # TF32 would cost float32 its promise that CPU and CUDA agree within 1e-3.
                provider = (name, {"device_id": int(device.partition(":")[2] or 0), "use_tf32": 0})
                if name not in onnxruntime.get_available_providers():
                    raise ModelError(f"装的 onnxruntime 用不了 {device}。{USE_GPU}")
                if hasattr(onnxruntime, "preload_dlls"):  # CUDA's libraries, where pip put them; since 1.21
                    onnxruntime.preload_dlls()
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, [provider])
            if device.startswith("cuda") and name not in self._session.get_providers():  # it does not say so itself
                raise ModelError(f"ONNX Runtime 用不了 {device},请用 nvidia-smi 检查显卡和驱动。{USE_GPU}")
            metadata = self._session.get_modelmeta().custom_metadata_map
            text, precision = metadata.get("wwts_spec"), metadata.get("wwts_precision", "float32")
            content = version or self._hash_content(path)  # which the session has found sound, and no file outside it
        if text is None:
            raise ModelError(f"ONNX 文件 {path} 里没有预处理方法和标签,它不是 export.py 导出的")
        with explaining(f"ONNX 文件 {path} 的 spec 有误: {{}}"):
            replacement = import_part("files").read_labels(labels) if labels else None
            spec = Spec.parse(json.loads(text), f"ONNX 文件 {path}", replacement)
            self.spec = dataclasses.replace(spec, draft=spec.draft or draft)
        crop, classes = self.spec.crop, self.spec.num_classes
        ports = [(port.type, port.shape[1:]) for port in (*self._session.get_inputs(), *self._session.get_outputs())]
        if ports != [("tensor(uint8)", [crop, crop, 3]), ("tensor(float)", [classes])]:
            raise ModelError(f"ONNX 文件 {path} 的输入或输出与它的 spec 不符,请重新导出")
        self._input = self._session.get_inputs()[0].name
        self.version = version or compute_version(content, self.spec, precision)
        where = device if device.startswith("cuda") else "cpu"
        self.device_name = f"{where} (ONNX Runtime{', int8' * (precision == 'int8')})"

    @staticmethod
    def _hash_content(path: str | os.PathLike) -> str:
        """A digest of a graph and of the files beside it that hold its weights."""
        digests = []
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            digests.append(hashlib.sha256(data).hexdigest())
            # Of a tensor that is kept elsewhere: the key "location", and a value with its length before it.
            places = {data[m.end() : m.end() + m[1][0]] for m in re.finditer(rb"\n\x08location\x12(?s:(.))", data)}
        for place in sorted(places):
            with open(os.path.join(os.path.dirname(path), os.fsdecode(place)), "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digest(*digests)

    def classify(self, batch: list[numpy.ndarray], topk: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Run the graph on images of crop×crop×3 uint8; give indices and confidences of the top-k, both N×k.

        Confidences fall along a row; a row is NaN where the graph gave anything that is not finite. Raises ModelError.
        """
        with explaining("ONNX Runtime 无法运行这个模型: {}。请重新导出"):
            try:
                (confidences,) = self._session.run(None, {self._input: numpy.stack(batch)})
            except Exception as error:  # of a class of its own for each kind of fault
                if re.search("out of memory|Failed to allocate memory", str(error)):
                    raise DeviceMemoryError(f"{self.device_name} 内存不足。请关闭占用它的程序,或改用 -d cpu") from error
                raise
        shape = (len(batch), self.spec.num_classes)
        sums = confidences.sum(1) if confidences.shape == shape else None
        if sums is None or confidences.min() < 0 or (abs(sums - 1) > 0.01).any():  # false for NaN
            raise ModelError(f"ONNX 模型 {self.spec.name} 的输出不是 {shape[0]}×{shape[1]} 的概率,请重新导出")
        k = min(topk, shape[1])
        top = numpy.argpartition(-confidences, k - 1)[:, :k]
        values = numpy.take_along_axis(confidences, top, 1)
        order = numpy.argsort(-values, kind="stable")
        values[~numpy.isfinite(sums)] = numpy.nan
        return numpy.take_along_axis(top, order, 1), numpy.take_along_axis(values, order, 1)


# ---------------------------------------------------------------- recognizer


# What an argument of Recognizer may be, as a pattern and in words.
COUNT = (r"[1-9]\d*", "不小于 1 的整数")
RULES = {
    "topk": COUNT,
    "device": (r"auto|cpu|mps|cuda(:\d{1,3})?", "auto、cpu、cuda、cuda:N 或 mps"),
    "dtype": ("auto|float32|float16|bfloat16", "auto、float32、float16 或 bfloat16"),
    "engine": ("auto|torch|onnx", "auto、torch 或 onnx"),
} | dict.fromkeys(("model", "repo", "weights", "labels"), ("(?s).+", "名称或路径"))
RULES |= dict.fromkeys(("batch_size", "workers"), (f"None|{COUNT[0]}", COUNT[1]))


class _Prepared(NamedTuple):
    """An image on its way to the engine: with pixels, or with answers from the cache, or with an error."""

    path: str
    pixels: numpy.ndarray | None = None
    key: str | None = None
    cached: list | None = None
    error: str | None = None


@dataclasses.dataclass(eq=False)
class Recognizer:
    """Recognises images with one model; loads it when first needed, so it can be pickled and shipped before.

    Any number of threads and streams may use one object. Raises UsageError for arguments that make no sense,
    and ModelError, when first used, if the model, its weights or labels, or the device are unusable.
    """

    # Entry point of the hub repository, a .safetensors file of learn.py, or an .onnx file; None: wwts_cn_base, or
    # wwts_cn_lite with a warning where base's weights are not to be had.
    model: str | os.PathLike | None = None
    _: dataclasses.KW_ONLY
    repo: str | None = None  # torch.hub repository, a folder or OWNER/NAME[:REF]; None: the folder of this file
    trust_repo: bool = False  # allow code of a remote repository to run
    weights: str | os.PathLike | None = None  # file or folder, passed to the entry point
    labels: str | os.PathLike | None = None  # file of labels that replace the model's own; see read_labels
    offline: bool = False  # never touch the network
    device: str = "auto"  # or cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # float16 on CUDA, else float32; or float32, float16, bfloat16
    engine: str = "auto"  # onnx: the graph that export.py keeps; torch; auto: that graph where there is no NVIDIA GPU
    topk: int = 5  # how many predictions a result has at most
    threshold: float = 0.0  # least confidence of a prediction, 0 to 1
    batch_size: int | None = None  # images per forward pass at most; None: 64 on CUDA, else 8
    workers: int | None = None  # decoding threads; None: one per core, 16 at most
    draft: bool = False  # decode large JPEGs at a reduced size; see decode_image
    cache: str | os.PathLike | None = None  # file or redis:// URL that keeps results by content of image and model

    def __post_init__(self) -> None:
        for name in ("model", "repo", "weights", "labels", "cache"):
            setattr(self, name, os.fspath(getattr(self, name)) if getattr(self, name) is not None else None)
        for name, (pattern, words) in RULES.items():
            value = getattr(self, name)
            if not re.fullmatch(pattern, str(value)) or words == COUNT[1] and type(value) not in (int, type(None)):
                raise UsageError(f"{name.replace('_', '-')} 应为 {words},而不是 {getattr(self, name)!r}")
        if not isinstance(self.threshold, (int, float)) or not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold 应为 0 到 1 之间的数,而不是 {self.threshold!r}")
        self.model_is_file = str(self.model).endswith(".onnx")
        on_cuda = self.device.startswith("cuda") and (self.engine == "onnx" or self.model_is_file)
        self.fits_onnx = (self.device in ("auto", "cpu") or on_cuda) and self.dtype in ("auto", "float32")
        if self.model_is_file and (self.engine == "torch" or self.weights or self.repo or not self.fits_onnx):
            raise UsageError("ONNX 文件以 float32 运行,不能与 --weights、--repo、--engine torch、-d mps、--dtype 同用")
        if self.engine == "onnx" and not self.fits_onnx:
            raise UsageError("--engine onnx 只在 CPU 或 CUDA 上以 float32 运行;请去掉 --dtype 和 -d mps")
        self.workers = self.workers or min(os.cpu_count() or 1, 16)
        self.offline = self.offline or os.environ.get("WWTS_OFFLINE", "0") not in ("", "0")
        self._cache = import_part("memory").AnswerCache(self.cache) if self.cache else None
        self._choice = None if self.model_is_file else import_part("choice").Choice(self)
        self._lock = threading.RLock()
        self._engine: Any = None  # an OnnxEngine, or a TorchEngine, which is used like one
        self._identity: Identity | None = None
        self._failed: ModelError | None = None
        self.loading_seconds = 0.0
        self.seconds: Counter = Counter()  # decode and resize: of all threads together; network

    def __reduce__(self) -> tuple:
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return functools.partial(Recognizer, **arguments), ()

    def identify(self) -> Identity:
        """Name, version and num_classes of the model: as remembered if no file changed, else by loading it."""
        with self._lock:
            if self._identity is None and self._choice:
                self._identity = self._choice.recall()
            if self._identity is None:
                self.load()
            return self._identity

    def load(self) -> Any:
        """Load the model unless that is done; give its engine. What failed once is not tried again."""
        with self._lock:
            if self._failed is not None:
                raise self._failed
            if self._engine is None:
                start = time.monotonic()
                try:
                    graph = (self.model, self.labels, None, self.draft, self.device)
                    engine = OnnxEngine(*graph) if self.model_is_file else self._choice.load()
                    identity = Identity(engine.spec.name, engine.version, engine.spec.num_classes)
                    if self._identity not in (None, identity):
                        raise ModelError("模型的权重、标签或程序在运行中变了,请再运行一次")
                except ModelError as error:
                    self._failed = error
                    raise
                self._engine, self._identity = engine, identity
                self.loading_seconds = time.monotonic() - start
                self.batch_size = self.batch_size or (64 if engine.device_name.startswith("cuda") else 8)
                log.info("加载模型完成,使用设备: %s", engine.device_name)
            return self._engine

    @property
    def on_cpu(self) -> bool:
        """Whether no NVIDIA GPU is to be used."""
        return self.device in ("cpu", "mps") or self.device == "auto" and not has_nvidia_gpu()

    def __call__(self, image: str | os.PathLike | Image.Image | BinaryIO) -> Result:
        """Recognise one image. One that cannot be read gives a Result with ``error`` set."""
        return self._answer([self._prepare(image)])[0]

    def stream(self, images: Iterable[str | os.PathLike | Image.Image | BinaryIO]) -> Iterator[Result]:
        """Recognise any number of images in constant memory; results come in input order.

        Decoding runs in ``workers`` threads beside the engine, which takes what is decoded, up to a batch. An
        exception of the input comes after the results of the images before it. Closing the iterator ends all.
        """
        if isinstance(images, (str, bytes, os.PathLike)):
            raise UsageError("stream 要一组图片;一张图片请直接调用 recognizer(图片)")
        return self._stream(iter(images))

    def _stream(self, images: Iterator) -> Iterator[Result]:
        workers, size = self.workers, self.batch_size or (8 if self.on_cpu else 64)
        pool, closed = ThreadPoolExecutor(workers), threading.Event()
        decoding: queue.Queue[Future | None] = queue.Queue(2 * size + workers)

        def feed() -> None:
            try:
                for image in images:
                    if closed.is_set():
                        return
                    decoding.put(pool.submit(self._prepare, image))
            except BaseException as error:  # handed over to the thread that asked for results
                failed: Future = Future()
                failed.set_exception(error)
                decoding.put(failed)
            decoding.put(None)

        threading.Thread(target=feed, daemon=True).start()
        waiting: list[Future | None] = []  # what was taken from the queue, but is not ready: one at most
        try:
            while (future := waiting.pop() if waiting else decoding.get()) is not None:
                batch = [future.result()]
                while len(batch) < (self.batch_size or 8):
                    with contextlib.suppress(queue.Empty):
                        waiting.append(decoding.get_nowait())
                    if not waiting or waiting[0] is None or not waiting[0].done() or waiting[0].exception():
                        break
                    batch.append(waiting.pop().result())
                yield from self._answer(batch)
        finally:
            closed.set()
            with contextlib.suppress(queue.Empty):  # the thread that feeds may wait for room
                while True:
                    decoding.get_nowait()
            pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, image: Any) -> _Prepared:
        """Decode an image, or find its answers in the cache."""
        key, is_path = None, isinstance(image, (str, bytes, os.PathLike))
        names = [image] if is_path else [getattr(image, "filename", None), getattr(image, "name", None)]
        path = os.fsdecode(next((name for name in names if name and isinstance(name, (str, bytes, os.PathLike))), ""))
        try:
            if hasattr(image, "read") and not image.seekable():
                image = io.BytesIO(image.read(MOST_IMAGE))
            with open_image(path) if is_path else contextlib.nullcontext(image) as file:
                if self._cache and not isinstance(file, Image.Image):
                    key = self._cache.key(file, self.identify())
                    if rows := self._cache.get(key, min(self.topk, self.identify().num_classes)):
                        return _Prepared(path, cached=rows)
                spec, start = self.load().spec, time.thread_time()
                decoded = decode_image(file, spec)
            middle = time.thread_time()
            pixels = preprocess(decoded, spec)
            with self._lock:
                self.seconds.update(decode=middle - start, resize=time.thread_time() - middle)
            return _Prepared(path, pixels, key)
        except ModelError:
            raise
        except Exception as error:  # a broken file can make a decoder raise anything: one record, no more
            return _Prepared(path, error=describe_image_error(error))

    def _answer(self, batch: list[_Prepared]) -> list[Result]:
        name, version, _ = self.identify()
        start = time.perf_counter()
        answers = iter(self._classify([image.pixels for image in batch if image.pixels is not None]))
        with self._lock:
            self.seconds["network"] += time.perf_counter() - start
        results = []
        for path, pixels, key, cached, error in batch:
            rows = cached if pixels is None else next(answers)
            if rows and key:
                self._cache.put(key, rows)
            if not rows and error is None:
                error = "模型输出了 NaN 或无穷大,结果不可信;可改用 --dtype float32"
            kept = tuple(Prediction(*row) for row in rows or () if row[1] >= self.threshold)
            results.append(Result(path, name, version, kept, error, cached is not None))
        return results

    def _classify(self, pixels: list[numpy.ndarray]) -> list[list[tuple[str, float, int]]]:
        """Label, confidence and index of the top-k of each image; in smaller batches where memory does not suffice."""
        rows: list = []
        while len(rows) < len(pixels):
            engine = self.load()
            batch = pixels[len(rows) : len(rows) + self.batch_size]
            try:
                answers = engine.classify(batch, self.topk)
            except DeviceMemoryError:
                if len(batch) == 1:
                    raise
                self.batch_size = len(batch) // 2
                log.warning("显存不足,批大小减为 %d", self.batch_size)
                continue
            for indices, values in zip(*(array.tolist() for array in answers), strict=True):
                row = [(engine.spec.labels[index], value, index) for index, value in zip(indices, values, strict=True)]
                rows.append(row if math.isfinite(values[0]) else [])
        return rows


# ---------------------------------------------------------------- inputs


def find_images(inputs: Iterable[str], warn: bool = True) -> Iterator[str]:
    """Paths of images: files as named, folders and globs expanded and sorted by path, - read line by line.

    A file that is named twice comes once. With ``warn``, what turns out to hold no image is warned of, and so
    are photos that need another package or another format.
    """
    inputs = list(inputs)
    # One folder names no file twice, and may hold millions.
    seen: set[str] | None = None if len(inputs) == 1 and os.path.isdir(inputs[0]) else set()
    unread: Counter = Counter()
    for name in inputs:
        number = 0
        for number, path in enumerate(_expand(name, unread), 1):  # noqa: B007
            if seen is not None:
                absolute = os.path.abspath(path)
                if absolute in seen:
                    continue
                seen.add(absolute)
            yield path
        if not number and warn:
            log.warning("%s 里没有图片(按扩展名找 .jpg、.png、.webp 等)", "标准输入" if name == "-" else name)
    for extension, number in unread.items() if warn else ():
        log.warning("跳过了 %d 个 %s 文件,%s", number, extension, UNREAD[extension])


def _expand(name: str, unread: Counter) -> Iterator[str]:
    if name == "-":
        # Bytes, since a file name need not be text; line by line, since the producer may be slow. Not through
        # sys.stdin, whose lock Python wants at exit, when an interrupted run may still wait for a line.
        with open(0, "rb", closefd=False) as file:
            while line := file.readline(MOST_TEXT):
                if len(line) == MOST_TEXT or line.startswith((b"\xff\xd8\xff", b"\x89PNG")):
                    raise UsageError("标准输入应是每行一个的路径,而不是图片本身")
                if path := os.fsdecode(line.rstrip(b"\r\n")):
                    yield path
    elif os.path.isdir(name):
        yield from _walk(name, unread)
    elif glob.has_magic(name) and not os.path.lexists(name):
        paths = sorted(glob.iglob(name, recursive=True))
        for path in paths:
            yield from _walk(path, unread) if os.path.isdir(path) else (path,)
        if not paths and not re.search("[*?]", name):  # more likely a missing 图片[1].jpg
            yield name
    else:
        yield name


def _walk(folder: str, unread: Counter) -> Iterator[str]:
    """Images under a folder in the order of their full paths; each folder once, however many links lead there."""
    _register_heif()
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    seen: set[tuple] = set()
    # The next one last. A "/" after a folder's name puts its files where their full paths belong among its neighbours'.
    waiting = [folder + "/"]
    while waiting:
        path = waiting.pop()
        if not path.endswith("/"):
            yield path
            continue
        path = path[:-1]
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            names = [entry.path + "/" * os.path.isdir(entry.path) for entry in os.scandir(path) if entry.name[0] != "."]
        except OSError:
            yield path  # becomes the error record of a folder that cannot be listed
            continue
        for name in sorted(names, reverse=True):
            extension = os.path.splitext(name)[1].lower()
            if name[-1] == "/" or extension in extensions:
                waiting.append(name)
            elif extension in UNREAD:
                unread[extension] += 1


# ---------------------------------------------------------------- outputs


def printable(text: str) -> str:
    """Escape control characters and what turns the direction of writing, so that a name cannot steer a terminal."""
    keep = "\u3000\u00a0\u200c\u200d"  # spaces, and what joins the parts of an emoji
    escaped = (
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
    return text if text.isprintable() else "".join(escaped)


def escape_cell(text: str) -> str:
    """A text as one line that no spreadsheet runs, as they run what begins with = + - or @ (OWASP, CSV injection)."""
    if os.sep == "/":  # elsewhere it is part of every path
        text = text.replace("\\", "\\\\")
    return "'" * text.startswith(("=", "+", "-", "@", "'")) + printable(text)


class Form(NamedTuple):
    """A way to write results: what comes before the first of them, and the text of one."""

    head: str
    format: Callable[[Result], str]


def make_form(name: str, topk: int, named: bool) -> Form:
    """Text, jsonl, or csv of so many predictions; only in text it matters whether images are ``named``."""
    if name == "csv":
        columns = [f"{name}_{rank}" for rank in range(1, topk + 1) for name in ("label", "confidence")]
        head = ",".join(["\ufeffpath", "model", "version", *columns, "error"]) + "\r\n"  # Excel wants the mark
        return Form(head, lambda result: format_csv(result, topk))
    return Form("", format_jsonl if name == "jsonl" else lambda result: format_text(result, named))


def format_text(result: Result, named: bool) -> str:
    """The block that people read; its header names the image if that is wanted."""
    name = f"{printable(result.path)} " if named else ""
    if result.error is not None:
        return f"[RESULT] {name}识别失败: {printable(result.error)}\n"
    lines = [f" - {printable(p.label)} (置信度: {p.confidence:.2f})\n" for p in result.predictions]
    return "".join([f"[RESULT] {name}识别结果:\n", *(lines or [" (没有达到阈值的标签)\n"])])


def format_jsonl(result: Result) -> str:
    """One JSON object in a line."""
    return json.dumps(result.record(), ensure_ascii=False, allow_nan=False) + "\n"


def format_csv(result: Result, topk: int) -> str:
    """One line for Excel: path, model, version, label_1, confidence_1, …, error."""
    cells = [cell for p in result.predictions for cell in (escape_cell(p.label), f"{p.confidence:.6f}")]
    cells += [""] * (2 * topk - len(cells))
    line = io.StringIO()
    start = [escape_cell(result.path), escape_cell(result.model), result.version]
    csv.writer(line, lineterminator="\r\n").writerow([*start, *cells, escape_cell(result.error or "")])
    return line.getvalue()


class StandardOutput:
    """Standard output, where there is nothing to resume; ``is_due`` tells which images are wanted."""

    path, recorded = None, (0, 0)  # how many images have a record, and how many of these one of an error

    def __init__(self, form: Form, is_due: Callable[[str], bool]):
        self.is_due, self._form, self._head = is_due, form, form.head

    def write(self, result: Result) -> None:
        """Print what is to be said of one image."""
        print(self._head + self._form.format(result), end="", flush=True)
        self._head = ""

    def close(self) -> None:
        """Leave it open for whatever else there is to say."""


# ---------------------------------------------------------------- command line, shared with the other scripts


# What people type at infer.py, and what it is called.
ELSEWHERE = {name: f"python {name[2:]}.py" for name in ("--export", "--check", "--bench")}
ELSEWHERE |= {"--int8": "python export.py --int8", "--finetune": "python learn.py --finetune"}
ELSEWHERE |= {"--price-per-hour": "python bench.py --price-per-hour", "--gpu": "-d cuda:0", "--cpu": "-d cpu"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with a script's docstring as help, UsageError in Chinese for errors, and -h, -q, --log-time."""

    def __init__(self, prog: str, manual: str):
        super().__init__(prog, add_help=False, allow_abbrev=False)
        self.manual = manual
        self.add_argument("-h", "--help", action="help")
        self.add_argument("-q", "--quiet", action="store_true")
        self.add_argument("--log-time", action="store_true")

    def format_help(self) -> str:
        """The manual."""
        return self.manual

    def error(self, message: str):
        """Say in Chinese what is wrong with the command line, and the nearest option that there is."""
        for english, chinese in (
            ("unrecognized arguments:", "无法识别的参数:"),
            ("the following arguments are required:", "缺少参数:"),
            ("expected one argument", "后面缺少一个值"),
            ("invalid int value:", "应为整数,而不是"),
            ("invalid float value:", "应为数,而不是"),
            ("invalid choice:", "没有这个选择:"),
            ("choose from", "可选"),
            ("argument ", "参数 "),
        ):
            message = message.replace(english, chinese)
        option = (re.findall(r"无法识别的参数: (--?[\w-]+)", message) or [""])[0]
        if self.prog == "infer.py" and option in ELSEWHERE:
            message = f"{option} 请改用: {ELSEWHERE[option]}"
        elif nearest := difflib.get_close_matches(option, self._option_string_actions, 1, 0.7):
            message += f"(是不是想用 {nearest[0]}?)"
        raise UsageError(f"{message}。用法见: python {self.prog} --help")


def add_model_options(parser: argparse.ArgumentParser, leave_out: Iterable[str] = ()) -> None:
    """Declare the options that choose a model and how it runs, but for those that a script does not heed."""
    options: dict[str, dict[str, Any]] = {name: {} for name in ("-m --model", "--repo", "--weights", "--labels")}
    options |= {name: {"default": "auto"} for name in ("-d --device", "--dtype", "--engine")}
    options |= {name: {"type": int} for name in ("-b --batch-size", "-j --workers")}
    options |= {name: {"action": "store_true"} for name in ("--trust-repo", "--offline", "--draft")}
    for names, settings in options.items():
        if names.split("--")[1] not in leave_out:
            parser.add_argument(*names.split(), **settings)


def build_recognizer(arguments: argparse.Namespace, **overrides: Any) -> Recognizer:
    """The Recognizer that a parsed command line asks for; ``overrides`` win."""
    names = {field.name for field in dataclasses.fields(Recognizer)}
    return Recognizer(**{name: value for name, value in vars(arguments).items() if name in names} | overrides)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, whose number is the argument."""


def _interrupt(number: int, frame: Any) -> None:
    """Unwind what is being done; what does not let itself be unwound within a second is left."""
    timer = threading.Timer(1, os._exit, [128 + number])
    timer.daemon = True
    timer.start()
    signal.signal(number, signal.SIG_DFL)
    raise Interrupted(number)


class _Formatter(logging.Formatter):
    """[INFO], [WARN], [ERROR] and [CACHE HIT] lines, with the time if that is asked for."""

    with_time = False

    def format(self, record: logging.LogRecord) -> str:
        level = {logging.WARNING: "WARN", CACHE_HIT: "CACHE HIT"}.get(record.levelno, record.levelname)
        start = self.formatTime(record, "%Y-%m-%d %H:%M:%S ") if self.with_time else ""
        return f"{start}[{level}] {printable(record.getMessage())}"


def run_command(run: Callable[[argparse.Namespace], int], parser: Parser, argv: list[str] | None = None) -> int:
    """Parse a command line, run it, and turn whatever it raises into one line and an exit status."""
    # Chinese must come out whatever the locale; a file name that is not UTF-8 must not stop the run.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by a daemon
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    formatter = _Formatter()
    handler.setFormatter(formatter)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    arguments = argparse.Namespace()
    actions = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        argv = sys.argv[1:] if argv is None else argv
        # Images may stand on both sides of options, which argparse allows only where there is no "--".
        arguments = parser.parse_args(argv) if "--" in argv else parser.parse_intermixed_args(argv)
        formatter.with_time = arguments.log_time
        if arguments.quiet:
            log.setLevel(logging.WARNING)
        if arguments.quiet or not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        if vars(arguments).get("format") not in (None, "text"):  # machines read UTF-8, whatever the terminal
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", newline="")
        status = run(arguments)
        sys.stdout.flush()
        return status
    except ModelError as error:
        log.error("%s", error)
        return error.exit_status
    except Interrupted as error:
        log.warning("已中断%s", vars(arguments).get("hint", ""))
        return 128 + error.args[0]
    except OSError as error:
        with contextlib.suppress(OSError):  # Python's own flush at exit must not complain again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            return 141  # 128 + SIGPIPE
        log.error("结果写不进去: %s%s", one_line(error), vars(arguments).get("hint", ""))
        return 3
    finally:
        for number, action in actions.items():
            signal.signal(number, action)
        log.removeHandler(handler)


@contextlib.contextmanager
def progress_bar(total: int | None, unit: str, initial: int = 0, wanted: bool = True) -> Iterator[Any]:
    """A tqdm bar on a terminal, which log lines go above; nothing elsewhere, with --quiet, or without tqdm."""
    if (
        not wanted
        or not sys.stderr.isatty()
        or not log.isEnabledFor(logging.INFO)
        or not importlib.util.find_spec("tqdm")
    ):
        yield types.SimpleNamespace(update=lambda *_: None, set_postfix_str=lambda *_, **__: None)
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm([log]), tqdm(total=total, unit=unit, initial=initial, dynamic_ncols=True) as bar:
        yield bar


# ---------------------------------------------------------------- recognising from the command line


def build_parser() -> Parser:
    """The command line of DESIGN.md."""
    parser = Parser("infer.py", __doc__)
    add_model_options(parser)
    add = parser.add_argument
    add("inputs", nargs="*")
    add("-k", "--topk", type=int, default=5)
    add("-t", "--threshold", type=float, default=0.0)
    add("-f", "--format", choices=["text", "jsonl", "csv"])
    add("-o", "--output")
    add("--expect", action="append")
    add("--cache", nargs="?", const=str(cache_folder() / "results.sqlite"))
    for name in ("--resume", "--retry-failed", "--overwrite", "--version"):
        add(name, action="store_true")
    return parser


def check_usage(arguments: argparse.Namespace) -> None:
    """Raise UsageError for what cannot be meant, before anything is opened or loaded."""
    inputs, resume = arguments.inputs, arguments.resume or arguments.retry_failed
    if not inputs:
        raise UsageError("缺少参数: 图片。用法见: python infer.py --help")
    if any(re.match("https?://", name) for name in inputs):
        raise UsageError("不能直接识别网址,请先下载图片")
    if not any(name == "-" or os.path.lexists(name) or re.search("[*?]", name) for name in inputs):
        hint = "。名字里有空格的要加引号" if os.path.lexists(" ".join(inputs)) else ""
        raise UsageError(f"文件不存在: {'、'.join(inputs)}{hint}")
    if arguments.cache and os.path.splitext(arguments.cache)[1].lower() in Image.registered_extensions():
        raise UsageError(f"--cache 后面的 {arguments.cache} 会被当作缓存文件;请把 --cache 写在图片后面")
    if arguments.expect and resume:
        raise UsageError("--expect 不能与 --resume 同用: 已有记录的图片不会再看")
    if arguments.output is None and (resume or arguments.overwrite):
        raise UsageError("--resume、--retry-failed 和 --overwrite 要与 -o 一起用")


def choose_recognizer(arguments: argparse.Namespace) -> Recognizer:
    """The Recognizer of the command line; raises UsageError for labels to expect that it lacks."""
    recognizer = build_recognizer(arguments)
    labels = recognizer.load().spec.labels if arguments.expect else ()
    if unknown := set(arguments.expect or ()) - set(labels):
        near = [near for label in unknown for near in difflib.get_close_matches(label, labels)]
        hint = f"。相近的有: {'、'.join(near)}" if near else ""
        raise UsageError(f"{recognizer.identify().name} 没有这些标签: {'、'.join(sorted(unknown))}{hint}")
    return recognizer


def run(arguments: argparse.Namespace) -> int:
    """Recognise everything that was asked for; return the exit status."""
    if arguments.version:
        print(", ".join(f"{name} {version}" for name, version in import_part("versions").package_versions().items()))
        return 0
    check_usage(arguments)
    single = len(arguments.inputs) == 1 and os.path.isfile(arguments.inputs[0])
    if arguments.output is None and "WORLD_SIZE" not in os.environ:
        output = StandardOutput(make_form(arguments.format or "text", arguments.topk, not single), lambda path: True)
    else:
        output = import_part("unattended").open_output(arguments, not single)
    with contextlib.closing(output):
        return recognise(arguments, output, single)


def recognise(arguments: argparse.Namespace, output: Any, single: bool) -> int:
    """Recognise the images that are due at an output (as StandardOutput); return the exit status."""
    inputs, counts, start = arguments.inputs, Counter(), time.monotonic()

    # 1. Which images.
    done_before, failed_before = output.recorded

    def due() -> Iterator[str]:
        for path in find_images(inputs):
            counts["found"] += 1
            if output.is_due(path):
                yield path

    images = due()
    first = list(itertools.islice(images, 1))
    if not counts["found"]:
        raise UsageError("没有找到图片(按扩展名找 .jpg、.png、.webp 等)")

    # 2. Which model.
    recognizer = choose_recognizer(arguments)
    if output.path:
        output.check(recognizer.identify(), arguments.topk, arguments.threshold)

    # 3. How it is shown.
    as_text = output.path is None and arguments.format in (None, "text")
    with_bar = not single and (output.path or not sys.stdout.isatty()) and sys.stderr.isatty()
    total = None
    if with_bar and "-" not in inputs:
        total = done_before + sum(map(output.is_due, find_images(inputs, warn=False)))

    # 4. Recognise and write.
    try:
        results = recognizer.stream(itertools.chain(first, images))
        with progress_bar(total, "张", done_before, with_bar) as bar, contextlib.closing(results):
            for result in results:
                if as_text and single and result.error is None:
                    log.info("输入图像: %s", result.path)
                if as_text and result.cached and not with_bar:
                    log.log(CACHE_HIT, "使用缓存结果")
                writing = time.perf_counter()
                output.write(result)
                recognizer.seconds["write"] += time.perf_counter() - writing
                counts.update(done=1, failed=result.error is not None, cached=result.cached)
                if result.error is not None:
                    log.error("%s: %s", result.path, result.error)
                if arguments.expect and not {p.label for p in result.predictions} & set(arguments.expect):
                    counts["unexpected"] += 1
                    log.error("%s: 答案里没有 %s", result.path, " 或 ".join(arguments.expect))
                bar.set_postfix_str(f"失败 {counts['failed']}", refresh=False)
                bar.update()
    finally:
        # 5. What was done, also where that was interrupted.
        output.close()
        nothing = counts["done"] == 0 and isinstance(sys.exc_info()[1], ModelError)
        if (counts["found"] > 1 or output.path) and not nothing:
            log.info(
                "%s: 识别 %d 张,失败 %d 张,缓存命中 %d 张,已有记录 %d 张(失败 %d 张),%.1f 张/秒"
                "(解码 %.1f 秒,缩放 %.1f 秒,网络 %.1f 秒,写入 %.1f 秒)",
                "中断" if sys.exc_info()[0] else "完成",
                *(counts["done"], counts["failed"], counts["cached"], done_before, failed_before),
                counts["done"] / max(time.monotonic() - start - recognizer.loading_seconds, 1e-3),
                *(recognizer.seconds[part] for part in ("decode", "resize", "network", "write")),
            )
    failed = counts["failed"] + failed_before
    shared = os.environ.get("WORLD_SIZE", "1") != "1"  # torchrun ends all processes when one of them fails
    if shared and failed:
        log.warning("第 %s 份有 %d 张失败", os.environ.get("RANK", "0"), failed)
    return 1 if (failed or counts["unexpected"]) and not shared else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
