"""Memory of one GPU through a training step, stage by stage: what is held all the time, and the curve of the rest.

    R  positions of a micro-batch (rows x padded length T)      N  answer tokens of it      e  bytes of a compute number
    d  width      f  inner width      q, k  widths of queries, and of keys or values      W  ranks      P  patches

**Held.** Under ZeRO-3 (DeepSpeed's stage3.py), every tensor of n elements leaves ceil(n / W) of them on a rank:

    frozen    e a shard element
    trained   e (compute copy) + 4 (master) + 8 (Adam) + 4 (`grad_accum_dtype` fp32: the flat gradients)
    also      e x `reduce_bucket_size` (ipg buffer), and whole tensors up to `stage3_param_persistence_threshold`
    hpZ       e a second shard element, ceil(n / ranks of a machine) of every tensor (`zero_hpz_partition_size`)

Without DeepSpeed: frozen e, trained 4 + 4 + 8 a parameter (`_keep_master_weights`).

**A decoder layer keeps for backward**, bytes a position, read off the stock code (RMSNorm computes in float32; rotary
embedding keeps only cos and sin; SwiGLU keeps gate, silu(gate), up and their product; SDPA keeps q, k, v, its output
and a logsumexp; LoRA keeps its bottleneck, and without DeepSpeed, where peft holds it in float32, under bfloat16 a
float32 copy of each adapted layer's input as well):

    norms 2 (4 d + e d) [+ 2 e d where trained]; attention e (2 q + 2 k) + 4 heads; FFN 4 e f; LoRA e ranks
    with experts FFN e (4 f + x d): f of all x experts of a token together, which get a copy of its d numbers each

A layer of linear attention is counted as one that attends, and float32 numbers of its own (shapes.py) beside.

A mask makes SDPA repeat keys and values to the queries' width (2 q in place of 2 k), and each layer keeps its own mask
in numbers, e T^2 a row: a batch of rows of unequal length has one. With gradient checkpointing a layer keeps e d, and
one layer at a time is computed again. Its backward adds d + 2 f numbers at its peak: the FFN's product is released when
its own gradient exists, and with it stand the gradients of silu(gate) and up. With experts 2 x d more stand by.

**A forward without gradient** holds d of the residual, d of the norm's output and the largest of 3 f (FFN; with
experts x d + 3 f, or 4 x d: their inputs, outputs, weighted, and those in the tokens' order) and q + 2 k + 3 q (rotary
embedding), and the hidden states of the target layers, N d e each (R d e for decoder
verbalizers).

**Losses**: N rows a layer, see `_kl` and `_answer_loss`; scratch is that of `vlsi_kernels`, by its own arithmetic.

A curve of these sums is walked through forward, loss, backward and optimizer; its maximum is the prediction. What the
allocator cannot use (fragments), CUDA's context and NCCL's buffers come on top: `RESERVE_BYTES`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..config import ConfigError, RunConfig
from .placement import teacher_bytes
from .shapes import ModelShape, shards

RESERVE_BYTES = 3 * 2**30
"""CUDA context, NCCL's buffers and fragments: an estimate, not part of the predicted peak; `fits` subtracts it."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    rows: int
    tokens: int  # positions of a row, padding included
    answers: int  # answer tokens of all rows
    patches: int  # image patches of all rows
    masked: bool = True  # rows of unequal length: attention has a mask

    @property
    def positions(self) -> int:
        return self.rows * self.tokens


@dataclass(frozen=True)
class Setup:
    """How a stage is run."""

    ranks: int
    zero: dict[str, Any] | None
    """`zero_optimization` of the DeepSpeed config; None: plain data parallelism."""
    compute_bytes: int
    accumulation: int
    checkpointing: bool
    device: str = "cuda"
    workspace: int | None = None
    teacher_mode: str = "zero3"
    """`teacher.mode`, auto resolved."""
    accumulate_bytes: int = 4
    """Bytes of DeepSpeed's gradient accumulation (`data_types.grad_accum_dtype`)."""
    whole: bool = False
    """DeepSpeed's numbers without its sharding: nothing is gathered, no bucket reduces (the dry run's one device)."""
    secondary: int = 1
    """Ranks that share second shards (hpZ, `zero_hpz_partition_size`, auto resolved); 1: there are none."""
    window: int = 1
    """Micro-batches for which the teacher runs at once in interact (`teacher.window`)."""
    persist_heads: bool = False
    """Frozen heads stay whole for an optimizer step (`training.persist_heads`)."""

    @property
    def windows(self) -> int:
        """Forwards of interact's teacher in an optimizer step."""
        return -(-self.accumulation // self.window)

    def number(self, name: str, default: float) -> float:
        value = (self.zero or {}).get(name, default)
        return default if value == "auto" else value

    def offloads(self, what: str) -> bool:
        return ((self.zero or {}).get(f"offload_{what}") or {}).get("device") in ("cpu", "nvme")


@dataclass(frozen=True)
class Spoken:
    """A role of a stage."""

    shape: ModelShape
    mode: str  # frozen, lora, full
    layers: int = 0  # target layers that are read
    verbalizer: str | None = None  # architecture, None: none takes part
    verbalizers: list[list[int]] = field(default_factory=list)  # those that run: of the target layers
    silent: list[list[int]] = field(default_factory=list)  # loaded with them, and not asked
    verbalizers_trained: bool = False
    norm: bool = False
    inner: int = 0  # inner width of the verbalizer's FFN
    output: int = 0  # width of its output
    trained_layers: int | None = None  # decoder layers that are trained, from the first; None: all
    train_vision: bool = False
    needs_last: bool = True  # the last layer's own output is wanted
    placement: str | None = None  # teacher.mode, where it holds the backbone outside the module tree (all but zero3)
    language: ModelShape | None = None  # the student, where the verbalizers translate; one of them is the last layer's

    def is_gathered(self, setup: Setup) -> bool:
        """Whether ZeRO-3 gathers the backbone's tensors."""
        return setup.zero is not None and not setup.whole and self.placement in (None, "offload")

    @property
    def grad(self) -> bool:
        return self.mode != "frozen"

    @property
    def reads_all(self) -> bool:
        """Whether verbalizers read the target layers' states at all positions, not at answers alone."""
        return (self.verbalizer or "").startswith("decoder")

    @property
    def takes_last(self) -> bool:
        """Whether the last layer's own output is read; a translating teacher's speaks through a verbalizer."""
        return self.needs_last and self.language is None

    @property
    def learning(self) -> int:
        """Layers with a loss in stage verbalize."""
        return self.layers + (self.language is not None)

    @property
    def voice(self) -> ModelShape:
        """The model through whose final norm and head the layers speak: the losses read states of its width."""
        return self.language or self.shape

    def recorded(self, batch: Batch) -> int:
        """Hidden states, d numbers each, that the forward takes for its verbalizers."""
        return len(self.verbalizers) * (batch.positions if self.reads_all else batch.answers)

    def split(self) -> tuple[list[int], list[int]]:
        """Sizes of trained and of frozen tensors in the module tree, verbalizers included."""
        shape, trained, frozen = self.shape, [], []
        if self.mode == "full":
            trained += shape.ends + [n for layer in shape.layers for n in layer]
            (trained if self.train_vision else frozen).extend(shape.vision)
        elif self.placement is None:
            frozen += shape.parameters
            if self.mode == "lora":
                kept = len(shape.lora) if self.trained_layers is None else self.trained_layers
                trained += [n for layer in shape.lora[:kept] for n in layer]
                frozen += [n for layer in shape.lora[kept:] for n in layer]
        verbalizers = (n for layer in (*self.verbalizers, *self.silent) for n in layer)
        (trained if self.verbalizers_trained else frozen).extend(verbalizers)
        return trained, frozen


@dataclass(frozen=True)
class Peak:
    """The largest sum of the curve."""

    moment: str
    columns: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.columns.values())


class Curve:
    """Live bytes by column; `moment` notes the sum at one instant, `extra` being alive only then."""

    def __init__(self, held: dict[str, int]):
        self.held: Counter[str] = Counter(held)
        self.peak: Peak | None = None
        self.moments: list[tuple[str, int]] = []
        self.largest: dict[str, int] = {}  # of each column, at whatever moment

    def hold(self, column: str, size: float) -> None:
        self.held[column] += int(size)

    def moment(self, name: str, **extra: float) -> None:
        columns = Counter(self.held)
        for column, size in extra.items():
            columns[column] += int(size)
        total = sum(columns.values())
        self.moments.append((name, total))
        for column, size in columns.items():
            self.largest[column] = max(size, self.largest.get(column, 0))
        if self.peak is None or total > self.peak.total:
            self.peak = Peak(name, dict(columns))


def held(student_and_teacher: dict[str, Spoken], setup: Setup, batch: dict[str, Batch]) -> dict[str, int]:
    """Bytes alive throughout: weights, gradients, optimizer, and the batches of one optimizer step."""
    e, columns = setup.compute_bytes, Counter()
    for role, spoken in student_and_teacher.items():
        trained, frozen = spoken.split()
        if spoken.placement is not None:
            columns["teacher"] += teacher_bytes(spoken.shape, spoken.placement, e, setup.zero is not None)
            if spoken.is_gathered(setup):  # small tensors of the offloaded teacher's own engine
                limit = setup.number("stage3_param_persistence_threshold", 1e5)
                columns["gathered"] += e * sum(n for n in spoken.shape.parameters if n <= limit)
        if spoken.language is not None:  # a plain copy of the student's norm, and its head where the student is absent
            lone = "student" not in student_and_teacher
            columns["teacher"] += e * (spoken.language.width + lone * spoken.language.head)
        if setup.zero is None:
            columns["parameters"] += 4 * sum(trained)
            columns["optimizer"] += 8 * sum(trained)
            columns["gradients"] += 4 * sum(trained) if setup.accumulation > 1 or setup.ranks > 1 else 0
            columns["teacher" if role == "teacher" else "parameters"] += e * sum(frozen)
            if e < 4:  # autocast keeps converted copies of the trained weights while there is a graph
                columns["parameters"] += e * sum(n for n in trained)
        else:
            _add_sharded(columns, role, trained, frozen, setup)
    # The Trainer takes all micro-batches of a step at once; on the CPU accelerate's loader has read one more ahead.
    # Roles whose images are cut into the same patches share them.
    on_gpu = setup.device == "cuda"
    shapes = {role: spoken.shape for role, spoken in student_and_teacher.items()}
    sources = {(s.patch_values, s.image_size, s.merge): batch[role] for role, s in reversed(shapes.items())}
    columns["inputs"] += (setup.accumulation + (not on_gpu)) * sum(
        4 * b.patches * values + 8 * 3 * b.positions for (values, _, _), b in sources.items()
    )
    return dict(columns)


def _add_sharded(columns: Counter, role: str, trained: list[int], frozen: list[int], setup: Setup) -> None:
    e, mine = setup.compute_bytes, shards(trained, setup.ranks)
    if not setup.offloads("optimizer"):
        columns["optimizer"] += 12 * mine
        columns["gradients"] += setup.accumulate_bytes * mine
    if trained and "bucket" not in columns and not setup.whole:
        columns["gradients"] += e * int(setup.number("reduce_bucket_size", 5e8))
        columns["bucket"] = 0  # one for all
    limit = setup.number("stage3_param_persistence_threshold", 1e5)
    whole = e * sum(n for n in (*trained, *frozen) if n <= limit)
    if not setup.offloads("param"):
        columns["parameters"] += e * mine
        columns["teacher" if role == "teacher" else "parameters"] += e * shards(frozen, setup.ranks)
        if setup.secondary > 1:
            columns["parameters"] += e * shards(trained, setup.secondary)
            columns["teacher" if role == "teacher" else "parameters"] += e * shards(frozen, setup.secondary)
    columns["gathered"] += 0 if setup.whole else whole


# ---- pieces of the curve ----


def layer_saved(spoken: Spoken, batch: Batch, setup: Setup) -> int:
    """Bytes that one decoder layer keeps for backward (see the module's head)."""
    s, e = spoken.shape, setup.compute_bytes
    repeated = batch.masked and s.heads > 1 and s.keys < s.queries
    numbers = 2 * s.width + 2 * s.queries + 2 * (s.queries if repeated else s.keys)
    numbers += 4 * s.ffn + s.routed * s.width
    numbers += 2 * s.width if spoken.mode == "full" else 0
    if spoken.mode == "lora" and e < 4 and setup.zero is None:  # peft holds LoRA in float32, autocast converts
        numbers += 4 * (s.lora_inputs + s.lora_ranks) // e - 2 * s.width - (0 if s.routed else s.inner)
    elif spoken.mode == "lora":
        numbers += s.lora_ranks
    mask = e * batch.rows * batch.tokens**2 if batch.masked else 0
    return batch.positions * (e * numbers + 4 * (2 * s.width + s.heads + 2 + s.recurrent_saved)) + mask


def layer_forward(shape: ModelShape, batch: Batch, setup: Setup) -> int:
    """Bytes alive inside one decoder layer without gradient, at its peak."""
    e = setup.compute_bytes
    mask = e * batch.rows * batch.tokens**2 if batch.masked else 0
    repeated = 2 * shape.queries if batch.masked and shape.keys < shape.queries else 0
    rotary = e * batch.positions * (2 * shape.width + 4 * shape.queries + 2 * shape.keys)
    attention = e * batch.positions * (2 * shape.width + 2 * shape.queries + 2 * shape.keys + repeated) + mask
    copies = shape.routed * shape.width
    ffn = e * batch.positions * (2 * shape.width + max(copies + 3 * shape.ffn, 4 * copies))
    return max(rotary, attention, ffn, batch.positions * (2 * e * shape.width + 4 * shape.recurrent))


def vision_forward(shape: ModelShape, patches: int, setup: Setup) -> int:
    """Bytes alive inside one block of the frozen vision tower: rotary embedding in float32, or its FFN."""
    e, v = setup.compute_bytes, shape.vision_width
    upcast = 2 * 4 * v if e < 4 else 0
    return patches * max(e * 5 * v + upcast + 4 * 4 * v, e * (3 * v + 2 * shape.vision_inner))


def statistics_scratch(
    rows: int, key: int, value: int, vocab: int, buffers: int, setup: Setup, frozen: bool = True
) -> int:
    """Scratch of one `stream_head_statistics` (buffers: 1, or 2 with the mean logit), as the operators plan it.

    The float16 copy of a frozen head that is kept is not part of it; of another a chunk is converted at a time.
    """
    import torch

    from vlsi_kernels import _common as common
    from vlsi_kernels._waves import MULTIPROCESSORS

    budget = setup.workspace or common.DEFAULT_WORKSPACE_BYTES.get(setup.device, common.DEFAULT_WORKSPACE_BYTES["cuda"])
    options = common.HeadOptions(vocab, 1.0, "torch", budget, None)
    if setup.device == "cpu":
        cpu = torch.device("cpu")
        row, chunk = common.plan_chunks(rows, options, torch.float32, cpu, value)
        converted = 4 * (row * key + chunk * (key + value)) if setup.compute_bytes < 4 else 0
        product = 4 * row * value * common.by_onednn(cpu, torch.float32)
        return 4 * row * chunk * buffers + converted + product
    low = torch.float32 if setup.compute_bytes == 4 else torch.float16
    row, chunk = common.plan_tiles(max(1, rows), value, low, options, key=key, sms=MULTIPROCESSORS)
    converted = 2 * chunk * value if setup.compute_bytes < 4 and not (frozen and setup.persist_heads) else 0
    return row * chunk * (4 + (low.itemsize if value else 0)) + converted


def divergence_scratch(rows: int, student: int, teacher: int, vocab: int, setup: Setup) -> int:
    """Scratch of one `linear_divergence` of `rows` tokens for heads of these widths, as the operator plans it; as for
    `statistics_scratch`."""
    import torch

    from vlsi_kernels import _common as common

    budget = setup.workspace or common.DEFAULT_WORKSPACE_BYTES.get(setup.device, common.DEFAULT_WORKSPACE_BYTES["cuda"])
    options = common.HeadOptions(vocab, 1.0, "torch", budget, None)
    low = setup.compute_bytes < 4
    if setup.device == "cpu":  # four tiles, the sums of both products, and, where converted, a chunk of both heads
        cpu = torch.device("cpu")
        row, chunk = common.plan_chunks(max(1, rows), options, torch.float32, cpu, 2 * student)
        chunk = min(-(-chunk // 256) * 128, vocab)
        anew = int(common.by_onednn(cpu, torch.float32))  # oneDNN's results: two tiles more, and both products
        chunk = min(chunk, max(common.MIN_VOCAB_CHUNK, chunk * 2 // 3)) if anew else chunk
        converted = 4 * (row + chunk) * (student + teacher) if low else 0
        return 4 * (4 + 2 * anew) * row * chunk + 4 * 2 * row * student * (1 + anew) + converted
    tile = torch.float16 if low else torch.float32
    row, chunk = common.plan_tiles(max(1, rows), 2 * student, tile, options)
    chunk = min(-(-chunk // 256) * 128, vocab)
    values = 2 * chunk * student if low and not setup.persist_heads else 0
    return 2 * row * chunk * (4 + tile.itemsize) + 4 * 2 * row * student + values


def verbalizer_saved(spoken: Spoken, batch: Batch, setup: Setup) -> int:
    """Bytes that the verbalizers of one role keep for backward, all together."""
    e, d, h = setup.compute_bytes, spoken.shape.width, spoken.inner
    kind, times = (spoken.verbalizer or "").removesuffix("_x2"), 2 if (spoken.verbalizer or "").endswith("_x2") else 1
    if kind == "decoder":
        plain = Spoken(spoken.shape, "frozen")
        return spoken.layers * times * layer_saved(plain, batch, setup)
    if spoken.language is not None and spoken.verbalizer == "mlp":  # the translation alone, which keeps its input
        return 0
    norm = (e + 4) * d if spoken.norm else 0
    block = e * d + 2 * e * h if kind in ("verb_ffn", "ffn") else e * d
    return len(spoken.verbalizers) * times * batch.answers * (block + norm)


def gathered_for(spoken: Spoken, setup: Setup, backward: bool, ahead: int) -> int:
    """Whole parameters around the running module: itself, what is prefetched, and in backward the recomputed layer.

    Every module that is called, those without parameters too, prefetches another bucket: that runs ahead of what is
    used, up to `stage3_max_live_parameters` and the tensor that steps over it.

    Args:
        ahead: elements of all parameters that the engine may still gather.
    """
    if spoken.placement == "offload" and setup.zero is None:
        return setup.compute_bytes * spoken.shape.together
    if not spoken.is_gathered(setup):
        return 0
    largest = needed = spoken.shape.together
    if backward and setup.checkpointing:
        needed += sum(spoken.shape.layers[0]) + (sum(spoken.shape.lora[0]) if spoken.mode == "lora" else 0)
    if setup.number("stage3_prefetch_bucket_size", 5e7):
        needed = max(needed, min(int(setup.number("stage3_max_live_parameters", 1e9)) + largest, ahead))
    return setup.compute_bytes * needed


def kept_for_backward(spoken: Spoken, setup: Setup, between: int) -> int:
    """Bytes of the last modules of the forward that stay whole: `stage3_max_reuse_distance` looks that far ahead."""
    if setup.zero is None or setup.whole:
        return 0
    tensors = [spoken.shape.head] if spoken.mode == "full" else []
    tensors += [n for layer in reversed(spoken.shape.layers) for n in layer]
    return setup.compute_bytes * _reused(tensors, between, setup, times=3 if setup.checkpointing else 2)


def kept_verbalizers(spoken: Spoken, setup: Setup, between: int) -> int:
    """Elements of the verbalizers that stay whole from forward to backward; `between` pass other roles' on the way."""
    return _reused([n for layer in reversed(spoken.verbalizers) for n in layer], between, setup, times=2)


def _reused(tensors: list[int], between: int, setup: Setup, times: int) -> int:
    """Elements whose next use is near enough: each later tensor is passed `times` times on the way there.

    Where backward follows at once, prefetching has also come to the end of the forward with as much as it may hold,
    finds that backward begins with the same tensors, and keeps those.
    """
    reach = setup.number("stage3_max_reuse_distance", 1e9)
    window = setup.number("stage3_max_live_parameters", 1e9) if setup.number("stage3_prefetch_bucket_size", 5e7) else 0
    kept, distance = 0, between
    for n in tensors:
        if distance >= reach and (between or kept + n > window):
            break
        kept, distance = kept + n, distance + times * n
    return kept


def gradient_scratch(spoken: Spoken, setup: Setup, largest: int) -> int:
    """Gradients on their way: DeepSpeed keeps one too large for its bucket, a copy to reduce, and the next one."""
    trained, _ = spoken.split()
    if not trained:
        return 0
    e = setup.compute_bytes
    if setup.zero is None:
        return 4 * largest
    if setup.whole:
        return e * largest
    bucket = int(setup.number("reduce_bucket_size", 5e8))
    return e * (3 * largest if largest > bucket else min(bucket, sum(trained)) + largest)


def check_zero(deepspeed: dict | None) -> dict | None:
    """`zero_optimization` of a DeepSpeed config. Raises ConfigError for stages that the arithmetic does not cover."""
    if deepspeed is None:
        return None
    zero = deepspeed.get("zero_optimization") or {}
    if zero.get("stage") != 3:
        raise ConfigError(
            f"training.deepspeed asks for ZeRO stage {zero.get('stage', 0)}; plan knows stage 3 and, with "
            "training.deepspeed null, plain data parallelism"
        )
    return zero


def optimizer_moment(curve: Curve, roles: dict[str, Spoken], setup: Setup) -> None:
    """Adam's own temporaries; activations are gone by then."""
    sizes = [n for spoken in roles.values() for n in spoken.split()[0]]
    if not sizes:
        return
    if setup.zero is None:
        gradients = 0 if curve.held["gradients"] else 4 * sum(sizes)
        # one tensor at a time on the CPU (square root and quotient), all square roots at once on a GPU
        scratch = 8 * max(sizes) if setup.device == "cpu" else 4 * sum(sizes)
        # autocast's copies are gone with the graph
        copies = setup.compute_bytes * sum(sizes) if setup.compute_bytes < 4 else 0
        curve.moment("optimizer step", gradients=gradients, optimizer=scratch, parameters=-copies)
    elif not setup.offloads("optimizer"):
        group = min(setup.number("sub_group_size", 1e9), shards(sizes, setup.ranks))
        # a flat float32 copy of a group's gradients, and the square root of its second moments
        curve.moment("optimizer step", gradients=4 * group, optimizer=4 * group)


def compute_bytes(config: RunConfig) -> int:
    """Bytes of one activation number."""
    return {"float32": 4, "bfloat16": 2}[config.dtype]
