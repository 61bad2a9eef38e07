"""The demo's task: turn the facts of a lost-and-found slip into a short notice.

A slip lists three to six facts, `item: kite; colour: red; found at: duck pond; day: Monday`; a good notice says all of them in one
or two plain sentences: `A red kite was found at the duck pond on Monday.` The corpus that the first policy learns from is written by the
grammar below with three defects on purpose: it drops facts, says one twice, and adds empty talk. The raters know better; the loop has to
teach it. What a notice is worth is decided in `demo/measure.py`, which shares the lists of values with this file and nothing else.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

SLOTS: dict[str, tuple[str, ...]] = {
    "item": (
        "kite", "scarf", "umbrella", "teapot", "lantern", "violin", "suitcase", "notebook", "apron", "mitten", "telescope", "basket",
    ),
    "colour": ("red", "green", "blue", "yellow", "grey", "orange", "purple", "white"),
    "mark": (
        "a torn label", "a silver button", "a muddy paw print", "a paper star", "a loose thread", "an inky thumbprint", "a brass bell",
        "a broken handle",
    ),
    "found at": (
        "duck pond", "ferry pier", "bandstand", "fountain", "market hall", "tram stop", "rose garden", "old mill",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "finder": ("milkman", "gardener", "drummer", "shepherd", "clockmaker", "postwoman", "baker", "captain"),
    "waits at": ("lighthouse", "town hall", "bookshop", "museum", "post office", "theatre", "chapel", "school"),
}  # fmt: skip
OPTIONAL = tuple(slot for slot in SLOTS if slot != "item")
EMPTY_TALK = (
    "Please read this notice with care.",
    "What a lovely day it was.",
    "We hope that this helps.",
    "Such things happen again and again.",
    "Thank you very much for your time.",
)

Facts = dict[str, str]


@dataclass(frozen=True, slots=True)
class Defects:
    """How the corpus goes wrong. Each is a probability: of dropping one fact, of saying one twice, of adding empty talk."""

    drop: float = 0.33
    repeat: float = 0.12
    empty_talk: float = 0.3


FLAWLESS = Defects(drop=0.0, repeat=0.0, empty_talk=0.0)


def prompt_text(facts: Facts) -> str:
    return "; ".join(f"{slot}: {value}" for slot, value in facts.items())


def read_prompt(prompt: str) -> Facts:
    """The facts that a prompt lists. Raises ValueError, naming the piece, if the text is not a slip."""
    facts: Facts = {}
    for piece in prompt.split(";"):
        slot, _, value = (part.strip() for part in piece.partition(":"))
        if value not in SLOTS.get(slot, ()):
            raise ValueError(f"{piece.strip()!r} is no fact of the demo: a slip looks like 'item: kite; day: Monday'.")
        facts[slot] = value
    return facts


def random_facts(rng: random.Random) -> Facts:
    """Three to six facts: always the item, then others in random order."""
    slots = ["item", *rng.sample(OPTIONAL, rng.randint(2, 5))]
    return {slot: rng.choice(SLOTS[slot]) for slot in slots}


def prompts(count: int, seed: int) -> list[str]:
    """`count` different slips, the same ones for the same seed."""
    rng = random.Random(seed)
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen[prompt_text(random_facts(rng))] = None
    return list(seen)


def article(noun_phrase: str) -> str:
    return f"an {noun_phrase}" if noun_phrase[0] in "aeiou" else f"a {noun_phrase}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _thing(rng: random.Random, facts: Facts) -> str:
    words = article(f"{facts['colour']} {facts['item']}" if "colour" in facts else facts["item"])
    if "mark" in facts:
        words += rng.choice((" with ", " that has ")) + facts["mark"]
    return words


def _circumstances(rng: random.Random, facts: Facts) -> tuple[str, str]:
    """What stands before the main clause (perhaps nothing) and after it: place and day."""
    place = f"{rng.choice(('at', 'near', 'beside'))} the {facts['found at']}" if "found at" in facts else ""
    day = f"on {facts['day']}" if "day" in facts else ""
    if day and rng.random() < 0.3:
        return f"{day}, ", f" {place}" if place else ""
    parts = [part for part in (place, day) if part]
    rng.shuffle(parts)
    return "", "".join(f" {part}" for part in parts)


def notice(rng: random.Random, facts: Facts) -> str:
    """One of many ways to say exactly these facts (the item among them) in one or two sentences."""
    thing = _thing(rng, facts)
    before, after = _circumstances(rng, facts)
    finder = facts.get("finder")
    if finder and rng.random() < 0.5:
        main = f"the {finder} {rng.choice(('found', 'picked up', 'brought in'))} {thing}{after}"
    elif finder:
        main = f"{thing} was {rng.choice(('found', 'picked up'))}{after} by the {finder}"
    else:
        main = f"{thing} {rng.choice(('was found', 'was picked up', 'has been found', 'was left'))}{after}"
    main = before + main
    if "waits at" not in facts:
        return sentence(main)
    desk = f"at the {facts['waits at']}"
    if rng.random() < 0.35:
        return sentence(f"{main} and now waits {desk}" if not before and main.startswith("a") else f"{main}, and it waits {desk}")
    return f"{sentence(main)} {rng.choice(('It waits', 'Ask for it', 'Please collect it'))} {desk}."


def _said_again(rng: random.Random, facts: Facts) -> str:
    again = {
        "colour": "It is {}.",
        "mark": "It has {}.",
        "found at": "It was at the {}.",
        "day": "It was on {}.",
        "finder": "It was found by the {}.",
        "waits at": "It waits at the {}.",
    }
    slots = [slot for slot in facts if slot in again]
    if not slots:
        return ""
    slot = rng.choice(slots)
    return again[slot].format(facts[slot])


def flawed_notice(rng: random.Random, facts: Facts, defects: Defects) -> str:
    kept = {slot: value for slot, value in facts.items() if slot == "item" or rng.random() >= defects.drop}
    parts = [notice(rng, kept)]
    if rng.random() < defects.repeat:
        parts.append(_said_again(rng, kept))
    if rng.random() < defects.empty_talk:
        parts.insert(rng.choice((0, len(parts))), rng.choice(EMPTY_TALK))
    return " ".join(part for part in parts if part)


def corpus(rows: int, seed: int, defects: Defects | None = None) -> Iterator[dict[str, str]]:
    """`rows` pairs {"prompt", "completion"} for SFT, the same ones for the same seed."""
    rng, defects = random.Random(seed), defects or Defects()
    for _ in range(rows):
        facts = random_facts(rng)
        yield {"prompt": prompt_text(facts), "completion": flawed_notice(rng, facts, defects)}
