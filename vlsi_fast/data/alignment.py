"""Which answer token of one tokenizer and which of another stand at the same place of the answer.

A teacher that speaks through the student's head predicts the student's tokens, whatever its own tokenizer makes of the
words. Its state in front of one of its own tokens has said some bytes of the answer. It belongs to the student's token
in front of which the student has said the same bytes.

- One token of the teacher over several of the student's: the first of them belongs to it. The teacher has no state of
  its own in front of the others, which stay without a pair.
- One token of the student over several of the teacher's: the first of those belongs to it.
- What ends a turn belongs together, whatever it is called.
- What one template puts in front of the words and the other does not, such as white space, counts for nothing. Of
  several tokens that start at one byte (a lone space in front of the words) the last one counts.

So the pairs are one to one, and both sides rise. A tokenizer's offsets count characters, and a normaliser may shift
them, so a token's start is known from what its tokens say: their bytes, end to end, are those of the text up to there.
Behind a stretch of which that is not true (the tokenizer's normaliser changed it, or it has no tokens for it), starts
are known again from the first character that the offsets name and the normaliser confirms. Tokens inside such a
stretch stay without a pair.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import LongTensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vlsi_fast.data.plaintext import ends_in_special

if TYPE_CHECKING:
    from vlsi_fast.data.encoding import Tokens

END = 1 << 62
"""Place of what ends a turn: behind all words."""
_TEXT_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
"""Decoders of tokenizers whose tokens are stretches of the text."""
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Answer:
    """One assistant turn as one tokenizer reads it. Its text is `before`, `words`, `after` and `end`, end to end."""

    before: bytes
    """What the template puts in front of the words, and the white space that they begin with."""
    words: bytes
    """The answer's own, without white space around them."""
    after: bytes
    """White space behind the words."""
    end: bytes
    """What ends the turn; empty where the template has nothing for it."""
    starts: tuple[int | None, ...]
    """For each answer token the byte of the text at which it starts; None where that is not known."""


class Pieces:
    """What each token of a tokenizer says, as bytes. `Pieces.of(tokenizer)` makes it once for each tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
    """

    _made: WeakKeyDictionary = WeakKeyDictionary()

    def __init__(self, tokenizer):
        backend = tokenizer.backend_tokenizer
        steps = _steps(backend.decoder)
        kinds = {step["type"] for step in steps}
        self._is_text = bool(kinds) and kinds <= _TEXT_DECODERS
        self._bytes = {char: byte for byte, char in bytes_to_unicode().items()} if "ByteLevel" in kinds else None
        self._falls_back = "ByteFallback" in kinds
        self._space = next((mark for step in steps if (mark := _space_mark(step))), None)
        self._added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self._unknown, self._name = tokenizer.unk_token_id, tokenizer.convert_ids_to_tokens
        self._normalizer = backend.normalizer

    @classmethod
    def of(cls, tokenizer) -> Pieces:
        """Those of a tokenizer."""
        if tokenizer not in cls._made:
            cls._made[tokenizer] = cls(tokenizer)
        return cls._made[tokenizer]

    def __call__(self, token_id: int) -> bytes | None:
        """Bytes of a token; None for the unknown token, and where the tokenizer's tokens are no stretches of text."""
        if token_id == self._unknown:
            return None
        if token_id in self._added:
            return self._added[token_id].encode()
        name = self._name(token_id)
        if name is None or not self._is_text:
            return None
        if self._bytes is not None:
            found = [self._bytes.get(char) for char in name]
            return None if None in found else bytes(found)
        if self.is_fallback(token_id):
            return bytes([int(_FALLBACK.fullmatch(name)[1], 16)])
        return (name.replace(self._space, " ") if self._space else name).encode()

    def is_fallback(self, token_id: int) -> bool:
        """Whether a token stands for one byte of characters that the vocabulary does not have."""
        return self._falls_back and _FALLBACK.fullmatch(self._name(token_id) or "") is not None

    def normalise(self, text: str) -> bytes:
        """What the tokenizer's normaliser makes of a text, in the bytes of its tokens."""
        text = text if self._normalizer is None else self._normalizer.normalize_str(text)
        return (text.replace(self._space, " ") if self._space else text).encode()


def _steps(decoder) -> list[dict]:
    """A decoder's parts, as the tokenizers library writes them."""
    if decoder is None:
        return []
    told = json.loads(decoder.__getstate__())
    return told["decoders"] if told["type"] == "Sequence" else [told]


def _space_mark(step: dict) -> str | None:
    """The character that stands for a space in tokens, if this part of a decoder puts the space back."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    return step["pattern"].get("String") if step["type"] == "Replace" and step["content"] == " " else None


def answers_of(row: Tokens, processor) -> list[Answer]:
    """Every answer of a row, and where its learnt tokens start.

    Args:
        row: the conversation as tokens.
        processor: whose it is.
    """
    pieces, text = Pieces.of(processor.tokenizer), row.rendered.plain
    ids, offsets, found = row.ids.tolist(), row.offsets.tolist(), []
    covered = list(accumulate((end for _, end in offsets), max, initial=0))
    for number, (start, stop) in enumerate(row.spans):
        learnt = (row.learnt & (row.answer == number)).nonzero()[:, 0].tolist()
        own = range(learnt[0], learnt[-1] + 1) if learnt else range(0)
        places = [(max(offsets[i][0] - start, 0), offsets[i][1] - start) for i in own]
        reached = max(covered[own.start] - start, 0)
        said = [pieces(ids[i]) for i in own]
        starts = dict(zip(own, token_starts(text[start:stop], places, said, pieces.normalise, reached)))
        tokens = [(starts[i], offsets[i], pieces(ids[i])) for i in learnt]
        found.append(_answer(row, start, stop, tokens, processor))
    return found


def _answer(
    row: Tokens, start: int, stop: int, tokens: list[tuple[int | None, list[int], bytes | None]], processor
) -> Answer:
    """The answer at these characters; `tokens`: of each the byte of it at which it starts, offsets, and bytes."""
    text, words = row.rendered.plain, row.rendered.words or []
    if own := words[bisect_left(words, (start,)) : bisect_left(words, (stop,))]:
        first, last = own[0][0], own[-1][1]
    else:  # the template rewrites texts: what ends the turn is then what special tokens stand last
        first = stop - len(text[start:stop].lstrip())
        last = start + len(text[start : start + ends_in_special(text[start:stop], processor)].rstrip())
    end = stop - len(text[last:stop].lstrip())
    bounds = ((start, first), (first, last), (last, end), (end, stop))
    before, words, after, ending = (text[a:b].encode() for a, b in bounds)
    behind = len(before) + len(words)
    ends = behind + len(after)
    starts = []
    for at, (char, upto), piece in tokens:
        if at is None and char == end and piece and ending.startswith(piece):  # the end is known, whatever is in front
            at = ends
        elif at is not None and behind <= at < ends and upto > end:  # it takes in the white space in front of the end
            at = ends
        starts.append(at)
    return Answer(before, words, after, ending, tuple(starts))


def token_starts(
    text: str,
    offsets: Sequence[tuple[int, int]],
    pieces: Sequence[bytes | None],
    normalise: Callable[[str], bytes] = str.encode,
    reached: int = 0,
) -> list[int | None]:
    """The byte of a text at which each of its tokens starts.

    Args:
        text: the text that the tokens stand in.
        offsets: first and last + 1 character in `text` of n successive tokens, as the tokenizer tells them.
        pieces: n tokens' bytes, None where they are not known.
        normalise: what the tokenizer makes of a text before it cuts it into tokens.
        reached: characters of `text` that tokens in front of these cover.

    Returns:
        n bytes, counted in UTF-8, rising; None where it is not known.
    """
    data = text.encode()
    byte_at = [0, *accumulate(len(char.encode()) for char in text)]
    char_at = {byte: char for char, byte in enumerate(byte_at)}
    found: list[int | None] = []
    at, known = None, None  # byte at which the next token starts; the last token that starts at a known character
    for i, ((start, end), piece) in enumerate(zip(offsets, pieces, strict=True)):
        if at is None and start >= reached and _is_start(text, start, known, pieces[:i], normalise):
            at = byte_at[start]
        found.append(at)
        if at in char_at:
            known = (i, char_at[at])
        reached = max(reached, end)
        if at is None:
            continue
        in_front = piece is not None and piece[:1] == b" " and data.startswith(piece[1:], at)
        if in_front and piece == b" ":  # alone, it shares a character with the next token
            in_front = any(following <= start for following, _ in offsets[i + 1 : i + 2])
        if piece is not None and data.startswith(piece, at):
            at += len(piece)
        elif in_front:  # a space that the tokenizer puts in front of the text
            at += len(piece) - 1
        elif start < end:  # else it stands for nothing of the text
            at = None
    return found


def _is_start(
    text: str,
    start: int,
    known: tuple[int, int] | None,
    pieces: Sequence[bytes | None],
    normalise: Callable[[str], bytes],
) -> bool:
    """Whether tokens from a known one on say the text up to this character and no more; `pieces`: all up to there."""
    if not pieces:
        return True
    said = () if known is None else pieces[known[0] :]
    if known is None or None in said:  # only the offsets tell, and a normaliser may reorder combining characters
        return not unicodedata.combining(text[start : start + 1] or " ")
    return b"".join(said).lstrip(b" ") == normalise(text[known[1] : start]).lstrip(b" ")


def pair_tokens(student: Answer, teacher: Answer) -> list[tuple[int, int]]:
    """Tokens of student and teacher that belong together.

    Args:
        student, teacher: the same turn, with the same words.

    Returns:
        Numbers of the student's and the teacher's token among those of the turn, rising in both.

    Raises:
        ValueError: the words differ.
    """
    if student.words != teacher.words:
        raise ValueError(f"the words differ: {student.words!r} and {teacher.words!r}")
    ours, theirs = _places(student, teacher), _places(teacher, student)
    return [(ours[place], theirs[place]) for place in sorted(ours.keys() & theirs.keys())]


def _places(answer: Answer, other: Answer) -> dict[int, int]:
    """Place in the words -> the token that starts there; of several the last. Where texts differ only their ends."""
    before = len(os.path.commonprefix([answer.before[::-1], other.before[::-1]]))
    after = len(os.path.commonprefix([answer.after, other.after]))
    first = len(answer.before)
    last = first + len(answer.words)
    end = last + len(answer.after)
    places = {}
    for token, start in enumerate(answer.starts):
        if start is None:
            continue
        if start >= end:
            if start == end or answer.end == other.end:
                places[END + start - end] = token
        elif start <= last + after:
            places[max(start - first, -before)] = token
    return places


def common_tokens(student_tokenizer, teacher_tokenizer, ends: tuple[int, int] | None = None) -> LongTensor:
    """Tokens that stand for the same bytes in two vocabularies, and what ends a turn in both.

    Special tokens are left out but for the ends of turn, and so are bytes that several tokens of one vocabulary stand
    for; a byte fallback that has a token of its own beside it does not count.

    Args:
        student_tokenizer, teacher_tokenizer: fast Hugging Face tokenizers.
        ends: what ends a turn in each (`encoding.end_of_turn`); None: their `eos_token`.

    Returns:
        [2, K] int64: ids of the student's and of the teacher's tokens, the student's rising.

    Raises:
        ValueError: a tokenizer has no `eos_token`.
    """
    ends = ends or (student_tokenizer.eos_token_id, teacher_tokenizer.eos_token_id)
    for whose, end in zip(("student", "teacher"), ends):
        if end is None:
            raise ValueError(f"the {whose}'s tokenizer has no eos_token; set it to what ends a turn and save it again")
    ours, theirs = _ordinary(student_tokenizer), _ordinary(teacher_tokenizer)
    pairs = {(ours[said], theirs[said]) for said in ours.keys() & theirs.keys()} | {ends}
    return torch.tensor(sorted(pairs), dtype=torch.int64).T.contiguous()


def _ordinary(tokenizer) -> dict[bytes, int]:
    """Bytes -> the one ordinary token that stands for them."""
    pieces, found = Pieces.of(tokenizer), defaultdict(list)
    left_out = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    for token_id in set(tokenizer.get_vocab().values()) - left_out:
        if said := pieces(token_id):
            found[said].append(token_id)
    own = {said: [i for i in ids if not pieces.is_fallback(i)] or ids for said, ids in found.items()}
    return {said: ids[0] for said, ids in own.items() if len(ids) == 1}
