"""Processes that are killed in the middle of what they do."""

import os
import signal
import time
import warnings
from collections.abc import Callable

import numpy as np


def die_at_random_moments(
    work: Callable[[], object], within: float, look: Callable[[], None], *, times: int = 20
) -> None:
    """Fork a child that does the `work`, kill it within so many seconds, `look`; and again."""
    rng = np.random.default_rng(0)
    for _ in range(times):
        with warnings.catch_warnings():
            # Python 3.12 and later warn of locks that other threads may hold; the child takes none.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            # In the child: nothing of the test may run on, whatever happens.
            try:
                work()
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.0, within))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        look()
