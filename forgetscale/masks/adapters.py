"""Low-rank factors beside a frozen matrix: names, shapes, and the update they stand for.

Shape letters: O out features, I in features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

FACTOR_A, FACTOR_B, FACTOR_E = "lora_A", "lora_B", "lora_E"


@dataclass(frozen=True, slots=True)
class AdapterPair:
    """The factors of one adapted matrix.

    The update that is applied is ``scale * B A``; every statement about it (norm, penalty,
    projection) must use that product: ``A`` and ``B`` alone are only known up to
    ``B R, R^-1 A``. With ``has_values`` it is ``scale * B diag(E) A``.

    Args:
        matrix: Name of the adapted matrix in the source model, ``...q_proj.weight``.
        shape: Its shape ``[O, I]``.
        rank: R.
        scale: What ``B A`` is multiplied with.
        dropout: Share of inputs that ``A`` does not see in training.
        has_values: ``E``, ``[R, 1]``, stands between the factors (AdaLoRA).
    """

    matrix: str
    shape: tuple[int, int]
    rank: int
    scale: float
    dropout: float = 0.0
    has_values: bool = False

    @property
    def module(self) -> str:
        """Name of the layer."""
        return self.matrix.removesuffix(".weight")

    @property
    def lora_A(self) -> str:  # noqa: N802 - the name every library uses
        """Name of ``A``, ``[R, I]``."""
        return f"{self.module}.{FACTOR_A}"

    @property
    def lora_B(self) -> str:  # noqa: N802
        """Name of ``B``, ``[O, R]``."""
        return f"{self.module}.{FACTOR_B}"

    @property
    def lora_E(self) -> str:  # noqa: N802
        """Name of ``E``, ``[R, 1]``, where there is one."""
        return f"{self.module}.{FACTOR_E}"

    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """Return parameter name -> shape, in the order of the layer."""
        out_features, in_features = self.shape
        found = {self.lora_A: (self.rank, in_features), self.lora_B: (out_features, self.rank)}
        return found | ({self.lora_E: (self.rank, 1)} if self.has_values else {})

    def delta(self, factors: Mapping[str, Tensor]) -> Float[Tensor, "O I"]:
        """Return the update that is applied to the matrix.

        Args:
            factors: Whole factors by parameter name, such as ``ShardSet.gather`` returns them.
        """
        right = factors[self.lora_A]
        if self.has_values:
            right = right * factors[self.lora_E]
        return self.scale * (factors[self.lora_B] @ right)


def factor_shapes(adapters: Mapping[str, AdapterPair]) -> dict[str, tuple[int, int]]:
    """Return parameter name -> shape of all factors."""
    return {name: s for pair in adapters.values() for name, s in pair.factor_shapes().items()}
