"""A calibration in one process, over a small model, without DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from forgetscale.api import Batch, ParamShard


class Body(nn.Module):
    """Embedding, two linear layers with one input, a norm, a layer that may be left out, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.left = nn.Linear(6, 4)
        self.right = nn.Linear(6, 4, bias=False)
        self.norm = nn.LayerNorm(4, bias=False)
        self.extra = nn.Linear(4, 4, bias=False)
        self.lm_head = nn.Linear(4, 11, bias=False)
        self.uses_extra = True

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(self.left(x) + self.right(x))
        return self.extra(x) if self.uses_extra else x


class Shards:
    """All parameters on one rank, cut in two pieces to look like two ranks' slices."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __iter__(self):
        for name, param in self._model.named_parameters():
            yield ParamShard(name, tuple(param.shape), 0, None, param.detach().flatten().float())

    def all_reduce_sum(self, value):
        return value

    def gather(self, names):
        return {n: p.detach() for n, p in self._model.named_parameters() if n in names}


class FakeCalibration:
    """``Calibration`` over given batches."""

    def __init__(self, model: nn.Module, batches: list[Batch], seed: int = 3) -> None:
        self.structure = model
        self.seed = seed
        self._batches = batches
        self.passes = 0

    def named_modules(self):
        return dict(self.structure.named_modules())

    def batches(self):
        yield from self._batches

    @property
    def num_blocks(self):
        return int(sum(float(batch.weight.sum()) for batch in self._batches))

    def backward(self, batch, labels, loss):
        self.passes += 1
        handle = self.structure.embed.register_forward_hook(
            lambda module, inputs, output: output.detach().requires_grad_()
        )
        hidden = self.structure(batch.input_ids)[:, :-1]
        loss(self.structure.lm_head(hidden).flatten(0, 1), labels[:, 1:].flatten()).backward()
        handle.remove()

    @torch.no_grad()
    def forward(self, batch):
        self.passes += 1
        self.structure(batch.input_ids)

    def shards(self):
        return Shards(self.structure)

    def target_token_counts(self):
        return torch.tensor([0, 3, 1, 0, 9, 2, 0, 1, 5, 4, 0])

    def provenance(self):
        return {"model_hash": "m"}


@pytest.fixture
def body():
    torch.manual_seed(0)
    return Body()


@pytest.fixture
def ids():
    return torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batches(ids):
    """Three batches of two rows; the last row of the last is there to fill only."""
    filled = torch.cat([ids, ids[-1:]]).view(3, 2, 7)
    weights = torch.tensor([[1.0, 1], [1, 1], [1, 0]])
    blocks = torch.tensor([[0, 1], [2, 3], [4, 4]])
    return [Batch(*parts) for parts in zip(filled, weights, blocks, strict=True)]


@pytest.fixture
def calibration(body, batches):
    return FakeCalibration(body, batches)


@pytest.fixture
def kit():
    return SimpleNamespace(FakeCalibration=FakeCalibration, Body=Body)
