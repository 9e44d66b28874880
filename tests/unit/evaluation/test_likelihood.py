import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from forgetscale.data import tokenizer_hash, write_token_set
from forgetscale.errors import ConfigError, DataError, ForgetScaleError
from forgetscale.evaluation import (
    HuggingFaceLikelihood,
    LiveEvaluator,
    SingleProcess,
    evaluate_live,
)
from forgetscale.evaluation.loading import load_perplexity
from forgetscale.evaluation.model import load_model
from forgetscale.evaluation.prompts import ChatPrompts
from forgetscale.evaluation.tasks import Question

LIVE_TASKS = ["perplexity/target", "recall", "perplexity/source"]


class Counting:
    """Counts forward calls around another likelihood model."""

    def __init__(self, inner: HuggingFaceLikelihood) -> None:
        self.inner = inner
        self.calls = 0

    def score(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.calls += 1
        return self.inner.score(input_ids, attention_mask)


def reference_nats(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Dense fp64 log-softmax over the whole logits."""
    with torch.no_grad():
        logits = model.double()(input_ids=ids, use_cache=False).logits
    model.float()
    shifted = logits[:, :-1] - logits[:, :-1].max(dim=-1, keepdim=True).values
    log_p = shifted - shifted.exp().sum(dim=-1, keepdim=True).log()
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("chunk_elements", [1, 500, 1 << 24])
def test_scores_equal_a_dense_reference(model_dir: Path, chunk_elements: int) -> None:
    model = load_model(model_dir, dtype="float32").model
    ids = torch.randint(7, 36, (3, 11), generator=torch.Generator().manual_seed(0))
    likelihood = HuggingFaceLikelihood(model, chunk_elements=chunk_elements)
    nll, is_argmax = likelihood.score(ids, torch.ones_like(ids))
    wanted = reference_nats(model, ids)
    assert nll.dtype == torch.float32 and nll.shape == (3, 10)
    torch.testing.assert_close(nll.double(), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(is_argmax, model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:])


def test_padding_changes_nothing(model_dir: Path) -> None:
    likelihood = HuggingFaceLikelihood(load_model(model_dir, dtype="float32").model)
    ids = torch.randint(7, 36, (2, 9), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    alone = likelihood.score(ids, torch.ones_like(ids))[0]
    torch.testing.assert_close(likelihood.score(padded, mask)[0][:, :8], alone)


def test_a_head_that_does_more_than_multiply_is_respected() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(0, 40, (2, 6))
    nll, _ = HuggingFaceLikelihood(model).score(ids, torch.ones_like(ids))
    torch.testing.assert_close(nll.double(), reference_nats(model, ids), rtol=1e-5, atol=1e-5)


def test_perplexity_and_bits_per_byte_follow_their_definition(
    model_dir: Path, task_dir: Path
) -> None:
    loaded = load_model(model_dir, dtype="float32")
    results = evaluate_live(
        HuggingFaceLikelihood(loaded.model), ["perplexity/source"], task_dir, loaded.tokenizer
    )
    from forgetscale.data import TokenSet

    rows = TokenSet(task_dir / "perplexity" / "source").read(range(7))
    mean = float(reference_nats(loaded.model, rows).mean())
    perplexity, bits = results
    assert (perplexity.metric, bits.metric) == ("perplexity", "bits_per_byte")
    assert perplexity.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert bits.value == pytest.approx(mean / math.log(2), rel=1e-5)  # one byte a token
    assert perplexity.n == 7 and not perplexity.higher_is_better
    assert perplexity.low < perplexity.value < perplexity.high


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_any_world_size_gives_the_same_numbers_with_equal_calls(
    model_dir: Path, task_dir: Path, run_ranks: Any, world_size: int, batch_size: int
) -> None:
    loaded = load_model(model_dir, dtype="float32")
    evaluator = LiveEvaluator(LIVE_TASKS, task_dir, loaded.tokenizer, batch_size=batch_size)
    alone = evaluator.evaluate(HuggingFaceLikelihood(loaded.model))
    models = [Counting(HuggingFaceLikelihood(loaded.model)) for _ in range(world_size)]
    outcomes = run_ranks(world_size, lambda ranks: evaluator.evaluate(models[ranks.rank], ranks))
    assert outcomes == [alone] * world_size
    assert len({model.calls for model in models}) == 1


def test_batch_split_does_not_change_results(model_dir: Path, task_dir: Path) -> None:
    loaded = load_model(model_dir, dtype="float32")
    values = []
    for batch_size in (1, 3, 50):
        evaluator = LiveEvaluator(LIVE_TASKS, task_dir, loaded.tokenizer, batch_size=batch_size)
        results, samples = evaluator.evaluate_with_samples(HuggingFaceLikelihood(loaded.model))
        values.append([result.value for result in results])
        assert len(samples) == 5 + 9 + 7
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] == pytest.approx(values[2], rel=1e-6)


def test_generated_kinds_are_refused_in_the_loop(model_dir: Path, task_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with pytest.raises(ConfigError, match="'compliance' is of kind 'check' and needs generated"):
        LiveEvaluator(["compliance"], task_dir, tokenizer)


def test_max_rows_bounds_a_token_set(model_dir: Path, task_dir: Path) -> None:
    loaded = load_model(model_dir, dtype="float32")
    model = HuggingFaceLikelihood(loaded.model)
    few = evaluate_live(model, ["perplexity/source"], task_dir, loaded.tokenizer, max_rows=2)
    whole = evaluate_live(model, ["perplexity/source"], task_dir, loaded.tokenizer)
    assert (few[0].n, whole[0].n) == (2, 7)
    assert few[0].task_hash != whole[0].task_hash


def test_a_model_that_is_not_finite_is_an_error(model_dir: Path, task_dir: Path) -> None:
    class Broken:
        def score(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            shape = (ids.shape[0], ids.shape[1] - 1)
            return torch.full(shape, math.nan), torch.ones(shape, dtype=torch.bool)

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for task in ("recall", "perplexity/source"):
        with pytest.raises(ForgetScaleError, match="expected a finite number"):
            evaluate_live(Broken(), [task], task_dir, tokenizer, SingleProcess())


def test_another_tokenizer_is_refused(model_dir: Path, task_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="was made with another tokenizer"):
        LiveEvaluator(["perplexity/source"], task_dir, other)


def test_conversations_of_sft_rows_are_scored_alone_at_their_supervised_tokens(
    model_dir: Path, tmp_path: Path
) -> None:
    loaded = load_model(model_dir, dtype="float32")
    ids = np.arange(20, 32).reshape(2, 6)
    supervised = np.zeros((2, 6), dtype=bool)
    supervised[0, [2, 3, 5]] = supervised[1, [1, 4]] = True
    write_token_set(
        tmp_path / "perplexity" / "chats",
        ids,
        vocab_size=len(loaded.tokenizer),
        tokenizer_sha256=tokenizer_hash(model_dir),
        doc_lens=np.array([4, 2, 6]),
        supervised=supervised,
    )
    task = load_perplexity(tmp_path, "perplexity/chats", tokenizer=loaded.tokenizer)
    evaluator = LiveEvaluator(["perplexity/chats"], tmp_path, loaded.tokenizer, batch_size=2)
    (result,) = evaluator.evaluate(HuggingFaceLikelihood(loaded.model))
    nats = []
    for text, scored in ((ids[0, :4], [2, 3]), (ids[0, 4:], [1]), (ids[1], [1, 4])):
        with torch.no_grad():
            logits = loaded.model(torch.from_numpy(text)[None]).logits[0].log_softmax(-1)
        nats += [-float(logits[place - 1, text[place]]) for place in scored]
    assert task.num_items == 3
    assert (result.metric, result.n) == ("perplexity", 3)
    assert result.value == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


def test_prompts_need_a_template_with_an_end(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts = ChatPrompts(tokenizer)
    messages = [{"role": "user", "content": "lo?"}]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert prompts.end_of_turn == end
    assert prompts.answer_ids(messages, "mika")[-1] == end
    assert prompts.stop_ids() == sorted([tokenizer.eos_token_id, end])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="with no special token"):
        ChatPrompts(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ChatPrompts(tokenizer)


def test_a_raw_prompt_is_continued_without_the_chat_template(model_dir: Path) -> None:
    chat_tokenizer = AutoTokenizer.from_pretrained(model_dir)
    question = Question(
        id="raw",
        messages=({"role": "user", "content": "who?"},),
        kind="exact",
        answers=("ann",),
        meta={"raw_prompt": "who is "},
    )
    prompts = ChatPrompts(chat_tokenizer)
    ids = prompts.question_ids(question)
    assert ids == chat_tokenizer("who is ", add_special_tokens=False)["input_ids"]
    gold = prompts.gold_ids(question, "ann")
    assert gold[-1] == chat_tokenizer.eos_token_id
    assert chat_tokenizer.decode([*ids, *gold[:-1]]) == chat_tokenizer.decode(
        chat_tokenizer("who is ann", add_special_tokens=False)["input_ids"]
    )
    chat = Question(id="chat", messages=question.messages, kind="exact", answers=("ann",))
    assert prompts.question_ids(chat) == prompts.prompt_ids(chat.messages)
