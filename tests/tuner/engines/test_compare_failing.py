"""What ``adaptspec compare`` keeps and leaves out where settings and engines fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptspec.engines.inference_engine import InferenceEngine
from adaptspec.errors import EngineError
from adaptspec.testing.scripted_engine import Machine, engine_on
from engine_commands import TRUTH, compare


@pytest.mark.parametrize("start", [2.0, 60.0])
def test_a_setting_that_fails_costs_its_own_row_alone(
    workload: Path, start: float
) -> None:
    cls = engine_on(Machine(TRUTH, start=start))
    tried: list[str] = []

    def fails(method: str, params: Any, count: int) -> str | None:
        tried.append(method)
        return "vocabularies differ" if method == "draft" else None

    cls.machine.fails = fails
    told = compare([cls], workload, "--json", "--method", "draft", "--method", "copy")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["left_out"] == {}
    assert [row["way"] for row in found["rows"]] == ["autoregressive", "copy"]
    for row in found["rows"]:
        counts = {name: cell["prompts"] for name, cell in row["cells"].items()}
        assert counts == {"summary": 2, "code": 2}
    why = "scripted ended: vocabularies differ"
    assert f"scripted: draft is left out in summary, code: {why}" in found["notes"]
    # A setting that can't be started is tried once.
    assert tried.count("draft") == 1


@pytest.mark.parametrize("start", [2.0, 60.0])
def test_a_setting_keeps_the_classes_in_which_it_did_not_fail(
    workload: Path, start: float
) -> None:
    class Failing(engine_on(Machine(TRUTH, start=start))):  # type: ignore[misc]
        def answer(self, method: str, params: Any, prompts: Any, most: int) -> Any:
            if method == "copy" and prompts[0].id == "summary/1":
                raise IndexError("of a model")
            return super().answer(method, params, prompts, most)

    told = compare([Failing], workload, "--json", "--method", "copy")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    plain, copy = found["rows"]
    assert set(plain["cells"]) == {"summary", "code"}
    assert set(copy["cells"]) == {"code"}
    assert (plain["ratio"], copy["ratio"]) == (1.0, None)  # some classes tell nothing
    note = "scripted: copy is left out in summary: IndexError: of a model"
    assert note in found["notes"]


def dying(name: str, last: int, *refused: str) -> type[InferenceEngine]:
    """An engine that ends after ``last`` answers, and refuses prompts before."""
    machine = Machine(TRUTH)
    machine.fails = lambda method, params, count: "killed" if count >= last else None

    class Dying(engine_on(machine, name)):  # type: ignore[misc]
        def answer(self, method: str, params: Any, prompts: Any, most: int) -> Any:
            if most != 4 and prompts[0].id in refused:
                raise EngineError("400: too long")
            return super().answer(method, params, prompts, most)

    return Dying


def test_an_engine_that_ends_keeps_the_classes_that_it_went_through(
    workload: Path,
) -> None:
    good = engine_on(Machine(TRUTH), "good")
    # A little answer at the start, two of each class.
    told = compare([dying("dies", 4), good], workload, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["left_out"] == {}
    # The first row, which others are compared with, has all classes.
    assert [row["engine"] for row in found["rows"]] == ["good", "dies"]
    assert [set(row["cells"]) for row in found["rows"]] == [
        {"summary", "code"},
        {"summary"},
    ]
    assert "dies: left out in code: dies ended: killed" in found["notes"]
    # Without a whole class it is left out.
    found = json.loads(compare([dying("dies", 2), good], workload, "--json").stdout)
    assert found["left_out"] == {"dies": "dies ended: killed"}
    assert {row["engine"] for row in found["rows"]} == {"good"}


def test_what_an_engine_refused_counts_where_it_is_compared(workload: Path) -> None:
    good = engine_on(Machine(TRUTH), "good")
    # Refusing costs another little answer.
    first = json.loads(
        compare([dying("dies", 4, "summary/0"), good], workload, "--json").stdout
    )
    rows = {row["engine"]: row["cells"] for row in first["rows"]}
    assert {name: set(cells) for name, cells in rows.items()} == {
        "good": {"summary", "code"},
        "dies": {"summary"},
    }
    assert rows["good"]["summary"]["prompts"] == 1
    # In a class in which it ended what it refused costs the others nothing.
    second = json.loads(
        compare([dying("dies", 4, "code/0"), good], workload, "--json").stdout
    )
    rows = {row["engine"]: row["cells"] for row in second["rows"]}
    assert set(rows["dies"]) == {"summary"}
    assert rows["good"]["code"]["prompts"] == 2
    assert not any("on all engines" in note for note in second["notes"])


@pytest.mark.parametrize("start", [2.0, 60.0])
def test_a_prompt_that_is_refused_takes_none_along_that_are_asked_with_it(
    workload: Path, start: float
) -> None:
    class Refusing(engine_on(Machine(TRUTH, start=start))):  # type: ignore[misc]
        def answer(self, method: str, params: Any, prompts: Any, most: int) -> Any:
            if most != 4 and any(prompt.id == "code/1" for prompt in prompts):
                raise EngineError("400: too long")
            return super().answer(method, params, prompts, most)

    more = ("--concurrency", 4, "--limit", 4, "--method", "copy", "--json")
    told = compare([Refusing], workload, *more)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    for row in found["rows"]:
        counts = {name: cell["prompts"] for name, cell in row["cells"].items()}
        assert counts == {"summary": 4, "code": 3}
    assert [note for note in found["notes"] if "all engines" in note] == [
        "prompt 'code/1' is left out on all engines: scripted: 400: too long"
    ]
