"""Write a world: everything from the seed, as one artefact folder."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forgetscale import artifact
from forgetscale.errors import DataError
from forgetscale.ops import checks
from forgetscale.testbed import chat, knowledge, new_task, tasks, text
from forgetscale.testbed.languages import Language, glosses_in, make_languages, make_names
from forgetscale.testbed.model import save_initial_model
from forgetscale.testbed.size import WorldSize, random_for
from forgetscale.testbed.tokenizer import save_tokenizer, train_sentencepiece

KIND = "world"
TARGET_FRACTION = 0.06
"""Share of target pages in the text the tokenizer is trained on."""
CLOSING_FRACTION = 0.8
"""Share of target pages that end with a question and its answer."""


def _json_lines(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _madlad_rows(pages: Iterable[str]) -> list[dict[str, str]]:
    """Return rows as MADLAD-400 has them: line breaks are a backslash and an n."""
    return [{"text": page.replace("\n", "\\n")} for page in pages]


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=6, mtime=0)


def _pages(
    seed: int,
    language: Language,
    facts: knowledge.Knowledge,
    counts: tuple[int, int],
    closing_fraction: float,
) -> tuple[list[str], list[str]]:
    """Return pages to train on and held-out pages, all different."""
    rng = random_for(seed, f"pages/{language.code}")
    pages: dict[str, None] = {}
    while len(pages) < sum(counts):
        closing = rng.random() < closing_fraction
        pages[text.page(rng, language, facts, closing=closing)] = None
    made = list(pages)
    return made[: counts[0]], made[counts[0] :]


def _write_new_task(
    root: Path,
    seed: int,
    size: WorldSize,
    speaker: chat.Speaker,
    task_rows: dict[str, list[tasks.Row]],
    held: set[str],
) -> None:
    for name, rows in new_task.sft_sets(seed, size, speaker, held).items():
        _write(root / f"{name}.jsonl", _json_lines(rows))
    for name, rows in new_task.sft_tasks(speaker, task_rows).items():
        _write(root / f"tasks/{name}.jsonl", _json_lines(rows))


def make_world_languages(seed: int) -> tuple[Language, Language]:
    """Return the source and the target language of the world with this seed."""
    return make_languages(
        seed, glosses_in([*knowledge.templates(), *chat.TEMPLATES, *text.FUNCTION_GLOSSES])
    )


def _fill(root: Path, seed: int, size: WorldSize) -> dict[str, Any]:
    """Write all files of the world below ``root``; return the manifest's payload."""
    source, target = make_world_languages(seed)
    taken = [*source.words(), *target.words()]
    names = make_names(seed, knowledge.num_names(size), taken)
    facts = knowledge.make_knowledge(seed, size, names, source, target)
    speaker = chat.Speaker(source, facts)
    task_rows, held = tasks.make_tasks(seed, size.num_task_rows, speaker, target)

    held_out = size.num_heldout_documents
    source_pages, source_held = _pages(
        seed, source, facts, (size.num_source_documents, held_out), 0.0
    )
    target_pages, target_held = _pages(
        seed, target, facts, (size.num_target_documents, held_out), CLOSING_FRACTION
    )
    rows = chat.chat_rows(random_for(seed, "chat"), speaker, held, size.num_chat_rows)
    calibration = chat.chat_rows(
        random_for(seed, "calibration"), speaker, held, size.num_calibration_rows
    )
    curriculum = [*rows, *({"text": page} for page in source_pages[: size.num_curriculum_texts])]
    random_for(seed, "curriculum").shuffle(curriculum)

    for code, pages, pages_held in (
        ("src", source_pages, source_held),
        ("tgt", target_pages, target_held),
    ):
        name = f"text/data/{code}/{code}_clean_0000.jsonl.gz"
        _write(root / name, _gzip(_json_lines(_madlad_rows(pages))))
        _write(root / f"text/heldout/{code}.jsonl", _json_lines(_madlad_rows(pages_held)))
    _write(root / "chat/train.jsonl", _json_lines(curriculum))
    _write(root / "chat/calibration.jsonl", _json_lines(calibration))
    for name, task in task_rows.items():
        _write(root / f"tasks/{name}.jsonl", _json_lines(task))
    _write_new_task(root / "sft", seed, size, speaker, task_rows, held)
    vocabulary = {"source_words": source.words(), "target_words": target.words()}
    _write(root / "vocabulary.json", _json_lines([vocabulary]))
    lexicons = {"source": dict(source.lexicon), "target": dict(target.lexicon)}
    description = {"lexicon": lexicons, **knowledge.describe(facts, source, target)}
    _write(root / "world.json", json.dumps(description, ensure_ascii=False, indent=1).encode())

    model = _train_tokenizer(source_pages, rows, target_pages, size.vocab_size)
    save_tokenizer(model, root / "tokenizer")
    num_parameters = save_initial_model(
        root / "init", seed=seed, size=size, vocab_size=size.vocab_size
    )
    save_tokenizer(model, root / "init")
    return {
        "seed": seed,
        "size": asdict(size),
        "languages": {"source": "src", "target": "tgt"},
        "vocabulary_sha256": artifact.hash_bytes(artifact.canonical_json(vocabulary)),
        "num_facts": {side: len(facts.of_side(side)) for side in ("source", "target")},
        "num_task_rows": {name: len(task) for name, task in task_rows.items()},
        "num_parameters": num_parameters,
        "examples": {
            "source_page": source_held[0],
            "target_page": target_held[0],
            "chat": rows[0]["messages"],
        },
    }


def _train_tokenizer(
    source_pages: list[str],
    rows: list[dict[str, Any]],
    target_pages: list[str],
    vocab_size: int,
) -> bytes:
    """Train on all source pages and chats, and on few target pages."""
    spoken = [f" {turn['content']}" for row in rows for turn in row["messages"]]
    num_target = round(len(source_pages) * TARGET_FRACTION)
    pieces = (*source_pages, *spoken, *target_pages[:num_target])
    sentences = (sentence for piece in pieces for sentence in piece.split("\n"))
    return train_sentencepiece(sentences, vocab_size)


def build_world(directory: Path, *, seed: int, size: WorldSize | None = None) -> Path:
    """Generate a world and publish it as an artefact.

    Everything follows from ``seed`` and ``size``: a second build gives the same bytes in every
    file (the manifest also records when and by what it was made).

    Args:
        directory: Folder to make; it must not exist.
        seed: Any integer; another seed is another world, words and facts included.
        size: Sizes; None for the quick start's.

    Returns:
        ``directory``.

    Raises:
        DataError: The folder exists already.
        ValueError: The sizes ask for something impossible.
    """
    directory = Path(directory)
    size = size or WorldSize()
    with artifact.ArtifactWriter(directory, KIND) as writer:
        writer.payload = _fill(writer.path, seed, size)
    return directory


def sources_hash() -> str:
    """Return a hash of the code that generates worlds."""
    files = sorted(Path(__file__).parent.glob("*.py")) + [Path(checks.__file__)]
    return artifact.hash_bytes(
        artifact.canonical_json([[path.name, artifact.hash_file(path)] for path in files])
    )


def world_path(cache_root: Path, seed: int, size: WorldSize | None = None) -> Path:
    """Return the folder of a world in the cache; its name holds a hash of all it depends on."""
    parts = [seed, asdict(size or WorldSize()), sources_hash()]
    digest = artifact.hash_bytes(artifact.canonical_json(parts))
    return Path(cache_root) / f"world-{seed}-{digest[:16]}"


def ensure_world(cache_root: Path, seed: int, size: WorldSize | None = None) -> Path:
    """Return a valid world from the cache, building it if it is missing or damaged.

    Args:
        cache_root: Folder that holds worlds; made if needed.
        seed: Seed of the world.
        size: Sizes; None for the quick start's.

    Returns:
        Folder of the world, every file of it verified.
    """
    directory = world_path(cache_root, seed, size)
    if directory.exists():
        try:
            artifact.verify_artifact(directory, KIND)
        except DataError:
            with tempfile.TemporaryDirectory(dir=directory.parent) as trash:
                os.replace(directory, Path(trash) / "damaged")
        else:
            return directory
    return build_world(directory, seed=seed, size=size)
