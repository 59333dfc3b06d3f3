"""Which model a Recognizer's settings ask for, and by which engine it runs here."""

from __future__ import annotations

import dataclasses
import functools
import glob
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import infer
from infer import Identity, ModelError, OnnxEngine, Recognizer, compute_version, digest, one_line

from wwts import files
from wwts.memory import kept_graph, recall, remember

log = logging.getLogger("wwts")
DEFAULT_MODEL, FALLBACK_MODEL = "wwts_cn_base", "wwts_cn_lite"


class Choice:
    """The model of a Recognizer that names no .onnx file, as remembered or to be loaded."""

    def __init__(self, settings: Recognizer):
        self._settings = settings

    def recall(self) -> Identity | None:
        """Which model it is, if that was remembered and no file has changed since."""
        if known := self._known:
            return Identity(known["name"], known["versions"][self._settings.draft], known["num_classes"])
        return None

    def load(self) -> Any:
        """The model's OnnxEngine or TorchEngine; raises ModelError where it, its labels or the device are unusable."""
        settings = self._settings
        if self._known and (engine := self._load_kept_graph(self._known)):
            return engine
        name = settings.model or (self._known["name"] if self._known else DEFAULT_MODEL)
        again = "(加上同样的 --repo、--weights、--labels)" * any((settings.repo, settings.weights, settings.labels))
        again = f"请运行: python export.py -m {name}{again}"
        if settings.engine == "onnx":
            raise ModelError(f"{name} 还没有导出为 ONNX,或者导出之后权重、标签或程序变了。{again}")
        from wwts.torch_engine import TorchEngine  # which a graph does not need

        try:
            model = self._load_network(name)
        except (FileNotFoundError, ConnectionError) as error:
            if settings.model or settings.repo or settings.weights:
                raise ModelError(one_line(error)) from error
            return self._load_fallback(error)
        whole, draft = (dataclasses.replace(model.spec, draft=draft) for draft in (model.spec.draft, True))
        model = model._replace(spec=draft if settings.draft else whole)
        engine = TorchEngine(model, settings.device, settings.dtype)
        if model.files:
            versions = [compute_version(model.weights, spec, engine.precision) for spec in (whole, draft)]
            facts = {"name": whole.name, "num_classes": whole.num_classes, "versions": versions, "warning": None}
            remember(self._key(), model.files, **facts)
        graph = kept_graph(whole.name, compute_version(model.weights, whole, "float32")).parent
        outdated = graph.parent.glob(f"graph-{glob.escape(whole.name)}-*")
        if settings.fits_onnx and settings.engine == "auto" and engine.device_name == "cpu" and model.own:
            if any(outdated) and not recall(graph.name):
                log.info("导出为 ONNX 之后,权重、标签或程序变了,这次用 torch。%s", again)
        return engine

    def _load_network(self, name: str) -> Any:
        """The HubModel of an entry point or of a file that learn.py wrote; raises what load_hub_model raises."""
        from wwts import learned, repositories
        from wwts.torch_engine import import_torch

        settings, torch = self._settings, import_torch()
        if settings.device.startswith(("auto", "cuda")) and torch.cuda.is_available():
            # CUDA wakes while the weights are read; if it cannot, that comes up again when it is used.
            ThreadPoolExecutor(1).submit(torch.zeros, 1, device=settings.device.replace("auto", "cuda"))
        is_learned = name.endswith(".safetensors")
        load = learned.load_learned_model if is_learned else repositories.load_hub_model
        return load(name, settings.repo, settings.trust_repo, settings.weights, settings.labels, settings.offline)

    @functools.cached_property
    def _known(self) -> dict[str, Any] | None:
        """What was remembered when the same was loaded before."""
        known = recall(self._key())
        try:
            right = [re.fullmatch("[0-9a-f]{8}", version) is not None for version in known["versions"]] == [True, True]
            right = right and type(known["name"]) is str and type(known["num_classes"]) is int
            warning = known["warning"]
        except (TypeError, LookupError, ValueError):  # nothing there, or not written by this program
            return None
        if warning:
            log.warning("%s", warning)
        return known if right and known["num_classes"] > 0 else None

    def _load_kept_graph(self, known: dict[str, Any]) -> OnnxEngine | None:
        """The engine of the graph that export.py made of this very version, where it is to be used."""
        settings = self._settings
        path = kept_graph(known["name"], known["versions"][0])  # one graph, with drafts and without
        on_gpu = settings.engine == settings.device == "auto" and infer.has_nvidia_gpu()
        if settings.engine == "torch" or on_gpu or not settings.fits_onnx or not recall(path.parent.name):
            return None
        try:
            return OnnxEngine(path, None, known["versions"][settings.draft], settings.draft, settings.device)
        except ModelError as error:
            if settings.engine == "onnx":
                raise
            log.warning("%s。这次用 torch", error)
            return None

    def _load_fallback(self, error: OSError) -> Any:
        """The engine of the fallback model, which is remembered as the default only where that needs no network."""
        advice = f"取得方法见 docs/模型.md;加上 -m {FALLBACK_MODEL} 就不试网络"
        warning = f"{error.reason},改用 {FALLBACK_MODEL}(1,000 类)。{advice}"
        log.warning(warning)
        fallback = Choice(dataclasses.replace(self._settings, model=FALLBACK_MODEL))
        engine = fallback.load()
        if self._settings.offline and (known := recall(fallback._key())):
            remember(self._key(), known["files"] | dict.fromkeys(error.places), **known | {"warning": warning})
        return engine

    def _key(self) -> str:
        """What was asked for, in so far as it decides the version beside the content of files."""
        settings = self._settings
        file = settings.model if str(settings.model).endswith(".safetensors") else None
        paths = [path and os.path.abspath(path) for path in (settings.repo, settings.weights, settings.labels, file)]
        variables = () if settings.weights else ("MODELSCOPE_CACHE", "HOME", "USERPROFILE")
        places = [os.environ.get(variable) for variable in variables]
        default = settings.offline if settings.model is None else None  # with a network it may be another model
        dtype = settings.dtype
        if dtype == "auto":
            dtype = "float32" if settings.on_cpu or settings.engine == "onnx" else "float16"
        return "model-" + digest(str(files.HERE), settings.model, *paths, *places, default, dtype)[:16]
