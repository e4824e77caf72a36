"""`answer`: the course of it. Claim the output, answer batches (each rank its share), merge, say what was made.

    OUT                  rows for reader `messages`, in the order of the questions
    OUT.rejected.jsonl   answers that were filtered out and rows that could not be asked, with their cause
    OUT.manifest.json    teacher, decoding, questions, filters, counts, versions
    OUT.parts/           while it runs (`parts.py`)

What is promised. A question's random numbers follow from the seed and its number, so nothing that is drawn depends on
batches, ranks or interruptions; and batches consist of the same questions whatever the number of ranks and however
often the run was interrupted. The file is therefore the same, to the byte, on the same kind of machine. With another
`batch_size` or machine the logits' last bits are others, which changes an answer where two tokens (or a random number
and a token's bound) are that close.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...config import RunConfig
from ...lineage import code_commit, versions
from .asking import Answerer
from .decoding import Decoding
from .filters import Filters
from .meeting import Meeting
from .parts import Files, write_whole
from .prompts import Questions
from .teacher import Teacher

FORMAT = "vlsi-fast answers 1"


def answer(
    config: RunConfig | str | Path | None,
    images: str | Path,
    questions: str | Path | list[str] | None,
    out: str | Path,
    *,
    model: str | Path | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    seed: int = 0,
    questions_per_image: int | None = None,
    image_root: str | None = None,
    limit: int | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    keep_cut: bool = False,
    max_repetition: float | None = None,
    min_agreement: float | None = None,
    keep: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a teacher's answers to pictures, as rows to train on.

    In a process that a launcher started (torchrun, deepspeed) each rank answers its share; all of them call this. An
    interrupted call is continued by the same one; filters may then be others.

    Args:
        config: a run's config or its file: its teacher answers, its `data` bounds images and prompts. None: `model`.
        images: folder of pictures, or a JSON or JSONL file of rows in the format of one of the readers.
        questions: a file with a question a line, a question, or several; each picture gets all of them. None: the
            rows' own, whose answers are not looked at.
        out: JSONL file to write.
        model: a checkpoint that answers instead of the config's teacher.
        samples: answers to each question.
        temperature: 0: greedy; above: sampling.
        top_p: sampling keeps the likeliest tokens up to this probability; 1: all.
        top_k: sampling keeps so many of the likeliest tokens; 0: all.
        max_new_tokens: tokens after which an answer is cut.
        batch_size: questions that are answered at once.
        seed: of the samples, and of the questions that are drawn.
        questions_per_image: so many of the questions for each picture, drawn by `seed`; None: all.
        image_root: folder that image paths of rows start from; None: that of the file.
        limit: pictures or rows to ask about, from the first; None: all.
        min_tokens: least tokens of an answer, its end not counted.
        max_tokens: most tokens of an answer; None: no bound besides `max_new_tokens`.
        keep_cut: keep answers that were cut at `max_new_tokens`.
        max_repetition: largest share (0 to 1) of an answer's stretches of four tokens that were there before in it.
        min_agreement: share (0 to 1) of a question's samples that must say the same.
        keep: of a question's samples that are left: "all", "first", or "majority", the first of those that agree with
            most others. None: majority where `min_agreement` is set, else all.
        dtype: of the model; None: the config's, else bfloat16 on a GPU and float32 elsewhere.
        device: None: the rank's GPU; all GPUs where no launcher started this process; the CPU where there is none.
        fresh: remove what an earlier call wrote to `out`.
        progress: a bar on rank 0.

    Returns:
        The manifest.

    Raises:
        ConfigError, FileNotFoundError: an option or a file is wrong.
        LineageError: `out` is finished, or holds other answers.
    """
    decoding = Decoding(temperature, top_p, top_k, samples, max_new_tokens, batch_size, seed)
    filters = Filters(min_tokens, max_tokens, keep_cut, max_repetition, min_agreement, keep)
    filters.check(samples, max_new_tokens)
    teacher = Teacher.of(config, model, dtype, device)
    asked = Questions(images, questions, image_root=image_root, per_image=questions_per_image, limit=limit, seed=seed)
    settings = {
        "format": FORMAT,
        "teacher": teacher.describe(),
        "bounds": teacher.bounds,
        "max_length": teacher.data and teacher.data.max_length,
        "decoding": vars(decoding),
        "asked": asked.describe(),
    }
    files, batches = Files(out), -(-len(asked) // batch_size)
    with Meeting() as meeting:
        meeting.first(lambda: files.claim(settings, fresh))
        done = files.done()
        meeting.wait()  # every rank has looked before one adds to its part
        own = range(meeting.rank, batches, meeting.ranks)
        began, todo = time.time(), [number for number in own if number not in done]
        if todo:
            bar = (len(own) - len(todo), len(own)) if progress and meeting.rank == 0 else None
            _answer(teacher, asked, decoding, files, (meeting.rank, todo, bar))
        meeting.wait()
        seconds = round(time.time() - began, 1)
        return meeting.first(lambda: _finish(files, batches, asked, filters, settings, seconds))


def _answer(teacher: Teacher, asked: Questions, decoding: Decoding, files: Files, share: tuple) -> None:
    """Answers the batches of one rank. `share`: the rank, its batches, and (done, all) for a progress bar or None."""
    from tqdm.auto import tqdm

    rank, todo, bar = share
    model, processor = teacher.load()
    bounds = (
        {}
        if teacher.data is None
        else {"max_length": teacher.data.max_length, "max_image_pixels": teacher.data.max_image_pixels}
    )
    answerer = Answerer(model, processor, asked, decoding, **bounds)
    size = decoding.batch_size
    done, total = bar or (0, None)

    def prepare(number: int):
        return answerer.prepare(range(number * size, min((number + 1) * size, len(asked))))

    with files.part(rank) as part, ThreadPoolExecutor(1) as ahead:  # the next batch's images while this one is answered
        waiting = ahead.submit(prepare, todo[0])
        for i, number in enumerate(tqdm(todo, "batches", total, initial=done, disable=bar is None, leave=False)):
            batch = waiting.result()
            if i + 1 < len(todo):
                waiting = ahead.submit(prepare, todo[i + 1])
            part.add(number, answerer.answer(batch))


def _finish(
    files: Files, batches: int, asked: Questions, filters: Filters, settings: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Merges the parts, writes the manifest, removes the parts. On rank 0."""
    counts, rejected, unusable, logprob = Counter(), Counter(), Counter(), 0.0
    partial = [path.with_name(path.name + ".tmp") for path in (files.out, files.rejected)]
    with open(partial[0], "wb") as good, open(partial[1], "wb") as bad:
        for row in files.merged(batches):
            if "cause" in row:
                unusable[row["cause"]] += 1
                bad.write(_line({k: row[k] for k in ("id", "images", "question", "cause", "detail") if k in row}))
                continue
            causes, agreement = filters.judge(row["answers"])
            for sample, (found, cause) in enumerate(zip(row["answers"], causes)):
                counts["answers"] += 1
                made = _row(row, found, settings["teacher"]["digest"])
                made["answered_by"] |= {} if agreement is None else {"sample": sample, "agreement": round(agreement, 4)}
                if cause is not None:
                    rejected[cause] += 1
                    bad.write(_line(made | {"cause": cause}))
                    continue
                counts["kept"] += 1
                counts["answer_tokens"] += sum(found["tokens"])
                logprob += found["logprob"]
                good.write(_line(made))
    partial[0].replace(files.out)
    partial[1].replace(files.rejected)
    manifest = settings | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "filters": vars(filters),
        "questions": asked.texts or "the rows' own",
        "rows": asked.row_count,
        "asked": settings["asked"] | {"conversations": len(asked)},
        "answers": counts["answers"],
        "kept": counts["kept"],
        "rejected": dict(rejected.most_common()),
        "unusable": dict(unusable.most_common()),
        "answer_tokens": counts["answer_tokens"],
        "mean_logprob": round(logprob / counts["kept"], 4) if counts["kept"] else None,
        "seconds": seconds,
        "source": {"reader": "messages", "path": str(files.out.absolute()), "image_root": asked.root},
        "versions": versions(),
        "commit": code_commit(),
    }
    write_whole(files.manifest, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(files.parts)
    return manifest


def _row(row: dict[str, Any], found: dict[str, Any], digest: str) -> dict[str, Any]:
    """A row of the output: the turns that were answered, with their answers."""
    messages = []
    for turns, text in zip(row["turns"], found["texts"]):
        messages += [*turns, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    shown = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    by = {"teacher": digest[:12], "logprob": found["logprob"]}
    by |= {} if row["question"] is None else {"question": row["question"]}
    return {"id": row["id"], "images": row["images"][:shown], "messages": messages, "answered_by": by}


def _line(row: dict[str, Any]) -> bytes:
    # what is no UTF-8 in a file's name becomes JSON's own escape
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
