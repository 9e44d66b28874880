"""The last stage of self-synthesised rehearsal: keep a diverse, central part of what was written.

Prompts are embedded and clustered; each cluster keeps its share of the wanted number, the members
nearest to its centre. The other stages are runs of ``forgetscale generate``: instances by learning
in context (``dialogue.kind: ssr``), and new answers by the latest model (``kind: prompts`` with the
result of this stage as ``path``).

Shape letters: N texts, D features, K clusters.

Source: Huang et al., arXiv:2403.01244 and its code: k-means with 20 clusters over normalised
sentence embeddings, quota by cluster size, nearest members. Ours differs in that quotas sum to the
wanted number exactly (largest remainder), and in that any encoder folder may be named.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float64, Int64
from transformers import AutoModel, AutoTokenizer

from forgetscale.artifact import ArtifactWriter, verify_artifact
from forgetscale.errors import ConfigError, DataError
from forgetscale.generation.filters import first_user_turn
from forgetscale.generation.records import FIELDS, from_rows
from forgetscale.generation.result import KIND, ResultNumbers, content_hash, result_files

RESTARTS = 10
_MOST_ROUNDS = 300


def embed(encoder: Path, texts: Sequence[str]) -> Float64[np.ndarray, "N D"]:
    """Return the normalised mean of an encoder's last hidden states over each text.

    One text at a time, so that no text's numbers depend on the others.

    Args:
        encoder: Hugging Face folder of an encoder or of a causal language model.
        texts: None of them empty.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        encoder, local_files_only=True, trust_remote_code=False
    )
    model: Any = AutoModel.from_pretrained(
        encoder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    ).eval()
    found = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True).input_ids
            hidden = model(input_ids=ids).last_hidden_state[0].double().mean(0)
            found.append((hidden / hidden.norm()).numpy())
    return np.stack(found)


def k_means(
    points: Float64[np.ndarray, "N D"], num_clusters: int, seed: int
) -> tuple[Int64[np.ndarray, " N"], Float64[np.ndarray, "K D"]]:
    """Return the cluster of each point and the centres: the best of some seeded starts.

    Args:
        points: At least ``num_clusters``.
        num_clusters: > 0.
        seed: Seed of the starts, >= 0.

    Source: Lloyd's rounds from the starts of Arthur and Vassilvitskii (2007).
    """
    if not 0 < num_clusters <= len(points):
        raise ValueError(f"{num_clusters} clusters of {len(points)} points")
    rng = np.random.default_rng(seed)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for _ in range(RESTARTS):
        labels, centres = _lloyd(points, _starts(points, num_clusters, rng))
        spread = float(_distances(points, centres)[np.arange(len(points)), labels].sum())
        if best is None or spread < best[0]:
            best = (spread, labels, centres)
    assert best is not None
    return best[1], best[2]


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return squared distances, ``[N, K]``."""
    squares = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
    found: np.ndarray = np.maximum(squares, 0.0)
    return found


def _starts(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return points drawn in proportion to their squared distance from those drawn before."""
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < count:
        nearest = _distances(points, points[chosen]).min(1)
        nearest[chosen] = 0.0
        if nearest.sum() > 0:
            chosen.append(int(rng.choice(len(points), p=nearest / nearest.sum())))
        else:  # only copies of chosen points are left
            left = np.setdiff1d(np.arange(len(points)), chosen)
            chosen.append(int(rng.choice(left)))
    return points[chosen]


def _lloyd(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.full(len(points), -1)
    for _ in range(_MOST_ROUNDS):
        new = _distances(points, centres).argmin(1)
        if np.array_equal(new, labels):
            break
        labels = new
        for cluster in range(len(centres)):
            members = points[labels == cluster]
            if len(members):  # an emptied cluster keeps its centre
                centres[cluster] = members.mean(0)
    return labels, centres


def quotas(sizes: Sequence[int], total: int) -> list[int]:
    """Return how many members each cluster keeps: its share of ``total``, rounded to the sum.

    Args:
        sizes: Members of each cluster, at least ``total`` together.
        total: Members wanted, >= 0.
    """
    whole = sum(sizes)
    if not 0 <= total <= whole:
        raise ValueError(f"{total} of {whole} members are wanted")
    share = max(whole, 1)
    kept = [size * total // share for size in sizes]
    order = sorted(range(len(sizes)), key=lambda k: (-(sizes[k] * total % share), k))
    for cluster in order[: total - sum(kept)]:
        kept[cluster] += 1
    return kept


def central_members(
    points: Float64[np.ndarray, "N D"], num_kept: int, num_clusters: int, seed: int
) -> list[int]:
    """Return the places of a diverse, central part of the points, sorted.

    Args:
        points: One row a text.
        num_kept: How many, in 1..N.
        num_clusters: Clusters, > 0; at most as many as there are points are made.
        seed: Seed of the clustering.
    """
    labels, centres = k_means(points, min(num_clusters, len(points)), seed)
    distance = _distances(points, centres)[np.arange(len(points)), labels]
    sizes = [int((labels == cluster).sum()) for cluster in range(len(centres))]
    found: list[int] = []
    for cluster, quota in enumerate(quotas(sizes, num_kept)):
        members = np.flatnonzero(labels == cluster)
        found += members[np.argsort(distance[members], kind="stable")][:quota].tolist()
    return sorted(found)


def select_central(
    directory: Path,
    output: Path,
    encoder: Path,
    *,
    num_kept: int,
    num_clusters: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a result folder that holds a diverse, central part of another one.

    Args:
        directory: Result folder of ``forgetscale generate``.
        output: New folder, of the same kind.
        encoder: Model folder for ``embed``.
        num_kept: Dialogues to keep, > 0.
        num_clusters: Clusters, > 0.
        seed: Seed of the clustering, >= 0.

    Returns:
        The payload.

    Raises:
        ConfigError: More are wanted than there are, or the numbers are out of range.
        DataError: The folder is no result, is damaged, or ``output`` exists.
    """
    manifest = verify_artifact(directory, KIND)
    if output.exists():
        raise DataError(f"{output} exists already; name another folder or remove it.")
    tables = [pq.read_table(path) for path in result_files(directory)]
    rows = [row for table in tables for row in table.select([n for n, _ in FIELDS]).to_pylist()]
    if not 0 < num_kept <= len(rows):
        raise ConfigError(
            f"{num_kept} dialogues are to be kept of the {len(rows)} in {directory}; keep at least"
            " one and at most all."
        )
    if num_clusters < 1 or seed < 0:
        raise ConfigError(f"clusters must be > 0 and the seed >= 0, got {num_clusters} and {seed}.")
    texts = [first_user_turn(row["messages"]) for row in rows]
    places = central_members(embed(encoder, texts), num_kept, num_clusters, seed)
    numbers, offset = ResultNumbers(), 0
    for sample in from_rows([rows[place] for place in places]):
        numbers.add(sample)
    with ArtifactWriter(output, KIND) as writer:
        for path, table in zip(result_files(directory), tables, strict=True):
            here = [place - offset for place in places if offset <= place < offset + len(table)]
            offset += len(table)
            pq.write_table(table.take(here), writer.path / path.name, compression="zstd")
        writer.payload = {
            **manifest["payload"],
            "num_dialogues": num_kept,
            "selection": {"num_clusters": num_clusters, "seed": seed, "num_before": len(rows)},
            **numbers.payload(),
        }
        writer.inputs = {**manifest["inputs"], "selected_from": content_hash(directory)}
    return dict(writer.payload)
