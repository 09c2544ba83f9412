"""One ordinary Hugging Face model out of a frozen encoder and a frozen text-only decoder, with a projector to train between.

The result is a model of a class that transformers has already: LLaVA for pictures; for sound Qwen2-Audio with a linear
projector, or Audio Flamingo 3 with an MLP. Both put Whisper's frames through a mean over two before the projector. It saves,
loads with the Auto classes, generates, pads and beams as these do, and nothing of hf_steer is needed to run it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_steer.config import AlignerConfig, AttentionConfig, SteerConfig
from hf_steer.errors import ConfigError, PatchError
from hf_steer.families import FAMILIES
from hf_steer.patching import patch_model
from hf_steer.patching.context import find_steering


@dataclass(frozen=True)
class Bridge:
    """One architecture of transformers that joins an encoder and a decoder.

    Attributes:
        config: name of its configuration class.
        model: name of its model class.
        processor: name of its processor class.
        section: name of the encoder's section in the configuration.
        tower: name of the encoder's module.
        token: name of the configuration value, and the text, of the placeholder token.
        settings: further values of the configuration, from the encoder's configuration and the projector's kind.
        tower_settings: values of the encoder's section, from the encoder's configuration; None to take it as it is.
        processing: arguments of the processor, from the encoder's configuration and the placeholder.
    """

    config: str
    model: str
    processor: str
    section: str
    tower: str
    token: tuple[str, str]
    settings: Callable[[Any, str], dict[str, Any]]
    tower_settings: Callable[[Any], dict[str, Any]] | None
    processing: Callable[[Any, str], dict[str, Any]]


_ACTIVATIONS = {"linear": "linear", "mlp": "gelu"}
_CONVOLUTIONS = ("num_mel_bins", "max_source_positions", "scale_embedding", "activation_function", "dropout", "attention_dropout")


def _whisper(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The encoder's half of a Whisper configuration, under another configuration's names."""
    own = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", *_CONVOLUTIONS)
    return {names.get(name, name): getattr(config, name) for name in own}


_FLAMINGO_NAMES = {
    "d_model": "hidden_size", "encoder_layers": "num_hidden_layers", "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
}  # fmt: skip

BRIDGES: Mapping[tuple[str, str], Bridge] = MappingProxyType(
    {
        ("audio", "linear"): Bridge(
            "Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration", "Qwen2AudioProcessor", "audio_config", "audio_tower",
            ("audio_token_index", "<|AUDIO|>"),
            settings=lambda config, projector: {},
            tower_settings=lambda config: {"model_type": "qwen2_audio_encoder", **_whisper(config, {})},
            processing=lambda config, token: {"audio_token": token},
        ),
        ("audio", "mlp"): Bridge(
            "AudioFlamingo3Config", "AudioFlamingo3ForConditionalGeneration", "AudioFlamingo3Processor", "audio_config",
            "audio_tower", ("audio_token_id", "<sound>"),
            settings=lambda config, projector: {"projector_hidden_act": "gelu"},
            tower_settings=lambda config: {"model_type": "audioflamingo3_encoder", **_whisper(config, _FLAMINGO_NAMES)},
            processing=lambda config, token: {"audio_token": token},
        ),
        **{
            ("image", projector): Bridge(
                "LlavaConfig", "LlavaForConditionalGeneration", "LlavaProcessor", "vision_config", "vision_tower",
                ("image_token_index", "<image>"),
                settings=lambda config, projector: {
                    "projector_hidden_act": _ACTIVATIONS[projector],
                    "vision_feature_select_strategy": "default" if _has_class_token(config) else "full",
                },
                tower_settings=None,
                processing=lambda config, token: {
                    "image_token": token, "patch_size": config.patch_size,
                    "vision_feature_select_strategy": "default" if _has_class_token(config) else "full",
                    "num_additional_image_tokens": int(_has_class_token(config)),
                },
            )
            for projector in _ACTIVATIONS
        },
    }
)  # fmt: skip
"""One row per modality and kind of projector."""

ENCODERS: Mapping[str, str] = MappingProxyType(
    {
        "whisper": "audio", "clip": "image", "clip_vision_model": "image", "siglip": "image", "siglip_vision_model": "image",
    }
)  # fmt: skip
"""`config.model_type` of an encoder -> its modality."""


def compose(
    encoder: PreTrainedModel | str | os.PathLike[str],
    decoder: PreTrainedModel | str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    feature_extractor: Any = None,
    aligner: AlignerConfig | tuple[AlignerConfig, ...] | None = None,
    attention: AttentionConfig | None = None,
    projector: Literal["linear", "mlp"] = "linear",
    placeholder: str | None = None,
) -> tuple[Any, Any]:
    """Join a frozen encoder and a frozen text-only decoder.

    The parts are not copied: the new model holds their modules (two models then share them, so patch only one). An encoder in
    another precision than the decoder's comes in as a copy in that of the decoder. Everything is
    frozen but the projector, which starts random, and the aligners, which start as the identity. Text-only prompts get the
    answers that the decoder gave alone, to the last bit.

    Args:
        encoder: a live Whisper, CLIP or SigLIP model, or its folder or Hub repository.
        decoder: a live causal language model (Qwen2, Qwen3, Llama: what DeepSeek-R1's distillations are), or its folder or
            Hub repository.
        tokenizer: the decoder's; None to load it from where the decoder is. It is copied, and gets the placeholder token.
        feature_extractor: the encoder's feature extractor or image processor; None to load it from where the encoder is.
        aligner: what `patch_model` inserts; the projector is then saved with the steering. None leaves the model unpatched.
        attention: the gaze, if it is to be steered, too.
        projector: `"linear"`, or `"mlp"` (two layers and a GELU between). For pictures LLaVA's two layers are kept, with no
            nonlinearity between them when linear.
        placeholder: text of the token that stands for one feature; None for the architecture's own. One that the tokenizer
            knows is used as it is.

    Returns:
        The model, and a processor that takes text with pictures or sounds and chat messages with both.

    Raises:
        ConfigError: an unknown kind of projector, or a tokenizer or feature extractor that is missing.
        PatchError: an encoder or a decoder that cannot be joined.
    """
    tokenizer = _tokenizer_of(decoder) if tokenizer is None else copy.deepcopy(tokenizer)
    feature_extractor = _extractor_of(encoder) if feature_extractor is None else feature_extractor
    encoder = AutoModel.from_pretrained(encoder) if isinstance(encoder, (str, os.PathLike)) else encoder
    decoder = AutoModelForCausalLM.from_pretrained(decoder) if isinstance(decoder, (str, os.PathLike)) else decoder
    bridge = _bridge_for(encoder, decoder, projector)
    tower = _tower_of(encoder)
    token = placeholder or bridge.token[1]
    if token not in tokenizer.get_added_vocab():  # one that is a word already becomes special, and keeps its number
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    token_id = tokenizer.convert_tokens_to_ids(token)
    model = _joined(bridge, tower, decoder, projector, token_id, vocabulary=len(tokenizer))
    processor = getattr(transformers, bridge.processor)(
        feature_extractor, tokenizer, chat_template=_with_content(tokenizer.chat_template, token),
        **bridge.processing(tower.config, token),
    )  # fmt: skip
    if aligner is not None or attention is not None:
        aligners = () if aligner is None else aligner if isinstance(aligner, tuple) else (aligner,)
        patch_model(model, SteerConfig(attention=attention, aligners=aligners, train_projector=bool(aligners)))
    return model, processor


def _bridge_for(encoder: Any, decoder: Any, projector: str) -> Bridge:
    if not isinstance(encoder, PreTrainedModel) or encoder.config.model_type not in ENCODERS:
        got = encoder.config.model_type if isinstance(encoder, PreTrainedModel) else type(encoder).__name__
        known = ", ".join(ENCODERS)
        raise PatchError(f"the encoder must be one of {known}; got {got!r}. A new one is a row in hf_steer/compose.py.")
    texts = [name for name, row in FAMILIES.items() if row.layers is not None and not row.encoders]
    speaks = isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None
    if not speaks or decoder.config.model_type not in texts:
        got = decoder.config.model_type if isinstance(decoder, PreTrainedModel) else type(decoder).__name__
        raise PatchError(
            f"the decoder must be a text-only causal language model ({', '.join(texts)}); got {got!r}. Load it with "
            "AutoModelForCausalLM."
        )
    for part, model in (("encoder", encoder), ("decoder", decoder)):
        if find_steering(model) is not None:
            raise PatchError(f"the {part} is patched; call hf_steer.unpatch_model on it first, and patch the composed model.")
    if projector not in _ACTIVATIONS:
        raise ConfigError(f"projector must be one of {', '.join(map(repr, _ACTIVATIONS))}; got {projector!r}.")
    return BRIDGES[ENCODERS[encoder.config.model_type], projector]


def _tower_of(encoder: Any) -> Any:
    """The encoder itself, without a head, a decoder or a text tower."""
    if encoder.config.model_type == "whisper":
        return encoder.get_encoder()
    return encoder if encoder.config.model_type.endswith("_vision_model") else encoder.get_encoder(modality="image")


def _joined(bridge: Bridge, tower: Any, decoder: Any, projector: str, token_id: int, *, vocabulary: int) -> Any:
    """The model, its parts in place, frozen but for the projector."""
    text_config = copy.deepcopy(decoder.config)
    model_class = getattr(transformers, bridge.model)
    tied = bool(text_config.tie_word_embeddings and model_class._tied_weights_keys)
    text_config.tie_word_embeddings = tied
    section = copy.deepcopy(tower.config) if bridge.tower_settings is None else bridge.tower_settings(tower.config)
    config = getattr(transformers, bridge.config)(
        text_config=text_config, tie_word_embeddings=tied,
        **{bridge.section: section, bridge.token[0]: token_id, **bridge.settings(tower.config, projector)},
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = model_class._from_config(config, attn_implementation=decoder.config._attn_implementation)
    places = {name.rpartition(".")[2]: name for name, _ in reversed(list(model.named_modules())) if name.count(".") < 2}
    weight = next(decoder.parameters())
    own = model.get_submodule(places[bridge.tower])
    if type(own) is not type(tower):  # the same weights under another class
        own.load_state_dict({name: value.to(weight.dtype) for name, value in tower.state_dict().items()}, assign=True)
        tower = own
    elif next(tower.parameters()).dtype != weight.dtype:
        tower = copy.deepcopy(tower).to(weight.dtype)
    fresh = _scaled(type(model.get_submodule(places["multi_modal_projector"]))(config), decoder).to(weight.device, weight.dtype)
    model.set_submodule(places[bridge.tower], tower)
    model.set_submodule(places["multi_modal_projector"], fresh)
    for name, part in decoder.base_model.named_children():  # one by one: the decoder keeps its own table of embeddings
        model.set_submodule(f"{places['language_model']}.{name}", part)
    head = decoder.get_output_embeddings()
    model.set_submodule(places["lm_head"], head if tied or not decoder.config.tie_word_embeddings else copy.deepcopy(head))
    if vocabulary > decoder.get_input_embeddings().num_embeddings:
        _make_room(model, vocabulary)
    model.generation_config = copy.deepcopy(decoder.generation_config)
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = [*suppressed, token_id]  # it stands for what is heard or seen, and is not said
    model.requires_grad_(False)
    fresh.requires_grad_(True)
    return model.train(decoder.training)


def _scaled(projector: torch.nn.Module, decoder: Any) -> torch.nn.Module:
    """Start a projector so that what it says of normalised features is as large as a word's embedding."""
    last = [layer for layer in projector.modules() if isinstance(layer, torch.nn.Linear)][-1]
    size = decoder.get_input_embeddings().weight.detach().float().std().item()
    torch.nn.init.normal_(last.weight, std=size * last.in_features**-0.5)
    if last.bias is not None:
        torch.nn.init.zeros_(last.bias)
    return projector


def _make_room(model: Any, vocabulary: int) -> None:
    """Rows for the placeholder, in tables of its own: transformers would resize the decoder's in place."""
    model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
    model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
    if model.config.tie_word_embeddings:
        model.tie_weights()
    model.resize_token_embeddings(vocabulary, mean_resizing=False)


def _has_class_token(config: Any) -> bool:
    return bool(config.model_type.startswith("clip"))


def _tokenizer_of(decoder: Any) -> Any:
    if not isinstance(decoder, (str, os.PathLike)):
        raise ConfigError("compose needs tokenizer= with a live decoder: AutoTokenizer.from_pretrained(...) of its folder.")
    return AutoTokenizer.from_pretrained(decoder)


def _extractor_of(encoder: Any) -> Any:
    if not isinstance(encoder, (str, os.PathLike)):
        raise ConfigError(
            "compose needs feature_extractor= with a live encoder: AutoFeatureExtractor or AutoImageProcessor of its folder."
        )
    modality = ENCODERS.get(transformers.AutoConfig.from_pretrained(encoder).model_type)
    loader: Any = transformers.AutoImageProcessor if modality == "image" else transformers.AutoFeatureExtractor
    return loader.from_pretrained(encoder)


def _with_content(template: Any, token: str) -> Any:
    """The decoder's own chat templates, after content that is a list of parts has been joined into text."""
    if isinstance(template, dict):
        return {name: _with_content(one, token) for name, one in template.items()}
    return (
        "{%- set joined = namespace(messages=[], text='') -%}{%- for message in messages -%}"
        "{%- if message['content'] is string or message['content'] is not iterable -%}{%- set joined.text = message['content'] -%}"
        "{%- else -%}{%- set joined.text = '' -%}{%- for part in message['content'] -%}"
        "{%- set joined.text = joined.text + (part['text'] if part['type'] == 'text' else '" + token + "') -%}"
        "{%- endfor -%}{%- endif -%}"
        "{%- set joined.messages = joined.messages + [dict(message, content=joined.text)] -%}{%- endfor -%}"
        "{%- set messages = joined.messages -%}"
    ) + (template or "{% for message in messages %}{{ message['content'] }}{% endfor %}")
