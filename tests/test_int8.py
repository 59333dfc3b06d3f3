"""export.py --int8: what it writes, says and refuses; and infer.py with what it wrote."""

import json
import re

import infer as infer_module

import numpy as np
import onnx
import pytest
from conftest import ROOT, SAMPLES
from PIL import Image, ImageEnhance, ImageOps

from exporting import quantization
from wwts import torch_engine

LITE = ("-m", "wwts_cn_lite")


def make_photos(folder, number, sizes=(0.6, 0.95)):
    """Crops of the samples, mirrored, darker and brighter."""
    folder.mkdir()
    dice = np.random.default_rng(0)
    samples = [Image.open(path).convert("RGB") for path in SAMPLES]
    for index in range(number):
        image = samples[index % len(samples)]
        width, height = (int(side * dice.uniform(*sizes)) for side in image.size)
        left, top = dice.integers(0, image.width - width), dice.integers(0, image.height - height)
        image = image.crop((left, top, left + width, top + height)).resize((320, 300))
        image = ImageOps.mirror(image) if dice.random() < 0.5 else image
        ImageEnhance.Brightness(image).enhance(dice.uniform(0.7, 1.4)).save(folder / f"{index:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def photos_of_samples(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("int8") / "照片", 48)


@pytest.fixture(scope="module")
def int8(tmp_path_factory, photos_of_samples):
    """wwts_cn_lite in int8, in a file and with what was said when it was exported."""
    import subprocess
    import sys

    path = tmp_path_factory.mktemp("int8") / "lite.onnx"
    (photos_of_samples / "000_坏.jpg").write_bytes(b"\xff\xd8\xff broken")
    command = [sys.executable, ROOT / "export.py", *LITE, "--int8", photos_of_samples, path]
    result = subprocess.run([*map(str, command)], capture_output=True, encoding="utf-8")
    (photos_of_samples / "000_坏.jpg").unlink()
    assert result.returncode == 0, result.stderr
    return path, result


def test_what_export_says(int8):
    path, result = int8
    assert result.stdout == "" and "Traceback" not in result.stderr and "WARNING" not in result.stderr
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["lite.onnx"]
    layers, kept = map(int, re.search(r"(\d+) 层中有 (\d+) 层留在 float32", result.stderr).groups())
    assert layers == 65 and 0 <= kept <= 20
    sizes = [float(size) for size in re.search(r"int8 ([\d.]+) MB,float32 ([\d.]+) MB;速度是", result.stderr).groups()]
    assert sizes[0] < 0.5 * sizes[1] and sizes[0] == pytest.approx(path.stat().st_size / 1e6, abs=0.06)
    agreement = re.search(
        r"没有参加校准的 24 张照片上,首选标签有 ([\d.]+)% 与 float32 相同,置信度最多相差 0\.\d{3}", result.stderr
    )
    assert float(agreement[1]) >= 95
    # Too few photos for figures that one can rely on, and one that cannot be read.
    assert "照片只有 48 张" in result.stderr and "000_坏.jpg" in result.stderr


def test_the_graph_is_int8_and_takes_pixels(int8):
    proto = onnx.load(int8[0])
    onnx.checker.check_model(proto)
    (pixels,), (confidences,) = proto.graph.input, proto.graph.output
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in pixels.type.tensor_type.shape.dim[1:]] == [260, 260, 3]
    assert confidences.type.tensor_type.shape.dim[1].dim_value == 1000
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["wwts_spec"])["name"] == "wwts_cn_lite" and metadata["wwts_precision"] == "int8"
    weights = [tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sum(np.prod(tensor.dims) for tensor in weights) > 5e6
    assert proto.graph.node[-1].op_type == "Softmax"


def test_infer_runs_it_and_names_it(int8, infer, exported):
    ours = infer("-m", int8[0], *SAMPLES, "-f", "jsonl", "-k", "1000")
    assert ours.returncode == 0 and "使用设备: cpu (ONNX Runtime, int8)\n" in ours.stderr, ours.stderr
    theirs = infer("-m", exported.single, *SAMPLES, "-f", "jsonl", "-k", "1000")
    assert "使用设备: cpu (ONNX Runtime)\n" in theirs.stderr
    for a, b in zip(*([json.loads(line) for line in r.stdout.splitlines()] for r in (ours, theirs)), strict=True):
        assert a["model"] == b["model"] and a["version"] != b["version"]
        assert a["results"][0]["label"] == b["results"][0]["label"]
        assert a["results"][0]["confidence"] == pytest.approx(b["results"][0]["confidence"], abs=0.1)


def test_only_the_word_itself_is_believed(int8, tmp_path):
    proto = onnx.load(int8[0])
    for entry in proto.metadata_props:
        entry.value = "int8)\x1b[31m" if entry.key == "wwts_precision" else entry.value
    onnx.save(proto, tmp_path / "odd.onnx")
    assert infer_module.OnnxEngine(tmp_path / "odd.onnx").device_name == "cpu (ONNX Runtime)"


def write_graph(network, path):
    """An untrained network of 10 classes on images of 32×32, as float32."""
    import export

    spec = dict(name="bad", num_classes=10, labels=[str(i) for i in range(10)], resize=32, crop=32)
    spec.update(interpolation="bilinear", mean=[0.5] * 3, std=[0.5] * 3)
    spec = infer_module.Spec.parse(spec, "x")
    model = torch_engine.HubModel(network.eval(), spec, "0" * 64, None, False)
    export.write_graph(torch_engine.TorchEngine(model, "cpu", "float32"), path, separate_weights=True)
    return np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)


def test_what_is_left_in_float_is_what_does_harm(tmp_path):
    """Of layers alike but one, whose channels differ so much that 256 steps are too few, that one stays in float."""
    torch = pytest.importorskip("torch")

    torch.manual_seed(0)
    layers = [
        torch.nn.Sequential(torch.nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), torch.nn.ReLU()) for i in range(20)
    ]
    with torch.no_grad():
        for layer in layers:
            torch.nn.init.kaiming_normal_(layer[0].weight)
        # One channel that takes up the whole range, and that the next layer hardly looks at.
        layers[9][0].weight[0] *= 300
        layers[10][0].weight[:, 0] /= 300
    network = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10))
    pixels = write_graph(network, tmp_path / "float32.onnx")
    quantizer = quantization.Quantizer(tmp_path / "float32.onnx", pixels)
    runs = quantizer.runs()
    assert 2 <= len(runs) <= 14 and sum(work > 0 for work in quantizer.work.values()) == 21
    quantizer.write(tmp_path / "all.onnx", list(quantizer.work), {})
    quantization.quantize_graph(tmp_path / "float32.onnx", tmp_path / "int8.onnx", pixels, {"wwts_precision": "int8"})
    assert quantizer.error(tmp_path / "int8.onnx") < 0.75 * quantizer.error(tmp_path / "all.onnx")


def test_rounded_weights_move_no_answer_one_way(tmp_path):
    """Where what flows in is positive, roundings that do not cancel out would move an output in all photos alike."""
    torch = pytest.importorskip("torch")
    from onnxruntime.quantization import QuantType, quantize_static

    torch.manual_seed(0)
    blocks = [(3, 32, 3, 1, True), (32, 32, 3, 32, True), (32, 64, 3, 4, True), (64, 32, 1, 1, False)]
    blocks += [(32, 32, 1, 1, True), (32, 32, 3, 8, True)]
    layers = []
    for inputs, outputs, size, groups, biased in blocks:
        layers += [torch.nn.Conv2d(inputs, outputs, size, groups=groups, bias=biased), torch.nn.ReLU6()]
        torch.nn.init.kaiming_normal_(layers[-2].weight)

    class Head(torch.nn.Module):
        """A Linear whose weights are stored the other way round."""

        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(torch.randn(32, 10) / 2), torch.nn.Parameter(torch.randn(10))

        def forward(self, features):
            return torch.addmm(self.bias, features.mean((2, 3)), self.weight)

    pixels = write_graph(torch.nn.Sequential(*layers, Head()), tmp_path / "float32.onnx")
    proto = onnx.load(tmp_path / "float32.onnx")
    first, second = [node for node in proto.graph.node if node.op_type == "Conv"][-2:]
    second.input[2] = first.input[2]  # layers may share a bias
    onnx.save(proto, tmp_path / "float32.onnx")

    def logits(path):
        engine = infer_module.OnnxEngine(path)
        indices, values = engine.classify(list(pixels), 10)
        values = np.log(np.take_along_axis(values, indices.argsort(1), 1))
        return values - values.mean(1, keepdims=True)

    class Photos:
        def __init__(self):
            self.rows = iter(pixels)

        def get_next(self):
            return next(({"pixels": row[None]} for row in self.rows), None)

    quantizer = quantization.Quantizer(tmp_path / "float32.onnx", pixels)
    quantizer.write(tmp_path / "ours.onnx", list(quantizer.work), {})
    options = dict(per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["Conv", "Gemm", "Clip"])
    quantize_static(tmp_path / "float32.onnx", tmp_path / "plain.onnx", Photos(), **options)
    expected = logits(tmp_path / "float32.onnx")
    ours, plain = (abs((logits(tmp_path / f"{name}.onnx") - expected).mean(0)).mean() for name in ("ours", "plain"))
    assert ours < plain / 2, (ours, plain)


@pytest.mark.parametrize("biased", [False, True])
def test_networks_without_a_bias_and_of_one_dimension(tmp_path, biased):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 4, stride=4, bias=False), torch.nn.ReLU(), torch.nn.Flatten(2)]
    layers += [torch.nn.Conv1d(8, 16, 3, bias=biased), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool1d(1)]
    layers += [torch.nn.Flatten(), torch.nn.Linear(16, 10, bias=False)]
    pixels = write_graph(torch.nn.Sequential(*layers), tmp_path / "float32.onnx")
    quantization.quantize_graph(tmp_path / "float32.onnx", tmp_path / "int8.onnx", pixels, {})
    tops = [
        infer_module.OnnxEngine(tmp_path / f"{name}.onnx").classify(list(pixels), 1)[1] for name in ("float32", "int8")
    ]
    assert np.allclose(*tops, atol=0.002)


def test_refusals(infer_here, hub_repository, photos_of_samples, tmp_path, monkeypatch):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"the one before")
    foreign = ("--repo", hub_repository, "-m", "resnet18")
    few = make_photos(tmp_path / "few", 19)
    for arguments, message in (
        ((*LITE, "--int8", photos_of_samples), "写明导出的文件名"),
        ((*foreign, "--int8", few, path), "能用的照片只有 19 张"),
        ((*foreign, "--int8", tmp_path / "none", path), "能用的照片只有 0 张"),
        ((*foreign, "--int8", few, path, "--least-agreement", "95"), "0 到 1 之间"),
    ):
        result = infer_here(*arguments, script="export")
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr


def test_too_little_agreement_is_refused_unless_told(
    infer_here, hub_repository, photos_of_samples, tmp_path, monkeypatch
):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"the one before")
    arguments = ("--repo", hub_repository, "-m", "resnet18", "--int8", photos_of_samples, path)
    right = infer_module.OnnxEngine.classify

    def wrong(self, batch, topk):
        indices, values = right(self, batch, topk)
        return (indices[:, ::-1], values[:, ::-1]) if "int8" in self.device_name else (indices, values)

    with monkeypatch.context() as patch:
        patch.setattr(infer_module.OnnxEngine, "classify", wrong)
        result = infer_here(*arguments, script="export")
        assert result.returncode == 3 and "低于 95.0%,未保存" in result.stderr and "--least-agreement" in result.stderr
        assert path.read_bytes() == b"the one before" and sorted(
            e.name for e in tmp_path.iterdir() if "x" in e.name
        ) == ["x.onnx"]
        result = infer_here(*arguments, "--least-agreement", "0", script="export")
        assert result.returncode == 0 and "首选标签有 0.0% 与 float32 相同" in result.stderr
    result = infer_here("-m", path, SAMPLES[0], "-f", "jsonl")
    assert result.returncode == 0 and "(ONNX Runtime, int8)" in result.stderr
    assert json.loads(result.stdout)["results"][0]["index"] == 285


def test_a_learned_model(infer_here, photos_of_samples, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    pytest.importorskip("safetensors")
    monkeypatch.setattr(quantization, "RUNS", 1)  # which run does most harm takes half a minute to find
    for photo in sorted(photos_of_samples.glob("*.jpg")):
        folder = tmp_path / "学" / SAMPLES[int(photo.stem) % len(SAMPLES)].stem
        folder.mkdir(parents=True, exist_ok=True)
        (folder / photo.name).write_bytes(photo.read_bytes())
    model, path = tmp_path / "我的.safetensors", tmp_path / "我的.onnx"
    assert infer_here(tmp_path / "学", "-o", model, *LITE, "--engine", "torch", script="learn").returncode == 0
    result = infer_here("-m", model, "--int8", photos_of_samples, path, script="export")
    assert result.returncode == 0, result.stderr
    answers = infer_here("-m", path, *SAMPLES, "-f", "jsonl", "-k", "1")
    assert "(ONNX Runtime, int8)" in answers.stderr
    for sample, line in zip(SAMPLES, answers.stdout.splitlines(), strict=True):
        assert json.loads(line)["results"][0]["label"] == sample.stem
