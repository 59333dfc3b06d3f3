"""serve.py: a real server on a free loopback port, real sockets; its page in a real browser."""

import base64
import concurrent.futures
import contextlib
import csv
import http.client
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import infer as infer_module

import pytest
from browser import download
from conftest import ROOT, SAMPLES, SPEC, make_graph
from PIL import Image
from test_hostile import BOMBS, HEADS
from test_report import CONTRASTS

import serve
from serving.lanes import MOST_TOPK, BusyError, Lane, Service

CAT = SAMPLES[0].read_bytes()
TOKEN = "口令 with spaces"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}".encode()}
# What a server may be given to behave in a test as it would after a longer time.
HURRY = "import serve, serving.uploads, sys; serving.uploads.READ_SECONDS = 1; sys.exit(serve.main(sys.argv[1:]))"


class Server:
    """serve.py in a process of its own."""

    def __init__(self, *arguments, code=None, env=()):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **dict(env)}
        program = ["-c", code] if code else [str(ROOT / "serve.py")]
        command = [sys.executable, *program, "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, encoding="utf-8")
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"已开始服务: http://[\d.]+:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(self.lines))
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.port}/"

    def call(self, method, path, body=None, headers=(), timeout=60):
        """Status, headers and text of an answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            text = response.read().decode()
            return SimpleNamespace(status=response.status, headers=response.headers, text=text)

    def json(self, method, path, body=None, headers=()):
        """Status and JSON of an answer."""
        answer = self.call(method, path, body, headers)
        return answer.status, json.loads(answer.text)

    def send(self, *images, path="/recognize", headers=(), **fields):
        """Status and JSON for (name, content) of images in a form."""
        body, kind = form(*images, **fields)
        return self.json("POST", path, body, {"Content-Type": kind, **dict(headers)})

    def connect(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def metric(self, name):
        """The sum of the samples of a metric."""
        lines = self.call("GET", "/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[ {{]", line))

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(15)


def form(*images, **fields):
    """A multipart body, as browsers and curl write it, and its type."""
    parts = [f'name="{name}"\r\n\r\n'.encode() + str(value).encode() for name, value in fields.items()]
    for name, content in images:
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        parts.append(f'name="image"; filename="{quoted}"\r\nContent-Type: image/jpeg\r\n\r\n'.encode() + content)
    body = b"".join(b"--edge\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
    return body + b"--edge--\r\n", "multipart/form-data; boundary=edge"


@pytest.fixture(scope="module")
def start():
    """A function that starts servers, which end with the tests."""
    servers = []

    def start(*arguments, **options):
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            assert server.stop() == 128 + signal.SIGTERM
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="module")
def tiny(start, tiny_graph):
    return start(*tiny_graph)


@pytest.fixture(scope="module")
def guarded(start, tiny_graph):
    return start(*tiny_graph, env={"WWTS_TOKEN": TOKEN})


@pytest.fixture(scope="module")
def slow(start, fast_repository):
    """A model that takes 0.1 seconds a batch of 1."""
    return start("--repo", fast_repository, "-m", "slow", "-b", "1", "--queue", "4", "--max-bytes", "50000")


@pytest.fixture(scope="module")
def lite(start):
    return start("-m", "wwts_cn_lite")


# ---------------------------------------------------------------- answers


def test_the_answer_is_the_record_of_the_command(lite, infer):
    result = infer("-m", "wwts_cn_lite", SAMPLES[0], "-f", "jsonl")
    wanted = json.loads(result.stdout) | {"path": "我的 猫.jpg"}
    status, record = lite.send(("我的 猫.jpg", CAT))
    assert status == 200 and record["results"][0]["label"] == "埃及猫"
    for record_, tolerance in ((record, 1e-5),):
        ours, theirs = record_.pop("results"), wanted.pop("results")
        assert record_ == wanted
        assert [(p["label"], p["index"]) for p in ours] == [(p["label"], p["index"]) for p in theirs]
        assert [p["confidence"] for p in ours] == pytest.approx([p["confidence"] for p in theirs], abs=tolerance)
    assert lite.json("GET", "/model")[1] == {
        "name": "wwts_cn_lite", "version": wanted["version"], "num_classes": 1000, "device": "cpu",
    }  # fmt: skip
    labels = lite.json("GET", "/labels")[1]
    assert len(labels) == 1000 and labels[285] == "埃及猫"


def as_json(*images, **fields):
    encoded = [base64.b64encode(image).decode() for image in images]
    return json.dumps({"image": encoded if len(images) > 1 else encoded[0], **fields})


WAYS = {
    "form": form(("", CAT)),
    "raw": (CAT, "image/jpeg"),
    "odd raw": (CAT, "IMAGE/X-Anything; charset=none"),
    "JSON": (as_json(CAT), "application/json"),
    "data URL": (json.dumps({"image": "data:image/jpeg;base64," + base64.b64encode(CAT).decode()}), "application/json"),
    "lines": (json.dumps({"image": base64.encodebytes(CAT).decode()}), "application/json; charset=utf-8"),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_send_an_image_give_the_same_answer(tiny, tiny_graph, way):
    body, kind = WAYS[way]
    status, record = tiny.json("POST", "/recognize", body, {"Content-Type": kind})
    wanted = infer_module.Recognizer(tiny_graph[1])(io.BytesIO(CAT)).record()
    assert status == 200 and record == wanted


def test_chunks_of_unknown_length(tiny):
    pieces = (CAT[start : start + 1000] for start in range(0, len(CAT), 1000))
    status, record = tiny.json("POST", "/recognize", pieces, {"Content-Type": "image/jpeg"})
    assert status == 200 and len(record["results"]) == 5


def test_several_images_are_a_list_in_their_order(tiny):
    images = [(f"{number}.jpg", b"bad" if number % 5 == 3 else CAT) for number in range(64)]
    status, records = tiny.send(*images)
    assert status == 200 and [record["path"] for record in records] == [name for name, _ in images]
    assert ["error" in record for record in records] == [content == b"bad" for _, content in images]
    status, records = tiny.json("POST", "/recognize", as_json(CAT, b"bad"), {"Content-Type": "application/json"})
    assert status == 200 and ["error" in record for record in records] == [False, True]
    body = json.dumps({"image": [base64.b64encode(CAT).decode()]})
    assert len(tiny.json("POST", "/recognize", body, {"Content-Type": "application/json"})[1]) == 1


@pytest.mark.parametrize("place", ["query", "form", "JSON", "JSON before query"])
def test_parameters(tiny, place):
    wanted = [p["label"] for p in tiny.send(("", CAT), topk=2)[1]["results"]]
    assert len(wanted) == 2
    if place == "query":
        _, record = tiny.send(("", CAT), path="/recognize?topk=2&threshold=0.0")
    elif place == "form":
        _, record = tiny.send(("", CAT), topk="2", threshold="0")
    else:
        path = "/recognize" + "?topk=4" * (place != "JSON")
        _, record = tiny.json("POST", path, as_json(CAT, topk=2), {"Content-Type": "application/json"})
    assert [p["label"] for p in record["results"]] == wanted


def test_the_threshold_is_the_least_confidence(lite):
    everything = lite.send(("", CAT), topk=MOST_TOPK)[1]["results"]
    assert len(everything) == MOST_TOPK
    kept = lite.send(("", CAT), topk=MOST_TOPK, threshold=0.05)[1]["results"]
    assert kept == [p for p in everything if p["confidence"] >= 0.05] and 1 < len(kept) < 10
    assert lite.send(("", CAT), threshold=1)[1]["results"] == []


def test_names_are_only_names(tiny):
    for name in ("../../etc/passwd", "a\nb".replace("\n", "%0A"), "=1+1.jpg", '"; x="', "\u202egpj.b", "猫" * 1000):
        assert tiny.send((name, CAT))[1]["path"] == name


def test_a_cached_answer_says_so(start, tiny_graph, tmp_path):
    server = start(*tiny_graph, "--cache", tmp_path / "cache.sqlite")
    first, second = (server.send(("a", CAT), topk=3)[1] for _ in range(2))
    assert second.pop("cached") is True and second == first
    shown = infer_module.Recognizer(tiny_graph[1], cache=tmp_path / "cache.sqlite")(SAMPLES[0])
    assert shown.cached and [p.label for p in shown.predictions[:3]] == [p["label"] for p in first["results"]]


# ---------------------------------------------------------------- refusals


def pixels(width, height):
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


JSON, JPEG = {"Content-Type": "application/json"}, {"Content-Type": "image/jpeg"}
FORM = {"Content-Type": form()[1]}
REFUSALS = {
    "torn form": (400, b"--edge\r\nno form", FORM),
    "no boundary": (400, form(("", CAT))[0], {"Content-Type": "multipart/form-data"}),
    "no type": (415, CAT, {}),
    "text": (415, CAT, {"Content-Type": "text/plain"}),
    "form of another kind": (415, b"image=abc", {"Content-Type": "application/x-www-form-urlencoded"}),
    "nothing": (422, b"", JPEG),
    "no photo": (422, b"no photo", JPEG),
    "torn photo": (422, CAT[:5000], JPEG),
    "empty form": (422, form()[0], FORM),
    "text in place of a file": (422, form(image="text")[0], FORM),
    "other name": (422, form(photo="text")[0], FORM),
    "no JSON": (422, b"{", JSON),
    "no object": (422, b"[1]", JSON),
    "deep": (422, b'{"image": ' + b"[" * 100_000, JSON),
    "no base64": (422, b'{"image": "*"}', JSON),
    "number": (422, b'{"image": 5}', JSON),
    "null": (422, b'{"image": null}', JSON),
    "empty list": (422, b'{"image": []}', JSON),
    "no image": (422, b"{}", JSON),
    "topk": (422, as_json(CAT, topk=0), JSON),
    "topk of words": (422, form(("", CAT), topk="many")[0], FORM),
    "threshold": (422, as_json(CAT, threshold=1.5), JSON),
    "NaN": (422, as_json(CAT, threshold=float("nan")), JSON),
    "unknown parameter": (422, as_json(CAT, topkk=3), JSON),
    "too many pixels": (413, pixels(20_000, 10_000), JPEG),
    "65 images": (413, form(*[("", b"x")] * 65)[0], FORM),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_json_in_chinese(tiny, name):
    status, body, headers = REFUSALS[name]
    answered, answer = tiny.json("POST", "/recognize", body, headers)
    assert answered == status and re.search("[\u4e00-\u9fff]", answer["error"]) and answer["error"].isprintable()
    assert tiny.send(("", CAT))[0] == 200


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nothing", 404), ("GET", "/docs", 404), ("GET", "/recognize", 405), ("POST", "/labels", 405),
    ("POST", "/reload", 403), ("POST", "/recognize?topk=x", 422), ("POST", "/recognize?a=1", 422),
])  # fmt: skip
def test_wrong_addresses(tiny, method, path, status):
    answered, answer = tiny.json(method, path, None if method == "GET" else CAT, JPEG if method == "POST" else {})
    assert answered == status and list(answer) == ["error"] and re.search("[\u4e00-\u9fff]", answer["error"])


def test_too_many_bytes(slow):
    large = CAT + bytes(50_000)
    assert slow.json("POST", "/recognize", large, JPEG)[0] == 413
    pieces = itertools.repeat(bytes(10_000), 10)
    assert slow.json("POST", "/recognize", pieces, JPEG)[0] == 413
    assert slow.send(("", large))[0] == 413
    assert slow.json("POST", "/recognize", as_json(large), JSON)[0] == 413
    status, (first, second) = slow.send(("", pixels(8, 8)), ("", large))
    assert status == 200 and "results" in first and "50,000 字节" in second["error"]
    assert slow.send(*[("", bytes(49_000))] * 9)[0] == 413  # together
    # A client that asks first need not send what will not be taken.
    head = b"POST /recognize HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nExpect: 100-continue\r\n"
    with slow.connect(head + b"Content-Length: 99999999\r\n\r\n") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("data", [b"hello\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\x02\0\x01"])
def test_what_is_no_http(tiny, data):
    with tiny.connect(data) as connection:
        answer = connection.makefile("rb").read()
    assert (
        answer.startswith(b"HTTP/1.1 400 ")
        and "不是有效的 HTTP 请求" in json.loads(answer.split(b"\r\n\r\n")[1])["error"]
    )


@pytest.mark.parametrize("length", ["-1", "abc", "1, 2", "9" * 30, "0x10"])
def test_lengths_that_are_none(tiny, length):
    head = f"POST /recognize HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n"
    with tiny.connect(head.encode()) as connection:
        assert connection.recv(1000).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))


def test_a_full_queue_says_when_to_come_again(slow):
    image = pixels(8, 8)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        body, kind = form(("", image))
        send = lambda _: slow.call("POST", "/recognize", body, {"Content-Type": kind})  # noqa: E731
        answers = list(pool.map(send, range(16)))
    assert {answer.status for answer in answers} == {200, 503}
    assert {answer.headers["Retry-After"] for answer in answers if answer.status == 503} == {"1"}
    assert slow.send(("", image))[0] == 200
    assert slow.send(*[("", image)] * 10)[0] == 200  # more than may wait, but nobody else does


def test_slow_images_do_not_hold_up_the_others(tiny):
    buffer = io.BytesIO()
    Image.new("RGB", (10_000, 10_000)).save(buffer, "PNG")
    order = []

    def send(name, content):
        order.append((name, tiny.json("POST", "/recognize", content, JPEG)[0]))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in range(3):
            pool.submit(send, "large", buffer.getvalue())
        while tiny.metric("wwts_queue_images") < 3:
            time.sleep(0.02)
        for _ in range(5):
            send("small", CAT)
    assert order[:5] == [("small", 200)] * 5 and order[5:] == [("large", 200)] * 3


# ---------------------------------------------------------------- tokens and addresses


def test_token(guarded):
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN.encode()}, {"Authorization": "Basic YTpi"}]
    wrong += [{"Authorization": "Bearer"}, {"Authorization": b"Bearer \xff\xfe"}]
    for method, path in (
        ("POST", "/recognize"),
        ("GET", "/model"),
        ("GET", "/labels"),
        ("GET", "/metrics"),
        ("POST", "/reload"),
    ):
        for headers in wrong:
            answer = guarded.call(method, path, None, headers)
            assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer" and "口令" in answer.text
    assert guarded.send(("", CAT), headers=AUTHORIZED)[0] == 200
    for path in ("/", "/health", "/openapi.json"):
        assert guarded.call("GET", path).status == 200


@pytest.mark.parametrize("arguments", [
    ("--host", "0.0.0.0"), ("--host", "::"), ("--host", "example.org"), ("--host", "0.0.0.0", "--token", ""),
    ("--port", "70000"), ("--port", "-1"), ("--max-bytes", "0"), ("--queue", "0"), ("extra",),
])  # fmt: skip
def test_wrong_usage(infer_here, tiny_graph, arguments):
    result = infer_here(*tiny_graph, *arguments, script="serve")
    assert result.returncode == 2 and result.stderr.startswith("[ERROR] ") and len(result.stderr.splitlines()) == 1


def test_what_cannot_be_served(infer_here, tiny, tiny_graph, tmp_path, monkeypatch):
    assert infer_here("-m", tmp_path / "missing.onnx", "--port", 0, script="serve").returncode == 3
    result = infer_here(*tiny_graph, "--port", tiny.port, script="serve")
    assert result.returncode == 3 and "--port" in result.stderr
    monkeypatch.setitem(serve.PACKAGES, "no_such_module", "no-such-package")
    result = infer_here(*tiny_graph, script="serve")
    assert result.returncode == 3 and result.stderr.endswith("pip install no-such-package\n")


def test_on_all_addresses_if_that_is_said(start, tiny_graph):
    assert start(*tiny_graph, "--host", "0.0.0.0", "--no-token").json("GET", "/health")[0] == 200
    server = start(*tiny_graph, "--host", "0.0.0.0", "--token", "t")
    assert server.json("GET", "/model")[0] == 401


# ---------------------------------------------------------------- OpenAPI, metrics


def test_openapi(tiny):
    from openapi_spec_validator import validate

    status, document = tiny.json("GET", "/openapi.json")
    validate(document)
    assert status == 200
    assert set(document["paths"]) == {"/recognize", "/model", "/labels", "/reload", "/metrics", "/health"}
    recognize = document["paths"]["/recognize"]["post"]
    assert set(recognize["requestBody"]["content"]) == {"multipart/form-data", "image/*", "application/json"}
    assert {parameter["name"] for parameter in recognize["parameters"]} == {"topk", "threshold"}
    assert {"200", "401", "413", "415", "422", "503"} <= set(recognize["responses"])


def test_metrics(start, tiny_graph):
    server = start(*tiny_graph)
    for body in (CAT, CAT, b"bad"):
        server.json("POST", "/recognize", body, JPEG)
    server.call("GET", "/no-such-address")
    text = server.call("GET", "/metrics").text
    assert 'wwts_requests_total{path="/recognize",status="200"} 2.0' in text
    assert 'wwts_requests_total{path="/recognize",status="422"} 1.0' in text
    assert 'wwts_requests_total{path="",status="404"} 1.0' in text and "no-such-address" not in text
    assert "wwts_request_seconds_count 3.0" in text and "wwts_queue_images 0.0" in text
    assert server.metric("wwts_batch_images_sum") == 3  # the one before it was ready, and two photos
    assert server.json("GET", "/health") == (200, {"status": "ok"})


# ---------------------------------------------------------------- stopping


def test_sigterm_answers_what_is_under_way(start, fast_repository):
    server = start("--repo", fast_repository, "-m", "slow", "-b", "1")
    body, kind = form(*[("", pixels(8, 8))] * 20)  # two seconds
    idle = server.connect()
    slow = server.connect(b"POST /recognize HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    with concurrent.futures.ThreadPoolExecutor() as pool, idle, slow:
        answer = pool.submit(server.call, "POST", "/recognize", body, {"Content-Type": kind})
        while not server.metric("wwts_queue_images"):
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert answer.result().status == 200 and len(json.loads(answer.result().text)) == 20
        with pytest.raises(OSError):
            server.call("GET", "/health")
        assert server.process.wait(10) == 128 + signal.SIGTERM


def test_clients_who_dawdle_do_not_keep_it_from_ending(start, tiny_graph):
    server = start(*tiny_graph)
    with server.connect(
        b"POST /recognize HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nx"
    ):
        assert server.json("GET", "/health")[0] == 200
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 128 + signal.SIGINT
    assert server.lines[-1].startswith("[WARN]")


# ---------------------------------------------------------------- hostile clients


@pytest.fixture(scope="module")
def hurried(start, tiny_graph):
    """A server that waits for one second where the others wait for a minute."""
    return start(*tiny_graph, "--max-bytes", "100000", code=HURRY)


HEAD = b"POST /recognize HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"


def test_a_body_that_does_not_arrive(hurried):
    with hurried.connect(HEAD + b"x") as connection:
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ") and "没有传完" in json.loads(answer.split(b"\r\n\r\n")[1])["error"]


@pytest.mark.parametrize("data", [b"", b"P", HEAD[:50], HEAD[:-2]], ids=["nothing", "a byte", "a line", "headers"])
def test_a_head_that_does_not_arrive(hurried, data):
    with hurried.connect(data) as connection:
        assert connection.recv(1000) == b""


def test_a_byte_at_a_time(hurried):
    """Neither before nor after an answer does a client get more time for dawdling."""
    with hurried.connect(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(ConnectionError):
            for number in range(100):
                connection.sendall(HEAD[number : number + 1])
                time.sleep(0.1)
            pytest.fail("goes on for ever")


def test_headers_without_end(hurried):
    with hurried.connect(b"GET / HTTP/1.1\r\n") as connection, contextlib.suppress(ConnectionError):
        for _ in range(1000):
            connection.sendall(b"X-Header: " + b"x" * 10_000 + b"\r\n")
        assert connection.recv(1000) == b""


def test_a_body_after_its_refusal_is_not_read_for_ever(hurried):
    head = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    with hurried.connect(head) as connection, contextlib.suppress(ConnectionError):
        assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.1)
        pytest.fail("goes on for ever")


def test_bodies_in_memory_are_bounded(hurried):
    """What 30 clients send and do not end is more than is held: some are refused, and their room is given back."""
    head = HEAD.replace(b"1000\r", b"90000\r")
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(hurried.connect(head + bytes(80_000))) for _ in range(30)]
        starts = sorted(connection.recv(12) for connection in connections)
    assert starts.count(b"HTTP/1.1 503") >= 10 and starts.count(b"HTTP/1.1 408") >= 10
    assert hurried.send(("", CAT[:1]))[0] == 422


def test_500_connections(tiny):
    """Idle ones, ones in the middle of a head, and ones in the middle of a body."""
    with contextlib.ExitStack() as stack:
        for number in range(500):
            stack.enter_context(tiny.connect([b"", HEAD[:60], HEAD + b"x"][number % 3]))
        assert [tiny.send(("", CAT))[0] for _ in range(20)] == [200] * 20


def test_clients_that_vanish(slow):
    """What they asked for is not computed once they are gone."""
    body, kind = form(*[("", pixels(8, 8))] * 60)
    head = f"POST /recognize HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    before = slow.metric("wwts_batch_images_sum")
    with slow.connect(head.encode() + body):
        while not slow.metric("wwts_queue_images"):
            time.sleep(0.02)
    with slow.connect(head.encode() + body[:100]):
        pass
    while slow.metric("wwts_queue_images"):
        time.sleep(0.05)
    assert slow.metric("wwts_batch_images_sum") - before < 50
    assert slow.send(("", pixels(8, 8)))[0] == 200


def hostile_uploads():
    """200 files: bombs, heads without bodies, and photos with wrong bytes or torn."""
    chance = random.Random(0)
    yield from BOMBS.values()
    yield from HEADS.values()
    formats = []
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        buffer = io.BytesIO()
        Image.open(SAMPLES[1]).convert("RGB").resize((90, 60)).save(buffer, kind)
        formats.append(buffer.getvalue())
    while True:
        content = bytearray(chance.choice(formats))
        for _ in range(chance.randrange(1, 20)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        yield bytes(content[: chance.randrange(len(content))] if chance.random() < 0.3 else content)


def test_200_hostile_uploads(tiny):
    uploads = [*itertools.islice(hostile_uploads(), 200)]
    wanted = tiny.send(("", CAT))[1]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda content: tiny.json("POST", "/recognize", content, JPEG), uploads))
        for status, answer in answers:
            assert ("results" in answer) == (status == 200) and ("error" in answer) == (status in (413, 422))
            assert status == 200 or answer["error"].isprintable()
    assert {200, 413, 422} == {status for status, _ in answers}
    for start in range(0, 200, 50):
        status, records = tiny.send(*[("", content) for content in uploads[start : start + 50]])
        assert status == 200 and ["error" in r for r in records] == [s != 200 for s, _ in answers[start : start + 50]]
    assert tiny.send(("", CAT))[1] == wanted


# ---------------------------------------------------------------- the model: replaced, failing


def test_reload_loses_no_request(start, tmp_path):
    path = make_graph(tmp_path / "model.onnx")
    server = start("-m", path, "--token", "t")
    token = {"Authorization": "Bearer t"}
    old = server.json("GET", "/model", headers=token)[1]["version"]
    answers, stop = [], threading.Event()

    def send():
        while not stop.is_set():
            answers.append(server.json("POST", "/recognize", CAT, JPEG | token))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(send)
        for sign in (-1, 1, -1):
            make_graph(tmp_path / "next.onnx", sign=sign)
            os.replace(tmp_path / "next.onnx", path)
            status, model = server.json("POST", "/reload", headers=token)
            assert status == 200 and (model["version"] != old) == (sign == -1)
            after = server.json("POST", "/recognize", CAT, JPEG | token)[1]
            assert after["version"] == model["version"]
        shutil.copy(SAMPLES[0], path)
        status, answer = server.json("POST", "/reload", headers=token)
        assert status == 500 and "仍用原来的模型" in answer["error"]
        time.sleep(0.2)
        stop.set()
    assert server.json("GET", "/model", headers=token)[1] == model
    assert {status for status, _ in answers} == {200}
    tops = {(answer["version"], answer["results"][0]["label"]) for _, answer in answers}
    assert {version for version, _ in tops} == {old, model["version"]} and len(tops) == 2


def test_a_learned_model(start, infer_here, tmp_path):
    folder = tmp_path / "photos"
    for name, colour in (("红", "red"), ("蓝", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (80, 60 + number), colour).save(folder / name / f"{number}.png")
    model = tmp_path / "own.safetensors"
    result = infer_here(folder, "-m", "wwts_cn_lite", "-o", model, script="learn")
    assert result.returncode == 0, result.stderr
    server = start("-m", model, "--token", "t")
    record = server.send(("a", (folder / "红" / "0.png").read_bytes()), headers={"Authorization": "Bearer t"})[1]
    assert record["results"][0]["label"] == "红" and {p["label"] for p in record["results"]} == {"红", "蓝"}
    assert server.json("POST", "/reload", headers={"Authorization": "Bearer t"})[1]["num_classes"] == 2


def test_a_model_that_fails_is_said_and_tried_again(tiny_graph):
    batches = []
    service = Service(SimpleNamespace(model=tiny_graph[1], queue=8), batches.append)
    engine = service.recognizer.load()
    classify = engine.classify

    def fail(*arguments):
        time.sleep(0.1)
        raise infer_module.ModelError("模型坏了")

    engine.classify = fail
    futures = service.put([CAT] * 8, [0] * 8)
    with pytest.raises(BusyError):
        service.put([CAT], [0])
    for future in futures:
        with pytest.raises(infer_module.ModelError, match="模型坏了"):
            future.result(10)
    engine.classify = classify
    assert service.put([CAT], [0])[0].result(10).predictions
    assert batches[0] == 1


def test_what_is_put_into_a_lane_that_failed_fails(tiny_graph):
    recognizer = infer_module.Recognizer(tiny_graph[1])
    recognizer.load().classify = lambda *_: 1 / 0
    lane = Lane(recognizer, 8)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            lane.put(CAT).result(10)


def test_a_model_that_answers_nothing_is_not_served(infer_here, hub_repository):
    result = infer_here("--repo", hub_repository, "-m", "not_a_number", "--port", 0, script="serve")
    assert result.returncode == 3 and "NaN" in result.stderr


# ---------------------------------------------------------------- the page


@pytest.fixture
def page(browser):
    """Open a server's page without what the browser kept; nothing may be complained of but what is said."""
    expected = []

    def open_page(server):
        browser.get(server.url + "health")
        browser.execute_script("localStorage.clear()")
        browser.get(server.url)
        browser.get_log("browser")
        return Page(browser, expected)

    yield open_page
    complaints = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [text for text in complaints if not any(status in text for status in expected)]


class Page:
    """What a user sees of the page and does to it."""

    def __init__(self, browser, expected):
        self.browser, self.expected = browser, expected

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def wait(self, expression, seconds=30):
        """Wait until an expression is true; give its value."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, seconds, 0.05).until(lambda b: b.execute_script(f"return {expression}"))

    def texts(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
        return self.browser.execute_script(script, selector)

    def choose(self, *paths):
        self.find("#files").send_keys("\n".join(map(str, paths)))

    def done(self, number):
        self.wait(f"document.getElementById('progress').innerText.startsWith('已识别 {number} / {number} ')")

    def download(self):
        return download(self.browser, "结果.csv")


GIVE = """
const [kind, target, base64, name] = arguments, data = new DataTransfer();
const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
data.items.add(new File([bytes], name, { type: "image/jpeg" }));
const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
const event = kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
document.querySelector(target).dispatchEvent(event);
"""


def test_choose_drop_paste_and_download(lite, page, tmp_path):
    shown = page(lite)
    shown.wait("document.getElementById('model').innerText.includes('wwts_cn_lite')")
    (tmp_path / "坏,=.jpg").write_bytes(b"no photo")
    shown.expected.append("422")
    shown.choose(SAMPLES[0], tmp_path / "坏,=.jpg")
    shown.done(2)
    for kind, name in (("drop", "=放下.jpg"), ("paste", "粘贴.jpg")):
        encoded = base64.b64encode(SAMPLES[1].read_bytes()).decode()
        shown.browser.execute_script(GIVE, kind, "#drop", encoded, name)
    shown.done(4)
    assert shown.texts(".name") == ["粘贴.jpg", "=放下.jpg", SAMPLES[0].name, "坏,=.jpg"]
    assert shown.texts("#photos > li:nth-child(3) bdi")[1] == "埃及猫"
    assert shown.texts("#photos .bad") == ["无法识别的图像格式,或文件已损坏"]
    assert "1 张出错" in shown.texts("#progress")[0]
    assert shown.wait("document.querySelectorAll('canvas').length") == 3
    path = shown.download()
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))
    assert [row["path"] for row in rows] == [SAMPLES[0].name, "坏,=.jpg", "'=放下.jpg", "粘贴.jpg"]
    assert rows[0]["label_1"] == "埃及猫" and rows[0]["confidence_1"].startswith("0.57942") and rows[1]["error"]
    assert list(rows[0])[-1] == "error" and rows[0]["version"] == lite.json("GET", "/model")[1]["version"]
    import report

    assert [record.path for record in report.read_records([str(path)], report.Rules(set(), set(), 0))][2] == "=放下.jpg"
    shown.find("#clear").click()
    assert shown.texts("#photos > li") == [] and shown.texts("#progress") == ["还没有照片"]


def test_the_token_is_asked_for_once(guarded, page):
    shown = page(guarded)
    shown.expected.append("401")
    for word in ("wrong", TOKEN):
        shown.wait("document.getElementById('login').open")
        shown.find("#token").send_keys(word + "\n")
    shown.wait("document.getElementById('model').innerText.includes('tiny')")
    shown.choose(*SAMPLES[:3])
    shown.done(3)
    shown.browser.refresh()
    shown.wait("document.getElementById('model').innerText.includes('tiny')")
    assert not shown.browser.execute_script("return document.getElementById('login').open")


def test_the_page_waits_while_the_service_is_busy(slow, page, tmp_path):
    shown = page(slow)
    shown.expected.append("503")
    (tmp_path / "a.png").write_bytes(pixels(8, 8))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        others = pool.submit(slow.send, *[("", pixels(8, 8))] * 20)
        while not slow.metric("wwts_queue_images"):
            time.sleep(0.02)
        shown.choose(tmp_path / "a.png")
        shown.done(1)
        assert others.result()[0] == 200
    assert shown.texts("#photos .bad") == []


def test_strangers_texts_are_only_texts(start, page, tmp_path):
    labels = ["<img src=x onerror=document.title=1>", "</script>", "a\u202eb", "'", '"', "=1", "&lt;", "颜色"]
    server = start("-m", make_graph(tmp_path / "x.onnx", SPEC | {"labels": labels}))
    shown = page(server)
    Image.new("RGB", (8, 8)).save(tmp_path / "<b>&amp;\u202egpj.png")
    shown.choose(tmp_path / "<b>&amp;\u202egpj.png")
    shown.done(1)
    assert shown.texts(".name") == ["<b>&amp;\\u202egpj.png"] and shown.browser.title == "识别照片"
    assert len(shown.texts(".answers bdi")) == 5
    assert set(shown.texts(".answers bdi")) <= {*labels, "a\\u202eb"}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_looks(lite, page, tmp_path, theme, width):
    """WCAG's AA contrast of all texts; nothing wider than the window; the keyboard reaches what can be pressed."""
    shown = page(lite)
    browser = shown.browser
    (tmp_path / "坏.jpg").write_bytes(b"no photo")
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    shown.expected.append("422")
    try:
        shown.choose(*SAMPLES, tmp_path / "坏.jpg")
        shown.done(len(SAMPLES) + 1)
        assert browser.execute_script(CONTRASTS) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert all(canvas.get_attribute("aria-label") for canvas in browser.find_elements("css selector", "canvas"))
        from selenium.webdriver.common.keys import Keys

        reached = set()
        for _ in range(10):
            browser.switch_to.active_element.send_keys(Keys.TAB)
            reached.add(browser.execute_script("return document.activeElement.innerText"))
            assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
            if "下载结果(CSV)" in reached:
                break
        assert {"选择照片", "清除", "下载结果(CSV)"} <= reached
        if folder := os.environ.get("WWTS_SCREENSHOTS"):
            browser.save_screenshot(f"{folder}/serve-{theme}-{width}.png")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_can_take_a_photo(tiny, page):
    shown = page(tiny)
    assert not shown.find("#camera").is_displayed() and shown.find("#hint").is_displayed()
    shown.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        shown.browser.refresh()
        assert shown.find("#camera").is_displayed() and not shown.find("#hint").is_displayed()
        assert shown.find("#shot").get_attribute("capture") == "environment"
        shown.find("#shot").send_keys(str(SAMPLES[0]))
        shown.done(1)
    finally:
        shown.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_the_page_is_strict(tiny):
    first, second = (tiny.call("GET", "/") for _ in range(2))
    assert set(re.findall(r"\w+://[\w./-]+", first.text)) == {"http://www.w3.org/2000/svg"}
    policy = first.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    nonces = [set(re.findall(r'nonce[-=]["]?([0-9a-f]{32})', page.text)) for page in (first, second)]
    assert len(nonces[0]) == len(nonces[1]) == 1 and nonces[0] != nonces[1]
    assert not re.search(r'\son\w+="', first.text) and not re.search(r'\sstyle="', first.text)


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_headers():
    with serve.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
