"""A night's run: folders, standard input, output files that are resumed, interruptions, several processes."""

import csv
import fcntl
import itertools
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import infer as infer_module

import pytest
import torch
from conftest import ROOT, SAMPLES
from PIL import Image

from wwts import unattended

LITE = ("-m", "wwts_cn_lite")


def records(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def summary(result):
    return next(line for line in result.stderr.splitlines() if "完成:" in line)


# ---------------------------------------------------------------- inputs


def find(*inputs):
    return list(infer_module.find_images([str(name) for name in inputs]))


@pytest.fixture
def tree(tmp_path):
    names = [
        "b.jpg",
        "a/x.PNG",
        "a/y.txt",
        "a.b/z.jpeg",
        "a-b.webp",
        ".hidden.jpg",
        ".git/c.jpg",
        "图 片/d.bmp",
        "A.tif",
    ]
    for name in names:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "tree"


def test_folders_are_recursive_and_sorted_by_path(tree):
    found = find(tree)
    expected = ["b.jpg", "a/x.PNG", "a.b/z.jpeg", "a-b.webp", "图 片/d.bmp", "A.tif"]
    assert found == sorted(str(tree / name) for name in expected)


def test_symlinks(tree, tmp_path):
    (tree / "a" / "loop").symlink_to(tree)
    (tree / "self.jpg").symlink_to(tree / "self.jpg")
    other = tmp_path / "other"
    other.mkdir()
    (other / "e.jpg").touch()
    (tree / "link").symlink_to(other)
    found = find(tree)
    assert str(tree / "link" / "e.jpg") in found and str(tree / "self.jpg") in found
    assert len(found) == 8 and not any("loop" in path for path in found)


def test_globs_that_the_shell_did_not_expand(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert find("*.jpg") == ["b.jpg"]
    assert find("**/*.PNG", "a*") == ["a/x.PNG", "a-b.webp", "a.b/z.jpeg"]
    (tree / "[1].jpg").touch()
    assert find("[1].jpg") == ["[1].jpg"]


def test_a_file_named_twice_is_done_once(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert find("b.jpg", "./b.jpg", tree / "b.jpg", "*.jpg", "b.jpg") == ["b.jpg"]
    assert len(find(tree, tree / "b.jpg", tree)) == 6


def test_nothing_found_is_wrong_usage(infer, tmp_path):
    (tmp_path / "notes.txt").touch()
    for arguments, text in ((tmp_path, str(tmp_path)), ("*.nothing", "*.nothing"), ("-", "标准输入")):
        result = infer(*LITE, arguments, stdin=subprocess.DEVNULL)
        assert result.returncode == 2 and result.stdout == ""
        assert "没有找到图片" in result.stderr and f"{text} 里没有图片" in result.stderr


def test_a_folder_that_cannot_be_listed_is_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert find(tmp_path) == [str(tmp_path)]
    assert "是文件夹" in infer_module.Recognizer("wwts_cn_lite", device="cpu")(tmp_path).error


def test_paths_on_standard_input_are_answered_as_they_come(tiny_graph, photos):
    command = [sys.executable, "infer.py", *tiny_graph, "-", "-f", "jsonl", "-q"]
    paths = [os.fsencode(path) for path in find(photos)[:5]]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for path in paths:  # each is answered before the next is asked
            process.stdin.write(path + b"\r\n" if path == paths[2] else path + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["path"] == os.fsdecode(path)
        process.stdin.write(b"\n" + paths[0])  # named before, and without a newline at the end
        process.stdin.close()
        assert process.stdout.read() == b"" and process.wait() == 0


# ---------------------------------------------------------------- output files


@pytest.fixture
def night(infer, infer_here, fast_repository, photos):
    """Run the fast model over the 300 photos into a file; more arguments and inputs as given."""

    def run(output, *arguments, inputs=(photos,), model="fast", **options):
        command = [*inputs, "--repo", fast_repository, "-m", model, "-o", output, *arguments]
        return infer(*command, **options) if options else infer_here(*command)

    return run


def test_output_files(night, photos, tmp_path):
    jsonl, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    result = night(jsonl)
    assert result.returncode == 0 and result.stdout == ""
    assert summary(result).startswith("[INFO] 完成: 识别 300 张,失败 0 张,缓存命中 0 张")
    seconds = [float(text) for text in re.findall(r"(\d+\.\d) 秒", summary(result))]
    assert len(seconds) == 4 and seconds[2] > 0  # decoding, resizing, network, writing
    assert [record["path"] for record in records(jsonl)] == find(photos)
    assert night(table).returncode == 0
    assert table.read_bytes().startswith(b"\xef\xbb\xbfpath,model,version,label_1")
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, records(jsonl), strict=True):
        assert (row["path"], row["label_5"]) == (record["path"], record["results"][4]["label"])
        assert float(row["confidence_1"]) == record["results"][0]["confidence"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_existing_file_is_never_silently_replaced(night, tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    path.write_text("precious")
    result = night(path)
    assert result.returncode == 2 and "--resume" in result.stderr and "--overwrite" in result.stderr
    assert path.read_text() == "precious"
    result = night(path, "--resume")
    assert result.returncode == 2 and "不能续写" in result.stderr and path.read_text() == "precious"
    path.write_text("precious\nmore\n")
    result = night(path, "--resume")
    assert result.returncode == 2 and "不能续写" in result.stderr and path.read_text() == "precious\nmore\n"
    assert night(path, "--overwrite", model="no such model").returncode == 3
    assert path.read_text() == "precious\nmore\n"  # kept until there is a model to replace it
    assert night(path, "--overwrite").returncode == 0 and len(path.read_bytes().splitlines()) >= 300
    path.write_text("")
    assert night(path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "x.txt"), ".jsonl 或 .csv"),
        (("-o", "x.csv", "-f", "jsonl"), "不要再用 -f"),
        (("--resume",), "要与 -o 一起用"),
        (("-o", "nowhere/x.csv"), "不存在"),
        (("--cache", "samples/cat.jpg"), "写在图片后面"),
    ],
)
def test_wrong_use_of_output_options(infer, arguments, message):
    result = infer(*LITE, SAMPLES[0], *arguments)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_resume_after_any_tear_gives_the_uninterrupted_file(night, tmp_path, suffix):
    """Cut at the start, within and at the end of records, between CR and LF, and with the zeros of a power cut."""
    path = tmp_path / f"whole{suffix}"
    night(path)
    whole = path.read_bytes()
    newline = whole.index(b"\n", len(whole) // 2)
    cuts = [0, 1, 5, 60, newline - 3, newline, newline + 1, newline + 2, len(whole) - 1, len(whole)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        result = night(path, "--resume")
        assert result.returncode == 0, result.stderr
        assert path.read_bytes() == whole, cut
    path.write_bytes(whole[: newline + 1] + b"\0" * 700)
    assert night(path, "--resume").returncode == 0 and path.read_bytes() == whole


def test_resume_gives_the_same_records_with_a_real_network(infer_here, tmp_path):
    """Kernels are chosen by batch size, and a resumed run cuts its batches elsewhere: the last decimal may differ."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, sample in enumerate(SAMPLES):
        with Image.open(sample) as image:
            for turn in range(3):
                image.transpose(Image.Transpose(turn)).convert("RGB").resize((300, 280)).save(
                    folder / f"{number}{turn}.jpg"
                )
    (folder / "07.jpg").write_text("broken")
    command = (folder, *LITE, "--engine", "torch", "-b", "4", "-o", tmp_path / "whole.jsonl")
    assert infer_here(*command).returncode == 1
    whole = (tmp_path / "whole.jsonl").read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 13
    for cut in (0, ends[0], ends[2] + 30, ends[7], ends[11], ends[12] - 1):  # the last three leave 5, 1 and 1 images
        (tmp_path / "whole.jsonl").write_bytes(whole[:cut])
        assert infer_here(*command, "--resume").returncode == 1
        for ours, theirs in zip(records(tmp_path / "whole.jsonl"), map(json.loads, whole.splitlines()), strict=True):
            a, b = ([(p.pop("confidence"), p) for p in record.pop("results", [])] for record in (ours, theirs))
            assert ours == theirs and [p for _, p in a] == [p for _, p in b], cut
            assert [value for value, _ in a] == pytest.approx([value for value, _ in b], abs=2e-6)


def test_a_foreign_file_is_not_taken_for_a_torn_one(night, tmp_path):
    path = tmp_path / "foreign.jsonl"
    for content in (b'{"path": "a.jpg"}\n', b'{"path": "' + b"[" * 100_000 + b"\n", b'{"path": "a\0b"}\n' * 2, b"[]\n"):
        path.write_bytes(content)
        result = night(path, "--resume")
        assert result.returncode == 2 and "不能续写" in result.stderr and path.read_bytes() == content


def test_resume_refuses_a_file_of_another_model_or_top_k(night, infer, photos, tmp_path):
    for suffix in (".jsonl", ".csv"):
        path = tmp_path / f"out{suffix}"
        night(path)
        whole = path.read_bytes()
        torn = whole[: whole.index(b"\n", 9000) + 1]
        path.write_bytes(torn)
        for arguments, options in ((("-k", "3"), {}), (("-k", "6"), {}), ((), {"model": "slow"})):
            before = path.read_bytes()
            result = night(path, "--resume", *arguments, **options)
            assert result.returncode == 2, result.stderr
            assert "续写" in result.stderr and path.read_bytes() == before
    path = tmp_path / "out.jsonl"
    night(path, "--overwrite", "-k", "10")  # more than the model has: all eight
    path.write_bytes(path.read_bytes()[:5000])
    assert night(path, "--resume", "-k", "10").returncode == 0


def test_resume_keeps_failures_and_the_exit_status(night, photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    path = tmp_path / "out.csv"
    assert night(path, inputs=[photos, broken]).returncode == 1
    whole = path.read_bytes()
    result = night(path, "--resume", inputs=[photos, broken])
    assert result.returncode == 1 and path.read_bytes() == whole and "已有记录 301 张" in summary(result)


def test_a_finished_run_costs_nothing_to_repeat(infer_here, tmp_path):
    """Neither loading a model of our own, whose version is remembered, nor writing."""
    command = (*SAMPLES, *LITE, "-d", "cpu", "-o", tmp_path / "out.csv")
    assert infer_here(*command).returncode == 0
    whole = (tmp_path / "out.csv").read_bytes()
    result = infer_here(*command, "--resume")
    assert result.returncode == 0 and (tmp_path / "out.csv").read_bytes() == whole
    assert "加载模型" not in result.stderr and "识别 0 张" in summary(result) and "已有记录 4 张" in summary(result)


def test_odd_names_survive_a_resume(night, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"a,b.png", b'q"uo.png', b"new\nline.png", b"latin\xe9.png", b"=1+1.png", b"\\udce9.png"):
        Image.new("RGB", (8, 8)).save(os.fsencode(str(folder)) + b"/" + name, format="PNG")
    for suffix in (".jsonl", ".csv"):
        path = tmp_path / f"odd{suffix}"
        assert night(path, inputs=[folder]).returncode == 0
        whole = path.read_bytes()
        whole.decode("utf-8")
        result = night(path, "--resume", inputs=[folder])
        assert result.returncode == 0 and path.read_bytes() == whole and "识别 0 张" in summary(result)


def test_killed_at_random_moments(infer_here, tiny_graph, photos, tmp_path):
    path = tmp_path / "whole.jsonl"
    assert infer_here(photos, *tiny_graph, "-o", path, "-b", "4").returncode == 0
    whole = path.read_bytes()
    command = [sys.executable, str(ROOT / "infer.py"), str(photos), *tiny_graph, "--resume", "-b", "4", "-o"]
    dice = random.Random(1)
    target = tmp_path / "killed.jsonl"
    kills = 0
    while kills < 20:
        if target.exists() and target.read_bytes() == whole:
            target.unlink()
        size = target.stat().st_size if target.exists() else 0
        with subprocess.Popen([*command, str(target)], stderr=subprocess.DEVNULL) as process:
            # Wait until it writes, so that the kill falls into the work and not into importing torch.
            while process.poll() is None and (target.stat().st_size if target.exists() else 0) <= size:
                time.sleep(0.001)
            time.sleep(dice.random() * 0.03)
            kills += process.poll() is None
            process.kill()
        assert process.returncode in (0, -signal.SIGKILL)
        lines = target.read_bytes().splitlines(keepends=True)
        assert whole.startswith(b"".join(lines[:-1]))
    result = infer_here(photos, *tiny_graph, "-o", target, "--resume", "-b", "4")
    assert result.returncode == 0 and target.read_bytes() == whole


def test_interrupted_while_waiting_for_a_path(tiny_graph, photos):
    command = [sys.executable, "infer.py", *tiny_graph, "-", "-f", "jsonl"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdin.write(os.fsencode(find(photos)[0]) + b"\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read().decode().splitlines()[-1].startswith("[WARN] 已中断")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(night, fast_repository, photos, tmp_path, number, status):
    path = tmp_path / "out.jsonl"
    command = [sys.executable, str(ROOT / "infer.py"), str(photos), "--repo", str(fast_repository), "-m", "slow"]
    process = subprocess.Popen([*command, "-o", str(path)], stderr=subprocess.PIPE, encoding="utf-8")
    while not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status and "Traceback" not in errors
    assert "--resume" in errors.splitlines()[-1]
    written = records(path)
    assert 0 < len(written) < 300
    result = night(path, "--resume", model="slow")
    assert result.returncode == 0 and [record["path"] for record in records(path)] == find(photos)


def test_a_full_disk(night, photos, tmp_path):
    """A file size limit stands in for a disk that fills up: the record that did not fit is taken back whole."""
    path = tmp_path / "out.jsonl"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = night(path, preexec_fn=limit, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert result.returncode == 3 and "Traceback" not in result.stderr
    assert "写不进去" in result.stderr.splitlines()[-1] and "--resume" in result.stderr.splitlines()[-1]
    whole = path.read_bytes()
    assert 19_000 < len(whole) <= 20_000 and whole.endswith(b"}\n")
    assert night(path, "--resume").returncode == 0 and len(records(path)) == 300


def test_a_full_standard_output(tiny_graph, photos):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "infer.py", str(photos), *tiny_graph, "-f", "csv"]
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, encoding="utf-8")
    assert result.returncode == 3 and "写不进去" in result.stderr
    assert (
        "Traceback" not in result.stderr
        and "Exception ignored" not in result.stderr
        and "--resume" not in result.stderr
    )


def test_two_thousand_inputs_with_every_twentieth_broken(night, photos, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    sources = [Path(path) for path in find(photos)]
    jpeg, png = SAMPLES[0].read_bytes(), sources[0].read_bytes()
    breakages = [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(jpeg[: len(jpeg) // 3]),
        lambda path: path.write_bytes(b"GIF89a" + bytes(20)),
        lambda path: path.write_bytes(png[:40] + bytes(100)),
        lambda path: path.write_text("<html>404</html>"),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to(folder / "nowhere"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_bytes(b"BM" + b"\xff" * 60),
        lambda path: path.write_bytes(png.replace(b"IHDR", b"IHDX")),
    ]
    for number in range(2000):
        path = folder / f"{number:05d}.png"
        if number % 20 == 7:
            breakages[number // 20 % len(breakages)](path)
        else:
            shutil.copy(sources[number % 300], path)
    out = tmp_path / "out.jsonl"
    result = night(out, inputs=[folder])
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "识别 2000 张,失败 100 张" in summary(result)
    written = records(out)
    assert [record["path"] for record in written] == [str(folder / f"{number:05d}.png") for number in range(2000)]
    assert [number for number, record in enumerate(written) if "error" in record] == list(range(7, 2000, 20))
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    assert night(out, "--resume", inputs=[folder]).returncode == 1 and out.read_bytes() == whole


def test_out_of_memory_halves_the_batch_and_goes_on(night, photos, tmp_path):
    fits, cramped = tmp_path / "fits.jsonl", tmp_path / "cramped.jsonl"
    night(fits)
    result = night(cramped, "-b", "16", model="cramped")
    assert result.returncode == 0
    warnings = [line for line in result.stderr.splitlines() if "[WARN]" in line]
    sizes = [int(line.removeprefix("[WARN] 显存不足,批大小减为 ")) for line in warnings]
    # From the first batch that is too large, which need not be full, down to the most that fits, or less.
    assert sizes and sizes[0] <= 8 and 2 <= sizes[-1] <= 3
    assert all(smaller == larger // 2 for larger, smaller in itertools.pairwise(sizes))
    assert [r["results"][0]["label"] for r in records(cramped)] == [r["results"][0]["label"] for r in records(fits)]


def test_progress_shows_on_a_terminal_and_nowhere_else(tiny_graph, photos, tmp_path):
    command = [sys.executable, "infer.py", str(photos), *tiny_graph, "-o"]
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([*command, str(tmp_path / "a.csv")], cwd=ROOT, stderr=secondary)
    os.close(secondary)
    shown = b""
    try:
        while chunk := os.read(primary, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    text = shown.decode("utf-8", "replace")
    assert "300/300" in text and "失败 0" in text and "[INFO] 完成: 识别 300 张" in text
    result = subprocess.run([*command, str(tmp_path / "b.csv")], cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8")
    assert result.stderr.count("\n") == 2 and "\r" not in result.stderr


# ---------------------------------------------------------------- several processes


def test_torchrun_shares_the_inputs(infer, infer_here, tiny_graph, photos, tmp_path):
    alone = tmp_path / "alone.jsonl"
    assert infer_here(photos, *tiny_graph, "-o", alone).returncode == 0

    def shares():
        return [records(tmp_path / f"shared.rank{rank}.jsonl") for rank in range(2)]

    arguments = (photos, *tiny_graph, "-d", "cpu", "-o", tmp_path / "shared.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "infer.py", *arguments]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", env=env, timeout=120)
    assert result.returncode == 0, result.stderr
    whole = shares()
    assert min(map(len, whole)) > 100
    together = sorted(whole[0] + whole[1], key=lambda record: record["path"])
    assert together == sorted(records(alone), key=lambda record: record["path"])
    torn = tmp_path / "shared.rank1.jsonl"
    torn.write_bytes(torn.read_bytes()[:7000])
    for rank in ("0", "1"):  # what torchrun says to its processes
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        assert infer(*arguments, "--resume", env=env).returncode == 0
    assert shares() == whole


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_each_process_uses_its_own_gpu(infer, photos, tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "0"}
    result = infer(*LITE, photos, "-o", tmp_path / "a.jsonl", env=env)
    assert result.returncode == 0 and "使用设备: cuda:0" in result.stderr


# ---------------------------------------------------------------- two runs at once, and failures that are mended


def test_two_runs_do_not_write_one_file(infer, tiny_graph, photos, tmp_path):
    path = tmp_path / "out.csv"
    command = [sys.executable, "infer.py", *tiny_graph, "-", "-o", str(path)]
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as first:
        first.stdin.write(os.fsencode(find(photos)[0]) + b"\n")
        first.stdin.flush()
        while not path.exists() or not path.stat().st_size:
            assert first.poll() is None
            time.sleep(0.02)
        for option in ("--resume", "--overwrite", "--retry-failed"):
            second = infer(*tiny_graph, photos, "-o", path, option)
            assert second.returncode == 2 and "另一个进程" in second.stderr and str(first.pid) in second.stderr
        first.kill()
        first.wait()
    # The lock goes with its owner.
    assert infer(*tiny_graph, photos, "-o", path, "--resume").returncode == 0
    assert len(path.read_bytes().splitlines()) == 301


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_failures_are_done_again_in_their_places(night, tmp_path, suffix):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (9, 9), (50 * number, 0, 0)).save(folder / f"{number}.png")
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[:40])  # half uploaded
    path, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    assert night(path, inputs=[folder]).returncode == 1
    (folder / "2.png").write_bytes(content)
    (folder / "9.png").write_bytes(content)
    assert night(path, "--resume", inputs=[folder]).returncode == 1  # it is not looked at again
    assert night(path, "--retry-failed", inputs=[folder]).returncode == 0
    assert night(whole, inputs=[folder]).returncode == 0
    assert path.read_bytes() == whole.read_bytes()
    assert night(path, "--resume", inputs=[folder]).returncode == 0


def test_spellings_of_a_path_are_one_photo(infer, tiny_graph, photos, tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    name = photos.name
    for spelling in (name, f"./{name}", str(photos), f"{name}/**"):
        result = infer(*tiny_graph, spelling, "-o", path, "--resume", cwd=photos.parent)
        assert result.returncode == 0 and len(path.read_bytes().splitlines()) == 301


def test_names_that_a_table_escapes_alike_are_different_photos(night, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ("a\n.png", r"a\n.png", "b\\.png", "\udcff.png", r"\udcff.png"):
        Image.new("RGB", (8, 8)).save(os.fsencode(f"{folder}/{name}"), format="PNG")
    path = tmp_path / "out.csv"
    for _ in range(2):
        result = night(path, "--resume", inputs=[folder])
        assert result.returncode == 0 and len(path.read_bytes().splitlines()) == 6


def test_shares_with_failures_and_of_other_numbers_of_processes(infer, tiny_graph, photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    arguments = (photos, broken, *tiny_graph, "-d", "cpu", "-o", tmp_path / "out.jsonl", "--resume")
    for world_size in (2, 3):  # of which the second adds nothing
        for rank in range(world_size):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            result = infer(*arguments, env=env)
            assert result.returncode == 0, result.stderr  # or torchrun would end the others
    paths = [record["path"] for share in tmp_path.glob("out.rank*.jsonl") for record in records(share)]
    assert sorted(paths) == sorted([*find(photos), str(broken)])
    env = {"RANK": "0", "WORLD_SIZE": "1"}
    result = infer(*arguments[:-1], "--overwrite", env=env | {"WORLD_SIZE": "2"})
    assert result.returncode == 0 and not (tmp_path / "out.rank2.jsonl").exists()


def test_heic_photos_are_counted_and_told_how_to_read(infer, tiny_graph, tmp_path):
    (tmp_path / "pillow_heif.py").write_text("raise ImportError('not installed')")
    heic = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(50)
    for name in ("1.heic", "2.HEIC", "3.jpg"):
        (tmp_path / name).write_bytes(heic)
    result = infer(*tiny_graph, tmp_path, "-f", "jsonl", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1 and result.stderr.count("pip install pillow-heif") == 2
    assert "跳过了 2 个 .heic 文件" in result.stderr and "pillow-heif" in json.loads(result.stdout)["error"]


def test_heic_photos_are_read_where_the_package_is_installed(infer, tiny_graph, tmp_path):
    """Found in a folder by their name, and read by their content under any other."""
    pillow_heif = pytest.importorskip("pillow_heif")
    with Image.open(SAMPLES[0]) as image:
        pillow_heif.from_pillow(image).save(tmp_path / "1.heic", quality=90)
    shutil.copy(tmp_path / "1.heic", tmp_path / "2.jpg")
    result = infer(*tiny_graph, tmp_path, "-f", "jsonl")
    assert result.returncode == 0 and "跳过" not in result.stderr, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["results"] == second["results"] and first["path"].endswith("1.heic")


def test_a_second_run_is_told_where_nobody_says_who_the_first_is(tmp_path, monkeypatch):
    """There is no /proc on other systems than Linux."""
    first, second = (
        unattended.OutputFile(tmp_path / "out.jsonl", infer_module.make_form("jsonl", 5, True), unattended.Share())
        for _ in range(2)
    )
    first.lock()
    with monkeypatch.context() as patch, pytest.raises(infer_module.UsageError, match="正由另一个进程写入"):
        patch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
        second.lock()
    first.close()
