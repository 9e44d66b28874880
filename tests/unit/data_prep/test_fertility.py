"""Fertility: counted by hand on small text, for byte-level and byte-fallback vocabularies."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.cli import main
from data_prep.fertility import WORD, byte_tokens, compare, find_languages, is_byte_level
from forgetscale.errors import ConfigError


@pytest.fixture(scope="module")
def fallback_dir(tmp_path_factory):
    """Three letters and bytes for all the rest, as SentencePiece's byte fallback does."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {"a": 257, "b": 258, " ": 259}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    folder = tmp_path_factory.mktemp("fallback")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_level_dir(tmp_path_factory):
    """Single bytes and one merge: the two bytes of U+0924's beginning."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: number for number, piece in enumerate(alphabet)}
    vocab |= {"à¤": 256, "à¤¤": 257, "ab": 258}
    core = Tokenizer(models.BPE(vocab, [("à", "¤"), ("à¤", "¤"), ("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    return folder


@pytest.fixture
def inputs(tmp_path, write_lines):
    latin = write_lines(tmp_path / "la.jsonl", [{"text": "ab ab"}, {"text": r"a\nb"}])
    nepali = write_lines(tmp_path / "ne.jsonl", [{"text": "त न"}])
    return [f"Latin={latin}", str(nepali)]


def test_counts_by_hand(inputs, fallback_dir, byte_level_dir):
    found = compare(inputs, [fallback_dir, byte_level_dir])
    rows = {(row["language"], row["tokenizer"][:5]): row for row in found["fertility"]}
    # "ab ab" and "a<line break>b": 8 characters and bytes, 4 words.
    row = rows["Latin", "fallb"]
    assert (row["documents"], row["words"], row["text_bytes"], row["tokens"]) == (2, 4, 8, 8)
    assert (row["byte_tokens"], row["unknown_tokens"]) == (1, 0)  # the line break
    assert rows["Latin", "bytes"]["tokens"] == 6
    assert rows["Latin", "bytes"]["byte_tokens"] == 0
    # U+0924, space, U+0928: 7 bytes; the first is one token of the byte-level vocabulary.
    row = rows["ne", "fallb"]
    assert (row["words"], row["text_bytes"], row["tokens"], row["byte_tokens"]) == (2, 7, 7, 6)
    row = rows["ne", "bytes"]
    assert (row["tokens"], row["byte_tokens"]) == (4, 2)
    assert row["tokens_per_word"] == 2 and row["tokens_per_byte"] == 4 / 7
    assert row["byte_share"] == 0.5


def test_byte_tokens_of_both_kinds(fallback_dir, byte_level_dir):
    from data_prep.encoding import load_tokenizer

    fallback, level = load_tokenizer(fallback_dir), load_tokenizer(byte_level_dir)
    assert not is_byte_level(fallback) and is_byte_level(level)
    assert np.flatnonzero(byte_tokens(fallback)).tolist() == list(range(1, 257))
    vocab = level.get_vocab()
    whole = byte_tokens(level)
    assert not whole[vocab["à¤¤"]] and whole[vocab["à¤"]]
    assert (~whole[:256]).sum() == 128  # ASCII


def test_words_of_many_scripts():
    assert len(WORD.findall("नेपालको राजधानी काठमाडौँ हो।")) == 4
    assert len(WORD.findall("ሰብአዊ መብት፡ ነው።")) == 3
    assert len(WORD.findall("ng'ombe don't, 3 x-ray")) == 5


def test_languages_of_a_copy_and_names(corpus, tmp_path, write_lines):
    root = corpus.parents[1]
    write_lines(root / "data-v1p5" / "yy" / "clean_docs_v2-00000-of-00001.jsonl", [{"text": "a"}])
    found = find_languages([str(root)])
    assert {name: len(paths) for name, paths in found.items()} == {"xx": 2, "yy": 1}
    with pytest.raises(ConfigError, match="names 'xx' twice"):
        find_languages([str(root), f"xx={corpus}"])


def test_page_and_numbers(inputs, fallback_dir, byte_level_dir, tmp_path, capsys):
    output = tmp_path / "report" / "fertility.html"
    arguments = ["fertility", "--input", *inputs, "--tokenizer", str(fallback_dir)]
    arguments += [str(byte_level_dir), "--output"]
    assert main([*arguments, str(output)]) == 0
    assert "tokens / word" in capsys.readouterr().out
    page = output.read_text(encoding="utf-8")
    assert "<svg" in page and "http" not in page
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert len(numbers["fertility"]) == 4
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "fertility.html",
        "fertility.json",
    ]
    assert main([*arguments, str(tmp_path / "x.pdf")]) == 2
    assert "--output must end in .html or .json" in capsys.readouterr().err
