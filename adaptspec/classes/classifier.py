"""Discovered classes of prompts: cheap features, and a tree of questions about them.

What `tune --classes auto` learnt is kept as plain numbers, so that choosing a class at
run time needs nothing but comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from adaptspec.classes.text_features import FEATURES, features
from adaptspec.errors import AdaptSpecError

KEY = "classifier"
FORMAT = 1
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Question:
    """An inner node: whether a feature is at most a threshold, and where to go on.

    Args:
        yes: Index of a later question, or ``-1 - class``.
        no: The same where the feature is above.
    """

    feature: int
    threshold: float
    yes: int
    no: int


@dataclass(frozen=True)
class Classifier:
    """A decision tree over :data:`FEATURES` of the text.

    Args:
        names: Of the classes.
        questions: The first is asked first; without any there is one class.
        low: ``[features]``: a prompt with less of one than this is ``unknown``.
        high: ``[features]``: or with more.
        seconds: What classifying a prompt takes, measured.
    """

    names: Sequence[str]
    questions: Sequence[Question]
    low: Sequence[float]
    high: Sequence[float]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        width = len(FEATURES)
        targets = [
            (index, after)
            for index, question in enumerate(self.questions)
            for after in (question.yes, question.no)
        ]
        if (
            not self.names
            or len(set(self.names)) != len(self.names)
            or UNKNOWN in self.names
            or len(self.low) != width
            or len(self.high) != width
            or not all(math.isfinite(value) for value in (*self.low, *self.high))
            or not all(math.isfinite(asked.threshold) for asked in self.questions)
            or not 0 <= self.seconds < math.inf
            or not all(0 <= question.feature < width for question in self.questions)
            # Later questions only, so that every way ends.
            or not all(
                index < after < len(self.questions) or 0 <= -1 - after < len(self.names)
                for index, after in targets
            )
        ):
            raise AdaptSpecError(
                "a classifier needs classes of different names, questions about "
                f"{width} features, with finite thresholds, that lead to later ones or "
                "to a class, and finite bounds of each feature"
            )

    def classify(self, text: str) -> str:
        """The class of a prompt's text, or ``unknown``."""
        found = features(text)
        if not all(
            low <= value <= high
            for low, value, high in zip(self.low, found, self.high, strict=True)
        ):
            return UNKNOWN
        at = 0 if self.questions else -1
        while at >= 0:
            question = self.questions[at]
            yes = found[question.feature] <= question.threshold
            at = question.yes if yes else question.no
        return self.names[-1 - at]

    def describe(self) -> list[str]:
        """Each class in words: the answers that lead to it."""
        told: dict[str, str] = {}

        def follow(at: int, answers: list[str]) -> None:
            if at < 0:
                told[self.names[-1 - at]] = " and ".join(answers) or "every prompt"
                return
            asked = self.questions[at]
            name, bound = FEATURES[asked.feature], f"{asked.threshold:.3g}"
            follow(asked.yes, [*answers, f"{name} <= {bound}"])
            follow(asked.no, [*answers, f"{name} > {bound}"])

        follow(0 if self.questions else -1, [])
        return [f"{name}: {told[name]}" for name in self.names if name in told]

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {
            "format": FORMAT,
            "features": list(FEATURES),
            "names": list(self.names),
            "questions": [
                [asked.feature, asked.threshold, asked.yes, asked.no]
                for asked in self.questions
            ],
            "low": list(self.low),
            "high": list(self.high),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Classifier:
        """The classifier that a record holds.

        Raises:
            AdaptSpecError: if it isn't one, or of other features.
        """
        try:
            if record["format"] != FORMAT or record["features"] != list(FEATURES):
                raise AdaptSpecError(
                    "the stored classifier is another version's; run tune again"
                )
            return cls(
                [str(name) for name in record["names"]],
                [
                    Question(index(feature), float(threshold), index(yes), index(no))
                    for feature, threshold, yes, no in record["questions"]
                ],
                [float(value) for value in record["low"]],
                [float(value) for value in record["high"]],
                float(record["seconds"]),
            )
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise AdaptSpecError(f"not a stored classifier: {error!r}") from None
