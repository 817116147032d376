"""Settings of the whole suite."""

import os
from collections import Counter
from collections.abc import Iterator

# The models are tiny: a second thread costs more than it gives, above all on a busy machine. Before
# anything imports NumPy or torch, and for the commands that tests start: last bits depend on it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the hub

import pytest
from helpers import Call
from hypothesis import HealthCheck, settings
from in_browser import browser

__all__ = ["browser"]

settings.register_profile(
    "spiffy",
    max_examples=int(os.environ.get("SPIFFY_EXAMPLES", "100")),  # unless a test says how many
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # so is the machine, at times
)
settings.load_profile("spiffy")

#: Files that take longest, the longest first.
LONGEST = (
    *("test_tiny", "test_losslessness", "test_cli", "test_workdir", "test_families", "test_serve"),
    *("test_fuzz", "test_report", "test_ray", "test_device", "test_exact_law", "test_bench"),
    *("test_lm_eval", "test_fuzz_checkpoints", "test_acceptance", "test_grow", "test_trial"),
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist's, which would go by numbers of tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers the longest files begin first: none is waited for at the end."""
    if not hasattr(config, "workerinput"):
        return
    tests = Counter(item.path.stem for item in items)

    def place(item: pytest.Item) -> tuple[int, int, str]:
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), -tests[name], name

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is measured on this machine out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIFFY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _measured_briefly() -> Iterator[None]:
    """Time every number of drafts twice, not 20 times: seconds for each model and setting.

    What is chosen by it differs from run to run anyway.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spiffy.runtime.budget.timed._ROUNDS", 2)
        yield


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    return Call(capsys, monkeypatch)
