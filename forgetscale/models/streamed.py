"""A causal language model run one decoder layer at a time, for models larger than memory.

The weights stay in the folder. A pass loads the embedding and looks up all texts, then loads the
first layer and runs it on all texts, drops it, loads the second, and so on; what lasts are the
hidden states of the texts. So the peak is one layer plus hidden states, whatever the depth, and the
folder is read once for all texts of a pass.

The model's own code does everything: its ``forward`` is run with decoder layers that only note how
they are called (masks, rotary positions), the layers then run with just that, and its ``forward``
is run once more over layers that hand through the finished hidden states, so that final norm, head
and whatever an architecture does to its logits are its own.

Shape letters: B = 1 text, T tokens, D width, K kept positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GenerationConfig

from forgetscale.errors import ConfigError, DataError
from forgetscale.models.raw import RawFolder
from forgetscale.models.skeleton import build_skeleton, read_model_config

STREAMED_KINDS = (
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "olmo2",
    "olmo3",
    "qwen2",
    "qwen3",
)
"""Architectures whose layers pass on hidden states alone; each is compared with the whole model in
a test. Others may share keys, values or routing between layers, which running layer by layer would
change without a word."""


@dataclass(slots=True)
class WeightLedger:
    """Bytes of weights in memory, as they are loaded and dropped."""

    held: int = 0
    peak: int = 0
    largest: int = 0
    """Of one part: the embedding, a layer, or norm and head."""
    passes: int = 0
    """Times that all layers were read."""
    loads: list[tuple[str, int]] = field(default_factory=list)
    """Part and bytes, of every load."""

    def take(self, part: str, num_bytes: int) -> None:
        """Note a load."""
        self.loads.append((part, num_bytes))
        self.held += num_bytes
        self.peak = max(self.peak, self.held)
        self.largest = max(self.largest, num_bytes)

    def give_back(self, num_bytes: int) -> None:
        """Note that weights were dropped."""
        self.held -= num_bytes


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter of the skeleton: every module that holds it, under one name."""

    name: str
    owners: tuple[tuple[nn.Module, str], ...]
    empty: nn.Parameter


def split_model(model: Any) -> dict[str, list[_Slot]]:
    """Return the parameters of each part that is loaded at a time, tied ones once a part.

    Args:
        model: Causal language model, its parameters on the meta device.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    values: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, value in module._parameters.items():
            if value is not None:
                names.setdefault(id(value), f"{prefix}.{leaf}" if prefix else leaf)
                owners.setdefault(id(value), []).append((module, leaf))
                values[id(value)] = value
    slots = {key: _Slot(names[key], tuple(owners[key]), values[key]) for key in names}

    def of(part: nn.Module) -> list[_Slot]:
        inside = {id(value) for value in part.parameters()}
        return [slot for key, slot in slots.items() if key in inside]

    decoder = model.get_decoder()
    layers = {f"layer {number}": of(layer) for number, layer in enumerate(decoder.layers)}
    inner = {slot.name for part in layers.values() for slot in part}
    begin = [slot for slot in of(decoder) if slot.name not in inner]
    table = {slot.name for slot in of(decoder.get_input_embeddings())}
    end = [slot for slot in begin if slot.name not in table]
    end += of(model.get_output_embeddings())
    return {"embedding": begin, **layers, "head": end}


def part_elements(model: Any) -> dict[str, int]:
    """Return the elements of each part that is loaded at a time; the largest is the peak."""
    return {
        name: sum(slot.empty.numel() for slot in slots)
        for name, slots in split_model(model).items()
    }


def require_streamable(config: Any, directory: Path) -> None:
    """Refuse architectures that were never compared with the whole model.

    Raises:
        ConfigError: ``config`` is of such a one.
    """
    if config.model_type not in STREAMED_KINDS:
        raise ConfigError(
            f"{directory} is of the architecture {config.model_type}, which is not known to run"
            f" layer by layer (known: {', '.join(STREAMED_KINDS)}); use --memory resident."
        )


class StreamedModel:
    """A model folder whose layers visit memory one after the other.

    Args:
        directory: Folder with ``config.json`` and safetensors files.
        dtype: ``auto`` (as the configuration says, else as stored), ``float32`` or ``bfloat16``.
        device: Where layers run; None takes the GPU that ``torch.cuda`` selects, else the CPU.

    Raises:
        ConfigError: The architecture is not known to work so.
        DataError: The folder's weights do not fit its configuration.

    Attributes:
        ledger: Bytes of weights that were in memory.
    """

    def __init__(self, directory: Path, *, dtype: str = "auto", device: str | None = None) -> None:
        self.directory = Path(directory)
        config = read_model_config(self.directory)
        require_streamable(config, self.directory)
        config._attn_implementation = None  # as for whole models, transformers picks it
        self._weights = RawFolder(self.directory)
        self.dtype = _working_type(config, self._weights, dtype)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.max_tokens: int | None = getattr(config, "max_position_embeddings", None)
        self.stop_ids = _stop_ids(self.directory, config)
        self.ledger = WeightLedger()
        self._model: Any = build_skeleton(config).eval()
        for module in self._model.modules():
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = value.to(self.device)
        self._decoder: Any = self._model.get_decoder()
        self._layers: list[Any] = list(self._decoder.layers)
        self._parts = split_model(self._model)
        self._check_names()

    def _check_names(self) -> None:
        for slot in (slot for part in self._parts.values() for slot in part):
            stored = self._weights.tensors.get(slot.name)
            shape = tuple(slot.empty.shape)
            if stored is None or stored.shape != shape or stored.dtype is None:
                what = "holds no" if stored is None else f"has {stored.code}{list(stored.shape)} as"
                raise DataError(
                    f"{self.directory} {what} {slot.name}, config.json asks for floats of shape"
                    f" {list(shape)}; the folder mixes two models, or is stored in an older form:"
                    " load it with transformers and save it again."
                )

    @contextmanager
    def _loaded(self, part: str) -> Iterator[None]:
        """Hold the weights of one part."""
        slots, taken = self._parts[part], 0
        try:
            for slot in slots:
                stored = self._weights.read_whole(slot.name)
                value = stored.view(slot.empty.shape).to(self.device, self.dtype)
                weight = nn.Parameter(value, requires_grad=False)
                for module, leaf in slot.owners:
                    module._parameters[leaf] = weight
                taken += weight.numel() * weight.element_size()
                del stored, value, weight
            self.ledger.take(part, taken)
            yield
        finally:
            for slot in slots:
                for module, leaf in slot.owners:
                    module._parameters[leaf] = slot.empty
            self.ledger.give_back(taken)

    @contextmanager
    def _layers_as(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Let decoder layers do something else when they are called."""
        try:
            for number, layer in enumerate(self._layers):
                layer.forward = forward(number)
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    @torch.no_grad()
    def hidden_states(
        self, texts: Sequence[Sequence[int]], kept: Sequence[int]
    ) -> list[Float[Tensor, "K D"]]:
        """Return what the last layer says, before the final norm.

        Args:
            texts: Token ids of each text, >= 1.
            kept: Last positions wanted of each text, >= 1.

        Raises:
            ConfigError: A layer passes on more than hidden states.
        """
        calls: list[list[Mapping[str, Any]]] = []
        states: list[Tensor] = []
        with self._loaded("embedding"):
            for text in texts:
                noted = _Calls(len(self._layers))
                with self._layers_as(noted.note):
                    ids = torch.tensor([list(text)], device=self.device)
                    self._decoder(input_ids=ids, use_cache=False)
                assert noted.first is not None
                states.append(noted.first)
                calls.append(noted.arguments)
        for number, layer in enumerate(self._layers):
            with self._loaded(f"layer {number}"):
                for place, state in enumerate(states):
                    found = layer(state, **calls[place][number])
                    if not isinstance(found, Tensor) or found.shape != state.shape:
                        raise ConfigError(
                            f"{self.directory}: a decoder layer passes on more than hidden states;"
                            " use --memory resident."
                        )
                    states[place] = found
        self.ledger.passes += 1
        return [state[0, -count:].clone() for state, count in zip(states, kept, strict=True)]

    @contextmanager
    def head(self) -> Iterator[Callable[[Float[Tensor, "K D"]], Float[Tensor, "K V"]]]:
        """Hold final norm and head; yield what makes logits of ``hidden_states``."""

        @torch.no_grad()
        def logits(hidden: Float[Tensor, "K D"]) -> Float[Tensor, "K V"]:
            given = hidden[None]
            with self._layers_as(lambda number: lambda *args, **kwargs: given):
                found: Tensor = self._model(inputs_embeds=given, use_cache=False).logits
            return found[0]

        with self._loaded("head"):
            yield logits

    def close(self) -> None:
        """Close the files."""
        self._weights.close()


class _Calls:
    """Notes how the decoder calls its layers for one text."""

    def __init__(self, count: int) -> None:
        self.first: Tensor | None = None
        self.arguments: list[Mapping[str, Any]] = [{} for _ in range(count)]

    def note(self, number: int) -> Callable[..., Tensor]:
        """Return a forward that notes its arguments and passes the states through."""

        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            if number == 0:
                self.first = hidden_states
            self.arguments[number] = arguments
            return hidden_states

        return forward


def _working_type(config: Any, weights: RawFolder, dtype: str) -> torch.dtype:
    """Return the type ``transformers`` would load the model in."""
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = next(t.dtype for t in weights.tensors.values() if t.dtype is not None)
    assert stored is not None
    return stored


def _stop_ids(directory: Path, config: Any) -> list[int]:
    """Return the end-of-sequence ids of the folder's generation settings."""
    if (directory / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    else:
        eos = config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
