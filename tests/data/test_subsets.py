"""Shares: what a lost replica leaves is trained on by others, every example once per epoch."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.data.batches import Batches, Cursor
from dbnet.data.file import Examples
from dbnet.data.subsets import Share, Shares, cut, hand_out, order

SEED = 7


def left(share: Share, size: int) -> list[int]:
    """Return the examples of the subset that are still to come in the share's epoch."""
    mine = order(SEED, share.subset, size, Range(share.lo, share.hi))(share.epoch)
    return sorted((mine[share.position :] + share.lo).tolist())


@st.composite
def shares_of(draw: st.DrawFn, most: int = 30) -> tuple[Share, int]:
    size = draw(st.integers(1, most))
    lo = draw(st.integers(0, size - 1))
    hi = draw(st.integers(lo, size))
    return Share(draw(st.integers(0, 5)), lo, hi, draw(st.integers(0, 3)), draw(st.integers(0, hi - lo))), size


def test_a_whole_subset_is_in_the_order_of_its_seed() -> None:
    assert sorted(order(1, 0, 9, Range(0, 9))(0)) == list(range(9))
    orders = [
        order(seed, subset, 50, Range(0, 50))(epoch).tolist()
        for seed, subset, epoch in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))
    ]
    assert len({tuple(one) for one in orders}) == 4


@given(shares_of(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_cut_keeps_what_is_used_and_what_is_to_come(share_size: tuple[Share, int], data: st.DataObject) -> None:
    share, size = share_size
    one, two = cut(share, data.draw(st.integers(share.lo, share.hi)), SEED, size)
    assert (one.lo, one.hi, two.hi) == (share.lo, two.lo, share.hi)
    assert one.position + two.position == share.position
    assert sorted(left(one, size) + left(two, size)) == left(share, size)


def test_a_piece_of_which_all_is_used_goes_on_with_the_next_epoch() -> None:
    """Of three examples the one that was used is cut off: it comes again when the others have come, and no minibatch is empty."""
    used = int(order(SEED, 0, 3, Range(0, 3))(2)[0])
    pieces = [Share(0, 0, 3, 2, 1)]
    for at in (used, used + 1):
        pieces = [piece for one in pieces for piece in (cut(one, at, SEED, 3) if one.lo < at < one.hi else [one])]
    whole = next(piece for piece in pieces if (piece.lo, piece.hi) == (used, used + 1))
    assert whole.position == whole.size == 1
    x, y = np.zeros((3, 1), np.float32), np.zeros(3, np.int64)

    def load(share: Share) -> Batches:
        part = Range(share.lo, share.hi)
        return Batches(Examples(x[part.slice], y[part.slice]), 2, 1.0, "float32", order(SEED, 0, 3, part))

    shares = Shares(load, 2, [whole])
    assert shares.cursor == Cursor(3, 0) and shares.next(np.zeros((1, 2), np.float32)) == 1 and shares.cursor == Cursor(4, 0)


@given(st.lists(shares_of(), max_size=4), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_what_is_left_is_handed_out_evenly(shares: list[tuple[Share, int]], heirs: int) -> None:
    shares = [(share._replace(subset=i), size) for i, (share, size) in enumerate(shares)]
    sizes = {share.subset: size for share, size in shares}
    got = hand_out([share for share, _ in shares], heirs, SEED, sizes.__getitem__)
    counts = [sum(share.size for share in mine) for mine in got]
    assert len(got) == heirs and max(counts) - min(counts) <= 1
    for subset, size in sizes.items():
        before = [example for share, _ in shares if share.subset == subset for example in left(share, size)]
        after = [example for mine in got for share in mine if share.subset == subset for example in left(share, size)]
        assert sorted(after) == sorted(before)
    # One more loss: what the first heir got is handed on again.
    again = hand_out(got[0], 2, SEED, sizes.__getitem__)
    assert sum(share.size for mine in again for share in mine) == counts[0]


def test_what_may_not_be_cut_is_handed_out_whole() -> None:
    shares = [Share(0, 0, 10, 1, 3), Share(1, 2, 5), Share(2, 0, 9)]
    assert hand_out(shares, 2, SEED, lambda subset: 10, 0) == [shares[:2], shares[2:]]
    assert hand_out(shares[:1], 3, SEED, lambda subset: 10, 0) == [shares[:1], [], []]
    some = hand_out(shares[:1], 3, SEED, lambda subset: 10, 1)
    assert [sum(share.size for share in mine) for mine in some] == [4, 6, 0]


def reader(share: Share) -> Batches:
    """Example e of subset s is the number 100 s + e."""
    size, part = 10 + share.subset, Range(share.lo, share.hi)
    x = 100.0 * share.subset + np.arange(*part)[:, None]
    return Batches(Examples(x, np.zeros(share.size, np.int64)), 3, 1.0, np.dtype("f8"), order(SEED, share.subset, size, part))


def examples(shares: Shares, epochs: int) -> list[int]:
    x, out = np.zeros((1, 3)), []
    while len(shares) and shares.cursor.epoch < epochs:
        out += x[0, : shares.next(x)].astype(int).tolist()
    return out


@given(st.integers(0, 20), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_example_comes_once_per_epoch_whoever_trains_on_it(steps: int, heirs: int) -> None:
    """Subset 1 is trained on for a while, then its replica is lost and the others go on with it to the end of epoch 3."""
    lost, x = Shares(reader, 3, [Share(1, 0, 11)]), np.zeros((1, 3))
    seen = [int(v) for _ in range(min(steps, 12)) for v in x[0, : lost.next(x)]]
    (cursor,) = lost.cursors
    shares = hand_out([Share(1, 0, 11, *cursor)], heirs, SEED, lambda subset: 11)
    for heir in range(heirs):
        more = Shares(reader, 3, [])
        assert len(more) == 0 and more.cursor == Cursor(0, 0)
        for share in shares[heir]:
            more.take(share)
        seen += examples(more, 3)
    assert sorted(seen) == sorted(3 * list(range(100, 111)))


def test_minibatches_come_from_what_is_least_far() -> None:
    shares = Shares(reader, 3, [Share(0, 0, 10, 1, 0)])
    shares.take(Share(2, 0, 4, 0, 2))
    x = np.zeros((1, 3))
    assert shares.taken == 2 and len(shares) == 14 and shares.cursor == Cursor(0, 2)
    shares.next(x)
    assert 200 <= x[0, 0] < 204 and shares.cursors == [Cursor(1, 0), Cursor(1, 0)]
    shares.next(x)
    assert x[0, 0] < 10 and shares.cursors == [Cursor(1, 3), Cursor(1, 0)]


def test_how_far_a_share_is_is_a_part_of_its_epoch() -> None:
    """3 examples of 4 are further than 4 of 9, and an empty share is never read."""
    shares, x = Shares(reader, 3, [Share(0, 0, 4, 1, 3), Share(2, 0, 9, 1, 4), Share(1, 5, 5, 0, 0)]), np.zeros((1, 3))
    assert shares.cursor == Cursor(1, 4)
    assert shares.next(x) == 3 and (x >= 200).all() and shares.cursor == Cursor(1, 3)


def test_signs_of_life_are_given_while_a_share_is_read() -> None:
    """The reading ends only when it has been heard of three times meanwhile."""
    heard, beats = threading.Event(), []

    def slowly(share: Share) -> Batches:
        assert heard.wait(30), "no sign of life"
        return reader(share)

    def beat() -> None:
        beats.append(threading.current_thread())
        if len(beats) == 3:
            heard.set()

    shares = Shares(slowly, 3, [])
    shares.take(Share(1, 2, 9, 0, 4), beat)
    # MPI is called by the thread that trains and by no other.
    assert set(beats) == {threading.main_thread()}
    assert shares.cursors == [Cursor(0, 4)] and len(shares) == 7


def test_what_cannot_be_read_is_said_where_it_is_taken() -> None:
    def broken(share: Share) -> Batches:
        raise UserError("cut off")

    with pytest.raises(UserError, match="cut off"):
        Shares(broken, 3, [Share(0, 0, 5)])
