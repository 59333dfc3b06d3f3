#!/usr/bin/env python3
"""检查这台机器、这套安装、这个模型能不能用: 逐项打 ✓ 或 ✗,并写明该怎么办。

用法: python check.py [图片 ...] [选项]

  图片                    用这些图片、文件夹或通配符检查(最多 20 张)
                          [自带的 samples]
  -m, --repo, --trust-repo, --weights, --labels, --offline, -d, --dtype,
  -b, -j                  与 infer.py 相同: 检查哪个模型,怎样运行
  -f, --format FMT        text 或 jsonl [text]

示例:
  python check.py -m wwts_cn_lite -d cuda
  python check.py -m 商品.onnx 商品照片/

退出状态: 0 都通过  2 用法错误  3 有一项不通过
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shlex
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import infer
from infer import ModelError, OnnxEngine, Recognizer

import numpy

from checking.installation import device, versions
from export import confidences, find_photos, read_pixels
from wwts import memory
from wwts.torch_engine import REINSTALL, TorchEngine

log = logging.getLogger("wwts")
HERE = Path(__file__).resolve().parent
LITE, BASE = "wwts_cn_lite", "wwts_cn_base"

# The reference package's answers to samples/ with these weights (efficientnet-lite-pytorch 0.1.0).
LITE_ANSWERS = {
    "cat.jpg": (285, "埃及猫", 0.579),
    "coffee.jpg": (967, "浓缩咖啡", 0.878),
    "palace.jpg": (698, "宫殿", 0.399),
    "tripod.jpg": (872, "三脚架", 0.615),
}
# Milliseconds for one image with torch: CPU, measured on 2 cores; CUDA, estimated from the number of kernels launched.
USUAL_LATENCY = {(LITE, "cpu"): 40, (BASE, "cpu"): 250, (LITE, "cuda"): 10, (BASE, "cuda"): 25}
BROKEN = "权重、标签、预处理或机器有问题: 请先看以上各行,再重新安装 requirements.txt"


class Skipped(Exception):
    """A check that cannot be made here, and why."""


@dataclasses.dataclass
class Context:
    """What the checks look at; the engine and the precision of its answers are known once the model is loaded."""

    recognizer: Recognizer
    photos: list[str]
    options: str
    engine: Any = None
    tolerance: float = 1e-3

    @functools.cached_property
    def pixels(self) -> list[numpy.ndarray]:
        """The photos, preprocessed."""
        return list(read_pixels(self.photos, self.engine.spec))

    @functools.cached_property
    def rows(self) -> numpy.ndarray:
        """N×classes confidences of the photos."""
        return confidences(self.engine, self.pixels)


def agree(ours: numpy.ndarray, theirs: numpy.ndarray, tolerance: float, remedy: str) -> str:
    """The largest difference of two arrays of confidences; raises ModelError if it or a top-1 is off."""
    difference = float(abs(ours - theirs).max())
    found = f"置信度最多相差 {difference:.1g}"
    if difference > tolerance or (tolerance < 0.01 and (ours.argmax(1) != theirs.argmax(1)).any()):
        raise ModelError(f"{found}(应不超过 {tolerance:g})。{remedy}")
    return found


# Each check returns what it found, raises Skipped, or raises what is wrong.


def weights(context: Context) -> str:
    """The model loads; its file has the SHA-256 that was published, or that an earlier check recorded."""
    context.engine = context.recognizer.load()
    if str(getattr(context.engine, "dtype", "")).endswith("float16"):  # bfloat16 too
        context.tolerance = 0.03
    files = getattr(context.engine, "files", {context.recognizer.model: None})
    if not files:
        raise Skipped("这个模型没有说明权重在哪个文件里")
    path = next(iter(files))
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    found = f"{path},{os.path.getsize(path) / 1e6:.1f} MB,SHA-256 {sha256}"
    known, where = getattr(getattr(context.engine, "model", None), "spec", {}).get("published_sha256"), "公布的"
    key, remedy = f"checked-{infer.digest(path)[:16]}", "请重新安装或下载"
    if not known:
        known, where = (memory.recall(key) or {}).get("sha256"), "上次检查时"
        remedy = f"不是您换的就{remedy};是您换的,请删除 {infer.cache_folder() / key}.json"
    if not known:
        memory.remember(key, {}, sha256=sha256)
        return f"{found},没有公布的值可比,{'已记下供下次比较' if memory.recall(key) else '也没能记下'}"
    if sha256 != known:
        raise ModelError(f"{found},与{where}不同。{remedy}")
    return f"{found},与{where}一致"


def parameters(context: Context) -> str:
    """All are finite, also in the precision that the engine computes in."""
    if isinstance(context.engine, OnnxEngine):
        raise Skipped("ONNX 的参数在图里")
    state = context.engine.model.state_dict()
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ModelError(f"{len(bad)} 组参数含有 NaN 或无穷大,第一组是 {bad[0]}。请重新下载权重,或用 --dtype float32")
    return f"{sum(value.numel() for value in state.values()):,} 个参数和统计量都是有限数"


def labels(context: Context) -> str:
    """One for each output, none empty, none twice; of base's many names twice the number is told."""
    spec = context.engine.spec
    empty, twice = sum(not label.strip() for label in spec.labels), len(spec.labels) - len(set(spec.labels))
    found = f"{len(spec.labels):,} 个标签,{spec.num_classes:,} 个输出,空名 {empty} 个,重名 {twice} 个"
    if empty or (twice and spec.name != BASE):
        raise ModelError(f"{found}。请换用与权重配套的标签文件")
    return found


def preprocessing(context: Context) -> str:
    """The pixels are the very numbers that torchvision.transforms gives."""
    try:
        import torch
        from torchvision import transforms
    except ImportError as error:
        if context.recognizer.model_is_file:
            raise Skipped("没有 torch 和 torchvision 可比") from error
        raise
    spec = context.engine.spec
    interpolation = transforms.InterpolationMode(spec.interpolation)
    crop = transforms.Compose([transforms.Resize(spec.resize, interpolation), transforms.CenterCrop(spec.crop)])
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    for photo, pixels in zip(context.photos, context.pixels, strict=True):
        with infer.open_image(photo) as file:
            image = crop(infer.decode_image(file))
        same = numpy.array_equal(numpy.asarray(image), pixels)
        if isinstance(context.engine, TorchEngine):
            ours = context.engine.normalize(numpy.stack([pixels]))[0].cpu()
            same = same and torch.equal(ours, normalize(image))
        if not same:
            raise ModelError(f"{photo} 预处理之后与 torchvision 的不同。请运行: pip install --force-reinstall pillow")
    return f"{len(context.photos)} 张照片与 torchvision 逐位相同"


def samples(context: Context) -> str:
    """Lite recognises the samples as the reference package does; of any other model the answers differ."""
    rows = context.rows
    spec, names = context.engine.spec, [os.path.basename(photo) for photo in context.photos]
    shown = [f"{name} {spec.labels[row.argmax()]} {row.max():.3f}" for name, row in zip(names, rows, strict=True)]
    found = ",".join(shown[:8])
    ours = all(Path(photo).parent == HERE / "samples" for photo in context.photos)
    if spec.name == LITE and ours:
        for row, (index, label, confidence) in zip(rows, map(LITE_ANSWERS.get, names), strict=True):
            known = label if context.recognizer.labels is None else spec.labels[index]
            if spec.labels[row.argmax()] != known or abs(row[index] - confidence) > max(context.tolerance, 5e-3):
                raise ModelError(f"{found};应有 {label} {confidence}。{BROKEN}")
    elif any(row.max() == row.min() for row in rows):
        raise ModelError(f"{found};每一类的置信度都相等。{BROKEN}")
    elif len(rows) > 1 and len({row.tobytes() for row in rows}) == 1:
        raise ModelError(f"{found};各图的结果一模一样。{BROKEN}")
    return found


def batches(context: Context) -> str:
    """An image gets the same answer alone and among others."""
    alone = numpy.concatenate([confidences(context.engine, [pixels]) for pixels in context.pixels[:2]])
    among = confidences(context.engine, [*context.pixels, *context.pixels])[: len(alone)]
    return agree(alone, among, context.tolerance, "这个模型的答案取决于同批的图片,或者机器有问题。" + REINSTALL)


def twice(context: Context) -> str:
    """The same batch gets the same answer again."""
    again = confidences(context.engine, context.pixels)
    return agree(context.rows, again, 1e-6, "同样的输入结果不稳定,内存或显卡可能有故障,建议换一台机器")


def cuda(context: Context) -> str:
    """CPU and CUDA agree in float32."""
    if not context.engine.device_name.startswith("cuda") or isinstance(context.engine, OnnxEngine):
        raise Skipped("没有用 torch 在 CUDA 上运行")
    settings = {"model": context.engine.spec.name, "engine": "torch", "dtype": "float32"}
    both = (
        dataclasses.replace(context.recognizer, **settings, device=name) for name in ("cpu", str(context.engine.device))
    )
    rows = [confidences(recognizer.load(), context.pixels) for recognizer in both]
    return agree(*rows, 1e-3, "显卡或驱动可能有故障,建议换一台机器")


def onnx(context: Context) -> str:
    """The exported graph agrees with torch on the CPU."""
    if isinstance(context.engine, OnnxEngine):
        raise Skipped("正在检查的就是 ONNX")
    export = f"python export.py{context.options or f' -m {context.engine.spec.name}'}"
    graph = memory.kept_graph(context.engine.spec.name, context.engine.version)
    if not graph.is_file():
        raise Skipped(f"{context.engine.spec.name} 的这一版还没有导出为 ONNX,请运行: {export}")
    given = confidences(OnnxEngine(graph), context.pixels)
    return agree(context.rows, given, context.tolerance, f"请重新导出: {export}")


def speed(context: Context) -> str:
    """Time of one image and of batches, against what is usual for model and device."""
    engine, batch = context.engine, (context.pixels * 64)[: context.recognizer.batch_size]

    def milliseconds(images: list[numpy.ndarray], times: int) -> list[float]:
        seconds = timeit.repeat(lambda: engine.classify(images, 5), number=1, repeat=times + 3)
        return sorted(1000 * value for value in seconds[3:])  # the first ones allocate and plan

    alone, together = milliseconds(context.pixels[:1], 20), milliseconds(batch, 5)
    found = f"单张 {alone[10]:.1f} 毫秒,每批 {len(batch)} 张时 {1000 * len(batch) / together[2]:.1f} 张/秒"
    usual = USUAL_LATENCY.get((context.engine.spec.name, context.engine.device_name.partition(":")[0]))
    if usual and alone[0] > 10 * usual:  # the best, since others may use the machine too
        raise ModelError(f"{found};单张通常约 {usual} 毫秒。请看有没有别的程序在用处理器或显卡,或换一台机器")
    return found + (f"(单张通常约 {usual} 毫秒)" if usual else "")


CHECKS: list[tuple[str, Callable[[Context], str]]] = [
    ("版本", versions), ("设备", device), ("权重", weights), ("参数", parameters),
    ("标签", labels), ("预处理", preprocessing), ("示例图片", samples), ("单张与成批", batches),
    ("同一批两次", twice), ("CPU 与 CUDA", cuda), ("torch 与 ONNX", onnx), ("速度", speed),
]  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Examine machine, installation and model, a line each; exit status 3 if anything is wrong."""
    photos = find_photos(arguments.photos, 20)
    engine = "auto" if str(arguments.model).endswith(".onnx") else "torch"
    recognizer = infer.build_recognizer(arguments, engine=engine)
    names = ("model", "repo", "weights", "labels")
    options = "".join(f" --{n} {shlex.quote(getattr(recognizer, n))}" for n in names if getattr(recognizer, n))
    context = Context(recognizer, photos, options)
    marks = {"ok": "✓", "failed": "✗", "skipped": "- 跳过"}
    counts = dict.fromkeys(marks, 0)
    for title, check in CHECKS:
        try:
            if context.engine is None and check not in (versions, device, weights):
                raise Skipped("模型没有加载")
            status, detail = "ok", check(context)
        except Skipped as reason:
            status, detail = "skipped", str(reason)
        except ModelError as error:
            status, detail = "failed", str(error)
        except Exception as error:  # a broken installation raises anything
            status, detail = "failed", f"{type(error).__name__}: {infer.one_line(error)}。{REINSTALL}"
        counts[status] += 1
        name = context.engine.spec.name if context.engine else None
        if arguments.format == "jsonl":
            record = {"check": check.__name__, "status": status, "detail": detail, "model": name}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            print(f"{marks[status]} {title}: {infer.printable(detail)}", flush=True)
    log.info("%s: %d 项通过,%d 项不通过,%d 项跳过", name or "模型没有加载", *counts.values())
    return 3 if counts["failed"] else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = infer.Parser("check.py", __doc__)
    infer.add_model_options(parser, leave_out=("engine", "draft"))
    parser.add_argument("photos", nargs="*")
    parser.add_argument("-f", "--format", choices=["text", "jsonl"])
    return infer.run_command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
