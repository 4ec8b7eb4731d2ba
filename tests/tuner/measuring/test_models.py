"""The leader and a cluster's nodes load the same models."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from adaptspec.environment import environment_of
from adaptspec.host import Host
from adaptspec.testing.fakes import tiny_model
from adaptspec_tuner.distributed.ray_pool import bench, place_of
from adaptspec_tuner.measuring.models import Models


def test_a_node_measures_in_the_leaders_place(
    tiny_pair: tuple[str, str], host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Host, "installed", classmethod(lambda cls: host))
    models = Models(Path(tiny_pair[0]), tiny_pair[1], dtype="float32")
    engine = models.engine(host)
    here = place_of(environment_of(engine.model, engine.draft))
    sent = pickle.loads(pickle.dumps(models.as_text()))
    assert bench(sent, 8, None, torch.get_num_threads(), {}, 0).place == here


def test_a_model_in_memory_is_taken_as_it_is_and_is_no_path(host: Host) -> None:
    model = tiny_model("llama")
    models = Models(model, "a folder")
    assert not models.are_paths
    assert Models("a folder", Path("another")).are_paths
    assert Models(model).engine(host).model is model
