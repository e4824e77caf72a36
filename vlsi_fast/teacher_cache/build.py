"""`vlsi-fast teacher build`: run the verbalized teacher over rows, and keep what it says. No student but its head.

The rows come in the order in which stage interact reads them, and in its micro-batches where neither their number nor
`balance_batch` makes others, so that what is kept is what a teacher in the job would have said, to the last bit on the
same machine. Several ranks share them out as in training, in any `teacher.mode`: under ZeRO-3 all make the same
forwards. What is there already is left out, so a call that was interrupted goes on, and one with other rows adds them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlsi_kernels import TeacherTargets, head_statistics

from ..backbones import family_of
from ..config import ConfigError, RunConfig
from ..data.collate import Collator
from ..data.packing import Packer
from ..data.sources import ConcatSource, build_source
from ..lineage import code_commit, rows_used, versions, weights_digest
from ..losses import PairwiseKL
from ..matching import draw_generator
from ..ranks.shard_loading import read_parameter
from ..ranks.sharding import barrier, broadcast_object, gathered_objects, rank, world_size
from ..stages.arguments import training_arguments
from ..stages.batches import StageCollator, to_device
from ..stages.interact import InteractStage
from ..stages.sampling import StepBatches, data_order
from ..terminal import say
from .following import Follow, data_digest
from .forms import DEFAULT, pack_targets, unpack_targets
from .manifest import (
    HEAD,
    NAME,
    TEACHER,
    counts_of,
    head_weight,
    identity_of_cache,
    read_manifest,
    require_same,
    tensor_digest,
    write_manifest,
)
from .rows import KeyedDataset, answers_digest
from .store import CacheReader, ShardWriter, forget_lost, numbers_in, shards_of

SHARD_BYTES = 256 * 2**20
EPOCHS = 4
"""Passes over the data in which --rows looks for rows that it has not seen."""
PROBES = 256
"""Answer tokens on which the error of rounded targets is measured."""


@dataclass
class Chosen:
    """What to build.

    Attributes:
        out: folder of the cache; None: the config's.
        form: targets or hidden.
        numbers: of the targets: float32, float16, bfloat16 or int8.
        layers: of the teacher's target layers; None: all.
        split: train or eval: rows of data.train or data.eval.
        source: only rows of this source, by its name; None: all.
        rows: the first so many of the order; None: those that stage interact reads.
        shard_bytes: of a shard, about.
        progress: show a bar.
        follow: with students that train meanwhile (`ahead.py`); None: all at once.
    """

    out: Path | None = None
    form: str = "targets"
    numbers: str = DEFAULT
    layers: list[int] | None = None
    split: str = "train"
    source: str | None = None
    rows: int | None = None
    shard_bytes: int = SHARD_BYTES
    progress: bool = True
    follow: Follow | None = None


class TeacherStage(InteractStage):
    """Stage interact as far as it concerns the teacher; it trains nothing."""

    def role_names(self) -> list[str]:
        return ["student", "teacher"]

    def open_caches(self) -> list:
        return []

    @property
    def _speakers(self) -> list[str]:
        return ["teacher"] if "teacher" in self.settings.speakers else []

    def prepare(self, layers: list[int] | None) -> None:
        """Read configs and processors, and check that the teacher can be asked.

        Raises:
            ConfigError, LineageError, FileNotFoundError: it cannot; the message names the fix.
        """
        if "teacher" not in self.settings.roles or self.settings.headless:
            what = "interact.headless" if self.settings.headless else "interact.intermediate and interact.last"
            raise ConfigError(f"{what} leaves nothing of the teacher to keep: no cache is of use to this config")
        self.args = training_arguments(self.config, self.name)
        try:
            self.read_models()
        except (ValueError, ImportError) as error:  # of tokenizers and processors: all say what to do
            raise ConfigError(str(error)) from error
        if self.config.preflight:
            self.self_test()
        self.chosen_layers = self.roles["teacher"].layers if self.settings.matches_layers else []
        absent = sorted(set(layers or ()) - set(self.chosen_layers))
        if absent:
            raise ConfigError(
                f"--layers {absent}: the teacher speaks at layers {self.chosen_layers}; name some of those"
            )
        if layers is not None:
            self.chosen_layers = sorted(layers)


def build(config: RunConfig, chosen: Chosen) -> dict[str, Any]:
    """Write what a teacher says to rows, and return the cache's manifest. Collective.

    Raises:
        ConfigError, LineageError, FileNotFoundError: options, models or an earlier stage's results do not fit.
    """
    if chosen.form == "hidden":
        chosen.numbers = config.dtype
    stage = TeacherStage(config)
    stage.prepare(chosen.layers)
    folder = chosen.out or config.cache_dir
    student_head = None
    if chosen.form == "targets":
        student = stage.roles["student"]
        student_head = head_weight(student.folder, student.config, config.dtype)
    manifest = _claim(stage, folder, chosen, student_head)
    if chosen.follow is not None:
        from .ahead import run_ahead

        manifest |= run_ahead(stage, chosen, folder, lambda: Teacher(stage, folder, chosen, student_head))
    else:
        work = _Work(stage, chosen, folder)
        if not work.is_done:
            manifest |= work.do(Teacher(stage, folder, chosen, student_head))
    barrier()
    manifest["counts"] = counts_of(folder)
    if rank() == 0:
        write_manifest(folder, manifest)
    for release in stage.releases:
        release()
    return manifest


def _claim(stage: TeacherStage, folder: Path, chosen: Chosen, student_head: Tensor | None) -> dict[str, Any]:
    """The manifest of a new cache, or of the one there, which must be of the same. Collective."""
    role, config = stage.roles["teacher"], stage.config
    facts = {name: value for name, value in role.facts.items() if name not in ("path", "layers")}
    spoken = stage.settings.matches_layers
    facts["verbalizers"] = weights_digest(role.verbalizer_folder()) if spoken else None
    if not spoken:
        facts["verbalizer"] = None
    identity = identity_of_cache(
        config,
        facts,
        form=chosen.form,
        numbers=chosen.numbers,
        layers=stage.chosen_layers,
        has_last=stage.settings.needs_teacher_last,
        vocab_size=stage.head_options.vocab_size,
        student_head=None if student_head is None else tensor_digest(student_head),
    )
    problem = None
    if rank() == 0:
        try:
            if (folder / NAME).is_file():
                require_same(folder, read_manifest(folder)["identity"], identity, "this call")
            elif folder.is_dir() and any(folder.iterdir()):
                raise ConfigError(f"{folder} is not empty and holds no cache; choose another with --out")
        except ConfigError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise ConfigError(problem)
    manifest = {"identity": identity, "teacher": {"path": str(role.folder)}, "errors": None}
    if (folder / NAME).is_file():
        manifest = read_manifest(folder)
    manifest |= {"versions": versions(), "commit": code_commit()}
    barrier()
    if rank() == 0:
        for name in forget_lost(folder):
            say(f"{folder / name}: gone or cut short; its rows are made again")
        role.config.save_pretrained(folder / TEACHER)
        role.processor.save_pretrained(folder / TEACHER)
        write_manifest(folder, manifest)
    return manifest


# ---- the teacher ----


class Teacher:
    """Runs the teacher on a micro-batch and says what a run with a teacher in the job would compare. Collective."""

    def __init__(self, stage: TeacherStage, folder: Path, chosen: Chosen, student_head: Tensor | None):
        self.stage, self.chosen, self.device = stage, chosen, stage.args.device
        teacher = stage.load_speaking_teacher()
        if stage.args.deepspeed is None:
            teacher.to(self.device)
        self._call = stage.apart(teacher) or teacher
        self.columns = [stage.roles["teacher"].layers.index(k) for k in stage.chosen_layers]
        self.errors: dict[str, float] = {}
        """What rounding costs, by the first micro-batch."""
        self.pairwise = None
        if student_head is not None:
            weight = nn.Parameter(student_head.to(self.device), requires_grad=False)
            self.pairwise = PairwiseKL(weight, teacher.head_weight, stage.head_options)
            self.student_head = weight
        else:
            _write_head(stage, folder / HEAD)

    @torch.no_grad()
    def __call__(self, inputs: dict, index: Tensor) -> Tensor | TeacherTargets:
        """Processor tensors and [N] answer positions -> targets, or [R, N, d_l] hidden states."""
        mixed = self.stage.args.bf16 and self.stage.args.deepspeed is None
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
            layers, last = self._call(inputs, index, True)
            found = [] if layers is None else [layers[self.columns] if len(self.columns) < len(layers) else layers]
            found += [] if last is None else [last[None]]
            states = torch.cat(found) if len(found) > 1 else found[0]
            if self.pairwise is None:
                return states
            (targets,) = self.pairwise.targets([states], self.stage.settings.temperature)
            return targets

    def stored(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What is kept of a micro-batch of `Reading`, all its rows' answer tokens: [N, ..] each, in CPU memory."""
        inputs = to_device(batch["batch"]["teacher"], self.device)
        said = self(inputs["inputs"], inputs["index"])
        if self.chosen.form == "hidden":
            dtype = getattr(torch, self.stage.config.dtype)
            return {"hidden": said.transpose(0, 1).to(dtype).contiguous().cpu()}
        stored = pack_targets(said, self.chosen.numbers)
        if self.chosen.numbers != "float32" and not self.errors:
            self.errors = measured_errors(said, stored, self.student_head, self.stage)
        return {name: value.cpu() for name, value in stored.items()}

    def told_errors(self) -> dict[str, Any]:
        """For the manifest. Collective."""
        errors = gathered_objects(self.errors)[0]
        return {"errors": errors} if errors else {}


def _write_head(stage: TeacherStage, path: Path) -> None:
    """The teacher's head, beside hidden states."""
    if rank() == 0 and not path.is_file():
        from safetensors.torch import save_file

        role = stage.roles["teacher"]
        partial = path.with_suffix(".partial")
        save_file({"head": head_weight(role.folder, role.config, stage.config.dtype).contiguous()}, partial)
        partial.replace(path)
    barrier()


# ---- the rows ----


class _Rounds(torch.utils.data.Sampler):
    """This rank's micro-batches, as lists of (row number, position in the order)."""

    def __init__(self, rounds: list[list[tuple[int, int | None]]]):
        self.rounds = rounds

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.rounds)


class _Placed(torch.utils.data.Dataset):
    """Rows by (number, position), which they keep."""

    def __init__(self, dataset: KeyedDataset):
        self.dataset = dataset

    def __getitem__(self, place: tuple[int, int]) -> dict:
        return self.dataset[place[0]] | {"place": place}


class _Collate:
    """`StageCollator`'s batch of the teacher alone, with what its rows are called in the cache."""

    def __init__(self, collator: Collator):
        self.collator = StageCollator(collator, ("teacher",))

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        labels = [row["teacher"]["labels"] for row in rows]
        return self.collator(rows) | {
            "keys": [row["key"] for row in rows],
            "places": [row["place"] for row in rows],
            "answers": [answers_digest(each) for each in labels],
            "counts": [int((each[:, 1:] != -100).sum()) for each in labels],
            "refused": [line for row in rows for line in row["refused"]],
        }


class Reading:
    """The teacher's rows as micro-batches.

    Args:
        stage: of the teacher.
        split: train or eval.
        roles: models whose side of a row must be usable.
    """

    def __init__(self, stage: TeacherStage, split: str, roles: tuple[str, ...] = ("teacher",)):
        config = stage.config
        self.sources = build_source(getattr(config.data, split), f"data.{split}")
        self.data = data_digest(config, split, self.sources)
        """Digest of what row numbers count in."""
        processors = {name: stage.roles[name].processor for name in roles}
        role = stage.roles["teacher"]
        packers = {"teacher": Packer(role.config)} if stage.packed("teacher") else {}
        collator = Collator({"teacher": role.processor}, always_image=world_size() > 1, packers=packers)
        self._dataset, self._collate = _Placed(KeyedDataset(self.sources, processors, config.data)), _Collate(collator)
        self._workers = config.data.num_workers

    def loader(self, rounds: list[list[tuple[int, int | None]]]) -> DataLoader:
        """Batches of rows given as places, (number, position): the teacher's `batch`, and lists of `keys`, `places`,
        `answers`, `counts` of answer tokens; `refused`: key, cause and detail of rows passed over."""
        options = {"collate_fn": self._collate, "num_workers": self._workers}
        return DataLoader(self._dataset, batch_sampler=_Rounds(rounds), **options)


def rows_in(batch: dict[str, Any], stored: dict[str, Tensor]) -> Iterator[tuple[bytes, bytes, Any, dict[str, Tensor]]]:
    """Key, answers' digest, place and values of each row of a batch of `Reading`, for `ShardWriter.add`."""
    first = 0
    for key, answers, place, count in zip(batch["keys"], batch["answers"], batch["places"], batch["counts"]):
        yield key, answers, place, {name: value[first : first + count].clone() for name, value in stored.items()}
        first += count


class _Work:
    """The rows that are still to do, rank by rank."""

    def __init__(self, stage: TeacherStage, chosen: Chosen, folder: Path):
        self.stage, self.chosen, self.folder = stage, chosen, folder
        self.reading = Reading(stage, chosen.split)
        self.data, settings = self.reading.data, stage.config.stage_training("interact")
        order = _order(stage.config, chosen, self.reading.sources, folder)
        done = broadcast_object(done_rows(folder, self.data) if rank() == 0 else None)
        batches = StepBatches(_Listed(order), settings.per_device_train_batch_size, 1, world_size())
        rounds = list(_all_ranks(batches))
        position, self.rounds = itertools.count(), []
        for one in rounds:
            places = [[(number, next(position)) for number in rows] for rows in one]
            if any(number not in done for rows in one for number in rows):
                self.rounds.append(places[rank()])
        self.total = len(rounds)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left; the same on every rank."""
        return not self.rounds

    def do(self, teacher: Teacher) -> dict[str, Any]:
        """Run the teacher over the rows. Returns `errors`, what rounding costs, for the manifest."""
        from tqdm.auto import tqdm

        known, chosen = CacheReader(self.folder), self.chosen
        writer = ShardWriter(self.folder, chosen.shard_bytes, None, self.data)
        written: set[bytes] = set()
        loader, began = self.reading.loader(self.rounds), self.total - len(self.rounds)
        bar = tqdm(loader, "teacher", self.total, initial=began, disable=rank() != 0 or not chosen.progress)
        for batch in bar:
            for refused in batch["refused"]:
                writer.refuse(*refused)
            for key, answers, place, values in rows_in(batch, teacher.stored(batch)):
                is_new = key not in written and known.find(key) is None
                writer.add(key, answers, place, values if is_new else None)
                written.add(key)
        writer.flush()
        return teacher.told_errors()


class _Listed:
    """An order that is a list."""

    def __init__(self, rows: list[int]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


def _all_ranks(batches: StepBatches) -> Iterator[list[list[int]]]:
    """Rounds of micro-batches, one of each rank."""
    ranks = []
    for number in range(batches.ranks):
        batches.rank = number
        ranks.append(list(batches))
    return zip(*ranks)


def _order(config: RunConfig, chosen: Chosen, sources: ConcatSource, folder: Path) -> list[int]:
    """Row numbers in the order of stage interact, each once; without those of sources that have another cache.

    Raises:
        ConfigError: no source of that name.
    """
    parts = [part.name for part in sources.parts]
    if chosen.source is not None and chosen.source not in parts:
        raise ConfigError(f"--source {chosen.source}: data.{chosen.split} has {', '.join(parts)}")
    training = config.stage_training("interact")
    if chosen.source is not None:
        rows: Iterable[int] = range(len(sources))
    elif chosen.split == "eval":
        count = min(training.max_eval_samples or len(sources), len(sources))
        rows = (i * len(sources) // count for i in range(count))
    else:
        order = data_order(config, sources, rows_used(config.stage_dir("verbalize")))
        per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size()
        read = training.max_steps * per_step
        if training.max_steps == -1:
            read = math.ceil(training.num_train_epochs * len(order))
        if chosen.rows is not None:  # each once, and the order has every row within so many passes
            read = EPOCHS * len(order)
        rows = itertools.islice(dict.fromkeys(order.order.rows(order.start, read)), chosen.rows)
    wanted = parts_of(config, chosen.split, folder)
    if chosen.source is not None:
        wanted = {i for i, name in enumerate(parts) if name == chosen.source}
    return list(dict.fromkeys(number for number in rows if sources.part_of(number) in wanted))


def parts_of(config: RunConfig, split: str, folder: Path) -> set[int]:
    """Numbers of the sources whose rows learn from the cache in this folder."""
    named = [source.teacher and Path(source.teacher) for source in getattr(config.data, split)]
    own = folder if folder in named else None
    return {i for i, name in enumerate(named) if name == own}


def done_rows(folder: Path, data: str) -> set[int]:
    """Numbers of the rows of this data that the cache has for good."""
    found: set[int] = set()
    for name, line in shards_of(folder).items():
        if line["data"] == data and not line.get("temporary"):
            found.update(numbers_in(folder, name))
    return found


# ---- what rounding costs ----


def measured_errors(
    targets: TeacherTargets, stored: dict[str, Tensor], weight: Tensor, stage: TeacherStage
) -> dict[str, float]:
    """Errors of KL and gradient by rounded targets, on the first answer tokens.

    The student's states are not known here. In their place stand states of the size that its final norm gives, drawn
    at random, which is what a student far from the teacher looks like.

    Returns:
        `kl_mean`, `kl_max` (nats, absolute), `gradient` (relative, of all tokens' gradients), `tokens`.
    """
    count = min(PROBES, targets.neg_entropy.shape[1])
    rounded = unpack_targets({n: v[:count] for n, v in stored.items()}, targets.vocab_size, targets.temperature)
    exact = targets._replace(neg_entropy=targets.neg_entropy[:, :count], expectation=targets.expectation[:, :count])
    student = stage.roles["student"]
    norm = read_parameter(student.folder, student.config, lambda m: family_of(m.config).final_norm(m).weight)
    probe = (torch.randn(count, weight.shape[1], generator=draw_generator(0, 0, 0)) * norm.float()).to(weight)
    options = {"vocab_size": targets.vocab_size, "temperature": targets.temperature, "impl": stage.config.impl}
    found = head_statistics(probe, weight, weight, **options)
    difference = rounded.expectation - exact.expectation
    kl = torch.einsum("nd,rnd->rn", probe.float(), difference).abs() / targets.temperature
    gradient = found.expectation.float() - exact.expectation
    relative = difference.norm() / gradient.norm()
    return {
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "gradient": float(relative),
        "tokens": count,
    }
