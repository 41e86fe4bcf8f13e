"""Decoders whose tokens see those after them."""

import copy

import pytest
import torch
from packaging.version import Version
from torch import nn

from lightning_reg.retrieval.bidirectional_attention import bidirectional_attention_

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
# Older releases take a full mask in place of the mark, but for layers that make a causal one of their own.
FOLLOWS = Version(transformers.__version__) >= Version("5.2")
HOSTS = {
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=2),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2),
}
TOKENS = torch.tensor([[1, 2, 3, 4, 5]])


def decoder(host="qwen2", attention="sdpa", of=None):
    of = transformers.AutoModel if of is None else of
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return of.from_config(HOSTS[host](), attn_implementation=attention).eval()


def hidden(model, tokens=TOKENS, mask=None):
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask)[0]


def sees(model, mask=None, tokens=TOKENS):
    """For each token whether it changes with each other one, as rows of 0 and 1."""
    plain, changes = hidden(model, tokens, mask), []
    for position in range(tokens.shape[1]):
        other = tokens.clone()
        other[0, position] = 40
        changes.append((hidden(model, other, mask) - plain)[0].abs().amax(1) > 1e-6)
    return torch.stack(changes, 1).int().tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("host", ["qwen2", "llama", "gpt2"])
def test_each_token_sees_all_of_them_also_after_it_was_saved(host, attention, tmp_path):
    model = decoder(host, attention)
    assert sees(model) == torch.ones(5, 5).tril().int().tolist()
    if host == "gpt2" and not FOLLOWS:
        pytest.skip("older releases of GPT-2 make a causal mask of their own; most are refused")
    bidirectional_attention_(model)
    assert not model.training
    assert sees(model) == [[1] * 5] * 5
    before = hidden(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert loaded.config.is_causal is False
    bidirectional_attention_(loaded)
    torch.testing.assert_close(hidden(loaded), before)
    torch.testing.assert_close(hidden(copy.deepcopy(model)), before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_seen_by_nobody(side, attention):
    model = decoder("qwen2", attention)
    bidirectional_attention_(model)
    pad, gone = torch.tensor([[0, 0]]), torch.zeros(1, 2, dtype=torch.long)
    parts = (pad, TOKENS) if side == "left" else (TOKENS, pad)
    masks = (gone, torch.ones_like(TOKENS)) if side == "left" else (torch.ones_like(TOKENS), gone)
    padded = hidden(model, torch.cat(parts, 1), torch.cat(masks, 1))
    own = padded[:, 2:] if side == "left" else padded[:, :5]
    torch.testing.assert_close(own, hidden(model), atol=1e-5, rtol=1e-4)  # rotary positions are relative


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sliding_window_reaches_ahead_as_far_as_back(attention):
    model = decoder("mistral", attention)
    model.layers = model.layers[:1]  # two layers reach twice as far
    model.config.num_hidden_layers = 1
    tokens = torch.arange(1, 8)[None]
    if not FOLLOWS:
        with pytest.raises(ValueError, match="MistralModel has a sliding window, which this release"):
            bidirectional_attention_(model)
        return
    bidirectional_attention_(model)
    near = (torch.arange(7)[:, None] - torch.arange(7)).abs() <= 2
    assert sees(model, None, tokens) == near.int().tolist()


def test_a_module_around_it_and_a_head_on_it_are_followed_and_nothing_else_changes():
    head = decoder(of=transformers.AutoModelForCausalLM)
    wrapper = nn.ModuleDict({"text": head, "other": nn.Linear(2, 2)})
    head.train()
    head.model.embed_tokens.weight.grad = torch.ones_like(head.model.embed_tokens.weight)
    weights = copy.deepcopy(head.state_dict())
    state = torch.get_rng_state()
    bidirectional_attention_(wrapper)
    assert torch.equal(torch.get_rng_state(), state)
    assert head.training
    assert head.model.training
    assert head.model.embed_tokens.weight.grad.eq(1).all()
    assert all(torch.equal(weights[name], value) for name, value in head.state_dict().items())
    assert sees(head.eval()) == [[1] * 5] * 5
    assert head.config.is_causal is False


class Old(nn.Module):
    """A release that makes the causal mask itself, but for one that is given whole."""

    def __init__(self, sliding_window=None, stubborn=False):
        super().__init__()
        self.config = transformers.Qwen2Config(**SMALL)
        self.config.sliding_window, self.config.use_sliding_window = sliding_window, True
        self.stubborn, self.attention = stubborn, nn.Identity()
        self.attention.is_causal = True
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)

    @property
    def base_model(self):
        return self

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, use_cache=True):
        x, count = self.embed(input_ids), input_ids.shape[1]
        mask = torch.full((count, count), -torch.inf).triu(1)
        if attention_mask is not None and attention_mask.dim() == 4 and not self.stubborn:
            mask = attention_mask[:, 0]
        elif attention_mask is not None and attention_mask.dim() == 2:
            mask = mask + torch.where(attention_mask[:, None] == 1, 0.0, -torch.inf)
        return ((x @ x.transpose(1, 2) / 4 + mask).softmax(2) @ x,)


def test_what_is_no_decoder_of_tokens_is_left_alone():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(image_size=8, patch_size=4, **size))
    with pytest.raises(ValueError, match="CLIPVisionModel holds no decoder"):
        bidirectional_attention_(vision)
    text = decoder()
    bidirectional_attention_(nn.ModuleList([vision, text]))
    assert sees(text) == [[1] * 5] * 5


def test_older_releases_get_a_full_mask():
    model = Old()
    assert sees(model) == torch.ones(5, 5).tril().int().tolist()
    bidirectional_attention_(model)
    bidirectional_attention_(model)
    assert len(model._forward_pre_hooks) == 1
    assert sees(model) == [[1] * 5] * 5
    padding = torch.tensor([[0, 1, 1, 1, 0]])
    inside = sees(model, padding)
    assert [row[1:4] for row in inside[1:4]] == [[1] * 3] * 3
    assert [row[0] + row[4] for row in inside[1:4]] == [0] * 3
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS, padding)[0], hidden(model, mask=padding))  # by position, too


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(2, 2), "Linear holds no decoder of transformers"),
        (Old(sliding_window=2), "Old has a sliding window, which this release"),
        (Old(stubborn=True), "tokens of Old see none after them even so"),
    ],
)
def test_refusals(model, said):
    with pytest.raises(ValueError, match=f"bidirectional_attention_: {said}"):
        bidirectional_attention_(model)
    assert not model._forward_pre_hooks


def test_an_encoder_and_decoder_are_refused():
    config = transformers.BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="BartModel has an encoder"):
        bidirectional_attention_(transformers.BartModel(config))
