"""Attention seen and replaced: outputs reproduced, maps by hand, processors put back."""

import math
from contextlib import nullcontext
from functools import partial

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

from lightning_reg import AttentionMaps, Denoiser
from lightning_reg.diffusion import attention
from tests.conformance.problems import seeded
from tests.diffusion.digits import flow_condition, flow_model, prompt, scheduler, word_model, words

CROSS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
SELF = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([300, 700])


def text(*digits):
    with torch.no_grad():
        return word_model()[1](words(*map(prompt, digits))).last_hidden_state


def unet(states=None):
    with torch.no_grad():
        return word_model()[0](X, TIMES, encoder_hidden_states=text(3, 5) if states is None else states).sample


def transformer():
    with torch.no_grad():
        return flow_model()(X, timestep=TIMES, **flow_condition(prompt(3), prompt(5))).sample


def flux():
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    with seeded(0):
        return diffusers.FluxTransformer2DModel(
            **sizes, num_attention_heads=2, joint_attention_dim=6, pooled_projection_dim=4, axes_dims_rope=(2, 2, 4)
        ).eval()


def flux_output(model, tokens=3):
    generator = torch.Generator().manual_seed(0)
    places = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0))
    ids = torch.cat([torch.zeros(4, 1), places], 1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(2, 4, 4, generator=generator), timestep=torch.tensor([0.3, 0.7]),
            encoder_hidden_states=torch.randn(2, tokens, 6, generator=generator), img_ids=ids,
            pooled_projections=torch.randn(2, 4, generator=generator), txt_ids=torch.zeros(tokens, 3),
        ).sample  # fmt: skip


def changed(weights, place):
    """Every map a uniform one."""
    return torch.full_like(weights, 1 / weights.shape[-1])


@pytest.fixture
def processors():
    """Puts the processors of the word model back."""
    yield word_model()[0]
    word_model()[0].set_attn_processor(AttnProcessor2_0())


def test_what_is_seen_of_a_unet_is_softmax_by_hand_and_the_output_is_its_own():
    model, states = word_model()[0], text(3, 5)
    layer, inputs = model.get_submodule(CROSS), []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    wanted = unet()
    hook.remove()
    with AttentionMaps(model) as maps:
        assert torch.equal(unet(), wanted)
        found = maps.means()
    assert sorted(found) == sorted(name for name, _ in model.named_modules() if name.endswith("attn2"))
    query, key = (
        layer.to_q(inputs[0]).unflatten(2, (8, -1)).double(),
        layer.to_k(states).unflatten(2, (8, -1)).double(),
    )
    by_hand = torch.zeros(2, 16, 8, dtype=torch.double)
    for row in range(2):
        for head in range(8):
            scores = query[row, :, head] @ key[row, :, head].T / math.sqrt(query.shape[-1])
            by_hand[row] += scores.softmax(1) / 8
    torch.testing.assert_close(found[CROSS].double(), by_hand.detach(), atol=1e-6, rtol=0)


def test_maps_of_passes_are_averaged_as_they_come_and_cleared():
    model = Denoiser(word_model()[0], scheduler("v_prediction"))
    with AttentionMaps(model, "*attn2") as maps, torch.no_grad():
        with pytest.raises(ValueError, match=r"no cross-attention was seen\. Run the model inside"):
            maps.grid(8, 8)
        singles = []
        for digit in (1, 2):
            maps.clear()
            unet(text(digit, 5))
            singles.append(maps.means()[CROSS])
        maps.clear()
        unet(text(1, 5))
        unet(text(2, 5))
        both = maps.means()[CROSS]
        grid = maps.grid(8, 8)
    torch.testing.assert_close(both, torch.stack(singles).mean(0))
    torch.testing.assert_close(both.sum(2), torch.ones(2, 16))
    assert grid.shape == (2, 8, 8, 8)
    torch.testing.assert_close(grid.sum(1), torch.ones(2, 8, 8))
    assert maps.means() == {}


def test_a_grid_is_the_mean_of_layers_of_other_sizes():
    with AttentionMaps(word_model()[0], "*attn2", rows=slice(1, 2)) as maps:
        unet()
        small = {name: one.mT.unflatten(2, (-1, round(one.shape[1] ** 0.5))) for name, one in maps.means().items()}
        found = maps.grid(4, 4)
    assert found.shape == (1, 8, 4, 4)
    assert len({one.shape for one in small.values()}) == 1  # all are 4 x 4 here
    torch.testing.assert_close(found, sum(small.values()) / len(small))


def test_self_attention_and_layers_that_are_left_alone():
    model = word_model()[0]
    with AttentionMaps(model, kind="self") as maps:
        unet()
        found = maps.means()
    assert {name.rpartition(".")[2] for name in found} == {"attn1"}
    assert found[SELF].shape == (2, 16, 16)
    with AttentionMaps(model, kind="self", size_limit=15) as maps:
        unet()
        assert maps.means() == {}


def test_a_map_that_takes_the_place_of_another_is_what_values_are_weighted_with():
    model = word_model()[0]
    layer, values, seen = model.get_submodule(CROSS), [], []
    hooks = [
        layer.to_v.register_forward_hook(lambda m, i, out: values.append(out)),
        layer.to_out[0].register_forward_pre_hook(lambda m, args: seen.append(args[0])),
    ]
    with AttentionMaps(model, CROSS, replace=changed):
        unet()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(seen[0], values[0].mean(1, keepdim=True).expand_as(seen[0]), atol=1e-6, rtol=1e-5)
    with AttentionMaps(model, replace=lambda weights, place: weights.clone()):
        assert torch.equal(unet(), unet())
    wanted = unet()
    with AttentionMaps(model, replace=lambda weights, place: weights.clone(), keep=False):
        assert torch.equal(unet(), wanted)


def test_processors_and_backends_are_put_back_after_exceptions_too():
    for model, run in ((word_model()[0], unet), (flow_model(), transformer)):
        before = dict(model.attn_processors)
        for fails in (False, True):

            def broken(weights, place, fails=fails):
                if fails:
                    raise KeyError("mine")
                return weights

            try:
                with AttentionMaps(model, replace=broken):
                    assert model.attn_processors != before
                    run()
            except KeyError:
                assert fails
            assert model.attn_processors == before
            assert not [m for m in model.modules() if "get_attention_scores" in vars(m)]
    model = flux()
    first = next(iter(model.attn_processors.values()))
    if not hasattr(first, "_attention_backend"):  # diffusers before 0.35
        return
    first._attention_backend = "mine"
    with AttentionMaps(model):
        assert {p._attention_backend for p in model.attn_processors.values()} == {"native"}
    assert [p._attention_backend for p in model.attn_processors.values()] == ["mine", None]
    assert "_attention_backend" not in vars(list(model.attn_processors.values())[1])


def test_joint_attention_of_a_transformer():
    wanted = transformer()
    with AttentionMaps(flow_model()) as maps:
        assert torch.equal(transformer(), wanted)
        cross = maps.means()
    with AttentionMaps(flow_model(), kind="self") as maps:
        transformer()
        both = {name: one.sum(2) + cross[name].sum(2) for name, one in maps.means().items()}
    assert len(cross) == 4
    for name, one in cross.items():
        assert one.shape == (2, 16, 8)
        torch.testing.assert_close(both[name], torch.ones(2, 16))
    places = []
    with AttentionMaps(flow_model(), replace=lambda weights, place: places.append(place) or weights):
        assert torch.equal(transformer(), wanted)
    assert (places[0].queries, places[0].pixels, places[0].words) == (slice(0, 16), slice(0, 16), slice(16, 24))


def another_backend():
    """Another default than torch's own; diffusers has none to choose from before 0.35."""
    try:
        from diffusers.models.attention_dispatch import attention_backend
    except ImportError:
        return nullcontext()
    return attention_backend("_native_math")


@pytest.mark.parametrize("tokens", [3, 4])
def test_joint_attention_with_the_text_first_and_rotary_positions(tokens):
    """By hand in Flux: the first block's text comes first; a text as long as the image is told by the processor."""
    model, places = flux(), []
    wanted = flux_output(model, tokens)
    with another_backend(), AttentionMaps(model) as maps:
        torch.testing.assert_close(flux_output(model, tokens), wanted, atol=1e-6, rtol=0)
        cross = maps.means()
    assert {name: one.shape for name, one in cross.items()} == {"transformer_blocks.0.attn": (2, 4, tokens)}
    with AttentionMaps(model, kind="self", replace=lambda weights, place: places.append(place) or weights) as maps:
        assert torch.equal(flux_output(model, tokens), wanted)
        alone = maps.means()
    joint, single = places
    assert (joint.queries, joint.pixels, joint.words) == (
        slice(tokens, tokens + 4), slice(tokens, tokens + 4), slice(0, tokens)
    )  # fmt: skip
    assert (single.queries, single.words) == (slice(0, tokens + 4), slice(0, 0))
    torch.testing.assert_close(alone[joint.layer].sum(2) + cross[joint.layer].sum(2), torch.ones(2, 4))


def test_fused_projections_and_processors_that_ask_their_layer():
    model, wanted = flux(), None
    maps = {}
    for fused in (False, True):
        if fused:
            model.fuse_qkv_projections()
        with AttentionMaps(model) as found:
            output = flux_output(model)
            maps[fused] = found.means()["transformer_blocks.0.attn"]
        wanted = output if wanted is None else wanted
        torch.testing.assert_close(output, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps[True], maps[False], atol=1e-6, rtol=0)
    before = [type(p) for p in flow_model().attn_processors.values()]
    wanted = transformer()
    flow_model().fuse_qkv_projections()
    try:
        with AttentionMaps(flow_model()) as found:
            torch.testing.assert_close(transformer(), wanted, atol=1e-5, rtol=0)
            assert found.means()["transformer_blocks.0.attn"].shape == (2, 16, 8)
    finally:
        flow_model().unfuse_qkv_projections()
    assert [type(p) for p in flow_model().attn_processors.values()] == before


def test_processors_that_ask_their_layer_for_maps(processors):
    with AttentionMaps(processors) as maps:
        wanted = unet()
        by_torch = maps.means()
    with AttentionMaps(processors, replace=changed):
        replaced = unet()
    processors.set_attn_processor(AttnProcessor())
    with AttentionMaps(processors) as maps:
        torch.testing.assert_close(unet(), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(maps.means()[CROSS], by_torch[CROSS], atol=1e-6, rtol=0)
    with AttentionMaps(processors, replace=changed):
        torch.testing.assert_close(unet(), replaced, atol=1e-5, rtol=1e-5)
    processors.set_attn_processor(SlicedAttnProcessor(3))
    # Slices of as many rows as there are heads would be whole maps of one sample of two.
    for size in (3, processors.get_submodule(CROSS).heads):
        processors.set_attn_processor(SlicedAttnProcessor(size))
        with AttentionMaps(processors), pytest.raises(RuntimeError, match=r"of SlicedAttnProcessor .* not seen"):
            unet()


def test_arguments_of_a_processor_are_still_read(caplog):
    class Mine(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, strength=1):
            return strength * super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    model = word_model()[0]
    model.set_attn_processor(Mine())
    call = {"encoder_hidden_states": text(3, 5), "cross_attention_kwargs": {"strength": 0.5}}
    try:
        with torch.no_grad():
            wanted = model(X, TIMES, **call).sample
            with AttentionMaps(model):
                assert torch.equal(model(X, TIMES, **call).sample, wanted)
                assert model.get_submodule(CROSS).get_processor().__class__.__name__ == "_Watched"
    finally:
        model.set_attn_processor(AttnProcessor2_0())
    assert not torch.equal(wanted, unet())


def test_masks_and_half_precision_are_in_the_maps(monkeypatch):
    model, states = word_model()[0], text(3, 5)
    mask = torch.tensor([[True] * 5 + [False] * 3] * 2)
    with AttentionMaps(model) as maps, torch.no_grad():
        model(X, TIMES, encoder_hidden_states=states, encoder_attention_mask=mask)
        assert float(maps.means()[CROSS][:, :, 5:].max()) < 1e-6
        assert maps.means()[CROSS].dtype is torch.float32
    with AttentionMaps(model, CROSS, gradients=True) as maps:
        states.requires_grad_()
        model(X, TIMES, encoder_hidden_states=states)
        maps.means()[CROSS][:, :, 4].sum().backward()
    assert float(states.grad.abs().sum()) > 0
    seen = []

    def asked(self, call, *args, **kwargs):
        query, key = call["query"].detach().float(), call["key"].detach().float()
        seen.append((query.double() @ key.double().mT / query.shape[-1] ** 0.5).softmax(-1).mean(1))
        return self(call, *args, **kwargs)

    monkeypatch.setattr(attention, "_weights", partial(asked, attention._weights))
    with AttentionMaps(model, CROSS) as maps, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(X, TIMES, encoder_hidden_states=states)
        torch.testing.assert_close(maps.means()[CROSS].double(), seen[0], atol=1e-6, rtol=0)
    for one in model.parameters():
        one.grad = None


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"^AttentionMaps: `kind` must be one of 'cross', 'self', got 'joint'"):
        AttentionMaps(word_model()[0], kind="joint")
    with pytest.raises(ValueError, match=r"^AttentionMaps: `model` must have layers .* got Linear, which has none"):
        AttentionMaps(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"^AttentionMaps: `model` must have layers .* got function"):
        AttentionMaps(Denoiser(lambda x, t: x, scheduler()))
    with pytest.raises(ValueError, match=r"^AttentionMaps: `layers` must match .* got '\*attn3'. Near it: '"):
        AttentionMaps(word_model()[0], ["*attn2", "*attn3"])


def test_processors_with_several_maps_or_none_are_refused_by_name(processors):
    import diffusers.models.attention_processor as known

    own = processors.attn_processors
    image = known.IPAdapterAttnProcessor2_0(32, 64)
    processors.set_attn_processor({name: image if "attn2" in name else one for name, one in own.items()})
    with pytest.raises(ValueError, match=r"^AttentionMaps: `layers` .* with IPAdapterAttnProcessor2_0, .*unload_ip_"):
        AttentionMaps(processors)
    AttentionMaps(processors, "*.attn1")  # those that are not looked at may be what they are
    linear = known.SanaLinearAttnProcessor2_0()
    processors.set_attn_processor({name: linear if "attn1" in name else own[name] for name in own})
    with pytest.raises(ValueError, match=r"^AttentionMaps: `layers` .* with SanaLinearAttnProcessor2_0, .*'\*\.attn2'"):
        AttentionMaps(processors)
    with AttentionMaps(processors, "*.attn2"):
        pass
