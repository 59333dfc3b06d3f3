"""Speed beside the peers, in one run, alternating, on the same photos, all with the weights of wwts_cn_lite.

    python tests/benchmark.py [--photos 1000] [--rounds 3] [--folder FOLDER]

Peers: infer.py with each engine; a plain torch script as one finds it everywhere; timm's own way (what its
inference.py does: create_dataset, create_loader, topk), plain and with --channels-last; and a bare ONNX Runtime
loop with two decoding threads, which does nothing but the work itself. Prints medians and ratios as Markdown.
"""

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

PLAIN = """
import sys, json, torch
from pathlib import Path
from PIL import Image
from torchvision import transforms as T
sys.path.insert(0, {root!r})
import hubconf
model = hubconf.wwts_cn_lite()
labels = json.load(open({root!r} + "/labels_zh.json", encoding="utf-8"))
transform = T.Compose([T.Resize(292, T.InterpolationMode.BICUBIC), T.CenterCrop(260), T.ToTensor(),
                       T.Normalize([127 / 255] * 3, [128 / 255] * 3)])
paths = [Path({folder!r})] if {folder!r}.endswith(".jpg") else sorted(Path({folder!r}).glob("*.jpg"))
for path in paths:
    with torch.no_grad():
        top = model(transform(Image.open(path).convert("RGB"))[None]).softmax(1)[0].topk(5)
    print(path, [(labels[i], p) for p, i in zip(*map(torch.Tensor.tolist, top))])
"""

TIMM = """
import sys, torch, timm
from timm.data import create_dataset, create_loader, resolve_data_config
sys.path.insert(0, {root!r})
import hubconf
model = timm.create_model("tf_efficientnet_lite2").eval()
model.load_state_dict(dict(zip(model.state_dict(), hubconf.wwts_cn_lite().state_dict().values())))
if {channels_last}:
    model = model.to(memory_format=torch.channels_last)
config = resolve_data_config({{}}, model=model)
dataset = create_dataset("", root={folder!r}.removesuffix("/00000.jpg"))
loader = create_loader(dataset, input_size=config["input_size"], batch_size=256, use_prefetcher=False,
                       interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
                       num_workers=2, crop_pct=config["crop_pct"], device=torch.device("cpu"))
outputs = []
with torch.inference_mode():
    for images, _ in loader:
        if {channels_last}:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs.append(model(images).softmax(-1).topk(5))
for name, values, indices in zip(dataset.filenames(basename=True), torch.cat([o[0] for o in outputs]),
                                 torch.cat([o[1] for o in outputs])):
    print(name, indices.tolist(), values.tolist())
"""

BARE = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession({graph!r}, providers=["CPUExecutionProvider"])
labels = json.load(open({root!r} + "/labels_zh.json", encoding="utf-8"))
def pixels(path):
    image = Image.open(path).convert("RGB")
    width, height = image.size
    scale = 292 / min(width, height)
    width, height = int(width * scale), int(height * scale)
    left, top = (width - 260) // 2, (height - 260) // 2
    return np.asarray(image.resize((width, height), Image.BICUBIC).crop((left, top, left + 260, top + 260)))
def answer(batch):
    for row in session.run(None, {{"pixels": np.stack(batch)}})[0]:
        print([(labels[i], float(row[i])) for i in row.argsort()[::-1][:5]])
paths = [Path({folder!r})] if {folder!r}.endswith(".jpg") else sorted(Path({folder!r}).glob("*.jpg"))
with ThreadPoolExecutor(2) as pool:
    batch = []
    for image in map(lambda future: future, pool.map(pixels, paths)):
        batch.append(image)
        if len(batch) == 8:
            answer(batch)
            batch = []
    if batch:
        answer(batch)
"""


def make_photos(folder: Path, number: int) -> None:
    """Crops of the samples at 500×375, the size of a photo on the web."""
    dice = random.Random(0)
    samples = [Image.open(path).convert("RGB") for path in sorted((ROOT / "samples").glob("*.jpg"))]
    for index in range(number):
        image = samples[index % len(samples)]
        share = dice.uniform(0.6, 1)
        width, height = int(image.width * share), int(image.height * share)
        left, top = dice.randint(0, image.width - width), dice.randint(0, image.height - height)
        crop = image.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
        crop.save(folder / f"{index:05d}.jpg", quality=90)


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of a command."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)[:200]}\n{errors}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


def commands(folder: Path, graph: str) -> dict[str, list[str]]:
    values = {"root": str(ROOT), "folder": str(folder), "graph": graph}

    def script(text: str, **more) -> list[str]:
        return [sys.executable, "-W", "ignore", "-c", text.format(**values, **more)]

    infer = [sys.executable, str(ROOT / "infer.py"), "-m", "wwts_cn_lite", "-d", "cpu", "-f", "jsonl", str(folder)]
    return {
        "bare ONNX Runtime loop": script(BARE),
        "infer.py, ONNX Runtime": [*infer, "--engine", "onnx"],
        "infer.py, torch": [*infer, "--engine", "torch"],
        "plain torch script": script(PLAIN),
        "timm --channels-last": script(TIMM, channels_last=True),
        "timm": script(TIMM, channels_last=False),
    }


def table(title: str, folder: Path, graph: str, rounds: int) -> None:
    figures: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, command in commands(folder, graph).items():
            figures.setdefault(name, []).append(measure(command))
    medians = {}
    for name, rows in figures.items():
        medians[name] = [statistics.median(column) for column in zip(*rows, strict=True)]
    bare = medians["bare ONNX Runtime loop"][0]
    print(f"\n| {title} | seconds | × bare loop | peak MB |\n|---|---|---|---|")
    for name, (seconds, megabytes) in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / bare:.2f} | {megabytes:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="photos of your own, *.jpg")
    arguments = parser.parse_args()
    os.environ["WWTS_OFFLINE"] = "1"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary
        subprocess.run([sys.executable, str(ROOT / "export.py"), "-m", "wwts_cn_lite", "-q"], check=True)
        graph = str(next(Path(temporary, "wwts").glob("graph-*/graph.onnx")))
        one, many = Path(temporary, "one"), arguments.folder or Path(temporary, "many")
        one.mkdir()
        make_photos(one, 1)
        if not arguments.folder:
            many.mkdir()
            make_photos(many, arguments.photos)
        table("one photo, cold process", one / "00000.jpg", graph, max(arguments.rounds, 5))
        table(f"{len(list(many.glob('*.jpg')))} photos", many, graph, arguments.rounds)


if __name__ == "__main__":
    main()
