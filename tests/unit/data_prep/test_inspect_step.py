"""``inspect --step``: the documents of any step and rank, without replaying the run."""

import json

import numpy as np
import pytest
import yaml

from data_prep.cli import main
from data_prep.inspect import rows_of_step
from forgetscale.config.data import MixtureDataConfig, MixtureSetConfig
from forgetscale.data import SkipList, SkippedRow, open_data, open_stream, write_token_set


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    sets = []
    for name, rows in (("a", 11), ("b", 5)):
        write_token_set(
            tmp_path / name,
            generator.integers(0, 50, (rows, 4)),
            vocab_size=50,
            tokenizer_sha256="ab" * 32,
        )
        sets.append(MixtureSetConfig(path=tmp_path / name, weight=2 if name == "a" else 1))
    return open_data(MixtureDataConfig(kind="mixture", sets=tuple(sets)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("with_skips", [False, True])
def test_any_step_of_any_rank_is_what_the_stream_delivered(data, world_size, with_skips):
    name = data.parts[0].token_set.content_hash
    skips = SkipList(data, [SkippedRow(name, row, "bad", 0, 3) for row in range(9)])
    how = {"seed": 3, "global_batch_size": 3, "world_size": world_size}
    how["skips"] = skips if with_skips else None
    streams = [open_stream(data, rank=rank, **how) for rank in range(world_size)]
    for step in range(1, 20):
        delivered = []
        for rank, stream in enumerate(streams):
            batch = next(stream)
            columns = (batch.set_ids, batch.row_ids, batch.skipped)
            delivered += [(rank, *row) for row in zip(*(c.tolist() for c in columns), strict=True)]
        seen = rows_of_step(data, step, **how)
        assert [(row.rank, row.set_id, row.row, row.skipped) for row in seen] == delivered


def test_step_prints_file_line_and_text(make, corpus, tmp_path, capsys):
    path = make(corpus, block_size=32)
    arguments = ["inspect", str(path), "--step", "3", "--global-batch-size", "5", "--seed", "7"]
    assert main([*arguments, "--world-size", "2"]) == 0
    shown = capsys.readouterr().out
    stream = open_stream(path, seed=7, global_batch_size=5, cursor=10)
    rows = next(stream).row_ids.tolist()
    places = [shown.index(f"row {row} of {path}: 32 tokens; step 3, rank") for row in rows]
    assert places == sorted(places) and len(places) == shown.count("; step 3, rank ")
    assert shown.count("rank 0 of 2") == 2 and shown.count("rank 1 of 2") == 3
    assert "xx_clean_000" in shown and "the river rose" in shown
    assert main([*arguments, "--world-size", "2", "--rank", "1"]) == 0
    assert capsys.readouterr().out == shown[places[2] :]


def test_step_of_a_run_folder(make, corpus, tmp_path, capsys):
    path = make(corpus, block_size=32)
    run = tmp_path / "run"
    run.mkdir()
    recipe = {
        "run": {"name": "a", "output_dir": str(run)},
        "model": {"path": "m"},
        "data": {"path": str(path), "shuffle_seed": 9},
        "method": {"kind": "sft"},
        "train": {"num_steps": 5, "global_batch_size": 4},
        "deepspeed": "z.json",
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    bad = next(open_stream(path, seed=9, global_batch_size=4, cursor=4)).row_ids[1].item()
    entry = {"set": open_stream(path, seed=9, global_batch_size=4).data.content_hash, "row": bad}
    entry |= {"reason": "noise", "step": 0, "first_position": 0}
    (run / "skip_list.jsonl").write_text(json.dumps(entry) + "\n")
    assert main(["inspect", "--run", str(run), "--step", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"row {bad} of {path}: 32 tokens; step 2, rank 0 of 1; on the skip list" in shown
    assert shown.count("on the skip list") == 1 and shown.count("; step 2,") == 4
    assert main(["inspect", "--run", str(run), "--step", "2", "--seed", "1"]) == 2
    assert "stand in the run's recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "exactly one of --row and --step"),
        (["--row", "1", "--step", "1"], "exactly one of --row and --step"),
        (["--step", "1"], "--step needs --global-batch-size >= 1, got None"),
        (["--step", "0", "--global-batch-size", "2"], "--step must be >= 1"),
        (["--step", "1", "--global-batch-size", "2", "--rank", "1"], "--rank must lie in 0..0"),
        (["--step", "1", "--run", "x"], "exactly one of a token set folder and --run"),
    ],
)
def test_wrong_options_are_one_sentence(make, corpus, capsys, options, message):
    assert main(["inspect", str(make(corpus)), *options]) == 2
    assert message in capsys.readouterr().err
