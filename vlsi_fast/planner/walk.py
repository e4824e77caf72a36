"""The memory curve of one micro-batch and the optimizer step behind it, in the order in which the stages do things.

Letters as in memory.py; S, L target layers of student and teacher. Each function notes what it adds and why.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..config_stages import InteractConfig, SftConfig, VerbalizeConfig
from .loss_memory import (
    answer_loss,
    divergence,
    head_bytes,
    kl,
    own_output,
    read_heads,
    teacher_statistics,
    whole,
)
from .memory import (
    Batch,
    Curve,
    Setup,
    Spoken,
    gathered_for,
    gradient_scratch,
    held,
    kept_for_backward,
    layer_forward,
    layer_saved,
    optimizer_moment,
    verbalizer_saved,
    vision_forward,
)
from .placement import running_layer
from .recalled import Recalled, hold_recalled, recall


@dataclass(frozen=True)
class Step:
    """A stage as the planner walks it."""

    stage: str
    roles: dict[str, Spoken]
    batches: dict[str, Batch]
    setup: Setup
    vocab: int
    settings: VerbalizeConfig | InteractConfig | SftConfig
    """The stage's own section of the config."""
    matched: int = 1
    """Teacher layers of a student layer (matching.k)."""
    recalled: Recalled | None = None
    """What a cache says in place of a teacher; of stage `build`, what is written."""

    @property
    def windowed(self) -> bool:
        """Whether the teacher runs once for several micro-batches, before them."""
        return self.setup.window > 1 and self.stage == "interact" and "teacher" in self.roles

    @property
    def has_states(self) -> bool:
        """Whether hidden states of the teacher are there to be compared: from itself, or from a cache."""
        return "teacher" in self.roles or (self.recalled is not None and self.recalled.has_states)

    @property
    def teacher_layers(self) -> int:
        """Its target layers; 0 where no loss reads the teacher."""
        found = self.roles.get("teacher") or self.recalled
        return 0 if found is None else found.layers

    @property
    def teacher_width(self) -> int:
        """Of the hidden states (`has_states`)."""
        return self.roles["teacher"].voice.width if self.recalled is None else self.recalled.width

    def head_role(self, role: str) -> str:
        """Whose head a role's layers speak through: a translating teacher's through the student's, where that is here.
        Else it is a copy of the teacher's own."""
        return "student" if self.roles[role].language is not None and "student" in self.roles else role

    @property
    def headless(self) -> bool:
        """Whether verbalizers' outputs are compared as they are, without norm and head."""
        return self.stage == "interact" and self.settings.headless

    @property
    def pairs(self) -> int:
        """Pairs that `linear_divergence` reads in interact, matched and last layers; 0 where kld is the forward KL."""
        layers = self.roles["student"].layers * self.matched * self.settings.layers_by_other_divergence
        return layers + self.settings.last_by_other_divergence


def walk(step: Step) -> Curve:
    """Held bytes, forward, losses, backward, optimizer."""
    curve = Curve(held(step.roles, step.setup, step.batches))
    if step.recalled is not None:
        hold_recalled(curve, step)
    curve.moment("at rest")
    if step.setup.persist_heads and not _taught_first(step):
        _keep_heads(curve, step)
    {"verbalize": _verbalize, "interact": _interact, "sft": _sft}[step.stage](curve, step)
    if step.setup.persist_heads:  # released after the last loss
        for column, size in head_bytes(step, *read_heads(step), released=True).items():
            curve.hold(column, -size)
    optimizer_moment(curve, step.roles, step.setup)
    return curve


def _taught_first(step: Step) -> bool:
    """Whether the first read of a step's heads comes after the only forward of the teacher: then that runs without."""
    return step.windowed and step.setup.windows == 1


def _keep_heads(curve: Curve, step: Step) -> None:
    """The curve is that of a micro-batch between the first and the last, where heads are whole throughout."""
    for column, size in head_bytes(step, *read_heads(step)).items():
        curve.hold(column, size)


def after(step: Step, role: str) -> int:
    """Elements that ZeRO-3's trace passes between a role's forward and its backward: those of the roles behind it."""
    names = [name for name in step.roles if not (name == "teacher" and step.windowed)]  # it has an engine of its own
    total = 0
    for spoken in (step.roles[name] for name in names[names.index(role) + 1 :]):
        verbalizers = sum(n for layer in spoken.verbalizers for n in layer)
        backbone = sum(spoken.shape.parameters) if spoken.placement is None else 0
        total += backbone + verbalizers * (2 if spoken.verbalizers_trained else 1)
    return total


# ---- forward ----


def _frozen_forward(curve: Curve, step: Step, role: str) -> None:
    """A backbone without gradient; holds on to its answer positions, (L + 1) N d, at the end (L R d + N d for decoder
    verbalizers). A translating teacher's last layer is read as its target layers are."""
    spoken, batch, setup = step.roles[role], step.batches[role], step.setup
    e, d, shape = setup.compute_bytes, spoken.shape.width, spoken.shape
    around = _mask_and_positions(spoken, batch, setup) + _model_inputs(spoken, batch, setup)
    _vision(curve, step, role)
    recorded = spoken.recorded(batch) * d * e
    gathered = _gathered(step, role)
    inside = recorded + layer_forward(shape, batch, setup) + running_layer(shape, spoken.placement, batch.positions)
    curve.moment(f"{role} forward", activations=around + inside, gathered=gathered)
    taken = (spoken.recorded(batch) + spoken.takes_last * batch.answers) * d * e
    # the last hidden state, its float32 norm and the norm's output beside all that is recorded
    norm = batch.positions * d * (2 * e + (8 if e < 4 else 4))
    curve.moment(f"{role} final norm", activations=around + recorded + norm)
    curve.hold("activations", taken)


def _trained_forward(curve: Curve, step: Step, role: str) -> int:
    """The student's backbone with gradient. Returns bytes kept for each decoder layer; its final norm's are held."""
    spoken, batch, setup = step.roles[role], step.batches[role], step.setup
    e, d, shape = setup.compute_bytes, spoken.shape.width, spoken.shape
    _vision(curve, step, role)
    curve.hold("activations", _mask_and_positions(spoken, batch, setup))
    saved = layer_saved(spoken, batch, setup)
    each = e * batch.positions * d if setup.checkpointing else saved
    curve.hold("activations", each * shape.depth)
    inside = layer_forward(shape, batch, setup) if setup.checkpointing else 0
    inside += _model_inputs(spoken, batch, setup)
    if e < 4 and not setup.checkpointing:  # a norm keeps a float32 copy, so the hooks hold a tensor of their own
        inside += spoken.recorded(batch) * d * e
    curve.moment(f"{role} forward", activations=inside, gathered=_gathered(step, role))
    curve.hold("activations", 4 * batch.positions * d)  # the final norm's input in float32
    curve.moment(f"{role} final norm", activations=batch.positions * d * (4 + 2 * e))
    curve.hold("activations", (spoken.layers + 1) * batch.answers * d * e)
    return each


def _vision(curve: Curve, step: Step, role: str) -> None:
    spoken, batch, setup = step.roles[role], step.batches[role], step.setup
    if not batch.patches:
        return
    alone = 2 * setup.compute_bytes * max(spoken.shape.vision) if spoken.is_gathered(setup) else 0
    gathered = max(alone, _gathered(step, role))
    inside = vision_forward(spoken.shape, batch.patches, setup) + _pixels(spoken, batch, setup)
    curve.moment(f"{role} vision", activations=inside, gathered=gathered)


def _gathered(step: Step, role: str) -> int:
    """In a forward: prefetching may run ahead with this role, those behind it and what backward needs of the others."""
    spoken, names = step.roles[role], list(step.roles)
    if spoken.placement or (role == "teacher" and step.windowed):  # an engine of its own
        return gathered_for(spoken, step.setup, backward=False, ahead=sum(spoken.shape.parameters))
    names = [name for name in names if not (name == "teacher" and step.windowed)]
    ahead = 0
    for name in names:
        trained, frozen = step.roles[name].split()
        done = names.index(name) < names.index(role) and not step.roles[name].grad
        ahead += sum(trained) + (0 if done else sum(frozen))
    return gathered_for(spoken, step.setup, backward=False, ahead=ahead)


def _pixels(spoken: Spoken, batch: Batch, setup: Setup) -> int:
    """The processor's float32 pixels in the compute dtype, which the stock forward's frame holds throughout."""
    return setup.compute_bytes * batch.patches * spoken.shape.patch_values if setup.compute_bytes < 4 else 0


def _mask_and_positions(spoken: Spoken, batch: Batch, setup: Setup) -> int:
    """One byte for each pair of positions, and cos and sin of the rotary embedding; both for each kind of layers."""
    head_dim = spoken.shape.queries // spoken.shape.heads
    mask = batch.rows * batch.tokens**2 if batch.masked else 0
    return spoken.shape.kinds * (mask + 2 * setup.compute_bytes * batch.positions * head_dim)


def _model_inputs(spoken: Spoken, batch: Batch, setup: Setup) -> int:
    """What the stock forward's frame holds while the language model runs: its input embeddings, the vision tower's last
    hidden state, and the image embeddings twice (by image, and joined)."""
    shape = spoken.shape
    images = batch.patches * shape.vision_width + 2 * batch.patches // shape.merge * shape.width
    return setup.compute_bytes * (batch.positions * shape.width + images) + _pixels(spoken, batch, setup)


def _speak(curve: Curve, step: Step, role: str, grad: bool) -> None:
    """Verbalizers and final norm: holds what backward needs, and the result [verbalizers, N, width]."""
    spoken, batch, setup = step.roles[role], step.batches[role], step.setup
    e, rows = setup.compute_bytes, len(spoken.verbalizers) * batch.answers
    out = spoken.output
    gathered = setup.compute_bytes * max((sum(v) for v in spoken.verbalizers), default=0)
    gathered = gathered if setup.zero and not setup.whole else 0
    saved = verbalizer_saved(spoken, batch, setup) if grad else 0
    # the layers' outputs, and their stack
    curve.moment(f"{role} verbalizers", activations=saved + 2 * e * rows * out, gathered=gathered)
    # the final norm: a float32 copy that backward needs (in float32: the stack itself), and its output
    curve.moment(f"{role} verbalized norm", activations=saved + rows * out * (e + (8 if e < 4 else 4) + 2 * e))
    curve.hold("activations", saved + (4 * rows * out if grad and not step.headless else 0) + e * rows * out)
    if not grad:
        curve.hold("activations", -e * spoken.recorded(batch) * spoken.shape.width)  # their inputs are free


# ---- backward ----


def _own_output_backward(curve: Curve, step: Step, role: str) -> None:
    """Differences of the expectations, their sum and the gradient; then the expectations are free."""
    spoken, batch, d = step.roles[role], step.batches[role], step.roles[role].shape.width
    rows, columns = spoken.layers * batch.answers, 1 + (step.settings.objective == "both")
    curve.moment(f"{role} KL backward", workspace=rows * d * (2 * 4 + step.setup.compute_bytes))
    curve.hold("targets", -4 * (rows * d + columns * batch.answers * (d + 1)))


def _student_backward(curve: Curve, step: Step, each: int, between: int) -> None:
    """From the deepest decoder layer to the first; `each` bytes a layer are given back on the way."""
    spoken, batch, setup = step.roles["student"], step.batches["student"], step.setup
    e, shape = setup.compute_bytes, spoken.shape
    hidden = e * batch.positions * shape.width
    # where verbalizers read all positions, the gradients of all target layers' states are there before the first
    # layer's turn; else index_select makes a layer's [R, d] when its turn comes
    waiting = spoken.layers if spoken.reads_all else 0
    recomputed = layer_saved(spoken, batch, setup) if setup.checkpointing else 0
    inside = recomputed + e * batch.positions * (shape.width + 2 * shape.ffn + 2 * shape.routed * shape.width)
    if spoken.mode == "lora" and e < 4 and not shape.routed:
        # the float32 gradient of the adapted input beside the frozen layer's
        inside = recomputed + batch.positions * ((e + 4) * shape.width + (e + 4) * shape.inner)
    trained = shape.layers[0] if spoken.mode == "full" else shape.lora[0]
    scratch = gradient_scratch(spoken, setup, max(trained, default=0))
    gathered = gathered_for(spoken, setup, backward=True, ahead=sum(map(sum, spoken.split())))
    kept = kept_for_backward(spoken, setup, between)
    for i in reversed(range(shape.depth)):
        curve.moment(
            f"student backward, layer {i + 1}",
            activations=inside + (waiting + 1) * hidden,
            gradients=scratch,
            gathered=max(gathered, kept),
        )
        curve.hold("activations", -each)
        if setup.zero is None and setup.accumulation == 1:
            layer = shape.layers[i] if spoken.mode == "full" else shape.lora[i]
            curve.hold("gradients", 4 * sum(layer))
        waiting = waiting * i // shape.depth
        kept = max(0, kept - e * sum(shape.layers[i]))
    if spoken.mode == "full":
        scratch = gradient_scratch(spoken, setup, shape.head)
        curve.moment("embedding backward", activations=hidden, gradients=scratch)


def _verbalizers_backward(curve: Curve, step: Step, role: str) -> None:
    """One verbalizer after another; its SwiGLU's backward holds eight float32 numbers of its inner width a token."""
    spoken, batch, setup = step.roles[role], step.batches[role], step.setup
    rows = batch.answers
    saved = verbalizer_saved(spoken, batch, setup)
    incoming = (4 + setup.compute_bytes) * len(spoken.verbalizers) * rows * spoken.output
    for sizes in reversed(spoken.verbalizers):
        scratch = gradient_scratch(spoken, setup, max(sizes)) if spoken.verbalizers_trained else 0
        inside = incoming + 8 * 4 * rows * spoken.inner
        curve.moment(f"{role} verbalizers backward", activations=inside, gradients=scratch)
        curve.hold("activations", -saved / len(spoken.verbalizers))
        if spoken.verbalizers_trained and setup.zero is None and setup.accumulation == 1:
            curve.hold("gradients", 4 * sum(sizes))


# ---- stages ----


def _verbalize(curve: Curve, step: Step) -> None:
    for role, spoken in step.roles.items():
        _frozen_forward(curve, step, role)
        _speak(curve, step, role, grad=True)
        if step.settings.needs_last:
            own_output(curve, step, role)
        else:
            answer_loss(curve, step, role, spoken.learning, trained_head=False)
    for role in reversed(step.roles):
        if step.settings.needs_last:
            _own_output_backward(curve, step, role)
        _verbalizers_backward(curve, step, role)


def _window(curve: Curve, step: Step, teachers: int) -> int:
    """The teacher's forward for a window, before the student's: holds what the losses of its micro-batches read.

    Returns bytes of one micro-batch's share.
    """
    spoken, one, count, setup = step.roles["teacher"], step.batches["teacher"], step.setup.window, step.setup
    window = dataclasses.replace(
        one, rows=count * one.rows, answers=count * one.answers, patches=count * one.patches, masked=True
    )
    inputs = 4 * window.patches * spoken.shape.patch_values + 8 * 3 * window.positions  # joined, beside their parts
    curve.hold("inputs", inputs)
    before, targets = curve.held["activations"], curve.held["targets"]
    joined = dataclasses.replace(step, batches=step.batches | {"teacher": window})
    _frozen_forward(curve, joined, "teacher")
    if spoken.verbalizer:
        _speak(curve, joined, "teacher", grad=False)
    row = setup.compute_bytes * one.answers * spoken.voice.width
    if setup.persist_heads and _taught_first(step):
        _keep_heads(curve, step)
    if teachers:
        curve.hold("activations", row * teachers)  # torch.cat of the layers and the last, a micro-batch at a time
        with whole(curve, step, "student", "teacher"):
            for _ in range(count):
                teacher_statistics(curve, step, teachers)
        curve.hold("activations", -row * teachers)
    settings = step.settings
    kept = spoken.layers * settings.reads_teacher_layers + settings.reads_teacher_last
    curve.hold("targets", count * kept * row)
    curve.moment("teacher's window")
    curve.hold("activations", before - curve.held["activations"])
    curve.hold("inputs", -inputs)
    return (curve.held["targets"] - targets) // count


def _interact(curve: Curve, step: Step) -> None:
    student, settings = step.roles["student"], step.settings
    hears, taught = "teacher" in step.roles, "teacher" in step.roles or step.recalled is not None
    students = student.layers * settings.matches_by_kl
    last = settings.last_by_forward_kl
    teachers = (step.teacher_layers if students else 0) + last if taught else 0
    waiting = _window(curve, step, teachers) * (step.setup.window - 1) if step.windowed else 0
    each = _trained_forward(curve, step, "student")
    if student.verbalizer:
        _speak(curve, step, "student", grad=True)
    before = curve.held["activations"]
    if step.recalled is not None:
        recall(curve, step)
    if hears and not step.windowed:
        _frozen_forward(curve, step, "teacher")
        if step.roles["teacher"].verbalizer:
            _speak(curve, step, "teacher", grad=False)
    n, width = step.batches["student"].answers, student.shape.width
    if students or last:
        kl(curve, step, students + last, teachers, grad=settings.kld_is_forward)
    if step.pairs:
        divergence(curve, step)
    if settings.headless:  # the differences of all pairs, kept by square()
        teacher = step.roles["teacher"]
        curve.hold("activations", 4 * student.layers * teacher.layers * n * teacher.shape.width)
        curve.moment("hidden L2")
    if "l2" in (settings.intermediate, settings.last) and not settings.headless:
        other = step.teacher_width
        curve.hold("workspace", 4 * (width**2 + width * other + other**2))  # Gram matrices
    if settings.learns_answers:
        rows = student.layers if settings.intermediate == "ce" else 1
        answer_loss(curve, step, "student", rows, trained_head=False)
    if taught:
        curve.hold("activations", before - curve.held["activations"])  # the teacher's part and the losses' are free
    curve.hold("targets", waiting - curve.held["targets"])  # those of the window's further micro-batches stay
    if student.verbalizer:
        _verbalizers_backward(curve, step, "student")
    _student_backward(curve, step, each, after(step, "student"))


def _sft(curve: Curve, step: Step) -> None:
    each = _trained_forward(curve, step, "student")
    answer_loss(curve, step, "student", 1, trained_head=step.roles["student"].mode == "full")
    _student_backward(curve, step, each, 0)
