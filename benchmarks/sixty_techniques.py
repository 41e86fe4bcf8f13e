"""How long the tests would take with sixty techniques: the laws and pairs of a small one, timed, times those to come.

    make test 2>&1 | tail -1      # how long they take today, in seconds
    python benchmarks/sixty_techniques.py 250

A technique to come costs its laws, those of its pairs with the references that are in the slice, its neutral setting
beside them, one pair of techniques, and tests of its own (`--own`, seconds). Fits are those of label smoothing
(`docs/tutorial.md`) in a case of its own: what its laws share (`once` in tests/conformance/harness.py) is made anew but
for the plain fits. A first round is not counted. Seconds are those of the processor, which others on the machine do not
take.
"""

import argparse
import gc
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.conformance.discovery import case_of, technique_classes
from tests.conformance.laws import LAWS, NEED_TWO_PROCESSES
from tests.conformance.pairs import check_pair, neutral_beside_references, pairs_with_references
from tests.conformance.recomputation import touches_layers
from tests.conformance.record import REFERENCE_PAIRS
from tests.quick import make_fits_quick
from tests.tutorial.test_label_smoothing import CASE

WORKERS, TARGET = 2, 60


def seconds_of(function, *arguments):
    """How long a call takes."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def costs_of_a_technique():
    """Seconds by what is done with a technique that no law has seen."""
    case = replace(CASE, make=partial(CASE.make), neutral=partial(CASE.neutral))
    pairs, techniques = pairs_with_references(case), list(technique_classes())
    left_out = {*NEED_TWO_PROCESSES, "order", *([] if touches_layers(case) else ["recomputation"])}
    costs = {law: seconds_of(LAWS[law], case) for law in LAWS if law not in left_out}
    share = min(REFERENCE_PAIRS / len(pairs), 1.0)
    costs[f"{REFERENCE_PAIRS} pairs with references"] = share * sum(seconds_of(check_pair, *pair) for pair in pairs)
    costs["neutral beside references"] = seconds_of(neutral_beside_references, case)
    costs["a pair of the slice"] = seconds_of(check_pair, case_of(techniques[0]), case_of(techniques[1]))
    return costs


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("today", type=float, help="seconds that `make test` takes today")
    parser.add_argument("--own", type=float, default=0.0, help="seconds of a technique's own tests, on one worker")
    parser.add_argument("--save", type=Path, help="file for what is printed")
    parser.add_argument("--ranks", type=float, default=0.5, help="seconds of the law on two processes, in a warm pool")
    options = parser.parse_args()
    techniques = list(technique_classes())
    make_fits_quick()
    costs_of_a_technique()
    gc.collect()
    gc.freeze()  # as tests/conftest.py does
    costs = costs_of_a_technique() | dict.fromkeys(NEED_TWO_PROCESSES, options.ranks)
    costs["its own tests"] = options.own
    each, more = sum(costs.values()), TARGET - len(techniques)
    table = Table("", "seconds", title=f"{more} small techniques more, {WORKERS} workers")
    for name, seconds in costs.items():
        table.add_row(name, f"{seconds:.2f}")
    table.add_section()
    table.add_row("one technique, one worker", f"{each:.1f}")
    table.add_row(f"{len(techniques)} techniques, as measured", f"{options.today:.0f}")
    table.add_row(f"{TARGET} techniques", f"{options.today + more * each / WORKERS:.0f}")
    console = Console(record=True, width=100)
    console.print(table)
    if options.save:
        options.save.write_text(console.export_text())


if __name__ == "__main__":
    main()
