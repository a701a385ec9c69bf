"""One torch thread for all tests: on shared cores a second one is slower by up to ten times."""

import gc

import pytest

from tests.fast_part import (  # noqa: F401
    hand_on_costs,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    tell_costs,
)


def pytest_configure(config: pytest.Config) -> None:
    tell_costs(config)
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # what hands tests out to others needs none of what they import
    from tests import prepared  # noqa: F401

    gc.disable()  # nothing of what is imported now is ever given back


def pytest_collection_finish(session: pytest.Session) -> None:
    """No two workers would name such a test alike, and neither runs one.

    Half a million objects of what was imported stay to the end: no collection needs to look through them again.
    """
    if unlike := [item.nodeid for item in session.items if " at 0x" in item.nodeid]:
        raise pytest.UsageError("an object's address is in a test's name: " + ", ".join(unlike))
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Else libraries that count their objects find them at the end of the process, and say so."""
    gc.unfreeze()
    hand_on_costs(session.config)
