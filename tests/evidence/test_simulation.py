"""The published simulation: its table digit for digit, its arithmetic in plain loops, its pictures and its command."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import hf_steer.analysis
from hf_steer.cli import main
from hf_steer.errors import ConfigError, FileError
from hf_steer.evidence import plots
from hf_steer.evidence.simulation import PUBLISHED, SimulationRow, simulate, steered_query

AS_PRINTED = """\
0.00 | -0.0000 | -0.000000
0.05 | 0.0005 | 0.000034
0.10 | 0.0020 | 0.000135
0.15 | 0.0044 | 0.000305
0.25 | 0.0125 | 0.000852
0.40 | 0.0326 | 0.002201
0.60 | 0.0751 | 0.005015
0.80 | 0.1368 | 0.009027
1.00 | 0.2192 | 0.014284
"""
SMALL = {"strengths": (0.0, 0.25, -1.0, 3.0), "seeds": (4, 9), "tokens": 21, "heads": 3}


def printed(rows):
    """Rows as the published table writes them."""
    return "".join(f"{strength:.2f} | {reduction:.4f} | {kl:.6f}\n" for strength, reduction, kl in rows)


@pytest.fixture(scope="module")
def table():
    return simulate()


def test_the_defaults_give_the_published_table_digit_for_digit(table):
    """Down to both minus signs at λ = 0; checked with the AVX-512, the AVX2 and the plain kernels of torch on x86_64."""
    assert printed((row.strength, row.entropy_reduction_percent, row.kl_nats) for row in table) == AS_PRINTED


def test_the_pictures_crosses_are_the_published_values():
    assert printed((strength, *values) for strength, values in PUBLISHED.items()) == AS_PRINTED


def test_the_folded_form_is_the_dense_one_up_to_rounding(table):
    # each form rounds a logit below 8 in size, by at most 2.4e-7; one more rounding of a few 1e-7 relative in the softmax
    largest = steered_query(1.0).after.max().item()
    for row in table:
        assert row.folded_max_difference <= 1e-6 * largest
    assert max(row.folded_max_difference for row in table) > 0  # two computations, not one number compared with itself


@pytest.mark.parametrize("wrong", ["bias", "keys"])
def test_a_wrong_fold_shows_in_the_difference(wrong, monkeypatch):
    from hf_steer.evidence import simulation

    honest = simulation.BACKENDS["folded"].attend

    def faulty(call, bias):
        if wrong == "bias":
            bias = type(bias)(bias.query * 1.01, bias.key)
        else:
            call = dataclasses.replace(call, key=call.key.flip(-1))
        return honest(call, bias)

    monkeypatch.setattr(simulation, "BACKENDS", {"folded": SimpleNamespace(attend=faulty)})
    (row,) = simulate((0.5,), **{key: SMALL[key] for key in ("seeds", "tokens", "heads")})
    assert row.folded_max_difference > 1e-5


def drawn(seed, tokens, heads):
    """Saliency, then the logits of one head after the other, in float64 lists."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(tokens, generator=generator).abs().tolist()
    low, high = min(raw), max(raw)
    saliency = [(value - low) / (high - low) for value in raw]
    return saliency, [(torch.randn(tokens, tokens, generator=generator) * 0.1).tolist() for _ in range(heads)]


def softmax(logits):
    weights = [math.exp(value) for value in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def oracle(strength, seeds, tokens, heads, eps=1e-8):
    """Entropy reduction (%) and KL (nats), one probability at a time."""
    reductions, divergences = [], []
    for seed in seeds:
        saliency, layer = drawn(seed, tokens, heads)
        before = after = divergence = 0.0
        for head in layer:
            for logits in head:
                attention = softmax(logits)
                steered = softmax([math.log(a + eps) + strength * s for a, s in zip(attention, saliency, strict=True)])
                before -= sum(a * math.log(a + eps) for a in attention)
                after -= sum(b * math.log(b + eps) for b in steered)
                for a, b in zip(attention, steered, strict=True):
                    divergence += a * (math.log(a + eps) - math.log(b + eps))
        reductions.append(100 * (before - after) / before)
        divergences.append(divergence / (heads * tokens))
    return sum(reductions) / len(seeds), sum(divergences) / len(seeds)


def test_rows_agree_with_plain_loops_in_double_precision():
    rows = simulate(**SMALL)
    assert [row.strength for row in rows] == list(SMALL["strengths"])
    for row in rows:
        reduction, kl = oracle(row.strength, SMALL["seeds"], SMALL["tokens"], SMALL["heads"])
        # float32 rounds logarithms of about 3 by 1.2e-7, twice in KL; entropies are divided by 3 and made per cent
        assert row.entropy_reduction_percent == pytest.approx(reduction, abs=3e-5)
        assert row.kl_nats == pytest.approx(kl, abs=2e-7)
    assert rows[1].entropy_reduction_percent > 0.05  # far beyond the tolerance
    assert rows[2].kl_nats > 0.01


def test_kl_is_the_cumulant_of_the_bias_less_its_mean():
    """KL(A ‖ A') = log E_A[e^b] - E_A[b] with b = λ s, which no eps enters."""
    for row in simulate(**SMALL):
        total = 0.0
        for seed in SMALL["seeds"]:
            saliency, layer = drawn(seed, SMALL["tokens"], SMALL["heads"])
            for logits in (logits for head in layer for logits in head):
                attention = softmax(logits)
                bias = [row.strength * s for s in saliency]
                total += math.log(sum(a * math.exp(b) for a, b in zip(attention, bias, strict=True)))
                total -= sum(a * b for a, b in zip(attention, bias, strict=True))
        # float32 as above; eps moves probabilities of about 0.05 by 2e-7 of themselves
        assert row.kl_nats == pytest.approx(total / (len(SMALL["seeds"]) * SMALL["heads"] * SMALL["tokens"]), abs=1.5e-6)


def test_a_seed_may_have_64_bits():
    """As torch.seed() returns them; layers and heads have fewer."""
    small = {**SMALL, "heads": 1}
    assert simulate(**{**small, "seeds": (2**64 - 1,)}) != simulate(**{**small, "seeds": (2**33,)})


def test_one_query_is_that_of_the_simulation():
    query = steered_query(0.7, seed=4, tokens=21)
    saliency, ((logits, *_),) = drawn(4, 21, 1)
    attention = softmax(logits)
    steered = softmax([math.log(a) + 0.7 * s for a, s in zip(attention, saliency, strict=True)])
    for found, expected in ((query.saliency, saliency), (query.before, attention), (query.after, steered)):
        torch.testing.assert_close(found, torch.tensor(expected))
    assert (query.saliency.min(), query.saliency.max()) == (0, 1)


def test_the_same_arguments_give_the_same_rows_whatever_else_was_drawn():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = simulate(**SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert simulate(**SMALL) == first
    assert simulate(**{**SMALL, "seeds": (4, 10)}) != first


def test_the_number_of_threads_changes_no_digit():
    """At the published size, where torch does share the work out."""
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(simulate((0.0, 0.25), seeds=(0,), heads=1))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_a_user_s_defaults_for_new_tensors_change_nothing():
    expected = simulate(**SMALL)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert simulate(**SMALL) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_cannot_be_changed_and_the_name_is_the_function():
    (row,) = simulate((0.5,), (0,), 8, 1)
    assert isinstance(row, SimulationRow)
    with pytest.raises(AttributeError):
        row.kl_nats = 0.0
    assert callable(hf_steer.analysis.simulate)


def test_extreme_strengths_put_all_on_one_token():
    for row in simulate((3e38, -3e38), seeds=(0,), tokens=16, heads=1):
        assert row.entropy_reduction_percent == pytest.approx(100)
        assert 0 < row.kl_nats < -math.log(1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strengths": ()}, r"strengths must not be empty; give at least one λ"),
        ({"strengths": 0.25}, r"strengths must be a sequence of numbers.*got 0\.25"),
        ({"strengths": (0.1, math.nan)}, r"strength must be a finite number; got nan"),
        ({"strengths": (-math.inf,)}, r"strength must be a finite number; got -inf"),
        ({"strengths": ("0.1",)}, r"strength must be a finite number; got '0\.1'"),
        ({"strengths": (1e39,)}, r"finite number in float32, at most 3\.4e\+38 in size; got 1e\+39"),
        ({"seeds": ()}, r"seeds must be a non-empty sequence of integers; got \(\)"),
        ({"seeds": 3}, r"seeds must be a sequence of integers; got 3"),
        ({"seeds": (0, -1)}, r"seeds must not be negative; got \(0, -1\)"),
        ({"seeds": (1, 1)}, r"seeds names one twice; got \(1, 1\)"),
        ({"seeds": (2**64,)}, r"seeds must be integers of 64 bits; got \(18446744073709551616,\)"),
        ({"tokens": 0}, r"tokens must be a whole number of at least 1; got 0"),
        ({"tokens": 8.0}, r"tokens must be a whole number of at least 1; got 8\.0"),
        ({"tokens": 1}, r"tokens must be at least 2; got 1: a single token has all the attention"),
        ({"heads": 0}, r"heads must be a whole number of at least 1; got 0"),
        ({"eps": 0.0}, r"eps must be at least 1\.2e-38 and below 1; got 0\.0"),
        ({"eps": math.nan}, r"eps must be a finite number; got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        simulate(**{**SMALL, **arguments})


def test_one_query_refuses_what_the_simulation_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"strength must be a finite number; got nan"):
        steered_query(math.nan)
    with pytest.raises(ConfigError, match=r"shown must be a whole number of at least 1; got 0"):
        plots.plot_steerability(tmp_path / "never.png", shown=0, tokens=8)
    assert not list(tmp_path.iterdir())


ASKED = ["simulate", "--strengths", "0,0.125,3", "--seeds", "4,9", "--tokens", "21", "--num-heads", "3"]


def test_the_command_prints_the_table_and_writes_pictures_and_rows(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert main([*ASKED, "--output", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = simulate((0.0, 0.125, 3.0), (4, 9), 21, 3)
    found = [line.split() for line in lines if line[:6].strip()[:1].isdigit() and len(line.split()) == 4]
    assert [line[0] for line in found] == ["0.00", "0.125", "3.00"]
    assert [line[1] for line in found] == [f"{row.entropy_reduction_percent:.4f}" for row in rows]
    assert [line[2] for line in found] == [f"{row.kl_nats:.6f}" for row in rows]
    assert [line[3] for line in found] == [f"{row.folded_max_difference:.1e}" for row in rows]
    names = ("steerability_plot.png", "lambda_tradeoff.png", "simulation.csv")
    assert all(str(folder / name) in lines[-1] for name in names)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names[:2]:
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 5
    with open(folder / "simulation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for line, row in zip(table, rows, strict=True):
        assert (float(line["strength"]), float(line["kl_nats"])) == (row.strength, row.kl_nats)
        assert float(line["entropy_reduction_percent"]) == row.entropy_reduction_percent
        assert float(line["folded_max_difference"]) == row.folded_max_difference
        assert (line["seeds"], line["tokens"], line["heads"], line["torch"]) == ("4 9", "21", "3", torch.__version__)
        assert line["date"].count("-") == 2


def test_json_is_one_object_with_the_rows_and_their_conditions(tmp_path, capsys):
    assert main([*ASKED, "--json", "--output", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert tuple(SimulationRow(**row) for row in report["rows"]) == simulate((0.0, 0.125, 3.0), (4, 9), 21, 3)
    assert (report["seeds"], report["tokens"], report["heads"], report["torch"]) == ([4, 9], 21, 3, torch.__version__)
    assert sorted(report["files"]) == sorted(str(path) for path in tmp_path.iterdir())


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    for given, message in (
        (["--strengths", "0,nan"], "--strengths: must be a finite number, such as 0.5; got 'nan'"),
        (["--seeds", "-1"], "--seeds: must be a whole number of at least 0; got '-1'"),
        (["--seeds", "0,x"], "--seeds: must be a whole number of at least 0; got 'x'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["simulate", *given, "--output", str(tmp_path)])
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["simulate", "--json", "--output", str(tmp_path / "file")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], "choose another with --output" in report["error"]) == (FileError.__name__, True)


def test_the_help_teaches_what_is_simulated(capsys):
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    taught = capsys.readouterr().out
    for text in ("softmax(log(A + 1e-8) + λ·s)", "entropy reduction", "in nats", "folded - dense", "lambda_tradeoff.png"):
        assert text in taught


def test_the_pictures_show_what_they_are_given(tmp_path):
    """Every strength named, both axes labelled, a cross per published value; a picture per strength."""
    from hf_steer.evidence.plots import simulation

    shown = {}
    rows = simulate(**SMALL)

    def keep(figure, path):
        shown[path.name] = figure
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "save", keep)
        plots.plot_tradeoff(rows, tmp_path / "tradeoff")
        plots.plot_steerability(tmp_path / "query", strength=0.7, seed=4, tokens=21, shown=8)
    (axis,) = shown["tradeoff"].axes
    assert "KL" in axis.get_xlabel()
    assert "entropy reduction" in axis.get_ylabel()
    assert {text.get_text() for text in axis.texts} == {f"λ = {row.strength:g}" for row in rows}
    simulated, published = axis.lines
    assert sorted(simulated.get_xdata()) == sorted(row.kl_nats for row in rows)
    assert published.get_marker() == "x"
    assert list(zip(published.get_ydata(), published.get_xdata(), strict=True)) == list(PUBLISHED.values())
    top, middle, bottom = shown["query"].axes
    query = steered_query(0.7, seed=4, tokens=21)
    assert [bar.get_height() for bar in top.patches] == pytest.approx(query.saliency[:8].tolist())
    assert middle.lines[0].get_ydata() == pytest.approx(query.before[:8].numpy())
    assert middle.lines[1].get_ydata() == pytest.approx(query.after[:8].numpy())
    assert [bar.get_height() for bar in bottom.patches] == pytest.approx((query.after / query.before).log()[:8].tolist())


def test_a_picture_of_a_strength_that_leaves_zeros_can_be_drawn(tmp_path):
    path = plots.plot_steerability(tmp_path / "steep.png", strength=-500.0, tokens=16)
    assert np.asarray(Image.open(path).convert("L")).std() > 5


def test_a_picture_that_fails_halfway_leaves_the_old_file(tmp_path):
    from hf_steer.analysis.plots import canvas

    class Half:
        def savefig(self, target, **kwargs):
            if hasattr(target, "write"):
                target.write(b"half a picture")
            else:
                target.write_bytes(b"half a picture")
            raise OSError("no more room")

    old = canvas.save(canvas.subplots(size=(1, 1))[0], tmp_path / "picture.png")
    content = old.read_bytes()
    with pytest.raises(OSError, match="no more room"):
        canvas.save(Half(), old)
    assert old.read_bytes() == content
    assert list(tmp_path.iterdir()) == [old]
