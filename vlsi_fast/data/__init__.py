"""Data: sources of rows, their encoding for student and teacher, batches, and the log of rows that cannot be used.

Reading order: sources.py, readers.py, messages.py, images.py (rows), tables.py, jsonfile.py (rows
by number), mixing.py (their order); plaintext.py, encoding.py, dataset.py, collate.py, packing.py (model inputs);
skipped.py (rows that cannot be used); processors.py (loading processors); tokens.py (what two tokenizers share);
alignment.py (answers of two tokenizers); build.py, manifest.py, command.py (`vlsi-fast data`); answering/ (a teacher's
answers to pictures without labels).
"""

import importlib

_HOME = {
    "AnswerMismatchError": "dataset",
    "Collator": "collate",
    "NoUsableRowError": "dataset",
    "Sample": "messages",
    "SkipLog": "skipped",
    "SpecialTokenError": "skipped",
    "TooManySkippedRows": "skipped",
    "UnusableRow": "skipped",
    "VlsiDataset": "dataset",
    "build_processor": "processors",
    "build_qwen2_vl_processor": "processors",
    "build_source": "sources",
    "configure_image_bounds": "encoding",
    "encode": "encoding",
    "load_processor": "processors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    # torch and transformers take seconds to import
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
