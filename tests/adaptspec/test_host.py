"""The host finds plugins, refuses clashes, and survives broken ones by name."""

from __future__ import annotations

import importlib.metadata
import warnings
from types import SimpleNamespace
from typing import Annotated, Any

import click
import pytest

from adaptspec.errors import (
    PluginConflictError,
    ProfileStoreError,
    UnknownStrategyError,
)
from adaptspec.hookspecs import hookimpl
from adaptspec.host import BLOCK_VARIABLE, Host, PluginWarning
from adaptspec.params import Params, Tunable
from adaptspec.strategy import (
    Baseline,
    BaselineRun,
    Drafter,
    Strategy,
    Target,
)


class Quick(Strategy):
    """A strategy of a plugin."""

    name = "quick"
    summary = "drafts quickly"

    def start(self, target: Target) -> Drafter:
        raise NotImplementedError


class Peer(Baseline):
    """Another engine."""

    name = "peer"
    summary = "another engine"

    def run(self, *args: Any) -> BaselineRun:
        raise NotImplementedError


class Unnamed(Quick):
    """A name that no option can hold."""

    name = "Not A Name"


class Abstract(Strategy):
    """Forgot ``start``."""

    name = "abstract"
    summary = "can't draft"


class BadParams(Params):
    """Tuned without bounds."""

    width: Annotated[int, Tunable()] = 4


class Unbounded(Quick):
    """Its parameters can't be searched."""

    name = "unbounded"
    Params = BadParams


def plugin(*strategies: Any) -> Any:
    """A plugin that brings ``strategies``; an exception among them is raised."""

    class Plugin:
        @hookimpl
        def register_strategies(self) -> list[type[Strategy]]:
            for strategy in strategies:
                if isinstance(strategy, Exception):
                    raise strategy
            return list(strategies)

    return Plugin()


class FullPlugin:
    """Every hook there is."""

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [Quick]

    @hookimpl
    def register_baselines(self) -> list[type[Baseline]]:
        return [Peer]

    @hookimpl
    def register_commands(self, cli: click.Group) -> None:
        cli.add_command(click.Command("greet"))

    @hookimpl
    def open_profile_store(self, url: str | None) -> Any:
        return None if url == "unknown://" else SimpleNamespace(url=url)


def test_a_plugin_brings_strategies_baselines_commands_and_a_store() -> None:
    host = Host({"full": FullPlugin()}, {"full": "1.2"})
    assert dict(host.strategies) == {"quick": Quick}
    assert dict(host.baselines) == {"peer": Peer}
    assert host.origin("quick") == host.origin("peer") == "full"
    group = click.Group()
    host.add_commands(group)
    assert list(group.commands) == ["greet"]
    assert host.open_store("db").url == "db"
    [info] = host.plugins
    assert (info.name, info.version, info.error) == ("full", "1.2", None)
    assert info.hooks == (
        "open_profile_store",
        "register_baselines",
        "register_commands",
        "register_strategies",
    )


def test_a_database_that_no_plugin_opens_is_an_error_with_its_address() -> None:
    with pytest.raises(ProfileStoreError, match="unknown://"):
        Host({"full": FullPlugin()}).open_store("unknown://")


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownStrategyError, match="no strategy 'slow'; known: quick"):
        Host({"one": plugin(Quick)}).strategy("slow")


def test_two_plugins_claiming_one_name_are_both_named() -> None:
    host = Host({"one": plugin(Quick), "two": plugin(Quick)})
    with pytest.raises(PluginConflictError, match="'one' and 'two' both bring 'quick'"):
        _ = host.strategies


@pytest.mark.parametrize(
    ("brought", "reason"),
    [
        (RuntimeError("no GPU"), "RuntimeError: no GPU"),
        (Unnamed, "lower_snake_case, got 'Not A Name'"),
        (Abstract, "Abstract lacks start"),
        (Unbounded, "width: a tuned int needs Tunable"),
        (Peer, "is not a subclass of Strategy"),
        ("quick", "is not a subclass of Strategy"),
    ],
)
def test_a_plugin_that_breaks_its_contract_is_left_out_by_name(
    brought: Any, reason: str
) -> None:
    host = Host({"broken": plugin(brought), "good": plugin(Quick)})
    with pytest.warns(PluginWarning, match="plugin 'broken' left out"):
        assert dict(host.strategies) == {"quick": Quick}
    errors = {info.name: info.error for info in host.plugins}
    assert errors["good"] is None
    assert reason in (errors["broken"] or "")


def test_a_hook_that_does_not_exist_is_told_by_name() -> None:
    class Misspelt:
        @hookimpl
        def register_stratgies(self) -> list[type[Strategy]]:
            return []

    with pytest.warns(PluginWarning, match=r"'typo'.*register_stratgies"):
        host = Host({"typo": Misspelt(), "good": plugin(Quick)})
    assert list(host.strategies) == ["quick"]


def test_a_plugin_whose_commands_fail_leaves_the_others_theirs() -> None:
    class Failing:
        @hookimpl
        def register_commands(self, cli: click.Group) -> None:
            raise ImportError("no module named rich_tables")

    host = Host({"a_failing": Failing(), "full": FullPlugin()})
    group = click.Group()
    with pytest.warns(PluginWarning, match=r"'a_failing'.*rich_tables"):
        host.add_commands(group)
    assert list(group.commands) == ["greet"]


class Entry:
    """An installed entry point."""

    def __init__(self, name: str, value: str, loads: Any) -> None:
        self.name, self.value = name, value
        self.dist = SimpleNamespace(version="3.0")
        self._loads = loads

    def load(self) -> Any:
        if isinstance(self._loads, BaseException):
            raise self._loads
        return self._loads


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    """Make these the only entry points."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: list(entries))


def test_a_plugin_that_cannot_be_imported_is_reported_and_the_rest_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(
        monkeypatch,
        Entry("sick", "sick_module", ModuleNotFoundError("No module named 'cupy'")),
        Entry("well", "well_module", plugin(Quick)),
    )
    with pytest.warns(PluginWarning, match=r"'sick' left out.*No module named 'cupy'"):
        host = Host.installed()
    assert list(host.strategies) == ["quick"]
    sick, well = host.plugins
    assert (sick.name, sick.version) == ("sick", "3.0")
    assert "import failed: ModuleNotFoundError" in (sick.error or "")
    assert (well.name, well.error) == ("well", None)


def test_two_distributions_with_one_entry_point_name_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(
        monkeypatch,
        Entry("same", "first_module", plugin()),
        Entry("same", "second_module", plugin()),
    )
    with pytest.raises(PluginConflictError, match=r"first_module and\s+second_module"):
        Host.installed()


def test_a_distribution_seen_twice_is_one_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = Entry("same", "module", plugin(Quick))
    install(monkeypatch, entry, entry)
    assert list(Host.installed().strategies) == ["quick"]


def test_blocked_plugins_are_not_even_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(
        monkeypatch,
        Entry("sick", "sick_module", RuntimeError("imported")),
        Entry("well", "well_module", plugin(Quick)),
    )
    monkeypatch.setenv(BLOCK_VARIABLE, "sick,other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host = Host.installed()
    assert [info.name for info in host.plugins] == ["well"]


def test_the_bundled_strategies_arrive_by_the_entry_point_group() -> None:
    host = Host.installed()
    bundled = {n for n in host.strategies if host.origin(n) == "bundled"}
    assert bundled >= {"autoregressive", "prompt_lookup", "draft_model", "draft_tree"}
    assert set(host.baselines) >= {"hf_generate", "hf_assisted", "hf_prompt_lookup"}
