"""How large rows are as model inputs, told from text and image headers, before anything is decoded.

A row is rendered and tokenized as it will be; the tokens of its images follow from their width and height by the
processor's own rule. What is told so is right but for rows that are replaced when they are read (`VlsiDataset`), texts
that spell special tokens, and turned photographs. It decides which rows stand together, nothing else.

Sizes are kept in one file a processor and set of rows, in the folder of the row tables (`jsonfile.cache_folder`).

    n  rows of all sources
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from vlsi_fast.config_data import DataConfig
from vlsi_fast.data.dataset import VlsiDataset
from vlsi_fast.data.encoding import (
    around_an_answer,
    check_length,
    check_messages,
    ends_bare,
    tokenizer_options,
)
from vlsi_fast.data.images import image_size
from vlsi_fast.data.jsonfile import cache_folder
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.plaintext import apply_template
from vlsi_fast.data.skipped import UnusableRow, row_boundary
from vlsi_fast.data.sources import ConcatSource
from vlsi_fast.data.storage import retried
from vlsi_fast.loading import tokenizer_digest
from vlsi_fast.terminal import say

COLUMNS = ("tokens", "answers", "patches", "pictures")
"""Of a row: tokens, image tokens included; answer tokens; image patches, or where images are cut into tiles the tokens
of these (`planner.shapes.ModelShape.told`); images, or tiles that are seen alone."""
KEPT_FROM_ROWS = 10_000
"""Fewer rows are measured in seconds; their sizes are not kept."""
TRIES = 16
"""Rows looked at in place of one that cannot be used; then it counts as an empty one."""
_VERSION = 1  # of the files
_READ = ("reader", "path", "image_root", "images_under", "images_not_under", "split", "limit", "placeholder")
_READ += ("images_column", "messages_column", "question_column", "answer_column", "options_column")


class RowSizer:
    """Sizes of one model's rows.

    Args:
        processor: the model's, with its pixel bounds set.
        data_config: `max_length` and `max_image_pixels` are read.
    """

    def __init__(self, processor, data_config: DataConfig):
        self.processor, self.data = processor, data_config
        self._before = around_an_answer(processor)[0]

    @row_boundary()
    def __call__(self, sample: Sample, images: list[tuple[int, int]]) -> tuple[int, int, int, int]:
        """`COLUMNS` of a row whose images have these widths and heights.

        Raises:
            UnusableRow: the row cannot be trained on, as far as its words and lengths tell.
        """
        check_messages(sample)
        check_length(sample.messages, self.processor, self.data.max_length)
        text = apply_template(self.processor, sample.messages, prompt=False)
        answers = [
            self._before + part["text"]
            for message in sample.messages
            if message["role"] == "assistant"
            for part in message["content"]
            if "text" in part
        ]
        whole = self._count([_framed(text, self.processor)], **tokenizer_options(self.processor, text))
        # an answer's end-of-turn token is learnt with it, or one behind the last
        bare = sample.messages[-1]["role"] == "assistant" and ends_bare(self.processor)
        learnt = self._count(answers, add_special_tokens=False, split_special_tokens=True)
        learnt, whole = learnt + (1 if bare else len(answers)), whole + bare
        shown = [image_counts(self.processor, size, alone=len(images) == 1) for size in images]
        tokens = whole + sum(count - 1 for count, _, _ in shown)  # the text has one of each image's tokens
        if tokens > self.data.max_length:
            raise UnusableRow("too_long", f"{tokens} tokens, data.max_length is {self.data.max_length}")
        return tokens, learnt, sum(patches for _, patches, _ in shown), sum(pictures for _, _, pictures in shown)

    def _count(self, texts: list[str], **options) -> int:
        return sum(map(len, self.processor.tokenizer(texts, return_attention_mask=False, **options)["input_ids"]))


def _framed(text: str, processor) -> str:
    """A rendering with what the processor writes around each image's tokens (Gemma 3: line breaks, begin and end)."""
    if not hasattr(processor, "full_image_sequence"):
        return text
    token = processor.tokenizer.image_token
    around = processor.full_image_sequence.replace(token * processor.image_seq_length, token)
    return text.replace(processor.image_token, around)


@lru_cache(maxsize=65536)
def image_counts(processor, size: tuple[int, int], alone: bool) -> tuple[int, int, int]:
    """Tokens, patches and pictures of an image.

    Args:
        processor: of any family.
        size: width and height.
        alone: whether it is its row's only image: LLaVA-OneVision cuts only such a one into tiles.
    """
    width, height = size
    grid = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if grid is not None and not alone:
        return processor.num_image_tokens + 1, processor.num_image_tokens, 1  # and a line break
    if not hasattr(processor, "_get_num_multimodal_tokens"):  # SmolVLM
        return _tiles_in_rows(processor, height, width)
    found = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])  # also vLLM asks it
    tokens, patches = found.num_image_tokens[0], found.num_image_patches[0]
    if hasattr(processor, "start_image_token"):  # InternVL calls tiles patches
        return tokens, patches * processor.image_seq_length, patches
    if hasattr(processor, "full_image_sequence"):  # Gemma 3 has one tile
        return tokens, tokens, 1
    if grid is None:
        return tokens, patches, 1
    tiles = 1 + _tiles(height, width, tuple(map(tuple, grid)), _tile_side(processor.image_processor))
    return tokens, tiles * processor.num_image_tokens, tiles


def _tiles_in_rows(processor, height: int, width: int) -> tuple[int, int, int]:
    """Tiles in rows with a name each, and the whole image once more."""
    _, rows, columns = processor.image_processor.get_number_of_image_patches(height, width, {})
    text = processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
    tiles = rows * columns + 1
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]), tiles * processor.image_seq_len, tiles


def _tiles(height: int, width: int, grid: tuple[tuple[int, int], ...], side: int) -> int:
    from transformers.image_processing_utils import select_best_resolution

    high, wide = select_best_resolution((height, width), grid)
    return (high // side) * (wide // side)


def _tile_side(image_processor) -> int:
    size = image_processor.size
    return size["shortest_edge"] if "shortest_edge" in size else min(size["height"], size["width"])


class _Sizes(Dataset):
    """Row number -> [models, 4] int32, `COLUMNS` for each sizer."""

    def __init__(self, sources: ConcatSource, sizers: list[RowSizer], rows: np.ndarray):
        self.sources, self.sizers, self.rows = sources, sizers, rows

    def __len__(self) -> int:
        return len(self.rows)

    @retried
    def __getitem__(self, at: int) -> np.ndarray:
        """Of the row, or of the next usable one, which will be read in its place."""
        for offset in range(min(TRIES, len(self.sources))):
            with contextlib.suppress(UnusableRow):
                return self._of((int(self.rows[at]) + offset) % len(self.sources))
        return np.zeros((len(self.sizers), len(COLUMNS)), np.int32)

    def _of(self, row: int) -> np.ndarray:
        sample, most = self.sources[row], self.sizers[0].data.max_image_pixels
        sizes = {ref: image_size(ref, most) for ref in dict.fromkeys(sample.images)}
        images = [sizes[ref] for ref in sample.images]
        return np.array([sizer(sample, images) for sizer in self.sizers], np.int32)


class SizeTable:
    """Sizes of the rows of a dataset in all of its models, as far as they are known.

    Attributes:
        roles: role -> its number among the models that are told apart; both have one where they share a processor.
        sizes: [models, n, 4] int32, `COLUMNS`; -1 where unknown.
    """

    def __init__(self, dataset: VlsiDataset):
        self.dataset, processors = dataset, dataset.processors
        self.roles = {role: 0 if dataset.shared else i for i, role in enumerate(processors)}
        self._processors = list(processors.values())[: 1 + max(self.roles.values())]
        self.sizes = np.full((len(self._processors), len(dataset), len(COLUMNS)), -1, np.int32)

    def unknown(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that some model's sizes are not known of."""
        return rows[(self.sizes[:, rows, 0] < 0).any(axis=0)]

    def measure(self, rows: np.ndarray, workers: int) -> np.ndarray:
        """[models, len(rows), 4] int32: sizes of these rows, found by so many processes."""
        sizers = [RowSizer(processor, self.dataset.data_config) for processor in self._processors]
        rows_of = _Sizes(self.dataset.sources, sizers, rows)
        loader = DataLoader(rows_of, batch_size=256, num_workers=workers if len(rows) > 256 else 0, collate_fn=np.stack)
        parts = [np.zeros((0, len(sizers), len(COLUMNS)), np.int32), *loader]
        return np.concatenate(parts).transpose(1, 0, 2)

    def load(self) -> None:
        """Take what is kept on disk; what cannot be read counts as unknown."""
        self.sizes = self._kept()

    def save(self) -> None:
        """Keep on disk what is known, with what others have kept since; a notice where that is not possible."""
        if len(self.dataset) < KEPT_FROM_ROWS:
            return
        kept = self._kept()
        kept[self.sizes >= 0] = self.sizes[self.sizes >= 0]
        try:
            for sizes, path in zip(kept, self._files()):
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as out:
                    try:
                        np.save(out, sizes, allow_pickle=False)
                        os.replace(out.name, path)  # whole or not at all, whoever else writes
                    except BaseException:
                        os.unlink(out.name)
                        raise
        except OSError as error:
            say(f"sizes of rows cannot be kept in {cache_folder()} ({error}): the next stage measures its rows again")

    def _kept(self) -> np.ndarray:
        kept = np.full_like(self.sizes, -1)
        if len(self.dataset) < KEPT_FROM_ROWS:
            return kept
        for own, path in zip(kept, self._files()):
            with contextlib.suppress(OSError, ValueError, EOFError):
                found = np.load(path, allow_pickle=False)
                if found.shape == own.shape and found.dtype == own.dtype:
                    own[:] = found
        return kept

    def _files(self) -> Iterator[Path]:
        data = _data_facts(self.dataset)
        for processor in self._processors:
            key = json.dumps([_VERSION, data, _processor_facts(processor)], sort_keys=True, default=str)
            yield cache_folder() / "sizes" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def _data_facts(dataset: VlsiDataset) -> list:
    """What makes rows the same rows: how they are read, and their files' sizes and times."""
    config = dataset.data_config
    facts: list = [config.max_length, config.max_image_pixels, dataset.sources.sizes]
    for source in config.train:
        files = sorted(
            file for path in source.paths for found in glob.glob(path, recursive=True) for file in _in(found)
        )
        stats = [(os.path.realpath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
        facts.append([source.model_dump(include=set(_READ)), stats])
    return facts


def _in(path: str) -> list[str]:
    return [path] if os.path.isfile(path) else [os.path.join(top, n) for top, _, names in os.walk(path) for n in names]


def _processor_facts(processor) -> list:
    template = processor.chat_template or processor.tokenizer.chat_template
    return [processor.to_dict(), processor.image_processor.to_dict(), tokenizer_digest(processor.tokenizer), template]
