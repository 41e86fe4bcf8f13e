"""A written report of failures: what was asked for, what was changed, pictures, and what the judges say."""

import base64
import struct
import zlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_reg.diffusion._service import Condition, Denoiser, spread
from lightning_reg.diffusion.sage._judged import Judge, JudgedSampler, check_search, frozen
from lightning_reg.diffusion.sage.core import LEAST_OF_TEST, is_failure, non_gaussian
from lightning_reg.engine.host.procedures import procedure
from lightning_reg.engine.host.written import write_atomically

__all__ = ["FailureReport", "failure_report"]

_STYLE = (
    "body{font-family:sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ccc}"
    "table{border-collapse:collapse}img{width:96px;image-rendering:pixelated}"
)


class FailureReport(NamedTuple):
    """Samples before and after a change of their noise or their prompt, a row for each.

    Args:
        labels: The class that was asked for, ``(B,)``.
        distance: How far the noise was moved, in the unit of its norm, ``(B,)``.
        before: Samples from where it started, ``(B, ...)``.
        after: Samples of what was found, ``(B, ...)``.
        scores: The probability that each judge gives to the class, before and after, ``(B, 2, M)``; the held-out
            judge's is the last.
        failed: Whether the sample after the change is a failure by the judges, bool ``(B,)``.
        confirmed: Whether the held-out judge does not see the class either, bool ``(B,)``; all ``False`` without one.
        odd: Whether the noise after the change fails a test of normality, see :func:`non_gaussian`, bool ``(B,)``.
        prompts: What was asked for, in words.
        changed: The same after the change.

    """

    labels: Tensor
    distance: Tensor
    before: Tensor
    after: Tensor
    scores: Tensor
    failed: Tensor
    confirmed: Tensor
    odd: Tensor
    prompts: Sequence[str]
    changed: Sequence[str]

    def rates(self) -> dict[str, float]:
        """The paper's rates: SSR(A), SSR(H) and NGR.

        Returns:
            SSR(A), the share of starts that fail by the judges; SSR(H), the share that the held-out judge confirms, who
            stands for the paper's people; NGR, the share of failures whose noise is not Gaussian (0 where nothing
            failed, left out where a sample has fewer than 20 numbers).

        """
        rates = {"SSR(A)": float(self.failed.double().mean()), "SSR(H)": float(self.confirmed.double().mean())}
        if self.after[0].numel() >= LEAST_OF_TEST:
            rates["NGR"] = int((self.failed & self.odd).sum()) / max(int(self.failed.sum()), 1)
        return rates

    def save(self, path: str | Path, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        """Writes it as one HTML file that holds its pictures, whole or not at all; failures come first.

        Args:
            path: Of the file.
            decode: Makes images ``(B, C, H, W)`` in [-1, 1] of samples, where these are latents. Samples of another
                shape have no pictures. All lie on the CPU.

        """
        page = self._page(decode).encode()

        def write(to: Path) -> None:
            to.write_bytes(page)

        write_atomically(path, write)

    def _page(self, decode: Callable[[Tensor], Tensor] | None) -> str:
        names = ", ".join(f"{name} {value:.2f}" for name, value in self.rates().items())
        judges = [f"judge {number + 1}" for number in range(self.scores.shape[2])]
        heads = ["asked for", "noise moved by", "before", "after", *judges, "result"]
        with torch.no_grad():
            shown = [decode(side) if decode else side for side in (self.before, self.after)]
        order = (self.failed.int() + self.confirmed.int()).argsort(descending=True, stable=True).tolist()
        lines = "\n".join(_line([*self._cells(row, shown)]) for row in order)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>Failures</title><style>{_STYLE}</style>\n'
            f"<h1>{int(self.failed.sum())} failures of {len(self.failed)} starts</h1>\n<p>{names}</p>\n"
            f"<table>\n{_line(heads, 'th')}\n{lines}\n</table></html>\n"
        )

    def _cells(self, row: int, shown: Sequence[Tensor]) -> list[str]:
        """The cells of a start, as HTML."""
        prompt, changed = escape(self.prompts[row]), escape(self.changed[row])
        moved = f"{float(self.distance[row]):.3f}" + (", not Gaussian" if bool(self.odd[row]) else "")
        pairs = self.scores[row].T.tolist()
        said = "failure" if bool(self.failed[row]) else "as asked for"
        return [
            prompt if prompt == changed else f"{prompt} → {changed}",
            moved,
            *(_picture(side[row]) if side.dim() == 4 else "" for side in shown),
            *(f"{one:.2f} → {two:.2f}" for one, two in pairs),
            said + (", confirmed" if bool(self.confirmed[row]) else ""),
        ]


@procedure
def failure_report(
    module: Denoiser,
    start: Tensor,
    noise: Tensor,
    condition: Condition,
    labels: Tensor,
    judges: Sequence[Judge],
    null: Condition = None,
    scale: float = 1.0,
    sampler_steps: int = 20,
    threshold: float = 0.5,
    held_out: Judge | None = None,
    prompts: Sequence[str] | None = None,
    condition_after: Condition = None,
    prompts_after: Sequence[str] | None = None,
) -> FailureReport:
    """Samples before and after a search, and gathers what the judges say of both.

    For :func:`latent_search` the noise is what it found; for :func:`token_search` and :func:`prompt_search` the noise
    stays (hand ``start`` over twice), and ``condition_after`` is what they found.

    Source:
        Liu et al., "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial Search", ICLR 2024,
        arXiv 2306.00974.

    Differs:
        The paper's SSR(H) asks people, here a held-out judge; its test of normality was not read.

    Args:
        module: The denoiser.
        start: Noise where the search began, ``(B, ...)``.
        noise: Noise that it found, of its shape.
        condition: A row for each.
        labels: The class that each is to show, ``(B,)``.
        judges: As for :func:`latent_search`.
        null: What stands for no condition.
        scale: Of the guidance.
        sampler_steps: At least 1.
        threshold: Of the judges' probability, in [0, 1].
        held_out: A judge that took no part in the search.
        prompts: What each was asked for, in words; ``None``: the number of its class.
        condition_after: A row for each, where the search has changed the condition.
        prompts_after: The words of these.

    Returns:
        The report; :meth:`FailureReport.save` writes it.

    Raises:
        ValueError: If an argument is outside its range.

    """
    check_search("failure_report", judges, {"sampler_steps": sampler_steps}, {}, threshold)
    module.eval()
    count, sampler = len(start), JudgedSampler(module, judges, null, scale, sampler_steps)
    named = [f"class {label}" for label in labels.expand(count).tolist()] if prompts is None else list(prompts)
    changed = named if prompts_after is None else list(prompts_after)
    if not len(named) == len(changed) == count:
        argument, given = ("prompts", named) if len(named) != count else ("prompts_after", changed)
        raise ValueError(f"failure_report: `{argument}` must be {count} texts, one for each row, got {len(given)}.")
    wanted, conditions = labels.expand(count), (condition, condition if condition_after is None else condition_after)
    everyone = [*judges, *([held_out] if held_out else [])]
    with torch.no_grad(), frozen(everyone):
        sides = [sampler.samples(z, spread(c, count)) for z, c in zip((start, noise), conditions, strict=True)]
        said = [[judge(side).float() for judge in everyone] for side in sides]
    own = [torch.stack([one.softmax(1).gather(1, wanted[:, None])[:, 0] for one in logits], 1) for logits in said]
    failed = is_failure(said[1][: len(judges)], wanted, threshold)
    seen = said[1][-1].argmax(1) if held_out else wanted
    moved = (noise - start).flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1)
    odd = non_gaussian(noise) if noise[0].numel() >= LEAST_OF_TEST else torch.zeros(count, dtype=torch.bool)
    return FailureReport(
        wanted.cpu(),
        moved.cpu(),
        sides[0].cpu(),
        sides[1].cpu(),
        torch.stack(own, 1).cpu(),
        failed.cpu(),
        (failed & (seen != wanted)).cpu(),
        odd.cpu(),
        named,
        changed,
    )


def _line(cells: Sequence[str], kind: str = "td") -> str:
    return "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in cells) + "</tr>"


def _picture(image: Tensor) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(_png(image)).decode()}">'


def _png(image: Tensor) -> bytes:
    """An image ``(C, H, W)`` in [-1, 1] as a PNG: grey, or of three channels colours."""
    channels = 3 if image.shape[0] == 3 else 1
    rows = ((image[:channels].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, 2)
    lines = b"".join(b"\0" + bytes(line.flatten().tolist()) for line in rows)
    head = struct.pack(">IIBBBBB", image.shape[2], image.shape[1], 8, 2 if channels == 3 else 0, 0, 0, 0)
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return made
