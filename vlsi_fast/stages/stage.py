"""The course of every stage: check inputs, claim the folder, build, train, save, record."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from vlsi_kernels import resolve_impl

from ..acceleration import apply_liger, attention_name, use_liger, use_packing
from ..backbones import family_of
from ..checkpoints import drop_newer
from ..config import ConfigError, RunConfig
from ..data.collate import Collator
from ..data.dataset import VlsiDataset
from ..data.packing import Packer
from ..data.sources import ConcatSource, build_source
from ..data.tokens import SharedTokens
from ..disk import checkpoint_size, explained_full_disk, result_size
from ..errors import StoppedEarly
from ..hidden_states import Held, Language, VerbalizedBackbone, checkpoint_activations
from ..lineage import (
    code_commit,
    identity_of,
    open_stage,
    versions,
    write_record,
)
from ..loading import (
    load_backbone,
    read_head,
    require_same_tokens,
    shared_rows,
)
from ..locking import claimed
from ..losses import OperatorOptions
from ..planner.checks.command import require_ready
from ..planner.window import fitting_heads
from ..ranks.heads import FrozenHeads
from ..ranks.rescaling import require_same_batch, rows_per_step
from ..ranks.sharding import barrier, gather_state, gathered_objects, rank, unsharded, world_size
from ..ranks.watch import watch
from ..resuming import checkpoint_to_resume
from ..self_test import of_run
from ..self_test import start as self_testing
from ..shrinking.record import carry_record
from ..teacher import load_teacher, resolve_mode, run_apart
from ..teacher_cache.following import dataset_of, followed
from ..teacher_cache.recalling import CachedTeacher, rows_of
from ..terminal import say
from ..translation import final_norm_of
from .arguments import training_arguments
from .balancing import row_costs
from .module import StageModule
from .role import Role
from .sampling import RowCosts
from .throughput import Throughput
from .trainer import StageTrainer


class Stage:
    """Base of the three stages. A subclass says what is read, built and saved; `run` is the course."""

    name: str
    sections: tuple[str, ...] = ()
    """Sections of the config, besides data, seed and the stage's own, whose change makes another run."""

    def __init__(self, config: RunConfig, deadline: float | None = None):
        """`deadline`: `time.monotonic()` after which the stage saves a checkpoint and ends."""
        self.config, self.settings, self.deadline = config, getattr(config, self.name), deadline
        self.folder = config.stage_dir(self.name)
        # known once inputs are checked
        self.args: TrainingArguments | None = None
        self.roles: dict[str, Role] = {}
        self.tokens = SharedTokens({}, None, None)
        """What the tokenizers of both models share."""
        self.teacher_mode: str | None = None
        self.caches: list[CachedTeacher] = []
        """Teachers that are on disk and not among the roles."""
        # known once models are built
        self.adapter: nn.Module | None = None
        """peft's wrapper of the trained model, where LoRA is trained."""
        self.attention: dict[str, str] = {}
        self.padding_free: dict[str, bool] = {}
        self.liger: dict[str, str | None] = {}
        self.releases: list[Callable[[], None]] = []
        self.eval_dataset: VlsiDataset | None = None
        """Rows of `data.eval`, where the stage evaluates."""
        self.sources: ConcatSource | None = None
        """Rows of `data.train`."""

    # ---- what a subclass says ----

    def role_names(self) -> list[str]:
        """The models that this stage runs."""
        raise NotImplementedError

    def open_caches(self) -> list[CachedTeacher]:
        """Teachers on disk that the stage learns from."""
        return []

    def check_predecessors(self) -> None:
        """Raise LineageError where an earlier stage's results are missing or do not fit."""

    def inputs(self) -> dict[str, str]:
        """Digests of what earlier stages made and this one starts from: other inputs are another run."""
        return {}

    def data_start(self) -> int:
        """Rows of the run's data order that earlier stages have used."""
        return 0

    def build(self) -> StageModule:
        """Load models and make the module to train."""
        raise NotImplementedError

    def save(self, module: StageModule) -> None:
        """Write the results into `self.folder`. Collective."""
        raise NotImplementedError

    # ---- the course ----

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Run the stage, or the rest of it.

        Returns:
            The stage's record (`vlsi_stage.json`).

        Raises:
            ConfigError, LineageError, FileNotFoundError: before any weight is loaded.
            NonFiniteLossError, TooManySkippedRows, DiskFullError: while training.
            StoppedEarly: not all steps were made; a checkpoint is saved.
        """
        self.args = training_arguments(self.config, self.name)  # first: starts the ranks, and loading under ZeRO-3
        watch.place = f"stage {self.name}, before its first step"
        watch.begin()
        try:
            resolve_impl(self.config.impl, self.args.device)
            use_liger(self.config.liger, self.args.device)  # raises where it is asked for and cannot run
            dataset, collator = self._check_inputs()
        except (ValueError, ImportError) as error:  # of tokenizers, processors, readers: all say what to do
            raise ConfigError(str(error)) from error
        record = self._record() | {"sources": [[part.name, len(part)] for part in dataset.sources.parts]}
        require_same_batch(self.folder, self.name, self.config.stage_training(self.name))
        with claimed(self.folder):
            found = open_stage(self.folder, record, resume)
            if found is not None and found["state"] == "finished":
                return found
            checkpoint = checkpoint_to_resume(self.folder, found) if found is not None else None
            if self.config.preflight:
                require_ready(self.config, self.name, self.roles, world_size())
                tested = self.self_test()
                if tested is not None:
                    record["self_test"] = tested
                    collator = self._collator() if tested["switched_off"] else collator
            barrier()  # every rank has looked before rank 0 writes
            if rank() == 0:
                drop_newer(self.folder, checkpoint)
                write_record(self.folder, record)
            return self._train(dataset, collator, record, checkpoint)

    def _train(self, dataset: VlsiDataset, collator: Collator, record: dict[str, Any], checkpoint: str | None):
        """Build, train and save. Returns the finished record."""
        start, costs = record["identity"]["data_start"], None
        if self.config.stage_training(self.name).balance_batch:
            configs = {name: role.config for name, role in self.roles.items()}
            costs = row_costs(self.config, self.name, dataset, start, configs, self.padding_free)
        trainer = self.make_trainer(dataset, collator, start, costs)
        module = trainer.module
        size = partial(checkpoint_size, module)
        with explained_full_disk(self.folder, f"a checkpoint of stage {self.name}", size), followed(trainer):
            result = trainer.train(resume_from_checkpoint=checkpoint)
        made, wanted = result.global_step, trainer.state.max_steps
        if made < wanted and not trainer.is_over():
            why = trainer.leaving.reason or "the Trainer ended"
            _release(trainer, self.releases)
            raise StoppedEarly(
                f"stopped in stage {self.name} after optimizer step {made} of {wanted}, since {why}; continue from the "
                "last checkpoint with --resume"
            )
        if trainer.keeps_best:
            trainer.load_best()
        record["summary"] = {
            "seconds": trainer.totals["step_seconds"],
            "data_wait_share": trainer.wait_seconds / max(trainer.totals["step_seconds"], 1e-9),
            "optimizer_steps": result.global_step,
            "rows": trainer.totals["rows"],
            "answer_tokens": trainer.totals["answer_tokens"],
            "answered_rows": trainer.totals["answered_rows"],
            "answered_tokens": trainer.totals["answered_tokens"],
            "unaligned_tokens": trainer.totals["unaligned_tokens"],
            "skipped_rows": trainer.skip_log.summary(),
            "device": str(self.args.device),
            "attention": self.attention,
            "padding_free": self.padding_free,
            "liger": self.liger,
            "teacher_window": module.window,
            "persist_heads": module.frozen_heads.keep,
            **trainer.summary(),
        }
        if rank() == 0 and trainer.skip_log.total():
            say(f"stage {self.name}: {trainer.skip_log.total()}")
        watch.place = f"stage {self.name}, writing its results"
        with explained_full_disk(self.folder, f"the result of stage {self.name}", partial(result_size, module)):
            self.save(module)
        barrier()
        record["state"] = "finished"
        if rank() == 0:
            write_record(self.folder, record)
        _release(trainer, self.releases)
        return record

    def make_trainer(
        self, dataset: VlsiDataset, collator: Collator, data_start: int = 0, costs: RowCosts | None = None
    ) -> StageTrainer:
        """Build the module, and what trains it."""
        configs = {name: role.config for name, role in self.roles.items()}
        set_seed(self.config.seed)
        module = self.build()
        if self.args.deepspeed is None:
            _keep_master_weights(module)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        throughput = Throughput(self.config, self.name, configs, world_size(), self.args.device)
        return StageTrainer(
            module,
            self.args,
            self.config,
            self.name,
            dataset,
            collator,
            data_start,
            self.deadline,
            costs,
            throughput,
            self.eval_dataset,
        )

    def _check_inputs(self) -> tuple[VlsiDataset, Collator]:
        """Open models' configs, tokenizers and data, and compare them with each other and with earlier stages."""
        self.read_models()
        processors = {name: role.processor for name, role in self.roles.items()}
        translates = self.config.verbalizer.translates
        taught = rows_of(self.caches, self.config.data.train, follow=True)
        self.sources = build_source(self.config.data.train)
        dataset = dataset_of(self.sources, processors, self.config.data, taught, translates)
        if self.config.stage_training(self.name).eval_steps is not None:
            rows, taught = build_source(self.config.data.eval, "data.eval"), rows_of(self.caches, self.config.data.eval)
            self.eval_dataset = VlsiDataset(rows, processors, self.config.data, taught, translates)
        return dataset, self._collator()

    def read_models(self) -> None:
        """Configs and processors, compared with each other and with earlier stages; no weights.

        Raises:
            ConfigError, LineageError, FileNotFoundError: they do not fit.
            ValueError, ImportError: of tokenizers and processors; all say what to do.
        """
        self.roles = {name: Role(name, self.config) for name in self.role_names()}
        self.caches = self.open_caches()
        translates = self.config.verbalizer.translates
        for teacher in [*self.caches, self.roles.get("teacher")]:
            if translates and isinstance(teacher, CachedTeacher):
                teacher.require_student(self.roles["student"].folder, self.roles["student"].config, self.shared_rows)
            elif "student" in self.roles and teacher is not None and not translates:
                self._compare_tokens(self.roles["student"], teacher)
        if "teacher" in self.roles:
            self.teacher_mode = resolve_mode(self.config.teacher.mode, self.args.device)
        self.check_predecessors()

    def _compare_tokens(self, student: Role, teacher: Role | CachedTeacher) -> None:
        tokenizers = (student.processor.tokenizer, teacher.processor.tokenizer)
        whose = str(teacher.folder) if isinstance(teacher, CachedTeacher) else teacher.settings.path
        tokens = require_same_tokens(*tokenizers, student.settings.path, whose)
        if self.tokens.limit is None or (tokens.limit is not None and tokens.limit < self.tokens.limit):
            self.tokens = tokens
        if isinstance(teacher, CachedTeacher):
            rows = [model.config.get_text_config().vocab_size for model in (student, teacher)]
            teacher.require_student(student.folder, student.config, shared_rows(rows, tokens))

    def _collator(self) -> Collator:
        processors = {name: role.processor for name, role in self.roles.items()}
        packers = {name: Packer(role.config) for name, role in self.roles.items() if self.packed(name)}
        return Collator(processors, always_image=world_size() > 1, packers=packers)

    def self_test(self) -> dict[str, Any] | None:
        """Compare the fast parts that the stage will use with plain PyTorch, and go on without those that disagree.

        Returns:
            What the record keeps of it; None on the CPU, where no part needs it.
        """
        if not self_testing.is_needed(self.args.device):
            return None
        liger = use_liger(self.config.liger, self.args.device)
        probes = of_run.probes_of(
            self.config,
            self.name,
            {name: role.config for name, role in self.roles.items()},
            device=self.args.device,
            attention={name: self._attention(name) for name in self.roles},
            liger=[name for name in self.roles if liger and self._runs_as_it_is(name)],
            widened=self.args.deepspeed is None,
        )
        self.config, found = self_testing.start(self.config, probes, self.args.device)
        for name, role in self.roles.items():
            role.run, role.settings = self.config, getattr(self.config, name)
        return found

    def _runs_as_it_is(self, name: str) -> bool:
        """Whether a role's modules keep their own forwards; what offloads or quantises replaces them."""
        return name == "student" or self.teacher_mode in ("zero3", "replicated")

    def _attention(self, name: str) -> str:
        role, padding_free = self.roles[name], self.config.data.padding_free
        return attention_name(
            role.settings.attn_implementation, self.config.dtype, self.args.device, padding_free, role.config
        )

    def packed(self, name: str) -> bool:
        """Whether a role's rows are packed; says what a user would not expect of it."""
        attention, asked = self._attention(name), self.config.data.padding_free
        packed = self.padding_free[name] = use_packing(asked, attention, self.roles[name].config)
        notices = []
        if packed and not attention.startswith("flash"):
            notices.append(
                f"data.padding_free with {attention}: the {name}'s attention mask has the square of a micro-batch's "
                "tokens; flash-attention needs none"
            )
        for notice in notices if rank() == 0 else ():
            say(notice)
        return packed

    def _record(self) -> dict[str, Any]:
        facts = {name: role.facts for name, role in self.roles.items()}
        if self.caches:
            facts["teacher"] = self.caches[0].facts
        identity = identity_of(
            self.config,
            self.name,
            self.sections,
            facts,
            rows_per_step=rows_per_step(self.config.stage_training(self.name), world_size()),
            inputs=self.inputs(),
            data_start=self.data_start(),
        )
        return {
            "stage": self.name,
            "state": "running",
            "facts": facts,
            "identity": identity,
            "world_size": world_size(),
            "config": self.config.model_dump(),
            "tokens": {"first_differing_id": self.tokens.limit, "differing": self.tokens.differing},
            "versions": versions(),
            "commit": code_commit(),
        }

    # ---- parts that stages share ----

    @property
    def head_options(self) -> OperatorOptions:
        """Heads are cut to the rows that mean the same in all models of the stage; further rows are padding, or special
        tokens that only one of two families has."""
        return OperatorOptions(self.shared_rows, self.config.impl, FrozenHeads(self._persists_heads()))

    @property
    def shared_rows(self) -> int:
        """Rows of the heads that take part: of the student's alone, where the teacher's layers speak through it."""
        models = [*self.roles.values(), *self.caches]
        if self.config.verbalizer.translates and "student" in self.roles:
            models = [self.roles["student"]]
        return shared_rows([model.config.get_text_config().vocab_size for model in models], self.tokens)

    def _persists_heads(self) -> bool:
        """`training.persist_heads`, auto resolved."""
        wanted = self.config.stage_training(self.name).persist_heads
        if wanted != "auto" or self.args.device.type != "cuda":
            return wanted is True
        memory = torch.cuda.get_device_properties(self.args.device).total_memory
        configs = {name: role.config for name, role in self.roles.items()}
        return min(gathered_objects(fitting_heads(self.config, self.name, configs, world_size(), memory)))

    def load_model(self, name: str, folder: Path | None = None, depth: int | None = None) -> nn.Module | Held:
        """A role's stock model, frozen; from `folder` where an earlier stage made it; its first `depth` layers only.

        The teacher is placed as `teacher.mode` says, and may be held outside the module tree.
        """
        role = self.roles[name]
        attention = self.attention[name] = self._attention(name)
        options = (self.config.dtype, attention, depth)
        if name == "student":
            model = load_backbone(folder or role.folder, *options)
        else:
            own_output = self.name == "verbalize" and self.settings.needs_last
            has_head = own_output or not self.config.verbalizer.translates
            model = load_teacher(role.folder, self.teacher_mode, *options, self.args, has_head)
        if isinstance(model, Held):
            self.releases.append(model.release)
        if self._runs_as_it_is(name) and use_liger(self.config.liger, self.args.device):
            stock = model.model if isinstance(model, Held) else model
            self.liger[name] = apply_liger(stock, required=self.config.liger is True)
        return model

    def student_language(self, head: torch.Tensor | None = None) -> Language:
        """What a teacher's translating verbalizers speak through: the student's final norm and head.

        Args:
            head: of the student where it is in the job; None: it is read from its checkpoint, whole.
        """
        role, dtype = self.roles["student"], self.config.dtype
        norm = final_norm_of(role.folder, role.config, getattr(torch, dtype), self.args.device)
        if head is None:
            head = read_head(role.folder, role.config, dtype).to(self.args.device)
            head = nn.Parameter(head, requires_grad=False)
        return Language(norm, head)

    def apart(self, teacher: VerbalizedBackbone) -> Callable | None:
        """What runs a teacher between the training engine's forwards; None: it may be called itself. Collective."""
        if self.args.deepspeed is None:
            return None
        call, release = run_apart(teacher, self.config.dtype, self.args)
        self.releases.append(release)
        return call

    def add_lora(self, model: nn.Module) -> nn.Module:
        """Inject trainable LoRA into the language model, in place. Returns the peft wrapper.

        In the model's dtype under DeepSpeed, which keeps a float32 copy for its optimizer; peft would otherwise make
        LoRA float32, and with it a float32 copy of each adapted layer's input. Without, `_keep_master_weights`.
        """
        from peft import LoraConfig, get_peft_model

        settings = self.config.lora
        lora = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.target_modules or family_of(model.config).lora_targets,
        )
        return get_peft_model(model, lora, autocast_adapter_dtype=self.args.deepspeed is None)

    def enable_checkpointing(self, model: nn.Module) -> None:
        """Gradient checkpointing on a trained backbone. Re-entrant checkpoints would cut target layers' gradients."""
        if self.config.stage_training(self.name).gradient_checkpointing:
            checkpoint_activations(model)

    def save_student(self, model: nn.Module, source: Path, adapter: nn.Module | None) -> None:
        """Write the trained student as a stock checkpoint with its processor to `<stage>/student`.

        With LoRA the adapter is kept beside it (`<stage>/adapter`, peft's format) and merged into the weights.
        """
        folder = self.folder / "student"
        trained = gather_state((n, p) for n, p in model.named_parameters() if p.requires_grad or ".lora_" in n)
        if rank() == 0:
            with unsharded():
                stock = load_backbone(source, self.config.dtype)
                if adapter is None:
                    _, unknown = stock.load_state_dict(trained, strict=False)
                    if unknown:
                        raise RuntimeError(f"trained weights that the stock model does not have: {unknown[:5]}")
                else:
                    stock = _merge(stock, adapter, trained, self.folder / "adapter")
                stock.save_pretrained(folder)
            self.roles["student"].processor.save_pretrained(folder)
            carry_record(self.roles["student"].folder, folder)


def _merge(stock: nn.Module, adapter: nn.Module, trained: dict, folder: Path) -> nn.Module:
    """Save an adapter's weights in peft's format and merge them into a stock model."""
    from peft import PeftModel

    prefix = "base_model.model."
    adapter.save_pretrained(folder, state_dict={prefix + name: value for name, value in trained.items()})
    return PeftModel.from_pretrained(stock, folder).merge_and_unload()


def _keep_master_weights(module: nn.Module) -> None:
    """Trained weights in float32 (autocast computes in bfloat16); DeepSpeed keeps such a copy of its own."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _release(trainer: StageTrainer, releases: list[Callable[[], None]]) -> None:
    """Give memory back for the next stage of the same process."""
    engine = getattr(trainer, "deepspeed", None)
    if engine is not None:
        engine.destroy()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.module = trainer.evaluation = None
    while releases:
        releases.pop()()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
