"""Every answer belongs to one version of one model: nothing stale or foreign comes from a cache, a file or a graph."""

import json
import os
import shutil
import threading

import pytest
import torch
from conftest import ROOT, SAMPLES, SPEC, make_graph
from PIL import Image

import infer as infer_module

CAT, COFFEE = SAMPLES[:2]
LITE = ("-m", "wwts_cn_lite", "-d", "cpu")


def records(result):
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def fresh(record):
    return "cached" not in record


def test_two_graphs_with_the_same_labels_do_not_answer_for_each_other(infer_here, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("甲乙丙丁戊己庚辛"))
    options = ("--labels", labels, "--cache", tmp_path / "c", "-f", "jsonl", CAT)
    versions = set()
    for name, spec in (("one", SPEC), ("two", SPEC | {"mean": [0.4] * 3})):
        (record,) = records(infer_here("-m", make_graph(tmp_path / f"{name}.onnx", spec), *options))
        assert fresh(record)
        versions.add(record["version"])
    assert len(versions) == 2


def test_a_graph_is_its_content_not_its_size_and_time(infer_here, tmp_path):
    path = make_graph(tmp_path / "x.onnx", SPEC | {"labels": list("甲乙丙丁戊己庚辛")})
    status = path.stat()
    command = ("-m", path, "--cache", tmp_path / "c", "-f", "jsonl", CAT)
    first = records(infer_here(*command))[0]
    make_graph(path, SPEC | {"labels": list("辛庚己戊丁丙乙甲")})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    second = records(infer_here(*command))[0]
    assert fresh(second) and second["results"][0]["label"] != first["results"][0]["label"]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A copy of the repository's files that a test may edit."""
    for name in ("hubconf.py", "labels_zh.json"):
        shutil.copy2(ROOT / name, tmp_path)
    monkeypatch.setattr(infer_module, "HERE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_edited_labels_end_what_was_cached_and_what_was_begun(infer_here, program):
    command = (*LITE, "--cache", program / "c", "-f", "jsonl", CAT)
    first = records(infer_here(*command))[0]
    assert not fresh(records(infer_here(*command))[0])
    begun = (*LITE, CAT, "-o", program / "out.csv")
    assert infer_here(*begun).returncode == 0
    names = program / "labels_zh.json"
    names.write_text(names.read_text("utf-8").replace("埃及猫", "法老猫"), encoding="utf-8")
    second = records(infer_here(*command))[0]
    assert fresh(second) and second["results"][0]["label"] == "法老猫" and second["version"] != first["version"]
    result = infer_here(*LITE, CAT, COFFEE, "-o", program / "out.csv", "--resume")
    assert result.returncode == 2 and first["version"] in result.stderr and second["version"] in result.stderr


REPOSITORY = """
import torch
from arithmetic import combine

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)
        torch.nn.init.constant_(self.fc.bias, 0)
        self.fc.weight.data = torch.arange(12.0).sin().view(4, 3)
    def forward(self, x):
        return combine(self.fc(x.mean((2, 3))))

def net():
    model = Net()
    model.spec = dict(num_classes=4, labels=["甲", "乙", "丙", "丁"], resize=32, crop=32, mean=[0.5, 0.5, 0.5])
    return model
"""


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("hubconf.py", '"甲", "乙"', '"乙", "甲"'),
        ("hubconf.py", "mean=[0.5", "mean=[0.1"),
        ("hubconf.py", "x.mean((2, 3))", "x.amax((2, 3))"),
        ("arithmetic.py", "return x", "return -x"),
    ],
)
def test_an_edited_repository_is_another_model(infer_here, tmp_path, file, old, new):
    (tmp_path / "hubconf.py").write_text(REPOSITORY)
    (tmp_path / "arithmetic.py").write_text("def combine(x):\n    return x\n")
    command = ("--repo", tmp_path, "-m", "net", "-f", "jsonl", CAT, "--cache", tmp_path / "c")
    first = records(infer_here(*command))[0]
    assert not fresh(records(infer_here(*command))[0])
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    second = records(infer_here(*command))[0]
    assert fresh(second) and second["version"] != first["version"] and second["results"] != first["results"]


def test_precision_belongs_to_the_version(infer_here, tmp_path):
    command = (*LITE, "--cache", tmp_path / "c", "-f", "jsonl", CAT)
    half = records(infer_here(*command, "--dtype", "bfloat16"))[0]
    full = records(infer_here(*command, "--dtype", "float32"))[0]
    assert fresh(full) and full["version"] != half["version"] and full["results"] != half["results"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_resume_refuses_what_would_mix_two_kinds(infer_here, fast_repository, hub_repository, tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    fast = ("--repo", fast_repository, "-m", "fast", "-o", path)
    assert infer_here(*fast, CAT, "-t", "0.01").returncode == 0
    whole = path.read_bytes()
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("甲乙丙丁戊己庚辛"))
    for changed, message in (
        (("-t", "0.01", "--labels", labels), "版本"),
        (("-t", "0.01", "-k", "3"), "-k 3"),
        (("-t", "0.02"), "-t 0.02"),
        ((), "-t"),
        (("-t", "0.01", "--repo", hub_repository, "-m", "resnet18"), "resnet18"),
    ):
        result = infer_here(*fast, *changed, COFFEE, "--resume")
        assert result.returncode == 2 and message in result.stderr and "续写" in result.stderr, result.stderr
        assert path.read_bytes() == whole


def test_labels_that_change_while_a_model_is_loaded_are_noticed_later(infer_here, program, monkeypatch):
    right = infer_module._call_entry_point
    names = program / "labels_zh.json"

    def edited_meanwhile(*arguments):
        model = right(*arguments)
        names.write_text(names.read_text("utf-8").replace("埃及猫", "法老猫"), encoding="utf-8")
        return model

    monkeypatch.setattr(infer_module, "_call_entry_point", edited_meanwhile)
    command = (*LITE, "-f", "jsonl", CAT, "--cache", program / "c")
    assert records(infer_here(*command))[0]["results"][0]["label"] == "埃及猫"
    monkeypatch.setattr(infer_module, "_call_entry_point", right)
    (again,) = records(infer_here(*command))
    assert fresh(again) and again["results"][0]["label"] == "法老猫"


class Standardised(torch.nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return torch.nn.functional.conv2d(x, weight, self.bias)


def network(kind):
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8, track_running_stats=kind != "no statistics")
    if kind == "standardised":
        conv = Standardised(3, 8, 3)
    if kind == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(conv)
    if kind == "hook":
        conv.register_forward_hook(lambda module, inputs, output: output * 2)
    layers = [conv, norm, torch.nn.Conv2d(8, 8, 1), norm if kind == "used twice" else torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4)).eval()


@pytest.mark.parametrize("kind", ["standardised", "parametrized", "hook", "used twice"])
def test_what_a_foreign_network_answers_does_not_depend_on_its_company(kind):
    infer_module.import_torch()
    spec = infer_module.Spec.parse(
        {**infer_module.CLASSIC_SPEC, "name": kind, "num_classes": 4, "labels": list("甲乙丙丁")}, kind
    )
    module = network(kind)
    pixels = [infer_module.preprocess(Image.open(photo).convert("RGB"), spec) for photo in SAMPLES]
    engine = infer_module.TorchEngine(infer_module.HubModel(network(kind), spec, "w", None, False), "cpu", "float32")
    with torch.inference_mode():
        wanted = module(engine.normalize(pixels[0][None])).softmax(1)[0]
    for batch in (pixels[:1], pixels, pixels[:1]):
        indices, values = engine.classify(batch, 4)
        assert values[0] == pytest.approx(wanted[indices[0].tolist()].tolist(), abs=1e-5)


def test_many_streams_on_one_recognizer_at_once(fast_repository):
    recognizer = infer_module.Recognizer("fast", repo=str(fast_repository), device="cpu")
    wanted = [recognizer(photo).predictions[0].label for photo in SAMPLES]
    answers, errors = [], []

    def work():
        try:
            answers.append([result.predictions[0].label for result in recognizer.stream(SAMPLES * 5)])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and answers == [wanted * 5] * 24


def test_streams_of_batches_of_one_end(fast_repository):
    recognizer = infer_module.Recognizer("fast", repo=str(fast_repository), device="cpu", batch_size=1)
    assert len(list(recognizer.stream(SAMPLES * 3))) == 12


def test_pil_images_files_and_failing_inputs(fast_repository, tmp_path):
    recognizer = infer_module.Recognizer("fast", repo=str(fast_repository), device="cpu")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.open(CAT).crop((0, 0, 300, 150)).save(path, exif=exif, quality=95)
    wanted = recognizer(path).predictions
    assert recognizer(Image.open(path)).predictions == wanted
    with open(path, "rb") as file:
        assert recognizer(file).predictions == wanted
    (tmp_path / "half.jpg").write_bytes(CAT.read_bytes()[:9000])
    assert recognizer(Image.open(tmp_path / "half.jpg")).error

    def inputs():
        yield CAT
        yield COFFEE
        raise KeyError("no more")

    seen = []
    with pytest.raises(KeyError):
        for result in recognizer.stream(inputs()):
            seen.append(result.path)
    assert seen == [str(CAT), str(COFFEE)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"topk": 0},
        {"topk": True},
        {"device": "gpu"},
        {"threshold": 2},
        {"dtype": "int8"},
        {"model": ""},
        {"workers": 0},
    ],
)
def test_arguments_are_checked_at_once(arguments):
    with pytest.raises(infer_module.UsageError):
        infer_module.Recognizer(**arguments)


def test_one_path_is_not_many():
    with pytest.raises(infer_module.UsageError):
        infer_module.Recognizer("wwts_cn_lite").stream("cat.jpg")
