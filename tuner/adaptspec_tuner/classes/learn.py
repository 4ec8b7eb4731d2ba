"""Learns a classifier of prompts from those of a workload with classes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import numpy as np

from adaptspec.classes.classifier import Classifier, Evidence
from adaptspec.classes.text_features import features, prompt_text
from adaptspec.workloads import Prompt


def learn(
    prompts: Sequence[Prompt],
    *,
    ridge: float = 0.1,
    sure: float = 0.6,
    unlike_share: float = 0.03,
    near_equal: float = 0.9,
    folds: int = 5,
    most: int = 100,
) -> Classifier | None:
    """A classifier of the prompts' classes; None where there are fewer than two.

    Takes about a tenth of a second for 60 prompts, less than a second for 600. The same
    prompts in the same order give the same classifier, but for its measured time.

    Args:
        ridge: Regularisation of the scores. Features have length 1.
        sure: Probability from which the likeliest class is used.
        unlike_share: Share of the prompts held out that are taken for strangers.
        near_equal: Cosine of features from which prompts are held out together.
        folds: Parts that are held out in turn.
        most: Prompts of a class that are looked at, the first ones.
    """
    kept = _first_of_each(prompts, most)
    names = list(dict.fromkeys(prompt.prompt_class for prompt in kept))
    if len(names) < 2:
        return None
    texts = [prompt_text(prompt.content) or "" for prompt in kept]
    table = np.stack([features(text) for text in texts]).astype(np.float64)
    labels = np.array([names.index(prompt.prompt_class) for prompt in kept])
    cosines = table @ table.T
    groups = grouped(cosines, near_equal)
    scores = _held_out(cosines, labels, _folds(labels, groups, folds), ridge)
    sharpness = _sharpness(scores, labels)
    likeness = _likeness(cosines, labels, groups)
    average, spread, unlike = _typical(likeness, labels, unlike_share)

    best = scores.argmax(axis=1)
    logits = sharpness * (scores - scores.max(axis=1, keepdims=True))
    confident = 1 / np.exp(logits).sum(axis=1) >= sure
    of_best = likeness[np.arange(len(kept)), best]
    told = confident & (of_best >= average[best] + unlike * spread[best])
    right = best == labels

    everyone = np.arange(len(kept))
    dual, share = _dual(cosines, labels, everyone, ridge)
    centre = table.mean(axis=0)
    weights = (table - centre).T @ dual
    means = np.stack([table[labels == i].mean(axis=0) for i in range(len(names))], 1)

    def classifier(seconds: float) -> Classifier:
        return Classifier(
            names,
            weights.astype(np.float16).astype(np.float32),  # as they are stored
            (share - centre @ weights).astype(np.float32),
            sharpness,
            (means / np.linalg.norm(means, axis=0)).astype(np.float16).astype("f4"),
            average.astype(np.float32),
            spread.astype(np.float32),
            unlike,
            sure,
            Evidence(
                prompts=len(kept),
                accuracy=float(right.mean()),
                told=float(told.mean()),
                told_accuracy=float(right[told].mean()) if told.any() else 0.0,
                seconds=seconds,
            ),
        )

    unmeasured, times = classifier(0.0), []
    for text in texts:
        started = perf_counter()
        unmeasured.tell(text)
        times.append(perf_counter() - started)
    return classifier(median(times))


def grouped(cosines: np.ndarray, near_equal: float) -> np.ndarray:
    """``[prompts]``: equal numbers for prompts joined by a chain of near-equal ones.

    Args:
        cosines: ``[prompts, prompts]``.
    """
    found = np.full(len(cosines), -1)
    for first in range(len(cosines)):
        if found[first] >= 0:
            continue
        waiting, found[first] = [first], first
        while waiting:
            near = np.flatnonzero((cosines[waiting.pop()] >= near_equal) & (found < 0))
            found[near] = first
            waiting.extend(near.tolist())
    return found


def _first_of_each(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """The first ``most`` prompts of each class, in their order."""
    counts: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        counts[prompt.prompt_class] = counts.get(prompt.prompt_class, 0) + 1
        if counts[prompt.prompt_class] <= most:
            kept.append(prompt)
    return kept


def _folds(labels: np.ndarray, groups: np.ndarray, folds: int) -> np.ndarray:
    """``[prompts]``: the groups of each class dealt out in turn."""
    of_group: dict[int, int] = {}
    for label in np.unique(labels):
        for turn, group in enumerate(dict.fromkeys(groups[labels == label].tolist())):
            of_group.setdefault(group, turn % folds)
    return np.array([of_group[group] for group in groups.tolist()])


def _dual(
    cosines: np.ndarray, labels: np.ndarray, rows: np.ndarray, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression on indicators of the classes, solved among the prompts.

    They are fewer than the features.

    Returns:
        ``[rows, classes]`` by which centred features are summed up to weights, and
        ``[classes]``, each class's share.
    """
    wanted = np.eye(labels.max() + 1)[labels[rows]]
    share = wanted.mean(axis=0)
    kernel = cosines[np.ix_(rows, rows)]
    kernel = kernel - kernel.mean(axis=0)
    kernel = kernel - kernel.mean(axis=1, keepdims=True)
    return np.linalg.solve(kernel + ridge * np.eye(len(rows)), wanted - share), share


def _held_out(
    cosines: np.ndarray, labels: np.ndarray, fold: np.ndarray, ridge: float
) -> np.ndarray:
    """``[prompts, classes]``: scores from what the other folds' prompts taught.

    Where all prompts are near-equal there is nothing to learn from: all are 0.
    """
    scores = np.zeros((len(labels), labels.max() + 1))
    for number in np.unique(fold):
        test, rows = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if not len(rows):
            continue
        dual, share = _dual(cosines, labels, rows, ridge)
        across, within = cosines[np.ix_(test, rows)], cosines[np.ix_(rows, rows)]
        centred = across - within.mean(axis=0)
        centred = centred - centred.mean(axis=1, keepdims=True)
        scores[test] = centred @ dual + share
    return scores


def _sharpness(scores: np.ndarray, labels: np.ndarray) -> float:
    """The factor of the scores with the likeliest softmax on prompts held out.

    Targets are smoothed by the number of prompts, so that a few that were all right
    don't make it certain (Platt 1999, "Probabilistic outputs for support vector
    machines", section 2.2).
    """
    count, classes = scores.shape
    smooth = 1 / (count + 2)
    targets = np.full(scores.shape, smooth / (classes - 1))
    targets[np.arange(count), labels] = 1 - smooth

    def loss(factor: float) -> float:
        logits = factor * (scores - scores.max(axis=1, keepdims=True))
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -float((targets * logs).sum())

    return float(min(np.geomspace(0.5, 100.0, 60), key=loss))


def _likeness(
    cosines: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """``[prompts, classes]``: cosines to the mean of a class's prompts of other groups.

    NaN where there are none.
    """
    found = np.full((len(labels), labels.max() + 1), np.nan)
    member = np.eye(found.shape[1])[labels]
    sums = cosines @ member  # of a prompt's cosines to each class
    squares = (member * sums).sum(axis=0)  # length of each class's sum, squared
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        own, among = member[rows], cosines[np.ix_(rows, rows)] @ member[rows]
        count = member.sum(axis=0) - own.sum(axis=0)
        numerator = sums[rows] - among
        left = squares - 2 * (own * sums[rows]).sum(axis=0) + (own * among).sum(axis=0)
        found[np.ix_(rows, count > 0)] = numerator[:, count > 0] / np.sqrt(
            left[count > 0]
        )
    return found


def _typical(
    likeness: np.ndarray, labels: np.ndarray, unlike_share: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Of each class's prompts the likeness to the others, mean and standard deviation
    ``[classes]``; and how many deviations below the mean ``unlike_share`` of them lie.
    """
    own = likeness[np.arange(len(labels)), labels]
    known = ~np.isnan(own)
    classes = likeness.shape[1]
    if not known.any():  # without two prompts of a class anything is like it
        return np.zeros(classes), np.ones(classes), 0.0
    of_class = [own[(labels == index) & known] for index in range(classes)]
    average = np.array([v.mean() if len(v) else own[known].mean() for v in of_class])
    counts = np.array([len(values) for values in of_class])
    variances = np.array([v.var(ddof=1) if len(v) > 1 else 0.0 for v in of_class])
    several = counts > 1
    pooled = variances[several].mean() if several.any() else 0.01
    # A class counts the others' variance like four prompts of its own.
    shared = (counts * variances + 4 * pooled) / (counts + 4)
    spread = np.sqrt(np.maximum(shared, 1e-6))
    deviations = (own - average[labels])[known] / spread[labels][known]
    return average, spread, float(np.quantile(deviations, unlike_share))
