"""`rlhf-dist label`: people judge responses on a web page, and what they said becomes preference data."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rlhf_dist.cli import arguments
from rlhf_dist.errors import DataError, InputError

USAGE = """usage: rlhf-dist label add STORE SOURCE [SOURCE ...] --judge pair|ranking|stars|thumbs [--overlap K] [--gold]
                     [--pairs-per-prompt N]
       rlhf-dist label serve STORE [--labellers NAME,NAME] [--tokens FILE] [--host HOST] [--port PORT]
       rlhf-dist label summary STORE
       rlhf-dist label export STORE FILE --form pair|transcripts|ranking|battles|rating|thumbs

Puts prompts with responses into a store (one SQLite file), serves a page on which people judge them, tells how far they
are and whether they agree, and writes what they said as preference data for `rlhf-dist reward`.
`rlhf-dist label VERB --help` shows what each takes; docs/human-feedback.md goes through all of it."""
HOST, PORT = "127.0.0.1", 8072
LEASE_S, GOLD_SHARE, LEAST_GOLD = 300.0, 0.1, 0.0


def run(argv: Sequence[str]) -> int:
    """Run one of the verbs; returns the exit code. Raises `RlhfError`."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    verbs = {"add": add, "serve": serve, "summary": summary, "export": export}
    if not argv or argv[0] not in verbs:
        said = f"`{argv[0]}` is no verb of label" if argv else "label needs a verb"
        raise InputError(f"{said}; name one of {', '.join(verbs)}\n\n{USAGE}")
    return verbs[argv[0]](argv[1:])


def add(argv: Sequence[str]) -> int:
    """`label add`: read sources, and put what is to be judged into the store."""
    from rlhf_dist.labels.item_files import FORMS, Form, read_answered
    from rlhf_dist.labels.items import PAIRS, Answered, items_of
    from rlhf_dist.labels.store import LabelStore, create
    from rlhf_dist.labels.verdicts import JUDGES

    parser = _parser("add", "Put prompts with responses into a store, which is made if it is not there.")
    parser.add_argument("store", type=Path, metavar="STORE", help="as in answers.labels")
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="SOURCE", help="JSON lines (also .gz), .parquet, or a run directory"
    )
    parser.add_argument("--judge", choices=JUDGES, required=True, help="what people are asked")
    parser.add_argument("--form", choices=FORMS, default="responses", help="what a row of the files is (responses)")
    parser.add_argument("--overlap", type=_count, default=1, metavar="K", help="labellers that judge each item (1)")
    parser.add_argument("--gold", action="store_true", help="the right answers are known: test labellers with them")
    parser.add_argument(
        "--pairs-per-prompt", type=_count, default=PAIRS, metavar="N", help=f"at most, of --judge pair ({PAIRS})"
    )
    args = parser.parse_args(list(argv))
    form: Form = args.form
    found: list[Answered] = []
    left_out: Counter[str] = Counter()
    for source in args.sources:
        answered, reasons = read_answered(source, form)
        found += answered
        left_out += reasons
    items, reasons = items_of(found, args.judge, args.gold, args.pairs_per_prompt)
    for reason, count in sorted((left_out + reasons).items()):
        print(f"left out: {count} ({reason})")
    if not items:
        raise DataError(f"there is nothing to judge by {args.judge} in {', '.join(map(str, args.sources))}")
    create(args.store)
    with closing(LabelStore(args.store)) as store:
        added = store.add(items, args.overlap)
    what = "gold items" if args.gold else "items"
    print(f"{args.store}: {added.new} {what} added, {added.known} were there already")
    if added.not_gold:
        print(f"{added.not_gold} are there already as ordinary items and do not become gold")
    return 0


def serve(argv: Sequence[str]) -> int:
    """`label serve`: the page, until it is stopped from the keyboard."""
    parser = _parser("serve", "Serve the labelling page until Ctrl-C. Prints an address with a token for each person.")
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--labellers", default="", metavar="NAME,NAME", help="who gets a new token, beside the owner")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="lines of NAME TOKEN, which stay the same")
    parser.add_argument("--host", default=HOST, help=f"address to listen at; default {HOST}, this machine only")
    parser.add_argument("--port", type=_port, default=PORT, help=f"default {PORT}; 0: a free one")
    parser.add_argument(
        "--lease-s",
        type=_seconds,
        default=LEASE_S,
        help=f"seconds an untouched item stays with one labeller ({LEASE_S:g})",
    )
    parser.add_argument("--gold-share", type=_share, default=GOLD_SHARE, help=f"of the items ({GOLD_SHARE:g})")
    args = parser.parse_args(list(argv))
    _require_store(args.store)
    from rlhf_dist.labels.access import guests_of, new_guests
    from rlhf_dist.labels.app import make_app
    from rlhf_dist.labels.leases import LabelQueue
    from rlhf_dist.labels.store import LabelStore, served_alone
    from rlhf_dist.scoring.bound_server import BoundServer, bind

    if args.tokens and args.labellers:
        raise InputError("--labellers: the file of --tokens names them; give one of the two")
    names = [name for name in args.labellers.split(",") if name]
    guests = guests_of(args.tokens) if args.tokens else new_guests(names)

    def ready(address: str) -> None:
        links = [f"{name:<12} {address}/" for name in guests.names] if args.tokens else guests.links(address)
        how = "the token of the file behind #" if args.tokens else "valid until this server ends"
        print(f"serving {args.store} (stop with Ctrl-C); {how}:", *links, sep="\n", flush=True)

    with (
        served_alone(args.store),
        closing(LabelStore(args.store)) as store,
        closing(bind(args.host, args.port)) as bound,
    ):
        queue = LabelQueue(store, args.lease_s, args.gold_share)
        BoundServer(make_app(store, queue, guests), bound, ready).serve_forever()
    return 0


def summary(argv: Sequence[str]) -> int:
    """`label summary`: what the owner's page shows, as JSON."""
    parser = _parser("summary", "Print how far the work is, agreement, speed and win rates as one JSON object.")
    parser.add_argument("store", type=Path, metavar="STORE")
    args = parser.parse_args(list(argv))
    _require_store(args.store)
    from rlhf_dist.labels.overview import overview
    from rlhf_dist.labels.store import LabelStore

    with closing(LabelStore(args.store)) as store:
        print(json.dumps(overview(store), indent=2, ensure_ascii=False))
    return 0


def export(argv: Sequence[str]) -> int:
    """`label export`: the decisions as preference data."""
    from rlhf_dist.labels.preference_export import EXPORT_FORMS, export as write
    from rlhf_dist.labels.store import LabelStore

    parser = _parser(
        "export", "Write the decisions as JSON lines that `rlhf-dist reward` reads; says what is left out."
    )
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("file", type=Path, metavar="FILE", help="to be made, as in pairs.jsonl")
    parser.add_argument(
        "--form", choices=EXPORT_FORMS, required=True, help="battles keeps ties; see docs/preferences.md"
    )
    parser.add_argument(
        "--least-gold", type=_share, default=LEAST_GOLD, metavar="SHARE", help="leave out labellers with fewer right"
    )
    parser.add_argument("--flagged", action="store_true", help="export items that were flagged, too")
    args = parser.parse_args(list(argv))
    _require_store(args.store)
    with closing(LabelStore(args.store)) as store:
        exported = write(store, args.file, args.form, args.least_gold, args.flagged)
    first, *others = exported.lines(args.form)
    print(f"{args.file}: {first}", *others, sep="\n")
    return 0


def _parser(verb: str, description: str) -> arguments.Parser:
    parser = arguments.Parser(prog=f"rlhf-dist label {verb}", description=description, allow_abbrev=False)
    parser.closing = "docs/human-feedback.md goes through it."
    return parser


def _require_store(path: Path) -> None:
    if path.is_dir() or not path.exists():
        what = "is a directory" if path.is_dir() else "no such store"
        raise DataError(f"{path}: {what}; make one with `rlhf-dist label add STORE SOURCE ...`")


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number up to 65535")
    return int(text)


def _seconds(text: str) -> float:
    return _number(text, 1.0, 86400.0)


def _share(text: str) -> float:
    return _number(text, 0.0, 1.0)


def _number(text: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
    return number
