"""The 25 kinds of instruction of IFEval: does an answer follow them, strictly or loosely?

Verdicts are those of the published checkers (tests compare them), with these differences:

- arguments must be given: the published ones draw a missing, empty or impossible one at random;
- keywords, section names and postscript markers are text, theirs are regular expressions;
- a letter outside a-z is counted, theirs counts a random letter in its place;
- sentences and languages: see ``ifeval_text``.

Over the 540 published prompts with published answers of GPT-4, all 832 strict verdicts are those of
the original checkers and 831 of the loose ones; the other is a letter ``#``
(``launch/bench/ifeval_parity.py``).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from forgetscale.evaluation.ifeval_text import language_of, num_capital_words, split_sentences

Arguments = Mapping[str, Any]
_RELATIONS = ("less than", "at least")
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCES = ("```json", "```Json", "```JSON", "```")
_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
_WORD_ENDS = ".,?!'\""


def _compared(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def _existence(arguments: Arguments, answer: str) -> bool:
    return all(
        re.search(re.escape(keyword), answer, re.IGNORECASE) for keyword in arguments["keywords"]
    )


def _frequency(arguments: Arguments, answer: str) -> bool:
    keyword = re.escape(arguments["keyword"].strip())
    count = len(re.findall(keyword, answer, re.IGNORECASE))
    return _compared(count, arguments["relation"], arguments["frequency"])


def _forbidden_words(arguments: Arguments, answer: str) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE)
        for word in arguments["forbidden_words"]
    )


def _letter_frequency(arguments: Arguments, answer: str) -> bool:
    count = answer.lower().count(arguments["letter"].lower())
    return _compared(count, arguments["let_relation"], arguments["let_frequency"])


def _response_language(arguments: Arguments, answer: str) -> bool:
    return language_of(answer) in (arguments["language"], None)


def _number_sentences(arguments: Arguments, answer: str) -> bool:
    count = len(split_sentences(answer))
    return _compared(count, arguments["relation"], arguments["num_sentences"])


def _number_paragraphs(arguments: Arguments, answer: str) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", answer)
    # An empty part is an error, but for the one before a first or behind a last divider.
    if any(not part.strip() for part in parts[1:-1]):
        return False
    ends = [parts[0]] if len(parts) == 1 else [parts[0], parts[-1]]
    count = len(parts) - sum(not part.strip() for part in ends)
    return bool(count == arguments["num_paragraphs"])


def _number_words(arguments: Arguments, answer: str) -> bool:
    count = len(re.findall(r"\w+", answer))
    return _compared(count, arguments["relation"], arguments["num_words"])


def _nth_paragraph_first_word(arguments: Arguments, answer: str) -> bool:
    parts = answer.split("\n\n")
    count, nth = sum(bool(part.strip()) for part in parts), arguments["nth_paragraph"]
    # Empty parts do not count, yet the n-th is looked up among all: so do the published checkers.
    if count != arguments["num_paragraphs"] or nth > count or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    end = next((place for place, c in enumerate(word) if c in _WORD_ENDS), len(word))
    # Letter by letter, as some letters fall to lower case differently at the end of a word.
    return "".join(c.lower() for c in word[:end]) == str(arguments["first_word"]).lower()


def _number_placeholders(arguments: Arguments, answer: str) -> bool:
    return bool(len(re.findall(r"\[.*?\]", answer)) >= arguments["num_placeholders"])


def _postscript(arguments: Arguments, answer: str) -> bool:
    marker = arguments["postscript_marker"].strip()
    pattern = _POSTSCRIPTS.get(marker, re.escape(marker.lower()))
    return re.search(pattern, answer.lower()) is not None


def _number_bullet_lists(arguments: Arguments, answer: str) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", answer, re.MULTILINE)
    return bool(len(stars) + len(dashes) == arguments["num_bullets"])


def _constrained_response(arguments: Arguments, answer: str) -> bool:
    return any(option in answer for option in _OPTIONS)


def _number_highlights(arguments: Arguments, answer: str) -> bool:
    single = (found.strip("*") for found in re.findall(r"\*[^\n\*]*\*", answer))
    double = (found[2:-2] for found in re.findall(r"\*\*[^\n\*]*\*\*", answer))
    count = sum(bool(text.strip()) for texts in (single, double) for text in texts)
    return bool(count >= arguments["num_highlights"])


def _multiple_sections(arguments: Arguments, answer: str) -> bool:
    name = re.escape(arguments["section_spliter"].strip())
    return bool(len(re.findall(rf"{name}\s?\d+", answer)) >= arguments["num_sections"])


def _json_format(arguments: Arguments, answer: str) -> bool:
    text = answer.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(arguments: Arguments, answer: str) -> bool:
    titles = re.findall(r"<<[^\n]+>>", answer)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


def _two_responses(arguments: Arguments, answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    if not all(parts[1:-1]):
        return False
    said = [part for part in parts if part]
    return len(said) == 2 and said[0] != said[1]


def _repeat_prompt(arguments: Arguments, answer: str) -> bool:
    return answer.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())


def _end_checker(arguments: Arguments, answer: str) -> bool:
    ending = arguments["end_phrase"].strip().lower()
    return answer.strip().strip('"').lower().endswith(ending)


def _capital_word_frequency(arguments: Arguments, answer: str) -> bool:
    count = num_capital_words(answer)
    return _compared(count, arguments["capital_relation"], arguments["capital_frequency"])


def _english_capital(arguments: Arguments, answer: str) -> bool:
    return answer.isupper() and language_of(answer) in ("en", None)


def _english_lowercase(arguments: Arguments, answer: str) -> bool:
    return answer.islower() and language_of(answer) in ("en", None)


def _no_comma(arguments: Arguments, answer: str) -> bool:
    return "," not in answer


def _quotation(arguments: Arguments, answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


_Checker = Callable[[Arguments, str], bool]
INSTRUCTIONS: Mapping[str, tuple[_Checker, Mapping[str, type]]] = {
    "keywords:existence": (_existence, {"keywords": list}),
    "keywords:frequency": (_frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": (_forbidden_words, {"forbidden_words": list}),
    "keywords:letter_frequency": (
        _letter_frequency,
        {"letter": str, "let_frequency": int, "let_relation": str},
    ),
    "language:response_language": (_response_language, {"language": str}),
    "length_constraints:number_sentences": (
        _number_sentences,
        {"num_sentences": int, "relation": str},
    ),
    "length_constraints:number_paragraphs": (_number_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": (_number_words, {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": (
        _nth_paragraph_first_word,
        {"num_paragraphs": int, "nth_paragraph": int, "first_word": str},
    ),
    "detectable_content:number_placeholders": (_number_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": (_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": (_number_bullet_lists, {"num_bullets": int}),
    "detectable_format:constrained_response": (_constrained_response, {}),
    "detectable_format:number_highlighted_sections": (_number_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": (
        _multiple_sections,
        {"section_spliter": str, "num_sections": int},
    ),
    "detectable_format:json_format": (_json_format, {}),
    "detectable_format:title": (_title, {}),
    "combination:two_responses": (_two_responses, {}),
    "combination:repeat_prompt": (_repeat_prompt, {"prompt_to_repeat": str}),
    "startend:end_checker": (_end_checker, {"end_phrase": str}),
    "startend:quotation": (_quotation, {}),
    "change_case:capital_word_frequency": (
        _capital_word_frequency,
        {"capital_frequency": int, "capital_relation": str},
    ),
    "change_case:english_capital": (_english_capital, {}),
    "change_case:english_lowercase": (_english_lowercase, {}),
    "punctuation:no_comma": (_no_comma, {}),
}
"""Published name of an instruction -> its checker and its arguments, all needed.

Source:
    arXiv:2311.07911; names, arguments and verdicts as in google-research/instruction_following_eval
    and its copy in lm-evaluation-harness 0.4.13, written anew.
"""


def require_instruction(check: Mapping[str, Any]) -> None:
    """Check that an instruction is one of the 25 and has its arguments.

    Args:
        check: ``kind``, the published name, and its arguments.

    Raises:
        ValueError: The name is unknown, or an argument is missing, unknown or not possible.
    """
    name = str(check.get("kind"))
    if name not in INSTRUCTIONS:
        near = difflib.get_close_matches(name, INSTRUCTIONS, n=1, cutoff=0.0)
        raise ValueError(f"unknown instruction {name!r}; nearest: {near[0]!r}")
    expected = INSTRUCTIONS[name][1]
    if unknown := sorted(set(check) - set(expected) - {"kind"}):
        known = f"expected {', '.join(expected)}" if expected else "it has none"
        raise ValueError(f"instruction {name!r} has no argument {unknown[0]!r}; {known}")
    for argument, kind in expected.items():
        value = check.get(argument)
        usable = isinstance(value, kind) and not isinstance(value, bool) and value not in ("", [])
        if kind is list:
            usable = usable and all(isinstance(item, str) and item for item in value or ())
        if argument.endswith("relation"):
            usable = value in _RELATIONS
        if not usable:
            what = " or ".join(_RELATIONS) if argument.endswith("relation") else kind.__name__
            raise ValueError(f"instruction {name!r}: {argument} is {value!r}, expected {what}")
    if len(check.get("letter", "a")) != 1:
        raise ValueError(f"instruction {name!r}: letter is {check['letter']!r}, expected one")
    if not 1 <= check.get("nth_paragraph", 1) <= check.get("num_paragraphs", 1):
        raise ValueError(f"instruction {name!r}: nth_paragraph is not in 1..num_paragraphs")


def follows(check: Mapping[str, Any], answer: str) -> bool:
    """Say whether an answer follows one instruction to the letter; an empty one follows none.

    Args:
        check: Instruction that passed ``require_instruction``.
        answer: Text of the answer.
    """
    return bool(answer.strip()) and INSTRUCTIONS[check["kind"]][0](check, answer)


def loose_forms(answer: str) -> Iterable[str]:
    """Return an answer and what is left without stars, without its first or its last line."""
    lines = answer.split("\n")
    parts = ("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))
    forms = [answer, *parts]
    return [*forms, *(form.replace("*", "") for form in forms)]


def follows_loosely(check: Mapping[str, Any], answer: str) -> bool:
    """Say whether an answer, or one of its ``loose_forms``, follows one instruction."""
    return any(follows(check, form) for form in loose_forms(answer))


PUBLISHED_KEYS = frozenset({"key", "prompt", "instruction_id_list", "kwargs"})


def row_of_published(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the published IFEval file as a row of a task of kind ``ifeval``.

    Args:
        row: ``key``, ``prompt``, ``instruction_id_list`` and ``kwargs``; arguments that are null
            are absent, as in tables.

    Raises:
        ValueError: The row is not one of that file.
    """
    names, arguments = row["instruction_id_list"], row["kwargs"]
    if not isinstance(names, list) or not isinstance(arguments, list):
        raise ValueError("instruction_id_list and kwargs must be lists")
    if len(names) != len(arguments) or not all(isinstance(each, Mapping) for each in arguments):
        raise ValueError("kwargs must hold one object for each name of instruction_id_list")
    return {
        "id": str(row["key"]),
        "kind": "ifeval",
        "messages": [{"role": "user", "content": row["prompt"]}],
        "checks": [
            {"kind": name, **{key: value for key, value in each.items() if value is not None}}
            for name, each in zip(names, arguments, strict=True)
        ],
    }
