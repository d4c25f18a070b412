"""analysis/results_table.py: one command trains, prunes and measures; it goes on where it was stopped; wrong input."""

import json
import shutil

import export_model
import train
from analysis import results_table
from helpers import assert_user_error, make_model, read_lines, run, run_here


def test_the_table_is_made_once_and_goes_on_where_it_was_stopped(tiny_data, tmp_path, monkeypatch):
    small, narrow = make_model(tmp_path / "small"), make_model(tmp_path / "narrow", hidden_size=24, num_hidden_layers=1)
    words = ["analysis/results_table.py", "--data_dir", tiny_data, "--output_dir", tmp_path / "out", "--models", small, narrow,
             "--prune_model", small, "--width_mult_list", "1/2", "--learning_rate", "3e-3", "--num_train_epochs", 3,
             "--prune_epochs", 1, "--device", "cpu", "--max_seq_length", 64, "--report_to", "none"]
    process = run(*words)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.strip().split("\n")
    assert [line.split()[2] for line in lines if line.startswith("+ python")] == [
        "train.py", "export_model.py", "prune.py", "train.py", "export_model.py"]
    table = [line.strip("| ").split(" | ") for line in read_lines(tmp_path / "out/results.md")]
    assert [row[:2] for row in table[2:]] == [["small", "2-layer, 48-hidden, 12-heads"],
                                              ["narrow", "1-layer, 24-hidden, 12-heads"],
                                              ["small + prune (1/2)", "2-layer, 48-hidden, 6-heads"]]
    assert lines[-5:] == read_lines(tmp_path / "out/results.md")
    for row, folder in zip(table[2:4], ("small", "narrow")):
        results = json.loads((tmp_path / "out" / folder / "eval_results.json").read_text())
        assert row[2] == f"{results['eval_accuracy'] * 100:.2f}" and float(row[3]) > 0

    # stopped: one training is unfinished, one export is missing
    shutil.rmtree(tmp_path / "out/narrow/export")
    for path in (tmp_path / "out/small").iterdir():
        if path.is_file() and path.name != "options.json":
            path.unlink()
    commands = []

    def run_script_here(script, *options):
        commands.append((script, options))
        process = run_here({"train.py": train, "export_model.py": export_model}[script].main, *options)
        assert process.returncode == 0, process.stderr

    monkeypatch.setattr(results_table, "run", run_script_here)
    again = run_here(results_table.main, *words[1:])
    assert again.returncode == 0, again.stderr
    assert [script for script, _ in commands] == ["train.py", "export_model.py"]
    assert "--resume_from_checkpoint" in commands[0][1] and "--overwrite_output_dir" not in commands[0][1]
    changed = run_here(results_table.main, *words[1:], "--seed", 4, "--output_dir", shutil.copytree(
        tmp_path / "out", tmp_path / "copy"))
    assert_user_error(changed, "options.json: this folder was made with other options")


def test_wrong_input_is_refused_before_the_first_training(tiny_data, tiny_model, tmp_path):
    common = ["--data_dir", tiny_data, "--output_dir", tmp_path / "out"]
    for more, *parts in ((["--models", tiny_model, "--prune_model", "ernie-3.0-nano-zh"], "is none of --models"),
                         (["--models", tiny_model, tiny_model], "two are called"),
                         (["--models", tiny_model, "--output_dir", tiny_model], "is the model"),
                         (["--models", tiny_model, tmp_path / "no"], "no: no such folder"),
                         (["--models", tiny_model, "--prune_model", tiny_model, "--width_mult_list", "x"], "x: not a fraction"),
                         (["--models", tiny_model, "--data_dir", tmp_path], "label.txt: file not found",
                          "train.txt: file not found")):
        assert_user_error(run_here(results_table.main, *common, *more), *parts)
    assert not (tmp_path / "out").exists()
