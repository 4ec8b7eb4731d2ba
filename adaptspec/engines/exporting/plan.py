"""Which servers to start with which settings, and what each class gets by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adaptspec.engines.exporting.measured import PLAIN_SETTING, Found, Setting
from adaptspec.engines.exporting.mix import (
    best_of_mix,
    candidates,
    gain,
    weights_of,
)
from adaptspec.engines.inference_engine import Launch
from adaptspec.errors import EngineError
from adaptspec.profile import Measurement

PLAIN_NAME = "plain"  # of the server that drafts nothing
LAST_PORT = 65535

Launches = Callable[[Setting], Launch]


@dataclass(frozen=True)
class Gain:
    """What a class gets from its server.

    Args:
        ratio: How many times as fast as plain decoding; None: not measured.
        measured: The measurement behind it; None for plain decoding or where there is
            none.
        best: What the class is fastest with.
        best_ratio: How many times as fast it would be with that.
        share: Of the mix's prompts.
    """

    ratio: float | None
    measured: Measurement | None
    best: Setting
    best_ratio: float
    share: float

    @property
    def loss(self) -> float:
        """Part of the class's own best speed that it loses; 0 where it isn't known."""
        if self.ratio is None or self.best_ratio <= 0:
            return 0.0
        return max(0.0, 1 - self.ratio / self.best_ratio)


@dataclass(frozen=True)
class Server:
    """A server to start.

    Args:
        launch: Without address and port.
        gains: Class -> what it gets.
        is_default: Whether it answers prompts of no class.
    """

    name: str
    setting: Setting
    launch: Launch
    port: int
    gains: Mapping[str, Gain]
    is_default: bool

    def url(self, host: str) -> str:
        """Where it answers."""
        reached = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        address = f"[{reached}]" if ":" in reached else reached
        return f"http://{address}:{self.port}"


@dataclass(frozen=True)
class Plan:
    """What is exported.

    Args:
        ratio: Plain decoding's expected time for the mix over that with these servers;
            None where it isn't known.
        notes: What is to be known of the choice, in sentences.
        one_by_one: Whether each server is started when the one before it is ready.
    """

    found: Found
    servers: Sequence[Server]
    ratio: float | None
    notes: Sequence[str]
    one_by_one: bool = False

    def before(self, server: Server) -> Server | None:
        """The server that must be ready before this one is started."""
        at = [one.name for one in self.servers].index(server.name)
        return self.servers[at - 1] if self.one_by_one and at else None


def for_class(found: Found, name: str, launches: Launches, port: int) -> Plan:
    """One server for the prompts of one class.

    Raises:
        EngineError: if the class wasn't measured.
    """
    if name not in found.classes:
        known = ", ".join(found.classes) or "none"
        raise EngineError(f"--class: no class {name!r} was measured; were: {known}")
    gains = _gains(found, found.classes[name].best, [name], {name: 1.0})
    server = _server(found.classes[name].best, launches, port, gains, True, [])
    return Plan(found, [server], gains[name].ratio, found.told(name))


def for_mix(
    found: Found, asked: Mapping[str, float], launches: Launches, port: int
) -> Plan:
    """One server for prompts of all classes."""
    if not found.classes:
        assert found.everything is not None
        setting, ratio = found.everything.best, found.everything.ratio
        server = _server(setting, launches, port, {}, True, [])
        return Plan(found, [server], ratio(setting), found.told())
    weights = weights_of(found, asked)
    wanted = candidates(found)
    best = best_of_mix(found, weights, wanted)
    assert best is not None  # plain decoding is always known
    gains = _gains(found, best.setting, list(found.classes), weights)
    notes = [*found.told(), *_unmeasured(found, wanted, weights)]
    server = _server(best.setting, launches, port, gains, True, [])
    return Plan(found, [server], best.ratio, notes)


def by_class(
    found: Found, asked: Mapping[str, float], launches: Launches, port: int
) -> Plan:
    """A server for each setting that a class is fastest with.

    Prompts of no class go to the setting of these that takes the least time for the
    mix, or where each is slower than plain decoding or wasn't measured on every class,
    to plain decoding.

    Raises:
        EngineError: if there aren't as many ports from ``port`` on.
    """
    if not found.classes:
        return for_mix(found, asked, launches, port)
    weights = weights_of(found, asked)
    settings = list(dict.fromkeys(of.best for of in found.classes.values()))
    best = best_of_mix(found, weights, [*settings, PLAIN_SETTING])
    assert best is not None  # plain decoding is always known
    settings = list(dict.fromkeys([*settings, best.setting]))
    if port + len(settings) - 1 > LAST_PORT:
        raise EngineError(
            f"--port: {len(settings)} servers need ports to {LAST_PORT} at most, got "
            f"{port} for the first; give {LAST_PORT + 1 - len(settings)} or less"
        )
    servers: list[Server] = []
    for number, setting in enumerate(settings):
        names = [name for name, of in found.classes.items() if of.best == setting]
        gains = _gains(found, setting, names, weights)
        taken = [server.name for server in servers]
        servers.append(
            _server(
                setting, launches, port + number, gains, setting == best.setting, taken
            )
        )
    used = {name: of.best for name, of in found.classes.items()}
    return Plan(found, servers, gain(found, weights, used), found.told())


def table_of(plan: Plan, host: str) -> dict[str, object]:
    """The router's table, without a classifier."""
    return {
        "servers": {server.name: server.url(host) for server in plan.servers},
        "classes": {
            name: server.name for server in plan.servers for name in server.gains
        },
        "default": next(s.name for s in plan.servers if s.is_default),
    }


def _server(
    setting: Setting,
    launches: Launches,
    port: int,
    gains: Mapping[str, Gain],
    is_default: bool,
    taken: Sequence[str],
) -> Server:
    name = base = PLAIN_NAME if setting.is_plain else setting.method
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return Server(name, setting, launches(setting), port, gains, is_default)


def _gains(
    found: Found,
    setting: Setting,
    names: Sequence[str],
    weights: Mapping[str, float],
) -> dict[str, Gain]:
    whole = sum(weights.values())
    gains = {}
    for name in names:
        of = found.classes[name]
        gains[name] = Gain(
            of.ratio(setting),
            None if setting.is_plain else of.measured.get(setting),
            of.best,
            of.ratio(of.best) or 1.0,
            weights.get(name, 0.0) / whole if whole else 0.0,
        )
    return gains


def _unmeasured(
    found: Found, wanted: Sequence[Setting], weights: Mapping[str, float]
) -> list[str]:
    """Settings that weren't compared, since a class of the mix lacks them."""
    told = []
    for setting in wanted:
        missing = [
            name
            for name, weight in weights.items()
            if weight > 0 and found.classes[name].ratio(setting) is None
        ]
        if missing:
            told.append(
                f"{setting} is left out of the comparison: it wasn't measured on "
                f"{', '.join(missing)}."
            )
    return told
