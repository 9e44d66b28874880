"""Which parameters SSU plans: matrices and vectors of the decoder body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from forgetscale.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Target:
    """One parameter of the decoder body."""

    name: str
    """Checkpoint name."""
    module: str
    """Name of the module that owns it, whose input is measured."""
    shape: tuple[int, ...]
    is_bias: bool
    """A bias of a linear layer: its input feature is the constant 1."""

    @property
    def is_vector(self) -> bool:
        """True for 1-D tensors."""
        return len(self.shape) == 1

    @property
    def width(self) -> int:
        """Columns: input features of a matrix, elements of a vector."""
        return self.shape[-1]


def find_targets(structure: Any) -> list[Target]:
    """Return the plannable parameters in the model's order.

    Embeddings and the output head are found by what they are, not by words in their names.

    Args:
        structure: Hugging Face causal language model (meta tensors will do).

    Raises:
        ConfigError: A parameter of the body is neither the matrix of a linear layer nor a vector
            (fused 3-D experts, convolutions, quantised layers).
    """
    input_embedding = structure.get_input_embeddings()
    output_embedding = structure.get_output_embeddings()
    skipped = {id(p) for m in (input_embedding, output_embedding) for p in m.parameters()}
    found = []
    for module_name, module in structure.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            if id(param) in skipped:
                continue
            name = f"{module_name}.{leaf}"
            shape = tuple(param.shape)
            if len(shape) == 2 and isinstance(module, nn.Linear):
                found.append(Target(name, module_name, shape, False))
            elif len(shape) == 1:
                found.append(Target(name, module_name, shape, isinstance(module, nn.Linear)))
            else:
                raise ConfigError(
                    f"ssu: {name} {list(shape)} in a {type(module).__name__} is neither the"
                    " matrix of a linear layer nor a vector; columns of it are not defined, so use"
                    " method.kind sft or a model whose experts are linear layers."
                )
    return found


def embedding_names(structure: Any) -> list[str]:
    """Return the names of the embedding and head weights, a tied one once."""
    wanted = [structure.get_input_embeddings().weight, structure.get_output_embeddings().weight]
    ids = {id(param) for param in wanted}
    return [name for name, param in structure.named_parameters() if id(param) in ids]
