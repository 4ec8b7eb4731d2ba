"""Under which keys a run keeps its JSON records in the profile store.

``spent``                      seconds by part (time_spent.py)
``plain/CLASS/PROMPT``         a tuning prompt's plain decoding (phases.py)
``mix``                        class -> prompts of the workload (phases.py)
``usage``                      what was tuned, as it was asked for (reporting/usage.py)
``defaults``                   method -> its parameters' defaults, of another engine
                               than ours (phases.py)
``classifier``                 what tells a prompt's class (adaptspec/classes)
``replayed/CLASS/STRATEGY``    trials without the target (replaying/presearch.py)
``raced/CLASS``                setting key -> prompt id -> ratios of leaders measured
                               again (searching/search.py)
``search``                     what workers join (distributed/workers.py)
``confirm/CLASS``              speeds on held-out prompts (confirming/confirm.py)
``predicted/CLASS``            setting key -> the ratio that the replay promised there
``answer/DIGEST``              a setting's answer to a held-out prompt, of an engine
                               whose starts are dear (engines/measurer.py)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptspec.classes.classifier import KEY
from adaptspec.run_records import DEFAULTS as DEFAULTS
from adaptspec.run_records import MIX as MIX
from adaptspec.run_records import USAGE as USAGE
from adaptspec.run_records import confirmed_key as confirmed_key

if TYPE_CHECKING:
    from adaptspec.profile import ProfileStore

CLASSIFIER = KEY  # read where the profiles are used
SPENT = "spent"
SEARCH = "search"


def plain_key(prompt_class: str, prompt_id: str) -> str:
    """Of a prompt's plain decoding."""
    return f"plain/{prompt_class}/{prompt_id}"


def replayed_key(prompt_class: str, strategy: str) -> str:
    """Of the replayed trials: ``{"trials": [...]}``."""
    return f"replayed/{prompt_class}/{strategy}"


def raced_key(prompt_class: str) -> str:
    """Of the leaders' further measurements."""
    return f"raced/{prompt_class}"


def predicted_key(prompt_class: str) -> str:
    """Of the predictions of what was confirmed."""
    return f"predicted/{prompt_class}"


def answer_key(setting: str, prompt_id: str) -> str:
    """Of a setting's answer to a held-out prompt.

    Args:
        setting: Its key.
    """
    told = json.dumps([setting, prompt_id]).encode()
    return f"answer/{hashlib.sha256(told).hexdigest()[:32]}"


@dataclass(frozen=True)
class RunRecords:
    """One run's records in a store."""

    store: ProfileStore
    run: str

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The record under a key."""
        return self.store.record(self.run, key)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record, in place of an older one."""
        self.store.put_record(self.run, key, record)
