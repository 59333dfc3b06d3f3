"""What a learned model says of photos of none of its categories, with and without a category 其他.

    python tests/benchmark_unknown.py TRAIN TEST

Both folders have a folder of photos for each category, at least eight of them. Ten sixteenths of the categories
are learned, three sixteenths are thrown together as 其他, and the photos of the rest are the strangers.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ("-m", "wwts_cn_lite")


def script(name, *arguments):
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments), "-q"]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


def main():
    train, test = map(Path, sys.argv[1:3])
    categories = sorted(folder.name for folder in train.iterdir())
    random.Random(1).shuffle(categories)
    first, second = len(categories) * 10 // 16, len(categories) * 13 // 16
    known, other, strange = categories[:first], categories[first:second], categories[second:]
    with tempfile.TemporaryDirectory() as folder:
        for title, others in (("没有“其他”", []), ("有“其他”", other)):
            photos, model = Path(folder, title), Path(folder, f"{title}.safetensors")
            for category in known:
                shutil.copytree(train / category, photos / category)
            for category in others:
                shutil.copytree(train / category, photos / "其他" / category)
            script("learn", photos, *MODEL, "-o", model)
            for name, asked in (("学过的", known), ("没学过的", strange)):
                paths = [test / category for category in asked]
                records = [
                    json.loads(line) for line in script("infer", "-m", model, *paths, "-f", "jsonl").splitlines()
                ]
                tops = [(Path(record["path"]).parent.name, record["results"][0]) for record in records]
                for threshold in (0, 0.6, 0.8):
                    said = [(c, top) for c, top in tops if top["confidence"] >= threshold and top["label"] != "其他"]
                    right = sum(category == top["label"] for category, top in said)
                    print(f"{title},{name},-t {threshold}: {len(tops)} 张中回答 {len(said)} 张,正确 {right} 张")


if __name__ == "__main__":
    main()
