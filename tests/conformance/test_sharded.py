"""Each phase under ``fully_shard``: it trains as under DDP, or is refused by name; a page says which."""

import re
from functools import partial
from pathlib import Path

import pytest

from lightning_reg.engine.run.phases import phases_of
from tests.conformance.harness import difference
from tests.conformance.references import REFERENCES
from tests.conformance.sharded import on_ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "distributed.md"
SAID = dict(re.findall(r"^\| `(\w+)` \| (\w+)", PAGE.read_text(), re.MULTILINE))


def phase_of(case):
    (phase,) = {*(phases_of(case.cls) or ("periods",))} - {"step_term"} or {"step_term"}
    return phase


def test_the_page_has_every_phase_that_is_tried():
    assert SAID.keys() == {phase_of(case) for case in REFERENCES}


@pytest.mark.usefixtures("sharded_means")
@pytest.mark.parametrize("case", REFERENCES, ids=lambda case: case.cls.__name__)
def test_a_phase_works_or_is_refused_as_the_page_says(case, two_processes):
    name, said = case.cls.__name__, SAID[phase_of(case)]
    split = two_processes.run(partial(on_ranks, sharded=True), name)
    if said == "refused":
        assert [answer.startswith(name) and answer.endswith("Use DDP.") for answer in split] == [True, True]
        return
    assert said == "works"
    copied, plain = (two_processes.run(partial(on_ranks, sharded=False), one) for one in (name, ""))
    for answer, wanted in zip(split, copied, strict=True):
        assert not difference(answer, wanted, rtol=1e-4, atol=1e-5)  # float32, sums in another order
    assert difference(copied[0], plain[0], rtol=1e-3, atol=1e-4), "the technique changes nothing"
