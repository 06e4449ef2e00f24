"""Samples of well-known tasks from files on disk, brought to one form for `task_files/`."""

import csv
import json
import re
from collections.abc import Callable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from kvq_core.errors import KvqError

Sample = dict[str, Any]
LETTERS = "ABCD"
MMLU_SHOTS = 5


def lambada(row: Sample) -> Sample:
    """`context` and `continuation`, or OpenAI's one `text`, whose last word is asked for."""
    if "text" in row:
        context, _, word = row["text"].rpartition(" ")
        return {"context": context, "continuation": word}
    return {"context": row["context"], "continuation": row["continuation"].strip()}


def arc(row: Sample) -> Sample:
    """`query`, `choices`, `gold`; or, as published, `question`, `choices: {text, label}`, `answerKey`."""
    if "answerKey" in row:
        choices = row["choices"]
        gold = choices["label"].index(row["answerKey"])
        return {"question": row["question"], "choices": choices["text"], "gold": gold}
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"question": question, "choices": row["choices"], "gold": int(row["gold"])}


def hellaswag(row: Sample) -> Sample:
    """As published: `activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")  # left over from WikiHow
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "question": clean(context),
        "choices": [clean(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def gsm8k(row: Sample) -> Sample:
    return {"question": row["question"], "answer": row["answer"]}


FILES: dict[str, tuple[str, Callable[[Sample], Sample]]] = {
    "lambada": ("lambada*.jsonl", lambada),
    "arc_easy": ("arc_easy*.jsonl", arc),
    "arc_challenge": ("arc_challenge*.jsonl", arc),
    "hellaswag": ("hellaswag*.jsonl", hellaswag),
    "gsm8k": ("gsm8k*.jsonl", gsm8k),
}
"""Task -> the file that holds it, and what brings a line of it to our form."""
MMLU = "mmlu"


def read_samples(name: str, folder: Path) -> list[Sample]:
    """All samples of a task; `KvqError` where the folder has no file for it, or one with other fields."""
    if name == MMLU:
        return _mmlu(folder / MMLU)
    pattern, form = FILES[name]
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        what = f"holds {len(found)} files" if found else "holds no file"
        raise KvqError(
            f"--tasks-path {folder} {what} {pattern} for {name}", "put one there, or name a folder with one"
        )
    samples = []
    with found[0].open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                samples.append(form(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise KvqError(
                    f"{found[0].name}, line {number} is no sample of {name}: {type(error).__name__} {error}",
                    f"it takes {form.__doc__ or 'the fields `question` and `answer`'}",
                ) from error
    if not samples:
        raise KvqError(f"{found[0]} is empty", "give a file with one JSON object a line")
    return samples


def _mmlu(folder: Path) -> list[Sample]:
    """`dev/SUBJECT_dev.csv` and `test/` or `val/SUBJECT_….csv`: question, A to D, answer; no header."""
    asked = next((folder / part for part in ("test", "val") if (folder / part).is_dir()), None)
    files = sorted(asked.glob("*.csv")) if asked else []
    if not (files and (folder / "dev").is_dir()):
        raise KvqError(
            f"{folder} is not MMLU as it is published",
            "it needs the folders dev and test (or val) with a CSV file for each subject",
        )
    subjects = []
    for file in files:
        subject = file.stem.rpartition("_")[0]
        shots = "".join(
            f"{text} {LETTERS[gold]}\n\n"
            for text, gold in map(_mmlu_question, _rows(folder / "dev" / f"{subject}_dev.csv")[:MMLU_SHOTS])
        )
        title = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {title}.\n\n"
        questions = map(_mmlu_question, _rows(file))
        subjects.append([{"question": head + shots + text, "gold": gold} for text, gold in questions])
    in_turns = chain.from_iterable(zip_longest(*subjects))  # so that the first N are of all subjects
    return [sample for sample in in_turns if sample is not None]


def _rows(file: Path) -> list[list[str]]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.reader(lines))
    except OSError as error:
        raise KvqError(
            f"{file} can't be read: {error.strerror}", "MMLU has a file in `dev` for every subject"
        ) from error
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in LETTERS:
            raise KvqError(
                f"{file.name}, line {number} is no question of MMLU", "question, A, B, C, D, answer"
            )
    return rows


def _mmlu_question(row: list[str]) -> tuple[str, int]:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0].strip()}{choices}\nAnswer:", LETTERS.index(row[5])
