"""Seconds land on the tokens that hear them: which those are is asked of the models, by making stretches of a sound anew."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from kit.listening import AUDIO, END, LISTENERS, START, changes, hear, make_listener, noise

import hf_steer
from hf_steer import AttentionConfig, Saliency, SaliencyConfig
from hf_steer.errors import SaliencyError
from hf_steer.families import family_of, resolve
from hf_steer.ground.arguments import Given
from hf_steer.ground.sounds import strides_of
from hf_steer.saliency.ears import EARS, Ear, places_between
from hf_steer.saliency.layouts import read_layouts
from hf_steer.saliency.regions import paint_region

SLOT = 0.02
CAUSAL = {"gemma3n", "muse_spark", "vibevoice_asr"}
"""Their convolutions or norms carry the past into a token; it ends where it hears last."""
SCALED = {"nemotron_h_omni"}
"""Their extractors scale each feature by its spread over the whole sound, so that every token changes a little with any stretch."""
HERE = [family for family, own in LISTENERS.items() if hasattr(transformers, own.model)]
"""Those that the installed transformers has."""
WHOLE = [family for family in HERE if LISTENERS[family].whole is None]
every = pytest.mark.parametrize("family", HERE)


def sounds_of(family):
    own = LISTENERS[family]
    return [noise(seconds, own.rate, seed) for seed, seconds in enumerate(own.seconds)]


def anatomy_of(family):
    whole = LISTENERS[family].whole
    if whole is not None:
        return SimpleNamespace(family=family, layout=family_of(family).layout, root=SimpleNamespace(config=whole()))
    return resolve(make_listener(family))


def layouts_of(family, sounds):
    named = LISTENERS[family].extract(list(sounds))
    return read_layouts(Given(named), {}, anatomy_of(family), whole=True)["audio"]


def placed(layout):
    return layout.cells[~torch.isnan(layout.cells).any(1)]


@every
def test_there_are_as_many_tokens_with_a_place_as_the_model_makes_and_they_follow_one_another(family):
    sounds = sounds_of(family)
    layouts = layouts_of(family, sounds)
    assert len(hear(family, sounds)) == sum(len(placed(layout)) for layout in layouts)
    for layout, seconds in zip(layouts, LISTENERS[family].seconds, strict=True):
        cells = placed(layout).unique(dim=0)
        torch.testing.assert_close(cells[1:, 0], cells[:-1, 1])
        assert cells[0, 0] == 0
        assert (cells[:, 1] > cells[:, 0]).all()
        assert layout.size[0] - layout.slack <= seconds <= layout.size[0] + 1e-6
        assert layout.tokens == (12 if family == "gemma3n" else len(placed(layout)))


@every
@pytest.mark.parametrize("which", [0, 1])
def test_what_changes_a_token_most_lies_in_its_cell(family, which):
    sounds = sounds_of(family)
    layouts = layouts_of(family, sounds)
    before = sum(len(placed(layout)) for layout in layouts[:which])
    cells = placed(layouts[which])
    changed = changes(family, sounds, which, SLOT)
    others = torch.ones(changed.shape[1], dtype=torch.bool)
    others[before : before + len(cells)] = False
    changed, elsewhere = changed[:, ~others], changed[:, others]
    assert elsewhere.max() < 1e-5 * changed.max()  # the other sound of the batch
    strong = changed * (changed > 0.25 * changed.amax(0))
    middles = (torch.arange(len(changed), dtype=torch.float64) + 0.5) * SLOT
    for token, (start, end) in enumerate(cells.tolist()):
        if start > LISTENERS[family].seconds[which]:  # padding, of which Voxtral's inputs do not tell
            continue
        if family in CAUSAL:
            last = float(middles[changed[:, token] > 0.05 * changed[:, token].max()].max())
            assert start < last < end + SLOT, (token, last, start, end)
        else:
            heard = float((strong[:, token] * middles).sum() / strong[:, token].sum())
            assert start - SLOT / 4 < heard < end + SLOT / 4, (token, heard, start, end)


@pytest.mark.parametrize("family", sorted(set(HERE) - CAUSAL - SCALED))
def test_a_stretch_lights_the_tokens_that_change_with_it(family):
    """Every token that is lit through changes, and none changes that is further from the stretch than its neighbours."""
    own, sounds = LISTENERS[family], sounds_of(family)
    plain, layout = hear(family, sounds), layouts_of(family, sounds)[0]
    for start, end in ((0.0, 0.113), (0.3013, 0.72), (0.9171, 1.07)):
        (region,) = Saliency.from_seconds((start, end)).regions
        lit = paint_region(region, layout, 1)
        other = [sounds[0].copy(), sounds[1]]
        stretch = other[0][round(start * own.rate) : round(end * own.rate)]
        stretch[:] = noise(len(stretch) / own.rate, own.rate, 5)
        change = (hear(family, other) - plain).norm(dim=1)[: len(lit)]
        changed = change > 0.05 * change.max()  # what padding is scaled by moves a little
        assert changed[lit > 0.99].all()
        near = torch.nn.functional.max_pool1d((lit > 0).float()[None], 2 * neighbours(layout) + 1, 1, neighbours(layout))[0] > 0
        near[layout.cells[:, 0] > own.seconds[0]] = True  # padding, as above
        assert not changed[~near].any(), (start, end, lit, change)


def neighbours(layout):
    """Tokens that hear the same."""
    return int((layout.cells[0] == layout.cells).all(1).sum())


@pytest.mark.parametrize("family", WHOLE)
def test_seconds_steer_the_patched_model(family):
    sounds = sounds_of(family)
    model, named = make_listener(family), LISTENERS[family].extract(list(sounds))
    counts = [layout.tokens for layout in layouts_of(family, sounds)]
    longest = max(counts)
    ids = torch.tensor([[*[7] * (longest - count), START, *[AUDIO] * count, END, 8] for count in counts])
    inputs = {
        "input_ids": ids, "attention_mask": (ids != 7).long(),
        **{name: value for name, value in named.items() if name not in ("num_audio_tokens",)},
    }  # fmt: skip
    if family.startswith("granite_speech"):
        inputs.pop("audio_embed_sizes")
    steering = AttentionConfig(strength=3.0, saliency=SaliencyConfig(source=None, normalize="none"))
    hf_steer.patch_model(model, steering)
    try:
        with torch.no_grad():
            outputs = {}
            for key, said in (("nothing", None), ("early", (0.0, 0.3)), ("late", (0.5, 0.8))):
                torch.manual_seed(0)
                saliency = None if said is None else Saliency.from_seconds(said) + Saliency.from_seconds(said, row=1)
                outputs[key] = model(**inputs, **({} if saliency is None else {"saliency": saliency})).logits[:, -1]
    finally:
        hf_steer.unpatch_model(model)
    for key, other in (("nothing", "early"), ("early", "late"), ("nothing", "late")):
        assert ((outputs[key] - outputs[other]).abs().amax(1) > 1e-4).all(), (key, other)


def test_a_sound_that_was_cut_or_goes_on_has_no_known_end():
    whole, windowed = Ear(steps=8), Ear(steps=8, long=True)
    assert whole.layout(16, full=True).slack == pytest.approx(0.01)
    assert not whole.layout(16, full=True).continues
    assert windowed.layout(16, full=True).continues
    assert windowed.layout(16, full=True).slack == Ear(steps=4, most_seconds=1.0).layout(100, full=False).slack == float("inf")
    assert windowed.layout(15, full=False).slack == pytest.approx(0.01)


def test_the_chunks_of_a_qwen_end_with_their_last_token():
    cells = Ear(steps=8, centred=True, window=20).layout(45, full=False).cells
    starts = [0.0, 0.04, 0.12, 0.2, 0.24, 0.32, 0.4]
    torch.testing.assert_close(cells[:, 0], torch.tensor(starts, dtype=torch.float64))
    assert cells[-1, 1] == pytest.approx(0.45)


def test_what_is_left_over_makes_a_token_or_is_not_heard():
    assert [Ear(steps=8, rest=7).layout(count, full=False).tokens for count in (6, 7, 14, 15, 16)] == [0, 1, 1, 2, 2]
    assert [Ear(steps=8).layout(count, full=False).tokens for count in (1, 8, 9)] == [1, 1, 2]
    assert Ear(steps=8, rest=7).layout(20, full=False).cells[-1, 1] == pytest.approx(0.16)
    assert Ear(steps=8).layout(20, full=False).cells[-1, 1] == pytest.approx(0.2)


def test_seconds_never_light_the_padding_of_gemma_3n():
    (layout, _) = layouts_of("gemma3n", sounds_of("gemma3n"))
    (region,) = Saliency.from_seconds((0.0, 1.43)).regions
    lit = paint_region(region, layout, 1)
    assert lit[: len(placed(layout))].gt(0.5).all()
    assert not lit[len(placed(layout)) :].any()
    (late,) = Saliency.from_seconds((1.6, 1.7)).regions
    with pytest.raises(SaliencyError, match="reaches past audio 0 in row 0, of which the model hears"):
        paint_region(late, layout, 1)


@pytest.mark.parametrize(("family", "step_seconds"), [("whisper", 0.01), ("moonshine", 1 / 16000)])
def test_places_of_an_encoder_lie_where_its_convolutions_put_them(family, step_seconds):
    sound = noise(1.17, 16000, 0)
    model = make_listener(family)
    stride, first = strides_of(model.get_encoder())
    step, first = stride * step_seconds, first * step_seconds
    changed = changes(family, [sound], 0, SLOT / 2)
    places = changed.shape[1]
    strong = changed * (changed > 0.25 * changed.amax(0))
    middles = (torch.arange(len(changed), dtype=torch.float64) + 0.5) * SLOT / 2
    for place in range(1, int((1.15 - first) / step)):
        heard = float((strong[:, place] * middles).sum() / strong[:, place].sum())
        assert abs(heard - (first + place * step)) < step * 0.6, (place, heard, first, step)
    plain = hear(family, [sound])
    for start, end in ((0.0, 0.1), (0.3013, 0.507), (0.61, 0.615), (0.9, 1.17)):
        own = places_between(start, end, places=places, step_seconds=step, first_seconds=first)
        other = sound.copy()
        stretch = other[round(start * 16000) : round(end * 16000)]
        stretch[:] = noise(len(stretch) / 16000, 16000, 7)
        change = (hear(family, [other]) - plain).norm(dim=1)
        assert (change[own] > 0.05 * change.max()).all(), (start, end, own)
        assert change.argmax() in range(own.start - 1, own.stop + 1)
        far = torch.ones(places, dtype=torch.bool)
        far[max(0, own.start - 2) : own.stop + 2] = False
        far[int(1.17 / step) :] = False  # padding
        assert (change[far] < 0.05 * change.max()).all(), (start, end, own)


def test_stretches_at_the_edges_name_places_that_are_there():
    how = {"places": 10, "step_seconds": 0.02, "first_seconds": 0.0}
    assert places_between(0.0, 0.2, **how) == range(10)
    assert places_between(0.05, 0.09, **how) == range(3, 5)
    assert places_between(0.001, 0.002, **how) == range(1)
    assert places_between(0.19, 0.5, **how) == range(9, 10)
    assert strides_of(torch.nn.Linear(2, 2)) is None


def test_every_ear_is_heard_by_a_model_of_this_file():
    layouts = [family_of(family).layout for family in LISTENERS]
    heard = {layout if isinstance(layout, str) else layout[-1] for layout in layouts}  # behind that of its pictures
    assert heard == {*EARS, "qwen2_audio", "audioflamingo3", "voxtral"}
