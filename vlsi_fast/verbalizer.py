"""Verbalizers: small networks that turn a hidden state into one that the frozen language head can read.

    verbalized distribution = softmax(head(final_norm(verbalizer(h_k))))        VLsI, section 3.1; table 4f

    d  width of the backbone        f  its FFN's inner width        N  tokens        B, T  rows, positions

| name         | one block                                         | parameters of a block, without norm |
|--------------|---------------------------------------------------|-------------------------------------|
| mlp          | linear d -> d                                     | d^2                                 |
| verb_ffn     | SwiGLU d -> d -> d                                | 3 d^2                               |
| ffn          | SwiGLU d -> f -> d, the backbone's own FFN shape  | 3 d f                               |
| decoder      | the backbone's decoder layer, without biases      | 3 d f + attention                   |
| .._x2        | two blocks (mlp_x2: an activation between them)   | twice that                          |

A *translating* verbalizer (`verbalizer.language: student`) makes a teacher's layer speak through the student's norm and
head, whose width is d_s. Its last block ends at that width, and a linear map A is added to what the blocks give:

    translated distribution = softmax(head_s(final_norm_s(A h_k + blocks(h_k))))        A [d_s, d], counted besides

The blocks' last matrix starts at zero, and A where `translation.start_map` puts it. An mlp is A alone.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vlsi_kernels import verb_ffn

from .backbones import family_of
from .ranks.sharding import gather_state, gathered, load_state, rank, sharded_init
from .weights import VERBALIZER_CONFIG as CONFIG_NAME
from .weights import VERBALIZER_WEIGHTS as WEIGHTS_NAME


@dataclass(frozen=True)
class VerbalizerSpec:
    """All that is needed to rebuild the verbalizers of one backbone, kept as JSON beside their weights."""

    architecture: str
    """One of the eight of table 4f."""
    layers: tuple[int, ...]
    """Target layers; k is the hidden state after k decoder layers."""
    hidden_size: int
    """Width of the backbone, d."""
    intermediate_size: int
    """Inner width of the backbone's FFN, f."""
    rms_norm_eps: float
    """Epsilon of the optional norm."""
    norm: bool = False
    """RMSNorm in front of every block."""
    residual: bool = False
    """Block output is added to its input."""
    output_size: int | None = None
    """Width of the output where it differs from d (the headless ablation of appendix D; a student's d_s)."""
    translates: bool = False
    """Whether they speak through another model's final norm and head, of width `output_size` (None: d as well)."""
    model_type: str = ""
    """transformers model type of the backbone."""
    backbone_config: dict | None = None
    """The backbone's configuration, stored for decoder verbalizers only."""
    made_for: dict = field(default_factory=dict)
    """What they were trained on: the backbone's path, digests of checkpoint and tokenizer, layers, settings, objective
    (`verbalize.objective`; absent from older ones, which learnt the answers)."""

    @classmethod
    def of(
        cls, config, layers, settings, output_size: int | None = None, made_for=None, translates: bool = False
    ) -> VerbalizerSpec:
        """Spec for a backbone's `transformers` config, target layers and a `VerbalizerConfig`."""
        text = config.get_text_config()
        decoder = settings.architecture.startswith("decoder")
        return cls(
            architecture=settings.architecture,
            layers=tuple(layers),
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            rms_norm_eps=text.rms_norm_eps,
            norm=settings.norm,
            residual=settings.residual,
            output_size=None if output_size in (None, text.hidden_size) else output_size,
            model_type=config.model_type,
            backbone_config=config.to_dict() if decoder else None,
            made_for=made_for or {},
            translates=translates,
        )

    @property
    def is_decoder(self) -> bool:
        """Decoder verbalizers attend, so they need the whole sequence; all others work token by token."""
        return self.architecture.startswith("decoder")


class _Block(nn.Module):
    """One token-wise block: [.., d] -> [.., out], with optional activation and norm in front, residual around.

    It owns its weights itself (no nn.Linear children), so that ZeRO-3 gathers them for this forward.

    Args:
        spec: of the verbalizer.
        inner: inner width; None: one linear map.
        out: width of the output.
        residual: add the input, which has that width too.
        silent: start at zero, so that at first only what the output is added to is heard.
        activate: activate the input.
        impl: of `vlsi_kernels.verb_ffn`.
    """

    def __init__(
        self, spec: VerbalizerSpec, inner: int | None, out: int, residual: bool, silent: bool, activate: bool, impl: str
    ):
        super().__init__()
        d = spec.hidden_size
        self.residual, self.activate, self.impl = residual, activate, impl
        if spec.norm:
            self.norm = nn.RMSNorm(d, eps=spec.rms_norm_eps)
        if inner is None:
            self.linear = _weight(out, d)
        else:
            self.gate, self.up, self.down = _weight(inner, d), _weight(inner, d), _weight(out, inner)
        if silent:
            nn.init.zeros_(self.linear if inner is None else self.down)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.silu(x) if self.activate else x
        h = self.norm(h) if hasattr(self, "norm") else h
        if hasattr(self, "linear"):
            h = nn.functional.linear(h, self.linear)
        else:
            h = verb_ffn(h, self.gate, self.up, self.down, impl=self.impl)
        return x + h if self.residual else h


def _weight(rows: int, columns: int) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, columns))
    nn.init.kaiming_uniform_(weight, a=5**0.5)  # nn.Linear's own
    return weight


class Verbalizer(nn.Module):
    """Verbalizer of one target layer.

    `forward(x [.., d], **attention) -> [.., output width]`; a decoder verbalizer takes x [B, T, d] and the keyword
    arguments with which the backbone called its own decoder layer (mask, position embeddings).
    """

    def __init__(self, spec: VerbalizerSpec, layer: int, impl: str = "auto"):
        super().__init__()
        kind, times = spec.architecture.removesuffix("_x2"), 2 if spec.architecture.endswith("_x2") else 1
        out = spec.output_size or spec.hidden_size
        if kind == "decoder":
            self.blocks = nn.ModuleList(_decoder_layer(spec, layer) for _ in range(times))
        else:
            inner = {"mlp": None, "verb_ffn": out, "ffn": spec.intermediate_size}[kind]
            self.blocks = nn.ModuleList()
            for i in range(0 if spec.translates and spec.architecture == "mlp" else times):
                last = i == times - 1
                residual = spec.residual and not (spec.translates and last)  # A is there instead
                # mlp_x2: two linear maps in a row would be one, so its second block activates its input
                activate = kind == "mlp" and i > 0
                # silent: what the final norm and head make of the hidden state itself, or of its translation
                silent = residual or (spec.translates and last)
                width = out if last else spec.hidden_size
                self.blocks.append(_Block(spec, inner, width, residual, silent, activate, impl))
        self.translation = _Translation(spec.hidden_size, out) if spec.translates else None

    def forward(self, x: Tensor, **attention) -> Tensor:
        said = x
        for block in self.blocks:
            said = block(said, **attention)
        if self.translation is None:
            return said
        translated = self.translation(x)
        return translated + said if len(self.blocks) else translated


class _Translation(nn.Module):
    """The linear map A of a translating verbalizer: [.., d] -> [.., d_s]."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.weight = _weight(out, width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def _decoder_layer(spec: VerbalizerSpec, layer: int) -> nn.Module:
    """The backbone's stock decoder layer; norms follow `spec.norm`, and table 4f's count leaves no room for biases."""
    from transformers import AutoConfig

    fields = copy.deepcopy(spec.backbone_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    module = family_of(config).new_decoder_layer(config, layer - 1)
    for child in module.modules():
        if isinstance(child, nn.Linear):
            child.bias = None
            with gathered([child.weight], writer=0), torch.no_grad():
                nn.init.normal_(child.weight, std=child.in_features**-0.5)
    if not spec.norm:
        for name, _ in list(module.named_children()):
            if "norm" in name:
                setattr(module, name, nn.Identity())
    return module


class Verbalizers(nn.Module):
    """The verbalizers of all target layers of one backbone; `impl` is that of `vlsi_kernels.verb_ffn`."""

    def __init__(self, spec: VerbalizerSpec, impl: str = "auto"):
        super().__init__()
        self.spec = spec
        with sharded_init():
            self.layers = nn.ModuleDict({str(k): Verbalizer(spec, k, impl) for k in spec.layers})

    def forward(
        self, hidden: list[Tensor], attention: list[dict] | None = None, layers: list[int] | None = None
    ) -> Tensor:
        """Verbalize target layers.

        Args:
            hidden: one tensor a layer: [N, d], or [B, T, d] for decoder verbalizers.
            attention: per layer the keyword arguments of the backbone's own decoder layer (decoder only).
            layers: which they are; None: all.

        Returns:
            [layers, .., output width], in their order.
        """
        attention, layers = attention or [{}] * len(hidden), self.spec.layers if layers is None else layers
        spoken = [self.layers[str(k)](h, **a) for k, h, a in zip(layers, hidden, attention, strict=True)]
        return torch.stack(spoken)

    def start_at(self, translation: Tensor | None) -> None:
        """Put every layer's linear map A at [d_s, d], given on rank 0 (elsewhere ignored under ZeRO-3). Collective."""
        for verbalizer in self.layers.values():
            weight = verbalizer.translation.weight
            with gathered([weight], writer=0), torch.no_grad():
                if not hasattr(weight, "ds_id") or rank() == 0:
                    weight.copy_(translation)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors) and spec (JSON). Collective under ZeRO-3; rank 0 writes."""
        from safetensors.torch import save_file

        state = gather_state(self.named_parameters())
        if rank() == 0:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
            (folder / CONFIG_NAME).write_text(json.dumps(asdict(self.spec), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, impl: str = "auto") -> Verbalizers:
        """Rebuild verbalizers from a folder alone. Collective under ZeRO-3.

        Raises:
            FileNotFoundError: the folder holds no verbalizers.
            ValueError: weights and spec do not belong together.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        spec = read_spec(folder)
        module = cls(spec, impl)
        sharded = any(hasattr(p, "ds_id") for p in module.parameters())
        load_state(module, load_file(folder / WEIGHTS_NAME) if rank() == 0 or not sharded else {})
        return module


def read_spec(folder: str | Path) -> VerbalizerSpec:
    """The spec stored in a folder of verbalizers. Raises FileNotFoundError where files are missing."""
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no verbalizers ({name} is missing); run the verbalize stage first")
    fields = json.loads((folder / CONFIG_NAME).read_text())
    return VerbalizerSpec(**{**fields, "layers": tuple(fields["layers"])})
