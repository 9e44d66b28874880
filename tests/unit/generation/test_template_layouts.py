"""Round trip for every template family: what dialogues write is what the template writes."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep.encoding import TokenizerSpec
from data_prep.tokenise_sft import ChatEncoder
from forgetscale.config import DialogueFilterConfig, SamplingConfig
from forgetscale.errors import ConfigError
from forgetscale.generation.dialogues import AnswerDialogue, DialogueSettings, SelfDialogue
from forgetscale.generation.filters import DialogueFilter
from forgetscale.generation.layout import ChatLayout
from forgetscale.generation.records import ACCEPTED, REJECTED
from tests.unit.data_prep.families import FAMILIES, Family, make_tokenizer

DAY = "2026-01-31"
TEXTS = [
    ["Who rules the town?", "Nobody.\n\nAh, so!"],
    ["In year 3 the river rose.", "ok"],
    ["(so)", "[x] 7.5!\n- ah\n- so"],
    ["Ah", '"the river"?'],
]


def settings_of(folder, *, turns=1, system=None, max_tokens=200, **filters) -> DialogueSettings:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layout = ChatLayout(tokenizer, turns=turns, system=system, day=DAY)
    rules = DialogueFilter(DialogueFilterConfig(min_user_characters=1, **filters))
    stops = (tokenizer.eos_token_id,)
    return DialogueSettings(layout, rules, "run", stops, max_tokens)


def talk(texts, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


def dictate(dialogue, ids):
    """Give a dialogue the tokens of ``ids`` where it asks for one; all it holds must agree."""
    for _ in range(1000):
        held = len(dialogue.ids)
        assert dialogue.ids == ids[:held]
        if dialogue.push(ids[held], -0.25) is None:
            return dialogue
    raise AssertionError("the dialogue does not end")


@pytest.mark.parametrize("system", [None, "Be kind."], ids=["plain", "system"])
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_dictated_dialogues_are_the_templates(family, turns, system, tokenizer_folders):
    if system is not None and not FAMILIES[family].has_system:
        with pytest.raises(ConfigError, match="refuses a conversation"):
            settings_of(tokenizer_folders[family], turns=turns, system=system)
        return
    if family == "mistral-v3" and turns == 2 and system is not None:
        # This template puts the system message into the last user turn, wherever that is.
        with pytest.raises(ConfigError, match=r"turn by turn|set turns to 1"):
            settings_of(tokenizer_folders[family], turns=turns, system=system)
        return
    settings = settings_of(tokenizer_folders[family], turns=turns, system=system)
    encoder = ChatEncoder(TokenizerSpec(tokenizer_folders[family]), DAY)
    # Without a pre-tokenizer "\n\nAh" is one token, over the border of system message and turn.
    count = 2 if family == "mistral-v3" and system is not None else len(TEXTS)
    for first in range(count):
        texts = [text for n in range(turns) for text in TEXTS[(first + n) % len(TEXTS)]]
        messages = talk(texts, system)
        ids = settings.layout.encode(settings.layout.render(messages))
        dialogue = SelfDialogue(settings, 0, 0, user=SamplingConfig(), assistant=SamplingConfig())
        sample = dictate(dialogue, ids).sample()
        assert (sample.state, sample.reason) == (ACCEPTED, "")
        assert sample.messages == messages
        encoded = encoder(messages)
        # The same mask as training rows of other sources; what follows the last end is left out.
        size = len(sample.input_ids)
        assert sample.input_ids == encoded.ids[:size].tolist()
        mask = np.zeros(size, bool)
        for start, end in sample.supervised:
            mask[start:end] = True
        assert mask.tolist() == encoded.supervised[:size].tolist()
        assert not encoded.supervised[size:].any()
        bos = settings.layout.tokenizer.bos_token_id
        if bos is not None and family != "llama2":  # Llama 2 writes one before every user turn
            assert sample.input_ids.count(bos) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_given_prompts_are_answered_in_place(family, tokenizer_folders):
    settings = settings_of(tokenizer_folders[family])
    prompt = talk(["Who rules the town?", "Nobody.", "Ah, so?"])
    messages = [*prompt, {"role": "assistant", "content": "ok."}]
    ids = settings.layout.encode(settings.layout.render(messages))
    dialogue = AnswerDialogue(
        settings, 3, 0, messages=prompt, source_id="p3", assistant=SamplingConfig()
    )
    sample = dictate(dialogue, ids).sample()
    assert sample.state == ACCEPTED and sample.messages == messages and sample.source_id == "p3"
    assert [turn.role for turn in sample.turns] == ["assistant"]


def drive(settings, script, *, turns=1, user=40, assistant=40):
    """A dialogue that gets the given tokens one after another."""
    dialogue = SelfDialogue(
        settings,
        0,
        0,
        user=SamplingConfig(max_new_tokens=user),
        assistant=SamplingConfig(max_new_tokens=assistant),
    )
    for token in script:
        if dialogue.push(token, -1.0) is None:
            return dialogue.sample()
    raise AssertionError("the dialogue goes on")


def chatml(tokenizer_folders, **how):
    settings = settings_of(tokenizer_folders["chatml"], **how)
    encode = settings.layout.encode
    return settings, encode, settings.layout.ends[0].stop_id


def test_cut_answers_have_no_supervised_end(tokenizer_folders):
    settings, encode, stop = chatml(tokenizer_folders)
    script = [*encode("Who rules?"), stop, *encode("Nobody rules the river")]
    sample = drive(settings, script, assistant=4)
    assert sample.state == ACCEPTED and sample.turns[-1].finish_reason == "length"
    (start, end) = sample.supervised[0]
    assert end - start == 4 and end == len(sample.input_ids)
    assert stop not in sample.input_ids[start:end]
    whole = drive(settings, [*script[:-1], stop], assistant=40)
    assert whole.input_ids[whole.supervised[0][1] - 1] == stop
    strict = settings_of(tokenizer_folders["chatml"], keep_cut_answers=False)
    assert drive(strict, script, assistant=4).reason == "cut_answer"


def test_reasons(tokenizer_folders):
    settings, encode, stop = chatml(tokenizer_folders)
    start = settings.layout.tokenizer.convert_tokens_to_ids("<|im_start|>")
    eos = settings.layout.tokenizer.eos_token_id
    question = encode("Who rules?")
    cases = {
        "cut_user_turn": (encode("the river rose and rose"), {"user": 3}),
        "empty_turn": ([stop, *encode("ok"), stop], {}),
        "special_token": ([*question, start], {}),
        "other_end_of_turn": ([*question, stop, *encode("ok"), eos], {}),
    }
    for reason, (script, limits) in cases.items():
        sample = drive(settings, script, **limits)
        assert (sample.state, sample.reason) == (REJECTED, reason)
    spelled = settings.layout.tokenizer.backend_tokenizer.get_vocab()
    letters = [spelled[letter] for letter in "<|im_end|>"]
    assert drive(settings, [*question, *letters, stop, *encode("ok"), stop]).reason == "role_header"
    repeated = encode("In year 3 the river rose. " * 12)
    loop = drive(settings, [*question, stop, *repeated, stop], assistant=150)
    assert loop.reason == "repetition"
    latin = settings_of(tokenizer_folders["chatml"], script="Ethiopic")
    assert drive(latin, [*question, stop, *encode("ok"), stop]).reason == "other_script"
    tight = settings_of(tokenizer_folders["chatml"], max_tokens=len(question) + 6)
    assert drive(tight, [*question, stop]).reason == "no_room"


def test_a_user_turn_ended_by_the_other_end_token_is_written_in_the_templates_way(
    tokenizer_folders,
):
    settings, encode, stop = chatml(tokenizer_folders)
    eos = settings.layout.tokenizer.eos_token_id
    tail = [*encode("Nobody."), stop]
    usual = drive(settings, [*encode("Who?"), stop, *tail])
    other = drive(settings, [*encode("Who?"), eos, *tail])
    assert other.input_ids == usual.input_ids and eos not in other.input_ids


def test_spaces_that_a_template_would_strip_are_rejected(tokenizer_folders):
    settings = settings_of(tokenizer_folders["llama3"])
    encode, stop = settings.layout.encode, settings.layout.ends[0].stop_id
    assert drive(settings, [*encode("Who?"), stop, *encode(" ok"), stop]).reason == "template_form"


def test_no_template_no_end_and_no_offsets(tmp_path, tokenizer_folders):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["chatml"])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatLayout(tokenizer, day=DAY)
    plain = Family(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        ("<x>",),
        "\n",
    )
    folder = make_tokenizer(tmp_path / "plain", plain)
    with pytest.raises(ConfigError, match="ends an answer with no special token"):
        ChatLayout(AutoTokenizer.from_pretrained(folder), day=DAY)


def test_a_template_that_rewrites_earlier_turns_takes_one_turn_only(tmp_path):
    dated = Family(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ messages | length }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
        " {{ messages | length + 1 }}\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    )
    folder = make_tokenizer(tmp_path / "dated", dated)
    with pytest.raises(ConfigError, match="several turns cannot be written in one pass"):
        ChatLayout(AutoTokenizer.from_pretrained(folder), turns=2, day=DAY)
