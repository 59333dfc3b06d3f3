"""bench.py: every figure is there, and they fit together."""

import json
import time

import numpy as np
import pytest
from conftest import SAMPLES


@pytest.fixture
def bench(infer_here, fast_repository, monkeypatch):
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 5 * clock())  # each of the measurements takes a second of it
    return lambda *arguments: infer_here(
        "--repo", fast_repository, "-m", "fast", "-d", "cpu", *arguments, script="bench"
    )


def test_bench(bench):
    result = bench("-f", "jsonl", "--price-per-hour", "1.5")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(line["model"], line["device"]) for line in lines} == {("fast", "cpu")}
    (version,) = {line["version"] for line in lines}
    assert len(version) == 8 and int(version, 16) >= 0
    figures = {line["measurement"]: line["value"] for line in lines}
    assert all(value > 0 and np.isfinite(value) for value in figures.values())
    assert figures["单张延迟 p50"] <= figures["单张延迟 p95"]
    assert {f"模型计算,每批 {size} 张" for size in (1, 2, 4, 8, 16)} < figures.keys()
    assert {"冷启动到第一个答案", "内存峰值"} < figures.keys()
    (end_to_end,) = (value for name, value in figures.items() if name.startswith("端到端(解码、缩放、计算),受限于"))
    (slow,), (fast,) = (
        [value for name, value in figures.items() if name.startswith(f"1,200 万像素,解码和缩放{draft}")]
        for draft in (",", "(--draft)")
    )
    assert fast > slow  # three times, and more
    assert figures["每千张费用"] == pytest.approx(1.5 / 3.6 / end_to_end)


def test_the_table_is_for_people(bench):
    result = bench(*SAMPLES[:2])
    assert result.returncode == 0, result.stderr
    title, *rows = result.stdout.splitlines()
    assert title.startswith("fast(版本 ") and title.endswith("),cpu")
    assert all(row.split()[-1] in ("秒", "毫秒", "张/秒", "MiB") for row in rows) and len(rows) >= 10
    assert "每千张费用" not in result.stdout


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "free"])
def test_a_price_that_is_none(bench, price):
    result = bench("--price-per-hour", price)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1


def test_a_model_that_does_not_start_is_one_line(bench):
    result = bench("-m", "no_such_model")
    assert result.returncode == 3 and result.stdout == "" and "fast" in result.stderr.splitlines()[-1]
