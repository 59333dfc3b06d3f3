"""Models from torch.hub repositories, this project's own or others', with all that decides their answers."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import itertools
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from infer import ModelError, Spec, UsageError, digest, explaining, one_line

from wwts import files
from wwts.files import read_labels
from wwts.memory import file_state
from wwts.torch_engine import REINSTALL, HubModel, check_logits, import_torch

# The classic ImageNet evaluation pipeline, for hub models that bring no spec of their own.
CLASSIC_SPEC = dict(
    resize=256, crop=224, interpolation="bilinear", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
)

_loading = threading.Lock()  # sys.path, sys.modules and sys.stdout belong to all threads
_repositories: set[Path] = set()  # others', that modules were imported from


def load_hub_model(
    name: str,
    repo: str | None = None,
    trust_repo: bool = False,
    weights: str | None = None,
    labels: str | None = None,
    offline: bool = False,
) -> HubModel:
    """Call the entry point ``name`` of a torch.hub repository with its trained weights.

    Raises what the entry point raises as ModelError, but for FileNotFoundError and ConnectionError of
    this project's own entry points, which mean that there are no weights to be had.
    """
    torch = import_torch()
    folder = files.HERE if repo is None else _find_folder(repo, trust_repo, offline)
    own, hubconf = folder == files.HERE, folder / "hubconf.py"
    if not hubconf.is_file():
        raise ModelError(f"{folder} 里没有 hubconf.py;请把它和 labels_zh.json 放在 infer.py 旁边,或用 -m 文件.onnx")
    states = {os.path.abspath(path): file_state(path) for path in (hubconf, labels) if path}
    replacement = None if labels is None else read_labels(labels)
    with _loading, _importing_from(folder), _explaining_failures(name, own):
        code = hashlib.sha256(hubconf.read_bytes())
        module = _call_entry_point(folder, name, weights, offline)
        given = getattr(module, "spec", None) or {}
        if not isinstance(module, torch.nn.Module) or not isinstance(given, Mapping):
            kinds = f"{type(module).__name__},spec 是 {type(given).__name__}"
            raise ModelError(f"模型 {name} 的入口应返回 torch.nn.Module,其 spec 应是字典,而返回的是 {kinds}")
        given = {**CLASSIC_SPEC, **given, "name": name}
        if own:
            parameters = given["sha256"]
        else:
            _repositories.add(folder)
            # Running it once imports what it imports late, and counts its classes.
            with torch.inference_mode():
                logits = module.eval().float()(torch.zeros(1, 3, given["crop"], given["crop"]))
            given.setdefault("num_classes", check_logits(logits, 1, given.get("num_classes")).shape[1])
            for file in (Path(file) for file, _ in _imported_from([folder])):
                if "site-packages" not in file.parts and file.is_file():
                    code.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
            parameters = _digest_tensors(module)
    if replacement is None and given.get("labels") is None and given["num_classes"] == 1000:
        replacement = read_labels(files.HERE / "labels_zh.json")  # most likely ImageNet's classes
    spec = Spec.parse(given, f"模型 {name}", replacement)
    read_from = {**given["files"], **states} if own else None
    return HubModel(module, spec, digest(parameters, code.hexdigest()), read_from, own, parameters)


def _find_folder(repo: str, trust_repo: bool, offline: bool) -> Path:
    """The folder of a local repository, or of torch.hub's copy of a remote one."""
    if os.path.isdir(repo):
        return Path(repo).resolve()
    match = re.fullmatch(r"([\w.-]+)/([\w.-]+)(?::([\w./-]+))?", repo)
    if not match:
        raise ModelError(f"找不到文件夹 {repo},它也不是 OWNER/NAME[:REF] 形式的仓库名")
    if not trust_repo:
        raise UsageError(f"{repo} 是远程仓库,运行其中的代码前请先确认可信,然后加上 --trust-repo")
    hub = import_torch().hub
    if not offline:
        remedy = "请另行取得它(git clone 或下载后解压),再用 --repo 指定那个文件夹"
        with explaining(f"无法从 GitHub 获取仓库 {repo}: {{}}。{remedy}"), contextlib.redirect_stdout(sys.stderr):
            hub.list(repo, trust_repo=True, verbose=False)  # fetches it, or finds it fetched
    owner, name, ref = match.groups()
    for branch in [ref.replace("/", "_")] if ref else ["main", "master"]:
        folder = Path(hub.get_dir(), f"{owner}_{name}_{branch}")
        if folder.is_dir():
            return folder.resolve()
    raise ModelError(f"本机没有仓库 {repo} 的副本,且处于离线模式")


def _imported_from(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """File and name of each module that was imported from one of the folders."""
    modules = [(getattr(module, "__file__", None), key) for key, module in list(sys.modules.items())]
    starts = tuple(os.path.join(folder, "") for folder in folders)
    return sorted((file, key) for file, key in modules if isinstance(file, str) and file.startswith(starts))


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let a repository import its own modules, and leave no trace in the search path; what it prints is no result."""
    for _, key in _imported_from(_repositories):  # "utils" of another, or of this one before it was edited
        del sys.modules[key]
    _repositories.clear()
    theirs = folder != files.HERE and ((folder / "infer.py").is_file() or (folder / "infer").is_dir())
    ours = sys.modules.pop("infer") if theirs else None
    search_path, pycache_prefix = sys.path[:], sys.pycache_prefix
    sys.path.insert(0, str(folder))
    # Python takes compiled code for current by size and time alone; the version is that of the source.
    sys.pycache_prefix = os.devnull
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path[:], sys.pycache_prefix = search_path, pycache_prefix
        if ours is not None:
            sys.modules["infer"] = ours


@contextlib.contextmanager
def _explaining_failures(name: str, own: bool) -> Iterator[None]:
    """Say in one line what a repository's code raised, which may be anything."""
    try:
        yield
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        if own and isinstance(error, (FileNotFoundError, ConnectionError)):
            raise
        message = f"模型 {name} 加载失败: {one_line(error)}"
        if isinstance(error, import_torch().OutOfMemoryError):
            message = f"模型 {name} 加载时显存不足(或内存不足)"
        elif "torchvision::" in str(error):
            message = f"torch 与 torchvision 版本不匹配({one_line(error)})。{REINSTALL}"
        elif isinstance(error, ModuleNotFoundError):
            message = f"模型 {name} 需要 {error.name},请运行: pip install {error.name}"
        raise ModelError(message) from error


def _call_entry_point(folder: Path, name: str, weights: str | None, offline: bool) -> Any:
    module_spec = importlib.util.spec_from_file_location("hubconf", folder / "hubconf.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    entries = [entry for entry in dir(module) if callable(getattr(module, entry)) and entry[0] != "_"]
    if name not in entries:
        nearest = difflib.get_close_matches(name, entries, 1)
        hint = f"。最接近的是 {nearest[0]}" if nearest else ""
        raise ModelError(f"没有名为 {name} 的模型。{folder} 提供: {', '.join(entries)}{hint}")
    entry = getattr(module, name)
    parameters = inspect.signature(entry).parameters
    arguments: dict[str, Any] = {"offline": True} if offline and "offline" in parameters else {}
    if weights and "weights" not in parameters:
        raise UsageError(f"模型 {name} 的入口不接受 --weights")
    # torchvision's conventions, new and old: left at None or False a network comes untrained.
    if weights or "weights" in parameters and parameters["weights"].default in (None, inspect.Parameter.empty):
        arguments["weights"] = weights or "DEFAULT"
    elif "weights" not in parameters and "pretrained" in parameters:
        arguments["pretrained"] = True
    return entry(**arguments)


def _digest_tensors(module: Any) -> str:
    """SHA-256 of all tensors of a network: parameters, buffers, and plain attributes."""
    torch, digests = import_torch(), hashlib.sha256()
    plain = (item for part in module.modules() for item in vars(part).items())
    tensors = itertools.chain(module.named_parameters(), module.named_buffers(), plain)
    for key, value in ((key, value) for key, value in tensors if isinstance(value, torch.Tensor)):
        digests.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        digests.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digests.hexdigest()
