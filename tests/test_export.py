"""export.py and the ONNX Runtime engine, against the torch engine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import infer as infer_module

import onnx
import pytest
import torch
from conftest import ROOT, SAMPLES

import export
import hubconf

LITE = ("-m", "wwts_cn_lite")
CAT = SAMPLES[0]


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory):
    """An environment in which importing torch or torchvision fails."""
    folder = tmp_path_factory.mktemp("without_torch")
    for name in ("torch", "torchvision"):
        (folder / f"{name}.py").write_text("raise RuntimeError('imported')")
    return {"PYTHONPATH": str(folder)}


def test_the_graph_is_self_contained_and_takes_pixels(exported):
    assert sorted(path.name for path in exported.graph.parent.iterdir()) == [
        "graph.onnx", "graph.onnx.data"
    ]  # fmt: skip
    assert not list(exported.folder.glob("**/*.partial"))
    proto = onnx.load(exported.single, load_external_data=False)
    onnx.checker.check_model(proto)
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    (pixels,) = proto.graph.input
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dimensions = pixels.type.tensor_type.shape.dim
    assert dimensions[0].dim_param and [d.dim_value for d in dimensions[1:]] == [260, 260, 3]
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    spec = json.loads({entry.key: entry.value for entry in proto.metadata_props}["wwts_spec"])
    assert spec["name"] == "wwts_cn_lite" and len(spec["labels"]) == 1000


def test_both_engines_agree(exported, infer_here, without_torch):
    wanted = records(infer_here(*LITE, "--engine", "torch", "-d", "cpu", *SAMPLES, "-f", "jsonl", "-k", "1000"))
    for graph, arguments in ((exported.graph, ()), (exported.graph, ("-b", "3")), (exported.single, ("-b", "1"))):
        result = exported("-m", graph, *SAMPLES, "-f", "jsonl", "-k", "1000", *arguments, env=without_torch)
        assert result.returncode == 0 and "使用设备: cpu (ONNX Runtime)" in result.stderr, result.stderr
        for ours, theirs in zip(records(result), wanted, strict=True):
            assert ours["model"] == "wwts_cn_lite"
            assert ours["results"][0]["label"] == theirs["results"][0]["label"]
            a, b = ({p["index"]: p["confidence"] for p in record["results"]} for record in (ours, theirs))
            assert max(abs(a[index] - b[index]) for index in b) < 1e-3 and len(a) == 1000
            confidences = [p["confidence"] for p in ours["results"]]
            assert confidences == sorted(confidences, reverse=True)


def test_the_kept_graph_is_used_by_itself(exported, without_torch):
    """By name, and by the plain command once it has seen that base's weights are absent; torch is not imported."""
    assert "(ONNX Runtime)" in exported(CAT).stderr
    assert "(ONNX Runtime)" in exported(CAT, "--draft").stderr
    for arguments, warnings in ((LITE, 0), ((), 1), ((*LITE, "--engine", "onnx"), 0)):
        result = exported(*arguments, CAT, "-f", "jsonl", env=without_torch)
        assert result.returncode == 0 and records(result)[0]["results"][0]["label"] == "埃及猫", result.stderr
        assert "(ONNX Runtime)" in result.stderr and result.stderr.count("[WARN]") == warnings
    broken = exported(*LITE, ROOT / "README.md", CAT, "-f", "jsonl", env=without_torch)
    assert broken.returncode == 1 and ["error" in record for record in records(broken)] == [True, False]


def test_torch_can_be_asked_for(exported):
    for arguments in (("--engine", "torch"), ("--dtype", "bfloat16")):
        result = exported.here(*LITE, CAT, "-k", "1", *arguments)
        assert result.returncode == 0 and "使用设备: cpu\n" in result.stderr


def test_base_that_arrives_is_not_answered_for_by_lites_graph(exported, base_folder):
    folder = exported.folder / "later" / "hub" / "models" / "iic" / "cv_resnest101_general_recognition"
    folder.mkdir(parents=True)
    for name in ("pytorch_model.pt", "meta_info.txt"):
        os.link(base_folder / name, folder / name)
    result = exported.here(CAT, "-f", "jsonl", env={"MODELSCOPE_CACHE": str(exported.folder / "later")})
    assert result.returncode == 0 and records(result)[0]["model"] == "wwts_cn_base", result.stderr


def test_infer_and_a_graph_need_nothing_beside_them(exported, without_torch, tmp_path):
    """For what else there is, they say in one line what to copy."""
    for path in (ROOT / "infer.py", exported.single):
        shutil.copy(path, tmp_path)
    plain = ("-m", tmp_path / exported.single.name, *SAMPLES)
    for form in ("text", "jsonl", "csv"):
        result = exported(*plain, "-f", form, program=tmp_path, env=without_torch)
        assert result.returncode == 0 and "埃及猫" in result.stdout, result.stderr
    for extra in (("-o", tmp_path / "x.csv"), ("--cache", tmp_path / "c"), ("-m", "wwts_cn_lite")):
        result = exported(*plain, *extra, program=tmp_path, env=without_torch)
        assert result.returncode == 3 and result.stdout == "", result.stderr
        assert result.stderr.count("\n") == 1 and "没有文件夹 wwts" in result.stderr


def assert_there_is_no_graph(exported):
    result = exported.here(*LITE, CAT, "--engine", "onnx")
    assert result.returncode == 3 and "export.py -m wwts_cn_lite" in result.stderr and result.stdout == ""
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("touched", ["hubconf.py", "labels_zh.json"])
def test_the_graph_of_a_touched_source_waits_until_its_content_was_seen(exported, touched):
    """The times have changed, so the version is unknown; loading with torch shows that it is still the same."""
    os.utime(exported.program / touched)
    assert_there_is_no_graph(exported)
    result = exported.here(*LITE, CAT, "-k", "1")
    assert result.returncode == 0 and "使用设备: cpu\n" in result.stderr and "export.py" not in result.stderr
    assert "(ONNX Runtime)" in exported.here(*LITE, CAT, "-k", "1").stderr


@pytest.mark.parametrize("part", ["graph.onnx", "graph.onnx.data"])
def test_a_graph_that_was_touched_is_not_used_and_the_hint_says_so(exported, part):
    folder = exported.graph.parent
    os.utime(folder / part)
    try:
        result = exported.here(*LITE, CAT, "-k", "1")
        assert result.returncode == 0 and "使用设备: cpu\n" in result.stderr
        assert "export.py -m wwts_cn_lite" in result.stderr
        assert_there_is_no_graph(exported)
    finally:
        exported.vouch()
    assert "(ONNX Runtime)" in exported.here(*LITE, CAT, "-k", "1").stderr


@pytest.mark.parametrize(
    ("edited", "old", "new"), [("hubconf.py", '"""torch.hub', '"""torch.Hub'), ("labels_zh.json", "埃及猫", "法老猫")]
)
def test_the_graph_of_an_edited_source_is_not_used_and_the_hint_says_so(exported, edited, old, new):
    path = exported.program / edited
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    try:
        for _ in range(2):  # the second time the new version is remembered
            result = exported.here(*LITE, CAT, "-k", "1")
            assert result.returncode == 0 and "使用设备: cpu\n" in result.stderr
            assert (new if edited == "labels_zh.json" else "埃及猫") in result.stdout
        assert "export.py -m wwts_cn_lite" in result.stderr
        assert_there_is_no_graph(exported)
    finally:
        path.write_text(text, encoding="utf-8")
        exported.here(*LITE, CAT)  # which sees that all is as it was
    assert "(ONNX Runtime)" in exported.here(*LITE, CAT, "-k", "1").stderr


def test_onnx_that_was_never_exported(infer, tmp_path):
    result = infer(*LITE, CAT, "--engine", "onnx", env={"XDG_CACHE_HOME": str(tmp_path)})
    assert result.returncode == 3 and "还没有导出" in result.stderr and result.stderr.count("\n") == 1
    result = infer(*LITE, CAT, "--engine", "onnx", "-d", "mps")
    assert result.returncode == 2


def test_labels_and_cache_with_a_graph(exported, tmp_path, without_torch):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"第{index}\n" for index in range(1000)), encoding="utf-8")
    cache = ("--cache", tmp_path / "c.sqlite", "-f", "jsonl", "-m", exported.single, CAT)
    assert records(exported(*cache, "--labels", labels, env=without_torch))[0]["results"][0]["label"] == "第285"
    first = records(exported(*cache, env=without_torch))[0]
    assert "cached" not in first and first["results"][0]["label"] == "埃及猫"
    assert records(exported(*cache, env=without_torch))[0]["cached"]
    labels.write_text("一\n", encoding="utf-8")
    assert exported("-m", exported.graph, CAT, "--labels", labels).returncode == 3


def test_what_the_kept_graph_put_into_the_cache_ends_with_its_sources(exported, tmp_path, without_torch):
    cache = ("--cache", tmp_path / "c.sqlite", "-f", "jsonl", *LITE, CAT)
    assert "ONNX" in exported(*cache).stderr
    assert records(exported(*cache, env=without_torch))[0]["cached"]
    names = exported.program / "labels_zh.json"
    text = names.read_text(encoding="utf-8")
    names.write_text(text.replace("埃及猫", "法老猫"), encoding="utf-8")
    try:
        (record,) = records(exported.here(*cache))
        assert "cached" not in record and record["results"][0]["label"] == "法老猫"
    finally:
        names.write_text(text, encoding="utf-8")
        exported.here(*LITE, CAT)  # which sees that all is as it was
    (record,) = records(exported(*cache, env=without_torch))
    assert record["cached"] and record["results"][0]["label"] == "埃及猫"


def test_files_that_are_no_graph_of_ours(exported, tmp_path):
    whole = exported.single.read_bytes()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    proto = onnx.load(exported.single)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    expected = {"half": "无法读取", "empty": "无法读取", "foreign": "不是 export.py 导出", "missing": "找不到"}
    for name, message in expected.items():
        result = exported("-m", tmp_path / f"{name}.onnx", CAT)
        assert result.returncode == 3 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
        assert message in result.stderr and f"{name}.onnx" in result.stderr
    result = exported("-m", exported.graph, CAT, "-d", "mps")
    assert result.returncode == 2 and "不能" in result.stderr


@pytest.mark.parametrize(
    ("package", "arguments", "status", "message"),
    [
        ("onnxscript", LITE, 3, "pip install onnx onnxscript"),
        ("onnx", LITE, 3, "pip install onnx onnxscript"),
        ("onnxruntime", ("-m", "GRAPH", CAT), 3, "pip install -U onnxruntime"),
    ],
)
def test_missing_packages_are_named(exported, tmp_path, package, arguments, status, message):
    (tmp_path / f"{package}.py").write_text("raise ImportError('gone')")
    arguments = [exported.graph if argument == "GRAPH" else argument for argument in arguments]
    script = "export" if "onnxruntime" != package else "infer"
    result = exported(*arguments, env={"PYTHONPATH": str(tmp_path)}, script=script)
    assert result.returncode == status and message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_wrong_use_of_export(infer_here, hub_repository, tmp_path):
    assert infer_here(*LITE, tmp_path / "x.bin", script="export").returncode == 2
    result = infer_here("--repo", hub_repository, "-m", "resnet18", script="export")
    assert result.returncode == 2 and "写明导出的文件名" in result.stderr
    photos = ("--photos", tmp_path / "nothing.jpg")
    result = infer_here(*LITE, *photos, tmp_path / "x.onnx", script="export")
    assert result.returncode == 2 and "没有找到图片" in result.stderr


def test_a_foreign_model_is_exported_too(infer_here, hub_repository, tmp_path):
    path = tmp_path / "别人.onnx"
    result = infer_here("--repo", hub_repository, "-m", "resnet18", path, script="export")
    assert result.returncode == 0, result.stderr
    (record,) = records(infer_here("-m", path, CAT, "-f", "jsonl", "-k", "1"))
    assert (record["model"], record["results"][0]["index"]) == ("resnet18", 285)


def test_a_graph_that_disagrees_is_not_kept(infer_here, hub_repository, tmp_path, monkeypatch):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"the one before")
    right = infer_module.OnnxEngine.classify

    def wrong(self, batch, topk):
        indices, values = right(self, batch, topk)
        return indices, values * 0.9

    monkeypatch.setattr(infer_module.OnnxEngine, "classify", wrong)
    result = infer_here("--repo", hub_repository, "-m", "resnet18", path, script="export")
    assert result.returncode == 3 and "不一致" in result.stderr
    assert path.read_bytes() == b"the one before" and list(tmp_path.glob("*.partial")) == []


def test_beyond_two_gigabytes_is_refused_before_the_work(tmp_path):
    class Engine:
        model = torch.nn.Linear(40_000, 20_000, device="meta")
        spec = None

    with pytest.raises(infer_module.ModelError, match="2 GiB"):
        export.export_graph(Engine(), tmp_path / "x.onnx", [], separate_weights=False)


def test_base_is_exported_at_full_size(infer, infer_here, base_folder, tmp_path, monkeypatch, without_torch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    photos = SAMPLES[:2]
    result = infer_here("--weights", base_folder, "--photos", photos[0], script="export")
    assert result.returncode == 0, result.stderr
    (graph,) = tmp_path.glob("wwts/*/graph.onnx")
    assert graph.stat().st_size < 5e6 and graph.with_name("graph.onnx.data").stat().st_size > 620e6
    wanted = records(infer_here("--weights", base_folder, *photos, "-f", "jsonl", "--engine", "torch"))
    kept = infer("--weights", base_folder, *photos, "-f", "jsonl", env=without_torch)
    assert "(ONNX Runtime)" in kept.stderr
    given = records(kept)
    for ours, theirs in zip(given, wanted, strict=True):
        assert ours["model"] == "wwts_cn_base"
        assert [p["label"] for p in ours["results"]] == [p["label"] for p in theirs["results"]]
        for a, b in zip(ours["results"], theirs["results"], strict=True):
            assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("network", [hubconf._EfficientNetLite2, lambda: hubconf._ResNeSt101(10)])
def test_batch_norm_is_folded_where_exact(network):
    torch.manual_seed(0)
    model = network().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
    inputs = torch.randn(2, 3, 96, 96)
    expected = model(inputs)
    assert model.fuse() is model
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert torch.allclose(model(inputs), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "export.py"), *LITE]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8") as process:
        while not list(tmp_path.glob("wwts/.graph-*.partial")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 143 and "Traceback" not in errors and errors.splitlines()[-1].startswith("[WARN] 已中断")
    )
    assert not list(tmp_path.glob("wwts/*graph*"))
