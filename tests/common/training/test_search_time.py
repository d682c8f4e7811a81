"""The largest batch is found by few tries, whatever the curve of memory looks like."""

import pytest

from common.training.pod.search import Trial, crossing, largest_that_fits

GIB = 2**30
LIMIT = 16 * GIB


def search(curve, start=2, most=4096):
    """(the largest that fits, sizes tried, lines said); `curve`: size -> GiB, None: unknown."""
    said = []

    def measure(size):
        needed = curve(size)
        return Trial(size, None if needed is None else int(needed * GIB), GIB // 4)

    trials = largest_that_fits(measure, LIMIT, start, most, said.append)
    best = max((t.size for t in trials if t.fits(LIMIT)), default=0)
    return best, [t.size for t in trials], said


@pytest.mark.parametrize("start", [1, 2, 8, 40])
def test_a_straight_line_takes_four_compilations(start):
    best, tried, said = search(lambda n: 1.1 + 0.73 * n, start)
    assert best == 20 and len(tried) <= 4, tried
    assert len(said) == len(tried)


def test_the_compiler_says_only_that_it_does_not_fit():
    best, tried, said = search(lambda n: 1.1 + 0.73 * n if n <= 20 else None)
    assert best == 20 and len(tried) <= 4, tried
    assert said[0].startswith("2 need 2.56 of 16.00 GiB; a straight line ends at ")
    assert any("21 do not fit" in line for line in said)


CURVES = {
    # The compiler computes more again the closer it comes to the limit.
    "bent": (lambda n: 1 + 14 * (1 - 2.0 ** (-n / 8)) if n <= 50 else None, 50),
    "in steps": (lambda n: 1 + 0.5 * (n // 16 + 1) * 4, 111),
    "noisy": (lambda n: 0.4 + 0.11 * n + 0.1 * (n % 3), 141),
    "steep": (lambda n: 1 + 0.02 * n * n, 27),
    "falling": (lambda n: 9 - 0.01 * n if n < 300 else None, 299),
    "from the first on": (lambda n: None, 0),
    "one": (lambda n: 9.0 * n, 1),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("start", [1, 7, 300])
def test_any_curve_is_halved_in_the_end(name, start):
    curve, expected = CURVES[name]
    best, tried, _ = search(curve, start, most=500)
    assert best == expected and len(tried) <= 6 + 9, tried
    assert len(set(tried)) == len(tried)


def test_what_always_fits_ends_at_the_most():
    assert search(lambda n: 1 + 0.001 * n, most=64)[0] == 64


def test_lines_go_through_the_tries_nearest_to_the_limit():
    assert crossing([Trial(4, None)], LIMIT) is None
    assert crossing([Trial(4, 5 * GIB, GIB)], LIMIT) == 15
    trials = [Trial(1, GIB), Trial(4, 8 * GIB), Trial(6, 12 * GIB), Trial(40, None)]
    assert crossing(trials, LIMIT) == 8
