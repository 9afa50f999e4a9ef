"""Free space in a file: nobody gets bytes that another one has, and what is given back is found again."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from moetier.record import PAGE
from moetier.stores.extents import ExtentFile, FreeSpace


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 7)), max_size=60))
def test_free_space(steps: list[tuple[int, int]]) -> None:
    """Take (an even second number) or give back one of those taken, against a set of units."""
    space, taken = FreeSpace(), dict[int, int]()
    for size, choice in steps:
        used = {unit for offset, nbytes in taken.items() for unit in range(offset, offset + nbytes)}
        if choice % 2 == 0 or not taken:
            offset = space.take(size)
            mine = set(range(offset, offset + size))
            assert not mine & used
            lower = [set(range(begin, begin + size)) for begin in range(offset)]
            assert all(units & used for units in lower)  # there is no lower place
            taken[offset] = size
        else:
            offset = sorted(taken)[choice % len(taken)]
            space.give(offset, taken.pop(offset))
        used = {unit for offset, nbytes in taken.items() for unit in range(offset, offset + nbytes)}
        assert space.end == max(used, default=-1) + 1
        assert space.nbytes == space.end - len(used)
    rebuilt = FreeSpace(taken.items())
    assert (rebuilt.end, rebuilt.nbytes, rebuilt.take(2)) == (space.end, space.nbytes, space.take(2))


def test_bytes_that_are_used_twice() -> None:
    with pytest.raises(ValueError, match="from 5 on are used twice"):
        FreeSpace([(0, 6), (5, 2)])


def test_extents_are_free_when_the_last_hold_is_released(tmp_path: Path) -> None:
    file = ExtentFile(tmp_path / "file")
    first, second = file.allocate(3), file.allocate(PAGE + 1)
    assert (first, second, file.used) == (0, PAGE, 3 * PAGE)
    file.hold(first)
    file.release(first)
    assert file.allocate(1) == 3 * PAGE
    file.release(first)
    assert file.allocate(1) == first
    file.release(3 * PAGE)
    file.trim()
    assert file.size == (tmp_path / "file").stat().st_size == 3 * PAGE
    with pytest.raises(ValueError, match="used twice"):
        file.claim([(0, PAGE), (0, 2 * PAGE)])
    file.close()
    file.close()
