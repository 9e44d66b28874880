"""New vocabulary entries: reachable, reversible, below the old merges; rows as defined."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from data_prep.cli import main
from data_prep.encoding import load_tokenizer
from data_prep.extend_vocabulary import extend_vocabulary
from data_prep.fertility import measure
from data_prep.vocabulary import join_pairs, make_extension, plan_extension
from forgetscale.artifact import verify_artifact
from forgetscale.errors import ConfigError, DataError
from forgetscale.models import SafetensorsFolder

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = Path(os.environ.get("FORGETSCALE_REAL_DATA", ROOT / "../shared/data/madlad_sample"))
NEPALI = "सबै मानिस जन्मजात स्वतन्त्र हुन् र समान अधिकार छन्। मानिस स्वतन्त्र छन्।"


def describe(vocab, merges):
    model = {"type": "BPE", "vocab": {piece: n for n, piece in enumerate(vocab)}, "merges": merges}
    return {"model": model, "added_tokens": [{"id": len(vocab), "content": "<s>"}]}


def test_join_pairs_takes_the_lowest_rank_first():
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2}
    assert join_pairs("abcab", ranks) == ["abc", "ab"]
    assert join_pairs("", ranks) == []


def test_worked_example_of_new_merges():
    description = describe(["a", "b", "c", "ab"], [["a", "b"]])
    found = plan_extension(description, ["ab", "abc", "cabc"], 9, byte_level=True)
    assert found.first_id == 5  # after the added token
    assert [token.piece for token in found.tokens] == ["abc", "cabc"]
    assert [token.constituents for token in found.tokens] == [(3, 2), (2, 3, 2)]
    assert found.merges == (("ab", "c"), ("c", "abc"))
    # Three parts are joined from the left, and the limit counts what arises on the way.
    assert not plan_extension(description, ["cacb"], 2, byte_level=True).tokens
    found = plan_extension(description, ["cacb"], 3, byte_level=True)
    assert [token.piece for token in found.tokens] == ["ca", "cac", "cacb"]


def test_letters_the_vocabulary_lacks_become_entries_spelled_in_bytes():
    vocab = [f"<0x{byte:02X}>" for byte in range(256)] + ["a"]
    found = plan_extension(describe(vocab, []), ["नa"], 9, byte_level=False)
    assert [token.piece for token in found.tokens] == ["न", "नa"]
    assert found.tokens[0].constituents == (0xE0, 0xA4, 0xA8)
    assert found.tokens[1].constituents == (0xE0, 0xA4, 0xA8, 256)
    with pytest.raises(ConfigError, match="knows neither 'न' nor its bytes"):
        plan_extension(describe(["a"], []), ["नa"], 9, byte_level=False)


@pytest.fixture(scope="module")
def fallback_tokenizer():
    """SentencePiece's form in tokenizers: spaces as U+2581, byte fallback."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"\u2581": 256, "a": 257, "b": 258, "ab": 259, "<unk>": 260}
    core = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte_level", "fallback"])
def extended(request):
    """Old and new tokenizer, before and after learning one Nepali line."""
    if request.param == "fallback":
        old = request.getfixturevalue("fallback_tokenizer")
    else:
        old = load_tokenizer(request.getfixturevalue("tokenizer_dir"))
    extension, description = make_extension(old, [NEPALI] * 3, 60)
    new = Tokenizer.from_str(json.dumps(description))
    return old.backend_tokenizer, new, extension


def ids_of(backend, text):
    return backend.encode(text, add_special_tokens=False).ids


def test_target_text_gets_shorter_and_comes_back(extended):
    old, new, extension = extended
    assert 0 < len(extension.tokens) <= 60
    before, after = ids_of(old, NEPALI), ids_of(new, NEPALI)
    assert len(after) < 0.6 * len(before)
    assert new.decode(after) == NEPALI
    assert max(after) >= extension.first_id
    for place, token in enumerate(extension.tokens):
        assert new.id_to_token(extension.first_id + place) == token.piece
        spelled = "".join(old.id_to_token(number) for number in token.constituents)
        assert spelled == token.piece or "<0x" in spelled


@given(st.text())
def test_any_text_decodes_as_before(extended, text):
    old, new, _ = extended
    assert new.decode(ids_of(new, text)) == old.decode(ids_of(old, text))


@given(st.text(alphabet="In year the river rose.\n0123456789"))
def test_source_text_keeps_its_tokens(extended, text):
    old, new, _ = extended
    assert ids_of(new, text) == ids_of(old, text)


def make_model(folder, tokenizer_dir, *, tied=False, padded=0, dtype=torch.bfloat16):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + padded,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="8KB")
    return folder


@pytest.fixture
def target(tmp_path, write_lines):
    return str(write_lines(tmp_path / "ne.jsonl", [{"text": NEPALI}] * 3))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded", [0, 10, 500])
def test_model_and_tokenizer_load_with_transformers(tmp_path, tokenizer_dir, target, tied, padded):
    source = make_model(tmp_path / "old", tokenizer_dir, tied=tied, padded=padded)
    output = tmp_path / "new"
    payload = extend_vocabulary(source, [target], 40, output)
    verify_artifact(output, "extended_model")
    old, new = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (source, output)
    )
    first, count = payload["first_new_id"], payload["num_new_tokens"]
    assert first == len(AutoTokenizer.from_pretrained(source)) and count <= 40
    assert new.config.vocab_size == max(first + padded, first + count) == payload["vocab_size"]
    assert len(payload["grown_tensors"]) == (1 if tied else 2)
    tokenizer, before = (AutoTokenizer.from_pretrained(path) for path in (output, source))
    params = dict(new.named_parameters())
    for name, param in old.named_parameters():
        if name not in payload["grown_tensors"]:
            assert torch.equal(params[name], param), name
            continue
        assert torch.equal(params[name][:first], param[:first])
        for number in range(first, first + count):
            text = tokenizer.convert_ids_to_tokens(number)
            ids = [before.get_vocab()[piece] for piece in _spell(before, text)]
            expected = param[ids].float().mean(0).to(param.dtype)
            assert torch.equal(params[name][number], expected)
        assert torch.equal(params[name][first + count :], param[first + count :])
    ids = torch.tensor([before("In year 5 the river rose.")["input_ids"]])
    assert tokenizer("In year 5 the river rose.")["input_ids"] == ids[0].tolist()
    assert torch.equal(new(ids).logits[..., :first], old(ids).logits[..., :first])
    assert tokenizer.decode(tokenizer(NEPALI)["input_ids"]) == NEPALI
    assert tokenizer.chat_template == before.chat_template
    gain = payload["fertility"]
    size = len(NEPALI.encode())
    assert gain["tokens_per_byte_after"] == len(tokenizer(NEPALI)["input_ids"]) / size
    assert gain["tokens_per_byte_after"] < 0.6 * gain["tokens_per_byte_before"]


def _spell(tokenizer, piece):
    """Pieces of the old tokenizer for a new one, which is spelled in byte letters."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return join_pairs(list(piece), {tuple(pair): rank for rank, pair in enumerate(merges)})


def test_same_input_gives_the_same_bytes(tmp_path, tokenizer_dir, target):
    source = make_model(tmp_path / "old", tokenizer_dir)
    for name in ("a", "b"):
        extend_vocabulary(source, [target], 40, tmp_path / name)
    files = [sorted((tmp_path / name).glob("*.*")) for name in ("a", "b")]
    for one, two in zip(*files, strict=True):
        assert one.name == two.name
        assert one.name == "manifest.json" or one.read_bytes() == two.read_bytes()
    folder = SafetensorsFolder(tmp_path / "a")
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    sizes = [torch.Size(folder.shape(name)).numel() * 2 for name in folder.names()]
    assert index["metadata"]["total_size"] >= sum(sizes)


def test_what_cannot_be_extended_is_refused(tmp_path, tokenizer_dir, target, capsys):
    source = make_model(tmp_path / "old", tokenizer_dir)
    arguments = ["extend-vocabulary", f"--input={target}", f"--output={tmp_path / 'new'}"]
    assert main([*arguments, f"--model={source}", "--num-pieces=0"]) == 2
    assert "--num-pieces must be >= 1" in capsys.readouterr().err
    words = {"a": 0, "<unk>": 1}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    (source / "tokenizer.json").write_text(core.to_str())
    assert main([*arguments, f"--model={source}", "--num-pieces=9"]) == 2
    assert "is of type WordLevel, expected BPE" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_text_without_anything_new_is_refused(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    for texts in (["x"], [""]):
        with pytest.raises(DataError, match="no piece that the tokenizer lacks|text is empty"):
            make_extension(tokenizer, texts, 5)


@pytest.mark.skipif(
    not SAMPLE.is_dir(), reason=f"no real text at {SAMPLE}; set FORGETSCALE_REAL_DATA"
)
@pytest.mark.parametrize(("language", "most"), [("ne", 0.5), ("am", 0.5)])
def test_real_text_costs_less(tmp_path, tokenizer_dir, language, most):
    source = make_model(tmp_path / "old", tokenizer_dir)
    (path,) = (SAMPLE / "data" / language).glob("*.gz")
    extend_vocabulary(source, [str(path)], 300, tmp_path / "new")
    old, new = (measure(language, [path], tmp_path / name, name) for name in ("old", "new"))
    assert new.tokens < most * old.tokens
    assert new.byte_tokens < old.byte_tokens
