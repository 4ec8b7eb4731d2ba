"""What strategies gain on JSON of a schema, step by step in turns with plain decoding.

    python benchmarks/structured.py [MODEL] [--layout]

Plain is one forward for each token under the same grammar. Times are of the processor,
in one thread, so that other work on the machine counts little.
"""

from __future__ import annotations

import math
import sys
from time import process_time
from typing import Any

import torch

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.default_model import default_model_path
from adaptspec.host import Host
from adaptspec.model.loading import load_model

NEW_TOKENS = 160
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
TEXT = {"type": "string", "maxLength": 40}
COUNT = {"type": "integer", "minimum": 0, "maximum": 999}

# What is asked -> properties of the answer.
ASKED: dict[str, dict[str, Any]] = {
    "Describe a made-up user of a web shop as JSON.": {
        "name": TEXT,
        "age": COUNT,
        "email": TEXT,
        "account_status": {"enum": ["active", "suspended", "deleted"]},
    },
    "Review the film 'The Silent Sea' as JSON.": {
        "title": TEXT,
        "rating": {"type": "integer", "minimum": 1, "maximum": 5},
        "summary": {"type": "string", "maxLength": 160},
        "recommended": {"type": "boolean"},
    },
    "Extract the order from: 'Two pizzas and three lemonades, please, to 5 Mill Lane.' "
    "Answer as JSON.": {
        "delivery_address": TEXT,
        "items": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"product_name": TEXT, "quantity": COUNT},
                "required": ["product_name", "quantity"],
                "additionalProperties": False,
            },
        },
    },
    "Call the weather service for Lisbon in metric units, tomorrow. Answer as JSON.": {
        "function_name": {"enum": ["get_weather", "get_forecast"]},
        "arguments": {
            "type": "object",
            "properties": {
                "location": TEXT,
                "temperature_unit": {"enum": ["celsius", "fahrenheit"]},
                "days_from_today": COUNT,
            },
            "required": ["location", "temperature_unit", "days_from_today"],
            "additionalProperties": False,
        },
    },
}
# Name -> strategy, most candidates of a step.
CONTENDERS = {
    "plain": ("autoregressive", 0),
    "forced tokens alone": ("autoregressive", 128),
    "token_recycling": ("token_recycling", 128),
    "hybrid": ("hybrid", 128),
}


def schema_of(properties: dict[str, Any], one_line: bool) -> dict[str, Any]:
    """A closed object, all of it required."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return schema | ({"x-guidance": ONE_LINE} if one_line else {})


def main() -> None:
    """Print tokens per forward and processor time against plain decoding's."""
    torch.set_num_threads(1)
    one_line = "--layout" in sys.argv
    given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    model = load_model(given[0] if given else default_model_path(), dtype="float32")
    host, engine = Host.installed(), Engine(model)
    strategies = {
        name: host.create(strategy) for name, (strategy, _) in CONTENDERS.items()
    }
    ratios: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    sums = {name: [0, 0, 0] for name in CONTENDERS}
    for prompt, properties in ASKED.items():
        runs: dict[str, Run] = {}
        for name, (_, nodes) in CONTENDERS.items():
            controls = Controls.for_model(
                model,
                temperature=0,
                max_new_tokens=NEW_TOKENS,
                max_nodes=nodes,
                json_schema=schema_of(properties, one_line),
            )
            ids = model.encode(prompt)
            runs[name] = Run(engine, strategies[name], ids, controls)
        steps = {name: iter(run) for name, run in runs.items()}
        for step in steps.values():  # the prompt
            next(step)
        seconds = dict.fromkeys(steps, 0.0)
        while steps:
            for name, step in list(steps.items()):
                began = process_time()
                if next(step, None) is None:
                    del steps[name]
                seconds[name] += process_time() - began
        plain = runs["plain"].result
        for name, run in runs.items():
            done = run.result
            assert done.token_ids == plain.token_ids, name
            ratios[name].append(seconds["plain"] / seconds[name])
            for at, count in enumerate(
                (len(done.token_ids) - 1, len(done.stats.steps), done.stats.forced)
            ):
                sums[name][at] += count
        print(model.decode(plain.token_ids), plain.finish, flush=True)
    for name, (tokens, forwards, forced) in sums.items():
        times = math.exp(sum(map(math.log, ratios[name])) / len(ratios[name]))
        print(
            f"{name}: {tokens} tokens, {forwards} forwards, "
            f"{tokens / forwards:.2f} tokens per forward, {forced} forced, "
            f"{times:.2f}x plain's speed"
        )


if __name__ == "__main__":
    main()
