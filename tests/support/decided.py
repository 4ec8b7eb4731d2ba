"""Profiles with the choices that an older version would have made of them."""

from __future__ import annotations

from collections.abc import Sequence

from adaptspec.profile import Profile, ProfileStore
from adaptspec_profiles.older import choices_of


def keep(store: ProfileStore, profiles: Sequence[Profile]) -> None:
    """Store profiles, and for each of their runs and classes a choice."""
    store.add_profiles(profiles)
    store.put_choices(choices_of(profiles))
