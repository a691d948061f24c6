"""`dist.watch`: who is to blame, from what everybody last said."""

from moestro.dist.watch import Sign, judge


def test_a_rank_without_new_beats_was_lost() -> None:
    before = {0: Sign(4, 90), 1: Sign(4, 90), 2: Sign(3, 90)}
    after = {0: Sign(8, 90), 1: Sign(8, 90), 2: Sign(3, 90)}
    assert judge(before, after) == ([2], "rank 2 was lost: no sign of life (killed, stopped, or its machine is gone)")


def test_where_all_beat_the_one_that_has_entered_fewest_exchanges_hangs() -> None:
    before = {0: Sign(4, 91), 1: Sign(4, 90)}
    after = {0: Sign(8, 91), 1: Sign(8, 90)}
    assert judge(before, after) == ([1], "rank 1 hangs: it has entered 90 exchanges, others 91")
