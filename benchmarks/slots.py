"""What a restaurant description says of the facts it was given: the task's own measure, independent of any model or rater.

A meaning representation is `name[...], eatType[...], food[...], ...`. Names are replaced by placeholders (usual for this task: a small
model cannot copy a name that it never saw), and every other slot is found by the words that people use for its value. A slot whose
text names another value of the same slot as well does not count: listing everything is not saying the fact.
"""

import re

NAME, NEAR = "Xname", "Xnear"


def words(*alternatives: str) -> str:
    return "|".join(f"(?:{one})" for one in alternatives)


def rated(adjective: str, *others: str) -> str:
    """An adjective beside a word for the guests' opinion, on either side of it and in one sentence; or one of the other phrases."""
    opinion = r"(?:rat\w+|review\w*|scor\w*|customer\w*|feedback|recommend\w*|regard\w*|received)"
    return words(rf"\b(?:{adjective})\w*[^.]{{0,25}}{opinion}", rf"{opinion}[^.]{{0,35}}\b(?:{adjective})", *others)


def stars(digit: str, name: str) -> str:
    return rf"\b(?:{digit}|{name}) ?(?:out of|of|/|over) ?(?:a possible )?(?:5|five)|(?:{digit}|{name})[ -]stars?"


CHEAP = words(
    r"cheap\w*",
    r"low[ -]?(?:cost|price\w*)",
    r"low(?:er)? (?:price|cost)",
    "inexpensive",
    r"affordabl\w+",
    "budget",
    r"prices? (?:is |are |range )*low",
)
MODERATE = words(
    r"moderate\w*", r"mid[ -]?(?:range|pric\w+)", r"average(?:ly)?[ -](?:pric\w+|cost)", r"medium[ -](?:pric\w+|cost)", r"reasonabl\w+",
    r"fair(?:ly)? pric\w+", r"price\w* (?:range )?(?:is |are )?(?:average|medium|fair)",
)  # fmt: skip
DEAR = words(
    r"(?:high|higher|upper|above[ -]average)[ -]?(?:end|pric\w+|cost\w*|range)", "expensive", "pric(?:ey|y)", "costly", "upscale",
    "high in price",
    r"prices? (?:range )?(?:is |are |tends? to be )?(?:very |quite |on the )?high",
)  # fmt: skip
LOW, MIDDLE, HIGH = (
    r"low\w*|poor\w*|bad\w*|unpopular",
    r"average\w*|medium|mediocre|decent|ok(?:ay)?|moderate\w*",
    r"high\w*|well|excellent|great|good|top",
)

SAID: dict[str, dict[str, str]] = {
    "eatType": {
        "coffee shop": words("coffee[ -]?(?:shop|house)", "caf[eé]"),
        "pub": words(r"\bpubs?\b", r"\bbar\b", "tavern"),
        "restaurant": words(r"restaur\w*", "eatery", r"diner\b", "dining (?:place|establishment)"),
    },
    "food": {
        "English": words(r"\benglish\b", "british", "fish and chips"),
        "Chinese": "chinese",
        "Indian": words(r"\bindian\b", "curry"),
        "Italian": words("italian", "pasta", "pizza"),
        "Japanese": words("japanese", "sushi"),
        "French": "french",
        "Fast food": words("fast[ -]?food", r"burgers?\b"),
    },
    "area": {
        "riverside": words(r"river\s?-?side", "riverbank", "waterfront", r"\briver\b"),
        "city centre": words(
            r"(?:city|town) ?-?cent\w+", "cent(?:re|er) of (?:the )?(?:city|town)", "downtown",
            r"central(?:ly)?\b", "(?:heart|middle) of the city"
        ),
    },
    "priceRange": {
        "cheap": CHEAP,
        "less than £20": words(
            r"(?:less|lower|cheaper|under|below|up to|for|not more|no more)(?: than)? ?£? ?20\b(?! ?-)", "less than twenty", CHEAP,
        ),
        "£20-25": words(r"£? ?20 ?£? ?(?:-|–|to|and|through) ?£? ?25", "twenty to twenty", MODERATE),
        "moderate": MODERATE,
        "more than £30": words(
            r"(?:more|over|above|upwards?|higher|greater|excess|exceed\w*|least|start\w*)(?: of| at| from| than)? ?£? ?30",
            r"£? ?30 ?(?:\+|or more|and up|plus)", DEAR,
        ),
        "high": DEAR,
    },
    "customer rating": {
        "low": rated(LOW, stars("1", "one"), "poorly", "low[ -]rated"),
        "1 out of 5": rated(LOW, stars("1", "one"), "poorly", "low[ -]rated"),
        "average": rated(MIDDLE, stars("3", "three"), "averagely", r"average\b"),
        "3 out of 5": rated(MIDDLE, stars("3", "three"), "averagely"),
        "high": rated(HIGH, stars("5", "five"), r"highly\b"),
        "5 out of 5": rated(HIGH, stars("5", "five"), "highly (?:recommend|rated)"),
    },
}  # fmt: skip

CHILDREN = words(r"famil\w+", r"child\w*", r"kids?\b", "all ages", r"adults?\b")
NOT_FOR_CHILDREN = words(
    r"(?:not|n't|non|no|never|isnt|without|unsuitable|avoid|un)[ -]?[^.]{0,35}?(?:famil\w+|child\w*|kids?\b)",
    r"adults?\b",
    r"(?:famil\w+|child\w*|kids?)[^.,]{0,25}(?:not|n't|unfriendly|no\b)",
)
DISTINCT = {"food", "area"}  # Slots whose values exclude each other plainly; the others have words in common.


def facts(meaning: str) -> dict[str, str]:
    """`name[A], area[B]` as {"name": "A", "area": "B"}."""
    return {key.strip(): value for key, value in re.findall(r"([A-Za-z][A-Za-z ]*)\[(.*?)\]", meaning)}


def with_placeholders(meaning: str, text: str = "") -> tuple[str, str]:
    """Both strings with the values of `name` and `near` replaced; spelling variants of upper and lower case are found too."""
    values = facts(meaning)
    pairs = [(values[slot], mark) for slot, mark in (("name", NAME), ("near", NEAR)) if slot in values]
    for value, mark in sorted(pairs, key=lambda pair: -len(pair[0])):
        pattern = re.compile(re.escape(value).replace(r"\ ", r"\s+"), re.IGNORECASE)
        meaning, text = meaning.replace(f"[{value}]", f"[{mark}]"), pattern.sub(mark, text)
    return meaning, text


def slot_is_said(slot: str, value: str, text: str) -> bool:
    low = text.lower()
    if slot in {"name", "near"}:
        return value.lower() in low
    if slot == "familyFriendly":
        if value == "no":
            return re.search(NOT_FOR_CHILDREN, low) is not None
        return re.search(CHILDREN, low) is not None and re.search(NOT_FOR_CHILDREN, low) is None
    if re.search(SAID[slot][value], low) is None:
        return False
    if slot in DISTINCT:
        return not any(re.search(pattern, low) for other, pattern in SAID[slot].items() if other != value)
    return True


def slots_said(meaning: str, text: str) -> tuple[int, int]:
    """(slots that the text states, slots that the meaning has)."""
    wanted = facts(meaning)
    return sum(slot_is_said(slot, value, text) for slot, value in wanted.items()), len(wanted)
