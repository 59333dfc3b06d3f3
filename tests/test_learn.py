"""learn.py: photos in folders become a model that infer.py runs like any other."""

import csv
import datetime
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import infer as infer_module

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES
from PIL import Image

import learn as learn_module
from learning import classifier, training
from learning import features as features_module
from wwts import learned as learned_models
from wwts import repositories, torch_engine

safetensors = pytest.importorskip("safetensors.numpy", reason="learning needs safetensors")

GOODS = Path(os.environ.get("WWTS_GOODS", ROOT.parent / "shared" / "goods"))

LITE = ("-m", "wwts_cn_lite")
CATEGORIES = ("生姜", "香蕉", "全脂牛奶", "半脱脂牛奶")
HUBCONF = """
import torch
from torch import nn

dependencies = ["torch"]


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.fc = nn.Linear(6, 1000)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def tiny(seed=0):
    torch.manual_seed(seed)
    net = _Net()
    net.spec = dict(resize=32, crop=32)
    return net


def other_weights():
    return tiny(1)


def no_linear():
    net = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.spec = dict(resize=32, crop=32, num_classes=6, labels=list("abcdef"))
    return net
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A hub repository of a tiny network with features of either sign."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def goods(tmp_path):
    """Six small photos each of three colours, all different, none alike."""
    folder, random = tmp_path / "商品", np.random.default_rng(0)
    for label, colour in {"红": (200, 40, 40), "绿": (40, 200, 40), "蓝": (40, 40, 200)}.items():
        (folder / label / "上").mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(
                np.array(colour) + random.normal(0, 40, (1, 1, 3)) + random.normal(0, 9, (40, 40, 3)), 0, 255
            )
            place = folder / label / ("上" if number % 2 else "")
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return folder


@pytest.fixture
def learn(infer_here, repository, tmp_path):
    """learn.py in this process, with the tiny network."""

    def run(*arguments, model="tiny", output=tmp_path / "模型.safetensors"):
        source = ("--repo", repository, "-m", model, "-d", "cpu")
        return infer_here(*arguments, "-o", output, *source, script="learn")

    run.output, run.source = tmp_path / "模型.safetensors", ("--repo", repository)
    return run


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def script(name, *arguments, env=(), **options):
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **dict(env)}
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", **options)


# ---------------------------------------------------------------- real weights, real photos


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """商品.safetensors, learned by a process of its own from six photos each of four kinds of goods, and its folder."""
    if not GOODS.is_dir():
        pytest.skip("the photos of goods are not here")
    folder = tmp_path_factory.mktemp("learned")
    for part, category in itertools.product(("train", "test"), CATEGORIES):
        target = folder / part / category
        target.mkdir(parents=True)
        for photo in sorted((GOODS / part / category).iterdir())[:6]:
            shutil.copy(photo, target)
    env = {"XDG_CACHE_HOME": str(folder / "cache")}
    report, output = folder / "report.json", folder / "商品.safetensors"
    arguments = (folder / "train", "--test", folder / "test", "-o", output, "--report", report, *LITE)
    result = script("learn.py", *arguments, env=env)
    assert result.returncode == 0, result.stderr
    return folder, output, result, json.loads(report.read_text(encoding="utf-8")), env


def test_photos_become_a_model_that_infer_runs(learned):
    folder, output, result, report, env = learned
    found = script("infer.py", "-m", output, folder / "test", "-f", "jsonl", "-k", "4", "-d", "cpu", env=env)
    assert found.returncode == 0, found.stderr
    answers = records(found)
    assert len(answers) == 24 and {answer["model"] for answer in answers} == {"商品"}
    right = [Path(answer["path"]).parent.name == answer["results"][0]["label"] for answer in answers]
    assert round(np.mean(right), 4) == report["test"]["accuracy"] >= 0.8
    assert result.stdout.startswith("别处拍的照片: 24 张") and "交叉验证: 24 张" in result.stdout
    assert report["photos"] == dict.fromkeys(sorted(CATEGORIES), 6)
    assert [row["photos"] for row in report["test"]["categories"]] == [6] * 4
    assert "这 4 类少于 10 张" in result.stdout


def test_scikit_learn_agrees_with_the_network(learned):
    discriminant_analysis = pytest.importorskip("sklearn.discriminant_analysis", reason="the oracle is scikit-learn")
    softmax = pytest.importorskip("scipy.special").softmax
    folder, output, *_ = learned
    model = repositories.load_hub_model("wwts_cn_lite")
    engine = torch_engine.TorchEngine(model, "cpu", "float32")
    engine.model._fc = torch.nn.Identity()

    def features(part):
        paths = sorted((folder / part).glob("*/*.jpg"))
        pixels = []
        for path in paths:
            with Image.open(path) as image:
                pixels.append(infer_module.preprocess(image.convert("RGB"), engine.spec))
        with torch.inference_mode():
            return engine.model(engine.normalize(np.stack(pixels))).numpy(), [path.parent.name for path in paths]

    (train, given), (test, _) = features("train"), features("test")
    theirs = discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2)
    train, test = (np.sqrt(rows) / np.linalg.norm(np.sqrt(rows), axis=1, keepdims=True) for rows in (train, test))
    theirs.fit(train.astype(float), given)
    labels = np.unique(given, return_inverse=True)[1]
    photos = make_photos(labels, train)
    temperature = 17.0
    head = classifier.fit_head(photos, np.arange(len(labels)))
    weight, bias = ((part - part.mean(0)) / temperature for part in head)  # as learn.py does
    # The file with this head in place of what was learned.
    tensors = {"weight": np.float32(weight), "bias": np.float32(bias)}
    rewritten = rewrite(output, folder / "oracle.safetensors", tensors=tensors)
    confidences = all_confidences(learned_models.load_learned_model(str(rewritten)), folder / "test")
    wanted = softmax(theirs.decision_function(test.astype(float)) / temperature, 1)
    assert (confidences.argmax(1) == wanted.argmax(1)).all()
    assert [theirs.classes_[index] for index in confidences.argmax(1)] == theirs.predict(test).tolist()
    assert abs(confidences - wanted).max() < 1e-4


def make_photos(labels, features):
    """Photos without times or second looks, their features brought to length 1."""
    count, width = features.shape
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    nothing = np.zeros(0, int), np.zeros((0, width))
    names, paths = [str(label) for label in range(max(labels) + 1)], [f"{row}.jpg" for row in range(count)]
    return classifier.Photos(names, paths, labels, features, np.ones(count), np.full(count, np.nan), *nothing)


def all_confidences(model, folder):
    engine = torch_engine.TorchEngine(model, "cpu", "float32")
    pixels = []
    for path in sorted(folder.glob("*/*.jpg")):
        with Image.open(path) as image:
            pixels.append(infer_module.preprocess(image.convert("RGB"), engine.spec))
    indices, values = engine.classify(pixels, engine.spec.num_classes)
    return np.take_along_axis(values, indices.argsort(1), 1)


def test_a_learned_model_is_a_model_like_any_other(learned, infer_here, tmp_path, monkeypatch):
    folder, output, _, _, env = learned
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = sorted((folder / "test").glob("*/*.jpg"))[::5]
    model = ("-m", output, "-d", "cpu")
    by_torch = records(infer_here(*model, *photos, "-f", "jsonl"))

    # The cache answers without loading, and a changed file is another version.
    store = ("--cache", tmp_path / "results.sqlite")
    assert not any("cached" in record for record in records(infer_here(*model, *photos, "-f", "jsonl", *store)))
    again = infer_here(*model, *photos, "-f", "jsonl", *store)
    assert all(record["cached"] for record in records(again)) and "加载模型" not in again.stderr

    # Resuming goes on with what is missing, and refuses another model's results.
    results = tmp_path / "r.jsonl"
    assert infer_here(*model, *photos[:2], "-o", results).returncode == 0
    assert infer_here(*model, *photos, "-o", results, "--resume").returncode == 0
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [line["results"][0]["label"] for line in lines] == [line["results"][0]["label"] for line in by_torch]
    other = rewrite(output, tmp_path / "商品.safetensors", labels=["一", "二", "三", "四"])
    refused = infer_here("-m", other, "-d", "cpu", *photos, "-o", results, "--resume")
    assert refused.returncode != 0 and infer_module.Recognizer(other).identify() != lines[0]["version"]

    # Pickled before first use, as Ray ships it.
    shipped = pickle.loads(pickle.dumps(infer_module.Recognizer(output, device="cpu")))
    assert shipped(photos[0]).version == by_torch[0]["version"]

    # Exported, kept or as a file, it gives the same answers without torch.
    pytest.importorskip("onnxscript", reason="exporting needs onnxscript")
    assert infer_here("-m", output, tmp_path / "商品.onnx", "-q", script="export").returncode == 0
    by_onnx = records(infer_here("-m", tmp_path / "商品.onnx", *photos, "-f", "jsonl"))
    for ours, theirs in zip(by_onnx, by_torch, strict=True):
        assert ours["model"] == "商品" and ours["results"][0]["label"] == theirs["results"][0]["label"]
        values = [{row["label"]: row["confidence"] for row in record["results"]} for record in (ours, theirs)]
        assert max(abs(values[0][label] - values[1][label]) for label in values[1]) < 1e-3


def test_check_finds_nothing_wrong(learned, infer_here):
    result = infer_here("-m", learned[1], "-d", "cpu", script="check")
    assert result.returncode == 0 and "✗" not in result.stdout, result.stdout + result.stderr


# ---------------------------------------------------------------- a foreign backbone


def test_a_foreign_backbone_with_features_of_either_sign(learn, goods, infer_here, repository):
    result = learn(goods)
    assert result.returncode == 0, result.stderr
    found = infer_here("-m", learn.output, *learn.source, goods, "-f", "jsonl")
    answers = records(found)
    right = [Path(answer["path"]).relative_to(goods).parts[0] == answer["results"][0]["label"] for answer in answers]
    assert len(right) == 18 and np.mean(right) > 0.9
    model = learned_models.load_learned_model(str(learn.output), str(repository))
    (root, linear), features = model.module.fc, torch.tensor([[-4.0, 0.0, 9.0, 1.0, -1.0, 0.25]])
    assert root(features)[0].tolist() == pytest.approx(np.array([-2, 0, 3, 1, -1, 0.5]) / 15.25**0.5)
    assert linear.out_features == 3


def test_only_new_photos_are_looked_at(learn, goods, monkeypatch):
    looked = []
    decode = infer_module.decode_image
    monkeypatch.setattr(infer_module, "decode_image", lambda *given: looked.append(1) or decode(*given))
    assert learn(goods).returncode == 0
    first = len(looked)
    shutil.copy(SAMPLES[0], goods / "红" / "new.jpg")
    os.rename(goods / "红" / "0.png", goods / "红" / "moved.png")
    assert learn(goods).returncode == 0
    assert first == 18 and len(looked) == 19


def test_the_report_is_judged_on_what_was_not_learned_from(learn, goods, tmp_path):
    report = tmp_path / "报告.json"
    wrong = goods / "蓝" / "00.png"  # a red one
    Image.new("RGB", (40, 40), (210, 35, 38)).save(wrong)
    result = learn(goods, "--report", report)
    facts = json.loads(report.read_text(encoding="utf-8"))
    judged = facts["cross_validation"]
    assert judged["photos"] == 19 and judged["accuracy"] <= 18 / 19
    low, high = judged["interval"]
    assert low < judged["accuracy"] < high
    assert facts["suspects"][0] == {"path": str(wrong), "given": "蓝", "believed": "红"}
    assert {"given": "蓝", "answered": "红", "times": 1} in judged["confused"] and "蓝 → 红 1 次" in result.stdout
    assert "偏高" in result.stdout and "--test" in result.stdout


def test_photos_for_testing_are_not_those_learned_from(learn, goods, tmp_path):
    test = tmp_path / "别处"
    shutil.copytree(goods, test)
    refused = learn(goods, "--test", test)
    assert refused.returncode == 2 and "学过" in refused.stderr
    for label, colour in {"红": (190, 60, 50), "蓝": (30, 30, 210), "黄": (200, 200, 0)}.items():
        (test / label).mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), colour).save(test / label / "new.png")
    result = learn(goods, "--test", test)
    assert result.returncode == 0 and result.stdout.startswith("别处拍的照片: 2 张") and "黄" in result.stderr


# ---------------------------------------------------------------- corrections, broken photos, refusals


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk"])
def test_corrections_overrule_folders(learn, goods, tmp_path, encoding):
    for number in range(3):
        Image.new("RGB", (40, 40), (230, 220 - number, 40)).save(goods / f"黄{number}.png")
    shutil.copy(goods / "绿" / "0.png", goods / "红" / "copy.png")
    rows = [("商品/红/copy.png", "绿"), *((f"商品/黄{number}.png", "黄色") for number in range(3))]
    file = tmp_path / "改正.csv"
    with open(file, "w", encoding=encoding, newline="") as stream:
        csv.writer(stream).writerows([("path", "label"), *rows])
    report = tmp_path / "r.json"
    assert learn(goods, file, "--report", report).returncode == 0
    facts = json.loads(report.read_text(encoding="utf-8"))
    assert facts["photos"] == {"红": 6, "绿": 6, "蓝": 6, "黄色": 3}


def test_odd_names_of_photos_as_the_page_of_report_writes_them(learn, goods, tmp_path):
    """改正.csv keeps spaces and backslashes of paths, and puts ./ or ' before what would be a formula."""
    written = {" 空格 .png": " 空格 .png", "=1.png": "./=1.png", "'q.png": "./'q.png", "a\\b.png": "a\\b.png"}
    written["c\\d.png"] = "c\\\\d.png"  # as infer.py's own results have it
    with open(tmp_path / "改正.csv", "w", encoding="utf-8-sig", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("path", "label"))
        for number, (name, path) in enumerate(written.items()):
            Image.new("RGB", (40, 40), (250, 250, 50 * number)).save(tmp_path / name, "PNG")
            rows.writerow((path, "'=特价" if number < 2 else "''引号"))
    assert learn(goods, tmp_path / "改正.csv", "--report", tmp_path / "r.json").returncode == 0
    photos = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["photos"]
    assert photos == {"红": 6, "绿": 6, "蓝": 6, "=特价": 2, "'引号": 3}


def test_what_cannot_be_learned_from_is_named_and_left_out(learn, goods, tmp_path):
    (goods / "红" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    shutil.copy(goods / "绿" / "0.png", goods / "红" / "copy.png")
    (goods / "空").mkdir()
    (goods / "少").mkdir()
    Image.new("RGB", (40, 40), "white").save(goods / "少" / "1.png")
    Image.new("RGB", (40, 40), "gray").save(goods / "loose.png")
    report = tmp_path / "r.json"
    result = learn(goods, "--report", report)
    assert result.returncode == 0
    facts = json.loads(report.read_text(encoding="utf-8"))
    assert facts["photos"] == {"少": 1, "红": 6, "绿": 5, "蓝": 6}
    warnings = [line for line in result.stderr.splitlines() if "[WARN]" in line]
    for words in (
        ("broken.jpg",),
        ("copy.png(红)", "0.png(绿)"),
        ("没有照片", "空"),
        ("不到 3 张", "少"),
        ("1 张照片不在",),
    ):
        assert any(all(word in line for word in words) for line in warnings), words


def test_refusals(learn, goods, tmp_path, infer_here):
    def refused(*arguments, status=2, **options):
        result = learn(*arguments, **options)
        lines = [line for line in result.stderr.splitlines() if line.startswith("[ERROR]")]
        assert result.returncode == status and len(lines) == 1 and "Traceback" not in result.stderr
        return lines[0]

    assert "两类" in refused(goods / "红")
    (tmp_path / "空").mkdir()
    assert "没有找到照片" in refused(tmp_path / "空")
    assert "不存在" in refused("不存在")
    assert ".safetensors" in refused(goods, output=tmp_path / "模型.onnx")
    assert "入口名" in refused(goods, model="x.onnx")
    assert "--finetune" in refused(goods, "--resume")
    assert "轮数" in refused(goods, "--finetune", "0")
    assert "没有可以接着做的训练" in refused(goods, "--finetune", "1", "--resume")
    assert "nn.Linear" in refused(goods, model="no_linear", status=3)
    assert "写不进去" in refused(goods, output=goods / "红" / "0.png" / "x.safetensors", status=3)
    for text in ("path,name\na,b\n", "path,label\nx.png,\n"):
        (tmp_path / "c.csv").write_text(text)
        assert "path" in refused(goods, tmp_path / "c.csv")
    os.rename(goods / "红", goods / "红\x1b[31m")
    line = refused(goods)
    assert "控制字符" in line and "\x1b" not in line


# ---------------------------------------------------------------- the file


def rewrite(source, target, tensors=None, labels=None, **changes):
    """A copy of a learned model with other tensors or metadata."""
    with open(source, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        about = json.loads(json.loads(file.read(size))["__metadata__"]["wwts_learned"])
    about |= changes
    if labels:
        about["spec"]["labels"] = labels
    tensors = safetensors.load_file(source) if tensors is None else tensors
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    Path(target).write_bytes(safetensors.save(tensors, {"wwts_learned": json.dumps(about)}))
    return target


def test_damaged_and_hostile_files_are_one_line(learn, goods, infer_here, tmp_path, repository):
    assert learn(goods).returncode == 0
    good, bad = learn.output.read_bytes(), tmp_path / "bad.safetensors"
    tensors = safetensors.load(good)
    nan, header = tensors["weight"].copy(), struct.unpack("<Q", good[:8])[0]
    nan[0, 0] = np.nan

    def refused(write):
        write()
        result = infer_here("-m", bad, *learn.source, goods / "红" / "0.png")
        assert result.returncode == 3 and result.stdout == "", (write, result.stderr)
        (line,) = [line for line in result.stderr.splitlines() if line]
        assert line.startswith("[ERROR]") and len(line) < 500 and line.isprintable()
        return line

    refused(lambda: None)  # not there
    for content in (b"", b"text", good[:-1], good[: header // 2], good + b"x", Path(SAMPLES[0]).read_bytes()):
        refused(lambda content=content: bad.write_bytes(content))
    refused(lambda: bad.write_bytes(struct.pack("<Q", 2**62) + good[8:]))
    refused(lambda: bad.write_bytes(safetensors.save(tensors)))  # of another program
    for changed in (
        {"weight": tensors["weight"]},
        tensors | {"more": tensors["bias"]},
        tensors | {"weight": tensors["weight"][:, :5]},
        tensors | {"weight": tensors["weight"].astype(np.float16)},
        tensors | {"weight": nan},
    ):
        refused(lambda changed=changed: rewrite(learn.output, bad, changed))
    for changes in (
        {"labels": ["红", "绿"]},
        {"labels": ["红", "绿", "蓝\x1b[2J"]},
        {"labels": ["红", "绿", 3]},
        {"spec": []},
        {"spec": {"name": "x" * 10**6}},
        {"backbone": ["tiny"]},
        {"backbone": "__import__"},
        {"backbone": "nowhere"},
    ):
        refused(lambda changes=changes: rewrite(learn.output, bad, **changes))
    spec = json.loads(json.loads(good[8 : 8 + header])["__metadata__"]["wwts_learned"])["spec"]
    refused(lambda: rewrite(learn.output, bad, spec=spec | {"name": "../../x"}))
    assert "重新学习" in refused(lambda: rewrite(learn.output, bad, backbone="other_weights"))


def test_another_repository_is_not_run_because_a_file_says_so(learn, goods, infer_here):
    assert learn(goods).returncode == 0
    result = infer_here("-m", learn.output, goods / "红" / "0.png")  # without --repo: this project's own
    assert result.returncode == 3 and "没有名为 tiny 的模型" in result.stderr


# ---------------------------------------------------------------- folds and calibration


def test_photos_of_one_moment_stay_in_one_fold():
    random = np.random.default_rng(0)
    views = np.repeat(random.normal(size=(8, 50)), 3, axis=0)
    labels = np.repeat([0, 1], 12)
    alike = make_photos(labels, views + random.normal(0, 0.05, views.shape))
    folds = classifier.assign_folds(alike).reshape(8, 3)
    assert (folds == folds[:, :1]).all() and all(len(set(part[:, 0])) == 4 for part in (folds[:4], folds[4:]))
    # Nothing alike, but three photos each within a minute, in no order.
    index = np.arange(24) % 12
    times = index % 4 * 1000.0 + np.array([0, 30, 70])[index // 4]
    apart = make_photos(labels, random.normal(size=(24, 50)))._replace(times=times)
    folds = classifier.assign_folds(apart)
    for label, moment in itertools.product((0, 1), range(4)):
        assert len(set(folds[(labels == label) & (times // 1000 == moment)])) == 1
    # All of one view: each photo for itself, or nothing could be judged.
    same = make_photos(labels, np.ones((24, 50)))
    assert np.bincount(classifier.assign_folds(same)[:12]).max() <= 3


def test_calibration_finds_the_temperature_that_confidences_were_spoilt_with():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (4000, 5))
    confidences = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    given = np.array([random.choice(5, p=row) for row in confidences])
    assert 6 < classifier.find_temperature(logits * 7, given) < 8.2
    judged = classifier.judge(given, classifier.answer(logits, None, given), list("abcde"))
    spoilt = classifier.judge(given, classifier.answer(logits * 7, None, given), list("abcde"))
    assert judged["calibration_error"] < 0.03 < 0.1 < spoilt["calibration_error"]
    answers = classifier.answer(logits, None, given)
    kept = answers[:, 1] >= judged["threshold"]
    assert (answers[kept, 0] == given[kept]).mean() >= 0.95 and abs(kept.mean() - judged["answered"]) < 1e-3


# ---------------------------------------------------------------- training the whole network


def test_training_writes_a_whole_network_only_if_it_is_better(learn, goods, infer_here, monkeypatch):
    monkeypatch.setattr(training, "MANY_STEPS", 1)
    assert learn(goods, "--finetune", "2").returncode == 0
    assert not Path(f"{learn.output}.checkpoint").exists()
    before = safetensors.load_file(learn.output)
    assert set(before) in ({"weight", "bias"}, {"conv.weight", "conv.bias", "fc.weight", "fc.bias"})
    # From the first epoch on better than a head that never is right.
    train = learn_module.finetune
    monkeypatch.setattr(learn_module, "finetune", lambda *a: train(*a[:4], -1.0, a[5]))
    result = learn(goods, "--finetune", "2")
    assert result.returncode == 0 and "没有参加训练的照片: " in result.stdout
    assert set(safetensors.load_file(learn.output)) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
    found = infer_here("-m", learn.output, *learn.source, goods, "-f", "jsonl")
    assert found.returncode == 0 and len(records(found)) == 18


def test_interrupted_training_keeps_the_best_and_goes_on(learn, goods, repository, cache):
    """Ctrl-C after an epoch: there is a model, and --resume does only what is left."""
    arguments = (goods, "-o", learn.output, "--repo", repository, "-m", "tiny", "-d", "cpu", "--finetune", "60")
    command = [sys.executable, str(ROOT / "learn.py"), *map(str, arguments)]
    checkpoint = Path(f"{learn.output}.checkpoint")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    done = torch.load(checkpoint, weights_only=True)["progress"][0]
    assert 1 <= done < 60
    assert infer_module.Recognizer(learn.output, repo=str(repository)).identify().num_classes == 3
    refused = learn(goods, "--finetune", "3", "--resume")
    assert refused.returncode == 2 and "别的照片、轮数或模型" in refused.stderr
    result = learn(goods, "--finetune", "60", "--resume")
    assert result.returncode == 0 and not checkpoint.exists()
    assert f"第 {done + 1}/60 轮" in result.stderr and f"第 {done}/60 轮" not in result.stderr


def test_the_time_taken_is_read_from_photos(tmp_path):
    image, exif = Image.new("RGB", (8, 8)), Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    image.save(tmp_path / "a.jpg", exif=exif)
    taken = features_module.time_taken((tmp_path / "a.jpg").read_bytes())
    assert datetime.datetime.fromtimestamp(taken) == datetime.datetime(2024, 5, 6, 7, 8, 9)
    image.save(tmp_path / "b.jpg")
    assert np.isnan(features_module.time_taken((tmp_path / "b.jpg").read_bytes()))
