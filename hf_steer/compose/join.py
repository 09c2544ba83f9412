"""One ordinary Hugging Face model out of a frozen encoder and a frozen text-only decoder, with a projector to train between.

The result is a model of a class that transformers has already: LLaVA for pictures; for sound Qwen2-Audio with a linear
projector, or Audio Flamingo 3 with an MLP, which both take the mean of two frames before the projector, or Voxtral, which puts
several frames side by side. It saves, loads with the Auto classes, generates, pads and beams as these do, and nothing of
hf_steer is needed to run it.
"""

from __future__ import annotations

import copy
import os
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_steer.compose.bridges import ACTIVATIONS, BRIDGES, ENCODERS, Bridge, stacked
from hf_steer.compose.processor import StackingProcessor
from hf_steer.config import AlignerConfig, AttentionConfig, SteerConfig
from hf_steer.errors import ConfigError, PatchError
from hf_steer.ground.implementations import implementation_of
from hf_steer.ground.settings import generate_like
from hf_steer.patching import patch_model
from hf_steer.patching.scopes import find_steering
from hf_steer.registry import FAMILIES


def compose(
    encoder: PreTrainedModel | str | os.PathLike[str],
    decoder: PreTrainedModel | str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    feature_extractor: Any = None,
    aligner: AlignerConfig | tuple[AlignerConfig, ...] | None = None,
    attention: AttentionConfig | None = None,
    projector: Literal["linear", "mlp"] = "linear",
    pooling: Literal["mean", "stack"] = "mean",
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
        pooling: of sound, before the projector: `"mean"` of two frames, of as many as the sound has; or `"stack"`, in which
            four frames of a Whisper (encoder_ffn_dim / d_model) make one token, always as many as fill the encoder's window. Its
            processor is loaded with `StackingProcessor.from_pretrained` (`from hf_steer.compose import StackingProcessor`).
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
    bridge = _bridge_for(encoder, decoder, projector, pooling)
    tower = _tower_of(encoder)
    token = placeholder or bridge.token[1]
    if token not in tokenizer.get_added_vocab():  # one that is a word already becomes special, and keeps its number
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    token_id = tokenizer.convert_tokens_to_ids(token)
    model = _joined(bridge, tower, decoder, projector, token_id, vocabulary=len(tokenizer))
    kind = StackingProcessor if bridge.processor == "StackingProcessor" else getattr(transformers, bridge.processor)
    processor = kind(
        feature_extractor, tokenizer, chat_template=_with_content(tokenizer.chat_template, token),
        **bridge.processing(tower.config, token),
    )  # fmt: skip
    if aligner is not None or attention is not None:
        aligners = () if aligner is None else aligner if isinstance(aligner, tuple) else (aligner,)
        patch_model(model, SteerConfig(attention=attention, aligners=aligners, train_projector=bool(aligners)))
    return model, processor


def _bridge_for(encoder: Any, decoder: Any, projector: str, pooling: str) -> Bridge:
    if not isinstance(encoder, PreTrainedModel) or encoder.config.model_type not in ENCODERS:
        got = encoder.config.model_type if isinstance(encoder, PreTrainedModel) else type(encoder).__name__
        known = ", ".join(ENCODERS)
        raise PatchError(f"the encoder must be one of {known}; got {got!r}. A new one is a row in hf_steer/compose/bridges.py.")
    texts = [name for name, row in FAMILIES.items() if row.composes]
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
    if projector not in ACTIVATIONS:
        raise ConfigError(f"projector must be one of {', '.join(map(repr, ACTIVATIONS))}; got {projector!r}.")
    modality = ENCODERS[encoder.config.model_type]
    if (modality, pooling, projector) not in BRIDGES:
        kinds = sorted({row[1] for row in BRIDGES if row[0] == modality})
        raise ConfigError(f"pooling for {modality} must be one of {', '.join(map(repr, kinds))}; got {pooling!r}.")
    if pooling == "stack":
        stacked(encoder.config)
    return BRIDGES[modality, pooling, projector]


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
        model: Any = model_class._from_config(config, attn_implementation=implementation_of(decoder.config))
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
    generate_like(model, decoder, never=token_id)  # it stands for what is heard or seen, and is not said
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
