"""How busy other programs kept the processors, as the operating system tells it."""

from __future__ import annotations


class OtherPrograms:
    """Counts the processor time of others from here on."""

    def __init__(self) -> None:
        self._begin = _times()

    def share(self) -> float | None:
        """Their share of the processors that this process may run on, 0 to 1.

        Time that a virtual machine's host took counts. None where the operating system
        doesn't tell, or no time has passed.
        """
        before, now = self._begin, _times()
        if before is None or now is None:
            return None
        everything, busy, own = (b - a for a, b in zip(before, now, strict=True))
        if everything <= 0 or busy <= 0:
            return None
        return min(1.0, max(0.0, busy - own) / everything)


def _times() -> tuple[float, float, float] | None:
    """Seconds so far of those processors: in all, not idle, and of this process."""
    import psutil  # type: ignore[import-untyped]

    try:
        process = psutil.Process()
        processors = psutil.cpu_times(percpu=True)
        allowed = getattr(process, "cpu_affinity", lambda: range(len(processors)))()
        everything = idle = 0.0
        for number in allowed:
            times = processors[number]
            waiting = getattr(times, "iowait", 0.0)
            guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
            everything += sum(times) - guest  # a guest's time is in the user's
            idle += times.idle + waiting
        mine = process.cpu_times()
        return everything, everything - idle, mine.user + mine.system
    except (psutil.Error, OSError, AttributeError, IndexError):
        return None
