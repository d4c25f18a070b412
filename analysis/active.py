"""Measure which texts to label first: label in rounds, the true labels in the person's place, and compare strategies.

    python analysis/active.py --source_dir KUAKE_QIC --encoder zh_bert --max_seq_length 64 --figure active.png

Each round a logistic regression is trained on the labelled rows' vectors, which an encoder as it is makes once, and tested; then
a strategy chooses the rows of the next round:
random     any.
margin     the smallest margins between the two likeliest labels. Begins at random.
review     as review.py: begins with the typical rows of clusters (k-means); smallest margins without near-duplicates.
diverse    begins like review; then k-means++ chooses rows that are unlike each other among ten times as many of the smallest
           margins, and 15 % of each round are random.

Reads   source_dir/train.txt, dev.txt, label.txt; the encoder: what retrieval_based/train.py made, or a pretrained model.
Writes  output_dir/results.tsv: accuracy of each seed after each round; figure; on standard output, how many rows each strategy
        needs. cache_dir: the vectors. --fine_tune: output_dir/STRATEGY-seed-N/, a model trained on the rows chosen.
"""

import os

import numpy as np
from threadpoolctl import threadpool_limits

from textcls.analysis.experiments import run
from textcls.analysis.features import cached_vectors, normalize, standardize
from textcls.analysis.selection import choose_diverse, order_by_clusters, order_unlabelled
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import get_logger
from textcls.common.options import add_encoder_options, encoder_options, make_parser, positive_int, seed_number, share_below_one
from textcls.common.outputs import check_output, check_output_folder, complete_file
from textcls.data.files import read_json, read_labelled, read_labels, write_rows
from textcls.retrieval.encoder import open_encoder
from textcls.training.baseline import fit_logistic

STRATEGIES = ("random", "margin", "review", "diverse")
FILES = ("train.txt", "dev.txt", "label.txt")
POINTS = 2  # percent below the accuracy of all rows: what a strategy has to reach


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--source_dir", required=True, help="folder of train.txt, dev.txt and label.txt")
    parser.add_argument("--encoder", required=True, help="folder or built-in name")
    add_encoder_options(parser)
    parser.add_argument("--output_dir", default="build/active", help="folder of the results")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[1, 2, 3])
    parser.add_argument("--first_rows", type=positive_int, default=200, help="rows that are labelled before the first round")
    parser.add_argument("--round_rows", type=positive_int, default=100, help="rows of a round")
    parser.add_argument("--max_rows", type=positive_int, default=3000, help="rows after the last round")
    parser.add_argument("--strength", type=float, default=0.01, help="C of the logistic regression, on standardized vectors")
    parser.add_argument("--held_out", type=share_below_one,
                        help="test on this share of train instead of on dev.txt, to choose options by it")
    parser.add_argument("--figure", help="picture of the curves, .png or .svg; None: none is drawn")
    parser.add_argument("--cache_dir", default=".analysis_cache", help='folder for vectors of texts; "": keep none')
    parser.add_argument("--fine_tune", help="also fine-tune this model, as of train.py, on the --max_rows rows of each strategy")
    parser.add_argument("--learning_rate", default="1e-4", help="of --fine_tune, as for train.py")
    parser.add_argument("--num_train_epochs", type=positive_int, default=5, help="of --fine_tune, as for train.py")
    args = parser.parse_args()
    if args.first_rows > args.max_rows:
        parser.error(f"--max_rows {args.max_rows}: expected --first_rows ({args.first_rows}) or more")
    if not 0 < args.strength < float("inf"):
        parser.error(f"--strength {args.strength}: expected a number above 0")
    if args.figure and not args.figure.endswith((".png", ".svg")):
        parser.error(f"--figure {args.figure}: expected a name that ends with .png or .svg")
    args.strategies, args.seeds = (list(dict.fromkeys(values)) for values in (args.strategies, args.seeds))
    return args


def read_rows(args):
    """(train, test, labels): (texts, label ids int64) twice, and the names. UserError."""
    problems = Problems()
    labels = read_labels(os.path.join(args.source_dir, "label.txt"), problems)
    train, test = (read_labelled(os.path.join(args.source_dir, name), labels, problems) for name in FILES[:2])
    problems.report()
    held_out = round((args.held_out or 0) * len(train[0]))
    num_rows, num_tests = len(train[0]) - held_out, held_out if args.held_out else len(test[0])
    if not num_tests or num_rows <= args.max_rows:
        raise UserError(f"{args.source_dir}/train.txt: {num_rows} rows to label, {num_tests} to test with, expected more than "
                        f"--max_rows ({args.max_rows}) and at least one")
    return train, test, labels


def make_vectors(args, train_texts, test_texts):
    """Vectors of both, float32 [num_texts, dimension], standardized by the training texts."""
    encoder = open_encoder(args.encoder, **encoder_options(args))
    vectors = cached_vectors(encoder, train_texts + test_texts, args.cache_dir, "all texts")
    train, test = np.split(vectors, [len(train_texts)])
    return standardize(train, train), standardize(test, train)


def hold_out(share, rows, vectors):
    """(train, test, vectors, test vectors), as of `read_rows` and `make_vectors`, of the training rows alone."""
    held_out, kept = np.split(np.random.default_rng(0).permutation(len(vectors)), [round(share * len(vectors))])
    train, test = (([rows[0][row] for row in part], rows[1][part]) for part in (kept, held_out))
    return train, test, vectors[kept], vectors[held_out]


def choose(strategy, texts, units, probs, count, rng):
    """The rows of a round, int64 [count], of the texts not labelled so far. units: their vectors, of length 1; probs: what the
    model says of them."""
    if strategy == "random":
        return rng.permutation(len(texts))[:count]
    if strategy == "margin":
        highest = np.sort(probs, axis=1)[:, -2:]
        return np.argsort(highest[:, 1] - highest[:, 0], kind="stable")[:count]
    if strategy == "review":
        return order_unlabelled(texts, units, probs)[:count]
    return choose_diverse(texts, units, probs, count, rng)


def label_in_rounds(args, strategy, seed, train, vectors, test, test_vectors):
    """(counts, accuracies in percent, rows): after each round, and the rows of train that are labelled in the end."""
    texts, label_ids = train
    rng = np.random.default_rng(seed)
    num_labels = int(max(label_ids.max(), test[1].max())) + 1
    units = normalize(vectors)
    starts_random = strategy in ("random", "margin")
    labelled = (rng.permutation(len(texts)) if starts_random else order_by_clusters(units, seed))[:args.first_rows]
    counts, accuracies = [], []
    while True:
        answer = fit_logistic(vectors[labelled], label_ids[labelled], num_labels, args.strength)
        counts.append(len(labelled))
        accuracies.append(100 * float((answer(test_vectors).argmax(axis=1) == test[1]).mean()))
        count = min(args.round_rows, args.max_rows - len(labelled))
        if not count:
            return counts, accuracies, labelled
        rest = np.setdiff1d(np.arange(len(texts)), labelled)
        chosen = choose(strategy, [texts[row] for row in rest], units[rest], answer(vectors[rest]), count, rng)
        labelled = np.concatenate([labelled, rest[chosen]])


def fine_tune(args, strategy, seed, train, test, labels, rows):
    """Accuracy in percent of a model that train.py makes of these rows, the last epoch's: nothing is chosen on the test rows."""
    folder = os.path.join(os.path.abspath(args.output_dir), f"{strategy}-seed-{seed}")
    os.makedirs(folder, exist_ok=True)
    names = np.array(labels)
    write_rows(os.path.join(folder, "train.txt"), [train[0][row] for row in rows], names[train[1][rows]].tolist())
    write_rows(os.path.join(folder, "dev.txt"), test[0], names[test[1]].tolist())
    with complete_file(os.path.join(folder, "label.txt")) as file:
        file.write("".join(f"{label}\n" for label in labels))
    checkpoint = os.path.join(folder, "checkpoint")
    model = os.path.abspath(args.fine_tune) if os.path.isdir(args.fine_tune) else args.fine_tune
    run("train.py", "--model_name_or_path", model, "--data_dir", folder, "--output_dir", checkpoint, "--overwrite_output_dir",
        "--do_train", "--do_eval", "--evaluation_strategy", "no", "--save_strategy", "no", "--seed", seed, "--learning_rate",
        args.learning_rate, "--num_train_epochs", args.num_train_epochs, "--per_device_train_batch_size", 32,
        *(["--max_seq_length", args.max_seq_length] if args.max_seq_length else []),
        *(["--device", args.device] if args.device else []))
    return 100 * read_json(os.path.join(checkpoint, "eval_results.json"))["eval_accuracy"]


def rows_needed(counts, accuracies, wanted):
    """The rows after which the accuracy is the wanted one for the first time, as words."""
    reached = np.flatnonzero(np.array(accuracies) >= wanted)
    return str(counts[reached[0]]) if len(reached) else f"> {counts[-1]}"


def make_table(counts, results, tuned, of_all, num_rows):
    """Lines of the table. results: {strategy: accuracies [num_seeds, num_rounds]}; tuned: {strategy: accuracies [num_seeds]}."""
    wanted = of_all - POINTS
    middle = len(counts) // 2
    lines = [f"all {num_rows} rows: {of_all:.2f} %; wanted: {wanted:.2f} %",
             f"strategy\trows needed by the mean\tof each seed\t% at {counts[0]} rows\t% at {counts[middle]}\t% at {counts[-1]}\t"
             "mean of the curve" + ("\t% fine-tuned" if tuned else "")]
    for strategy, curves in results.items():
        cells = [strategy, rows_needed(counts, curves.mean(axis=0), wanted),
                 ", ".join(rows_needed(counts, curve, wanted) for curve in curves)]
        columns = [curves[:, 0], curves[:, middle], curves[:, -1], curves.mean(axis=1)]
        for values in columns + ([np.array(tuned[strategy])] if tuned else []):
            cells.append(f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""))
        lines.append("\t".join(cells))
    return lines


def draw_figure(counts, results, of_all, path):
    """Accuracy over labelled rows: a line per strategy, mean of the seeds, with their standard deviation as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for strategy, curves in results.items():
        mean, deviation = curves.mean(axis=0), curves.std(axis=0, ddof=1) if len(curves) > 1 else 0
        axes.plot(counts, mean, label=strategy)
        axes.fill_between(counts, mean - deviation, mean + deviation, alpha=0.15)
    axes.axhline(of_all - POINTS, color="gray", linestyle="--", label=f"all rows, less {POINTS} points")
    axes.set(xlabel="labelled rows", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    with complete_file(path, "wb") as file:
        figure.savefig(file, dpi=100, format=path.rsplit(".", 1)[1])


def main():
    args = parse_arguments()
    check_output_folder(args.output_dir, "--output_dir")
    if args.figure:
        check_output(args.figure, [os.path.join(args.source_dir, name) for name in FILES], args.source_dir)
    train, test, labels = read_rows(args)
    vectors, test_vectors = make_vectors(args, train[0], test[0])
    if args.held_out:
        train, test, vectors, test_vectors = hold_out(args.held_out, train, vectors)
    results, tuned = {}, {}
    with threadpool_limits(1):  # short calls: more threads only wait for each other
        answer = fit_logistic(vectors, train[1], len(labels), args.strength)
        of_all = 100 * float((answer(test_vectors).argmax(axis=1) == test[1]).mean())
        for strategy in args.strategies:
            curves = []
            for seed in args.seeds:
                counts, accuracies, rows = label_in_rounds(args, strategy, seed, train, vectors, test, test_vectors)
                curves.append(accuracies)
                if args.fine_tune:
                    tuned.setdefault(strategy, []).append(fine_tune(args, strategy, seed, train, test, labels, rows))
            results[strategy] = np.array(curves)
            get_logger().info(f"{strategy}: {len(counts)} rounds, {len(args.seeds)} seeds")
    os.makedirs(args.output_dir, exist_ok=True)
    with complete_file(os.path.join(args.output_dir, "results.tsv")) as file:
        file.write("strategy\tseed\t" + "\t".join(map(str, counts)) + "\n")
        for strategy, curves in results.items():
            for seed, curve in zip(args.seeds, curves):
                file.write(f"{strategy}\t{seed}\t" + "\t".join(f"{accuracy:.2f}" for accuracy in curve) + "\n")
    if args.figure:
        draw_figure(counts, results, of_all, args.figure)
    print("\n".join(make_table(counts, results, tuned, of_all, len(train[0]))))


if __name__ == "__main__":
    run_script(main)
