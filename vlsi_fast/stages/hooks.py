"""What the stages change inside `transformers.Trainer`: every private method that they replace, and one patch.

transformers promises nothing of these, so they stand here alone. They fit 5.17 to 5.23, where each method has the same
arguments. A version that lacks one of them is refused when this is imported: Python would take a replacement that
nothing calls without a word.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.trainer
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..ranks.rescaling import universal_where_needed
from ..ranks.sharding import world_size
from ..unpickling import data_only
from .batches import restore_shared, to_device

FITS = "5.17 to 5.23"
"""Versions of transformers."""
TRAINABLE_NAME = "trainable.safetensors"


class HookedTrainer(Trainer):
    """A Trainer of `StageCollator`'s batches whose checkpoints hold only what is trained."""

    def __init__(self, module: nn.Module, batches: torch.utils.data.Sampler, **options: Any):
        """`module` is trained on this rank's `batches`, lists of row numbers; `options`: of the Trainer."""
        super().__init__(model=module, **options)
        self.module, self.batches = module, batches
        self.loss_is_scaled_for_ga = True  # says so from 5.23 on; before, the next line alone did
        self.model_accepts_loss_kwargs = True

    keeps_best = False
    """Whether the checkpoint of the best evaluation is wanted."""

    def on_checkpoint(self, checkpoint: Path) -> None:
        """Called on every rank when the Trainer has written a checkpoint's files."""

    def catch_up(self) -> None:
        """Called before each epoch, so also where a resumed run begins."""

    def is_over(self) -> bool:
        """Whether the run ends before its last step."""
        return False

    # ---- batches ----

    def get_train_dataloader(self) -> DataLoader:
        """A loader that accelerate does not deal to the ranks: `batches` are this rank's already, of any size."""
        args = self.args
        names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
        names += ("in_order", "multiprocessing_context")  # not in 5.17
        options = {name: getattr(args, f"dataloader_{name}") for name in names if hasattr(args, f"dataloader_{name}")}
        loader = DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator, **options)
        accelerator = self.accelerator
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=accelerator.device_placement,
            non_blocking=accelerator.non_blocking,
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        restore_shared(inputs["batch"], inputs["facts"])
        return inputs

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Answer tokens of one optimizer step over all micro-batches and ranks."""
        total = to_device(torch.tensor(sum(batch["facts"]["answer_tokens"] for batch in batch_samples)), device)
        if world_size() > 1:
            dist.all_reduce(total)
        return total

    # ---- the course ----

    def _run_epoch(self, *args, **kwargs):
        """Resumed at its last step, a run lacks only its export: the Trainer would make one step more."""
        self.catch_up()
        if self.state.global_step >= self.state.max_steps or self.is_over():
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A new best is saved where it is found, whatever `save_steps` says."""
        better = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= better and self.keeps_best
        return better

    def note_best(self, metrics: dict[str, float]) -> None:
        """Take an evaluation's numbers as the Trainer takes those of its own evaluations."""
        self._determine_best_metric(metrics, None)

    # ---- checkpoints: only what is trained, and read as data ----

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.on_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainable parameters of a checkpoint. Under DeepSpeed its own files hold them."""
        if self.is_deepspeed_enabled or not self.args.should_save:
            return
        from safetensors.torch import save_file

        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._trainable(), folder / TRAINABLE_NAME, metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from safetensors.torch import load_file

        stored, own = load_file(Path(resume_from_checkpoint) / TRAINABLE_NAME), self._trainable()
        if stored.keys() != own.keys():
            raise ValueError(f"{resume_from_checkpoint} holds other trainable parameters than this run has")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])

    def load_weights(self, checkpoint: Path) -> None:
        """Take the trained weights of one of this run's checkpoints, after training. Collective."""
        if not self.is_deepspeed_enabled:
            return self._load_from_checkpoint(str(checkpoint))
        with partial_checkpoints():
            transformers.trainer.deepspeed_load_checkpoint(self.model_wrapped, str(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with data_only():
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with data_only():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with data_only():
            super()._load_scaler(checkpoint)

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def partial_checkpoints() -> Iterator[None]:
    """Inside, the Trainer takes DeepSpeed's checkpoints without frozen parameters, and those of other numbers of
    ranks."""
    strict = transformers.trainer.deepspeed_load_checkpoint

    def frozen_parameters_are_not_in_checkpoints(engine, path, load_module_strict=True):
        with data_only(), universal_where_needed(engine, path):
            return strict(engine, path, load_module_strict=False)

    transformers.trainer.deepspeed_load_checkpoint = frozen_parameters_are_not_in_checkpoints
    try:
        yield
    finally:
        transformers.trainer.deepspeed_load_checkpoint = strict


def replaced() -> list[str]:
    """Names of the Trainer's private methods that are replaced here."""
    own = (name for name, value in vars(HookedTrainer).items() if isinstance(value, Callable))
    return [name for name in own if name.startswith("_") and not name.startswith("__") and name != "_trainable"]


def require_hooks(trainer: type) -> None:
    """Raise ImportError unless a Trainer class has every private method that is replaced or called."""
    missing = [name for name in (*replaced(), "_get_learning_rate") if not hasattr(trainer, name)]
    if missing:
        raise ImportError(
            f"transformers {transformers.__version__} has no Trainer.{', Trainer.'.join(missing)}, which the stages "
            f"rely on; vlsi-fast is known to fit {FITS}: pip install 'transformers>=5.17,<6'"
        )


require_hooks(Trainer)
