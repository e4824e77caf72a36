"""One sample -> one row of model inputs and labels, through the family's own processor.

Letters: T tokens of the row as the model sees it (image tokens expanded).

Labels come from the chat template. An answer starts where the rendering up to the generation prompt ends, and ends
where the rendering of the conversation through that turn ends. Whitespace after the end-of-turn token is left out, so
the model learns to stop and not what a template puts between turns. The processor tells what it wrote in place of each
image token (a run of them, or also line breaks and marks around it: Gemma 3), which carries that span over to the text
that the model gets, and token offsets carry it over to tokens.

A row's words never become control tokens (plaintext.py), and endless text is refused before it is tokenized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from vlsi_fast.config_data import DataConfig
from vlsi_fast.data.alignment import answers_of
from vlsi_fast.data.images import ImageRef
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.plaintext import Rendered, apply_template, plainly, render, special_tokens
from vlsi_fast.data.skipped import UnusableRow, row_boundary

IGNORED = -100
"""Label of a token that no loss is taken of."""
MAX_REWRITTEN_TURNS = 32
"""Answers of a conversation whose template rewrites texts: each is then found by renderings of its own."""
USUAL_CHARACTERS = 16
"""A text of more characters than this a token allowed is counted from its start before it is tokenized as a whole."""


@row_boundary()
def encode(
    sample: Sample,
    processor,
    data_config: DataConfig,
    image_loader: Callable[[ImageRef], Image.Image],
    with_answers: bool = False,
) -> dict[str, torch.Tensor]:
    """Model inputs of one sample.

    Args:
        sample: the conversation.
        processor: a Hugging Face processor with a chat template and a fast tokenizer.
        data_config: `max_length` and `special_tokens` are read.
        image_loader: opens one image; asked once for an image that the row shows several times.
        with_answers: say of every answer where its tokens stand in its words, for `alignment.pair_tokens`.

    Returns:
        Everything that `processor(text=.., images=..)` returns, unchanged (`input_ids` [1, T] int64, `attention_mask`
        [1, T], vision tensors whose first axis runs over patches or images, ..), and `labels` [1, T] int64: the token
        inside assistant answers, end of turn included, and -100 elsewhere. `with_answers`: also `answers`, a list of
        one `alignment.Answer` for each assistant turn, whose tokens are the labels that are not -100, in order.

    Raises:
        UnusableRow: the row cannot be trained on.
    """
    check_messages(sample)
    check_length(sample.messages, processor, data_config.max_length)
    rendered, spans = _ended(*answer_spans(sample.messages, processor), sample.messages, processor)
    check_special(rendered, data_config)
    loaded = {ref: image_loader(ref) for ref in dict.fromkeys(sample.images)}
    images = [loaded[ref] for ref in sample.images]
    check_placeholders(rendered, len(images), processor)
    asked = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    row = encode_rendered(rendered, images, processor, **asked)
    offsets, replaced = row.pop("offset_mapping")[0], row.pop("text_replacement_offsets")
    length = row["input_ids"].shape[1]
    if length > data_config.max_length:
        raise UnusableRow("too_long", f"{length} tokens, data.max_length is {data_config.max_length}")
    tokens = Tokens(rendered, spans, row["input_ids"][0], offsets, replaced[0] if replaced else [])
    row["labels"] = torch.where(tokens.learnt, tokens.ids, IGNORED)[None]
    return row | ({"answers": answers_of(tokens, processor)} if with_answers else {})


def encode_question(question: str, images: list[Image.Image], processor) -> dict[str, torch.Tensor]:
    """Model inputs of one user turn, images first, up to where the answer starts.

    Args:
        question: the user's words.
        images: RGB images, shown in front of them.
        processor: as for `encode`.

    Returns:
        What the processor returns: `input_ids` [1, T], `attention_mask` [1, T], vision tensors ..

    Raises:
        UnusableRow: the processor refuses an image, or special tokens in the question cannot be read as text (it is a
            ValueError).
    """
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    check_characters(messages)
    rendered = render(processor, messages, prompt=True)
    return encode_rendered(rendered, images, processor)


def encode_rendered(rendered: Rendered, images: list[Image.Image], processor, **more) -> dict[str, torch.Tensor]:
    """What the processor makes of one rendered conversation.

    Args:
        rendered: from `render`.
        images: RGB images, one for each image token in it.
        processor: as for `encode`.
        more: further options of its call.

    Raises:
        UnusableRow: the processor refuses an image, or the row's own special tokens cannot be read as text.
    """
    options = tokenizer_options(processor, rendered.text) | more
    # nested, as `apply_chat_template` passes them: LLaVA-OneVision treats several images of one row differently
    nested = [images] if images else None
    reader = plainly(processor, [rendered])
    try:
        return dict(reader(text=[rendered.text], images=nested, return_tensors="pt", **options))
    except UnusableRow:
        raise
    except ValueError as error:  # an image too narrow to resize, ..
        raise UnusableRow("bad_row", f"{type(processor).__name__} refuses the row: {error}") from error


def check_messages(sample: Sample) -> None:
    """Refuses a conversation that holds nothing to learn, or what is no text.

    Raises:
        UnusableRow: cause empty_answer, where there is no assistant turn or one of them has no text; bad_row, where a
            text holds half of a surrogate pair, which no tokenizer and no file takes.
    """
    answers = [message for message in sample.messages if message["role"] == "assistant"]
    if not answers:
        raise UnusableRow("empty_answer", "there is no assistant turn")
    for i, answer in enumerate(answers):
        if not "".join(part.get("text", "") for part in answer["content"]).strip():
            raise UnusableRow("empty_answer", f"assistant turn {i + 1} of {len(answers)} has no text")
    check_characters(sample.messages)


def check_characters(messages: list[dict]) -> None:
    """Refuses text with half of a surrogate pair. Raises UnusableRow, cause bad_row."""
    for message in messages:
        for part in message["content"]:
            try:
                part.get("text", "").encode()
            except UnicodeEncodeError as error:
                raise UnusableRow("bad_row", f"the text of a {message['role']} turn is no Unicode: {error}") from error


def check_length(messages: list[dict], processor, max_length: int) -> None:
    """Refuses, without tokenizing it all, text that must have more tokens than a row may have.

    Args:
        messages: chat messages, content in list form.
        processor: its tokenizer's longest token says how much text a token holds at most.
        max_length: tokens that a row may have.

    Raises:
        UnusableRow: cause too_long.
    """
    texts = [part["text"] for message in messages for part in message["content"] if "text" in part]
    longest = _longest_token(processor.tokenizer)
    if (characters := sum(map(len, texts))) > longest * max_length:
        what = f"{characters} characters, a token has at most {longest}; data.max_length is {max_length}"
        raise UnusableRow("too_long", what)
    for text in texts:
        start = text[: USUAL_CHARACTERS * max_length]
        if len(start) == len(text):
            continue
        words = processor.tokenizer(start, add_special_tokens=False, split_special_tokens=True).word_ids()
        if words and sum(word != words[-1] for word in words) > max_length:  # the last word may go on behind the cut
            what = f"{len(text)} characters, the first {len(start)} alone are too many; data.max_length is {max_length}"
            raise UnusableRow("too_long", what)


_longest: WeakKeyDictionary = WeakKeyDictionary()


def _longest_token(tokenizer) -> int:
    """Characters of the longest entry of the vocabulary."""
    if tokenizer not in _longest:
        _longest[tokenizer] = max(map(len, tokenizer.get_vocab()))
    return _longest[tokenizer]


def check_placeholders(rendered: Rendered, images: int, processor) -> None:
    """Refuses a rendering whose image tokens are not those of the row's images, or that has others.

    Raises:
        UnusableRow: cause bad_row.
    """
    image_token = getattr(processor, "image_token", None)
    found = images if image_token is None else rendered.text.count(image_token)
    if found != images:
        raise UnusableRow("bad_row", f"{found} image tokens {image_token} in the text, but {images} images")
    known = special_tokens(processor)  # to SmolVLM's processor <video> is a token, to its tokenizer a word
    for token in (getattr(processor, "video_token", None), getattr(processor, "audio_token", None)):
        if token in known and token in rendered.text:
            raise UnusableRow("bad_row", f"the text holds {token}, but rows have no videos and no sound")


def check_special(rendered: Rendered, data_config: DataConfig) -> None:
    """Refuses special tokens in a row's text where the config does not want them read as text.

    Raises:
        UnusableRow: cause special_token.
    """
    if rendered.hidden and data_config.special_tokens != "text":
        raise UnusableRow("special_token", f"the text holds {', '.join(rendered.special)}")


def answer_spans(messages: list[dict], processor) -> tuple[Rendered, list[tuple[int, int]]]:
    """The rendered conversation, image tokens not expanded, and the characters of each assistant answer in it.

    The first and the last answer are found by renderings up to there. Those between are found by what stands around the
    texts, which must be the same: so the number of renderings does not grow with the number of turns.

    Raises:
        UnusableRow: cause template, where the template fails or does not continue its own generation prompt; those of
            `render`.
    """
    full = render(processor, messages, prompt=False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if turns and turns[0] == 0:
        raise UnusableRow("template", "the conversation starts with an assistant turn, so it has no prompt")
    if len(turns) <= 2:
        return full, [_span(messages, i, full, processor) for i in turns]
    if spans := _spans_between(messages, turns, full, processor):
        return full, spans
    if len(turns) > MAX_REWRITTEN_TURNS:
        what = (
            f"the chat template renders turns differently, so no more than {MAX_REWRITTEN_TURNS} answers can be found"
        )
        raise UnusableRow("template", what)
    return full, [_span(messages, i, full, processor) for i in turns]


def _span(messages: list[dict], i: int, full: Rendered, processor) -> tuple[int, int]:
    """Where the answer of turn `i` stands: by renderings up to there, or by its words where those differ."""
    try:
        return _rendered_span(messages, i, full.plain, processor)
    except UnusableRow:
        found = _worded_span(messages, i, full, processor)
        if found is None:
            raise
        return found


def _worded_span(messages: list[dict], i: int, full: Rendered, processor) -> tuple[int, int] | None:
    """Of an answer in whose place the template writes more while it is the last one (Qwen3.5: an empty thought): from
    its first word to the end of turn that it has there. None where the words are not known, or none follow."""
    alone = render(processor, messages[: i + 1], prompt=False)
    if i == len(messages) - 1 or not alone.words or full.words is None:
        return None
    count = sum(bool(part.get("text", "").strip()) for part in messages[i]["content"])
    own = full.words[len(alone.words) - count : len(alone.words)]
    ending = alone.plain[alone.words[-1][1] :].strip()
    start, at = own[0][0], own[-1][1]
    end = full.plain.find(ending, at)
    return (start, end + len(ending)) if end >= 0 and not full.plain[at:end].strip() else None


def _rendered_span(messages: list[dict], i: int, full: str, processor) -> tuple[int, int]:
    """Where the answer of turn `i` stands in the whole conversation, by renderings up to its start and its end."""
    last = i == len(messages) - 1
    through = (full if last else apply_template(processor, messages[: i + 1], prompt=False)).rstrip()
    start = _end_of_prompt(apply_template(processor, messages[:i], prompt=True), through)
    if start is None or not full.startswith(through):
        raise UnusableRow(
            "template", f"the chat template renders turn {i + 1} differently with and without what surrounds it"
        )
    return start, len(through)


def _spans_between(messages: list[dict], turns: list[int], full: Rendered, processor) -> list[tuple[int, int]] | None:
    """All answers, by the generation prompt in front of an answer's words and the end of turn behind them.

    None where the template is not that regular.
    """
    if full.words is None:
        return None
    plain, known = full.plain, {i: _span(messages, i, full, processor) for i in (turns[0], turns[-1])}
    before = apply_template(processor, messages[: turns[0]], prompt=False)
    prompt = apply_template(processor, messages[: turns[0]], prompt=True)
    if not prompt.startswith(before) or not (prompt := prompt[len(before) :]).strip():
        return None
    words, spans, ending, behind = iter(full.words), [], None, 0
    for i, message in enumerate(messages):
        texts = [part["text"] for part in message["content"] if part.get("text", "").strip()]
        own = [next(words) for _ in texts]
        if message["role"] == "assistant":
            (start, _), (_, end) = own[0], own[-1]
            at = plain.rfind(prompt.strip(), behind, start)
            found = None if at < 0 else _end_of_prompt(prompt.lstrip(), plain[at : start + 1])
            if ending is None:  # of the first answer, known by rendering
                ending = plain[end : known[i][1]].lstrip()
            after = end if not ending else plain.find(ending, end)
            if found is None or plain[end:after].strip():
                return None
            spans.append((at + found, after + len(ending)))
        behind = own[-1][1] if own else behind
    return spans if (spans[0], spans[-1]) == (known[turns[0]], known[turns[-1]]) else None


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
    if not {"max_pixels", "merge_size"} & set(accepted) or not {"shortest_edge", "longest_edge"} <= size.keys():
        raise ValueError(
            f"{type(image_processor).__name__} has no bounds on the number of pixels; remove {section}.min_pixels and "
            f"{section}.max_pixels from the config"
            + ("; to bound the other model's images alone, set them in its section" if section == "data" else "")
        )
    # GLM's counts the pixels of as many frames as it makes of an image
    frames = 1 if "max_pixels" in accepted else image_processor.temporal_patch_size
    low = size["shortest_edge"] if min_pixels is None else frames * min_pixels
    high = size["longest_edge"] if max_pixels is None else frames * max_pixels
    if low > high:
        raise ValueError(
            f"the image bounds exclude each other: at least {low // frames} and at most {high // frames} pixels; set "
            f"both {section}.min_pixels and {section}.max_pixels "
            f"(the processor's own are {size['shortest_edge'] // frames} and {size['longest_edge'] // frames})"
        )
    image_processor.size = {**size, "shortest_edge": low, "longest_edge": high}


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
    """For the processor's call: no second beginning-of-text token, as in `apply_chat_template(tokenize=True)`."""
    begin = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}


_around: WeakKeyDictionary = WeakKeyDictionary()


def around_an_answer(processor) -> tuple[str, str]:
    """What the chat template writes between its generation prompt and an answer's words (SmolVLM's a space), and behind
    a last answer (GLM's nothing: it stops before the next turn)."""
    if processor not in _around:
        turns = [{"role": role, "content": [{"type": "text", "text": "seven"}]} for role in ("user", "assistant")]
        try:
            rendered, [(start, end)] = answer_spans(turns, processor)
        except UnusableRow:  # as every row will be
            return "", ""
        before, _, behind = rendered.plain[start:end].partition("seven")
        _around[processor] = before, behind.strip()
    return _around[processor]


def ends_bare(processor) -> bool:
    """Whether a template writes nothing behind the last answer."""
    return not around_an_answer(processor)[1]


def end_of_turn(processor) -> int | None:
    """The token that ends an answer: what the template writes there, or the tokenizer's `eos_token` where that is
    nothing, or no single token. (The eos_token of Gemma ends a text, and <end_of_turn> a turn.)"""
    tokenizer = processor.tokenizer
    found = tokenizer(around_an_answer(processor)[1], add_special_tokens=False)["input_ids"]
    return found[0] if len(found) == 1 else tokenizer.eos_token_id


def _ended(rendered: Rendered, spans: list[tuple[int, int]], messages: list[dict], processor):
    """With the end-of-text token behind a last answer that ends bare, to be learnt: else none would learn to stop."""
    if messages[-1]["role"] != "assistant" or not ends_bare(processor):
        return rendered, spans
    text = rendered.text.rstrip() + processor.tokenizer.eos_token
    return replace(rendered, text=text), [*spans[:-1], (spans[-1][0], len(text))]


class Tokens:
    """A conversation's tokens as the model gets them: of each, which answer it is of, if any.

    Args:
        rendered: the conversation, each image being one image token.
        spans: characters of each answer in it.
        ids: [T] tokens, those of images included.
        offsets: [T, 2] first and last + 1 character of each token, in the text with its images' tokens.
        replaced: what the processor wrote for each image, in order: `span` in the conversation, `new_span` there.
    """

    def __init__(
        self,
        rendered: Rendered,
        spans: list[tuple[int, int]],
        ids: torch.Tensor,
        offsets: torch.Tensor,
        replaced: list[dict],
    ):
        self.rendered, self.spans, self.ids = rendered, spans, ids
        self.offsets = torch.stack([_unmoved(at, replaced, side) for side, at in enumerate(offsets.T)], dim=1)
        """[T, 2] characters in the conversation; those of an image are its image token's."""
        starts, ends = self.offsets.T.contiguous()
        first, last = torch.tensor(spans, dtype=starts.dtype).T.contiguous()
        self.answer = torch.searchsorted(first, starts, right=True) - 1
        """[T] the answer that starts before a token, -1: none."""
        self.learnt = (self.answer >= 0) & (ends <= last[self.answer.clamp(min=0)]) & (ends > starts)
        """[T] a token is learnt when all of its characters lie in an answer, and none in an image there."""
        for start, end in (each["new_span"] for each in replaced):
            self.learnt &= (offsets[:, 1] <= start) | (offsets[:, 0] >= end)


def _unmoved(at: torch.Tensor, replaced: list[dict], side: int) -> torch.Tensor:
    """Places [T] in the text with its images' tokens as places in the text before; inside an image its image token's
    first (side 0) or last + 1 (side 1) character."""
    if not replaced:
        return at
    old, new = (torch.tensor([each[name] for each in replaced]) for name in ("span", "new_span"))
    passed = torch.searchsorted(new[:, 1].contiguous(), at.contiguous(), right=True)
    moved = torch.cat([torch.zeros(1, dtype=old.dtype), old[:, 1] - new[:, 1]])[passed]
    following = passed.clamp(max=len(new) - 1)
    inside = (passed < len(new)) & (at > new[following, 0])
    return torch.where(inside, old[following, side], at + moved)


def image_token_ids(processor) -> list[int]:
    """Ids that stand for image patches in `input_ids`; none where a processor does not tell."""
    ids = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    return [i for i in ids if i is not None]
