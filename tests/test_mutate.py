"""The tests of the losses notice every alteration of them (a few seconds)."""

from tests.mutate import campaign


def test_every_mutant_of_the_losses_is_killed():
    tried, wrong = campaign()
    assert not wrong, "\n".join(wrong)
    assert tried > 150
