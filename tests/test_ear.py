"""A real ear, `examples/real/ear.py`: it runs on stand-ins, goes on where it was, and measures what it says."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from kit.real import real


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return real("ear_standins").write_standins(tmp_path_factory.mktemp("standins"))


@pytest.fixture(scope="module")
def sounds(places):
    recordings = real("recordings").read_recordings(places["phrases"])
    return real("ear_sounds").hear(places["ear"], recordings, places["ear"].parent)


@pytest.fixture
def writer(places):
    return lambda kind="linear alone": real("ear_training").Writer(*real("ear_training").join(places["ear"], places["mind"], kind))


def test_the_whole_of_it_runs_on_stand_ins_goes_on_where_it_was_and_writes_its_table_and_picture(tmp_path, capsys):
    command = ["--preset", "quick", "--workers", "1", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path)]
    real("ear").main(command)
    rows = list(csv.DictReader((tmp_path / "ear.csv").read_text().splitlines()))
    assert {row["sounds"] for row in rows} == {"held-out phrases", "other readers"}
    kinds = ["linear alone", "simple", "hierarchical", "progressive"]
    assert [row["condition"] for row in rows[:6]] == [*kinds, "start, untrained", "linear alone, sound of another phrase"]
    assert all(row["run"] and row["transformers"] and row["date"] and row["wer"] and row["right"] for row in rows)
    assert all(row["wer_less_linear_low"] and row["parameters"] for row in rows if row["condition"] in kinds[1:])
    assert (tmp_path / "ear.png").stat().st_size > 5000
    (kept,) = (path for path in (tmp_path / "cache").glob("ear-*") if (path / "simple-0.json").is_file())
    marked = json.loads((kept / "simple-0.json").read_text())
    marked["value"]["loss"] = 77.0  # a run that made it anew would not say so
    (kept / "simple-0.json").write_text(json.dumps(marked))
    (kept / "hierarchical-0.json").unlink()
    real("ear").main(command)
    again = list(csv.DictReader((tmp_path / "ear.csv").read_text().splitlines()))
    assert float(again[1]["loss"]) == 77
    assert (kept / "hierarchical-0.json").is_file()
    timed = {"loss", "date", "seconds", "cpu_seconds"}
    assert [{name: row[name] for name in row if name not in timed} for row in again] == [
        {name: row[name] for name in row if name not in timed} for row in rows
    ]


def test_no_text_is_in_two_splits_and_single_words_are_only_trained_on(places):
    divide, normal = real("ear_sounds").divide, real("words").normal_words
    parts = divide(real("recordings").read_recordings(places["phrases"]), report=10, choosing=4)
    assert {name: len(own) for name, own in parts.items()} == {"training": 46, "report": 10, "choosing": 4}
    texts = {name: {one.text for one in own} for name, own in parts.items()}
    assert all(not texts[one] & texts[other] for one, other in itertools.combinations(texts, 2))
    assert all(len(normal(text)) >= 3 for name in ("report", "choosing") for text in texts[name])
    assert any(len(normal(text)) == 1 for text in texts["training"])


def test_what_is_kept_of_a_sound_are_the_states_that_lie_on_it_of_the_whole_window(places):
    sounds, recording = real("ear_sounds"), real("recordings").read_recordings(places["phrases"])[2]
    (own,) = sounds.hear(places["ear"], [recording], places["ear"].parent)
    from transformers import AutoFeatureExtractor, AutoModel

    mel = AutoFeatureExtractor.from_pretrained(places["ear"])(recording.samples(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        whole = AutoModel.from_pretrained(places["ear"]).get_encoder()(mel.input_features).last_hidden_state[0]
    assert len(own.states) == 32  # 0.6 seconds are 30 frames, and eight tokens of four
    torch.testing.assert_close(own.states.float(), whole[:32], rtol=0, atol=0.05)  # kept in bfloat16
    assert (whole[:32] - whole[4:36]).abs().max() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear alone", "simple"])
def test_states_that_were_kept_say_what_the_sound_itself_says(places, writer, kind):
    own = writer(kind)
    for parameter in own.model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    sound = torch.randn(1, 16, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    states = real("ear_training").VoxtralEncoder.forward(own.model.model.audio_tower, sound).last_hidden_state
    ids = torch.tensor([[*own.before, *[own.placeholder] * 50, *own.after]])
    with torch.autocast("cpu", torch.bfloat16):
        heard, remembered = (own.model(input_ids=ids, input_features=given).logits for given in (sound, states))
        strange = own.model(input_ids=ids, input_features=states.flip(1)).logits
    torch.testing.assert_close(heard, remembered)
    assert not torch.allclose(heard, strange, atol=1e-3)


def test_borders_lie_in_order_where_they_cost_least():
    in_order, random = real("ear_training").in_order, torch.Generator().manual_seed(0)
    for steps, tokens in ((6, 3), (5, 5), (4, 1)):
        costs = torch.rand(steps, tokens, generator=random)
        found = in_order(costs)
        ways = [way for way in itertools.product(range(tokens), repeat=steps)
                if list(way) == sorted(way) and set(way) == set(range(tokens))]  # fmt: skip
        least = min(ways, key=lambda way: sum(costs[step, token] for step, token in enumerate(way)))
        assert found.tolist() == list(least)
    assert in_order(torch.rand(2, 4, generator=random)).tolist() == [0, 1]


def test_the_projection_starts_with_the_words_where_they_are_spoken_though_nobody_said_where(writer):
    training, own, words = real("ear_training"), writer(), real("ear_standins").WORDS
    random = np.random.default_rng(0)
    voices, spoken, made = random.standard_normal((len(words), 16)), [], []
    for _ in range(80):
        said = random.integers(len(words), size=3)
        spoken.append(np.repeat(said, random.integers(1, 9, size=3)))  # from one token of sound to eight
        states = np.repeat(voices[spoken[-1]], 4, 0) + 0.1 * random.standard_normal((4 * len(spoken[-1]), 16))
        made.append(real("ear_sounds").Sound(" ".join(words[word] for word in said), torch.tensor(states).bfloat16()))
    training.start_projector(own, made)
    own.round()
    table = own.model.get_input_embeddings().weight[[own.ids(f" {word}")[0] for word in words]].float()
    with torch.no_grad():
        says = [own.model.model.multi_modal_projector(one.states.reshape(one.tokens, -1)).float() for one in made]
    nearest = torch.cat([torch.cdist(one, table).argmin(1) for one in says])
    assert (nearest.numpy() == np.concatenate(spoken)).mean() > 0.97


def test_all_kinds_see_the_same_sounds_in_the_same_order_and_every_sound_as_often(sounds):
    training = real("ear_training")
    one, other, another = ([[id(sound) for sound in own] for own in training.batches(sounds, 30, seed)] for seed in (0, 0, 1))
    assert one == other != another
    counts = [sum(own.count(id(sound)) for own in one) for sound in sounds]
    assert set(counts) <= {3, 4, 5}
    assert all(len(own) == training.BATCH for own in one)


def test_training_changes_what_is_between_and_nothing_else(writer, sounds):
    own = writer("simple")
    before = {name: parameter.detach().clone() for name, parameter in own.model.named_parameters()}
    training, loss = real("ear_training"), []
    for steps in (4, 0):
        with torch.autocast("cpu", torch.bfloat16):
            loss.append(training.mean_loss(own, sounds))
        if steps:
            training.train(own, sounds, sounds, steps=steps, seed=0, looks=1)
    assert loss[1] < loss[0]
    moved = {name for name, parameter in own.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in own.model.named_parameters() if parameter.requires_grad}
    assert any("router" in name for name in moved)
    assert any("projector" in name for name in moved)


def test_what_stays_is_what_was_least_wrong_about_sounds_for_choosing(writer, sounds, monkeypatch):
    training, kept, told = real("ear_training"), [], iter([3.0, 1.0, 2.0])
    own = writer("simple")
    projection = own.model.model.multi_modal_projector.linear_1.weight

    def look(writer, choosing):
        kept.append(projection.detach().clone())
        return next(told)

    monkeypatch.setattr(training, "mean_loss", look)
    losses, seen = training.train(own, sounds, sounds[:2], steps=7, seed=0, looks=3)
    assert (len(losses), seen) == (7, [3.0, 1.0, 2.0])
    assert torch.equal(projection, kept[1])
    assert not torch.equal(kept[1], kept[2])


def test_what_an_answer_costs_does_not_depend_on_its_neighbours_in_the_batch(writer, sounds):
    own, few = writer(), sounds[:5]
    own.round()
    with torch.no_grad():
        together, tokens = own.losses(few, [one.text for one in few])
        alone = [own.losses([one], [one.text]) for one in few]
    assert tokens.tolist() == [len(one.text.split()) + 1 for one in few]
    torch.testing.assert_close(together, torch.cat([loss for loss, _ in alone]), rtol=0.02, atol=0.02)  # of bfloat16


def test_candidates_are_the_right_one_first_and_seven_others_that_are_about_as_long(sounds):
    rows = real("ear").candidates_of(sounds[:30])
    for own, row in zip(sounds, rows, strict=False):
        assert row[0] == own.text
        assert len(row) == 8
        assert own.text not in row[1:]
        assert max(abs(len(text.split()) - len(own.text.split())) for text in row) <= 2


def test_rates_and_differences_are_paired_over_seeds_and_sounds():
    figures = real("ear").Figures(["cat dog key", "ship star", "bell"])
    base = figures.edits(["cat dog key", "star", "bell dog key"])
    assert base == [0, 1, 2]
    row = figures.row([base, base], [[True, False, False]] * 2)
    assert (row["n"], row["seeds"], row["wer"]) == (3, 2, pytest.approx(3 / 6))
    assert row["right"] == pytest.approx(1 / 3)
    assert row["wer_low"] < row["wer"] < row["wer_high"]
    fewer = [[0, 0, 1]] * 2
    paired = figures.row(fewer, [[True, True, False]] * 2, ([base, base], [[True, False, False]] * 2))
    assert paired["wer_less_linear"] == pytest.approx(-2 / 6)
    assert paired["right_less_linear"] == pytest.approx(1 / 3)
    same = figures.row([base, base], [[True, False, False]] * 2, ([base, base], [[True, False, False]] * 2))
    assert same["wer_less_linear_low"] == same["wer_less_linear_high"] == 0
