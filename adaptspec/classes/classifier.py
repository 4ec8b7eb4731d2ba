"""Tells the class of a prompt by its text, or that it is like none of the classes.

A linear model on :func:`~adaptspec.classes.text_features.features` scores each class
(regularised least squares: Rifkin and others 2003, "Regularized least-squares
classification"). A softmax makes probabilities of the scores, its sharpness fitted to
prompts held out (Guo and others 2017, "On calibration of modern neural networks"). A
prompt that is less like its class than the class's own prompts are belongs to none.
Learning it is the tuner's; using it needs numpy alone.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptspec.classes.text_features import FEATURES, features
from adaptspec.errors import AdaptSpecError

if TYPE_CHECKING:
    from adaptspec.profile import ClassChoice, ProfileStore

KEY = "classifier"  # of a run's record
FORMAT = 2


@dataclass(frozen=True)
class Told:
    """What is told of a prompt.

    Args:
        likeliest: The class with the highest score.
        confidence: Its probability, fitted to prompts held out in learning.
        like: Whether the prompt is like that class's prompts at all.
        sure: Whether the confidence suffices.
    """

    likeliest: str
    confidence: float
    like: bool
    sure: bool

    @property
    def prompt_class(self) -> str | None:
        """The class, None where it isn't sure or the prompt is like none."""
        return self.likeliest if self.like and self.sure else None

    @property
    def reason(self) -> str:
        """How it was told, in words."""
        if not self.like:
            return "the prompt is unlike any that was tuned on"
        how = f"{self.likeliest!r}, {self.confidence:.0%} sure"
        if not self.sure:
            return f"the prompt's class isn't clear from its text (at best {how})"
        return f"class told from the text: {how}"


@dataclass(frozen=True)
class Evidence:
    """How good a classifier is, by cross-validation.

    Near-equal prompts are held out together.

    Args:
        prompts: How many it was learnt from.
        accuracy: Share of them whose likeliest class was right when held out.
        told: Share that was given a class when held out, sure and like it.
        told_accuracy: Share of those that were given the right one; 0 if none were.
        seconds: Median time that telling a prompt's class took.
    """

    prompts: int
    accuracy: float
    told: float
    told_accuracy: float
    seconds: float

    def describe(self) -> str:
        """The same as sentences."""
        return (
            f"A prompt's class is told from its text in {1e3 * self.seconds:.2f} ms: "
            f"the likeliest class was right for {self.accuracy:.0%} of "
            f"{self.prompts} prompts held out in turn; {self.told:.0%} were sure "
            f"enough to be given it, {self.told_accuracy:.0%} of them rightly. A "
            "prompt that is given none is decoded by the choice over all classes."
        )


@dataclass(frozen=True, eq=False)
class Classifier:
    """Scores of classes, and how like its own prompts a class's prompts are.

    Likeness is the cosine between a prompt's features and its class's mean.

    Args:
        names: Of the classes, two or more.
        weights: ``[FEATURES, classes]``: a score is the sum of features times weights
            and the offset.
        offsets: ``[classes]``.
        sharpness: By which scores are multiplied before the softmax.
        means: ``[FEATURES, classes]``, each class's of length 1.
        likeness: ``[classes]``: mean likeness of a class's own prompts to the others.
        spread: ``[classes]``: its standard deviation.
        unlike: Standard deviations from the mean below which a prompt is like none.
        sure: Probability from which the likeliest class is used.
        evidence: How good it is.

    Raises:
        AdaptSpecError: if these don't fit each other.
    """

    names: Sequence[str]
    weights: np.ndarray
    offsets: np.ndarray
    sharpness: float
    means: np.ndarray
    likeness: np.ndarray
    spread: np.ndarray
    unlike: float
    sure: float
    evidence: Evidence

    def __post_init__(self) -> None:
        classes = len(self.names)
        tables, rows = (FEATURES, classes), (classes,)
        arrays = (self.weights, self.means, self.offsets, self.likeness, self.spread)
        if (
            classes < 2
            or len(set(self.names)) != classes
            or [array.shape for array in arrays] != [tables, tables, rows, rows, rows]
            or not all(np.isfinite(array).all() for array in arrays)
            or not all(map(math.isfinite, (self.sharpness, self.unlike, self.sure)))
            or not (self.spread > 0).all()
        ):
            raise AdaptSpecError(
                "a classifier needs two classes or more of different names, finite "
                f"weights and means of {FEATURES} features for each, and positive "
                f"spreads; got {classes} classes; run tune again"
            )

    def tell(self, text: str) -> Told:
        """What class the text of a prompt is of."""
        return self.tell_vector(features(text))

    def tell_vector(self, vector: np.ndarray) -> Told:
        """The same from ``[FEATURES]`` features."""
        scores = self.sharpness * (vector @ self.weights + self.offsets)
        best = int(scores.argmax())
        confidence = 1 / float(np.exp(scores - scores[best]).sum())
        likeness = float(vector @ self.means[:, best]) - self.likeness[best]
        like = bool(likeness >= self.unlike * self.spread[best])
        return Told(self.names[best], confidence, like, confidence >= self.sure)

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads: numbers, no text of any prompt."""
        return {
            "format": FORMAT,
            "names": list(self.names),
            "weights": _packed(self.weights),
            "offsets": self.offsets.tolist(),
            "sharpness": self.sharpness,
            "means": _packed(self.means),
            "likeness": self.likeness.tolist(),
            "spread": self.spread.tolist(),
            "unlike": self.unlike,
            "sure": self.sure,
            "evidence": dict(vars(self.evidence)),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Classifier:
        """The classifier that a record holds.

        Raises:
            AdaptSpecError: if it isn't one, or another version's.
        """
        try:
            if record["format"] != FORMAT:
                raise AdaptSpecError(
                    "the stored classifier is another version's; run tune again"
                )
            names = [str(name) for name in record["names"]]
            return cls(
                names,
                _unpacked(record["weights"], len(names)),
                np.array(record["offsets"], np.float32),
                float(record["sharpness"]),
                _unpacked(record["means"], len(names)),
                np.array(record["likeness"], np.float32),
                np.array(record["spread"], np.float32),
                float(record["unlike"]),
                float(record["sure"]),
                Evidence(**record["evidence"]),
            )
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            if isinstance(error, AdaptSpecError):
                raise
            raise AdaptSpecError(f"not a stored classifier: {error!r}") from None


def stored_record(
    store: ProfileStore, choices: Iterable[ClassChoice]
) -> Mapping[str, Any] | None:
    """The record of the classifier that is used, of the runs that made ``choices``;
    None where none of them learnt one."""
    runs = {choice.run: (choice.created, choice.pinned) for choice in choices}
    records = [
        (runs[run][1], record)
        for run in sorted(runs, key=lambda run: (runs[run][0], run))
        if (record := store.record(run, KEY)) is not None
    ]
    return best_record(records) if records else None


def best_record(
    records: Sequence[tuple[bool, Mapping[str, Any]]],
) -> Mapping[str, Any]:
    """The record of the classifier that is used, of those of several runs.

    A pinned run's counts before all others. Then it is the newest of those that know at
    least half as many classes, and were learnt from at least half as many prompts, as
    the best: a tune of few prompts, to see whether things work, replaces nothing.

    Args:
        records: Whether the run is pinned, and what :meth:`Classifier.as_json` made;
            the oldest first, one or more. Of no account are those that can't be read.
    """
    kept = [record for pinned, record in records if pinned]
    kept = kept or [record for _, record in records]
    for size in (_classes, _prompts):
        most = max(map(size, kept))
        kept = [record for record in kept if 2 * size(record) >= most]
    return kept[-1]


def _classes(record: Mapping[str, Any]) -> int:
    names = record.get("names")
    readable = record.get("format") == FORMAT and isinstance(names, list)
    return len(names) if readable and names else 0


def _prompts(record: Mapping[str, Any]) -> int:
    evidence = record.get("evidence")
    count = evidence.get("prompts") if isinstance(evidence, dict) else None
    return count if isinstance(count, int) else 0


def _packed(table: np.ndarray) -> str:
    """Half-precision numbers as text: a class takes 33 kilobytes."""
    return base64.b64encode(table.astype("<f2").tobytes()).decode()


def _unpacked(text: str, classes: int) -> np.ndarray:
    """``[FEATURES, classes]`` float32."""
    raw = base64.b64decode(text, validate=True)
    return np.frombuffer(raw, "<f2").astype(np.float32).reshape(FEATURES, classes)
