"""analysis/active.py: all strategies on tiny data, fine-tuning at the end, the cache of vectors, wrong input; diverse batches."""

import numpy as np
import pytest

import train
from analysis import active
from helpers import assert_user_error, make_model, read_lines, run_here
from textcls.analysis.features import normalize
from textcls.analysis.selection import RANDOM_SHARE, choose_diverse
from textcls.models.checkpoints import load_model
from textcls.models.configs import SentenceOptions
from textcls.models.paddle_setup import paddle


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A pretrained model without a head, of random weights."""
    folder = make_model(tmp_path_factory.mktemp("encoder") / "model", num_hidden_layers=1, num_attention_heads=4,
                        architectures=["ErnieModel"])
    model = load_model(str(folder), head="SentenceEncoder", sentence_options=SentenceOptions("mean", 0, []))
    paddle.save(model.state_dict(), str(folder / "model_state.pdparams"))
    return folder


def test_all_strategies_on_tiny_data(tiny_data, encoder, tmp_path, monkeypatch):
    trained = []

    def run_train_here(command, *options):  # an import of Paddle fewer
        assert command == "train.py" and run_here(train.main, *options).returncode == 0
        trained.append(options[options.index("--data_dir") + 1])

    monkeypatch.setattr(active, "run", run_train_here)
    words = ["--source_dir", tiny_data, "--encoder", encoder, "--output_dir", tmp_path / "out", "--seeds", 1, 2,
             "--first_rows", 40, "--round_rows", 30, "--max_rows", 120, "--device", "cpu", "--cache_dir", tmp_path / "cache"]
    process = run_here(active.main, *words, "--figure", tmp_path / "curve.png")
    assert process.returncode == 0, process.stderr
    table = [line.split("\t") for line in read_lines(tmp_path / "out/results.tsv")]
    assert table[0] == ["strategy", "seed", "40", "70", "100", "120"]
    assert [row[:2] for row in table[1:]] == [[name, seed] for name in active.STRATEGIES for seed in ("1", "2")]
    accuracies = {(row[0], row[1]): [float(cell) for cell in row[2:]] for row in table[1:]}
    assert all(0 < accuracy <= 100 for curve in accuracies.values() for accuracy in curve)
    assert accuracies["random", "1"][0] == accuracies["margin", "1"][0]  # the same rows at first
    assert accuracies["random", "1"] != accuracies["margin", "1"]
    printed = process.stdout.splitlines()
    assert printed[0].startswith("all 220 rows: ") and [line.split("\t")[0] for line in printed[2:]] == list(active.STRATEGIES)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")

    [cached] = (tmp_path / "cache").iterdir()
    made = cached.stat().st_mtime_ns
    again = run_here(active.main, *words, "--seeds", 2, "--strategies", "diverse", "--fine_tune", encoder,
                     "--num_train_epochs", 1)
    assert again.returncode == 0, again.stderr
    assert cached.stat().st_mtime_ns == made and f"read from {cached}" in again.stderr
    assert [line.split("\t") for line in read_lines(tmp_path / "out/results.tsv")][1] == table[-1]
    assert trained == [str(tmp_path / "out/diverse-seed-2")] and "fine-tuned" in again.stdout.splitlines()[1]
    rows = read_lines(tmp_path / "out/diverse-seed-2/train.txt")
    held_out = run_here(active.main, *words, "--seeds", 1, "--strategies", "review", "--held_out", 0.2)
    assert held_out.stdout.startswith("all 176 rows: ") and f"read from {cached}" in held_out.stderr
    assert len(set(rows)) == len(rows) == 120 and set(rows) <= set(read_lines(tiny_data / "train.txt"))


def test_a_diverse_batch_has_unlike_rows_and_random_ones():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(10, 16))
    vectors = normalize(np.repeat(directions, 30, axis=0) + 0.3 * rng.normal(size=(300, 16))).astype(np.float32)
    probs = np.full((300, 2), 0.5, np.float32)
    texts = [f"文本{number}" for number in range(300)]
    chosen = choose_diverse(texts, vectors, probs, 20, np.random.default_rng(1))
    assert len(set(chosen.tolist())) == 20
    assert len(set((chosen[:20 - round(RANDOM_SHARE * 20)] // 30).tolist())) == 10  # each direction is there
    like = np.repeat(vectors[:1], 300, axis=0)  # nothing to tell them apart by: the rest of the batch is random
    assert len(set(choose_diverse(["同一句话"] * 300, like, probs, 20, np.random.default_rng(1)).tolist())) == 20


def test_wrong_input_is_one_line(tiny_data, encoder, tmp_path):
    words = ["--source_dir", tiny_data, "--encoder", encoder, "--output_dir", tmp_path / "out", "--device", "cpu"]
    for more, message in (([], "220 rows to label, 55 to test with, expected more than --max_rows (3000)"),
                          (["--max_rows", 200, "--held_out", 0.001], "220 rows to label, 0 to test with, expected"),
                          (["--first_rows", 50, "--max_rows", 40], "--max_rows 40: expected --first_rows (50) or more"),
                          (["--strength", "nan"], "--strength nan: expected a number above 0"),
                          (["--figure", "curve.jpg"], "--figure curve.jpg: expected a name that ends with .png or .svg"),
                          (["--strategies", "entropy"], "argument --strategies: invalid choice: 'entropy'"),
                          (["--first_rows", 50, "--max_rows", 120, "--encoder", "no_such"], "no_such: no such folder, expected"),
                          (["--figure", tiny_data / "train.txt/a.png"], "train.txt/a.png: cannot be written in")):
        assert_user_error(run_here(active.main, *words, *more), message)
    assert not (tmp_path / "out").exists()
