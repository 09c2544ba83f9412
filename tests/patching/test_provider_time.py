"""A provider that was shown other frames of a video than the steered model: held together in time, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kit.tiny import VIDEO, make_model, make_prompt, pad_rows
from kit.tiny_encoders import make_encoder_model
from PIL import Image
from qwen_vl_utils import vision_process
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_steer import (
    AttentionConfig,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SaliencyProvider,
    SteerConfig,
    patch_model,
    read_saliency,
    unpatch_model,
)
from hf_steer.embedded import embedded_model_dir
from hf_steer.saliency.films import FrameTimes, even_times, times_of


def overlap(start, end, other_start, other_end):
    return max(0.0, min(end, other_end) - max(start, other_start))


def aligned(maps, when, steps):
    """Mean of the maps over the time that each step shares with them, pixel by pixel.

    Args:
        maps: `[frame][row][column]`.
        when: `(start, end)` of each map.
        steps: `(start, end)` of each step of the steered model.
    """
    result = []
    for start, end in steps:
        shares = [overlap(start, end, *stretch) for stretch in when]
        result.append([[
            sum(share * own[row][column] for share, own in zip(shares, maps, strict=True)) / sum(shares) if sum(shares) else 0.0
            for column in range(len(maps[0][0]))
        ] for row in range(len(maps[0]))])  # fmt: skip
    return torch.tensor(result)


def evenly(count):
    return [(number / count, (number + 1) / count) for number in range(count)]


def stretches(times):
    return list(zip(times.edges, times.edges[1:], strict=False))


class Seen:
    """A provider that says what it is told to say of one video."""

    def __init__(self, maps, times, size=(24, 16)):
        self.found = {("video", 0, 0): (maps, size, times)}

    def look(self, conversations):
        return self.found


def model_of(family):
    return make_encoder_model(family, seed=3) if family == "llava_onevision" else make_model(family, seed=3)


def inputs_of(family, steps, side):
    """One row with one video of so many steps, `side` tokens high, and half as many again wide where the model can."""
    if family != "llava_onevision":
        return make_prompt(family, [[3, ("video", steps, side, side + side // 2), 4]])
    tokens = [5, 6, *[VIDEO] * (steps * side * side + 1), 7]
    generator = torch.Generator().manual_seed(0)
    return {**pad_rows([tokens], padding="left"), "pixel_values_videos": torch.randn(1, steps, 3, 12, 12, generator=generator)}


def laid(family, inputs, statement):
    """Scores of the video's tokens, `(steps, rows, columns)`; the newline at the end is left out."""
    reading = read_saliency(model_of(family), inputs, given=statement)
    (span,) = reading.spans
    frames, height, width = span.layout.grid
    scores = reading.raw.values[span.row, span.positions]
    assert not scores[frames * height * width :].any()
    return scores[: frames * height * width].view(frames, height, width)


STEERED = [("qwen2_vl", 2), ("qwen2_5_vl", 2), ("qwen3_vl", 2), ("llava_onevision", 1)]
"""Families, and how many frames they put into one step."""


@pytest.mark.parametrize(("family", "temporal"), STEERED)
@pytest.mark.parametrize(("maps", "steps"), [(5, 5), (5, 3), (3, 5), (4, 2), (2, 4), (1, 3), (3, 1)])
def test_frames_of_both_share_the_video_evenly_where_nothing_is_said(family, temporal, maps, steps):
    side = 2
    inputs = inputs_of(family, steps, side)
    width = side if family == "llava_onevision" else side + side // 2
    seen = torch.rand(maps, side, width, generator=torch.Generator().manual_seed(7)) + 0.1
    found = laid(family, inputs, Saliency.external(Seen(seen, even_times(maps)), []))
    torch.testing.assert_close(found, aligned(seen.tolist(), evenly(maps), evenly(steps)))
    if maps == steps:
        assert torch.equal(found, seen)  # nothing is mixed
    assert maps == 1 or not torch.equal(found[0], found[-1]) or steps == 1


def metadata(indices, total, fps=None):
    return {"frames_indices": indices, "total_num_frames": total, "fps": fps}


def stands_for(stamps, total, fps=1.0):
    """`(start, end)` of each frame : to the middles between it and its neighbours, the first from 0, the last to the end."""
    found = []
    for number, stamp in enumerate(stamps):
        start = 0.0 if number == 0 else (stamps[number - 1] + stamp) / 2
        end = total if number == len(stamps) - 1 else (stamp + stamps[number + 1]) / 2
        found.append((start / fps, end / fps))
    return found


def in_pairs(when, temporal):
    return [(group[0][0], group[-1][1]) for group in (when[first : first + temporal] for first in range(0, len(when), temporal))]


@pytest.mark.parametrize(("family", "temporal"), STEERED)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (metadata([0, 20, 39, 59], 60, 30.0), metadata([0, 10, 20, 30, 40, 50], 60, 30.0)),
        (metadata([0, 30, 60, 90, 119], 120, 24.0), metadata([0, 4, 8, 12, 16, 20, 24], 25, 5.0)),  # one file at two rates
        (metadata([0, 1, 2, 50, 98, 99], 100, 10.0), metadata([10, 30, 50, 70, 90], 100, 10.0)),
        (metadata([0, 3, 6, 9], 10, None), metadata([0, 50, 99], 100, 25.0)),  # without a rate only shares of the whole compare
    ],
)
def test_frames_that_are_known_in_time_are_held_together_by_it(family, temporal, theirs, ours):
    steps = -(-len(ours["frames_indices"]) // temporal)
    inputs = inputs_of(family, steps, 2)
    width = 2 if family == "llava_onevision" else 3
    times = times_of(theirs).joined(2)
    seen = torch.rand(times.frames, 2, width, generator=torch.Generator().manual_seed(7)) + 0.1
    found = laid(family, inputs, Saliency.external(Seen(seen, times), [], video_metadata=[ours]))
    scale = [said["fps"] if theirs["fps"] else said["total_num_frames"] for said in (theirs, ours)]
    when, own = (
        in_pairs(stands_for(said["frames_indices"], said["total_num_frames"], rate), group)
        for said, rate, group in zip((theirs, ours), scale, (2, temporal), strict=True)
    )
    torch.testing.assert_close(found, aligned(seen.tolist(), when, own))
    by_number = torch.stack([seen[min(step, len(seen) - 1)] for step in range(steps)])
    assert not torch.allclose(found, by_number)


def test_a_part_of_a_video_is_a_part_of_its_time():
    """The provider was shown seconds 2 to 4 of eight: the other steps hear nothing of it. Readers count from the beginning."""
    clip = metadata([20, 27, 33, 40], 20, 10.0)
    assert times_of(clip) == FrameTimes((2.0, 2.35, 3.0, 3.65, 4.0), seconds=True)
    seen = torch.rand(4, 2, 3) + 0.1
    whole = metadata(list(range(5, 80, 10)), 80, 10.0)
    found = laid("qwen2_vl", inputs_of("qwen2_vl", 4, 2), Saliency.external(Seen(seen, times_of(clip)), [], video_metadata=[whole]))
    torch.testing.assert_close(found, aligned(seen.tolist(), stretches(times_of(clip)), [(0, 2), (2, 4), (4, 6), (6, 8)]))
    assert [bool(step.any()) for step in found] == [False, True, False, False]


@pytest.fixture(scope="module")
def embedded():
    folder = embedded_model_dir()
    return [AutoModelForImageTextToText.from_pretrained(folder).eval() for _ in range(2)], AutoProcessor.from_pretrained(folder)


def frames_of(count):
    return [Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 112, 3), dtype=np.uint8)) for seed in range(count)]


def told(video):
    return [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "?"}]}]


@pytest.mark.parametrize(("looked", "shown"), [(8, 4), (4, 8), (5, 4), (6, 6)])
def test_a_real_provider_of_other_frames_steers_by_time(embedded, looked, shown):
    """Lists of frames: nothing says when they were, so each list shares the video evenly, the odd one without its repetition."""
    (eyes, model), processor = embedded
    provider = SaliencyProvider(eyes, processor)
    maps, _, times = provider.look([told(frames_of(looked))])["video", 0, 0]
    expected_times = in_pairs(evenly(looked), 2)
    assert stretches(times) == [pytest.approx(stretch) for stretch in expected_times]
    assert len(maps) == -(-looked // 2)
    _, (video,) = vision_process.process_vision_info(told(frames_of(shown)))
    text = processor.apply_chat_template(told(frames_of(shown)), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], videos=[video], return_tensors="pt", do_sample_frames=False)
    outside = Saliency.external(provider, told(frames_of(looked)))
    reading = read_saliency(model, inputs, given=outside)
    (span,) = reading.spans
    found = reading.raw.values[0, span.positions].view(span.layout.grid)
    torch.testing.assert_close(found, aligned(maps.tolist(), evenly(len(maps)), evenly(shown // 2)), rtol=1e-5, atol=1e-6)
    said = Saliency.external(
        provider, told(frames_of(looked)), video_metadata=[{"frames_indices": range(shown), "total_num_frames": shown, "fps": None}]
    )
    found = read_saliency(model, inputs, given=said).raw.values[0, span.positions].view(span.layout.grid)
    own = in_pairs(stands_for(range(shown), shown), 2)
    when = [tuple(edge * shown for edge in stretch) for stretch in expected_times]
    torch.testing.assert_close(found, aligned(maps.tolist(), when, own), rtol=1e-5, atol=1e-6)
    patch_model(model, SteerConfig(attention=AttentionConfig(strength=4.0, saliency=SaliencyConfig(source=None))))
    with torch.no_grad():
        plain, steered = model(**inputs).logits, model(**inputs, saliency=said).logits
    unpatch_model(model)
    assert (plain - steered).abs().max() > 1e-3


def test_a_file_that_the_provider_reads_says_when_its_frames_were(embedded, monkeypatch):
    (eyes, _), processor = embedded
    asked = []

    def read(element):
        asked.append(element["video"])
        indices = torch.tensor([0, 30, 59, 89])
        said = {"fps": 30.0, "frames_indices": indices, "total_num_frames": 90, "video_backend": "ours"}
        return torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames_of(4)]), said, 4 / 3

    monkeypatch.setattr(vision_process, "VIDEO_READER_BACKENDS", {"ours": read})
    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "ours")
    maps, _, times = SaliencyProvider(eyes, processor).look([told("walk.mp4")])["video", 0, 0]
    assert asked == ["walk.mp4"]
    assert (len(maps), times.seconds) == (2, True)
    assert stretches(times) == [pytest.approx((0.0, 44.5 / 30)), pytest.approx((44.5 / 30, 3.0))]


def test_two_videos_and_a_picture_keep_their_own_times():
    provider = Seen(torch.rand(4, 2, 3), even_times(4))
    provider.found = {
        ("image", 0, 0): (torch.rand(1, 2, 3), (24, 16), even_times(1)),
        ("video", 0, 0): (torch.rand(4, 2, 3), (24, 16), FrameTimes((0.0, 1.0, 2.0, 3.0, 4.0), seconds=True)),
        ("video", 1, 0): (torch.rand(2, 2, 3), (24, 16), FrameTimes((0.0, 2.0, 8.0), seconds=True)),
    }
    said = [metadata([0, 3], 4, 1.0), metadata([0, 3, 5, 7], 8, 1.0)]
    prompt = [[2, ("image", 2, 3), 1, ("video", 1, 2, 3)], [("video", 2, 2, 3), 3]]
    outside = Saliency.external(provider, [], video_metadata=said)
    reading = read_saliency(model_of("qwen2_vl"), make_prompt("qwen2_vl", prompt), given=outside)
    steps = {("video", 0): [(0.0, 4.0)], ("video", 1): [(0.0, 4.0), (4.0, 8.0)]}
    for span in reading.spans:
        maps, _, times = provider.found[span.modality, span.row, 0]
        found = reading.raw.values[span.row, span.positions].view(span.layout.grid)
        wanted = maps if span.modality == "image" else aligned(maps.tolist(), stretches(times), steps[span.modality, span.row])
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([metadata([0, 1, 2, 3, 4, 5], 6, 2.0)], "6 frames, 2 to a step, but the model's inputs have 2 steps.*return_metadata"),
        ([], "speaks of 0 videos, and the messages hold 1"),
        ([metadata(None, 6, 2.0)], "frames_indices .* must be known"),
        ([metadata([0, 1], None, 2.0)], "total_num_frames must be known"),
        ([metadata([3, 1], 6, 2.0)], r"frames_indices \(rising\)"),
        ([None], "got None"),
    ],
)
def test_metadata_that_cannot_be_the_models_is_refused(said, message):
    provider = Seen(torch.rand(3, 2, 3), even_times(3))
    with pytest.raises(SaliencyError, match=message):
        laid("qwen2_vl", inputs_of("qwen2_vl", 2, 2), Saliency.external(provider, [], video_metadata=said))


def test_a_processor_that_samples_again_is_refused(embedded):
    (eyes, _), processor = embedded

    class Halving:
        """Shows the model every other frame, whatever it is asked."""

        apply_chat_template = processor.apply_chat_template

        def __call__(self, *, videos, **arguments):
            return processor(videos=[video[::2] for video in videos], **{**arguments, "video_metadata": None})

    with pytest.raises(SaliencyError, match="made 2 steps of a video of which 4 were sampled"):
        SaliencyProvider(eyes, Halving()).look([told(frames_of(8))])
