"""Searches for a token and for words, by gradients through the sampler."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_reg.diffusion._service import Condition, Denoiser, spread
from lightning_reg.diffusion.sage._judged import Judge, JudgedSampler, check_search, frozen
from lightning_reg.diffusion.sage.core import ensemble_prob
from lightning_reg.engine.host.procedures import left_as_found, out_of_inference

__all__ = ["PromptResult", "TokenResult", "append_token", "prompt_search", "token_search"]


class TokenResult(NamedTuple):
    """A token that turns prompts into something else.

    Args:
        token: ``(d,)``.
        history: The mean probability of the wanted class at each step, ``(iterations + 1,)``.
        hits: Which prompts show the wanted class to all judges in the end, bool ``(B,)``.

    """

    token: Tensor
    history: Tensor
    hits: Tensor


class PromptResult(NamedTuple):
    """Prompts at which the model fails most.

    Args:
        ids: The best ones first, ``(beam, L)``.
        values: Their mean probability of the class that was asked for, ``(beam,)``.
        tried: How many prompts were sampled from.

    """

    ids: Tensor
    values: Tensor
    tried: int


def append_token(condition: Condition, token: Tensor) -> Condition:
    """Prompts with one more token vector at their end.

    Args:
        condition: Token vectors ``(B, l, d)``, or a mapping with ``"encoder_hidden_states"``.
        token: ``(d,)``.

    Returns:
        ``(B, l + 1, d)``, or the mapping with them.

    Raises:
        ValueError: If there are no token vectors.

    """
    if isinstance(condition, Mapping) and "encoder_hidden_states" in condition:
        longer = append_token(condition["encoder_hidden_states"], token)
        return {**condition, "encoder_hidden_states": longer} if isinstance(longer, Tensor) else condition
    if not isinstance(condition, Tensor) or condition.dim() != 3:
        raise ValueError("append_token: `condition` must be token vectors (B, l, d); write `append` for another kind.")
    return torch.cat([condition, token.to(condition).expand(len(condition), 1, -1)], 1)


def token_search(
    module: Denoiser,
    noise: Tensor,
    condition: Condition,
    target: int,
    judges: Sequence[Judge],
    init: Tensor | None = None,
    append: Callable[[Condition, Tensor], Condition] = append_token,
    null: Condition = None,
    scale: float = 1.0,
    sampler_steps: int = 20,
    iterations: int = 50,
    lr: float = 0.05,
) -> TokenResult:
    r"""Searches one token vector that, put to every prompt, makes the model show another class.

    Adam raises the mean of :math:`\log q_{target}` over all prompts and noises at once, through the sampler. The vector
    need not be that of a word.

    Source:
        Liu et al., "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial Search", ICLR 2024,
        arXiv 2306.00974.

    Differs:
        A reconstruction: the paper's optimizer and rates were not read. Without ``append`` the token stands behind the
        text encoder; an ``append`` that runs the encoder has it in front.

    Args:
        module: The denoiser.
        noise: Where samples start, ``(B, ...)``.
        condition: A prompt for each.
        target: The class that is to be shown.
        judges: As for :func:`latent_search`.
        init: The first vector ``(d,)``; ``None``: the mean of the prompts' token vectors.
        append: Makes conditions of the prompts and the vector.
        null: What stands for no condition.
        scale: Of the guidance.
        sampler_steps: At least 1.
        iterations: Steps of Adam, at least 1.
        lr: Of Adam, above 0.

    Returns:
        The vector, and how well it works.

    Raises:
        ValueError: If an argument is outside its range, or there are no vectors to begin with.

    """
    check_search("token_search", judges, {"sampler_steps": sampler_steps, "iterations": iterations}, {"lr": lr})
    rows = condition.get("encoder_hidden_states") if isinstance(condition, Mapping) else condition
    if init is None and (rows is None or rows.dim() != 3):
        raise ValueError("token_search: `init` must be a vector where the condition holds no token vectors (B, l, d).")
    with left_as_found(module), frozen(judges):
        module.eval()
        noise, condition, null, rows, init = out_of_inference((noise, condition, null, rows, init))
        sampler = JudgedSampler(module, judges, null, scale, sampler_steps)
        first = rows.mean((0, 1)) if init is None and rows is not None else init
        token = torch.as_tensor(first).detach().float().clone().requires_grad_()
        optimizer, history = torch.optim.Adam([token], lr=lr), []
        labels = torch.full((len(noise),), target, device=noise.device)

        def shown(*, through: bool) -> list[Tensor]:
            longer = append(spread(condition, len(noise)), token)
            return sampler.logits(sampler.samples(noise, longer, through=through))

        for _ in range(iterations):
            q = ensemble_prob(shown(through=True), labels)
            history.append(q.detach().mean())
            (token.grad,) = torch.autograd.grad(-q.clamp(min=1e-30).log().mean(), token)
            optimizer.step()
        with torch.no_grad():
            logits = shown(through=False)
        history.append(ensemble_prob(logits, labels).mean())
        hits = torch.stack([one.argmax(1) == target for one in logits]).all(0)
    return TokenResult(token.detach(), torch.stack(history), hits)


def prompt_search(
    module: Denoiser,
    noise: Tensor,
    ids: Tensor,
    slots: Sequence[int],
    label: int,
    judges: Sequence[Judge],
    encode: Callable[[Tensor], Condition],
    embedding: Tensor,
    candidates: Sequence[int] | Callable[[Tensor, int], Sequence[int]],
    null: Condition = None,
    scale: float = 1.0,
    sampler_steps: int = 20,
    top_k: int = 16,
    beam: int = 4,
) -> PromptResult:
    r"""Searches words at which the model no longer shows what the prompt asks for.

    One slot after the other: candidates w are ordered by :math:`\langle \nabla_e q, E(w) - E(w_0) \rangle`, the
    promising ones are sampled from, the best prompts stay.

    Source:
        Liu et al., "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial Search", ICLR 2024,
        arXiv 2306.00974.

    Differs:
        A reconstruction: the paper lets a language model propose words and weighs them by gradient; here ``candidates``
        proposes, a list or a function of the prompt, and the weights are a first-order estimate.

    Args:
        module: The denoiser.
        noise: Where samples of each prompt start, ``(B, ...)``.
        ids: The first prompt, ``(L,)``.
        slots: Positions whose word may change, in turn.
        label: The class that the prompt asks for.
        judges: As for :func:`latent_search`.
        encode: Conditions of embedded prompts ``(n, L, d)``, a row for each.
        embedding: Vectors of all words, ``(V, d)``.
        candidates: Words that may stand in a slot, or a function of the prompt and the slot.
        null: What stands for no condition.
        scale: Of the guidance.
        sampler_steps: At least 1.
        top_k: Words that are tried for each prompt and slot, at least 1.
        beam: Prompts that are kept, at least 1.

    Returns:
        The prompts found, the first one among the candidates too.

    Raises:
        ValueError: If an argument is outside its range, or conditions do not depend on the vectors of words.

    """
    check_search("prompt_search", judges, {"sampler_steps": sampler_steps, "top_k": top_k, "beam": beam}, {})
    if not all(0 <= slot < len(ids) for slot in slots):
        raise ValueError(
            f"prompt_search: `slots` must be positions in a prompt of {len(ids)} tokens, from 0, got {list(slots)}."
        )

    def probability(embedded: Tensor, *, through: bool = False) -> Tensor:
        made = sampler.samples(noise, spread(encode(embedded[None]), len(noise)), through=through)
        return ensemble_prob(sampler.logits(made), labels).mean()

    with left_as_found(module), frozen(judges):
        module.eval()
        noise, null, vectors = out_of_inference((noise, null, embedding.detach().float()))
        labels = torch.full((len(noise),), label, device=noise.device)
        sampler = JudgedSampler(module, judges, null, scale, sampler_steps)
        with torch.no_grad():
            known = {tuple(ids.tolist()): float(probability(vectors[ids]))}
        for slot in slots:
            for words in sorted(known, key=known.__getitem__)[:beam]:
                prompt = torch.tensor(words, device=ids.device)
                embedded = vectors[prompt].requires_grad_()
                gradient = _gradient(probability(embedded, through=True), embedded)
                offered = candidates(prompt, slot) if callable(candidates) else candidates
                choice = torch.as_tensor(list(offered), device=ids.device)
                order = ((vectors[choice] - vectors[prompt[slot]]) @ gradient[slot]).argsort()[:top_k]
                with torch.no_grad():
                    for word in choice[order].tolist():
                        other = (*words[:slot], word, *words[slot + 1 :])
                        if other not in known:
                            known[other] = float(probability(vectors[list(other)]))
    best = sorted(known, key=known.__getitem__)[:beam]
    return PromptResult(torch.tensor(best), torch.tensor([known[words] for words in best]), len(known))


def _gradient(value: Tensor, embedded: Tensor) -> Tensor:
    gradient = torch.autograd.grad(value, embedded, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise ValueError(
            "prompt_search: `encode` must give conditions that depend on the vectors of words, so that there is a"
            " gradient; labels, and an encoder that runs under `torch.no_grad`, give none."
        )
    return gradient
