"""Training of the whole network."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import infer

import numpy

from learning.classifier import Photos, answer, find_temperature, judge
from learning.features import Network, look_at, run_torch
from wwts import files, learned, memory, repositories, torch_engine

log = logging.getLogger("wwts")
# Photos a step, rates of the head and of the rest for so many steps, shares of a photo that are cut out.
BATCH, RATES, MANY_STEPS, CROP_AREA = 16, (1e-3, 2e-4), 800, (0.35, 1)


def finetune(
    arguments: argparse.Namespace, network: Network, photos: Photos, held: numpy.ndarray, best: float, write: Callable
) -> dict[str, Any] | None:
    """Train all of a network on the photos that are not ``held`` (N booleans); give what ``judge`` says of the best.

    After each epoch that recognises more of those held out than all before, and than ``best`` (a share), ``write``
    is called with all parameters and that judgement; and everything is saved, for --resume. Batch norms keep their
    statistics. Raises UsageError where --resume finds another training, ModelError where it cannot be read.
    """
    torch = torch_engine.import_torch()
    from torchvision.transforms import v2

    model = repositories.load_hub_model(network.spec.name, *arguments.source)
    epochs, result, labels, names = arguments.finetune, None, photos.labels, photos.names
    rows, paths = numpy.flatnonzero(~held), [photos.paths[row] for row in numpy.flatnonzero(held)]
    # The head first, on features that are not rooted, since a root has no finite slope at zero. Not by discriminant
    # analysis, whose large weights on what varies little would upset all with the first step.
    rooted = photos.features[rows] * photos.lengths[rows, None]
    features = torch.from_numpy(rooted * abs(rooted)).float()
    linear, layer = torch.nn.Linear(features.shape[1], len(names)), learned.find_classifier(model)
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    solver = torch.optim.LBFGS(linear.parameters(), max_iter=50)

    def closure() -> Any:
        solver.zero_grad()
        loss = smooth(linear(features), torch.from_numpy(labels[rows]))
        loss.backward()
        return loss

    solver.step(closure)
    model.module.set_submodule(layer, linear)
    # As if it were not this project's own, whose batch norms are folded and could not be trained.
    engine = torch_engine.TorchEngine(model._replace(own=False), arguments.device, "float32")
    module = engine.model.requires_grad_(True)
    body = [value for name, value in module.named_parameters() if not name.startswith(f"{layer}.")]
    optimizer = torch.optim.AdamW([{"params": linear.parameters()}, {"params": body}], weight_decay=0.02)
    steps = epochs * math.ceil(len(rows) / BATCH)
    # With fewer steps it learns more slowly, or what it unlearns at first would not be mended in time.
    rates = [rate * min(steps / MANY_STEPS, 1) for rate in RATES]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps + 1, pct_start=0.15, cycle_momentum=False)
    mixed = arguments.dtype == "bfloat16" or arguments.dtype == "auto" and engine.device.type == "cuda"
    interpolation = v2.InterpolationMode(model.spec.interpolation)
    crop = v2.RandomResizedCrop(model.spec.crop, CROP_AREA, interpolation=interpolation)
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)])

    def load(row: int) -> numpy.ndarray:
        with infer.open_image(photos.paths[row]) as file:
            return numpy.asarray(augment(infer.decode_image(file, model.spec)))

    parts = {"network": module, "optimizer": optimizer, "schedule": schedule}
    checkpoint, done = Path(f"{arguments.output}.checkpoint"), 0
    key = infer.digest(model.parameters, photos.paths, labels.tolist(), held.tolist(), epochs)
    if arguments.resume:
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if state["key"] != key:
                raise infer.UsageError(f"{checkpoint} 是用别的照片、轮数或模型训练的;请改回来,或去掉 --resume 重新训练")
            done, best, result = state["progress"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except infer.UsageError:
            raise
        except Exception as error:  # there is no end of ways in which bytes can be no checkpoint
            raise infer.ModelError(f"{checkpoint} 已损坏: {infer.one_line(error)}。请去掉 --resume 重新训练") from error
    for epoch in range(done + 1, epochs + 1):
        batches = numpy.array_split(numpy.random.default_rng(epoch).permutation(rows), steps // epochs)
        losses = []
        with infer.progress_bar(len(batches), "步") as bar, ThreadPoolExecutor(arguments.workers) as pool:
            for batch in batches:
                pixels = engine.normalize(numpy.stack(list(pool.map(load, batch))))
                target = torch.tensor(labels[batch], device=engine.device)
                with torch.autocast(engine.device.type, torch.bfloat16, enabled=mixed):
                    loss = smooth(module(pixels).float(), target)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix_str(f"第 {epoch}/{epochs} 轮,损失 {numpy.mean(losses):.3f}")
                bar.update(1)
        seen = look_at(paths, network._replace(run=run_torch(engine)), arguments, memory.Cache(":memory:"))
        if gone := [path for path in paths if isinstance(seen[path], str)]:
            raise infer.UsageError(f"{gone[0]}: {seen[gone[0]]}。请放回照片,加上 --resume 接着做")
        logits = numpy.stack([seen[path].rows[0] for path in paths])
        divisor = find_temperature(logits, labels[held])
        judged = judge(labels[held], answer(logits / divisor, None, labels[held]), names)
        share = f"没有参加训练的照片正确率 {judged['accuracy']:.1%}(超过 {best:.1%} 才换)"
        log.info("第 %d/%d 轮: 损失 %.3f,%s", epoch, epochs, numpy.mean(losses), share)
        if judged["accuracy"] > best:
            best, result = judged["accuracy"], judged
            tensors = {name: value.cpu().numpy() for name, value in module.state_dict().items()}
            for name in (f"{layer}.weight", f"{layer}.bias"):
                tensors[name] = tensors[name] / numpy.float32(divisor)
            write(tensors, result, whole=True)
        with files.replacing(checkpoint) as path:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save(states | {"key": key, "progress": [epoch, best, result]}, path)
    checkpoint.unlink()
    return result
