"""The tables of the profile database."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Float,
    ForeignKey,
    Integer,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeEngine

from adaptspec.profile import OURS


def text(length: int) -> TypeEngine[str]:
    """Text that SQLite doesn't measure, and no server shall cut or refuse."""
    return String(length).with_variant(String(), "postgresql")


class Base(DeclarativeBase):
    """All tables of this store; Optuna's live beside them under other names."""


class EnvironmentRow(Base):
    """Where a measurement was taken; one row per distinct environment."""

    __tablename__ = "environments"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    digest: Mapped[str] = mapped_column(text(64), unique=True)
    model: Mapped[str] = mapped_column(text(64), index=True)
    model_name: Mapped[str] = mapped_column(String)
    draft: Mapped[str | None] = mapped_column(text(64))
    draft_name: Mapped[str | None] = mapped_column(String)
    dtype: Mapped[str] = mapped_column(text(32))
    device: Mapped[str] = mapped_column(text(32))
    device_name: Mapped[str] = mapped_column(String)
    threads: Mapped[int] = mapped_column(Integer)
    versions: Mapped[dict[str, str]] = mapped_column(JSON)
    heads: Mapped[str | None] = mapped_column(text(64))
    heads_name: Mapped[str | None] = mapped_column(String)
    configuration: Mapped[str | None] = mapped_column(text(64))
    kernel: Mapped[str | None] = mapped_column(text(64))
    attention: Mapped[str | None] = mapped_column(text(64))
    engine: Mapped[str] = mapped_column(text(64), server_default=OURS)
    concurrency: Mapped[int] = mapped_column(Integer, server_default="1")


class ProfileRow(Base):
    """One confirmed setting for one class of prompts."""

    __tablename__ = "profiles"
    __table_args__ = (
        UniqueConstraint(
            *("run", "prompt_class", "strategy", "setting", "baseline"),
            name="uq_profiles_setting",
        ),
        {"sqlite_autoincrement": True},  # a deleted profile's id names no other
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    environment_id: Mapped[int] = mapped_column(ForeignKey("environments.id"))
    environment: Mapped[EnvironmentRow] = relationship(lazy="joined")
    run: Mapped[str] = mapped_column(text(64), index=True)
    workload: Mapped[str] = mapped_column(text(64))
    workload_name: Mapped[str] = mapped_column(String)
    prompt_class: Mapped[str] = mapped_column(String)
    strategy: Mapped[str] = mapped_column(String)
    params: Mapped[dict[str, Any]] = mapped_column(JSON)
    lossless: Mapped[bool] = mapped_column(Boolean)
    baseline: Mapped[bool] = mapped_column(Boolean)
    created: Mapped[datetime] = mapped_column(DateTime)  # UTC
    tokens_per_second: Mapped[float] = mapped_column(Float)
    ratio: Mapped[float] = mapped_column(Float)
    measurement: Mapped[dict[str, Any]] = mapped_column(JSON)
    setting: Mapped[str] = mapped_column(text(64))  # digest of params


class UseRow(Base):
    """Sums over the requests decoded with a profile's setting for one class."""

    __tablename__ = "uses"

    profile_id: Mapped[int] = mapped_column(ForeignKey("profiles.id"), primary_key=True)
    prompt_class: Mapped[str] = mapped_column(text(256), primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    forwards: Mapped[int] = mapped_column(BigInteger)
    proposed: Mapped[int] = mapped_column(BigInteger)
    accepted: Mapped[int] = mapped_column(BigInteger)
    seconds_prefill: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    log_ratio: Mapped[float] = mapped_column(Float)
    log_ratio_squared: Mapped[float] = mapped_column(Float)
    weight: Mapped[float] = mapped_column(Float)


class ChoiceRow(Base):
    """What a tuning run decided for a class of prompts."""

    __tablename__ = "choices"
    __table_args__ = (UniqueConstraint("run", "prompt_class", name="uq_choices_class"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    environment_id: Mapped[int] = mapped_column(ForeignKey("environments.id"))
    environment: Mapped[EnvironmentRow] = relationship(lazy="joined")
    run: Mapped[str] = mapped_column(text(64), index=True)
    prompt_class: Mapped[str] = mapped_column(String)
    created: Mapped[datetime] = mapped_column(DateTime)  # UTC
    picks: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    reason: Mapped[str] = mapped_column(String)
    prompts: Mapped[int] = mapped_column(Integer)
    tried: Mapped[list[str]] = mapped_column(JSON)
    objective: Mapped[str] = mapped_column(text(32))
    pinned: Mapped[bool] = mapped_column(Boolean)


class TrialRow(Base):
    """One finished trial."""

    __tablename__ = "tuning_trials"
    __table_args__ = (
        UniqueConstraint(
            "run", "prompt_class", "strategy", "number", name="uq_tuning_trials_number"
        ),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    run: Mapped[str] = mapped_column(text(64))
    prompt_class: Mapped[str] = mapped_column(String)
    strategy: Mapped[str] = mapped_column(String)
    number: Mapped[int] = mapped_column(Integer)
    params: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(text(16))
    value: Mapped[float | None] = mapped_column(Float)
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)


class RecordRow(Base):
    """A JSON record of a run."""

    __tablename__ = "tuning_records"

    run: Mapped[str] = mapped_column(text(64), primary_key=True)
    key: Mapped[str] = mapped_column(text(128), primary_key=True)
    value: Mapped[dict[str, Any]] = mapped_column(JSON)
