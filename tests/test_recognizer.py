"""The importable Recognizer: many threads and streams on one object, whatever images, whatever foreign code does."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import infer as infer_module
from infer import ModelError, Recognizer, UsageError

import pytest
import torch
from conftest import SAMPLES, make_graph
from PIL import Image, ImageOps

from wwts import repositories

CAT, COFFEE, PALACE, TRIPOD = SAMPLES


@pytest.fixture
def fast(fast_repository):
    """Make a Recognizer whose model costs next to nothing."""
    return lambda model="fast", **options: Recognizer(model, repo=str(fast_repository), device="cpu", **options)


def answers(results):
    return [(result.path, [p.index for p in result.predictions], result.error) for result in results]


def in_threads(functions):
    """What functions return, all of them started at once; raises what any of them raised."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(run, function) for function in functions]]


# ---------------------------------------------------------------- many threads and streams


@pytest.mark.parametrize("recognizers", [1, 4, 24])
def test_24_streams_at_once(fast, photos, recognizers):
    """Not loaded before, so that the first thing they do together is loading."""
    images = [str(path) for path in sorted(photos.rglob("*.png"))[:40]]
    wanted = answers(map(fast(), images))
    assert len({str(indices) for _, indices, _ in wanted}) > 3
    shared = [fast(batch_size=size) for size in itertools.islice(itertools.cycle((3, 1, 8)), recognizers)]
    turned = [images[number:] + images[:number] for number in range(24)]
    found = in_threads([
        lambda recognizer=shared[number % recognizers], images=turned[number]: answers(recognizer.stream(images))
        for number in range(24)
    ])  # fmt: skip
    assert found == [wanted[number:] + wanted[:number] for number in range(24)]


def test_streams_of_the_real_model_at_once():
    """Each of four recognizers of its own is loaded while the others load or run."""
    wanted = [285, 967, 698, 872]
    recognizers = [Recognizer("wwts_cn_lite", device="cpu", topk=1) for _ in range(4)]
    found = in_threads([lambda recognizer=r: list(recognizer.stream(SAMPLES)) for r in recognizers])
    for results in found:
        assert [result.predictions[0].index for result in results] == wanted
        assert {result.version for result in results} == {found[0][0].version}


def test_calls_and_streams_share_one_object(fast):
    recognizer = fast()
    wanted = answers(map(fast(), SAMPLES))
    functions = [lambda: answers(recognizer.stream(SAMPLES * 3))] * 4
    functions += [lambda: answers(recognizer(photo) for photo in SAMPLES * 3)] * 4
    assert in_threads(functions) == [wanted * 3] * 8


def test_one_stream_may_end_while_others_go_on(fast):
    recognizer = fast(batch_size=2)
    first, second = recognizer.stream(itertools.cycle(SAMPLES)), recognizer.stream(SAMPLES * 10)
    unused = recognizer.stream(SAMPLES)
    assert next(first).path == next(second).path == str(CAT)
    unused.close()  # before it gave anything
    first.close()
    assert len(list(second)) == 39 and list(unused) == list(first) == []
    assert len(list(recognizer.stream(SAMPLES))) == 4


def test_a_stream_that_is_closed_leaves_no_thread_behind(fast):
    recognizer = fast(workers=4)
    list(recognizer.stream(SAMPLES))
    before = threading.active_count()
    for _ in range(5):
        stream = recognizer.stream(itertools.cycle(SAMPLES))
        next(stream)
        stream.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_streams_of_batches_of_one_end(fast):
    assert len(list(fast(batch_size=1).stream(SAMPLES * 3))) == 12


def test_the_model_is_loaded_once_by_however_many_threads(fast, monkeypatch):
    calls = []
    load = repositories.load_hub_model
    monkeypatch.setattr(repositories, "load_hub_model", lambda *a: calls.append(1) or time.sleep(0.1) or load(*a))
    recognizer = fast(workers=8)
    in_threads([lambda: list(recognizer.stream(SAMPLES * 5)) for _ in range(8)])
    assert len(calls) == 1


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
def test_a_model_that_fails_is_loaded_once(infer_here, photos, tmp_path, cache):
    (tmp_path / "hubconf.py").write_text(f"""
import time
import warnings
def failing():
    with open({str(tmp_path / "calls")!r}, "a") as file:
        file.write("x")
    time.sleep(0.1)
    raise RuntimeError("first line\\nsecond line")
""")
    options = ("--cache", tmp_path / "c") if cache else ()
    result = infer_here("--repo", tmp_path, "-m", "failing", photos, "-j", "8", *options)
    assert result.returncode == 3 and result.stdout == ""
    assert [line for line in result.stderr.splitlines() if "[ERROR]" in line] == [
        "[ERROR] 模型 failing 加载失败: first line second line"
    ]
    assert (tmp_path / "calls").read_text() == "x"
    recognizer = Recognizer("failing", repo=str(tmp_path))
    functions = [lambda: recognizer(CAT)] * 4 + [lambda: list(recognizer.stream(SAMPLES))] * 4

    def message(function):
        with pytest.raises(ModelError) as caught:
            function()
        return str(caught.value)

    assert len(set(in_threads([lambda f=function: message(f) for function in functions]))) == 1
    assert (tmp_path / "calls").read_text() == "xx"


# ---------------------------------------------------------------- when answers come


def test_a_lone_image_is_answered_at_once(fast):
    """The next image comes only after the answer to the one before; waiting for a full batch would wait for ever."""
    answered = threading.Semaphore(0)

    def images():
        for photo in SAMPLES:
            yield photo
            assert answered.acquire(timeout=60), "no answer while the input waits"

    for result, photo in zip(fast(batch_size=8).stream(images()), SAMPLES, strict=True):
        assert result.path == str(photo)
        answered.release()


class _Late:
    """An image that takes its time to be read."""

    name = "late.jpg"

    def __init__(self, event):
        self.event, self.file = event, io.BytesIO(CAT.read_bytes())

    def read(self, *size):
        assert self.event.wait(60)
        return self.file.read(*size)

    def seek(self, *position):
        return self.file.seek(*position)

    def tell(self):
        return self.file.tell()


def test_what_is_ready_does_not_wait_for_what_is_not(fast):
    """And comes in the order of the input nevertheless."""
    event = threading.Event()
    stream = fast(workers=4).stream([COFFEE, _Late(event), PALACE])
    assert next(stream).path == str(COFFEE)
    event.set()
    assert [result.path for result in stream] == ["late.jpg", str(PALACE)]


def test_no_more_is_taken_than_is_worked_on(fast):
    taken = []
    stream = fast(batch_size=2, workers=2).stream(taken.append(photo) or photo for photo in itertools.cycle(SAMPLES))
    for _ in range(20):
        next(stream)
    stream.close()
    assert len(taken) < 20 + 40


@pytest.mark.parametrize("error", [KeyError("no more"), RuntimeError("no more"), KeyboardInterrupt(), GeneratorExit()])
def test_an_exception_of_the_input_comes_after_the_results_before_it(fast, error):
    event = threading.Event()

    def images():
        yield COFFEE
        yield _Late(event)
        yield "missing.jpg"
        event.set()
        raise error

    seen = []
    with pytest.raises(type(error)) as caught:
        for result in fast(batch_size=8).stream(images()):
            seen.append(result.path)
    assert caught.value is error and seen == [str(COFFEE), "late.jpg", "missing.jpg"]


# ---------------------------------------------------------------- kinds of images


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pil_images_are_turned_by_exif_like_files(fast, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    with Image.open(CAT) as image:
        image.crop((100, 0, 400, 150)).save(path, exif=exif)
    recognizer = fast("upper", topk=8)
    wanted = recognizer(path).predictions
    with Image.open(path) as image:
        assert recognizer(image).predictions == wanted
        assert image.size == (300, 150)  # the caller's own is left as it is
        upright = ImageOps.exif_transpose(image)
    assert recognizer(upright).predictions == wanted
    with Image.open(path) as image:
        (result,) = recognizer.stream([image])
        assert result.predictions == wanted and result.path == str(path)


def test_broken_pil_images_are_error_records(fast, tmp_path):
    (tmp_path / "half.jpg").write_bytes(CAT.read_bytes()[:9000])
    closed = Image.open(CAT)
    closed.close()
    with Image.open(tmp_path / "half.jpg") as half, Image.open(CAT) as good:
        inputs = [COFFEE, half, closed, good, PALACE]
        results = list(fast().stream(inputs))
    assert [result.error is not None for result in results] == [False, True, True, False, False]
    assert results[1].path == str(tmp_path / "half.jpg") and all(r.error.isprintable() for r in results[1:3])


def encoded(photo, **options):
    file = io.BytesIO()
    with Image.open(photo) as image:
        image.save(file, "JPEG", **options)
    return file  # at its end, as whoever writes one leaves it


class _Pipe(io.RawIOBase):
    """Bytes that come once, as from a socket."""

    def __init__(self, content):
        self.content = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.content.readinto(buffer)


def test_binary_files_are_images(fast):
    recognizer = fast(topk=8)
    wanted = recognizer(CAT)
    with open(CAT, "rb") as file:
        assert recognizer(file) == wanted and not file.closed  # its name is its path
        assert recognizer(file) == wanted  # and again, wherever it was left
    content = io.BytesIO(CAT.read_bytes())
    results = list(recognizer.stream([content, CAT, content]))
    assert [result.predictions for result in results] == [wanted.predictions] * 3
    assert results[0].path == "" and not content.closed
    with tempfile.TemporaryFile() as file, tempfile.SpooledTemporaryFile() as spooled:
        for unnamed in (file, spooled):  # the name of the first is a number
            unnamed.write(CAT.read_bytes())
            result = recognizer(unnamed)
            assert result.predictions == wanted.predictions and isinstance(result.path, str)


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_binary_files_that_cannot_go_back_are_images(fast, tmp_path, cache, progressive):
    content = encoded(CAT, progressive=progressive).getvalue()
    recognizer = fast(cache=str(tmp_path / "c") if cache else None)
    for _ in range(2):
        result = recognizer(io.BufferedReader(_Pipe(content)))
        assert result.error is None and result.predictions == recognizer(io.BytesIO(content)).predictions


def test_binary_files_of_the_same_length_read_are_not_the_same_image(fast, tmp_path):
    """A file may come at its end: what the cache knows it by must be its content and not what is left of it."""
    wanted = [fast()(encoded(photo)).predictions for photo in SAMPLES]
    assert len({tuple(p.index for p in predictions) for predictions in wanted}) > 1
    recognizer = fast(cache=str(tmp_path / "c"))
    first = [recognizer(encoded(photo)) for photo in SAMPLES]
    assert [result.predictions for result in first] == wanted and not any(result.cached for result in first)
    again = [recognizer(io.BytesIO(encoded(photo).getvalue())) for photo in SAMPLES]
    assert [result.predictions for result in again] == wanted and all(result.cached for result in again)


def test_what_is_no_image_is_an_error_record(fast, tmp_path):
    with open(CAT, errors="replace") as text:
        odd = [text, io.BytesIO(b""), io.BytesIO(b"no image"), None, 5, object(), b"\xff\xd8\xff", "\0", ["a.jpg"]]
        results = list(fast().stream([CAT, *odd, COFFEE]))
    assert [result.error is None for result in results] == [True, *[False] * len(odd), True]
    assert all(result.error.isprintable() and isinstance(result.path, str) for result in results[1:-1])


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"topk": 0}, "topk"),
        ({"topk": -1}, "topk"),
        ({"topk": 2.5}, "topk"),
        ({"topk": "5"}, "topk"),
        ({"topk": None}, "topk"),
        ({"topk": True}, "topk"),
        ({"device": "gpu"}, "device"),
        ({"device": None}, "device"),
        ({"device": "cuda:x"}, "device"),
        ({"threshold": 2}, "threshold"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": "0.5"}, "threshold"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": torch.float16}, "dtype"),
        ({"engine": "tensorrt"}, "engine"),
        ({"model": ""}, "model"),
        ({"workers": 0}, "workers"),
        ({"workers": "2"}, "workers"),
        ({"batch_size": 0}, "batch"),
        ({"batch_size": "8"}, "batch"),
        ({"cache": "http://example.com"}, "cache"),
        ({"model": "x.onnx", "device": "mps"}, "ONNX"),
        ({"model": "x.onnx", "repo": "."}, "ONNX"),
        ({"engine": "onnx", "dtype": "float16"}, "onnx"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments, word):
    with pytest.raises(UsageError, match=word) as caught:
        Recognizer(**arguments)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ModelError)


def test_only_the_model_may_be_given_without_its_name():
    with pytest.raises(TypeError):
        Recognizer("wwts_cn_lite", "somewhere")


@pytest.mark.parametrize("path", ["cat.jpg", b"cat.jpg", CAT], ids=repr)
def test_one_path_is_not_many(path):
    with pytest.raises(UsageError, match="一组"):
        Recognizer("wwts_cn_lite").stream(path)  # at once, and not at the first result


def test_paths_may_be_path_objects(fast_repository, tmp_path):
    recognizer = Recognizer("fast", repo=fast_repository, device="cpu", cache=tmp_path / "c")
    assert recognizer(CAT).path == recognizer(os.fspath(CAT)).path == recognizer(os.fsencode(CAT)).path == str(CAT)
    graph = Recognizer(make_graph(tmp_path / "x.onnx"))
    assert graph(CAT).error is None
    with pytest.raises(ModelError):
        Recognizer("fast", repo=tmp_path / "nothing")(CAT)


def test_a_graph_that_may_not_be_read_is_no_error_of_the_images(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    recognizer = Recognizer(make_graph(tmp_path / "x.onnx"))
    monkeypatch.setattr(infer_module.mmap, "mmap", fail)
    for use in (lambda: recognizer(CAT), lambda: list(recognizer.stream(SAMPLES)), recognizer.load):
        with pytest.raises(ModelError):
            use()


def test_the_identity_is_that_of_the_results(fast):
    recognizer = fast()
    identity = recognizer.identify()
    result = recognizer(CAT)
    assert (identity.name, identity.version, identity.num_classes) == ("fast", result.version, 8)
    assert re.fullmatch("[0-9a-f]{8}", result.version) and result.model == "fast"
    engine = recognizer.load()
    assert (engine.version, engine.device_name, engine.spec.num_classes) == (result.version, "cpu", 8)
    assert infer_module.Spec.parse(json.loads(json.dumps(engine.spec.record())), "x") == engine.spec


def test_records_are_those_of_the_command(fast, infer_here, fast_repository, tmp_path):
    command = ("--repo", fast_repository, "-m", "fast", "-d", "cpu", "-f", "jsonl")
    lines = infer_here(*command, CAT, tmp_path / "no.jpg").stdout.splitlines()
    recognizer = fast()
    assert [recognizer(path).record() for path in (CAT, tmp_path / "no.jpg")] == list(map(json.loads, lines))


# ---------------------------------------------------------------- pickling


def _recognize(recognizer, path):
    return [prediction.index for prediction in recognizer(path).predictions]


@pytest.mark.parametrize("used", [False, True], ids=["before use", "after use"])
def test_a_recognizer_can_be_pickled(fast_repository, tmp_path, used):
    options = dict(topk=3, threshold=0.01, batch_size=2, workers=3, cache=str(tmp_path / "c"), dtype="bfloat16")
    recognizer = Recognizer("fast", repo=str(fast_repository), device="cpu", **options)
    wanted = _recognize(Recognizer("fast", repo=str(fast_repository), device="cpu", **options), COFFEE)
    if used:
        assert len(list(recognizer.stream(SAMPLES))) == 4
    data = pickle.dumps(recognizer)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert {name: getattr(copy, name) for name in options} == options
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_recognize, copy, COFFEE).result(timeout=120) == wanted
    assert _recognize(copy, COFFEE) == wanted


# ---------------------------------------------------------------- what foreign code does

FOREIGN = """
import os
import sys
from types import SimpleNamespace

import torch
from torch import nn

LABELS = list("甲乙丙丁")


class Net(nn.Module):
    def __init__(self, answer=2, change=lambda logits, x: logits):
        super().__init__()
        self.fc, self.change = nn.Linear(3, 4), change
        nn.init.zeros_(self.fc.weight)
        self.fc.bias.data = torch.eye(4)[answer] * 5
        self.spec = dict(num_classes=4, labels=LABELS, resize=32, crop=32)

    def forward(self, x):
        return self.change(self.fc(x.mean((2, 3))), x)


def _raise(error):
    raise error


def _in_batch_only(bad):
    return lambda logits, x: bad(logits, x) if len(x) > 1 else logits


# What forward gives or raises.
def gives_dict(): return Net(change=lambda logits, x: {"logits": logits})
def gives_tuple(): return Net(change=lambda logits, x: (logits, x))
def gives_list(): return Net(change=lambda logits, x: [logits])
def gives_none(): return Net(change=lambda logits, x: None)
def gives_rank_1(): return Net(change=lambda logits, x: logits[0])
def gives_rank_4(): return Net(change=lambda logits, x: logits[..., None, None])
def gives_integers(): return Net(change=lambda logits, x: logits.long())
def gives_complex(): return Net(change=lambda logits, x: logits.to(torch.complex64))
def gives_other_classes(): return Net(change=lambda logits, x: logits[:, :3])
def gives_no_classes(): return Net(change=lambda logits, x: logits[:, :0])
def raises(): return Net(change=lambda logits, x: _raise(ValueError("first\\nsecond")))
def raises_nothing_to_say(): return Net(change=lambda logits, x: _raise(RuntimeError()))
def raises_stop_iteration(): return Net(change=lambda logits, x: _raise(StopIteration()))
def exits(): return Net(change=lambda logits, x: sys.exit(0))
def imports_what_is_missing(): return Net(change=lambda logits, x: __import__("no_such_package_at_all"))


# The same for more than one image only.
def batch_gives_dict(): return Net(change=_in_batch_only(lambda logits, x: {"logits": logits}))
def batch_gives_one(): return Net(change=_in_batch_only(lambda logits, x: logits[:1]))
def batch_raises(): return Net(change=_in_batch_only(lambda logits, x: _raise(ValueError("one\\nonly"))))
def batch_reshapes(): return Net(change=lambda logits, x: logits.view(1, 4))
def batch_lacks_kernels():
    error = RuntimeError("CUDA error: no kernel image is available for execution on the device\\nCompile with ...")
    return Net(change=_in_batch_only(lambda logits, x: _raise(error)))


# What the entry point gives or raises.
def entry_gives_none(): return None
def entry_gives_dict(): return Net().state_dict()
def entry_gives_function(): return lambda x: x
def entry_gives_pair(): return Net(), LABELS
def entry_raises(): raise KeyError("first\\nsecond")
def entry_misses_a_file(): open("/nonexistent/weights.pt")
def entry_has_no_network(): raise ConnectionError("no network")
def entry_exits(): sys.exit(0)
def entry_wants_more(size): return Net()


def _with_spec(spec):
    net = Net()
    net.spec = spec
    return net


def spec_list(): return _with_spec([1, 2])
def spec_text(): return _with_spec("text")
def spec_number(): return _with_spec(5)
def spec_object(): return _with_spec(SimpleNamespace(num_classes=4))
def spec_method():
    Net.spec = property(lambda self: _raise(ValueError("spec")), lambda self, value: None)
    return Net()
def spec_crop_text(): return _with_spec(dict(num_classes=4, labels=LABELS, crop="32", resize=32))
def spec_crop_negative(): return _with_spec(dict(num_classes=4, labels=LABELS, crop=-1, resize=32))
def spec_crop_huge(): return _with_spec(dict(num_classes=4, labels=LABELS, crop=10**9, resize=10**9))
def spec_few_labels(): return _with_spec(dict(num_classes=4, labels=LABELS[:3], crop=32, resize=32))
def spec_no_labels(): return _with_spec(dict(crop=32, resize=32))
def spec_other_classes(): return _with_spec(dict(num_classes=5, labels=LABELS + ["戊"], crop=32, resize=32))
def spec_tensor_mean(): return _with_spec(dict(labels=LABELS, crop=32, resize=32, mean=torch.zeros(3)))
def spec_keys(): return _with_spec({1: 2, None: 3, "crop": None})


# Not a number.
def nan(): return Net(change=lambda logits, x: logits * float("nan"))


# Odd, but a model.
def none_spec():
    net = nn.Sequential(Net(), nn.Linear(4, 1000))
    nn.init.zeros_(net[1].weight)
    net[1].bias.data[285] = 30
    net.spec = None
    return net


def edits_sys_path():
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "lib"))
    import deep_in_lib

    return Net(deep_in_lib.ANSWER)


def shortens_sys_path():
    net = Net()
    del sys.path[0]
    sys.path.append("/nonexistent")
    return net


def replaces_sys_path():
    sys.path = sys.path[1:]
    return Net()


def own_default(weights="IMAGENET1K_V2"): return Net({"IMAGENET1K_V2": 2}.get(weights, 0))
def no_default(weights=None): return Net({"DEFAULT": 2}.get(weights, 0))
def must_have_weights(*, weights): return Net({"DEFAULT": 2}.get(weights, 0))
def old_convention(pretrained=False, **kwargs): return Net(2 if pretrained and not kwargs else 0)
def both_conventions(weights="A", pretrained=False): return Net(2 if weights == "A" and not pretrained else 0)
def prints():
    print("hello from a stranger")
    return Net(change=lambda logits, x: print("hello again") or logits)
def half(): return Net().half()
def training(): return Net().train()
def with_gradients():
    net = Net()
    assert torch.is_grad_enabled() and net.fc.weight.requires_grad
    return net
"""
ENTRIES = re.findall(r"^def ([a-z]\w*)\(", FOREIGN, re.MULTILINE)
BATCH = [name for name in ENTRIES if name.startswith("batch_")]
BAD = [name for name in ENTRIES[: ENTRIES.index("nan")] if name not in BATCH]
GOOD = ENTRIES[ENTRIES.index("none_spec") :]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "hubconf.py").write_text(FOREIGN, encoding="utf-8")
    (folder / "lib").mkdir()
    (folder / "lib" / "deep_in_lib.py").write_text("ANSWER = 2\n")
    return folder


@pytest.fixture(autouse=True)
def same_path():
    """Whatever foreign code does to it, the path that modules are imported from is afterwards as it was."""
    path = sys.path[:]
    yield
    assert sys.path == path


def assert_refused(result, status=3):
    """No result, and one line that says why."""
    assert result.returncode == status and "Traceback" not in result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("[INFO] ", "[WARN] "))]
    assert len(errors) == 1 and errors[0].startswith("[ERROR] ") and errors[0].isprintable(), result.stderr
    assert len(errors[0]) > 20


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
@pytest.mark.parametrize("entry", BAD)
def test_whatever_foreign_code_does_is_one_line(infer_here, foreign, tmp_path, entry, cache):
    options = ("--cache", tmp_path / "c") if cache else ()
    for images in ([CAT], SAMPLES):
        result = infer_here("--repo", foreign, "-m", entry, *images, "-f", "jsonl", "-d", "cpu", *options)
        assert_refused(result)
        assert result.stdout == ""


@pytest.mark.parametrize("entry", BAD)
def test_whatever_foreign_code_does_is_a_model_error(foreign, entry):
    recognizer = Recognizer(entry, repo=str(foreign), device="cpu")
    for use in (lambda: recognizer(CAT), lambda: list(recognizer.stream(SAMPLES)), recognizer.identify):
        with pytest.raises(ModelError) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", [*BAD, "nan", "batch_raises"])
def test_what_cannot_be_exported_is_one_line(infer_here, foreign, tmp_path, entry):
    command = ("--repo", foreign, "-m", entry, "--photos", CAT.parent, tmp_path / "x.onnx")
    assert_refused(infer_here(*command, script="export"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry", [*BAD, *BATCH, "nan"])
def test_what_does_not_work_does_not_pass_the_check(infer_here, foreign, entry, monkeypatch):
    import check

    monkeypatch.setattr(check, "CHECKS", [row for row in check.CHECKS if row[1] in (check.weights, check.batches)])
    result = infer_here("--repo", foreign, "-m", entry, "-d", "cpu", script="check")
    assert result.returncode == 3 and "Traceback" not in result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and all(line.isprintable() for line in lines)
    assert [line[0] for line in lines] == (["-", "✗"] if entry in [*BATCH, "nan"] else ["✗", "-"])


@pytest.mark.parametrize("entry", BATCH)
def test_a_model_for_one_image_only_is_told_of_at_the_first_batch(infer_here, foreign, entry, monkeypatch):
    command = ("--repo", foreign, "-m", entry, "-d", "cpu", "-f", "jsonl")
    result = infer_here(*command, CAT)
    assert result.returncode == 0 and json.loads(result.stdout)["results"][0]["label"] == "丙"
    one_by_one = infer_here(*command, *SAMPLES, "-b", "1")
    assert one_by_one.returncode == 0 and len(one_by_one.stdout.splitlines()) == 4
    pixels = [[[0] * 3] * 32] * 32
    engine = Recognizer(entry, repo=str(foreign), device="cpu").load()
    with pytest.raises(ModelError) as caught:
        engine.classify([torch.tensor(pixels, dtype=torch.uint8).numpy()] * 2, 2)
    assert "\n" not in str(caught.value)
    # However the threads cut the batches, there is one line or no batch of more than one.
    result = infer_here(*command, *SAMPLES * 5, "-j", "4")
    if result.returncode:
        assert_refused(result)


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
def test_not_a_number_is_never_an_answer(infer_here, foreign, tmp_path, cache):
    options = ("--cache", tmp_path / "c") if cache else ()
    for _ in range(2):
        result = infer_here("--repo", foreign, "-m", "nan", *SAMPLES, "-f", "jsonl", "-d", "cpu", *options)
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.returncode == 1 and len(lines) == 4 and all("NaN" in line["error"] for line in lines)


@pytest.mark.parametrize("entry", GOOD)
def test_odd_entry_points_work(infer_here, foreign, entry):
    result = infer_here("--repo", foreign, "-m", entry, *SAMPLES, "-f", "jsonl", "-d", "cpu", "-k", "1")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    wanted = 285 if entry == "none_spec" else 2
    assert [line["results"][0]["index"] for line in lines] == [wanted] * 4


def test_given_weights_are_used_where_an_entry_has_a_default_of_its_own(infer_here, foreign):
    command = ("--repo", foreign, "-m", "own_default", CAT, "-f", "jsonl", "-k", "1", "--weights", "others")
    assert json.loads(infer_here(*command).stdout)["results"][0]["index"] == 0


def test_a_graph_on_cuda_says_what_is_missing(infer_here, tiny_graph, monkeypatch):
    """ONNX Runtime itself goes on with the CPU, and says nothing."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    command = (*tiny_graph, SAMPLES[0], "-d", "cuda:0")
    result = infer_here(*command)
    assert result.returncode == 3 and result.stdout == "" and "pip install onnxruntime-gpu" in result.stderr
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxruntime's own, of a provider that is not there
        result = infer_here(*command)
    assert result.returncode == 3 and result.stdout == "" and "nvidia-smi" in result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_graph_on_cuda_answers_alike(infer_here, tiny_graph):
    if "CUDAExecutionProvider" not in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    rows = [json.loads(infer_here(*tiny_graph, SAMPLES[0], "-d", d, "-f", "jsonl").stdout) for d in ("cpu", "cuda")]
    for one, other in zip(*(row["results"] for row in rows), strict=True):
        assert one["label"] == other["label"] and abs(one["confidence"] - other["confidence"]) < 1e-3
