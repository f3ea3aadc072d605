"""The script that counts how far a request is followed."""

from pathlib import Path

import pytest
from support.walks import Code, Stop, figures_of, walk

SOURCES = {
    "stage.py": """
from emloc_core.files import Checkpoint, other, size
def prepare(request: Request) -> Job:
    return Job(request)
class Job:
    def __init__(self, request: Request) -> None:
        self.base = Checkpoint(request.model)
        size(self.base)
        other(3)
        self._check()
    def _check(self) -> None:
        self.base.tensors
    def run(self) -> None:
        size(self.base)
""",
    "files.py": """
class Checkpoint:
    def __init__(self, directory: str) -> None:
        self.directory = directory
    @property
    def tensors(self) -> list[str]:
        return []
def size(model: Checkpoint) -> int:
    return 0
def other(number: int) -> int:
    return number
""",
}


@pytest.fixture
def stops(tmp_path: Path) -> list[Stop]:
    """The stops in a core of two modules."""
    (tmp_path / "emloc_core").mkdir()
    for name, source in SOURCES.items():
        (tmp_path / "emloc_core" / name).write_text(source)
    return walk(Code(tmp_path), Stop("stage", "", "prepare"))


def test_a_walk_follows_the_request_and_the_model_alone(stops: list[Stop]) -> None:
    names = [".".join(filter(None, (stop.owner, stop.name))) for stop in stops]
    expected = ["prepare", "Job.__init__", "Checkpoint.__init__", "size", "Job._check", "Checkpoint.tensors"]
    assert names == expected


def test_coming_back_up_is_a_climb(stops: list[Stop]) -> None:
    assert figures_of(stops, {"stage": 1, "files": 0}) == {"stops": 6, "modules": 2, "rooms": 2, "climbs": 1}
