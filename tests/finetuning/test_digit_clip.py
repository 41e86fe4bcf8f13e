"""The small CLIP of the tests: one set of weights for two libraries."""

import torch

from tests.finetuning.digit_clip import (
    DIGITS,
    FILE,
    TEMPLATES,
    few_shots,
    hugging_face,
    open_clip,
    shifted,
    tokens,
    unseen,
)


@torch.no_grad()
def test_libraries_agree_and_it_knows_digits_by_their_names():
    images, labels = unseen()
    texts = tokens(*(TEMPLATES[0].format(name) for name in DIGITS))
    theirs, own = hugging_face()(texts, images), open_clip()
    image, text, scale = own(images, texts)
    torch.testing.assert_close(image, theirs.image_embeds, atol=1e-5, rtol=0)  # other kernels of attention
    torch.testing.assert_close(text, theirs.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(scale * image @ text.T, theirs.logits_per_image, atol=1e-3, rtol=0)  # scale about 14
    torch.testing.assert_close(open_clip(custom_text=True)(images, texts)[1], text, atol=1e-6, rtol=0)
    assert (theirs.logits_per_image.argmax(1) == labels).float().mean() > 0.9
    elsewhere = scale * open_clip()(shifted(images), texts)[0] @ text.T
    assert 0.6 < (elsewhere.argmax(1) == labels).float().mean() < 0.9
    assert FILE.stat().st_size < 2**20


def test_few_shots_are_of_the_classes():
    _, labels = unseen()
    rows = few_shots(labels, 3, [1, 4], seed=0)
    assert labels[rows].tolist() == [1, 1, 1, 4, 4, 4]
    assert not torch.equal(rows, few_shots(labels, 3, [1, 4], seed=1))
