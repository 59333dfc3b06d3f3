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
import contextlib
import csv
import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import os
import queue
import re
import stat
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

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

DTYPES = ("auto", "float32", "float16", "bfloat16")

log = logging.getLogger("wwts")


class ModelError(Exception):
    """Model, weights, labels or device cannot be used; the message says what to do."""

    exit_status = 3


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

    def record(self) -> dict[str, Any]:
        """The JSON-able record that is written to JSONL."""
        record: dict[str, Any] = {"path": self.path, "model": self.model}
        if self.error is not None:
            return record | {"error": self.error}
        return record | {"results": [dataclasses.asdict(prediction) for prediction in self.predictions]}


# ---------------------------------------------------------------- images


def read_image(path: str | os.PathLike) -> Image.Image:
    """Decode an image file into an RGB ``PIL.Image``: first frame, upright, transparency over white.

    Raises ``OSError`` for what is not a readable regular file, and whatever Pillow raises for a file
    that is broken, truncated, of an unknown format or beyond its decompression-bomb limit.
    """
    from PIL import Image, ImageOps

    # Pillow only warns between once and twice its limit; phones take such photos.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would block for ever
        raise OSError("是文件夹" if os.path.isdir(path) else "不是普通文件")
    with open(path, "rb") as file, Image.open(file) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


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
    return image.convert("RGB")


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
    short = min(width, height)
    width, height = (resize if side == short else int(resize * side / short) for side in (width, height))
    image = image.resize((width, height), Image.Resampling[spec["interpolation"].upper()])
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return numpy.asarray(image.crop((left, top, left + crop, top + crop)))


def describe_image_error(error: Exception) -> str:
    """Say in Chinese, in one line, why an image could not be read."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "无法识别的图像格式,或文件已损坏"
    if isinstance(error, Image.DecompressionBombError):
        return f"图像过大,超过 {2 * Image.MAX_IMAGE_PIXELS:,} 像素"
    if isinstance(error, FileNotFoundError):
        return "文件不存在"
    if isinstance(error, PermissionError):
        return "没有读取权限"
    if isinstance(error, OSError) and error.strerror is None and not error.args:
        return "无法读取图像"
    if isinstance(error, OSError) and "truncated" in str(error):
        return f"图像文件不完整: {error}"
    if isinstance(error, MemoryError):
        return "内存不足,无法解码"
    return f"无法读取图像: {' '.join(str(error).split()) or type(error).__name__}"


# ---------------------------------------------------------------- labels


def read_labels(path: str | os.PathLike) -> list[str]:
    """Read labels: a JSON list, a JSON object of index → name, a text of a name a line, or a meta_info.txt.

    Raises ModelError when the file cannot be read or its shape is none of these.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
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
    except (OSError, ValueError) as error:
        raise ModelError(f"标签文件 {path} 无法读取: {error}") from error
    if not all(isinstance(label, str) for label in labels) or not any(labels):
        raise ModelError(f"标签文件 {path} 应是一组名称(JSON 列表、JSON 对象、每行一个名称的文本或 meta_info.txt)")
    return labels


# ---------------------------------------------------------------- models from torch.hub repositories


def import_torch() -> Any:
    """Import torch, or raise ModelError with the pip line that mends the installation."""
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
    # What other people's hub code prints must not get among the results on standard output.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            sys.path.insert(0, str(folder))
            try:
                module_spec = importlib.util.spec_from_file_location("hubconf", folder / "hubconf.py")
                module = importlib.util.module_from_spec(module_spec)
                module_spec.loader.exec_module(module)
                entries = [entry for entry in dir(module) if callable(getattr(module, entry)) and entry[0] != "_"]
                if name not in entries:
                    nearest = difflib.get_close_matches(name, entries, 1, cutoff=0)
                    raise ModelError(
                        f"没有名为 {name} 的模型。{folder} 提供: {', '.join(entries)}"
                        + (f"。最接近的是 {nearest[0]}" if nearest else "")
                    )
                entry = getattr(module, name)
                parameters = inspect.signature(entry).parameters
                arguments: dict[str, Any] = {}
                # torchvision's convention; without it (or its older form) a network comes untrained.
                if "weights" in parameters:
                    arguments["weights"] = weights or "DEFAULT"
                elif weights:
                    raise UsageError(f"模型 {name} 的入口不接受 --weights")
                elif "pretrained" in parameters:
                    arguments["pretrained"] = True
                if "offline" in parameters and offline:
                    arguments["offline"] = True
                model = entry(**arguments)
            finally:
                sys.path.remove(str(folder))
        except ModelError:
            raise
        except (FileNotFoundError, ConnectionError) as error:
            if repo is None:
                raise
            raise ModelError(f"模型 {name} 加载失败: {error}") from error
        except Exception as error:  # a repository's code may raise anything
            if "torchvision::" in str(error):
                raise ModelError(
                    f"torch 与 torchvision 版本不匹配({_one_line(error)})。"
                    "请运行: pip install --force-reinstall torch torchvision"
                ) from error
            if isinstance(error, ModuleNotFoundError):
                raise ModelError(f"模型 {name} 需要 {error.name},请运行: pip install {error.name}") from error
            raise ModelError(f"模型 {name} 加载失败: {_one_line(error)}") from error
    return model


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
        self.spec = {"name": name} | CLASSIC_SPEC | getattr(model, "spec", {})
        if self.spec["crop"] > self.spec["resize"]:
            raise ModelError(f"模型 {name} 的 spec 有误: crop {self.spec['crop']} 大于 resize {self.spec['resize']}")
        if "num_classes" not in self.spec:
            self.spec["num_classes"] = self._count_classes()
        self.spec["labels"] = self._labels(labels)
        self._mean, self._std = (
            torch.tensor(self.spec[key], device=self.device).view(1, 3, 1, 1) for key in ("mean", "std")
        )

    def normalize(self, batch: numpy.ndarray) -> torch.Tensor:
        """Turn N×H×W×3 uint8 into N×3×H×W float32 on the device: torchvision's ToTensor and Normalize."""
        import torch

        pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)

    def classify(self, batch: list[numpy.ndarray], topk: int) -> list[list[tuple[int, float]]]:
        """Run the network on preprocessed images; give (index, confidence) of the top-k of each.

        An image whose confidences are not finite gets an empty list.
        """
        import numpy
        import torch

        with torch.inference_mode(), self._out_of_memory():
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
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
            raise ModelError("模型的输出不是 N×类别数 的张量,它不是图像分类模型")
        return logits

    def _count_classes(self) -> int:
        import torch

        with torch.inference_mode(), self._out_of_memory():
            return self._forward(torch.zeros(1, 3, self.spec["crop"], self.spec["crop"], device=self.device)).shape[1]

    def _labels(self, labels: list[str] | None) -> list[str]:
        num_classes = self.spec["num_classes"]
        if labels is None:
            labels = self.spec.get("labels")
        if labels is None and num_classes == 1000:
            labels = read_labels(HERE / "labels_zh.json")
        if labels is None:
            raise ModelError(f"模型有 {num_classes} 个输出,但没有自带标签,请用 --labels 指定标签文件")
        if len(labels) != num_classes:
            raise ModelError(f"标签有 {len(labels)} 个,而模型有 {num_classes} 个输出,两者必须相等")
        return labels

    @contextlib.contextmanager
    def _out_of_memory(self) -> Iterator[None]:
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{self.device_name} 显存不足。请关闭占用显存的程序(nvidia-smi 查看),或改用 --dtype float16、-d cpu"
            ) from error


# ---------------------------------------------------------------- recognizer


class Recognizer:
    """Recognises images with one model; loads it when first used, so it can be pickled and shipped before.

    Args:
        model: entry point of the hub repository; None means wwts_cn_base, or wwts_cn_lite with a warning
            where base's weights are not to be had.
        repo: torch.hub repository, a folder or OWNER/NAME[:REF]; None means the folder of this file.
        trust_repo: allow code of a remote repository to run.
        weights: file or folder of weights, passed to the entry point.
        labels: file of labels that replace the model's own; see read_labels.
        offline: never touch the network.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto (float16 on CUDA, else float32), float32, float16 or bfloat16.
        topk: how many predictions a result has at most.
        threshold: least confidence (0 to 1) of a prediction.
        batch_size, workers: images per forward pass, decoding threads.

    Raises ModelError, when first used, if the model, its weights or labels, or the device are unusable.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        repo: str | None = None,
        trust_repo: bool = False,
        weights: str | os.PathLike | None = None,
        labels: str | os.PathLike | None = None,
        offline: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        topk: int = 5,
        threshold: float = 0.0,
        batch_size: int = 8,
        workers: int | None = None,
    ):
        self.model = model
        self.repo, self.trust_repo = repo, trust_repo
        self.weights = None if weights is None else os.fspath(weights)
        self.labels, self.offline = labels, offline or os.environ.get("WWTS_OFFLINE", "0") not in ("", "0")
        self.device, self.dtype = device, dtype
        self.topk, self.threshold = topk, threshold
        self.batch_size, self.workers = batch_size, workers or min(os.cpu_count() or 1, 16)
        self._engine: TorchEngine | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None}

    def load(self) -> TorchEngine:
        """Load model and labels unless that is done, and return the engine."""
        if self._engine is None:
            labels = None if self.labels is None else read_labels(self.labels)
            import_torch()
            model = self._load_model()
            self._engine = TorchEngine(model, self.model, labels, self.device, self.dtype)
        return self._engine

    def _load_model(self) -> torch.nn.Module:
        source = (self.repo, self.trust_repo, self.weights, self.offline)
        name = self.model or DEFAULT_MODEL
        try:
            model = load_hub_model(name, *source)
        except (FileNotFoundError, ConnectionError) as error:
            if self.model is not None or self.weights is not None:
                raise ModelError(_one_line(error)) from error
            log.warning("%s。本次改用 %s(1,000 类)", error, FALLBACK_MODEL)
            name = FALLBACK_MODEL
            try:
                model = load_hub_model(name, *source)
            except FileNotFoundError as missing:
                raise ModelError(_one_line(missing)) from missing
        self.model = name
        return model

    def __call__(self, image: str | os.PathLike | Image.Image) -> Result:
        """Recognise one file or PIL image. A file that cannot be read gives a Result with ``error`` set."""
        return next(self.stream([image]))

    def stream(self, images: Iterable[str | os.PathLike | Image.Image]) -> Iterator[Result]:
        """Recognise any number of files or PIL images in constant memory; results come in input order.

        Decoding runs in ``workers`` threads beside the engine. A batch is run when it is full, or when
        the input has nothing more to give at the moment.
        """
        engine = self.load()
        prepared: queue.Queue[Future | None] = queue.Queue(2 * self.batch_size + self.workers)
        stopped = threading.Event()
        with ThreadPoolExecutor(self.workers) as pool:

            def put(item: Future | None) -> None:
                while not stopped.is_set():
                    with contextlib.suppress(queue.Full):
                        return prepared.put(item, timeout=0.1)

            def feed() -> None:
                try:
                    for image in images:
                        put(pool.submit(self._prepare, image, engine))
                        if stopped.is_set():
                            return
                    put(None)
                except BaseException as error:  # handed over to the thread that asked for results
                    failed: Future = Future()
                    failed.set_exception(error)
                    put(failed)

            threading.Thread(target=feed, daemon=True).start()
            try:
                for batch in _batches(prepared, self.batch_size):
                    yield from self._classify(batch, engine)
            finally:
                stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, image: Any, engine: TorchEngine) -> tuple[str, numpy.ndarray | None, str | None]:
        """Path, preprocessed pixels, error: one of the last two is None."""
        from PIL import Image

        if isinstance(image, Image.Image):
            return getattr(image, "filename", "") or "", preprocess(to_rgb(image), engine.spec), None
        path = os.fspath(image)
        try:
            return path, preprocess(read_image(path), engine.spec), None
        except Exception as error:  # a broken file can make a decoder raise anything: one record, no more
            return path, None, describe_image_error(error)

    def _classify(
        self, batch: list[tuple[str, numpy.ndarray | None, str | None]], engine: TorchEngine
    ) -> Iterator[Result]:
        pixels = [pixels for _, pixels, _ in batch if pixels is not None]
        answers = iter(engine.classify(pixels, self.topk) if pixels else ())
        labels = engine.spec["labels"]
        for path, pixels, error in batch:
            if pixels is None:
                yield Result(path, self.model, error=error)
                continue
            answer = next(answers)
            if not answer:
                yield Result(path, self.model, error="模型输出了 NaN 或无穷大,结果不可信;可改用 --dtype float32")
                continue
            kept = tuple(Prediction(labels[index], p, index) for index, p in answer if p >= self.threshold)
            yield Result(path, self.model, kept)


def _batches(prepared: queue.Queue, size: int) -> Iterator[list]:
    """Lists of results of the futures in a queue that ends with None; waits for no input that is late."""
    batch: list = []
    while True:
        try:
            future = prepared.get(timeout=0.05) if batch else prepared.get()
        except queue.Empty:
            yield batch
            batch = []
            continue
        if future is None:
            break
        batch.append(future.result())
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---------------------------------------------------------------- writers


class TextWriter:
    """The block that people read: results to standard output, the name of the image to standard error."""

    def __init__(self, file: TextIO, topk: int):
        self.file = file

    def write(self, result: Result) -> None:
        if result.error is not None:
            log.error("%s: %s", printable(result.path), printable(result.error))
            return
        log.info("输入图像: %s", printable(result.path))
        lines = [f" - {printable(p.label)} (置信度: {p.confidence:.2f})" for p in result.predictions]
        print("[RESULT] 识别结果:", *(lines or [" (没有达到阈值的标签)"]), sep="\n", file=self.file, flush=True)


class JsonlWriter:
    """One JSON object a line."""

    def __init__(self, file: TextIO, topk: int):
        self.file = file

    def write(self, result: Result) -> None:
        text = json.dumps(result.record(), ensure_ascii=False, allow_nan=False)
        print(text, file=self.file, flush=True)


class CsvWriter:
    """One row an image, for Excel: path, model, label_1, confidence_1, …, error."""

    def __init__(self, file: TextIO, topk: int):
        self.file, self.topk = file, topk
        self.rows = csv.writer(file, lineterminator="\r\n")
        columns = [f"{name}_{rank}" for rank in range(1, topk + 1) for name in ("label", "confidence")]
        file.write("\ufeff")  # without this mark Excel shows Chinese as garbage
        self.rows.writerow(["path", "model", *columns, "error"])

    def write(self, result: Result) -> None:
        cells = [cell for p in result.predictions for cell in (p.label, p.confidence)]
        padding = [""] * (2 * self.topk - len(cells))
        self.rows.writerow([result.path, result.model, *cells, *padding, result.error or ""])
        self.file.flush()


WRITERS = {"text": TextWriter, "jsonl": JsonlWriter, "csv": CsvWriter}


def printable(text: str) -> str:
    """Escape control characters, so that a file name or label cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# ---------------------------------------------------------------- command line

EPILOG = """\
示例:
  python infer.py samples/cat.jpg                       识别一张图片
  python infer.py -m wwts_cn_lite -k 3 a.jpg b.png      指定模型,每张 3 个标签
  python infer.py -f csv *.jpg > 结果.csv               Excel 可直接打开
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
            message += f"。是不是想用 {nearest[0]}?" if nearest else ""
        raise UsageError(f"{message}。用法见: python infer.py --help")


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
    add("inputs", metavar="图片", nargs="+", help="图片文件")
    add = parser.add_argument_group("模型").add_argument
    add("-m", "--model", metavar="NAME", help=f"模型入口名 [{DEFAULT_MODEL},没有权重时 {FALLBACK_MODEL}]")
    add("--repo", metavar="REPO", help="torch.hub 仓库: 文件夹或 OWNER/NAME[:REF] [infer.py 所在文件夹]")
    add("--trust-repo", action="store_true", help="允许运行远程仓库的代码")
    add("--weights", metavar="PATH", help="权重文件,或含 pytorch_model.pt 和 meta_info.txt 的文件夹")
    add("--labels", metavar="FILE", help="改用这个标签文件(JSON、每行一个的文本或 meta_info.txt)")
    add("--offline", action="store_true", help="不访问网络(同环境变量 WWTS_OFFLINE=1)")
    add("-d", "--device", metavar="DEV", type=_device, default="auto", help="auto、cpu、cuda、cuda:N、mps [auto]")
    add("--dtype", metavar="TYPE", choices=DTYPES, default="auto", help=f"{'、'.join(DTYPES)} [auto: CUDA 用 float16]")
    add = parser.add_argument_group("输出").add_argument
    add("-k", "--topk", metavar="N", type=_at_least(int, 1), default=5, help="每张图最多几个标签 [5]")
    add("-t", "--threshold", metavar="P", type=_at_least(float, 0, 1), default=0.0, help="最低置信度 [0]")
    add("-f", "--format", metavar="FMT", choices=list(WRITERS), default="text", help="text、jsonl、csv [text]")
    add("-q", "--quiet", action="store_true", help="不显示 [INFO] 信息和进度")
    add("--version", action="version", version=_versions(), help="显示版本")
    add("-h", "--help", action="help", help="显示本说明")
    return parser


def _versions() -> str:
    versions = [f"infer.py {__version__}", f"Python {sys.version.split()[0]}"]
    for package in ("torch", "torchvision", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(versions)


def run(arguments: argparse.Namespace) -> int:
    """Recognise everything that was asked for; return the exit status."""
    recognizer = Recognizer(
        arguments.model,
        repo=arguments.repo,
        trust_repo=arguments.trust_repo,
        weights=arguments.weights,
        labels=arguments.labels,
        offline=arguments.offline,
        device=arguments.device,
        dtype=arguments.dtype,
        topk=arguments.topk,
        threshold=arguments.threshold,
    )
    engine = recognizer.load()
    log.info("加载模型完成,使用设备: %s", engine.device_name)
    writer = WRITERS[arguments.format](sys.stdout, arguments.topk)
    failures = 0
    for result in recognizer.stream(arguments.inputs):
        writer.write(result)
        failures += result.error is not None
    return 1 if failures else 0


class _StderrHandler(logging.StreamHandler):
    """[INFO], [WARN] and [ERROR] lines on standard error."""

    def format(self, record: logging.LogRecord) -> str:
        return f"[{'WARN' if record.levelname == 'WARNING' else record.levelname}] {record.getMessage()}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Chinese must come out whatever the locale; a file name that is not UTF-8 must not stop the run.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    handler = _StderrHandler(sys.stderr)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        arguments = build_parser().parse_args(argv)
        if arguments.quiet:
            log.setLevel(logging.WARNING)
        if arguments.quiet or not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        if arguments.format != "text":
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
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
