"""Simulated raters: accounts that rank through the same leases and the same submit as people, each with a character of its own.

What a rater perceives is the hidden utility plus noise; texts that seem nearly equal are tied; a careless rater sometimes ranks without
reading, and one has a taste of his own for short texts. The accounts are of kind `simulated`, cannot sign in, and every ranking of theirs
carries that kind into the snapshots.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from annotation.errors import Refused
from annotation.models import Completion, Lease, Membership, Project, User
from annotation.services.leases import lease_next
from annotation.services.rankings import ranking_submit

Utility = Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Character:
    """How one rater judges. Units: `noise`, `tie_width` in utility; `careless` is a probability; `dislike_per_word` is utility a word."""

    name: str
    noise: float
    tie_width: float
    careless: float = 0.0
    dislike_per_word: float = 0.0


CHARACTERS = (
    Character("sim-ada", noise=0.2, tie_width=0.2),
    Character("sim-bruno", noise=0.4, tie_width=0.3),
    Character("sim-clara", noise=0.4, tie_width=0.2, dislike_per_word=0.05),
    Character("sim-dmitri", noise=0.5, tie_width=0.3, careless=0.35),
    Character("sim-emeka", noise=0.6, tie_width=0.7),
)


def perceived(character: Character, rng: random.Random, utilities: Sequence[float], words: Sequence[int]) -> list[float]:
    """How good each completion seems to this rater this time; pure noise when he does not read."""
    if rng.random() < character.careless:
        return [rng.gauss(0.0, 1.0) for _ in utilities]
    return [
        utility + rng.gauss(0.0, character.noise) - character.dislike_per_word * count
        for utility, count in zip(utilities, words, strict=True)
    ]


def bands_of(values: Sequence[float], tie_width: float) -> list[list[int]]:
    """Indices from best to worst; a value within `tie_width` of the best one of a band joins that band."""
    bands: list[list[int]] = []
    for index in sorted(range(len(values)), key=lambda place: -values[place]):
        if bands and values[bands[-1][0]] - values[index] <= tie_width:
            bands[-1].append(index)
        else:
            bands.append([index])
    return bands


def raters_make(*, project: Project, characters: Sequence[Character] = CHARACTERS) -> list[tuple[User, Character]]:
    """The raters' accounts, made once, with membership of the project. They have no password and cannot sign in."""
    made = []
    for character in characters:
        user, is_new = User.objects.get_or_create(username=character.name, defaults={"kind": User.Kind.SIMULATED, "is_active": True})
        if is_new:
            user.set_unusable_password()
            user.save(update_fields=["password"])
        if user.kind != User.Kind.SIMULATED:
            raise Refused("name_taken", f"The account {user.username} belongs to a person; the demo needs that name for a simulated rater.")
        Membership.objects.get_or_create(project=project, user=user, defaults={"role": Membership.Role.RATER})
        made.append((user, character))
    return made


def lease_rank(*, lease: Lease, rater: User, character: Character, utility: Utility) -> None:
    """Judge the completions in the order in which they stand on the rater's screen, and submit the ranking."""
    texts = {str(uid): text for uid, text in Completion.objects.filter(prompt=lease.prompt_id).values_list("uid", "text")}
    question = lease.prompt.messages[-1]["content"]
    shown = [texts[uid] for uid in lease.displayed]
    # One generator per rater and prompt: what a rater says does not depend on who came before him.
    rng = random.Random(f"{character.name}/{lease.prompt.key}")
    words = [len(text.split()) for text in shown]
    noise_order = sorted(range(len(shown)), key=lambda place: shown[place])
    values = perceived(character, rng, [utility(question, shown[place]) for place in noise_order], [words[place] for place in noise_order])
    bands = [[lease.displayed[noise_order[index]] for index in band] for band in bands_of(values, character.tie_width)]
    seconds = round(4.0 + 0.4 * sum(words) * rng.uniform(0.5, 1.5), 1)  # as long as reading takes; nobody waits for it
    ranking_submit(rater=rater, token=lease.token, client_id=uuid.uuid4(), bands=bands, duration_seconds=seconds)


def rank_open_prompts(
    *,
    project: Project,
    raters: Sequence[tuple[User, Character]],
    utility: Utility,
    report: Callable[[int], None] | None = None,
) -> int:
    """Let the raters take turns, one prompt each, until no prompt is open to any of them. Returns the rankings made now.

    `report` hears the number made so far. Stopped in the middle, the next call goes on: a prompt that a rater held is handed to him again.
    """
    made, active = 0, list(raters)
    while active:
        for pair in list(active):
            rater, character = pair
            lease = lease_next(project=project, rater=rater)
            if lease is None:
                active.remove(pair)
                continue
            lease_rank(lease=lease, rater=rater, character=character, utility=utility)
            made += 1
            if report is not None:
                report(made)
    return made
