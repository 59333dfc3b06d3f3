#!/usr/bin/env python3
"""测速: 在这台机器上用户要等多久、要付多少钱。

用法: python bench.py [图片 ...] [选项],如 python bench.py -m wwts_cn_lite

  图片                    用这些图片、文件夹或通配符测 [自带的 samples]
  --price-per-hour YUAN   机器每小时的价钱(元),折算每千张的费用
  -m, --repo, --trust-repo, --weights, --labels, --offline, -d, --dtype,
  --engine, -b, -j        与 infer.py 相同: 测哪个模型,怎样运行
  -f, --format FMT        text 或 jsonl [text]
  -q, --quiet             不显示 [INFO] 信息

退出状态: 0 测完  2 用法错误  3 模型不可用
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import timeit
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import infer
from infer import ModelError, OnnxEngine, Recognizer, Spec, UsageError

from export import find_photos, read_pixels
from wwts import torch_engine
from wwts.torch_engine import TorchEngine


def cold_start(recognizer: Recognizer, photo: str) -> float:
    """Seconds from the start of a process to its first answer; raises ModelError if it gives none."""
    options = ("model", "repo", "weights", "labels", "device", "dtype", "engine")
    command = [f"--{name}={getattr(recognizer, name)}" for name in options if getattr(recognizer, name)]
    command += ["--trust-repo"] * recognizer.trust_repo + ["--offline"] * recognizer.offline
    command = [sys.executable, Path(__file__).resolve().with_name("infer.py"), "-q", *command, "--", photo]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        errors = result.stderr.decode(errors="replace").strip().splitlines() or [f"退出状态 {result.returncode}"]
        raise ModelError(f"冷启动失败: {errors[-1].removeprefix('[ERROR] ')}")
    return seconds


def latencies(engine: TorchEngine | OnnxEngine, pixels: list) -> list[float]:
    """Milliseconds that one image takes, sorted, after a few to warm up."""
    seconds = timeit.repeat(lambda: engine.classify(pixels[:1], 5), number=1, repeat=25)
    return sorted(1000 * value for value in seconds[5:])


def rate(work: Callable[[], int]) -> float:
    """What work does in a second, as it counts itself."""
    work()  # the first time allocates and plans
    start, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < 1:
        done += work()
    return done / seconds


def decode_rate(photos: list[str], spec: Spec, workers: int) -> float:
    """Photos decoded and prepared in a second."""
    with ThreadPoolExecutor(workers) as pool:
        return rate(lambda: sum(map(len, pool.map(lambda photo: list(read_pixels([photo], spec)), photos))))


def measure(recognizer: Recognizer, photos: list[str], price: float | None) -> Iterator[tuple[str, float, str]]:
    """Name, value and unit of each measurement."""
    engine = recognizer.load()
    pixels = list(read_pixels(photos[:64], engine.spec))
    on_cuda = engine.device_name.startswith("cuda")
    yield "冷启动到第一个答案", cold_start(recognizer, photos[0]), "秒"
    milliseconds = latencies(engine, pixels)
    yield "单张延迟 p50", milliseconds[len(milliseconds) // 2], "毫秒"
    yield "单张延迟 p95", milliseconds[int(len(milliseconds) * 0.95)], "毫秒"
    rates = []
    for size in [1, 2, 4, 8, 16] + [32, 64, 128, 256] * on_cuda:
        batch = list(itertools.islice(itertools.cycle(pixels), size))
        rates.append(rate(lambda batch=batch: len(engine.classify(batch, recognizer.topk)[0])))
        yield f"模型计算,每批 {size} 张", rates[-1], "张/秒"
    many = list(itertools.islice(itertools.cycle(photos), 256))
    decoded = decode_rate(many[:64], engine.spec, recognizer.workers)
    yield f"解码和缩放,{recognizer.workers} 个线程", decoded, "张/秒"
    with tempfile.TemporaryDirectory() as folder:
        large = os.path.join(folder, "large.jpg")
        with infer.open_image(photos[0]) as file:
            infer.decode_image(file).resize((4032, 3024)).save(large, quality=90)  # as phones take them
        for draft in (False, True):
            spec = dataclasses.replace(engine.spec, draft=draft)
            figure = decode_rate([large] * recognizer.workers, spec, recognizer.workers)
            limit = ",受限于解码" if figure < max(rates) else ""
            yield f"1,200 万像素,解码和缩放{'(--draft)' * draft}{limit}", figure, "张/秒"
    end_to_end = rate(lambda: sum(1 for _ in recognizer.stream(many)))
    limit = "解码" if decoded < max(rates) else "模型计算"
    yield f"端到端(解码、缩放、计算),受限于{limit}", end_to_end, "张/秒"
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        yield "内存峰值", peak, "MiB"
    if on_cuda:
        yield "显存峰值", torch_engine.import_torch().cuda.max_memory_allocated() / 2**20, "MiB"
    if price is not None:
        yield "每千张费用", price / 3600 / end_to_end * 1000, "元"


def run(arguments: argparse.Namespace) -> int:
    """Print the table of what was measured."""
    price = arguments.price_per_hour
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UsageError(f"--price-per-hour 应为不小于 0 的数,而不是 {price}")
    photos = find_photos(arguments.photos, 1000)
    recognizer = infer.build_recognizer(arguments)
    engine = recognizer.load()
    as_json = arguments.format == "jsonl"
    identity = {"model": engine.spec.name, "version": engine.version, "device": engine.device_name}
    title = "" if as_json else f"{engine.spec.name}(版本 {engine.version}),{engine.device_name}\n"
    for name, value, unit in measure(recognizer, photos, price):
        row = identity | {"measurement": name, "value": value, "unit": unit}
        width = 44 - sum(unicodedata.east_asian_width(c) in "WF" for c in name)
        text = json.dumps(row, ensure_ascii=False) if as_json else f"{name:<{width}}{value:>12.4g} {unit}"
        print(f"{title}{text}", flush=True)
        title = ""
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = infer.Parser("bench.py", __doc__)
    infer.add_model_options(parser, leave_out=("draft",))
    parser.add_argument("photos", nargs="*")
    parser.add_argument("--price-per-hour", type=float)
    parser.add_argument("-f", "--format", choices=["text", "jsonl"])
    return infer.run_command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
