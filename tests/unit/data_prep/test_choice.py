"""Which documents stay: filters, duplicates, budget, hold-out; each one left out is counted."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.filters import DocumentFilter, FilterOptions
from forgetscale.data import TokenSet
from forgetscale.data.duplicates import (
    exact_duplicates,
    hash_array,
    is_held_out,
    near_duplicates,
    signature,
    text_hash,
)
from forgetscale.data.text import ngram_hashes, script_fraction, script_pattern, words_of
from forgetscale.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The River, rose -- 3 times!", ["the", "river", "rose", "3", "times"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
        ("ሰላም፡ልዑል ነው", ["ሰላም", "ልዑል", "ነው"]),
        ("日本語 abc", ["日", "本", "語", "abc"]),
        ("...", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("नमस्ते abcd", "Devanagari", 6 / 10),
        ("नमस्ते abcd", "Deva", 6 / 10),
        ("ሰላም, 123!", "Ethiopic", 1.0),
        ("123 !?", "Latin", 0.0),
    ],
)
def test_share_of_a_script(text, script, share):
    assert script_fraction(text, script_pattern(script)) == pytest.approx(share)


def test_unknown_script():
    with pytest.raises(ConfigError, match="script Klingon is no Unicode script"):
        script_pattern("Klingon")


def test_reasons_to_drop(tmp_path):
    text = "one two three four"
    for options, reason in (
        ({"min_characters": 18}, None),
        ({"min_characters": 19}, "too_few_characters"),
        ({"max_characters": 17}, "too_many_characters"),
        ({"min_words": 5}, "too_few_words"),
        ({"max_words": 3}, "too_many_words"),
        ({"script": "Latn"}, None),
        ({"script": "Cyrl"}, "other_script"),
    ):
        assert DocumentFilter(FilterOptions(**options)).reason_to_drop(text) == reason
    for length, reason in ((3, "evaluation_overlap"), (4, None)):
        path = tmp_path / f"{length}.npy"
        np.save(path, np.sort(ngram_hashes(words_of("Zero: TWO, three four five"), length)))
        found = DocumentFilter(FilterOptions(ngram=length), path).reason_to_drop(text)
        assert found == reason
    assert len(ngram_hashes(["a"] * 12, 13)) == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(1, 5))
def test_equal_ngrams_have_equal_hashes(words, length):
    grams = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    hashes = ngram_hashes(words, length).tolist()
    assert len(set(hashes)) == len(set(grams)) == len(set(zip(grams, hashes, strict=True)))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=20))
def test_the_first_of_equal_texts_stays(texts):
    found = exact_duplicates(hash_array([text_hash(text) for text in texts])).tolist()
    assert found == [text in texts[:index] for index, text in enumerate(texts)]


def sentences(seed, count=40):
    generator = np.random.default_rng(seed)
    return " ".join(f"w{number}" for number in generator.integers(0, 5000, count * 8))


def test_near_duplicates():
    base = sentences(0)
    words = base.split()
    close = " ".join([*words[:150], "other", *words[151:]])
    far = " ".join(words[:160]) + " " + sentences(1)
    texts = [base, sentences(2), close, far, base, ""]
    found = near_duplicates(np.stack([signature(text) for text in texts]), 0.8)
    assert found.tolist() == [False, False, True, False, True, False]
    none = near_duplicates(np.empty((0, 128), np.uint32), 0.8)
    assert none.shape == (0,)


def test_held_out_share():
    hashes = np.random.default_rng(0).integers(0, 2**64, 40_000, dtype=np.uint64)
    held = is_held_out(hashes, 0.1, 7)
    assert abs(held.mean() - 0.1) < 0.006
    other = is_held_out(hashes, 0.1, 8)
    assert abs((held & other).mean() - 0.01) < 0.004
    assert not is_held_out(hashes, 0.0, 7).any()
    assert (is_held_out(hashes, 0.05, 7) <= held).all(), "a larger share contains a smaller one"


def pieces(path):
    token_set = TokenSet(path)
    return {
        (piece.file, piece.line)
        for row in range(len(token_set))
        for piece in token_set.document_pieces(row)
    }


def accounted(payload):
    """Return the lines that the manifest accounts for."""
    other = payload["holdout"]["num_documents_of_other_part"] if payload["holdout"] else 0
    return (
        payload["num_documents"]
        + other
        + payload["documents"]["num_empty"]
        + payload["dropped"]["num_dropped"]
        + payload["rejects"]["num_rejects"]
    )


@pytest.fixture
def mixed(tmp_path, sentence, write_lines):
    """Two files with 100 lines: 10 repeated, 2 bad, 3 empty, 5 short, 4 in another script."""
    lines = [{"text": sentence(number)} for number in range(76)]
    lines += [{"text": sentence(number)} for number in range(10)]
    lines += [b"{", b'{"x": 1}', *[{"text": ""}] * 3]
    lines += [{"text": f"short {number}"} for number in range(5)]
    amharic = "\u12f0\u1270 \u1230\u120b\u121d \u12d3\u1208\u121d " * 5
    lines += [{"text": f"{amharic}{number}"} for number in range(4)]
    write_lines(tmp_path / "in" / "a.jsonl", lines[:60])
    write_lines(tmp_path / "in" / "b.jsonl.gz", lines[60:])
    write_lines(tmp_path / "eval.jsonl", [{"question": sentence(5).replace(r"\n", "\n")}])
    return tmp_path / "in"


def test_nothing_is_left_out_without_a_count(make, mixed, tmp_path):
    path = make(
        mixed,
        deduplicate="exact",
        min_characters=20,
        script="Latin",
        decontaminate=(str(tmp_path / "eval.jsonl"),),
        decontaminate_ngram=11,
        max_documents=60,
        seed=3,
        min_document_tokens=2,
        max_tokens=900,
    )
    payload = TokenSet(path).payload
    reasons = payload["dropped"]["by_reason"]
    assert reasons["too_few_characters"] == 5
    assert reasons["other_script"] == 4
    assert reasons["evaluation_overlap"] == 2, "the text and its copy"
    assert reasons["exact_duplicate"] == 9
    assert reasons["not_sampled"] == 15
    assert reasons["over_budget"] == 60 - payload["num_documents"] > 0
    assert payload["documents"]["num_empty"] == 3
    assert payload["rejects"]["num_rejects"] == 2
    assert accounted(payload) == 100 == sum(source["num_lines"] for source in payload["sources"])
    assert 900 <= payload["num_tokens"] + payload["packing"]["dropped_tail_tokens"] < 960
    assert payload["decontamination"]["num_texts"] == 1


def test_held_out_documents_stand_in_exactly_one_set(make, mixed, tmp_path):
    whole = pieces(make(mixed, name="whole"))
    train = make(mixed, holdout_fraction=0.3, seed=1, name="set")
    held = tmp_path / "set-holdout"
    assert not pieces(train) & pieces(held)
    payloads = [TokenSet(path).payload for path in (train, held)]
    assert [payload["holdout"]["part"] for payload in payloads] == ["train", "holdout"]
    assert sum(payload["num_documents"] for payload in payloads) == 95
    assert pieces(train) | pieces(held) <= whole
    for payload in payloads:
        assert accounted(payload) == 100
    assert not list(TokenSet(held).damages())
    for number in range(1, 11):
        first = (str(mixed / "a.jsonl"), number) in pieces(held)
        copy = (str(mixed / "b.jsonl.gz"), number + 16) in pieces(held)
        assert first == copy, "equal texts go together"


def test_a_held_out_set_without_its_training_set_is_made_again(make, mixed, tmp_path):
    import shutil

    train = make(mixed, holdout_fraction=0.3)
    before = json.loads((tmp_path / "set-holdout" / "manifest.json").read_text())["files"]
    shutil.rmtree(train)
    make(mixed, holdout_fraction=0.3)
    after = json.loads((tmp_path / "set-holdout" / "manifest.json").read_text())["files"]
    assert before == after
    shutil.rmtree(train)
    with pytest.raises(DataError, match="set-holdout exists already"):
        make(mixed, holdout_fraction=0.2)


def test_near_duplicates_leave_the_set(make, tmp_path, write_lines):
    base = sentences(0)
    lines = [{"text": sentences(9)}, {"text": base}, {"text": base + " more"}, {"text": base}]
    path = make(write_lines(tmp_path / "in.jsonl", lines), deduplicate="near", block_size=8)
    payload = TokenSet(path).payload
    assert payload["dropped"]["by_reason"] == {"exact_duplicate": 1, "near_duplicate": 1}
    assert {line for _, line in pieces(path)} == {1, 2}


def test_bad_choices(make, mixed, tmp_path, write_lines):
    for options, sentence in (
        ({"script": "Nope"}, "no Unicode script"),
        ({"min_words": 5, "max_words": 3}, "--min-words 5 is above --max-words 3"),
        ({"holdout_fraction": 1.0}, "--holdout-fraction must be at least 0 and below 1"),
        ({"holdout_output": tmp_path / "x"}, "--holdout-output needs --holdout-fraction"),
        ({"near_threshold": 0.0}, "--near-threshold must be above 0"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make(mixed, **options)
    with pytest.raises(ConfigError, match="either --input or --dataset"):
        make()
    with pytest.raises(DataError, match=r"no document of the 2 .* is left .*too_few_w"):
        make(mixed, min_words=1000)
    with pytest.raises(DataError, match="none of the 1 texts in --decontaminate has 13 words"):
        short = write_lines(tmp_path / "short.jsonl", [{"q": "a b"}])
        make(mixed, decontaminate=(str(short),))
    with pytest.raises(DataError, match="bad.jsonl line 1 cannot be read"):
        make(mixed, decontaminate=(str(write_lines(tmp_path / "bad.jsonl", [b"{"])),))


def test_raw_sentencepiece_models(make, corpus, tmp_path, sentence):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(number) for number in range(100)]),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=40,
        minloglevel=2,
    )
    model = tmp_path / "tokenizer.model"
    path = make(corpus, tokenizer=model)
    token_set = TokenSet(path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    first = processor.encode(sentence(0).replace(r"\n", "\n")) + [processor.eos_id()]
    assert token_set.read(range(8)).reshape(-1).tolist()[: len(first)] == first
    assert token_set.payload["vocab_size"] == 40
    (tmp_path / "bad.model").write_bytes(b"nothing")
    with pytest.raises(DataError, match="bad.model is no SentencePiece model"):
        make(corpus, tokenizer=tmp_path / "bad.model", name="bad")


def test_dataset_by_name(make, corpus, tmp_path, monkeypatch, write_lines):
    """A folder stands for the hub, which tests cannot reach."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    write_lines(
        folder / "train.jsonl", [{"text": f"text {number} of the hub"} for number in range(30)]
    )
    token_set = TokenSet(make(dataset=str(folder)))
    assert token_set.num_documents == 30
    with pytest.raises(DataError, match="cannot be loaded .*check name"):
        make(dataset=str(tmp_path / "none"), name="none")
