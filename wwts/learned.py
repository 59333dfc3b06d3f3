"""Models that learn.py wrote: the network of a hub model with a last layer of its own, or learned as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import re

from infer import ModelError, Spec, digest, explaining, printable

from wwts import repositories
from wwts.files import read_labels
from wwts.memory import file_state
from wwts.torch_engine import HubModel, import_torch

FORMAT = 2  # of the files; in the first, features were not brought to length 1


def find_classifier(model: HubModel) -> str:
    """The name, within a network, of the nn.Linear that gives its logits: the last one of as many outputs."""
    torch = import_torch()
    layers = [(name, layer) for name, layer in model.module.named_modules() if isinstance(layer, torch.nn.Linear)]
    if not layers or layers[-1][1].out_features != model.spec.num_classes:
        raise ModelError(f"模型 {model.spec.name} 的最后一层不是 nn.Linear 分类层,不能学习自己的类别。请换一个模型")
    return layers[-1][0]


def load_learned_model(
    path: str,
    repo: str | None = None,
    trust_repo: bool = False,
    weights: str | None = None,
    labels: str | None = None,
    offline: bool = False,
) -> HubModel:
    """Load what learn.py wrote: a head for the hub model that the file names, or all parameters of its network.

    The file may choose an entry point, but only of the repository that is asked for. Raises ModelError where it
    is damaged, not of learn.py, or of a model with other weights; else as load_hub_model does.
    """
    torch = import_torch()
    states = {os.path.abspath(file): file_state(file) for file in (path, labels) if file}
    if not os.path.isfile(path):
        raise ModelError(f"找不到模型文件 {path}")
    with explaining("学习得到的模型需要 safetensors({}),请运行: pip install safetensors", ImportError):
        from safetensors import safe_open
    damaged = f"{path} 不是 learn.py 写的模型,或者已损坏: {{}}。请重新复制或重新学习"
    with explaining(damaged):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("wwts_learned", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        spec = Spec.parse(about["spec"], path, labels and read_labels(labels))
        if any(printable(text) != text for text in (spec.name, *spec.labels)) or re.search(r"[/\\]", spec.name):
            raise ValueError("名称中有控制字符或路径")
    if about.get("format") != FORMAT:
        raise ModelError(f"{path} 是另一版本的 learn.py 写的,请重新学习")
    backbone = repositories.load_hub_model(about["backbone"], repo, trust_repo, weights, offline=offline)
    if backbone.parameters != about.get("parameters"):
        cause = "现在的权重与学习时的不同。请换回那时的权重(--repo、--weights),或重新学习"
        raise ModelError(f"{path} 以 {backbone.spec.name} 为基础,{cause}")
    module, name = backbone.module, find_classifier(backbone)

    class UnitRoot(torch.nn.Module):
        """As unit_root of learning.classifier."""

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(features.sign() * features.abs().sqrt())

    with explaining(damaged):
        linear = torch.nn.Linear(module.get_submodule(name).in_features, spec.num_classes)
        # Trained as a whole, a network needs no root, whose slope has no limit at zero.
        module.set_submodule(name, linear if about["whole"] else torch.nn.Sequential(UnitRoot(), linear))
        target = module if about["whole"] else linear
        expected = {key: (value.dtype, value.shape) for key, value in target.state_dict().items()}
        if {key: (value.dtype, value.shape) for key, value in tensors.items()} != expected:
            raise ValueError("参数的名称、类型或形状不符")
        if not all(value.isfinite().all() for value in tensors.values()):
            raise ValueError("参数含有 NaN 或无穷大")
        target.load_state_dict(tensors)
    files = None if backbone.files is None else backbone.files | states
    digests = [digest(content, part) for part in (backbone.weights, backbone.parameters)]
    return HubModel(module.eval().requires_grad_(False), spec, digests[0], files, backbone.own, digests[1])
