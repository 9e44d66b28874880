"""Edit a tuned model against its source: put back what tuning should not have changed.

An element is ranked by a score, the first or last share of the ranking gets its source value back
(bits copied), and the rest stays as tuned. The same machinery merges models. Works out of core on
Hugging Face safetensors folders and on checkpoints of a run (runs/x/checkpoints/step-...), needs no
recipe and no GPU, and gives the same bytes with any number of workers and ranks.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from forgetscale.errors import ConfigError
from forgetscale.knowledge.edits import (
    METHODS,
    RESCALES,
    SCOPES,
    SCORES,
    EditOptions,
    parse_fraction,
)
from forgetscale.knowledge.restore import Place, check_output, describe, read_ranks, restore
from forgetscale.knowledge.selection import (
    HTML_NAME,
    JSON_NAME,
    SOURCE,
    TUNED,
    Selection,
    candidates,
    check_selection,
    is_selected,
    run_selection,
    selection_digest,
    table,
)
from forgetscale.knowledge.setup import Request, open_setup
from forgetscale.knowledge.work import start_process

EXAMPLES = """examples:
  forgetscale restore --source base --tuned runs/a/export --output out/a-20 --score relative --fraction 0.2
  forgetscale restore --source base --tuned tuned --output out/sweep --score relative \\
      --fraction 0.01 0.05 0.1 0.2 0.4 --controls      # one folder per fraction and control
  forgetscale restore --source base --tuned tuned --output out/best --fraction 0.05 0.1 0.2 0.4 \
      --controls --task-dir tasks --dev-tasks qa_dev --test-tasks qa_test   # choose, then report
  forgetscale restore --source base --tuned tuned --output out/x --score absolute --scope tensor \\
      --side bottom --fraction 0.8 --include mlp --dry-run
  forgetscale restore --source base --tuned tuned --output out/wise --method wise-ft --lambda 0.3
  forgetscale restore --source base --tuned t1 t2 --output out/ties --method ties --fraction 0.8
  forgetscale restore --source base --tuned tuned --output out/dare --method dare --fraction 0.9 \\
      --rescale inverse                                 # l1: as mergekit rescales
  srun -N 4 -n 4 bash -c 'forgetscale restore ... --rank $SLURM_PROCID --world-size $SLURM_NTASKS'

--fraction is always the share that goes back to the source: exact counts floor(F * N) by ranking,
of equal scores the earlier by (tensor name, flat index); drawn with probability F by dare and della.
Without --include and --exclude, restore edits decoder layers without norms (names with "layers" and
without "norm"; all tensors where none has layers); other methods edit all float tensors. The rest
is copied from the tuned model. A killed command goes on where it stopped.
"""  # noqa: E501 (command lines to copy)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("--source", type=Path, required=True, metavar="DIR", help="model before tuning")
    add("--tuned", type=Path, required=True, nargs="+", metavar="DIR",
        help="tuned model folder or checkpoint; several to merge")  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR", help="new model folder(s)")
    add("--method", choices=METHODS, default="restore", help="kind of edit (default: %(default)s)")
    add("--score", choices=(*SCORES, "hash"), default="relative",
        help="relative |d|/(|source|+eps), absolute |d|, base |source|, random (or hash), fisher"
        " F*d^2 (default: %(default)s)")  # fmt: skip
    add("--scope", choices=SCOPES, default="global", help="ranked within (default: %(default)s)")
    add("--side", choices=("top", "bottom"), default="top",
        help="put back the highest or the lowest scores (default: %(default)s)")  # fmt: skip
    add("--fraction", nargs="+", default=[], metavar="F", help="share(s) put back, 0 to 1")
    add("--lambda", nargs="+", type=float, default=[1.0], dest="lambdas", metavar="L",
        help="factor(s) on the kept change; alpha of wise-ft (default: 1)")  # fmt: skip
    add("--weights", nargs="+", type=float, metavar="W", help="one per tuned model (default: 1)")
    add("--rescale", choices=RESCALES, default="none",
        help="inverse: 1/(1-F); l1, l2: keep the norm of a change (default: none)")  # fmt: skip
    add("--controls", action="store_true",
        help="also write random, opposite-side and norm-matched scaled versions")  # fmt: skip
    add("--also-score", nargs="+", default=[], choices=("relative", "absolute", "base"),
        help="also put back the same share by these scores")  # fmt: skip
    add("--include", metavar="REGEX", help="edit only tensors whose name matches")
    add("--exclude", metavar="REGEX", help="leave tensors out whose name matches")
    add("--fisher", type=Path, metavar="FILE", help="safetensors with F by tensor name")
    add("--eps", type=float, default=1e-8, metavar="E", help="of relative (default: %(default)s)")
    add("--score-dtype", choices=("float32", "bfloat16"), default="float32",
        help="bfloat16: compute scores as the official code does")  # fmt: skip
    add("--gamma", default="0.01", metavar="G", help="top share breadcrumbs drops")
    add("--spread", default="0.1", metavar="S", help="della: probabilities F-S to F+S")
    add("--new-rows", choices=("error", "keep"), default="error",
        help="keep: of a resized vocabulary, edit the rows both have")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of random scores and draws")
    add("--workers", type=int, metavar="N", help="local processes (default: cores, at most 8)")
    add("--rank", type=int, metavar="R", help="of independent ranks (default: RANK or 0)")
    add("--world-size", type=int, metavar="N", help="ranks (default: WORLD_SIZE or 1)")
    choice = parser.add_argument_group("choosing one of several edits")
    add = choice.add_argument
    add("--task-dir", type=Path, metavar="DIR", help="tasks, as for forgetscale evaluate")
    add("--dev-tasks", nargs="+", default=[], metavar="NAME", help="chat tasks that choose")
    add("--test-tasks", nargs="+", default=[], metavar="NAME",
        help="chat tasks that are reported, with intervals")  # fmt: skip
    add("--batch-size", type=int, default=32, metavar="N", help="sequences at once (default: 32)")
    add("--max-new-tokens", type=int, default=64, metavar="N",
        help="longest generated answer; exact questions need none (default: 64)")  # fmt: skip
    add("--keep", choices=("all", "chosen"), default="all",
        help="chosen: remove the edited models that no kind of edit picked")  # fmt: skip
    add = parser.add_argument
    add("--dry-run", action="store_true", help="check inputs, print exact counts, write nothing")


def read_request(options: argparse.Namespace) -> Request:
    """Return the request the options stand for.

    Raises:
        ConfigError: A number cannot be read or is out of range.
    """
    edit = EditOptions(
        method=options.method,
        score="random" if options.score == "hash" else options.score,
        scope=options.scope,
        side=options.side,
        fractions=tuple(parse_fraction(text) for text in options.fraction),
        lambdas=tuple(options.lambdas),
        weights=tuple(options.weights or [1.0] * len(options.tuned)),
        rescale=options.rescale,
        seed=options.seed,
        eps=options.eps,
        narrow=options.score_dtype == "bfloat16",
        gamma=parse_fraction(options.gamma),
        spread=parse_fraction(options.spread),
        controls=options.controls,
        also_scores=tuple(options.also_score),
    )
    return Request(
        source=options.source,
        tuned=tuple(options.tuned),
        options=edit,
        include=options.include,
        exclude=options.exclude,
        new_rows=options.new_rows,
        fisher=options.fisher,
    )


def read_selection(options: argparse.Namespace) -> Selection | None:
    """Return what is asked to choose, or None.

    Raises:
        ConfigError: Only some of the options that belong together were given.
    """
    given = [bool(options.task_dir), bool(options.dev_tasks), bool(options.test_tasks)]
    if not any(given):
        return None
    if not all(given):
        raise ConfigError("--task-dir, --dev-tasks and --test-tasks go together; give all three.")
    return Selection(
        options.task_dir,
        tuple(options.dev_tasks),
        tuple(options.test_tasks),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        keep=options.keep,
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    start_process()
    request = read_request(options)
    place = read_ranks(
        options.output, options.workers, options.rank, options.world_size, os.environ
    )
    if options.dry_run:
        check_output(request, place.output)
        print(describe(open_setup(request)))
        return
    selection = read_selection(options)
    if selection is None:
        folders = restore(request, place, print)
        if place.rank == 0:
            for name, folder in folders.items():
                print(f"{name}: {folder}")
        return
    _restore_and_choose(request, place, selection)


def _restore_and_choose(request: Request, place: Place, selection: Selection) -> None:
    check_output(request, place.output)
    listed = candidates(open_setup(request).plan.variants)
    if len(listed) < 2 or request.options.method != "restore" or len(request.options.lambdas) > 1:
        raise ConfigError(
            "choosing needs --method restore with one --lambda and several --fraction or"
            " --controls; one edit leaves nothing to choose."
        )
    digest = selection_digest(selection, request.digest(), check_selection(selection))
    if not is_selected(place.output, digest):
        folders = restore(request, place, print)
        if place.rank > 0:
            return
        models = {SOURCE: request.source, TUNED: request.tuned[0], **folders}
        run_selection(selection, listed, models, place.output, digest, print)
    if place.rank == 0:
        print(table(json.loads((place.output / JSON_NAME).read_bytes())))
        print(place.output / HTML_NAME)
