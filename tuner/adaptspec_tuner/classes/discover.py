"""Classes discovered from the prompts, as many as pay on prompts held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from adaptspec.classes.classifier import UNKNOWN, Classifier, Question
from adaptspec.classes.text_features import features, prompt_text
from adaptspec.params import DraftingParams
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Measurer, Setting
from adaptspec_tuner.searching.space import defaults

if TYPE_CHECKING:
    import numpy as np

    from adaptspec.strategy import Strategy
    from adaptspec.workloads import Prompt, Workload

MOST = 8
FEWEST = 4  # prompts of a class, of those that it is learnt from
FOLDS = 5
WORTH = 0.01  # of speed: what further classes must add on held-out prompts
MARGIN = 0.5  # of a feature's span, beyond which a prompt is like none that was seen

# Prompt id -> setting -> ratio to plain decoding.
Gains = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Discovery:
    """What was found.

    Args:
        gains: Number of classes -> mean ratio to plain decoding on held-out prompts,
            with the setting that was best for the class's other prompts.
    """

    classifier: Classifier
    gains: Mapping[int, float]


def discover(prompts: Sequence[Prompt], gains: Gains, seed: int = 0) -> Discovery:
    """Part ``prompts`` by cheap features into as many classes as pay.

    A regression tree on the logarithms of the settings' ratios puts prompts together
    that the same settings speed up. For each number of leaves the prompts are divided
    into folds: tree and best settings come from the other folds, and what these gain on
    the fold's prompts is averaged (geometric mean). More classes must add 1%, and more
    than the standard error of what they add (Breiman and others 1984, Classification
    and Regression Trees, 3.4.3). The same input and seed give the same classes.

    Args:
        gains: Settings missing from a prompt count as plain decoding there.
    """
    import numpy as np

    table = np.array([features(_text(prompt)) for prompt in prompts])
    settings = sorted({name for found in gains.values() for name in found})
    ratios = [
        [gains.get(p.id, {}).get(name, 1.0) for name in settings] + [1.0]
        for p in prompts
    ]
    logs = np.log(np.maximum(np.array(ratios), 1e-6))
    most = min(MOST, len(prompts) // (2 * FEWEST)) if settings else 1
    held_out = {
        count: _held_out(table, logs, count, seed)
        for count in range(1, max(1, most) + 1)
    }
    best = 1
    for count, values in held_out.items():
        more = values - held_out[best]
        error = float(more.std()) / math.sqrt(len(more))
        if more.mean() > max(math.log(1 + WORTH), error):
            best = count
    unmeasured = _classifier(table, _tree(table, logs, best, seed))
    times = []
    for prompt in prompts:
        started = perf_counter()
        unmeasured.classify(_text(prompt))
        times.append(perf_counter() - started)
    found = {count: math.exp(values.mean()) for count, values in held_out.items()}
    return Discovery(replace(unmeasured, seconds=median(times)), found)


def classified(workload: Workload, classifier: Classifier) -> Workload:
    """The workload with the classes that ``classifier`` gives its prompts."""
    return replace(
        workload,
        prompts=tuple(
            replace(p, prompt_class=classifier.classify(_text(p)))
            for p in workload.prompts
        ),
    )


def known_only(
    workload: Workload, classes: Collection[str]
) -> tuple[Workload, list[str]]:
    """Without prompts that are ``unknown`` or of none of ``classes``.

    Returns:
        The others, and the ids of those left out.
    """
    kept = set(classes) - {UNKNOWN}
    known = tuple(p for p in workload.prompts if p.prompt_class in kept)
    left = [p.id for p in workload.prompts if p.prompt_class not in kept]
    return replace(workload, prompts=known), left


def probed(strategy: type[Strategy]) -> list[Setting]:
    """Settings that tell prompts apart: the defaults, and short and long drafts."""
    settings = [defaults(strategy.Params)]
    if issubclass(strategy.Params, DraftingParams):
        specs = {spec.name: spec for spec in strategy.Params.specs()}
        if (tunable := specs["draft_length"].tunable) is not None:
            for bound in (tunable.low, tunable.high):
                if bound is not None:
                    settings.append({**settings[0], "draft_length": int(bound)})
    return [Setting(strategy.name, params) for params in settings]


def replayed_gains(
    replayer: Measurer,
    settings: Sequence[Setting],
    prompts: Sequence[Prompt],
    in_time: Callable[[], bool],
) -> dict[str, dict[str, float]]:
    """Prompt id -> setting key -> predicted ratio to plain decoding.

    A setting that fails or that time ran out for is left out.
    """
    gains: dict[str, dict[str, float]] = {prompt.id: {} for prompt in prompts}
    plain = {p.id: replayer.measure(PLAIN_SETTING, p) for p in prompts}
    for setting in settings:
        replayer.forget()
        try:
            found = {}
            for prompt in prompts:
                if not in_time():
                    return gains
                sample = replayer.measure(setting, prompt)
                found[prompt.id] = sample.gain(plain[prompt.id])
        # A third party's strategy may raise anything; the search will name it.
        except Exception:
            continue
        for key, gain in found.items():
            gains[key][setting.key] = gain
    return gains


def _held_out(table: np.ndarray, logs: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Logarithm of each prompt's ratio, with what the other folds' prompts taught."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(table))
    folds = min(FOLDS, len(table))
    found = np.zeros(len(table))
    for fold in range(folds):
        test = order[fold::folds]
        train = np.setdiff1d(order, test)
        if not len(train):
            break
        tree = _tree(table[train], logs[train], count, seed)
        leaves = tree.apply(table[train])
        for row, leaf in zip(test, tree.apply(table[test]), strict=True):
            best = int(logs[train][leaves == leaf].mean(axis=0).argmax())
            found[row] = logs[row, best]
    return found


def _tree(table: np.ndarray, logs: np.ndarray, count: int, seed: int) -> Any:
    """A fitted regression tree of ``count`` leaves at most."""
    from sklearn.tree import DecisionTreeRegressor

    if count == 1:
        return DecisionTreeRegressor(max_depth=1, min_samples_leaf=len(table)).fit(
            table, logs
        )
    return DecisionTreeRegressor(
        max_leaf_nodes=count, min_samples_leaf=FEWEST, random_state=seed
    ).fit(table, logs)


def _classifier(table: np.ndarray, tree: Any) -> Classifier:
    """A fitted tree as plain numbers; classes are numbered from left to right."""
    nodes = tree.tree_
    names: list[str] = []
    questions: list[Question] = []

    def add(node: int) -> int:
        if nodes.children_left[node] < 0:
            names.append(f"auto-{len(names) + 1}")
            return -len(names)
        at = len(questions)
        questions.append(Question(0, 0.0, -1, -1))  # its place
        feature, threshold = int(nodes.feature[node]), float(nodes.threshold[node])
        yes, no = add(nodes.children_left[node]), add(nodes.children_right[node])
        questions[at] = Question(feature, threshold, yes, no)
        return at

    add(0)
    low, high = table.min(axis=0), table.max(axis=0)
    # A feature that none of the prompts varied in tells nothing of others.
    span = (high - low).clip(min=0.1)
    low, high = low - MARGIN * span, high + MARGIN * span
    return Classifier(names, questions, low.tolist(), high.tolist())


def _text(prompt: Prompt) -> str:
    return prompt_text(prompt.content) or ""
