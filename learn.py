#!/usr/bin/env python3
"""用自己的照片学习自己的类别,得到 infer.py 能用的模型: 网络不变,只换最后一层。

先安装: pip install scipy safetensors(再装 onnx onnxscript onnxruntime 会快几倍)

用法: python learn.py 照片 [照片 ...] -o 模型.safetensors [选项]

  照片                    文件夹: 每个子文件夹是一类,其名称就是标签;或 CSV 文件:
                          path,label 两列(UTF-8 或 GBK),补充或改正前者
  -o, --output FILE       学到的模型,文件名以 .safetensors 结尾
  --test FOLDER           用别处拍的照片(同样每类一个子文件夹)检验
  --report FILE.json      把报告也写成 JSON
  --finetune [EPOCHS]     接着训练整个网络 [5 轮],需要显卡或耐心
  --resume                接着做中断了的 --finetune
  -m, --repo, --trust-repo, --weights, --offline, -d, --dtype, --engine, -b, -j
                          与 infer.py 相同: 以哪个模型为基础,怎样运行它
  -q, --quiet             不显示 [INFO] 信息和进度
  -h, --help              显示本说明

示例:
  python learn.py 商品 -o 商品.safetensors
  python learn.py 商品 改正.csv --test 别家店 -o 商品.safetensors
  python infer.py -m 商品.safetensors 新照片 -o 结果.csv

退出状态: 0 已学好  2 用法错误  3 模型不可用或写不进去  130 被中断
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import importlib.util
import io
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import infer
from infer import ModelError, Parser, TorchEngine, UsageError

import numpy

from learning.classifier import Photos, answer, assign_folds, cross_validate, find_suspects, fit_head, judge, root
from learning.features import Features, load_model, open_backbone, run_torch
from learning.training import train_network

log = logging.getLogger("wwts")
# This share of the photos, but 50 at least and 1,000 at most, is looked at a second time, mirrored and from nearer.
SECOND_LOOKS, LEAST, MOST = 0.15, 50, 1000
FEW = 10  # photos of a category, below which more of them help most
MOST_LINES = 20  # of confused pairs and of suspects that are printed


# ---------------------------------------------------------------- which photos


def read_corrections(path: str) -> dict[str, str]:
    """Path → label of a CSV file; paths may be relative to the current folder or to that of the file.

    Raises UsageError for anything else than two columns, path and label, that are filled in each row.
    """
    data, labels = Path(path).read_bytes(), {}
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("gb18030", "replace")  # as Excel saves it
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 2):
            # infer.py puts a ' before what a spreadsheet would take for a formula.
            photo, label = (re.sub("^'(?=[-=+@'])", "", (row[key] or "").strip()) for key in ("path", "label"))
            if not photo or not label:
                raise UsageError(f"{path} 第 {number} 行缺少 path 或 label")
            place = photo if os.path.exists(photo) else os.path.join(os.path.dirname(path), photo)
            labels[os.path.abspath(place)] = label
    except (KeyError, csv.Error) as error:
        raise UsageError(f"{path} 应是 CSV 文件,第一行是 path,label,以后每行一张照片") from error
    return labels


def collect_photos(inputs: list[str]) -> tuple[dict[str, str], set[str]]:
    """Path → label of what folders of categories and CSV files name; and the paths that a CSV file names."""
    labels, corrections, loose = {}, {}, 0
    for name in inputs:
        if os.path.isdir(name):
            folders = {entry.name for entry in os.scandir(name) if entry.is_dir() and entry.name[0] != "."}
            for path in infer.find_images([name]):
                category = Path(path).relative_to(name).parts[0]
                loose += category not in folders
                labels |= {os.path.abspath(path): category} if category in folders else {}
            if empty := sorted(folders - set(labels.values())):
                log.warning("这些文件夹里没有照片,不成一类: %s", "、".join(empty))
        elif os.path.isfile(name):
            corrections |= read_corrections(name)
        else:
            raise UsageError(f"{name} 应是文件夹(每个子文件夹一类)或 CSV 文件")
    if loose:
        log.warning("%d 张照片不在任何一类的子文件夹里,没有使用", loose)
    labels |= corrections
    if odd := [label for label in set(labels.values()) if infer.printable(label) != label]:
        raise UsageError(f"类别名 {infer.printable(odd[0])} 含有控制字符或无法显示的字符,请改名")
    return labels, set(corrections)


def sort_out(labels: dict[str, str], corrected: set[str], seen: dict[str, bytes | str]) -> tuple[dict, dict]:
    """Content of photo → path, of what can be learned from; and path → why not, of the rest.

    A label that a CSV file gives holds for all copies of a photo.
    """
    left_out = {path: found for path, found in seen.items() if isinstance(found, str)}
    copies: dict[bytes, list[str]] = {}
    for path in sorted(seen, key=lambda path: path not in corrected):
        if path not in left_out:
            copies.setdefault(seen[path], []).append(path)
    for photo, paths in list(copies.items()):
        given = {labels[path]: path for path in paths if path in corrected or paths[0] not in corrected}
        if len(given) > 1:
            left_out |= dict.fromkeys(paths, f"同一张照片有几个标签: {'、'.join(given)}")
            pairs = [f"{path}({label})" for label, path in given.items()]
            log.warning("同一张照片有几个标签,没有使用: %s", "、".join(pairs))
            del copies[photo]
    for path, found in seen.items():
        if isinstance(found, str):
            log.warning("%s: %s,没有使用", path, found)
    return {photo: paths[0] for photo, paths in copies.items()}, left_out


# ---------------------------------------------------------------- the report


def judge_photos(
    arguments: argparse.Namespace,
    number: dict[str, int],
    learned: list[bytes],
    store: Features,
    transform: Callable,
    head: tuple,
) -> dict[str, Any]:
    """What ``judge`` says of the photos of --test but for those learned from; features are transformed first."""
    labels, _ = collect_photos([arguments.test])
    if unknown := sorted(set(labels.values()) - set(number)):
        log.warning("%s 里的这些类别没有学过,不参加检验: %s", arguments.test, "、".join(unknown))
    seen = store.compute([path for path, label in labels.items() if label in number], 0, arguments)
    photos = {path: photo for path, photo in seen.items() if isinstance(photo, bytes)}
    for path, photo in seen.items():
        if isinstance(photo, str):
            log.warning("%s: %s,没有使用", path, photo)
    new = set(photos.values()).difference(learned)
    if same := sum(photo not in new for photo in photos.values()):
        log.warning("%s 里有 %d 张照片是学过的,不参加检验", arguments.test, same)
        photos = {path: photo for path, photo in photos.items() if photo in new}
    if not photos:
        raise UsageError(f"{arguments.test} 里没有可以检验的照片。应是每类一个子文件夹,名称与学习的相同")
    given = numpy.array([number[labels[path]] for path in photos])
    _, features, _ = store.read(list(photos.values()))
    return judge(given, answer(transform(features), head, 1.0, given), list(number))


def advise(report: dict[str, Any]) -> list[str]:
    """What would help most, in words."""
    few = [label for label, number in report["photos"].items() if number < FEW]
    advice = [f"这 {len(few)} 类少于 {FEW} 张,先补拍: {'、'.join(few)}"] if few else []
    if report["suspects"]:
        advice.append("先复查标签可能有误的照片,把改正写进 CSV 文件(path,label),同文件夹一起再学一次")
    if "test" not in report:
        advice.append("每类留几张在别的地方、别的日子拍的照片,用 --test 检验")
    return advice


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    for key, title in (("test", "别处拍的照片"), ("held_out", "没有参加训练的照片"), ("cross_validation", "交叉验证")):
        if key in report:
            result = report[key]
            low, high = result["interval"]
            right = f"正确率 {result['accuracy']:.1%}(95% 区间 {low:.1%}–{high:.1%})"
            print(f"{title}: {result['photos']} 张,{right},置信度与正确率相差 {result['calibration_error']:.3f}")
    if "test" not in report:
        print("同一次拍的照片彼此相像,以上正确率会偏高;请用 --test 给出别处拍的照片,那才是将来的正确率")
    result = next(report[key] for key in ("test", "held_out", "cross_validation") if key in report)
    if result["threshold"] is not None:
        print(f"加上 -t {result['threshold']:.2f},回答 {result['answered']:.0%} 的照片,其中 95% 以上正确")
    print("\n各类正确率,从低到高:\n 正确率   张数(学习用)  类别")
    for row in result["categories"]:
        learned = report["photos"].get(row["label"], 0)
        print(f" {row['right'] / row['photos']:6.1%} {row['photos']:6}({learned})  {infer.printable(row['label'])}")
    sections = [("最常混淆:", [f"{row['given']} → {row['answered']} {row['times']} 次" for row in result["confused"]])]
    suspects = [f"{row['path']}: 标为 {row['given']},像是 {row['believed']}" for row in report["suspects"]]
    sections += [("标签可能有误,请再看一眼:", suspects), ("建议:", report["advice"])]
    for title, lines in sections:
        if lines:
            print("\n" + "\n".join([title, *(f" - {infer.printable(line)}" for line in lines[:MOST_LINES])]))
            if len(lines) > MOST_LINES:
                print(f"   ……共 {len(lines)} 条,全部见 --report 的文件")


# ---------------------------------------------------------------- learning


def write_model(path: Path, about: dict[str, Any], tensors: dict[str, numpy.ndarray]) -> None:
    """Write the file that infer.py's load_learned_model reads."""
    from safetensors.numpy import save

    tensors = {name: numpy.ascontiguousarray(values) for name, values in tensors.items()}
    with infer.replacing(path) as target:
        target.write_bytes(save(tensors, {"wwts_learned": json.dumps(about, ensure_ascii=False)}))


def check_arguments(arguments: argparse.Namespace, output: Path) -> None:
    """Raise UsageError for a command line that makes no sense, ModelError for a package that is missing."""
    if output.suffix != ".safetensors" or output.is_dir() or infer.printable(output.stem) != output.stem:
        raise UsageError(f"-o 的文件名应以 .safetensors 结尾,而不是 {output}")
    if str(arguments.model).endswith((".onnx", ".safetensors")):
        raise UsageError(f"-m 应是入口名,如 wwts_cn_lite,而不是文件 {arguments.model}")
    if arguments.finetune is not None and arguments.finetune < 1 or arguments.resume and not arguments.finetune:
        raise UsageError("--finetune 的轮数应不小于 1;--resume 要与 --finetune 同用")
    if missing := [name for name in ("scipy", "safetensors") if not importlib.util.find_spec(name)]:
        raise ModelError(f"缺少 {'、'.join(missing)},请运行: pip install {' '.join(missing)}")


def run(arguments: argparse.Namespace) -> int:
    """Learn, judge, write the model, and report."""
    output = Path(arguments.output)
    check_arguments(arguments, output)
    labels, corrected = collect_photos(arguments.inputs)
    if not labels:
        raise UsageError("没有找到照片。应是每类一个子文件夹,里面放照片")
    backbone = open_backbone(arguments, len(labels))
    store = Features(backbone)
    share = max(min(LEAST / len(labels), 1), min(SECOND_LOOKS, MOST / len(labels)))
    chosen, left_out = sort_out(labels, corrected, store.compute(list(labels), share, arguments))
    paths, contents = list(chosen.values()), list(chosen)
    counts = Counter(labels[path] for path in paths)
    names = sorted(counts)
    if len(names) < 2:
        raise UsageError(f"至少要有两类照片,现在能用的只有: {'、'.join(names) or '无'}")
    if max(counts.values()) < 2:
        raise UsageError("每类只有一张照片,无法检验,也定不出置信度。请每类至少给两张")
    if few := [name for name in names if counts[name] < 3]:
        log.warning("这些类别不到 3 张照片,学不好也验不准: %s", "、".join(few))
    number = {name: index for index, name in enumerate(names)}
    given = numpy.array([number[labels[path]] for path in paths])
    (_, features, times), (again, nearer, _) = store.read(contents), store.read(contents, copy=1)
    features = root(features)
    photos = Photos(given, features, times, again, root(nearer) - features[again])
    folds = assign_folds(photos, len(names))
    temperature, judged, answers = cross_validate(photos, folds, len(names))
    # What all categories have in common changes no answer, but costs digits.
    head = fit_head(photos, numpy.arange(len(given)), len(names))
    weight, bias = ((part - part.mean(0)) / temperature for part in head)
    suspects = find_suspects(photos, judged, answers)
    report: dict[str, Any] = {
        "model": output.stem,
        "backbone": backbone.name,
        "date": datetime.date.today().isoformat(),
        "photos": {name: counts[name] for name in names},
        "cross_validation": judge(given[judged], answers, names),
        "suspects": [
            {"path": paths[row], "given": names[given[row]], "believed": names[label], "confidence": confidence}
            for row, label, confidence in suspects
        ],
        "left_out": left_out,
    }
    spec = dataclasses.replace(backbone.spec, name=output.stem, num_classes=len(names), labels=tuple(names))
    about = {"parameters": backbone.parameters, "spec": spec.record()}
    about |= {key: report[key] for key in ("backbone", "date", "photos")}

    def keep(tensors: dict[str, numpy.ndarray], result: dict[str, Any], whole: bool = True) -> None:
        write_model(output, about | {"accuracy": result["accuracy"], "whole": whole}, tensors)

    if not (arguments.resume and output.exists()):  # which may be the best network so far
        keep({"weight": numpy.float32(weight), "bias": numpy.float32(bias)}, report["cross_validation"], whole=False)
        log.info("已学好 %d 类、%d 张照片,存入 %s", len(names), len(given), output)
    how = store, root, (weight, bias)
    if arguments.finetune:
        held = numpy.zeros(len(given), bool)
        held[judged[folds[judged] == 0]] = True
        frozen = float((answers[:, 0] == given[judged])[held[judged]].mean())
        log.info("接着训练整个网络。随时可以中断: 存着的总是最好的一轮,加上 --resume 接着做")
        model = load_model(arguments, backbone.name)
        result = train_network(arguments, model, names, paths, photos, held, frozen, keep)
        if result:
            report["held_out"] = result
            source = (arguments.repo, arguments.trust_repo, arguments.weights, None, arguments.offline)
            engine = TorchEngine(infer.load_learned_model(str(output), *source), arguments.device, arguments.dtype)
            store = Features(backbone._replace(run=run_torch(engine)), kept=False)
            how = store, numpy.asarray, (numpy.eye(len(names)), 0)  # its outputs are logits already
        else:
            log.warning("训练整个网络没有更好,保留原来的网络")
    if arguments.test:
        report["test"] = judge_photos(arguments, number, contents, *how)
    report["advice"] = advise(report)
    if arguments.report:
        with infer.replacing(arguments.report) as target:
            target.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    show(report)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("learn.py", __doc__)
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
