"""The model's own eyes: one pass through the tower, scores at the right tokens, for each layout of patches."""

from __future__ import annotations

import itertools

import pytest
import torch
from kit import eyes_oracle as oracle
from kit.gazing import logits, steer
from kit.tiny import IMPLEMENTATIONS, SEEING, make_model, make_prompt
from kit.versions import cache_of

from hf_steer import AttentionConfig, Saliency, SaliencyConfig, SteerConfig, patch_model, unpatch_model, use_saliency
from hf_steer.saliency import normalize
from hf_steer.values import TokenScores


def looking_with(family, blocks, source="vision_attention"):
    saliency = SaliencyConfig(source=source, blocks=blocks, normalize="zscore", preserve_mass=False)
    return SteerConfig(attention=AttentionConfig(heads={1: "all"}, strength=1.0, saliency=saliency))


def pixels_with_an_odd_token(grid, odd):
    """Grey patches but for one token, in the processors' order: merge block by merge block."""
    pixels = torch.full((grid[0] * grid[1] * grid[2] * 4, 3 * 2 * 16), 0.1)
    pixels[4 * odd : 4 * odd + 4] = torch.linspace(-9, 9, 96)
    return pixels


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", SEEING)
@pytest.mark.parametrize("grid", [(1, 3, 5), (1, 5, 2), (2, 3, 4)])
def test_an_odd_token_stands_out_where_it_lies(family, implementation, grid):
    """Grids are not square, Qwen2.5-VL permutes windows, videos attend frame by frame: the place must come out all the same.

    Positions are switched off in the tower, so that grey patches are all alike and only the odd one can differ.
    """
    frames, height, width = grid
    model = patch_model(make_model(family, implementation), looking_with(family, (0,)))
    tower, patches = model.model.visual, torch.tensor([[frames, 2 * height, 2 * width]])
    with torch.no_grad():
        tower.rotary_pos_emb.inv_freq.zero_()
        if family == "qwen3_vl":
            tower.pos_embed.weight.zero_()
        for odd in range(frames * height * width):
            record = model.get_image_features(pixels_with_an_odd_token(grid, odd), patches, return_dict=True).hf_steer
            assert record.grids == (grid,)
            assert record.scores.mean().item() == pytest.approx(1.0, abs=1e-4)
            per_frame = record.scores.view(frames, -1)
            frame, place = divmod(odd, height * width)
            grey = torch.cat([per_frame[frame, :place], per_frame[frame, place + 1 :]])
            assert grey.max() - grey.min() < 1e-4 < 1e-2 < (per_frame[frame, place] - grey[0]).abs()
            for other in set(range(frames)) - {frame}:
                torch.testing.assert_close(per_frame[other], torch.ones(height * width))  # it never saw the odd token


@pytest.mark.parametrize("family", SEEING)
@pytest.mark.parametrize("block", [0, 1])
def test_recorded_scores_equal_a_recomputation_from_the_blocks_own_input(family, block):
    """Queries and keys once more from the block's input, segment by segment, against what rode along."""
    model = patch_model(make_model(family), looking_with(family, (block,)))
    inputs = make_prompt(family, [[3, ("image", 3, 5), 2, ("image", 2, 2), 1]])
    taken = {}

    def take(module, args, kwargs):
        taken.update(hidden=args[0], **kwargs)

    attention = model.model.visual.blocks[block].attn
    hook = attention.register_forward_pre_hook(take, with_kwargs=True)
    with torch.no_grad():
        record = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True).hf_steer
        hook.remove()
        count = len(taken["hidden"])
        query, key, _ = attention.qkv(taken["hidden"]).reshape(count, 3, 2, -1).permute(1, 2, 0, 3)
        cos, sin = taken["position_embeddings"]

        def turn(values):
            low, high = values.chunk(2, -1)
            return values * cos + torch.cat([-high, low], -1) * sin

        bounds = taken["cu_seqlens"].tolist()
        patches = torch.cat([
            torch.softmax(turn(query)[:, a:b].double() @ turn(key)[:, a:b].double().mT * attention.scaling, -1).sum((0, 1)) / 2
            for a, b in itertools.pairwise(bounds)
        ])
    tokens = patches.view(-1, 4).mean(1).float()
    windowed = family == "qwen2_5_vl"
    if windowed:  # the order is checked by the odd token; here the values
        torch.testing.assert_close(record.scores.sort().values, tokens.sort().values, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(record.scores, tokens, rtol=1e-4, atol=1e-5)
    assert record.scores.std() > 0.01


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", SEEING)
@pytest.mark.parametrize("blocks", [None, "all", (0,), (-1,), (1, 0)])
def test_rollout_equals_the_product_of_whole_matrices(family, implementation, blocks):
    """Qwen2.5-VL's block 1 attends in windows and block 0 frame by frame: one chain over all patches has to hold both."""
    model = patch_model(make_model(family, implementation), looking_with(family, blocks, "vision_rollout"))
    inputs = make_prompt(family, [[3, ("image", 3, 3), 2, ("image", 2, 1), 1]])
    taken = {}

    def take(module, args, kwargs):
        taken[module] = {"hidden": args[0], **kwargs}

    tower = model.model.visual
    hooks = [block.attn.register_forward_pre_hook(take, with_kwargs=True) for block in tower.blocks]
    with torch.no_grad():
        record = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True).hf_steer
        matrices = [whole_matrix(block.attn, **taken[block.attn]) for block in tower.blocks]
    for hook in hooks:
        hook.remove()
    segments = [len(taken[block.attn]["cu_seqlens"]) - 1 for block in tower.blocks]
    assert segments == ([2, 5] if family == "qwen2_5_vl" else [2, 2])
    chosen = {None: (0, 1), "all": (0, 1), (0,): (0,), (-1,): (1,), (1, 0): (0, 1)}[blocks]
    patches = oracle.rollout([matrices[block] for block in chosen])
    tokens = patches.view(-1, 4).mean(1)
    if family == "qwen2_5_vl":
        order = oracle.windows(1, 3, 3, 2) + [9 + place for place in oracle.windows(1, 2, 1, 2)]
        assert order != sorted(order)
        tokens = torch.stack([tokens[order.index(place)] for place in range(11)])
    torch.testing.assert_close(record.scores.double(), tokens, rtol=1e-4, atol=1e-5)
    assert record.scores[:9].mean().item() == pytest.approx(1.0, abs=1e-5)
    assert record.scores.std() > 0.01


def whole_matrix(attention, hidden, cu_seqlens, position_embeddings, **_):
    """The attention weights of one block over all patches of the call, by loops."""
    query, key, _ = attention.qkv(hidden).reshape(len(hidden), 3, 2, -1).permute(1, 2, 0, 3)
    cos, sin = position_embeddings

    def turn(values):
        low, high = values.chunk(2, -1)
        return values * cos + torch.cat([-high, low], -1) * sin

    bounds = itertools.pairwise(cu_seqlens.tolist())
    return oracle.block_diagonal([oracle.attention(turn(query)[:, a:b], turn(key)[:, a:b], attention.scaling) for a, b in bounds])


@pytest.mark.parametrize("family", SEEING)
def test_rollout_steers_the_same_in_a_pass_and_in_generate(family):
    inputs = make_prompt(family, [[3, ("image", 3, 2), 1, ("video", 2, 2, 3), 2], [2, ("image", 2, 2), 4]])
    model = make_model(family)
    outputs = [logits(model, inputs)]
    for source in ("vision_attention", "vision_rollout"):
        patch_model(model, looking_with(family, None, source))
        outputs.append(logits(model, inputs))
        first = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
        torch.testing.assert_close(first.logits[0], outputs[-1][:, -1], rtol=1e-4, atol=2e-5)
        unpatch_model(model)
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).abs().max() > 0.05


def test_regions_that_a_user_draws_keep_their_peaks():
    """A few high scores are outliers in the tower's attention; in what a user points at they are what is meant."""
    model = patch_model(make_model("qwen2_vl"), looking_with("qwen2_vl", (0,)))
    inputs = make_prompt("qwen2_vl", [[3, ("image", 5, 2), 2]])
    said = Saliency.from_points((139, 248), (200, 500))
    with torch.no_grad(), use_saliency(model, said):
        state = cache_of(model(**inputs, use_cache=True)).hf_steer_state
    spot = said.regions[0].paint.on_grid(5, 2).flatten()
    plain = ((spot - spot.mean()) / spot.std(unbiased=False)).clamp(-3, 3)
    winsorized = normalize(TokenScores(spot[None], torch.zeros(1, 10).long()), "zscore", 3.0).values[0]
    assert (winsorized - plain).abs().max() > 1
    assert torch.equal(state.scores.values[0, state.spans[0].positions], plain)


@pytest.mark.parametrize("family", SEEING)
def test_several_blocks_are_averaged(family):
    inputs = make_prompt(family, [[3, ("image", 3, 2), 1]])
    scores = {}
    for blocks in ((0,), (1,), (0, -1)):
        model = patch_model(make_model(family), looking_with(family, blocks))
        with torch.no_grad():
            output = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        scores[blocks] = output.hf_steer.scores
    torch.testing.assert_close(scores[0, -1], (scores[0,] + scores[1,]) / 2)
    assert not torch.allclose(scores[0,], scores[1,])


@pytest.mark.parametrize("family", SEEING)
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_the_tower_runs_once(family, how):
    inputs = make_prompt(family, [[3, ("image", 3, 2), 1], [2, ("image", 2, 2), 4]])
    calls = {}
    for patched in (False, True):
        model = make_model(family)
        if patched:
            patch_model(model, steer(family))
        counted = []
        model.model.visual.register_forward_hook(lambda *_, counted=counted: counted.append("tower"))
        for block in model.model.visual.blocks:
            block.attn.qkv.register_forward_hook(lambda *_, counted=counted: counted.append("qkv"))
        if how == "forward":
            logits(model, inputs)
        else:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        calls[patched] = counted
    assert calls[True] == calls[False]
    assert calls[True].count("tower") == 1


@pytest.mark.parametrize("family", SEEING)
def test_the_towers_own_output_is_bit_equal_while_it_is_watched(family):
    inputs = make_prompt(family, [[3, ("image", 3, 2), 1]])
    model = make_model(family)
    outputs = []
    for _ in range(2):
        with torch.no_grad():
            output = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        outputs.append(output.pooler_output[0])
        if not outputs[1:]:
            patch_model(model, steer(family))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", SEEING)
def test_recomputation_under_gradient_checkpointing_reads_nothing_twice(family, monkeypatch):
    from hf_steer.saliency import eyes

    inputs = make_prompt(family, [[3, ("image", 3, 2), 1, ("image", 2, 2)]])
    model = make_model(family).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    patch_model(model, looking_with(family, (0,)))
    read, real = [], eyes.attention_received
    monkeypatch.setattr(eyes, "attention_received", lambda *args: read.append(args) or real(*args))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(read) == 2
    assert model.model.visual.blocks[0].attn.qkv.weight.grad.abs().max() > 0
