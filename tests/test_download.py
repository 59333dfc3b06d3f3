"""wwts_cn_base from a ModelScope server on loopback, well and badly behaved, by the real client."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import types

import pytest
from conftest import LOGIN_PAGE, ROOT, SAMPLES, ModelScopeServer

import hubconf

CAT = SAMPLES[0]


def environment(server, tmp_path):
    return {"WWTS_OFFLINE": "0", "MODELSCOPE_ENDPOINT": server.endpoint, "MODELSCOPE_CACHE": str(tmp_path / "cache")}


def model_of(result):
    return json.loads(result.stdout)["model"]


def test_the_first_run_downloads_and_the_second_does_not(infer, infer_here, modelscope, tmp_path, monkeypatch):
    env = environment(modelscope, tmp_path)
    result = infer(CAT, "-f", "jsonl", env=env)
    assert result.returncode == 0, result.stderr
    assert model_of(result) == "wwts_cn_base" and "正在从" in result.stderr and modelscope.requests
    modelscope.requests.clear()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    again = infer_here(CAT, "-f", "jsonl")
    assert again.stdout == result.stdout and not modelscope.requests
    modelscope.close()
    offline = infer_here("-m", "wwts_cn_base", CAT, "-f", "jsonl", "--offline")
    assert offline.stdout == result.stdout


# ---------------------------------------------------------------- bad networks


def head(handler, length):
    handler.close_connection = True
    handler.send_response(200)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()


def stall(handler):
    handler.server.closed.wait(60)


def stall_midway(handler):
    head(handler, len(handler.body))
    handler.wfile.write(handler.body[: len(handler.body) // 2])
    handler.server.closed.wait(60)


def trickle(handler):
    """A byte now and then, which no limit on a single read notices."""
    head(handler, len(handler.body))
    with contextlib.suppress(OSError):
        for byte in handler.body:
            handler.wfile.write(bytes([byte]))
            if handler.server.closed.wait(0.2):
                return


def hang_up(handler):
    handler.close_connection = True


def cut_off(handler):
    head(handler, len(handler.body))
    handler.wfile.write(handler.body[: len(handler.body) // 2])


def claims_more(handler):
    head(handler, len(handler.body) + 1000)
    handler.wfile.write(handler.body)


def claims_less(handler):
    head(handler, len(handler.body) - 1000)
    with contextlib.suppress(OSError):
        handler.wfile.write(handler.body)


def truncated(handler):
    handler.reply(200, handler.body[:-100])


def corrupted(handler):
    handler.reply(200, handler.body[:-1] + bytes([handler.body[-1] ^ 1]))


def login_page(handler):
    handler.reply(200, LOGIN_PAGE, {"Content-Type": "text/html"})


def redirect_to_login_page(handler):
    handler.reply(302, b"", {"Location": "/login"})


def status(code):
    def answer(handler):
        handler.reply(code, LOGIN_PAGE, {"Content-Type": "text/html"})

    answer.__name__ = f"status_{code}"
    return answer


def json_list(handler):
    handler.reply(200, b"[1, 2]")


def no_files(handler):
    handler.reply(200, b'{"Code": 200, "Data": {}}')


ANY = [stall, stall_midway, trickle, hang_up, cut_off, login_page, redirect_to_login_page]
ANY += [status(code) for code in (403, 404, 500)]
CASES = [("listing", answer) for answer in [*ANY, json_list, no_files]]
CASES += [("pytorch_model.pt", answer) for answer in [*ANY, claims_more, claims_less, truncated, corrupted]]
CASES += [("meta_info.txt", login_page)]


@pytest.fixture
def server(small_modelscope, tmp_path, monkeypatch):
    """The small server, as hubconf's download in this process finds it, with seconds for minutes."""
    limits = {
        "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "1",
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
        "MODELSCOPE_DOWNLOAD_TIMEOUT": "1",
        "MODELSCOPE_DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "1",
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
    }
    for name, value in (environment(small_modelscope, tmp_path) | limits).items():
        monkeypatch.setenv(name, value)
    forget_the_client(monkeypatch)
    return small_modelscope


def forget_the_client(monkeypatch):
    """It reads its limits when it is imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "modelscope_hub"]:
        monkeypatch.delitem(sys.modules, name)


def assert_whole(folder, server):
    assert {name: (folder / name).read_bytes() for name in server.files} == server.files
    assert hubconf._find_base() == folder


def assert_clear(error):
    message = str(error)
    assert message == f"{error.reason}。{error.remedy}" and "\n" not in message
    assert len(error.remedy) <= 120 and "再次运行" in error.remedy
    assert not any(noise in message for noise in ("http:", "<html", "Traceback", "object at"))


@pytest.mark.parametrize(("what", "answer"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_bad_answer_is_a_clear_line_soon_and_the_next_attempt_is_whole(server, what, answer):
    server.answers[what] = answer
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="下载失败") as caught:
        hubconf._download_base(offline=False)
    assert time.monotonic() - start < 10
    assert_clear(caught.value)
    assert len(caught.value.reason) <= 80
    assert hubconf._find_base() is None
    server.answers.clear()
    server.ranges.clear()
    assert_whole(hubconf._download_base(offline=False), server)
    if what == "pytorch_model.pt" and answer in (cut_off, stall_midway):  # what came is not asked for again
        assert "bytes=150000-" in server.ranges


def test_the_limits_let_a_dead_network_end_within_a_minute():
    """Tries and the client's pauses between them, which double from two seconds; a slow network has hours."""
    limits = {name.removeprefix("MODELSCOPE_"): int(value) for name, value in hubconf._CLIENT_LIMITS.items()}
    retries = limits["DOWNLOAD_MAX_RETRIES"]
    for idle in ("DOWNLOAD_TIMEOUT", "DOWNLOAD_LOW_SPEED_WINDOW_SECONDS", "REPO_TREE_PAGE_TIMEOUT_SECONDS"):
        assert limits[idle] * (retries + 1) + sum(2**retry for retry in range(retries)) < 60
    assert limits["DOWNLOAD_TOTAL_TIMEOUT"] >= 12 * 3600


def test_a_slow_steady_network_is_given_its_time(server):
    def slow(handler):
        head(handler, len(handler.body))
        for start in range(0, len(handler.body), 30_000):
            handler.wfile.write(handler.body[start : start + 30_000])
            time.sleep(0.3)

    server.answers["pytorch_model.pt"] = slow
    assert_whole(hubconf._download_base(offline=False), server)


def test_files_may_lie_on_another_host(server, tmp_path):
    elsewhere = ModelScopeServer(tmp_path / "served")
    server.answers["pytorch_model.pt"] = lambda handler: handler.reply(
        302, b"", {"Location": elsewhere.endpoint + handler.path}
    )
    assert_whole(hubconf._download_base(offline=False), server)
    assert len(elsewhere.requests) == 1
    elsewhere.close()


@pytest.mark.parametrize("metadata", [(), ("Sha256",)])
def test_a_listing_without_sizes_is_not_trusted(server, metadata):
    """Nothing would tell a login page from the weights."""
    server.metadata = metadata
    server.answers["pytorch_model.pt"] = login_page
    with pytest.raises(ConnectionError, match="文件清单不完整"):
        hubconf._download_base(offline=False)
    assert hubconf._find_base() is None


def test_a_missing_file_is_noticed_before_the_download(server):
    del server.files["meta_info.txt"]
    with pytest.raises(ConnectionError, match="文件清单不完整"):
        hubconf._download_base(offline=False)
    assert not any("FilePath" in request for request in server.requests)


def test_two_processes_download_into_one_cache(server):
    def listings():
        return sum(request.endswith("Recursive=True") for request in server.requests)

    def half_until_the_other_comes(handler):
        head(handler, len(handler.body))
        handler.wfile.write(handler.body[:150_000])
        while listings() < 2:
            time.sleep(0.05)
        handler.wfile.write(handler.body[150_000:])

    server.answers["pytorch_model.pt"] = half_until_the_other_comes
    command = [sys.executable, "-c", "import hubconf; hubconf._download_base(False)"]
    other = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while not listings():
        assert other.poll() is None
        time.sleep(0.05)
    assert_whole(hubconf._download_base(offline=False), server)
    _, stderr = other.communicate(timeout=60)
    assert other.returncode == 0, stderr.decode()
    assert sum("FilePath=pytorch_model.pt" in request for request in server.requests) == 1


def test_a_failed_download_falls_back_or_is_an_error(server, infer_here):
    server.answers["pytorch_model.pt"] = status(403)
    result = infer_here(CAT, "-f", "jsonl")
    assert result.returncode == 0 and model_of(result) == "wwts_cn_lite"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("[WARN]")]
    assert "下载失败(PermissionDeniedError 403)" in line
    result = infer_here("-m", "wwts_cn_base", CAT)
    assert result.returncode == 3 and result.stdout == ""
    assert "下载失败(PermissionDeniedError 403)" in result.stderr.splitlines()[-1]


# ---------------------------------------------------------------- bad disks


def fail_to_store(cache, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(cache))
    with pytest.raises(ConnectionError, match=f"{cache} 写不进去: .+MODELSCOPE_CACHE") as caught:
        hubconf._download_base(offline=False)
    assert_clear(caught.value)


def test_a_full_disk(server, tmpfs, monkeypatch):
    disk = tmpfs("size=200k")
    fail_to_store(disk / "cache", monkeypatch)
    assert hubconf._find_base() is None
    tmpfs("remount,size=2m")
    assert_whole(hubconf._download_base(offline=False), server)
    assert any(server.ranges)  # it went on where it had stopped


def test_a_read_only_disk(server, tmpfs, monkeypatch):
    fail_to_store(tmpfs("ro") / "cache", monkeypatch)


def test_a_file_in_the_way_of_the_cache(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    fail_to_store(tmp_path / "file", monkeypatch)
    fail_to_store("/dev/null/cache", monkeypatch)


def test_home_need_not_be_set(server, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    assert_whole(hubconf._download_base(offline=False), server)


# ---------------------------------------------------------------- what the client does not check


def test_wrong_labels_without_hashes_never_become_a_result(infer, modelscope, tmp_path):
    """A listing without SHA-256 that serves another model's labels: sizes agree, the count does not."""
    modelscope.metadata = ("Size",)
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


def test_no_network_is_noticed_within_three_seconds(silent_endpoint, small_modelscope, monkeypatch):
    start = time.monotonic()
    assert not hubconf._reachable(silent_endpoint)
    assert not hubconf._reachable("http://127.0.0.1:9")
    assert time.monotonic() - start < 3
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: time.sleep(20) or [])  # a name server that is gone
    start = time.monotonic()
    assert not hubconf._reachable("https://modelscope.invalid")
    assert time.monotonic() - start < 3
    monkeypatch.undo()
    assert hubconf._reachable(small_modelscope.endpoint)
    monkeypatch.setenv("http_proxy", small_modelscope.endpoint)
    monkeypatch.setenv("no_proxy", "")
    assert hubconf._reachable("http://modelscope.invalid")  # a proxy resolves names itself


def assert_absent(error, words):
    """A short reason to show at every run, what to do where the model was asked for, and where it was looked for."""
    assert words in error.reason and len(error.reason) <= 60 and "wwts_cn_base" in error.reason
    assert str(error) == f"{error.reason}。{error.remedy}" and len(error.remedy) <= 120
    assert any(place.endswith("/pytorch_model.pt") for place in error.places)
    assert any(place.endswith("/meta_info.txt") for place in error.places)


def test_why_there_is_no_base_is_short_and_what_to_do_is_one_command(silent_endpoint, monkeypatch):
    command = "modelscope-hub download iic/cv_resnest101_general_recognition --local-dir wwts_base"
    with pytest.raises(FileNotFoundError) as caught:
        hubconf.wwts_cn_base(offline=True)
    assert_absent(caught.value, "离线")
    assert command in caught.value.remedy and "--weights wwts_base" in caught.value.remedy
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", silent_endpoint)
    forget_the_client(monkeypatch)
    with pytest.raises(ConnectionError) as caught:
        hubconf.wwts_cn_base(offline=False)
    assert_absent(caught.value, "连不上")
    assert command in caught.value.remedy and "--weights wwts_base" in caught.value.remedy
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(FileNotFoundError) as caught:
        hubconf.wwts_cn_base(offline=False)
    assert_absent(caught.value, "modelscope-hub")
    assert "pip install -U modelscope-hub" in caught.value.remedy


def test_no_network_falls_back_or_is_an_error(infer_here, silent_endpoint, monkeypatch):
    monkeypatch.setenv("WWTS_OFFLINE", "0")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", silent_endpoint)
    result = infer_here(CAT, "-f", "jsonl")
    assert result.returncode == 0 and model_of(result) == "wwts_cn_lite"
    assert result.stderr.count("[WARN]") == 1 and "连不上" in result.stderr
    result = infer_here("-m", "wwts_cn_base", CAT)
    assert result.returncode == 3 and "连不上" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("client", [None, types.ModuleType("modelscope_hub")], ids=["missing", "old"])
def test_without_a_client_that_tells_failures_the_pip_line_is_given(infer_here, monkeypatch, client):
    monkeypatch.setenv("WWTS_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "modelscope_hub", client)
    result = infer_here("-m", "wwts_cn_base", CAT)
    assert result.returncode == 3 and result.stderr.count("\n") == 1
    assert "pip install -U modelscope-hub" in result.stderr
