"""What the report counts in revisions and votes, by hand."""

import math

import pytest

from minicai.report.summary import changes, places


def test_changes_by_round_and_by_principle_by_hand():
    """An empty revision is faulty and no change. Boilerplate is a change, and faulty."""

    def row(initial, *steps):
        rounds = [{"principle": p, "critique": "", "revision": text} for p, text in steps]
        return {"initial": initial, "rounds": rounds}

    rows = [
        row("a", ("kind", "b"), ("brief", "B ")),
        row("a", ("brief", ""), ("kind", "Here is b")),
        row("a", ("kind", "a")),
    ]
    found = changes(rows)
    shares = [
        [(step[key]["count"], step[key]["rate"]) for key in ("changed", "faulty")]
        for step in found["by_round"]
    ]
    assert shares == [[(3, 1 / 3), (3, 1 / 3)], [(2, 1 / 2), (2, 1 / 2)]]
    rates = {name: step["changed"]["rate"] for name, step in found["by_principle"].items()}
    assert rates == {"brief": 0, "kind": 2 / 3}
    assert changes([]) == {"by_round": [], "by_principle": {}}


def test_what_the_position_was_worth_by_hand():
    def vote(principle, order, p):
        logprobs = {"logp_first": math.log(p), "logp_second": math.log(1 - p)}
        return {"principle": principle, "order": order, **logprobs}

    def pair(principle, forward, backward):
        orders = (("first,second", forward), ("second,first", backward))
        return {"votes": [vote(principle, order, p) for order, p in orders]}

    one_order = {"votes": [vote("kind", "first,second", 0.9)]}
    pairs = [pair("kind", 0.9, 0.2), pair("kind", 0.8, 0.7), pair("brief", 0.4, 0.6)]
    found = places([*pairs, one_order, {"votes": []}])
    assert found["p_a"] == pytest.approx((0.85 + 0.55 + 0.4) / 3)  # (0.9 + 1 - 0.2) / 2, ...
    assert (found["to_a"]["count"], found["to_a"]["rate"]) == (3, 1 / 3)
    assert found["to_b"]["rate"] == 1 / 3
    own = found["by_principle"]
    assert list(own) == ["brief", "kind"] and own["kind"]["p_a"] == pytest.approx(0.7)
    assert own["kind"]["to_a"]["rate"] == 1 / 2 and own["brief"]["to_b"]["rate"] == 1
    assert places([])["p_a"] is None
