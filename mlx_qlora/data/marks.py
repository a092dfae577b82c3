"""What of a row is nothing to learn: where it is from, marks and weights, labels of other tasks."""

import math
import re
from collections.abc import Mapping
from typing import Any

from mlx_qlora.errors import DataError

# ---- where a row is from, and what it weighs -----------------------------------------------------

EMPTY: tuple[Any, ...] = (None, "", [], {})
# Fields that say where a row or a message is from, how good or long it is: nothing to learn.
HARMLESS = frozenset(
    "id _id ids idx index uid uuid guid hash row_id prompt_id message_id conversation_id parent_id "
    "question_id task_id dataset dataset_name data_source source sources origin url link license "
    "author user_id model model_name generator teacher engine created created_at updated_at date "
    "timestamp language lang category categories domain type tag tags difficulty score scores "
    "rating ratings score_chosen score_rejected chosen_score rejected_score margin reward_model "
    "quality toxicity embedding length len num_tokens "
    "token_count num_turns split fold seed temperature metadata meta annotations signature "
    "logprobs finish_reason usage status version __index_level_0__ cache_control".split()
)
LONGEST_LABEL = 100  # characters; a longer "source" is something to read, not where it is from
# Marks of a message: 0 and false take it out of what is learned, and so does `masked`.
MARKS = ("weight", "train", "training", "loss", "loss_weight", "trainable", "masked")
ROW_MARKS = ("weight", "train", "trainable", "loss_weight")  # those that a whole row may have
LIKE = re.compile(r"[-+., ]*\d[-+\d.,% ]*")  # a text that is meant as a number
WEIGHTS = ("weight", "loss_weight")  # marks that may be any number from 0 on


def is_harmless(name: Any, value: Any) -> bool:
    """Whether a field says nothing to learn: it holds nothing, or a short fact about the row."""
    if value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value):
        return True
    return str(name).lower() in HARMLESS and not _is_long(value)


def _is_long(value: Any) -> bool:
    if isinstance(value, (list, tuple, Mapping)):
        return any(map(_is_long, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, str) and len(value) > LONGEST_LABEL


def is_mark(value: Any) -> bool:
    """Whether a value can only say that something is learned, or that it is not."""
    return isinstance(value, (int, float)) and value in (0, 1)


def is_weight(name: str, value: Any) -> bool:
    """Whether a mark of a row or a message weighs its labels."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return name in WEIGHTS and is_number and 0 <= value < math.inf


def as_value(value: Any) -> Any:
    """The number, or true or false, that a text says, as all values of a CSV file are text."""
    text = value.strip().lower() if isinstance(value, str) else ""
    try:
        return text == "true" if text in ("true", "false") else float(text)
    except ValueError:
        return value


def with_marks(row: Any, columns: Mapping[str, str]) -> Any:
    """A row whose marks are numbers, true or false where they are text that says so."""
    names = MARKS if isinstance(row, Mapping) else ()
    texts = {n: as_value(row[n]) for n in names if n in row and n not in columns.values()}
    return {**row, **texts} if texts else row


def row_weight(row: Mapping[str, Any]) -> float:
    """The factor of all weights of a row, 1 if it has none; a DataError for one that is none."""
    weight = 1.0
    for name, value in ((name, row[name]) for name in WEIGHTS if name in row):
        if is_weight(name, value) or isinstance(value, bool):
            weight *= value
        elif isinstance(value, (int, float)) or LIKE.fullmatch(str(value)):
            raise DataError(f"the {name} of the row must be at least 0; got {value!r:.40}")
    return weight


# ---- rows of other tasks -------------------------------------------------------------------------

# What rows of other tasks are -> how they can be read.
PAIR, JUDGED = "a preference pair", "a labelled answer"
READS = {
    PAIR: "training.objective=dpo, orpo or simpo reads it; ",
    JUDGED: "training.objective=kto reads it; ",
}
# Fields of a row that make it one of another task -> what such rows are.
PREFERRED = ("chosen", "rejected", "preferred_output", "non_preferred_output")
OTHER_TASKS = dict.fromkeys(PREFERRED, PAIR) | dict.fromkeys(
    ("image", "images", "image_url", "audio", "audios", "video", "videos"), "more than text"
)


def refuse_other_tasks(row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """A DataError for rows that teach something else than an answer.

    With `columns` it is the user who says which fields are question and answer.
    """
    for name in (name for name in MARKS if name in row):
        is_number = name in ROW_MARKS and is_mark(row[name])  # elsewhere 0 may be a figure
        taken_out = (name == "masked") if row[name] is True else not row[name]
        if (isinstance(row[name], bool) or is_number) and taken_out:
            raise DataError(f"no supervised token: the {name} of the row is {row[name]!r}")
    tasks = {
        name: task
        for name, task in OTHER_TASKS.items()
        if not isinstance(row.get(name), (int, float)) and not is_harmless("", row.get(name))
    }
    label = row.get("label", row.get("kto_tag"))
    is_judgement = isinstance(label, bool) or ("completion" in row and is_mark(label))  # KTO's
    if isinstance(row.get("reward_model"), Mapping):
        tasks["reward_model"] = "rewards for answers"
    elif "completions" in row and "labels" in row:
        tasks["labels"] = "rewards for steps"
    elif "text" not in row and is_judgement:
        tasks["label" if "label" in row else "kto_tag"] = JUDGED
    elif label not in EMPTY and "text" in row and not {"instruction", "output"} & row.keys():
        tasks["label"] = "classification"
    text_alone = {name: task for name, task in tasks.items() if task != "more than text"}
    own_fields = columns and text_alone == tasks and not {"rejected", "label"} & columns.keys()
    if tasks and not own_fields:
        names, task = ", ".join(map(repr, tasks)), next(iter(tasks.values()))
        remedy = "if its answer is wanted, leave the field out, or name both with data.columns"
        raise DataError(f"is {task} ({names}), not an answer; {READS.get(task, '')}{remedy}")
