"""What ranks agree on: equal on all, or an error on all."""

import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD

from prdp_fem.ranks.agreement import agree, from_first_rank


@pytest.mark.parallel([1, 2, 3])
def test_what_is_equal_is_returned():
    mine = [3, 4]
    assert agree(COMM_WORLD, lambda: mine, "shapes") is mine
    rank = COMM_WORLD.rank
    assert agree(COMM_SELF, lambda: rank, "ranks") == rank


@pytest.mark.parallel([2, 3])
def test_what_differs_is_an_error_on_all_ranks():
    last = COMM_WORLD.size - 1
    with pytest.raises(
        ValueError,
        match=f"shapes must be the same on all ranks, found 3 on rank 0 and 4 on rank {last}: cut",
    ):
        agree(COMM_WORLD, lambda: 4 if COMM_WORLD.rank == last else 3, "shapes", "cut them")
    with pytest.raises(
        ValueError, match="shapes must be the same on all ranks, found 3 on rank 0 and 4 on rank 1$"
    ):
        agree(COMM_WORLD, lambda: 3 + COMM_WORLD.rank, "shapes")


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("raising", [[0], [1], [0, 1, 2]])
def test_what_is_raised_on_one_rank_is_an_error_on_all(raising):
    def find():
        if COMM_WORLD.rank in raising:
            raise KeyError("mesh")
        return np.zeros(2)

    if raising[0] >= COMM_WORLD.size:
        agree(COMM_WORLD, find, "meshes")
        return
    with pytest.raises(KeyError if COMM_WORLD.rank in raising else ValueError) as raised:
        agree(COMM_WORLD, find, "meshes")
    if COMM_WORLD.rank not in raising:
        assert (
            str(raised.value)
            == f"rank {raising[0]} of {COMM_WORLD.size} has raised KeyError: 'mesh'"
        )


@pytest.mark.parallel([1, 2, 3])
def test_what_only_the_first_rank_finds_is_had_by_all():
    ranks = []

    def find():
        ranks.append(COMM_WORLD.rank)
        return {"mesh": 3}

    assert from_first_rank(COMM_WORLD, find) == {"mesh": 3}
    assert ranks == ([0] if COMM_WORLD.rank == 0 else [])

    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        from_first_rank(COMM_WORLD, fail)
