"""A plan as a command line, as JSON, and in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from adaptspec.engines.exporting.plan import PLAIN_NAME, Gain, Plan, Server
from adaptspec.profile import ANSWER, LATENCY

HEALTH = "/health"  # is answered with 200 by a server that is ready
OBJECTIVES = {ANSWER: "time per answer", LATENCY: "p95 latency per token"}


def command_of(server: Server, host: str) -> list[str]:
    """Program and arguments with the address."""
    address = ["--host", host, "--port", str(server.port)]
    return [*server.launch.command, *address]


def shell_line(server: Server, host: str) -> str:
    """One line for a POSIX shell."""
    variables = [
        f"{name}={shlex.quote(value)}"
        for name, value in server.launch.environment.items()
    ]
    if server.launch.path:
        folders = ":".join(map(shlex.quote, server.launch.path))
        variables.append(f'PATH={folders}:"$PATH"')
    return " ".join([*variables, shlex.join(command_of(server, host))])


def waiting_line(server: Server, host: str) -> str:
    """For a POSIX shell: wait until the server that was started last is ready, or has
    ended."""
    url = shlex.quote(f"{server.url(host)}{HEALTH}")
    ready = f"curl -sf -o /dev/null {url}"
    return f"while kill -0 $! 2>/dev/null && ! {ready}; do sleep 2; done"


def as_flags(plan: Plan, engine: str, host: str, *, background: bool) -> str:
    """Commands to paste into a shell; all that is said is a comment there.

    Args:
        background: Whether the shell goes on while they run.
    """
    lines = [f"# {line}" for line in heading(plan, engine)]
    for server in plan.servers:
        lines += ["", *(f"# {line}" for line in sentences(server, plan))]
        if (first := plan.before(server)) is not None:
            lines.append(waiting_line(first, host))
        lines.append(shell_line(server, host) + (" &" if background else ""))
    return "\n".join(lines) + "\n"


def as_json(plan: Plan, engine: str, host: str) -> dict[str, Any]:
    """All of it but the router's table, for programs."""
    then = plan.found.environment
    return {
        "for": engine,
        "measured": engine == then.engine,
        "measured_on": {
            "engine": then.engine,
            "versions": dict(then.versions),
            "model": then.model_name,
            "model_digest": then.model,
            "draft_model": then.draft_name,
            "heads": then.heads_name,
            "dtype": then.dtype,
            "device": then.device,
            "device_name": then.device_name,
            "threads": then.threads,
            "concurrency": then.concurrency,
            "runs": list(plan.found.runs),
        },
        "expected_ratio": plan.ratio,
        "notes": list(plan.notes),
        "servers": [_server_json(server, plan, host) for server in plan.servers],
    }


def heading(plan: Plan, engine: str) -> list[str]:
    """What was measured where, and what is expected over all classes."""
    then = plan.found.environment
    models = [then.model_name]
    models += [f"draft model {then.draft_name}"] if then.draft_name else []
    models += [f"heads {then.heads_name}"] if then.heads_name else []
    versions = ", ".join(f"{k} {v}" for k, v in then.versions.items())
    several = then.concurrency != 1
    lines = [
        f"{engine}: {', '.join(models)}, {then.dtype}",
        f"measured on {then.engine}, {then.device_name}, {then.threads} threads, "
        f"{then.concurrency} request{'s' if several else ''} at a time ({versions}); "
        f"run {', '.join(plan.found.runs)}",
    ]
    if plan.ratio is not None and sum(len(s.gains) for s in plan.servers) > 1:
        mix = ", ".join(
            f"{name} {gain.share:.0%}"
            for server in plan.servers
            for name, gain in server.gains.items()
        )
        lines.append(f"expected: {plan.ratio:.2f}x plain decoding over {mix}")
    return [*lines, *map(one_line, plan.notes)]


def sentences(server: Server, plan: Plan) -> list[str]:
    """What a server does, what each class gets, and what the engine can't do."""
    named = server.name in (server.setting.method, PLAIN_NAME)
    lines = [str(server.setting) if named else f"{server.name}: {server.setting}"]
    lines += [gain_in_words(name, gain) for name, gain in server.gains.items()]
    if server.is_default and len(plan.servers) > 1:
        lines.append("prompts of no class")
    return [*lines, *map(one_line, server.launch.notes)]


def gain_in_words(name: str, gain: Gain) -> str:
    """What a class gets, how sure that is, and what it loses."""
    if gain.ratio is None:
        told = "not measured"
    elif gain.measured is None:
        told = "as plain decoding"
    else:
        found = gain.measured
        what = OBJECTIVES.get(found.objective, "tokens per second")
        told = f"{gain.ratio:.2f}x plain decoding in {what}"
        prompts = f"{found.prompts} prompt{'' if found.prompts == 1 else 's'}"
        if found.interval_low is not None and found.interval_high is not None:
            low, high = found.interval_low, found.interval_high
            told += f" (95%: {low:.2f} to {high:.2f}, {prompts})"
        else:
            told += f" ({prompts})"
    if gain.loss > 0:
        told += (
            f"; it loses {gain.loss:.0%} of the {gain.best_ratio:.2f}x that "
            f"{gain.best} gives it"
        )
    return one_line(f"{name}: {told}")


def one_line(text: str) -> str:
    """A sentence without line breaks, so that a comment stays one."""
    return " ".join(text.split())


def _server_json(server: Server, plan: Plan, host: str) -> dict[str, Any]:
    first = plan.before(server)
    return {
        "name": server.name,
        "start_when_ready": None if first is None else first.name,
        "method": server.setting.method,
        "params": dict(server.setting.params),
        "url": server.url(host),
        "command": command_of(server, host),
        "shell": shell_line(server, host),
        "environment": dict(server.launch.environment),
        "path": list(server.launch.path),
        "config": dict(server.launch.config),
        "notes": list(server.launch.notes),
        "default": server.is_default,
        "classes": {name: _gain_json(gain) for name, gain in server.gains.items()},
    }


def _gain_json(gain: Gain) -> Mapping[str, Any]:
    found = gain.measured
    return {
        "share": gain.share,
        "ratio": gain.ratio,
        "interval": None
        if found is None
        else [found.interval_low, found.interval_high],
        "objective": None if found is None else found.objective,
        "prompts": None if found is None else found.prompts,
        "tokens_per_second": None if found is None else found.tokens_per_second,
        "best": {
            "method": gain.best.method,
            "params": dict(gain.best.params),
            "ratio": gain.best_ratio,
        },
        "loss": gain.loss,
    }
