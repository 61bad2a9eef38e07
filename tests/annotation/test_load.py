"""Loading files: bad lines are named and kept, good ones come in once, and real sets of rankings come in whole."""

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from annotation.adapters import SHAPES, shape_of
from annotation.loading import MAX_LINE_BYTES
from annotation.models import Completion, Lease, Membership, Project, Prompt, Ranking, User
from annotation.services.leases import lease_next
from annotation.services.prompts import prompts_add, slots_open
from annotation.services.rankings import ranking_submit
from tests.annotation import desk
from tests.annotation.files import PAIRS, RANKINGS, load, ranked, real, refused, run, written

pytestmark = pytest.mark.django_db
GOOD = ranked("good", [1, 2])


def bands(key: str) -> list[list[str]]:
    """The only ranking of the prompt, as texts."""
    ranking = Ranking.objects.get(prompt__key=key)
    texts = {str(one.uid): one.text for one in ranking.prompt.completions.all()}
    return [[texts[uid] for uid in band] for band in ranking.bands]


HOSTILE: list[tuple[Any, str]] = [
    ('{"prompt": "cut', "is not JSON"),
    ("[" * 100_000, "is nested too deeply"),
    ('{"a":' * 100_000, "is nested too deeply"),
    ('["a list"]', "is not a JSON object"),
    ("null", "is not a JSON object"),
    (b'{"prompt": "\xff\xfe"}', "is not UTF-8 at byte"),
    ('{"prompt": "q", "n": ' + "9" * 5000 + "}", "is not JSON that can be read"),
    ('{"prompt": "a", "prompt": "b"}', "has the field 'prompt' twice"),
    ({**GOOD, "prompt": "a\x00b"}, "NUL"),
    ({**GOOD, "prompt": "a\ud800b"}, "surrogate"),
    ({**GOOD, "completions": ["a", "b\x00"]}, "completion 2, text holds a NUL"),
    ({**GOOD, "rater": "r\x00"}, "NUL"),
    ({**GOOD, "key": "k" * 300}, "at most 200"),
    ({**GOOD, "key": {"a": 1}}, "the key must be text"),
    ({**GOOD, "prompt": 7}, "must be a list"),
    ({**GOOD, "prompt": "  "}, "is blank"),
    ({**GOOD, "prompt": None}, "neither `prompt` nor `messages`"),
    ({**GOOD, "prompt": [{"role": "robot", "content": "x"}]}, "role must be one of"),
    ({**GOOD, "prompt": [{"role": "user", "content": ["x"]}]}, "content must be text"),
    ({**GOOD, "prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "must end with the turn"),
    ({**GOOD, "prompt": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "`tool_calls`"),
    ({**GOOD, "ranks": [1, "2"]}, "is not a number"),
    ({**GOOD, "ranks": [1, True]}, "is not a number"),
    ({**GOOD, "ranks": [1, None]}, "is not a number"),
    ({**GOOD, "ranks": [1, 2, 3]}, "a list of 2 numbers"),
    ({**GOOD, "ranks": {"nobody": 1}}, "'nobody' names no completion"),
    ('{"key": "n", "prompt": "q", "completions": ["a", "b"], "scores": [1, NaN]}', "NaN"),
    ('{"key": "n", "prompt": "q", "completions": ["a", "b"], "scores": [1, 1e999]}', "is not finite"),
    ({**GOOD, "ranks": None, "bands": [[0], [0, 1]]}, "must name each of the 2 completions once"),
    ({**GOOD, "ranks": None, "bands": [[0], [5]]}, "there is no completion 5"),
    ({**GOOD, "ranks": None, "bands": [[0, 1], []]}, "at least one completion"),
    ({**GOOD, "ranks": None}, "has none of `bands`, `ranks` and `scores`"),
    ({**GOOD, "completions": ["a"], "ranks": [1]}, "at least 2 different completions"),
    ({**GOOD, "completions": ["a"] * 3, "ranks": [1, 1, 1]}, "at least 2 different completions"),
    ({**GOOD, "completions": ["a", "a", "b"], "ranks": [1, 2, 3]}, "differently from an equal text"),
    ({**GOOD, "completions": [str(n) for n in range(17)], "ranks": list(range(17))}, "at most 16"),
    ({**GOOD, "completions": "text"}, "completions must be a list"),
    ({**GOOD, "completions": [{"text": None}, "b"]}, "must be text, not nothing"),
    ({**GOOD, "completions": ["", "b"]}, "neither a text nor a policy"),
    ({**GOOD, "duration_seconds": -1}, "duration_seconds"),
    ({**GOOD, "round": "1"}, "round must be"),
    ({**GOOD, "rater": "a\nb"}, "control character"),
    ({**GOOD, "rater": "r" * 190}, "too long a name"),
    ({**GOOD, "flags": {"9": ["x"]}}, "flags: there is no completion 9"),
    ({**GOOD, "criteria": {"c": [1, 2]}}, "must be a list of bands"),
]


@pytest.mark.parametrize(("line", "reason"), HOSTILE, ids=[reason for _, reason in HOSTILE])
def test_a_bad_line_is_named_with_its_reason_and_spoils_no_other(tmp_path: Path, line: Any, reason: str) -> None:
    path = written(tmp_path / "f.jsonl", [ranked("a", [2, 1]), line, ranked("b", [1, 1])])
    said = refused("load", "p", path, "--create")
    assert said.startswith("line 2: ")
    assert reason in said
    assert "1 of 3 lines were rejected" in said
    assert sorted(Prompt.objects.values_list("key", flat=True)) == ["a", "b"]
    assert Ranking.objects.count() == 2


def test_a_huge_line_is_refused_without_being_held(tmp_path: Path) -> None:
    huge = json.dumps({**GOOD, "prompt": "x" * (6 * MAX_LINE_BYTES)})
    path = written(tmp_path / "f.jsonl", [ranked("a", [2, 1]), huge, ranked("b", [1, 1])])
    tracemalloc.start()
    said = refused("load", "p", path, "--create")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "line 2: is longer than 8,388,608 bytes" in said
    assert Ranking.objects.count() == 2
    assert (tmp_path / "f.jsonl.rejects.jsonl").read_bytes() == huge.encode() + b"\n"
    assert peak < 4.5 * MAX_LINE_BYTES


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n \n\n", "no lines with anything"),
        (b"not json\n", "is not recognised: line 1 is not JSON"),
        (b'{"question": 1}\n', "is not recognised: line 1 has the fields question"),
        ('{"prompt": "q"}'.encode("utf-16"), "is UTF-16"),
        (b"\x1f\x8b\x08\x00rest", "is compressed"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    assert reason in refused("load", "p", path, "--create")


def test_unknown_projects_and_files_are_refused(tmp_path: Path) -> None:
    assert "Add --create" in refused("load", "nowhere", written(tmp_path / "f.jsonl", [GOOD]))
    assert "There is no file" in refused("load", "p", tmp_path / "absent.jsonl", "--create")
    assert "project_invalid" not in refused("load", "no slug!", written(tmp_path / "f.jsonl", [GOOD]), "--create")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    load("p", path)
    assert Ranking.objects.count() == 1


def test_rejects_can_be_mended_and_loaded_again(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", [ranked("a", [2, 1]), {**ranked("b", [1, 2]), "ranks": [1]}])
    refused("load", "p", path, "--create")
    rejects = tmp_path / "f.jsonl.rejects.jsonl"
    mended = [json.loads(line) | {"ranks": [1, 2]} for line in rejects.read_text().splitlines()]
    load("p", written(rejects, mended))
    assert Ranking.objects.count() == 2


def test_rejects_that_somebody_is_mending_are_not_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", [GOOD, "bad"])
    rejects = tmp_path / "f.jsonl.rejects.jsonl"
    refused("load", "p", path, "--create")
    assert str(rejects) in refused("load", "p", path)
    rejects.write_text("half mended")
    assert ".rejects.2.jsonl" in refused("load", "p", path)
    assert rejects.read_text() == "half mended"
    assert not list(tmp_path.glob("*.part"))


def test_the_same_key_with_other_content_is_refused(tmp_path: Path) -> None:
    other_prompt = {**ranked("a", [1, 2]), "prompt": "Other?"}
    other_texts = {**ranked("a", [1, 2]), "completions": ["x", "y"]}
    path = written(tmp_path / "f.jsonl", [ranked("a", [1, 2]), other_prompt, other_texts])
    said = refused("load", "p", path, "--create")
    assert "line 2: key 'a' is present already with other messages" in said
    assert "line 3: key 'a' is present already with other completions" in said


def test_the_same_rater_ranks_a_prompt_once(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", [ranked("a", [1, 2]), ranked("a", [1, 2]), ranked("a", [2, 1])])
    said = refused("load", "p", path, "--create")
    assert said.count("line ") == 1
    assert "line 3: rater 'r1' has ranked prompt 'a' already, and differently" in said
    twice = {**ranked("b", [1, 2]), "ratings": [{"rater": "x", "ranks": [1, 2]}, {"rater": "x", "ranks": [1, 2]}]}
    assert "ranks twice in one line" in refused("load", "p", written(tmp_path / "g.jsonl", [twice]), "--as", "rankings")


def test_a_file_cannot_speak_for_a_person_who_signs_in(tmp_path: Path) -> None:
    desk.person("anna@p")
    path = written(tmp_path / "f.jsonl", [ranked("a", [1, 2], rater="anna"), GOOD])
    assert "line 1: rater 'anna@p' is the name of a user whose rankings are not imported" in refused("load", "p", path, "--create")
    assert not Prompt.objects.filter(key="a").exists()


def test_loading_a_file_twice_adds_nothing_and_says_so(tmp_path: Path) -> None:
    rows = [ranked("a", [1, 2]), {"prompt": "Only a question?"}, ranked("b", [1, 1, 2])]
    path = written(tmp_path / "f.jsonl", rows[:1] + rows[2:])
    load("p", path)
    before = [model.objects.count() for model in (Prompt, Completion, Lease, Ranking, User, Membership)]
    said = load("p", path)
    assert "added to p: nothing" in said
    assert "there already: 2 prompts, 2 rankings" in said
    assert [model.objects.count() for model in (Prompt, Completion, Lease, Ranking, User, Membership)] == before


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ({"ranks": [2, 1, 2]}, [["b"], ["a", "c"]]),
        ({"ranks": [10, 0.5, 3]}, [["b"], ["c"], ["a"]]),
        ({"ranks": {"P2": 1, "P1": 3, "c-id": 2}}, [["b"], ["c"], ["a"]]),
        ({"scores": [1.5, 9, 1.5]}, [["b"], ["a", "c"]]),
        ({"scores": {"P1": -1, "P2": 0, "c-id": 7}}, [["c"], ["b"], ["a"]]),
        ({"bands": [[1], [2, 0]]}, [["b"], ["a", "c"]]),
        ({"bands": [["P2", "c-id"], ["P1"]]}, [["b", "c"], ["a"]]),
        ({"ranks": [1, 2, 3], "scores": [9, 10, 11]}, [["a"], ["b"], ["c"]]),
    ],
)
def test_ranks_scores_and_bands_become_bands(tmp_path: Path, order: dict[str, Any], expected: list[list[str]]) -> None:
    completions = [{"text": "a", "policy": "P1"}, {"text": "b", "policy": "P2"}, {"text": "c", "id": "c-id"}]
    load("p", written(tmp_path / "f.jsonl", [{"key": "k", "prompt": "q", "completions": completions, **order}]))
    assert bands("k") == expected


def test_ranks_may_stand_with_each_completion(tmp_path: Path) -> None:
    completions = [{"text": "a", "rank": 2}, {"text": "b", "rank": 1}]
    scored = [{"text": "a", "score": 2}, {"text": "b", "score": 1}]
    rows = [{"key": "r", "prompt": "q", "completions": completions}, {"key": "s", "prompt": "q", "completions": scored}]
    load("p", written(tmp_path / "f.jsonl", rows))
    assert bands("r") == [["b"], ["a"]]
    assert bands("s") == [["a"], ["b"]]


@pytest.mark.parametrize("count", [2, 3, 16])
def test_two_to_sixteen_completions_can_be_ranked_in_one_file(tmp_path: Path, count: int) -> None:
    load("p", written(tmp_path / "f.jsonl", [ranked("k", list(range(count))), ranked("other", [1, 2])]))
    assert len(bands("k")) == count


def test_everything_that_a_ranking_says_is_kept(tmp_path: Path) -> None:
    said = {"rater": "w 1", "ranks": [1, 2], "criteria": {"honest": {"scores": [0, 1]}, "kind": [[0, 1]]}, "flags": {"1": ["unsafe"]}}
    said |= {"comment": "Fine.", "duration_seconds": 12.5, "displayed": [1, 0]}
    row = {"key": "k", "prompt": "q", "completions": ["a", "b"], "rankings": [said, {"rater": 2, "ranks": [1, 1]}]}
    load("p", written(tmp_path / "f.jsonl", [row]))
    ranking = Ranking.objects.get(rater__username="w 1@p")
    a, b = (str(Completion.objects.get(text=text).uid) for text in "ab")
    assert ranking.bands == [[a], [b]]
    assert ranking.criteria["honest"] == [[b], [a]]
    assert set(ranking.criteria["kind"][0]) == {a, b}
    assert (ranking.flags, ranking.displayed) == ({b: ["unsafe"]}, [b, a])
    assert (ranking.comment, ranking.duration_seconds) == ("Fine.", 12.5)
    assert ranking.lease.state == "done"
    user = ranking.rater
    assert (user.kind, user.is_active, user.has_usable_password()) == ("imported", False, False)
    assert Membership.objects.filter(project__slug="p").count() == 2


def test_more_raters_than_slots_get_slots_and_fewer_leave_them_open(tmp_path: Path) -> None:
    rows = [ranked("many", [1, 2], rater=f"r{number}") for number in range(5)] + [ranked("few", [1, 2])]
    load("p", written(tmp_path / "f.jsonl", rows))
    assert Prompt.objects.get(key="many").overlap == 5
    assert Lease.objects.filter(prompt__key="many", state="done").count() == 5
    assert sorted(Lease.objects.filter(prompt__key="few").values_list("slot", "state")) == [(0, "done"), (1, "free"), (2, "free")]


def test_loaded_rankings_take_free_slots_and_never_those_of_people(tmp_path: Path) -> None:
    project = desk.project("p", overlap=2)
    anna = desk.member(project, "anna")
    prompts_add(
        project=project,
        items=[
            {
                "key": "k",
                "messages": [{"role": "user", "content": "Question k?"}],
                "completions": [{"text": "k answer 0"}, {"text": "k answer 1"}],
            }
        ],
    )
    lease = lease_next(project=project, rater=anna)
    load("p", written(tmp_path / "f.jsonl", [ranked("k", [1, 2]), ranked("k", [1, 2], rater="r2")]))
    ranking_submit(rater=anna, token=lease.token, client_id=lease.token, bands=desk.in_order(lease))
    assert Ranking.objects.filter(prompt__key="k").count() == 3
    assert Prompt.objects.get(key="k").overlap == 3


def test_prompts_may_come_first_and_their_completions_later(tmp_path: Path) -> None:
    question = {"key": "k", "prompt": "Question k?"}
    assert "as prompts" in load("p", written(tmp_path / "a.jsonl", [question]))
    assert Lease.objects.count() == 0
    assert "as completions" in load("p", written(tmp_path / "b.jsonl", [question | {"completions": ["x", "y"]}]))
    assert Lease.objects.filter(state="free").count() == 3
    assert "added to p: nothing" in load("p", tmp_path / "a.jsonl")


def test_equal_texts_of_one_policy_are_stored_once_with_their_count(tmp_path: Path) -> None:
    rows = [{"key": "k", "prompt": "q", "completions": ["same", "same", "other", {"text": "same", "policy": "another"}]}]
    said = load("p", written(tmp_path / "f.jsonl", rows), "--policy", "sft")
    assert "stored once: 1" in said
    stored = {(one.text, one.policy): one.sampling for one in Completion.objects.all()}
    assert stored == {("same", "sft"): {"count": 2}, ("other", "sft"): {}, ("same", "another"): {}}


TURN = {"role": "user", "content": "Why?"}
YES, NO = [{"role": "assistant", "content": "Yes."}], [{"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [TURN], "chosen": YES, "rejected": NO},
        {"prompt": [TURN], "chosen": "Yes.", "rejected": "No."},
        {"chosen": [TURN, *YES], "rejected": [TURN, *NO]},
        {"chosen": "Why? Yes.", "rejected": "Why? No."},
    ],
)
def test_every_shape_of_trl_pairs_loads(tmp_path: Path, row: dict[str, Any]) -> None:
    assert "as pairs" in load("p", written(tmp_path / "f.jsonl", [{"id": "k", **row}]))
    assert Prompt.objects.get().messages == [TURN]
    assert [[text.strip() for text in band] for band in bands("k")] == [["Yes."], ["No."]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "rejected must be text"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same text"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected is blank"),
        ({"chosen": [TURN, *YES, TURN, *YES], "rejected": [TURN, *NO, TURN, *YES]}, "the same turns up to the last"),
        ({"chosen": "yes", "rejected": "no"}, "no `prompt`"),
        ({"prompt": [TURN], "chosen": [*YES, *YES], "rejected": NO}, "one turn of the assistant"),
    ],
)
def test_pairs_that_are_none_are_refused(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    assert reason in refused("load", "p", written(tmp_path / "f.jsonl", [row]), "--create")


def test_fields_that_nobody_reads_are_named(tmp_path: Path) -> None:
    said = load("p", written(tmp_path / "f.jsonl", [{"prompt": "q", "complettions": ["a", "b"]}, {"prompt": "r"}]))
    assert "fields not used: complettions (1)" in said


def test_the_shape_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", [GOOD])
    assert "as prompts" in load("p", path, "--as", "prompts")
    assert Completion.objects.count() == 0
    assert "invalid choice" in refused("load", "p", path, "--as", "nonsense")


EXPECTED = {
    "e2e_quality_k5": ("e2e", 2439, 12121),
    "e2e_naturalness_k5": ("e2e", 3465, None),
    "rankme_k3": ("rankme", 900, None),
    "squality_k3": ("squality", 300, 0),
    "oasst_en100": ("oasst", 212, 0),
    "wmt16_ron-eng_k5": ("wmt16", 1259, None),
    "wmt16_eng-ron_k5": ("wmt16", 869, None),
    "hh_helpful_train": ("pairs", 1801, 0),
    "hh_harmless_train": ("pairs", 1817, 0),
}


@pytest.mark.parametrize("name", [*(f"rankings/{name}" for name in RANKINGS), *(f"pairs/{name}" for name in PAIRS)])
def test_every_real_file_is_recognised_and_every_line_of_it_is_good(name: str) -> None:
    path = real(f"{name}.jsonl")
    shape, rankings, ties = EXPECTED[path.stem]
    found = tied = 0
    with path.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            assert shape_of(line).name == shape
            row = SHAPES[shape].read(line, "")
            found += len(row.ratings)
            tied += sum(len(band) * (len(band) - 1) // 2 for rating in row.ratings for band in rating.bands)
    assert found == rankings
    assert ties is None or tied == ties


@pytest.mark.parametrize("name", [*(f"rankings/{name}" for name in RANKINGS), *(f"pairs/{name}" for name in PAIRS)])
def test_real_files_load_and_load_again_to_nothing(tmp_path: Path, name: str) -> None:
    with real(f"{name}.jsonl").open("rb") as lines:
        path = tmp_path / "part.jsonl"
        path.write_bytes(b"".join(itertools.islice(lines, 150)))
    rows = sum(1 for _ in path.open("rb"))
    said = load("p", path)
    assert f"{rows} lines" in said
    assert ", 0 rejected" in said
    assert Prompt.objects.count() == rows
    assert "added to p: nothing" in load("p", path)


def test_a_whole_real_file_loads() -> None:
    load("p", real("rankings/squality_k3.jsonl"))
    assert Ranking.objects.count() == 300
    assert set(Ranking.objects.first().criteria) == {"correctness", "selection"}


def test_wmt_systems_of_one_text_are_tied_and_no_rater_is_shown_them() -> None:
    load("p", real("rankings/wmt16_ron-eng_k5.jsonl"))
    ranking = Ranking.objects.get(prompt__key="wmt-ro-en-1630")
    policies = {str(one.uid): one for one in ranking.prompt.completions.all()}
    best = [policies[uid] for uid in ranking.bands[0]]
    assert {one.policy for one in best} == {"newstest2016.LIMSI.4422.ro-en", "newstest2016.online-B.0.ro-en"}
    assert len({one.sampling["shared_text"] for one in best}) == 1
    assert Lease.objects.exclude(state="done").count() == 0
    assert slots_open(project=Project.objects.get(slug="p"), overlap=5) == 0


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(name: str, count: int) -> int:
        rows = ({"key": f"{name}{n}", "prompt": f"Question {n}? " + "x" * 400, "completions": ["a" * 200, "b" * 200]} for n in range(count))
        path = written(tmp_path / f"{name}.jsonl", rows)
        tracemalloc.start()
        run("load", name, path, "--create", "-v", "0")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak("warm", 10)
    small, large = peak("small", 600), peak("large", 2600)
    assert large < 1.3 * small
