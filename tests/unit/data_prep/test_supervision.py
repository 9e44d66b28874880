"""What is supervised reads back as the answers and their ends, for eight template families."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.encoding import TokenizerSpec
from data_prep.records import BadRecordError
from data_prep.tokenise_sft import ChatEncoder
from forgetscale.errors import ConfigError
from tests.unit.data_prep.families import FAMILIES, make_tokenizer

TEXT = st.text(st.sampled_from("ab zé\n\t.禅🙂>[/")).filter(lambda text: text.strip())
DAY = "2024-07-26"
QUIET = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {
        name: ChatEncoder(TokenizerSpec(make_tokenizer(folder / name, family)), DAY)
        for name, family in FAMILIES.items()
    }


def runs(encoded):
    """Supervised tokens, one list for each run of them."""
    found, last = [], False
    for token, supervised in zip(encoded.ids.tolist(), encoded.supervised.tolist(), strict=True):
        if supervised and not last:
            found.append([])
        if supervised:
            found[-1].append(token)
        last = supervised
    return found


@pytest.mark.parametrize("name", FAMILIES)
@QUIET
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), system=st.none() | TEXT)
def test_round_trip(encoders, name, pairs, system):
    family, encoder = FAMILIES[name], encoders[name]
    messages = []
    if system is not None and family.has_system:
        messages.append({"role": "system", "content": system})
    for question, answer in pairs:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    encoded = encoder(messages)
    tokenizer = encoder.tokenizer
    if family.bos is not None and family.bos != "<s>":
        assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1, "one beginning of text"
    assert len(encoded.spans) == len(pairs)
    assert all(span.has_end for span in encoded.spans)
    for (_, answer), tokens, span in zip(pairs, runs(encoded), encoded.spans, strict=True):
        content = answer.strip() if family.strips else answer
        if family.drops_thoughts and span is not encoded.spans[-1]:
            content = content.lstrip("\n")  # as the template does
        expected = family.before + content + family.end
        assert encoded.text[span.start : span.end] == expected
        decoded = tokenizer.decode(tokens, skip_special_tokens=False)
        # A first token may also hold the end of what stands before the answer, nothing else.
        assert decoded.endswith(expected)
        more = decoded[: len(decoded) - len(expected)]
        assert encoded.text[: span.start].endswith(more)
        assert not more or encoded.num_merged


THOUGHT = "<think>\nhm, year 3\n</think>\n\n"


def talk(*contents, system=None):
    roles = ("user", "assistant")
    found = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + found


def supervised(encoder, messages, first=0):
    encoded = encoder(messages, first)
    return [encoded.text[span.start : span.end] for span in encoded.spans]


def test_dropped_thoughts_are_not_supervised_and_kept_ones_are(encoders):
    messages = talk("a", THOUGHT + "b", "c", THOUGHT + "d")
    found = supervised(encoders["chatml-thinking"], messages)
    assert found == ["b<|im_end|>", THOUGHT + "d<|im_end|>"]
    both = supervised(encoders["chatml"], messages)
    assert both == [THOUGHT + "b<|im_end|>", THOUGHT + "d<|im_end|>"]


def test_a_system_text_that_moves_to_the_last_question(encoders):
    """The template is no prefix of itself: the beginning of the chat changes as it goes on."""
    encoder = encoders["mistral-v3"]
    encoded = encoder(talk("a", "b", "c", "d", system="S"))
    assert encoded.text == "<s>[INST] a[/INST] b</s>[INST] S\n\nc[/INST] d</s>"
    assert [encoded.text[span.start : span.end] for span in encoded.spans] == [" b</s>", " d</s>"]


def test_the_same_tokens_as_at_generation(encoders):
    """What the model is given and what it must write are the tokens of the row, in this order."""
    for name, family in FAMILIES.items():
        encoder = encoders[name]
        encoded = encoder(talk("a b", "ab z."))
        prompt = encoder.tokenizer(
            encoder._render(talk("a b"), add_generation_prompt=True), add_special_tokens=False
        )["input_ids"]
        size = len(prompt)
        assert encoded.ids[:size].tolist() == prompt, name
        assert not encoded.supervised[:size].any() and encoded.supervised[size], name
        assert encoded.num_merged == 0, name
        assert family.end.strip() in encoder.tokenizer.decode(encoded.ids[encoded.supervised])


def test_spaces_that_the_tokenizer_adds(encoders, tmp_path):
    """Llama's first tokenizers put a space before each text, also after special tokens."""
    folder = shutil.copytree(encoders["mistral-v3"].tokenizer.name_or_path, tmp_path / "old")
    description = json.loads((folder / "tokenizer.json").read_text())
    replace = description["normalizer"]
    prepend = {"type": "Prepend", "prepend": "▁"}
    description["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    template = FAMILIES["mistral-v3"].template.replace("{% else %} {{", "{% else %}{{")
    (folder / "chat_template.jinja").write_text(template)
    encoder = ChatEncoder(TokenizerSpec(folder), DAY)
    for answer in ("禅 b", "b", " b"):
        encoded = encoder(talk("a", answer))
        prompt = encoder.tokenizer("<s>[INST]a[/INST]", add_special_tokens=False)["input_ids"]
        assert encoded.ids[: len(prompt)].tolist() == prompt
        assert encoded.supervised.tolist() == [n >= len(prompt) for n in range(len(encoded.ids))]
        written = encoder.tokenizer.decode(encoded.ids[len(prompt) :])
        assert written == f" {answer}</s>"


def test_a_prompt_that_opens_a_thought_and_a_chat_that_drops_it(encoders, tmp_path):
    """The generation prompt does not stand in the chat; the answer is what the template writes."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
    )
    encoder = variant(encoders, tmp_path, template)
    found = supervised(encoder, talk("a", THOUGHT + "b", "c", "d"))
    assert found == ["\n\nb<|im_end|>", "d<|im_end|>"]


def variant(encoders, tmp_path, template, name="chatml"):
    """An encoder with another template."""
    folder = shutil.copytree(encoders[name].tokenizer.name_or_path, tmp_path / "variant")
    (folder / "chat_template.jinja").write_text(template)
    return ChatEncoder(TokenizerSpec(folder), DAY)


def test_a_template_without_generation_prompt_keeps_its_header_out(encoders, tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    encoder = variant(encoders, tmp_path, template)
    assert supervised(encoder, talk("a", "b", "b", "a")) == ["b<|im_end|>", "a<|im_end|>"]


def test_white_space_that_only_earlier_answers_lose(encoders):
    found = supervised(encoders["chatml-thinking"], talk("a", "\n> ", "c", "\n> "))
    assert found == ["> <|im_end|>", "\n> <|im_end|>"]


def test_what_a_template_writes_after_the_prompt_is_to_be_learnt(encoders, tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last"
        " %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = variant(encoders, tmp_path, template)
    found = supervised(encoder, talk("a", "b", "c", "d"))
    assert found == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]


def test_no_end_marker_is_counted(encoders, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    encoder = variant(encoders, tmp_path, template)
    (span,) = encoder(talk("a", "b")).spans
    assert not span.has_end


def test_an_end_of_plain_text_is_learnt(encoders, tmp_path):
    template = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\nDONE\n\n{% endfor %}"
    encoder = variant(encoders, tmp_path, template)
    assert supervised(encoder, talk("a", "b", "c", "d")) == ["b\nDONE\n\n", "d\nDONE\n\n"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "otherwise"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
            "leaves it out",
        ),
        ("{{ raise_exception('never') }}", "refused by the chat template .never."),
    ],
)
def test_templates_that_say_something_else_are_refused(encoders, tmp_path, template, reason):
    encoder = variant(encoders, tmp_path, template)
    with pytest.raises(BadRecordError, match=reason):
        encoder(talk("who", "me"))


def test_roles_out_of_order_are_refused(encoders):
    with pytest.raises(BadRecordError, match="refused by the chat template .roles must alternate"):
        encoders["gemma"](talk("a", "b") + talk("c", "d")[1:])
    with pytest.raises(BadRecordError, match="refused by the chat template .no system role"):
        encoders["gemma"](talk("a", "b", system="S"))


def test_the_date_is_the_builds(encoders, tmp_path):
    template = "{{ strftime_now('%d %b %Y') }}" + FAMILIES["chatml"].template
    encoder = variant(encoders, tmp_path, template)
    assert encoder.uses_day and not encoders["chatml"].uses_day
    encoded = encoder(talk("a", "b"))
    assert encoded.text.startswith("26 Jul 2024<|im_start|>user")
    with pytest.raises(ConfigError, match="today's date in a form that is not"):
        variant(encoders, tmp_path / "other", "{% set f = '%Y' %}{{ strftime_now(f) }}")


def test_answers_of_a_prompt_are_context(encoders):
    messages = talk("a", "b", "c", "d")
    assert supervised(encoders["chatml"], messages, first=2) == ["d<|im_end|>"]


def test_tokenizers_that_do_not_serve(encoders, tmp_path):
    folder = shutil.copytree(encoders["chatml"].tokenizer.name_or_path, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="--sft needs a chat template"):
        ChatEncoder(TokenizerSpec(folder), DAY)
