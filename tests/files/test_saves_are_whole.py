"""A save is one thing: of two saves never a part each, whoever kills the saver, saves at the same time, or saves without us."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kit.aligning import align, aligned, logits, stir
from kit.hub import make_hub_cache
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model
from transformers import AutoModelForImageTextToText, WhisperForConditionalGeneration

import hf_steer
from hf_steer import FileError, SteerConfig, patch_model, unpatch_model
from hf_steer.saving import SAVED, whole_save

HERE = Path(__file__).parents[1]
WEIGHTS = "hf_steer/steer_model.safetensors"


def whisper(seed=3, kind="simple", **options):
    model = patch_model(make_encoder_model("whisper"), align("whisper", "output", kind, **options))
    stir(model, seed)
    return model


def loaded(folder):
    return logits(hf_steer.from_pretrained(folder).eval(), make_encoder_inputs("whisper"))


def save_until_all_is_written(model, folder, monkeypatch):
    """The saver is killed when nothing is in its place yet."""
    real = os.replace

    def replace(source, target):
        if SAVED in Path(source).parts:
            raise KeyboardInterrupt
        return real(source, target)

    with monkeypatch.context() as killed:
        killed.setattr("hf_steer.saving.os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)
    assert (folder / SAVED).is_dir()


def expected(model):
    return logits(model.eval(), make_encoder_inputs("whisper"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each save is stopped in a fork")
def test_a_save_that_is_killed_or_runs_out_of_disk_leaves_the_old_or_the_new(tmp_path):
    cases = ["kill-save_steering", "kill-sharded", "full-save_pretrained"]
    path = os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "kit" / "run_killed_saves.py"), str(tmp_path), *cases],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE).group(1))
    for case, found in results.items():
        assert len(found) > 12, case
        assert (found[0], found[-1]) == ("old", "new"), case
        assert sorted(found, key=["old", "new"].index) == found, case  # "neither" raises


@pytest.mark.parametrize("taken", ["steer_config.json", WEIGHTS])
def test_configuration_and_weights_of_two_saves_never_load_together(taken, tmp_path):
    one, other = whisper(seed=3), whisper(seed=4)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / taken, tmp_path / "one" / taken)
    for load in (hf_steer.from_pretrained, lambda folder: hf_steer.load_steering(one, folder)):
        with pytest.raises(FileError, match=r"not the file that was saved with the steer_config\.json.*of different saves"):
            load(tmp_path / "one")


def test_a_configuration_that_is_saved_over_trained_weights_does_not_take_them_for_its_own(tmp_path):
    model = whisper()
    model.save_pretrained(tmp_path)
    SteerConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(FileError, match="saved by itself, without their weights.*save_steering saves both"):
        hf_steer.from_pretrained(tmp_path)
    hf_steer.save_steering(model, tmp_path)
    assert torch.equal(loaded(tmp_path), expected(model))


def test_saves_from_before_there_were_digests_still_load(tmp_path):
    model = whisper()
    model.save_pretrained(tmp_path)
    path = tmp_path / "steer_config.json"
    values = json.loads(path.read_text())
    del values["saved"]
    path.write_text(json.dumps(values))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    assert torch.equal(loaded(tmp_path), expected(model))


def test_what_a_save_notes_about_itself_is_none_of_the_configuration(tmp_path):
    model = whisper()
    hf_steer.save_steering(model, tmp_path)
    values = json.loads((tmp_path / "steer_config.json").read_text())
    assert set(values["saved"]) == {"weights", "base"}
    assert SteerConfig.from_pretrained(tmp_path) == SteerConfig.from_dict(values) == hf_steer.get_steer_status(model).config
    assert "saved" not in SteerConfig.from_pretrained(tmp_path).to_dict()
    values["saved"]["weights"] = 3
    (tmp_path / "steer_config.json").write_text(json.dumps(values))
    with pytest.raises(FileError, match="'saved' is what hf_steer noted about this save.*got {'weights': 3"):
        SteerConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("locks", ["the folder's own", "a file elsewhere"])
def test_threads_that_save_into_one_folder_do_not_collide(locks, tmp_path, monkeypatch):
    if locks != "the folder's own":  # as on network disks without flock
        monkeypatch.setattr("hf_steer.saving.fcntl", None)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
    models = [whisper(seed) for seed in range(3)]
    rows = [expected(model) for model in models]
    folder, faults = tmp_path / "shared", []
    models[0].save_pretrained(folder)

    def save(model):
        try:
            for _ in range(6):
                hf_steer.save_steering(model, folder)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    target = whisper()
    while any(thread.is_alive() for thread in threads):
        hf_steer.load_steering(target, folder)
        assert any(torch.equal(expected(target), row) for row in rows)
    for thread in threads:
        thread.join()
    assert faults == []
    assert any(torch.equal(loaded(folder), row) for row in rows)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_a_living_saver_is_left_alone_and_a_dead_ones_rest_is_cleared(tmp_path):
    model = whisper()
    (tmp_path / ".hf_steer-saving-dead").mkdir()
    with whole_save(tmp_path) as stage:
        (stage / "note").write_text("mine")
        hf_steer.save_steering(model, tmp_path)
        assert sorted(path.name for path in tmp_path.glob(".*")) == [stage.name]
        assert not (tmp_path / "note").exists()
    assert (tmp_path / "note").read_text() == "mine"
    assert list(tmp_path.glob(".*")) == []


def test_a_steering_that_lost_its_weights_takes_the_file_away_and_shards_follow_the_model(tmp_path):
    model = whisper()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other = patch_model(make_encoder_model("whisper"), SteerConfig())
    other.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.safetensors*")] == ["model.safetensors"]
    assert not (tmp_path / "hf_steer").exists()
    assert torch.equal(loaded(tmp_path), expected(other))


def test_a_save_needs_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(FileError, match="is a file, or lies in one; a save needs a folder"):
            hf_steer.save_steering(whisper(), place)


def test_a_save_that_cannot_be_finished_from_here_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    model = whisper()
    save_until_all_is_written(model, tmp_path, monkeypatch)

    def read_only(*_):
        raise PermissionError("read-only")

    target = whisper(seed=8)
    with monkeypatch.context() as locked:
        locked.setattr("hf_steer.saving.os.replace", read_only)
        with pytest.raises(FileError, match="was interrupted when all was written.*where the folder can be written"):
            hf_steer.from_pretrained(tmp_path)
        hf_steer.load_steering(target, tmp_path)  # which reads the files where they are
        assert torch.equal(expected(target), expected(model))
    assert torch.equal(loaded(tmp_path), expected(model))


def test_the_steering_of_a_model_that_was_saved_unpatched_since_does_not_patch(tmp_path):
    model = whisper()
    model.save_pretrained(tmp_path)
    patched = expected(model)
    unpatch_model(model).save_pretrained(tmp_path)
    with pytest.raises(FileError, match=r"steer_config\.json is stale\. Delete it.*steer_config='.*save_steering"):
        hf_steer.from_pretrained(tmp_path)
    again = hf_steer.from_pretrained(tmp_path, steer_config=str(tmp_path))  # as the message says
    assert torch.equal(expected(again), patched)
    hf_steer.save_steering(again, tmp_path)
    assert torch.equal(loaded(tmp_path), patched)


def test_a_model_that_plain_transformers_loaded_and_saved_there_makes_it_stale_as_well(tmp_path):
    whisper().save_pretrained(tmp_path)
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    plain.save_pretrained(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "steer_config.json").exists()
    hf_steer.from_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    with pytest.raises(FileError, match="is stale"):
        hf_steer.from_pretrained(tmp_path)


def test_a_stale_steering_is_found_on_the_hub_as_well(tmp_path):
    model = patch_model(make_encoder_model("llava"), SteerConfig())
    model.save_pretrained(tmp_path / "base")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    make_hub_cache(tmp_path / "cache", "someone/patched", contents)
    assert hf_steer.get_steer_status(hf_steer.from_pretrained("someone/patched", cache_dir=tmp_path / "cache")).patched
    unpatch_model(model).save_pretrained(tmp_path / "base")
    stale = {**contents, "config.json": (tmp_path / "base" / "config.json").read_bytes()}
    make_hub_cache(tmp_path / "cache", "someone/stale", stale)
    with pytest.raises(FileError, match="'someone/stale' holds a steering.*is stale"):
        hf_steer.from_pretrained("someone/stale", cache_dir=tmp_path / "cache")
    plain = AutoModelForImageTextToText.from_pretrained("someone/patched", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(plain.eval(), make_encoder_inputs("llava")), logits(model.eval(), make_encoder_inputs("llava")))


def test_what_transformers_saved_after_a_save_was_killed_is_not_undone(tmp_path, monkeypatch):
    model = whisper()
    save_until_all_is_written(model, tmp_path, monkeypatch)
    plain = make_encoder_model("whisper", seed=5)
    plain.save_pretrained(tmp_path)
    with pytest.raises(FileError, match="is stale"):
        hf_steer.from_pretrained(tmp_path)
    kept = WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(expected(kept), expected(plain))


def test_weights_on_the_hub_come_from_the_commit_of_their_configuration(tmp_path, monkeypatch):
    model = aligned("whisper", "output", "simple")
    model.save_pretrained(tmp_path / "base")
    files = {path.relative_to(tmp_path / "base"): path for path in (tmp_path / "base").rglob("*") if path.is_file()}
    snapshot = make_hub_cache(tmp_path / "cache", "someone/ear", {})
    (snapshot / "hf_steer").mkdir()
    for name, path in files.items():
        shutil.copy(path, snapshot / name)
    hub = {"cache_dir": tmp_path / "cache"}
    found = hf_steer.from_pretrained("someone/ear", **hub)
    assert torch.equal(expected(found), expected(model))
    asked = []
    real = hf_steer.patching.saves.find_file

    def spy(place, name, **hub):
        asked.append((name, hub.get("revision")))
        return real(place, name, **hub)

    monkeypatch.setattr("hf_steer.patching.saves.find_file", spy)
    hf_steer.load_steering(found, "someone/ear", **hub)
    assert asked == [(WEIGHTS, "0" * 40)]
