"""A batch of questions -> the teacher's answers, each with what the filters look at.

A conversation of several questions is answered turn by turn, every answer standing before the next question.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...asking import Prompt, encode_prompts, generate, make_prompt
from ...config import ConfigError
from ...config_data import PILLOW_MAX_IMAGE_PIXELS
from ..encoding import check_length
from ..images import check_pixels, load_image
from ..skipped import UnusableRow, row_boundary
from .decoding import Chooser, Decoding, numbers_of
from .filters import repetition
from .prompts import Question, Questions, as_written


@dataclass
class Talk:
    """One question, or one sample of a conversation, on its way."""

    number: int
    question: Question
    images: list[Image.Image]
    prompt: Prompt
    """Of the next turn to be answered."""
    said: list[dict[str, Any]] = field(default_factory=list)
    """Answers so far."""
    cause: str | None = None
    """Why it cannot go on."""


@dataclass
class Batch:
    """Questions made ready."""

    rows: list[dict[str, Any]]
    """What is known of each question, in order; `cause` and `detail` where it cannot be asked."""
    talks: list[Talk]
    """Those that can be."""
    inputs: Any
    """Model inputs of their first turns; None where there are none."""


class Answerer:
    """Asks one model.

    Args:
        model: stock, where it runs.
        processor: its own.
        questions: all there are.
        decoding: how it answers.
        max_length: tokens of a prompt that is too long; None: no bound.
        max_image_pixels: of an image file.
    """

    def __init__(
        self,
        model: nn.Module,
        processor,
        questions: Questions,
        decoding: Decoding,
        max_length: int | None = None,
        max_image_pixels: int = PILLOW_MAX_IMAGE_PIXELS,
    ):
        self.model, self.processor, self.questions, self.decoding = model, processor, questions, decoding
        self.max_length, self.max_image_pixels = max_length, max_image_pixels
        self.lock = threading.Lock()  # a fast tokenizer may not be set up anew while another thread uses it
        tokenizer, own = processor.tokenizer, model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
        if ends is None:
            raise ConfigError("the teacher has no end token: set eos_token_id in its generation_config.json")
        pad = own.pad_token_id if own.pad_token_id is not None else tokenizer.pad_token_id
        self.options = {"eos_token_id": ends, "pad_token_id": pad, "do_sample": False, "num_beams": 1}
        self.ends = torch.as_tensor(ends).flatten()
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        vision = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")}
        self.special = {token for token in special | vision if token}

    # ---- ready to ask; may run in another thread ----

    def prepare(self, numbers: range) -> Batch:
        """Opens the images of some questions and encodes what is asked first."""
        rows, talks = [], []
        load = lru_cache(maxsize=None)(lambda image: load_image(image, self.max_image_pixels))
        for number in numbers:
            name, which = self.questions.name(number)
            row: dict[str, Any] = {"id": name, "question": which}
            rows.append(row)
            try:
                with row_boundary():
                    question = self.questions[number]
                    row |= {"id": question.id, "images": [as_written(image) for image in question.images]}
                    row["turns"] = question.turns
                    check_pixels(question.images, self.max_image_pixels, PILLOW_MAX_IMAGE_PIXELS)
                    images = [load(image) for image in question.images]
                    with self.lock:
                        if self.max_length is not None:
                            asked = [turn for turns in question.turns for turn in turns]
                            check_length(asked, self.processor, self.max_length)
                        talks.append(Talk(number, question, images, self._prompt(question, images, [])))
            except UnusableRow as error:
                row |= {"cause": error.cause, "detail": error.detail}
        refused: dict[int, UnusableRow] = {}
        talks, inputs = self._encode(talks, refused)
        for number, error in refused.items():
            rows[number - numbers.start] |= {"cause": error.cause, "detail": error.detail}
        return Batch(rows, talks, inputs)

    def _prompt(self, question: Question, images: list[Image.Image], said: list[str]) -> Prompt:
        """The conversation up to the next answer."""
        turns = list(question.turns[0])
        for answer, after in zip(said, question.turns[1:]):
            turns += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}, *after]
        shown = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        return make_prompt(self.processor, turns, images[:shown])

    def _encode(self, talks: list[Talk], refused: dict[int, UnusableRow]) -> tuple[list[Talk], Any]:
        """The talks whose prompts fit, and their inputs together; the others' numbers go to `refused`."""
        if not talks:
            return [], None
        with self.lock:
            try:
                inputs = encode_prompts(self.processor, [talk.prompt for talk in talks])
            except ValueError as error:  # an image too narrow to resize, ..: which row is it?
                if len(talks) == 1:
                    kind = type(self.processor).__name__
                    refused[talks[0].number] = UnusableRow("bad_row", f"{kind} refuses the row: {error}")
                    return [], None
                inputs = None
        if inputs is None:
            good = [talk for talk in talks if self._encode([talk], refused)[0]]
            if len(good) == len(talks):
                raise ConfigError("the processor takes each of these rows alone, but not together; set --batch-size 1")
            return self._encode(good, refused)
        lengths = inputs["attention_mask"].sum(1).tolist()
        if self.max_length is None or max(lengths) < self.max_length:
            return talks, inputs
        fitting = []
        for talk, length in zip(talks, lengths):
            if length < self.max_length:
                fitting.append(talk)
            else:
                detail = f"the question alone has {length} tokens, data.max_length is {self.max_length}"
                refused[talk.number] = UnusableRow("too_long", detail)
        return self._encode(fitting, refused)

    # ---- answers ----

    def answer(self, batch: Batch) -> list[dict[str, Any]]:
        """The batch's rows, with `answers` of those that could be asked, one a sample."""
        answers: dict[int, list[dict]] = {talk.number: [] for talk in batch.talks}
        for sample in range(self.decoding.samples):
            talks = [Talk(t.number, t.question, t.images, t.prompt) for t in batch.talks]
            active, inputs = talks, batch.inputs
            while active:
                self._ask(active, inputs, sample)
                active, inputs = self._next_turn(active)
            for talk in talks:
                answers[talk.number].append(_record(talk))
        rest = iter(answers.values())
        return [row if "cause" in row else row | {"answers": next(rest)} for row in batch.rows]

    def _ask(self, talks: list[Talk], inputs: Any, sample: int) -> None:
        """Adds an answer to each of the talks. Halves what does not fit in memory."""
        numbers, count = None, self.decoding.max_new_tokens
        if self.decoding.temperature > 0:
            drawn = [numbers_of(self.decoding.seed, t.number, sample, len(t.said), count) for t in talks]
            numbers = torch.tensor(drawn, dtype=torch.float64, device=self.model.device)
        chooser = Chooser(self.decoding, numbers)
        try:
            new = generate(self.model, inputs, max_new_tokens=count, logits_processor=[chooser], **self.options)
        except torch.OutOfMemoryError as error:
            if len(talks) == 1:
                raise ConfigError(f"one question does not fit in memory ({error}); lower --data.max_pixels") from error
            new = None
        if new is not None:
            self._note(talks, new.cpu(), torch.stack(chooser.logprobs, 1).cpu())
            return
        del chooser
        torch.cuda.empty_cache()
        for part in (talks[: len(talks) // 2], talks[len(talks) // 2 :]):
            with self.lock:
                inputs = encode_prompts(self.processor, [talk.prompt for talk in part])
            self._ask(part, inputs, sample)

    def _note(self, talks: list[Talk], new: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Each talk's answer from tokens and log-probabilities [B, T]."""
        for talk, ids, scores in zip(talks, new, logprobs):
            ends = torch.isin(ids, self.ends).nonzero().flatten().tolist()
            tokens = ids[: ends[0]].tolist() if ends else ids.tolist()
            with self.lock:
                text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
            said = {"text": text, "tokens": len(tokens), "finished": bool(ends), "repetition": repetition(tokens)}
            talk.said.append(said | {"logprob": scores[: len(tokens) + bool(ends)].sum().item()})
            if not text.strip():
                talk.cause = "empty"
            elif any(token in text for token in self.special):
                talk.cause = "special_token"

    def _next_turn(self, talks: list[Talk]) -> tuple[list[Talk], Any]:
        """Those that have a further question, and its inputs. A cut answer is judged later: it may be kept."""
        going = []
        for talk in talks:
            if talk.cause is None and len(talk.said) < len(talk.question.turns):
                try:
                    talk.prompt = self._prompt(talk.question, talk.images, [said["text"] for said in talk.said])
                    going.append(talk)
                except UnusableRow as error:
                    talk.cause = error.cause
        refused: dict[int, UnusableRow] = {}
        kept, inputs = self._encode(going, refused)
        for talk in going:
            if talk.number in refused:
                talk.cause = refused[talk.number].cause
        return kept, inputs


def _record(talk: Talk) -> dict[str, Any]:
    """A sample as the parts hold it."""
    lists = {name: [said[name] for said in talk.said] for name in ("tokens", "finished", "repetition")}
    count = sum(said["tokens"] + said["finished"] for said in talk.said)
    record = {"texts": [said["text"] for said in talk.said], **lists}
    record["logprob"] = round(sum(said["logprob"] for said in talk.said) / count, 4)
    return record | ({"cause": talk.cause} if talk.cause else {})
