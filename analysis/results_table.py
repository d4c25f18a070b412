"""Train several models on one data set, prune one of them, and print the table of all: structure, accuracy, latency.

    python analysis/results_table.py --data_dir KUAKE_QIC --device gpu
    python analysis/results_table.py --data_dir data --models data zh_bert --prune_model zh_bert --num_train_epochs 3

Without --models: the six ERNIE models of the guide's table, and ERNIE 3.0 Medium pruned to three widths. Options not listed by
--help go to train.py. Every command is printed as it runs.

Reads   data_dir/train.txt, dev.txt, label.txt; the models, downloaded by their names or folders.
Writes  output_dir/NAME/: the checkpoint, its export/ and, of the pruned one, prune/width_mult_X/; output_dir/results.md.
        What is finished is not done again, and a training that was stopped goes on from its last checkpoint.
"""

import os
from fractions import Fraction

from textcls.analysis.comparison import Compared, time_models
from textcls.analysis.experiments import check_options, model_files, run
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import get_logger
from textcls.common.options import make_parser, parse_widths, positive_int, seed_number
from textcls.common.outputs import check_output_folder, complete_file, lock_folder
from textcls.data.files import check_splits, read_json, read_labelled, read_labels
from textcls.models.built_in import BUILT_IN_MODELS
from textcls.models.configs import read_config
from textcls.runtime.onnx_session import check_gpu_build
from textcls.runtime.predictor import Predictor
from textcls.training.scoring import score

GUIDE = ("ernie-1.0-large-zh-cw", "ernie-3.0-base-zh", "ernie-3.0-medium-zh", "ernie-3.0-mini-zh", "ernie-3.0-micro-zh",
         "ernie-3.0-nano-zh")
PRUNED = "ernie-3.0-medium-zh"
FILES = ("train.txt", "dev.txt", "label.txt")
# options that another run in the same folder may not change
KEPT = ("learning_rate", "num_train_epochs", "early_stopping_patience", "prune_epochs", "seed", "train_options")
BATCH = 32  # of the latency, as in the guide


def parse_arguments():
    parser = make_parser(__doc__, epilog="Options not listed here go to train.py.")
    parser.add_argument("--data_dir", default="./data/", help="folder of train.txt, dev.txt and label.txt")
    parser.add_argument("--models", nargs="+", default=list(GUIDE), help="built-in names or model folders")
    parser.add_argument("--prune_model", help=f"which of them is pruned; None: {PRUNED} if it is among them")
    parser.add_argument("--width_mult_list", nargs="+", default=["3/4", "2/3", "1/2"], help="widths, as for prune.py")
    parser.add_argument("--output_dir", default="build/results_table", help="folder of all models and of the table")
    parser.add_argument("--device", help="of the trainings, as for train.py; None: the GPU if there is one")
    parser.add_argument("--latency_device", choices=["cpu", "gpu"], default="cpu", help="of the latency, by ONNX Runtime")
    parser.add_argument("--learning_rate", default="3e-5", help="as for train.py and prune.py")
    parser.add_argument("--num_train_epochs", type=positive_int, default=100, help="at most, as for train.py")
    parser.add_argument("--early_stopping_patience", type=positive_int, default=4, help="as for train.py")
    parser.add_argument("--prune_epochs", type=positive_int, default=10, help="as --num_train_epochs of prune.py")
    parser.add_argument("--seed", type=seed_number, default=3, help="as for train.py and prune.py")
    args, args.train_options = parser.parse_known_args()
    names = [model_name(model) for model in args.models]
    if len(set(names)) < len(names):
        parser.error(f"--models: two are called {max(names, key=names.count)}, expected folders of different names")
    if args.prune_model is None and PRUNED in args.models:
        args.prune_model = PRUNED
    if args.prune_model not in (None, *args.models):
        parser.error(f"--prune_model {args.prune_model}: is none of --models, expected one of {', '.join(args.models)}")
    return args


def model_name(model):
    """The name of a model's row and folder."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model


def read_data(data_dir):
    """Check the data files before anything is trained. Returns dev: (texts, label ids int64 [num_texts]). UserError."""
    problems, paths = Problems(), [os.path.join(data_dir, name) for name in FILES]
    labels = read_labels(paths[2], problems)
    train, dev = (read_labelled(path, labels if not problems.count else [], problems, paths[2]) for path in paths[:2])
    if not problems.count:
        check_splits(*paths[:2], train, dev, labels, problems)
    problems.report()
    return dev


def check_models(models, pruned, widths):
    """UserError where a model cannot be found, or the one that is pruned (None: none) has no such widths."""
    for model in models:
        if not os.path.isdir(model) and model not in BUILT_IN_MODELS:
            raise UserError(f"--models {model}: no such folder, expected a model folder or one of {', '.join(BUILT_IN_MODELS)}")
        config = read_config(model) if os.path.isdir(model) else {}
        if model == pruned and (config or model == PRUNED):  # what others have is known when they are downloaded
            parse_widths(widths, config.get("num_attention_heads", 12))


def train_and_export(args, model, folder):
    """Train a model in a folder and export it, as far as that is not done."""
    device = ["--device", args.device] if args.device else []
    if not os.path.isfile(os.path.join(folder, "trainer_state.json")):  # the last that train.py writes
        begun = os.path.isdir(folder) and any(name.startswith("checkpoint-") for name in os.listdir(folder))
        resume = ["--resume_from_checkpoint", folder] if begun else ["--overwrite_output_dir"]
        run("train.py", "--model_name_or_path", model, "--data_dir", args.data_dir, "--output_dir", folder, *device,
            "--learning_rate", args.learning_rate, "--num_train_epochs", args.num_train_epochs, "--early_stopping_patience",
            args.early_stopping_patience, "--per_device_train_batch_size", BATCH, "--per_device_eval_batch_size", BATCH, "--seed",
            args.seed, "--do_train", "--do_eval", "--metric_for_best_model", "accuracy", "--load_best_model_at_end",
            "--evaluation_strategy", "epoch", "--save_strategy", "epoch", "--save_total_limit", 1, *resume, *args.train_options)
    export = os.path.join(folder, "export")
    if not os.path.isfile(os.path.join(export, "deploy.json")):
        run("export_model.py", "--params_path", folder, "--output_path", export, "--onnx")
    return export


def prune_widths(args, folder):
    """Prune a trained model to all widths, as far as that is not done. Returns the folders of the widths: list of str."""
    output = os.path.join(folder, "prune")
    folders = [os.path.join(output, f"width_mult_{round(float(Fraction(width)), 2)}") for width in args.width_mult_list]
    if not all(os.path.isfile(os.path.join(one, "deploy.json")) for one in folders):
        run("prune.py", "--dataset_dir", args.data_dir, "--params_dir", folder, "--output_dir", output, "--onnx", "--seed",
            args.seed, "--learning_rate", args.learning_rate, "--num_train_epochs", args.prune_epochs, "--width_mult_list",
            *args.width_mult_list, "--overwrite_output_dir", *(["--device", args.device] if args.device else []))
    return folders


def describe_structure(folder, width=1):
    """Layers, hidden size and heads of a checkpoint, in the guide's words. width: share of the heads that are left."""
    config = read_json(os.path.join(folder, "config.json"))
    heads = round(config["num_attention_heads"] * width)
    return f"{config['num_hidden_layers']}-layer, {config['hidden_size']}-hidden, {heads}-heads"


def make_models(args):
    """Train, prune and export everything. Returns the rows of the table: list of (name, structure, exported folder)."""
    rows, pruned = [], []
    for number, model in enumerate(args.models, 1):
        name = model_name(model)
        folder = os.path.join(args.output_dir, name)
        get_logger().info(f"{name}: {number} of {len(args.models)}")
        export = train_and_export(args, model, folder)
        rows.append((name, describe_structure(folder), export))
        if model == args.prune_model:
            for width, own in zip(args.width_mult_list, prune_widths(args, folder)):
                pruned.append((f"{name} + prune ({width})", describe_structure(folder, float(Fraction(width))), own))
    return rows + pruned


def make_table(args, rows, dev):
    """Measure all models on dev, in turns. Returns the lines of a Markdown table."""
    texts, label_ids = dev
    predictors = [Predictor(folder, device=args.latency_device, batch_size=BATCH) for _, _, folder in rows]
    models = [Compared(name, "ONNX", predictor.labels, predictor.probabilities)
              for (name, _, _), predictor in zip(rows, predictors)]
    accuracies = [score(label_ids, model.answer(texts))["accuracy"] for model in models]
    lines = [f"| model_name | structure | Accuracy(%) | latency(ms), {args.latency_device} |", "| --- | --- | --- | --- |"]
    for (name, structure, _), accuracy, ms in zip(rows, accuracies, time_models(models, texts)):
        lines.append(f"| {name} | {structure} | {accuracy * 100:.2f} | {ms:.2f} |")
    return lines


def main():
    args = parse_arguments()
    check_output_folder(args.output_dir, "--output_dir", {
        "the data folder": args.data_dir, **{f"the model {model}": model for model in args.models}})
    if args.latency_device == "gpu":
        check_gpu_build("--latency_device")
    check_models(args.models, args.prune_model, args.width_mult_list)
    dev = read_data(args.data_dir)
    lock_folder(args.output_dir)
    args.data_dir, args.output_dir = os.path.abspath(args.data_dir), os.path.abspath(args.output_dir)
    args.models = [os.path.abspath(model) if os.path.isdir(model) else model for model in args.models]
    if args.prune_model and os.path.isdir(args.prune_model):
        args.prune_model = os.path.abspath(args.prune_model)
    for model in args.models:  # all before the first training
        check_options(os.path.join(args.output_dir, model_name(model)), {name: getattr(args, name) for name in KEPT},
                      [*(os.path.join(args.data_dir, name) for name in FILES), *model_files(model)])
    table = "\n".join(make_table(args, make_models(args), dev))
    with complete_file(os.path.join(args.output_dir, "results.md")) as file:
        file.write(table + "\n")
    print(table)


if __name__ == "__main__":
    run_script(main)
