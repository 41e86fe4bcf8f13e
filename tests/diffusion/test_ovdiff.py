"""OVDiff: exact properties of prototypes, masks and scores; supports of the word-conditioned digits model."""

import itertools
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import JaccardIndex

from lightning_reg import Denoiser, DenoiserFeatures, PrototypeSegmenter
from lightning_reg.functional import (
    attention_masks,
    best_caption,
    build_prototypes,
    cosine_scores,
    kmeans_centres,
    present_classes,
    sample_support,
)
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.kinds.procedure import ProcedureCase
from tests.diffusion.digits import prompt, scheduler, training_digits, word_model, words
from tests.diffusion.test_null_text_inversion import OTHER, PROMPT, SAMPLE, unet
from tests.toys import QUIET, make_trainer

pytestmark = QUIET


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channels(images):
    """The simplest features: the channels of an image."""
    return images.movedim(1, 3)


def shifted(images):
    return channels(2 * images + 1)


IMAGES = drawn(2, 4, 3, 5)


def segmenter(**options):
    made = PrototypeSegmenter(**{"extractors": [channels, shifted], "parts": 2, **options})
    support = {name: drawn(3, 4, 3, 5, seed=seed) for seed, name in enumerate(("cat", "sky", "boat"), 1)}
    masks = {name: images[:, 0] > 0 for name, images in support.items()}
    made.fit(support, masks, {name: ~mask for name, mask in masks.items()}, stuff=["sky"])
    return made


CASE = (
    NetworkCase(
        segmenter,
        (IMAGES, torch.tensor([[True, False, True], [True, True, True]])),
        [
            ({"extractors": []}, "extractors"),
            ({"kinds": []}, "kinds"),
            ({"kinds": ["mean"]}, "kinds"),
            ({"parts": 0}, "parts"),
            ({"background_filter": 1.5}, "background_filter"),
            ({"filter_against": "none"}, "filter_against"),
            ({"window": 0}, "window"),
            ({"stride": 0}, "stride"),
        ],
    ),
    ProcedureCase(
        sample_support,
        unet,
        (SAMPLE, PROMPT, OTHER, torch.tensor([[False, True, False]] * 2)),
        {"guidance": 2.0, "steps": 3},
        [({"steps": 0}, "steps")],
    ),
)


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_prototypes_are_one_and_one_for_each_image_and_each_part():
    features, masks = drawn(4, 3, 3, 6).double(), drawn(4, 3, 3, seed=2) > 0
    found = build_prototypes(features, masks, parts=5)
    assert found.shape == (1 + 4 + 5, 6)
    torch.testing.assert_close(found[0], features[masks].mean(0))
    for image in range(4):
        rows = [features[image, i, j] for i, j in itertools.product(range(3), range(3)) if masks[image, i, j]]
        torch.testing.assert_close(found[1 + image], sum(rows) / len(rows))
    torch.testing.assert_close(build_prototypes(features, masks, ["part"], 1), found[:1])
    assert torch.equal(build_prototypes(features, masks, ["part"], 5), found[5:])
    masks[2] = False
    assert build_prototypes(features, masks, parts=5).shape == (1 + 3 + 5, 6)  # an image that has none is left out
    assert bool(build_prototypes(features, masks).isfinite().all())
    assert build_prototypes(features, torch.zeros_like(masks)).shape == (0, 6)


def test_a_place_counts_that_any_of_the_mask_touches():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 5, 1] = True
    features = torch.arange(16.0).reshape(1, 4, 4, 1)
    assert build_prototypes(features, mask, ["class"]).tolist() == [[8.0]]  # row 2, column 0


def test_centres_are_means_of_what_is_nearest_to_them():
    places = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    points = (places[:, None] + 0.1 * drawn(3, 30, 2)).flatten(0, 1)
    found = kmeans_centres(points, 3)
    wanted = points.reshape(3, 30, 2).mean(1)
    torch.testing.assert_close(found[found[:, 0].argsort()][-1], wanted[1])
    torch.testing.assert_close(found.sum(0), wanted.sum(0))
    assert torch.equal(kmeans_centres(points, 3), found)
    assert len(kmeans_centres(points[:2], 5)) == 2
    assert len(kmeans_centres(points[:1].expand(4, 2), 3)) == 3
    assert len(kmeans_centres(points, 3, most=10)) == 3


def test_scores_are_those_of_the_nearest_prototype_and_do_not_depend_on_size_or_order():
    features, prototypes, owner = (
        drawn(2, 3, 4, 5).double(),
        drawn(6, 5, seed=1).double(),
        torch.tensor([0, 2, 1, 0, 2, 1]),
    )
    found = cosine_scores(features, prototypes, owner, 4)
    for b, i, j, c in itertools.product(range(2), range(3), range(4), range(4)):
        near = [float(F.cosine_similarity(features[b, i, j], prototypes[k], dim=0)) for k in range(6) if owner[k] == c]
        assert float(found[b, c, i, j]) == pytest.approx(max(near, default=-1.0), abs=1e-12)
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    again = cosine_scores(7 * features, 0.1 * prototypes[order], owner[order], 4)
    torch.testing.assert_close(again, found)


def test_masks_of_attention_alone_and_of_regions():
    maps = torch.tensor([[[0.0, 1.0, 2.0, 4.0]], [[3.0, 3.0, 3.0, 3.0]]])
    found = attention_masks(maps, 0.4, 0.3)
    assert found.foreground.int().tolist() == [[[0, 0, 1, 1]], [[0, 0, 0, 0]]]
    assert found.background.int().tolist() == [[[1, 1, 0, 0]], [[1, 1, 1, 1]]]
    maps = torch.zeros(2, 5, 9)
    maps[:, :, 7:] = 1.0
    left, right = torch.zeros(2, 5, 9, dtype=torch.bool), torch.zeros(2, 5, 9, dtype=torch.bool)
    left[:, :, :6], right[:, :, 6:] = True, True
    none = torch.zeros_like(left)
    regions = torch.stack([left, right, none], 1)
    regions[1, 0] = False  # a single region: by the map alone
    found = attention_masks(maps, proposals=regions)
    assert torch.equal(found.foreground[0], right[0])
    wanted = left[0].clone()
    wanted[:, 5] = False  # made smaller; beyond the border counts as background
    assert torch.equal(found.background[0], wanted)
    assert torch.equal(attention_masks(maps, proposals=regions, erosion=0).background[0], left[0])
    wanted[:, 4] = False
    assert torch.equal(attention_masks(maps, proposals=regions, erosion=2).background[0], wanted)
    with pytest.raises(ValueError, match=r"^attention_masks: `erosion` must be at least 0, got -1"):
        attention_masks(maps, erosion=-1)
    assert torch.equal(found.foreground[1], maps[1] > 0.5)
    overlapping = torch.stack([torch.ones_like(left), right], 1)
    found = attention_masks(maps, proposals=overlapping)
    assert torch.equal(found.foreground, right)  # the heavier one has a place that both hold


def test_classes_are_filtered_by_embeddings_and_by_captions():
    images, names = drawn(5, 8), drawn(4, 8, seed=1)
    found = present_classes(images, names, at_most=1, stuff=[3])
    for b in range(5):
        cosines = [float(F.cosine_similarity(images[b], names[c], dim=0)) for c in range(4)]
        best = max(range(4), key=lambda c: cosines[c])
        assert [c for c in range(4) if found[b, c]] == sorted({best, 3})
    every = present_classes(images, names, scale=3.0)
    shares = torch.stack([(3 * F.cosine_similarity(images[b, None], names)).softmax(0) for b in range(5)])
    assert torch.equal(every, shares >= 0.25)
    assert best_caption([0, 1, 2], lambda chosen: 2 * (0 in chosen) + (2 in chosen) - 3 * (1 in chosen)) == [0, 2]
    assert best_caption([], len) == []


# -- the segmenter -----------------------------------------------------------------------------------------------------


def scenes():
    """Images of labels 0, 1, 2 whose channels are one-hot."""
    labels = torch.randint(3, (4, 6, 6), generator=torch.Generator().manual_seed(0))
    return F.one_hot(labels, 3).movedim(3, 1).float(), labels


def perfect(**options):
    images, labels = scenes()
    made = PrototypeSegmenter([channels], **{"parts": 2, **options})
    support = {"one": images, "two": images}
    made.fit(support, {"one": labels == 1, "two": labels == 2}, dict.fromkeys(support, labels == 0))
    return made


def test_features_that_are_the_labels_give_a_perfect_index():
    images, labels = scenes()
    metric = JaccardIndex("multiclass", num_classes=3)
    metric.update(perfect().predict(images), labels)
    assert float(metric.compute()) == 1.0
    assert torch.equal(perfect().predict(5 * images), labels)


def test_a_class_that_is_not_present_is_never_chosen():
    images, _ = scenes()
    present = torch.tensor([[True, False]] * 2 + [[False, True], [False, False]])
    found = perfect().predict(images, present)
    assert [sorted(one.unique().tolist()) for one in found] == [[0, 1], [0, 1], [0, 2], [0]]
    scores = perfect()(images, present)
    assert bool((scores[:2, 2] == -2).all())
    other = PrototypeSegmenter([channels])  # backgrounds of absent classes do not count
    other.fit({"a": images, "b": images}, dict.fromkeys("ab", scenes()[1] == 1),
              {"a": scenes()[1] == 0, "b": scenes()[1] == 2})  # fmt: skip
    only = other(images, torch.tensor([[True, False]] * 4))
    assert bool((only[:, 0][scenes()[1] == 2] == 0).all())


def backgrounds(**options):
    made = segmenter(**options)
    _, classes, groups = made._kept(0)
    return [int(((classes == c) & (groups == 0)).sum()) for c in range(3)]


def test_background_prototypes_are_filtered_by_other_foregrounds():
    assert backgrounds(background_filter=1.0) == [1 + 3 + 2, 0, 1 + 3 + 2]  # stuff has none
    assert backgrounds(background_filter=-1.0) == [0, 0, 0]
    scores = segmenter(background_filter=-1.0)(IMAGES)
    assert bool((scores[:, 0] == -1).all())  # never chosen
    made = segmenter(background_filter=-0.1, kinds=["class", "instance"])
    support = {name: drawn(3, 4, 3, 5, seed=seed) for seed, name in enumerate(("cat", "sky", "boat"), 1)}

    def front(name):
        return build_prototypes(channels(support[name]), support[name][:, 0] > 0, ["class", "instance"])

    counts = {"all": [], "stuff": []}
    for against in counts:
        for place in (0, 2):
            kept = 0
            rows = build_prototypes(channels(support[made.names[place]]), support[made.names[place]][:, 0] <= 0,
                                    ["class", "instance"])  # fmt: skip
            for row in rows:
                near = [
                    float(F.cosine_similarity(row, other, dim=0))
                    for number, name in enumerate(made.names)
                    if number != place and (against == "all" or name == "sky")
                    for other in front(name)
                ]
                kept += max(near) <= -0.1
            counts[against].append(kept)
    for against, kept in counts.items():
        found = backgrounds(background_filter=-0.1, kinds=["class", "instance"], filter_against=against)
        assert found == [kept[0], 0, kept[1]]


def test_at_one_no_background_is_filtered_and_a_class_without_a_place_is_refused():
    images, everywhere = drawn(4, 16, 4, 4), torch.ones(4, 4, 4, dtype=torch.bool)
    made = PrototypeSegmenter([channels], parts=4, background_filter=1.0)
    both = dict.fromkeys("ab", everywhere)
    made.fit(dict.fromkeys("ab", images), both, both)  # the same rows, of which some cosines are above 1
    assert int((made._kept(0)[2] == 0).sum()) == 2 * (1 + 4 + 4)
    with pytest.raises(ValueError, match=r"`foreground` must have a place of each class, got none of 'b' in all 4 im"):
        made.fit(dict.fromkeys("ab", images), {"a": everywhere, "b": ~everywhere}, both)


def test_boats_have_water_around_them_and_water_is_stuff():
    """Channels are cat, boat and water; a cat is beside a boat, a boat in water."""
    cat, boat, water = torch.eye(3)[:, None, :, None, None].expand(3, 1, 3, 2, 2).clone().unbind()
    for image, around in ((cat, boat), (boat, water)):
        image[..., 1] = around[..., 1]
    left = torch.tensor([[[True, False], [True, False]]])
    support = {"cat": cat, "boat": boat, "water": water}
    front = {"cat": left, "boat": left, "water": left | True}
    for against, wanted in (("all", [0, 0]), ("stuff", [1, 0])):
        made = PrototypeSegmenter([channels], ["class"], filter_against=against)
        made.fit(support, front, {"cat": ~left, "boat": ~left}, stuff=["water"])
        _, classes, groups = made._kept(0)
        assert [int(((classes == c) & (groups == 0)).sum()) for c in range(2)] == wanted


def test_scores_are_averaged_over_extractors_and_windows():
    one, two = (segmenter(extractors=[part]) for part in (channels, shifted))
    torch.testing.assert_close(segmenter()(IMAGES), (one(IMAGES) + two(IMAGES)) / 2)

    def blurred(images):  # features that see the whole image
        return channels(images + images.mean((2, 3), keepdim=True))

    plain, windows = segmenter(extractors=[blurred]), segmenter(extractors=[blurred], window=2, stride=2)
    total, count = plain(IMAGES), torch.ones(3, 5)
    for top, left in itertools.product((0, 1), (0, 2, 3)):
        rows, columns = slice(top, top + 2), slice(left, left + 2)
        total[:, :, rows, columns] += plain(IMAGES[:, :, rows, columns])
        count[rows, columns] += 1
    torch.testing.assert_close(windows(IMAGES), total / count)


def test_prototypes_go_through_a_state_dict_of_another_number():
    made, other = segmenter(parts=3), PrototypeSegmenter([channels, shifted])
    with pytest.raises(ValueError, match=r"there are no prototypes\. Call `fit`"):
        other.predict(IMAGES)
    other.load_state_dict(made.state_dict())
    assert other.names == ["cat", "sky", "boat"]
    assert torch.equal(other(IMAGES), made(IMAGES))
    with pytest.raises(ValueError, match=r"got none for \['a'\]; `stuff` must be classes, got \['b'\]"):
        other.fit({"a": IMAGES}, {"a": IMAGES[:, 0] > 0}, {}, stuff=["b"])


# -- the digits model --------------------------------------------------------------------------------------------------


def text(*prompts):
    with torch.no_grad():
        return word_model()[1](words(*prompts)).last_hidden_state


def denoiser():
    return Denoiser(word_model()[0], scheduler("v_prediction"))


@cache
def support(digit):
    is_word = torch.tensor([[False] * 4 + [True] + [False] * 3])
    noise = drawn(6, 1, 8, 8, seed=digit)
    return sample_support(denoiser(), noise, text(prompt(digit)), text(""), is_word, 2.0, 8)


def test_a_support_is_guided_sampling_with_the_maps_of_the_word_alone():
    found = support(3)
    with torch.no_grad():
        wanted = denoiser().sample(drawn(6, 1, 8, 8, seed=3), text(prompt(3)), text(""), 2.0, 8)
    assert torch.equal(found.images, wanted)
    every = sample_support(
        denoiser(), drawn(6, 1, 8, 8, seed=3), text(prompt(3)), text(""), torch.ones(1, 8) > 0, 2.0, 8
    )
    torch.testing.assert_close(every.maps, torch.ones(6, 8, 8))  # attention sums to 1 over the prompt
    assert found.maps.shape == (6, 8, 8)
    assert 0 < float(found.maps.mean()) < 1
    masks = attention_masks(found.maps)
    assert bool(masks.foreground.flatten(1).any(1).all())
    assert not bool((masks.foreground & masks.background).any())
    x, y = training_digits()
    means = torch.stack([x[y == n].mean(0) for n in range(10)])
    assert int(((found.images - means[3]).square().mean((1, 2, 3)) < 0.5).sum()) >= 4


def test_prompts_of_other_lengths_are_no_pair():
    word = torch.tensor([[False, True, False]])
    with pytest.raises(ValueError, match=r"^sample_support: `null` must have the shape of `condition`"):
        sample_support(unet(), SAMPLE, PROMPT, OTHER[:, :2], word, 2.0, 3)


def test_words_are_chosen_by_places_that_are_true():
    for tokens, said in ((torch.tensor([[1]]), "torch.int64"), (torch.zeros(1, 3) > 0, "a row without one")):
        with pytest.raises(ValueError, match=rf"^sample_support: `tokens` must be bool, .* got {said}\. Write `ids =="):
            sample_support(unet(), SAMPLE, PROMPT, OTHER, tokens, 2.0, 3)


def test_features_of_a_denoiser_are_the_outputs_of_its_layers_at_one_level():
    extract = DenoiserFeatures(denoiser(), ["conv_in", "mid_block"], 100, text(""), draws=2)
    images = support(3).images
    found = extract(images)
    assert found.shape == (6, 8, 8, 32 + 64)
    assert torch.equal(extract(images), found)
    torch.testing.assert_close(extract(images[2:3]), found[2:3], atol=1e-5, rtol=1e-5)
    single = DenoiserFeatures(denoiser(), "mid_block", 100, text(""))(images)
    again = DenoiserFeatures(denoiser(), "mid_block", 100, text(""), seed=1)(images)
    assert single.shape[:3] == (6, 4, 4)
    assert not torch.equal(single, again)
    assert not [h for m in word_model()[0].modules() for h in m._forward_hooks]
    with pytest.raises(ValueError, match=r"^DenoiserFeatures: `layers` must match .* got 'mid'. Near it: 'mid_block"):
        DenoiserFeatures(denoiser(), "mid")
    with pytest.raises(ValueError, match=r"must be layers that make tensors, got \['down_blocks'\], which were not"):
        DenoiserFeatures(denoiser(), "down_blocks", 100, text(""))(images)
    with pytest.raises(ValueError, match=r"must be layers whose output has places, .* got one of \(6, 32\)"):
        DenoiserFeatures(denoiser(), "down_blocks.0.resnets.0.time_emb_proj", 100, text(""))(images)
    with pytest.raises(ValueError, match="`draws` must be at least 1"):
        DenoiserFeatures(denoiser(), "mid_block", draws=0)


class Segmenting(LightningModule):
    def __init__(self, made):
        super().__init__()
        self.segmenter, self.index = made, JaccardIndex("multiclass", num_classes=3)

    def validation_step(self, batch, batch_idx):
        self.index.update(self.segmenter.predict(batch[0]), batch[1])
        self.log("mIoU", self.index)


def fitted(digits=(0, 1), **options):
    made = PrototypeSegmenter(
        [DenoiserFeatures(denoiser(), ["up_blocks.0", "up_blocks.1"], 100, text(""))], **{"parts": 4, **options}
    )
    images = {str(digit): support(digit).images for digit in digits}
    made.fit(
        images,
        {name: value[:, 0] > 0 for name, value in images.items()},
        {name: value[:, 0] < -0.4 for name, value in images.items()},
    )
    return made


def test_real_digits_are_segmented_in_validation_better_than_without_a_background():
    x, y = training_digits()
    rows = torch.cat([(y == digit).nonzero()[:10, 0] for digit in (0, 1)])
    labels = torch.where(x[rows, 0] > 0, y[rows][:, None, None] + 1, 0)
    found = make_trainer().validate(Segmenting(fitted()), DataLoader(TensorDataset(x[rows], labels), batch_size=7))
    index = JaccardIndex("multiclass", num_classes=3)
    index.update(fitted(background_filter=-1.0).predict(x[rows]), labels)
    assert found[0]["mIoU"] > float(index.compute()) + 0.2
    assert found[0]["mIoU"] > 0.5
