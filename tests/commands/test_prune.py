"""prune.py: every width has its own shape and stands alone; held-out rows, other strategies, two processes, refusals."""

import json
import os
import re

import numpy as np
import pytest

from helpers import (
    GRAPH,
    ROOT,
    assert_paths_agree,
    assert_user_error,
    launch,
    needs_paddle_2,
    read_lines,
    run,
    run_here,
    thousand_texts,
    weights,
    write_lines,
)
from prune import hold_out, main, parse_widths
from textcls.common.errors import UserError
from textcls.models.paddle_setup import PADDLE_3

DATA = ROOT / "data"
LEARNING = ["--learning_rate", "3e-4", "--weight_decay", "0.5"]
WIDTHS = {"0.75": 9, "0.67": 8, "0.5": 6}  # folder: heads that are left of 12
FILES = {*(f"pruned_model{ending}" for ending in GRAPH), "model_state.pdparams", "config.json",
         "tokenizer.json", "tokenizer_config.json", "vocab.txt", "label.txt", "deploy.json", "MODEL_CARD.md", "MODEL_CARD_en.md"}


def options(checkpoint, output, *more, data=DATA, steps=6):
    return ["prune.py", "--device", "cpu", "--dataset_dir", data, "--params_dir", checkpoint, "--output_dir", output,
            "--max_steps", steps, "--logging_steps", 1, *more]


def prune(*arguments, **keywords):
    process = run(*options(*arguments, **keywords))
    assert process.returncode == 0, process.stderr
    return process


def table(process):
    """{first column: [parameters, size, accuracy, macro-F1, ms]} of the table that ends a run."""
    lines = process.stdout[process.stdout.index("width "):].split("\n")[1:]
    rows = [re.fullmatch(r"(\S+) +([\d,]+) +([\d.]+) +([\d.]+) % +([\d.]+) +([\d.]+)", line) for line in lines if line.strip()]
    return {row[1]: [float(value.replace(",", "")) for value in row.groups()[1:]] for row in rows}


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory):
    """(output folder, finished process) of a run that is shorter than --save_steps."""
    folder = tmp_path_factory.mktemp("prune")
    return folder, prune(checkpoint, folder, "--width_mult_list", "3/4", "2/3", "1/2", *LEARNING, "--onnx")


def graph_accuracy(prefix, folder):
    """Dev accuracy in percent of a graph, from the files beside it alone."""
    from tokenizers import Tokenizer

    from textcls.export.deployment import open_graph, run_graph

    tokenizer, labels = Tokenizer.from_file(str(folder / "tokenizer.json")), read_lines(folder / "label.txt")
    predictor, rows = open_graph(str(prefix)), [line.split("\t") for line in read_lines(DATA / "dev.txt")]
    right = [labels[run_graph(predictor, np.array([tokenizer.encode(text).ids], np.int64))[0].argmax()] == label
             for text, label in rows]
    return 100 * sum(right) / len(right)


def test_every_width_is_complete_has_its_own_shape_and_the_accuracy_of_the_table(pruned, checkpoint):
    folder, process = pruned
    assert sorted(os.listdir(folder)) == sorted(f"width_mult_{width}" for width in WIDTHS)  # no staging folder
    rows = table(process)
    assert list(rows) == ["1", *WIDTHS]
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.pickle_guard import guard_paddle_load

    guard_paddle_load()
    from textcls.models.paddle_setup import paddle

    whole = paddle.load(str(checkpoint / "model_state.pdparams"), return_numpy=True)
    assert rows["1"][0] == sum(value.size for value in whole.values())
    for width, heads in WIDTHS.items():
        width_folder = folder / f"width_mult_{width}"
        assert set(os.listdir(width_folder)) >= FILES
        state = paddle.load(str(width_folder / "model_state.pdparams"), return_numpy=True)
        assert state["ernie.encoder.layers.1.self_attn.q_proj.weight"].shape == (48, 48 * heads // 12)
        assert state["ernie.encoder.layers.0.linear2.weight"].shape == (96 * heads // 12, 48)
        assert rows[width][0] == sum(value.size for value in state.values())
        deploy = json.loads((width_folder / "deploy.json").read_text())
        assert deploy["model_file"] == f"pruned_model{GRAPH[0]}" and deploy["input_names"] == ["input_ids", "token_type_ids"]
        assert deploy["temperature"] != 1 and "threshold" not in deploy
        card = (width_folder / "MODEL_CARD_en.md").read_text(encoding="utf-8")
        assert f"| Accuracy | {rows[width][2]:.2f} % |" in card and f"width\\_mult {width}" in card
        assert rows[width][2] == pytest.approx(graph_accuracy(width_folder / "pruned_model", width_folder), abs=0.01)
    assert rows["1"][2] > 50 and rows["0.75"][2] > rows["1"][2] - 15
    assert rows["1"][0] > rows["0.75"][0] > rows["0.67"][0] > rows["0.5"][0]
    assert "global step 6," in process.stderr and "global step 7," not in process.stderr
    with pytest.raises(UserError, match="width_mult_0.5: a pruned model, which can only be deployed"):
        load_checkpoint(str(folder / "width_mult_0.5"))


def test_a_width_is_the_same_where_the_whole_table_of_embeddings_is_trained(pruned, checkpoint, tmp_path):
    folder, process = pruned
    again = prune(checkpoint, tmp_path, "--width_mult_list", "3/4", "2/3", "1/2", *LEARNING, "--full_embeddings")
    assert re.search(r"Word embeddings: trains the [\d,]+ of [\d,]+ rows", process.stderr)
    assert "Word embeddings" not in again.stderr
    for width in WIDTHS:
        first, second = weights(folder / f"width_mult_{width}"), weights(tmp_path / f"width_mult_{width}")
        assert first.keys() == second.keys()
        for name, value in first.items():
            if not name.endswith("k_proj.bias"):  # whose gradient is rounding alone
                np.testing.assert_allclose(value, second[name], atol=2e-5, err_msg=name)


def test_every_width_agrees_with_its_onnx_model_on_a_thousand_texts(pruned):
    for width in WIDTHS:
        assert_paths_agree(pruned[0] / f"width_mult_{width}" / "pruned_model", thousand_texts(), DATA / "dev.txt",
                           least=0.98, allow_accuracy_drop=True)  # after 6 steps many texts lie between two classes


def test_training_rows_are_held_out_in_every_class(pruned):
    assert "121 of 1210 training rows are held out" in pruned[1].stderr
    label_ids = np.array([0] * 40 + [1] * 7 + [2] * 2 + [3])
    held = hold_out(label_ids, 3)
    assert np.bincount(label_ids[held], minlength=4).tolist() == [4, 1, 1, 0]
    assert (held == hold_out(label_ids, 3)).all() and (held != hold_out(label_ids, 4)).any()


def test_another_importance_file_and_a_width_again(checkpoint, pruned, tmp_path):
    for name in ("train.txt", "dev.txt", "label.txt"):
        write_lines(tmp_path / name, read_lines(DATA / name))
    write_lines(tmp_path / "important.txt", read_lines(DATA / "test.txt")[:33])
    (tmp_path / "out/width_mult_0.5").mkdir(parents=True)
    (tmp_path / "out/width_mult_0.5/pruned_model.onnx").write_text("of an earlier run")
    (tmp_path / "out/width_mult_0.5/deploy.json").write_text("{}")
    again = ["--importance_file", "important.txt", "--width_mult_list", "0.5"]
    process = run_here(main, *options(checkpoint, tmp_path / "out", *again, data=tmp_path)[1:])
    assert_user_error(process, "width_mult_0.5: holds a model of an earlier run, expected another --output_dir, or --overwrite")
    process = prune(checkpoint, tmp_path / "out", *again, "--overwrite_output_dir", data=tmp_path)
    assert "held out" not in process.stderr.replace("held-out rows", "")
    assert not (tmp_path / "out/width_mult_0.5/pruned_model.onnx").exists()
    assert set(os.listdir(tmp_path / "out/width_mult_0.5")) >= FILES


def test_ernie_m_is_pruned_and_its_padding_stays_masked(ernie_m, tmp_path):
    process = prune(ernie_m / "checkpoint", tmp_path, "--width_mult_list", "1/2", data=ernie_m)
    rows, deploy = table(process), json.loads((tmp_path / "width_mult_0.5/deploy.json").read_text())
    assert deploy["input_names"] == ["input_ids"] and rows["0.5"][2] > 70
    assert (tmp_path / "width_mult_0.5/sentencepiece.bpe.model").exists()
    from textcls.export.deployment import open_graph, run_graph

    predictor = open_graph(str(tmp_path / "width_mult_0.5/pruned_model"))
    alone = run_graph(predictor, np.array([[0, 9, 8, 2]]))
    np.testing.assert_allclose(run_graph(predictor, np.array([[0, 9, 8, 2, 1, 1, 1]])), alone, atol=1e-4)


@needs_paddle_2
@pytest.mark.parametrize("strategy, graphs", [
    ("dynabert+qat+embeddings", ["0.75", "0.75/int8", "0.75/quant_emb", "0.5", "0.5/int8", "0.5/quant_emb"]),
    ("dynabert+ptq+embeddings", [f"{width}{graph}" for width in ("0.75", "0.5")
                                 for graph in ("", "/mse8_1/int8", "/mse8_1/quant_emb")]),
    ("ptq", ["mse8_1/int8"]),
])
def test_other_strategies(checkpoint, tmp_path, strategy, graphs):
    process = prune(checkpoint, tmp_path, "--strategy", strategy, "--width_mult_list", "3/4", "1/2", "--algo_list", "mse",
                    "--batch_size_list", 8, steps=2)
    rows = table(process)
    assert sorted(rows) == sorted(["1", *graphs])
    assert not (tmp_path / ".staging").exists()
    for name in graphs:
        width = name.split("/")[0]
        assert rows[name][2] > rows[width if width in rows else "1"][2] - 15  # all graphs run, and as well as their model
        folder = tmp_path / (f"width_mult_{name}" if name[0] == "0" else name)
        folder = folder if folder.is_dir() else folder.parent
        assert {"deploy.json", "tokenizer.json", "label.txt"} <= set(os.listdir(folder))


@pytest.mark.skipif(not PADDLE_3, reason="Paddle 2 quantizes")
def test_paddle_3_refuses_to_quantize(checkpoint, tmp_path):
    process = run_here(main, *options(checkpoint, tmp_path / "out", "--strategy", "ptq")[1:])
    assert_user_error(process, "--strategy ptq: PaddleSlim 2.6 can quantize graphs of Paddle 2 only", "--use_quantize")
    assert os.listdir(tmp_path) == []


def test_two_processes_prune(checkpoint, tmp_path):
    process = launch(*options(checkpoint, tmp_path / "out", "--width_mult_list", "3/4", "1/2", "--save_steps", 3, "--verbose"),
                     log_dir=tmp_path / "log")
    assert process.returncode == 0, process.stdout + process.stderr
    logs = [(tmp_path / f"log/workerlog.{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    held_out = [re.findall(r"held-out rows, loss: (\S+), acc", log) for log in logs]
    assert len(held_out[0]) == 1 + 2 * 2 and held_out[0] == held_out[1]  # the ranks agree on what is best
    assert set(os.listdir(tmp_path / "out")) == {"width_mult_0.75", "width_mult_0.5"}
    assert set(os.listdir(tmp_path / "out/width_mult_0.5")) >= FILES


def test_two_runs_do_not_share_an_output_folder(tmp_path):
    from textcls.common.outputs import lock_folder

    lock_folder(tmp_path)
    with pytest.raises(UserError, match="another run is writing there"):
        lock_folder(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text, wrong", [
    ("0.7", "0.7 of 12 heads is not a whole number"), ("__import__('os').mkdir('owned')", "not a fraction or decimal"),
    ("1/0", "not a fraction"), ("3/2", "1.5 of 12 heads"), ("1", "1 of 12 heads"), ("0", "0 of 12 heads"), ("", "not a fraction"),
    ("0.5", "named twice"), ("nan", "not a fraction"), ("1e999999999", "not a fraction"), ("0.000001", "of 12 heads"),
])
def test_widths_are_parsed_not_evaluated(text, wrong):
    assert parse_widths(["3/4", "2/3", "0.5", "5/12"], 12) == [0.75, 2 / 3, 0.5, 5 / 12]
    with pytest.raises(UserError, match=wrong):
        parse_widths(["1/2", text], 12)


@pytest.mark.parametrize("more, parts", [
    (["--width_mult_list", "0.7"], ["--width_mult_list 0.7: 0.7 of 12 heads", "expected some of 1/12,", "3/4, 5/6, 11/12"]),
    (["--strategy", "magic"], ["--strategy: invalid choice: 'magic'"]),
    (["--gradient_accumulation_steps", "2"], ["--gradient_accumulation_steps"]),
    (["--strategy", "ptq", "--algo_list", "foo"], ["--algo_list foo: unknown, expected one of mse, KL"]),
    (["--importance_file", "no.txt"], ["no.txt: file not found"]),
])
def test_wrong_options_are_refused_and_nothing_is_written(checkpoint, tmp_path, more, parts):
    assert_user_error(run_here(main, *options(checkpoint, tmp_path / "out", *more)[1:]), *parts)
    assert os.listdir(tmp_path) == []


def test_a_refusal_in_a_process_of_its_own(checkpoint, tmp_path):
    assert_user_error(run(*options(checkpoint, tmp_path / "out", "--width_mult_list", "0.7")), "--width_mult_list 0.7")
    assert os.listdir(tmp_path) == []
