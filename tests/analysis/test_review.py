"""analysis/review.py: journal, cards, requests and files, by HTTP from a server of its own; the page in test_review_page.py."""

import json
import re
import signal
import socket
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from analysis import review
from data import doccano, table
from helpers import ROOT, assert_user_error, open_url, read_lines, run_here, write_lines
from review_server import LABELS, Server, entries, make_data
from textcls.analysis.review_journal import Decisions, Journal, cohens_kappa, share_interval
from textcls.common.errors import UserError


@pytest.fixture
def start(tmp_path):
    """start(*options): a server on tmp_path/data, killed at the end."""
    servers = []

    def start(*options):
        folder = tmp_path / "data"
        servers.append(Server(folder if folder.exists() else make_data(folder), *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(server, its folder): every person gets every card."""
    folder = make_data(tmp_path_factory.mktemp("shared") / "data")
    server = Server(folder, "--overlap", 1)
    yield server, folder
    server.kill()


# ---------------------------------------------------------------- journal and figures


def test_a_journal_keeps_what_is_whole_and_sets_a_damaged_end_aside(tmp_path, suite_log):
    path = tmp_path / "review.jsonl"
    journal = Journal(str(path))
    for label in "ABC":
        journal.append("label", who="amy", role="train", text="头疼", before="A", after=label)
    with pytest.raises(UserError, match="another review.py is using it"):
        Journal(str(path))
    path.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="was moved, deleted or replaced"):  # not into a file that nobody finds
        journal.append("undo", who="amy", undoes=3)
    (tmp_path / "moved").rename(path)
    journal.close()
    whole = path.read_bytes()
    for end in (b'{"id": 4, "action": "lab', b"\xff\x00" * 20, b"\0" * 30 + b"\n"):
        path.write_bytes(whole + end)
        again = Journal(str(path))
        assert len(again.entries) == 3 and path.read_bytes() == whole
        again.append("undo", who="amy", undoes=3)
        again.close()
    assert "its last line is damaged" in suite_log.text
    assert (tmp_path / "review.jsonl.damaged").read_bytes().count(b"\n") == 3
    path.write_bytes(whole.rstrip(b"\n"))  # only the line end is missing
    again = Journal(str(path))
    again.append("skip", who="amy", role="train", text="牙疼", before=None, after=None)
    again.close()
    assert [entry["id"] for entry in entries(tmp_path)] == [1, 2, 3, 4]
    for wrong in (b"no journal\n", b'{"id": 1, "action": "keep", "who": "amy"}\n', b"[1]\n", b'{"id": 1, "action": "eval"}\n'):
        path.write_bytes(wrong + whole)
        with pytest.raises(UserError, match="review.jsonl:1: no entry of a journal"):
            Journal(str(path))
    for wrong in (b"a note\n", b"a note"):  # a file of something else is not touched
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="review.jsonl:1: no entry of a journal"):
            Journal(str(path))
        assert path.read_bytes() == wrong


def test_what_counts_of_several_decisions():
    def entry(number, action, who="amy", text="头疼", **content):
        return {"id": number, "time": "", "action": action, "who": who, "role": "train", "text": text, **content}

    def outcome(*given):
        decisions = Decisions(["A", "B"], given)
        [key] = decisions.stacks
        status, decision = decisions.outcome(key)
        return status, decision and decision.label is not None and decisions.names[decision.label]

    first, second = entry(1, "label", after="A"), entry(2, "label", after="B")
    assert outcome(first, second) == ("decided", "B")  # the same person: the last one
    assert outcome(first, second, entry(3, "undo")) == ("decided", "A")
    assert outcome(first, second, entry(3, "undo"), entry(4, "undo"), entry(5, "undo")) == ("open", None)
    assert outcome(first, {**second, "who": "bob"}) == ("conflict", None)
    assert outcome(first, {**second, "who": "bob"}, entry(3, "label", "eve", after="B", final=True)) == ("decided", "B")
    last_word = [first, {**second, "who": "bob"}, entry(3, "label", "bob", after="B", final=True)]
    assert outcome(*last_word, entry(4, "label", "eve", after="B")) == ("decided", "B")  # settled is settled
    assert outcome(*last_word, entry(4, "label", "eve", after="A")) == ("conflict", None)
    assert outcome(first, entry(2, "drop", "bob", after=None)) == ("conflict", None)
    assert outcome(first, entry(2, "skip", "bob", after=None)) == ("decided", "A")
    assert outcome(first, {**second, "who": "bob"}, entry(3, "skip", "bob", after=None)) == ("conflict", None)  # takes none back
    renamed = {"id": 2, "time": "", "action": "rename_label", "who": "bob", "before": "A", "after": "C"}
    assert outcome(first, renamed) == ("decided", "C")
    assert outcome(first, entry(2, "undo", "bob")) == ("decided", "A")  # nobody undoes what others did
    decided = Decisions(["C", "B"], [first, renamed])  # label.txt has the new name already
    assert decided.names == ["C", "B"] and decided.ids["A"] == 0
    decided = Decisions(["D", "B"], [first, renamed])  # a label.txt that has lost it
    assert decided.names == ["D", "B", "C"]


def test_kappa_and_interval_are_those_of_the_formulas():
    """Cohen 1960; Clopper and Pearson 1934: 0 of 150 is up to 1 - 0.025 ** (1 / 150)."""
    first, second = np.repeat([0, 0, 1, 1], [20, 5, 10, 15]), np.repeat([0, 1, 0, 1], [20, 5, 10, 15])
    assert cohens_kappa(first.tolist(), second.tolist()) == pytest.approx(0.4)  # 0.7 agree, 0.5 by chance
    assert cohens_kappa([1, 1], [1, 1]) == 1.0
    assert share_interval(0, 150) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 150)))
    assert share_interval(3, 3) == pytest.approx((1, 0.025 ** (1 / 3), 1))
    assert share_interval(2, 20) == pytest.approx((0.1, 0.01235, 0.31698), abs=1e-5)


# ---------------------------------------------------------------- the server


def test_cards_decisions_undo_and_a_killed_server(start, tmp_path):
    server, folder = start("--num_suspects", 30), tmp_path / "data"
    state = server.ask("state")[1]
    assert state["labels"][LABELS.index("医疗费用")] == {"name": "医疗费用", "pinyin": "yiliaofeiyong", "initials": "ylfy"}
    assert state["progress"]["train"] == [0, 30] and state["progress"]["duplicates"][1] and state["progress"]["data"] == [0, 12]
    card, seen = server.card(), []
    for number in range(30):
        answer = server.decide(card, "label" if number % 3 else "keep", label=card["candidates"][0][0])
        written = entries(folder)[-1]  # before the answer came
        assert (written["text"], written["who"]) == (card["text"], "amy")
        assert answer["own"] == number + 1 and card["key"] not in seen
        seen.append(card["key"])
        card = answer["card"]
        assert set(card) == {"key", "role", "text", "lines", "label", "labels", "candidates", "reason", "votes", "nearest",
                             "seen"}
        assert card["reason"].keys() <= {"kind", "probability", "lines"} and len(card["nearest"]) == 3
    drawn = [entry["kind"] for entry in entries(folder) if entry["action"] != "opened"].count("control")
    assert drawn == 3 == answer["estimate"]["count"]
    assert {"share", "low", "high"} <= answer["estimate"].keys()
    assert server.ask("undo")[1]["card"]["key"] == seen[-1]
    server.kill()
    with open(folder / "review.jsonl", "ab") as file:
        file.write(b'{"id": 33, "action": "la')  # as a loss of power leaves it
    server = start("--num_suspects", 10)
    assert server.ask("state")[1]["estimate"]["count"] <= 3  # what was read as a suspect row was not drawn at random
    assert "its last line is damaged" in server.log.read_text() and "Scores of the rows read from" in server.log.read_text()
    answer = server.ask("card")[1]
    assert answer["own"] == 29 and answer["card"]["key"] not in seen[:-1]
    for key in seen[-2::-1]:  # undone to the very first
        assert server.ask("undo")[1]["card"]["key"] == key
    answer = server.ask("undo")[1]
    assert (answer["card"], answer["own"]) == (None, 0)
    server.decide(server.card(), "skip")
    assert server.ask("state")[1]["skipped"] == 1 and server.card(kind="skipped")["key"] == seen[0]
    assert len(entries(folder)) == 1 + 30 + 30 + 1  # nothing was deleted


def test_two_persons_disagree_and_one_settles_it(shared):
    server, folder = shared
    cards = [server.card("amy")]
    for _ in range(9):
        cards.append(server.decide(cards[-1], who="amy", action="keep")["card"])
    by_key = {card["key"]: card for card in cards[:9]}
    dropped = server.card("bob")
    for action in ["drop"] + ["keep"] * 8:  # the other one gets the same cards, and does not see what was decided
        card = server.card("bob")
        assert card["votes"] == [] and card["label"] == by_key.pop(card["key"])["label"]
        answer = server.decide(card, action, "bob")
    [pair] = answer["agreement"]
    assert (pair["persons"], pair["count"], pair["agreed"]) == (["amy", "bob"], 9, 8 / 9) and pair["kappa"] < 1
    assert answer["people"] == 1
    process = run_here(review.main, "--dataset_dir", folder, "--journal", folder / "copy.jsonl", "--apply")
    assert process.returncode == 0, process.stderr
    copy = folder / "copy.jsonl"  # the command to go on with finds the same journal, and compares nothing where no model is
    assert f"analysis/review.py --dataset_dir {folder} --journal {copy} --params_path checkpoint_reviewed\n" in process.stderr
    status, answer = server.ask("decide", key=dropped["key"], action="keep", seen=0)
    assert (status, answer["stale"]) == (409, True)  # amy has decided on it: an older window cannot overwrite that
    for _ in range(2):  # putting it off takes no decision back
        assert server.decide(server.card("bob", "people"), "skip", "bob", kind="people")["people"] == 1
    card = server.card("eve", "people")
    assert card["key"] == dropped["key"] and dict(card["votes"]) == {"amy": LABELS[card["label"]], "bob": None}
    answer = server.decide(card, who="eve", action="label", label=1, final=True)
    assert answer["people"] == 0 and entries(folder)[-1]["final"] is True


def test_who_is_refused(shared):
    server, folder = shared
    before = (folder / "review.jsonl").read_bytes()
    card = server.card()
    decision = {"key": card["key"], "action": "keep"}
    for headers, status in (({"X-Review-Token": ""}, 401), ({"X-Review-Token": server.token[:-1]}, 401),
                            ({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1.evil.example"}, 403), ({"Host": ""}, 403),
                            ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
                            ({"Content-Type": "text/plain"}, 422)):
        assert server.ask("decide", headers, **decision)[0] == status, headers
    for wrong in ({"key": "train-0"}, {"action": "delete"}, {"action": "label"}, {"action": "label", "label": 11}, {"who": ""},
                  {"who": "a\tb"}, {"who": "x" * 41}, {"kind": "all files"}, {"file": "/etc/passwd"}, {"seconds": -1},
                  {"action": "label", "label": -1}):
        assert server.ask("decide", **{**decision, **wrong})[0] in (409, 422), wrong
    assert server.ask("decide", **decision, who="x" * 70000)[0] == 413
    for wrong in ("", "a\tb", "a==b", " a", LABELS[0], "a\u200b"):
        assert server.ask("label", name=wrong)[0] == 409, wrong
    assert (folder / "review.jsonl").read_bytes() == before
    with open_url(server.url) as response:
        page, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert server.token not in page and "感冒" not in page  # it holds nothing; all comes with the token
    assert not re.search(r'(src|href)="(?!data:)|https?://|innerHTML|{{', page)
    assert "default-src 'none'" in policy and re.search(r"script-src 'nonce-[\w-]+'", policy)
    for path in ("/docs", "/openapi.json", "/api/state"):
        with pytest.raises(urllib.error.HTTPError):
            open_url(server.url + path)
    ssh_tunnel = {"Host": "localhost:9999", "Origin": "http://localhost:9999"}
    assert server.ask("decide", ssh_tunnel, **decision)[0] == 200


def test_apply_renamed_labels_changed_files_and_export(start, tmp_path):
    make_data(tmp_path / "data")
    texts = [line.split("\t")[0] for line in read_lines(tmp_path / "data/train.txt")]
    header = "rank\tline\tscore\ttext\tlabel\tsuggested_label\tprobability"
    write_lines(tmp_path / "data/report.tsv", [header, *(f"1\t1\t0.9\t{text}\ta\tb\t0.5" for text in (texts[70], texts[7]))])
    known = [read_lines(tmp_path / "data" / name)[5].split("\t")[0] for name in ("train.txt", "dev.txt")]
    write_lines(tmp_path / "data/data.txt", known + read_lines(tmp_path / "data/data.txt"))  # nobody is to label these again
    server, folder = start("--suspects_file", "report.tsv"), tmp_path / "data"
    assert server.ask("state")[1]["progress"]["train"] == [0, 2] and server.ask("state")[1]["progress"]["data"] == [0, 12]
    assert [server.card(who, "train")["text"] for who in ("cat", "dan")] == [texts[70], texts[7]]
    first = server.card(kind="duplicates")
    server.decide(first, "label", label=LABELS.index("其他"))
    second = server.card(kind="duplicates")
    server.decide(second, "drop")
    unlabelled = server.card(kind="data")
    added = server.ask("label", name="新的 标签")[1]["labels"][-1]
    assert added == {"name": "新的 标签", "pinyin": "xindebiaoqian", "initials": "xdbq"}
    server.decide(unlabelled, "label", label=len(LABELS))
    for name in ("其它", "其他"):  # there and back
        assert server.ask("label", name=name, label=LABELS.index("其他"))[0] == 200
    assert server.ask("label", name="其它", label=LABELS.index("其他"))[1]["labels"][LABELS.index("其他")]["name"] == "其它"
    texts = {name: (folder / name).read_bytes() for name in ("train.txt", "dev.txt", "data.txt", "label.txt")}
    status, applied = server.ask("apply")
    assert status == 200, applied
    assert [applied[name] for name in ("changed", "dropped", "labelled", "conflicts", "unmatched")] == [1, 1, 1, 0, 0]
    assert "python train.py --data_dir" in applied["commands"][0] and "--train_file train_reviewed.txt" in applied["commands"][0]
    assert {name: (folder / name).read_bytes() for name in texts} == texts  # the old files stay
    old, new = read_lines(folder / "train.txt"), read_lines(folder / "train_reviewed.txt")
    assert f"{first['text']}\t其它" in new and not any(line.startswith(second["text"] + "\t") for line in new)
    assert new[-1] == f"{unlabelled['text']}\t新的 标签" and len(new) == len(old) - len(second["lines"]) + 1
    assert not any(line.endswith("\t其他") for line in new + read_lines(folder / "dev_reviewed.txt"))
    assert unlabelled["text"] not in read_lines(folder / "data_reviewed.txt")
    assert read_lines(folder / "label_reviewed.txt") == [*LABELS[:-1], "其它", "新的 标签"]
    changes = [line.split("\t") for line in read_lines(folder / "review_changes.tsv")]
    assert [first["text"], LABELS[first["label"]], "其它", "amy"] in [row[2:6] for row in changes]
    status, refused = server.ask("apply")
    assert status == 409 and "there from before" in refused["error"]
    assert server.ask("apply", overwrite=True)[0] == 200
    # another program moves or changes a file underneath; then it is deleted
    (folder / "dev.txt").rename(folder / "moved.txt")
    assert "dev.txt: file not found, and it was there when" in server.ask("apply", overwrite=True)[1]["error"]
    (folder / "moved.txt").rename(folder / "dev.txt")
    write_lines(folder / "train.txt", [line for line in old if not line.startswith(first["text"] + "\t")])
    assert server.ask("card")[1]["changed_files"] == [str(folder / "train.txt")]
    assert server.ask("apply", overwrite=True)[1]["unmatched"] == 1
    assert ["not found"] in [line.split("\t")[7:] for line in read_lines(folder / "review_changes.tsv")]
    (folder / "train.txt").unlink()
    status, refused = server.ask("apply", overwrite=True)
    assert status == 409 and "train.txt: file not found, and there are decisions on its rows" in refused["error"]
    server.decide(server.card())  # decisions go on
    server.kill()
    write_lines(folder / "train.txt", old)
    # back by the converters
    for form, name, main, option in (("doccano", "out.jsonl", doccano.main, "--doccano_file"),
                                     ("label_studio", "out.json", table.main, "--table_file")):
        process = run_here(review.main, "--dataset_dir", folder, "--export", form, "--export_file", tmp_path / name)
        assert process.returncode == 0, process.stderr
        process = run_here(main, option, tmp_path / name, "--save_dir", tmp_path / form, "--splits", 1)
        assert process.returncode == 0, process.stderr
        wanted = {*new, *read_lines(folder / "dev_reviewed.txt")}
        assert set(read_lines(tmp_path / form / "train.txt")) == wanted
        assert len(read_lines(tmp_path / form / "data.txt")) == 11


def test_labelling_from_nothing(tmp_path):
    """Only texts and label names: clusters first, then the labels given suggest others."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [line.split("\t") for line in read_lines(ROOT / "data/train.txt")[:300]]
    rows = [row for row in rows if row[1] in ("医疗费用", "病因分析", "治疗方案")]
    truth = dict(rows)
    write_lines(folder / "data.txt", truth)
    names = ["医疗费用", "病因分析", "治疗方案"]
    write_lines(folder / "label.txt", names)
    server = Server(folder, "--overlap", 0)
    try:
        card = server.card()
        assert server.card("bob")["key"] != card["key"]  # what one has open the other does not get
        assert card["candidates"] == [] and card["label"] is None and card["nearest"] == []
        first = []
        for number in range(50):
            first += [truth[card["text"]]] if number < 10 else []
            card = server.decide(card, "label", label=names.index(truth[card["text"]]))["card"]
        assert set(first) == set(names)  # clusters: not one class after the other
        for _ in range(200):
            card = server.card()
            if card["candidates"]:
                break
            time.sleep(0.05)
        assert len(card["candidates"]) == 3 and card["nearest"]
        while not server.ask("card")[1]["rounds"]:
            time.sleep(0.05)
        applied = server.ask("apply")[1]
        assert applied["labelled"] == 50 and "--export doccano" in applied["commands"][0]
    finally:
        server.kill()
    reviewed = dict(line.split("\t") for line in read_lines(folder / "train_reviewed.txt"))
    assert len(reviewed) == 50 and all(truth[text] == label for text, label in reviewed.items())
    assert (folder / "data_reviewed.txt").exists()
    write_lines(folder / "data.txt", reviewed)  # all that is left has a label
    process = run_here(review.main, "--dataset_dir", folder, "--apply", "--overwrite")
    assert process.returncode == 0 and not (folder / "data_reviewed.txt").exists(), process.stderr


def test_refusals_at_the_start(tmp_path):
    def refused(*words, parts):
        assert_user_error(run_here(review.main, "--dataset_dir", tmp_path / "data", *words, cwd=tmp_path), *parts)

    folder = make_data(tmp_path / "data")
    labels = (folder / "label.txt").read_text(encoding="utf-8")
    (folder / "label.txt").unlink()
    refused(parts=["label.txt: file not found, expected a UTF-8 text file"])
    write_lines(folder / "label.txt", ["其他"])
    refused(parts=["label.txt: only one label, expected at least two labels"])
    (folder / "label.txt").write_text(labels, encoding="utf-8")
    refused("--train_file", "a", "--dev_file", "b", "--data_file", "c", parts=["none of a, b, c is there"])
    refused("--suspects_file", "dev.txt", parts=["dev.txt:1: not the header of a report of dirty.py"])
    refused("--params_path", tmp_path / "none", parts=["none"])
    refused("--overwrite", parts=["--overwrite: without effect, expected --apply with it"])
    refused("--compare_path", "x", parts=["--compare_path: nothing to compare with, expected --params_path"])
    refused("--journal", "/proc/review.jsonl", parts=["/proc/review.jsonl: cannot be written"])
    refused("--journal", folder / "train.txt", parts=["train.txt: is an input of this run"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused("--port", port, parts=[f"--port {port}: cannot listen on 127.0.0.1 (Address already in use)"])
    write_lines(folder / "review.jsonl", [json.dumps({"id": 1, "time": "", "action": "keep", "who": "a", "role": "train",
                                                      "text": "没有的话", "before": "其他", "after": "其他"})])
    refused(parts=["none of the 1 texts decided there is in these data files", "expected another --journal"])


def test_sigterm_ends_it(shared):
    server, _ = shared
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) in (0, 143, -signal.SIGTERM)
    assert "Traceback" not in server.log.read_text()


def test_words_are_shaded_and_a_second_model_is_compared(checkpoint, binary, tmp_path):
    """With a checkpoint: its answers, the words behind them, and dev before and after, with the file's and the decided labels."""
    folder = make_data(tmp_path / "data", 60)
    server = Server(folder, "--params_path", checkpoint, "--compare_path", binary[1], "--device", "cpu")
    try:
        card = server.card(kind="dev")
        words = server.ask("words", key=card["key"])[1]
        assert "".join(blanks + word for blanks, word, _ in words["words"]) == card["text"]
        assert words["prediction"] == card["candidates"][0][0] != card["label"]
        assert max(abs(shade) for _, _, shade in words["words"]) == 1
        server.decide(card, "label", label=words["prediction"])
        server.decide(server.card(kind="dev"), "drop")
        of_file, decided = server.ask("compare")[1]["splits"]
        rows = [line.split("\t") for line in read_lines(folder / "dev.txt")]
        assert (of_file["size"], decided["size"]) == (len(rows), len(rows) - 1)
        wrong = [round((1 - split["before"]["accuracy"]) * split["size"]) for split in (of_file, decided)]
        assert wrong[0] == wrong[1] + 2  # the model was right on one, the other is gone
        for split in (of_file, decided):
            low, high = split["before"]["intervals"]["accuracy"]
            assert low <= split["before"]["accuracy"] <= high
            change = (split["gained"] - split["lost"]) / split["size"]
            assert split["after"]["accuracy"] - split["before"]["accuracy"] == pytest.approx(change)
            assert split["difference"]["low"] <= change <= split["difference"]["high"]
            assert [len(split["went"]), len(split["came"])] == [split["gained"], split["lost"]]
            assert sum(row["count"] for row in split["per_class"]) == split["size"]
        assert of_file["lost"]  # the other model knows two classes only
    finally:
        server.kill()
