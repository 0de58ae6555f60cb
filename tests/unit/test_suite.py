"""How this suite is run."""

import pytest
from shares import share_of

TESTS = [f"test_{number}" for number in range(12)]


def test_five_shares_of_the_release_tests_are_all_of_them_once():
    shares = [share_of(TESTS, f"{number}/5") for number in range(1, 6)]
    assert sorted(name for share in shares for name in share) == sorted(TESTS)
    assert {len(share) for share in shares} <= {2, 3}
    assert share_of(TESTS, "all") == TESTS and share_of(TESTS, "none") == []


@pytest.mark.parametrize("which", ["6/5", "0/5", "2", "some", "", "1/0"])
def test_what_is_no_share_is_refused(which):
    with pytest.raises(ValueError, match="give all, none, or K/N"):
        share_of(TESTS, which)
