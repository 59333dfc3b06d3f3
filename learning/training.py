"""Training a whole network on one's own categories.

AdamW with a cosine schedule after a short warm-up; random crops, mirror images and slight changes of colour; label
smoothing; batch norms keep their statistics. What that brings is in docs/学习.md.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import infer
from infer import HubModel, ModelError, TorchEngine, UsageError

import numpy

from learning.classifier import Photos, answer, find_temperature, fit_head, judge
from learning.features import Backbone, Features, run_torch

log = logging.getLogger("wwts")
BATCH, WARM_UP, AHEAD = 16, 50, 4  # photos a step; steps at most; steps whose photos are decoded ahead
BODY_RATE, HEAD_RATE, WEIGHT_DECAY, SMOOTHING = 2e-4, 1e-3, 0.02, 0.1
# With fewer steps than this the body learns more slowly, or what it unlearns at first would not be mended in time.
MANY_STEPS = 800
CROP_AREA = (0.35, 1)  # shares of a photo


def train_network(
    arguments: argparse.Namespace,
    model: HubModel,
    names: list[str],
    paths: list[str],
    photos: Photos,
    held: numpy.ndarray,
    best: float,
    keep: Callable[[dict[str, numpy.ndarray], dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Train a hub model on the photos that are not ``held`` (N booleans), whose categories are called ``names``.

    After each epoch in which those held out are recognised better than ever, ``best`` (0 to 1) included, ``keep``
    is called with all parameters of the network and with what ``judge`` says; the last such judgement is returned.
    Everything is saved after each epoch beside the output, where --resume looks for it; raises UsageError if it
    was not the same that was trained there.
    """
    torch = infer.import_torch()
    rows, held_rows, classes = numpy.flatnonzero(~held), numpy.flatnonzero(held), len(names)
    # It begins with the head for unrooted features, since a root has no finite slope at zero.
    plain = photos._replace(features=photos.features * abs(photos.features), again=photos.again[:0])
    weight, bias = fit_head(plain._replace(changes=photos.changes[:0]), rows, classes)
    # As sure as smoothed labels want it: of photos that it knows it is far too sure, which would upset all at first.
    temperature = find_temperature(plain.features[rows] @ weight.T + bias, photos.labels[rows], SMOOTHING)
    linear = torch.nn.Linear(weight.shape[1], classes)
    linear.load_state_dict({"weight": torch.tensor(weight / temperature), "bias": torch.tensor(bias / temperature)})
    name = infer.find_classifier(model)
    model.module.set_submodule(name, linear)
    # As if it were not this project's own, whose batch norms are folded and could not be trained.
    engine = TorchEngine(model._replace(own=False), arguments.device, "float32")
    network = engine.model.requires_grad_(True)
    body = [value for key, value in network.named_parameters() if not key.startswith(f"{name}.")]
    steps = arguments.finetune * math.ceil(len(rows) / BATCH)
    rate = BODY_RATE * min(steps / MANY_STEPS, 1)
    groups = [{"params": body, "lr": rate}, {"params": linear.parameters(), "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    warm_up = max(min(WARM_UP, steps // 10), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Path(f"{arguments.output}.checkpoint")
    training = [paths[row] for row in rows]
    key = infer.digest(model.parameters, names, training, photos.labels[rows].tolist(), arguments.finetune)
    epoch, result = 0, None
    if arguments.resume:
        epoch, best, result = restore(checkpoint, key, parts)
    while epoch < arguments.finetune:
        loss = train_epoch(
            engine, epoch, arguments, optimizer, schedule, [paths[row] for row in rows], photos.labels[rows]
        )
        store = Features(Backbone("", "", "", model.spec, run_torch(engine)), kept=False)
        seen = store.compute([paths[row] for row in held_rows], 0, arguments)
        _, logits, _ = store.read(list(seen.values()))
        temperature = find_temperature(logits, photos.labels[held_rows])
        answers = answer(logits, (numpy.eye(classes), 0), temperature, photos.labels[held_rows])
        judged, epoch = judge(photos.labels[held_rows], answers, names), epoch + 1
        progress = (
            f"第 {epoch}/{arguments.finetune} 轮: 损失 {loss:.3f},没有参加训练的照片正确率 {judged['accuracy']:.1%}"
        )
        log.info("%s(此前最高 %.1f%%)", progress, best * 100)
        if judged["accuracy"] > best:
            best, result = judged["accuracy"], judged
            tensors = {entry: value.cpu().numpy() for entry, value in network.state_dict().items()}
            for part in (f"{name}.weight", f"{name}.bias"):
                tensors[part] = tensors[part] / numpy.float32(temperature)
            keep(tensors, result)
        state = {"key": key, "progress": [epoch, best, result]}
        with infer.replacing(checkpoint) as path:
            torch.save(state | {name: part.state_dict() for name, part in parts.items()}, path)
    os.remove(checkpoint)
    return result


def train_epoch(
    engine: TorchEngine,
    epoch: int,
    arguments: argparse.Namespace,
    optimizer: Any,
    schedule: Any,
    paths: list[str],
    labels: numpy.ndarray,
) -> float:
    """Train an engine's network once on all photos, in an order that the number of the epoch decides; mean loss."""
    torch = infer.import_torch()
    from torchvision import transforms

    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                engine.spec.crop, CROP_AREA, interpolation=transforms.InterpolationMode(engine.spec.interpolation)
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.2, 0.2, 0.2),
        ]
    )

    def prepare(row: int) -> numpy.ndarray:
        with infer.open_image(paths[row]) as file:
            return numpy.asarray(augment(infer.decode_image(file)))

    mixed = arguments.dtype == "bfloat16" or arguments.dtype == "auto" and engine.device.type == "cuda"
    order = numpy.random.default_rng(epoch).permutation(len(paths))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    total = 0.0
    with infer.progress_bar(len(batches), "步") as bar, ThreadPoolExecutor(arguments.workers) as pool:
        waiting: list = []
        for number in range(len(batches)):
            for rows in batches[number + len(waiting) : number + AHEAD]:
                waiting.append([pool.submit(prepare, row) for row in rows])
            pixels = numpy.stack([future.result() for future in waiting.pop(0)])
            with torch.autocast(engine.device.type, torch.bfloat16, enabled=mixed):
                logits = engine.model(engine.normalize(pixels)).float()
            target = torch.tensor(labels[batches[number]], device=engine.device)
            loss = torch.nn.functional.cross_entropy(logits, target, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(engine.model.parameters(), 1)
            optimizer.step()
            schedule.step()
            total += loss.item()
            bar.set_postfix_str(f"第 {epoch + 1}/{arguments.finetune} 轮,损失 {total / (number + 1):.3f}")
            bar.update(1)
    return total / len(batches)


def restore(checkpoint: Path, key: str, parts: dict[str, Any]) -> list:
    """Bring network, optimizer and schedule into the state of a checkpoint; give its epochs, best and judgement.

    Raises UsageError where there is none, or one of another training; ModelError where it cannot be read.
    """
    if not checkpoint.is_file():
        raise UsageError(f"没有 {checkpoint},没有可以接着做的训练;请去掉 --resume")
    try:
        state = infer.import_torch().load(checkpoint, map_location="cpu", weights_only=True)
        if state["key"] != key:
            raise UsageError(f"{checkpoint} 是用别的照片、轮数或模型训练的;请改回来,或去掉 --resume 重新训练")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["progress"]
    except ModelError:
        raise
    except Exception as error:  # there is no end of ways in which bytes can be no checkpoint
        raise ModelError(f"{checkpoint} 已损坏: {infer.one_line(error)}。请去掉 --resume 重新训练") from error
