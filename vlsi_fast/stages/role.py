"""One of the two models of a stage before its weights are loaded, and what must agree with other stages."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from ..backbones import family_of, require_dense
from ..config import QUANTIZED, RunConfig
from ..data.encoding import configure_image_bounds
from ..data.processors import load_processor
from ..lineage import LineageError, checkpoint_digest, require_equal
from ..loading import load_model_config, needed_depth, resolve_folder, target_layers, tokenizer_digest
from ..verbalizer import Verbalizers, VerbalizerSpec, read_spec


class Role:
    """One of the two models, `student` or `teacher`, before its weights are loaded."""

    def __init__(self, name: str, config: RunConfig):
        self.name, self.run, self.settings = name, config, getattr(config, name)
        self.folder: Path = resolve_folder(self.settings.path, f"{name}.path")
        self.config = load_model_config(self.settings, name)
        family = family_of(self.config)
        if name == "student" and config.sft.method == "full" and "sft" in config.stages:  # not only when sft begins
            require_dense(family, "sft.method")
        if family.sparse_block is not None and config.verbalizer.architecture.startswith("decoder"):
            family.new_decoder_layer(self.config, 0)  # says why there is none
        self.layers = target_layers(self.settings, self.config, name, config, self.folder)
        self.processor = load_processor(self.folder)
        configure_image_bounds(self.processor, self.settings.min_pixels, self.settings.max_pixels, name)

    def spec(self, output_size: int | None = None) -> VerbalizerSpec:
        """Verbalizers that this run's config asks for; translating ones are of the last layer, too."""
        layers, settings, student = self.layers, self.run.verbalizer, self.speaks_as
        if student is not None:
            layers = sorted({*layers, self.config.get_text_config().num_hidden_layers})
            output_size = student.config.get_text_config().hidden_size
        return VerbalizerSpec.of(self.config, layers, settings, output_size, self.facts, student is not None)

    @property
    def speaks_as(self) -> Role | None:
        """The student, where this is a teacher whose verbalizers translate."""
        return self._student if self.name == "teacher" and self.run.verbalizer.translates else None

    @cached_property
    def _student(self) -> Role:
        return Role("student", self.run)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a later stage must agree with."""
        return {
            "path": str(self.folder),
            "checkpoint": checkpoint_digest(self.folder),
            "tokenizer": tokenizer_digest(self.processor.tokenizer),
            "layers": self.layers,
            "verbalizer": self.run.verbalizer.recorded,
        } | self._own_facts

    @property
    def _own_facts(self) -> dict[str, Any]:
        if self.name != "teacher":
            return {}
        student = self.speaks_as
        heard = {} if student is None else {"student": {n: student.facts[n] for n in ("checkpoint", "tokenizer")}}
        return {"quantization": self.quantization} | heard

    @property
    def quantization(self) -> str | None:
        """int8 or nf4: they change what the teacher says. Other modes are mere placement, and no part of the facts."""
        return self.settings.mode if self.settings.mode in QUANTIZED else None

    @property
    def depth(self) -> int:
        """Decoder layers that the target layers need, where nothing deeper is asked for."""
        return needed_depth(self.config, self.layers)

    def verbalizer_folder(self) -> Path:
        """Where trained verbalizers of this model are."""
        return Path(self.settings.verbalizers or self.run.stage_dir("verbalize") / self.name)

    def require_verbalizers(self) -> None:
        """Raises LineageError where there are none, or they were made for another model, layers or architecture."""
        folder = self.verbalizer_folder()
        try:
            found = read_spec(folder)
        except FileNotFoundError:
            raise LineageError(f"{folder} holds no verbalizers; run --stage verbalize first") from None
        require_equal(folder, "verbalize", {self.name: found.made_for}, {self.name: self.facts})

    def trained_verbalizers(self) -> Verbalizers:
        """Load them, frozen."""
        return Verbalizers.from_pretrained(self.verbalizer_folder(), self.run.impl).requires_grad_(False)
