"""Decide on rows in the browser, one key each: suspect labels, conflicts, wrong dev texts, texts to label; then train again.

    python analysis/review.py --dataset_dir data --params_path ./checkpoint         # open the address that it prints
    python analysis/review.py --dataset_dir data --apply                            # write the decisions into new files
    python analysis/review.py --dataset_dir data --params_path ./checkpoint --compare_path ./checkpoint_reviewed
    python analysis/review.py --dataset_dir data --export doccano --export_file reviewed.jsonl

Reads   dataset_dir/label.txt and what is there of train.txt, dev.txt, data.txt (at least one); params_path (made by train.py),
        where there is one: else TF-IDF suggests, and where nothing is labelled yet, the first texts come from clusters.
Writes  journal: each decision, a JSON line, on the disk before the next card is shown; nothing is ever deleted from it.
        --apply, or the button on the page: dataset_dir/train_reviewed.txt, dev_reviewed.txt, data_reviewed.txt,
        label_reviewed.txt and review_changes.tsv, what is changed and by whom. --export: export_file. cache_dir: scores of the
        rows, for the next start.
"""

import getpass
import os
import secrets
import shlex
import webbrowser
from urllib.parse import quote

from textcls.analysis.review_files import JOURNAL, check_journal, export_rows, make_cards, read_data, read_suspects, same_options
from textcls.analysis.review_journal import Decisions, Journal
from textcls.analysis.review_scores import Model, find_scores
from textcls.analysis.review_session import Review, apply_now
from textcls.common.errors import UserError, needs_packages, run_script
from textcls.common.log import get_logger, say_next
from textcls.common.options import add_model_options, make_parser, positive_int, probability
from textcls.common.outputs import check_output
from textcls.runtime.listening import listen

DEFAULT_CHECKPOINT = "./checkpoint/"


def parse_arguments():
    parser = make_parser(__doc__)
    add_model_options(parser, train_file=True, dev_file=True, cache_dir=True)
    parser.set_defaults(params_path=None)
    parser.add_argument("--data_file", default="data.txt", help="texts without labels in dataset_dir")
    parser.add_argument("--compare_path", help="checkpoint trained again, to compare with params_path on dev")
    parser.add_argument("--journal", help="file of all decisions; None: review.jsonl in dataset_dir")
    parser.add_argument("--num_suspects", type=positive_int, default=200,
                        help="training rows to read again, the most suspicious first; of the others some are drawn at random")
    parser.add_argument("--suspects_file", help="--report_file of dirty.py in dataset_dir, whose rows are read again, in order; "
                        "None: TF-IDF ranks them, as dirty.py does by default")
    parser.add_argument("--overlap", type=probability, default=0.1,
                        help="share of the cards that every person gets, so that their agreement can be measured")
    parser.add_argument("--port", type=int, default=8190, help="of 127.0.0.1; 0: any free one")
    parser.add_argument("--open_browser", action="store_true", help="open the page in this machine's browser")
    parser.add_argument("--apply", action="store_true", help="write the decisions into new files, and end")
    parser.add_argument("--overwrite", action="store_true",
                        help="with --apply: replace such files from before, and remove those of which no row is left")
    parser.add_argument("--export", choices=["doccano", "label_studio"], help="write all rows as decided for this tool, and end")
    parser.add_argument("--export_file", help="where they go; None: reviewed.jsonl, reviewed.json")
    args = parser.parse_args()
    if args.params_path is None and os.path.isdir(DEFAULT_CHECKPOINT):
        args.params_path = DEFAULT_CHECKPOINT
    args.journal = args.journal or os.path.join(args.dataset_dir, JOURNAL)
    if args.overwrite and not args.apply:
        parser.error("--overwrite: without effect, expected --apply with it")
    if args.compare_path and not args.params_path:
        parser.error("--compare_path: nothing to compare with, expected --params_path, too")
    return args


def open_journal(args, labels, data):
    """The journal, its entries checked against the data files, whose hashes it gets where they are new. UserError."""
    check_output(args.journal, [rows.path for rows in data.values()], args.dataset_dir)
    journal = Journal(args.journal)
    check_journal(args.journal, Decisions(labels, journal.entries), make_cards(data))
    hashes = {os.path.basename(rows.path): rows.hash for rows in data.values()}
    known = [entry["files"] for entry in journal.entries if entry["action"] == "opened"]
    if known and known[-1] != hashes:
        changed = sorted(name for name in {*known[-1], *hashes} if known[-1].get(name) != hashes.get(name))
        get_logger().warning(f"{', '.join(changed)}: not as when {args.journal} was last opened; decisions are matched by text.")
    if not known or known[-1] != hashes:
        journal.append("opened", files=hashes)
    return journal


def apply(args, journal):
    """Write the new files and say what is in them and what to do next."""
    found = apply_now(args, journal, args.overwrite)
    get_logger().info(f"{found['changed']} labels changed, {found['labelled']} texts labelled, {found['dropped']} dropped; left "
                      f"as they were, since persons disagree: {found['conflicts']}; decided, but in no file any more: "
                      f"{found['unmatched']}. Each is listed in {found['paths'][-1]}")
    for command in found["commands"]:
        get_logger().info(f"Next: {command}")


def export(args, data, decisions):
    """Write all rows as decided for another tool."""
    path = args.export_file or ("reviewed.jsonl" if args.export == "doccano" else "reviewed.json")
    check_output(path, [*(rows.path for rows in data.values()), args.journal], args.dataset_dir)
    count = export_rows(args.export, path, data, decisions)
    get_logger().info(f"{count} rows saved in {path}")
    script, option = ("data/doccano.py", "--doccano_file") if args.export == "doccano" else ("data/table.py", "--table_file")
    say_next(script, option, path, "--save_dir", "reviewed_data")


def choose_suspects(args, data):
    """The train rows of --suspects_file, int64, None without it. UserError."""
    if not args.suspects_file:
        return None
    if "train" not in data:
        raise UserError(f"{os.path.join(args.dataset_dir, args.train_file)}: file not found, expected it with --suspects_file")
    return read_suspects(os.path.join(args.dataset_dir, args.suspects_file), data["train"])


def compare_models(args, data, decisions, scores):
    """The label ids that params_path and compare_path predict for dev, int64 [num_dev] each. UserError."""
    if "dev" not in data:
        raise UserError(f"{os.path.join(args.dataset_dir, args.dev_file)}: file not found, expected it with --compare_path")
    _, after = Model(args.compare_path, args, decisions.ids).predict(data["dev"].texts, len(decisions.names), "dev")
    return scores.probs["dev"].argmax(axis=1), after.argmax(axis=1)


def own_name():
    """The user's name; "", so that the page asks for one, where the system has none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""


def serve(args, review, listening):
    """Answer until Ctrl-C."""
    import uvicorn

    from textcls.analysis.review_app import make_app

    token = secrets.token_urlsafe(24)
    server = uvicorn.Server(uvicorn.Config(make_app(review, token), log_level="warning", lifespan="off", server_header=False,
                                           timeout_graceful_shutdown=1))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/#token={token}&who={quote(own_name())}"
    get_logger().info(f"Open this address in a browser; who has it can read and decide: {address}")
    model = ["--params_path", args.params_path] if args.params_path else []
    get_logger().info(f"Each decision is saved in {args.journal}. Ctrl-C ends; then: "
                      f"python analysis/review.py {shlex.join([*same_options(args), *model])} --apply")
    if args.open_browser and not webbrowser.open(address):
        get_logger().warning("--open_browser: no browser found here, expected the address opened by hand; on another machine: "
                             f"ssh -L {listening.getsockname()[1]}:127.0.0.1:{listening.getsockname()[1]} this-machine")
    server.run(sockets=[listening])


def main():
    args = parse_arguments()
    labels, data = read_data(args)
    journal = open_journal(args, labels, data)
    decisions = Decisions(labels, journal.entries)
    if args.apply:
        return apply(args, journal)
    if args.export:
        return export(args, data, decisions)
    with needs_packages("requirements-cpu.txt"):  # before the work, not after it
        import fastapi  # noqa: F401
        import pypinyin  # noqa: F401
        import uvicorn  # noqa: F401
    suspects = choose_suspects(args, data)
    listening = listen("127.0.0.1", args.port, "--port")
    model = Model(args.params_path, args, decisions.ids) if args.params_path else None
    scores = find_scores(args, labels, data, model)
    scores = scores if suspects is None else scores._replace(suspects=suspects)
    compared = compare_models(args, data, decisions, scores) if args.compare_path else None
    serve(args, Review(args, labels, data, journal, scores, model, compared), listening)


if __name__ == "__main__":
    run_script(main)
