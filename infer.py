#!/usr/bin/env python3
"""用中文说出图片里有什么:单文件推理脚本。

用法: python infer.py 图片 [图片 ...] [选项]

  图片                    图片文件、文件夹(含子文件夹)、通配符,
                          或 - (从标准输入读路径,每行一个)
模型:
  -m, --model NAME        模型入口名,export.py 导出的 .onnx 文件,或 learn.py
                          学得的 .safetensors 文件
                          [wwts_cn_base,没有权重时 wwts_cn_lite]
  --repo REPO             torch.hub 仓库: 文件夹或 OWNER/NAME[:REF]
                          [infer.py 所在文件夹]
  --trust-repo            允许运行远程仓库的代码
  --weights PATH          权重文件,或含 pytorch_model.pt 和 meta_info.txt
                          的文件夹
  --labels FILE           改用这个标签文件(JSON、每行一个名称的文本或
                          meta_info.txt)
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
  --expect LABEL          前 K 个标签里应有它(可写多个,有一个即可),
                          否则退出状态 1
  --cache [FILE]          缓存结果,同一图片不再重算;可以是 redis://…
                          [用户缓存文件夹]
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
import inspect
import io
import itertools
import json
import logging
import math
import mmap
import os
import queue
import re
import shutil
import signal
import stat
import tempfile
import threading
import time
import types
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

try:
    import numpy
    from PIL import EpsImagePlugin, Image, UnidentifiedImageError
except ImportError as missing:
    sys.stderr.write(f"[ERROR] Pillow 或 NumPy 不能使用({missing})。请运行: pip install -r requirements.txt\n")
    sys.exit(3)

if TYPE_CHECKING:
    import torch

__version__ = "2.0.0"
__all__ = [
    "Cache", "HubModel", "Identity", "ModelError", "OnnxEngine", "Parser", "Prediction", "Recognizer", "Result", "Spec",
    "TorchEngine", "UsageError", "add_model_options", "build_recognizer", "cache_folder", "choose_device",
    "compute_version", "decode_image", "describe_image_error", "digest", "escape_cell", "explaining",
    "file_state", "find_classifier", "find_images", "has_nvidia_gpu", "import_torch", "kept_graph",
    "load_hub_model", "load_learned_model", "one_line", "open_image", "package_versions", "preprocess",
    "printable", "progress_bar", "read_labels", "read_text", "recall", "remember", "replacing", "run_command",
    "unescape_cell",
]  # fmt: skip

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL, FALLBACK_MODEL = "wwts_cn_base", "wwts_cn_lite"
# The classic ImageNet evaluation pipeline, for hub models that bring no spec of their own.
CLASSIC_SPEC = dict(
    resize=256, crop=224, interpolation="bilinear", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
)
# Far beyond what is meant so: bytes of a text file, a record or a path; bytes of an image file; scans of a JPEG.
MOST_TEXT, MOST_IMAGE, MOST_SCANS = 2**26, 2**30, 100
# Against full decoding, over 110 camera photos, the top-1 label was the same for 93.6, 98.2 and 99.1 % at 1, 2 and 3.
DRAFT_MARGIN = 2
# What cameras and phones write and Pillow by itself does not read; and what to do about it.
UNREAD = dict.fromkeys((".heic", ".heif"), "要识别请运行: pip install pillow-heif")
UNREAD |= dict.fromkeys(".jxl .avif .dng .cr2 .cr3 .nef .arw .raf .orf .rw2".split(), "要识别请先转成 .jpg")
USE_GPU = "请运行: pip uninstall onnxruntime,再运行: pip install onnxruntime-gpu;或改用 -d cpu"
REINSTALL = "请运行: pip install --force-reinstall torch torchvision"

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

        Without either, a model of 1,000 classes gets ImageNet's names in Chinese. Raises ModelError if images
        cannot be prepared by it, or if the labels are not as many as the outputs.
        """

        def are(values: Any, length: int, *kinds: type) -> bool:
            right = isinstance(values, (list, tuple)) and len(values) == length
            return right and all(type(v) in kinds and (kinds == (str,) or math.isfinite(v)) for v in values)

        v = {
            field.name: given.get(field.name) if isinstance(given, Mapping) else None
            for field in dataclasses.fields(cls)
        }
        sizes, own = [v["num_classes"], v["crop"], v["resize"]], v["labels"]
        v["draft"] = bool(v["draft"])
        right = are(sizes, 3, int) and sizes[0] > 0 and 0 < sizes[1] <= sizes[2] <= 4096
        right = right and are([v["name"], v["interpolation"]], 2, str) and v["interpolation"] in ("bilinear", "bicubic")
        right = right and are(v["mean"], 3, int, float) and are(v["std"], 3, int, float) and all(v["std"])
        if not right or own is not None and not (isinstance(own, (list, tuple)) and are(own, len(own), str)):
            raise ModelError(f"{source} 的 spec 有误,无法得知怎样准备图片和读取结果")
        if labels is None and own is None and v["num_classes"] == 1000:
            labels = read_labels(HERE / "labels_zh.json")
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
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    if "Ghostscript" in text or "cannot find loader" in text:
        return "不支持 EPS、WMF 等矢量图"
    if isinstance(error, OSError) and error.errno:  # said by the system
        return f"无法读取图像: {error.strerror}"
    return f"图像数据不完整或已损坏({text})"


# ---------------------------------------------------------------- small files


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


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file; raises OSError, or ValueError if it is no text or longer than 64 MiB."""
    with open(path, "rb") as file:
        data = file.read(MOST_TEXT + 1)
    if len(data) > MOST_TEXT:
        raise ValueError(f"超过 {MOST_TEXT >> 20} MiB")
    return data.decode("utf-8-sig")


def read_labels(path: str | os.PathLike) -> list[str]:
    """Read labels: a JSON list, a JSON object of index → name, a text of a name a line, or a meta_info.txt.

    Raises ModelError when the file cannot be read or its shape is none of these.
    """
    with explaining(f"标签文件 {path} 无法读取: {{}}。应是 UTF-8 编码的文本", (OSError, ValueError, RecursionError)):
        text = read_text(path).strip("\r\n")
        is_json = re.match(r'[\[{]\s*["\[\]{}]|\[\s*[\d-]|\[NaN', text)  # and not a name such as [PAD]
        labels = json.loads(text) if is_json else text.split("\n")
    if isinstance(labels, dict):
        with explaining(f"标签文件 {path} 缺少序号 {{}}", KeyError):
            labels = [labels[str(index)] for index in range(len(labels))]
    elif not is_json:
        table = all("\t" in line for line in labels)  # meta_info.txt: the label is column 1
        labels = [(line.split("\t")[1] if table else line).strip() for line in labels]
    if not all(isinstance(label, str) for label in labels) or not any(labels):
        raise ModelError(f"标签文件 {path} 应是一组名称(JSON 列表、JSON 对象、每行一个名称的文本或 meta_info.txt)")
    return labels


def cache_folder() -> Path:
    """The folder for what this program keeps for the user: results, exported graphs and what it remembers."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "wwts"


def kept_graph(name: str, version: str) -> Path:
    """Where export.py keeps the graph of a model's version; ``recall(its folder's name)`` vouches for it."""
    return cache_folder() / f"graph-{name}-{version}" / "graph.onnx"


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


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write a file or folder at; when all went well, it replaces ``path`` in one step.

    Raises ModelError, and leaves nothing behind, where it cannot be written.
    """
    path, folder = Path(path), ""
    try:
        with explaining(f"{path} 写不进去: {{}}。请腾出空间、检查权限,或换一个地方", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(prefix=f".{path.name[:50]}.", suffix=".partial", dir=path.parent)
            yield Path(folder, path.name)
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(Path(folder, path.name), path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- models from torch.hub repositories


class HubModel(NamedTuple):
    """A network (eval mode, float32, on the CPU) with what is known of it.

    ``weights`` is a digest of all that decides its answers besides the spec: parameters and code;
    ``parameters`` is one of the former alone. ``files`` are the states of the files that both were read from,
    None where they are not known. ``own`` tells the networks of this project, whose batch norms may be folded
    into convolutions.
    """

    module: torch.nn.Module
    spec: Spec
    weights: str
    files: dict[str, Any] | None
    own: bool
    parameters: str = ""


def import_torch() -> Any:
    """Import torch, for this module too, or raise ModelError with the pip line that mends the installation."""
    global torch
    # GNU OpenMP's threads wait for each other by spinning, which takes the cores from decoding and whatever else
    # runs: beside one busy process 200 photos took 24 s instead of 17. Without spinning one image takes twice as long.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with explaining("torch 无法导入: {}。请运行: pip install --force-reinstall torch torchvision"):
        advice = "请运行: pip install torch torchvision。导出的 .onnx 文件不需要它: -m 文件.onnx"
        with explaining(f"缺少 torch 或它的一部分({{}})。{advice}", ModuleNotFoundError):
            import torch
    return torch


_loading = threading.Lock()  # sys.path, sys.modules and sys.stdout belong to all threads
_repositories: set[Path] = set()


def load_hub_model(
    name: str,
    repo: str | None = None,
    trust_repo: bool = False,
    weights: str | None = None,
    labels: str | None = None,
    offline: bool = False,
) -> HubModel:
    """Call the entry point ``name`` of a torch.hub repository with its trained weights.

    Raises what the entry point raises as ModelError, but for FileNotFoundError and ConnectionError of
    this project's own entry points, which mean that there are no weights to be had.
    """
    import_torch()
    folder = HERE if repo is None else _hub_folder(repo, trust_repo, offline)
    own, hubconf = folder == HERE, folder / "hubconf.py"
    if not hubconf.is_file():
        raise ModelError(f"{folder} 里没有 hubconf.py;请把它和 labels_zh.json 放在 infer.py 旁边,或用 -m 文件.onnx")
    states = {os.path.abspath(path): file_state(path) for path in (hubconf, labels) if path}
    replacement = None if labels is None else read_labels(labels)

    def imported(folders: Iterable[Path]) -> list[tuple[str, str]]:
        modules = [(getattr(module, "__file__", None), key) for key, module in list(sys.modules.items())]
        starts = tuple(os.path.join(folder, "") for folder in folders)
        return sorted((file, key) for file, key in modules if isinstance(file, str) and file.startswith(starts))

    with _loading:
        for _, module_name in imported(_repositories):  # "utils" of another, or of this one before it was edited
            del sys.modules[module_name]
        _repositories.clear()
        code, search_path = hashlib.sha256(hubconf.read_bytes()), sys.path[:]
        sys.path.insert(0, str(folder))
        # Python takes compiled code for current by size and time alone; the version is that of the source.
        sys.pycache_prefix, pycache_prefix = os.devnull, sys.pycache_prefix
        try:
            # What other people's hub code prints must not get among the results on standard output.
            with contextlib.redirect_stdout(sys.stderr):
                module = _call_entry_point(folder, name, weights, offline)
                given = getattr(module, "spec", None) or {}
                if not isinstance(module, torch.nn.Module) or not isinstance(given, Mapping):
                    kinds = f"{type(module).__name__},spec 是 {type(given).__name__}"
                    raise ModelError(f"模型 {name} 的入口应返回 torch.nn.Module,其 spec 应是字典,而返回的是 {kinds}")
                given = {**CLASSIC_SPEC, **given, "name": name}
                if own:
                    parameters = given["sha256"]
                else:
                    _repositories.add(folder)
                    # Running it once imports what it imports late, and counts its classes.
                    with torch.inference_mode():
                        logits = module.eval().float()(torch.zeros(1, 3, given["crop"], given["crop"]))
                    given.setdefault("num_classes", _check_logits(logits, 1, given.get("num_classes")).shape[1])
                    for file in (Path(file) for file, _ in imported([folder])):
                        if "site-packages" not in file.parts and file.is_file():
                            code.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
                    digests = hashlib.sha256()
                    plain = (item for part in module.modules() for item in vars(part).items())  # neither of the two
                    tensors = itertools.chain(module.named_parameters(), module.named_buffers(), plain)
                    for key, value in ((key, value) for key, value in tensors if isinstance(value, torch.Tensor)):
                        digests.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
                        digests.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                    parameters = digests.hexdigest()
        except ModelError:
            raise
        except (Exception, SystemExit) as error:  # a repository's code may raise anything
            if own and isinstance(error, (FileNotFoundError, ConnectionError)):
                raise
            message = f"模型 {name} 加载失败: {one_line(error)}"
            if isinstance(error, torch.OutOfMemoryError):
                message = f"模型 {name} 加载时显存不足(或内存不足)"
            elif "torchvision::" in str(error):
                message = f"torch 与 torchvision 版本不匹配({one_line(error)})。{REINSTALL}"
            elif isinstance(error, ModuleNotFoundError):
                message = f"模型 {name} 需要 {error.name},请运行: pip install {error.name}"
            raise ModelError(message) from error
        finally:
            sys.path[:], sys.pycache_prefix = search_path, pycache_prefix
    spec = Spec.parse(given, f"模型 {name}", replacement)
    files = {**given["files"], **states} if own else None
    return HubModel(module, spec, digest(parameters, code.hexdigest()), files, own, parameters)


def _call_entry_point(folder: Path, name: str, weights: str | None, offline: bool) -> Any:
    module_spec = importlib.util.spec_from_file_location("hubconf", folder / "hubconf.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    entries = [entry for entry in dir(module) if callable(getattr(module, entry)) and entry[0] != "_"]
    if name not in entries:
        nearest = difflib.get_close_matches(name, entries, 1)
        hint = f"。最接近的是 {nearest[0]}" if nearest else ""
        raise ModelError(f"没有名为 {name} 的模型。{folder} 提供: {', '.join(entries)}{hint}")
    entry = getattr(module, name)
    parameters = inspect.signature(entry).parameters
    arguments: dict[str, Any] = {"offline": True} if offline and "offline" in parameters else {}
    if weights and "weights" not in parameters:
        raise UsageError(f"模型 {name} 的入口不接受 --weights")
    # torchvision's conventions, new and old: left at None or False a network comes untrained.
    if weights or "weights" in parameters and parameters["weights"].default in (None, inspect.Parameter.empty):
        arguments["weights"] = weights or "DEFAULT"
    elif "weights" not in parameters and "pretrained" in parameters:
        arguments["pretrained"] = True
    return entry(**arguments)


def _hub_folder(repo: str, trust_repo: bool, offline: bool) -> Path:
    """The folder of a local repository, or of torch.hub's copy of a remote one."""
    if os.path.isdir(repo):
        return Path(repo).resolve()
    match = re.fullmatch(r"([\w.-]+)/([\w.-]+)(?::([\w./-]+))?", repo)
    if not match:
        raise ModelError(f"找不到文件夹 {repo},它也不是 OWNER/NAME[:REF] 形式的仓库名")
    if not trust_repo:
        raise UsageError(f"{repo} 是远程仓库,运行其中的代码前请先确认可信,然后加上 --trust-repo")
    if not offline:
        remedy = "请另行取得它(git clone 或下载后解压),再用 --repo 指定那个文件夹"
        with explaining(f"无法从 GitHub 获取仓库 {repo}: {{}}。{remedy}"), contextlib.redirect_stdout(sys.stderr):
            torch.hub.list(repo, trust_repo=True, verbose=False)  # fetches it, or finds it fetched
    owner, name, ref = match.groups()
    for branch in [ref.replace("/", "_")] if ref else ["main", "master"]:
        folder = Path(torch.hub.get_dir(), f"{owner}_{name}_{branch}")
        if folder.is_dir():
            return folder.resolve()
    raise ModelError(f"本机没有仓库 {repo} 的副本,且处于离线模式")


def find_classifier(model: HubModel) -> str:
    """The name, within a network, of the nn.Linear that gives its logits: the last one of as many outputs."""
    layers = [(name, layer) for name, layer in model.module.named_modules() if isinstance(layer, torch.nn.Linear)]
    if not layers or layers[-1][1].out_features != model.spec.num_classes:
        raise ModelError(f"模型 {model.spec.name} 的最后一层不是 nn.Linear 分类层,不能学习自己的类别。请换一个模型")
    return layers[-1][0]


def load_learned_model(
    path: str,
    repo: str | None = None,
    trust_repo: bool = False,
    weights: str | None = None,
    labels: str | None = None,
    offline: bool = False,
) -> HubModel:
    """Load what learn.py wrote: a head for the hub model that the file names, or all parameters of its network.

    The file may choose an entry point, but only of the repository that is asked for. Raises ModelError where it
    is damaged, not of learn.py, or of a model with other weights; else as load_hub_model does.
    """
    import_torch()
    states = {os.path.abspath(file): file_state(file) for file in (path, labels) if file}
    if not os.path.isfile(path):
        raise ModelError(f"找不到模型文件 {path}")
    with explaining("学习得到的模型需要 safetensors({}),请运行: pip install safetensors", ImportError):
        from safetensors import safe_open
    damaged = f"{path} 不是 learn.py 写的模型,或者已损坏: {{}}。请重新复制或重新学习"
    with explaining(damaged):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("wwts_learned", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        spec = Spec.parse(about["spec"], path, labels and read_labels(labels))
        if any(printable(text) != text for text in (spec.name, *spec.labels)) or re.search(r"[/\\]", spec.name):
            raise ValueError("名称中有控制字符或路径")
    backbone = load_hub_model(about["backbone"], repo, trust_repo, weights, offline=offline)
    if backbone.parameters != about.get("parameters"):
        cause = "现在的权重与学习时的不同。请换回那时的权重(--repo、--weights),或重新学习"
        raise ModelError(f"{path} 以 {backbone.spec.name} 为基础,{cause}")
    module, name = backbone.module, find_classifier(backbone)

    class Root(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features.sign() * features.abs().sqrt()

    with explaining(damaged):
        linear = torch.nn.Linear(module.get_submodule(name).in_features, spec.num_classes)
        # Trained as a whole, a network needs no root, whose slope has no limit at zero.
        module.set_submodule(name, linear if about["whole"] else torch.nn.Sequential(Root(), linear))
        target = module if about["whole"] else linear
        expected = {key: (value.dtype, value.shape) for key, value in target.state_dict().items()}
        if {key: (value.dtype, value.shape) for key, value in tensors.items()} != expected:
            raise ValueError("参数的名称、类型或形状不符")
        if not all(value.isfinite().all() for value in tensors.values()):
            raise ValueError("参数含有 NaN 或无穷大")
        target.load_state_dict(tensors)
    files = None if backbone.files is None else backbone.files | states
    digests = [digest(content, part) for part in (backbone.weights, backbone.parameters)]
    return HubModel(module.eval().requires_grad_(False), spec, digests[0], files, backbone.own, digests[1])


def _check_logits(logits: Any, images: int, classes: int | None = None) -> torch.Tensor:
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if len(shape) != 2 or shape[0] != images or classes not in (None, shape[1]) or not logits.is_floating_point():
        raise ModelError(f"模型的输出是 {shape},而不是 {images}×{classes or '类别数'} 的张量,它不是图像分类模型")
    return logits


@functools.cache
def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver has a GPU for this process, without asking torch."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda, cuda:N or mps into a device that works here, or raise ModelError."""
    torch = import_torch()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with explaining(f"不能使用 {name}: {{}};或改用 -d cpu"):  # none there, too old a driver, in use
        if name.startswith("cuda") and not torch.cuda.is_available():
            cause = "没有可用的 NVIDIA 显卡或驱动,请用 nvidia-smi 检查"
            raise RuntimeError(cause if torch.version.cuda else f"装的是不带 CUDA 的 torch,{REINSTALL}")
        torch.zeros(1, device=name)
    return torch.device(name)


# ---------------------------------------------------------------- engines


class TorchEngine:
    """A hub model on one device.

    Attributes: ``model`` (the network), ``spec``, ``version``, ``files`` (see HubModel), ``device``, ``dtype``, and
    ``device_name`` for people.
    """

    def __init__(self, model: HubModel, device: str, dtype: str):
        self.spec, self.files, self.device = model.spec, model.files, choose_device(device)
        self.device_name = str(self.device)
        self.precision = ("float16" if self.device.type == "cuda" else "float32") if dtype == "auto" else dtype
        self.dtype = getattr(torch, self.precision)
        self.version = compute_version(model.weights, model.spec, self.precision)
        self._lock, self._own = threading.Lock(), model.own
        # Without statistics of its own a batch norm takes those of the batch: company would decide the answers.
        norms = [part for part in model.module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
        self._apart = any(norm.running_mean is None for norm in norms)
        with self._one_line_errors():
            self.model = (model.module.fuse() if model.own else model.module.eval()).to(self.device, self.dtype)
            # Pixels come as N×H×W×3 anyway, and convolutions are up to twice as fast so.
            for parameter in self.model.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (self.spec.mean, self.spec.std)
        )

    def normalize(self, batch: numpy.ndarray) -> torch.Tensor:
        """Turn N×H×W×3 uint8 into N×3×H×W float32 on the device: torchvision's ToTensor and Normalize."""
        pixels = torch.from_numpy(batch)
        if self.device.type == "cuda":  # only pinned memory is copied while the host goes on
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        pixels = pixels.to(self.device).permute(0, 3, 1, 2)
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)

    def classify(self, batch: list[numpy.ndarray], topk: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Run the network on images of crop×crop×3 uint8; give indices and confidences of the top-k, both N×k.

        Confidences fall along a row; a row is NaN where the network gave anything that is not finite.
        Raises ModelError for whatever the network raises.
        """
        # TF32 would cost float32 its promise that CPU and CUDA agree within 1e-3; the switch is for all threads.
        with self._lock, self._one_line_errors(), torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            inputs = self.normalize(numpy.stack(batch)).to(self.dtype)
            with contextlib.nullcontext() if self._own else contextlib.redirect_stdout(sys.stderr):
                logits = torch.cat([self.model(image[None]) for image in inputs]) if self._apart else self.model(inputs)
            confidences = _check_logits(logits, len(batch), self.spec.num_classes).float().softmax(1)
            top = confidences.topk(min(topk, self.spec.num_classes))
            values = top.values.where(confidences.isfinite().all(1, keepdim=True), torch.nan)
            return top.indices.cpu().numpy(), values.cpu().numpy()

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        with explaining(f"模型 {self.spec.name} 在 {self.device_name} 上运行出错: {{}}"):
            try:
                yield
            except torch.OutOfMemoryError as error:
                remedy = "请关闭占用显存的程序(nvidia-smi 查看),或改用 --dtype float16、-d cpu"
                raise DeviceMemoryError(f"{self.device_name} 显存不足。{remedy}") from error


class OnnxEngine:
    """A graph that export.py wrote, run by ONNX Runtime on the CPU or on CUDA in float32; torch is not imported.

    Attributes: ``spec``, ``version`` and ``device_name`` for people. ``labels`` replace the graph's own. The
    version is that of the file's content, unless it is known of which model the graph was made.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        labels: list[str] | None = None,
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
            text, precision = metadata.get("wwts_spec"), metadata.get("wwts_precision")
            content = version or self._hash_content(path)  # which the session has found sound, and no file outside it
        if text is None:
            raise ModelError(f"ONNX 文件 {path} 里没有预处理方法和标签,它不是 export.py 导出的")
        with explaining(f"ONNX 文件 {path} 的 spec 有误: {{}}"):
            spec = Spec.parse(json.loads(text), f"ONNX 文件 {path}", labels)
            self.spec = dataclasses.replace(spec, draft=spec.draft or draft)
        crop, classes = self.spec.crop, self.spec.num_classes
        ports = [(port.type, port.shape[1:]) for port in (*self._session.get_inputs(), *self._session.get_outputs())]
        if ports != [("tensor(uint8)", [crop, crop, 3]), ("tensor(float)", [classes])]:
            raise ModelError(f"ONNX 文件 {path} 的输入或输出与它的 spec 不符,请重新导出")
        self._input = self._session.get_inputs()[0].name
        precision = "int8" if precision == "int8" else "float32"
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
            places = {
                data[m.end() : m.end() + m[1][0]] for m in re.finditer(rb"\n\x08location\x12(.)", data, re.DOTALL)
            }
        for place in sorted(places):
            with open(os.path.join(os.path.dirname(path), os.fsdecode(place)), "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digest(*digests)

    def classify(self, batch: list[numpy.ndarray], topk: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """As TorchEngine.classify."""
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


# ---------------------------------------------------------------- cache of results


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


# ---------------------------------------------------------------- recognizer


def _parse_rows(text: str | bytes | None, least: int) -> list | None:
    """Label, confidence and index of the first ``least`` labels of a cached answer; None if it is none."""
    try:
        rows = json.loads(text or "null")
        kinds = {tuple(map(type, row)) for row in rows}
        right = kinds == {(str, float, int)} and len(rows) >= least and all(0 <= row[1] <= 1 for row in rows)
    except (ValueError, TypeError, RecursionError):  # this program did not put that there
        return None
    return rows[:least] if right else None


# What an argument of Recognizer may be, as a pattern and in words.
COUNT = (r"[1-9]\d*", "不小于 1 的整数")
RULES = {
    "topk": COUNT,
    "batch_size": (f"None|{COUNT[0]}", COUNT[1]),
    "workers": (f"None|{COUNT[0]}", COUNT[1]),
    "device": (r"auto|cpu|mps|cuda(:\d{1,3})?", "auto、cpu、cuda、cuda:N 或 mps"),
    "dtype": ("auto|float32|float16|bfloat16", "auto、float32、float16 或 bfloat16"),
    "engine": ("auto|torch|onnx", "auto、torch 或 onnx"),
} | dict.fromkeys(("model", "repo", "weights", "labels"), ("(?s).+", "名称或路径"))


class _Prepared(NamedTuple):
    """An image on its way to the engine: with pixels, or with answers from the cache, or with an error."""

    path: str
    pixels: numpy.ndarray | None = None
    key: str | None = None
    cached: list | None = None
    error: str | None = None
    seconds: tuple[float, float] = (0.0, 0.0)  # of decoding and of resizing


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
        self._fits_onnx = (self.device in ("auto", "cpu") or on_cuda) and self.dtype in ("auto", "float32")
        if self.model_is_file and (self.engine == "torch" or self.weights or self.repo or not self._fits_onnx):
            raise UsageError(
                "ONNX 文件自带权重,以 float32 运行,不能与 --weights、--repo、--engine torch、-d mps、--dtype 同用"
            )
        if self.engine == "onnx" and not self._fits_onnx:
            raise UsageError("--engine onnx 只在 CPU 或 CUDA 上以 float32 运行;请去掉 --dtype 和 -d mps")
        self.workers = self.workers or min(os.cpu_count() or 1, 16)
        self.offline = self.offline or os.environ.get("WWTS_OFFLINE", "0") not in ("", "0")
        self._cache = Cache(self.cache) if self.cache else None
        self._lock = threading.RLock()
        self._engine: TorchEngine | OnnxEngine | None = None
        self._identity: Identity | None = None
        self._failed: ModelError | None = None
        self.loading_seconds = 0.0
        self.seconds: Counter = Counter()  # decode and resize: of all threads together; network

    def __reduce__(self) -> tuple:
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return functools.partial(Recognizer, **arguments), ()

    # Which model, and by which engine

    def identify(self) -> Identity:
        """Name, version and num_classes of the model: as remembered if no file changed, else by loading it."""
        with self._lock:
            if self._identity is None and (known := self._known):
                self._identity = Identity(known["name"], known["versions"][self.draft], known["num_classes"])
            elif self._identity is None:
                self.load()
            return self._identity

    @functools.cached_property
    def _known(self) -> dict[str, Any] | None:
        """What was remembered when the same was loaded before."""
        known = None if self.model_is_file else recall(self._key())
        try:
            right = [re.fullmatch("[0-9a-f]{8}", version) is not None for version in known["versions"]] == [True, True]
            right = right and type(known["name"]) is str and type(known["num_classes"]) is int
            warning = known["warning"]
        except (TypeError, LookupError, ValueError):  # nothing there, or not written by this program
            return None
        if warning:
            log.warning("%s", warning)
        return known if right and known["num_classes"] > 0 else None

    def load(self) -> TorchEngine | OnnxEngine:
        """Load model and labels unless that is done, and return the engine. What failed once is not tried again."""
        with self._lock:
            if self._failed is not None:
                raise self._failed
            if self._engine is None:
                start = time.monotonic()
                try:
                    engine = self._load()
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

    def _load(self) -> TorchEngine | OnnxEngine:
        if self.model_is_file:
            return OnnxEngine(self.model, self.labels and read_labels(self.labels), None, self.draft, self.device)
        if self._known and (engine := self._load_kept_graph(self._known)):
            return engine
        name = self.model or (self._known["name"] if self._known else DEFAULT_MODEL)
        load = load_learned_model if name.endswith(".safetensors") else load_hub_model
        again = f"请运行: python export.py -m {name}" + "(加上同样的 --repo、--weights、--labels)" * bool(
            self.repo or self.weights or self.labels
        )
        if self.engine == "onnx":
            raise ModelError(f"{name} 还没有导出为 ONNX,或者导出之后权重、标签或程序变了。{again}")
        import_torch()
        if self.device.startswith(("auto", "cuda")) and torch.cuda.is_available():
            # CUDA wakes while the weights are read; if it cannot, that comes up again when it is used.
            ThreadPoolExecutor(1).submit(torch.zeros, 1, device=self.device.replace("auto", "cuda"))
        try:
            model = load(name, self.repo, self.trust_repo, self.weights, self.labels, self.offline)
        except (FileNotFoundError, ConnectionError) as error:
            if self.model or self.repo or self.weights:
                raise ModelError(one_line(error)) from error
            return self._load_fallback(error)
        whole, draft = (dataclasses.replace(model.spec, draft=draft) for draft in (model.spec.draft, True))
        engine = TorchEngine(model._replace(spec=draft if self.draft else whole), self.device, self.dtype)
        if model.files:
            versions = [compute_version(model.weights, spec, engine.precision) for spec in (whole, draft)]
            facts = {"name": whole.name, "num_classes": whole.num_classes, "versions": versions, "warning": None}
            remember(self._key(), model.files, **facts)
        graph = kept_graph(whole.name, compute_version(model.weights, whole, "float32")).parent
        outdated = graph.parent.glob(f"graph-{glob.escape(whole.name)}-*")
        if self._fits_onnx and self.engine == "auto" and engine.device_name == "cpu" and model.own:
            if any(outdated) and not recall(graph.name):
                log.info("导出为 ONNX 之后,权重、标签或程序变了,这次用 torch。%s", again)
        return engine

    def _load_kept_graph(self, known: dict[str, Any]) -> OnnxEngine | None:
        """The engine of the graph that export.py made of this very version, where it is to be used."""
        path = kept_graph(known["name"], known["versions"][0])  # one graph, with drafts and without
        on_gpu = self.engine == self.device == "auto" and has_nvidia_gpu()
        if self.engine == "torch" or on_gpu or not self._fits_onnx or not recall(path.parent.name):
            return None
        try:
            return OnnxEngine(path, None, known["versions"][self.draft], self.draft, self.device)
        except ModelError as error:
            if self.engine == "onnx":
                raise
            log.warning("%s。这次用 torch", error)
            return None

    def _load_fallback(self, error: OSError) -> TorchEngine | OnnxEngine:
        """The engine of the fallback model, which is remembered as the default only where that needs no network."""
        advice = f"取得方法见 docs/模型.md;加上 -m {FALLBACK_MODEL} 就不试网络"
        warning = f"{error.reason},改用 {FALLBACK_MODEL}(1,000 类)。{advice}"
        log.warning(warning)
        fallback = dataclasses.replace(self, model=FALLBACK_MODEL)
        engine = fallback._load()
        if self.offline and (known := recall(fallback._key())):
            remember(self._key(), known["files"] | dict.fromkeys(error.places), **known | {"warning": warning})
        return engine

    @property
    def _on_cpu(self) -> bool:
        return self.device in ("cpu", "mps") or self.device == "auto" and not has_nvidia_gpu()

    def _key(self) -> str:
        """What was asked for, in so far as it decides the version beside the content of files."""
        learned = self.model if str(self.model).endswith(".safetensors") else None
        paths = [path and os.path.abspath(path) for path in (self.repo, self.weights, self.labels, learned)]
        places = [
            os.environ.get(variable) for variable in ("MODELSCOPE_CACHE", "HOME", "USERPROFILE") if not self.weights
        ]
        default = self.offline if self.model is None else None  # with a network the default may be another model
        dtype = (
            ("float32" if self._on_cpu or self.engine == "onnx" else "float16") if self.dtype == "auto" else self.dtype
        )
        return "model-" + digest(str(HERE), self.model, *paths, *places, default, dtype)[:16]

    # Images

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
        workers, size = self.workers, self.batch_size or (8 if self._on_cpu else 64)
        pool, closed = ThreadPoolExecutor(workers), threading.Event()
        decoding: queue.Queue[Future | None] = queue.Queue(2 * size + workers)

        def put(future: Future | None) -> None:
            while not closed.is_set():
                with contextlib.suppress(queue.Full):
                    return decoding.put(future, timeout=0.1)

        def feed() -> None:
            try:
                for image in images:
                    put(pool.submit(self._prepare, image))
                    if closed.is_set():
                        return
            except BaseException as error:  # handed over to the thread that asked for results
                failed: Future = Future()
                failed.set_exception(error)
                put(failed)
            put(None)

        threading.Thread(target=feed, daemon=True).start()
        try:
            future = decoding.get()
            while future is not None:
                batch, future = [future.result()], False
                while len(batch) < (self.batch_size or 8):
                    try:
                        future = decoding.get_nowait()
                    except queue.Empty:
                        future = False
                    if not future or not future.done() or future.exception():
                        break
                    batch.append(future.result())
                    future = False
                yield from self._answer(batch)
                future = decoding.get() if future is False else future
        finally:
            closed.set()
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
                    identity = self.identify()
                    file.seek(0)
                    key = hashlib.sha256()
                    while chunk := file.read(2**20):
                        key.update(chunk)
                    file.seek(0)
                    key = f"wwts:{key.hexdigest()}:{identity.version}"
                    if rows := _parse_rows(self._cache.get(key), min(self.topk, identity.num_classes)):
                        return _Prepared(path, cached=rows)
                spec, start = self.load().spec, time.thread_time()
                decoded = decode_image(file, spec)
            middle = time.thread_time()
            pixels = preprocess(decoded, spec)
            return _Prepared(path, pixels, key, seconds=(middle - start, time.thread_time() - middle))
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
            for image in batch:
                self.seconds.update(decode=image.seconds[0], resize=image.seconds[1])
        results = []
        for path, pixels, key, cached, error, _ in batch:
            rows = cached if pixels is None else next(answers)
            if rows and key:
                self._cache.put(key, json.dumps(rows))
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


def unescape_cell(cell: str) -> str:
    """The text that ``escape_cell`` was given; raises UnicodeDecodeError for what it never gives."""
    escape = r"\\(?:\\|[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"
    text = cell.removeprefix("'")
    return re.sub(escape, lambda m: m[0].encode().decode("unicode_escape"), text) if os.sep == "/" else text


class Text:
    """The block that people read; with ``named`` its header names the image."""

    head = ""  # what comes before the first record

    def __init__(self, topk: int, named: bool):
        self.named = named

    def format(self, result: Result) -> str:
        """The block for one image."""
        name = f"{printable(result.path)} " if self.named else ""
        if result.error is not None:
            return f"[RESULT] {name}识别失败: {printable(result.error)}\n"
        lines = [f" - {printable(p.label)} (置信度: {p.confidence:.2f})\n" for p in result.predictions]
        return "".join([f"[RESULT] {name}识别结果:\n", *(lines or [" (没有达到阈值的标签)\n"])])


class Jsonl:
    """One JSON object a line."""

    head, begins = "", b'{"path": "'  # the latter as every file does

    def __init__(self, topk: int, named: bool = True):
        pass

    def format(self, result: Result) -> str:
        """The line for one image."""
        return json.dumps(result.record(), ensure_ascii=False, allow_nan=False) + "\n"

    def parse(self, line: str) -> tuple[str, str, str, list[float] | None]:
        """Path, model, version and confidences (None for an error) of a line; raises at what is none."""
        record = json.loads(line)
        names = [record[key] for key in ("path", "model", "version")]
        if set(map(type, names)) != {str}:
            raise TypeError
        return *names, None if "error" in record else [float(p["confidence"]) for p in record["results"]]


class Csv:
    """One line an image, for Excel: path, model, version, label_1, confidence_1, …, error."""

    def __init__(self, topk: int, named: bool = True):
        columns = [f"{name}_{rank}" for rank in range(1, topk + 1) for name in ("label", "confidence")]
        self.topk = topk
        self.head = (
            "\ufeff" + ",".join(["path", "model", "version", *columns, "error"]) + "\r\n"
        )  # Excel wants the mark
        self.begins = self.head.encode()

    def format(self, result: Result) -> str:
        """The line for one image."""
        cells = [cell for p in result.predictions for cell in (escape_cell(p.label), f"{p.confidence:.6f}")]
        cells += [""] * (2 * self.topk - len(cells))
        line = io.StringIO()
        start = [escape_cell(result.path), escape_cell(result.model), result.version]
        csv.writer(line, lineterminator="\r\n").writerow([*start, *cells, escape_cell(result.error or "")])
        return line.getvalue()

    def parse(self, line: str) -> tuple[str, str, str, list[float] | None]:
        """As Jsonl.parse."""
        (row,) = csv.reader([line], strict=True)
        if len(row) != 2 * self.topk + 4:
            raise ValueError
        confidences = [float(value) for value in row[4:-1:2] if value]
        return unescape_cell(row[0]), row[1], row[2], None if row[-1] else confidences


FORMATS = {"text": Text, "jsonl": Jsonl, "csv": Csv}


class StandardOutput:
    """Standard output, where there is nothing to resume."""

    path, size = None, 0
    done = failed = frozenset()

    def write(self, text: str, path: str) -> None:
        """Print what is to be said of one image."""
        print(text, end="", flush=True)

    def close(self) -> None:
        """Leave it open for whatever else there is to say."""


class OutputFile:
    """A file of whole records, which one process at a time writes.

    What a full disk or a power cut left half written is taken back. Attributes: ``size``, where its last whole
    record ends; ``done`` and ``failed``, the absolute paths of the images that have a record, or one of an error.
    Raises UsageError if another process is writing it.
    """

    def __init__(self, path: Path, form: Jsonl | Csv):
        self.path, self.form, self.size = path, form, 0
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self.models: set[tuple[str, str]] = set()
        self._counts: set[int] = set()  # of predictions
        self._least = 1.0  # of all confidences
        self._replacements: dict[str, str] = {}
        self._settings = f"output-{digest(os.path.abspath(path))[:16]}"
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

    def resume(self) -> None:
        """Take in the records of an earlier run; raises UsageError at what was not written in this format."""
        foreign = False
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            head = file.read(len(self.form.begins)).rstrip(b"\0")
            foreign = not self.form.begins.startswith(head)
            file.seek(0)
            while not foreign and (line := file.readline(MOST_TEXT)):
                if not line.endswith(b"\n") or b"\0" in line:  # torn, as only the last can be
                    foreign = bool(file.read(1))
                    break
                try:
                    if self.size or not self.form.head:
                        path, model, version, confidences = self.form.parse(line.decode())
                        self.done.add(os.path.abspath(path))
                        self.models.add((model, version))
                        if confidences is None:
                            self.failed.add(os.path.abspath(path))
                        else:
                            self._counts.add(len(confidences))
                            self._least = min([self._least, *confidences])
                    self.size += len(line)
                except (ValueError, LookupError, TypeError, RecursionError, csv.Error):
                    foreign = True
        if foreign and (columns := head.count(b"label_")) and not self.size:
            self._refuse(f"是用 -k {columns} 或更大的 -k 写的,现在是 -k {self.form.topk}")
        if foreign:
            self._refuse(f"的第 {self.size} 字节之后不是这一版以同样的格式和 -k 写出的记录")

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

    def write(self, text: str, path: str) -> None:
        """Append one record, or keep it for ``close`` if it replaces a failure; on an OSError the file is as before."""
        if os.path.abspath(path) in self.failed:
            self._replacements[os.path.abspath(path)] = text
            return
        # A file name that is no text is written as JSON would escape it.
        data = text.encode("utf-8", "backslashreplace")
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
                for number, line in enumerate(iter(lambda: old.readline(MOST_TEXT), b"")):
                    if number or not self.form.head:
                        key = os.path.abspath(self.form.parse(line.decode())[0])
                        line = self._replacements.get(key, "").encode("utf-8", "backslashreplace") or line
                    new.write(line)
        self._replacements = {}
        if self._file is not None and not self._file.closed:
            self._file.close()
            if not self.size and not self.path.stat().st_size:  # made by ``lock`` for nothing
                self.path.unlink()


# ---------------------------------------------------------------- command line, shared with the other scripts


# What people type at infer.py, and what it is called.
ELSEWHERE = {name: f"python {name[2:]}.py" for name in ("--export", "--check", "--bench")}
ELSEWHERE |= {"--int8": "python export.py --int8", "--finetune": "python learn.py --finetune"}
ELSEWHERE |= {"--price-per-hour": "python bench.py --price-per-hour", "--gpu": "-d cuda:0", "--cpu": "-d cpu"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help is a script's docstring and whose errors are UsageError in Chinese.

    It knows -h, -q and --log-time.
    """

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
def progress_bar(total: int | None, unit: str, initial: int = 0) -> Iterator[Any]:
    """A tqdm bar on a terminal, which log lines go above; nothing elsewhere, with --quiet, or without tqdm."""
    if not sys.stderr.isatty() or not log.isEnabledFor(logging.INFO) or not importlib.util.find_spec("tqdm"):
        yield types.SimpleNamespace(update=lambda *_: None, set_postfix_str=lambda *_, **__: None)
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm([log]), tqdm(total=total, unit=unit, initial=initial, dynamic_ncols=True) as bar:
        yield bar


def package_versions() -> dict[str, str]:
    """Versions of this program, of Python and of those packages of requirements.txt that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"infer.py": __version__, "Python": sys.version.split()[0]}
    for package in ("torch", "torchvision", "pillow", "numpy", "onnxruntime", "modelscope-hub", "tqdm"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


# ---------------------------------------------------------------- recognising from the command line


def build_parser() -> Parser:
    """The command line of DESIGN.md."""
    parser = Parser("infer.py", __doc__)
    add_model_options(parser)
    add = parser.add_argument
    add("inputs", nargs="*")
    add("-k", "--topk", type=int, default=5)
    add("-t", "--threshold", type=float, default=0.0)
    add("-f", "--format", choices=list(FORMATS))
    add("-o", "--output")
    add("--expect", action="append")
    add("--cache", nargs="?", const=str(cache_folder() / "results.sqlite"))
    for name in ("--resume", "--retry-failed", "--overwrite", "--version"):
        add(name, action="store_true")
    return parser


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


def check_usage(arguments: argparse.Namespace, share: Share) -> None:
    """Raise UsageError for what cannot be meant, before anything is opened or loaded."""
    inputs, resume = arguments.inputs, arguments.resume or arguments.retry_failed
    if not inputs:
        raise UsageError("缺少参数: 图片。用法见: python infer.py --help")
    if any(re.match("https?://", name) for name in inputs):
        raise UsageError("不能直接识别网址,请先下载图片")
    if not any(name == "-" or os.path.lexists(name) or re.search("[*?]", name) for name in inputs):
        hint = "。名字里有空格的要加引号" if os.path.lexists(" ".join(inputs)) else ""
        raise UsageError(f"文件不存在: {'、'.join(inputs)}{hint}")
    if share.world_size > 1 and "-" in inputs:
        raise UsageError("用 torchrun 时不能从标准输入读路径,请改用文件夹或通配符")
    if arguments.cache and os.path.splitext(arguments.cache)[1].lower() in Image.registered_extensions():
        raise UsageError(f"--cache 后面的 {arguments.cache} 会被当作缓存文件;请把 --cache 写在图片后面")
    if arguments.expect and resume:
        raise UsageError("--expect 不能与 --resume 同用: 已有记录的图片不会再看")
    if arguments.output is None and (resume or arguments.overwrite):
        raise UsageError("--resume、--retry-failed 和 --overwrite 要与 -o 一起用")
    if arguments.output is not None:
        path = Path(arguments.output)
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


def open_output(arguments: argparse.Namespace, share: Share) -> OutputFile | StandardOutput:
    """Where results go: standard output, or the file of -o, or a share's part of it, with what --resume finds there."""
    if arguments.output is None:
        return StandardOutput()
    path, resume = Path(arguments.output), arguments.resume or arguments.retry_failed
    arguments.format = path.suffix[1:].lower()
    output = OutputFile(path, FORMATS[arguments.format](arguments.topk))
    if share.world_size > 1:
        output.path = path.with_suffix(f".rank{share.rank}{path.suffix}")
        for other in path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}"):
            number = other.name[len(path.stem) + 5 : -len(path.suffix)]
            if resume and other != output.path:  # of another number of processes, or with photos of ours
                part = OutputFile(other, output.form)
                part.resume()
                output.done, output.models = output.done | part.done, output.models | part.models
            elif arguments.overwrite and share.rank == 0 and number.isdigit() and int(number) >= share.world_size:
                other.unlink()
    output.lock()
    try:
        if resume:
            output.resume()
        elif not arguments.overwrite and output.path.stat().st_size:
            raise UsageError(f"{output.path} 已存在。接着做用 --resume,重新做用 --overwrite")
    except UsageError:
        output.close()
        raise
    arguments.hint = f"。已写的都完好,加上 --resume 再运行会接着写 {output.path}"
    return output


def choose_recognizer(arguments: argparse.Namespace, share: Share) -> Recognizer:
    """The Recognizer of the command line, on this share's own GPU; raises UsageError for labels that it lacks."""
    graph = arguments.engine == "onnx" or str(arguments.model).endswith(".onnx")
    on_gpu = arguments.device == "cuda" or arguments.device == "auto" and not graph and has_nvidia_gpu()
    if share.world_size > 1 and on_gpu and (graph or import_torch().cuda.is_available()):
        arguments.device = f"cuda:{share.local_rank}"
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
        print(", ".join(f"{name} {version}" for name, version in package_versions().items()))
        return 0
    share = Share.of_environment()
    check_usage(arguments, share)
    with contextlib.closing(open_output(arguments, share)) as output:
        return recognise(arguments, share, output)


def recognise(arguments: argparse.Namespace, share: Share, output: OutputFile | StandardOutput) -> int:
    """Recognise the images of this share that have no record yet; return the exit status."""
    inputs, counts, start = arguments.inputs, Counter(), time.monotonic()

    # 1. Which images.
    retry = output.failed if arguments.retry_failed else set()
    done_before, failed_before = len(output.done - retry), len(output.failed - retry)

    def remaining() -> Iterator[str]:
        for path in find_images(inputs):
            counts["found"] += 1
            key = os.path.abspath(path)
            if share.has(path) and (key not in output.done or key in retry):
                yield path

    images = remaining()
    first = list(itertools.islice(images, 1))
    if not counts["found"]:
        raise UsageError("没有找到图片(按扩展名找 .jpg、.png、.webp 等)")

    # 2. Which model.
    recognizer = choose_recognizer(arguments, share)
    if output.path:
        output.check(recognizer.identify(), arguments.topk, arguments.threshold)

    # 3. How it is shown.
    single = len(inputs) == 1 and os.path.isfile(inputs[0])
    form = FORMATS[arguments.format or "text"](arguments.topk, named=not single)
    head = "" if output.size else form.head
    with_bar = not single and (output.path or not sys.stdout.isatty()) and sys.stderr.isatty()
    total = sum(map(share.has, find_images(inputs, warn=False))) if with_bar and "-" not in inputs else None

    # 4. Recognise and write.
    try:
        results = recognizer.stream(itertools.chain(first, images))
        shown = progress_bar(total, "张", done_before) if with_bar else contextlib.nullcontext()
        with shown as bar, contextlib.closing(results):
            for result in results:
                if isinstance(form, Text) and single and result.error is None:
                    log.info("输入图像: %s", result.path)
                if isinstance(form, Text) and result.cached and not bar:
                    log.log(CACHE_HIT, "使用缓存结果")
                writing = time.perf_counter()
                output.write(head + form.format(result), result.path)
                recognizer.seconds["write"] += time.perf_counter() - writing
                head = ""
                counts.update(done=1, failed=result.error is not None, cached=result.cached)
                if result.error is not None:
                    log.error("%s: %s", result.path, result.error)
                if arguments.expect and not {p.label for p in result.predictions} & set(arguments.expect):
                    counts["unexpected"] += 1
                    log.error("%s: 答案里没有 %s", result.path, " 或 ".join(arguments.expect))
                if bar:
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
    if share.world_size > 1:  # torchrun ends all processes when one of them fails
        if failed:
            log.warning("第 %d 份有 %d 张失败", share.rank, failed)
        return 0
    return 1 if failed or counts["unexpected"] else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
