"""wwts_cn_base from a ModelScope server on loopback: the real client, the real file sizes."""

import contextlib
import json
import socket
import time

import pytest
from conftest import SAMPLES

import hubconf

CAT = SAMPLES[0]


def environment(server, tmp_path):
    return {"WWTS_OFFLINE": "0", "MODELSCOPE_ENDPOINT": server.endpoint, "MODELSCOPE_CACHE": str(tmp_path / "cache")}


def model_of(result):
    return json.loads(result.stdout)["model"]


def test_the_first_run_downloads_and_the_second_does_not(infer, modelscope, tmp_path):
    env = environment(modelscope, tmp_path)
    result = infer(CAT, "-f", "jsonl", env=env)
    assert result.returncode == 0, result.stderr
    assert model_of(result) == "wwts_cn_base" and "正在从" in result.stderr and modelscope.requests
    modelscope.requests.clear()
    again = infer(CAT, "-f", "jsonl", env=env)
    assert again.stdout == result.stdout and not modelscope.requests
    modelscope.close()
    offline = infer("-m", "wwts_cn_base", CAT, "-f", "jsonl", "--offline", env=env)
    assert offline.stdout == result.stdout


def truncated(server):
    server.sent["pytorch_model.pt"] = server.files["pytorch_model.pt"][:-100_000]


def corrupted(server):
    body = bytearray(server.files["pytorch_model.pt"])
    body[len(body) // 2] ^= 1
    server.sent["pytorch_model.pt"] = bytes(body)


def login_page(server):
    server.sent["meta_info.txt"] = b"<html>please log in</html>"


def missing(server):
    del server.files["meta_info.txt"]


@pytest.mark.parametrize("spoil", [truncated, corrupted, login_page, missing])
def test_a_bad_download_never_becomes_a_result(infer, modelscope, tmp_path, spoil):
    whole = dict(modelscope.files)
    spoil(modelscope)
    env = environment(modelscope, tmp_path)
    result = infer("-m", "wwts_cn_base", CAT, env=env)
    assert result.returncode == 3 and result.stdout == "", result.stderr
    assert "下载失败" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    if spoil is missing:  # the plain command, which may fall back, says why
        plain = infer(CAT, "-f", "jsonl", env=env)
        assert plain.returncode == 0 and model_of(plain) == "wwts_cn_lite"
        assert "下载失败" in plain.stderr and plain.stderr.count("[WARN]") == 1
    if spoil is truncated:  # the next attempt, with the server mended, is whole
        modelscope.files, modelscope.sent = whole, {}
        mended = infer(CAT, "-f", "jsonl", env=env)
        assert mended.returncode == 0 and model_of(mended) == "wwts_cn_base", mended.stderr


def test_wrong_labels_without_hashes_never_become_a_result(infer, modelscope, tmp_path):
    """A listing without SHA-256 that serves another model's labels: sizes agree, the count does not."""
    modelscope.hashes = False
    modelscope.files["meta_info.txt"] = b"".join(b"%d\tlabel\n" % index for index in range(1000))
    result = infer(CAT, env=environment(modelscope, tmp_path))
    assert result.returncode == 3 and result.stdout == "" and "标签有 1000 个" in result.stderr


@pytest.fixture
def silent_endpoint():
    """A host that never answers: a listening socket whose queue is full drops what comes next."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_no_network_is_noticed_within_three_seconds(silent_endpoint, modelscope, monkeypatch):
    start = time.monotonic()
    assert not hubconf._reachable(silent_endpoint)
    assert not hubconf._reachable("http://127.0.0.1:9")
    assert time.monotonic() - start < 3
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: time.sleep(20) or [])  # a name server that is gone
    start = time.monotonic()
    assert not hubconf._reachable("https://modelscope.invalid")
    assert time.monotonic() - start < 3
    monkeypatch.undo()
    assert hubconf._reachable(modelscope.endpoint)
    monkeypatch.setenv("http_proxy", modelscope.endpoint)
    monkeypatch.setenv("no_proxy", "")
    assert hubconf._reachable("http://modelscope.invalid")  # a proxy resolves names itself


def test_no_network_falls_back_or_is_an_error(infer, silent_endpoint):
    env = {"WWTS_OFFLINE": "0", "MODELSCOPE_ENDPOINT": silent_endpoint}
    result = infer(CAT, "-f", "jsonl", env=env)
    assert result.returncode == 0 and model_of(result) == "wwts_cn_lite"
    assert result.stderr.count("[WARN]") == 1 and "连不上" in result.stderr
    result = infer("-m", "wwts_cn_base", CAT, env=env)
    assert result.returncode == 3 and "连不上" in result.stderr and result.stderr.count("\n") == 1


def test_without_the_client_the_pip_line_is_given(infer, tmp_path):
    (tmp_path / "modelscope_hub.py").write_text("raise ImportError('gone')")
    env = {"PYTHONPATH": str(tmp_path), "WWTS_OFFLINE": "0"}
    result = infer("-m", "wwts_cn_base", CAT, env=env)
    assert result.returncode == 3 and "pip install modelscope-hub" in result.stderr and result.stderr.count("\n") == 1
