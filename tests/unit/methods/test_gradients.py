"""Fisher information per column: worked number, expectation under drawn labels, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forgetscale.api import Batch
from forgetscale.errors import DataError
from forgetscale.methods.ssu.gradients import GradientSquares, fisher_columns, uniform_numbers
from forgetscale.methods.ssu.targets import Target, find_targets


class Small(nn.Module):
    """Embedding, one matrix with bias, head: positions do not see each other."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.middle = nn.Linear(3, 4)
        self.norm = norm or nn.Identity()
        self.lm_head = nn.Linear(4, 5, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.norm(self.middle(self.embed(ids)))


def one_batch(ids: torch.Tensor) -> list[Batch]:
    return [Batch(ids, torch.ones(len(ids)), torch.arange(len(ids)))]


def test_worked_number():
    """Block gradients [[1,2],[0,1]] and [[3,0],[1,1]] give columns 5.5 and 3."""
    layer = nn.Linear(2, 2, bias=False)
    squares = GradientSquares({"a": layer}, [Target("a.weight", "a", (2, 2), False)])
    blocks = torch.tensor([[[1.0, 2], [0, 1]], [[3, 0], [1, 1]]])
    squares.start(Batch(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2), torch.arange(2)))
    # Unit vectors as inputs: the gradient of the output is the transposed gradient of the weight.
    inputs = torch.eye(2).expand(2, 2, 2).clone().requires_grad_()
    layer(inputs).backward(blocks.transpose(1, 2))
    squares.close()
    assert (squares.sums["a.weight"] / squares.num_rows).tolist() == pytest.approx([5.5, 3.0])
    layer(inputs).backward(blocks.transpose(1, 2))
    assert squares.sums["a.weight"].tolist() == pytest.approx([11.0, 6.0]), "hooks are gone"


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.RMSNorm(4)], ids=["ln", "lnw", "rms"]
)
@pytest.mark.parametrize("sizes", [[1] * 6, [2] * 3, [6]])
def test_any_cut_into_batches_gives_the_fisher_of_blocks(kit, norm, sizes: list[int]):
    torch.manual_seed(0)
    model = Small(norm)
    ids = torch.randint(0, 5, (6, 7))
    batches = [
        Batch(rows, torch.ones(len(rows)), blocks)
        for rows, blocks in zip(ids.split(sizes), torch.arange(6).split(sizes), strict=True)
    ]
    targets = find_targets(model)
    found = fisher_columns(kit.FakeCalibration(model, batches), targets, sampled=False)
    exact = {name: torch.zeros(param.shape[-1]) for name, param in model.named_parameters()}
    for row in ids:
        model.zero_grad()
        logits = model.lm_head(model(row[None]))[0, :-1]
        nn.functional.cross_entropy(logits, row[1:]).backward()
        for name, param in model.named_parameters():
            exact[name] += param.grad.view(-1, param.shape[-1]).square().sum(0) / 6
    assert set(found) == {name for name in exact if "embed" not in name and "head" not in name}
    for name, value in found.items():
        assert torch.allclose(value.float(), exact[name], rtol=1e-4, atol=1e-9), name


def test_drawn_labels_give_the_true_fisher(kit):
    """Mean over 4,000 draws against the expectation over all labels, position by position."""
    torch.manual_seed(1)
    model, draws = Small(), 4000
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    row = torch.randint(0, 5, (5,))
    targets = find_targets(model)
    calibration = kit.FakeCalibration(model, one_batch(row.expand(draws, 5)))
    found = fisher_columns(calibration, targets, sampled=True)
    expected = {name: torch.zeros(param.shape) for name, param in model.named_parameters()}
    logits = model.lm_head(model(row[None]))[0, :-1]
    for position in range(4):
        share = logits[position].softmax(0).detach()
        for label in range(5):
            loss = -logits[position].log_softmax(0)[label]
            grads = torch.autograd.grad(
                loss, list(model.parameters()), retain_graph=True, allow_unused=True
            )
            for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
                expected[name] += share[label] * grad.square() / 4**2
    for target in targets:
        exact = expected[target.name].view(-1, target.width).sum(0)
        assert torch.allclose(found[target.name].float(), exact, rtol=0.1), target.name


def test_drawn_numbers_are_a_function_of_seed_and_block():
    first = uniform_numbers(1, 2, 50)
    assert torch.equal(first[:20], uniform_numbers(1, 2, 20))
    assert not torch.equal(first, uniform_numbers(1, 3, 50))
    assert not torch.equal(first, uniform_numbers(2, 2, 50))
    assert first.min() >= 0 and first.max() < 1 and first.dtype == torch.float64


def test_blocks_of_one_token_are_refused(kit):
    calibration = kit.FakeCalibration(Small(), one_batch(torch.zeros(3, 1, dtype=torch.int64)))
    with pytest.raises(DataError, match="holds no token with a prediction"):
        fisher_columns(calibration, find_targets(calibration.structure), sampled=False)


def test_inputs_without_rows_are_refused(kit):
    class Flat(Small):
        def forward(self, ids):
            return super().forward(ids.flatten()).view(*ids.shape, 4)

    calibration = kit.FakeCalibration(Flat(), one_batch(torch.zeros(3, 4, dtype=torch.int64)))
    with pytest.raises(DataError, match=r"input of middle has shape \[12, 3\], expected one entry"):
        fisher_columns(calibration, find_targets(calibration.structure), sampled=False)
    assert not calibration.structure.middle._forward_hooks
