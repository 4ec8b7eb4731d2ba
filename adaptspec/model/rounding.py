"""What is said and kept of how near outputs are to plain decoding's."""

from __future__ import annotations

from adaptspec.model.hardware_costs import costs_owner
from adaptspec.profile import Environment, ProfileStore

ROUNDING_RECORD = "rounding"  # the name of the record in the store


def output_note(rounding: str) -> str:
    """How near greedy outputs are to plain decoding's, for people.

    Args:
        rounding: As :attr:`~adaptspec.model.language_model.LanguageModel.rounding`.
    """
    if rounding:
        return f"outputs equal plain decoding's up to near ties: {rounding}"
    return "outputs equal plain decoding's bit for bit"


def stored_rounding(store: ProfileStore, environment: Environment) -> str | None:
    """The target's ``rounding`` that was found in ``environment``; None: nobody did."""
    record = store.record(costs_owner(environment), ROUNDING_RECORD)
    return None if record is None else str(record.get("found", ""))


def store_rounding(
    store: ProfileStore, environment: Environment, rounding: str
) -> None:
    """Keep the target's ``rounding`` beside the costs of its forwards."""
    owner = costs_owner(environment)
    store.put_record(owner, ROUNDING_RECORD, {"found": rounding})
