"""A float32 graph as int8 by static quantisation; which run of layers stays in float is found by measuring."""

from __future__ import annotations

import copy
import logging
import statistics
import time
import types
from pathlib import Path
from typing import Any

from infer import ModelError, OnnxEngine

import numpy

log = logging.getLogger("wwts")

LAYERS = ("Conv", "Gemm", "MatMul")
# What ONNX Runtime computes in int8 and loses little by it; the rest (softmax, sigmoid, means) costs next to no time.
QUANTIZED = (*LAYERS, "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "MaxPool", "Relu")
QUANTIZED += ("Reshape", "Split", "Transpose")
RUNS = 14  # of about equal work, of which one may stay in float; one of ten costs more time for no less error
GAIN = 0.85  # share of the error that is left at most, or that run is quantised too: in float it costs a tenth more
HALF = 1.3  # times the error of the whole run in float that half of it may leave, being faster
TRIED = 64  # photos that errors are measured on
BATCH, ROUNDS = 8, 9  # for comparing speeds
WORTHWHILE = 1.2  # times as fast as float32


def quantize_graph(graph: Path, target: Path, pixels: numpy.ndarray, metadata: dict[str, str]) -> None:
    """Write a float32 graph's int8 form, calibrated on N×crop×crop×3 uint8 pixels, with metadata added.

    One run of layers stays in float: the one that by itself does most harm in int8, or half of it where that is nearly
    as good, if this takes 15 % off the error. ONNX Runtime computes a float layer or two between others in int8 after
    all, so no half has fewer than three. Files of its own are written beside the graph. Raises whatever onnxruntime's
    quantisation raises.
    """
    root = logging.getLogger()
    silent = logging.NullHandler()  # with no handler at all the library would set one up, which says everything twice
    root.addHandler(silent)
    try:
        quantizer, trial = Quantizer(graph, pixels), graph.with_name("trial.onnx")

        def error(path: Path, nodes: list[str], metadata: dict[str, str] | None = None) -> float:
            quantizer.write(path, nodes, metadata or {})
            return quantizer.error(path)

        runs, kept = quantizer.runs(), []
        everything = [name for run in runs for name in run]
        least = error(target, everything, metadata)
        if len(runs) > 1:
            worst = max(runs, key=lambda run: error(trial, run))
            layers = [name for name in worst if quantizer.work[name]]
            choices, middle = [worst], worst.index(layers[len(layers) // 2])
            if len(layers) >= 6:
                choices += [worst[:middle], worst[middle:]]
            others = [[name for name in everything if name not in choice] for choice in choices]
            errors = [error(trial, names) for names in others]
            best = min(range(len(choices)), key=lambda i: errors[i] if i else HALF * errors[0])
            if errors[best] <= GAIN * least:
                quantizer.write(target, others[best], metadata)
                kept = [name for name in choices[best] if quantizer.work[name]]
        number = sum(work > 0 for work in quantizer.work.values())
        log.info("%d 层中有 %d 层留在 float32%s", number, len(kept), f"({kept[0]} 到 {kept[-1]})" if kept else "")
    finally:
        root.removeHandler(silent)


def judge_graph(float32: Path, int8: Path, pixels: list[numpy.ndarray], least: float) -> None:
    """Say in words what a graph brings and costs beside that of float32, on images of crop×crop×3 uint8.

    Speed is measured alternately, in batches of eight. Raises ModelError if the top-1 is the same for less than the
    share ``least`` of the images.
    """
    engines = [OnnxEngine(path) for path in (float32, int8)]
    same, largest = 0, 0.0
    for start in range(0, len(pixels), BATCH):
        batch = pixels[start : start + BATCH]
        (tops, expected), (others, given) = (engine.classify(batch, engine.spec.num_classes) for engine in engines)
        same += int((tops[:, 0] == others[:, 0]).sum())
        rows = [numpy.take_along_axis(v, i.argsort(1), 1) for i, v in ((tops, expected), (others, given))]
        largest = max(largest, float(abs(rows[0] - rows[1]).max()))
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for engine, taken in zip(engines, seconds, strict=True):
            start = time.perf_counter()
            engine.classify(pixels[:BATCH], 1)
            taken.append(time.perf_counter() - start)
    speed, agreement = statistics.median(seconds[0]) / statistics.median(seconds[1]), same / len(pixels)
    before = sum(part.stat().st_size for part in float32.parent.glob("float32.onnx*"))  # weights lie beside the graph
    sizes = int8.stat().st_size / 1e6, before / 1e6
    log.info("int8 %.1f MB,float32 %.1f MB;速度是 float32 的 %.1f 倍(每批 8 张,轮流测)", *sizes, speed)
    words = f"在没有参加校准的 {len(pixels)} 张照片上,首选标签有 {agreement:.1%} 与 float32 相同"
    log.info("%s,置信度最多相差 %.3f", words, largest)
    if agreement < least:
        remedy = "请换成更多、更像将来要识别的照片;能接受就用 --least-agreement 写明最低的比例"
        raise ModelError(f"{words},低于 {least:.1%},未保存。{remedy}")
    if speed < WORTHWHILE:
        log.warning("int8 在这台机器上不值得: 快得不多,处理器多半没有 VNNI 一类的 int8 指令")


class Quantizer:
    """Quantises a float32 graph, whole or in part, and measures the error.

    ``work`` has the multiplications that each node takes, by its name, in the order in which they run; 0 for what is
    no layer.
    """

    def __init__(self, graph: Path, pixels: numpy.ndarray):
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

        self._pixels = pixels
        self._model = load_model_with_shape_infer(graph)
        self._ranges = self._measure_ranges(graph)
        self._expected = self._logits(graph)
        self.work = self._count_work()
        self._means = self._measure_means(graph)

    def write(self, path: Path, nodes: list[str], metadata: dict[str, str]) -> None:
        """Write the graph with these nodes in int8: weights signed and by channel, what flows between unsigned."""
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType

        model, chosen = copy.deepcopy(self._model), set(nodes)
        # A product of two things that flow, as in attention, is no layer.
        names = [n.name for n in model.graph.node if n.name in chosen and (n.op_type != "MatMul" or self.work[n.name])]
        self._correct_biases(model.graph, chosen)
        kinds = (QuantType.QInt8, QuantType.QUInt8)
        # In 256 steps the logits themselves would be too coarse.
        options = {"OpTypesToExcludeOutputQuantization": ["Gemm"]}
        quantizer = QDQQuantizer(model, True, False, *kinds, self._ranges, names, [], list(QUANTIZED), options)
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        for key, value in metadata.items():
            quantizer.model.model.metadata_props.add(key=key, value=value)
        onnx.save(quantizer.model.model, path)

    def error(self, path: Path) -> float:
        """How far the logits of the graph in a file are from those of float32: the mean square of the differences."""
        return float(((self._logits(path) - self._expected) ** 2).mean())

    def runs(self) -> list[list[str]]:
        """The names of the nodes in at most ``RUNS`` runs of about equal work, each with a layer in it."""
        runs: dict[int, list[str]] = {}
        total, done = sum(self.work.values()), 0
        for name, work in self.work.items():
            runs.setdefault(RUNS * done // max(total, 1), []).append(name)
            done += work
        return [run for run in runs.values() if any(self.work[name] for name in run)]

    def _correct_biases(self, graph: Any, chosen: set[str]) -> None:
        """Add to the chosen layers' biases what rounding their weights to 8 bits takes away on average.

        What flows in is mostly positive, so weights whose roundings do not cancel out move an output one way.
        Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019,
        section 4.2, with the means of the calibration photos.
        """
        from onnx import numpy_helper

        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in self._layers_with_bias(graph):
            if node.name not in chosen:
                continue
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            weights, bias = (numpy_helper.to_array(tensors[name]) for name in node.input[1:])
            if node.op_type == "Gemm" and not attributes.get("transB"):
                weights = weights.T
            rows = weights.reshape(len(weights), -1)
            steps = abs(rows).max(1, keepdims=True).clip(1e-30) / 127
            groups = attributes.get("group", 1)
            inputs = self._means[node.input[0]].reshape(groups, -1).repeat(len(rows) // groups, 0)
            lost = (rows - (rows / steps).round() * steps).reshape(*inputs.shape, -1).sum(2)
            corrected = (bias + (lost * inputs).sum(1)).astype(bias.dtype)
            node.input[2] = f"{node.name}_corrected_bias"  # of its own: layers may share one
            graph.initializer.append(numpy_helper.from_array(corrected, node.input[2]))

    def _layers_with_bias(self, graph: Any) -> list[Any]:
        held = {tensor.name for tensor in graph.initializer}
        return [n for n in graph.node if self.work[n.name] and any(name in held for name in n.input[2:3])]

    def _measure_ranges(self, graph: Path) -> Any:
        """The least and the greatest value of each tensor."""
        from onnxruntime.quantization import create_calibrator

        path = str(graph.with_name("ranges.onnx"))
        calibrator = create_calibrator(graph, QUANTIZED, path, use_external_data_format=True)
        calibrator.infer_session = self._session(path)  # in place of one that optimises nothing and takes long
        photos = iter(self._pixels)

        def get_next() -> dict[str, numpy.ndarray] | None:
            photo = next(photos, None)
            return None if photo is None else {"pixels": photo[None]}

        calibrator.collect_data(types.SimpleNamespace(get_next=get_next))
        return calibrator.compute_data()

    def _measure_means(self, graph: Path) -> dict[str, numpy.ndarray]:
        """The mean of each channel of what flows into each layer that has a bias."""
        import onnx

        model = copy.deepcopy(self._model)
        names = list(dict.fromkeys(node.input[0] for node in self._layers_with_bias(model.graph)))
        if not names:
            return {}
        del model.graph.output[:]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        path = graph.with_name("means.onnx")
        onnx.save(model, path)
        session = self._session(path)
        totals = dict.fromkeys(names, 0)
        for pixels in self._pixels:
            for name, values in zip(names, session.run(names, {"pixels": pixels[None]}), strict=True):
                totals[name] = totals[name] + values.mean((0, *range(2, values.ndim)))
        return {name: total / len(self._pixels) for name, total in totals.items()}

    def _logits(self, path: Path) -> numpy.ndarray:
        """N×classes logits less each row's mean; confidences near 1 would hide most of an error."""
        session = self._session(path)
        rows = [session.run(None, {"pixels": pixels[None]})[0] for pixels in self._pixels[:TRIED]]
        logits = numpy.log(numpy.concatenate(rows).clip(1e-30))
        return logits - logits.mean(1, keepdims=True)

    @staticmethod
    def _session(path: str | Path) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def _count_work(self) -> dict[str, int]:
        graph, work = self._model.graph, {}
        sizes = {weights.name: list(weights.dims) for weights in graph.initializer}
        shapes = {
            value.name: [max(dimension.dim_value, 1) for dimension in value.type.tensor_type.shape.dim]
            for value in (*graph.value_info, *graph.output)
        }
        for node in graph.node:
            work[node.name] = 0
            if node.op_type in LAYERS and node.input[1] in sizes and (shape := shapes.get(node.output[0])):
                channels = shape[1 if node.op_type == "Conv" else -1]
                work[node.name] = int(numpy.prod(sizes[node.input[1]]) * numpy.prod(shape[1:]) // channels)
        return work
