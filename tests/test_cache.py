"""--cache: the same image and model are computed once, in SQLite and in a real Redis server."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SAMPLES

CAT, COFFEE = SAMPLES[:2]
LITE = ("-m", "wwts_cn_lite", "-f", "jsonl")


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def without_torch(tmp_path):
    """An environment in which importing torch or onnxruntime fails, to show that nothing does.

    Otherwise it is as in this process: what a cache says of a model holds where weights are looked for alike.
    """
    for name in ("torch", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    return {"PYTHONPATH": str(tmp_path)} | {name: os.environ.get(name) for name in ("HOME", "MODELSCOPE_CACHE")}


def test_hits_answer_alike_without_torch(infer, infer_here, tmp_path):
    cache = tmp_path / "sub" / "缓存.sqlite"
    first = infer_here(*LITE, *SAMPLES, "--cache", cache)
    assert first.returncode == 0 and not any("cached" in record for record in records(first))
    copy = tmp_path / "copy.jpg"  # the content counts, not the name
    shutil.copy(CAT, copy)
    env = without_torch(tmp_path)
    again = infer(*LITE, *SAMPLES, copy, "--cache", cache, env=env)
    assert again.returncode == 0, again.stderr
    lines = records(again)
    assert all(record.pop("cached") is True for record in lines)
    assert lines[:4] == records(first) and lines[4]["results"] == lines[0]["results"]
    assert "加载模型" not in again.stderr
    text = infer("-m", "wwts_cn_lite", CAT, "-k", "1", "--cache", cache, env=env)
    assert text.stdout == "[RESULT] 识别结果:\n - 埃及猫 (置信度: 0.58)\n"
    assert "[CACHE HIT] 使用缓存结果\n" in text.stderr
    fewer = infer(*LITE, CAT, "-k", "2", "-t", "0.3", "--cache", cache, env=env)
    assert len(records(fewer)[0]["results"]) == 1
    more = infer_here(*LITE, CAT, "-k", "6", "--cache", cache)
    assert len(records(more)[0]["results"]) == 6 and "cached" not in records(more)[0]
    assert len(records(infer(*LITE, CAT, "-k", "6", "--cache", cache, env=env))[0]["results"]) == 6


def test_the_default_cache_is_in_the_users_cache_folder(infer, tiny_graph, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    assert "cached" not in records(infer(*tiny_graph, CAT, "-f", "jsonl", "--cache", env=env))[0]
    assert (tmp_path / "wwts" / "results.sqlite").is_file()
    assert records(infer(CAT, *tiny_graph, "-f", "jsonl", "--cache", env=env))[0]["cached"] is True


def test_another_model_or_other_labels_miss(infer_here, tmp_path, base_folder):
    cache = ("--cache", tmp_path / "c.sqlite")
    infer_here(*LITE, CAT, *cache)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"名{index}\n" for index in range(1000)), encoding="utf-8")
    (other,) = records(infer_here(*LITE, CAT, *cache, "--labels", labels))
    assert "cached" not in other and other["results"][0]["label"] == "名285"
    (again,) = records(infer_here(*LITE, CAT, *cache, "--labels", labels))
    assert again["cached"] and again["results"][0]["label"] == "名285"
    labels.write_text("".join(f"新{index}\n" for index in range(1000)), encoding="utf-8")
    (changed,) = records(infer_here(*LITE, CAT, *cache, "--labels", labels))
    assert "cached" not in changed and changed["results"][0]["label"] == "新285"
    (base,) = records(infer_here("--weights", base_folder, "-f", "jsonl", CAT, *cache))
    assert base["model"] == "wwts_cn_base" and "cached" not in base


def test_the_fallbacks_cache_ends_when_base_arrives(infer, infer_here, tmp_path, base_folder, monkeypatch):
    """Offline the plain command may answer from lite's cache; once base's weights are there it may not."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    env = without_torch(tmp_path)
    plain = ("-f", "jsonl", CAT, "--cache", tmp_path / "c.sqlite")
    assert records(infer_here(*plain))[0]["model"] == "wwts_cn_lite"
    hit = infer(*plain, env=env)
    assert records(hit)[0]["cached"] and "[WARN]" in hit.stderr and "wwts_cn_base" in hit.stderr
    folder = tmp_path / "modelscope" / "models" / "iic--cv_resnest101_general_recognition" / "snapshots" / "master"
    folder.mkdir(parents=True)
    for name in ("pytorch_model.pt", "meta_info.txt"):
        os.link(base_folder / name, folder / name)
    arrived = infer_here(*plain)
    assert records(arrived)[0]["model"] == "wwts_cn_base" and "cached" not in records(arrived)[0]
    again = infer(*plain, env=env)
    assert records(again)[0]["model"] == "wwts_cn_base" and records(again)[0]["cached"]


def test_a_model_without_fingerprint_is_told_by_its_parameters(infer_here, hub_repository, tmp_path):
    cache = ("--repo", hub_repository, "-f", "jsonl", CAT, "--cache", tmp_path / "c.sqlite", "-m")
    assert "cached" not in records(infer_here(*cache, "resnet18"))[0]
    assert records(infer_here(*cache, "resnet18"))[0]["cached"]
    other = records(infer_here(*cache, "resnet50"))[0]
    assert "cached" not in other and other["results"][0]["index"] == 7


@pytest.mark.parametrize("content", [b"", b"not a database at all, " * 300, None])
def test_a_broken_cache_file_costs_a_warning(infer, tiny_graph, tmp_path, content):
    cache = tmp_path / "c.sqlite"
    if content is None:  # whole at the start, rubbish within
        infer(*tiny_graph, *SAMPLES, "--cache", cache)
        body = bytearray(cache.read_bytes())
        body[2000:] = os.urandom(len(body) - 2000)
        cache.write_bytes(body)
    else:
        cache.write_bytes(content)
    result = infer(*tiny_graph, CAT, COFFEE, "-f", "jsonl", "--cache", cache)
    assert result.returncode == 0 and len(records(result)) == 2, result.stderr
    assert result.stderr.count("[WARN]") == (0 if content == b"" else 1) and "Traceback" not in result.stderr


def test_a_folder_that_cannot_be_written_costs_a_warning(infer, tiny_graph):
    result = infer(*tiny_graph, CAT, "-f", "jsonl", "--cache", "/proc/nowhere/c.sqlite")
    assert result.returncode == 0 and result.stderr.count("[WARN]") == 1 and len(records(result)) == 1


def test_three_processes_share_one_cache(tiny_graph, photos, tmp_path):
    cache = tmp_path / "c.sqlite"
    command = [sys.executable, "infer.py", str(photos), *tiny_graph, "-f", "jsonl", "--cache", str(cache), "-b", "2"]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    processes = [subprocess.Popen(command, **options) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and len(output.splitlines()) == 300 and "[WARN]" not in errors
    with sqlite3.connect(cache) as connection:
        assert connection.execute("SELECT count(*) FROM cache").fetchone()[0] == 300


# ---------------------------------------------------------------- Redis


@pytest.fixture(params=["socket", "port"])
def redis_server(request, tmp_path):
    if not shutil.which("redis-server"):
        pytest.skip("needs redis-server (Debian: apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"/tmp/wwts-redis-{os.getpid()}.sock"  # tmp_path may be longer than a socket's name can be
    where = ["--port", "0", "--unixsocket", path] if request.param == "socket" else ["--port", str(port)]
    command = ["redis-server", *where, "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"unix://{path}" if request.param == "socket" else f"redis://127.0.0.1:{port}/0"
    import redis

    client = redis.Redis.from_url(url)
    for _ in range(100):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.05)
    yield url, client, process
    process.terminate()
    process.wait()


def test_redis(infer, infer_here, redis_server, tmp_path):
    url, client, process = redis_server
    first = infer_here(*LITE, *SAMPLES, "--cache", url)
    assert first.returncode == 0 and client.dbsize() == 4, first.stderr
    again = infer(*LITE, *SAMPLES, "--cache", url, env=without_torch(tmp_path))
    lines = records(again)
    assert all(record.pop("cached") for record in lines) and lines == records(first)
    client.set(client.keys()[0], b"\xff rubbish")
    process.terminate()
    process.wait()
    alone = infer_here(*LITE, CAT, "--cache", url)
    assert alone.returncode == 0 and alone.stderr.count("[WARN]") == 1 and "cached" not in records(alone)[0]


def test_redis_without_its_package_is_named_with_its_pip_line(infer, tmp_path):
    (tmp_path / "redis.py").write_text("raise ImportError('gone')")
    result = infer(*LITE, CAT, "--cache", "redis://127.0.0.1:1", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 3 and "pip install redis" in result.stderr and result.stderr.count("\n") == 1
