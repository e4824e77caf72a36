"""What each layer says: against a loop without cache, against models built by hand, and how often what is run."""

import copy
from functools import cache
from types import SimpleNamespace

import numpy
import pytest
import tiny_families as families
import torch
from PIL import Image
from torch import nn

from vlsi_fast.backbones import FAMILIES, family_of
from vlsi_fast.data.encoding import encode_question
from vlsi_fast.hidden_states import VerbalizedBackbone
from vlsi_fast.speech import Speaker, open_speaker
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec

NAMES = sorted(FAMILIES)
LAYERS, NEW = [1, 2, 4], 5
SPEAKING = {"verb_ffn": "verb_ffn", "decoder": "decoder_x2"}
QUESTION = "what color is the circle?"


@cache
def processor(name):
    return families.make_processor(name)


@cache
def model_of(name):
    return without_image_tokens(families.make_model(name), name)


def without_image_tokens(model, name):
    """Its random head never prefers them: a forward without cache over an answer would look for a second image. Nor an
    end, which would make answers short."""
    never = [model.config.image_token_id, processor(name).tokenizer.eos_token_id]
    model.requires_grad_(False).lm_head.weight[never] = 0
    return model


def picture(seed=0, size=(48, 48)):  # square: its 4 tokens take 2 positions, so deltas of 3D positions are not 0
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=numpy.uint8))


def speaker_of(name, architecture="verb_ffn", model=None, layers=LAYERS, **spec):
    model = model_of(name) if model is None else model
    settings = SimpleNamespace(architecture=architecture, norm=True, residual=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        verbalizers = Verbalizers(VerbalizerSpec.of(model.config, layers, settings, **spec))
        for parameter in verbalizers.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3)
    return Speaker(model, processor(name), verbalizers)


def extended(inputs, tokens):
    """The prompt's tensors with the answer's first tokens behind it."""
    if not tokens:
        return inputs
    new = torch.tensor([tokens])
    more = {"input_ids": new, "attention_mask": torch.ones_like(new)}
    more |= dict.fromkeys(("mm_token_type_ids", "token_type_ids"), torch.zeros_like(new))
    return {n: torch.cat([v, more[n].to(v.dtype)], dim=1) if n in more else v for n, v in inputs.items()}


@torch.no_grad()
def without_cache(speaker, images, speech):
    """The likeliest token, and the probability of the spoken one, at every place of an answer.

    One forward without cache through what the trainer trains; where all places agree, so does a loop token by token.
    """
    verbalizers = None if speech.layer is None else speaker.verbalizers
    backbone = VerbalizedBackbone(speaker.model, LAYERS, verbalizers, train_backbone=False)
    inputs = extended(encode_question(QUESTION, images, speaker.processor), speech.token_ids[:-1])
    index = torch.arange(inputs["input_ids"].shape[1])[-len(speech.token_ids) :]
    spoken, last = backbone(inputs, index)
    hidden = last if speech.layer is None else spoken[LAYERS.index(speech.layer)]
    distribution = (hidden.float() @ backbone.head_weight.float().T).softmax(-1)
    likeliest = distribution.argmax(-1).tolist()
    return likeliest, distribution.gather(1, torch.tensor(speech.token_ids)[:, None]).flatten().tolist()


@pytest.mark.parametrize("images", [[picture()], []], ids=["image", "text"])
@pytest.mark.parametrize("name, architecture", [(n, SPEAKING[a]) for n, a in families.ARCHITECTURES])
def test_greedy_is_the_loop_without_cache(name, architecture, images):
    speaker = speaker_of(name, architecture)
    found = speaker.speak(images, QUESTION, max_new_tokens=NEW)
    assert [speech.layer for speech in found] == [*LAYERS, None]
    assert len({tuple(speech.token_ids) for speech in found}) > 1
    for speech in found:
        tokens, probabilities = without_cache(speaker, images, speech)
        assert speech.token_ids == tokens and len(tokens) == NEW
        assert speech.token_probabilities == pytest.approx(probabilities, rel=1e-3)


@pytest.mark.parametrize("architecture", ["mlp_x2", "decoder"])
def test_sliding_windows(architecture):
    """Full and sliding attention by turns, and a prompt longer than the window."""
    model = copy.deepcopy(model_of("llava_onevision"))
    fields = model.config.to_dict()
    kinds = ["full_attention", "sliding_attention"] * 2
    fields["text_config"] |= {"use_sliding_window": True, "sliding_window": 5, "layer_types": kinds}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = without_image_tokens(type(model)(type(model.config)(**fields)).eval(), "llava_onevision")
    assert family_of(model.config).decoder_layers(model)[1].self_attn.sliding_window == 5
    speaker = speaker_of("llava_onevision", architecture, model)
    for images in ([picture()], []):
        found = speaker.speak(images, QUESTION, max_new_tokens=NEW)
        assert [s.token_ids for s in found] == [without_cache(speaker, images, s)[0] for s in found]


def built_by_hand(speaker, layer):
    """A model of its own that ends at a layer, for stock `generate` with the image."""
    model = copy.deepcopy(speaker.model)
    language, verbalizer = model.get_decoder(), copy.deepcopy(speaker.verbalizers.layers[str(layer)])
    blocks = list(verbalizer.blocks) if speaker.verbalizers.spec.is_decoder else []
    for i, block in enumerate(blocks):
        block.self_attn.layer_idx = layer + i
    if not blocks:
        language.norm = nn.Sequential(verbalizer, language.norm)
    language.layers = nn.ModuleList([*language.layers[:layer], *blocks])
    for config in (language.config, model.config.get_text_config()):
        config.num_hidden_layers = len(language.layers)
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * 2)[: len(language.layers)]
    return model


@pytest.mark.parametrize("name, architecture", [(name, "verb_ffn") for name in NAMES] + [("qwen3_vl", "decoder")])
def test_beams_are_stock_generate(name, architecture):
    speaker, images = speaker_of(name, architecture), [picture()]
    inputs = encode_question(QUESTION, images, processor(name))
    found = speaker.speak(images, QUESTION, num_beams=5, max_new_tokens=NEW, top=3)
    assert [s.token_ids for s in found] != [s.token_ids for s in speaker.speak(images, QUESTION, max_new_tokens=NEW)]
    for speech in found:
        model = speaker.model if speech.layer is None else built_by_hand(speaker, speech.layer)
        with torch.no_grad():
            # stock caches do not know their length where no layer attends
            cached = name not in families.RECURRENT
            output = model.generate(**inputs, num_beams=5, do_sample=False, max_new_tokens=NEW, use_cache=cached)
        assert speech.token_ids == output[0, inputs["input_ids"].shape[1] :].tolist()
        _, probabilities = without_cache(speaker, images, speech)
        assert speech.token_probabilities == pytest.approx(probabilities, rel=1e-3)
        assert len(speech.alternatives) == len(speech.tokens) and all(len(step) == 3 for step in speech.alternatives)
        for token, p, step in zip(speech.tokens, speech.token_probabilities, speech.alternatives):
            values = [q for _, q in step]
            assert values == sorted(values, reverse=True) and ((token, pytest.approx(p)) in step or p <= values[-1])


@pytest.mark.parametrize("images", [[picture(1), picture(2, (64, 32))], []], ids=["images", "text"])
@pytest.mark.parametrize("name", NAMES)
def test_the_last_layer_is_the_model_itself(name, images):
    speaker = Speaker(model_of(name), processor(name))
    (speech,) = speaker.speak(images, QUESTION, max_new_tokens=NEW)
    inputs = encode_question(QUESTION, images, processor(name))
    with torch.no_grad():
        output = speaker.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    output = output[0, inputs["input_ids"].shape[1] :]
    assert speech.layer is None and speech.token_ids == output.tolist()
    assert speech.text == processor(name).tokenizer.decode(output, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name, architecture", [(n, SPEAKING[a]) for n, a in families.ARCHITECTURES])
def test_nothing_is_run_twice_or_too_deep(name, architecture):
    """The vision tower once; tokens through each decoder layer: the prompt once, and each answer up to its layer."""
    speaker, images = speaker_of(name, architecture), [picture()]
    layers, seen, vision = family_of(speaker.model.config).decoder_layers(speaker.model), [0] * 4, []
    tower = family_of(speaker.model.config).vision(speaker.model)[0]
    hooks = [tower.register_forward_pre_hook(lambda *_: vision.append(1))]
    for i, layer in enumerate(layers):

        def count(module, arguments, keywords, i=i):
            seen[i] += arguments[0].shape[1]

        hooks.append(layer.register_forward_pre_hook(count, with_kwargs=True))
    try:
        found = speaker.speak(images, QUESTION, layers=[2, 1], max_new_tokens=NEW)
    finally:
        for hook in hooks:
            hook.remove()
    prompt = encode_question(QUESTION, images, processor(name))["input_ids"].shape[1]
    two, one = (len(speech.token_ids) for speech in found)
    assert len(vision) == 1 and [speech.layer for speech in found] == [2, 1]
    assert seen == [prompt - 1 + one + two, prompt - 1 + two, 0, 0]


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_speaking_leaves_no_trace(name):
    """Prompts with and without image in turns say the same each time, and the model is as it was."""
    speaker = speaker_of(name, "decoder_x2")
    before = state_of(speaker)
    rounds = []
    for _ in range(2):
        rounds.append([speaker.speak(images, QUESTION, max_new_tokens=3) for images in ([picture()], [])])
        speaker.model.generate(**encode_question("?", [picture()], speaker.processor), max_new_tokens=1)
    assert rounds[0] == rounds[1] and rounds[0][0] != rounds[0][1]
    assert before == state_of(speaker)
    layers = family_of(speaker.model.config).decoder_layers(speaker.model)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def state_of(speaker):
    """All that a voice might change: settings, modules, places in the cache."""
    modules = [*speaker.model.named_modules(), *speaker.verbalizers.named_modules()]
    places = [(n, m.layer_idx) for n, m in modules if hasattr(m, "layer_idx")]
    assert len(places) == 4 + 6
    return speaker.model.config.to_dict(), [(n, id(m)) for n, m in modules], places


@pytest.mark.parametrize("name", ["qwen3_vl"])
def test_bfloat16(name):
    """Rounding may turn a close call, so its own tokens' probabilities are compared, not the tokens."""
    speaker = speaker_of(name, "decoder", model=copy.deepcopy(model_of(name)).bfloat16())
    assert next(speaker.verbalizers.parameters()).dtype == torch.bfloat16
    for speech in speaker.speak([picture()], QUESTION, max_new_tokens=4):
        _, probabilities = without_cache(speaker, [picture()], speech)
        assert speech.token_probabilities == pytest.approx(probabilities, rel=0.15)


def test_an_answer_ends_at_the_end_of_turn_token():
    speaker = speaker_of("qwen2_vl", model=copy.deepcopy(model_of("qwen2_vl")))
    speech = speaker.speak([], QUESTION, layers=[2], max_new_tokens=NEW)[0]
    speaker.model.generation_config.eos_token_id = speech.token_ids[2]
    cut = speaker.speak([], QUESTION, layers=[2], max_new_tokens=NEW)[0]
    end = speech.token_ids.index(speech.token_ids[2]) + 1
    assert cut.token_ids == speech.token_ids[:end] and cut.tokens == speech.tokens[:end]


def test_the_checkpoints_sampling_is_left_out(recwarn):
    speaker = speaker_of("qwen2_vl", model=copy.deepcopy(model_of("qwen2_vl")))
    plain = speaker.speak([], QUESTION, max_new_tokens=NEW)
    config = speaker.model.generation_config
    config.do_sample, config.temperature, config.top_k, config.top_p = True, 5.0, 50, 0.9
    assert speaker.speak([], QUESTION, max_new_tokens=NEW) == plain and config.do_sample
    assert not [w for w in recwarn if "temperature" in str(w.message)]


def test_from_folders_and_files(tmp_path):
    families.save(tmp_path / "model", "qwen2_vl")
    made = speaker_of("qwen2_vl")
    made.verbalizers.save_pretrained(tmp_path / "verbalizers")
    picture().save(tmp_path / "a.png")
    speaker = open_speaker(tmp_path / "model", tmp_path / "verbalizers")
    options = {"layers": [1, None], "max_new_tokens": 3}
    found = speaker.speak([tmp_path / "a.png"], QUESTION, **options)
    assert [s.tokens for s in found] == [s.tokens for s in made.speak([picture()], QUESTION, **options)]
    with pytest.raises(FileNotFoundError, match="holds no verbalizers"):
        open_speaker(tmp_path / "model", tmp_path)
    with pytest.raises(ValueError, match="missing_image"):
        speaker.speak([tmp_path / "b.png"], QUESTION)
    (tmp_path / "c.png").write_text("no image")
    with pytest.raises(ValueError, match="truncated_image"):
        speaker.speak([tmp_path / "c.png"], QUESTION)


def test_bad_input():
    speaker = speaker_of("qwen2_vl")
    with pytest.raises(ValueError, match=r"no verbalizers for layers \[3\]; there are some for \[1, 2, 4\]"):
        speaker.speak([], QUESTION, layers=[1, 3])
    with pytest.raises(ValueError, match="1 or more"):
        speaker.speak([], QUESTION, num_beams=0)
    with pytest.raises(ValueError, match="no Unicode"):
        speaker.speak([], "what is \ud800?")
    with pytest.raises(ValueError, match="headless"):
        speaker_of("qwen2_vl", output_size=48)
    with pytest.raises(ValueError, match="of width 32 .* do not fit a qwen2_vl of width 48"):
        Speaker(families.make_model("qwen2_vl", hidden=48), processor("qwen2_vl"), speaker.verbalizers)
    with pytest.raises(ValueError, match="do not fit a qwen2_vl .* with 3 layers"):
        Speaker(families.make_model("qwen2_vl", layers=3), processor("qwen2_vl"), speaker.verbalizers)
    patched = copy.copy(speaker.model)
    patched.forward = lambda *_: None
    with pytest.raises(ValueError, match="load_backbone"):
        Speaker(patched, processor("qwen2_vl")).speak([], QUESTION)
