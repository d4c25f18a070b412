"""analysis/walkthrough.py: all conditions of one seed, on tiny data."""

import pytest

import train
from analysis import aug, dirty, sparse, walkthrough
from helpers import assert_user_error, read_lines, run, run_here
from textcls.common.errors import UserError

SCRIPTS = {"train.py": train.main, "analysis/dirty.py": dirty.main, "analysis/aug.py": aug.main,
           "analysis/sparse.py": sparse.main}


def test_its_scripts_run_in_processes_of_their_own(capsys):
    walkthrough.run("data/doccano.py", "--help")
    with pytest.raises(UserError, match="data/doccano.py failed, see its message above"):
        walkthrough.run("data/doccano.py", "--no_such_option")
    assert capsys.readouterr().out == "+ python data/doccano.py --help\n+ python data/doccano.py --no_such_option\n"


def test_one_seed(tiny_data, tiny_model, tmp_path, monkeypatch):
    def run_script_here(command, *options):  # nine imports of Paddle fewer
        assert run_here(SCRIPTS[command], *options).returncode == 0

    monkeypatch.setattr(walkthrough, "run", run_script_here)
    words = ["--source_dir", tiny_data, "--model_name_or_path", tiny_model, "--output_dir", tmp_path,
             "--seeds", 1, "--num_train_epochs", 1, "--device", "cpu"]
    process = run_here(walkthrough.main, *words)
    assert process.returncode == 0, process.stderr
    table = [line.split("\t") for line in read_lines(tmp_path / "results.tsv")]
    assert process.stdout.rstrip("\n").endswith("\n".join("\t".join(row) for row in table))
    rows = {row[0]: int(row[2]) for row in table[1:]}
    kept = len(read_lines(tiny_data / "train.txt")) - 22  # a tenth chooses the best epoch
    listed = round(0.2 * kept)
    assert list(rows) == ["clean", "noisy", "dropped", "relabelled", "augmented", "repeated", "half",
                          "half and support", "half and random"]
    assert [rows[name] for name in ("clean", "noisy", "dropped", "relabelled")] == [kept, kept, kept - listed, kept]
    assert kept < rows["augmented"] <= rows["repeated"] == 2 * kept
    assert rows["half"] == kept // 2 < rows["half and support"] == rows["half and random"] <= 1.2 * rows["half"] + 1

    def labels_of(name):
        return dict(line.split("\t") for line in read_lines(tmp_path / "seed-1" / name / "train.txt"))

    clean, noisy, relabelled = map(labels_of, ("clean", "noisy", "relabelled"))
    wrong = {text for text in clean if noisy[text] != clean[text]}
    assert 0.1 * kept < len(wrong) < 0.3 * kept  # the noise is planted before a tenth is taken away
    assert {text for text in clean if relabelled[text] != clean[text]} < wrong
    assert read_lines(tmp_path / "seed-1/clean/test.txt") == read_lines(tiny_data / "dev.txt")
    assert not {text for text in labels_of("augmented")} & {line.split("\t")[0] for line in read_lines(tiny_data / "dev.txt")}

    process = run("analysis/walkthrough.py", *words, "--noise", 0.3)
    assert_user_error(process, f"{tmp_path}/options.json: this folder was made with other options, data or another model")
