"""The training loop that all three stages share: `transformers.Trainer` with VLsI's batches, counts and records.

What differs between stages is one module, a `StageModule`: its forward takes a batch and returns the loss.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.trainer
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from ..config import ConfigError, RunConfig
from ..data.mixing import EpochOrder
from ..data.skipped import SkipLog
from ..matching import draw_generator
from ..rescaling import require_same_engine, universal_where_needed
from ..sharding import barrier, rank, world_size
from ..watch import TellPlace
from .batches import LengthGroups, StageCollator, UncollatedRows, restore_shared

TRAINABLE_NAME = "trainable.safetensors"
COUNTS = 6
"""Numbers in front of `_sums`."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite. The message names the step, the layers and the rows."""


class StageModule(nn.Module):
    """What a stage trains.

    `forward(student=None, teacher=None, generator=None)` takes for each role `{"inputs": processor tensors,
    "index": [N] answer positions, "labels": [N]}` and returns

        loss      scalar, sum over `parts`, each a mean over the N answer tokens of the micro-batch
        parts     [P] float32, detached, in the order of `part_names`
        kl        [S, L] float32, detached (interact only)
        matches   [S, L] float32 counts of chosen pairs (interact only)
    """

    part_names: list[str]
    """Names of the parts of the loss, as logged."""
    roles: tuple[str, ...]
    """Which of student and teacher the stage runs."""
    matrix_shape: tuple[int, int] | None = None
    """[S, L] where the stage matches layers."""
    layer_names: tuple[list[int], list[int]] = ([], [])
    """Target layers of student and teacher, for logs."""


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, ..) started this process."""
    return "LOCAL_RANK" in os.environ


def training_arguments(config: RunConfig, stage: str) -> TrainingArguments:
    """`TrainingArguments` of one stage. Made before any model, since it switches ZeRO-3 loading on.

    Raises:
        ConfigError: DeepSpeed asked for but not installed or not readable.
    """
    t = config.stage_training(stage)
    deepspeed = t.deepspeed
    if deepspeed is not None and not launched():
        print("vlsi-fast: no launcher, so training.deepspeed is not used (start with `deepspeed` or `torchrun`)")
        deepspeed = None
    if isinstance(deepspeed, str) and not Path(deepspeed).is_file():
        raise ConfigError(f"training.deepspeed: file {deepspeed} does not exist; configs/zero3.json is one")
    if deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("training.deepspeed is set but deepspeed is not installed: pip install deepspeed")
    schedule, schedule_kwargs = t.lr_scheduler_type, {}
    if schedule == "cosine":
        schedule, schedule_kwargs = "cosine_with_min_lr", {"min_lr_rate": t.min_learning_rate / t.learning_rate}
    elif schedule == "constant" and t.warmup_steps:
        schedule = "constant_with_warmup"
    on_cpu = not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu"
    arguments = {
        **t.model_dump(
            include={
                "learning_rate", "warmup_steps", "num_train_epochs", "max_steps", "per_device_train_batch_size",
                "gradient_accumulation_steps", "weight_decay", "adam_beta2", "max_grad_norm", "optim",
                "logging_steps", "save_steps", "save_total_limit",
            }
        ),
        **_loading_arguments(config.data.num_workers),
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": schedule_kwargs,
        "report_to": t.report_to or "none",
        "output_dir": str(config.stage_dir(stage)),
        "deepspeed": deepspeed,
        "seed": config.seed,
        "bf16": config.dtype == "bfloat16",
        "use_cpu": on_cpu,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
        "ddp_find_unused_parameters": False,
        **t.extra,
    }
    if deepspeed is None:  # an earlier stage of this process may have used it
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        unset_hf_deepspeed_config()
    args = TrainingArguments(**arguments)
    _ = args.device  # starts the process group
    if deepspeed is not None:
        _start_deepspeed(on_cpu)
    if not launched():
        args._n_gpu = 1  # one process, one GPU: the Trainer would wrap several in DataParallel
    return args


def _loading_arguments(workers: int) -> dict[str, Any]:
    """Fields of TrainingArguments that let batches be made while the device computes.

    Copies to the device do not block: a blocking one would wait for all work queued before it, and count as data wait.
    """
    arguments = {"dataloader_num_workers": workers, "accelerator_config": {"non_blocking": True}}
    if workers:  # both are errors without workers
        arguments |= {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    return arguments


def _start_deepspeed(on_cpu: bool) -> None:
    """Hand torch's process group to DeepSpeed: without it, loading under ZeRO-3 would count one rank."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        return
    if on_cpu:
        # An all-reduce for inference that training never calls, but that needs a C++ compiler and minutes to build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


class ContinuingSampler(torch.utils.data.Sampler):
    """Rows in the run's one random order, from where the stage before ended.

    Epoch e of the run is a permutation drawn from (seed, e); a stage that starts `start` rows into the run takes the
    rows that follow, so that three stages read what one of their total length would.
    """

    def __init__(self, rows: int | EpochOrder, seed: int = 0, start: int = 0):
        """`rows`: how many there are, each once an epoch; or the order of a weighted mix, which has its own seed."""
        self.order = EpochOrder([rows], seed) if isinstance(rows, int) else rows
        self.start, self.epoch = start, 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self):
        return self.order.rows(self.start + self.epoch * len(self), len(self))


class _TellSampler(TrainerCallback):
    """Tells the sampler the epoch; the Trainer's own way does not reach it through accelerate's sharding."""

    def __init__(self, sampler: ContinuingSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int((state.epoch or 0) + 1e-6)


class _Progress(ProgressCallback):
    """The Trainer's progress bar with loss and learning rate behind it instead of a printed dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}", lr=f"{logs.get('learning_rate', 0):.2g}")


class StageTrainer(Trainer):
    """Trainer of one stage. Loss and metrics are sums over answer tokens of all micro-batches and ranks."""

    def __init__(
        self, module: StageModule, args: TrainingArguments, config: RunConfig, stage: str, dataset, collator,
        data_start: int = 0,
    ):  # fmt: skip
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.stage_dir(stage) / "tensorboard")
        collator = StageCollator(collator, module.roles)
        grouped = config.stage_training(stage).group_by_length
        self.groups = LengthGroups(collator, module.roles) if grouped else None
        send = UncollatedRows if grouped else collator
        super().__init__(model=module, args=args, train_dataset=dataset, data_collator=send)
        del os.environ["TENSORBOARD_LOGGING_DIR"]
        rows = dataset.sources
        order = EpochOrder(rows.sizes, config.seed, rows.weights, config.data.stopping_strategy)
        self.sampler = ContinuingSampler(order, start=data_start)
        self.add_callback(_TellSampler(self.sampler))
        self.add_callback(TellPlace(stage, args.ddp_timeout))
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.config, self.stage, self.module = config, stage, module
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Progress)
        self.metrics_path = Path(args.output_dir) / "metrics.jsonl"
        self.skip_log = SkipLog(
            Path(args.output_dir) / "skipped_rows.jsonl", len(dataset), config.data.max_skipped_share
        )
        self._pending: list[tuple[Tensor, dict[str, Any]]] = []
        self._scalars: dict[str, float] = {}
        self._step_began, self._waited = time.perf_counter(), 0.0
        self.totals = {"answer_tokens": 0, "rows": 0, "step_seconds": 0.0}
        self.wait_seconds = 0.0

    # ---- batches ----

    def _get_train_sampler(self, *args, **kwargs) -> ContinuingSampler:
        return self.sampler

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The Trainer's own, with the time that the batches took; not that of the ranks' exchange of counts."""
        if self.groups is not None:
            epoch_iterator = self.groups(epoch_iterator, num_batches, device)
        return super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        restore_shared(inputs["batch"], inputs["facts"])
        return inputs

    def _timed(self, batches):
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Answer tokens of one optimizer step over all micro-batches and ranks."""
        total = torch.tensor(sum(batch["facts"]["answer_tokens"] for batch in batch_samples), device=device)
        if world_size() > 1:
            dist.all_reduce(total)
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch, scaled so that the gradients' mean over ranks is that of all answer tokens."""
        batch, facts = dict(inputs["batch"]), inputs["facts"]
        if self.module.matrix_shape is not None:
            # Numbered over ranks as the data are, so that another number of ranks draws the same.
            micro = len(self._pending) * world_size() + rank()
            batch["generator"] = draw_generator(self.config.seed, self.state.global_step, micro)
        output = model(**batch)
        self._pending.append((self._sums(output, facts), facts))
        if self.accelerator.sync_gradients:
            self._finish_step()
        # Gradients are averaged over ranks; the loss is a sum of tokens over their global count.
        loss = output["loss"] * (facts["answer_tokens"] * world_size() / num_items_in_batch.clamp_min(1))
        return (loss, output) if return_outputs else loss

    # ---- records ----

    def _sums(self, output: dict[str, Tensor], facts: dict[str, Any]) -> Tensor:
        """Everything that is summed over micro-batches and ranks, as one float64 vector on the device."""
        n = facts["answer_tokens"]
        lengths = [len(facts["ids"]), len(facts["skipped"]), facts["positions"], facts["padding"]]
        counts = torch.tensor([n, facts["tokens"], *lengths])
        pieces = [counts, output["parts"] * n]
        if self.module.matrix_shape is not None:
            pieces += [output["kl"].flatten() * n, output["matches"].flatten()]
        device = output["parts"].device
        return torch.cat([p.to(device, torch.float64) for p in pieces])

    def _finish_step(self) -> None:
        """Once an optimizer step, before its last backward: reduce the sums, stop on bad numbers, write the record."""
        peaks = torch.zeros(2, world_size(), dtype=torch.float64)
        peaks[:, rank()] = torch.tensor([peak_memory_bytes(self.args.device), peak_rss_bytes()], dtype=torch.float64)
        own = torch.cat([torch.tensor([self._waited], dtype=torch.float64), peaks.flatten()]).to(self.args.device)
        self._waited = 0.0
        total = torch.cat([sum(sums for sums, _ in self._pending), own])
        if world_size() > 1:
            dist.all_reduce(total)
        values = total.tolist()
        if not all(map(math.isfinite, values)):
            self._stop_on_non_finite()
        for _, facts in self._pending:
            self.skip_log.record(facts["skipped"], len(facts["ids"]) + len(facts["skipped"]))
        self.skip_log.check()
        self._pending.clear()
        record = self._record(values)
        self._add_to_totals(record)
        self._scalars = _scalars(record)
        if rank() == 0:
            with self.metrics_path.open("a") as stream:
                stream.write(json.dumps(record) + "\n")

    def _record(self, values: list[float]) -> dict[str, Any]:
        answer_tokens, tokens, rows, skipped, positions, padding = (int(v) for v in values[:COUNTS])
        now, began = time.perf_counter(), self._step_began
        self._step_began = now
        n, names = max(answer_tokens, 1), self.module.part_names
        parts = [v / n for v in values[COUNTS : COUNTS + len(names)]]
        record = {
            "stage": self.stage,
            "step": self.state.global_step + 1,
            "loss": sum(parts),
            **{f"loss/{name}": value for name, value in zip(names, parts)},
            "learning_rate": self._get_learning_rate(),
            "answer_tokens": answer_tokens,
            "rows": rows,
            "skipped_rows": skipped,
            "padding_share": padding / max(positions, 1),
            "step_seconds": now - began,
            "tokens_per_second": tokens / (now - began),
            "answer_tokens_per_second": answer_tokens / (now - began),
        }
        if self.module.matrix_shape is not None:
            s, l = self.module.matrix_shape
            start = COUNTS + len(names)
            kl = [[v / n for v in values[start + i * l : start + (i + 1) * l]] for i in range(s)]
            start += s * l
            matches = [[int(v) for v in values[start + i * l : start + (i + 1) * l]] for i in range(s)]
            students, teachers = self.module.layer_names
            record |= {"kl": kl, "matches": matches, "student_layers": students, "teacher_layers": teachers}
        waited, *peaks = values[-2 * world_size() - 1 :]
        # Ranks meet in the sums just made, so a step is equally long on all of them: only the wait differs.
        record["data_wait_share"] = waited / world_size() / record["step_seconds"]
        peaks = [int(v) for v in peaks]
        record["peak_memory_bytes"], record["peak_rss_bytes"] = peaks[: world_size()], peaks[world_size() :]
        return record

    def _add_to_totals(self, record: dict[str, Any]) -> None:
        for name in self.totals:
            self.totals[name] += record[name]
        self.wait_seconds += record.get("data_wait_share", 0.0) * record["step_seconds"]  # older records have none

    def _stop_on_non_finite(self) -> None:
        """Raise on every rank alike, naming what each rank saw. Nothing has been stepped or saved."""
        names = self.module.part_names
        seen = []
        for micro, (sums, facts) in enumerate(self._pending):
            bad = [name for name, v in zip(names, sums[COUNTS : COUNTS + len(names)].tolist()) if not math.isfinite(v)]
            if bad or not bool(torch.isfinite(sums).all()):
                seen.append(f"rank {rank()}, micro-batch {micro}: {', '.join(bad) or 'KL matrix'}; rows {facts['ids']}")
        everyone = [seen]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, seen)
        lines = "\n  ".join(line for lines in everyone for line in lines)
        raise NonFiniteLossError(
            f"non-finite loss in stage {self.stage}, optimizer step {self.state.global_step + 1}:\n  {lines}\n"
            f"Nothing was stepped or saved; the last good checkpoint in {self.args.output_dir} is kept. Look at these "
            "rows; lower training.learning_rate or set training.max_grad_norm and start again in another output_dir, "
            "or, if the cause lay outside the run (hardware), continue with --resume"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's own numbers to what the Trainer reports to the trackers."""
        super().log({**logs, **self._scalars} if "loss" in logs else logs, start_time)

    # ---- checkpoints: only what is trained ----

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train, from `resume_from_checkpoint` where given."""
        self._truncate_metrics(resume_from_checkpoint)
        self._step_began, self._waited = time.perf_counter(), 0.0
        if resume_from_checkpoint is not None:
            require_same_engine(resume_from_checkpoint, self.is_deepspeed_enabled)
        strict = transformers.trainer.deepspeed_load_checkpoint

        def frozen_parameters_are_not_in_checkpoints(engine, path, load_module_strict=True):
            with universal_where_needed(engine, path):
                return strict(engine, path, load_module_strict=False)

        transformers.trainer.deepspeed_load_checkpoint = frozen_parameters_are_not_in_checkpoints
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            transformers.trainer.deepspeed_load_checkpoint = strict

    def _run_epoch(self, *args, **kwargs):
        """Resumed at its last step, a run lacks only its export: the Trainer would make one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _truncate_metrics(self, checkpoint: str | None) -> None:
        """Drop records of steps that a resumed run makes again, and count the others' into the totals."""
        done = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
        lines = self.metrics_path.read_text().splitlines() if self.metrics_path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
        for line in kept:
            self._add_to_totals(json.loads(line))
        barrier()  # every rank has read before rank 0 writes
        if rank() == 0:
            partial = self.metrics_path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(self.metrics_path)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        barrier()  # rank 0 then writes the state that marks the checkpoint as complete

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

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """A step's record as the flat numbers that trackers take, beyond what the Trainer logs itself."""
    scalars = {k: float(v) for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "loss")}
    del scalars["learning_rate"]
    teachers = record.get("teacher_layers", [])
    for i, student in enumerate(record.get("student_layers", [])):
        counts = record["matches"][i]
        mean = sum(count * teacher for count, teacher in zip(counts, teachers)) / max(sum(counts), 1)
        scalars[f"matched_teacher_layer/student_{student}"] = mean
        for j, teacher in enumerate(teachers):
            scalars[f"kl/student_{student}/teacher_{teacher}"] = record["kl"][i][j]
    for name in ("peak_memory_bytes", "peak_rss_bytes"):
        scalars[name] = float(max(record[name]))
    return scalars


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the stage on a GPU; on the CPU `peak_rss_bytes`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since its start (earlier stages of the same process included)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
