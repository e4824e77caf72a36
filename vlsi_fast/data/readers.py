"""One reader per format of data. Each opens a source once and parses a row only when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlsi_fast.config_mix import split_sample
from vlsi_fast.data.messages import Sample, from_llava, from_messages, from_question
from vlsi_fast.data.skipped import printable
from vlsi_fast.data.tables import HfTable, JsonTable, import_package

if TYPE_CHECKING:
    from vlsi_fast.config_data import SourceConfig


ANSWERED_BY = "answered_by"
"""Column of what wrote a row's answers; absent or empty where people did."""


class Reader:
    """One opened source: its first `limit` rows, or N of them for `path#N`, read one at a time.

    Attributes:
        name: the source in row ids.
        image_root: absolute folder that image paths start from.
        rows: rows there are, before `#N` and the limit.
    """

    name: str
    image_root: str
    rows: int
    _table: JsonTable | HfTable | None = None

    def __init__(self, config: SourceConfig, name: str, image_root: str, rows: int, field: str):
        """`name`, `image_root`, `rows`: what the opened source has."""
        self.name, self.image_root, self.rows = config.name or name, image_root, rows
        self._limit, self._sample, self._type = config.limit, None, config.type_column
        self._answered = config.answered
        if isinstance(config.path, str):
            self._sample = split_sample(config.path)[1]
        if self._sample is not None and self._sample > rows:
            raise ValueError(
                f"{field}.path: #{self._sample} asks for more rows than the {rows} there are; lower the number, or "
                "remove it and give the source a weight"
            )

    def __len__(self) -> int:
        if self._sample is not None:
            return self._sample
        return self.rows if self._limit is None else min(self._limit, self.rows)

    def number(self, row: int) -> int:
        """Row `row` of this reader, as a number among all the rows of the source."""
        return row if self._sample is None else sampled_row(row, self.rows, self._sample)

    def read(self, row: int, sample_id: str) -> Sample:
        """Row `row` as a sample.

        Raises:
            UnusableRow: cause bad_row, where the row is malformed.
        """
        raise NotImplementedError

    def where(self, row: int) -> dict[str, Any]:
        """`file` and, where it is known, `line` of row `row`."""
        return self._table.where(self.number(row))

    def answered_rows(self) -> int:
        """Rows whose answers a model wrote."""
        if self._answered is not None:
            return len(self) if self._answered else 0
        table = self._table
        if table is None or not table.mentions(ANSWERED_BY):
            return 0
        return sum(bool(table.value(self.number(row), ANSWERED_BY)) for row in range(len(self)))

    def _with_notes(self, sample: Sample, row: dict) -> Sample:
        """The sample with its type, where the source has a column of types, and with who answered it."""
        if self._type is not None:
            found = row.get(self._type)
            sample.type = "(none)" if found is None else printable(str(found)[:200])
        if self._answered is not False:
            sample.answered_by = row.get(ANSWERED_BY) or (True if self._answered else None)
        return sample


class JsonReader(Reader):
    """LLaVA-style or messages-style rows in JSON lists or JSON-lines files."""

    def __init__(self, config: SourceConfig, field: str):
        self._table = JsonTable(config, field)
        super().__init__(config, self._table.name, self._table.image_root, len(self._table), field)
        self._llava, self._placeholder = config.reader == "llava", config.placeholder

    def read(self, row: int, sample_id: str) -> Sample:
        value = self._table[self.number(row)]
        if self._llava:
            return self._with_notes(from_llava(value, sample_id, self.image_root, self._placeholder), value)
        images = (value.get("images") or value.get("image")) if isinstance(value, dict) else None
        sample = from_messages(value, sample_id, self.image_root, images=images, placeholder=self._placeholder)
        return self._with_notes(sample, value)


class HfReader(Reader):
    """A Hugging Face dataset saved with `save_to_disk`, or parquet files, with a column of messages."""

    def __init__(self, config: SourceConfig, field: str):
        self._table = table = HfTable(config, field)
        super().__init__(config, table.name, table.image_root, len(table), field)
        self._messages = table.require(config.messages_column, "messages_column", field)
        self._images = _images_column(config, table, field)
        self._placeholder = config.placeholder
        if self._type is not None:
            table.require(self._type, "type_column", field)

    def read(self, row: int, sample_id: str) -> Sample:
        value = self._table[self.number(row)]
        images = value[self._images] if self._images is not None else None
        messages = value[self._messages]
        if isinstance(messages, list) and messages and isinstance(messages[0], dict) and "from" in messages[0]:
            llava = {"conversations": messages, "image": images}
            return self._with_notes(from_llava(llava, sample_id, self.image_root, self._placeholder), value)
        sample = from_messages(value, sample_id, self.image_root, self._messages, images, self._placeholder)
        return self._with_notes(sample, value)


class QaReader(Reader):
    """One question and its answer in a row, in columns of their own: JSON files, a saved dataset or parquet."""

    def __init__(self, config: SourceConfig, field: str):
        self._columns = {"question": config.question_column, "answer": config.answer_column}
        self._columns["options"] = config.options_column
        is_json = Path(config.paths[0]).suffix in (".json", ".jsonl")
        self._table = table = (JsonTable if is_json else HfTable)(config, field)
        super().__init__(config, table.name, table.image_root, len(table), field)
        self._images: str | None = config.images_column
        if isinstance(table, HfTable):
            for name, column in {**self._columns, "type": self._type}.items():
                if column is not None:
                    table.require(column, f"{name}_column", field)
            self._images = _images_column(config, table, field)

    def read(self, row: int, sample_id: str) -> Sample:
        value = self._table[self.number(row)]
        images = None
        if isinstance(value, dict):
            images = next((value[name] for name in (self._images, "image") if value.get(name)), None)
        sample = from_question(value, sample_id, self.image_root, images=images, **self._columns)
        return self._with_notes(sample, value)


class EasyVqaReader(Reader):
    """PyPI's easy-vqa: 38,575 training and 9,673 test questions on small images of coloured shapes."""

    def __init__(self, config: SourceConfig, field: str):
        package = import_package("easy_vqa", "easy-vqa", field)
        train = config.split == "train"
        self._columns = (package.get_train_questions if train else package.get_test_questions)()
        self._paths = (package.get_train_image_paths if train else package.get_test_image_paths)()
        self._file, root = package.__file__, str(Path(package.__file__).parent)
        super().__init__(config, f"easy_vqa:{config.split}", root, len(self._columns[0]), field)

    def where(self, row: int) -> dict[str, Any]:
        return {"file": self._file}

    def read(self, row: int, sample_id: str) -> Sample:
        question, answer, image = (column[row] for column in self._columns)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        path = self._paths.get(image, f"{image}.png")
        sample = from_messages({"messages": turns}, sample_id, self.image_root, images=path)
        return self._with_notes(sample, {})


def _images_column(config: SourceConfig, table: HfTable, field: str) -> str | None:
    """The column of images: the one asked for; where none was, `images` or `image` if it is there."""
    if config.images_column != "images":
        return table.require(config.images_column, "images_column", field)
    return next((name for name in ("images", "image") if name in table.columns), None)


def sampled_row(k: int, rows: int, sample: int) -> int:
    """Row number, among `rows`, of the k-th of `sample` rows.

    The file is cut into `sample` stretches of equal length and one row is taken from each, at a place that looks random
    but depends on nothing but these three numbers: every stage, rank and version takes the same rows, in the file's
    order, from all parts of the file, and no list of them is kept.
    """
    low, high = k * rows // sample, (k + 1) * rows // sample
    x = (k + 1) * 0x9E3779B97F4A7C15 % 2**64  # splitmix64: neighbouring k give unrelated numbers
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return low + (x ^ x >> 31) % (high - low)


READERS: dict[str, type[Reader]] = {
    "llava": JsonReader,
    "messages": JsonReader,
    "hf": HfReader,
    "qa": QaReader,
    "easy_vqa": EasyVqaReader,
}
