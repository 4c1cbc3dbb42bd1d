"""What is kept is made anew where a source of it has changed, and only there."""

import numpy as np
import pytest
from firedrake.petsc import PETSc

from prdp_fem.freshness import MEMORY, MESH, Clock, Kept
from prdp_fem.memory.memory import Memory
from prdp_fem.memory.place import Place


class Made:
    """Counts how often something was made, and gives the count."""

    def __init__(self):
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


def test_what_is_kept_is_made_at_the_first_call():
    made = Made()
    kept = Kept(made, Clock(), [MESH])
    assert made.count == 0
    assert [kept.value, kept.value] == [1, 1]


def test_what_is_kept_is_made_anew_after_a_change_of_its_sources_only():
    clock, made = Clock(), Made()
    kept = Kept(made, clock, [MESH, 3])
    kept.ensure()
    for sources, count in (((MEMORY, 2), 1), ((3,), 2), ((MEMORY, MESH), 3), ((), 3)):
        clock.changed(*sources)
        assert [kept.value, kept.value] == [count, count]


def test_a_change_before_the_first_call_counts_once():
    clock, made = Clock(), Made()
    kept = Kept(made, clock, [MESH])
    clock.changed(MESH)
    assert [kept.value, kept.value] == [1, 1]


def test_what_could_not_be_made_is_made_at_the_next_call():
    attempts = []

    def make():
        attempts.append(None)
        if len(attempts) % 2:
            raise ArithmeticError
        return len(attempts)

    clock = Clock()
    kept = Kept(make, clock, [MESH])
    for expected in (2, 4):
        with pytest.raises(ArithmeticError):
            kept.ensure()
        assert [kept.value, kept.value] == [expected, expected]
        clock.changed(MESH)


def test_a_change_while_something_is_made_has_it_made_again():
    clock, made = Clock(), Made()

    def make():
        if made() == 1:
            clock.changed(MESH)
        return made.count

    kept = Kept(make, clock, [MESH])
    assert [kept.value, kept.value, kept.value] == [1, 2, 2]


def test_what_is_put_in_is_valid_until_the_next_change():
    clock, made = Clock(), Made()
    clock.changed(MESH)
    kept = Kept(made, clock, [MESH])
    kept.put(-1)
    assert kept.value == -1
    clock.changed(MESH)
    assert kept.value == 1
    kept.drop()
    assert kept.value == 2


def test_a_clock_tells_which_sources_have_changed_since_a_moment():
    clock = Clock()
    clock.changed(1, MESH)
    moment = clock.now
    clock.changed(2)
    assert clock.since(moment, [1, 2, MESH, MEMORY]) == {2}
    assert clock.since(0, [1, MEMORY]) == {1}
    assert clock.last([1, MESH]) == moment < clock.last([1, 2])
    assert clock.last([MEMORY]) == clock.last([]) == 0


def test_vectors_and_batches_are_those_of_the_memory():
    layout = PETSc.Vec().createSeq(3)
    place = Place(Memory())
    vector = place.vector(layout)
    row = place.row(layout)
    batches = place.batches(layout)

    def there() -> tuple:
        return vector.value, row.value, batches.value[2]

    before = there()
    place.clock.changed(MESH)
    assert all(one is other for one, other in zip(before, there()))
    place.move_to(Memory())
    after = there()
    assert all(one is not other for one, other in zip(before, after))
    assert after[2].array.shape == (2, 3)
    np.testing.assert_array_equal(after[2].array, 0.0)
    assert place.memory.statistics is place.statistics
