"""liger-kernel's RMSNorm, SwiGLU and rotary embeddings, as `apply_liger` puts them into the language models, against
the stock modules: same hidden states, same gradients.

On CUDA where there is one, else in Triton's interpreter, which has no bfloat16 arithmetic; float16 stands for it.
"""

import copy
import importlib
from collections import Counter

import pytest
import torch
from kernels_util import randn, relative_error
from liger_util import liger_kernels

for package in ("liger_kernel", "pydantic", "peft"):  # not on every GPU machine where the kernels' tests run
    pytest.importorskip(package)

import tiny_families  # noqa: E402

from vlsi_fast.acceleration import apply_liger  # noqa: E402
from vlsi_fast.backbones import FAMILIES  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, LENGTHS = 48, (5, 3)
"""Width, which is no power of two as kernels' blocks are; tokens of the batch's rows."""


@pytest.fixture(autouse=True)
def kernels():
    with liger_kernels():
        yield


def language_model(family):
    """Of two layers, whose norms' weights are not all one."""
    model = tiny_families.make_model(family, hidden=HIDDEN, layers=2)
    for i, (name, parameter) in enumerate(model.get_decoder().named_parameters()):
        if name.endswith("norm.weight"):
            parameter.data = 1 + randn(*parameter.shape, seed=i, scale=0.3)
    return model.requires_grad_(False)


def with_lora(model, family):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = FAMILIES[family].lora_targets
        lora = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        get_peft_model(model, lora, autocast_adapter_dtype=False)


def run(model, dtype):
    """Hidden states, and gradients by name (those of the inputs too), with checkpointing as in training."""
    decoder = model.get_decoder().to(DEVICE, dtype).train()
    inputs = randn(len(LENGTHS), max(LENGTHS), HIDDEN, seed=1, dtype=dtype).to(DEVICE).requires_grad_()
    mask = torch.tensor([[int(t < n) for t in range(max(LENGTHS))] for n in LENGTHS], device=DEVICE)
    hidden = decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = randn(*hidden.shape, seed=2, dtype=dtype).to(DEVICE) * mask[..., None]
    leaves = {"inputs": inputs} | {n: p for n, p in decoder.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(hidden, list(leaves.values()), wanted, allow_unused=True)
    grads = {name: grad for name, grad in zip(leaves, grads) if grad is not None}
    return hidden.detach() * mask[..., None], grads


def trainable(family, trained, with_liger=False):
    """The model, made ready as a stage makes it."""
    model = language_model(family)
    if with_liger:
        apply_liger(model, required=True)
    if trained == "lora":
        with_lora(model, family)
    else:
        model.get_decoder().requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.fixture
def ran(monkeypatch):
    """How often each of liger-kernel's forwards ran."""
    counts = Counter()
    for name in ("rms_norm", "swiglu", "rope"):
        module = importlib.import_module(f"liger_kernel.ops.{name}")
        forward = getattr(module, f"{name}_forward")

        def counted(*arguments, name=name, forward=forward, **options):
            counts[name] += 1
            return forward(*arguments, **options)

        monkeypatch.setattr(module, f"{name}_forward", counted)
    return counts


# The stock model runs before liger-kernel is applied: its rotary embeddings are for the whole process.


@pytest.mark.parametrize(
    "family, trained",
    [*((family, "all") for family in tiny_families.LIGER), ("llava_onevision", "lora"), ("qwen3_vl", "lora")],
)
def test_hidden_states_and_gradients_are_the_stock_modules(family, trained, ran):
    truth, truths = run(trainable(family, trained), torch.float32)
    assert not ran
    hidden, grads = run(trainable(family, trained, with_liger=True), torch.float32)
    norms = 5 + 4 * (family in tiny_families.QUERY_NORMS)  # two a layer and the last; and those of queries and keys
    plain = family in ("internvl", "llava_onevision", "smolvlm")
    twice = {"rms_norm": 2 * norms - 1, "swiglu": 4} | ({"rope": 4} if plain else {})
    if FAMILIES[family].sparse_block is not None:
        del twice["swiglu"]
    assert ran == twice  # in the layers again for the backward
    assert grads.keys() == truths.keys() and len(grads) >= (20 if trained == "all" else 25)
    assert relative_error(hidden, truth) < 2e-6
    for name, grad in grads.items():
        assert relative_error(grad, truths[name]) < 1e-5, name


@pytest.mark.parametrize("family", tiny_families.LIGER)
def test_in_half_precision_it_errs_no_more_than_the_stock_modules(family):
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    stock = trainable(family, "all").to(dtype)
    if FAMILIES[family].sparse_block is not None:
        stock.set_experts_implementation("eager")  # torch has no grouped products in float64
    truth, truths = run(copy.deepcopy(stock).double(), torch.float64)  # of the weights as they were rounded
    plain, plains = run(stock, dtype)
    hidden, grads = run(trainable(family, "all", with_liger=True), dtype)
    assert relative_error(hidden, truth) < 2 * relative_error(plain, truth)
    for name, grad in grads.items():
        assert relative_error(grad, truths[name]) < 2 * relative_error(plains[name], truths[name]) + 1e-4, name
