"""One sample -> one row of model inputs and labels, through the family's own processor.

Letters: T tokens of the row as the model sees it (image tokens expanded).

Labels come from the chat template. For every assistant turn the conversation is rendered up to the generation prompt,
and up to the end of that turn; the characters between are the answer. Whitespace after the end-of-turn token is left
out, so the model learns to stop and not what a template puts between turns. Token offsets carry that span over to
tokens, and since a processor only lengthens runs of the image token, collapsing those runs carries it over to the
model's input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jinja2 import TemplateError
from PIL import Image

from vlsi_fast.data.images import ImageRef
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.skipped import UnusableRow
from vlsi_fast.data.sources import DataConfig

IGNORED = -100
"""Label of a token that no loss is taken of."""


def encode(
    sample: Sample, processor, data_config: DataConfig, image_loader: Callable[[ImageRef], Image.Image]
) -> dict[str, torch.Tensor]:
    """Model inputs of one sample.

    Args:
        sample: the conversation.
        processor: a Hugging Face processor with a chat template and a fast tokenizer.
        data_config: `max_length` is read.
        image_loader: opens one image.

    Returns:
        Everything that `processor(text=.., images=..)` returns, unchanged (`input_ids` [1, T] int64, `attention_mask`
        [1, T], vision tensors whose first axis runs over patches or images, ..), and `labels` [1, T] int64: the token
        inside assistant answers, end of turn included, and -100 elsewhere.

    Raises:
        UnusableRow: the row cannot be trained on.
    """
    check_messages(sample)
    images = [image_loader(ref) for ref in sample.images]
    text, spans = answer_spans(sample.messages, processor)
    image_token = getattr(processor, "image_token", None)
    found = len(images) if image_token is None else text.count(image_token)
    if found != len(images):
        raise UnusableRow("bad_row", f"{found} image tokens {image_token} in the text, but {len(images)} images")
    for token in (getattr(processor, "video_token", None), getattr(processor, "audio_token", None)):
        if token is not None and token in text:
            raise UnusableRow("bad_row", f"the text holds {token}, but rows have no videos and no sound")
    options = tokenizer_options(processor, text)
    try:
        # nested, as `apply_chat_template` passes them: LLaVA-OneVision treats several images of one row differently
        row = dict(processor(text=[text], images=[images] if images else None, return_tensors="pt", **options))
    except ValueError as error:  # an image too narrow to resize, ..
        raise UnusableRow("bad_row", f"{type(processor).__name__} refuses the row: {error}") from error
    length = row["input_ids"].shape[1]
    if length > data_config.max_length:
        raise UnusableRow("too_long", f"{length} tokens, data.max_length is {data_config.max_length}")
    row["labels"] = _labels(row["input_ids"], text, spans, processor, options)
    return row


def encode_question(question: str, images: list[Image.Image], processor) -> dict[str, torch.Tensor]:
    """Model inputs of one user turn, images first, up to where the answer starts.

    Args:
        question: the user's words.
        images: RGB images, shown in front of them.
        processor: as for `encode`.

    Returns:
        What the processor returns: `input_ids` [1, T], `attention_mask` [1, T], vision tensors ..

    Raises:
        ValueError: the question holds an image or video token, or the processor refuses an image.
    """
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    for token in (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")):
        if token is not None and token in question:
            raise ValueError(f"the question holds the special token {token}; leave it out, images are given as files")
    text = render(processor, [{"role": "user", "content": parts}], prompt=True)
    options = tokenizer_options(processor, text)
    return dict(processor(text=[text], images=[images] if images else None, return_tensors="pt", **options))


def check_messages(sample: Sample) -> None:
    """Refuses a conversation that holds nothing to learn.

    Raises:
        UnusableRow: cause empty_answer, where there is no assistant turn or one of them has no text.
    """
    answers = [message for message in sample.messages if message["role"] == "assistant"]
    if not answers:
        raise UnusableRow("empty_answer", "there is no assistant turn")
    for i, answer in enumerate(answers):
        if not "".join(part.get("text", "") for part in answer["content"]).strip():
            raise UnusableRow("empty_answer", f"assistant turn {i + 1} of {len(answers)} has no text")


def answer_spans(messages: list[dict], processor) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, image tokens not expanded, and the characters of each assistant answer in it.

    Raises:
        UnusableRow: cause template, where the template fails or does not continue its own generation prompt.
    """
    full = render(processor, messages, prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise UnusableRow("template", "the conversation starts with an assistant turn, so it has no prompt")
        last = i == len(messages) - 1
        through = (full if last else render(processor, messages[: i + 1], prompt=False)).rstrip()
        start = _end_of_prompt(render(processor, messages[:i], prompt=True), through)
        if start is None or not full.startswith(through):
            raise UnusableRow(
                "template", f"the chat template renders turn {i + 1} differently with and without what surrounds it"
            )
        spans.append((start, len(through)))
    return full, spans


def configure_image_bounds(processor, min_pixels: int | None, max_pixels: int | None, section: str = "data") -> None:
    """Sets the pixel bounds on a processor's image processor, in place; None leaves a bound as it is.

    Args:
        processor: the family's processor.
        min_pixels: pixels that a smaller image is enlarged to.
        max_pixels: pixels that a larger image is reduced to.
        section: of the config, for messages.

    Raises:
        ValueError: a bound is given and this processor has no such bounds, or the two exclude each other.
    """
    if min_pixels is None and max_pixels is None:
        return
    image_processor = getattr(processor, "image_processor", None)
    accepted = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})
    size = dict(getattr(image_processor, "size", None) or {})
    if "max_pixels" not in accepted or not {"shortest_edge", "longest_edge"} <= size.keys():
        raise ValueError(
            f"{type(image_processor).__name__} has no bounds on the number of pixels; remove {section}.min_pixels and "
            f"{section}.max_pixels from the config"
            + ("; to bound the other model's images alone, set them in its section" if section == "data" else "")
        )
    low = size["shortest_edge"] if min_pixels is None else min_pixels
    high = size["longest_edge"] if max_pixels is None else max_pixels
    if low > high:
        raise ValueError(
            f"the image bounds exclude each other: at least {low} and at most {high} pixels; set both "
            f"{section}.min_pixels and {section}.max_pixels "
            f"(the processor's own are {size['shortest_edge']} and {size['longest_edge']})"
        )
    image_processor.size = {**size, "shortest_edge": low, "longest_edge": high}


def render(processor, messages: list[dict], prompt: bool) -> str:
    """The conversation as the chat template writes it; `prompt`: up to where the next answer starts.

    Raises:
        UnusableRow: cause template, where the template fails.
    """
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        raise UnusableRow("template", f"the chat template fails on this conversation: {error}") from error


def _end_of_prompt(prompt: str, text: str) -> int | None:
    """Where the answer starts in `text`, which begins with `prompt`; None where it does not.

    Some templates put other whitespace before a finished answer than after the generation prompt (LLaVA-OneVision: a
    space before the line break), so whitespace may differ, and only whitespace.
    """
    if text.startswith(prompt):
        return len(prompt)
    at = 0
    for char in prompt:
        if char.isspace():
            continue
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text) or text[at] != char:
            return None
        at += 1
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def tokenizer_options(processor, text: str) -> dict:
    """For the processor's call on rendered text. What `apply_chat_template(tokenize=True)` passes on: no second beginning-of-text token."""
    begin = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}


def _labels(input_ids: torch.Tensor, text: str, spans: list[tuple[int, int]], processor, options: dict) -> torch.Tensor:
    """Labels [1, T] of `input_ids` [1, T]: a token is learnt when all of its characters lie in an answer."""
    plain = processor.tokenizer(text, return_offsets_mapping=True, return_tensors="pt", **options)
    starts, ends = plain["offset_mapping"][0].unbind(1)
    learnt = torch.zeros_like(starts, dtype=torch.bool)
    for start, end in spans:
        learnt |= (starts >= start) & (ends <= end) & (ends > starts)
    image_ids = _image_token_ids(processor)
    kept = _run_starts(input_ids[0], image_ids)
    kept_plain = _run_starts(plain["input_ids"][0], image_ids)
    ids = input_ids[0][kept]
    if not torch.equal(ids, plain["input_ids"][0][kept_plain]):
        raise UnusableRow(
            "template",
            f"{type(processor).__name__} changes more of the text than runs of its image token; answers are lost",
        )
    labels = torch.full_like(input_ids, IGNORED)
    labels[0, kept] = torch.where(learnt[kept_plain], ids, IGNORED)
    return labels


def _run_starts(ids: torch.Tensor, image_ids: torch.Tensor) -> torch.Tensor:
    """Mask [T] of `ids` [T] that leaves only the first token of every run of image tokens."""
    is_image = torch.isin(ids, image_ids)
    repeats = torch.zeros_like(is_image)
    repeats[1:] = is_image[1:] & is_image[:-1]
    return ~repeats


def _image_token_ids(processor) -> torch.Tensor:
    """Ids [n] that stand for image patches in `input_ids`."""
    ids = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    return torch.tensor([i for i in ids if i is not None], dtype=torch.int64)
