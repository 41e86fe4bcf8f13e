"""Changes the package in small ways, one at a time, and looks whether the tests notice: ``make mutants``.

Which changes: a sample that the seed chooses by the changed text, so that it stays where other code changes. Which
tests: those that run the changed line, by a map that one run of all tests under coverage makes and ``.mutants`` keeps
until the package changes. Those beside the changed file and the laws of its class come first, then the fastest, up to
``--seconds``. Of tests that are new since the map those run that are near, or in ``tests`` itself. A change is tried in
a copy of the tree. The result is saved after each: a run that was stopped goes on where it was, and one that is
repeated tries again what no test noticed. ``verdict`` and ``why`` in the result are written by hand: "equivalent"
(nothing that runs differs), "message" (only words differ) or "hole".

    python .ci/mutants.py --seed 0 --count 150

Why not a tool: mutmut 3 maps functions to tests, not lines, and puts a switch in place of each function, which the
engine sees, for it reads signatures and overrides; cosmic-ray runs one command for every mutant; pytest-gremlins has
five operators, none of which removes a statement or an argument. None draws a sample by a seed (mutmut 3.8.1,
cosmic-ray 8.7.0, pytest-gremlins 1.12.2).
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from hashlib import sha256
from importlib.util import cache_from_source
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tests/conftest.py has it, before torch reads it

import coverage
import lightning.pytorch  # before the fork, so that not each mutant waits for it
import pytest
import torch
from mutations import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
CACHE = ROOT / ".mutants"
# The ids of these tests follow the package's content.
UNSTABLE = "tests/conformance/test_pairs.py::test_two_techniques"
# Plugins of pytest that libraries have brought along before it asked.
IMPORTED = "-Wignore::pytest.PytestAssertRewriteWarning"


class Seconds:
    """Notes for how long each test runs, and which does not pass."""

    def __init__(self):
        self.seconds, self.failed = {}, set()

    def pytest_runtest_logreport(self, report):
        """A hook of pytest, called for each of a test's phases."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed or (report.when == "call" and not report.passed):
            self.failed.add(report.nodeid)


def content() -> str:
    """A digest of the package's sources, whose lines the map names."""
    files = sorted((ROOT / "lightning_reg").rglob("*.py"))
    return sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def make_map() -> None:
    """Runs all tests under coverage, which notes for each line the tests that run it."""
    CACHE.mkdir(exist_ok=True)
    os.environ["COVERAGE_FILE"] = str(CACHE / "coverage")
    noted = Seconds()
    cover = ["--cov", "--cov-context=test", "--cov-report="]
    pytest.main(["-q", "-n2", "--dist=worksteal", IMPORTED, *cover], plugins=[noted])
    seconds = {test: round(took, 3) for test, took in noted.seconds.items()}
    told = {"content": content(), "seconds": seconds, "failed": sorted(noted.failed)}
    (CACHE / "tests.json").write_text(json.dumps(told))


class Map:
    """Which tests run a line, and how long each takes."""

    def __init__(self):
        told = json.loads((CACHE / "tests.json").read_text())
        self.seconds, self.failed = told["seconds"], set(told["failed"])
        self._data = coverage.CoverageData(str(CACHE / "coverage"))
        self._data.read()
        self._files = {re.sub(r".*/(?=lightning_reg/)", "", file): file for file in self._data.measured_files()}

    def is_of_use(self, test: str) -> bool:
        """Whether a failure of it tells of a change."""
        return test in self.seconds and test not in self.failed and not test.startswith(UNSTABLE)

    def tests(self, mutant: Mutant) -> list[str]:
        """Of the first place that a test runs; where none does (a module's constant), of the whole file."""
        lines = self._data.contexts_by_lineno(self._files[mutant.file]) if mutant.file in self._files else {}
        found = {place: {c.split("|")[0] for line in place for c in lines.get(line, ())} for place in mutant.lines}
        chosen = next((tests for tests in found.values() if tests - {""}), None)
        chosen = chosen or {c.split("|")[0] for contexts in lines.values() for c in contexts}
        known = [test for test in chosen if self.is_of_use(test)]
        return sorted(known, key=lambda test: (not is_near(test, mutant), self.seconds[test], test))


def is_near(test: str, mutant: Mutant) -> bool:
    """Whether a test is beside the changed file, or of a law for a class in its folder."""
    texts = [file.read_text() for file in (ROOT / mutant.file).parent.glob("*.py")]
    classes = [name for text in texts for name in re.findall(r"^class ([A-Z]\w+)", text, re.M)]
    beside = "/".join(["tests", *mutant.file.split("/")[1:2]])
    return test.startswith(beside) or any(f"[{name}-" in test for name in classes)


def within(tests: list[str], seconds: dict[str, float], limit: float) -> list[str]:
    """The first of the tests that take no longer than ``limit`` together."""
    spent, chosen = 0.0, []
    for test in tests:
        spent += seconds[test]
        if spent <= limit or not chosen:
            chosen.append(test)
    return chosen


def pytest_in(tree: Path, log: Path, arguments: list[str]) -> int:
    """Runs pytest in this process, which it leads from now on, on the package in ``tree``."""
    os.setsid()
    os.chdir(tree)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ["PYTHONPATH"] = str(tree)  # for the processes that tests start
    sys.path.insert(0, str(tree))
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", IMPORTED, *arguments]))


def run(tree: Path, arguments: list[str], limit: float) -> tuple[int | None, str]:
    """Pytest's exit code in a process of its own, None where it took longer than ``limit``; and what it printed."""
    log = tree / ".mutants.log"
    child = os.fork()
    if not child:
        code = 3  # pytest's own for an error within
        try:
            code = pytest_in(tree, log, arguments)
        finally:
            os._exit(code)
    until, status = time.monotonic() + limit, None
    try:
        while status is None and time.monotonic() < until:
            done, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if done else time.sleep(0.05)
    finally:  # after a Ctrl-C as well, which it does not get
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # itself, or what it left running
    if status is None:
        os.waitpid(child, 0)
    return status, log.read_text(errors="replace")


def new_tests(tree: Path, known: dict[str, float]) -> list[str]:
    """Those that were written since the map was made."""
    _, text = run(tree, ["--collect-only"], 600)
    new = [t for t in re.findall(r"^\S+\.py::.+$", text, re.M) if t not in known and not t.startswith(UNSTABLE)]
    code, text = run(tree, new, 600) if new else (0, "")
    if code:
        raise SystemExit(f"A test fails without any change:\n{text[-1000:]}")
    return new


def try_one(tree: Path, mutant: Mutant, tests: list[str]) -> tuple[str, str]:
    """Whether a test notices the change ("caught", "hangs", "survived"), and which."""
    file = tree / mutant.file
    source, compiled = file.read_bytes(), Path(cache_from_source(str(file)))
    try:
        compiled.unlink(missing_ok=True)  # which knows a change by second and length alone
        file.write_bytes(mutant.apply(source))
        while tests:
            (tree / ".mutants.txt").write_text("\n".join(tests))
            code, text = run(tree, ["-x", "@.mutants.txt"], 300)
            gone = set(re.findall(r"^ERROR: not found: \S*?/((?:tests|lightning_reg)/.*)$", text, re.M))
            if code != 4 or not gone.intersection(tests):
                break
            tests = [test for test in tests if test not in gone]  # named by what the change changed
    finally:
        file.write_bytes(source)
        compiled.unlink(missing_ok=True)
    if not tests or code in (0, 5):
        return "survived", ""
    if code == 3:
        raise RuntimeError(f"pytest broke down: {text[-1000:]}")
    by = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", text, re.M)
    return ("hangs" if code is None else "caught"), by[1] if by else text[-200:]


def copy_tree(to: Path) -> Path:
    """Copies what git does not ignore."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, to / name)
    return to


def summary(entries: list[dict]) -> str:
    """How many were caught, of those that are not judged to change nothing or a message."""
    judged = [entry for entry in entries if entry.get("verdict") not in ("equivalent", "message")]
    caught = sum(entry["result"] != "survived" for entry in judged)
    return f"{caught} of {len(judged)} are caught; {len(entries) - len(judged)} others change nothing or a message"


def save(known: dict[str, dict], chosen: list[Mutant], options: argparse.Namespace) -> list[dict]:
    """Writes the result, and returns what it holds of the sample."""
    entries = [known[mutant.key] for mutant in chosen if mutant.key in known]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
    about = {"seed": options.seed, "count": options.count, **versions, "summary": summary(entries)}
    written = CACHE / "result.json"  # a run may be stopped at any time
    written.write_text(json.dumps({**about, "mutants": entries}, indent=1) + "\n")
    written.replace(RESULT)
    return entries


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for one change")
    options = parser.parse_args()
    kept = CACHE / "tests.json"
    if not kept.exists() or json.loads(kept.read_text())["content"] != content():
        make = os.fork()  # pytest imports the package, which no mutant may find imported
        if not make:
            make_map()
            os._exit(0)
        os.waitpid(make, 0)
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "lightning_reg").rglob("*.py"))
    every = [mutant for file in files for mutant in mutants(file, (ROOT / file).read_bytes())]
    chosen = sorted(every, key=lambda m: sha256(f"{options.seed} {m.key}".encode()).digest())[: options.count]
    known = {entry["key"]: entry for entry in json.loads(RESULT.read_text())["mutants"]} if RESULT.exists() else {}
    lines = Map()
    with tempfile.TemporaryDirectory() as name:
        tree = copy_tree(Path(name))
        new = new_tests(tree, lines.seconds)
        for number, mutant in enumerate(chosen):
            old = known.get(mutant.key, {})
            if old.get("result") in ("caught", "hangs") or old.get("verdict") in ("equivalent", "message"):
                continue
            tests = lines.tests(mutant)
            near = [test for test in new if is_near(test, mutant) or test.count("/") == 1]
            some = [*near, *within(tests, lines.seconds, options.seconds)]
            started = time.monotonic()
            result, by = try_one(tree, mutant, some)
            what = {name: getattr(mutant, name) for name in ("key", "file", "function", "kind", "before", "after")}
            line = (ROOT / mutant.file).read_bytes().count(b"\n", 0, mutant.start) + 1
            seen = {"line": line, "result": result, "by": by, "tests": f"{len(some)} of {len(tests) + len(near)}"}
            known[mutant.key] = {**what, **seen, **{k: old[k] for k in ("verdict", "why") if k in old}}
            took = time.monotonic() - started
            print(f"{number + 1} {result} {mutant.file}:{line} {mutant.kind} {took:.0f} s, {by[:80]}", flush=True)
            save(known, chosen, options)
    print(summary(save(known, chosen, options)))


if __name__ == "__main__":
    main()
