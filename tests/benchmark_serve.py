"""How serve.py does under load, beside infer.py and beside what people write themselves. Prints Markdown.

    OMP_WAIT_POLICY=passive python tests/benchmark_serve.py [--rounds 3] [--memory 50000] [--restart 10000]

One run measures alternately, with wwts_cn_lite and a photo of 500×375 pixels. The client is hey (Debian: apt install
hey); --restart needs nginx too. Everything stays on 127.0.0.1. The peer on LitServe needs pip install litserve, and is
left out without it. The policy keeps torch's threads, which only the peers use, from spinning on a busy machine.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MODEL = "wwts_cn_lite"
EDGE = b"edge"
# The example that everybody copies: one image a request, read by PIL, run by torch.
PLAIN = """
import io, sys, torch, uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image
from torchvision import transforms

model = torch.hub.load(sys.argv[1], "wwts_cn_lite", source="local").eval()
spec = model.spec
transform = transforms.Compose([
    transforms.Resize(spec["resize"], transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(spec["crop"]),
    transforms.ToTensor(), transforms.Normalize(spec["mean"], spec["std"]),
])
app = FastAPI()


@app.post("/recognize")
async def predict(image: UploadFile):
    picture = Image.open(io.BytesIO(await image.read())).convert("RGB")
    with torch.no_grad():
        confidences, indices = model(transform(picture)[None])[0].softmax(0).topk(5)
    return {spec["labels"][index]: float(value) for value, index in zip(confidences, indices)}


uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
"""
# LitServe's own example of classifying images, with this model; its worker batches up to 8.
LITSERVE = """
import io, sys, litserve, torch
from PIL import Image
from torchvision import transforms


class Classifier(litserve.LitAPI):
    def setup(self, device):
        self.model = torch.hub.load(sys.argv[1], "wwts_cn_lite", source="local").eval().to(device)
        spec = self.model.spec
        self.transform = transforms.Compose([
            transforms.Resize(spec["resize"], transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(spec["crop"]), transforms.ToTensor(),
            transforms.Normalize(spec["mean"], spec["std"]),
        ])

    def decode_request(self, request):
        return self.transform(Image.open(io.BytesIO(request["image"].file.read())).convert("RGB"))

    def batch(self, inputs):
        return torch.stack(inputs)

    def predict(self, inputs):
        with torch.inference_mode():
            return self.model(inputs).softmax(1)

    def unbatch(self, outputs):
        return list(outputs)

    def encode_response(self, output):
        confidences, indices = output.topk(5)
        return {self.model.spec["labels"][index]: float(value) for value, index in zip(confidences, indices)}


if __name__ == "__main__":
    server = litserve.LitServer(Classifier(max_batch_size=8, batch_timeout=0.01, api_path="/recognize"),
                                accelerator="cpu", timeout=60)
    server.run(port=int(sys.argv[2]), log_level="error", generate_client_file=False)
"""
# The other stack that serve.py might have had: LitServe around one Recognizer.
AROUND = """
import io, sys, litserve

sys.path.insert(0, sys.argv[1])
from infer import Recognizer


class Recognize(litserve.LitAPI):
    def setup(self, device):
        self.recognizer = Recognizer("wwts_cn_lite", device="cpu")
        self.recognizer.load()

    def decode_request(self, request):
        return io.BytesIO(request["image"].file.read())

    def batch(self, inputs):
        return inputs

    def predict(self, inputs):
        return list(self.recognizer.stream(inputs))

    def unbatch(self, outputs):
        return outputs

    def encode_response(self, output):
        return output.record()


if __name__ == "__main__":
    server = litserve.LitServer(Recognize(max_batch_size=8, batch_timeout=0.005, api_path="/recognize"),
                                accelerator="cpu", timeout=60)
    server.run(port=int(sys.argv[2]), log_level="error", generate_client_file=False)
"""
NGINX = """
worker_processes 1;
error_log stderr crit;
pid %(folder)s/nginx.pid;
events { worker_connections 1024; }
http {
    access_log off;
    client_body_temp_path %(folder)s/body; proxy_temp_path %(folder)s/proxy; fastcgi_temp_path %(folder)s/a;
    uwsgi_temp_path %(folder)s/b; scgi_temp_path %(folder)s/c;
    upstream wwts { server 127.0.0.1:%(backend)d max_fails=0; keepalive 32; }
    server {
        listen 127.0.0.1:%(port)d;
        client_max_body_size 160m;
        client_body_buffer_size 1m;
        location / {
            proxy_pass http://wwts;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_next_upstream error timeout non_idempotent;
            error_page 502 504 = @busy;
        }
        location @busy {
            default_type application/json;
            add_header Retry-After 1 always;
            return 503 '{"error": "服务正在重新启动,请稍后再试"}';
        }
    }
}
"""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def started(*command: object, port: int):
    """A server as a process, from when it accepts a request until the context ends."""
    environment = {**os.environ, "WWTS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 60) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if connection.recv(100):
                    break
            assert process.poll() is None
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # LitServe's processes outlive it
            os.killpg(process.pid, signal.SIGKILL)


def load(port: int, body: Path, much: int | str, connections: int, rate: int | None = None) -> tuple[list, float, dict]:
    """Send a body by hey that often, or for a time such as "10s", at most ``rate`` times a second and connection.

    Gives the seconds of each answer, sorted; seconds in all; and how many answers had which status.
    """
    kind = f"multipart/form-data; boundary={EDGE.decode()}"
    command = ["hey", "-z" if isinstance(much, str) else "-n", much, "-c", connections, *(["-q", rate] if rate else [])]
    command += ["-t", 60, "-m", "POST", "-T", kind, "-D", body, "-o", "csv", f"http://127.0.0.1:{port}/recognize"]
    start = time.perf_counter()
    output = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    seconds = time.perf_counter() - start
    rows = list(csv.DictReader(io.StringIO(output)))
    statuses = dict(Counter(row["status-code"] for row in rows))
    if not isinstance(much, str) and (lost := much // connections * connections - len(rows)):
        statuses["lost"] = lost
    return sorted(float(row["response-time"]) for row in rows), seconds, statuses


def memory(process: subprocess.Popen) -> float:
    """Resident memory of a process and of those that it started, in MiB."""
    total, waiting = 0, [process.pid]
    while waiting:
        pid = waiting.pop()
        total += int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
        waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return total / 1024


def measure(port: int, body: Path) -> tuple[float, float, float]:
    """Answers a second at 32 connections; seconds of a lone request, median; of ten a second, the 95th percentile."""
    times, seconds, statuses = load(port, body, "10s", 32)
    assert set(statuses) == {"200"}, statuses
    alone, _, _ = load(port, body, "5s", 1)
    paced, _, _ = load(port, body, "10s", 1, 10)
    return len(times) / seconds, statistics.median(alone), paced[int(0.95 * len(paced))]


def print_row(
    name: str, figures: list[tuple[float, float, float]], bases: list[tuple[float, float]], used: float
) -> None:
    """A row of medians: figures of ``measure``, their ratios to others measured just before, and memory in MiB."""
    speed, alone, paced = (statistics.median(column) for column in zip(*figures, strict=True))
    pairs = list(zip(figures, bases, strict=True))
    faster = statistics.median(ours[0] / base[0] for ours, base in pairs)
    slower = statistics.median(ours[1] / base[1] for ours, base in pairs)
    cells = [
        f"{speed:.1f}",
        f"{faster:.2f}",
        f"{alone * 1e3:.1f}",
        f"{slower:.2f}",
        f"{paced * 1e3:.0f}",
        f"{used:.0f}",
    ]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def measure_speed(folder: Path, photo: Path, body: Path, rounds: int) -> None:
    """Throughput and latency of serve.py beside infer.py, then of each peer beside serve.py."""
    sys.path.insert(0, str(ROOT))
    import infer

    photos = folder / "photos"
    photos.mkdir()
    for number in range(480):
        os.link(photo, photos / f"{number}.jpg")
    command = [
        sys.executable,
        ROOT / "infer.py",
        "-m",
        MODEL,
        "-d",
        "cpu",
        photos,
        "-o",
        folder / "x.csv",
        "--overwrite",
    ]
    engine, data = infer.Recognizer(MODEL, device="cpu"), photo.read_bytes()
    engine(photo)

    def measure_bases() -> tuple[float, float]:
        text = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True).stderr
        alone = []
        for _ in range(100):
            start = time.perf_counter()
            assert engine(io.BytesIO(data)).predictions
            alone.append(time.perf_counter() - start)
        return float(re.search(r"([\d.]+) 张/秒", text)[1]), statistics.median(alone)

    columns = ["32 个连接,张/秒", "之比", "单个请求 p50,毫秒", "之比", "每秒 10 个 p95,毫秒", "内存 MB"]
    print(f"| | {' | '.join(columns)} |\n{'|---' * 7}|")
    port = free_port()
    serve = [sys.executable, ROOT / "serve.py", "-q", "-m", MODEL, "-d", "cpu", "--port", port]
    with started(*serve, port=port) as process:
        measure(port, body)
        bases, figures = zip(*((measure_bases(), measure(port, body)) for _ in range(rounds)), strict=True)
        print_row("serve.py,与 infer.py 和引擎本身之比", figures, bases, memory(process))
        peers = {"普通 FastAPI 例子": PLAIN}
        if importlib.util.find_spec("litserve"):
            peers |= {"LitServe 的例子": LITSERVE, "LitServe 套 Recognizer": AROUND}
        for name, code in peers.items():
            script, peer_port = folder / "peer.py", free_port()
            script.write_text(code)
            with started(sys.executable, script, ROOT, peer_port, port=peer_port) as peer:
                load(peer_port, body, "3s", 4)
                bases, figures = zip(
                    *((measure(port, body), measure(peer_port, body)) for _ in range(rounds)), strict=True
                )
                print_row(f"{name},与 serve.py 之比", figures, bases, memory(peer))


def measure_memory(model: str, body: Path, requests: int) -> None:
    """Memory in the course of many requests."""
    port = free_port()
    command = [sys.executable, ROOT / "serve.py", "-q", "-m", model, "--port", port]
    with started(*command, port=port) as process:
        print("\n| 请求 | 内存 MB |\n|---|---|", flush=True)
        step = max(requests // 10 // 32 * 32, 32)
        for done in range(0, requests + 1, step):
            print(f"| {done} | {memory(process):.1f} |", flush=True)
            if done + step <= requests:
                assert set(load(port, body, step, 32)[2]) == {"200"}


def measure_restarts(folder: Path, body: Path, requests: int) -> None:
    """What becomes of requests through nginx while the server is ended and started, again and again."""
    backend, port, stop, restarts = free_port(), free_port(), threading.Event(), []
    (folder / "nginx.conf").write_text(NGINX % {"folder": folder, "backend": backend, "port": port})
    command = [sys.executable, ROOT / "serve.py", "-q", "-m", MODEL, "-d", "cpu", "--port", backend]

    def restart() -> None:
        while not stop.is_set():
            with started(*command, port=backend) as process:
                stop.wait(15)
                start = time.monotonic()
                process.send_signal(signal.SIGTERM)
                process.wait(20)
                restarts.append(time.monotonic() - start)

    thread = threading.Thread(target=restart)
    thread.start()
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    with subprocess.Popen([nginx, "-p", folder, "-c", folder / "nginx.conf", "-g", "daemon off;"]) as proxy:
        time.sleep(5)
        try:
            # Below what the server can do: 503 comes at once, and would use up the requests while there is no server.
            times, seconds, statuses = load(port, body, requests // 32 * 32, 32, 1)
        finally:
            stop.set()
            thread.join()
            proxy.terminate()
    print(f"\n{sum(statuses.values())} 个请求,{seconds:.0f} 秒,状态: {statuses}")
    print(f"重启 {len(restarts)} 次,SIGTERM 之后最多 {max(restarts):.1f} 秒结束", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 3), ("memory", 0), ("restart", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default=MODEL, help="for --memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo, body = folder / "photo.jpg", folder / "body"
        Image.open(ROOT / "samples" / "cat.jpg").convert("RGB").resize((500, 375)).save(photo, quality=90)
        head = b'\r\nContent-Disposition: form-data; name="image"; filename="photo.jpg"\r\n\r\n'
        body.write_bytes(b"--" + EDGE + head + photo.read_bytes() + b"\r\n--" + EDGE + b"--\r\n")
        if arguments.rounds:
            measure_speed(folder, photo, body, arguments.rounds)
        if arguments.memory:
            measure_memory(arguments.model, body, arguments.memory)
        if arguments.restart:
            measure_restarts(folder, body, arguments.restart)


if __name__ == "__main__":
    main()
