"""labels_zh.json and --labels files."""

import json
import re

import infer

import pytest
from conftest import ROOT

from wwts import files

# Names that Chinese speakers write with Latin letters.
WITH_LATIN_LETTERS = {"CD播放器", "iPod", "T恤", "福特T型车"}


def labels():
    return json.loads((ROOT / "labels_zh.json").read_text(encoding="utf-8"))


def test_a_thousand_different_chinese_names():
    names = labels()
    assert len(names) == len(set(names)) == 1000
    odd = {name for name in names if not re.fullmatch(r"[\u4e00-\u9fff]+", name)}
    assert odd == WITH_LATIN_LETTERS
    assert max(map(len, names)) <= 10


def test_every_name_can_be_written_where_text_is_gbk():
    """A console, a spreadsheet or an old program in China."""
    assert [name.encode("gbk").decode("gbk") for name in labels()] == labels()


@pytest.mark.parametrize(
    ("index", "name"),
    [(134, "鹤"), (517, "起重机"), (101, "长牙象"), (412, "垃圾桶"), (443, "围嘴"), (610, "T恤"), (718, "桥墩")]
    + [(744, "火箭"), (876, "浴盆"), (926, "火锅"), (968, "茶杯"), (984, "油菜花"), (271, "红狼"), (666, "研钵")]
    + [
        (667, "学士帽"),
        (665, "轻便摩托车"),
        (93, "犀鸟"),
        (96, "巨嘴鸟"),
        (699, "排箫"),
        (340, "斑马"),
        (999, "卫生纸"),
    ]
    + [(11, "红额金翅雀"), (282, "条纹猫"), (428, "独轮手推车"), (864, "清障车"), (911, "羊毛织品"), (932, "碱水结")],
)
def test_names_say_what_the_photos_show(index, name):
    assert labels()[index] == name


def write(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", '["猫", "狗", "鹤 鸟"]'),
        ("object.json", '{"1": "狗", "0": "猫", "2": "鹤 鸟"}'),
        ("names.txt", "猫\n狗\n鹤 鸟\n"),
        ("no_newline.txt", "猫\n狗\n鹤 鸟"),
        ("windows.txt", "\ufeff猫\r\n狗\r\n鹤 鸟\r\n"),
        ("meta_info.txt", "0\t猫\tx\n1\t狗\ty\n2\t鹤 鸟\tz\n"),
    ],
)
def test_every_kind_of_labels_file(tmp_path, name, text):
    assert files.read_labels(write(tmp_path, name, text)) == ["猫", "狗", "鹤 鸟"]


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("", "utf-8", "应是一组名称"),
        ("[]", "utf-8", "应是一组名称"),
        ('["猫", 3]', "utf-8", "应是一组名称"),
        ('{"0": "猫", "2": "狗"}', "utf-8", "缺少序号 '1'"),
        ('["猫", ', "utf-8", "无法读取"),
        ("猫\n狗\n", "gbk", "无法读取"),
    ],
)
def test_a_bad_labels_file_is_one_clear_error(tmp_path, text, encoding, message):
    with pytest.raises(infer.ModelError, match=message):
        files.read_labels(write(tmp_path, "labels", text, encoding))
    with pytest.raises(infer.ModelError, match="无法读取"):
        files.read_labels(tmp_path / "missing")
