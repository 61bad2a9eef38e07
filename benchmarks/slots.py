"""What a restaurant description says of the facts it was given: the task's own measure, independent of any model or rater.

A meaning representation is `name[...], eatType[...], food[...], ...`. Names are replaced by placeholders (usual for this task: a small
model cannot copy a name that it never saw), and every other slot is found by the words that people use for its value. A slot whose
text names another value of the same slot as well does not count: listing everything is not saying the fact.
"""

import re

NAME, NEAR = "Xname", "Xnear"

SAID: dict[str, dict[str, str]] = {
    "eatType": {
        "coffee shop": r"coffee[ -]?(?:shop|house)|caf[eé]",
        "pub": r"\bpubs?\b|\bbar\b|tavern",
        "restaurant": r"restaur\w*|eatery|diner\b|dining (?:place|establishment)",
    },
    "food": {
        "English": r"\benglish\b|british|fish and chips",
        "Chinese": r"chinese",
        "Indian": r"\bindian\b|curry",
        "Italian": r"italian|pasta|pizza",
        "Japanese": r"japanese|sushi",
        "French": r"french",
        "Fast food": r"fast[ -]?food|burgers?\b",
    },
    "area": {
        "riverside": r"river\s?-?side|riverbank|\bthe river\b|by (?:a|the) river|waterfront|\briver\b",
        "city centre": r"(?:city|town) ?-?(?:cent\w+)|cent(?:re|er) of (?:the )?(?:city|town)|downtown|central(?:ly)?\b|heart of the city|middle of the city",
    },
    "priceRange": {
        "cheap": r"cheap\w*|low[ -]?(?:cost|price\w*)|inexpensive|affordabl\w+|budget|prices? (?:is |are |range )*low|low(?:er)? (?:price|cost)|economical",
        "less than £20": r"(?:less|lower|cheaper|under|below|up to|for|not more|no more)(?: than)? ?(?:£|l)? ?20\b(?! ?-)|(?:under|below|<) ?£? ?20\b|cheap\w*|low[ -]?(?:cost|price\w*)|inexpensive|affordabl\w+|less than twenty",
        "£20-25": r"£? ?20 ?(?:-|–|to|and|through) ?£? ?25|twenty to twenty|moderate\w*(?:ly)?[ -]pric|mid[ -]?(?:range|pric\w+)|moderate price|average(?:ly)? pric|price range (?:is )?(?:moderate|average)|20 ?£? ?- ?£?25",
        "moderate": r"moderate\w*|mid[ -]?(?:range|pric\w+)|average(?:ly)?[ -]pric\w+|reasonabl\w+|price\w* (?:range )?(?:is |are )?(?:average|medium|fair)|fair(?:ly)? pric\w+|medium pric\w+|average cost|(?:average|medium) (?:price|cost)",
        "more than £30": r"(?:more|over|above|upwards?|higher|greater|excess|exceed\w*|least|start\w*)(?: of| at| from| than)? ?£? ?30|£? ?30 ?(?:\+|or more|and up|plus)|high[ -]?(?:end|price\w*|cost)|expensive|pric(?:ey|y)|upscale",
        "high": r"(?:high|higher|upper|above[ -]average)[ -]?(?:end|pric\w+|cost\w*|range)|expensive|pric(?:ey|y)|prices? (?:range )?(?:is |are |tends? to be )?(?:very |quite |on the )?high|costly|upscale|high in price",
    },
    "customer rating": {
        "low": r"(?:low|poor|bad|1 (?:out )?of 5|one star|1[ -]star|not (?:highly|well)|unpopular)\w*[^.]{0,25}(?:rat\w+|review\w*|star|customer\w*|recommend\w*|received|satisf\w*|scor\w*|feedback|quality)|(?:rat\w+|review\w*|customers?|scor\w*)[^.]{0,30}\b(?:low\w*|poor\w*|bad\w*|1 out of 5|not good)|one star|1[ -]star|poorly|low[ -]rated|1 (?:out )?of 5",
        "1 out of 5": r"\b(?:1|one) ?(?:out of|of|/|over) ?(?:a possible )?(?:5|five)|(?:1|one)[ -]stars?|low(?:ly)?[ -]?(?:customer[ -])?(?:rat\w+|scor\w+)|(?:rat\w+|review\w*)[^.]{0,20}\b(?:low\w*|poor\w*|1\b)|poor(?:ly)?[ -](?:customer )?(?:rat\w+|review\w*)",
        "average": r"(?:average|averagely|medium|mediocre|moderate|decent|ok(?:ay)?|middling|3 (?:out )?of 5|3[ -]star)\w*[^.]{0,25}(?:rat\w+|review\w*|scor\w*|customer\w*|feedback|quality)|(?:rat\w+|review\w*|customers?|scor\w*)[^.]{0,35}\b(?:average\w*|medium|mediocre|decent|ok(?:ay)?|moderate\w*)|averagely|3[ -]star|average\b",
        "3 out of 5": r"\b(?:3|three) ?(?:out of|of|/|over) ?(?:a possible )?(?:5|five)|(?:3|three)[ -]stars?|average(?:ly)?[ -](?:customer[ -])?(?:rat\w+|review\w*)|(?:rat\w+|review\w*)[^.]{0,25}\b(?:average\w*|medium|3\b)",
        "high": r"(?:high|highly|well|excellent|great|good|top|very|5 (?:out )?of 5|five star|5[ -]star)\w*[^.]{0,25}(?:rat\w+|review\w*|scor\w*|recommend\w*|customer\w*|feedback|regard\w*|received)|(?:rat\w+|review\w*|customers?|scor\w*)[^.]{0,35}\b(?:high\w*|excellent|great|good|5 out of 5)|five[ -]star|5[ -]star|highly",
        "5 out of 5": r"\b(?:5|five) ?(?:out of|of|/|over) ?(?:a possible )?(?:5|five)|(?:5|five)[ -]stars?|(?:high\w*|excellent|top|perfect|great)[ -](?:customer[ -])?(?:rat\w+|review\w*)|(?:rat\w+|review\w*)[^.]{0,25}\b(?:high\w*|excellent|5\b)|highly (?:recommend|rated)",
    },
}  # fmt: skip

CHILDREN = r"famil\w+|child\w*|kids?\b|all ages|adults?\b"
NOT_FOR_CHILDREN = (
    r"(?:not|n't|non|no|isn.t|aren.t|doesn.t|never|isnt|without|unsuitable|avoid|un)[ -]?[^.]{0,35}?(?:famil\w+|child\w*|kids?\b)"
    r"|adults?[ -]?(?:only|oriented|orientated|establishment|environment|place|crowd|venue|\b)|(?:famil\w+|child\w*|kids?)[^.,]{0,25}(?:not|n't|unfriendly|no\b)"
)
OTHER_VALUES = {  # Values that mean the same to people are not a contradiction.
    "priceRange": [{"cheap", "less than £20"}, {"moderate", "£20-25"}, {"high", "more than £30"}],
    "customer rating": [{"low", "1 out of 5"}, {"average", "3 out of 5"}, {"high", "5 out of 5"}],
}
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
        return not any(re.search(words, low) for other, words in SAID[slot].items() if other != value)
    return True


def slots_said(meaning: str, text: str) -> tuple[int, int]:
    """(slots that the text states, slots that the meaning has)."""
    wanted = facts(meaning)
    return sum(slot_is_said(slot, value, text) for slot, value in wanted.items()), len(wanted)
