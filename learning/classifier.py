"""The classifier: learned from features, judged on what it did not learn from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy

from learning.features import Look

SHRINKAGE = 0.2  # of the covariance; from 0.1 to 0.5 hardly anything changes (docs/学习.md)
# Photos of a category that are this alike (cosine), or were taken so few seconds apart, show one thing once.
FOLDS, ALIKE, SECONDS = 5, 0.92, 60
CHUNK = 1024  # rows that are computed with at a time


class Photos(NamedTuple):
    """What is learned from: names of the categories; paths, labels by number, features (N×width, of unit_root), their
    lengths before they were divided by them, times taken; and of the photos whose numbers ``again`` has, by how much
    a second look changed the features (M×width)."""

    names: list[str]
    paths: list[str]
    labels: numpy.ndarray
    features: numpy.ndarray
    lengths: numpy.ndarray
    times: numpy.ndarray
    again: numpy.ndarray
    changes: numpy.ndarray


def unit_root(features: numpy.ndarray) -> numpy.ndarray:
    """Rows of square roots, with signs kept, each of length 1: how strongly a network sees a photo matters little."""
    rooted = numpy.sign(features) * numpy.sqrt(numpy.abs(features))
    return rooted / numpy.linalg.norm(rooted, axis=1, keepdims=True).clip(1e-12)


def gather(labels: dict[str, str], seen: dict[str, Look]) -> Photos:
    """What is learned from, of photos with labels that the network has seen."""
    names, looks = sorted(set(labels.values())), [seen[path] for path in labels]
    number = {name: index for index, name in enumerate(names)}
    given = numpy.array([number[label] for label in labels.values()])
    first, times = numpy.stack([look.rows[0] for look in looks]), numpy.array([look.time for look in looks])
    again = numpy.array([row for row, look in enumerate(looks) if len(look.rows) > 1], int)
    second = numpy.array([looks[row].rows[1] for row in again], numpy.float32).reshape(len(again), first.shape[1])
    features, lengths = unit_root(first), numpy.sqrt(abs(first).sum(1))
    return Photos(names, list(labels), given, features, lengths, times, again, unit_root(second) - features[again])


def fit_head(photos: Photos, rows: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Weight (classes×width) and bias of linear discriminant analysis, learned from some of the photos.

    It is scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE), in a hundredth of its time;
    but the covariance of what a second look changes is added to that within the classes.
    """
    labels, classes, width = photos.labels[rows], len(photos.names), photos.features.shape[1]
    counts, means = numpy.bincount(labels, minlength=classes), numpy.zeros((classes, width))
    numpy.add.at(means, labels, photos.features[rows])
    means /= numpy.maximum(counts, 1)[:, None]
    changes = photos.changes[numpy.isin(photos.again, rows)].astype(float)

    def deviations() -> Iterator[numpy.ndarray]:
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            yield (photos.features[rows[part]] - means[labels[part]]) / math.sqrt(len(rows))
        yield changes / math.sqrt(max(len(changes), 1))

    # The covariance S'S, or with few photos the smaller SS', by which the former's inverse is known (Woodbury).
    few = len(rows) + len(changes) < width
    spread = numpy.concatenate(list(deviations())) if few else numpy.eye(width)
    product = spread @ spread.T if few else sum(part.T @ part for part in deviations())
    ridge = SHRINKAGE * max(numpy.trace(product) / width, 1e-9)  # not zero where all photos are alike
    inner = (1 - SHRINKAGE) * product + ridge * numpy.eye(len(product))
    weight = numpy.linalg.solve(inner, spread @ means.T).T
    if few:
        weight = (means - (1 - SHRINKAGE) * weight @ spread) / ridge
    priors = numpy.maximum(counts, 1e-9) / len(rows)  # a class without photos is never the answer
    return weight, numpy.log(priors) - (weight * means).sum(1) / 2


def log_softmax(logits: numpy.ndarray) -> numpy.ndarray:
    """Logarithms of confidences, N×classes (scipy's takes longer to import than all else here to compute)."""
    logits = logits - logits.max(1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(1, keepdims=True))


def find_temperature(logits: numpy.ndarray, given: numpy.ndarray) -> float:
    """What logits (N×classes) are to be divided by so that their softmax best foretells the given labels.

    Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2. Where all answers are right,
    half an error is added, for the strongest other labels: even N right answers make none certain.
    """
    rows, others = numpy.arange(len(given)), logits.copy()
    doubt = (logits.argmax(1) == given).all() / (2 * len(given) + 2)
    others[rows, given] = -numpy.inf
    rivals = others.argmax(1)

    def loss(temperature: float) -> float:
        logarithms = log_softmax(logits / temperature)
        return -(1 - doubt) * logarithms[rows, given].mean() - doubt * logarithms[rows, rivals].mean()

    best = min(numpy.geomspace(0.01, 100000, 80), key=loss)
    return min(numpy.geomspace(best / 1.2, best * 1.2, 20), key=loss)


def answer(features: numpy.ndarray, head: tuple | None, given: numpy.ndarray) -> numpy.ndarray:
    """For rows of features or of logits: the answer by number, its confidence, and the given label's; N×3."""
    answers = numpy.empty((len(given), 3))
    for start in range(0, len(given), CHUNK):
        part = slice(start, start + CHUNK)
        confidences = numpy.exp(log_softmax(features[part] @ head[0].T + head[1] if head else features[part]))
        of_given = confidences[numpy.arange(len(confidences)), given[part]]
        answers[part] = numpy.stack([confidences.argmax(1), confidences.max(1), of_given], 1)
    return answers


def members(numbers: numpy.ndarray) -> list[numpy.ndarray]:
    """The rows of each of the numbers that there are."""
    return numpy.split(
        numpy.argsort(numbers, kind="stable"), numpy.cumsum(numpy.unique(numbers, return_counts=True)[1])[:-1]
    )


def group_views(features: numpy.ndarray, times: numpy.ndarray) -> numpy.ndarray:
    """Give the same number to photos of a category that show one thing once: see ALIKE and SECONDS."""
    number = len(features)
    linked = (features @ features.T > ALIKE) | (abs(times[:, None] - times) <= SECONDS) | numpy.eye(number, dtype=bool)
    groups = numpy.arange(number)
    # Each takes the least number among those that it is linked to, then that one's, until nothing changes.
    while (least := numpy.where(linked, groups, number).min(1)).tolist() != groups.tolist():
        groups = least[least]
    return groups


def assign_folds(photos: Photos) -> numpy.ndarray:
    """A fold for each photo: what shows one thing in one fold, each category spread over all folds evenly.

    Of a category with no more photos than there are folds each photo has its own: that is leave-one-out. Where there
    are very many, only photos that follow each other are compared, CHUNK at a time.
    """
    folds = numpy.zeros(len(photos.labels), int)
    for number, category in enumerate(members(photos.labels)):
        groups = []
        for start in range(0, len(category), CHUNK):
            part = category[start : start + CHUNK]
            groups += [part[rows] for rows in members(group_views(photos.features[part], photos.times[part]))]
        groups = sorted(groups, key=len, reverse=True) if len(groups) > 1 else category[:, None]
        for rank, group in enumerate(groups):
            folds[group] = (rank + number) % FOLDS
    return folds


def cross_validate(photos: Photos) -> tuple[float, numpy.ndarray, numpy.ndarray]:
    """Temperature; a fold for each photo; and what ``answer`` gives of each by a head learned without its fold."""
    folds, answers, logits, sample = assign_folds(photos), numpy.empty((len(photos.labels), 3)), [], []
    known = numpy.bincount(photos.labels)[photos.labels] > 1  # from another photo of the category
    heads = [fit_head(photos, numpy.flatnonzero(folds != fold)) for fold in range(FOLDS)]
    for fold, (weight, bias) in enumerate(heads):
        rows = numpy.random.default_rng(0).permutation(numpy.flatnonzero(known & (folds == fold)))
        sample.append(rows[: 10**7 // len(photos.names) + 100])  # not more logits than 80 MB
        logits.append(photos.features[sample[fold]] @ weight.T + bias)
    temperature = find_temperature(numpy.concatenate(logits), photos.labels[numpy.concatenate(sample)])
    for fold, (weight, bias) in enumerate(heads):
        rows = numpy.flatnonzero(folds == fold)
        answers[rows] = answer(photos.features[rows], (weight / temperature, bias / temperature), photos.labels[rows])
    return temperature, folds, answers


def judge(given: numpy.ndarray, answers: numpy.ndarray, names: list[str]) -> dict[str, Any]:
    """How good answers (of ``answer``) to N photos are, JSON-able: accuracy with its 95 % interval (Wilson's), the
    expected calibration error in 15 bins, the categories from worst to best, the pairs confused most often, and the
    least confidence from which on 95 % of the answers are right, with the share of answers that reach it."""
    answered, confidences, z = answers[:, 0].astype(int), answers[:, 1], 1.96
    right, number = answered == given, len(given)
    accuracy, spread = float(right.mean()), z**2 / number
    half = z * math.sqrt((accuracy * (1 - accuracy) + spread / 4) / number)
    interval = [round((accuracy + spread / 2 + sign * half) / (1 + spread), 4) for sign in (-1, 1)]
    bins = members((confidences * 15).astype(int).clip(0, 14))
    error = sum(abs(right[rows].sum() - confidences[rows].sum()) for rows in bins) / number
    rows = [(names[given[rows[0]]], len(rows), int(right[rows].sum())) for rows in members(given)]
    rows.sort(key=lambda row: (row[2] / row[1], row[0]))
    confused = Counter(zip(given[~right].tolist(), answered[~right].tolist(), strict=True)).most_common()
    levels = [level / 100 for level in range(100) if (confidences >= level / 100).any()]
    threshold = next((level for level in levels if right[confidences >= level].mean() >= 0.95), None)
    return {
        "photos": number,
        "accuracy": round(accuracy, 4),
        "interval": interval,
        "calibration_error": round(float(error), 4),
        "threshold": threshold,
        "answered": None if threshold is None else round(float((confidences >= threshold).mean()), 4),
        "categories": [dict(zip(("label", "photos", "right"), row, strict=True)) for row in rows],
        "confused": [{"given": names[a], "answered": names[b], "times": times} for (a, b), times in confused],
    }


def find_suspects(photos: Photos, answers: numpy.ndarray) -> list[dict[str, Any]]:
    """Photos that most likely carry the wrong label, likeliest first; after Northcutt et al., arXiv 1911.00068.

    Another category is answered at least as confidently as photos of that category are on average.
    """
    answered, given, names = answers[:, 0].astype(int), photos.labels, photos.names
    usual = numpy.array([answers[rows, 2].mean() for rows in members(given)])
    wrong = (answered != given) & (answers[:, 1] >= usual[answered]) & (numpy.bincount(given)[given] > 1)
    order = [row for row in numpy.argsort(answers[:, 2], kind="stable") if wrong[row]]
    return [{"path": photos.paths[r], "given": names[given[r]], "believed": names[answered[r]]} for r in order]
