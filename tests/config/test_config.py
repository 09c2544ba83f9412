import copy
import dataclasses
import json
import pickle

import pytest
from kit.hub import make_hub_cache

from hf_steer import AlignerConfig, AttentionConfig, ConfigError, FileError, SaliencyConfig, SteerConfig

FULL = SteerConfig(
    attention=AttentionConfig(
        heads={1: (0, 3), 5: "all", -1: (2,)},
        strength={1: {0: 2.0, 3: -1.5}, 5: 0.5, -1: 1},
        saliency=SaliencyConfig(source=None, normalize="rank", clip=2.5, blocks=(-1, 3), preserve_mass=True),
        queries="generated",
        backend="mask",
    ),
    base_model_type="qwen2_vl",
)


ROLLOUT = SteerConfig(attention=AttentionConfig(saliency=SaliencyConfig(source="vision_rollout", blocks="all")))


@pytest.mark.parametrize("config", [FULL, ROLLOUT, SteerConfig(), SteerConfig(attention=AttentionConfig())])
def test_a_configuration_survives_dict_json_disk_copy_and_pickle(config, tmp_path):
    assert SteerConfig.from_dict(config.to_dict()) == config
    assert SteerConfig.from_dict(json.loads(config.to_json())) == config
    config.save_pretrained(tmp_path / "new" / "folder")
    assert SteerConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert hash(copy.copy(config)) == hash(config)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["steer_config.json"]


def test_heads_and_strengths_are_taken_as_json_writes_them():
    heads, strength = {1: (0, 3), -1: "all"}, {1: {0: 2.0, 3: -1.0}, -1: 4.0}
    config = AttentionConfig(heads=heads, strength=strength)
    assert AttentionConfig(heads=json.loads(json.dumps(heads)), strength=json.loads(json.dumps(strength))) == config


def test_a_configuration_is_frozen_to_its_depth():
    heads = {1: [0, 3]}
    config = AttentionConfig(heads=heads)
    heads[1].append(5)
    heads[2] = (0,)
    assert config.heads == {1: (0, 3)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strength = 3.0
    with pytest.raises(TypeError):
        config.heads[1] = (2,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AttentionConfig(strength=float("nan")), "attention.strength must be a finite number; got nan"),
        (lambda: AttentionConfig(strength=float("inf")), "attention.strength must be a finite number; got inf"),
        (lambda: AttentionConfig(strength={1: {0: float("nan")}}), "layer 1, head 0 must be a finite number"),
        (lambda: AttentionConfig(strength="strong"), "finite number; got 'strong'"),
        (lambda: AttentionConfig(strength={}), "must not be empty"),
        (lambda: AttentionConfig(heads={}), '"all" or a mapping'),
        (lambda: AttentionConfig(heads="most"), "\"all\" or a mapping of layers to heads; got 'most'"),
        (lambda: AttentionConfig(heads={1: ()}), "heads of layer 1 must be a non-empty sequence"),
        (lambda: AttentionConfig(heads={1: (-1,)}), "must not be negative"),
        (lambda: AttentionConfig(heads={1: (2, 2)}), "names one twice"),
        (lambda: AttentionConfig(heads={"1": (2,), 1: (3,)}), "attention.heads names one twice"),
        (lambda: AttentionConfig(heads={"first": (2,)}), "attention.heads: keys must be layer or head numbers"),
        (lambda: AttentionConfig(heads={1: (0,)}, strength={2: 1.0}), r"names layers \[2\], attention.heads \[1\]"),
        (lambda: AttentionConfig(heads={1: (0, 3)}, strength={1: {0: 1.0}}), r"layer 1 names heads \[0\].*\[0, 3\]"),
        (lambda: AttentionConfig(queries="some"), "'all', 'generated', 'thinking', 'answer'; got 'some'"),
        (lambda: AttentionConfig(backend="flash"), "attention.backend must be one of 'auto', 'folded', 'mask'"),
        (lambda: AttentionConfig(saliency={"clip": 1}), "must be a SaliencyConfig; got dict"),
        (lambda: SaliencyConfig(normalize="l2"), "'maxabs', 'rank', 'none'; got 'l2'"),
        (lambda: SaliencyConfig(source="dino"), "None, 'vision_attention', .*'gradient'; got 'dino'"),
        (lambda: SaliencyConfig(clip=0), "clip must be above 0"),
        (lambda: SaliencyConfig(blocks=()), "non-empty sequence"),
        (lambda: SaliencyConfig(blocks="last"), "saliency.blocks must be .*; got 'last'"),
        (lambda: SaliencyConfig(preserve_mass=1), "True or False; got 1"),
        (lambda: SteerConfig(attention="all"), "must be an AttentionConfig or None; got str"),
        (lambda: SteerConfig(schema_version=99), "schema_version 99; this hf_steer reads up to 2. Upgrade"),
        (lambda: SteerConfig(schema_version="1"), "positive integer"),
        (lambda: SteerConfig(base_model_type=3), "must be a string or None"),
        (lambda: SteerConfig.from_dict({}), "schema_version is missing"),
        (lambda: SteerConfig.from_dict({"schema_version": True}), "schema_version must be a positive integer; got True"),
        (lambda: SteerConfig.from_dict({"schema_version": 1.0}), "schema_version must be a positive integer; got 1.0"),
        (lambda: SteerConfig.from_dict({"schema_version": 0}), "schema_version must be a positive integer; got 0"),
        (lambda: SteerConfig.from_dict({"schema_version": 3, "new": 1}), "Upgrade: pip install -U hf-steer"),
        (lambda: SteerConfig.from_dict({"schema_version": 1, "atention": None}), "did you mean 'attention'"),
        (
            lambda: SteerConfig.from_dict({"schema_version": 1, "attention": {"saliency": {"normalise": "none"}}}),
            "attention.saliency has no 'normalise' \\(did you mean 'normalize'",
        ),
        (lambda: SteerConfig.from_dict({"schema_version": 1, "attention": {"heads": {"x": [1]}}}), "keys must be layer"),
        (lambda: SteerConfig.from_dict({"schema_version": 1, "attention": [1]}), "must be a mapping; got list"),
        (lambda: SteerConfig.from_dict([1]), "must be a mapping; got list"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"schema_version": 1, "att', "not valid JSON.*truncated"), (b"\xff\xfe\x00", "not valid JSON"), (b"[1]", "holds list")],
)
def test_a_broken_file_is_an_error_that_names_it(content, message, tmp_path):
    (tmp_path / "steer_config.json").write_bytes(content)
    with pytest.raises(FileError, match=message):
        SteerConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_an_error_that_says_how_it_is_made(tmp_path):
    with pytest.raises(FileError, match=r"has no steer_config\.json; was it saved with"):
        SteerConfig.from_pretrained(tmp_path)
    with pytest.raises(FileError, match="neither a folder nor a Hub repository"):
        SteerConfig.from_pretrained("nobody/nothing", cache_dir=tmp_path)
    with pytest.raises(FileError, match="neither a folder nor a Hub repository"):
        SteerConfig.from_pretrained("/no/such/folder")


def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    FULL.save_pretrained(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("hf_steer.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        SteerConfig().save_pretrained(tmp_path)
    assert SteerConfig.from_pretrained(tmp_path) == FULL
    assert len(list(tmp_path.iterdir())) == 1


def test_a_hub_repository_is_read_like_a_folder(tmp_path):
    make_hub_cache(tmp_path, "someone/steered", {"steer_config.json": FULL.to_json().encode()})
    assert SteerConfig.from_pretrained("someone/steered", cache_dir=tmp_path) == FULL
    with pytest.raises(FileError, match="someone/steered"):
        SteerConfig.from_pretrained("someone/steered", cache_dir=tmp_path, revision="missing")


def test_pushing_creates_the_repository_and_uploads_the_file(monkeypatch, tmp_path):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **kwargs):
            calls.append(("create", repo_id, kwargs))
            return type("Url", (), {"repo_id": f"me/{repo_id}"})()

        def upload_file(self, **kwargs):
            calls.append(("upload", kwargs))
            return type("Commit", (), {"commit_url": "https://example/commit"})()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert FULL.push_to_hub("steered", private=True, token="t", revision="dev") == "https://example/commit"
    FULL.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert calls[0] == ("token", "t")
    assert calls[1] == ("create", "steered", {"private": True, "exist_ok": True})
    upload = calls[2][1]
    assert SteerConfig.from_dict(json.loads(upload["path_or_fileobj"])) == FULL
    assert (upload["repo_id"], upload["path_in_repo"], upload["revision"]) == ("me/steered", "steer_config.json", "dev")
    assert calls[4][1] == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "output"}, "use placement='projector'; got 'output'"),
        ({"placement": "projector", "top_k": 2}, "none is selected; got top_k=2"),
        ({"placement": "layers", "kind": "layer_wise"}, "has no merge"),
        ({"placement": "projector", "merge": 1}, "aligner.merge"),
    ],
)
def test_experts_are_merged_only_where_a_sequence_is_known_and_nothing_is_selected(options, message):
    with pytest.raises(ConfigError, match=message):
        AlignerConfig(modality="audio", **{"merge": True, **options})


def test_merging_is_off_unless_asked_for_and_comes_back_from_a_file():
    assert AlignerConfig(modality="audio").merge is False
    config = SteerConfig(aligners=(AlignerConfig(modality="audio", placement="projector", merge=True),))
    assert SteerConfig.from_dict(json.loads(config.to_json())) == config
    older = config.to_dict()
    del older["aligners"][0]["merge"]
    assert SteerConfig.from_dict(older).aligners[0].merge is False
