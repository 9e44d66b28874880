"""Task data and self-written data mixed by conversations or by target tokens."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from forgetscale.config import MixtureDataConfig, MixtureSetConfig
from forgetscale.data import open_data, open_stream, write_token_set
from forgetscale.data.training_data import units_per_row
from forgetscale.errors import ConfigError

SIZE = 32


def write_set(folder, num_rows, lens, num_answer_tokens):
    """Rows of conversations of the given lengths; each ends with an answer of so many tokens."""
    assert sum(lens) == SIZE
    rng = np.random.default_rng(len(lens))
    ids = rng.integers(5, 90, size=(num_rows, SIZE))
    mask = np.zeros(SIZE, bool)
    for end in np.cumsum(lens):
        mask[end - num_answer_tokens : end] = True
    write_token_set(
        folder,
        ids,
        vocab_size=100,
        tokenizer_sha256="0" * 64,
        doc_lens=np.tile(lens, num_rows),
        supervised=np.tile(mask, (num_rows, 1)),
    )
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Task: 4 conversations a row with 2 target tokens each. Self: 2 with 12."""
    root = tmp_path_factory.mktemp("sets")
    task = write_set(root / "task", 40, [8, 8, 8, 8], 2)
    own = write_set(root / "self", 25, [16, 16], 12)
    return task, own


def mixture(sets, own_share, unit):
    weights = (1 - own_share, own_share)
    parts = tuple(
        MixtureSetConfig(kind="sft", path=path, weight=weight)
        for path, weight in zip(sets, weights, strict=True)
    )
    return open_data(MixtureDataConfig(kind="mixture", sets=parts, unit=unit))


def drawn(data, num_batches, batch_size=16):
    """Conversations and target tokens of each set, counted from the batches themselves."""
    sequences, targets, rows = Counter(), Counter(), Counter()
    stream = open_stream(data, seed=3, global_batch_size=batch_size)
    for _, batch in zip(range(num_batches), stream, strict=False):
        for place, set_id in enumerate(batch.set_ids.tolist()):
            name = data.parts[set_id].name
            rows[name] += 1
            targets[name] += int(batch.loss_mask[place].sum())
            sequences[name] += 4 if name == "task" else 2
    return sequences, targets, rows


@pytest.mark.parametrize("own_share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("unit", ["targets", "sequences", "rows"])
def test_the_share_is_kept_in_its_unit_and_both_shares_are_reported(unit, own_share, sets):
    data = mixture(sets, own_share, unit)
    sequences, targets, rows = drawn(data, 60)
    counted = {"targets": targets, "sequences": sequences, "rows": rows}[unit]
    assert counted["self"] / counted.total() == pytest.approx(own_share, abs=0.01)
    shares = data.shares(np.array([rows["task"], rows["self"]]))
    # The formulas: N L over the sum of both, with or without the answer's length.
    lambda_tok = sequences["self"] * 12 / (sequences["self"] * 12 + sequences["task"] * 2)
    lambda_seq = sequences["self"] / (sequences["self"] + sequences["task"])
    assert shares["data/target_share/self"] == pytest.approx(lambda_tok)
    assert shares["data/sequence_share/self"] == pytest.approx(lambda_seq)
    for kind in ("row", "token", "target", "sequence"):
        assert sum(shares[f"data/{kind}_share/{name}"] for name in ("task", "self")) == (
            pytest.approx(1)
        )


def test_one_to_one_by_conversations_is_mostly_self_written_by_tokens(sets):
    """Short targets: the trap of naming a ratio without its unit."""
    shares = mixture(sets, 0.5, "sequences").shares(np.array([100, 200]))
    assert shares["data/sequence_share/self"] == pytest.approx(0.5)
    assert shares["data/target_share/self"] == pytest.approx(12 / 14)


def test_units_of_a_row(sets):
    task, own = (part.token_set for part in mixture(sets, 0.5, "rows").parts)
    assert [units_per_row(task, unit) for unit in ("rows", "tokens", "targets", "sequences")] == [
        1,
        SIZE,
        8,
        4,
    ]
    assert units_per_row(own, "targets") == Fraction(24)


def test_a_set_without_targets(tmp_path, sets):
    ids = np.full((3, SIZE), 7)
    write_token_set(
        tmp_path / "none",
        ids,
        vocab_size=100,
        tokenizer_sha256="0" * 64,
        supervised=np.zeros(ids.shape, bool),
    )
    with pytest.raises(ConfigError, match=r"data.unit is targets, but .*none holds none"):
        mixture((sets[0], tmp_path / "none"), 0.5, "targets")
