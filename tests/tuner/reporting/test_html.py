"""``adaptspec report``: figures from the store, in three forms, whatever is in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adaptspec.cli import build_cli
from adaptspec.colours import contrast
from adaptspec.errors import ProfileStoreError
from adaptspec.host import Host
from adaptspec.model.hardware_costs import ForwardCosts, HardwareCosts, store_costs
from adaptspec.profile import PLAIN, Profile, ProfileStore, Trial
from adaptspec.testing.stores import example_profile
from adaptspec.workloads import Prompt
from adaptspec_profiles import open_store
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.classes.learn import learn
from adaptspec_tuner.measuring.profiler import Setting
from adaptspec_tuner.records import confirmed_key, predicted_key, replayed_key
from adaptspec_tuner.reporting.html import render
from adaptspec_tuner.reporting.result import told_errors
from adaptspec_tuner.reporting.stored import build
from adaptspec_tuner.reporting.usage import Usage
from decided import keep

HOSTILE = "</script><img src=x onerror=document.title='owned'> [bold] {{ 7*7 }}"
PLACE = example_profile().environment


def profile(name: str, strategy: str, speed: float, **changes: Any) -> Profile:
    ratio = speed / 10
    measurement = replace(
        example_profile().measurement,
        tokens_per_second=speed,
        ratio=ratio,
        interval_low=0.9 * ratio,
        interval_high=1.1 * ratio,
        objective="speed",
    )
    return example_profile(
        prompt_class=name,
        strategy=strategy,
        params={} if strategy == PLAIN else {"k": 4},
        measurement=measurement,
        **changes,
    )


def key(strategy: str) -> str:
    return Setting(strategy, {} if strategy == PLAIN else {"k": 4}).key


def filled(store: ProfileStore, name: str = "chat") -> ProfileStore:
    """A run of two classes: in one ``a`` wins, in the other nothing does."""
    keep(
        store,
        [
            profile(name, PLAIN, 10.0),
            profile(name, "a", 20.0),
            profile(name, "b", 15.0),
            profile("maths", PLAIN, 10.0),
            profile("maths", "a", 9.0),
        ],
    )
    store.put_record("r1", "spent", {"seconds": 60.0, "parts": {"trials": 60.0}})
    store.put_record(
        "r1",
        replayed_key(name, "a"),
        {
            "trials": [
                {"number": 0, "params": {"k": 4}, "state": "complete", "ratio": 2.5},
                {"number": 1, "params": {"k": 5}, "state": "pruned", "ratio": 0.5},
            ]
        },
    )
    store.put_record("r1", predicted_key(name), {key("a"): 2.2, key("b"): 1.2})
    store.put_record(
        "r1",
        confirmed_key(name),
        {
            "prompts": {
                "p1": {key(PLAIN): [10.0], key("a"): [40.0], key("b"): [20.0, 10.0]},
                "p2": {key(PLAIN): [10.0], key("a"): [10.0], key("b"): [15.0]},
            },
            "positions": {key("a"): [[8, 10], [2, 4], [0, 0]]},
        },
    )
    store.add_trial(
        Trial("r1", name, "a", 0, {"k": 4}, "complete", 20.0, {"ratio": 1.9})
    )
    store.add_trial(
        Trial("r1", name, "a", 1, {"k": 9}, "failed", None, {"error": name})
    )
    line = [0.01, 0.02]
    costs = ForwardCosts([128], [1, 4], [line])
    store_costs(store, PLACE, HardwareCosts(costs, None, "2026-01-01", 1.0))
    return store


def test_every_figure_is_worked_out_from_what_is_stored() -> None:
    report = build(filled(MemoryStore()))
    chat, maths = report.classes
    assert (chat.name, chat.choice.strategy, maths.choice.strategy) == (
        "chat",
        "a",
        PLAIN,
    )
    assert "2.00x plain decoding" in chat.choice.reason
    # 50 ms a token saved in chat, nothing in maths.
    assert chat.saved == pytest.approx(0.05)
    assert maths.saved == 0
    assert report.break_even == pytest.approx(60 / 0.025)
    # 2.2/2 - 1 = 10%, 1.2/1.5 - 1 = -20%.
    assert report.prediction_error == pytest.approx(0.15)
    off = {row.strategy: row.prediction_error for row in chat.rows}
    assert off == {PLAIN: None, "a": pytest.approx(0.1), "b": pytest.approx(-0.2)}
    # a: sqrt(4 * 1), b: sqrt(1.5 * 1.5); by prompt 4 and 1.5.
    assert chat.oracle is not None
    assert chat.oracle.strategy == "a"
    assert chat.oracle.fixed == pytest.approx(2.0)
    assert chat.oracle.best == pytest.approx(6**0.5)
    assert chat.oracle.gap == pytest.approx(6**0.5 / 2 - 1)
    assert maths.oracle is None
    rows = {row.strategy: row for row in chat.rows}
    assert rows["a"].positions == [0.8, 0.5]
    assert rows["a"].interval == pytest.approx((1.8, 2.2))
    assert report.costs["target"]["milliseconds"] == [[10.0, 20.0]]
    measured = [t for t in chat.tried if not t.replayed]
    assert [t.error for t in measured] == [None, "chat"]
    replayed = [t for t in chat.tried if t.replayed]
    assert [(t.strategy, t.number, t.state, t.ratio) for t in replayed] == [
        ("a", 0, "complete", 2.5),
        ("a", 1, "pruned", 0.5),
    ]
    # 30 s are chat's part, at 50 ms a token.
    assert report.own_break_even(chat) == pytest.approx(600)
    assert report.own_break_even(maths) is None
    said = render(report)
    assert "2.20 (+10.0%)" in said
    assert "1.20 (-20.0%)" in said
    assert "predictions of 2 confirmed settings were off by 15.0% (median)." in said
    assert "Without a prediction: a (" in said  # in maths
    assert "a, replayed" in said
    assert "repaid after 600 tokens of this class" in said
    assert "2 replayed against recorded answers" in said


def test_the_report_says_how_well_the_class_of_a_prompt_is_told() -> None:
    store = filled(MemoryStore())
    prompts = [
        Prompt(str(i), name, text)
        for name, text in (("chat", "how are you"), ("maths", "1 + 2 = 3"))
        for i in range(3)
    ]
    found = learn(prompts)
    assert found is not None
    store.put_record("r1", "classifier", found.as_json())
    report = build(store)
    assert report.classifier is not None
    assert report.classifier["prompts"] == 6
    assert report.classifier["accuracy"] == found.evidence.accuracy
    assert "6 prompts held out in turn" in render(report)
    store.put_record("r1", "classifier", {"format": 99})
    assert build(store).classifier is None


def test_predictions_of_settings_that_changed_outputs_are_told_apart() -> None:
    errors = [(0.1, True), (-0.02, True), (0.5, False)]
    said = told_errors(errors)
    assert "3 confirmed settings were off by 10.0% (median)" in said
    assert "of the 2 whose outputs were identical on every prompt by 6.0%" in said
    assert told_errors([]) == ""


def test_the_newest_run_is_shown_and_any_other_on_demand() -> None:
    store = filled(MemoryStore())
    later = example_profile().created.replace(year=2030)
    keep(store, [profile("chat", PLAIN, 10.0, run="r2", created=later)])
    assert build(store).run == "r2"
    assert build(store, "r1").run == "r1"
    with pytest.raises(ProfileStoreError, match=r"no run 'r3'; it has r2, r1"):
        build(store, "r3")
    with pytest.raises(ProfileStoreError, match="adaptspec tune"):
        build(MemoryStore())


def test_only_what_was_confirmed_last_stands_beside_a_choice() -> None:
    store = MemoryStore()
    then = example_profile().created
    now = then.replace(year=2031)
    keep(store, [profile("chat", PLAIN, 10.0), profile("chat", "b", 99.0)])
    again = [
        profile("chat", s, v, created=now) for s, v in ((PLAIN, 10.0), ("a", 20.0))
    ]
    keep(store, again)
    assert len(store.profiles()) == 3
    (chat,) = build(store).classes
    assert {p.strategy for p in chat.profiles} == {PLAIN, "a"}


def test_what_was_not_recorded_is_said_to_be_missing() -> None:
    store = MemoryStore()
    keep(store, [profile("chat", PLAIN, 10.0), profile("chat", "a", 20.0)])
    report = build(store)
    assert report.break_even is report.prediction_error is None
    page = render(report)
    for said in ("Not recorded", "What tuning took was not recorded", "No trial"):
        assert said in page


def test_lossy_results_and_other_engines_are_labelled_in_every_form() -> None:
    store = filled(MemoryStore())
    store.add_profiles(
        [
            profile("chat", "wrong", 50.0, lossless=False),
            profile("chat", "hf", 12.0, baseline=True),
        ]
    )
    report = build(store)
    assert report.classes[0].choice.strategy == "a"
    page = render(report)
    assert "wrong (NOT LOSSLESS)" in page
    assert "hf (baseline)" in page
    named = re.findall(r">(wrong|hf)( \([^<]*)?<", page)
    marks = {mark.strip() for _, mark in named}
    assert marks == {"(NOT LOSSLESS)", "(baseline)"}
    data = {row["strategy"]: row for row in report.as_json()["classes"][0]["results"]}
    assert data["wrong"]["lossless"] is False
    assert data["hf"]["baseline"] is True


@pytest.fixture
def db(tmp_path: Path) -> str:
    path = str(tmp_path / "p.db")
    store = open_store(path)
    filled(store, HOSTILE)
    store.close()
    return path


def test_the_command_prints_a_table_json_or_writes_a_page(
    db: str, tmp_path: Path
) -> None:
    def run(*arguments: str) -> Any:
        commands = build_cli(Host.installed())
        return CliRunner().invoke(commands, ["report", "--db", db, *arguments])

    table = run()
    assert table.exit_code == 0, table.output
    assert "repaid after 2,400 tokens" in table.stdout
    assert "[bold]" in table.stdout
    assert "-20.0%" in table.stdout
    data = json.loads(run("--json").stdout)
    assert data["classes"][0]["class"] == HOSTILE
    assert data["classes"][0]["results"][0]["prediction_error"] == pytest.approx(0.1)
    assert data["classes"][0]["oracle"]["gap"] == pytest.approx(6**0.5 / 2 - 1)
    page = tmp_path / "r.html"
    assert run("-o", str(page)).exit_code == 0
    assert page.stat().st_size > 10_000
    assert data["said"][0] in page.read_text(encoding="utf-8")
    nowhere = run("-o", str(tmp_path / "no" / "r.html"))
    assert nowhere.exit_code != 0
    assert "give another path" in str(nowhere.output) + str(nowhere.exception)


def test_the_page_needs_nothing_from_elsewhere_and_names_stay_text(db: str) -> None:
    store = open_store(db)
    page = render(build(store))
    store.close()
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert not re.search(r"@import|url\(", page)
    assert "<script" not in page
    assert HOSTILE not in page
    assert "<img" not in page
    assert "49" not in re.findall(r"\[bold\] (\S+)", page)


def styles(page: str) -> dict[str, dict[str, str]]:
    """By day and by night: the page's colours by name."""
    rules = re.findall(r"(@media[^{]*dark[^{]*\{\s*)?:root \{([^}]*)\}", page)
    found: dict[str, dict[str, str]] = {"day": {}, "night": {}}
    for dark, rule in rules:
        colours = re.findall(r"--([\w]+): (#[0-9a-f]{6});", rule)
        found["night" if dark else "day"].update(colours)
    return found


@pytest.mark.parametrize("time", ["day", "night"])
def test_texts_and_graphics_have_the_contrast_of_wcag_aa(time: str) -> None:
    store = filled(MemoryStore())
    page = render(build(store))
    colours = styles(page)[time]
    assert set(colours) >= {"paper", "ink", "soft", "shade", "warn", "line", "c0", "c7"}
    # Whatever colours a text, it does so by one of these variables.
    css = page.split("<style>")[1].split("</style>")[0]
    inks = set(re.findall(r"(?:[ {;]color|fill): var\(--(\w+)\)", css))
    papers = set(re.findall(r"background: var\(--(\w+)\)", css)) - {"ink"}
    assert inks == {"ink", "soft", "warn"}
    assert papers == {"paper", "shade"}
    assert not re.findall(r"(?:[ {;]color|fill): #", css)
    for ink in inks:
        for paper in papers:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    data = [value for name, value in colours.items() if re.fullmatch(r"c\d+", name)]
    assert len(set(data)) == len(data)
    for colour in (*data, colours["soft"]):
        assert contrast(colour, colours["paper"]) >= 3


@pytest.mark.slow
def test_a_long_run_of_many_strategies_stays_below_a_megabyte() -> None:
    store = MemoryStore()
    names = [f"a_strategy_{number}" for number in range(14)]
    for number in range(8):
        name = f"class {number}"
        store.add_profiles(
            [profile(name, strategy, 10.0 + i) for i, strategy in enumerate(names)]
            + [profile(name, PLAIN, 10.0)]
        )
        for strategy in names:
            for trial in range(40):
                params = {f"parameter_{i}": trial for i in range(6)}
                detail = {"ratio": 1.0 + trial / 7}
                store.add_trial(
                    Trial("r1", name, strategy, trial, params, "complete", 1.0, detail)
                )
            trials = [
                {"number": i, "params": {}, "state": "complete", "ratio": 1 + i / 7}
                for i in range(100)
            ]
            store.put_record("r1", replayed_key(name, strategy), {"trials": trials})
    page = render(build(store))
    assert len(page.encode()) < 1_000_000
    used = set(re.findall(r"background: var\(--(c\d+)\)", page))
    assert len(used) == len(names)  # a colour for each
    assert used <= set(styles(page)["day"])


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1100])
def test_a_browser_shows_the_page_without_scrolling_sideways(
    db: str, tmp_path: Path, width: int
) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium isn't installed")
    store = open_store(db)
    page = render(replace(build(store), usage=Usage("m" * 99)))
    store.close()
    # A headless window is 500 wide at least: the page is shown in a narrower frame.
    frame = tmp_path / "frame.html"
    (tmp_path / "r.html").write_text(page, encoding="utf-8")
    frame.write_text(
        f"""<iframe id=f src=r.html width={width} height=900 frameborder=0></iframe>
        <script>f.onload = () => {{
          const d = f.contentDocument, e = d.documentElement;
          const texts = [...d.querySelectorAll('figure svg text')];
          const heights = texts.map(t => t.getBoundingClientRect().height);
          document.body.dataset.found = JSON.stringify({{
            title: d.title, wide: e.scrollWidth, least: Math.min(...heights),
            charts: d.querySelectorAll('figure > svg').length}})
        }}</script>"""
    )
    shown = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--disable-quic", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=10000"),
            *("--window-size=1200,1000", "--allow-file-access-from-files"),
            *("--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    (data,) = re.findall(r'data-found="([^"]*)"', shown)
    found = json.loads(unescape(data))
    assert found["title"] == f"AdaptSpec: {PLACE.model_name}"
    assert found["wide"] <= width
    assert found["charts"] == 4
    assert found["least"] >= 9  # pixels of the smallest text of a chart
