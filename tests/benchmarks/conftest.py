"""Run benchmarks only where they are asked for, and print their tables at the end."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TABLES = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config, items):
    """Skip benchmarks unless this folder is named or ``--benchmark-only`` is given."""
    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if config.getoption("benchmark_only") or any(p.is_relative_to(HERE) for p in named):
        return
    skip = pytest.mark.skip(reason="a benchmark; run `pytest tests/benchmarks`")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter, config):
    for table in config.stash.get(TABLES, []):
        terminalreporter.write_line("")
        terminalreporter.write_line(table)


@pytest.fixture
def one_thread():
    """Keep torch to one thread, so that rates can be compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def report(pytestconfig):
    """Collect a text that stands at the end of the run."""
    return pytestconfig.stash.setdefault(TABLES, []).append
