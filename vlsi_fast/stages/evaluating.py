"""Evaluation while training: the stage's own loss, part by part, and exact match, on rows of `data.eval`.

    N  answer tokens        P  parts of the loss        R  rows of a micro-batch        V  vocabulary        d  width

Exact match needs no generation. Greedy decoding gives an answer token for token just where each of its tokens, the end
of the turn included, is the likeliest after those before it, and the forward that the loss comes from has them all. So
every rank makes the same forwards whatever the model says, as ZeRO-3 needs. `vlsi-fast eval` generates, and may count
more as right: other tokens of the same text, another case, a source's own metric.

Nothing here changes what is trained. Random numbers are put back. Layers are matched by draws of their own, the same
at every evaluation, so that evaluations differ by the weights alone.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback

from vlsi_kernels.frozen_head import weight_of

from ..checkpoints import EVALUATIONS_NAME, damage, lines_up_to, looks_whole, write_lines
from ..config import ConfigError, TrainingConfig
from ..data.encoding import IGNORED
from ..lineage import LineageError
from ..matching import draw_generator
from ..ranks.sharding import gathered, gathered_objects, rank, release_gathered, world_size
from ..ranks.watch import watch
from ..terminal import say
from .batches import StageCollator, restore_shared, to_device
from .hooks import HookedTrainer
from .module import StageModule

NO_STEP = 2**62
"""What stands for the optimizer step in the draws of an evaluation: training never gets there."""
CHUNK = 16384
"""Rows of a language head whose logits are held at once."""


def last_answers(rows: list[dict]) -> Tensor:
    """Which row's last answer each answer token of the student belongs to.

    Args:
        rows: R rows of the dataset. Of the `whole` labels of one that is aligned, [1, T], only the tokens that the
            student's labels keep are counted.

    Returns:
        [N] int64 in the order of `hidden_states.answer_positions`: the row's number, -1 for tokens of earlier answers.
    """
    found = []
    for number, row in enumerate(rows):
        labels = row["student"]["labels"][0, 1:]
        places = (row.get("whole", row["student"]["labels"])[0, 1:] != IGNORED).nonzero()[:, 0]
        starts = (places.diff() > 1).nonzero()[:, 0] + 1  # of all answers but the first
        owner = torch.full_like(places, number)
        owner[: starts[-1] if len(starts) else 0] = -1
        found.append(owner[labels[places] != IGNORED])
    return torch.cat(found)


class EvaluationCollator:
    """`StageCollator`'s batches of those rows that can be used; the others are only counted.

    Adds to `facts`: `unusable`, how many rows cannot be used; `counted`, False where none is left and one row stands in
    for them, since every rank must make a forward; `owners`, [N] of the student's answer tokens (`last_answers`).
    """

    def __init__(self, collator: StageCollator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        # in place of a row that cannot be used stands the next one, which has a place of its own
        usable = [row for row in rows if not row["skipped"]]
        taken = usable or rows[:1]
        batch = self.collator(taken)
        batch["facts"] |= {"unusable": len(rows) - len(usable), "counted": bool(usable)}
        if "student" in taken[0]:
            batch["facts"]["owners"] = last_answers(taken)
        return batch


def likeliest_tokens(hidden: Tensor, weight: Tensor) -> Tensor:
    """The token that a head finds likeliest: hidden [N, d] after the final norm, weight [V, d] -> [N] int64.

    The first of equal ones, as torch.argmax and so greedy decoding has it. Logits are float32, `CHUNK` of them at once.
    """
    best = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    token = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    for start in range(0, len(weight), CHUNK):
        value, index = (hidden @ weight[start : start + CHUNK].to(hidden.dtype).T).float().max(dim=1)
        token = torch.where(value > best, start + index, token)
        best = torch.maximum(best, value)
    return token


class Evaluation:
    """The rows of `data.eval` and what a stage's module says of them.

    Micro-batch j is rows j B to j B + B - 1 (B the training's micro-batch), whatever the number of ranks, and runs on
    rank j mod ranks. A rank that has one fewer runs its first again and counts nothing of it.

    Args:
        module: the stage's.
        dataset: rows of `data.eval` as `VlsiDataset` has them.
        collator: of the stage's micro-batches.
        batch_size: rows of a micro-batch.
        samples: rows to take, evenly from all; None: all.
        seed: of the run, for the draws of the matching.
        workers: processes that read rows ahead, while an evaluation lasts.
        device: of the module.
    """

    def __init__(
        self,
        module: StageModule,
        dataset: Dataset,
        collator: StageCollator,
        *,
        batch_size: int,
        samples: int | None,
        seed: int,
        workers: int,
        device: torch.device,
    ):
        self.module, self.seed, self.device = module, seed, device
        count = min(samples or len(dataset), len(dataset))
        rows = [i * len(dataset) // count for i in range(count)]
        self.batches = [rows[i : i + batch_size] for i in range(0, count, batch_size)]
        own = self.batches[rank() :: world_size()]
        rounds = -(-len(self.batches) // world_size())
        own += self.batches[:1] * (rounds - len(own))
        reading = {"num_workers": workers} | ({"prefetch_factor": 2} if workers else {})
        self.loader = DataLoader(dataset, batch_sampler=own, collate_fn=EvaluationCollator(collator), **reading)

    def run(self, model: nn.Module) -> dict[str, Any]:
        """Evaluate. Collective.

        Args:
            model: what runs the module's forward: itself, or DeepSpeed's engine around it.

        Returns:
            loss, that of each part (nats a token, over all answer tokens of all ranks), exact_match (0 to 1; of stages
            that train a student's own answers), rows, answer_tokens, skipped_rows.
        """
        training, devices = self.module.training, [self.device] if self.device.type == "cuda" else []
        student = getattr(self.module, "student", None)
        self.module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                sums = sum(self._sums(model, student, number, batch) for number, batch in self._numbered())
        finally:
            self.module.train(training)
            self.module.frozen_heads.release()
            release_gathered(model)
        if world_size() > 1:
            dist.all_reduce(sums)
        tokens, rows, skipped, right, *parts = sums.tolist()
        parts = [value / max(tokens, 1) for value in parts]
        found = {"loss": sum(parts), **{f"loss/{name}": v for name, v in zip(self.module.part_names, parts)}}
        if student is not None:
            found["exact_match"] = right / max(rows, 1)
        return found | {"rows": int(rows), "answer_tokens": int(tokens), "skipped_rows": int(skipped)}

    def _numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """This rank's micro-batches on the device, with their numbers over all ranks."""
        for place, batch in enumerate(self.loader):
            batch = to_device(batch, self.device)
            restore_shared(batch["batch"], batch["facts"])
            yield place * world_size() + rank(), batch

    def _sums(self, model: nn.Module, student: nn.Module | None, number: int, batch: dict[str, Any]) -> Tensor:
        """[4 + P] float64: answer tokens, rows, unusable rows, rows answered right, and each part's loss summed over
        tokens; zeros of a micro-batch that does not count."""
        inputs, facts = batch["batch"], batch["facts"]
        draws = {"generator": draw_generator(self.seed, NO_STEP, number)} if self.module.matrix_shape else {}
        with _last_states(student) as seen:
            output = model(**inputs, **draws)
        right = torch.zeros(1, dtype=torch.float64, device=self.device)
        if student is not None:
            right += self._right(model, student.head_weight, seen[0], inputs["student"]["labels"], facts)
        own, tokens = number < len(self.batches), facts["answer_tokens"]
        if not (own and facts["counted"]):
            zeros = torch.zeros(4 + len(output["parts"]), dtype=torch.float64)
            zeros[2] = facts["unusable"] * own
            return zeros.to(self.device)
        counts = torch.tensor([tokens, len(facts["ids"]), facts["unusable"]], dtype=torch.float64).to(self.device)
        return torch.cat([counts, right, output["parts"].double() * tokens])

    def _right(self, model: nn.Module, head: Tensor, hidden: Tensor, labels: Tensor, facts: dict[str, Any]) -> Tensor:
        """How many rows' last answers are the likeliest token by token, a scalar on the device."""
        release_gathered(model)  # the head may be on its way for a backward that never comes
        with self._whole(head) as weight:
            wrong = (likeliest_tokens(hidden, weight) != labels) & (facts["owners"] >= 0)
        rows = torch.zeros(len(facts["ids"]), device=self.device)
        return (rows.index_add(0, facts["owners"].clamp(min=0), wrong.float()) == 0).sum()

    @contextlib.contextmanager
    def _whole(self, head: Tensor) -> Iterator[Tensor]:
        """The student's head, [V, d], inside the block; one that is not trained as the losses have it."""
        if head.requires_grad:
            with gathered([head]):
                yield head
            return
        with self.module.frozen_heads.whole([head]) as (frozen,):
            yield weight_of(frozen)


@contextlib.contextmanager
def _last_states(student: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collects the last hidden states, [N, d], that a `VerbalizedBackbone` gives inside."""
    seen: list[Tensor] = []
    if student is None:
        yield seen
        return
    hook = student.register_forward_hook(lambda module, arguments, output: seen.append(output[1]))
    try:
        yield seen
    finally:
        hook.remove()


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, with a checkpoint at the end, from which a run that dies before its result goes on."""

    def on_train_begin(self, args, state, control, **kwargs):
        pass  # it would miss the Trainer's load_best_model_at_end: the stage loads the best

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, metrics, **kwargs)
        control.should_save |= self.over

    @property
    def over(self) -> bool:
        """Whether its patience is at an end."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience


class EvaluatingTrainer(HookedTrainer):
    """A Trainer that evaluates by `Evaluation`, keeps the best checkpoint, and may end early.

    The best and the patience are in the Trainer's own state, so in every checkpoint.
    """

    evaluation: Evaluation | None = None
    stage: str
    """Name of the stage, for messages."""

    def prepare_evaluation(self, evaluation: Evaluation, settings: TrainingConfig) -> None:
        """To be called once, before `train`.

        Raises:
            ConfigError: `metric_for_best_model` is no part of the stage's loss.
        """
        metric, parts = settings.metric_for_best_model, self.module.part_names
        if metric.startswith("loss/") and metric.removeprefix("loss/") not in parts:
            raise ConfigError(
                f"{self.stage}: training.metric_for_best_model is {metric}; this stage's are loss, "
                + ", ".join(f"loss/{name}" for name in parts)
            )
        self.evaluation, self.keeps_best = evaluation, settings.load_best_model_at_end
        if settings.early_stopping_patience is not None:
            patience, threshold = settings.early_stopping_patience, settings.early_stopping_threshold
            self.add_callback(EarlyStopping(patience, threshold))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate into eval.jsonl and the trackers. Collective. Returns the numbers, each name with `eval_` before."""
        began, step, place = time.perf_counter(), self.state.global_step, watch.place
        watch.place = f"stage {self.stage}, evaluation after optimizer step {step}"
        found = self.evaluation.run(self.model_wrapped if self.is_deepspeed_enabled else self.module)
        watch.place = place
        found["runtime"] = time.perf_counter() - began
        if rank() == 0:
            self._write({"stage": self.stage, "step": step, **found})
            match = f", exact match {found['exact_match']:.1%}" if "exact_match" in found else ""
            say(f"stage {self.stage}, optimizer step {step}: evaluation loss {found['loss']:.4g}{match}")
        metrics = {f"eval_{name}": float(value) for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _write(self, record: dict[str, Any]) -> None:
        path = Path(self.args.output_dir) / EVALUATIONS_NAME
        # one that was made up for is there already where the run died soon after
        write_lines(path, [*lines_up_to(path, record["step"] - 1), json.dumps(record)])

    # ---- the best, and an early end ----

    @property
    def best_kept(self) -> int | None:
        """Optimizer step of the checkpoint that must stay."""
        return self.state.best_global_step if self.keeps_best else None

    def is_over(self) -> bool:
        """Whether evaluations have ended the stage."""
        return any(each.over for each in self.callback_handler.callbacks if isinstance(each, EarlyStopping))

    def catch_up(self) -> None:
        """What a run that goes on from a checkpoint lacks: the evaluation that one which had to leave left out.

        A best whose checkpoint is gone is forgotten.
        """
        step = self.state.global_step
        best = self.best_kept
        if best is not None and best != step and not looks_whole(self._checkpoint(best)):
            if rank() == 0:
                say(f"{self._checkpoint(best)}, the best so far, is gone: only evaluations from here on can be best")
            self.state.best_metric = self.state.best_global_step = None
        due = self.evaluation is not None and step and step % self.args.eval_steps == 0 and step < self.state.max_steps
        if due and not any(entry.get("step") == step and "eval_loss" in entry for entry in self.state.log_history):
            self.note_best(self.evaluate())

    def load_best(self) -> None:
        """Take the trained weights of the best evaluation. Collective.

        Raises:
            LineageError: its checkpoint is not what was written.
        """
        best = self.best_kept
        if best == self.state.global_step:
            return
        if best is None:
            if rank() == 0:
                say(f"stage {self.stage}: no evaluation had a best value, so its result has the last weights")
            return
        folder = self._checkpoint(best)
        wrong = sorted({line for lines in gathered_objects(damage(folder, rank(), world_size())) for line in lines})
        if wrong:
            raise LineageError(
                f"{folder}, the best checkpoint, is not what was written: {'; '.join(wrong[:4])}. Restore it from a "
                "copy, or delete it; --resume then writes the stage's result, without it of the last weights"
            )
        self.load_weights(folder)

    def summary(self) -> dict[str, Any]:
        """What a stage's record says of its evaluations; nothing where there were none."""
        if self.evaluation is None:
            return {}
        state, made = self.state, self.state.global_step
        best = {"metric": self.args.metric_for_best_model, "value": state.best_metric, "step": state.best_global_step}
        early = made if made < state.max_steps else None
        return {"best": best | {"loaded": self.best_kept is not None}, "stopped_early_at": early}

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"
