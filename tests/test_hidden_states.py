"""A backbone that speaks at its layers: hidden states, answer positions, checkpointing, decoder verbalizers."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_batch import ROWS, make_batch, make_model

from vlsi_fast.backbones import family_of
from vlsi_fast.hidden_states import VerbalizedBackbone, _take_in_layer, answer_positions
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec

DEPTH = 4


def make_verbalizers(model, layers, architecture="mlp", norm=False, residual=True, output_size=None):
    settings = SimpleNamespace(architecture=architecture, norm=norm, residual=residual)
    torch.manual_seed(3)
    return Verbalizers(VerbalizerSpec.of(model.config, layers, settings, output_size))


@pytest.fixture(scope="module")
def batch():
    inputs, labels = make_batch()
    assert not inputs["attention_mask"].all() and "pixel_values" in inputs
    return inputs, *answer_positions(labels)


@pytest.fixture(scope="module")
def model():
    return make_model(layers=DEPTH, seed=7).requires_grad_(False)


@pytest.fixture(scope="module")
def stock(model, batch):
    """Stock transformers' hidden states and logits at the answer positions."""
    inputs, index, _ = batch
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, use_cache=False)
    flat = [h.flatten(0, 1)[index] for h in output.hidden_states]
    assert len(flat) == DEPTH + 1
    return flat, output.logits.flatten(0, 1)[index]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- answer positions ----


def test_positions_predict_the_answers():
    labels = torch.tensor(
        [
            [-100, -100, 5, 6, -100],
            [-100, -100, -100, -100, -100],  # no answer
            [9, -100, -100, -100, 8],  # nothing comes before the first token, so nothing predicts it
            [-100, 1, 2, 3, 4],
        ]
    )
    index, wanted = answer_positions(labels)
    assert index.tolist() == [1, 2, 13, 15, 16, 17, 18]
    assert wanted.tolist() == [5, 6, 8, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (3, 1)])
def test_no_answers_at_all(shape):
    index, wanted = answer_positions(torch.full(shape, -100))
    assert index.shape == wanted.shape == (0,) and index.dtype == torch.long


def test_positions_give_the_stock_loss(model, batch):
    """transformers' own shift, labels and mean."""
    inputs, labels = make_batch()
    _, index, wanted = batch
    with torch.no_grad():
        output = model(**inputs, labels=labels, use_cache=False)
    logits = output.logits.flatten(0, 1)[index]
    close(torch.nn.functional.cross_entropy(logits, wanted), output.loss)


# ---- hidden states ----


@pytest.mark.parametrize("layers", [[1], [2, 3], [1, 2, 3, 4]], ids=str)
def test_hidden_states_are_stock_transformers(model, batch, stock, layers):
    """Verbalizers that are the identity show the hidden states themselves."""
    inputs, index, _ = batch
    backbone = VerbalizedBackbone(model, layers, make_verbalizers(model, layers), train_backbone=False)
    raw, last = backbone(inputs, index, normed=False)
    normed, _ = backbone(inputs, index)
    hidden, logits = stock
    norm = family_of(model.config).final_norm(model)
    for i, k in enumerate(layers):
        if k < DEPTH:  # transformers stores the last one behind the final norm
            close(raw[i], hidden[k])
            close(normed[i], norm(hidden[k]))
        else:
            close(normed[i], hidden[k])
            assert not torch.allclose(raw[i], hidden[k], atol=1e-3)
    close(last, hidden[-1])
    close(last @ backbone.head_weight.T, logits)


def test_without_verbalizers_only_the_last_layer(model, batch, stock):
    inputs, index, _ = batch
    spoken, last = VerbalizedBackbone(model, [1, 2], None, train_backbone=False)(inputs, index)
    assert spoken is None
    close(last @ model.lm_head.weight.T, stock[1])


def test_padding_changes_nothing(model, batch):
    """A row alone and the same row in a batch, padded to a longer one's length."""
    inputs, index, _ = batch
    backbone = VerbalizedBackbone(model, [2], make_verbalizers(model, [2]), train_backbone=False)
    spoken, last = backbone(inputs, index)
    alone = []
    for row in ROWS:
        inputs, labels = make_batch([row])
        assert inputs["attention_mask"].all()
        alone.append(backbone(inputs, answer_positions(labels)[0]))
    close(spoken, torch.cat([s for s, _ in alone], dim=1))
    close(last, torch.cat([l for _, l in alone]))


def test_hooks_are_gone_after_a_forward(model, batch):
    inputs, index, _ = batch
    layers = family_of(model.config).decoder_layers(model)
    before = [len(layer._forward_hooks) for layer in layers]
    backbone = VerbalizedBackbone(model, [1, 3], make_verbalizers(model, [1, 3]), train_backbone=False)
    backbone(inputs, index)
    assert [len(layer._forward_hooks) for layer in layers] == before
    with pytest.raises((KeyError, ValueError, TypeError, RuntimeError, AttributeError)):
        backbone({"input_ids": "no tensor"}, index)
    assert [len(layer._forward_hooks) for layer in layers] == before


def test_headless_output_is_the_verbalizers_own(model, batch, stock):
    inputs, index, _ = batch
    verbalizers = make_verbalizers(model, [1, 3], "verb_ffn", residual=False, output_size=48)
    backbone = VerbalizedBackbone(model, [1, 3], verbalizers, train_backbone=False)
    spoken, _ = backbone(inputs, index, normed=False)
    assert spoken.shape == (2, len(index), 48)
    for i, k in enumerate((1, 3)):
        close(spoken[i], verbalizers.layers[str(k)](stock[0][k]))


@pytest.mark.parametrize("train, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=["frozen", "trained"])
def test_states_of_all_positions_are_gone_with_the_next_layer(batch, train, dtype):
    """Only what is taken of them lives on. (float32 layers that are trained keep their own inputs for backward.)"""
    inputs, index, _ = batch
    model = make_model(layers=DEPTH, seed=7).to(dtype)
    layers = family_of(model.config).decoder_layers(model)
    backbone = VerbalizedBackbone(model, [1, 2, 3], make_verbalizers(model, [1, 2, 3]).to(dtype), train).train()
    states, alive = [], {}

    def watch(i):
        def look(module, arguments, output):
            states.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
            alive[i] = [state() is not None for state in states[:-2]]

        return look

    for i, layer in enumerate(layers):
        layer.register_forward_hook(watch(i))
    backbone(inputs, index)
    assert alive == {0: [], 1: [], 2: [False], 3: [False, False]}


# ---- who learns ----


def test_frozen_backbone_gives_gradient_to_verbalizers_only(batch):
    inputs, index, _ = batch
    model = make_model(layers=DEPTH)  # weights that would take a gradient
    verbalizers = make_verbalizers(model, [1, 3], "verb_ffn", residual=False)
    backbone = VerbalizedBackbone(model, [1, 3], verbalizers, train_backbone=False).train()
    assert verbalizers.training and not model.training
    spoken, last = backbone(inputs, index, normed=False)
    spoken[0].square().sum().backward()
    assert not last.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad.any() for p in verbalizers.layers["1"].parameters())
    assert all(p.grad is None or not p.grad.any() for p in verbalizers.layers["3"].parameters())


def lora_gradients(batch, checkpointing: bool):
    """Loss, LoRA gradients and the number of FFN calls of layer 1, in training mode."""
    inputs, index, _ = batch
    model = make_model(layers=DEPTH, seed=7).requires_grad_(False)
    torch.manual_seed(11)
    get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=family_of(model.config).lora_targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    family_of(model.config).decoder_layers(model)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    verbalizers = make_verbalizers(model, [1, 3], "verb_ffn", residual=False).requires_grad_(False)
    backbone = VerbalizedBackbone(model, [1, 3], verbalizers, train_backbone=True).train()
    spoken, last = backbone(inputs, index)
    loss = spoken[0].cos().sum() + spoken[1].square().mean() + last.sin().sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, len(calls)


def test_gradient_checkpointing_changes_nothing(batch):
    loss, gradients, calls = lora_gradients(batch, False)
    again, recomputed, more_calls = lora_gradients(batch, True)
    assert calls == 1 and more_calls == 2, "checkpointing runs a layer a second time in backward"
    close(again, loss, 1e-6)
    assert gradients.keys() == recomputed.keys() and len(gradients) == DEPTH * 7 * 2
    for name, gradient in gradients.items():
        assert gradient.any(), name
        close(recomputed[name], gradient, 1e-6)


def test_positions_are_taken_inside_a_checkpoint_too():
    """As with transformers 5.17, which checkpoints the call of a layer, hooks included: they are gone by backward."""
    hidden, index = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([1, 4])
    layer, taken = torch.nn.Linear(5, 5), []
    hook = layer.register_forward_hook(lambda module, arguments, output: taken.append(_take_in_layer(output, index)))
    output = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
    hook.remove()
    (output.sin().sum() + taken[0].cos().sum()).backward()
    again = hidden.detach().requires_grad_()
    output = layer(again)
    (output.sin().sum() + output.flatten(0, 1)[index].cos().sum()).backward()
    close(hidden.grad, again.grad, 1e-6)


def test_gradient_reaches_only_layers_below(batch):
    inputs, index, _ = batch
    model = make_model(layers=DEPTH)
    backbone = VerbalizedBackbone(model, [2], make_verbalizers(model, [2]), train_backbone=True)
    backbone(inputs, index, normed=False)[0].square().sum().backward()
    layers = family_of(model.config).decoder_layers(model)
    touched = [any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in layers]
    assert touched == [True, True, False, False]


# ---- decoder verbalizers ----


def without_biases(**options):
    model = make_model(layers=DEPTH, seed=7, **options).requires_grad_(False)
    for name, parameter in family_of(model.config).decoder_layers(model).named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    return model


def copies_of_the_next_layers(model, layers):
    verbalizers = make_verbalizers(model, layers, "decoder", norm=True, residual=False)
    for k in layers:
        state = family_of(model.config).decoder_layers(model)[k].state_dict()
        block = verbalizers.layers[str(k)].blocks[0]
        block.load_state_dict({name: w for name, w in state.items() if not name.endswith("bias")}, strict=True)
    return verbalizers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoder_verbalizer_is_the_next_layer(batch, attention):
    """With the next decoder layer's weights it says what the next layer says, mask and positions included."""
    inputs, index, _ = batch
    model, layers = without_biases(), [1, 2]
    model.set_attn_implementation(attention)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    verbalizers = copies_of_the_next_layers(model, layers)
    spoken, last = VerbalizedBackbone(model, layers, verbalizers, train_backbone=False)(inputs, index, normed=False)
    for i, k in enumerate(layers):
        close(spoken[i], hidden[k + 1].flatten(0, 1)[index])
        assert not torch.allclose(spoken[i], hidden[k].flatten(0, 1)[index], atol=1e-2)
    close(last, hidden[-1].flatten(0, 1)[index])


def test_decoder_verbalizer_under_checkpointing(batch):
    """Gradient flows through the decoder verbalizer's attention to the backbone, with checkpointing as without."""
    inputs, index, _ = batch
    results = []
    for checkpointing in (False, True):
        model = without_biases().requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        verbalizers = copies_of_the_next_layers(model, [2]).requires_grad_(False)
        backbone = VerbalizedBackbone(model, [2], verbalizers, train_backbone=True).train()
        spoken, _ = backbone(inputs, index)
        spoken.cos().sum().backward()
        results.append((spoken.detach(), model.model.language_model.layers[0].mlp.up_proj.weight.grad))
    for a, b in zip(*results):
        assert a.any()
        close(a, b, 1e-6)
