"""Options of optimisation, which every stage has."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .config_files import nearest
from .config_stages import Section

NOT_EXTRA = {
    *("output_dir", "seed", "data_seed", "bf16", "fp16", "use_cpu", "remove_unused_columns", "logging_nan_inf_filter"),
    *("lr_scheduler_kwargs", "dataloader_num_workers", "ddp_find_unused_parameters"),
    *("dataloader_persistent_workers", "train_sampling_strategy", "restore_callback_states_from_checkpoint"),
    *("greater_is_better", "save_only_model", "save_safetensors", "label_smoothing_factor"),
    *("label_names", "per_device_eval_batch_size", "batch_eval_metrics", "group_by_length", "resume_from_checkpoint"),
    *("average_tokens_across_devices", "neftune_noise_alpha", "auto_find_batch_size", "torch_compile"),
    "enable_jit_checkpoint",  # max_hours, save_minutes and SIGTERM do what it does
}
"""Fields of TrainingArguments that the stages set themselves or that have no meaning for them."""


class TrainingConfig(Section):
    """Optimisation; names are those of `transformers.TrainingArguments`. Defaults are the paper's (section 4.1c)."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    min_learning_rate: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule from learning_rate to min_learning_rate (linear ends at 0, constant stays)."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over data.train; used where max_steps is -1."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as num_train_epochs give."""
    per_device_train_batch_size: int = Field(4, ge=1)
    """Rows of one micro-batch on one rank."""
    gradient_accumulation_steps: int = Field(16, ge=1)
    """Micro-batches of one optimizer step on one rank."""
    balance_batch: bool = False
    """Deal the rows of each optimizer step into all micro-batches of all ranks by cost, so that no rank waits for
    another; rows of like length together where there is padding. per_device_train_batch_size is then a mean. The rows
    of a step stay, and so does the loss in verbalize and sft; interact matches layers by micro-batch, so its matches
    differ."""
    persist_heads: Literal["auto", True, False] = "auto"
    """Keep frozen language heads whole from the first micro-batch of an optimizer step to the last: with ZeRO-3 each is
    gathered once a step, as if below stage3_param_persistence_threshold until then, and with the fused kernels its
    float16 copy is made once a step (without ZeRO-3 once a run). Losses are the same. auto: on CUDA where both fit on
    paper (`vlsi-fast plan`), else false."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay (matrices only)."""
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW's second-moment decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0: no clipping (stage verbalize's default, see verbalize.training)."""
    gradient_checkpointing: bool = True
    """Recompute the student's decoder layers in backward (only where its backbone is trained)."""
    optim: str = "adamw_torch"
    """Optimizer, by its transformers name."""
    logging_steps: int = Field(1, ge=1)
    """Optimizer steps between reports to report_to; metrics.jsonl has every step."""
    save_steps: int = Field(500, ge=1)
    """Optimizer steps between checkpoints for --resume."""
    save_minutes: float | None = Field(30, gt=0)
    """Minutes after which a checkpoint is saved at the end of the step, whatever save_steps says; null: never."""
    save_total_limit: int | None = Field(2, ge=1)
    """Checkpoints kept, the newest, and the best beside them (load_best_model_at_end); null: all."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimizer steps between evaluations on data.eval, and one at the end, into eval.jsonl: the loss of every layer,
    and in interact and sft exact match; null: never."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Rows of an evaluation while training, taken evenly from all of data.eval; null: all rows."""
    load_best_model_at_end: bool = False
    """The stage's result has the weights of the best evaluation instead of the last. A new best is saved where it is
    found, whatever save_steps says, and its checkpoint stays."""
    metric_for_best_model: str = "loss"
    """What decides which evaluation is best, for load_best_model_at_end and early stopping: loss, loss/PART (as in
    eval.jsonl, such as loss/last), or exact_match. Of losses the lowest is best, of exact_match the highest."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """The stage ends after so many evaluations in a row that are no better than the best; null: never early."""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """By how much an evaluation must be better for early_stopping_patience to count it so."""
    report_to: list[str] = ["tensorboard"]
    """Trackers, by their transformers names: tensorboard, wandb, mlflow, ..; []: none."""
    deepspeed: str | dict | None = None
    """DeepSpeed JSON (path or mapping), used where a launcher started the ranks; null: plain data parallelism."""
    extra: dict[str, Any] = {}
    """Any further field of transformers.TrainingArguments, by its own name."""

    @property
    def evaluations_decide(self) -> bool:
        """Whether evaluations change what a stage makes."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def greater_is_better(self) -> bool:
        """Of `metric_for_best_model`."""
        return not self.metric_for_best_model.startswith("loss")

    @model_validator(mode="before")
    @classmethod
    def _no_grouping(cls, values):
        """Records of older runs have it as false."""
        if not isinstance(values, dict) or "group_by_length" not in values:
            return values
        values = dict(values)
        if values.pop("group_by_length"):
            raise ValueError(
                "group_by_length is no more: set balance_batch, which does the same over all ranks and also saves time "
                "where nothing is padded"
            )
        return values

    @model_validator(mode="after")
    def _check(self):
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be positive, or -1 for num_train_epochs, got {self.max_steps}")
        if self.lr_scheduler_type == "cosine" and self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate is above learning_rate; lower it")
        self._check_evaluation()
        if set(self.report_to) - {"tensorboard"}:  # as below: seconds of import that most configs do not need
            from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

            for name in self.report_to:
                if name not in (known := {*INTEGRATION_TO_CALLBACK, "all", "none"}):
                    raise ValueError(f"report_to: transformers has no tracker {name!r}{nearest(name, known)}")
        if self.extra:
            from transformers import TrainingArguments  # seconds of import that most configs do not need

            known = set(TrainingArguments.__dataclass_fields__)
        for name in self.extra:
            if name in type(self).model_fields:
                raise ValueError(f"extra.{name}: set training.{name} itself")
            if name in NOT_EXTRA or name.startswith(("eval_", "do_", "hub_", "push_to_hub")):
                raise ValueError(f"extra.{name} is set by the stage, or has no meaning for it; remove it")
            if name not in known:
                raise ValueError(f"extra.{name} is no field of transformers.TrainingArguments{nearest(name, known)}")
        return self

    def _check_evaluation(self) -> None:
        """What needs evaluations has them, and what decides by them has a metric."""
        metric = self.metric_for_best_model
        for name in ("load_best_model_at_end", "early_stopping_patience", "max_eval_samples"):
            if getattr(self, name) and self.eval_steps is None:
                raise ValueError(f"{name} needs evaluations; set eval_steps (steps between them), or remove it")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold belongs to early_stopping_patience; set that, or remove it")
        if metric not in ("loss", "exact_match") and not metric.startswith("loss/"):
            raise ValueError(
                f"metric_for_best_model is {metric!r}; use loss, loss/PART (the names in eval.jsonl) or exact_match"
            )
        if metric != "loss" and not self.evaluations_decide:
            raise ValueError(
                "metric_for_best_model decides nothing without load_best_model_at_end or early_stopping_patience; set "
                "one of them, or remove it"
            )
