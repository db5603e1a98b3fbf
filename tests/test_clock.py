import subprocess
import sys
import time

import numpy as np
import pytest

from liqlab import clock


def test_now_is_wall_time_in_ms():
    before = time.time()
    now = clock.now_ms()
    after = time.time()
    assert isinstance(now, int)
    assert before * 1000 - 1 <= now <= after * 1000


def test_elapsed_measures_seconds():
    start = clock.elapsed_s()
    time.sleep(0.02)
    assert 0.02 <= clock.elapsed_s() - start < 1


def test_units_follow_from_each_other():
    assert clock.HOUR_MS == 60 * clock.MINUTE_MS
    assert clock.DAY_MS == 24 * clock.HOUR_MS


def test_same_seed_same_numbers_in_every_process():
    code = "from liqlab.clock import generator; print(generator(7).integers(1 << 62, size=3).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(clock.generator(7).integers(1 << 62, size=3).tolist())


def test_different_seeds_differ():
    assert not np.array_equal(clock.generator(1).random(8), clock.generator(2).random(8))


def test_generators_are_independent_of_each_other_and_of_numpys_global_state():
    first = clock.generator(3)
    np.random.seed(0)
    clock.generator(3).random(100)
    np.testing.assert_array_equal(first.random(8), clock.generator(3).random(8))


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        clock.generator(-1)


def test_tokens_are_hex_and_do_not_repeat():
    tokens = {clock.token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(len(token) == 16 and int(token, 16) >= 0 for token in tokens)
