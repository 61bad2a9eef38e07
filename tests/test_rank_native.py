"""The comparison with TRL in miniature: it runs both sides for real and writes what its table says. How fast is measured, not tested."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.gpu_check import attention_flops
from benchmarks.rank_data import MADE, Row, tiny
from benchmarks.rank_growth import Panel, drawing
from benchmarks.rank_native import main
from benchmarks.rank_stand import SideFailed, Stand

pytestmark = pytest.mark.training


def test_both_sides_make_the_same_update_and_every_number_is_written(tmp_path: Path) -> None:
    """One reward row and one DPO row, one repeat of each side."""
    file = tmp_path / "rows.json"
    assert main(["--tiny", "--quick", "--rows", "reward-k4", "dpo-pairs-p1", "--json", str(file)]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["reward-k4", "dpo-pairs-p1"]
    for row in rows.values():
        assert row["same_update"] is True
        assert row["loss_ours"] == pytest.approx(row["loss_trl"], rel=1e-4)
        assert row["ratio"] > 0
        assert row["memory_ratio"] > 0
        assert row["tokens_per_second_ours"] > 0
        assert row["steps_per_second_trl"] > 0
    assert rows["reward-k4"]["pairs_per_step"] == 2 * 6  # two rankings of four: six pairs each
    assert rows["dpo-pairs-p1"]["reference_seconds_per_step"] > 0
    assert rows["dpo-pairs-p1"]["ratio"] < rows["dpo-pairs-p1"]["ratio_warm"]


def test_the_rows_have_the_names_that_the_targets_speak_of() -> None:
    assert [row.name for row in MADE] == ["reward-k4", "reward-k9", "dpo-k4", "dpo-pairs-p1", "dpo-pairs-p8", "dpo-pairs-p1over8"]


def test_a_row_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    row = tiny(MADE[2])
    row.write(tmp_path)
    assert Row.read(tmp_path) == row


def test_a_side_that_cannot_run_is_told_apart_from_one_that_is_slow(tmp_path: Path) -> None:
    with pytest.raises(SideFailed, match=r"rank_sides .* ended with 1"):
        Stand(tmp_path, tmp_path, 1).run(tiny(MADE[0]), tmp_path / "nowhere", "ours")


def test_the_figure_is_well_formed_and_holds_every_point() -> None:
    panels = [Panel("rankings", "rankings", [(2, 0.5), (4, 1.1)], [(2, 2.0)]), Panel("completions", "K", [(2, 0.1)], [])]
    root = ElementTree.fromstring(drawing(panels, MADE[0]))
    assert len(root.findall(".//{http://www.w3.org/2000/svg}circle")) == 4


def test_attention_is_counted_as_far_as_each_token_sees() -> None:
    """P = 2, K = 1, R = 1: the tokens see 1, 2 and 3 places, 6 together; 12 x 1 layer x 4 wide x 6 = 288."""
    assert attention_flops(layers=1, width=4, prompt=2, completions=1, completion=1) == 288
