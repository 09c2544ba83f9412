"""A processor for composed models that transformers has none for."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature, ProcessorMixin

from hf_steer.errors import ConfigError


class StackingProcessor(ProcessorMixin):
    """Text and sounds for a composed Voxtral, with any tokenizer; transformers' own processor for it needs Mistral's.

    Args:
        feature_extractor: a WhisperFeatureExtractor.
        tokenizer: with the placeholder token.
        chat_template: that puts one placeholder where a sound is.
        audio_token: text of the placeholder.
        frames: of the encoder that make one token.
    """

    def __init__(
        self, feature_extractor: Any, tokenizer: Any, chat_template: Any = None, audio_token: str = "[AUDIO]", frames: int = 4
    ) -> None:
        self.audio_token, self.frames = audio_token, frames
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(self, text: Any = None, audio: Any = None, *, sampling_rate: int | None = None, **kwargs: Any) -> BatchFeature:
        """Mel frames of each sound over the encoder's whole window, and text with as many placeholders as it gives tokens.

        Args:
            text: a prompt or a list of them, with one placeholder per sound.
            audio: the sounds in the order of their placeholders, float32 at the extractor's sampling rate; None for none.
            sampling_rate: of the sounds, for a check; None for none.
            **kwargs: of the tokenizer, such as `padding`.

        Raises:
            ConfigError: sounds and placeholders of other number, a sound longer than the window, or of another rate.
        """
        texts = [text] if isinstance(text, str) else list(text)
        sounds = [] if audio is None else list(audio) if isinstance(audio, (list, tuple)) else [audio]
        placeholders = sum(one.count(self.audio_token) for one in texts)
        longest = max((len(sound) for sound in sounds), default=0)
        if placeholders != len(sounds) or longest > self.feature_extractor.n_samples:
            raise ConfigError(
                f"{len(sounds)} sounds came for {placeholders} {self.audio_token} in the text, the longest with {longest} samples; "
                f"give one for each, of at most {self.feature_extractor.n_samples} samples."
            )
        rate = self.feature_extractor.sampling_rate
        if sampling_rate not in (None, rate):
            raise ConfigError(f"sounds come at {rate} samples per second here; got {sampling_rate}.")
        tokens = self.feature_extractor.nb_max_frames // 2 // self.frames
        kwargs.setdefault("return_tensors", "pt")
        written = [one.replace(self.audio_token, self.audio_token * tokens) for one in texts]
        inputs: dict[str, Any] = dict(self.tokenizer(written, **kwargs))
        if sounds:
            inputs |= self.feature_extractor(sounds, sampling_rate=rate, return_tensors=kwargs["return_tensors"])
        return BatchFeature(inputs)
