"""How fast report.py makes its page, what memory that takes, and how fast Chromium opens it and scrolls.

    python tests/benchmark_report.py [--photos 10000]

Photos of 500×375 pixels, 500 different ones cut from samples/ under as many names as asked for; then 50 of
4,000×3,000 pixels. Prints Markdown. Needs Debian's chromium and chromium-driver, and pip install selenium.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from browser import start_browser
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCROLL = """
const done = arguments[0], times = [];
let last = performance.now();
function frame() {
  const now = performance.now();
  times.push(now - last);
  last = now;
  scrollBy(0, 700);
  if (times.length < 300) return requestAnimationFrame(frame);
  times.sort((one, other) => one - other);
  done([times[150], times[285], times[299]]);
}
requestAnimationFrame(frame);
"""


def make_photos(folder: Path, count: int, size: tuple[int, int], different: int) -> Path:
    """Photos cut from samples/, and a result file that names them all."""
    random.seed(0)
    samples = [Image.open(path).convert("RGB") for path in sorted((ROOT / "samples").glob("*.jpg"))]
    results = folder / f"{size[0]}-{count}.jsonl"
    with open(results, "w", encoding="utf-8") as file:
        for number in range(count):
            path = folder / f"{size[0]}-{number}.jpg"
            if number < different:
                image = samples[number % len(samples)]
                left, top = random.randrange(image.width // 3), random.randrange(image.height // 3)
                box = (left, top, left + image.width * 2 // 3, top + image.height * 2 // 3)
                image.resize(size, box=box).save(path, quality=90)
            elif not path.exists():
                os.link(folder / f"{size[0]}-{number % different}.jpg", path)
            answers = [{"label": f"标签{number % 97 + rank}", "confidence": 0.5**rank / 2} for rank in range(5)]
            record = {"path": path.name, "model": "m", "version": "00000000", "results": answers}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return results


def make_page(results: Path) -> None:
    """Run report.py; print its speed, its peak memory and the size of the page."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, ROOT / "report.py", "-q", results.name], cwd=results.parent)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0
    size = results.with_suffix(".html").stat().st_size / 1e6
    count = sum(1 for _ in open(results, "rb"))
    speed, memory = count / seconds, usage.ru_maxrss / 2**10
    print(f"| {results.stem} | {seconds:.1f} 秒,{speed:.0f} 张/秒 | {memory:.0f} MiB | {size:.1f} MB |", flush=True)


def open_page(page: Path) -> None:
    """Open the page three times and scroll through it; print milliseconds."""
    with start_browser(page.parent) as browser:
        for _ in range(3):
            start = time.perf_counter()
            browser.get(page.as_uri())
            assert browser.find_elements("css selector", "#photos li img")
            print(f"打开 {page.name}: {time.perf_counter() - start:.2f} 秒")
        median, most, worst = browser.execute_async_script(SCROLL)
        print(f"滚动 300 帧: 中位数 {median:.0f},95% 以内 {most:.0f},最长 {worst:.0f} 毫秒")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=10000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| 边长-张数 | 时间 | 内存峰值 | 网页 |\n|---|---|---|---|")
        for count in (arguments.photos // 10, arguments.photos):
            make_page(results := make_photos(folder, count, (500, 375), 500))
        make_page(make_photos(folder, 50, (4000, 3000), 50))
        print()
        open_page(results.with_suffix(".html"))


if __name__ == "__main__":
    main()
