"""The five open tables: what is added is there, what is wrong is refused, what is unknown is told."""

from __future__ import annotations

import ast
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kit.plugins import ROOT, tables_as_they_were
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model

import hf_steer
from hf_steer import AlignerConfig, AttentionConfig, Backend, Family, Gate, GateConfig, Router, SaliencyConfig, Source, SteerConfig
from hf_steer.errors import ConfigError, PatchError
from hf_steer.families import NONE, family_of
from hf_steer.registry import BACKENDS, FAMILIES, GATES, ROUTERS, SOURCES, TABLES

ROWS = {
    "family": Family(),
    "backend": Backend(attend=lambda call, bias: (None, None)),
    "source": Source(prompt=lambda sight: sight.embeds[..., 0]),
    "gate": Gate(measures=lambda logits: logits[:, 0], options={"threshold": 0.5, "release": 0.4}),
    "router": Router(build=lambda config, size, layers: torch.nn.Identity(), routes=False),
}
NAMING = {
    "family": FAMILIES.__getitem__,
    "backend": lambda name: AttentionConfig(backend=name),
    "source": lambda name: SaliencyConfig(source=name),
    "gate": lambda name: GateConfig(name),
    "router": lambda name: AlignerConfig("image", kind=name),
}
ASKED = {
    "family": "family must be one of 'qwen2_vl'.*got '{}'",
    "backend": "attention.backend must be one of 'auto', 'folded'.*got '{}'",
    "source": "saliency.source must be one of None, 'vision_attention'.*got '{}'",
    "gate": "gate.kind must be one of 'entropy'.*got '{}'",
    "router": "aligner.kind must be one of 'simple'.*got '{}'",
}
OURS = {name for table in (GATES, SOURCES, ROUTERS) for name in table if table.is_ours(name)}
every = pytest.mark.parametrize("noun", list(TABLES))

@pytest.fixture(autouse=True)
def _own_tables():
    with tables_as_they_were():
        yield



def register(noun, name, row):
    getattr(hf_steer, f"register_{noun}")(name, row)


@every
def test_what_is_registered_can_be_named(noun):
    with pytest.raises((ConfigError, PatchError), match=ASKED[noun].format("my_own")):
        NAMING[noun]("my_own")
    register(noun, "my_own", ROWS[noun])
    NAMING[noun]("my_own")
    assert TABLES[noun]["my_own"] is ROWS[noun]
    assert list(TABLES[noun])[-1] == "my_own"
    assert not TABLES[noun].is_ours("my_own")
    assert TABLES[noun].provider_of("my_own") is None


@every
def test_a_name_means_one_thing(noun):
    register(noun, "my_own", ROWS[noun])
    register(noun, "my_own", ROWS[noun])  # a cell of a notebook that is run again
    other = {"family": Family(composes=True), "gate": Gate(reads=lambda reading, gate: reading.age, options={})}
    changed = other.get(noun) or type(ROWS[noun])(*[lambda *given: None])
    with pytest.raises(ConfigError, match=f"there is a {noun} 'my_own' already, from the module 'test_tables'.*Take another name"):
        register(noun, "my_own", changed)
    ours = next(iter(TABLES[noun]))
    with pytest.raises(ConfigError, match=f"there is a {noun} '{ours}' already, which is hf_steer's own"):
        register(noun, ours, changed)
    assert TABLES[noun]["my_own"] is ROWS[noun]


def test_a_model_type_without_a_row_has_an_empty_one():
    assert family_of("my_own") is NONE
    register("family", "my_own", ROWS["family"])
    assert family_of("my_own") is ROWS["family"]


def test_the_choice_of_a_backend_cannot_be_taken_for_a_backend():
    with pytest.raises(ConfigError, match="there is a backend 'auto' already"):
        hf_steer.register_backend("auto", ROWS["backend"])


@every
@pytest.mark.parametrize("name", ["", "my own", "1st", "a/b", "x" * 101, None, ["gate"]])
def test_what_is_no_name_is_refused(noun, name):
    with pytest.raises(ConfigError, match=f"the name of a {noun} begins with a letter"):
        register(noun, name, ROWS[noun])


@every
@pytest.mark.parametrize("row", [lambda logits: logits, None, Gate])
def test_what_is_no_row_is_refused(noun, row):
    with pytest.raises(ConfigError, match=f"a {noun} is an hf_steer.{type(ROWS[noun]).__name__}\\(...\\); got .* for 'my_own'"):
        register(noun, "my_own", row)
    assert "my_own" not in TABLES[noun]


@every
def test_an_unknown_name_is_answered_with_the_nearest_and_a_way_to_add_it(noun):
    ours = next(iter(TABLES[noun]))
    near = f"the nearest is '{ours}'.*hf_steer.plugins.*hf_steer.register_{noun}"
    with pytest.raises((ConfigError, PatchError), match=near):
        NAMING[noun](f"{ours}s")


@every
@pytest.mark.parametrize("name", [3, ["entropy"], {"a": 1}])
def test_what_is_no_string_is_an_unknown_name(noun, name):
    with pytest.raises((ConfigError, PatchError), match="got"):
        TABLES[noun].find(name)
    assert name not in TABLES[noun]


def test_a_row_can_be_taken_out_but_none_of_ours():
    hf_steer.register_gate("my_own", ROWS["gate"])
    GATES.remove("my_own")
    assert "my_own" not in GATES
    with pytest.raises(ConfigError, match="gate 'entropy' was not added by anybody; those that were: none"):
        GATES.remove("entropy")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gate(options={}), "a Gate measures distributions .* or reads tokens"),
        (lambda: Gate(options={}, measures=len, reads=len), "give one of the two"),
        (lambda: Gate(measures=len, options={"threshold": 1.0}), r"has options 'threshold' and 'release'.*got \['threshold'\]"),
        (lambda: Source(), "a Source reads either the vision tower .* or the prompt"),
        (lambda: Source(eyes=len, prompt=len), "give one of the two"),
        (lambda: Router(build=len, reads_text=True), "a Router that reads text has placements=.'projector',., where features meet"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_options_of_a_rows_own_are_checked_against_its_own():
    options = {"threshold": 0.5, "release": 0.4, "window": 8, "power": 2.0, "over": "all", "shares": (0.5,), "hard": False}
    hf_steer.register_gate("my_own", Gate(measures=lambda logits, **own: logits[:, 0], options=options))
    assert GateConfig("my_own").options == {"window": 8, "power": 2.0, "over": "all", "shares": (0.5,), "hard": False}
    given = GateConfig("my_own", options={"power": 3, "shares": [1, 2]})
    assert (given.options["power"], given.options["shares"], given.options["window"]) == (3, (1, 2), 8)
    assert hash(given) == hash(GateConfig("my_own", options={"power": 3, "shares": (1, 2)}))
    for wrong, message in (
        ({"windw": 3}, "a 'my_own' gate has no option 'windw' of its own; it has window, power"),
        ({"window": 2.5}, "option 'window' of a 'my_own' gate must be a whole number, as 8 is; got 2.5"),
        ({"power": "two"}, "option 'power' .* must be a finite number; got 'two'"),
        ({"over": 3}, "option 'over' .* must be a str, as 'all' is; got 3"),
        ({"hard": 1}, "option 'hard' .* must be True or False; got 1"),
        ([3], "options of a 'my_own' gate must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=message):
            GateConfig("my_own", options=wrong)
    with pytest.raises(ConfigError, match="a 'entropy' gate has no option 'window' of its own; it has none"):
        GateConfig(options={"window": 3})


def test_a_gate_measures_falls_and_compares_as_its_row_says():
    from hf_steer.gating import Patterns, fresh_state, observe

    row = Gate(
        measures=lambda logits, shift: logits[:, 0] + shift,
        options={"threshold": -3.0, "release": -2.0, "shift": 0.0}, falls=True, bounds=(-9.0, 9.0),
        zscore={"threshold": -1.0, "release": -1.0},
    )  # fmt: skip
    hf_steer.register_gate("sinking", row)
    gate = GateConfig("sinking", options={"shift": 1.0})
    state = fresh_state(4, Patterns(), gate, torch.device("cpu"))
    state = observe(state, torch.tensor([[-5.0], [-4.0], [-3.9], [0.0]]), gate)
    assert state.value.tolist() == [1.0, 1.0, 0.0, 0.0]
    state = observe(state, torch.tensor([[-3.0], [-2.9], [-4.1], [0.0]]), gate)
    assert state.value.tolist() == [1.0, 0.0, 1.0, 0.0]  # open until it rises over the release
    with pytest.raises(ConfigError, match=r"gate.threshold of a 'sinking' gate must lie in \[-9, 9\]; got 12"):
        GateConfig("sinking", threshold=12)
    relative = GateConfig("sinking", zscore=True)
    state = fresh_state(1, Patterns(), relative, torch.device("cpu"))
    opened = []
    for value in (1.0, 2.0, 1.0, 2.0, 5.0, 0.0):
        state = observe(state, torch.tensor([[value]]), relative)
        opened.append(float(state.value))
    assert opened == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_a_gate_that_reads_needs_tokens_and_no_distributions():
    hf_steer.register_gate("early", Gate(reads=lambda reading, gate: (reading.age > 3).float(), options={}))
    assert AttentionConfig(gate=GateConfig("early")).reads_tokens
    assert not AttentionConfig(gate=GateConfig("entropy")).reads_tokens


def test_a_configuration_from_elsewhere_still_finds_its_row():
    """A pickle is not checked again: its row is looked up when it is needed."""
    hf_steer.register_gate("my_own", ROWS["gate"])
    written = pickle.dumps(GateConfig("my_own"))
    assert pickle.loads(written).row is ROWS["gate"]
    GATES.remove("my_own")
    with pytest.raises(ConfigError, match="gate must be one of 'entropy', .*; got 'my_own'"):
        _ = pickle.loads(written).row


def test_threads_that_register_at_once_lose_nothing():
    names = [f"gate_{number}" for number in range(64)]
    with tables_as_they_were(), ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: hf_steer.register_gate(name, ROWS["gate"]), names))
        assert set(names) <= set(GATES)
        assert all(pool.map(lambda name: GATES[name] is ROWS["gate"], names))


def test_a_pass_takes_rows_from_the_tables_and_asks_nobody(monkeypatch):
    attention = AttentionConfig(saliency=SaliencyConfig(source="gradient"), gate=GateConfig(initial=1.0), backend="folded")
    config = SteerConfig(attention=attention, aligners=AlignerConfig("image"))
    model = hf_steer.patch_model(make_encoder_model("qwen2_vl"), config)
    for table in TABLES.values():
        monkeypatch.setattr(table, "look", None)
        monkeypatch.setattr(table, "find", None)
    model.generate(**make_encoder_inputs("qwen2_vl"), max_new_tokens=3, do_sample=False)


METRIC = "hf_steer/analysis/plots/heads.py"
"""Asks for the metric "entropy", which is no gate."""


def test_nothing_asks_which_row_it_is():
    """What differs from row to row stands in the row; a comparison with a name would have to know all of them."""
    found = []
    for path in sorted((ROOT / "hf_steer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                named = {own.value for own in ast.walk(node) if isinstance(own, ast.Constant) and isinstance(own.value, str)}
                found += [f"{path.relative_to(ROOT)}: {name}" for name in named & OURS if path != ROOT / METRIC]
    assert not found, found


HOMES = {"gates.py": GATES, "saliency/sources.py": SOURCES, "aligners/routers.py": ROUTERS}
DEFAULTS = {"config/gate.py": {"entropy"}, "config/attention.py": {"vision_attention"}, "config/aligner.py": {"simple"}}
"""What a configuration means when it says nothing."""


@pytest.mark.parametrize("home", list(HOMES))
def test_a_name_stands_in_one_file_of_the_lower_rooms(home):
    rooms = ("config", "ground", "saliency", "aligners", "attention", "patching", "registry")
    names = {name for name in HOMES[home] if HOMES[home].is_ours(name)}
    files = [path for path in (ROOT / "hf_steer").rglob("*.py") if {*rooms, "gating.py", "gates.py"} & set(path.parts)]
    for path in files:
        place = path.relative_to(ROOT / "hf_steer").as_posix()
        if place == home:
            continue
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        allowed = DEFAULTS.get(place, set()) | ({"entropy"} if "aligning" in place else set())  # of the routing
        assert not (words & names) - allowed, f"{place} names {sorted((words & names) - allowed)}"


def test_every_backend_is_over_implementations_that_can_be_steered():
    from hf_steer.attention import STEERABLE

    assert all(set(row.over) <= set(STEERABLE) for row in BACKENDS.values())
    assert set(FAMILIES) >= {"qwen2_vl", "whisper"}
