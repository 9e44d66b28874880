"""Build a token set: find input, survey and choose, tokenise in units, pack, write, publish."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encoding import (
    TokenizerSpec,
    end_token_id,
    load_tokenizer,
    padding_token_id,
    spec_of,
    template_hash,
    vocabulary_size,
)
from data_prep.engine import (
    Source,
    WorkOrder,
    publish_choice,
    run_merging,
    survey_stage,
    token_stage,
    work,
)
from data_prep.evaluation_texts import index_evaluation
from data_prep.ledger import Ledger
from data_prep.merge import Output, TokenMerger
from data_prep.options import BuildOptions
from data_prep.sample import SurveyMerger
from data_prep.scratch import Scratch
from data_prep.sources import estimate_text_bytes, find_sources, named_dataset
from data_prep.team import MpiTeam, Pool, Team
from data_prep.tokenise import DocumentOptions, TokenizeOptions
from data_prep.tokenise_sft import TOO_LONG, ChatEncoder, SftOptions, sft_payload
from data_prep.units import UNIT_BYTES
from forgetscale.artifact import (
    ArtifactWriter,
    canonical_json,
    hash_bytes,
    read_manifest,
    recorded_day,
)
from forgetscale.data import (
    BestFitPacker,
    ConcatPacker,
    OnePerRowPacker,
    Packer,
    ShardWriter,
    token_set_payload,
    tokenizer_hash,
)
from forgetscale.data.format import KIND, REJECTS_NAME, rows_per_batch
from forgetscale.errors import ConfigError, ForgetScaleError
from forgetscale.progress import Progress

__all__ = ["BuildOptions", "build"]

_UNIT_VERSION = 1
_UNIT_BYTES = UNIT_BYTES
_SMALL_BYTES = 24 << 20
_UNIT_SETTINGS = (
    "chat",
    "sft",
    "format",
    "long",
    "escapes",
    "text_field",
    "text_documents",
    "max_line_bytes",
    "max_document_tokens",
    "min_document_tokens",
    "min_characters",
    "max_characters",
    "min_words",
    "max_words",
    "script",
    "min_script_fraction",
)


def build(options: BuildOptions, mpi: MpiTeam | None = None) -> dict[str, Any]:
    """Build the token set (and the held-out one) and return the manifest payload of the first.

    Rows depend on the input files, their order, the tokenizer and the options alone: not on the
    number of processes or nodes, nor on interruptions. Finished units are kept beside the output
    until it is published, so that the same command goes on where an earlier one was stopped.

    Args:
        options: What to build.
        mpi: Ranks that share the work; all of them call this, rank 0 with the result.

    Raises:
        ConfigError: Options clash.
        DataError: Input is missing, damaged or mostly unusable; nothing is published.
        ForgetScaleError: A process died.
    """
    if mpi is not None and mpi.rank > 0:
        mpi.start(None, None)
        work(mpi.order, mpi)
        mpi.finish()
        return {}
    try:
        return _build(options, mpi)
    except (ForgetScaleError, OSError) as error:
        if mpi is not None:
            mpi.refuse(getattr(error, "exit_code", 1))
        raise


def _build(options: BuildOptions, mpi: MpiTeam | None) -> dict[str, Any]:
    if mpi is not None and options.num_processes is not None:
        raise ConfigError("--num-processes is for one process; under mpiexec or srun ranks count.")
    paths = _input_files(options)
    team = mpi or _local_team(paths, options)
    _remove_unpaired(options)
    shared = mpi is not None
    with Scratch(options.outputs, team.token, shared=shared) as scratch, ExitStack() as stack:
        job = _Job(options, paths, scratch)
        stack.callback(team.close)
        team.start(scratch.run / "alive", job.order)
        payload = job.run(team)
        team.finish()
        return payload


def _remove_unpaired(options: BuildOptions) -> None:
    """Remove a held-out set whose training set was not published by the same command."""
    if len(options.outputs) == 1 or options.output.exists() or not options.outputs[1].is_dir():
        return
    manifest = read_manifest(options.outputs[1], KIND)
    if manifest["made_by"].get("recipe") == json.loads(json.dumps(options.recorded())):
        shutil.rmtree(options.outputs[1])


def _input_files(options: BuildOptions) -> list[Path]:
    if options.dataset is not None:
        return named_dataset(options.dataset, options.dataset_config, options.dataset_split)
    return find_sources(
        options.inputs, language=options.language, split=options.split, release=options.release
    )


def _local_team(paths: Sequence[Path], options: BuildOptions) -> Team:
    """Return the processes on this machine; small input is not worth starting any.

    In one process the tokenizer may use threads, unless one process was asked for.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chosen = options.num_processes or num_cores or 1
    if options.num_processes is None and estimate_text_bytes(paths) < _SMALL_BYTES:
        chosen = 1
    use_threads = chosen == 1 and options.num_processes is None
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if use_threads else "false"
    return Team() if chosen == 1 else Pool(chosen, work)


class _Job:
    """One build, seen from the process that merges."""

    def __init__(self, options: BuildOptions, paths: Sequence[Path], scratch: Scratch) -> None:
        self.options = options
        self.tokenizer_sha256 = tokenizer_hash(options.tokenizer)
        tokenizer = load_tokenizer(options.tokenizer)
        if options.chat and not tokenizer.chat_template:
            raise ConfigError(
                f"--chat needs a chat template, the tokenizer in {options.tokenizer} has none; use"
                " the tokenizer of an instruct model."
            )
        self.template_day: str | None = None
        self.end_token = end_token_id(tokenizer, options.document_end, options.tokenizer)
        self.pad_token = padding_token_id(tokenizer)
        self.vocab_size = vocabulary_size(tokenizer)
        evaluation, self.decontamination = index_evaluation(
            options.decontaminate, options.decontaminate_ngram, scratch.folder, options.read
        )
        sft = self._sft()
        self.order = WorkOrder(
            folder=scratch.folder,
            run=scratch.run,
            sources=tuple(Source.of(index, path) for index, path in enumerate(paths)),
            read=options.read,
            documents=DocumentOptions(
                chat=options.chat,
                undo_escapes=options.escapes == "undo",
                text_field=options.text_field,
                filters=options.filters,
                evaluation=evaluation,
                sft_format=options.format if options.sft else None,
            ),
            tokenize=TokenizeOptions(
                tokenizer=spec_of(tokenizer, options.tokenizer, chat=options.chat),
                end_token=self.end_token,
                max_document_tokens=options.max_document_tokens,
                min_document_tokens=options.min_document_tokens,
            ),
            sft=sft,
            survey=options.needs_survey,
            near=options.deduplicate == "near",
            unit_bytes=_UNIT_BYTES,
            fence=self._fence(template_hash(tokenizer), evaluation),
        )
        fatal = TOO_LONG if options.long == "error" else None
        self.ledger = Ledger(self.order.sources, fatal)

    def _sft(self) -> SftOptions | None:
        options = self.options
        if not options.sft:
            return None
        spec, day = TokenizerSpec(options.tokenizer), recorded_day()
        encoder = ChatEncoder(spec, day)  # refuses tokenizers that do not serve
        self.template_day = day if encoder.uses_day else None
        limit, least = options.block_size, options.min_document_tokens
        return SftOptions(spec, limit, day, options.long, least)

    def _fence(self, template: str, evaluation: Path | None) -> str:
        """Return a hash of all that decides the result of a unit, beside its lines."""
        options = self.options
        settings: dict[str, Any] = {name: getattr(options, name) for name in _UNIT_SETTINGS} | {
            "version": _UNIT_VERSION,
            "unit_bytes": _UNIT_BYTES,
            "tokenizer": self.tokenizer_sha256,
            "template": template if options.chat or options.sft else None,
            "row_tokens": options.block_size if options.sft else None,
            "template_day": self.template_day,
            "end_token": self.end_token,
            "ngram": options.decontaminate_ngram,
            "evaluation": None if evaluation is None else evaluation.name,
            "near": options.deduplicate == "near",
            "survey": options.needs_survey,
        }
        for package in ("tokenizers", "sentencepiece", "transformers"):
            settings[package] = importlib.metadata.version(package)
        return hash_bytes(canonical_json(settings))[:16]

    def run(self, team: Team) -> dict[str, Any]:
        """Do the work with ``team``, publish, return the payload of the token set."""
        options = self.options
        chosen, sampling = self._choose(team)
        with ExitStack() as stack:
            artifacts = [
                stack.enter_context(ArtifactWriter(path, KIND, recipe=options.recorded()))
                for path in options.outputs
            ]  # published in reverse, so that the first one says that all are there
            outputs = [self._output(artifact.path) for artifact in artifacts]
            with self._progress("build") as progress:
                merger = TokenMerger(
                    outputs,
                    self.ledger,
                    holdout_fraction=options.holdout_fraction,
                    seed=options.seed,
                    max_tokens=options.max_tokens,
                    progress=progress,
                )
                run_merging(token_stage(self.order, team, chosen), team, merger)
            self.ledger.check(
                options.max_reject_fraction, sum(output.num_documents for output in outputs)
            )
            for artifact, output in zip(artifacts, outputs, strict=True):
                output.finish(artifact.directory)
                self.ledger.write_rejects(artifact.path / REJECTS_NAME)
                artifact.payload = self._payload(output, outputs, sampling)
                artifact.inputs = {"tokenizer": self.tokenizer_sha256} | {
                    source["path"]: source["sha256"] for source in self.ledger.sources
                }
            payload = artifacts[0].payload
        return payload

    def _progress(self, label: str) -> Progress:
        total = sum(source.path.stat().st_size for source in self.order.sources)
        return Progress(total, label, unit="byte", log_path=self.options.log)

    def _choose(self, team: Team) -> tuple[list[np.ndarray] | None, dict[str, int] | None]:
        """Choose documents in a first pass over the input, if one is needed."""
        options = self.options
        if not options.needs_survey:
            return None, None
        with self._progress("survey") as progress:
            merger = SurveyMerger(self.ledger, progress)
            run_merging(survey_stage(self.order, team), team, merger)
        chosen, num_candidates = merger.choose(
            deduplicate=options.deduplicate,
            near_threshold=options.near_threshold,
            max_documents=options.max_documents,
            seed=options.seed,
            num_sources=len(self.order.sources),
        )
        publish_choice(self.order, chosen)
        if not options.max_documents:
            return chosen, None
        return chosen, {
            "max_documents": options.max_documents,
            "seed": options.seed,
            "num_candidates": num_candidates,
        }

    def _output(self, folder: Path) -> Output:
        options = self.options
        size, batch = options.block_size, rows_per_batch(options.block_size)
        writer = ShardWriter(
            folder, block_size=size, vocab_size=self.vocab_size, supervised=options.sft
        )
        dtype = np.dtype(np.uint32) if options.sft else writer.dtype  # with room for a mark
        packer: Packer
        if options.packing == "best-fit":
            packer = BestFitPacker(size, batch, dtype, pad_id=self.pad_token)
        elif options.packing == "none":
            packer = OnePerRowPacker(size, batch, dtype, pad_id=self.pad_token)
        else:
            packer = ConcatPacker(size, batch, dtype)
        return Output(writer, packer, len(self.order.sources))

    def _payload(
        self, output: Output, outputs: Sequence[Output], sampling: dict[str, int] | None
    ) -> dict[str, Any]:
        options, ledger, packer = self.options, self.ledger, output.packer
        num_text_bytes, num_dropped = output.kept_text()
        return token_set_payload(
            block_size=options.block_size,
            vocab_size=self.vocab_size,
            num_rows=output.writer.num_rows,
            num_documents=output.num_documents,
            num_text_bytes=num_text_bytes,
            tokenizer_sha256=self.tokenizer_sha256,
            shards=output.writer.close(),
            num_padding_tokens=packer.num_padding_tokens,
            supervision=self._supervision(output),
        ) | {
            "tokenizer_path": str(options.tokenizer.resolve()),
            "document_end": {"policy": options.document_end, "token_id": self.end_token},
            "packing": {
                "method": packer.METHOD,
                "version": packer.VERSION,
                "dropped_tail_tokens": packer.dropped_tail_tokens,
                "dropped_tail_documents": num_dropped,
            },
            "row_shares": _row_shares(output),
            "chat": options.chat or options.sft,
            "text": {"escapes": options.escapes, "special_tokens": "as_text"},
            "documents": {
                "num_chats": output.num_chats,
                "num_plain": output.num_documents - output.num_chats,
                "num_empty": ledger.counts["empty_documents"],
                "num_truncated": ledger.counts["truncated_documents"],
            },
            "dropped": ledger.dropped_payload(),
            "deduplication": _deduplication(options),
            "decontamination": self.decontamination,
            "max_tokens": options.max_tokens,
            "holdout": _holdout(options, output, outputs),
            "sampling": sampling,
            "sources": [
                source | {"num_documents": count}
                for source, count in zip(ledger.sources, output.documents, strict=True)
            ],
            "rejects": ledger.rejects_payload(options.max_reject_fraction),
        }

    def _supervision(self, output: Output) -> dict[str, Any] | None:
        found = output.writer.supervision()
        if found is not None:
            found |= sft_payload(
                self.options, self.template_day, self.ledger.counts, self.ledger.dropped
            )
        return found


def _row_shares(output: Output) -> dict[str, Any]:
    """Return what packing made of the documents: measured, not promised."""
    packer = output.packer
    num_tokens = output.writer.num_rows * packer.block_size
    return {
        "num_pieces": packer.num_pieces,
        "num_padding_tokens": packer.num_padding_tokens,
        "padding_share": packer.num_padding_tokens / num_tokens,
        "num_cut_documents": packer.num_cut_documents,
        "cut_share": packer.num_cut_documents / output.num_documents,
    }


def _deduplication(options: BuildOptions) -> dict[str, Any]:
    found: dict[str, Any] = {"method": options.deduplicate}
    if options.deduplicate == "near":
        found |= {
            "threshold": options.near_threshold,
            "rensa": importlib.metadata.version("rensa"),
        }
    return found


def _holdout(
    options: BuildOptions, output: Output, outputs: Sequence[Output]
) -> dict[str, Any] | None:
    """Return which part this set is and how many documents the other one has."""
    if not options.holdout_fraction:
        return None
    return {
        "part": "train" if output is outputs[0] else "holdout",
        "fraction": options.holdout_fraction,
        "seed": options.seed,
        "num_documents_of_other_part": sum(
            other.num_documents for other in outputs if other is not output
        ),
    }
