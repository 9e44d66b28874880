"""The last stages of self-synthesised rehearsal: a diverse and central part, answered again."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import main as data_prep_main
from forgetscale.artifact import verify_artifact
from forgetscale.cli.main import main
from forgetscale.data import TokenSet
from forgetscale.generation.central import central_members, embed, k_means, quotas
from forgetscale.generation.result import content_hash, result_files
from forgetscale.generation.run import run_worker
from tests.unit.generation.test_generate_runs import recipe


def blobs(seed, sizes, spread=0.1):
    rng = np.random.default_rng(seed)
    centres = 10 * np.eye(len(sizes))
    return np.concatenate(
        [c + spread * rng.normal(size=(n, len(sizes))) for c, n in zip(centres, sizes, strict=True)]
    )


def test_clusters_are_found_and_a_seed_gives_them_again():
    points = blobs(0, (40, 20, 5))
    labels, centres = k_means(points, 3, 0)
    assert sorted(np.bincount(labels)) == [5, 20, 40]
    for cluster in range(3):
        assert len(set(np.repeat([0, 1, 2], (40, 20, 5))[labels == cluster])) == 1
        np.testing.assert_allclose(centres[cluster], points[labels == cluster].mean(0))
    again, _ = k_means(points, 3, 0)
    assert np.array_equal(labels, again)


def test_each_cluster_keeps_its_share_of_the_nearest():
    points = blobs(1, (40, 20, 4))
    kept = central_members(points, 16, 3, 0)
    assert kept == sorted(set(kept)) and len(kept) == 16
    kinds = np.repeat([0, 1, 2], (40, 20, 4))
    assert np.bincount(kinds[kept]).tolist() == [10, 5, 1]
    for kind in range(3):
        own = np.flatnonzero(kinds == kind)
        distance = np.linalg.norm(points[own] - points[own].mean(0), axis=1)
        nearest = set(own[np.argsort(distance)][: np.bincount(kinds[kept])[kind]])
        assert nearest == set(kept) & set(own)


def test_fewer_points_than_clusters_and_copies():
    assert central_members(np.ones((5, 2)), 3, 20, 0) == central_members(np.ones((5, 2)), 3, 20, 0)
    assert len(central_members(np.ones((5, 2)), 3, 20, 0)) == 3
    with pytest.raises(ValueError, match="0 clusters of 3 points"):
        k_means(np.ones((3, 1)), 0, 0)
    with pytest.raises(ValueError, match="7 of 6 members"):
        quotas([2, 4], 7)


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), data=st.data())
@settings(max_examples=80, deadline=None)
def test_quotas_sum_and_lie_within_one_of_their_share(sizes, data):
    whole = sum(sizes)
    total = data.draw(st.integers(0, whole))
    found = quotas(sizes, total)
    assert sum(found) == total
    for size, quota in zip(sizes, found, strict=True):
        assert 0 <= quota <= size and abs(quota - size * total / max(whole, 1)) < 1


def test_from_written_dialogues_to_rows_with_new_answers(talker, tmp_path, capsys):
    run_worker(recipe(talker, tmp_path / "run", num_dialogues=24))
    written, kept = tmp_path / "run" / "dialogues", tmp_path / "kept"
    command = ["generate", "--keep-central", "9", "--dialogues", str(written), "--clusters", "4"]
    assert main([*command, "--encoder", str(talker), "--output", str(kept)]) == 0
    manifest = verify_artifact(kept, "dialogues")
    assert manifest["payload"]["num_dialogues"] == 9
    assert manifest["inputs"]["selected_from"] == content_hash(written)
    before = [row for path in result_files(written) for row in pq.read_table(path).to_pylist()]
    after = [row for path in result_files(kept) for row in pq.read_table(path).to_pylist()]
    assert len(after) == 9 and all(row in before for row in after)
    texts = [row["messages"][0]["content"] for row in before]
    places = central_members(embed(talker, texts), 9, 4, 0)
    assert [row["sample_id"] for row in after] == [before[place]["sample_id"] for place in places]
    capsys.readouterr()
    assert main([*command, "--encoder", str(talker), "--output", str(kept)]) == 2
    assert "exists already" in capsys.readouterr().err
    more = ["generate", "--keep-central", "99", "--dialogues", str(written)]
    assert main([*more, "--encoder", str(talker), "--output", str(tmp_path / "more")]) == 2
    assert "99 dialogues are to be kept of the 24" in capsys.readouterr().err
    assert main(more) == 2
    assert "--keep-central needs one --dialogues folder" in capsys.readouterr().err
    again = {"kind": "prompts", "path": str(kept), "assistant": {"max_new_tokens": 16}}
    values = recipe(talker, tmp_path / "again", num_dialogues=None, dialogue=again)
    assert run_worker(values)["num_dialogues"] == 9
    (answered,) = result_files(tmp_path / "again" / "dialogues")
    for row, source in zip(pq.read_table(answered).to_pylist(), after, strict=True):
        assert row["source_id"] == str(source["sample_id"])
        assert row["messages"][0] == source["messages"][0]
    rows = ["build", "--sft", "--input", str(kept), "--tokenizer", str(talker)]
    assert data_prep_main([*rows, "--block-size", "96", "--output", str(tmp_path / "rows")]) == 0
    assert TokenSet(tmp_path / "rows").num_documents == 9
