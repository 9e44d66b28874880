"""Mixtures: exact shares after every row, own epochs of each set, any position at once."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetscale.config import MixtureDataConfig, MixtureSetConfig
from forgetscale.config.data import MAX_PERIOD, whole_shares
from forgetscale.data import TokenSet, open_data, open_stream, write_token_set
from forgetscale.data.mixture import MixedOrder, share_pattern
from forgetscale.data.order import RowOrder
from forgetscale.data.training_data import mixture_shares
from forgetscale.errors import ConfigError, DataError

SHARES = st.lists(st.integers(1, 60), min_size=1, max_size=9)


def mixed(sizes, shares):
    return MixedOrder([RowOrder(n, f"h{n}", i) for i, n in enumerate(sizes)], shares)


class TestShares:
    @settings(deadline=None, max_examples=150)
    @given(shares=SHARES, periods=st.integers(1, 2))
    def test_floor_or_ceil_after_every_row(self, shares, periods):
        pattern = np.tile(share_pattern(shares), periods)
        seen = np.cumsum(pattern == np.arange(len(shares))[:, None], axis=1)
        for n in range(1, len(pattern) + 1):
            for count, share in zip(seen[:, n - 1], shares, strict=True):
                exact = n * share
                assert exact // sum(shares) <= count <= -(-exact // sum(shares))

    def test_extreme_weights(self):
        """One nesting of halves after another goes wrong here; deadlines do not."""
        shares = [9000, 900, 90, 9, 1]
        pattern = share_pattern(shares)
        n = np.arange(1, len(pattern) + 1)
        for index, share in enumerate(shares):
            seen = np.cumsum(pattern == index)
            assert (seen >= n * share // 10_000).all()
            assert (seen <= -(-n * share // 10_000)).all()

    def test_pattern_is_fixed_for_ever(self):
        assert share_pattern([7, 2, 1]).tolist() == PATTERN_7_2_1

    @pytest.mark.parametrize("shares", [[], [0, 1], [-1]])
    def test_impossible_shares(self, shares):
        with pytest.raises(ValueError, match="whole numbers >= 1"):
            share_pattern(shares)

    def test_decimals_are_taken_as_written(self):
        assert whole_shares([0.7, 0.2, 0.1]) == (7, 2, 1)
        assert whole_shares([0.1, 0.3]) == (1, 3), "in binary 0.3 is not three times 0.1"
        assert whole_shares([2, 4.0]) == (1, 2)

    def test_token_weights_count_rows_by_their_tokens(self):
        full, half = Fraction(512), Fraction(256)
        assert mixture_shares([1, 1], [full, full]) == (1, 1)
        assert mixture_shares([1, 1], [full, half]) == (1, 2)

    @settings(deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=2, max_size=5)
    )
    def test_uneven_tokens_are_rounded_to_one_part_in_65536(self, pairs):
        means = [Fraction(*pair) for pair in pairs]
        shares = mixture_shares([1] * len(pairs), means)
        ideal = [1 / mean for mean in means]
        assert min(shares) >= 1
        for share, wanted in zip(shares, ideal, strict=True):
            error = abs(Fraction(share, sum(shares)) - wanted / sum(ideal))
            assert error <= Fraction(len(pairs), MAX_PERIOD)


class TestOrder:
    @settings(deadline=None, max_examples=60)
    @given(
        parts=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=5),
        cuts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    )
    def test_any_cutting_gives_the_same_rows(self, parts, cuts):
        sizes, shares = zip(*parts, strict=True)
        total = sum(cuts)
        sets, rows = mixed(sizes, shares).draw(0, total)
        at = 0
        for cut in cuts:
            again = mixed(sizes, shares).draw(at, cut)
            assert again[0].tolist() == sets[at : at + cut].tolist()
            assert again[1].tolist() == rows[at : at + cut].tolist()
            at += cut

    @settings(deadline=None, max_examples=60)
    @given(
        parts=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=4),
        total=st.integers(0, 300),
    )
    def test_each_set_goes_through_its_own_epochs(self, parts, total):
        sizes, shares = zip(*parts, strict=True)
        order = mixed(sizes, shares)
        sets, rows = order.draw(0, total)
        assert order.counts(total).tolist() == np.bincount(sets, minlength=len(sizes)).tolist()
        for index, size in enumerate(sizes):
            mine = rows[sets == index]
            for start in range(0, len(mine) - size + 1, size):
                assert sorted(mine[start : start + size]) == list(range(size))
            tail = mine[len(mine) // size * size :]
            assert len(set(tail.tolist())) == len(tail)

    def test_far_positions_cost_no_more(self):
        order = mixed([1000, 77], [3, 2])
        sets, rows = order.draw(10**15, 5)
        assert len(rows) == 5
        assert order.counts(10**15).tolist() == [6 * 10**14, 4 * 10**14]


class TestOpenData:
    @pytest.fixture
    def folder(self, tmp_path):
        for name, size, block in (("a", 12, 4), ("b", 5, 4), ("wide", 5, 8)):
            rows = np.repeat(np.arange(size)[:, None] + (50 if name == "b" else 0), block, axis=1)
            write_token_set(tmp_path / name, rows, vocab_size=100, tokenizer_sha256="x")
        return tmp_path

    def config(self, folder: Path, **weights: float) -> MixtureDataConfig:
        sets = [MixtureSetConfig(path=folder / name, weight=w) for name, w in weights.items()]
        return MixtureDataConfig(kind="mixture", sets=tuple(sets))

    def test_batches_name_set_and_row(self, folder):
        data = open_data(self.config(folder, a=0.5, b=0.5))
        batch = next(open_stream(data, seed=1, global_batch_size=20))
        assert batch.set_ids.tolist().count(1) == 10
        expected = batch.row_ids + 50 * batch.set_ids
        assert batch.input_ids.tolist() == expected[:, None].expand(-1, 4).tolist()
        assert batch.metrics == {
            "data/row_share/a": 0.5,
            "data/token_share/a": 0.5,
            "data/row_share/b": 0.5,
            "data/token_share/b": 0.5,
        }

    def test_one_set_of_a_mixture_is_the_set(self, folder):
        data = open_data(self.config(folder, a=3))
        alone = TokenSet(folder / "a")
        assert data.content_hash == alone.content_hash
        one = next(open_stream(data, seed=1, global_batch_size=30))
        two = next(open_stream(alone, seed=1, global_batch_size=30))
        assert one.row_ids.tolist() == two.row_ids.tolist()
        assert one.metrics == {}

    def test_hash_knows_sets_and_shares(self, folder):
        hashes = {
            open_data(self.config(folder, **weights)).content_hash
            for weights in ({"a": 1, "b": 1}, {"a": 1, "b": 2}, {"b": 1, "a": 1}, {"a": 1})
        }
        assert len(hashes) == 4
        again = open_data(self.config(folder, a=0.2, b=0.4)).content_hash
        assert again == open_data(self.config(folder, a=1, b=2)).content_hash

    def test_rows_of_other_length_are_refused(self, folder):
        with pytest.raises(ConfigError, match="wide have 8 tokens"):
            open_data(self.config(folder, a=1, wide=1))

    def test_other_tokenizers_are_refused(self, folder, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "tokenizer.json").write_text("{}")
        with pytest.raises(DataError, match="another tokenizer"):
            open_data(self.config(folder, a=1, b=1), tmp_path / "model")


PATTERN_7_2_1 = [0, 0, 0, 1, 0, 0, 1, 0, 0, 2]
