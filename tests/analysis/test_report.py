"""analysis/report.py: everything on one page, agreeing with the scripts that it joins."""

import html
import json
import re

import pytest

from analysis import report, sent_interpret
from helpers import ROOT, assert_user_error, read_lines, run, run_here, write_lines

LABELS = read_lines(ROOT / "data/label.txt")


@pytest.fixture(scope="module")
def reported(checkpoint, tmp_path_factory):
    """(data folder, report folder) of a data set with two planted faults and a text that is HTML."""
    folder = tmp_path_factory.mktemp("report")
    train, dev = (read_lines(ROOT / "data" / name) for name in ("train.txt", "dev.txt"))
    text, label = train[0].split("\t")
    other = next(name for name in LABELS if name != label)
    write_lines(folder / "train.txt", [*train, f"{text}？\t{other}"])
    write_lines(folder / "dev.txt", [*dev, f"<b>感冒</b> & 发烧\t{LABELS[-1]}", f"<b>感冒</b> & 发烧？\t{LABELS[0]}"])
    write_lines(folder / "label.txt", LABELS)
    process = run("analysis/report.py", "--dataset_dir", folder, "--params_path", checkpoint, "--report_dir", folder / "report",
                  "--num_cases", 5, "--num_suspects", 7, "--num_uncovered", 9, "--cache_dir", folder / "cache", "--device", "cpu",
                  "--baseline")
    assert process.returncode == 0, process.stderr
    return folder, process


def section(page, name):
    return re.search(rf'<h2 id="{name}">.*?(?=<h2|</body>)', page, re.DOTALL).group()


def test_the_page_joins_all_parts(reported, checkpoint):
    folder, process = reported
    assert {path.name for path in (folder / "report").iterdir()} == {"report.html", "metrics.json", "confusion_matrix.png",
                                                                     "reliability.png", "risk_coverage.png"}
    page = (folder / "report/report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<b>感冒" not in page  # dev texts are text, not HTML
    assert "Baseline accuracy" in page

    metrics = json.loads((folder / "report/metrics.json").read_text(encoding="utf-8"))["dev"]
    wrong = metrics["size"] - sum(row[i] for i, row in enumerate(metrics["confusion_matrix"]))
    cases = section(page, "bad-cases")
    assert f"（{wrong} 条" in cases and cases.count('class="case"') == 5 and cases.count("<li>") == 5 * 3
    assert cases.count('<td class="text">') == wrong - 5
    for case in re.findall(r'<div class="text">(.*?)</div>', cases, re.DOTALL):
        text = html.unescape(re.sub(r"<[^>]+>", "", case))
        assert any(line.startswith(text + "\t") for line in read_lines(folder / "dev.txt")), text

    conflicts = section(page, "conflicts")
    rows = len(read_lines(folder / "train.txt"))
    assert "train:1<" in conflicts and f"train:{rows}<" in conflicts and "1.000" in conflicts
    suspects = section(page, "suspects")
    assert suspects.count('<td class="text">') == 7 and f"<td>{rows}</td>" in suspects  # the planted label
    uncovered = section(page, "uncovered")
    scores = [float(score) for score in re.findall(r"<td>(0\.\d{4})</td></tr>", uncovered)]
    assert len(scores) == 9 and scores == sorted(scores)


def test_the_nearest_rows_are_those_of_sent_interpret(reported, checkpoint, tmp_path):
    folder, _ = reported
    page = (folder / "report/report.html").read_text(encoding="utf-8")
    case = re.search(r'<div class="case">.*?</ol>', page, re.DOTALL).group()
    text = html.unescape(re.sub(r"<[^>]+>", "", re.search(r'<div class="text">(.*?)</div>', case, re.DOTALL).group(1)))
    write_lines(tmp_path / "texts.txt", [text])
    process = run_here(sent_interpret.main, "--dataset_dir", folder, "--params_path", checkpoint, "--interpret_input_file",
                  tmp_path / "texts.txt", "--interpret_result_file", tmp_path / "out.txt", "--jsonl_file", tmp_path / "out.jsonl",
                  "--cache_dir", folder / "cache", "--device", "cpu")
    assert process.returncode == 0, process.stderr
    assert "read from" in process.stderr  # the training features that report.py has cached
    found = json.loads(read_lines(tmp_path / "out.jsonl")[0])
    assert [int(line) for line in re.findall(r"train:(\d+)", case)] == [row["line"] for row in found["positive"]]
    assert f"<b>{found['predict_label']}</b>" in case


def test_what_is_wrong_is_said_before_anything_is_written(checkpoint, tmp_path):
    (tmp_path / "report").write_text("kept")
    write_lines(tmp_path / "train.txt", ["没有标签"])
    write_lines(tmp_path / "label.txt", LABELS)
    words = [report.main, "--dataset_dir", tmp_path, "--params_path", checkpoint, "--cache_dir", tmp_path / "cache"]
    process = run_here(*words, "--report_dir", tmp_path / "report")
    assert_user_error(process, f"{tmp_path}/report: is no folder, expected the name of one")
    assert (tmp_path / "report").read_text() == "kept"
    process = run_here(*words, "--report_dir", tmp_path / "new")
    assert_user_error(process, f"{tmp_path}/train.txt:1: no tab", f"{tmp_path}/dev.txt: file not found")
    assert not (tmp_path / "new").exists() and not (tmp_path / "cache").exists()
