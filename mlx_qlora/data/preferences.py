"""Rows that compare answers: pairs of a better and a worse one, and answers that are judged.

A pair is read as two rows, each of which says the same before its answer; the formats, templates
and refusals of other rows apply to both.
"""

import re
from collections.abc import Mapping
from typing import Any

from mlx_qlora.data.formats import object_of
from mlx_qlora.data.marks import as_value, is_harmless, is_mark, refuse_other_tasks, row_weight
from mlx_qlora.data.rows import Said, columns_hint, n_alike, read_row, renamed, unread_fields
from mlx_qlora.errors import DataError

# What rows are -> the objectives that read them.
ANSWERS, PAIRS, JUDGEMENTS = "answers", "pairs", "labelled answers"
OBJECTIVES = {ANSWERS: ("sft",), PAIRS: ("dpo", "orpo", "simpo"), JUDGEMENTS: ("kto",)}
KIND_OF = {objective: kind for kind, each in OBJECTIVES.items() for objective in each}
# OpenAI's names of a pair's fields -> ours.
OPENAI = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
# What opens an answer in a transcript.
TURN = re.compile(r"\b(?:assistant|ai|bot|gpt|model|response|answer)\b[^\w\s]*[:>\n]\s*", re.I)
CONTEXTS = ("messages", "conversations")  # fields that may hold what precedes both answers


def read_pair(row: Any, columns: Mapping[str, str]) -> tuple[list[Said], set[str]]:
    """The rejected side of a pair and the chosen one, and the names of fields that are not used."""
    row = _pair_of(renamed(object_of(row), columns), columns)
    sides, unread = [], set[str]()
    for name, side in zip(("rejected", "chosen"), _sides(row)):
        try:
            sides.append(read_row(side, "auto"))
        except DataError as error:
            text = str(error).replace("'completion'", f"'{name}'").replace("'output'", f"'{name}'")
            raise DataError(text.replace("completion[", f"{name}[")) from None
        unread |= unread_fields(side, "auto", sides[-1])
    if sides[0] == sides[1]:
        raise DataError("fields 'chosen' and 'rejected' are equal")
    # What stands before both answers is one field, and there is no third answer.
    before = next((n for n in (*CONTEXTS, "instruction", "prompt") if row.get(n)), "")
    others = {*CONTEXTS, "prompt", "completion", "output"} - {before}
    unread |= {name for name in others if not is_harmless("", row.get(name))}
    if row_weight(row) != 1:
        unread.add("weight")
    return sides, unread


def _pair_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A pair with our names of its fields; a DataError for a row that is none."""
    if OPENAI.keys() <= row.keys():
        rest = {k: v for k, v in row.items() if k not in (*OPENAI, "input")}
        asked = row.get("input")
        asked = asked if isinstance(asked, Mapping) else {"messages": asked}
        row = {**rest, **asked, **{ours: row[name] for name, ours in OPENAI.items()}}
    missing = [name for name in ("chosen", "rejected") if is_harmless("", row.get(name))]
    hint = columns_hint(row, is_pair=True) if missing and not columns else ""
    if len(missing) == 2:
        refuse_other_tasks(row, {})
        remedy = hint or "; set training.objective=sft"
        raise DataError(f"has no 'chosen' and no 'rejected'{remedy}")
    if missing:
        what = "is empty" if missing[0] in row else f"is missing{hint}"
        raise DataError(f"field {missing[0]!r} {what}")
    return row


def _sides(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rejected and the chosen side as rows of one answer."""
    answers = [row["rejected"], row["chosen"]]
    rest = {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
    context = next((rest[name] for name in CONTEXTS if rest.get(name)), rest.get("prompt"))
    if not any(rest.get(name) for name in CONTEXTS) and "instruction" in rest:
        return [{**rest, "output": answer} for answer in answers]
    rest = {k: v for k, v in rest.items() if k not in (*CONTEXTS, "completion", "prompt")}
    if isinstance(context, str) and all(isinstance(answer, str) for answer in answers):
        return [{**rest, "prompt": context, "completion": answer} for answer in answers]
    if context is None and all(isinstance(answer, str) for answer in answers):
        start = n_alike(*answers)  # two transcripts that begin alike
        openings = [*TURN.finditer(answers[0][:start])]
        place = openings[-1].end() if openings else answers[0][:start].rfind(" ") + 1
        texts = ({"prompt": x[:place], "completion": x[place:]} for x in answers)
        return [{**rest, **(text if place else {"text": text["completion"]})} for text in texts]
    turns = [_turns(answer) for answer in answers]
    if not isinstance(context, list):  # the question, or what is said of whole conversations
        start = n_alike(*turns)
        shared = turns[0][: min(start, len(turns[0]) - 1, len(turns[1]) - 1)]
        if not all(isinstance(turn, Mapping) for turn in shared):
            raise DataError("fields 'chosen' and 'rejected' must hold messages, or texts")
        turns = [each[len(shared) :] for each in turns]
        texts = [str(turn.get("content", turn.get("value"))).strip() for turn in shared]
        if shared and context is not None and context.strip() not in texts:
            raise DataError("field 'prompt' differs from how both conversations begin")
        asked = [{"role": "user", "content": context}] if context is not None else []
        context = shared or asked
    elif all(each[: len(context)] == context for each in turns):  # repeated in both answers
        turns = [each[len(context) :] for each in turns]
    return [{**rest, "prompt": context, "completion": each} for each in turns]


def _turns(answer: Any) -> list[Any]:
    """An answer as messages: it may be one, or its text."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return [*answer] if isinstance(answer, (list, tuple)) else [answer]


def read_judgement(row: Any, form: str, columns: Mapping[str, str]) -> tuple[Said, bool, set[str]]:
    """An answer, whether it is a good one, and the names of fields that are not used."""
    ours = renamed(object_of(row), columns)
    name = next((name for name in ("label", "kto_tag") if name in ours), "label")
    label = as_value(ours.get(name))
    if not is_mark(label):
        refuse_other_tasks(ours, {})
        what = f"must be true or false, not {label!r:.40}" if name in ours else "is missing"
        raise DataError(f"field {name!r} {what}")
    answer = {k: v for k, v in ours.items() if k != name}
    said = read_row(answer, form)
    unread = unread_fields(answer, form, said)
    return said, bool(label), unread | ({"weight"} if row_weight(answer) != 1 else set())


def check_kind(kind: str, objective: str) -> None:
    """Raise a DataError for rows that an objective does not read, naming those that do."""
    if KIND_OF[objective] != kind:
        others = " or ".join(OBJECTIVES[kind])
        raise DataError(
            f"the rows are {kind}, for training.objective={others}, not {objective}; read rows "
            f'with read_examples(..., objective="{objective}")'
        )
