"""Networks run by torch."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from infer import DeviceMemoryError, ModelError, Spec, compute_version, explaining

import numpy

if TYPE_CHECKING:
    import torch

REINSTALL = "请运行: pip install --force-reinstall torch torchvision"


class HubModel(NamedTuple):
    """A network (eval mode, float32, on the CPU) with what is known of it.

    ``weights`` is a digest of all that decides its answers besides the spec: parameters and code;
    ``parameters`` is one of the former alone. ``files`` are the states of the files that both were read from,
    None where they are not known. ``own`` tells the networks of this project, whose batch norms may be folded
    into convolutions.
    """

    module: torch.nn.Module
    spec: Spec
    weights: str
    files: dict[str, Any] | None
    own: bool
    parameters: str = ""


def import_torch() -> Any:
    """Import torch, for this module too, or raise ModelError with the pip line that mends the installation."""
    global torch
    # GNU OpenMP's threads wait for each other by spinning, which takes the cores from decoding and whatever else
    # runs: beside one busy process 200 photos took 24 s instead of 17. Without spinning one image takes twice as long.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with explaining(f"torch 无法导入: {{}}。{REINSTALL}"):
        advice = "请运行: pip install torch torchvision。导出的 .onnx 文件不需要它: -m 文件.onnx"
        with explaining(f"缺少 torch 或它的一部分({{}})。{advice}", ModuleNotFoundError):
            import torch
    return torch


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda, cuda:N or mps into a device that works here, or raise ModelError."""
    torch = import_torch()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with explaining(f"不能使用 {name}: {{}};或改用 -d cpu"):  # none there, too old a driver, in use
        if name.startswith("cuda") and not torch.cuda.is_available():
            cause = "没有可用的 NVIDIA 显卡或驱动,请用 nvidia-smi 检查"
            raise RuntimeError(cause if torch.version.cuda else f"装的是不带 CUDA 的 torch,{REINSTALL}")
        torch.zeros(1, device=name)
    return torch.device(name)


def check_logits(logits: Any, images: int, classes: int | None = None) -> torch.Tensor:
    """What a network returned, if that is N×classes floating-point numbers; raises ModelError if it is not."""
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if len(shape) != 2 or shape[0] != images or classes not in (None, shape[1]) or not logits.is_floating_point():
        raise ModelError(f"模型的输出是 {shape},而不是 {images}×{classes or '类别数'} 的张量,它不是图像分类模型")
    return logits


class TorchEngine:
    """A hub model on one device.

    Attributes: ``model`` (the network), ``spec``, ``version``, ``files`` (see HubModel), ``device``, ``dtype``, and
    ``device_name`` for people.
    """

    def __init__(self, model: HubModel, device: str, dtype: str):
        self.spec, self.files, self.device = model.spec, model.files, choose_device(device)
        self.device_name = str(self.device)
        self.precision = ("float16" if self.device.type == "cuda" else "float32") if dtype == "auto" else dtype
        self.dtype = getattr(torch, self.precision)
        self.version = compute_version(model.weights, model.spec, self.precision)
        self._lock, self._own = threading.Lock(), model.own
        # Without statistics of its own a batch norm takes those of the batch: company would decide the answers.
        norms = [part for part in model.module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
        self._apart = any(norm.running_mean is None for norm in norms)
        with self._one_line_errors():
            self.model = (model.module.fuse() if model.own else model.module.eval()).to(self.device, self.dtype)
            # Pixels come as N×H×W×3 anyway, and convolutions are up to twice as fast so.
            for parameter in self.model.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (self.spec.mean, self.spec.std)
        )

    def normalize(self, batch: numpy.ndarray) -> torch.Tensor:
        """Turn N×H×W×3 uint8 into N×3×H×W float32 on the device: torchvision's ToTensor and Normalize."""
        pixels = torch.from_numpy(batch)
        if self.device.type == "cuda":  # only pinned memory is copied while the host goes on
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        pixels = pixels.to(self.device).permute(0, 3, 1, 2)
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)

    def classify(self, batch: list[numpy.ndarray], topk: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """As OnnxEngine.classify; raises ModelError for whatever the network raises."""
        # TF32 would cost float32 its promise that CPU and CUDA agree within 1e-3; the switch is for all threads.
        with self._lock, self._one_line_errors(), torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            inputs = self.normalize(numpy.stack(batch)).to(self.dtype)
            with contextlib.nullcontext() if self._own else contextlib.redirect_stdout(sys.stderr):
                logits = torch.cat([self.model(image[None]) for image in inputs]) if self._apart else self.model(inputs)
            confidences = check_logits(logits, len(batch), self.spec.num_classes).float().softmax(1)
            top = confidences.topk(min(topk, self.spec.num_classes))
            values = top.values.where(confidences.isfinite().all(1, keepdim=True), torch.nan)
            return top.indices.cpu().numpy(), values.cpu().numpy()

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        with explaining(f"模型 {self.spec.name} 在 {self.device_name} 上运行出错: {{}}"):
            try:
                yield
            except torch.OutOfMemoryError as error:
                remedy = "请关闭占用显存的程序(nvidia-smi 查看),或改用 --dtype float16、-d cpu"
                raise DeviceMemoryError(f"{self.device_name} 显存不足。{remedy}") from error
