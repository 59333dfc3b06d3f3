#!/usr/bin/env python3
"""用中文说出图片里有什么:单文件推理脚本。

    python infer.py 图片.jpg

命令行用法见 python infer.py --help,完整说明见 README.md。作为库使用:

    from infer import Recognizer
    recognizer = Recognizer("wwts_cn_lite", device="cpu")
    print(recognizer("cat.jpg").predictions[0].label)

arguments → paths → images (decoded in threads) → engine → top-k with labels → writer
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import functools
import glob
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import queue
import re
import signal
import stat
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    import numpy
    import torch
    from PIL import Image

__version__ = "1.0.0"

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL, FALLBACK_MODEL = "wwts_cn_base", "wwts_cn_lite"

# The classic ImageNet evaluation pipeline, for hub models that bring no spec of their own.
CLASSIC_SPEC = {
    "resize": 256,
    "crop": 224,
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}

USE_FALLBACK = f"本次改用 {FALLBACK_MODEL}(1,000 类)"
NO_BASE = (
    f"本机没有 {DEFAULT_MODEL} 的权重,且处于离线模式。获取方法: 在能联网的机器上运行 modelscope-hub download "
    f"iic/cv_resnest101_general_recognition --local-dir wwts_base,再用 --weights wwts_base 指定。{USE_FALLBACK}"
)
REINSTALL = "请运行: pip install --force-reinstall torch torchvision"
COMMON_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
# Far beyond what is meant so: bytes of a text file, a record or a path; bytes of an image file; scans of a JPEG.
MOST_TEXT, MOST_IMAGE, MOST_SCANS = 2**26, 2**30, 100
ENGINES = ("auto", "torch", "onnx")
DTYPES = ("auto", "float32", "float16", "bfloat16")

log = logging.getLogger("wwts")
CACHE_HIT = logging.INFO + 1  # a level of its own, for its own word in brackets


class ModelError(Exception):
    """Model, weights, labels or device cannot be used; the message says what to do."""

    exit_status = 3


class DeviceMemoryError(ModelError):
    """The device has not enough memory for what was asked of it at once."""


class UsageError(ModelError):
    """The request itself makes no sense."""

    exit_status = 2


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
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None
    cached: bool = False

    def record(self) -> dict[str, Any]:
        """The JSON-able record that is written to JSONL."""
        record: dict[str, Any] = {"path": self.path, "model": self.model}
        if self.error is not None:
            return record | {"error": self.error}
        record["results"] = [dataclasses.asdict(prediction) for prediction in self.predictions]
        return record | {"cached": True} if self.cached else record


# ---------------------------------------------------------------- images


def open_image(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file of at most 1 GiB; raises ``OSError`` for anything else (a FIFO would block for ever)."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("是文件夹(没有权限列出其中的文件?)" if os.path.isdir(path) else "不是普通文件")
    if status.st_size > MOST_IMAGE:
        raise OSError(f"文件超过 {MOST_IMAGE >> 30} GiB")
    return open(path, "rb")


def decode_image(file: BinaryIO) -> Image.Image:
    """Decode an image file into an RGB ``PIL.Image``: first frame, upright, transparency over white.

    Raises whatever Pillow raises for a file that is broken, truncated, of an unknown format or beyond
    its decompression-bomb limit.
    """
    from PIL import Image, ImageOps

    large = _set_up_pillow()
    image = Image.open(file)
    if image.info.get("progressive"):  # each scan goes over the whole image and may take but a few bytes
        file.seek(0)
        if file.read().count(b"\xff\xda") > MOST_SCANS:
            raise OSError(f"JPEG 超过 {MOST_SCANS} 次扫描")
    with large if image.width * image.height > Image.MAX_IMAGE_PIXELS / 2 else contextlib.nullcontext():
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


@functools.cache
def _set_up_pillow() -> threading.Lock:
    """Make Pillow fit for strangers' files; give the lock under which large ones, up to 3 GiB each, are decoded."""
    from PIL import EpsImagePlugin

    # Pillow warns of odd tags, and of photos up to twice its limit, which phones take.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    EpsImagePlugin.gs_binary = False  # EPS is a program, and Ghostscript would run it
    return threading.Lock()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency over white, 16 and 32 bits scaled down to 8."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        low, high = image.convert("F").getextrema()
        if image.mode == "F" and (low < 0 or high > 255 or high <= 1):  # no fixed range: stretch what is there
            scale, offset = 255 / ((high - low) or 1), -low * 255 / ((high - low) or 1)
        else:
            scale, offset = (255 / 65535 if high > 255 or ";16" in image.mode else 1), 0
        # Through F, since Pillow's own conversion clips at 255; 0.5 rounds, as the last step cuts off.
        image = image.convert("F").point(lambda value: value * scale + (offset + 0.5)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode in ("RGBa", "La"):
            image = image.convert(image.mode.upper())
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def preprocess(image: Image.Image, spec: dict[str, Any]) -> numpy.ndarray:
    """Resize and centre-crop an RGB image as the spec says into crop×crop×3 uint8.

    Bit-identical to torchvision.transforms' Resize and CenterCrop, without the second and a half that
    importing torchvision takes. Only an image so long and thin that the resized one would be beyond
    Pillow's limit for decoding loses its far ends first.
    """
    import numpy
    from PIL import Image

    resize, crop = spec["resize"], spec["crop"]
    width, height = image.size
    longest = max(Image.MAX_IMAGE_PIXELS // resize**2, 1) * min(width, height)
    if max(width, height) > longest:
        left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = image.size
    interpolation = Image.Resampling[spec["interpolation"].upper()]
    short = min(width, height)
    new_width, new_height = (resize if side == short else int(resize * side / short) for side in (width, height))
    left, top = round((new_width - crop) / 2), round((new_height - crop) / 2)
    image = image.resize((new_width, new_height), interpolation)
    return numpy.asarray(image.crop((left, top, left + crop, top + crop)))


def describe_image_error(error: Exception) -> str:
    """Say in Chinese, in one line, why an image could not be read."""
    from PIL import Image, UnidentifiedImageError

    reasons: dict[type[Exception], str] = {
        UnidentifiedImageError: "无法识别的图像格式,或文件已损坏",
        Image.DecompressionBombError: f"图像过大,超过 {2 * Image.MAX_IMAGE_PIXELS:,} 像素",
        FileNotFoundError: "文件不存在",
        PermissionError: "没有读取权限",
        MemoryError: "内存不足,无法解码",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    text = getattr(error, "strerror", None) or _one_line(error)
    if "Ghostscript" in text or "cannot find loader" in text:
        return "不支持 EPS、WMF 等矢量图"
    if not text.isascii() or isinstance(error, OSError) and error.errno:  # said above, or by the system
        return f"无法读取图像: {text}"
    return f"图像数据不完整或已损坏({text})"


# ---------------------------------------------------------------- labels


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file; raises OSError, or ValueError if it is no text or far too long."""
    with open(path, "rb") as file:
        data = file.read(MOST_TEXT + 1)
    if len(data) > MOST_TEXT:
        raise ValueError(f"超过 {MOST_TEXT >> 20} MiB")
    return data.decode("utf-8-sig")


def read_labels(path: str | os.PathLike) -> list[str]:
    """Read labels: a JSON list, a JSON object of index → name, a text of a name a line, or a meta_info.txt.

    Raises ModelError when the file cannot be read or its shape is none of these.
    """
    try:
        text = read_text(path)
        if text.lstrip()[:1] in ("[", "{"):
            labels = json.loads(text)
            if isinstance(labels, dict):
                labels = [labels[str(index)] for index in range(len(labels))]
        else:
            labels = [line.strip() for line in text.removesuffix("\n").split("\n")]
            if all("\t" in line for line in labels):  # meta_info.txt: the label is column 1
                labels = [line.split("\t")[1] for line in labels]
    except KeyError as error:
        raise ModelError(f"标签文件 {path} 缺少序号 {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"标签文件 {path} 无法读取: {_one_line(error)}") from error
    if not all(isinstance(label, str) for label in labels) or not any(labels):
        raise ModelError(f"标签文件 {path} 应是一组名称(JSON 列表、JSON 对象、每行一个名称的文本或 meta_info.txt)")
    return labels


# ---------------------------------------------------------------- models from torch.hub repositories


def import_torch() -> Any:
    """Import torch, or raise ModelError with the pip line that mends the installation."""
    # GNU OpenMP's threads wait for each other by spinning, which takes the cores from decoding and whatever else
    # runs: beside one busy process 200 photos took 24 s instead of 17. Without spinning one image takes twice as long.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModelError(f"缺少 {error.name},请运行: pip install torch torchvision") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ModelError(f"torch 无法导入: {_one_line(error)}。请运行: pip install --force-reinstall torch") from error
    return torch


def load_hub_model(
    name: str, repo: str | None = None, trust_repo: bool = False, weights: str | None = None, offline: bool = False
) -> torch.nn.Module:
    """Call the entry point ``name`` of a torch.hub repository with its trained weights.

    Raises what the entry point raises as ModelError, but for FileNotFoundError and ConnectionError of
    this project's own entry points, which mean that there are no weights to be had.
    """
    folder = HERE if repo is None else _hub_folder(repo, trust_repo, offline)
    sys.path.insert(0, str(folder))
    try:
        # What other people's hub code prints must not get among the results on standard output.
        with contextlib.redirect_stdout(sys.stderr):
            model = _call_entry_point(folder, name, weights, offline)
    except ModelError:
        raise
    except Exception as error:  # a repository's code may raise anything
        if repo is None and isinstance(error, (FileNotFoundError, ConnectionError)):
            raise
        message = f"模型 {name} 加载失败: {_one_line(error)}"
        if "torchvision::" in str(error):
            message = f"torch 与 torchvision 版本不匹配({_one_line(error)})。{REINSTALL}"
        elif isinstance(error, ModuleNotFoundError):
            message = f"模型 {name} 需要 {error.name},请运行: pip install {error.name}"
        raise ModelError(message) from error
    finally:
        sys.path.remove(str(folder))
    if "files" in getattr(model, "spec", {}):
        model.spec["files"].append(str(folder / "hubconf.py"))
    return model


def _call_entry_point(folder: Path, name: str, weights: str | None, offline: bool) -> torch.nn.Module:
    module_spec = importlib.util.spec_from_file_location("hubconf", folder / "hubconf.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    entries = [entry for entry in dir(module) if callable(getattr(module, entry)) and entry[0] != "_"]
    if name not in entries:
        nearest = difflib.get_close_matches(name, entries, 1, cutoff=0)
        hint = f"。最接近的是 {nearest[0]}" if nearest else ""
        raise ModelError(f"没有名为 {name} 的模型。{folder} 提供: {', '.join(entries)}{hint}")
    entry = getattr(module, name)
    parameters = inspect.signature(entry).parameters
    arguments: dict[str, Any] = {"offline": True} if offline and "offline" in parameters else {}
    # torchvision's convention; without it (or its older form) a network comes untrained.
    if "weights" in parameters:
        arguments["weights"] = weights or "DEFAULT"
    elif weights:
        raise UsageError(f"模型 {name} 的入口不接受 --weights")
    elif "pretrained" in parameters:
        arguments["pretrained"] = True
    return entry(**arguments)


def _hub_folder(repo: str, trust_repo: bool, offline: bool) -> Path:
    """The folder of a local repository, or of torch.hub's copy of a remote one."""
    if os.path.isdir(repo):
        if not os.path.isfile(os.path.join(repo, "hubconf.py")):
            raise ModelError(f"文件夹 {repo} 里没有 hubconf.py,不是 torch.hub 仓库")
        return Path(repo).resolve()
    match = re.fullmatch(r"([\w.-]+)/([\w.-]+)(?::(.+))?", repo)
    if not match:
        raise ModelError(f"找不到文件夹 {repo},它也不是 OWNER/NAME[:REF] 形式的仓库名")
    if not trust_repo:
        raise UsageError(f"{repo} 是远程仓库,运行其中的代码前请先确认可信,然后加上 --trust-repo")
    import torch

    owner, name, ref = match.groups()
    pattern = f"{owner}_{name}_{ref.replace('/', '_') if ref else 'ma[is]*'}"  # main or master
    if not offline:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                torch.hub.list(repo, trust_repo=True, verbose=False)  # fetches it, or finds it fetched
        except Exception as error:  # a network can fail in any way
            raise ModelError(f"无法从 GitHub 获取仓库 {repo}: {_one_line(error)}") from error
    folders = sorted(Path(torch.hub.get_dir()).glob(pattern))
    if not folders:
        raise ModelError(f"本机没有仓库 {repo} 的副本,且处于离线模式")
    return folders[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _settle_spec(spec: Any, labels: list[str] | None, source: object) -> dict[str, Any]:
    """The spec with the labels asked for, its own, or ImageNet's.

    Raises ModelError if images cannot be prepared by it, or if the labels are not as many as the outputs.
    """

    def of(values: Any, kind: type | tuple, length: int) -> bool:
        return isinstance(values, list) and len(values) == length and all(isinstance(v, kind) for v in values)

    try:
        own = spec.get("labels")
        sizes = [spec[key] for key in ("resize", "crop", "num_classes")]
        right = of(sizes, int, 3) and 0 < spec["crop"] <= spec["resize"] <= 4096 and spec["num_classes"] > 0
        right = right and spec["interpolation"] in ("bilinear", "bicubic") and isinstance(spec["name"], str)
        right = right and all(of(spec[key], (int, float), 3) for key in ("mean", "std")) and all(spec["std"])
        right = right and (own is None or of(own, str, len(own)))
    except (AttributeError, LookupError, TypeError):
        right = False
    if not right:
        raise ModelError(f"{source} 的 spec 有误,无法得知怎样准备图片和读取结果")
    if labels is not None:
        spec |= {"labels": labels, "fingerprint": _digest(spec.get("fingerprint"), labels)}
    elif own is None:
        if spec["num_classes"] != 1000:
            raise ModelError(f"模型有 {spec['num_classes']} 个输出,但没有自带标签,请用 --labels 指定标签文件")
        spec["labels"] = read_labels(HERE / "labels_zh.json")
    if len(spec["labels"]) != spec["num_classes"]:
        raise ModelError(f"标签有 {len(spec['labels'])} 个,而模型有 {spec['num_classes']} 个输出,两者必须相等")
    return spec


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda, cuda:N or mps into a device that exists here, or raise ModelError."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            reason = (
                "没有可用的 NVIDIA 显卡或驱动,请用 nvidia-smi 检查"
                if torch.version.cuda
                else "装的是不带 CUDA 的 torch,请运行: pip install --force-reinstall torch torchvision"
            )
            raise ModelError(f"不能使用 {name}: {reason};或改用 -d cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ModelError(f"不能使用 {name}: 本机只有 {torch.cuda.device_count()} 块 NVIDIA 显卡(编号从 0 开始)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("不能使用 mps: 本机没有可用的 Apple GPU;请改用 -d cpu")
    return device


class TorchEngine:
    """A hub model on one device, with the preprocessing and labels that its spec asks for.

    Attributes: ``spec`` (see hubconf.py), ``device``, ``dtype`` and ``device_name`` for people.
    """

    def __init__(self, model: torch.nn.Module, name: str, labels: list[str] | None, device: str, dtype: str):
        import torch

        if not isinstance(model, torch.nn.Module):
            raise ModelError(f"模型 {name} 的入口返回的不是 torch.nn.Module,而是 {type(model).__name__}")
        self.device = choose_device(device)
        self.device_name = str(self.device)
        self.dtype = getattr(
            torch, dtype if dtype != "auto" else "float16" if self.device.type == "cuda" else "float32"
        )
        with self._out_of_memory():
            # channels_last: pixels come as N×H×W×3 anyway, and convolutions are up to twice as fast so.
            self.model = model.eval().to(self.device, self.dtype, memory_format=torch.channels_last)
        self.spec = CLASSIC_SPEC | getattr(model, "spec", {}) | {"name": name}
        if "num_classes" not in self.spec:
            self.spec["num_classes"] = self._count_classes()
        _settle_spec(self.spec, labels, f"模型 {name}")
        self._folded = False
        self._mean, self._std = (
            torch.tensor(self.spec[key], device=self.device).view(1, 3, 1, 1) for key in ("mean", "std")
        )

    def normalize(self, batch: numpy.ndarray) -> torch.Tensor:
        """Turn N×H×W×3 uint8 into N×3×H×W float32 on the device: torchvision's ToTensor and Normalize."""
        import torch

        pixels = torch.from_numpy(batch)
        if self.device.type == "cuda":  # only pinned memory is copied while the host goes on
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        pixels = pixels.to(self.device).permute(0, 3, 1, 2)
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)

    def classify(self, batch: list[numpy.ndarray], topk: int) -> list[list[tuple[int, float]]]:
        """Run the network on preprocessed images; give (index, confidence) of the top-k of each.

        An image whose confidences are not finite gets an empty list.
        """
        import numpy
        import torch

        with torch.inference_mode(), self._out_of_memory():
            if len(batch) > 1 and not self._folded:  # takes longer than it saves on a single image
                self._folded = True
                fold_batch_norm(self.model)
            logits = self._forward(self.normalize(numpy.stack(batch)))
            confidences = logits.float().softmax(1)
            top = confidences.topk(min(topk, confidences.shape[1]))
            rows = zip(top.indices.tolist(), top.values.tolist(), confidences.isfinite().all(1).tolist(), strict=True)
            return [list(zip(indices, values, strict=True)) if finite else [] for indices, values, finite in rows]

    def _forward(self, inputs: torch.Tensor) -> torch.Tensor:
        import torch

        # TF32 would cost float32 its promise that CPU and CUDA agree within 1e-3.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            logits = self.model(inputs.to(self.dtype))
        classes = self.spec.get("num_classes")
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if len(shape) != 2 or shape[0] != len(inputs) or classes not in (None, shape[1]):
            raise ModelError(f"模型的输出是 {shape},而不是 N×{classes or '类别数'} 的张量,它不是图像分类模型")
        return logits

    def _count_classes(self) -> int:
        import torch

        with torch.inference_mode(), self._out_of_memory():
            return self._forward(torch.zeros(1, 3, self.spec["crop"], self.spec["crop"], device=self.device)).shape[1]

    @contextlib.contextmanager
    def _out_of_memory(self) -> Iterator[None]:
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self.device_name} 显存不足。请关闭占用显存的程序(nvidia-smi 查看),或改用 --dtype float16、-d cpu"
            ) from error


def fold_batch_norm(model: torch.nn.Module) -> None:
    """Fold, in place, each batch-norm that alone takes a convolution's output into that convolution.

    A model that torch.fx cannot trace stays as it is.
    """
    from torch import fx, nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Conv2d) or super().is_leaf_module(module, name)

    try:
        nodes = Tracer().trace(model).nodes
    except Exception as error:  # control flow that depends on data, and much else in other people's models
        log.debug("batch-norm stays unfolded: %s", error)
        return
    modules = dict(model.named_modules())
    for node in nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        source = node.args[0]
        if source.op == "call_module" and isinstance(modules[source.target], nn.Conv2d) and len(source.users) == 1:
            folded = fuse_conv_bn_eval(modules[source.target], modules[node.target])
            model.set_submodule(source.target, folded)
            model.set_submodule(node.target, nn.Identity())


# ---------------------------------------------------------------- ONNX Runtime


class OnnxEngine:
    """A graph that --export wrote, run by ONNX Runtime on the CPU; neither torch nor torchvision is imported.

    Attributes: ``spec`` (see hubconf.py) and ``device_name`` for people.
    """

    device_name = "cpu (ONNX Runtime)"

    def __init__(self, path: str | os.PathLike, labels: list[str] | None):
        if not os.path.isfile(path):
            raise ModelError(f"找不到 ONNX 文件 {path}")
        try:
            import onnxruntime
        except ImportError as error:
            raise ModelError("运行 ONNX 模型需要 onnxruntime,请运行: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is said below, in one line
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, ["CPUExecutionProvider"])
            text = self._session.get_modelmeta().custom_metadata_map.get("wwts_spec")
        except Exception as error:  # onnxruntime's exceptions have no common ancestor of their own
            raise ModelError(f"ONNX 文件 {path} 无法读取: {_one_line(error)}。请重新导出") from error
        if text is None:
            raise ModelError(f"ONNX 文件 {path} 里没有预处理方法和标签,它不是 infer.py --export 导出的")
        try:
            spec = json.loads(text)
        except (ValueError, RecursionError):
            spec = None
        self.spec = _settle_spec(spec, labels, f"ONNX 文件 {path}")
        shapes = [port.shape[1:] for port in (*self._session.get_inputs(), *self._session.get_outputs())]
        if shapes != [[spec["crop"], spec["crop"], 3], [spec["num_classes"]]]:
            raise ModelError(f"ONNX 文件 {path} 的输入或输出与它的 spec 不符,请重新导出")
        if "fingerprint" not in spec:
            with open(path, "rb") as file:
                spec["fingerprint"] = hashlib.file_digest(file, "sha256").hexdigest()

    def classify(self, batch: list[numpy.ndarray], topk: int) -> list[list[tuple[int, float]]]:
        """As TorchEngine.classify."""
        import numpy

        try:
            (confidences,) = self._session.run(None, {"pixels": numpy.stack(batch)})
        except Exception as error:  # as above
            raise ModelError(f"ONNX Runtime 无法运行这个模型: {_one_line(error)}。请重新导出") from error
        answers = []
        for row in confidences:
            top = numpy.argpartition(-row, min(topk, len(row) - 1))[:topk]
            top = top[numpy.argsort(-row[top], kind="stable")]
            answers.append(list(zip(top.tolist(), row[top].tolist(), strict=True)) if numpy.isfinite(row).all() else [])
        return answers


def export_graph(engine: TorchEngine, path: Path, photos: list[str], separate_weights: bool = False) -> float:
    """Write the engine's model as an ONNX file: N×crop×crop×3 uint8 in, N×classes confidences out.

    With ``separate_weights`` the weights lie beside it in a file that is mapped into memory, which starts
    sooner and has no limit of 2 GiB. The graph is checked against the engine on the photos; returns the
    largest difference in confidence. Raises ModelError if a package is missing, the graph would be too
    large for one file, or the two do not agree.
    """
    import torch
    from torch import nn

    try:
        import onnx  # noqa: F401  (torch.onnx asks for them too late and at length)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError("导出需要 onnx 和 onnxscript,请运行: pip install onnx onnxscript onnxruntime") from error
    spec = engine.spec
    size = sum(value.numel() * value.element_size() for value in engine.model.state_dict().values())
    if size > 2**31 - 2**26 and not separate_weights:
        raise ModelError(
            f"模型有 {size / 2**30:.1f} GiB,超过单个 ONNX 文件的 2 GiB 上限;不写文件名的 --export 没有这个限制"
        )

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = engine.model
            for name in ("mean", "std"):
                self.register_buffer(f"pixel_{name}", torch.tensor(spec[name]).view(1, 3, 1, 1))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            inputs = pixels.permute(0, 3, 1, 2).float().div(255).sub(self.pixel_mean).div(self.pixel_std)
            return self.model(inputs).softmax(1)

    kept = {key: value for key, value in spec.items() if key not in ("files", "published_sha256")}
    kept.setdefault("fingerprint", fingerprint(engine.model))
    expected = [engine.classify([pixels], spec["num_classes"])[0] for pixels in _read_pixels(photos, spec)]
    fold_batch_norm(engine.model)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Graph().eval(),
            (torch.zeros(2, spec["crop"], spec["crop"], 3, dtype=torch.uint8),),
            input_names=["pixels"],
            output_names=["confidences"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props["wwts_spec"] = json.dumps(kept, ensure_ascii=False)
    program.save(path, external_data=separate_weights)
    graph = OnnxEngine(path, None)
    largest = 0.0
    for pixels, wanted in zip(_read_pixels(photos, spec), expected, strict=True):
        # Beside copies of itself, so that a batch of a size unlike the example's is tried too.
        given = graph.classify([pixels] * 3, spec["num_classes"])[1]
        confidences = dict(given)
        largest = max([largest, *(abs(value - confidences[index]) for index, value in wanted)])
        if largest > 1e-3 or given[0][0] != wanted[0][0]:
            raise ModelError(f"导出的 ONNX 与 torch 的结果不一致(置信度相差 {largest:.2g}),未保存")
    return largest


def _read_pixels(photos: list[str], spec: dict[str, Any]) -> Iterator[numpy.ndarray]:
    for photo in photos:
        try:
            with open_image(photo) as file:
                yield preprocess(decode_image(file), spec)
        except Exception as error:  # a broken file can make a decoder raise anything
            raise UsageError(f"{photo}: {describe_image_error(error)}") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A folder to write path in; when all went well path is replaced by what it holds under that name."""
    import shutil

    folder = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        yield folder
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(folder / path.name, path)
    except OSError as error:
        raise ModelError(f"{path} 写不进去: {error.strerror}。请腾出空间、检查权限,或换一个地方") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver has a GPU for this process, without asking torch."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def base_weights_here() -> bool:
    """Whether hubconf.py would find wwts_cn_base in ModelScope's cache: the same places, without importing torch."""
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or os.path.expanduser("~/.cache/modelscope"))
    name = "cv_resnest101_general_recognition"
    layouts = ("models/{}--{}/snapshots/master", "models/{}/{}", "hub/models/{}/{}", "hub/{}/{}", "{}/{}")
    folders = [cache / layout.format(owner, name) for layout in layouts for owner in ("iic", "damo")]
    return any(all((f / file).is_file() for file in ("pytorch_model.pt", "meta_info.txt")) for f in folders)


# ---------------------------------------------------------------- cache of results


class _SqliteStore:
    """What of redis.Redis the cache uses, in a file that any number of processes share."""

    def __init__(self, path: str):
        import sqlite3

        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        # A write-ahead log lets some read while one writes; what a power cut loses can be had again.
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute("CREATE TABLE IF NOT EXISTS cache (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    def get(self, key: str) -> str | None:
        row = self._connection.execute("SELECT value FROM cache WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def set(self, key: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO cache VALUES (?, ?)", (key, value))


class Cache:
    """JSON values by key in an SQLite file or a Redis server; one that breaks costs a warning, no more."""

    def __init__(self, location: str):
        self._location, self._lock, self._broken, self._store = location, threading.Lock(), False, None
        import sqlite3

        self._errors: tuple = (sqlite3.Error, OSError, ValueError)
        self._open: Callable = functools.partial(_SqliteStore, location)
        if location.startswith(("redis://", "rediss://", "unix://")):
            try:
                import redis
            except ImportError as error:
                raise ModelError("--cache redis://… 需要 redis 包,请运行: pip install redis") from error
            self._errors += (redis.RedisError,)
            self._open = functools.partial(redis.Redis.from_url, location, socket_timeout=5, socket_connect_timeout=2)

    def _call(self, method: str, *arguments: str) -> Any:
        with self._lock:
            try:
                if not self._broken:
                    self._store = self._store or self._open()
                    return getattr(self._store, method)(*arguments)
            except self._errors as error:
                self._broken = True
                log.warning("缓存 %s 不能使用(%s),本次不用缓存", self._location, _one_line(error))
        return None

    def get(self, key: str) -> Any:
        """The value stored under key, or None."""
        text = self._call("get", f"wwts:{key}")
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # this program did not put that there
            return None if text is None else json.loads(text)
        return None

    def put(self, key: str, value: Any) -> None:
        """Store a value under key."""
        self._call("set", f"wwts:{key}", json.dumps(value))


def cache_folder() -> Path:
    """The folder for what this program keeps for the user: results and exported graphs."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "wwts"


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True, default=str).encode()).hexdigest()[:32]


def _file_states(paths: Iterable[str]) -> list:
    """Path, size and time of last change of files, so that a change (or coming into being) is seen later."""
    states = []
    for path in paths:
        try:
            status = os.stat(path)
            states.append([path, status.st_size, status.st_mtime_ns])
        except OSError:
            states.append([path, None, None])
    return states


# ---------------------------------------------------------------- recognizer


class _Prepared(NamedTuple):
    """An image on its way to the engine: with pixels, or with cached predictions, or with an error."""

    path: str
    pixels: numpy.ndarray | None = None
    key: str | None = None
    cached: list | None = None
    error: str | None = None


@dataclasses.dataclass(eq=False)
class Recognizer:
    """Recognises images with one model; loads it when first needed, so it can be pickled and shipped before.

    Raises ModelError, when first used, if the model, its weights or labels, or the device are unusable.
    """

    # Entry point of the hub repository, or an .onnx file; None: wwts_cn_base, or wwts_cn_lite with a
    # warning where base's weights are not to be had.
    model: str | None = None
    _: dataclasses.KW_ONLY
    repo: str | None = None  # torch.hub repository, a folder or OWNER/NAME[:REF]; None: the folder of this file
    trust_repo: bool = False  # allow code of a remote repository to run
    weights: str | os.PathLike | None = None  # file or folder, passed to the entry point
    labels: str | os.PathLike | None = None  # file of labels that replace the model's own; see read_labels
    offline: bool = False  # never touch the network
    device: str = "auto"  # or cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # float16 on CUDA, else float32; or float32, float16, bfloat16
    topk: int = 5  # how many predictions a result has at most
    threshold: float = 0.0  # least confidence of a prediction, 0 to 1
    batch_size: int | None = None  # images per forward pass; None: 64 on CUDA, else 8
    workers: int | None = None  # decoding threads; None: one per core, 16 at most
    cache: str | os.PathLike | None = None  # file or redis:// URL that keeps results by content of image and model
    engine: str = "auto"  # onnx: the graph that --export keeps; torch; auto: that graph where there is no NVIDIA GPU

    def __post_init__(self) -> None:
        self.weights, self.labels, self.cache = (
            None if path is None else os.fspath(path) for path in (self.weights, self.labels, self.cache)
        )
        self.offline = self.offline or os.environ.get("WWTS_OFFLINE", "0") not in ("", "0")
        self.workers = self.workers or min(os.cpu_count() or 1, 16)
        self.name: str | None = None
        self._engine: TorchEngine | OnnxEngine | None = None
        self._identity: dict[str, Any] | None = None
        self._cache: Cache | None = None
        self._lock = threading.RLock()
        self._failed: ModelError | None = None
        self._stopped = False

    def __reduce__(self) -> tuple:
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return functools.partial(Recognizer, **arguments), ()

    # Which model, and by which engine

    def choose(self) -> str | None:
        """The model's name as far as the file system tells; None if the network is to be asked for base."""
        if self.name is None:
            if self.model or self.repo or self.weights or base_weights_here():
                self.name = self.model or DEFAULT_MODEL
            elif self.offline:
                log.warning(NO_BASE)
                self.name = FALLBACK_MODEL
        return self.name

    def identify(self) -> dict[str, Any]:
        """Name, num_classes and fingerprint of the model: from the cache if no file changed, else by loading it."""
        with self._lock:
            if self._identity is None and self.cache:
                self._cache = self._cache or Cache(self.cache)
                known = self.choose() and self._cache.get(f"model:{self._digest()}")
                with contextlib.suppress(ValueError, LookupError, TypeError):  # this program did not put that there
                    states = known["files"]
                    fresh = states and _file_states(state[0] for state in states) == states
                    if fresh and isinstance(known["name"], str) and known["num_classes"] and known["fingerprint"]:
                        self._identity = known
            if self._identity is None:
                self.load()
            return self._identity

    def _digest(self) -> str:
        """What decides, beside the content of files, what the chosen model is."""
        paths = [path and os.path.abspath(path) for path in (self.repo, self.weights, self.labels)]
        name = os.path.abspath(self.name) if self._is_graph() else self.name
        places = ["MODELSCOPE_CACHE", "HOME", "USERPROFILE"] if self.weights is None else []
        places = [os.environ.get(variable) for variable in places]
        return _digest(__version__, str(HERE), name, *paths, *places)

    def _is_graph(self) -> bool:
        return str(self.name).endswith(".onnx")

    def kept_graph(self) -> Path:
        """Folder where --export without a name keeps the chosen model's graph and what it was made from."""
        return cache_folder() / f"{self.name}-{self._digest()[:12]}"

    def find_graph(self) -> list[str] | None:
        """The graph to run instead of torch, and the files it was made from if they have not changed since."""
        if self._is_graph():
            if self.engine == "torch" or self.device not in ("auto", "cpu"):
                raise UsageError("ONNX 模型由 ONNX Runtime 在 CPU 上运行,不能与 --engine torch 或 -d 同用")
            return [self.name]
        possible = self.name and self.device in ("auto", "cpu") and self.dtype in ("auto", "float32")
        if self.engine == "onnx" and not possible:
            raise UsageError("--engine onnx 只在 CPU 上以 float32 运行,且要有权重;请去掉 -d 和 --dtype")
        if self.engine == "torch" or not possible or (self.engine == self.device == "auto" and has_nvidia_gpu()):
            return None
        folder = self.kept_graph()
        try:
            states = json.loads(read_text(folder / "files.json"))
            files = [state[0] for state in states]
            fresh = bool(files) and _file_states(files) == states
            problem = None if fresh else "导出为 ONNX 之后,权重、标签或程序变了"
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            problem = "还没有导出为 ONNX"
        export = f"请运行: python infer.py --export{f' -m {self.model}' if self.model else ''}"
        if problem is None:
            if importlib.util.find_spec("onnxruntime"):
                return files
            problem, export = "已导出为 ONNX,但没有 onnxruntime", "要用它加速请运行: pip install onnxruntime"
        if self.engine == "onnx":
            raise ModelError(f"{self.name} {problem},{export}")
        if folder.exists():
            log.info("%s %s,这次用 torch。%s", self.name, problem, export)
        return None

    def load(self) -> TorchEngine | OnnxEngine:
        """Load model and labels unless that is done, and return the engine."""
        with self._lock:
            if self._failed is not None:  # for the threads that wait; once is enough to see it fail
                raise self._failed
            if self._engine is None:
                try:
                    self._engine = self._load()
                except ModelError as error:
                    self._failed = error
                    raise
            return self._engine

    def _load(self) -> TorchEngine | OnnxEngine:
        labels = None if self.labels is None else read_labels(self.labels)
        self.choose()
        files = self.find_graph()
        if files is None:
            engine: TorchEngine | OnnxEngine = self._load_torch(labels)
        else:
            engine = OnnxEngine(files[0], labels)
            engine.spec["files"] = files
        if "files" in engine.spec and self.labels:
            engine.spec["files"].append(self.labels)
        log.info("加载模型完成,使用设备: %s", engine.device_name)
        self.batch_size = self.batch_size or (64 if engine.device_name.startswith("cuda") else 8)
        self._identity = {key: engine.spec.get(key) for key in ("name", "num_classes", "fingerprint")}
        if self._cache and "files" in engine.spec and self.name:
            files = _file_states(engine.spec["files"])
            self._cache.put(f"model:{self._digest()}", self._identity | {"files": files})
        return engine

    def _load_torch(self, labels: list[str] | None) -> TorchEngine:
        torch = import_torch()
        if self.device.startswith(("auto", "cuda")) and torch.cuda.is_available():
            # CUDA wakes while the weights are read; if it cannot, that comes up again when it is used.
            ThreadPoolExecutor(1).submit(torch.zeros, 1, device=self.device.replace("auto", "cuda"))
        source = (self.repo, self.trust_repo, self.weights, self.offline)
        name = self.name or DEFAULT_MODEL
        try:
            model = load_hub_model(name, *source)
        except (FileNotFoundError, ConnectionError) as error:
            if self.name is not None:
                raise ModelError(_one_line(error)) from error
            log.warning("%s。%s", error, USE_FALLBACK)
            name = FALLBACK_MODEL
            try:
                model = load_hub_model(name, *source)
            except FileNotFoundError as missing:
                raise ModelError(_one_line(missing)) from missing
        if self.cache and "fingerprint" not in getattr(model, "spec", {}):
            model.spec = {**getattr(model, "spec", {}), "fingerprint": fingerprint(model)}
        return TorchEngine(model, name, labels, self.device, self.dtype)

    def __call__(self, image: str | os.PathLike | Image.Image) -> Result:
        """Recognise one file or PIL image. A file that cannot be read gives a Result with ``error`` set."""
        return next(self.stream([image]))

    def stop(self) -> None:
        """Let the stream that is running end after the batch in hand; safe to call from a signal handler."""
        self._stopped = True

    def stream(self, images: Iterable[str | os.PathLike | Image.Image], reproducible: bool = False) -> Iterator[Result]:
        """Recognise any number of files or PIL images in constant memory; results come in input order.

        Decoding runs in ``workers`` threads beside the engine. A batch is run when it is full, or when
        the input has nothing more to give at the moment. With ``reproducible`` a batch that is not full is
        filled up, since kernels chosen by batch size differ in a confidence's last digits.
        """
        self._stopped, self._reproducible = False, reproducible
        prepared: queue.Queue[Future | None] = queue.Queue(2 * (self.batch_size or 8) + self.workers)
        closed = threading.Event()

        def put(item: Future | None) -> None:
            while not closed.is_set():
                with contextlib.suppress(queue.Full):
                    return prepared.put(item, timeout=0.1)

        def feed() -> None:
            try:
                for image in images:
                    put(pool.submit(self._prepare, image))
                    if closed.is_set():
                        return
                put(None)
            except BaseException as error:  # handed over to the thread that asked for results
                failed: Future = Future()
                failed.set_exception(error)
                put(failed)

        pool = ThreadPoolExecutor(self.workers)
        try:
            threading.Thread(target=feed, daemon=True).start()
            self.identify()  # while the first images are decoded
            for batch in self._batches(prepared):
                yield from self._recognize(batch)
        finally:
            closed.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _batches(self, prepared: queue.Queue) -> Iterator[list[_Prepared]]:
        """Batches of what a queue of futures gives, up to None; waits for nothing that is not yet in it."""
        batch: list[_Prepared] = []
        ended = False
        while not ended and not self._stopped:
            with contextlib.suppress(queue.Empty):
                future = prepared.get(timeout=0.05 if batch else 0.2)
                ended = future is None
                if not ended:
                    batch.append(future.result())
                    if len(batch) < (self.batch_size or 8):
                        continue
            if batch:
                yield batch
                batch = []

    def _prepare(self, image: Any) -> _Prepared:
        from PIL import Image

        if isinstance(image, Image.Image):
            return _Prepared(getattr(image, "filename", "") or "", preprocess(to_rgb(image), self.load().spec))
        path = os.fspath(image)
        key = None
        try:
            with open_image(path) as file:
                if self.cache:
                    identity = self.identify()
                    key = f"{hashlib.file_digest(file, 'sha256').hexdigest()}:{identity['fingerprint']}"
                    file.seek(0)
                    known = self._cache.get(key)
                    if _are_results(known) and len(known) >= min(self.topk, identity["num_classes"]):
                        return _Prepared(path, cached=known[: self.topk])
                image = decode_image(file)
            return _Prepared(path, preprocess(image, self.load().spec), key)
        except ModelError:
            raise
        except Exception as error:  # a broken file can make a decoder raise anything: one record, no more
            return _Prepared(path, error=describe_image_error(error))

    def _recognize(self, batch: list[_Prepared]) -> Iterator[Result]:
        name = self._identity["name"]
        answers = iter(self._classify([image.pixels for image in batch if image.pixels is not None]))
        for path, pixels, key, cached, error in batch:
            if error is not None:
                yield Result(path, name, error=error)
                continue
            results = cached if pixels is None else next(answers)
            if not results:
                yield Result(path, name, error="模型输出了 NaN 或无穷大,结果不可信;可改用 --dtype float32")
                continue
            if key is not None:
                self._cache.put(key, results)
            kept = tuple(Prediction(*result) for result in results if result[1] >= self.threshold)
            yield Result(path, name, kept, cached=pixels is None)

    def _classify(self, pixels: list[numpy.ndarray]) -> list[list[tuple[str, float, int]]]:
        """Label, confidence and index of the top-k of each image; in smaller batches where memory does not suffice."""
        answers: list = []
        while len(answers) < len(pixels):
            engine = self.load()
            batch = pixels[len(answers) : len(answers) + self.batch_size]
            filling = [batch[-1]] * (self.batch_size - len(batch)) if self._reproducible else []
            try:
                answers += engine.classify(batch + filling, self.topk)[: len(batch)]
            except DeviceMemoryError:
                if len(batch + filling) == 1:
                    raise
                self.batch_size = len(batch + filling) // 2
                log.warning("显存不足,批大小减为 %d", self.batch_size)
        return [[(engine.spec["labels"][index], value, index) for index, value in answer] for answer in answers]


def _are_results(known: Any) -> bool:
    """Whether what a cache gave is a list of label, confidence and index."""
    with contextlib.suppress(TypeError, ValueError):
        return bool(known) and all(
            (type(label), type(value), type(index)) == (str, float, int) and 0 <= value <= 1
            for label, value, index in known
        )
    return False


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of all parameters and buffers, for a model that brings none."""
    import torch

    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------- inputs


def find_images(inputs: Iterable[str]) -> Iterator[str]:
    """Paths of images: files as named, folders and globs expanded and sorted by path, - read line by line.

    A file that is named twice comes once. What turns out to hold no image is warned of.
    """
    inputs = list(inputs)
    # One folder names no file twice, and may hold millions.
    seen: set[str] | None = None if len(inputs) == 1 and inputs[0] != "-" else set()
    for name in inputs:
        number = 0
        for number, path in enumerate(_expand(name), 1):  # noqa: B007
            if seen is not None:
                absolute = os.path.abspath(path)
                if absolute in seen:
                    continue
                seen.add(absolute)
            yield path
        if not number:
            log.warning("%s 里没有图片", "标准输入" if name == "-" else name)


def _expand(name: str) -> Iterator[str]:
    if name == "-":
        # Bytes, since a file name need not be text; line by line, since the producer may be slow. Not through
        # sys.stdin, whose lock Python wants at exit, when an interrupted run may still wait for a line.
        with open(0, "rb", closefd=False) as file:
            while line := file.readline(MOST_TEXT):
                if len(line) == MOST_TEXT:
                    raise UsageError("标准输入不是每行一个的路径")
                if path := os.fsdecode(line.rstrip(b"\r\n")):
                    yield path
    elif os.path.isdir(name):
        yield from _walk(name, image_extensions())
    elif glob.has_magic(name) and not os.path.lexists(name):
        paths = sorted(glob.iglob(name, recursive=True))
        for path in paths:
            yield from _expand(path) if os.path.isdir(path) else (path,)
        if not paths and not re.search("[*?]", name):  # more likely a missing 图片[1].jpg
            yield name
    else:
        yield name


def image_extensions() -> set[str]:
    """The file name extensions, with dot and in lower case, that Pillow opens."""
    from PIL import Image

    return {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}


def _walk(folder: str, extensions: set[str]) -> Iterator[str]:
    """Images under a folder in the order of their full paths; each folder once, however many links lead there."""
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
        kept = (name for name in names if name[-1] == "/" or os.path.splitext(name)[1].lower() in extensions)
        waiting += sorted(kept, reverse=True)


# ---------------------------------------------------------------- outputs


class Text:
    """The block that people read: results to standard output, the name of the image to standard error."""

    head = ""  # what comes before the first record

    def __init__(self, topk: int):
        self.topk = topk

    def format(self, result: Result) -> str:
        """The block for one image; what is not a result is logged."""
        if result.error is not None:
            log.error("%s: %s", result.path, result.error)
            return ""
        log.info("输入图像: %s", result.path)
        if result.cached:
            log.log(CACHE_HIT, "使用缓存结果")
        lines = [f" - {printable(p.label)} (置信度: {p.confidence:.2f})\n" for p in result.predictions]
        return "".join(["[RESULT] 识别结果:\n", *(lines or [" (没有达到阈值的标签)\n"])])


class Jsonl(Text):
    """One JSON object a line."""

    begins = b'{"path": "'  # as every file does

    def format(self, result: Result) -> str:
        """The line for one image."""
        return json.dumps(result.record(), ensure_ascii=False, allow_nan=False) + "\n"

    def parse(self, line: str) -> tuple[str, str, int | None]:
        """Path, model and number of predictions (None for an error) of a line; raises at what is none."""
        record = json.loads(line)
        if not isinstance(record["path"], str) or not isinstance(record["model"], str):
            raise TypeError
        return record["path"], record["model"], None if "error" in record else len(record["results"])

    def name(self, path: str) -> str:
        """The path as ``parse`` gives it."""
        return path


class Csv(Text):
    """One line an image, for Excel: path, model, label_1, confidence_1, …, error."""

    def __init__(self, topk: int):
        super().__init__(topk)
        columns = [f"{name}_{rank}" for rank in range(1, topk + 1) for name in ("label", "confidence")]
        self.head = "\ufeff" + ",".join(["path", "model", *columns, "error"]) + "\r\n"  # Excel wants the mark
        self.begins = self.head.encode()

    def format(self, result: Result) -> str:
        """The line for one image."""
        cells = [cell for p in result.predictions for cell in (self.name(p.label), p.confidence)]
        padding = [""] * (2 * self.topk - len(cells))
        line = io.StringIO()
        row = [self.name(result.path), self.name(result.model), *cells, *padding, self.name(result.error or "")]
        csv.writer(line, lineterminator="\r\n").writerow(row)
        return line.getvalue()

    def parse(self, line: str) -> tuple[str, str, int | None]:
        """Path, model and number of predictions (None for an error) of a line; raises at what is none."""
        (row,) = csv.reader([line], strict=True)
        if len(row) != 2 * self.topk + 3:
            raise ValueError
        return row[0], row[1], None if row[-1] else sum(map(bool, row[2:-1:2]))

    def name(self, text: str) -> str:
        """A cell that is one line and no formula: spreadsheets run what begins with = + - or @ (OWASP)."""
        return "'" * text.startswith(("=", "+", "-", "@", "'")) + printable(text)


FORMATS = {"text": Text, "jsonl": Jsonl, "csv": Csv}


class OutputFile:
    """A file of whole records: what a full disk or a power cut left half written is taken back.

    Attributes: ``size``, where its last whole record ends; ``inputs``, the names of those that have a
    record; ``failures``, how many of them are errors.
    """

    def __init__(self, path: Path, form: Jsonl | Csv):
        self.path, self.form, self.size, self.failures = path, form, 0, 0
        self.inputs: set[str] = set()
        self._models: set[str] = set()
        self._counts: set[int] = set()
        self._file: BinaryIO | None = None

    def resume(self) -> None:
        """Take in the records of an earlier run; raises UsageError at what was not written in this format."""
        foreign = False
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            foreign = not self.form.begins.startswith(file.read(len(self.form.begins)).rstrip(b"\0"))
            file.seek(0)
            while not foreign and (line := file.readline(MOST_TEXT)):
                if not line.endswith(b"\n") or b"\0" in line:  # torn, as only the last can be
                    foreign = bool(file.read(1))
                    break
                try:
                    if self.size or not self.form.head:
                        path, model, count = self.form.parse(line.decode())
                        self.inputs.add(path)
                        self._models.add(model)
                        self.failures += count is None
                        self._counts |= {count} - {None}
                    self.size += len(line)
                except (ValueError, LookupError, TypeError, RecursionError, csv.Error):
                    foreign = True
        if foreign:
            raise UsageError(
                f"{self.path} 的第 {self.size} 字节之后不是以同样的格式和 -k 写出的记录,不能续写。"
                "换一个文件名,或用 --overwrite"
            )

    def check(self, model: str | None, most: int, least: int) -> None:
        """Raise UsageError if the records are of another model or have more or fewer predictions."""
        if model is not None and self._models - {model}:
            raise UsageError(
                f"{self.path} 是 {', '.join(self._models)} 的结果,不能用 {model} 续写。换一个文件名,或用 --overwrite"
            )
        if not all(least <= count <= most for count in self._counts):
            raise UsageError(f"{self.path} 是用别的 -k 或 -t 写的,不能续写。换一个文件名,或用 --overwrite")

    def __contains__(self, path: str) -> bool:
        return self.form.name(path) in self.inputs

    def write(self, text: str) -> None:
        """Append one record; on an OSError the file is as before."""
        if self._file is None:
            self._file = open(self.path, "r+b" if self.path.exists() else "xb", buffering=0)
            self._file.truncate(self.size)
            self._file.seek(self.size)
        # A file name that is no text is written as JSON would escape it.
        data = text.encode("utf-8", "backslashreplace")
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self.size)
            raise
        self.size += len(data)


def printable(text: str) -> str:
    """Escape control characters, so that a file name or label cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# ---------------------------------------------------------------- measuring and checking


def run_bench(recognizer: Recognizer, arguments: argparse.Namespace) -> int:
    """Measure what a user waits for and pays for, with the model, device and engine chosen; print a table."""
    import subprocess

    photos = _photos(arguments, 1000)
    engine = recognizer.load()
    pixels = list(_read_pixels(photos[:64], engine.spec))
    cuda = engine.device_name.startswith("cuda")
    sizes = [1, 2, 4, 8, 16] + [32, 64, 128, 256] * cuda
    many = list(itertools.islice(itertools.cycle(photos), 256))
    options = ("model", "repo", "weights", "labels", "device", "dtype", "engine")
    command = [f"--{name}={getattr(recognizer, name)}" for name in options if getattr(recognizer, name)]
    command += ["--trust-repo"] * recognizer.trust_repo + ["--offline"] * recognizer.offline

    def measure() -> Iterator[tuple[str, float, str]]:
        start = time.perf_counter()
        subprocess.run([sys.executable, __file__, "-q", *command, photos[0]], capture_output=True)
        yield "冷启动到第一个答案", time.perf_counter() - start, "秒"
        seconds = _latencies(engine, pixels[0])
        yield "单张延迟 p50", seconds[len(seconds) // 2] * 1000, "毫秒"
        yield "单张延迟 p95", seconds[int(len(seconds) * 0.95)] * 1000, "毫秒"
        rates = []
        for size in sizes:
            batch = list(itertools.islice(itertools.cycle(pixels), size))
            rates.append(_rate(lambda batch=batch: len(engine.classify(batch, recognizer.topk))))
            yield f"模型计算,每批 {size} 张", rates[-1], "张/秒"
        with ThreadPoolExecutor(recognizer.workers) as pool:
            read = functools.partial(pool.map, lambda photo: list(_read_pixels([photo], engine.spec)))
            decode_rate = _rate(lambda: len(list(read(many[:64]))))
        yield f"解码和缩放,{recognizer.workers} 个线程", decode_rate, "张/秒"
        end_to_end = _rate(lambda: sum(1 for _ in recognizer.stream(many)))
        limit = "解码" if decode_rate < max(rates) else "模型计算"
        yield f"端到端(解码、缩放、计算),受限于{limit}", end_to_end, "张/秒"
        with contextlib.suppress(ImportError):  # not on Windows
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
            yield "内存峰值", peak, "MiB"
        if cuda:
            import torch

            yield "显存峰值", torch.cuda.max_memory_allocated() / 2**20, "MiB"
        if arguments.price_per_hour is not None:
            yield "每千张费用", arguments.price_per_hour / 3600 / end_to_end * 1000, "元"
            yield "商用 API 每千张费用(0.003 元一次)", 3.0, "元"
            yield "商用 API 一次调用(对比单张延迟)", 150.0, "毫秒"

    identity = {"model": engine.spec["name"], "device": engine.device_name}
    total = len(sizes) + 6 + cuda + 3 * (arguments.price_per_hour is not None)
    with _bar(total, "项", show=sys.stderr.isatty() and not arguments.quiet) as bar:
        rows = []
        for row in measure():
            rows.append(row)
            bar.update()
    for name, value, unit in rows:
        if arguments.format == "jsonl":
            print(json.dumps(identity | {"measurement": name, "value": value, "unit": unit}, ensure_ascii=False))
        else:
            width = 44 - sum(unicodedata.east_asian_width(c) in "WF" for c in name)
            print(f"{name:<{width}}{value:>12.4g} {unit}")
    return 0


def _latencies(engine: TorchEngine | OnnxEngine, pixels: numpy.ndarray) -> list[float]:
    """Seconds that one image takes, sorted, after a few to warm up."""
    seconds = []
    for _ in range(25):
        start = time.perf_counter()
        engine.classify([pixels], 5)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[5:])


def _rate(work: Callable[[], int]) -> float:
    """What work does in a second, as it counts itself."""
    work()  # the first time allocates and plans
    start, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < 1:
        done += work()
    return done / seconds


def package_versions() -> dict[str, str]:
    """Versions of this program, of Python and of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"infer.py": __version__, "Python": sys.version.split()[0]}
    for package in ("torch", "torchvision", "pillow", "numpy", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


class Skipped(Exception):
    """A check that cannot be made here, and why."""


# The reference package's answers to samples/ with these weights (efficientnet-lite-pytorch 0.1.0).
LITE_ANSWERS = {
    "cat.jpg": (285, "埃及猫", 0.579),
    "coffee.jpg": (967, "浓缩咖啡", 0.878),
    "palace.jpg": (698, "宫殿", 0.399),
    "tripod.jpg": (872, "三脚架", 0.615),
}
# Milliseconds for one image with torch: CPU, measured on 2 cores; CUDA, estimated from the number of kernels launched.
USUAL_LATENCY = {
    (FALLBACK_MODEL, "cpu"): 40,
    (DEFAULT_MODEL, "cpu"): 250,
    (FALLBACK_MODEL, "cuda"): 10,
    (DEFAULT_MODEL, "cuda"): 25,
}
BROKEN = "权重、标签、预处理或机器有问题: 请先看以上各行,再重新安装 requirements.txt"


class Check:
    """What --check looks at: each method returns what it found, raises Skipped, or raises what is wrong.

    Photos are those of samples/.
    """

    def __init__(self, recognizer: Recognizer):
        graph = str(recognizer.model).endswith(".onnx")
        self.recognizer = recognizer if graph else dataclasses.replace(recognizer, engine="torch")
        self.photos = [str(path) for path in (HERE / "samples" / name for name in LITE_ANSWERS) if path.is_file()]
        self._engine: TorchEngine | OnnxEngine | None = None

    @property
    def engine(self) -> TorchEngine | OnnxEngine:
        """The engine under examination."""
        if self._engine is None:
            raise Skipped("模型没有加载")
        return self._engine

    @functools.cached_property
    def pixels(self) -> list[numpy.ndarray]:
        """The photos, preprocessed."""
        if not self.photos:
            raise Skipped(f"没有示例图片 {HERE / 'samples'}")
        return list(_read_pixels(self.photos, self.engine.spec))

    def confidences(self, batch: list[numpy.ndarray], engine: TorchEngine | OnnxEngine | None = None) -> numpy.ndarray:
        """N×classes confidences of preprocessed images; raises ModelError if one is not finite."""
        import numpy

        engine = engine or self.engine
        rows = numpy.zeros((len(batch), engine.spec["num_classes"]), numpy.float32)
        for row, answer in zip(rows, engine.classify(batch, rows.shape[1]), strict=True):
            if not answer:
                raise ModelError("输出了 NaN 或无穷大。可改用 --dtype float32;仍然如此则权重或机器有问题")
            indices, values = zip(*answer, strict=True)
            row[list(indices)] = values
        return rows

    def agree(self, ours: numpy.ndarray, theirs: numpy.ndarray, tolerance: float, remedy: str) -> str:
        """The largest difference of two arrays of confidences; raises ModelError if it or a top-1 is off."""
        difference = float(abs(ours - theirs).max())
        found = f"置信度最多相差 {difference:.1g}"
        if difference > tolerance or (tolerance < 0.01 and (ours.argmax(1) != theirs.argmax(1)).any()):
            raise ModelError(f"{found}(应不超过 {tolerance:g})。{remedy}")
        return found

    @property
    def tolerance(self) -> float:
        """How far confidences may be apart in the engine's precision."""
        return 0.03 if str(getattr(self.engine, "dtype", "")).endswith("float16") else 1e-3

    def versions(self) -> str:
        """Of Python and the packages; each at least what requirements.txt asks for."""
        import_torch()
        found = package_versions()
        requirements = HERE / "requirements.txt"
        lines = requirements.read_text().splitlines() if requirements.is_file() else []
        for name, least in (line.split(">=") for line in lines if ">=" in line):
            has, wants = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (found.get(name, "9999"), least))
            if has < wants:
                raise ModelError(f"{name} {found[name]} 太旧,请运行: pip install '{name}>={least}'")
        try:
            import torchvision  # noqa: F401
        except Exception as error:  # what a mismatched build raises is of any kind
            raise ModelError(f"torchvision 无法导入({_one_line(error)})。{REINSTALL}") from error
        return ",".join(f"{name} {version}" for name, version in found.items())

    def device(self) -> str:
        """That computes, with its memory, driver and CUDA."""
        import platform
        import subprocess

        torch = import_torch()
        device = choose_device(self.recognizer.device)
        if device.type == "cuda":
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
            driver = ""
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
                driver = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.partition("\n")[0]
            name = f"{device} {torch.cuda.get_device_name(device)}"
            return f"{name},显存 {total:.1f} GiB(空闲 {free:.1f}),CUDA {torch.version.cuda},驱动 {driver or '未知'}"
        if self.recognizer.device == "auto" and has_nvidia_gpu():
            raise ModelError(f"有 NVIDIA 显卡,但 torch {torch.__version__} 用不了它。{REINSTALL}")
        memory = ""
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
            memory = f",内存 {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
        return f"{device} {platform.machine()},{os.cpu_count()} 核{memory}"

    def weights(self) -> str:
        """Load the model; its file has the SHA-256 that was published, or that an earlier check recorded."""
        self._engine = self.recognizer.load()
        spec = self._engine.spec
        self.recognizer.name = spec["name"]
        if "files" not in spec:
            raise Skipped("这个模型没有说明权重在哪个文件里")
        path = spec["files"][0]
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        found = f"{path},{os.path.getsize(path) / 1e6:.1f} MB,SHA-256 {sha256}"
        if spec.get("published_sha256"):
            if sha256 != spec["published_sha256"]:
                raise ModelError(f"{found},与公布的不同。请重新安装或下载")
            return f"{found},与公布的一致"
        record = cache_folder() / f"checked-{_digest(path)}.txt"
        if not record.is_file():
            try:
                with _replacing(record) as folder:
                    (folder / record.name).write_text(sha256)
            except ModelError as error:
                return f"{found},没有公布的值可比,也没能记下: {error}"
            return f"{found},没有公布的值可比,已记下供下次比较"
        if record.read_text() != sha256:
            raise ModelError(f"{found},与上次检查时不同。不是您换的就请重新下载;是您换的,请删除 {record}")
        return f"{found},与上次检查时一致"

    def parameters(self) -> str:
        """Are all finite, also in the precision that the engine computes in."""
        if isinstance(self.engine, OnnxEngine):
            raise Skipped("ONNX 的参数在图里")
        state = self.engine.model.state_dict()
        bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
        if bad:
            raise ModelError(
                f"{len(bad)} 组参数含有 NaN 或无穷大,第一组是 {bad[0]}。请重新下载权重,或用 --dtype float32"
            )
        return f"{sum(value.numel() for value in state.values()):,} 个参数和统计量都是有限数"

    def labels(self) -> str:
        """One for each output, none empty, none twice; of base's many names twice the number is told."""
        labels, outputs = self.engine.spec["labels"], self.engine.spec["num_classes"]
        empty = sum(not label.strip() for label in labels)
        duplicates = len(labels) - len(set(labels))
        found = f"{len(labels):,} 个标签,{outputs:,} 个输出,空名 {empty} 个,重名 {duplicates} 个"
        if len(labels) != outputs or empty or (duplicates and self.engine.spec["name"] != DEFAULT_MODEL):
            raise ModelError(f"{found}。请换用与权重配套的标签文件")
        return found

    def preprocessing(self) -> str:
        """Gives the very numbers that torchvision.transforms gives."""
        import numpy
        import torch
        from torchvision import transforms

        spec = self.engine.spec
        interpolation = transforms.InterpolationMode[spec["interpolation"].upper()]
        resize_and_crop = transforms.Compose(
            [transforms.Resize(spec["resize"], interpolation), transforms.CenterCrop(spec["crop"])]
        )
        normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec["mean"], spec["std"])])
        for photo, pixels in zip(self.photos, self.pixels, strict=True):
            with open_image(photo) as file:
                image = resize_and_crop(decode_image(file))
            same = numpy.array_equal(numpy.asarray(image), pixels)
            if isinstance(self.engine, TorchEngine):
                same = same and torch.equal(self.engine.normalize(numpy.stack([pixels]))[0].cpu(), normalize(image))
            if not same:
                raise ModelError(
                    f"{photo} 预处理之后与 torchvision 的不同。请运行: pip install --force-reinstall pillow"
                )
        return f"{len(self.photos)} 张照片与 torchvision 逐位相同"

    def samples(self) -> str:
        """Are recognised as the reference package does; other models must be finite, sure of something, and differ."""
        rows = self.confidences(self.pixels)
        labels = self.engine.spec["labels"]
        names = [os.path.basename(photo) for photo in self.photos]
        found = ",".join(f"{n} {labels[row.argmax()]} {row.max():.3f}" for n, row in zip(names, rows, strict=True))
        if self.engine.spec["name"] == FALLBACK_MODEL:
            for row, (index, label, confidence) in zip(rows, map(LITE_ANSWERS.get, names), strict=True):
                known = label if self.recognizer.labels is None else labels[index]
                if labels[row.argmax()] != known or abs(row[index] - confidence) > max(self.tolerance, 5e-3):
                    raise ModelError(f"{found};应有 {label} {confidence}。{BROKEN}")
        elif any(row.max() < 2 / len(row) for row in rows) or len({row.tobytes() for row in rows}) < len(rows):
            raise ModelError(f"{found};结果没有把握,或各图都一样。{BROKEN}")
        return found

    def batches(self) -> str:
        """An image gets the same answer alone and among others."""
        alone = self.confidences(self.pixels[:1])
        among = self.confidences([*self.pixels[1:], *self.pixels * 2])[len(self.pixels) - 1 :][:1]
        return self.agree(alone, among, self.tolerance, REINSTALL)

    def twice(self) -> str:
        """The same batch gets the same answer again."""
        first, second = self.confidences(self.pixels), self.confidences(self.pixels)
        return self.agree(first, second, 1e-6, "同样的输入结果不稳定,内存或显卡可能有故障,建议换一台机器")

    def cuda(self) -> str:
        """CPU and CUDA agree in float32."""
        if not self.engine.device_name.startswith("cuda"):
            raise Skipped("没有使用 CUDA")
        replace = functools.partial(dataclasses.replace, self.recognizer, engine="torch", dtype="float32")
        rows = [
            self.confidences(self.pixels, replace(device=device).load()) for device in ("cpu", self.recognizer.device)
        ]
        return self.agree(*rows, 1e-3, "显卡或驱动可能有故障,建议换一台机器")

    def onnx(self) -> str:
        """The exported graph agrees with torch on the CPU."""
        if isinstance(self.engine, OnnxEngine):
            raise Skipped("正在检查的就是 ONNX")
        name = self.engine.spec["name"]
        exported = dataclasses.replace(self.recognizer, engine="onnx", device="cpu", dtype="float32", model=name)
        try:
            exported.choose()
            exported.find_graph()
        except ModelError as error:
            raise Skipped(str(error)) from error
        rows = [self.confidences(self.pixels), self.confidences(self.pixels, exported.load())]
        return self.agree(*rows, self.tolerance, "请重新导出: python infer.py --export")

    def speed(self) -> str:
        """Of one image and of batches, against what is usual for model and device."""
        latencies = [seconds * 1000 for seconds in _latencies(self.engine, self.pixels[0])]
        batch = (self.pixels * 16)[: self.recognizer.batch_size]
        rate = _rate(lambda: len(self.engine.classify(batch, 5)))
        found = f"单张 {latencies[len(latencies) // 2]:.1f} 毫秒,每批 {len(batch)} 张时 {rate:.1f} 张/秒"
        usual = USUAL_LATENCY.get((self.engine.spec["name"], self.engine.device_name.partition(":")[0]))
        if usual and latencies[0] > 10 * usual:  # the best, since others may use the machine too
            raise ModelError(f"{found};单张通常约 {usual} 毫秒。请看有没有别的程序在用处理器或显卡,或换一台机器")
        return found + (f"(单张通常约 {usual} 毫秒)" if usual else "")


CHECKS = {
    Check.versions: "版本",
    Check.device: "设备",
    Check.weights: "权重",
    Check.parameters: "参数",
    Check.labels: "标签",
    Check.preprocessing: "预处理",
    Check.samples: "示例图片",
    Check.batches: "单张与成批",
    Check.twice: "同一批两次",
    Check.cuda: "CPU 与 CUDA",
    Check.onnx: "torch 与 ONNX",
    Check.speed: "速度",
}


def run_check(recognizer: Recognizer, arguments: argparse.Namespace) -> int:
    """Examine machine, installation and model, a line each; exit status 3 if anything is wrong."""
    check = Check(recognizer)
    marks = {"ok": "✓", "failed": "✗", "skipped": "- 跳过"}
    counts = dict.fromkeys(marks, 0)
    for method, title in CHECKS.items():
        try:
            status, detail = "ok", method(check)
        except Skipped as reason:
            status, detail = "skipped", str(reason)
        except ModelError as error:
            status, detail = "failed", str(error)
        except Exception as error:  # a broken installation raises anything
            status, detail = "failed", f"{type(error).__name__}: {_one_line(error)}。{REINSTALL}"
        counts[status] += 1
        if arguments.format == "jsonl":
            record = {"check": method.__name__, "status": status, "detail": detail, "model": check.recognizer.name}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            print(f"{marks[status]} {title}: {printable(detail)}", flush=True)
    log.info("%s: %d 项通过,%d 项不通过,%d 项跳过", check.recognizer.name or "模型没有加载", *counts.values())
    return 3 if counts["failed"] else 0


# ---------------------------------------------------------------- command line

EPILOG = """\
示例:
  python infer.py samples/cat.jpg                       识别一张图片
  python infer.py 照片文件夹 -o 结果.csv                  识别整个文件夹,Excel 可直接打开结果
  python infer.py 照片文件夹 -o 结果.csv --resume         中断后接着做,已有结果的不重做
  find . -name '*.jpg' | python infer.py - -f jsonl     从标准输入读路径,每行一个
  python infer.py --weights wwts_base x.jpg             使用手工下载的 wwts_cn_base 权重
  python infer.py --repo 文件夹 -m resnet18 x.jpg       任何 ImageNet-1k 的 torch.hub 模型

退出状态: 0 全部识别  1 有图片失败,其余已完成  2 用法错误  3 模型、权重或标签不可用  130 被中断
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(usage, actions, groups, prefix="用法: ")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        chinese = {
            "unrecognized arguments:": "无法识别的参数:",
            "the following arguments are required:": "缺少参数:",
            "expected one argument": "后面缺少一个值",
            "invalid choice:": "没有这个选择:",
            "choose from": "可选",
            "argument ": "参数 ",
        }
        for english, translation in chinese.items():
            message = message.replace(english, translation)
        unknown = re.search(r"无法识别的参数: (--?[\w-]+)", message)
        if unknown:
            nearest = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f"(是不是想用 {nearest[0]}?)" if nearest else ""
        raise UsageError(f"{message}。用法见: python infer.py --help")


class _VersionAction(argparse.Action):
    def __call__(self, parser, *arguments):
        print(", ".join(f"{name} {version}" for name, version in package_versions().items()))
        parser.exit()


def _at_least(kind: type, low: float, high: float = float("inf")):
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            span = f"不小于 {low} 的" if high == float("inf") else f"{low} 到 {high} 之间的"
            raise argparse.ArgumentTypeError(f"应为{span}{'整数' if kind is int else '数'},而不是 {text}")
        return value

    return convert


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"应为 auto、cpu、cuda、cuda:N 或 mps,而不是 {text}")
    return text


def build_parser() -> argparse.ArgumentParser:
    """The command line of DESIGN.md."""
    parser = _Parser(
        prog="infer.py",
        usage="python infer.py 图片 [图片 ...] [选项]",
        description="用中文说出图片里有什么。",
        epilog=EPILOG,
        formatter_class=_HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("输入").add_argument
    add("inputs", metavar="图片", nargs="*", help="图片、文件夹(含子文件夹)、通配符,或 - (从标准输入读路径)")
    add = parser.add_argument_group("模型").add_argument
    add("-m", "--model", metavar="NAME", help=f"模型入口名或 .onnx 文件 [{DEFAULT_MODEL},没有权重时 {FALLBACK_MODEL}]")
    add("--repo", metavar="REPO", help="torch.hub 仓库: 文件夹或 OWNER/NAME[:REF] [infer.py 所在文件夹]")
    add("--trust-repo", action="store_true", help="允许运行远程仓库的代码")
    add("--weights", metavar="PATH", help="权重文件,或含 pytorch_model.pt 和 meta_info.txt 的文件夹")
    add("--labels", metavar="FILE", help="改用这个标签文件(JSON、每行一个的文本或 meta_info.txt)")
    add("--offline", action="store_true", help="不访问网络(同环境变量 WWTS_OFFLINE=1)")
    add("-d", "--device", metavar="DEV", type=_device, default="auto", help="auto、cpu、cuda、cuda:N、mps [auto]")
    add("--dtype", metavar="TYPE", choices=DTYPES, default="auto", help=f"{'、'.join(DTYPES)} [auto: CUDA 用 float16]")
    add("--engine", metavar="ENGINE", choices=ENGINES, default="auto", help="auto、torch、onnx [auto: 见 --export]")
    export_help = "导出为 ONNX;不写 FILE 则存入用户缓存文件夹,此后没有 NVIDIA 显卡时自动使用"
    add("--export", metavar="FILE.onnx", nargs="?", const="", help=export_help)
    add("--check", action="store_true", help="检查机器、安装和模型,逐项打 ✓ 或 ✗")
    add("--bench", action="store_true", help="测速: 冷启动、延迟、吞吐、解码、内存 [用自带示例图片]")
    add(
        "--price-per-hour", metavar="YUAN", type=_at_least(float, 0), help="机器每小时的价钱(元),测速时折算每千张的费用"
    )
    add("-b", "--batch-size", metavar="N", type=_at_least(int, 1), help="每批几张 [CUDA 64,否则 8]")
    add("-j", "--workers", metavar="N", type=_at_least(int, 1), help="解码线程数 [处理器核数]")
    add = parser.add_argument_group("输出").add_argument
    add("-k", "--topk", metavar="N", type=_at_least(int, 1), default=5, help="每张图最多几个标签 [5]")
    add("-t", "--threshold", metavar="P", type=_at_least(float, 0, 1), default=0.0, help="最低置信度 [0]")
    add("-f", "--format", metavar="FMT", choices=list(FORMATS), help="标准输出的格式: text、jsonl、csv [text]")
    add("-o", "--output", metavar="FILE", help="结果写入这个 .jsonl 或 .csv 文件")
    add("--resume", action="store_true", help="接着写 -o 的文件,跳过已有记录的图片")
    add("--overwrite", action="store_true", help="覆盖 -o 的文件")
    add(
        "--expect",
        metavar="LABEL",
        action="append",
        help="每张图的前 K 个标签里应有它(可写多个,有一个即可),否则退出状态 1",
    )
    add("--cache", metavar="FILE|redis://…", nargs="?", const="", help="缓存结果,同一图片不再重算 [用户缓存文件夹]")
    add("-q", "--quiet", action="store_true", help="不显示 [INFO] 信息和进度")
    add("--version", action=_VersionAction, nargs=0, help="显示版本")
    add("-h", "--help", action="help", help="显示本说明")
    return parser


def open_output(arguments: argparse.Namespace, rank: int | None) -> OutputFile | None:
    """The file of -o, with what --resume finds in it; rank is put into its name. Raises UsageError."""
    if arguments.output is None:
        if arguments.resume or arguments.overwrite:
            raise UsageError("--resume 和 --overwrite 要与 -o 一起用")
        return None
    path = Path(arguments.output)
    if path.suffix not in (".jsonl", ".csv") or arguments.format:
        raise UsageError("-o 的文件名应以 .jsonl 或 .csv 结尾,格式由它决定,不要再用 -f")
    if not path.parent.is_dir():
        raise UsageError(f"文件夹 {path.parent} 不存在")
    arguments.format = path.suffix[1:]
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} 不是普通文件")
    path = path if rank is None else path.with_suffix(f".rank{rank}{path.suffix}")
    output = OutputFile(path, FORMATS[arguments.format](arguments.topk))
    if arguments.resume:
        output.resume()
    elif not arguments.overwrite and output.path.exists() and output.path.stat().st_size:
        raise UsageError(f"{output.path} 已存在。接着做用 --resume,重新做用 --overwrite")
    return output


def run(arguments: argparse.Namespace) -> int:
    """Recognise everything that was asked for; return the exit status."""
    # torchrun's convention: this is process RANK of WORLD_SIZE, and LOCAL_RANK on its machine.
    try:
        rank, world_size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
    except ValueError as error:
        raise UsageError(f"环境变量 RANK、WORLD_SIZE、LOCAL_RANK 应是整数: {error}") from error
    if world_size > 1 and "-" in arguments.inputs:
        raise UsageError("用 torchrun 时不能从标准输入读路径,请改用文件夹或通配符")
    if arguments.cache and os.path.splitext(arguments.cache)[1].lower() in COMMON_EXTENSIONS:
        raise UsageError(f"--cache 后面的 {arguments.cache} 会被当作缓存文件;请把 --cache 写在图片后面")
    output = open_output(arguments, rank if world_size > 1 else None)
    if arguments.cache == "":
        arguments.cache = cache_folder() / "results.sqlite"
    graph = arguments.engine == "onnx" or str(arguments.model).endswith(".onnx")
    if world_size > 1 and arguments.device in ("auto", "cuda") and not graph and has_nvidia_gpu():
        arguments.device = f"cuda:{local_rank}" if import_torch().cuda.is_available() else arguments.device
    recognizer = Recognizer(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recognizer)})

    if arguments.export is not None:
        return run_export(recognizer, arguments)
    if arguments.check or arguments.bench:
        if arguments.format == "csv":
            raise UsageError("--check 和 --bench 的格式只有 text 和 jsonl")
        return (run_check if arguments.check else run_bench)(recognizer, arguments)
    if not arguments.inputs:
        raise UsageError("缺少参数: 图片。用法见: python infer.py --help")
    if arguments.expect:
        if arguments.resume:
            raise UsageError("--expect 不能与 --resume 同用: 已有记录的图片不会再看")
        unknown = set(arguments.expect) - set(recognizer.load().spec["labels"])
        if unknown:
            raise UsageError(
                f"{recognizer.name} 没有这些标签: {','.join(sorted(unknown))}。--expect 应写模型自己的标签"
            )
    counts: collections.Counter = collections.Counter()

    def images() -> Iterator[str]:
        return itertools.islice(find_images(arguments.inputs), rank, None, world_size)

    def remaining() -> Iterator[str]:
        for path in images():
            counts["found"] += 1
            if output is None or path not in output:
                yield path

    todo = remaining()
    first = next(todo, None)
    if not counts["found"] and not rank:
        raise UsageError("没有找到图片")
    if output is not None:
        # An .onnx file tells its model's name only when it is loaded, which a finished run shall not need.
        output.check(None if str(arguments.model).endswith(".onnx") else arguments.model, arguments.topk, 0)
    signals: list[int] = []
    start = time.monotonic()
    if first is not None:
        if output is not None:
            model = recognizer.identify()
            most = min(arguments.topk, model["num_classes"])
            output.check(model["name"], most, 0 if arguments.threshold else most)
        form = FORMATS[arguments.format or "text"](arguments.topk)
        write = functools.partial(print, end="", flush=True) if output is None else output.write
        head = form.head if output is None or not output.size else ""
        start = time.monotonic()
        bar = _progress_bar(output, lambda: None if "-" in arguments.inputs else sum(1 for _ in images()))
        stream = contextlib.closing(recognizer.stream(itertools.chain([first], todo), reproducible=output is not None))
        with bar as advance, _interruptible(recognizer.stop, signals), stream as results:
            for result in results:
                write(head + form.format(result))
                head = ""
                counts.update(done=1, failed=result.error is not None, cached=result.cached)
                if arguments.expect and not {p.label for p in result.predictions} & set(arguments.expect):
                    counts["unexpected"] += 1
                    log.error("%s: 答案里没有 %s", result.path, " 或 ".join(arguments.expect))
                advance(counts["failed"])
    if counts["found"] > 1 or output is not None:
        log.info(
            "%s: 识别 %d 张,失败 %d 张,缓存命中 %d 张,已有记录 %d 张(失败 %d 张),%.1f 张/秒",
            "中断" if signals else "完成",
            *(counts["done"], counts["failed"], counts["cached"]),
            *((0, 0) if output is None else (len(output.inputs), output.failures)),
            counts["done"] / max(time.monotonic() - start, 1e-3),
        )
    if signals:
        log.warning("已中断。%s", f"加上 --resume 再运行,会接着写 {output.path}" if output else "再运行会从头开始")
        return 128 + signals[0]
    return 1 if counts["failed"] or counts["unexpected"] or (output is not None and output.failures) else 0


def _photos(arguments: argparse.Namespace, most: int) -> list[str]:
    """The first of the images that were named, or the samples; raises UsageError if there are none."""
    photos = list(itertools.islice(find_images(arguments.inputs or [str(HERE / "samples")]), most))
    if not photos or not os.path.exists(photos[0]):
        raise UsageError(f"没有找到图片{'' if arguments.inputs else ' samples;请在命令里给出几张'}")
    return photos


def run_export(recognizer: Recognizer, arguments: argparse.Namespace) -> int:
    """Write the model's graph where it was asked for, or where later runs look for it."""
    photos = _photos(arguments, 20)
    if arguments.export and (not arguments.export.endswith(".onnx") or os.path.isdir(arguments.export)):
        raise UsageError("--export 后面应是以 .onnx 结尾的文件名;不写文件名时请把 --export 写在最后")
    recognizer = dataclasses.replace(recognizer, engine="torch", device="cpu", dtype="float32")
    engine = recognizer.load()
    recognizer.name = engine.spec["name"]
    path = Path(arguments.export) if arguments.export else recognizer.kept_graph()
    if not arguments.export and "files" not in engine.spec:
        raise UsageError("这个模型没有说明它由哪些文件构成,无法得知权重是否变化;请写明导出的文件名,再用 -m 指定它")
    log.info("正在导出 %s,需要十几秒到一分钟", path)
    with _replacing(path) as folder:
        target = folder / path.name
        if arguments.export:
            difference = export_graph(engine, target, photos)
        else:
            target.mkdir()
            difference = export_graph(engine, target / "graph.onnx", photos, separate_weights=True)
            states = _file_states(str(target / name) for name in sorted(os.listdir(target)))
            states = [[str(path / Path(file).name), *state] for file, *state in states]
            (target / "files.json").write_text(json.dumps(states + _file_states(engine.spec["files"])))
    log.info("已导出 %s,在 %d 张照片上与 torch 的置信度最多相差 %.1g", path, len(photos), difference)
    return 0


@contextlib.contextmanager
def _interruptible(stop: Callable, signals: list[int]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call stop and be noted, instead of ending the process in the midst of a batch."""

    def interrupt(number: int, frame: Any) -> None:
        signals.append(number)
        stop()
        signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress_bar(output: OutputFile | None, count: Callable[[], int | None]) -> Iterator[Callable[[int], None]]:
    """Give a function that moves the bar on by an image; there is one on a terminal that shows no results."""
    if not sys.stderr.isatty() or not log.isEnabledFor(logging.INFO) or (output is None and sys.stdout.isatty()):
        yield lambda failures: None
        return
    with _bar(count(), "张", initial=0 if output is None else len(output.inputs)) as bar:

        def advance(failures: int) -> None:
            bar.set_postfix_str(f"失败 {failures}", refresh=False)
            bar.update()

        yield advance


@contextlib.contextmanager
def _bar(total: int | None, unit: str, initial: int = 0, show: bool = True) -> Iterator[Any]:
    """A tqdm bar that log lines go above."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bar = tqdm(total=total, unit=unit, initial=initial, dynamic_ncols=True, disable=not show)
    with logging_redirect_tqdm([log]) if show else contextlib.nullcontext(), bar:
        yield bar


class _Formatter(logging.Formatter):
    """[INFO], [WARN], [ERROR] and [CACHE HIT] lines."""

    def format(self, record: logging.LogRecord) -> str:
        level = {logging.WARNING: "WARN", CACHE_HIT: "CACHE HIT"}.get(record.levelno, record.levelname)
        return f"[{level}] {printable(record.getMessage())}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Chinese must come out whatever the locale; a file name that is not UTF-8 must not stop the run.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by a daemon
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        arguments = build_parser().parse_args(argv)
        if arguments.quiet:
            log.setLevel(logging.WARNING)
        if arguments.quiet or not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        if arguments.format not in (None, "text"):  # machines read UTF-8, whatever the terminal
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", newline="")
        return run(arguments)
    except ModelError as error:
        log.error("%s", error)
        return error.exit_status
    except KeyboardInterrupt:
        log.error("已中断")
        return 130
    except BrokenPipeError:
        # The reader has seen enough. Python's own flush at exit must not complain; 141 is 128 + SIGPIPE.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        log.error("结果写不进去: %s。已写的都完好,解决后加 --resume 接着做", _one_line(error))
        return 3
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
