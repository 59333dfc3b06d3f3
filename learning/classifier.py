"""A linear classifier on features: learned, calibrated, and judged on what it did not learn from. Only numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy

SHRINKAGE = 0.2  # of the covariance; from 0.1 to 0.5 hardly anything changes (docs/学习.md)
FOLDS = 5
# Photos of a category that are this alike (cosine), or were taken so few seconds apart, show one thing once.
ALIKE, SECONDS = 0.92, 60
CHUNK = 4096  # rows that are computed with at a time


class Photos(NamedTuple):
    """What is learned from, N photos: labels by number, rooted features (N×width), times taken (seconds or NaN),
    and for M of them, whose numbers ``again`` has, the changes of rooted features at a second look (M×width)."""

    labels: numpy.ndarray
    features: numpy.ndarray
    times: numpy.ndarray
    again: numpy.ndarray
    changes: numpy.ndarray


def root(features: numpy.ndarray) -> numpy.ndarray:
    """The square root, with the sign kept; features of most networks, this project's among them, are not negative."""
    return numpy.sign(features) * numpy.sqrt(numpy.abs(features))


def fit_head(photos: Photos, rows: numpy.ndarray, classes: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Weight (classes×width) and bias of linear discriminant analysis, learned from some of the photos.

    It is scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE), in a tenth of its time and
    with less memory for many classes, but for one thing: the covariance of ``changes`` is added to that within the
    classes, so that what a second look changes counts for less. A class without photos is never the answer.
    """
    import scipy.linalg

    labels, width = photos.labels[rows], photos.features.shape[1]
    counts = numpy.bincount(labels, minlength=classes)
    means, scatter = numpy.zeros((classes, width)), numpy.zeros((width, width))
    numpy.add.at(means, labels, photos.features[rows])
    means /= numpy.maximum(counts, 1)[:, None]
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        centred = photos.features[rows[part]] - means[labels[part]]
        scatter += centred.T @ centred
    covariance = scatter / len(rows)
    changes = photos.changes[numpy.isin(photos.again, rows)].astype(float)
    covariance += changes.T @ changes / max(len(changes), 1)
    target = max(numpy.trace(covariance) / width, 1e-9)  # not zero where all photos are alike
    covariance *= 1 - SHRINKAGE
    covariance.flat[:: width + 1] += SHRINKAGE * target
    weight = scipy.linalg.solve(covariance, means.T, assume_a="pos").T
    with numpy.errstate(divide="ignore"):
        return weight, numpy.log(counts / len(rows)) - (weight * means).sum(1) / 2


def answer(features: numpy.ndarray, head: tuple, temperature: float, given: numpy.ndarray) -> numpy.ndarray:
    """For rows of rooted features: the answer by number, its confidence, and that of the given label; N×3."""
    answers = []
    for start in range(0, len(features), CHUNK):
        part = slice(start, start + CHUNK)
        logits = (features[part] @ head[0].T + head[1]) / temperature
        confidences = numpy.exp(logits - logits.max(1, keepdims=True))
        confidences /= confidences.sum(1, keepdims=True)
        rows = numpy.arange(len(logits))
        answers.append(numpy.stack([logits.argmax(1), confidences.max(1), confidences[rows, given[part]]], 1))
    return numpy.concatenate(answers)


def members(numbers: numpy.ndarray, count: int) -> list[numpy.ndarray]:
    """The rows that have each of the numbers from 0 to count - 1."""
    ends = numpy.cumsum(numpy.bincount(numbers, minlength=count))[:-1]
    return numpy.split(numpy.argsort(numbers, kind="stable"), ends)


def group_views(features: numpy.ndarray, times: numpy.ndarray) -> list[numpy.ndarray]:
    """Groups, largest first, of the photos of one category that show one thing once: see ALIKE and SECONDS.

    Where all would be one group, each photo is one.
    """
    from scipy.sparse import coo_array, csr_array, vstack
    from scipy.sparse.csgraph import connected_components

    unit = features / numpy.maximum(numpy.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    alike = vstack([csr_array(unit[start : start + CHUNK] @ unit.T > ALIKE) for start in range(0, len(unit), CHUNK)])
    order = numpy.argsort(times)
    soon = numpy.flatnonzero(numpy.diff(times[order]) <= SECONDS)  # never where one is NaN
    soon = coo_array((numpy.ones(len(soon)), (order[soon], order[soon + 1])), shape=alike.shape)
    number, groups = connected_components(alike + soon, directed=False)
    return sorted(members(groups if number > 1 else numpy.arange(len(unit)), len(unit)), key=len, reverse=True)


def assign_folds(photos: Photos, classes: int) -> numpy.ndarray:
    """A fold for each photo: what shows one thing in one fold, each category spread over all folds evenly.

    Of a category with no more photos than there are folds each photo has its own: that is leave-one-out.
    """
    folds, load = numpy.zeros(len(photos.labels), int), numpy.zeros(FOLDS)
    for category in members(photos.labels, classes):
        here = numpy.zeros(FOLDS)
        for group in group_views(photos.features[category], photos.times[category]) if len(category) else ():
            fold = numpy.lexsort((load, here))[0]
            folds[category[group]] = fold
            here[fold] += len(group)
            load[fold] += len(group)
    return folds


def find_temperature(logits: numpy.ndarray, given: numpy.ndarray, smoothing: float = 0.0) -> float:
    """What logits (N×classes) are to be divided by so that their softmax best foretells the given labels.

    Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2. With ``smoothing`` the
    labels are smoothed first: that share of each is spread over all classes.
    """

    def loss(temperature: float) -> float:
        scaled = logits / temperature
        scaled -= scaled.max(1, keepdims=True)
        target = (1 - smoothing) * scaled[numpy.arange(len(given)), given]
        if smoothing:  # a category without photos has the logit -inf, which no factor takes back
            target = target + smoothing * scaled.mean(1)
        return (numpy.log(numpy.exp(scaled).sum(1)) - target).mean()

    return min(numpy.geomspace(0.01, 1000, 120).tolist(), key=loss)


def cross_validate(photos: Photos, folds: numpy.ndarray, classes: int) -> tuple[float, numpy.ndarray, numpy.ndarray]:
    """Temperature; the photos whose category has others, by number; and for each what ``answer`` gives.

    Each photo is judged by a head that was learned without its fold.
    """
    judged = numpy.flatnonzero(numpy.bincount(photos.labels, minlength=classes)[photos.labels] > 1)
    parts = [judged[folds[judged] == fold] for fold in range(FOLDS)]
    heads = [fit_head(photos, numpy.flatnonzero(folds != fold), classes) for fold in range(FOLDS)]
    random, sample = numpy.random.default_rng(0), max(10**8 // classes // FOLDS, 100)  # of logits, 800 MB at most
    chosen = [random.permutation(part)[:sample] for part in parts]
    logits = [photos.features[rows] @ weight.T + bias for rows, (weight, bias) in zip(chosen, heads, strict=True)]
    temperature = find_temperature(numpy.concatenate(logits), photos.labels[numpy.concatenate(chosen)])
    answers = [
        answer(photos.features[rows], head, temperature, photos.labels[rows])
        for rows, head in zip(parts, heads, strict=True)
    ]
    return temperature, numpy.concatenate(parts), numpy.concatenate(answers)


def judge(given: numpy.ndarray, answers: numpy.ndarray, names: list[str]) -> dict[str, Any]:
    """How good answers (of ``answer``) to N photos are, JSON-able: accuracy with its 95 % interval (Wilson's), the
    expected calibration error in 15 bins, the categories from worst to best, the pairs confused most often, and the
    least confidence from which on 95 % of the answers are right, with the share of answers that reach it."""
    answered, confidences = answers[:, 0].astype(int), answers[:, 1]
    right, number, z = answered == given, len(given), 1.96
    accuracy = right.mean()
    middle = (accuracy + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * math.sqrt(accuracy * (1 - accuracy) / number + z**2 / (4 * number**2))
    bins = members(numpy.minimum(confidences * 15, 14).astype(int), 15)
    error = sum(abs(right[rows].sum() - confidences[rows].sum()) for rows in bins) / number
    rows = ((names[label], len(rows), int(right[rows].sum())) for label, rows in enumerate(members(given, len(names))))
    categories = sorted((row for row in rows if row[1]), key=lambda row: (row[2] / row[1], row[0]))
    confused = Counter(zip(given[~right].tolist(), answered[~right].tolist(), strict=True)).most_common()
    levels = [level / 100 for level in range(100) if (confidences >= level / 100).any()]
    threshold = next((level for level in levels if right[confidences >= level].mean() >= 0.95), None)
    return {
        "photos": number,
        "accuracy": round(float(accuracy), 4),
        "interval": [round(middle - half, 4), round(middle + half, 4)],
        "calibration_error": round(float(error), 4),
        "threshold": threshold,
        "answered": None if threshold is None else round(float((confidences >= threshold).mean()), 4),
        "categories": [dict(zip(("label", "photos", "right"), row, strict=True)) for row in categories],
        "confused": [{"given": names[a], "answered": names[b], "times": times} for (a, b), times in confused],
    }


def find_suspects(photos: Photos, judged: numpy.ndarray, answers: numpy.ndarray) -> list[tuple[int, int, float]]:
    """Photos that most likely carry the wrong label, likeliest first: number, the label believed, its confidence.

    After Northcutt et al., Confident Learning, arXiv 1911.00068: another category is answered at least as
    confidently as photos of that category are on average. ``judged`` and ``answers`` are cross_validate's.
    """
    given, answered = photos.labels[judged], answers[:, 0].astype(int)
    classes = max(given.max(), answered.max()) + 1
    usual = [answers[rows, 2].mean() if len(rows) else 1.0 for rows in members(given, classes)]
    rows = [row for row in numpy.argsort(answers[:, 2], kind="stable") if answered[row] != given[row]]
    return [
        (int(judged[row]), int(answered[row]), round(float(answers[row, 1]), 4))
        for row in rows
        if answers[row, 1] >= usual[answered[row]]
    ]
