"""The bundled plugin as the host sees it."""

from __future__ import annotations

import subprocess
import sys

import adaptspec_plugins
from adaptspec.host import Host


def test_the_host_takes_every_bundled_strategy_and_baseline() -> None:
    host = Host({"bundled": adaptspec_plugins})
    assert sorted(host.strategies) == [
        "autoregressive",
        "draft_model",
        "draft_tree",
        "hybrid",
        "lookahead",
        "medusa",
        "medusa_typical",
        "prompt_lookup",
        "suffix",
        "token_recycling",
        "universal_draft",
    ]
    assert sorted(host.baselines) == ["hf_assisted", "hf_generate", "hf_prompt_lookup"]
    assert [plugin.error for plugin in host.plugins] == [None]


def test_importing_the_plugin_imports_no_torch() -> None:
    check = "import sys, adaptspec_plugins; sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", check], check=False)
    assert found.returncode == 0
