"""What `tune` prints: sentences first, then a table that fits, then what to type."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from adaptspec.profile import EVERY_CLASS, PLAIN, Profile
from adaptspec.selector import Choice
from adaptspec.testing.stores import example_profile
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.reporting import sentences
from adaptspec_tuner.reporting.result import ClassResult, TuneResult
from adaptspec_tuner.reporting.tables import print_result
from adaptspec_tuner.reporting.usage import Usage

HERE = example_profile().environment
LONG_CLASS = "a class of prompts with a very long name: translation of law texts, x" * 2
LONG_STRATEGY = "a_strategy_of_a_plugin_with_a_name_that_nobody_would_want_to_type"


def profile(name: str, strategy: str, ratio: float, **changes: Any) -> Profile:
    measurement = replace(
        example_profile().measurement,
        tokens_per_second=10 * ratio,
        ratio=ratio,
        interval_low=0.8 * ratio,
        interval_high=1.25 * ratio,
        objective="speed",
    )
    return example_profile(
        prompt_class=name, strategy=strategy, measurement=measurement, **changes
    )


def found(name: str, strategy: str, ratio: float, **changes: Any) -> ClassResult:
    rows = [
        profile(name, PLAIN, 1.0, params={}),
        profile(name, "other", 0.9),
        profile(name, strategy, ratio, **changes),
    ]
    won = rows[2 if ratio > 1 else 0]
    choice = Choice(name, won.strategy, won.params, f"why {won.strategy}")
    return ClassResult(name, choice, tuple(rows[: 2 + (ratio > 1)]))


def result(*classes: ClassResult, **changes: Any) -> TuneResult:
    whole = TuneResult("r", HERE, "mine", "p.db", list(classes), [], {})
    return replace(whole, **changes)


def printed(shown: TuneResult, width: int, terminal: bool = True) -> list[str]:
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        markup=False,
        force_terminal=terminal,
        color_system=None,
        _environ={},
    )
    print_result(shown, console)
    return out.getvalue().splitlines()


FULL = result(
    found("json", "hybrid", 2.125),
    found("maths", PLAIN, 1.0),
    found(LONG_CLASS, LONG_STRATEGY, 8.0, lossless=False),
    usage=Usage("./a model with a long path/that goes on", db="p.db"),
    unavailable={
        "medusa": "it needs heads, which `adaptspec train medusa` trains here"
    },
    spent={"trials": 60.0, "confirming": 30.0},
)


@pytest.mark.parametrize("width", [80, 60])
def test_everything_but_what_is_typed_fits(width: int) -> None:
    lines = printed(FULL, width)
    typed = lines.index("Use it from the command line:")
    assert max(map(cell_len, lines[:typed])) <= max(width, len("Run r, stored in p.db"))
    shown = "\n".join(lines)
    for needed in ("x", "plain", "95% interval", "2.12", "[1.70..2.66]", "json"):
        assert needed in shown
    pressed = "".join(shown.split())  # names may be folded
    assert "".join(LONG_CLASS.split()) in pressed
    assert LONG_STRATEGY in pressed
    command = FULL.usage.command() if FULL.usage else ""
    assert f"  {command}" in lines  # whole, to be copied


def test_what_has_no_room_is_named() -> None:
    narrow, wide = ("\n".join(printed(FULL, width)) for width in (60, 200))
    assert "Left out for want of width: " in narrow
    assert "peak GiB" in narrow
    assert "Left out" not in wide
    assert "predicted" not in wide  # no row has one


def test_it_begins_with_what_was_gained_and_a_sentence_a_class() -> None:
    lines = printed(FULL, 200)
    # (2.125 * 1 * 8) ** (1 / 3)
    assert lines[0] == (
        "With what is chosen, your prompts are decoded 2.57 times as fast as with "
        "plain decoding (geometric mean of 3 classes)."
    )
    assert lines[1] == "json: hybrid, 2.12x [1.70..2.66], 4 prompts"
    assert lines[2] == "maths: plain decoding, 4 prompts"
    assert lines[:3] == sentences.opening(FULL)[:3]
    why = lines.index("Why:")
    assert lines[why + 1] == "  json: why hybrid"
    assert why < next(i for i, line in enumerate(lines) if "class, strategy" in line)


def test_over_all_classes_nothing_is_predicted_and_nothing_is_missed() -> None:
    json = found("json", "hybrid", 4.0)
    rival = json.profiles[2]
    key = Setting(rival.strategy, rival.params).key
    classes = [replace(json, predicted={key: 4.1}), found(EVERY_CLASS, "hybrid", 3.0)]
    lines = sentences.summary(result(*classes, spent={"trials": 60.0}))
    assert any(line.startswith("Replay: its predictions") for line in lines)
    missing = [line for line in lines if line.startswith("Without a prediction")]
    assert "hybrid" not in " ".join(missing)


def test_one_prompt_is_one_prompt_and_without_an_interval_there_is_none() -> None:
    chosen = profile("a", "b", 1.5)
    (name, choice, rows) = ("a", Choice("a", "b", chosen.params, ""), [])
    for strategy in (PLAIN, "b"):
        one = profile("a", strategy, 1.5)
        few = replace(one.measurement, prompts=1, interval_low=None, interval_high=None)
        rows.append(replace(one, measurement=few))
    assert sentences.sentence(ClassResult(name, choice, tuple(rows))) == (
        "a: b, 1.50x, 1 prompt"
    )


def test_a_choice_of_an_earlier_run_that_stays_is_named() -> None:
    kept = found("json", "hybrid", 2.0)
    kept = replace(kept, choice=Choice("json", "suffix", {}, "better", True, "r7"))
    assert sentences.sentence(kept) == "json: suffix, kept from run r7, 4 prompts"
    assert "earlier runs" in sentences.gain(result(kept))
    assert "times as fast" in sentences.gain(result(kept, found("a", "hybrid", 2.0)))


def test_where_nothing_is_faster_it_says_so() -> None:
    lines = printed(result(found("maths", PLAIN, 1.0), usage=Usage()), 80)
    assert lines[0] == (
        "Nothing was reliably faster than plain decoding, so that is chosen."
    )
    assert "  adaptspec generate 'Your prompt'" in lines


def test_the_result_over_all_classes_is_no_class_of_its_own() -> None:
    classes = [found("json", "hybrid", 4.0), found(EVERY_CLASS, "hybrid", 3.0)]
    shown = result(*classes, spent={"trials": 60.0})
    assert sentences.opening(shown) == [
        "With what is chosen, your prompts are decoded 4.00 times as fast as with "
        "plain decoding.",
        "all classes: hybrid, 3.00x [2.40..3.75], 4 prompts",
        "json: hybrid, 4.00x [3.20..5.00], 4 prompts",
    ]
    alone = result(classes[0], spent={"trials": 60.0})
    assert shown.break_even == alone.break_even
    assert shown.own_break_even(classes[1]) is None
    assert "*" not in "\n".join(printed(shown, 80))


def test_only_parameters_that_differ_from_the_defaults_are_shown() -> None:
    usual = {"k": 4, "stop": 0.5, "policy": "recent"}
    shown = result(found("json", "hybrid", 2.0), defaults={"hybrid": usual})
    lines = printed(shown, 80)
    at = lines.index("Parameters that differ from the defaults:")
    assert lines[at + 1] == "  json, hybrid: stop=0.25 on=True"
    (row,) = [row for row in shown.classes[0].rows if row.strategy == "hybrid"]
    assert shown.changed(row.strategy, row.profile.params) == {"stop": 0.25, "on": True}
    data = sentences.as_json(shown)["classes"][0]["results"]
    assert [r["changed"] for r in data if r["strategy"] == "hybrid"] == [
        {"stop": 0.25, "on": True}
    ]


def test_what_to_type_next_needs_no_class() -> None:
    shown = result(
        found("json", "hybrid", 2.0), found("code", "suffix", 3.0), usage=Usage("m")
    )
    data = sentences.as_json(shown)
    assert data["said"] == sentences.opening(shown)
    assert data["next"]["command"] == Usage("m").command()
    assert data["next"]["command"] in "\n".join(printed(shown, 200))


def test_a_pipe_gets_whole_sentences() -> None:
    lines = printed(FULL, 40, terminal=False)
    assert "With what is chosen" in lines[0]
    assert lines[0].endswith("classes).")
