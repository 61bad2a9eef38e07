import random

import numpy as np
import pytest
import torch
from torch import nn

from training.checkpoint import (
    State,
    load_optimiser_state,
    load_trained,
    optimiser_state,
    random_state,
    read_checkpoint,
    restore_newest,
    set_random_state,
    trained_tensors,
    write_checkpoint,
)
from training.errors import InputError


def state(value):
    return State({"model": {"w": torch.full((3,), float(value))}}, {"step": value})


def test_the_newest_are_kept_and_read_back(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]
    step, found = restore_newest(tmp_path, pytest.fail)
    assert (step, found.values) == (3, {"step": 3})
    assert found.tensors["model"]["w"].tolist() == [3.0] * 3


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_corrupt_checkpoint_is_refused_and_the_one_before_is_taken(tmp_path, damage):
    write_checkpoint(tmp_path, 1, state(1))
    newest = write_checkpoint(tmp_path, 2, state(2))
    file = newest / ("manifest.json" if damage == "manifest" else "model.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    file.write_bytes(data[:-4] if damage in ("cut", "manifest") else data)
    if damage == "remove":
        file.unlink()
    with pytest.raises(ValueError):
        read_checkpoint(newest)
    warnings = []
    assert restore_newest(tmp_path, warnings.append)[0] == 1
    assert "step-2" in warnings[0]


def test_what_a_crash_left_behind_is_never_restored(tmp_path):
    (tmp_path / ".step-9.new").mkdir()
    (tmp_path / "step-8").mkdir()
    assert restore_newest(tmp_path, pytest.fail) is None
    write_checkpoint(tmp_path, 1, state(1))
    assert not (tmp_path / ".step-9.new").exists()


def test_random_generators_go_on_where_they_were():
    saved = random_state()
    first = (torch.rand(3).tolist(), random.random(), np.random.rand())
    random.gauss(0, 1)
    set_random_state(saved)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == first


def test_an_optimiser_goes_on_bit_by_bit():
    def step(module, optimiser, count):
        for _ in range(count):
            optimiser.zero_grad()
            module(torch.ones(2, 4)).square().sum().backward()
            optimiser.step()

    torch.manual_seed(0)
    one = nn.Linear(4, 4)
    first = torch.optim.AdamW(one.parameters(), lr=0.01, fused=True)
    step(one, first, 3)
    other = nn.Linear(4, 4)
    load_trained(other, trained_tensors(one))
    second = torch.optim.AdamW(other.parameters(), lr=0.01, fused=True)
    load_optimiser_state(second, optimiser_state(first))
    for module, optimiser in ((one, first), (other, second)):
        step(module, optimiser, 3)
    assert torch.equal(one.weight, other.weight)


def test_weights_of_another_model_are_refused():
    with pytest.raises(InputError, match="another model"):
        load_trained(nn.Linear(2, 2), trained_tensors(nn.Linear(3, 3)))
