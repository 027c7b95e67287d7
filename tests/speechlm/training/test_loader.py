"""What is read ahead is seen in order, once, and is nobody's position."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from speechlm.training.loader import Loader


class Numbers:
    """Counts; a batch takes a while to make."""

    def __init__(self, seconds: float = 0.0, last: int = 1000) -> None:
        self.place, self.seconds, self.last = 0, seconds, last

    def next(self) -> int:
        time.sleep(self.seconds)
        if self.place == self.last:
            raise LookupError("no more")
        self.place += 1
        return self.place

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_every_batch_once_and_the_position_is_the_trainers(ahead: int) -> None:
    with Loader(Numbers(), ahead) as loader:
        assert loader.state_dict() == {"place": 0}
        for number in range(1, 20):
            assert loader.next() == number
            assert loader.state_dict() == {"place": number}
        loader.load_state_dict({"place": 5})
        assert [loader.next() for _ in range(3)] == [6, 7, 8]
    assert not any(thread.name == "loader" for thread in threading.enumerate())


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_mistake_in_the_data_reaches_the_trainer(ahead: int) -> None:
    with Loader(Numbers(last=2), ahead) as loader:
        assert [loader.next(), loader.next()] == [1, 2]
        with pytest.raises(LookupError, match="no more"):
            loader.next()


def test_waiting_is_measured() -> None:
    shares = []
    for ahead in (0, 2):
        with Loader(Numbers(0.05), ahead) as loader:
            loader.next()
            loader.busy()
            for _ in range(4):
                loader.next()
                time.sleep(0.1)
            shares.append(loader.busy())
    alone, ahead_of_it = shares
    assert 0.3 < alone < 0.75 and alone + 0.1 < ahead_of_it <= 1
