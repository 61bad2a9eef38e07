from itertools import chain

import pytest
import torch

from training.pack import Row, epoch_batches, epoch_order, gather_rows, length_groups, micro_batches, pad_rows, padding_share
from training.rankings import EncodedRanking
from training.schedule import learning_rate_share


def test_the_order_depends_on_seed_and_epoch_alone():
    assert epoch_order(50, seed=1, epoch=0) == epoch_order(50, seed=1, epoch=0)
    assert epoch_order(50, seed=1, epoch=0) != epoch_order(50, seed=1, epoch=1) != epoch_order(50, seed=2, epoch=1)


@pytest.mark.parametrize(("count", "batch"), [(100, 32), (96, 32), (7, 3), (1, 8), (33, 32)])
def test_every_item_comes_once_in_batches_of_near_size(count, batch):
    batches = epoch_batches([1.0] * count, batch=batch, seed=4, epoch=2)
    assert sorted(chain(*batches)) == list(range(count))
    sizes = [len(part) for part in batches]
    assert len(batches) == -(-count // batch)
    assert max(sizes) - min(sizes) <= 1


def test_items_of_several_rankings_fill_a_batch_sooner_and_weightless_ones_are_left_out():
    batches = epoch_batches([3.0, 0.0, 3.0, 3.0, 3.0], batch=6, seed=0, epoch=0)
    assert sorted(chain(*batches)) == [0, 2, 3, 4]
    assert [len(part) for part in batches] == [2, 2]


def test_length_groups_hold_every_row_within_the_budget_and_little_padding():
    lengths = [3, 90, 5, 88, 4, 40, 41, 39, 200]
    groups = length_groups(lengths, budget=180, overhead=4)
    assert sorted(chain(*groups)) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in group) * len(group) <= 180 or len(group) == 1 for group in groups)
    assert groups[0] == [8]
    assert padding_share(lengths, groups) < 0.03


def test_groups_are_the_cheapest_cut():
    """By hand: rows of 10, 10, 2 with an overhead of 5. One group: 30 + 5 = 35; [10, 10], [2]: 20 + 5 + 2 + 5 = 32. With an overhead of
    20: 30 + 20 = 50 against 20 + 20 + 2 + 20 = 62."""
    assert length_groups([10, 2, 10], budget=1000, overhead=5) == [[0, 2], [1]]
    assert length_groups([10, 2, 10], budget=1000, overhead=20) == [[0, 2, 1]]


def test_micro_batches_stay_in_the_budget_unless_one_item_is_larger():
    parts = micro_batches([5, 50, 7, 5, 20], budget=25)
    assert sorted(chain(*parts)) == [0, 1, 2, 3, 4]
    assert parts[0] == [1]
    assert micro_batches([], budget=25) == []


def test_masks_say_what_is_real_whatever_the_ids_are():
    padded = pad_rows([Row([7, 1], [1]), Row([7], [1, 1, 0])], pad_id=1)
    assert padded.input_ids.tolist() == [[7, 1, 1, 1], [7, 1, 1, 0]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert padded.completion_mask.tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


def test_gathered_places_find_each_completion():
    items = [
        EncodedRanking("a", "", [1], [[2], [3]], [0, 1, 0], [], []),
        EncodedRanking("b", "", [4], [[5], [6]], [1, 0], [], []),
    ]
    rows, places = gather_rows(items)
    assert [row.completion_ids for row in rows] == [[2], [3], [5], [6]]
    assert torch.equal(places, torch.tensor([[0, 1, 0], [3, 2, 0]]))


def test_the_schedule_rises_and_falls_as_said():
    """By hand, 10 steps, 2 of warm-up, ending at 0.1: (0+1)/3, (1+1)/3, then 1 at step 2; half-way (step 6) cosine gives 0.1 + 0.9 / 2."""
    share = [learning_rate_share(step, steps=10, warmup_steps=2, kind="cosine", final_share=0.1) for step in range(10)]
    assert share[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert share[6] == pytest.approx(0.55)
    assert learning_rate_share(6, steps=10, warmup_steps=2, kind="linear", final_share=0.0) == pytest.approx(0.5)
    assert learning_rate_share(9, steps=10, warmup_steps=0, kind="constant", final_share=0.0) == 1.0
    with pytest.raises(ValueError, match="unknown schedule"):
        learning_rate_share(0, steps=1, warmup_steps=0, kind="steps", final_share=0.0)
    with pytest.raises(ValueError, match="not in"):
        learning_rate_share(5, steps=5, warmup_steps=0, kind="linear", final_share=0.0)
