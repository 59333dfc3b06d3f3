"""Where the program runs: bad disks, no home, no terminal, closed streams, warnings as errors."""

import ast
import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLES

CAT = SAMPLES[0]
LITE = ("-m", "wwts_cn_lite")


@pytest.fixture
def fast(infer_here, fast_repository):
    return lambda *arguments: infer_here("--repo", fast_repository, "-m", "fast", *arguments)


def test_results_on_a_full_disk_are_whole_and_resumed(fast, photos, tmpfs, tmp_path):
    fast(photos, "-o", tmp_path / "whole.csv")
    whole = (tmp_path / "whole.csv").read_bytes()
    path = tmpfs("size=16k") / "out.csv"
    result = fast(photos, "-o", path)
    assert result.returncode == 3 and result.stderr.splitlines()[-1].startswith("[ERROR] 结果写不进去")
    assert 8000 < path.stat().st_size <= 16384 and whole.startswith(path.read_bytes())
    assert path.read_bytes().endswith(b"\r\n")
    tmpfs("remount,size=1m")
    assert fast(photos, "-o", path, "--resume").returncode == 0 and path.read_bytes() == whole


def test_a_cache_on_a_full_disk_costs_a_warning(fast, photos, tmpfs):
    path = tmpfs("size=64k") / "cache.sqlite"
    result = fast(photos, "-f", "jsonl", "--cache", path)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 300
    assert result.stderr.count("[WARN]") == 1 and "本次不用缓存" in result.stderr


def test_an_export_to_a_full_disk_leaves_nothing(infer_here, tmpfs, monkeypatch):
    folder = tmpfs("size=5m")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    for arguments in ([], [folder / "lite.onnx"]):
        result = infer_here(*LITE, *arguments, script="export")
        assert result.returncode == 3 and result.stderr.splitlines()[-1].startswith("[ERROR]"), result.stderr
        assert "写不进去" in result.stderr and not list(folder.glob("**/*.onnx*"))
    assert "(ONNX Runtime)" not in infer_here(*LITE, CAT).stderr


def test_read_only_folders(fast, infer_here, fast_repository, photos, tmpfs, monkeypatch):
    folder = tmpfs("ro")
    result = fast(photos, "-o", folder / "out.jsonl")
    assert result.returncode == 3 and result.stderr.count("[ERROR]") == 1 and "写不进去" in result.stderr
    result = fast(CAT, "--cache", folder / "cache.sqlite", "-f", "jsonl")
    assert result.returncode == 0 and result.stderr.count("[WARN]") == 1 and "results" in result.stdout
    result = infer_here("--repo", fast_repository, "-m", "fast", folder / "fast.onnx", script="export")
    assert result.returncode == 3 and result.stderr.count("[ERROR]") == 1 and "写不进去" in result.stderr
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    result = fast(CAT, "--cache", "-f", "jsonl")
    assert result.returncode == 0 and result.stderr.count("[WARN]") == 1
    monkeypatch.chdir(folder)
    assert fast(CAT).returncode == 0


def test_checking_where_nothing_can_be_recorded(infer_here, base_folder, tmpfs, monkeypatch):
    import check

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmpfs("ro")))
    monkeypatch.setattr(check, "CHECKS", [("权重", check.weights)])
    result = infer_here("--weights", base_folder, "-d", "cpu", script="check")
    assert result.returncode == 0 and "✓" in result.stdout and "没能记下" in result.stdout


@pytest.mark.parametrize("options", [(), ("-W", "error")])
def test_no_home_no_terminal_no_writable_folder_no_warnings(options):
    """As a service may start it; and no warning of our own making."""
    env = {"PATH": os.environ["PATH"], "WWTS_OFFLINE": "1", "MODELSCOPE_CACHE": "/nonexistent", "HOME": "/dev/null"}
    command = [sys.executable, *options, str(ROOT / "infer.py"), str(CAT), "-d", "cpu", "-k", "1", "--cache"]
    result = subprocess.run(
        command, cwd="/proc", env=env, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0 and result.stdout == "[RESULT] 识别结果:\n - 埃及猫 (置信度: 0.58)\n"
    assert sorted(line.split("]")[0] for line in result.stderr.splitlines()) == ["[INFO", "[INFO", "[WARN", "[WARN"]


def test_closed_streams(tiny_graph, tmp_path):
    command = shlex.join([sys.executable, "infer.py", str(CAT), *map(str, tiny_graph)])
    out = tmp_path / "out.jsonl"
    for redirection in ("<&- >&- 2>&-", ">&-", "2>&-"):
        shell = f'{command} -o "{out}" --overwrite {redirection}'
        assert subprocess.run(["sh", "-c", shell], cwd=ROOT, capture_output=True).returncode == 0
        (record,) = map(json.loads, out.read_text().splitlines())
        assert record["results"]
        out.unlink()
    assert b"RESULT" in subprocess.run(["sh", "-c", f"{command} 2>&-"], cwd=ROOT, stdout=subprocess.PIPE).stdout


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_script_says_that_python_is_too_old_instead_of_a_traceback(script):
    """From 3.8 on: what an older parser refuses would come before the first line that could say so."""
    ast.parse((ROOT / script).read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("script", ["infer", "bench", "check", "export", "learn", "report"])
def test_a_missing_package_is_one_line(infer, tmp_path, script):
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy')")
    result = infer("x", script=script, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 3 and result.stderr.count("\n") == 1 and "pip install" in result.stderr
