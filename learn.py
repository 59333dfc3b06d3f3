#!/usr/bin/env python3
"""用自己的照片学习自己的类别,得到 infer.py 能用的模型: 网络不变,只换最后一层。

先安装: pip install safetensors(再装 onnx onnxscript onnxruntime 会快几倍)

用法: python learn.py 照片 [照片 ...] -o 模型.safetensors [选项]

  照片                    文件夹: 每个子文件夹是一类,其名称就是标签;或 CSV 文件:
                          path,label 两列(UTF-8 或 GBK),补充或改正前者
  -o, --output FILE       学到的模型,文件名以 .safetensors 结尾
  --test FOLDER           用别处拍的照片(同样每类一个子文件夹)检验
  --report FILE.json      把报告也写成 JSON
  --finetune [EPOCHS]     接着训练整个网络 [5 轮],需要显卡或耐心
  --resume                接着做中断了的 --finetune
  选模型、设备、线程等的选项与 infer.py 相同,见 python infer.py --help

示例:
  python learn.py 商品 改正.csv --test 别家店 -o 商品.safetensors
  python infer.py -m 商品.safetensors 新照片 -o 结果.csv

退出状态: 0 已学好  2 用法错误  3 模型不可用或写不进去  130 被中断
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import sqlite3
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import infer

import numpy
from PIL import Image, ImageOps

import export

log = logging.getLogger("wwts")
WORTH_EXPORTING = 200  # photos, whose features regain the time that exporting the network takes
# This share of the photos, but 50 at least and 1,000 at most, is looked at again, mirrored and so much nearer.
SECOND_LOOKS, LEAST, MOST, NEARER = 0.15, 50, 1000, 1.2
SHRINKAGE = 0.2  # of the covariance; from 0.1 to 0.5 hardly anything changes (docs/学习.md)
# Photos of a category that are this alike (cosine), or were taken so few seconds apart, show one thing once.
FOLDS, ALIKE, SECONDS = 5, 0.92, 60
CHUNK = 1024  # rows that are computed with at a time
# Training: photos a step, rates of the head and of the rest for so many steps, shares of a photo that are cut out.
BATCH, RATES, MANY_STEPS, CROP_AREA = 16, (1e-3, 2e-4), 800, (0.35, 1)


# ---------------------------------------------------------------- which photos


def read_table(path: str) -> dict[str, str]:
    """Path → label of a CSV file, whose paths start at the current folder or at its own; raises UsageError."""
    labels = {}
    try:
        data = Path(path).read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("gb18030", "replace")  # as Excel saves it
        rows = csv.DictReader(io.StringIO(text, newline=""))
        for row in rows:
            photo, label = row["path"] or "", (row["label"] or "").strip()
            if not photo or not label:
                raise infer.UsageError(f"{path} 第 {rows.line_num} 行缺少 path 或 label")
            names = (photo, infer.unescape_cell(photo))  # the latter where it comes from a result of infer.py
            places = [Path(folder, name) for name in names for folder in ("", Path(path).parent)]
            # A ' keeps spreadsheets from taking what follows for a formula.
            label = re.sub("^'(?=[-=+@'])", "", label)
            labels[os.path.abspath(next(filter(os.path.exists, places), photo))] = label
    except (KeyError, ValueError, csv.Error, OSError) as error:
        expected = "应是 CSV 文件,第一行是 path,label,以后每行一张照片"
        raise infer.UsageError(f"{path} {expected}({infer.one_line(error)})") from error
    return labels


def collect(inputs: list[str]) -> tuple[dict[str, str], set[str]]:
    """Path → label of what folders of categories and CSV files name; and the paths that a CSV file names."""
    labels, corrections, loose = {}, {}, 0
    for name in inputs:
        if os.path.isdir(name):
            folders = {entry.name for entry in os.scandir(name) if entry.is_dir() and entry.name[0] != "."}
            for path in infer.find_images([name]):
                category = Path(path).relative_to(name).parts[0]
                if category in folders:
                    labels[os.path.abspath(path)] = category
                loose += category not in folders
            if empty := sorted(folders.difference(labels.values())):
                log.warning("这些文件夹里没有照片,不成一类: %s", "、".join(empty))
        elif os.path.isfile(name):
            corrections |= read_table(name)
        else:
            raise infer.UsageError(f"{name} 应是文件夹(每个子文件夹一类)或 CSV 文件")
    if loose:
        log.warning("%d 张照片不在任何一类的子文件夹里,没有使用", loose)
    labels |= corrections
    if not labels:
        raise infer.UsageError(f"{'、'.join(inputs)} 里没有找到照片。应是每类一个子文件夹,里面放照片")
    if odd := [label for label in set(labels.values()) if infer.printable(label) != label]:
        raise infer.UsageError(f"类别名 {infer.printable(odd[0])} 含有控制字符或无法显示的字符,请改名")
    return labels, set(corrections)


def choose(labels: dict[str, str], corrected: set[str], seen: dict[str, Look | str]) -> dict[str, str]:
    """Path → label of what can be learned from: each content once, as a CSV file says, or else all its copies."""
    corrections = {seen[path].digest: labels[path] for path in corrected if isinstance(seen[path], Look)}
    copies: dict[str, dict[str, str]] = defaultdict(dict)  # label → path by content
    for path, look in sorted(seen.items()):
        if isinstance(look, str):
            log.warning("%s: %s,没有使用", path, look)
        else:
            copies[look.digest].setdefault(corrections.get(look.digest, labels[path]), path)
    for given in copies.values():
        if len(given) > 1:
            pairs = (f"{path}({label})" for label, path in given.items())
            log.warning("同一张照片有几个标签,没有使用: %s", "、".join(pairs))
    return {path: label for given in copies.values() if len(given) == 1 for label, path in given.items()}


# ---------------------------------------------------------------- what a network sees in photos


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


def run_torch(engine: infer.TorchEngine) -> Callable[[list[numpy.ndarray]], numpy.ndarray]:
    """The function from pixels to the outputs of an engine's network, for any number of threads."""
    lock = threading.Lock()

    def run(batch: list[numpy.ndarray]) -> numpy.ndarray:
        with lock, infer.import_torch().inference_mode():
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
    known = infer.recall(path.parent.name) if onnx else None
    if known is None:
        model, torch = infer.load_hub_model(name, *arguments.source), infer.import_torch()
        model.module.set_submodule(infer.find_classifier(model), torch.nn.Identity())
        model = model._replace(spec=dataclasses.replace(model.spec, draft=recognizer.draft or model.spec.draft))
        engine = infer.TorchEngine(model, recognizer.device, recognizer.dtype)
        onnx = onnx and importlib.util.find_spec("onnxscript") and model.files and engine.dtype == torch.float32
        arguments.batch_size = recognizer.batch_size or (64 if engine.device.type == "cuda" else 8)
        slow = Network(model.spec, version, model.parameters, run_torch(engine))
        if not onnx or photos < WORTH_EXPORTING and recognizer.engine != "onnx":
            return slow
        log.info("正在导出网络,需要十几秒到一分钟,以后不再需要")
        try:
            with infer.replacing(path.parent) as folder:
                folder.mkdir()
                export.write_graph(engine, folder / path.name, separate_weights=True, softmax=False)
        except infer.ModelError as error:
            log.warning("%s。这次用 torch", error)
            return slow
        known = {"parameters": model.parameters, "spec": model.spec.record()}
        infer.remember(path.parent.name, {str(part): infer.file_state(part) for part in path.parent.iterdir()}, **known)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Each batch in a thread of its own: threads that share one wait for each other.
    options.intra_op_num_threads = max((os.cpu_count() or 1) // recognizer.workers, 1)
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def run(batch: list[numpy.ndarray]) -> numpy.ndarray:
        return session.run(None, {"pixels": numpy.stack(batch)})[0]

    return Network(infer.Spec.parse(known["spec"], name), version, known["parameters"], run)


class Store:
    """Rows of features in an SQLite file; one that cannot be used costs a warning, no more."""

    def __init__(self, path: Path):
        self._path, self._lock, self._file = path, threading.Lock(), None

    def ask(self, query: str, *values: Any) -> tuple | None:
        """What an SQL query finds first."""
        with self._lock:
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = sqlite3.connect(self._path, 30, isolation_level=None, check_same_thread=False)
                    self._file.execute("PRAGMA journal_mode=WAL")
                    self._file.execute("CREATE TABLE IF NOT EXISTS rows (key TEXT PRIMARY KEY, row BLOB)")
                return self._file.execute(query, values).fetchone()
            except (OSError, sqlite3.Error) as error:
                log.warning("%s 不能使用(%s),下次学习要重新计算", self._path, error)
                self.ask = lambda *_: None


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
    paths: list[str], network: Network, arguments: argparse.Namespace, store: Store, share: float = 0
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
                known = [store.ask("SELECT row FROM rows WHERE key = ?", key) for key in keys]
                rows = [found and numpy.frombuffer(found[0], numpy.float32) for found in known]
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
            store.ask("INSERT OR REPLACE INTO rows VALUES (?, ?)", key, row.tobytes())
        return seen

    seen, size = {}, arguments.batch_size or 8
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    with infer.progress_bar(len(paths), "张") as bar, ThreadPoolExecutor(arguments.workers) as pool:
        for found in pool.map(examine, batches):
            seen |= found
            bar.update(len(found))
    return seen


# ---------------------------------------------------------------- the classifier, learned and judged


class Photos(NamedTuple):
    """What is learned from: names of the categories; paths, labels by number, rooted features (N×width), times taken;
    and of the photos whose numbers ``again`` has, by how much a second look changed rooted features (M×width)."""

    names: list[str]
    paths: list[str]
    labels: numpy.ndarray
    features: numpy.ndarray
    times: numpy.ndarray
    again: numpy.ndarray
    changes: numpy.ndarray


def root(features: numpy.ndarray) -> numpy.ndarray:
    """The square root, with the sign kept."""
    return numpy.sign(features) * numpy.sqrt(numpy.abs(features))


def gather(labels: dict[str, str], seen: dict[str, Look]) -> Photos:
    """What is learned from, of photos with labels that the network has seen."""
    names, looks = sorted(set(labels.values())), [seen[path] for path in labels]
    number = {name: index for index, name in enumerate(names)}
    given = numpy.array([number[label] for label in labels.values()])
    features = root(numpy.stack([look.rows[0] for look in looks]))
    again = numpy.array([row for row, look in enumerate(looks) if len(look.rows) > 1], int)
    changes = [root(looks[row].rows[1]) - features[row] for row in again]
    changes = numpy.array(changes, numpy.float32).reshape(len(again), features.shape[1])
    return Photos(names, list(labels), given, features, numpy.array([look.time for look in looks]), again, changes)


def fit_head(photos: Photos, rows: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Weight (classes×width) and bias of linear discriminant analysis, learned from some of the photos.

    It is scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE), in a hundredth of its time;
    but the covariance of what a second look changes is added to that within the classes.
    """
    labels, classes, width = photos.labels[rows], len(photos.names), photos.features.shape[1]
    counts, means = numpy.bincount(labels, minlength=classes), numpy.zeros((classes, width))
    numpy.add.at(means, labels, photos.features[rows])
    means /= numpy.maximum(counts, 1)[:, None]
    changes = photos.changes[numpy.isin(photos.again, rows)].astype(float)

    def deviations() -> Iterator[numpy.ndarray]:
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            yield (photos.features[rows[part]] - means[labels[part]]) / math.sqrt(len(rows))
        yield changes / math.sqrt(max(len(changes), 1))

    # The covariance S'S, or with few photos the smaller SS', by which the former's inverse is known (Woodbury).
    few = len(rows) + len(changes) < width
    spread = numpy.concatenate(list(deviations())) if few else numpy.eye(width)
    product = spread @ spread.T if few else sum(part.T @ part for part in deviations())
    ridge = SHRINKAGE * max(numpy.trace(product) / width, 1e-9)  # not zero where all photos are alike
    inner = (1 - SHRINKAGE) * product + ridge * numpy.eye(len(product))
    weight = numpy.linalg.solve(inner, spread @ means.T).T
    if few:
        weight = (means - (1 - SHRINKAGE) * weight @ spread) / ridge
    priors = numpy.maximum(counts, 1e-9) / len(rows)  # a class without photos is never the answer
    return weight, numpy.log(priors) - (weight * means).sum(1) / 2


def log_softmax(logits: numpy.ndarray) -> numpy.ndarray:
    """Logarithms of confidences, N×classes (scipy's takes longer to import than all else here to compute)."""
    logits = logits - logits.max(1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(1, keepdims=True))


def find_temperature(logits: numpy.ndarray, given: numpy.ndarray) -> float:
    """What logits (N×classes) are to be divided by so that their softmax best foretells the given labels.

    Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2. Where all answers are right,
    half an error is added, for the strongest other labels: even N right answers make none certain.
    """
    rows, others = numpy.arange(len(given)), logits.copy()
    doubt = (logits.argmax(1) == given).all() / (2 * len(given) + 2)
    others[rows, given] = -numpy.inf
    rivals = others.argmax(1)

    def loss(temperature: float) -> float:
        logarithms = log_softmax(logits / temperature)
        return -(1 - doubt) * logarithms[rows, given].mean() - doubt * logarithms[rows, rivals].mean()

    best = min(numpy.geomspace(0.01, 100000, 80), key=loss)
    return min(numpy.geomspace(best / 1.2, best * 1.2, 20), key=loss)


def answer(features: numpy.ndarray, head: tuple | None, given: numpy.ndarray) -> numpy.ndarray:
    """For rows of rooted features, or of logits: the answer by number, its confidence, and the given label's; N×3."""
    answers = numpy.empty((len(given), 3))
    for start in range(0, len(given), CHUNK):
        part = slice(start, start + CHUNK)
        confidences = numpy.exp(log_softmax(features[part] @ head[0].T + head[1] if head else features[part]))
        of_given = confidences[numpy.arange(len(confidences)), given[part]]
        answers[part] = numpy.stack([confidences.argmax(1), confidences.max(1), of_given], 1)
    return answers


def members(numbers: numpy.ndarray) -> list[numpy.ndarray]:
    """The rows of each of the numbers that there are."""
    return numpy.split(
        numpy.argsort(numbers, kind="stable"), numpy.cumsum(numpy.unique(numbers, return_counts=True)[1])[:-1]
    )


def group_views(features: numpy.ndarray, times: numpy.ndarray) -> numpy.ndarray:
    """Give the same number to photos of a category that show one thing once: see ALIKE and SECONDS."""
    unit = features / numpy.maximum(numpy.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    linked = (unit @ unit.T > ALIKE) | (abs(times[:, None] - times) <= SECONDS) | numpy.eye(len(unit), dtype=bool)
    groups = numpy.arange(len(unit))
    # Each takes the least number among those that it is linked to, then that one's, until nothing changes.
    while (least := numpy.where(linked, groups, len(unit)).min(1)).tolist() != groups.tolist():
        groups = least[least]
    return groups


def assign_folds(photos: Photos) -> numpy.ndarray:
    """A fold for each photo: what shows one thing in one fold, each category spread over all folds evenly.

    Of a category with no more photos than there are folds each photo has its own: that is leave-one-out. Where there
    are very many, only photos that follow each other are compared, CHUNK at a time.
    """
    folds = numpy.zeros(len(photos.labels), int)
    for number, category in enumerate(members(photos.labels)):
        groups = []
        for start in range(0, len(category), CHUNK):
            part = category[start : start + CHUNK]
            groups += [part[rows] for rows in members(group_views(photos.features[part], photos.times[part]))]
        groups = sorted(groups, key=len, reverse=True) if len(groups) > 1 else category[:, None]
        for rank, group in enumerate(groups):
            folds[group] = (rank + number) % FOLDS
    return folds


def cross_validate(photos: Photos) -> tuple[float, numpy.ndarray, numpy.ndarray]:
    """Temperature; a fold for each photo; and what ``answer`` gives of each by a head learned without its fold."""
    folds, answers, logits, sample = assign_folds(photos), numpy.empty((len(photos.labels), 3)), [], []
    known = numpy.bincount(photos.labels)[photos.labels] > 1  # from another photo of the category
    heads = [fit_head(photos, numpy.flatnonzero(folds != fold)) for fold in range(FOLDS)]
    for fold, (weight, bias) in enumerate(heads):
        rows = numpy.random.default_rng(0).permutation(numpy.flatnonzero(known & (folds == fold)))
        sample.append(rows[: 10**7 // len(photos.names) + 100])  # not more logits than 80 MB
        logits.append(photos.features[sample[fold]] @ weight.T + bias)
    temperature = find_temperature(numpy.concatenate(logits), photos.labels[numpy.concatenate(sample)])
    for fold, (weight, bias) in enumerate(heads):
        rows = numpy.flatnonzero(folds == fold)
        answers[rows] = answer(photos.features[rows], (weight / temperature, bias / temperature), photos.labels[rows])
    return temperature, folds, answers


def judge(given: numpy.ndarray, answers: numpy.ndarray, names: list[str]) -> dict[str, Any]:
    """How good answers (of ``answer``) to N photos are, JSON-able: accuracy with its 95 % interval (Wilson's), the
    expected calibration error in 15 bins, the categories from worst to best, the pairs confused most often, and the
    least confidence from which on 95 % of the answers are right, with the share of answers that reach it."""
    answered, confidences, z = answers[:, 0].astype(int), answers[:, 1], 1.96
    right, number = answered == given, len(given)
    accuracy, spread = right.mean(), z**2 / number
    half = z * math.sqrt((accuracy * (1 - accuracy) + spread / 4) / number)
    interval = [round((accuracy + spread / 2 + sign * half) / (1 + spread), 4) for sign in (-1, 1)]
    bins = members((confidences * 15).astype(int).clip(0, 14))
    error = sum(abs(right[rows].sum() - confidences[rows].sum()) for rows in bins) / number
    rows = [(names[given[rows[0]]], len(rows), int(right[rows].sum())) for rows in members(given)]
    rows.sort(key=lambda row: (row[2] / row[1], row[0]))
    confused = Counter(zip(given[~right].tolist(), answered[~right].tolist(), strict=True)).most_common()
    levels = [level / 100 for level in range(100) if (confidences >= level / 100).any()]
    threshold = next((level for level in levels if right[confidences >= level].mean() >= 0.95), None)
    return {
        "photos": number,
        "accuracy": round(float(accuracy), 4),
        "interval": interval,
        "calibration_error": round(float(error), 4),
        "threshold": threshold,
        "answered": None if threshold is None else round(float((confidences >= threshold).mean()), 4),
        "categories": [dict(zip(("label", "photos", "right"), row, strict=True)) for row in rows],
        "confused": [{"given": names[a], "answered": names[b], "times": times} for (a, b), times in confused],
    }


def find_suspects(photos: Photos, answers: numpy.ndarray) -> list[dict[str, Any]]:
    """Photos that most likely carry the wrong label, likeliest first; after Northcutt et al., arXiv 1911.00068.

    Another category is answered at least as confidently as photos of that category are on average.
    """
    answered, given, names = answers[:, 0].astype(int), photos.labels, photos.names
    usual = numpy.array([answers[rows, 2].mean() for rows in members(given)])
    wrong = (answered != given) & (answers[:, 1] >= usual[answered]) & (numpy.bincount(given)[given] > 1)
    order = [row for row in numpy.argsort(answers[:, 2], kind="stable") if wrong[row]]
    return [{"path": photos.paths[r], "given": names[given[r]], "believed": names[answered[r]]} for r in order]


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    titles = {"test": "别处拍的照片", "held_out": "没有参加训练的照片", "cross_validation": "交叉验证"}
    results = {key: report[key] for key in titles if key in report}
    for key, result in results.items():
        right = "正确率 {:.1%}(95% 区间 {:.1%}–{:.1%})".format(result["accuracy"], *result["interval"])
        print(f"{titles[key]}: {result['photos']} 张,{right},置信度与正确率相差 {result['calibration_error']:.3f}")
    if "test" not in results:
        print("同一次拍的照片彼此相像,以上正确率会偏高;请用 --test 给出别处拍的照片,那才是将来的正确率")
    result = next(iter(results.values()))
    if result["threshold"] is not None:
        print(f"加上 -t {result['threshold']:.2f},回答 {result['answered']:.0%} 的照片,其中 95% 以上正确")
    print("\n各类正确率,从低到高:\n 正确率   张数(学习用)  类别")
    for row in result["categories"]:
        share, learned = row["right"] / row["photos"], report["photos"][row["label"]]
        print(f" {share:6.1%} {row['photos']:6}({learned})  {row['label']}")
    confused = [f"{row['given']} → {row['answered']} {row['times']} 次" for row in result["confused"]]
    suspects = [f"{row['path']}: 标为 {row['given']},像是 {row['believed']}" for row in report["suspects"]]
    sections = {"最常混淆": confused, "标签可能有误,请再看一眼": suspects, "建议": report["advice"]}
    for title, lines in sections.items():
        if lines:
            more = f"(共 {len(lines)} 条,全部见 --report 的文件)" if len(lines) > 20 else ""
            print(f"\n{title}{more}:", *map(infer.printable, lines[:20]), sep="\n - ")


# ---------------------------------------------------------------- training the whole network


def finetune(
    arguments: argparse.Namespace, network: Network, photos: Photos, held: numpy.ndarray, best: float, write: Callable
) -> dict[str, Any] | None:
    """Train all of a network on the photos that are not ``held`` (N booleans); give what ``judge`` says of the best.

    After each epoch that recognises more of those held out than all before, and than ``best`` (a share), ``write``
    is called with all parameters and that judgement; and everything is saved, for --resume. Batch norms keep their
    statistics. Raises UsageError where --resume finds another training, ModelError where it cannot be read.
    """
    torch = infer.import_torch()
    from torchvision.transforms import v2

    model = infer.load_hub_model(network.spec.name, *arguments.source)
    epochs, result, labels, names = arguments.finetune, None, photos.labels, photos.names
    rows, paths = numpy.flatnonzero(~held), [photos.paths[row] for row in numpy.flatnonzero(held)]
    # The head first, on features that are not rooted, since a root has no finite slope at zero. Not by discriminant
    # analysis, whose large weights on what varies little would upset all with the first step.
    features = torch.from_numpy(photos.features[rows]).float()
    linear, layer = torch.nn.Linear(features.shape[1], len(names)), infer.find_classifier(model)
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    solver = torch.optim.LBFGS(linear.parameters(), max_iter=50)

    def closure() -> Any:
        solver.zero_grad()
        loss = smooth(linear(features * features.abs()), torch.from_numpy(labels[rows]))
        loss.backward()
        return loss

    solver.step(closure)
    model.module.set_submodule(layer, linear)
    # As if it were not this project's own, whose batch norms are folded and could not be trained.
    engine = infer.TorchEngine(model._replace(own=False), arguments.device, "float32")
    module = engine.model.requires_grad_(True)
    body = [value for name, value in module.named_parameters() if not name.startswith(f"{layer}.")]
    optimizer = torch.optim.AdamW([{"params": linear.parameters()}, {"params": body}], weight_decay=0.02)
    steps = epochs * math.ceil(len(rows) / BATCH)
    # With fewer steps it learns more slowly, or what it unlearns at first would not be mended in time.
    rates = [rate * min(steps / MANY_STEPS, 1) for rate in RATES]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps + 1, pct_start=0.15, cycle_momentum=False)
    mixed = arguments.dtype == "bfloat16" or arguments.dtype == "auto" and engine.device.type == "cuda"
    interpolation = v2.InterpolationMode(model.spec.interpolation)
    crop = v2.RandomResizedCrop(model.spec.crop, CROP_AREA, interpolation=interpolation)
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)])

    def load(row: int) -> numpy.ndarray:
        with infer.open_image(photos.paths[row]) as file:
            return numpy.asarray(augment(infer.decode_image(file, model.spec)))

    parts = {"network": module, "optimizer": optimizer, "schedule": schedule}
    checkpoint, done = Path(f"{arguments.output}.checkpoint"), 0
    key = infer.digest(model.parameters, photos.paths, labels.tolist(), held.tolist(), epochs)
    if arguments.resume:
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if state["key"] != key:
                raise infer.UsageError(f"{checkpoint} 是用别的照片、轮数或模型训练的;请改回来,或去掉 --resume 重新训练")
            done, best, result = state["progress"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except infer.UsageError:
            raise
        except Exception as error:  # there is no end of ways in which bytes can be no checkpoint
            raise infer.ModelError(f"{checkpoint} 已损坏: {infer.one_line(error)}。请去掉 --resume 重新训练") from error
    for epoch in range(done + 1, epochs + 1):
        batches = numpy.array_split(numpy.random.default_rng(epoch).permutation(rows), steps // epochs)
        losses = []
        with infer.progress_bar(len(batches), "步") as bar, ThreadPoolExecutor(arguments.workers) as pool:
            for batch in batches:
                pixels = engine.normalize(numpy.stack(list(pool.map(load, batch))))
                target = torch.tensor(labels[batch], device=engine.device)
                with torch.autocast(engine.device.type, torch.bfloat16, enabled=mixed):
                    loss = smooth(module(pixels).float(), target)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix_str(f"第 {epoch}/{epochs} 轮,损失 {numpy.mean(losses):.3f}")
                bar.update(1)
        seen = look_at(paths, network._replace(run=run_torch(engine)), arguments, Store(Path(":memory:")))
        if gone := [path for path in paths if isinstance(seen[path], str)]:
            raise infer.UsageError(f"{gone[0]}: {seen[gone[0]]}。请放回照片,加上 --resume 接着做")
        logits = numpy.stack([seen[path].rows[0] for path in paths])
        divisor = find_temperature(logits, labels[held])
        judged = judge(labels[held], answer(logits / divisor, None, labels[held]), names)
        share = f"没有参加训练的照片正确率 {judged['accuracy']:.1%}(此前最高 {best:.1%})"
        log.info("第 %d/%d 轮: 损失 %.3f,%s", epoch, epochs, numpy.mean(losses), share)
        if judged["accuracy"] > best:
            best, result = judged["accuracy"], judged
            tensors = {name: value.cpu().numpy() for name, value in module.state_dict().items()}
            for name in (f"{layer}.weight", f"{layer}.bias"):
                tensors[name] = tensors[name] / numpy.float32(divisor)
            write(tensors, result, whole=True)
        with infer.replacing(checkpoint) as path:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save(states | {"key": key, "progress": [epoch, best, result]}, path)
    checkpoint.unlink()
    return result


# ---------------------------------------------------------------- the command


def run(arguments: argparse.Namespace) -> int:
    """Learn, judge, write the model, and report; return the exit status."""
    output, checkpoint, epochs = Path(arguments.output), Path(f"{arguments.output}.checkpoint"), arguments.finetune
    if output.suffix != ".safetensors" or output.is_dir() or infer.printable(output.stem) != output.stem:
        raise infer.UsageError(f"-o 的文件名应以 .safetensors 结尾,而不是 {output}")
    if str(arguments.model).endswith((".onnx", ".safetensors")):
        raise infer.UsageError(f"-m 应是入口名,如 wwts_cn_lite,而不是文件 {arguments.model}")
    if epochs is not None and epochs < 1 or arguments.resume and not epochs:
        raise infer.UsageError("--finetune 的轮数应不小于 1;--resume 要与 --finetune 同用")
    if arguments.resume and not (output.is_file() and checkpoint.is_file()):
        raise infer.UsageError(f"没有 {checkpoint} 或 {output},没有可以接着做的训练;请去掉 --resume")
    if not importlib.util.find_spec("safetensors"):
        raise infer.ModelError("缺少 safetensors,请运行: pip install safetensors")
    labels, corrected = collect(arguments.inputs)
    arguments.source = (arguments.repo, arguments.trust_repo, arguments.weights, None, arguments.offline)
    network, store = open_backbone(arguments, len(labels)), Store(infer.cache_folder() / "features.sqlite")
    share = max(min(LEAST / len(labels), 1), min(SECOND_LOOKS, MOST / len(labels)))
    seen = look_at(list(labels), network, arguments, store, share)
    learned = choose(labels, corrected, seen)
    counts = Counter(learned.values())
    names = sorted(counts)
    if len(names) < 2 or max(counts.values()) < 2:
        found = f"{len(learned)} 张、{len(names)} 类: {'、'.join(names[:10])}"
        raise infer.UsageError(f"至少要有两类照片,并且每类不止一张;现在能用的是 {found}")
    if few := [name for name in names if counts[name] < 3]:
        log.warning("这些类别不到 3 张照片,学不好也验不准: %s", "、".join(few))

    photos = gather(learned, seen)
    number, given = {name: index for index, name in enumerate(names)}, photos.labels
    temperature, folds, answers = cross_validate(photos)
    # What all categories have in common changes no answer, but costs digits.
    head = [(part - part.mean(0)) / temperature for part in fit_head(photos, numpy.arange(len(given)))]
    known = numpy.bincount(given)[given] > 1  # the others were answered by heads that cannot know them
    report: dict[str, Any] = {"model": output.stem, "backbone": network.spec.name}
    report |= {"date": datetime.date.today().isoformat(), "photos": {name: counts[name] for name in names}}
    spec = dataclasses.replace(network.spec, name=output.stem, num_classes=len(names), labels=tuple(names))
    about = report | {"parameters": network.parameters, "spec": spec.record()}
    report["cross_validation"] = judge(given[known], answers[known], names)
    report["suspects"] = find_suspects(photos, answers)

    def write(tensors: dict[str, numpy.ndarray], result: dict[str, Any], whole: bool) -> None:
        from safetensors.numpy import save

        text = json.dumps(about | {"accuracy": result["accuracy"], "whole": whole}, ensure_ascii=False)
        tensors = {name: numpy.array(values, order="C") for name, values in tensors.items()}
        with infer.replacing(output) as target:
            target.write_bytes(save(tensors, {"wwts_learned": text}))

    if not arguments.resume:  # or else it may be the best network so far
        checkpoint.unlink(missing_ok=True)
        tensors = dict(zip(("weight", "bias"), map(numpy.float32, head), strict=True))
        write(tensors, report["cross_validation"], whole=False)
        log.info("已学好 %d 类、%d 张照片,存入 %s", len(names), len(given), output)
    if epochs:
        log.info("接着训练整个网络。随时可以中断: 存着的总是最好的一轮,加上 --resume 接着做")
        held = known & (folds == numpy.bincount(folds[known]).argmax())
        frozen = float((answers[:, 0] == given)[held].mean())
        try:
            result = finetune(arguments, network, photos, held, frozen, write)
        except (ImportError, RuntimeError) as error:
            remedy = "显存不足请改用 -d cpu,torchvision 不能用请重新安装;加上 --resume 接着做"
            raise infer.ModelError(f"训练出错: {infer.one_line(error)}。{remedy}") from error
        if result:
            report["held_out"], head = result, None
            model = infer.load_learned_model(str(output), *arguments.source)
            engine = infer.TorchEngine(model, arguments.device, arguments.dtype)
            network = Network(model.spec, engine.version, "", run_torch(engine))
        else:
            log.warning("训练整个网络没有更好,保留原来的网络")
    if arguments.test:
        elsewhere, _ = collect([arguments.test])
        if unknown := sorted(set(elsewhere.values()).difference(names)):
            log.warning("%s 里的这些类别没有学过,不参加检验: %s", arguments.test, "、".join(unknown))
        digests = {seen[path].digest for path in learned}
        paths = [path for path in elsewhere if elsewhere[path] in counts]
        seen = look_at(paths, network, arguments, store)
        seen = {path: look for path, look in seen.items() if isinstance(look, Look) and look.digest not in digests}
        if len(seen) < len(paths):
            log.warning("%s 里有 %d 张照片打不开,或是学过的,不参加检验", arguments.test, len(paths) - len(seen))
        if not seen:
            raise infer.UsageError(f"{arguments.test} 里没有可以检验的照片。应是每类一个子文件夹,名称与学习的相同")
        given = numpy.array([number[elsewhere[path]] for path in seen])
        rows = numpy.stack([look.rows[0] for look in seen.values()])
        report["test"] = judge(given, answer(root(rows) if head else rows, head, given), names)
    few = [name for name in names if counts[name] < 10]
    report["advice"] = [f"这 {len(few)} 类少于 10 张,先补拍: {'、'.join(few)}"] if few else []
    if report["suspects"]:
        report["advice"].append("先复查标签可能有误的照片,把改正写进 CSV 文件(path,label),同文件夹一起再学一次")
    if arguments.report:
        with infer.replacing(arguments.report) as target:
            target.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    show(report)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = infer.Parser("learn.py", __doc__)
    infer.add_model_options(parser, leave_out=("labels",))
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--test")
    parser.add_argument("--report")
    parser.add_argument("--finetune", nargs="?", type=int, const=5)
    parser.add_argument("--resume", action="store_true")
    return infer.run_command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
