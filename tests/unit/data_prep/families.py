"""Chat templates in the manner of eight model families, and the tokenizers that go with them.

Facts only: which markers stand where, where white space is stripped, what is refused or left out.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerFast

CORPUS = ["In year 3 the river rose.", "Who rules the town? Nobody.\n\nAh, so!", "[/INST] ok <x>"]


@dataclass(frozen=True)
class Family:
    """A template and what is known of it without rendering."""

    template: str
    special: tuple[str, ...]
    end: str
    """What ends an answer."""
    bos: str | None = None
    eos: str = "</s>"
    strips: bool = False
    """The template strips white space around messages."""
    before: str = ""
    """What the model writes between generation prompt and content."""
    has_system: bool = True
    drops_thoughts: bool = False
    metaspace: bool = False
    rstrip: tuple[str, ...] = field(default=())
    """Special tokens that swallow the white space after them."""


_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)

FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "chatml-thinking": Family(
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 < ns.last %}"
        "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        drops_thoughts=True,
    ),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n"
        "{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}",
        ("<|begin|>", "<|header|>", "<|/header|>", "<|eot|>"),
        "<|eot|>",
        bos="<|begin|>",
        eos="<|eot|>",
        strips=True,
    ),
    "llama2": Family(
        "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
        "{% set messages = messages[1:] %}{% else %}{% set sys = none %}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first and sys is not none %}<<SYS>>\n{{ sys }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}"
        "{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        " </s>",
        bos="<s>",
        strips=True,
        before=" ",
        metaspace=True,
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}"
        "\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        strips=True,
        has_system=False,
        metaspace=True,
    ),
    "mistral-v3": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST]{% if loop.index0 >= messages | length - 2 and sys is "
        "defined %} {{ sys }}\n\n{{ m.content }}{% else %} {{ m.content }}{% endif %}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        bos="<s>",
        before=" ",
        metaspace=True,
    ),
    "phi3": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|end|>",
        eos="<|endoftext|>",
        rstrip=("<|end|>", "<|user|>"),
    ),
    "tulu": Family(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}"
        "{{ eos_token }}{% if not loop.last %}\n{% endif %}{% else %}<|{{ m.role }}|>\n"
        "{{ m.content }}\n{% endif %}{% if loop.last and add_generation_prompt %}<|assistant|>\n"
        "{% endif %}{% endfor %}",
        ("</s>",),
        "</s>",
    ),
}


def make_tokenizer(folder: Path, family: Family) -> Path:
    """Write the tokenizer of a family: byte-level BPE, or SentencePiece's way with bytes."""
    special = list(dict.fromkeys([*family.special, family.eos, "<pad>"]))
    if family.metaspace:
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token=None, fuse_unk=True))
        core.normalizer = normalizers.Replace(" ", "▁")
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        extra = [f"<0x{number:02X}>" for number in range(256)]
        alphabet: list[str] = []
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.post_processor = ByteLevel(trim_offsets=True)
        extra, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=extra, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=family.bos, eos_token=family.eos, pad_token="<pad>"
    )
    from tokenizers import AddedToken

    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken(token, special=True, normalized=False, rstrip=token in family.rstrip)
                for token in special
                if token not in (family.bos, family.eos, "<pad>")
            ]
        }
    )
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    return folder
