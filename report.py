#!/usr/bin/env python3
"""看结果、改标签: 把 infer.py 的结果文件做成一个网页。

用法: python report.py 结果文件 [结果文件 ...] [选项]

  结果文件                infer.py 用 -o 写的 .jsonl 或 .csv;可以有几个,
                          如 torchrun 各进程的 结果.rank0.jsonl …
  -o, --output FILE       网页 [第一个结果文件的名字,扩展名换成 .html]
  --labels FILE           改正时还能选的标签,格式同 infer.py 的 --labels
  --forbid LABEL          照片的标签里不许有它;可写多个,也可写标签文件
  --require LABEL         照片的标签里应有它,写了多个时有一个即可;也可写文件
  -t, --threshold P       这两个选项只看置信度不低于 P 的标签,0 到 1 [0]
  --most N                网页里最多放几张照片 [10000]
  -q, --quiet             不显示 [INFO] 信息和进度
  -h, --help              显示本说明

示例(在运行 infer.py 的文件夹里运行):
  python report.py 结果.csv -o 报告.html --forbid 香烟 -t 0.2

退出状态: 0 完成  1 有照片违反 --forbid 或 --require  2 用法错误或结果文件
不可用  3 标签文件不可用或网页写不出来  130/143 被中断
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import infer

from PIL import Image

from wwts import files

TEMPLATE = Path(__file__).resolve().parent / "pages" / "report.html"
LONGEST_LINE = 2**26  # bytes; what is longer is no record
THUMBNAIL = 160  # pixels of the longer side
BLOCK = 100  # photos that are read at once, and whose thumbnails the page takes apart at once

log = logging.getLogger("wwts")


class Record(NamedTuple):
    """One image of a result file: (label, confidence from 0 to 1) by falling confidence, or an error."""

    path: str
    model: str
    version: str
    results: list[tuple[str, float]]
    error: str | None
    violation: str | None = None


def parse_record(line: str, header: list[str] | None) -> Record:
    """Read a line of JSONL, or of CSV with this header; what is no record leads to one of many exceptions."""
    if header is None:
        row = json.loads(line)
        error = row.get("error")
        answers = [(answer["label"], answer["confidence"]) for answer in row["results"]] if error is None else []
    else:
        (cells,) = csv.reader([line], strict=True)
        row = dict(zip(header, map(files.unescape_cell, cells), strict=True))
        error = row["error"] or None
        answers = [(row[f"label_{rank}"], row[f"confidence_{rank}"]) for rank in range(1, len(header) // 2 - 1)]
    results = [(label, float(confidence)) for label, confidence in answers if confidence != ""]
    record = Record(row["path"], row["model"], row["version"], results, error)
    texts = [*record[:3], error or "", *(label for label, _ in results)]
    if not all(isinstance(text, str) for text in texts) or not all(0 <= confidence <= 1 for _, confidence in results):
        raise ValueError  # NaN is not between 0 and 1 either
    return record


def read_rule(values: list[str]) -> set[str]:
    """The labels that --forbid or --require names, themselves or in files."""
    return set(chain(*(files.read_labels(value) if os.path.isfile(value) else [value] for value in values))) - {""}


class Rules(NamedTuple):
    """Labels that no photo may show, and labels of which each must show one, at this confidence or more."""

    forbidden: set[str]
    required: set[str]
    threshold: float

    def violation(self, record: Record) -> str | None:
        """Say in Chinese what is wrong with a photo; None if nothing is."""
        shown = {label: confidence for label, confidence in record.results if confidence >= self.threshold}
        reasons = [f"出现了{label}({shown[label]:.2f})" for label in shown if label in self.forbidden]
        if self.required and self.required.isdisjoint(shown):
            reasons.append(f"没有{'、'.join(self.required)}" if len(self.required) == 1 else "应有的标签一个也没有")
        return ",".join(reasons) or None


def read_records(paths: list[str], rules: Rules) -> Iterator[Record]:
    """Read result files line by line; raises UsageError where one is torn or was not written by infer.py."""
    for path in paths:
        header, number = None, 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):  # noqa: B023
                    if not line.endswith(b"\n"):
                        raise infer.UsageError(f"{path} 的第 {number} 行不完整;请用 infer.py --resume 把它做完")
                    if number == 1 and path.lower().endswith(".csv"):
                        header = line.decode("utf-8-sig").rstrip().split(",")
                    else:
                        record = parse_record(line.decode(), header)
                        yield record._replace(violation=rules.violation(record))
        except OSError as error:
            raise infer.UsageError(f"结果文件 {path} 无法读取: {infer.one_line(error)}") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
            raise infer.UsageError(f"{path} 的第 {number} 行不是这一版 infer.py 写的记录;请重新识别") from error


def survey(records: Iterable[Record]) -> dict[str, Any]:
    """Count records; raises UsageError unless there are some, all of one version of one model."""
    total, violations, models, digest = 0, 0, set(), hashlib.sha256()
    for record in records:
        models.add(f"{record.model}(版本 {record.version})")
        if len(models) > 1:
            raise infer.UsageError(f"结果来自不同的模型或版本: {'、'.join(sorted(models))}。请分别做成网页")
        total += 1
        violations += record.violation is not None
        digest.update(repr(record[:5]).encode("utf-8", "surrogatepass"))
    if not total:
        raise infer.UsageError("结果文件里没有记录")
    return {"model": models.pop(), "total": total, "violations": violations, "digest": digest.hexdigest()}


def make_thumbnail(path: str) -> str:
    """A photo's JPEG thumbnail in Base64, upright, its longer side at most 160 pixels; raises what Pillow raises."""
    with infer.open_image(path) as file, Image.open(file) as image:
        image.draft("RGB", (THUMBNAIL, THUMBNAIL))  # lets libjpeg decode half, a quarter or an eighth of the size
        small = infer.decode_image(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=65, optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def make_entry(record: Record, folder: str) -> tuple[dict[str, Any], str]:
    """What a page in ``folder`` is told of a photo, and its thumbnail: "" if there is none, and "problem" says why."""
    entry = {key: getattr(record, key) for key in ("path", "results", "error", "violation")}
    if record.error is not None:
        return entry, ""
    try:
        link = quote(os.fsencode(os.path.relpath(record.path, folder).replace(os.sep, "/")))
        return entry | {"link": link}, make_thumbnail(record.path)
    except Exception as error:  # Pillow's decoders raise all kinds of it
        return entry | {"problem": infer.describe_image_error(error)}, ""


def data_element(kind: str, data: Any) -> str:
    """HTML that holds data for the page's script; no text in it can end it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" class="{kind}">{text}</script>\n'


def run(arguments: argparse.Namespace) -> int:
    """Make the page; return the exit status."""
    paths, most = arguments.results, arguments.most
    output = Path(arguments.output or Path(paths[0]).with_suffix(".html"))
    if output.suffix.lower() != ".html" or output.is_dir() or not output.parent.is_dir():
        raise infer.UsageError(f"-o 后面应是一个以 .html 结尾的文件名,在已有的文件夹里,而不是 {output}")
    if most < 1 or not 0 <= arguments.threshold <= 1:
        raise infer.UsageError("--most 应是 1 或更大的整数,-t 应在 0 到 1 之间")
    known = files.read_labels(arguments.labels) if arguments.labels else []
    rules = Rules(read_rule(arguments.forbid), read_rule(arguments.require), arguments.threshold)
    if known and (unknown := (rules.forbidden | rules.required).difference(known)):
        raise infer.UsageError(f"{arguments.labels} 里没有这些标签: {'、'.join(sorted(unknown))}")

    start = time.monotonic()
    if not TEMPLATE.is_file():
        raise infer.ModelError(f"缺少网页的模板 {TEMPLATE};请重新下载本项目")
    # The page's Content-Security-Policy allows only the script and the style that bear its secret number.
    head, tail = files.read_text(TEMPLATE).replace("NONCE", secrets.token_hex(16)).split("<!-- data -->\n")
    summary = survey(read_records(paths, rules))
    total, violations, shown, missing = summary["total"], summary["violations"], min(summary["total"], most), 0
    summary |= {"files": [*map(os.path.basename, paths)], "time": max(map(os.path.getmtime, paths))}
    summary |= {"rules": any(rules[:2]), "labels": known, "block": BLOCK}
    room = {True: most, False: most - violations}  # what violates a rule goes before what does not

    def has_room(record: Record) -> bool:
        room[record.violation is not None] -= 1
        return room[record.violation is not None] >= 0

    # A run that still goes on may have added records since they were counted.
    chosen = filter(has_room, islice(read_records(paths, rules), total))
    # A path that is no text is escaped as JSON would escape it.
    options = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    with files.replacing(output) as target, open(target, "w", **options) as page, ThreadPoolExecutor() as pool:
        page.write(head)
        with infer.progress_bar(shown, "张") as bar:
            while block := list(islice(chosen, BLOCK)):
                made = pool.map(make_entry, block, repeat(os.path.abspath(output.parent)))
                photos, thumbnails = zip(*made, strict=True)
                page.write(data_element("photos", photos) + data_element("thumbnails", thumbnails))
                missing += sum("problem" in photo for photo in photos)
                bar.update(len(block))
        page.write(data_element("summary", summary) + tail)

    speed, size = shown / (time.monotonic() - start), output.stat().st_size / 1e6
    log.info("已写 %s: %d 张照片,%.1f MB,%.1f 张/秒", output, shown, size, speed)
    if missing:
        log.warning("%d 张照片打不开,没有缩略图;请在运行 infer.py 的文件夹里运行 report.py", missing)
    if total > shown:
        log.warning("共 %d 张,网页里省略了 %d 张;要全部放进去,请用 --most %d", total, total - shown, total)
    if violations:
        log.error("%d 张照片违反 --forbid 或 --require", violations)
    return 1 if violations else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = infer.Parser("report.py", __doc__)
    parser.add_argument("results", nargs="+", metavar="结果文件")
    parser.add_argument("-o", "--output")
    parser.add_argument("--labels")
    parser.add_argument("--forbid", action="append", default=[])
    parser.add_argument("--require", action="append", default=[])
    parser.add_argument("-t", "--threshold", type=float, default=0.0)
    parser.add_argument("--most", type=int, default=10000)
    return infer.run_command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
