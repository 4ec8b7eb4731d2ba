"""Which accelerators ``llama-server`` is told to use, in its own names."""

from __future__ import annotations

from collections.abc import Sequence

from adaptspec.errors import EngineError

NONE = "none"  # nothing is offloaded
OPTIONS = ("-dev", "--device")
LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers")

Devices = Sequence[tuple[str, str]]


def named(device: str | None, devices: Devices) -> str | None:
    """What its ``--device`` takes for what a user calls a device.

    Args:
        device: Its own names with commas between, ``cuda``, ``cuda:N``, ``cpu`` or
            ``none``; None: not told.
        devices: Name and description of each that it lists.

    Raises:
        EngineError: for one that it doesn't list.
    """
    if device is None:
        return None
    if device in ("cpu", NONE):
        return NONE
    known = {name.lower(): name for name, _ in devices}
    found = []
    for word in device.split(","):
        name = _own_name(word).lower()
        if name not in known:
            shown = ", ".join(known.values()) or "none"
            raise EngineError(
                f"llama.cpp: a device is cpu or one that `llama-server --list-devices` "
                f"shows ({shown}), got {word.strip()!r}; leave out --device to use all"
            )
        found.append(known[name])
    return ",".join(found)


def elsewhere(device: str | None, devices: Devices) -> Devices:
    """What a user calls a device that isn't listed here, but was where it was tuned.

    Args:
        device: As for :func:`named`.
    """
    if device is None or device in ("cpu", NONE):
        return []
    known = {name.lower() for name, _ in devices}
    names = [_own_name(word) for word in device.split(",")]
    return [(name, f"no {name}") for name in names if name.lower() not in known]


def used(device: str | None, arguments: Sequence[str], devices: Devices) -> Devices:
    """Those that hold layers, as far as options tell; the last one counts.

    Args:
        device: As :func:`named` gives it.
        arguments: Of the program, which come behind.
    """
    layers = ""
    for place, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        option = option.replace("_", "-")
        if not equals:
            value = "".join(arguments[place + 1 : place + 2])
        if option in OPTIONS:
            device = value
        elif option in LAYERS:
            layers = value
    if device == NONE or layers == "0":
        return ()
    if device is None:
        return devices
    names = device.lower().split(",")
    return [one for one in devices if one[0].lower() in names]


def family(name: str) -> str:
    """``cuda`` of ``CUDA0``, ``vulkan`` of ``Vulkan1``."""
    return name.rstrip("0123456789").lower()


def _own_name(word: str) -> str:
    """``CUDA1`` of ``cuda:1``; others are the server's own names."""
    kind, _, number = word.strip().partition(":")
    return f"CUDA{number or 0}" if kind == "cuda" else word.strip()
