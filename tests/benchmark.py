"""Speed beside the peers, in one run, alternating, on the same photos, all with the weights of wwts_cn_lite.

    python tests/benchmark.py [--photos 1000] [--large 100] [--rounds 3] [--folder FOLDER]

Peers: a plain torch script as one finds it everywhere; timm's own way (what its inference.py does: create_dataset,
create_loader, topk), plain and with --channels-last; and bare loops with two decoding threads, which do nothing but
the work itself: ONNX Runtime with the same graphs as infer.py, OpenVINO (in float32) and torch.compile (with
freezing), where they are installed. Tables: one photo in a cold process; many photos of the size of the web; photos
of 12 megapixels; a model learned of one's own categories. Prints medians and ratios as Markdown.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
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
import numpy as np
from PIL import Image
{prelude}
labels = json.load(open({labels!r}, encoding="utf-8"))
def pixels(path):
    image = Image.open(path)
    if {draft}:
        image.draft("RGB", (2 * 292, 2 * 292))
    image = image.convert("RGB")
    width, height = image.size
    scale = 292 / min(width, height)
    width, height = int(width * scale), int(height * scale)
    left, top = (width - 260) // 2, (height - 260) // 2
    return np.asarray(image.resize((width, height), Image.BICUBIC).crop((left, top, left + 260, top + 260)))
def answer(batch):
    for row in run(np.stack(batch)):
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

ONNXRUNTIME = """
import onnxruntime
session = onnxruntime.InferenceSession({graph!r}, providers=["CPUExecutionProvider"])
run = lambda pixels: session.run(None, {{"pixels": pixels}})[0]
"""

OPENVINO = """
import openvino
model = openvino.Core().compile_model({graph!r}, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
run = lambda pixels: model(pixels)[0]
"""

COMPILED = """
import torch, torch._inductor.config
sys.path.insert(0, {root!r})
import hubconf
torch._inductor.config.freezing = True
model = torch.compile(hubconf.wwts_cn_lite().fuse().to(memory_format=torch.channels_last))
def run(pixels):
    with torch.inference_mode():
        return model((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128).softmax(1).numpy()
"""


def make_photos(folder: Path, number: int, size: tuple[int, int] = (500, 375)) -> Path:
    """Crops of the samples in one size: by default that of a photo on the web."""
    dice = random.Random(0)
    samples = [Image.open(path).convert("RGB") for path in sorted((ROOT / "samples").glob("*.jpg"))]
    folder.mkdir()
    for index in range(number):
        image = samples[index % len(samples)]
        share = dice.uniform(0.6, 1)
        width, height = int(image.width * share), int(image.height * share)
        left, top = dice.randint(0, image.width - width), dice.randint(0, image.height - height)
        crop = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
        crop.save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of a command."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)[:200]}\n{errors}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


def python(text: str, **values) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", text.format(root=str(ROOT), **values)]


def bare(folder: Path, graph: Path, labels: Path, prelude: str = ONNXRUNTIME, draft: bool = False) -> list[str]:
    """A loop that does nothing but the work itself."""
    prelude = prelude.format(root=str(ROOT), graph=str(graph))
    return python(BARE, prelude=prelude, folder=str(folder), labels=str(labels), draft=draft)


def infer(folder: Path, model: Path | str, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "infer.py"), "-m", str(model), "-d", "cpu", "-f", "jsonl", *options, str(folder)]


def all_ways(folder: Path, graph: Path, int8: Path) -> dict[str, list[str]]:
    """Every way to run wwts_cn_lite over a folder, or over one photo."""
    labels = ROOT / "labels_zh.json"
    ways = {
        "bare ONNX Runtime loop": bare(folder, graph, labels),
        "infer.py, ONNX Runtime": infer(folder, "wwts_cn_lite", "--engine", "onnx"),
        "bare ONNX Runtime loop, int8": bare(folder, int8, labels),
        "infer.py, ONNX Runtime, int8": infer(folder, int8),
        "infer.py, torch": infer(folder, "wwts_cn_lite", "--engine", "torch"),
        "plain torch script": python(PLAIN, folder=str(folder)),
        "timm --channels-last": python(TIMM, folder=str(folder), channels_last=True),
        "timm": python(TIMM, folder=str(folder), channels_last=False),
    }
    if importlib.util.find_spec("openvino"):
        ways["bare OpenVINO loop"] = bare(folder, graph, labels, OPENVINO)
        ways["bare OpenVINO loop, int8"] = bare(folder, int8, labels, OPENVINO)
    if shutil.which("g++"):
        ways["bare torch.compile loop"] = bare(folder, graph, labels, COMPILED)
    return ways


def table(title: str, ways: dict[str, list[str]], rounds: int) -> None:
    """Run all ways alternately, and print medians; the first is what the others are compared with."""
    figures: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, command in ways.items():
            figures.setdefault(name, []).append(measure(command))
    medians = {}
    for name, rows in figures.items():
        medians[name] = [statistics.median(column) for column in zip(*rows, strict=True)]
    first = next(iter(medians))
    print(f"\n| {title} | seconds | × {first} | peak MB |\n|---|---|---|---|")
    for name, (seconds, megabytes) in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / medians[first][0]:.2f} | {megabytes:.0f} |", flush=True)


def run_script(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / f"{name}.py"), "-q", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--large", type=int, default=100, help="photos of 12 megapixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="photos of your own, *.jpg")
    arguments = parser.parse_args()
    os.environ["WWTS_OFFLINE"] = "1"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = temporary
        many = arguments.folder or make_photos(work / "many", arguments.photos)
        one = make_photos(work / "one", 1) / "00000.jpg"
        run_script("export", "-m", "wwts_cn_lite")
        (graph,) = work.glob("wwts/graph-*/graph.onnx")
        int8 = work / "int8.onnx"
        # Speed is what is measured here, whatever the photos are.
        calibration = make_photos(work / "calibration", 100)
        quantized = ("--int8", calibration, "--least-agreement", 0)
        run_script("export", "-m", "wwts_cn_lite", *quantized, int8)
        table("one photo, cold process", all_ways(one, graph, int8), max(arguments.rounds, 5))
        ways = all_ways(many, graph, int8)
        table(f"{len(list(many.glob('*.jpg')))} photos", ways, arguments.rounds)

        large = make_photos(work / "large", arguments.large, (4032, 3024))
        labels = ROOT / "labels_zh.json"
        ways = {name: way for name, way in all_ways(large, graph, int8).items() if "compile" not in name}
        ways["bare ONNX Runtime loop, draft"] = bare(large, graph, labels, draft=True)
        ways["infer.py, ONNX Runtime, --draft"] = infer(large, "wwts_cn_lite", "--engine", "onnx", "--draft")
        ways["infer.py, ONNX Runtime, int8, draft"] = infer(large, int8, "--draft")
        table(f"{arguments.large} photos of 12 megapixels", ways, arguments.rounds)

        for index, photo in enumerate(sorted(calibration.glob("*.jpg"))):
            category = work / "categories" / "abcd"[index % 4]
            category.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, category)
        learned, alone, small = work / "own.safetensors", work / "own.onnx", work / "own-int8.onnx"
        run_script("learn", work / "categories", "-m", "wwts_cn_lite", "-o", learned)
        for options in ((), (alone,), (*quantized, small)):
            run_script("export", "-m", learned, *options)
        labels = work / "labels.json"
        labels.write_text(json.dumps(list("abcd")))
        ways = {
            "bare ONNX Runtime loop": bare(many, alone, labels),
            "infer.py, ONNX Runtime": infer(many, learned, "--engine", "onnx"),
            "bare ONNX Runtime loop, int8": bare(many, small, labels),
            "infer.py, ONNX Runtime, int8": infer(many, small),
            "infer.py, torch": infer(many, learned, "--engine", "torch"),
        }
        table("the same with a learned model", ways, arguments.rounds)


if __name__ == "__main__":
    main()
