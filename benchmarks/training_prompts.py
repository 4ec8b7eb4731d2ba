"""Prompts to train heads on, made from Python's standard library and templates.

    python benchmarks/training_prompts.py --count 2000 >prompts.jsonl

The kinds are the example workload's; none of its prompts is used, so that speed can be
measured on those. The same Python and seed give the same prompts.
"""

from __future__ import annotations

import ast
import itertools
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

TOPICS = """bread baking|tides|bicycle gears|compound interest|black holes
chess openings|beekeeping|the water cycle|sleep|job interviews
public speaking|houseplants|volcanoes|vaccines|knitting|jazz
the Roman roads|budgeting|running a first 10 km|earthquakes
making coffee|writing a thank-you letter|the immune system
photosynthesis|rainbows|learning a language|moving house
solar panels|the printing press|migraines|haiku|composting
map projections|the stock market|stage fright|origami|glaciers
time zones|electric cars|fermentation|the metric system
meditation|train signals|whales|pottery|ancient Egypt
cloud formation|good posture|email etiquette|recycling|the violin
deserts|camping in the rain|negotiating a salary|the moon landing
allergies|sourdough|lighthouses|board games|first aid
bird migration|a vegetable garden|sharing a flat|tea|bridges"""
ASKS = (
    "Explain {} to a ten-year-old.",
    "What are three common mistakes people make with {}?",
    "Give me a short plan to learn about {} in a week.",
    "Why is {} important? Answer in one paragraph.",
    "Write a short poem about {}.",
    "I know nothing about {}. Where should I start?",
    "What is the most surprising fact about {}?",
    "List five tips about {} with one sentence each.",
    "Tell me a short story that involves {}.",
    "How has {} changed over the last hundred years?",
)
LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese")
NAMES = ("Ada", "Ben", "Chloe", "Dev", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jun")
THINGS = ("apples", "stamps", "pencils", "tickets", "marbles", "books", "tiles", "eggs")
MOST_LINES, LEAST_LINES = 14, 4


@dataclass(frozen=True)
class Piece:
    """A function of the library: its name, source, docstring and parameters."""

    name: str
    source: str
    doc: str
    arguments: tuple[str, ...]
    names: tuple[str, ...]  # of local variables


def pieces(folder: Path) -> Iterator[Piece]:
    """Short functions with a docstring, in the order of their files."""
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            source = ast.get_source_segment(text, node) or ""
            doc = ast.get_docstring(node) or ""
            lines = source.count("\n") + 1
            if not LEAST_LINES <= lines <= MOST_LINES or not 40 <= len(doc) <= 400:
                continue
            stored = {
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            yield Piece(
                node.name,
                source,
                re.sub(r"\s+", " ", doc),
                tuple(a.arg for a in node.args.args if a.arg != "self"),
                tuple(sorted(stored | {a.arg for a in node.args.args} - {"self"})),
            )


def code_edit(draw: random.Random, piece: Piece) -> str | None:
    """Change something small, give all of it back."""
    if not piece.names:
        return None
    name = draw.choice(piece.names)
    ask = draw.choice(
        (
            f"Rename `{name}` to `{name}_value` everywhere in this function and show "
            "the whole function:",
            "Remove the docstring from this function and return the rest unchanged:",
            "Add type hints to this function. Return the complete code:",
            f"Rename the function `{piece.name}` to `do_{piece.name.strip('_')}` and "
            "print the full code:",
        )
    )
    return f"{ask}\n\n```python\n{piece.source}\n```"


def code_generation(draw: random.Random, piece: Piece) -> str:
    """A function by what it shall do."""
    arguments = ", ".join(piece.arguments)
    return (
        f"Write a Python function `{piece.name.strip('_')}({arguments})`: {piece.doc}"
    )


def as_json(draw: random.Random, piece: Piece) -> str:
    """Structure from text."""
    return (
        "Return a JSON object with the keys name, arguments and description for this "
        f"function:\n\n{piece.name}({', '.join(piece.arguments)}): {piece.doc}"
    )


def summary(draw: random.Random, piece: Piece) -> str:
    """Shorter in own words."""
    length = draw.choice(("one sentence", "two sentences", "at most 20 words"))
    return f"Summarize in {length}:\n\n{piece.doc}"


def question(draw: random.Random, piece: Piece) -> str:
    """An answer that stands in the text."""
    ask = draw.choice(
        (f"What does `{piece.name}` do?", f"When would you use `{piece.name}`?")
    )
    return f"Text: {piece.doc}\n\nQuestion: {ask} Answer from the text."


def translation(draw: random.Random, piece: Piece) -> str:
    """The first sentence in another language."""
    sentence = piece.doc.split(". ")[0].rstrip(".")
    return f"Translate into {draw.choice(LANGUAGES)}: {sentence}."


def chat(draw: random.Random, piece: Piece) -> str:
    """Something people ask."""
    topics = [topic for line in TOPICS.splitlines() for topic in line.split("|")]
    return draw.choice(ASKS).format(draw.choice(topics))


def math(draw: random.Random, piece: Piece) -> str:
    """A word problem of two or three steps."""
    who, other = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    a, b, c = draw.randint(12, 95), draw.randint(3, 11), draw.randint(2, 9)
    return draw.choice(
        (
            f"{who} has {a} {thing} and buys {b} boxes of {c} more. How many {thing} "
            f"does {who} have now? Show your steps.",
            f"{who} shares {a * c} {thing} equally among {c} friends. {other} loses "
            f"{b} of his share. How many does {other} keep? Explain step by step.",
            f"A shop sells {thing} at {b} euros each. {who} buys {c} and pays with a "
            f"{a + b * c} euro voucher. What is left on it? Work it out.",
        )
    )


KINDS: dict[str, Callable[[random.Random, Piece], str | None]] = {
    "chat": chat,
    "code_generation": code_generation,
    "code_edit": code_edit,
    "json": as_json,
    "summarization": summary,
    "question_answering": question,
    "translation": translation,
    "math": math,
}


def prompts(count: int, seed: int, folder: Path) -> Iterator[dict[str, str]]:
    """``count`` distinct prompts, the kinds in turn."""
    draw = random.Random(seed)
    found = list(pieces(folder))
    if not found:
        raise click.ClickException(f"{folder} holds no Python sources to draw from")
    known: set[str] = set()
    for kind in itertools.islice(itertools.cycle(KINDS), 20 * count):
        text = KINDS[kind](draw, draw.choice(found))
        if text is None or text in known:
            continue
        known.add(text)
        yield {"id": f"{kind}-{len(known)}", "class": kind, "text": text}
        if len(known) == count:
            return


@click.command(help=__doc__)
@click.option("--count", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(count: int, seed: int) -> None:
    """Print JSON lines."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for prompt in prompts(count, seed, folder):
        text = prompt.pop("text")
        line = {**prompt, "messages": [{"role": "user", "content": text}]}
        click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
