"""Freeze plans: what they freeze, what is refused, and the file they are kept in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.errors import ConfigError, DataError
from forgetscale.masks import FreezePlan, load_plan, pack_slice, save_plan

SHAPES = {"a.weight": (4, 6), "b.weight": (3, 5), "norm.weight": (5,), "embed.weight": (9, 2)}


def plan_of(**changes) -> FreezePlan:
    parts = {
        "columns": {"a.weight": torch.tensor([0, 5]), "norm.weight": torch.tensor([2])},
        "rows": {"embed.weight": torch.tensor([1, 8]), "a.weight": torch.tensor([3])},
        "whole": frozenset({"b.weight"}),
        "provenance": {"method": "ssu", "model_hash": "ff"},
    }
    return FreezePlan(**(parts | changes))


def test_number_of_frozen_elements():
    # a: 2 columns x 4 + 1 row x 6 - 2 shared; norm 1; embed 2 x 2; b 15.
    assert plan_of().num_frozen(SHAPES) == (8 + 6 - 2) + 1 + 4 + 15


@given(st.data())
def test_number_of_frozen_elements_is_that_of_full_masks(data):
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    columns = sorted(data.draw(st.sets(st.integers(0, width - 1))))
    rows = sorted(data.draw(st.sets(st.integers(0, height - 1))))
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, columns] = True
    mask[rows] = True
    plan = FreezePlan(columns={"w": torch.tensor(columns)}, rows={"w": torch.tensor(rows)})
    assert plan.num_frozen({"w": (height, width)}) == int(mask.sum())


def test_whole_parameters_freeze_every_element():
    mask = plan_of().slice_mask("b.weight", (3, 5), 4, 7)
    assert mask is not None
    assert mask.num_frozen() == 7


def test_a_parameter_outside_the_plan_has_no_mask():
    assert plan_of().slice_mask("other", (3, 5), 0, 15) is None


def element_plan(**changes):
    bits = pack_slice(torch.arange(15) % 4 == 1, 0, 15)
    return plan_of(**({"whole": frozenset(), "elements": {"b.weight": bits}} | changes))


class TestElements:
    def test_round_trip_maps_the_bits(self, tmp_path):
        plan = element_plan()
        plan.check_model(SHAPES)
        save_plan(tmp_path / "plan", plan)
        found = load_plan(tmp_path / "plan")
        assert torch.equal(found.elements["b.weight"], plan.elements["b.weight"])
        assert found.content_hash() == plan.content_hash() != plan_of().content_hash()
        assert found.num_frozen(SHAPES) == plan_of(whole=frozenset()).num_frozen(SHAPES) + 4
        with safetensors.safe_open(tmp_path / "plan" / "plan.safetensors", "pt") as file:
            stored = file.get_tensor("elements/b.weight")
        assert stored.dtype == torch.uint8 and stored.tolist() == [0b00100010, 0b00100010]
        assert "b.weight" in found.names

    def test_large_bits_take_no_memory_until_they_are_read(self, tmp_path):
        numel = 400_000_000
        bits = torch.zeros(numel // 8, dtype=torch.uint8)
        save_plan(tmp_path / "plan", FreezePlan(elements={"w": bits}))
        del bits
        before = private_bytes()
        plan = load_plan(tmp_path / "plan")
        mask = plan.slice_mask("w", (20_000, 20_000), 0, numel // 10_000)
        assert mask is not None and mask.num_frozen() == 0
        assert private_bytes() - before < numel // 8 // 4

    def test_the_hash_is_of_the_bits(self):
        other = element_plan(elements={"b.weight": torch.tensor([1, 0], dtype=torch.uint8)})
        assert other.content_hash() != element_plan().content_hash()

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            (
                {"elements": {"b.weight": torch.zeros(3, dtype=torch.uint8)}},
                r"b.weight has 15 elements, 2 bytes of bits, but the plan holds \[3\]",
            ),
            (
                {"elements": {"b.weight": torch.zeros(2, dtype=torch.int32)}},
                r"the plan holds \[2\] torch.int32",
            ),
            (
                {"elements": {"b.weight": torch.tensor([0, 128], dtype=torch.uint8)}},
                "b.weight has 15 elements but the plan names an element after the last",
            ),
            (
                {"elements": {"c.weight": torch.zeros(2, dtype=torch.uint8)}},
                "no parameter 'c.weight'",
            ),
            ({"whole": frozenset({"b.weight"})}, "planned by elements and by columns, rows"),
        ],
    )
    def test_bits_that_do_not_fit(self, changes, sentence):
        with pytest.raises(ConfigError, match=sentence):
            element_plan(**changes).check_model(SHAPES)


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", text).group(1))


class TestCheckModel:
    def test_a_good_plan(self):
        plan_of().check_model(SHAPES)
        FreezePlan(columns={"a.weight": torch.tensor([], dtype=torch.int64)}).check_model(SHAPES)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            (
                {"whole": frozenset({"b.weigth"})},
                r"no parameter 'b.weigth' \(4 names; nearest: b.weight\)",
            ),
            (
                {"columns": {"a.weight": torch.tensor([6])}},
                "a.weight has 6 columns but .* column 6",
            ),
            ({"rows": {"embed.weight": torch.tensor([9])}}, "embed.weight has 9 rows but .* row 9"),
            ({"rows": {"norm.weight": torch.tensor([1])}}, "norm.weight has 1 rows"),
            ({"columns": {"a.weight": torch.tensor([-1, 2])}}, "a.weight has 6 columns"),
            ({"columns": {"a.weight": torch.tensor([2, 1])}}, "not sorted or repeat"),
            ({"columns": {"a.weight": torch.tensor([2, 2])}}, "not sorted or repeat"),
        ],
    )
    def test_a_plan_that_does_not_fit(self, changes, sentence):
        with pytest.raises(ConfigError, match=sentence):
            plan_of(**changes).check_model(SHAPES)


class TestFile:
    def test_round_trip(self, tmp_path):
        plan = plan_of()
        save_plan(tmp_path / "plan", plan, {"run": {"name": "x"}})
        for path in (tmp_path / "plan", tmp_path / "plan" / "plan.safetensors"):
            found = load_plan(path)
            assert found.content_hash() == plan.content_hash()
            assert found.whole == plan.whole
            assert found.provenance == plan.provenance
            assert {k: v.tolist() for k, v in found.rows.items()} == {
                k: v.tolist() for k, v in plan.rows.items()
            }

    def test_public_layout(self, tmp_path):
        save_plan(tmp_path / "plan", plan_of())
        with safetensors.safe_open(tmp_path / "plan" / "plan.safetensors", "pt") as file:
            assert sorted(file.keys()) == [
                "columns/a.weight",
                "columns/norm.weight",
                "rows/a.weight",
                "rows/embed.weight",
            ]
            assert file.get_tensor("columns/a.weight").dtype == torch.int32
            header = json.loads(file.metadata()["forgetscale"])
        assert header["whole"] == ["b.weight"]
        assert header["provenance"]["method"] == "ssu"

    def test_the_hash_is_of_what_is_frozen(self):
        same = plan_of(provenance={"method": "other"})
        assert same.content_hash() == plan_of().content_hash()
        for changes in ({"whole": frozenset()}, {"columns": {}}, {"rows": {}}):
            assert plan_of(**changes).content_hash() != plan_of().content_hash()

    def test_a_flipped_bit_is_noticed(self, tmp_path):
        save_plan(tmp_path / "plan", plan_of())
        path = tmp_path / "plan" / "plan.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(DataError, match="plan.safetensors has other content"):
            load_plan(tmp_path / "plan")

    def test_no_plan(self, tmp_path):
        with pytest.raises(DataError, match="does not exist; expected a freeze_plan artefact"):
            load_plan(tmp_path / "nothing")

    def test_an_older_plan_is_replaced(self, tmp_path):
        save_plan(tmp_path / "plan", plan_of())
        save_plan(tmp_path / "plan", plan_of(whole=frozenset()))
        assert load_plan(tmp_path / "plan").whole == frozenset()
        assert [path.name for path in tmp_path.iterdir()] == ["plan"]
