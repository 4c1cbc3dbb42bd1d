"""Random options and states of refinements, run by hand: each is taken as it is written, or refused
in one sentence.

    python tests/fuzz_inputs.py [--seconds 60] [options] [states]

The numbers that options mean are found a second time, by Python's decimal and a table of PETSc's
words for true and false. A state that is loaded is the state that there is afterwards; one that is
refused changes nothing. Hypothesis makes the first failure small, and prints it.
"""

import argparse
import collections
import copy
import json
import math
import time
import warnings
from decimal import Decimal, InvalidOperation

from firedrake.petsc import PETSc
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from prdp_fem import (
    FixedRefinement,
    IterationLadder,
    Iterations,
    NewtonLadder,
    ProgressiveRefinement,
    ScheduledRefinement,
    ToleranceLadder,
    refinement_from_options,
)

COUNTS = collections.Counter()
MOST = 2**31 - 1


def refused(error: Exception) -> None:
    """Count a refusal, which must be one of those that are documented."""
    text = str(error)
    assert type(error) in (ValueError, TypeError), repr(error)
    assert "\n" not in text and 10 < len(text) < 900, text
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    COUNTS["refused"] += 1


# Options

INTEGERS = ("start", "step", "stop", "ema_window", "error_window")
REALS = ("tau_step", "tau_stop")
SWITCHES = ("monitor", "view")
NAMES = (*INTEGERS, *REALS, *SWITCHES, "ladder", "device")
numbers = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.decimals().map(str),
    st.integers(-2, 2**33).map(str),
    st.floats(0, 1).map(repr),
    st.sampled_from(["0", "1", "0.5", "1e-3", str(MOST), str(MOST + 1), "99999999999"]),
)
words = st.text(
    st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters=" \"'#"), max_size=12
)
letters = st.text("adeilnoprstuvw_-", min_size=1, max_size=12)
known = [
    "iterations",
    "tolerances",
    "newton",
    "true",
    "false",
    "yes",
    "no",
    "on",
    "off",
    "nan",
    "inf",
    "",
    "5it",
]
values = st.one_of(
    numbers,
    words,
    st.sampled_from(known),
    st.text(max_size=8).filter(lambda text: text.isprintable()),
)
prefixes = st.sampled_from(["", "", "", "heat_", "wave_"])


@st.composite
def options(draw):
    """Names and values; most names are right."""
    found = {}
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(NAMES))
        if draw(st.integers(0, 5)) == 0:
            place = draw(st.integers(0, len(name)))
            name = draw(
                st.sampled_from(
                    [
                        name[:place] + draw(letters) + name[place:],
                        name[:place] + name[place + 1 :],
                        draw(letters),
                    ]
                )
            )
        found[f"{draw(prefixes)}prdp_{name}"] = draw(values)
    return found


def meant(kind: str, name: str, text: str) -> Decimal | None:
    """The number that is written, or None."""
    is_real = name in REALS or (kind == "tolerances" and name in ("start", "step", "stop"))
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if is_real or number == number.to_integral_value() else None


def check_options(found: dict[str, str]) -> None:
    database = PETSc.Options()
    for name, value in found.items():
        database.setValue(name, value)
    # Those that print would fill the screen.
    kept = {name: value for name, value in found.items() if name.startswith("prdp_")}
    if {"prdp_view", "prdp_monitor"} & kept.keys():
        COUNTS["switches"] += 1
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            refinement = refinement_from_options()
    except Exception as error:
        refused(error)
        return
    finally:
        for name in found:
            database.delValue(name)
    COUNTS["taken"] += 1
    for name in found:
        assert name.rpartition("prdp_")[2].lower() in NAMES, name
    kind = kept.get("prdp_ladder", "iterations")
    for name, text in kept.items():
        name = name.removeprefix("prdp_")
        if name in (*INTEGERS, *REALS):
            number = meant(kind, name, text)
            of = refinement if name in (*REALS, "ema_window", "error_window") else refinement.ladder
            has = getattr(of, "factor" if name == "step" and kind == "tolerances" else name)
            assert number is not None, (name, text, has)
            assert has == (float(number) if isinstance(has, float) else int(number)), (
                name,
                text,
                has,
            )
    assert refinement.setting.max_it is None or 1 <= refinement.setting.max_it <= MOST


# States

LADDERS = (
    IterationLadder(stop=9),
    IterationLadder(),
    ToleranceLadder(),
    NewtonLadder(stop=3, linear=[1, 5, 20]),
    [5, 10, 20],
)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 12),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from([10**400, -(10**400), 2**31, 10**17, math.inf, math.nan, "FixedRefinement"]),
)
anything = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
metrics = st.lists(st.floats(0, 1e300, allow_subnormal=False), max_size=8)


@st.composite
def refinements(draw):
    """Two that are equal, one of which has a history."""
    ladder = draw(st.sampled_from(LADDERS))
    make = draw(
        st.sampled_from(
            [
                lambda: ProgressiveRefinement(ladder, ema_window=1, error_window=1),
                lambda: ProgressiveRefinement(ladder, tau_step=0.5, ema_window=3, error_window=2),
                lambda: ScheduledRefinement(ladder, {1: 1, 3: 2}),
                lambda: FixedRefinement(Iterations(7)),
            ]
        )
    )
    first, second = make(), make()
    for metric in draw(metrics):
        first.step(metric)
    return first, second


def damage(draw, value, depth=0):
    """A copy, in which something is another thing, lacks or is too much."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 3)) > 0 and depth < 5:
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        what = draw(st.sampled_from(["deeper", "deeper", "away", "more"]))
        if what == "deeper":
            value[key] = damage(draw, value[key], depth + 1)
        elif what == "away":
            del value[key]
        elif isinstance(value, dict):
            value[draw(st.text(max_size=5))] = draw(anything)
        else:
            value.insert(key, draw(anything))
        return value
    return draw(anything)


def same(one, other) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def check_states(data) -> None:
    source, target = data.draw(refinements())
    state = json.loads(json.dumps(source.state_dict(), allow_nan=False))
    damaged = damage(data.draw, copy.deepcopy(state))
    before = target.state_dict()
    try:
        target.load_state_dict(damaged)
    except Exception as error:
        refused(error)
        assert same(target.state_dict(), before)
        return
    COUNTS["taken"] += 1
    after = target.state_dict()
    json.dumps(after, allow_nan=False)
    assert after.keys() == damaged.keys()
    for name, value in after.items():
        assert (
            value == damaged[name]
            or name == "checkpoint"
            and value is None
            and damaged[name] == math.inf
        ), name
    target.step(1.0)


def run(name: str, strategy, test, seconds: float) -> None:
    """As many examples as there is time for, and what became of them."""
    COUNTS.clear()
    start, rounds = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        options = settings(
            max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        seed(rounds)(options(given(strategy)(test)))()
        rounds += 1
    print(
        f"{name}: {dict(COUNTS)} in {time.monotonic() - start:.0f} s, and nothing but documented "
        "errors",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help="options or states (default: both)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="for each kind (default: %(default)s)"
    )
    arguments = parser.parse_args()
    tests = {"options": (options(), check_options), "states": (st.data(), check_states)}
    PETSc.Options().setValue("options_left", False)
    for kind in arguments.kinds or tests:
        run(kind, *tests[kind], arguments.seconds)
