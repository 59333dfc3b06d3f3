"""Fixtures: infer.py in a process of its own, a full-size wwts_cn_base made here, a ModelScope server on loopback."""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SAMPLES = sorted((ROOT / "samples").glob("*.jpg"))

# In this process too: no test may find weights that the machine happens to have, or go to the network.
os.environ["WWTS_OFFLINE"] = "1"
os.environ["MODELSCOPE_CACHE"] = "/nonexistent/modelscope"
# Users have neither; they change when standard output is written and whether start-up compiles.
for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)
# Threads that have nothing to do sleep: spinning costs several times the work where others use the machine too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """No test may find, or change, what the program keeps for the user who runs the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def infer(home):
    """Run infer.py as a user would; stdout and stderr come back as UTF-8 text."""

    def run(*arguments, env=None, cwd=ROOT, timeout=120, script="infer", **options):
        environment = {
            **os.environ,
            "HOME": str(home),
            "MODELSCOPE_CACHE": str(home / "modelscope"),
            "CUDA_VISIBLE_DEVICES": "",
            **(env or {}),
        }
        return subprocess.run(
            [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)],
            env={name: value for name, value in environment.items() if value is not None},
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            **options,
        )

    return run


@pytest.fixture
def infer_here(capsys, monkeypatch):
    """A script's main in this process, where torch is imported already: the same words in a tenth of the time."""
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def run(*arguments, script="infer"):
        status = importlib.import_module(script).main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=captured.out, stderr=captured.err)

    return run


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """pytorch_model.pt and meta_info.txt of wwts_cn_base's full size, with random weights, as upstream packs them."""
    import timm
    import torch

    folder = tmp_path_factory.mktemp("base")
    with torch.device("meta"):
        shapes = timm.create_model("resnest101e", num_classes=54092).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in shapes.items():
        if key.endswith("num_batches_tracked"):
            tensor = torch.tensor(1234)
        elif key.endswith("running_mean"):
            tensor = torch.randn(value.shape, generator=generator) * 0.2
        elif key.endswith("running_var"):
            tensor = torch.rand(value.shape, generator=generator) + 0.5
        elif value.ndim == 1:  # batch-norm scales and shifts, biases
            # Small in the last batch-norm of a block, so that 33 additions do not grow without bound.
            scale = 0.2 if "bn3.weight" in key else 1.0 if key.endswith("weight") else 0.0
            tensor = scale + torch.randn(value.shape, generator=generator) * 0.05
        else:
            tensor = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        state["module." + key] = tensor
    torch.save({"state_dict": state}, folder / "pytorch_model.pt")
    lines = [f"{index}\t标签{index}\tn{index:08d}\n" for index in range(54092)]
    (folder / "meta_info.txt").write_text("".join(lines), encoding="utf-8")
    return folder


LOGIN_PAGE = b"<html><title>Login</title>\n<body>please log in</body></html>"


class ModelScopeServer:
    """ModelScope's file API on loopback for one model.

    ``files`` is what it lists and ``sent`` what it really sends; ``answers`` maps "listing" or the name of a
    file to a function that takes the request handler and answers in another way.
    """

    def __init__(self, folder: Path):
        self.files = {name: (folder / name).read_bytes() for name in ("pytorch_model.pt", "meta_info.txt")}
        self.sent: dict[str, bytes] = {}
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.metadata = ("Size", "Sha256")
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.closed = threading.Event()
        self._digests: dict[int, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.requests.append(self.path)
                outer.ranges += self.headers.get_all("Range", [])
                parts = urlsplit(self.path)
                name = parse_qs(parts.query).get("FilePath", ["listing"])[0]
                if parts.path == "/login":
                    self.reply(200, LOGIN_PAGE, {"Content-Type": "text/html"})
                elif parts.path.endswith(("/repo/files", "/repo")):
                    self.body = outer.body(name)
                    outer.answers.get(name, Handler.answer)(self)
                else:
                    self.reply(404, b"{}")

            def answer(self):
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                if self.body is None:
                    self.reply(404, b"{}")
                elif start:
                    span = {"Content-Range": f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"}
                    self.reply(206, self.body[start:], span)
                else:
                    self.reply(200, self.body)

            def reply(self, status, body, headers=None):
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # a client may have read enough
                    self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.closed = self.closed
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # It looks that often whether it is to stop; the default is half a second.
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def body(self, name):
        if name == "listing":
            return json.dumps({"Code": 200, "Success": True, "Data": {"Files": self.listing()}}).encode()
        return self.sent.get(name, self.files.get(name))

    def listing(self):
        entries = []
        for name, body in self.files.items():
            digest = self._digests.get(id(body)) or hashlib.sha256(body).hexdigest()
            self._digests[id(body)] = digest
            metadata = {"Size": len(body), "Sha256": digest}
            entries.append({"Path": name, "Name": name, "Type": "blob"} | {key: metadata[key] for key in self.metadata})
        return entries

    def close(self):
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def modelscope(base_folder):
    server = ModelScopeServer(base_folder)
    yield server
    server.close()


@pytest.fixture
def small_modelscope(tmp_path):
    """The same with files of a few hundred kilobytes, for what goes wrong before anything is loaded."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name, size in (("pytorch_model.pt", 300_000), ("meta_info.txt", 20_000)):
        (folder / name).write_bytes(np.random.default_rng(size).bytes(size))
    server = ModelScopeServer(folder)
    yield server
    server.close()


@pytest.fixture
def hub_repository(tmp_path):
    """A small hub repository with ImageNet-1k models of the kind that other people publish."""
    folder = tmp_path / "别人的 仓库"
    folder.mkdir()
    (folder / "hubconf.py").write_text(
        """
import torch
from torch import nn

dependencies = ["torch"]


class _Net(nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def _trained(classes=1000, answer=285):
    net = _Net(classes)
    nn.init.zeros_(net.fc.weight)
    net.fc.bias.data.zero_()
    net.fc.bias.data[answer] = 5.0
    return net


def resnet18(pretrained=False, **kwargs):
    print("loading resnet18 ...")
    return _trained() if pretrained else _Net()


def resnet50(*, weights=None, progress=True):
    return _trained(answer=7) if weights == "DEFAULT" else _Net()


def seven():
    return _trained(7, 3)


def broken():
    raise KeyError("no such thing")


def needs_torchvision():
    import torchvision


def detector():
    net = _trained()
    net.forward = lambda x: {"boxes": x}
    return net


def not_a_number():
    net = _trained()
    net.fc.bias.data[3] = float("nan")
    return net


def too_large():
    net = _trained()

    def forward(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    net.spec = {"num_classes": 1000}
    net.forward = forward
    return net
""",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="session")
def fast_repository(tmp_path_factory):
    """A model that costs next to nothing, so that what is tested is the pipeline: brightest of eight colour sums."""
    folder = tmp_path_factory.mktemp("fast")
    (folder / "hubconf.py").write_text(
        """
import os, time
import torch
from torch import nn


class _Net(nn.Module):
    def __init__(self, slow=0.0, most=None, half=False):
        super().__init__()
        self.slow, self.most, self.half = slow, most, half
        self.register_buffer("mixture", torch.arange(24.0).sin().view(3, 8))

    def forward(self, x):
        time.sleep(self.slow)
        if self.most and len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        # The upper half alone tells an image from one that is turned.
        return (x[:, :, : x.shape[2] // 2] if self.half else x).mean((2, 3)) @ self.mixture


def _model(**options):
    net = _Net(**options)
    net.spec = dict(
        name="fast", num_classes=8, labels=[f"颜色{i}" for i in range(8)], resize=32, crop=32,
    )
    return net


def fast():
    return _model()


def slow():
    return _model(slow=0.1)


def cramped():
    return _model(most=3)


def upper():
    return _model(half=True)
"""
    )
    return folder


@pytest.fixture(scope="session")
def _exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    program, cache = folder / "程序 1", folder / "cache"
    program.mkdir()
    for name in ("infer.py", "export.py", "hubconf.py", "labels_zh.json"):
        shutil.copy2(ROOT / name, program)
    for name in ("samples", "wwts"):
        shutil.copytree(ROOT / name, program / name)
    env = {"XDG_CACHE_HOME": str(cache), "HOME": str(folder), "MODELSCOPE_CACHE": str(folder / "ms")}

    def run(*arguments, env=(), program=program, script="infer"):
        environment = {**os.environ, **run.env, "CUDA_VISIBLE_DEVICES": "", **dict(env)}
        command = [sys.executable, str(program / f"{script}.py"), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", cwd=ROOT)

    run.program, run.folder, run.env = program, folder, env
    result = run("-m", "wwts_cn_lite", script="export")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and "已导出" in result.stderr and "最多相差" in result.stderr
    (run.graph,) = (cache / "wwts").glob("*/graph.onnx")
    run.single = folder / "lite.onnx"  # the same with its weights in one file
    import onnx

    import export

    spec = next(p.value for p in onnx.load(run.graph).metadata_props if p.key == "wwts_spec")
    assert export.main(["-m", "wwts_cn_lite", "-q", str(run.single)]) == 0
    os.environ.pop("TQDM_DISABLE", None)  # which a quiet command sets for its process
    assert json.loads(onnx.load(run.single).metadata_props[0].value) == json.loads(spec)
    return run


@pytest.fixture
def exported(_exported, infer_here, monkeypatch):
    """A copy of the program, and a user's cache folder into which it exported wwts_cn_lite.

    Call it to run that copy in a process of its own, or ``here`` to run it in this one; ``vouch`` makes the graph
    as good as new after a test that touched it.
    """

    def here(*arguments, env=(), script="infer"):
        from wwts import files

        with monkeypatch.context() as patch:
            patch.setattr(files, "HERE", _exported.program)
            for name, value in {**_exported.env, **dict(env)}.items():
                patch.setenv(name, value)
            return infer_here(*arguments, script=script)

    def vouch():
        from wwts import memory

        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", _exported.env["XDG_CACHE_HOME"])
            folder = _exported.graph.parent
            memory.remember(folder.name, {str(path): memory.file_state(path) for path in folder.iterdir()})

    _exported.here, _exported.vouch = here, vouch
    return _exported


SPEC = dict(name="tiny", num_classes=8, resize=32, crop=32, interpolation="bilinear")
SPEC |= dict(mean=[0.5] * 3, std=[0.5] * 3, labels=[f"颜色{index}" for index in range(8)])


def make_graph(path, spec=SPEC, classes=8, external=None, crop=32, sign=1):
    """A graph of the form that export.py writes, with whatever metadata; ``sign`` -1 turns its answers round."""
    import onnx
    from onnx import TensorProto, helper

    mixture = sign * np.sin(np.arange(3 * classes, dtype=np.float32)).reshape(3, classes)
    weights = onnx.numpy_helper.from_array(mixture, "mixture")
    if external is not None:
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", "0"), ("length", str(mixture.nbytes))):
            weights.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "mixture"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["confidences"]),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", crop, crop, 3])
    confidences = helper.make_tensor_value_info("confidences", TensorProto.FLOAT, ["N", classes])
    axes = onnx.numpy_helper.from_array(np.array([1, 2]), "axes")
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", [pixels], [confidences], [weights, axes]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    if spec is not None:
        helper.set_model_props(model, {"wwts_spec": spec if isinstance(spec, str) else json.dumps(spec)})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory):
    """The arguments for a model without torch, for processes where the model does not matter: they start at once."""
    return "-m", str(make_graph(tmp_path_factory.mktemp("tiny") / "tiny.onnx"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """300 small images of different colours in nested folders."""
    folder = tmp_path_factory.mktemp("photos")
    colours = np.random.default_rng(0).integers(0, 256, (300, 3))
    for number, colour in enumerate(colours):
        place = folder / f"第{number % 7}天"
        place.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), tuple(map(int, colour))).save(place / f"{number:04d}.png")
    return folder


@pytest.fixture
def tmpfs(tmp_path):
    """A function that mounts a memory file system with the options given, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not allowed here")
        return folder

    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium without a window or a network but loopback; what it downloads lies in its folder ``downloads``."""
    from browser import start_browser

    downloads = tmp_path_factory.mktemp("downloads")
    try:
        chromium = start_browser(downloads)
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))
    with chromium:
        chromium.downloads = downloads
        yield chromium
