"""Time of a step on paper: operations over peak times utilisation, bytes of ZeRO-3 over bandwidth.

Nothing here is measured. Operations count a multiply and an add as two; letters as in memory.py, T tokens of a row.

    decoder layer forward      2 x parameters a token + 4 q T a token (all of T: a mask hides, it saves nothing); of
                               experts those parameters that a token meets; linear attention in place of 4 q T its
                               products within a chunk and with its state
    backward, frozen weights   as much as forward (gradients of activations), of attention twice that, since both sides
                               of its products are activations; trained weights: twice all that has weights
    gradient checkpointing     the decoder layers' forward once more, up to the last number that backward needs
    verbalizer                 forward 2, backward 2 x parameters a token: of weights or of inputs, 4 where of both;
                               2 x the weights behind the first layers where only weights are trained
    heads                      2 N V (d_l + d_s) a teacher layer, 4 N V d_s one that speaks the student's language, a
                               student layer or an answer loss (one a layer in that language, too); a trained
                               head 4 N V d_s more. Verbalized against the own last layer: 4 N V d for that one more
    other divergences          2 N V (d_l + 3 d_s) a matched pair, Jensen-Shannon 2 N V (d_l + d_s) more; the matching
                               2 N V (d_l + d_s) a teacher layer and, without gradient, 2 N V d_s a student layer

Decoder layers that nothing reads are not there (see build.py). Traffic is ZeRO-3's: see `traffic`, which a test
compares with the bytes that DeepSpeed gathers on two ranks. With hpZ most of it stays inside a node (`inside_nodes`).
A ring brings (W - 1) / W of the bytes to each GPU over the links inside a node, and (nodes - 1) / nodes of them into
each node. A teacher in CPU memory comes over PCIe.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial

from .arguments import Machine
from .loss_memory import read_heads
from .memory import Spoken, kept_for_backward, kept_verbalizers
from .placement import pcie_bytes
from .walk import Step, after


def operations(step: Step) -> dict[str, float]:
    """FLOPs of each part of one micro-batch."""
    parts: Counter[str] = Counter()
    for role, spoken in step.roles.items():
        batch, shape = step.batches[role], spoken.shape
        seen = batch.patches / max(1, batch.rows)  # an image a row: patches attend to those of their image
        attention = sum(each * min(seen, most) for each, most in shape.vision_attention)
        vision = batch.patches * (shape.vision_flops + attention)
        forward = _decoder_forward(spoken, batch.positions, batch.tokens)
        parts[f"{role} vision"] += vision * (3 if spoken.train_vision else 1)
        parts[f"{role} forward"] += forward
        if spoken.grad:
            weights = 2.0 * batch.positions * sum(_trained_in_layers(spoken))
            lora = 2.0 * batch.positions * sum(_trained_in_layers(spoken)) if spoken.mode == "lora" else 0.0
            parts[f"{role} forward"] += lora
            parts[f"{role} backward"] += forward + _attention(spoken, batch.positions, batch.tokens) + lora + weights
            if step.setup.checkpointing:
                # a layer's last product is not made again where nothing behind it is kept (of LoRA's, its input is)
                spared = spoken.mode == "full" and not shape.norm_behind
                last = 2.0 * batch.positions * shape.inner * shape.width * shape.depth * spared
                parts[f"{role} recomputation"] += forward + lora - last
        if spoken.verbalizer:
            tokens = batch.positions if spoken.verbalizer.startswith("decoder") else batch.answers
            backward = 2 if spoken.verbalizers_trained or spoken.grad else 0
            backward += 2 if spoken.verbalizers_trained and spoken.grad else 0
            size = sum(n for layer in spoken.verbalizers for n in layer)
            parts[f"{role} verbalizers"] += (2.0 + backward) * tokens * size
            if spoken.verbalizers_trained and not spoken.grad:
                parts[f"{role} verbalizers"] += 2.0 * tokens * sum(map(partial(_behind, spoken), spoken.verbalizers))
    parts["heads"] = _heads(step)
    return {name: value for name, value in parts.items() if value}


def _decoder_forward(spoken: Spoken, positions: int, tokens: int) -> float:
    products = 2.0 * sum(spoken.shape.active)
    return positions * products + _attention(spoken, positions, tokens)


def _attention(spoken: Spoken, positions: int, tokens: int) -> float:
    """Of a forward: scores, and their product with the values; of linear attention its products without weights."""
    shape = spoken.shape
    attending = sum(not each for each in shape.recurrence)
    return positions * (4.0 * shape.queries * tokens * attending + sum(shape.recurrence))


def _behind(spoken: Spoken, sizes: list[int]) -> int:
    """Of a verbalizer's weights those through which a gradient runs back to its first layers' weights."""
    kind, d, out = spoken.verbalizer.removesuffix("_x2"), spoken.shape.width, spoken.output
    if kind == "decoder":
        return sum(sizes)
    if d in sizes:  # a trained norm in front of all of them; a translation's own map has none
        return sum(sizes) - d - d * out * (spoken.language is not None)
    down, maps = (spoken.inner, 2 * d * spoken.inner) if kind in ("verb_ffn", "ffn") else (0, d * out)
    if not spoken.verbalizer.endswith("_x2"):
        return down * out
    return down * d + down * out + maps


def _trained_in_layers(spoken: Spoken) -> list[int]:
    layers = spoken.shape.lora if spoken.mode == "lora" else spoken.shape.layers
    return [n for layer in layers for n in layer]


def _heads(step: Step) -> float:
    """Vocabulary passes, DESIGN's count."""
    v, total = step.vocab, 0.0
    if step.stage == "verbalize":
        own = step.settings.needs_last
        return sum(
            4.0 * (s.learning + own) * step.batches[r].answers * v * s.voice.width for r, s in step.roles.items()
        )
    if step.stage == "build":
        found, (teacher, batch) = step.recalled, (step.roles["teacher"].voice, step.batches["teacher"])
        both = 0 if found.has_states else teacher.width + found.student_width
        return 2.0 * batch.answers * v * both * found.kept
    student = step.roles["student"]
    n, d = step.batches["student"].answers, student.shape.width
    if step.stage == "sft":
        return 4.0 * n * v * d * (2 if student.mode == "full" else 1)
    settings = step.settings
    layers = student.layers * settings.matches_by_kl
    last = settings.last_by_forward_kl
    if layers + last:
        products = 4.0 if settings.kld_is_forward else 2.0
        total += n * v * d * (products * layers + 4.0 * last)
        if step.has_states:  # else its targets come with the rows
            total += 2.0 * n * v * (step.teacher_width + d) * ((step.teacher_layers if layers else 0) + last)
    if step.pairs:
        both = step.teacher_width + d
        total += 2.0 * n * v * step.pairs * (both * (2 if settings.divergence == "jsd" else 1) + 2 * d)
    answers = student.layers * (settings.intermediate == "ce") + (settings.last == "ce")
    return total + 4.0 * n * v * d * answers


def traffic(step: Step) -> dict[str, float]:
    """Bytes of whole tensors that ZeRO-3 moves for one micro-batch, before the ring's share; plain: gradients alone.

    Tensors above the persistence threshold are gathered for their forward, and those that a gradient runs through once
    more for backward, unless `stage3_max_reuse_distance` keeps them. Under gradient checkpointing the recomputation
    gathers decoder layers. Trained tensors then stay for the backward that follows, but frozen ones are released with
    the first module of the layer that has finished its backward, and gathered a third time. With prefetching the
    deepest layer's last tensor is still there even where a teacher ran between. Heads that are kept whole
    (`training.persist_heads`) are gathered once an optimizer step; a tied one as embedding as often as before. A
    translating teacher's is the student's, which verbalize then gathers for each of the two.
    """
    setup, moved = step.setup, Counter()
    e = setup.compute_bytes
    limit = setup.number("stage3_param_persistence_threshold", 1e5)
    for role, spoken in step.roles.items():
        trained, _ = spoken.split()
        if setup.zero is None:
            moved["gradients"] += 2.0 * 4 * sum(trained) / setup.accumulation  # all-reduce, once a step
            continue
        shape = spoken.shape
        total = sum(n for layer in spoken.verbalizers for n in layer if n > limit)
        if spoken.grad or spoken.verbalizers_trained:  # the last ones of the forward may be kept for backward
            kept = kept_verbalizers(spoken, setup, after(step, role))
            total += max(0, sum(n for layer in spoken.verbalizers for n in layer if n > limit) - kept)
        if spoken.is_gathered(setup):
            total += sum(n for n in shape.parameters if n > limit)
            total += shape.head if shape.tied and shape.has_head else 0  # as embedding and as head
        head = spoken.language is None and spoken.is_gathered(setup) and shape.head > limit
        kept = setup.persist_heads and role in read_heads(step) and head
        total -= shape.head if kept else 0
        if step.stage == "verbalize" and head and not kept:
            total += shape.head * sum(step.head_role(other) == role != other for other in step.roles)
        if role == "teacher" and step.windowed:
            total *= setup.windows / setup.accumulation
        elif step.windowed and (step.settings.matches_by_kl or step.settings.last_by_forward_kl) and not kept:
            total += shape.head * setup.windows / setup.accumulation  # for the targets, beside each micro-batch's own
        total += shape.head / setup.accumulation if kept else 0
        if spoken.grad:
            total += _for_backward(step, role, limit)
        moved[f"{role} gathers"] += e * total
        moved["gradients"] += e * sum(trained)
    return {name: value for name, value in moved.items() if value}


def _for_backward(step: Step, role: str, limit: float) -> int:
    """Elements of a trained backbone that are gathered beyond the forward's once."""
    spoken, setup, shape = step.roles[role], step.setup, step.roles[role].shape
    large = [[n for n in layer if n > limit] for layer in shape.layers]
    kept = kept_for_backward(spoken, setup, after(step, role)) // setup.compute_bytes
    again = max(0, sum(map(sum, large)) - max(0, kept - (shape.head if spoken.mode == "full" else 0)))
    if setup.number("stage3_prefetch_bucket_size", 5e7) and not kept:
        again -= max(large[-1], default=0)
    if spoken.mode == "full":
        ends = shape.head if again and not shape.tied else 0  # the embedding
        ends += 0 if kept else shape.head
        return again + ends + (sum(n for n in shape.vision if n > limit) if spoken.train_vision else 0)
    lora = [n for layer in shape.lora[: spoken.trained_layers] for n in layer if n > limit]
    total = again + sum(n for layer in shape.lora for n in layer if n > limit) + (sum(lora) if again else 0)
    return total + (sum(map(sum, large)) if setup.checkpointing else 0)


def inside_nodes(step: Step, moved: dict[str, float]) -> float:
    """Bytes of `traffic` that do not leave a machine: what second shards (hpZ) give.

    All gathers of frozen tensors, and those of trained ones but the first of an optimizer step. An offloaded teacher's
    engine has no second shards.
    """
    if step.setup.secondary <= 1:
        return 0.0
    near, e = 0.0, step.setup.compute_bytes
    limit = step.setup.number("stage3_param_persistence_threshold", 1e5)
    for role, spoken in step.roles.items():
        if spoken.placement is None:
            first = e * sum(n for n in spoken.split()[0] if n > limit) / step.setup.accumulation
            near += max(0.0, moved.get(f"{role} gathers", 0.0) - first)
    return near


def over_pcie(step: Step) -> float:
    """Bytes that each GPU takes from CPU memory for one micro-batch (teacher.mode offload)."""
    setup, limit = step.setup, step.setup.number("stage3_param_persistence_threshold", 1e5)
    share = setup.windows / setup.accumulation if step.windowed else 1.0
    return share * sum(
        pcie_bytes(spoken.shape, spoken.placement, setup.compute_bytes, setup.ranks, setup.zero is not None, limit)
        for spoken in step.roles.values()
    )


def communication_seconds(size: float, machine: Machine, near: float = 0.0) -> float:
    """Time of a ring over all ranks for `size` bytes: the slower of the links inside nodes and those between.

    `near` of the bytes go round inside each node alone, before or after the others.
    """
    far = size - near
    inside = far * (machine.ranks - 1) / machine.ranks / machine.link_bytes
    between = far * (machine.nodes - 1) / machine.nodes / machine.network_bytes
    return max(inside, between) + near * (machine.gpus - 1) / machine.gpus / machine.link_bytes


@dataclass(frozen=True)
class Speed:
    """One optimizer step of all ranks."""

    compute_seconds: float
    communication_seconds: float
    samples: int
    """Rows that all ranks read in it."""
    pcie_seconds: float = 0.0

    @property
    def hidden(self) -> float:
        """Seconds, communication and copies wholly behind computation: a lower bound."""
        return max(self.compute_seconds, self.communication_seconds, self.pcie_seconds)

    @property
    def exposed(self) -> float:
        """Seconds, nothing overlapped: an upper bound."""
        return self.compute_seconds + self.communication_seconds + self.pcie_seconds

    def days(self, samples: int) -> tuple[float, float]:
        """From lower to upper bound, for so many rows."""
        steps = samples / self.samples
        return steps * self.hidden / 86400, steps * self.exposed / 86400


def speed(step: Step, machine: Machine) -> Speed:
    """Predicted time of one optimizer step."""
    times = step.setup.accumulation
    compute = times * sum(operations(step).values()) / (machine.peak_flops * machine.utilisation)
    found = traffic(step)
    moved = times * communication_seconds(sum(found.values()), machine, inside_nodes(step, found))
    rows = next(iter(step.batches.values())).rows
    copied = times * over_pcie(step) / machine.pcie_bytes
    return Speed(compute, moved, times * rows * machine.ranks, copied)
