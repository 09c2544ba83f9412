"""One model out of two that have never met: it speaks as its decoder did, and hears or sees besides."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from kit.aligning import TOLERANCE, generate, logits, stir
from kit.tiny import make_model, spread
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, CLIPImageProcessor, PreTrainedTokenizerFast, WhisperFeatureExtractor

import hf_steer
from hf_steer import AlignerConfig, AttentionConfig, ConfigError, PatchError, Saliency, SaliencyConfig, SteerConfig, compose
from hf_steer.compose import StackingProcessor

TEMPLATE = (
    "{% for m in messages %}{{ 'w3' if m.role == 'user' else 'w4' }} {{ m.content }} w5 {% endfor %}"
    "{% if add_generation_prompt %}w4{% endif %}"
)
CASES = [
    ("whisper", "linear", "Qwen2AudioForConditionalGeneration", "AutoModelForMultimodalLM"),
    ("whisper", "mlp", "AudioFlamingo3ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ("whisper-stack", "linear", "VoxtralForConditionalGeneration", "AutoModelForMultimodalLM"),
    ("whisper-stack", "mlp", "VoxtralForConditionalGeneration", "AutoModelForMultimodalLM"),
    ("clip", "linear", "LlavaForConditionalGeneration", "AutoModelForImageTextToText"),
    ("siglip", "mlp", "LlavaForConditionalGeneration", "AutoModelForImageTextToText"),
]
each = pytest.mark.parametrize(("kind", "projector", "expected", "auto"), CASES)


def make_tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        chat_template=TEMPLATE,
    )  # fmt: skip


def make_encoder(kind):
    torch.manual_seed(1)
    if kind.startswith("whisper"):
        config = transformers.WhisperConfig(
            d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=8, max_source_positions=50,
            decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=96, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        model = transformers.WhisperModel(config)
    else:
        name = "CLIPVision" if kind == "clip" else "SiglipVision"
        config = getattr(transformers, f"{name}Config")(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=12, patch_size=4
        )
        model = getattr(transformers, f"{name}Model")(config)
    spread(model, 1)
    return model.eval()


def make_extractor(kind):
    if kind.startswith("whisper"):
        return WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return CLIPImageProcessor(size={"height": 12, "width": 12}, crop_size={"height": 12, "width": 12})


def composed(kind, projector="linear", family="qwen3", *, tied=True, **options):
    decoder = make_model(family, tie_word_embeddings=tied)
    decoder.tie_weights()
    parts = {"tokenizer": make_tokenizer(), "feature_extractor": make_extractor(kind)}
    return compose(make_encoder(kind), decoder, projector=projector, pooling=pooling_of(kind), **parts, **options)


def pooling_of(kind):
    return "stack" if kind.endswith("stack") else "mean"


def perceive(kind, processor, *, rows=2):
    """A batch of chat messages with sounds of unequal length, or pictures, and text of unequal length."""
    random = np.random.default_rng(0)
    part = {"type": "audio" if kind.startswith("whisper") else "image"}
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [part, {"type": "text", "text": " w9" * (row + 1)}]}], add_generation_prompt=True
        )
        for row in range(rows)
    ]
    if kind.startswith("whisper"):
        sounds = [random.standard_normal(16000 - 5000 * row).astype("float32") for row in range(rows)]
        return processor(text=texts, audio=sounds, return_tensors="pt", **PADDING[type(processor).__name__])
    pictures = [random.integers(0, 255, (12, 12, 3), dtype=np.uint8) for _ in range(rows)]
    return processor(text=texts, images=pictures, return_tensors="pt", padding=True)


PADDING = {"Qwen2AudioProcessor": {"padding": True}, "AudioFlamingo3Processor": {}, "StackingProcessor": {"padding": True}}


@each
@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False), ("qwen2", True), ("deepseek_v3", False)])
def test_text_only_answers_are_those_that_the_decoder_gave_alone(kind, projector, expected, auto, family, tied):
    decoder = make_model(family, tie_word_embeddings=tied)
    decoder.tie_weights()
    ids = torch.randint(3, 90, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {"input_ids": ids, "attention_mask": (torch.arange(7) >= torch.tensor([[0], [3]])).long()}
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    answers, steps = generate(decoder, inputs, max_new_tokens=6)
    alone = logits(decoder, inputs)
    others = [decoder.generate(**padded, max_new_tokens=6, num_beams=beams) for beams in (1, 3)]
    model, processor = compose(
        make_encoder(kind), decoder, tokenizer=make_tokenizer(), feature_extractor=make_extractor(kind), projector=projector,
        pooling=pooling_of(kind),
    )  # fmt: skip
    assert type(model).__name__ == expected
    assert torch.equal(logits(model, inputs)[..., :96], alone)
    again, new_steps = generate(model, inputs, max_new_tokens=6)
    assert torch.equal(again, answers)
    assert torch.equal(new_steps[:, 1:, :96], steps[:, 1:])
    # Qwen2-Audio computes the logits of the whole prompt, and a product of other shape may round otherwise
    torch.testing.assert_close(new_steps[:, 0, :96], steps[:, 0])
    assert model.generation_config.suppress_tokens[-1] == processor.tokenizer.convert_tokens_to_ids(
        {"Llava": "<image>", "Qwen2": "<|AUDIO|>", "Audio": "<sound>", "Voxtr": "[AUDIO]"}[expected[:5]]
    )
    for beams, other in zip((1, 3), others, strict=True):
        assert torch.equal(model.generate(**padded, max_new_tokens=6, num_beams=beams), other)
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    assert decoder.config.vocab_size == 96


@each
def test_it_generates_pads_and_beams_from_what_it_perceives(kind, projector, expected, auto):
    model, processor = composed(kind, projector)
    inputs = perceive(kind, processor)
    assert (inputs["attention_mask"] == 0).any()
    sequences, steps = generate(model, inputs)
    assert sequences.shape == (2, inputs["input_ids"].shape[1] + 4)
    deaf = {name: torch.zeros_like(value) if value.is_floating_point() else value for name, value in inputs.items()}
    assert (generate(model, deaf)[1][:, 0] - steps[:, 0]).abs().max() > 1e-3
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=3)
    alone = perceive(kind, processor, rows=1)
    torch.testing.assert_close(generate(model, alone)[1][0], steps[0], **TOLERANCE)
    assert torch.equal(model.generate(**alone, max_new_tokens=4, num_beams=3)[0, -4:], beams[0, -4:])


@each
def test_it_saves_and_loads_with_plain_auto_classes(kind, projector, expected, auto, tmp_path):
    model, processor = composed(kind, projector)
    inputs = perceive(kind, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    read = (StackingProcessor if "Voxtral" in expected else AutoProcessor).from_pretrained(tmp_path)
    assert type(read) is type(processor)
    again = perceive(kind, read)
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert torch.equal(logits(loaded, again), logits(model, inputs))
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens


@each
def test_only_the_projector_trains_and_the_loss_falls(kind, projector, expected, auto):
    model, processor = composed(kind, projector)
    inputs = perceive(kind, processor)
    assert all("multi_modal_projector" in name for name, p in model.named_parameters() if p.requires_grad)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < inputs["input_ids"].shape[1] - 3, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("multi_modal_projector" not in name), name


@each
def test_it_is_steered_like_any_other_model(kind, projector, expected, auto):
    model, processor = composed(kind, projector)
    inputs = perceive(kind, processor)
    plain = logits(model, inputs)
    config = SteerConfig(attention=AttentionConfig(queries="all", strength=3.0, saliency=SaliencyConfig(source=None)))
    hf_steer.patch_model(model, config)
    with hf_steer.use_saliency(model, Saliency.from_tokens(torch.randn(inputs["input_ids"].shape))):
        assert (logits(model, inputs) - plain).abs().max() > 0.05
    hf_steer.unpatch_model(model)
    assert torch.equal(logits(model, inputs), plain)


@each
def test_compose_patches_with_an_aligner_and_a_gaze(kind, projector, expected, auto, tmp_path):
    ear = AlignerConfig(modality="audio" if kind.startswith("whisper") else "image", kind="progressive", num_experts=4)
    gaze = AttentionConfig(queries="all", strength=2.0, saliency=SaliencyConfig(source=None))
    model, processor = composed(kind, projector, aligner=ear, attention=gaze)
    inputs = perceive(kind, processor)
    said = Saliency.from_tokens(torch.randn(inputs["input_ids"].shape))
    with hf_steer.use_saliency(model, said):
        fresh = logits(model, inputs)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("hf_steer.") or "multi_modal_projector" in name for name in trained)
    stir(model)
    with hf_steer.use_saliency(model, said):
        steered = logits(model, inputs)
    assert not torch.equal(fresh, steered)
    model.save_pretrained(tmp_path / "all")
    hf_steer.save_steering(model, tmp_path / "steering")
    saved = (tmp_path / "steering" / "hf_steer" / "steer_model.safetensors").stat().st_size
    assert saved < 0.2 * (tmp_path / "all" / "model.safetensors").stat().st_size
    loaded = hf_steer.from_pretrained(tmp_path / "all").eval()
    with hf_steer.use_saliency(loaded, said):
        assert torch.equal(logits(loaded, inputs), steered)


def test_it_loads_its_parts_from_folders(tmp_path):
    tokenizer = make_tokenizer()
    decoder = make_model("qwen3")
    decoder.save_pretrained(tmp_path / "mind")
    tokenizer.save_pretrained(tmp_path / "mind")
    make_encoder("whisper").save_pretrained(tmp_path / "ear")
    make_extractor("whisper").save_pretrained(tmp_path / "ear")
    model, processor = compose(tmp_path / "ear", str(tmp_path / "mind"))
    torch.manual_seed(5)
    inputs = perceive("whisper", processor)
    assert logits(model, inputs).shape[-1] == 97
    with pytest.raises(ConfigError, match="needs tokenizer= with a live decoder"):
        compose(tmp_path / "ear", decoder)
    with pytest.raises(ConfigError, match="needs feature_extractor= with a live encoder"):
        compose(make_encoder("whisper"), tmp_path / "mind")


def test_a_token_that_the_tokenizer_has_is_used_as_it_is():
    model, processor = composed("whisper", placeholder="w70")
    assert model.config.audio_token_id == 70
    assert model.get_input_embeddings().num_embeddings == 96
    assert logits(model, perceive("whisper", processor)).shape[-1] == 96


def test_the_decoders_own_template_renders_plain_text_as_before():
    tokenizer = make_tokenizer()
    _, processor = composed("whisper")
    turns = [{"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w7"}]
    assert processor.apply_chat_template(turns) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_several_templates_and_none_at_all():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "loud": "w8 " + TEMPLATE}
    parts = {"feature_extractor": make_extractor("whisper")}
    _, processor = compose(make_encoder("whisper"), make_model("qwen3"), tokenizer=tokenizer, **parts)
    turns = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": " w9"}]}]
    assert processor.apply_chat_template(turns, chat_template="loud") == "w8 w3 <|AUDIO|> w9 w5 "
    tokenizer.chat_template = None
    _, processor = compose(make_encoder("whisper"), make_model("qwen3"), tokenizer=tokenizer, **parts)
    assert processor.apply_chat_template(turns) == "<|AUDIO|> w9"


@each
def test_an_encoder_in_another_precision_comes_in_the_decoders(kind, projector, expected, auto):
    encoder, decoder = make_encoder(kind).half(), make_model("qwen3").bfloat16()
    model, processor = compose(
        encoder, decoder, tokenizer=make_tokenizer(), feature_extractor=make_extractor(kind), projector=projector,
        pooling=pooling_of(kind), aligner=AlignerConfig(modality="audio" if kind.startswith("whisper") else "image"),
    )  # fmt: skip
    assert {p.dtype for name, p in model.named_parameters() if not name.startswith("hf_steer.")} == {torch.bfloat16}
    assert next(encoder.parameters()).dtype == torch.float16
    inputs = perceive(kind, processor).to(dtype=torch.bfloat16)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_tokenizer_that_was_given_is_not_changed():
    tokenizer = make_tokenizer()
    decoder = make_model("qwen3")
    compose(make_encoder("whisper"), decoder, tokenizer=tokenizer, feature_extractor=make_extractor("whisper"))
    assert len(tokenizer) == 96


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoder": "llama"}, PatchError, "the encoder must be one of whisper, clip.*got 'llama'"),
        ({"decoder": "qwen2_vl"}, PatchError, "the decoder must be a text-only causal language model .*got 'qwen2_vl'"),
        ({"decoder": "gemma2"}, PatchError, "the decoder must be a text-only causal language model .*got 'gemma2'"),  # caps logits
        ({"decoder": "base"}, PatchError, "the decoder must be a text-only .*AutoModelForCausalLM"),
        ({"pooling": "max"}, ConfigError, "pooling for audio must be one of 'mean', 'stack'; got 'max'"),
        ({"projector": "conv"}, ConfigError, "projector must be one of 'linear', 'mlp'; got 'conv'"),
        ({"decoder": "patched"}, PatchError, "the decoder is patched; call hf_steer.unpatch_model on it first"),
    ],
)
def test_parts_that_cannot_be_joined_are_refused(change, error, message):
    given = {"encoder": make_encoder("whisper"), "decoder": make_model("qwen3"), "projector": "linear"}
    gaze = SteerConfig(attention=AttentionConfig(saliency=SaliencyConfig(source=None)))
    built = {
        "llama": lambda: make_model("llama"), "qwen2_vl": lambda: make_model("qwen2_vl"), "base": lambda: make_model("qwen3").model,
        "patched": lambda: hf_steer.patch_model(make_model("qwen3"), gaze), "gemma2": lambda: make_model("gemma2", "eager"),
    }  # fmt: skip
    given |= {part: built[value]() if value in built else value for part, value in change.items()}
    encoder, decoder = given.pop("encoder"), given.pop("decoder")
    with pytest.raises(error, match=message):
        compose(encoder, decoder, tokenizer=make_tokenizer(), feature_extractor=make_extractor("whisper"), **given)


def test_a_deepcopy_of_a_composed_model_stands_alone():
    model, processor = composed("whisper", aligner=AlignerConfig(modality="audio"))
    inputs = perceive("whisper", processor)
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, inputs), expected)


def test_the_stacking_processor_wants_a_sound_for_each_placeholder_and_room_for_it():
    _, processor = composed("whisper-stack")
    with pytest.raises(ConfigError, match=r"1 sounds came for 0 \[AUDIO\] in the text"):
        processor(text="w3 w9", audio=np.zeros(8000, dtype="float32"))
    with pytest.raises(ConfigError, match="the longest with 16001 samples; .* at most 16000 samples"):
        processor(text="w3 [AUDIO]", audio=np.zeros(16001, dtype="float32"))
    assert set(processor(text="w3 w9")) == {"input_ids", "attention_mask"}


def test_stacking_needs_sizes_that_fit():
    encoder = make_encoder("whisper")
    encoder.config.encoder_ffn_dim = 40
    parts = {"tokenizer": make_tokenizer(), "feature_extractor": make_extractor("whisper")}
    with pytest.raises(ConfigError, match=r"needs encoder_ffn_dim \(40\) to be a multiple of d_model \(16\).*pooling='mean'"):
        compose(encoder, make_model("qwen3"), pooling="stack", **parts)
