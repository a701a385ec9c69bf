"""What `make test-fast` runs, by a rule, and what that costs: told at the end of the run.

Of each test function the first case, where it isn't slow or thorough; but for what `fast_part.txt` says: "-" before a
function that takes too long for that, "+" before a case that is run all the same, as lines of the package are come by
in no other. `python -m benchmarks.mutation.fast_part` writes it. A new test needs no line there unless it is told to.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_suffix(".txt")
MOST_S = 0.5  # of CPU time, that a test without a line of its own may take
BUDGET_S = 160.0  # of CPU time, that all take with the start of two workers: under 90 s on 2 cores

_BEGUN, _NAME = pytest.StashKey[float](), "cpu_s"


def cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    return sum(os.times()[:4])


def listed(text: str) -> tuple[set[str], set[str]]:
    """The functions that are left out, and the cases that are run."""
    rows = [line.partition(" ") for line in text.splitlines() if line[:1] in ("-", "+")]
    return tuple({name for kind, _, name in rows if kind == sign} for sign in "-+")  # type: ignore[return-value]


def function_of(test: str) -> str:
    return test.partition("[")[0]


def chosen(tests: Iterable[str], left_out: set[str], kept: set[str]) -> Iterator[str]:
    """Those that belong to it, of tests that are neither slow nor thorough, in order."""
    begun: set[str] = set()
    for test in tests:
        function = function_of(test)
        if test in kept or (function not in begun and function not in left_out):
            yield test
        begun.add(function)


def told(tests: Mapping[str, float], total: float, kept: set[str]) -> Iterator[str]:
    """What the run took, and which tests take more than one may that is in it by the rule alone."""
    own = sum(tests.values())
    yield f"the fast part took {total:.0f} s of CPU time, of {BUDGET_S:.0f}: {own:.0f} of them its tests"
    for test, seconds in sorted(tests.items(), key=lambda row: -row[1]):
        if seconds > MOST_S and test not in kept:
            yield f"{seconds:.1f} s of CPU time, more than {MOST_S}: {test}. Make it cheaper, or list it in {LIST.name}"


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    quick = {i.nodeid: i for i in items if not any(map(i.get_closest_marker, ("slow", "thorough")))}
    for test in chosen(quick, *listed(LIST.read_text(encoding="utf-8"))):
        quick[test].add_marker(pytest.mark.fast)


def tell_costs(config: pytest.Config) -> None:
    """At the end of a run of the fast part."""
    if config.option.markexpr == "fast" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Costs())


def hand_on_costs(config: pytest.Config) -> None:
    """A worker's, to the process that prints."""
    if hasattr(config, "workeroutput"):
        config.workeroutput[_NAME] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[_BEGUN] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown":
        report.user_properties.append((_NAME, cpu_seconds() - item.stash[_BEGUN]))
    return report


class Costs:
    """In the process that prints: what tests and workers took."""

    def __init__(self) -> None:
        self.tests: dict[str, float] = {}
        self.workers = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests.update((report.nodeid, float(str(v))) for name, v in report.user_properties if name == _NAME)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.workers += getattr(node, "workeroutput", {}).get(_NAME, 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        own = sum(os.times()[:2])  # without its children, who are the workers
        for line in told(self.tests, own + self.workers, listed(LIST.read_text(encoding="utf-8"))[1]):
            terminalreporter.write_line(line)
