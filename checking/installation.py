"""Checks of the machine and of what is installed, for the Recognizer of a context; they raise ModelError."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from typing import Any

import infer
from infer import ModelError

from wwts import files, torch_engine
from wwts.versions import package_versions


def versions(context: Any) -> str:
    """Python and the packages; each at least what requirements.txt asks for, and torchvision fits torch."""
    found, needs_torch = package_versions(), not context.recognizer.model_is_file
    requirements = files.HERE / "requirements.txt"
    lines = requirements.read_text().splitlines() if requirements.is_file() else []
    for name, least in (line.split(">=") for line in lines if ">=" in line):
        has, wants = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (found.get(name, ""), least))
        if has < wants and (needs_torch or not name.startswith("torch")):
            state = f"{name} {found[name]} 太旧" if has else f"缺少 {name}"
            raise ModelError(f"{state},请运行: pip install '{name}>={least}'")
    if needs_torch:
        torch_engine.import_torch()
        with infer.explaining(f"torchvision 无法导入({{}})。{torch_engine.REINSTALL}"):
            import torchvision  # noqa: F401
    return ",".join(f"{name} {version}" for name, version in found.items())


def device(context: Any) -> str:
    """The device computes; its memory, driver and CUDA."""
    name, cores, recognizer = "cpu", os.cpu_count(), context.recognizer
    if not recognizer.model_is_file:
        torch = torch_engine.import_torch()
        chosen = torch_engine.choose_device(recognizer.device)
        if chosen.type == "cuda":
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(chosen))
            title = f"{chosen} {torch.cuda.get_device_name(chosen)},显存 {total:.1f} GiB(空闲 {free:.1f})"
            return f"{title},CUDA {torch.version.cuda},驱动 {driver_version() or '未知'}"
        if recognizer.device == "auto" and infer.has_nvidia_gpu():
            raise ModelError(f"有 NVIDIA 显卡,但 torch {torch.__version__} 用不了它。{torch_engine.REINSTALL}")
        name = str(chosen)
    memory = ""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        memory = f",内存 {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    return f"{name} {platform.machine()},{cores} 核{memory}"


def driver_version() -> str:
    """Of the NVIDIA driver; empty where it does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.partition("\n")[0]
    return ""
