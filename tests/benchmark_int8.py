"""What int8 costs in accuracy: photos whose labels are known, by a model in float32 and in int8.

    python tests/benchmark_int8.py LABELS.csv [MODEL]

The CSV file has the columns path and label; where several labels are right, they stand with | between them. Half of
the photos are given to export.py and the other half judges what it made; then the halves change places.
"""

import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def script(name, photos, *arguments):
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, input="\n".join(photos), stdout=subprocess.PIPE, encoding="utf-8").stdout


def tops(model, photos):
    """Each photo's first answer."""
    lines = script("infer", photos, "-q", "-m", model, "-f", "jsonl", "-").splitlines()
    return [json.loads(line)["results"][0] for line in lines]


def main():
    with open(sys.argv[1], encoding="utf-8-sig", newline="") as file:
        labels = {row["path"]: row["label"].split("|") for row in csv.DictReader(file)}
    model = sys.argv[2] if len(sys.argv) > 2 else "wwts_cn_lite"
    photos = sorted(labels)
    random.Random(0).shuffle(photos)
    judged = []
    with tempfile.TemporaryDirectory() as folder:
        for fold in range(2):
            graph, judging = Path(folder, f"{fold}.onnx"), photos[fold::2]
            script("export", photos[1 - fold :: 2], "-m", model, "--int8", "-", "--least-agreement", "0", graph)
            judged += zip(judging, tops(model, judging), tops(graph, judging), strict=True)
    before, after = ([pair[which]["label"] in labels[pair[0]] for pair in judged] for which in (1, 2))
    same = [pair[1]["label"] == pair[2]["label"] for pair in judged]
    number, lost = len(judged), sum(was and not now for was, now in zip(before, after, strict=True))
    won = sum(after) - sum(before) + lost
    print(f"{number} 张: float32 对 {sum(before)} 张,int8 对 {sum(after)} 张(少对 {lost} 张,多对 {won} 张)")
    print(f"相差 {(sum(after) - sum(before)) / number:+.2%};首选标签 {sum(same) / number:.1%} 相同")


if __name__ == "__main__":
    main()
