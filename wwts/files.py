"""Small files: read with care, taken back from table cells, and replaced in one step."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infer import MOST_TEXT, ModelError, explaining

HERE = Path(__file__).resolve().parent.parent  # where hubconf.py and labels_zh.json are


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file; raises OSError, or ValueError if it is no text or longer than 64 MiB."""
    with open(path, "rb") as file:
        data = file.read(MOST_TEXT + 1)
    if len(data) > MOST_TEXT:
        raise ValueError(f"超过 {MOST_TEXT >> 20} MiB")
    return data.decode("utf-8-sig")


def read_labels(path: str | os.PathLike) -> list[str]:
    """Read labels: a JSON list, a JSON object of index → name, a text of a name a line, or a meta_info.txt.

    Raises ModelError when the file cannot be read or its shape is none of these.
    """
    with explaining(f"标签文件 {path} 无法读取: {{}}。应是 UTF-8 编码的文本", (OSError, ValueError, RecursionError)):
        text = read_text(path).strip("\r\n")
        is_json = re.match(r'[\[{]\s*["\[\]{}]|\[\s*[\d-]|\[NaN', text)  # and not a name such as [PAD]
        labels = json.loads(text) if is_json else text.split("\n")
    if isinstance(labels, dict):
        with explaining(f"标签文件 {path} 缺少序号 {{}}", KeyError):
            labels = [labels[str(index)] for index in range(len(labels))]
    elif not is_json:
        table = all("\t" in line for line in labels)  # meta_info.txt: the label is column 1
        labels = [(line.split("\t")[1] if table else line).strip() for line in labels]
    if not all(isinstance(label, str) for label in labels) or not any(labels):
        raise ModelError(f"标签文件 {path} 应是一组名称(JSON 列表、JSON 对象、每行一个名称的文本或 meta_info.txt)")
    return labels


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write a file or folder at; when all went well, it replaces ``path`` in one step.

    Raises ModelError, and leaves nothing behind, where it cannot be written.
    """
    path, folder = Path(path), ""
    try:
        with explaining(f"{path} 写不进去: {{}}。请腾出空间、检查权限,或换一个地方", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(prefix=f".{path.name[:50]}.", suffix=".partial", dir=path.parent)
            yield Path(folder, path.name)
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(Path(folder, path.name), path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unescape_cell(cell: str) -> str:
    """The text that ``escape_cell`` was given; raises UnicodeDecodeError for what it never gives."""
    escape = r"\\(?:\\|[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"
    text = cell.removeprefix("'")
    return re.sub(escape, lambda m: m[0].encode().decode("unicode_escape"), text) if os.sep == "/" else text
