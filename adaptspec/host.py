"""Finds plugins, refuses name clashes, and survives broken plugins."""

from __future__ import annotations

import importlib.metadata
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pluggy

from adaptspec import hookspecs
from adaptspec.errors import (
    HeadsLoadError,
    PluginConflictError,
    PluginError,
    ProfileStoreError,
    UnknownStrategyError,
)
from adaptspec.hookspecs import PROJECT

if TYPE_CHECKING:
    import click

    from adaptspec.engines.inference_engine import InferenceEngine
    from adaptspec.heads.protocol import TrainedHeads
    from adaptspec.model.language_model import LanguageModel
    from adaptspec.profile import ProfileStore
    from adaptspec.strategy import Baseline, Strategy

BLOCK_VARIABLE = "ADAPTSPEC_BLOCK_PLUGINS"


class PluginWarning(UserWarning):
    """A plugin could not be used; everything else works."""


@dataclass(frozen=True)
class PluginInfo:
    """One plugin, working or not."""

    name: str
    version: str
    hooks: tuple[str, ...]
    error: str | None = None


class Host:
    """The plugins of one program run.

    Args:
        plugins: Name -> module or object with hook implementations.
        versions: Name -> version of the distribution it came in.
        broken: Plugins that could not even be imported.
    """

    def __init__(
        self,
        plugins: Mapping[str, Any],
        versions: Mapping[str, str] | None = None,
        broken: Iterable[PluginInfo] = (),
    ) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._versions = dict(versions or {})
        self._errors: dict[str, str] = {}
        self._broken = list(broken)
        for name, plugin in plugins.items():
            try:
                self._manager.register(plugin, name)
                for hook in self._manager.get_hookcallers(plugin) or []:
                    if not hook.has_spec():
                        raise pluggy.PluginValidationError(
                            plugin, f"unknown hook {hook.name!r}"
                        )
            except (pluggy.PluginValidationError, ValueError) as error:
                if self._manager.has_plugin(name):
                    self._manager.unregister(name=name)
                self._fail(name, error)
        for info in self._broken:
            _warn(info.name, info.error or "")

    @classmethod
    def installed(cls) -> Host:
        """Every installed plugin of the ``adaptspec`` entry-point group.

        ``ADAPTSPEC_BLOCK_PLUGINS=name,name`` leaves some out.
        """
        blocked = set(filter(None, os.environ.get(BLOCK_VARIABLE, "").split(",")))
        plugins: dict[str, Any] = {}
        versions: dict[str, str] = {}
        origins: dict[str, str] = {}
        broken = []
        entries = importlib.metadata.entry_points(group=PROJECT)
        # Sorted, so that order doesn't depend on the file system.
        for entry in sorted(entries, key=lambda e: (e.name, e.value)):
            if entry.name in blocked or origins.get(entry.name) == entry.value:
                continue
            if entry.name in origins:
                raise PluginConflictError(
                    f"two plugins are called {entry.name!r}: {origins[entry.name]} and "
                    f"{entry.value}; uninstall one or set {BLOCK_VARIABLE}"
                )
            origins[entry.name] = entry.value
            version = entry.dist.version if entry.dist else "unknown"
            try:
                plugins[entry.name] = entry.load()
            except Exception as error:  # a plugin's import may raise anything
                text = f"import failed: {type(error).__name__}: {error}"
                broken.append(PluginInfo(entry.name, version, (), text))
            versions[entry.name] = version
        return cls(plugins, versions, broken)

    @property
    def plugins(self) -> list[PluginInfo]:
        """Every plugin by name, broken ones with the reason."""
        infos = {info.name: info for info in self._broken}
        for name, plugin in self._manager.list_name_plugin():
            if plugin is None:
                continue
            callers = self._manager.get_hookcallers(plugin) or []
            hooks = tuple(sorted(caller.name for caller in callers))
            infos[name] = PluginInfo(
                name, self._versions.get(name, "unknown"), hooks, self._errors.get(name)
            )
        for name, error in self._errors.items():
            version = self._versions.get(name, "unknown")
            infos.setdefault(name, PluginInfo(name, version, (), error))
        return [infos[name] for name in sorted(infos)]

    @cached_property
    def strategies(self) -> Mapping[str, type[Strategy]]:
        """Every strategy by name.

        Raises:
            PluginConflictError: if two plugins bring one name.
        """
        from adaptspec.strategy import Strategy

        return self._collect("register_strategies", Strategy, _check_drafting)

    @cached_property
    def baselines(self) -> Mapping[str, type[Baseline]]:
        """Every baseline by name."""
        from adaptspec.strategy import Baseline

        return self._collect("register_baselines", Baseline, _check_drafting)

    @cached_property
    def engines(self) -> Mapping[str, type[InferenceEngine]]:
        """Every inference engine by name."""
        from adaptspec.engines.inference_engine import InferenceEngine

        return self._collect("register_engines", InferenceEngine, _check_engine)

    def strategy(self, name: str) -> type[Strategy]:
        """One strategy class.

        Raises:
            UnknownStrategyError: with the names there are.
        """
        try:
            return self.strategies[name]
        except KeyError:
            known = ", ".join(sorted(self.strategies))
            raise UnknownStrategyError(
                f"no strategy {name!r}; known: {known}"
            ) from None

    def create(self, name: str, params: Mapping[str, Any] | None = None) -> Strategy:
        """A strategy object that has met the others.

        Raises:
            UnknownStrategyError: with the names there are.
            InvalidParamsError: naming the parameter, the value and what is allowed.
        """
        cls = self.strategy(name)
        strategy = cls(cls.Params.parse(params or {}, name))
        strategy.meet(self.strategies)
        return strategy

    def origin(self, name: str) -> str:
        """The plugin that brought a strategy or baseline."""
        return self._origins[name]

    def add_commands(self, cli: click.Group) -> None:
        """Let every plugin add its commands."""
        for name, plugin in self._implementing("register_commands"):
            try:
                plugin.register_commands(cli=cli)
            except Exception as error:  # the plugin edge: report by name, go on
                self._fail(name, error)

    @property
    def opens_stores(self) -> bool:
        """Whether a plugin that works opens profile databases."""
        return any(
            "open_profile_store" in plugin.hooks and plugin.error is None
            for plugin in self.plugins
        )

    def open_store(self, url: str | None = None) -> ProfileStore:
        """Open the profile database at ``url``, the default one for None."""
        store: ProfileStore | None = self._manager.hook.open_profile_store(url=url)
        if store is None:
            raise ProfileStoreError(f"no plugin opens the profile database {url!r}")
        return store

    def open_heads(self, path: str | Path, model: LanguageModel) -> TrainedHeads:
        """The trained heads in the folder ``path``, read for ``model``.

        Raises:
            HeadsLoadError: if they are damaged, don't fit, or no plugin knows them.
        """
        heads: TrainedHeads | None = self._manager.hook.open_heads(
            path=Path(path), model=model
        )
        if heads is None:
            raise HeadsLoadError(f"no plugin reads the heads in {path}")
        return heads

    @cached_property
    def _origins(self) -> dict[str, str]:
        return {}

    def _implementing(self, hook: str) -> list[tuple[str, Any]]:
        return sorted(
            (name, plugin)
            for name, plugin in self._manager.list_name_plugin()
            if plugin is not None and hasattr(plugin, hook) and name not in self._errors
        )

    def _collect(
        self, hook: str, base: type[Any], check: Callable[[Any], None]
    ) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for plugin_name, plugin in self._implementing(hook):
            try:
                classes = list(getattr(plugin, hook)())
                for cls in classes:
                    _check_class(cls, base)
                    check(cls)
            except Exception as error:  # the plugin edge: report by name, go on
                self._fail(plugin_name, error)
                continue
            for cls in classes:
                if cls.name in self._origins:
                    raise PluginConflictError(
                        f"plugins {self._origins[cls.name]!r} and {plugin_name!r} both "
                        f"bring {cls.name!r}; uninstall one or set {BLOCK_VARIABLE}"
                    )
                self._origins[cls.name] = plugin_name
                found[cls.name] = cls
        return MappingProxyType(found)

    def _fail(self, name: str, error: Exception) -> None:
        self._errors[name] = f"{type(error).__name__}: {error}"
        _warn(name, self._errors[name])


def _warn(name: str, reason: str) -> None:
    warnings.warn(f"plugin {name!r} left out: {reason}", PluginWarning, stacklevel=4)


def _check_class(candidate: Any, base: type[Any]) -> None:
    if not (isinstance(candidate, type) and issubclass(candidate, base)):
        raise PluginError(f"{candidate!r} is not a subclass of {base.__name__}")
    cls: Any = candidate
    if not isinstance(getattr(cls, "summary", None), str):
        raise PluginError(f"{cls.__name__}.summary must be one line of text")
    if abstract := getattr(cls, "__abstractmethods__", None):
        raise PluginError(f"{cls.__name__} lacks {', '.join(sorted(abstract))}")


def _check_engine(cls: Any) -> None:
    name = getattr(cls, "name", None)
    if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9._-]*", name)):
        raise PluginError(
            f"{cls.__name__}.name must be of lower letters, digits, '.', '_' and '-', "
            f"got {name!r}"
        )


def _check_drafting(cls: Any) -> None:
    from adaptspec.params import Params

    name = getattr(cls, "name", None)
    if not (isinstance(name, str) and name.isidentifier() and name.islower()):
        raise PluginError(f"{cls.__name__}.name must be lower_snake_case, got {name!r}")
    if not issubclass(cls.Params, Params):
        raise PluginError(
            f"{cls.__name__}.Params must subclass adaptspec.params.Params"
        )
    cls.Params.specs()
    cls.Params()
