import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM

from forgetscale.testbed.tokenizer import SPECIAL, to_fast_tokenizer, train_sentencepiece

QUESTION = [{"role": "user", "content": "to be"}]
ANSWER = [*QUESTION, {"role": "assistant", "content": "not to be"}]


def test_decoding_gives_back_the_text_and_pieces_are_those_of_sentencepiece(
    world, tokenizer, read_lines
):
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(world / "tokenizer" / "tokenizer.model")
    )
    texts = [
        row["text"].replace("\\n", "\n")
        for code in ("src", "tgt")
        for row in read_lines(world / f"text/heldout/{code}.jsonl")
    ]
    for text in [*texts, "Zebra, 17  %\n\n日本 é ", "  a. b?", ""]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert model.encode(text) == ids


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁<"), max_size=40)
)
def test_any_text_survives(small_tokenizer, text):
    ids = small_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert small_tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def small_tokenizer():
    texts = [f"bada dorin {word}." for word in ("bal", "tol", "ren", "dorbal", "badan")] * 20
    return to_fast_tokenizer(train_sentencepiece(texts, 290))


def test_special_tokens(tokenizer):
    assert [tokenizer.convert_ids_to_tokens(number) for number in range(6)] == list(SPECIAL)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<pad>", "<unk>")


def test_chat_template(tokenizer):
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(ANSWER, tokenize=False)
    assert prompt == "<s><|user|> to be<|end|><|assistant|>"
    assert whole == prompt + " not to be<|end|>"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(ids) == whole
    assert tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True) == " not to be"


def test_the_template_marks_what_the_assistant_says(tokenizer):
    rendered = tokenizer.apply_chat_template(
        ANSWER * 2, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = [
        token
        for token, said in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
        if said
    ]
    assert tokenizer.decode(kept) == " not to be<|end|> not to be<|end|>"


@pytest.mark.parametrize(
    "messages", [ANSWER[1:], QUESTION * 2, [{"role": "system", "content": "x"}]]
)
def test_the_template_refuses_other_orders_of_turns(tokenizer, messages):
    with pytest.raises(TemplateError, match="alternate"):
        tokenizer.apply_chat_template(messages, tokenize=False)


def test_target_words_are_cut_finer(world, tokenizer):
    vocabulary = json.loads((world / "vocabulary.json").read_text(encoding="utf-8"))

    def pieces(words):
        return sum(len(tokenizer.tokenize(f" {word}")) for word in words) / len(words)

    assert pieces(vocabulary["target_words"]) > 1.15 * pieces(vocabulary["source_words"])


def test_the_initial_model_loads(world, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(world / "init", local_files_only=True)
    assert type(model).__name__ == "Olmo2ForCausalLM"
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not model.config.tie_word_embeddings
    assert {str(value.dtype) for value in model.state_dict().values()} == {"torch.float32"}
