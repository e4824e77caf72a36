"""The training loop that all three stages share: `transformers.Trainer` with VLsI's batches, counts and records.

What differs between stages is one module, a `StageModule`.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import ProgressCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..checkpoints import (
    EVALUATIONS_NAME,
    METRICS_NAME,
    describe,
    describe_start,
    files_of,
    keep_newest,
    lines_up_to,
    write_lines,
    write_manifest,
    writer_of,
)
from ..config import RunConfig
from ..data.skipped import SkipLog
from ..errors import UserError
from ..matching import draw_generator
from ..ranks.rescaling import require_same_engine
from ..ranks.sharding import barrier, gathered_objects, rank, world_size
from ..ranks.watch import TellPlace
from ..terminal import say
from .arguments import run_group
from .batches import StageCollator, to_device
from .evaluating import EvaluatingTrainer, Evaluation
from .hooks import partial_checkpoints
from .leaving import WISHES, Leaving
from .module import StageModule
from .records import COUNTS, counts_of, non_finite, own_numbers, step_record, sums_of, tracker_scalars
from .sampling import RowCosts, StepBatches, TellSampler, data_order
from .throughput import Throughput
from .trackers import tensorboard_in, tracked
from .window import TeacherWindow

ETA_STEPS = 50
"""Latest steps, of this process, whose mean time the rest is expected to take."""


class NonFiniteLossError(UserError, RuntimeError):
    """The loss became NaN or infinite. The message names the step, the layers and the rows."""

    exit_code = 1


class _Progress(ProgressCallback):
    """The Trainer's progress bar with loss, rate and speed behind it instead of a printed dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            told = {"loss": f"{logs['loss']:.4g}", "lr": f"{logs.get('learning_rate', 0):.2g}"}
            if "tokens_per_second" in logs:
                told["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
            if "mfu" in logs:
                told["MFU"] = f"{logs['mfu']:.0%}"
            self.training_bar.set_postfix(told)


class StageTrainer(EvaluatingTrainer):
    """Trainer of one stage. Loss and metrics are sums over answer tokens of all micro-batches and ranks."""

    def __init__(
        self,
        module: StageModule,
        args: TrainingArguments,
        config: RunConfig,
        stage: str,
        dataset,
        collator,
        data_start: int = 0,
        deadline: float | None = None,
        costs: RowCosts | None = None,
        throughput: Throughput | None = None,
        eval_dataset=None,
    ):
        """`data_start`: rows of the run's order that come before; `costs`: by which micro-batches are balanced."""
        order = data_order(config, dataset.sources, data_start)
        batches = StepBatches(
            order,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            world_size(),
            rank(),
            costs,
            args.dataloader_drop_last,
        )
        self.window = TeacherWindow(module, collator, self._prepare_inputs) if module.window > 1 else None
        collator = StageCollator(collator, module.roles)
        with tensorboard_in(config.stage_dir(stage) / "tensorboard"):
            super().__init__(
                module, batches, args=args, train_dataset=dataset, eval_dataset=eval_dataset, data_collator=collator
            )
        self.add_callback(TellSampler(order))
        self.add_callback(TellPlace(stage, args.ddp_timeout))
        self.leaving = Leaving(deadline, config.stage_training(stage).save_minutes)
        self.add_callback(self.leaving)
        self.config, self.stage, self.throughput = config, stage, throughput
        if eval_dataset is not None:
            settings = config.stage_training(stage)
            evaluation = Evaluation(
                module,
                eval_dataset,
                collator,
                batch_size=settings.per_device_train_batch_size,
                samples=settings.max_eval_samples,
                seed=config.seed,
                workers=config.data.num_workers,
                device=args.device,
            )
            self.prepare_evaluation(evaluation, settings)
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Progress)
        self.metrics_path = Path(args.output_dir) / METRICS_NAME
        self.skip_log = SkipLog(
            Path(args.output_dir) / "skipped_rows.jsonl", len(dataset), config.data.max_skipped_share
        )
        self._pending: list[tuple[Tensor, dict[str, Any]]] = []
        self._scalars: dict[str, float] = {}
        self._step_began, self._waited = time.perf_counter(), 0.0
        self._made: deque[float] = deque(maxlen=ETA_STEPS)
        self.totals = {
            "answer_tokens": 0,
            "rows": 0,
            "skipped_rows": 0,
            "answered_rows": 0,
            "answered_tokens": 0,
            "unaligned_tokens": 0,
            "step_seconds": 0.0,
        }
        self.wait_seconds = 0.0

    # ---- batches ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The Trainer's own, with the time that the batches took; not that of the ranks' exchange of counts."""
        batches, count = super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)
        if self.window is not None:
            self.window.begin(batches)
        return batches, count

    def _timed(self, batches):
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch, scaled so that the gradients' mean over ranks is that of all answer tokens."""
        batch, facts = dict(inputs["batch"]), inputs["facts"]
        if self.module.matrix_shape is not None:
            # Numbered over ranks as the data are, so that another number of ranks draws the same.
            micro = len(self._pending) * world_size() + rank()
            batch["generator"] = draw_generator(self.config.seed, self.state.global_step, micro)
        if self.window is not None and self.window.waiting:
            del batch["teacher"]
            batch["taught"] = self.window.next()
        output = model(**batch, **self._schedule())
        self._pending.append((sums_of(self.module, output, facts), facts))
        if self.accelerator.sync_gradients:
            self.module.frozen_heads.release()  # the last that reads them: no backward does
            self._finish_step()
        # Gradients are averaged over ranks; the loss is a sum of tokens over their global count.
        loss = output["loss"] * (facts["answer_tokens"] * world_size() / num_items_in_batch.clamp_min(1))
        return (loss, output) if return_outputs else loss

    def _schedule(self) -> dict[str, float]:
        return self.module.schedule(self.state.global_step / max(1, self.state.max_steps))

    # ---- records ----

    def _finish_step(self) -> None:
        """Once an optimizer step, before its last backward: reduce the sums, stop on bad numbers, write the record."""
        counts = sum(counts_of(facts) for _, facts in self._pending)
        own = torch.cat([counts, own_numbers(self._waited, world_size(), self.args.device), self.leaving.wishes()])
        self._waited = 0.0
        own = to_device(own, self.args.device)
        total = torch.cat([own[:COUNTS], sum(sums for sums, _ in self._pending), own[COUNTS:]])
        if world_size() > 1:
            dist.all_reduce(total)
        values = total.tolist()
        self.leaving.agreed(values[-WISHES:])
        del values[-WISHES:]
        if not all(map(math.isfinite, values)):
            self._stop_on_non_finite()
        for _, facts in self._pending:
            self.skip_log.record(facts["skipped"])
        for line in self.skip_log.news() if rank() == 0 else ():
            say(line)
        self._pending.clear()
        now = time.perf_counter()
        record = step_record(
            self.module,
            values,
            world_size(),
            stage=self.stage,
            step=self.state.global_step + 1,
            learning_rate=self._get_learning_rate(),
            seconds=now - self._step_began,
            throughput=self.throughput,
        )
        record |= self._schedule()
        self._made.append(record["step_seconds"])
        left = self.state.max_steps - record["step"]
        record["eta_seconds"] = left * sum(self._made) / len(self._made)
        self._step_began = now
        self._add_to_totals(record)
        self.skip_log.check(self.totals["skipped_rows"], self.totals["skipped_rows"] + self.totals["rows"])
        self._scalars = tracker_scalars(record)
        if rank() == 0:
            with self.metrics_path.open("a") as stream:
                stream.write(json.dumps(record) + "\n")

    def _add_to_totals(self, record: dict[str, Any]) -> None:
        for name in self.totals:
            self.totals[name] += record.get(name, 0)  # older records have not all of them
        self.wait_seconds += record.get("data_wait_share", 0.0) * record["step_seconds"]  # older records have none

    def _stop_on_non_finite(self) -> None:
        """Raise on every rank alike, naming what each rank saw. Nothing has been stepped or saved."""
        seen = non_finite(self.module, self._pending)
        lines = "\n  ".join(line for lines in gathered_objects(seen) for line in lines)
        raise NonFiniteLossError(
            f"non-finite loss in stage {self.stage}, optimizer step {self.state.global_step + 1}:\n  {lines}\n"
            f"Nothing was stepped or saved; the last good checkpoint in {self.args.output_dir} is kept. Look at these "
            "rows; lower training.learning_rate or set training.max_grad_norm and start again in another output_dir, "
            "or, if the cause lay outside the run (hardware), continue with --resume"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's own numbers to what the Trainer reports to the trackers."""
        super().log({**logs, **self._scalars} if "loss" in logs else logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """See `EvaluatingTrainer`. Its time is not that of the next step."""
        began = time.perf_counter()
        found = super().evaluate(*args, **kwargs)
        self._step_began += time.perf_counter() - began
        return found

    # ---- the course and its checkpoints ----

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train, from `resume_from_checkpoint` where given."""
        self._truncate_metrics(resume_from_checkpoint)
        self._step_began, self._waited = time.perf_counter(), 0.0
        if resume_from_checkpoint is not None:
            require_same_engine(resume_from_checkpoint, self.is_deepspeed_enabled)
        try:
            with partial_checkpoints(), tracked(self.callback_handler.callbacks, run_group(self.config, self.stage)):
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._close_bar()

    def _close_bar(self) -> None:
        """What is said next, an error above all, begins a line of its own."""
        for callback in self.callback_handler.callbacks:
            if getattr(callback, "training_bar", None) is not None:
                callback.training_bar.close()

    def _truncate_metrics(self, checkpoint: str | None) -> None:
        """Drop records of steps that a resumed run makes again, and count the others' into the totals."""
        done = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
        kept = lines_up_to(self.metrics_path, done)
        for line in kept:
            self._add_to_totals(json.loads(line))
        barrier()  # every rank has read before rank 0 writes
        if rank() == 0:
            write_lines(self.metrics_path, kept)
            evaluations = self.metrics_path.with_name(EVALUATIONS_NAME)
            if evaluations.is_file():
                write_lines(evaluations, lines_up_to(evaluations, done))

    def on_checkpoint(self, checkpoint: Path) -> None:
        """Write the manifest last, then delete older checkpoints. Each rank hashes the files that it wrote."""
        own = describe(checkpoint, [name for name in files_of(checkpoint) if writer_of(name) == rank()])
        parts = gathered_objects(own)
        if rank() == 0:
            files = {name: fact for part in parts for name, fact in part.items()}
            write_manifest(checkpoint, files, metrics=describe_start(self.metrics_path))
            limit = self.config.stage_training(self.stage).save_total_limit
            keep_newest(checkpoint.parent, limit, self.best_kept)
