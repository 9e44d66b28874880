"""A tiny tokenizer with a chat template, and helpers to write inputs."""

import gzip
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """Byte-level BPE of 400 tokens, saved so that AutoTokenizer loads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence_of(number) for number in range(200)], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)


def sentence_of(number):
    """Text of document ``number``, its line break stored as in MADLAD-400."""
    return f"In year {number} the river rose {number % 7} times.\\nNobody in town slept."


@pytest.fixture
def sentence():
    return sentence_of


def write_to(path, lines):
    """Write ``lines`` (bytes, or values to be written as JSON) to .jsonl or .jsonl.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()) + b"\n"
        for line in lines
    )
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
    return path


@pytest.fixture
def write_lines():
    return write_to


@pytest.fixture
def corpus(tmp_path):
    """Folder with two shards of 60 and 40 documents in the layout of MADLAD-400 v1."""
    folder = tmp_path / "madlad" / "data" / "xx"
    for shard, numbers in enumerate((range(60), range(60, 100))):
        lines = [{"text": sentence_of(number)} for number in numbers]
        write_to(folder / f"xx_clean_{shard:04d}.jsonl.gz", lines)
    return folder


@pytest.fixture
def make(tmp_path, tokenizer_dir):
    """Build a token set with short rows; return its folder."""
    from data_prep.build import BuildOptions, build

    def run(*inputs, name="set", **options):
        output = tmp_path / name
        build(
            BuildOptions(
                inputs=tuple(str(path) for path in inputs),
                **{"tokenizer": tokenizer_dir, "block_size": 16, "output": output} | options,
            )
        )
        return output

    return run
