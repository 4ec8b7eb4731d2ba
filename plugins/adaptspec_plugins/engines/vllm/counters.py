"""What a vLLM server has counted, read from its ``/metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GENERATED = "vllm:generation_tokens_total"
PROPOSED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


@dataclass(frozen=True)
class Counters:
    """Since the server's start; those that it doesn't have are 0.

    Args:
        generated: Tokens of all answers.
        proposed: Draft tokens verified.
        accepted: Of them, accepted; also those behind an answer's end.
    """

    generated: int = 0
    proposed: int = 0
    accepted: int = 0

    @classmethod
    def read(cls, page: str) -> Counters:
        """From the page, in Prometheus' text format, summed over engines."""
        from prometheus_client.parser import text_string_to_metric_families

        sums = dict.fromkeys((GENERATED, PROPOSED, ACCEPTED), 0.0)
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name in sums:
                    sums[sample.name] += sample.value
        return cls(*(int(total) for total in sums.values()))

    def since(self, before: Counters) -> Counters:
        """What was counted after ``before``."""
        return Counters(
            self.generated - before.generated,
            self.proposed - before.proposed,
            self.accepted - before.accepted,
        )


def shared(total: int, weights: Sequence[int]) -> list[int]:
    """``total`` in whole parts that are as large as ``weights``, about.

    The largest remainders are rounded up, so that the parts are ``total`` together.
    """
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    parts = [total * weight // whole for weight in weights]
    remainders = [total * weight % whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: -remainders[i])
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts
