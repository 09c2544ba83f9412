"""What a method's source says of its module's parts."""

from __future__ import annotations

import torch
from torch import nn

from hf_steer.ground.flow import follow, method_of
from hf_steer.ground.widths import width_into


class Queries(nn.Module):
    def __init__(self):
        super().__init__()
        self.queries, self.keys = nn.Linear(4, 4), nn.Linear(6, 4)

    def forward(self, own, encoder_hidden_states):
        return self.queries(own) + self.keys(encoder_hidden_states)


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(24, 4)

    def shuffle(self, features):
        return features.reshape(features.shape[0], -1, 24)

    def forward(self, features):
        return self.project(self.shuffle(features))


class Seeing(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.reader = nn.Linear(3, 6), Queries()
        self.shuffled, self.relu = Shuffled(), nn.ReLU()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.own = nn.Parameter(torch.zeros(1, 4))

    def encode(self, pixels):
        return self.tower(pixels)

    def by_name(self, pixels):
        seen = self.encode(pixels)
        own = self.own.expand(seen.shape[0], -1)
        return self.reader(own, encoder_hidden_states=seen.last_hidden_state)

    def in_turn(self, pixels):
        state = self.tower(pixels)[0]
        for _, layer in enumerate(self.layers):
            state = self.relu(layer(state))
        return dict(last=state, first=pixels)

    def joined(self, pixels):
        states = self.tower(pixels).hidden_states
        both = torch.cat([states[state] for state in (0, 1)], -1)
        return self.shuffled(both)


def calls(method, *arguments):
    return {call.part: call for call in follow(Seeing(), method, arguments).calls}


def test_what_reads_what_is_told_by_argument_and_field():
    found = calls("by_name", "pixels")
    assert found["tower"].reads("=pixels")[0] == 0
    at, came = found["reader"].reads("tower")
    assert (at, came.field, came.reshaped) == ("encoder_hidden_states", "last_hidden_state", False)


def test_a_loop_over_layers_is_a_call_of_their_list_and_an_activation_is_none():
    found = calls("in_turn")
    assert list(found) == ["tower", "layers"]
    assert found["layers"].reads("tower")[1].field == "0"
    assert [came.part for came in follow(Seeing(), "in_turn", ("pixels",)).fields["first"]] == ["=pixels"]


def test_joined_states_are_known_as_such():
    assert calls("joined")["shuffled"].reads("tower")[1].reshaped


def test_the_width_is_that_of_the_weights_that_meet_the_features_first():
    assert width_into(Queries(), "encoder_hidden_states").size == 6
    assert width_into(Queries()).size == 4
    found = width_into(Shuffled())
    assert (found.size, found.reshaped) == (24, True)
    assert not width_into(nn.Conv2d(3, 4, 2)).last


def test_methods_that_every_model_has_say_nothing():
    assert method_of(Seeing, "to") is None
    assert method_of(Seeing, "encode") is Seeing.encode
