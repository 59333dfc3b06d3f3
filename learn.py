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
import importlib.util
import io
import json
import logging
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import infer

import numpy

from learning.classifier import answer, cross_validate, find_suspects, fit_head, gather, judge, unit_root
from learning.features import Look, Network, look_at, open_backbone, run_torch
from learning.training import finetune
from wwts import files, memory, torch_engine
from wwts import learned as learned_models
from wwts.learned import FORMAT

log = logging.getLogger("wwts")
# This share of the photos, but 2,000 at most, is looked at again, mirrored and nearer.
SECOND_LOOKS, MOST = 0.08, 2000


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
            names = (photo, files.unescape_cell(photo))  # the latter where it comes from a result of infer.py
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
    if result["threshold"]:  # at 0 all answers are as right as that already
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
    network, store = open_backbone(arguments, len(labels)), memory.Cache(str(infer.cache_folder() / "features.sqlite"))
    seen = look_at(list(labels), network, arguments, store, min(SECOND_LOOKS, MOST / len(labels)))
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
    about = report | {"format": FORMAT, "parameters": network.parameters, "spec": spec.record()}
    report["cross_validation"] = judge(given[known], answers[known], names)
    report["suspects"] = find_suspects(photos, answers)

    def write(tensors: dict[str, numpy.ndarray], result: dict[str, Any], whole: bool) -> None:
        from safetensors.numpy import save

        text = json.dumps(about | {"accuracy": result["accuracy"], "whole": whole}, ensure_ascii=False)
        tensors = {name: numpy.array(values, order="C") for name, values in tensors.items()}
        with files.replacing(output) as target:
            target.write_bytes(save(tensors, {"wwts_learned": text}))

    if not arguments.resume:  # or else it may be the best network so far
        checkpoint.unlink(missing_ok=True)
        tensors = dict(zip(("weight", "bias"), map(numpy.float32, head), strict=True))
        write(tensors, report["cross_validation"], whole=False)
        log.info("已学好 %d 类、%d 张照片,存入 %s", len(names), len(given), output)
    if epochs:
        log.info("接着训练整个网络。随时可以中断: 存着的总是最好的一轮,加上 --resume 接着做")
        held = known & (folds == numpy.bincount(folds[known]).argmax())
        # What is better by less than chance explains, or on a fold that is hard, may well be worse on other photos.
        frozen = max(judge(given[held], answers[held], names)["interval"][1], report["cross_validation"]["accuracy"])
        try:
            result = finetune(arguments, network, photos, held, frozen, write)
        except (ImportError, RuntimeError) as error:
            remedy = "显存不足请改用 -d cpu,torchvision 不能用请重新安装;加上 --resume 接着做"
            raise infer.ModelError(f"训练出错: {infer.one_line(error)}。{remedy}") from error
        if result:
            report["held_out"], head = result, None
            model = learned_models.load_learned_model(str(output), *arguments.source)
            engine = torch_engine.TorchEngine(model, arguments.device, arguments.dtype)
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
        report["test"] = judge(given, answer(unit_root(rows) if head else rows, head, given), names)
    few = [name for name in names if counts[name] < 10]
    report["advice"] = [f"这 {len(few)} 类少于 10 张,先补拍: {'、'.join(few)}"] if few else []
    if report["suspects"]:
        report["advice"].append("先复查标签可能有误的照片,把改正写进 CSV 文件(path,label),同文件夹一起再学一次")
    if arguments.report:
        with files.replacing(arguments.report) as target:
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
