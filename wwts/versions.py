"""What is installed."""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import PackageNotFoundError, version

import infer


def package_versions() -> dict[str, str]:
    """Versions of this program, of Python and of those packages of requirements.txt that are installed."""
    versions = {"infer.py": infer.__version__, "Python": sys.version.split()[0]}
    for package in ("torch", "torchvision", "pillow", "numpy", "onnxruntime", "modelscope-hub", "tqdm"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
