"""Bring prompts and their completions into a project, and open their slots to raters."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar
from uuid import UUID, uuid4

from django.db import transaction

from annotation.content import ContentRefused, PromptItem, prompt_digest, split_of
from annotation.errors import Refused
from annotation.models import MAX_COMPLETIONS, Completion, Lease, Project, Prompt

__all__ = ["prompt_digest", "prompts_add", "slots_free", "slots_open", "split_of"]

BATCH = 500
T = TypeVar("T")


@dataclass(slots=True)
class StoredPrompt:
    """A prompt row of the batch at hand, with the uids of its completions by (text, policy)."""

    prompt: Prompt
    uids: dict[tuple[str, str], UUID]
    is_new: bool
    is_filled: bool = False

    @property
    def opens(self) -> bool:
        """Whether raters may see it: 2 to 16 completions that all have a text."""
        return 2 <= len(self.uids) <= MAX_COMPLETIONS and all(text.strip() for text, _ in self.uids)

    def fill(self, item: PromptItem) -> list[Completion]:
        """The rows of the item's completions, not saved yet."""
        rows = [
            Completion(prompt=self.prompt, text=one.text, policy=one.policy, run=one.run, sampling=dict(one.sampling))
            for one in item.completions
        ]
        self.uids = {(row.text, row.policy): row.uid for row in rows}
        self.is_filled = True
        return rows


def prompts_add(*, project: Project, items: Iterable[Any], round: int = 0) -> dict[str, int]:
    """Store prompts with their completions; those that are present already add nothing.

    Args:    items {key?, messages, completions?: [{text, policy?, run?, sampling?}]}; the key defaults to a digest of the content.
             round: 0 for loaded prompts, n for what round n wrote.
    Returns: counts of `prompts`, `completions` and `slots` added, prompts `present` before, and `repeated` texts that were merged.
    Raises:  Refused for bad content, and for a key that is present with other content. Batches before the bad one stay.
    """
    counts: Counter[str] = Counter(dict.fromkeys(("prompts", "completions", "slots", "present", "repeated"), 0))
    for numbered in batched(enumerate(items, start=1), BATCH):
        parsed = []
        for number, raw in numbered:
            try:
                parsed.append(PromptItem.checked(raw, round))
            except ContentRefused as error:
                raise Refused("prompt_refused", f"Item {number}: {error}.") from error
        with transaction.atomic():
            stored = prompts_store(project=project, items=parsed, counts=counts)
            if refused := next((one for one in stored if isinstance(one, ContentRefused)), None):
                raise Refused("prompt_key_taken", f"Project {project.slug}: {refused}.", status=409)
            counts["slots"] += _slots_create([one for one in stored if isinstance(one, StoredPrompt)])
    return dict(counts)


def project_lock(project: Project) -> Project:
    """Make everybody who adds to this project take turns until the transaction ends; raters go on working.

    Without FOR UPDATE's "no key" every insert that points to the project would wait too.
    """
    return Project.objects.select_for_update(no_key=True).get(pk=project.pk)


def prompts_store(*, project: Project, items: Sequence[PromptItem], counts: Counter[str]) -> list[StoredPrompt | ContentRefused]:
    """Store one batch without slots; an item whose key has other content comes back as its refusal. Call inside a transaction."""
    project_lock(project)
    known = _known_prompts(project, {item.key for item in items})
    results: list[StoredPrompt | ContentRefused] = []
    rows: list[Completion] = []
    for item in items:
        stored = known.get(item.key)
        if stored is None:
            stored = known[item.key] = _new_prompt(project, item)
            rows += stored.fill(item)
            counts["prompts"] += 1
            counts["repeated"] += item.repeated
        elif refusal := _difference(stored, item):
            results.append(refusal)
            continue
        elif item.completions and not stored.uids:
            rows += stored.fill(item)
            counts["repeated"] += item.repeated
        else:
            counts["present"] += 1
        results.append(stored)
    Prompt.objects.bulk_create([stored.prompt for stored in known.values() if stored.is_new])
    Completion.objects.bulk_create(rows, batch_size=BATCH)
    counts["completions"] += len(rows)
    return results


def _known_prompts(project: Project, keys: set[str]) -> dict[str, StoredPrompt]:
    prompts = {prompt.pk: prompt for prompt in Prompt.objects.filter(project=project, key__in=keys)}
    known = {prompt.key: StoredPrompt(prompt, {}, is_new=False) for prompt in prompts.values()}
    for prompt_id, text, policy, uid in Completion.objects.filter(prompt__in=prompts).values_list("prompt_id", "text", "policy", "uid"):
        known[prompts[prompt_id].key].uids[text, policy] = uid
    return known


def _new_prompt(project: Project, item: PromptItem) -> StoredPrompt:
    prompt = Prompt(
        project=project,
        key=item.key,
        messages=item.messages,
        digest=item.digest,
        split=split_of(item.digest, project.held_out_percent),
        round=item.round,
        overlap=project.overlap,
    )
    return StoredPrompt(prompt, {}, is_new=True)


def _difference(stored: StoredPrompt, item: PromptItem) -> ContentRefused | None:
    """Why `item` is not what its key stands for; a prompt that has no completions yet may still get them."""
    key = item.key if len(item.key) <= 60 else item.key[:57] + "..."
    if stored.prompt.digest != item.digest:
        return ContentRefused(f"key {key!r} is present already with other messages; give this one another key")
    if item.completions and stored.uids and {one.identity for one in item.completions} != set(stored.uids):
        return ContentRefused(f"key {key!r} is present already with other completions; give this one another key")
    return None


def _slots_create(stored: Iterable[StoredPrompt]) -> int:
    fresh = {one.prompt.pk: one for one in stored if one.is_filled and one.opens}
    rows = [
        Lease(project_id=one.prompt.project_id, prompt=one.prompt, slot=slot)
        for one in fresh.values()
        for slot in range(one.prompt.overlap)
    ]
    Lease.objects.bulk_create(rows, batch_size=BATCH)
    return len(rows)


def slots_open(*, project: Project, overlap: int) -> int:
    """Raise the project's raters per prompt to `overlap`, also for prompts that are in. Returns the slots added.

    Prompts that have as many slots already keep them; texts-free prompts and prompts without 2 to 16 completions get none.
    Raises: Refused when `overlap` is lower than now: slots that raters may hold are never taken away.
    """
    with transaction.atomic():
        locked = project_lock(project)
        if not locked.overlap <= overlap <= 100:
            raise Refused("overlap_lower", f"Raters per prompt can be raised from {locked.overlap} up to 100, not set to {overlap}.")
        Project.objects.filter(pk=project.pk).update(overlap=overlap)
        project.overlap = overlap
        raised = list(Prompt.objects.filter(project=project, overlap__lt=overlap).order_by().values_list("pk", flat=True))
        return sum(_slots_raise(chunk, overlap) for chunk in batched(raised, BATCH))


def _slots_raise(prompt_ids: Sequence[int], overlap: int) -> int:
    rows = []
    taken: dict[int, set[int]] = {pk: set() for pk in prompt_ids}
    for prompt_id, slot in Lease.objects.filter(prompt__in=prompt_ids).values_list("prompt_id", "slot"):
        taken[prompt_id].add(slot)
    completions: dict[int, list[bool]] = {pk: [] for pk in prompt_ids}
    for prompt_id, text in Completion.objects.filter(prompt__in=prompt_ids).values_list("prompt_id", "text"):
        completions[prompt_id].append(bool(text.strip()))
    for prompt in Prompt.objects.filter(pk__in=prompt_ids):
        if 2 <= len(completions[prompt.pk]) <= MAX_COMPLETIONS and all(completions[prompt.pk]):
            rows += [
                Lease(project_id=prompt.project_id, prompt=prompt, slot=slot) for slot in range(overlap) if slot not in taken[prompt.pk]
            ]
    Prompt.objects.filter(pk__in=prompt_ids).update(overlap=overlap)
    Lease.objects.bulk_create(rows, batch_size=BATCH)
    return len(rows)


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` rows, without holding more than one list."""
    source = iter(rows)
    while batch := list(islice(source, size)):
        yield batch


def slots_free(*, lease_ids: Iterable[int]) -> int:
    """Take held slots back from their raters, for others to have now; rankings that are in stay. Returns how many were held."""
    freed = 0
    with transaction.atomic():
        for pk in lease_ids:
            # A new token with each: a submit under the old grant is refused, and the rater's page says why.
            free: dict[str, Any] = {
                "state": Lease.State.FREE,
                "rater": None,
                "token": uuid4(),
                "displayed": [],
                "granted_at": None,
                "expires_at": None,
            }
            freed += Lease.objects.filter(pk=pk, state=Lease.State.HELD).update(**free)
    return freed
