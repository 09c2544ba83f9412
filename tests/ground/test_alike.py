"""What structure tells of one model holds for those that are alike, and for no others."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
from kit.pictured import KINDS, make_pictured_model, make_tokenizer
from torch import nn

from hf_steer.ground import towers
from hf_steer.ground.towers import find_encoders


@pytest.fixture(autouse=True)
def nothing_found_yet(monkeypatch):
    monkeypatch.setattr(towers, "FOUND", {})


@pytest.fixture
def followed(monkeypatch):
    """Whose source is read."""
    owners, way_of = [], towers.way_of

    def counted(model, modality):
        owners.append(model)
        return way_of(model, modality)

    monkeypatch.setattr(towers, "way_of", counted)
    return owners


def make(family="internvl", seed=0):
    return make_pictured_model(KINDS[family], make_tokenizer(KINDS[family]), seed=seed)


def names_in(model, found):
    """Everything that was found, with the names of the model's own modules."""
    names = {module: name for name, module in model.named_modules()}
    return {
        modality: (
            names[own.tower], names[own.outlet], [(site.name, names[site.module]) for site in own.layers],
            [names[part] for part in own.projectors], own.size, own.placeholder_ids,
        )
        for modality, own in found.encoders.items()
    }, dict(found.reasons)  # fmt: skip


def test_a_model_that_is_alike_is_not_looked_through_again_and_its_own_modules_are_named(followed):
    first, second = make(seed=0), make(seed=1).to("meta")
    one = names_in(first, find_encoders(first))
    assert followed == [first, first]
    assert names_in(second, find_encoders(second)) == one
    assert followed == [first, first]
    assert one[0]["image"][0]
    assert one[1]["audio"].endswith("takes no sounds")


def test_what_was_found_keeps_no_model_alive():
    model = make()
    find_encoders(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(towers, "MOST", 2)
    model = make()
    for token in (7, 8, 9):
        model.config.image_token_id = token
        find_encoders(model)
        newest = list(towers.FOUND)[-1]
    assert len(towers.FOUND) == 2
    model.config.image_token_id = 9
    find_encoders(model)
    assert list(towers.FOUND)[-1] == newest


@pytest.mark.parametrize("part", ["model", "model.multi_modal_projector"])
def test_a_model_of_which_a_method_was_replaced_is_like_no_other(followed, part):
    model, other = make(), make()
    find_encoders(model)
    changed = other.get_submodule(part)
    changed.forward = changed.forward
    found = names_in(other, find_encoders(other))
    assert followed[2:] == [other, other]
    find_encoders(other)
    assert followed[4:] == [other, other]
    assert found == names_in(model, find_encoders(model))
    assert len(towers.FOUND) == 1


@pytest.mark.parametrize("what", ["another part", "another size", "another setting"])
def test_a_model_that_differs_is_looked_through_anew(followed, what):
    model = make()
    find_encoders(model)
    other = copy.deepcopy(model)
    projector = other.model.multi_modal_projector
    if what == "another part":
        projector.linear_1 = nn.Sequential(projector.linear_1)
    elif what == "another size":
        projector.layer_norm = nn.LayerNorm(80)
    else:
        other.config.image_token_id += 1
    found, known = names_in(other, find_encoders(other)), names_in(model, find_encoders(model))
    assert followed[2:] == [other, other]
    assert (found == known) == (what == "another part")
