"""`rlsedit facts`: real facts with other answers, as a file for the other commands."""

from __future__ import annotations

import argparse

from rlsedit.cli.options import blamed, check_outputs, natural, place, positive

NAME = "facts"
HELP = "write a file of real facts with other answers"
DESCRIPTION = (
    "Write facts about countries, cities, airports and elements, or about more than 20,000 towns, with other answers, "
    "paraphrases and neighbours that are never edited. The same seed gives the same stream; small PyPI packages carry "
    "the facts."
)
EXAMPLES = ("rlsedit facts --out facts.jsonl --limit 200",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where they go, how many, which."""
    parser.add_argument("--out", required=True, type=place, metavar="FILE", help="JSON, one fact a line")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N facts (default: all there are)")
    parser.add_argument(
        "--relations", metavar="LIST", help="such as capital,symbol or town (default: all but town; all: with town)"
    )
    parser.add_argument(
        "--seed", type=natural, metavar="N", default=0, help="of order, answers and neighbours (default 0)"
    )
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")


def run(args: argparse.Namespace) -> int:
    """Makes and writes them."""
    from rlsedit.facts import save_facts
    from rlsedit.facts.relations import MANY, RELATIONS
    from rlsedit.facts.world import world_facts
    from rlsedit.report import Console

    if args.out.exists() and not args.force:
        raise ValueError(f"--out: {args.out} is there; needs another name, or --force to replace it")
    check_outputs(args, "out", beside=True, file=True)
    names = None
    if args.relations == "all":
        names = [relation.name for relation in (*RELATIONS, *MANY)]
    elif args.relations is not None:
        names = [part.strip() for part in args.relations.split(",")]
    with blamed("--relations", "world_facts: "):
        facts = world_facts(args.seed, limit=args.limit, relations=names)
    save_facts(facts, args.out)
    console, relations = Console(), sorted({fact.relation for fact in facts})
    console.line(f"{len(facts)} facts of {len(relations)} relations ({', '.join(relations)}) written to {args.out}")
    return 0
