"""Our IFEval verdicts against those of the original checkers, over published prompts and answers.

The folder is laid out as ``instruction_following_eval/data`` of github.com/google-research/
google-research: ``input_data.jsonl`` (prompts) and, under ``test_output``, what its
``evaluation_main`` writes for the answers of GPT-4 that lie beside them, in
``eval_results_strict.jsonl`` and ``eval_results_loose.jsonl``. The result kept here is over the
copy in github.com/Podtech-AI/IFEval, which holds all three. Nothing is fetched.

    python launch/bench/ifeval_parity.py --folder instruction_following_eval/data
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measure import keep

from forgetscale.artifact import hash_file
from forgetscale.evaluation import ChatTask, load_chat_task
from forgetscale.evaluation.ifeval import follows, follows_loosely


def read_task(path: Path) -> ChatTask:
    """Read the published prompts as a task, as they are."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "ifeval.jsonl")
        return load_chat_task(Path(folder), "ifeval")


def compare(
    task: ChatTask, judge: Callable[[Mapping[str, Any], str], bool], published: Path
) -> dict[str, Any]:
    """Count verdicts and list those that differ."""
    rows = {row["prompt"]: row for row in map(json.loads, published.read_text().splitlines())}
    count, differ = 0, []
    followed = {"ours": 0, "published": 0}
    for question in task.questions:
        row = rows[question.messages[-1]["content"]]
        ours = [judge(check, row["response"]) for check in question.checks]
        theirs = row["follow_instruction_list"]
        count += len(ours)
        followed["ours"] += all(ours)
        followed["published"] += all(theirs)
        differ += [
            {"key": question.id, "check": dict(check), "ours": one, "published": other}
            for check, one, other in zip(question.checks, ours, theirs, strict=True)
            if one != other
        ]
    return {"verdicts": count, "prompts_followed": followed, "differ": differ}


def main() -> None:
    """Compare and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    prompts = options.folder / "input_data.jsonl"
    task = read_task(prompts)
    hashes = {prompts.name: hash_file(prompts)}
    result: dict[str, Any] = {"prompts": len(task.questions), "sha256": hashes}
    for mode, judge in (("strict", follows), ("loose", follows_loosely)):
        path = options.folder / "test_output" / f"eval_results_{mode}.jsonl"
        hashes[path.name] = hash_file(path)
        result[mode] = compare(task, judge, path)
    keep("ifeval_parity", result)


if __name__ == "__main__":
    main()
