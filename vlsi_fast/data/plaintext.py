"""A row's text is text: what looks like a special token in it is spelt out, only the chat template's own tokens count.

Every text is rendered between two marks, a character that the row does not hold, so of each rendered character it is
known whether the template or the row wrote it. A special token's string that takes a character from the row gets a
stand-in of the same length before the processor looks for image tokens. The tokenizer then reads the text between two
of the template's tokens in one piece, as it would for a tokenizer that has no such token. Families with other special
tokens so still agree on the answers' tokens. Text without such strings goes through the stock processor as it is.

Special is what the tokenizer itself calls special, and the processor's image, video and audio tokens. Other added
tokens (`<think>`, `<tool_call>`) are words that a text may use.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from jinja2 import TemplateError
from transformers import BatchEncoding

from vlsi_fast.data.skipped import UnusableRow

_PRIVATE = range(0xE000, 0xF900)
"""Characters that have no meaning of their own: marks and stand-ins are taken from those that a row does not hold."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the chat template writes it, image tokens not expanded."""

    text: str
    """Special tokens of the row's own under stand-ins."""
    hidden: dict[str, str] = field(default_factory=dict)
    """Stand-in -> the string that it stands for, of the same length."""
    words: list[tuple[int, int]] | None = None
    """First and last + 1 character of each text of the conversation that is not blank, whitespace around it left out;
    None where the template writes texts otherwise than they are."""

    @property
    def plain(self) -> str:
        """The text as the template wrote it; the same characters at the same places."""
        text = self.text
        for name, token in self.hidden.items():
            text = text.replace(name, token)
        return text

    @property
    def special(self) -> list[str]:
        """The special tokens that the row's own text spells, each once."""
        return list(dict.fromkeys(self.hidden.values()))


def special_tokens(processor) -> dict[str, int]:
    """Strings that would be read as special tokens -> their ids."""
    tokenizer = processor.tokenizer
    added = {str(token): (i, token.special) for i, token in tokenizer.added_tokens_decoder.items()}
    vision = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    return {token: i for token, (i, special) in added.items() if special or token in vision}


def render(processor, messages: list[dict], prompt: bool) -> Rendered:
    """A conversation in the template's words; `prompt`: up to where the next answer starts.

    Args:
        processor: with a chat template and a fast tokenizer.
        messages: chat messages, content in list form.
        prompt: whether the generation prompt follows.

    Raises:
        UnusableRow: cause template, where the template fails; special_token, where the row's own special tokens cannot
            be told from the template's.
    """
    text = apply_template(processor, messages, prompt)
    tokens = _pattern(tuple(special_tokens(processor)))
    texts = [part["text"] for message in messages for part in message["content"] if part.get("text", "").strip()]
    free = _free_characters(text, *texts)
    words = _words(processor, messages, prompt, text, texts, next(free))
    if words is None:
        if found := tokens.search("".join(texts)):
            what = f"the text holds {found[0]}, and the chat template rewrites texts, so it cannot be told from its own"
            raise UnusableRow("special_token", what)
        return Rendered(text)
    return Rendered(*_hide(text, words, tokens, free), words)


def plainly(processor, rendered: list[Rendered]):
    """A processor that reads what stand-ins stand for as text.

    Args:
        processor: the family's.
        rendered: of the texts that it will be called with, in their order.

    Returns:
        The processor itself where nothing is hidden, else a copy for `processor(text=[each.text for each in rendered])`
        without padding. Its tokenizer raises UnusableRow (cause special_token) where plain text still gives one.
    """
    if not any(each.hidden for each in rendered):
        return processor
    made = copy.copy(processor)
    made.tokenizer = _PlainTokenizer(processor, [each.hidden for each in rendered])
    return made


def ends_in_special(text: str, processor) -> int:
    """Where the special tokens begin that a text ends in, white space between them; its length where there are none."""
    at, behind = len(text), list(_pattern(tuple(special_tokens(processor))).finditer(text))
    while behind and not text[behind[-1].end() : at].strip():
        at = behind.pop().start()
    return at


def apply_template(processor, messages: list[dict], prompt: bool) -> str:
    """The stock rendering. Raises UnusableRow (cause template) where the template fails.

    A template that knows thoughts is asked for none: a row's answers have none, and its generation prompt must be what
    stands in front of them.
    """
    options = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        raise UnusableRow("template", f"the chat template fails on this conversation: {error}") from error


def _words(processor, messages, prompt: bool, text: str, texts: list[str], mark: str) -> list[tuple[int, int]] | None:
    """Where the texts stand in `text`, from a rendering with marks around them."""

    def marked(part: dict) -> dict:
        core = part.get("text", "").strip()
        if not core:
            return part
        before, after = part["text"].split(core, 1)  # outside of the marks, for templates that strip
        return {**part, "text": f"{before}{mark}{core}{mark}{after}"}

    turns = [{**message, "content": [marked(part) for part in message["content"]]} for message in messages]
    pieces = apply_template(processor, turns, prompt).split(mark)
    if "".join(pieces) != text or pieces[1::2] != [each.strip() for each in texts]:
        return None
    words, at = [], 0
    for i, piece in enumerate(pieces):
        if i % 2:
            words.append((at, at + len(piece)))
        at += len(piece)
    return words


def _hide(text: str, words: list[tuple[int, int]], tokens: re.Pattern, free: Iterator[str]) -> tuple[str, dict]:
    """The text with a stand-in for every special token that takes a character from `words`, and the stand-ins."""
    pieces, at = [], 0
    for start, end in words:
        pieces += [text[at:start], "\0" * (end - start)]
        at = end
    own = [found.span() for found in tokens.finditer("".join([*pieces, text[at:]]))]
    names: dict[str, str] = {}

    def stand_in(found: re.Match) -> str:
        token = found[0]
        if token not in names:
            names[token] = next(free) * len(token)
        return names[token]

    pieces, at = [], 0
    for start, end in [*own, (len(text), len(text))]:
        pieces += [tokens.sub(stand_in, text[at:start]), text[start:end]]
        at = end
    return "".join(pieces), {name: token for token, name in names.items()}


def _free_characters(*texts: str) -> Iterator[str]:
    for code in _PRIVATE:
        if not any(chr(code) in text for text in texts):
            yield chr(code)
    raise UnusableRow("special_token", "the text holds nearly all private-use characters and special tokens")


@lru_cache(maxsize=32)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class _PlainTokenizer:
    """A tokenizer whose texts hold stand-ins. Everything but calls is the tokenizer's own."""

    def __init__(self, processor, hidden: list[dict[str, str]]):
        self._tokenizer, self._hidden, self._special = processor.tokenizer, hidden, special_tokens(processor)
        self._pattern = _pattern(tuple(self._special))

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "_tokenizer":  # looked up by copy and pickle before it is set
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(
        self,
        text: str | list[str],
        return_offsets_mapping: bool = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        padding: bool = False,
        **options,
    ) -> BatchEncoding:
        """Ids of each text, lists of lists or tensors, and their offsets in the texts as given."""
        if padding:
            raise ValueError("texts with stand-ins are encoded one by one and padded later")
        if add_special_tokens and self._tokenizer.num_special_tokens_to_add():
            raise UnusableRow("special_token", "the tokenizer frames texts itself, so special tokens stay special")
        texts = [text] if isinstance(text, str) else text
        rows = [self._encode(each, hidden) for each, hidden in zip(texts, self._hidden, strict=True)]
        made = {"input_ids": [ids for ids, _ in rows], "attention_mask": [[1] * len(ids) for ids, _ in rows]}
        if return_offsets_mapping:
            made["offset_mapping"] = [offsets for _, offsets in rows]
        return BatchEncoding(made, tensor_type=return_tensors)

    def _encode(self, text: str, hidden: dict[str, str]) -> tuple[list[int], list[tuple[int, int]]]:
        own = list(self._pattern.finditer(text))
        starts = [0, *(found.end() for found in own)]
        pieces = [text[start:end] for start, end in zip(starts, [*(found.start() for found in own), len(text)])]
        for name, token in hidden.items():
            pieces = [piece.replace(name, token) for piece in pieces]
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        encoded = self._tokenizer(pieces, **options)
        ids, offsets = [], []
        for i, start in enumerate(starts):
            if made := set(encoded["input_ids"][i]) & set(self._special.values()):
                token = self._tokenizer.convert_ids_to_tokens(made.pop())
                raise UnusableRow("special_token", f"plain text gives {token} in this tokenizer")
            ids += encoded["input_ids"][i]
            offsets += [(start + a, start + b) for a, b in encoded["offset_mapping"][i]]
            if i < len(own):
                ids.append(self._special[own[i][0]])
                offsets.append(own[i].span())
        return ids, offsets
