"""Cycles of a Pallas call: XLA estimates none, so its final schedule is counted."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?P<label>[A-Z]{2})?\s*:\s*[> ]*\{")
_LOOP_TEST = re.compile(
    r"%(\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) /\* loop exit test"
)
_DELAY = 4  # bundles that a branch still runs after its own


def count_cycles(bundles: str) -> int:
    """Returns bundles times trips of a final schedule, in libtpu's text form.

    Branches count as always taken; waiting for memory counts nothing.

    Raises:
        ValueError: when a loop's trips are not constant.
    """
    count, loops = 0, []
    open_loops: list[dict[str, Any]] = []
    for line in bundles.splitlines():
        if bundle := _BUNDLE.match(line):
            if bundle["label"] == "LB":
                open_loops.append({"start": count, "test": "", "trips": 0})
            count += 1
        if test := _LOOP_TEST.search(line):
            innermost = [loop for loop in open_loops if not loop["test"]][-1]
            innermost |= {"test": test.group(1), "trips": int(test.group(2))}
        for loop in list(open_loops):
            if loop["test"] and re.search(rf"sbr\.rel \(!%{loop['test']}\)", line):
                open_loops.remove(loop)
                loops.append((loop["start"], count + _DELAY, loop["trips"]))
    if open_loops:
        raise ValueError(f"{len(open_loops)} loops of the schedule have no constant trips")
    trips = np.ones(count, np.int64)
    for start, stop, times in loops:
        trips[start:stop] *= times
    return int(trips.sum())


def read_schedules(dumps: Path, names: Collection[str]) -> dict[str, int]:
    """Returns the counted cycles of those of the named calls whose schedule libtpu dumped."""
    found = {}
    for path in dumps.glob("*final_bundles.txt"):
        name = re.match(r"\d+-(.+?)-\d+-final_bundles", path.name)
        if name and name[1] in names:
            found[name[1]] = count_cycles(path.read_text(errors="replace"))
    return found
