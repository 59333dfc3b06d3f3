#!/usr/bin/env python3
"""把模型导出为 ONNX,在没有 NVIDIA 显卡的机器上快得多;与 torch 核对过结果才保存。

先安装: pip install onnx onnxscript onnxruntime

用法: python export.py [FILE.onnx] [选项]

  FILE.onnx               导出成这个独立的文件,以后用 infer.py -m FILE.onnx
                          [存入用户缓存文件夹,此后 infer.py 自动使用它]
  --photos PATH           用来核对的图片、文件夹或通配符(可写多个)
                          [自带的 samples]
  --int8 PATH             导出成 int8: 文件约为四分之一,在合适的处理器上快一倍,
                          答案略有出入。PATH 是将来要识别的那种照片,文件夹或
                          通配符(可写多个),100 到 500 张为宜: 一半用来
                          校准,另一半用来与 float32 比较
  --least-agreement P     首选标签与 float32 相同的照片少于这个比例就不保存
                          [0.95]
  -m, --repo, --trust-repo, --weights, --labels, --offline
                          与 infer.py 相同: 导出哪个模型
  -q, --quiet             不显示 [INFO] 信息
  -h, --help              显示本说明

示例:
  python export.py -m wwts_cn_lite               约 12 秒(wwts_cn_base 约 25 秒)
  python export.py -m wwts_cn_lite lite.onnx
  python export.py -m wwts_cn_lite --int8 照片文件夹 lite-int8.onnx

退出状态: 0 已导出  2 用法错误  3 模型不可用、结果与它不一致或写不进去
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import infer
from infer import ModelError, OnnxEngine, Spec, UsageError

import numpy

from wwts import files, memory, torch_engine
from wwts.torch_engine import TorchEngine

__all__ = ["confidences", "export_graph", "find_photos", "read_pixels", "write_graph"]

log = logging.getLogger("wwts")
HERE = Path(__file__).resolve().parent
# Photos for int8: with fewer than the first nothing can be said, with fewer than the second little; more are left out.
LEAST, FEW, MOST = 20, 100, 500


def find_photos(inputs: list[str] | None, most: int) -> list[str]:
    """The first of the images that were named, or the samples; raises UsageError if there are none."""
    photos = list(itertools.islice(infer.find_images(inputs or [str(HERE / "samples")]), most))
    if not photos or not os.path.exists(photos[0]):
        raise UsageError(f"没有找到图片{'' if inputs else ' samples;请在命令里给出几张'}")
    return photos


def read_pixels(photos: list[str], spec: Spec) -> Iterator[numpy.ndarray]:
    """Images as the spec prepares them, crop×crop×3 uint8; raises UsageError at one that cannot be read."""
    for photo in photos:
        try:
            with infer.open_image(photo) as file:
                yield infer.preprocess(infer.decode_image(file, spec), spec)
        except Exception as error:  # a broken file can make a decoder raise anything
            raise UsageError(f"{photo}: {infer.describe_image_error(error)}") from error


def write_graph(engine: TorchEngine, path: Path, separate_weights: bool = False, softmax: bool = True) -> None:
    """Write an engine's model as an ONNX file: N×crop×crop×3 uint8 in, N×classes confidences out.

    Without ``softmax`` the outputs are the network's own. The engine must be on the CPU in float32. With
    ``separate_weights`` the weights lie beside the file in another, which is mapped into memory: that starts
    sooner and has no limit of 2 GiB. Raises ModelError if a package is missing or the model cannot be exported.
    """
    torch = torch_engine.import_torch()
    try:
        import onnx  # noqa: F401  (torch.onnx asks for them too late and at length)
        import onnxscript.optimizer
    except ImportError as error:
        raise ModelError("导出需要 onnx 和 onnxscript,请运行: pip install onnx onnxscript onnxruntime") from error
    spec = engine.spec
    size = sum(value.numel() * value.element_size() for value in engine.model.state_dict().values())
    if size > 2**31 - 2**26 and not separate_weights:
        raise ModelError(f"模型有 {size / 2**30:.1f} GiB,超过单个 ONNX 文件的 2 GiB 上限;不写文件名则没有这个限制")

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = engine.model
            for name in ("mean", "std"):  # repeated for a row of pixels: by three values at a time it would be slow
                self.register_buffer(f"pixel_{name}", torch.tensor(getattr(spec, name)).repeat(spec.crop, 1))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            inputs = pixels.float().div(255).sub(self.pixel_mean).div(self.pixel_std)
            outputs = self.model(inputs.permute(0, 3, 1, 2))
            return outputs.softmax(1) if softmax else outputs

    logging.getLogger("torch.onnx").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            example = (torch.zeros(2, spec.crop, spec.crop, 3, dtype=torch.uint8),)
            shapes = ({0: torch.export.Dim("N")},)
            graph = torch.export.export(Graph().eval(), example, dynamic_shapes=shapes)
            batch_norm = torch.ops.aten._native_batch_norm_legit_no_training.default
            program = torch.onnx.export(
                # torch 2.5 knows no form of batch norms in ONNX.
                graph.run_decompositions({batch_norm: decompose_batch_norm}),
                example,
                input_names=["pixels"],
                output_names=["confidences" if softmax else "features"],
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter's reasons are as many as networks, and hundreds of lines long
        reason = infer.one_line(error.__cause__ or error)[:150]
        raise ModelError(f"模型 {spec.name} 不能导出为 ONNX,请直接用 torch 运行它。原因: {reason}") from error
    onnxscript.optimizer.optimize(program.model)  # as torch itself does since 2.6
    program.model.metadata_props["wwts_spec"] = json.dumps(spec.record(), ensure_ascii=False)
    program.save(path, external_data=separate_weights)


def decompose_batch_norm(
    inputs: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, epsilon: float
) -> tuple[Any, Any, Any]:
    """What aten's batch norm gives in eval mode (N×C×… and two statistics that nobody reads), as plain arithmetic."""
    row = (1, -1, *[1] * (inputs.dim() - 2))
    scale = (variance + epsilon).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    return inputs * scale.reshape(row) + shift.reshape(row), inputs.new_empty(0), inputs.new_empty(0)


def export_graph(engine: TorchEngine, path: Path, photos: list[str], separate_weights: bool = False) -> float:
    """As write_graph, then check the graph against the engine on the photos; return the largest difference.

    Raises ModelError also if the two do not agree in confidences or top-1.
    """
    # One by one, so that what an image's company in a batch does to its answer is seen.
    expected = [confidences(engine, [pixels])[0] for pixels in read_pixels(photos, engine.spec)]
    if any(row.max() == row.min() for row in expected):
        raise ModelError("模型给每一类的置信度都相等,它没有训练过,或者权重没有载入")
    write_graph(engine, path, separate_weights)
    graph = OnnxEngine(path)
    largest = 0.0
    for pixels, wanted in zip(read_pixels(photos, engine.spec), expected, strict=True):
        # Beside copies of itself, so that a batch of a size unlike the example's is tried too.
        given = confidences(graph, [pixels] * 3)[1]
        largest = max(largest, float(abs(given - wanted).max()))
        if not largest <= 1e-3 or given.argmax() != wanted.argmax():
            raise ModelError(f"导出的 ONNX 与 torch 的结果不一致(置信度相差 {largest:.2g}),未保存")
    return largest


def confidences(engine: TorchEngine | OnnxEngine, batch: list[numpy.ndarray]) -> numpy.ndarray:
    """N×classes confidences of images of crop×crop×3 uint8; raises ModelError if one is not finite."""
    indices, values = engine.classify(batch, engine.spec.num_classes)
    if not numpy.isfinite(values).all():
        raise ModelError("输出了 NaN 或无穷大。可改用 --dtype float32;仍然如此则权重或机器有问题")
    return numpy.take_along_axis(values, indices.argsort(1), 1)


def export_int8(engine: TorchEngine, path: Path, checked: list[str], photos: list[str], least: float) -> float:
    """As export_graph, of an int8 graph: some of the photos calibrate it, the others judge it.

    Only float32, from which it is made, is checked against the engine. Raises UsageError if too few photos can be
    read, and ModelError if the top-1 of less than the share ``least`` of those that judge is that of float32.
    """
    from exporting.quantization import judge_graph, quantize_graph

    pixels = []
    for photo in random.Random(0).sample(photos, min(len(photos), MOST)):
        try:
            pixels += read_pixels([photo], engine.spec)
        except UsageError as error:
            log.warning("%s,没有使用", error)
    if len(pixels) < LEAST:
        raise UsageError(f"能用的照片只有 {len(pixels)} 张,校准和比较至少要 {LEAST} 张,{FEW} 到 {MOST} 张为宜")
    if len(pixels) < FEW:
        log.warning("照片只有 %d 张,比较得出的数字靠不住;%d 到 %d 张为宜", len(pixels), FEW, MOST)
    calibrating, judging = numpy.stack(pixels[::2]), pixels[1::2]
    float32 = path.parent / "work" / "float32.onnx"  # whatever the file is called
    float32.parent.mkdir()
    largest = export_graph(engine, float32, checked, separate_weights=True)
    log.info("正在试哪些层用 int8,小模型约一分钟,wwts_cn_base 约十分钟")
    try:
        quantize_graph(float32, path, calibrating, {"wwts_precision": "int8"})
    except Exception as error:  # as many reasons as networks
        reason = infer.one_line(error)[:150]
        raise ModelError(f"模型 {engine.spec.name} 不能转成 int8,请导出成 float32。{reason}") from error
    judge_graph(float32, path, judging, least)
    return largest


def run(arguments: argparse.Namespace) -> int:
    """Write the model's graph where it was asked for, or where later runs look for it."""
    photos = find_photos(arguments.photos, 20)
    if arguments.int8 and not arguments.file:
        raise UsageError("用 --int8 时请写明导出的文件名")
    if not 0 <= arguments.least_agreement <= 1:
        raise UsageError(f"--least-agreement 应为 0 到 1 之间的数,而不是 {arguments.least_agreement}")
    if arguments.file and (not arguments.file.endswith(".onnx") or os.path.isdir(arguments.file)):
        raise UsageError(f"要写的文件名应以 .onnx 结尾,而不是 {arguments.file}")
    if str(arguments.model).endswith(".onnx"):
        raise UsageError(f"{arguments.model} 已经是 ONNX 文件")
    engine = infer.build_recognizer(arguments, engine="torch", device="cpu", dtype="float32").load()
    path = Path(arguments.file) if arguments.file else memory.kept_graph(engine.spec.name, engine.version)
    if not arguments.file and not engine.files:
        raise UsageError("这个模型的文件在哪里无法得知,权重变了也看不出;请写明导出的文件名,再用 -m 指定它")
    log.info("正在导出 %s,需要十几秒到一分钟", path)
    with files.replacing(path if arguments.file else path.parent) as target:
        if arguments.int8:
            ours = list(infer.find_images(arguments.int8))
            difference = export_int8(engine, target, photos, ours, arguments.least_agreement)
        elif arguments.file:
            difference = export_graph(engine, target, photos)
        else:
            target.mkdir()
            difference = export_graph(engine, target / path.name, photos, separate_weights=True)
    if not arguments.file:
        memory.remember(path.parent.name, {str(part): memory.file_state(part) for part in path.parent.iterdir()})
    which = "其 float32 " * bool(arguments.int8)
    log.info("已导出 %s,%s在 %d 张照片上与 torch 的置信度最多相差 %.1g", path, which, len(photos), difference)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = infer.Parser("export.py", __doc__)
    infer.add_model_options(parser, leave_out=("device", "dtype", "engine", "batch-size", "workers", "draft"))
    parser.add_argument("file", nargs="?")
    parser.add_argument("--photos", action="append")
    parser.add_argument("--int8", action="append")
    parser.add_argument("--least-agreement", type=float, default=0.95)
    return infer.run_command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
