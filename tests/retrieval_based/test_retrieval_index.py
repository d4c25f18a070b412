"""The index of retrieval_based/: search, votes, changes, damage."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import ROOT, assert_user_error, load_script, read_lines, run_here
from textcls.common.confidence import precision_bound
from textcls.common.errors import UserError
from textcls.common.known import auroc
from textcls.retrieval import predictor
from textcls.retrieval.changes import add_texts, remove_label, rename_label
from textcls.retrieval.fitting import fit
from textcls.retrieval.index import open_index
from textcls.retrieval.lexical import cosines, count_terms, idf_of_postings, weigh
from textcls.retrieval.nearest import WantedType, nearest
from textcls.retrieval.rows import label_texts, rows_of_means, rows_of_texts
from textcls.retrieval.search import (
    chunks,
    fuse,
    label_probabilities,
    label_similarities,
    lexical_nearest,
    make_answers,
    search,
    vote,
)
from textcls.retrieval.writing import memory_index, new_header, write_index

LABELS = read_lines(ROOT / "data/label.txt")
ROWS = [line.split("\t") for line in read_lines(ROOT / "data/train.txt")][:300]
DEV = [line.split("\t") for line in read_lines(ROOT / "data/dev.txt")]
TEXTS, IDS = [text for text, _ in ROWS], np.array([LABELS.index(label) for _, label in ROWS])
SIZE = 24


def unit(generator, *shape):
    vectors = generator.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def class_vectors(generator, label_ids):
    """Unit vectors that lie around one of their class."""
    vectors = unit(np.random.default_rng(9), 40, SIZE)[label_ids] + 0.8 * unit(generator, len(label_ids), SIZE)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS = class_vectors(np.random.default_rng(0), IDS)
QUERIES = class_vectors(np.random.default_rng(1), np.arange(40) % len(LABELS))
ENCODER = "0123456789abcdef"
change = load_script("retrieval_based", "index")


def make_index(folder, corpus="texts", dtype="float32", encoder_id=ENCODER):
    header = new_header(encoder_id, SIZE, corpus, [(label, []) for label in LABELS], dtype)
    if corpus == "labels":
        rows = rows_of_texts(unit(np.random.default_rng(2), len(LABELS), SIZE), range(len(LABELS)), LABELS)
    else:
        rows = (rows_of_means if corpus == "means" else rows_of_texts)(VECTORS, IDS, TEXTS)
    write_index(folder, memory_index(header, rows))
    return open_index(folder)


# ---- search


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 2e-2)])
def test_nearest_rows_are_those_of_brute_force_in_all_segments_without_removed_labels(tmp_path, dtype, error):
    make_index(tmp_path, dtype=dtype)
    new = unit(np.random.default_rng(3), 2, SIZE)
    add_texts(tmp_path, "新", ["新的", "更新的"], new)
    remove_label(tmp_path, LABELS[1])
    index = open_index(tmp_path)
    assert index.segments[0].vectors.dtype == dtype and index.labels == [LABELS[0], *LABELS[2:], "新"]
    expected = QUERIES @ np.concatenate([VECTORS, new]).T
    expected[:, np.flatnonzero(IDS == 1)] = -np.inf
    similarities, rows = nearest(index, QUERIES, 7)
    wanted = np.sort(expected, axis=1)[:, ::-1][:, :7]
    np.testing.assert_allclose(similarities, wanted, atol=error)
    if dtype == "float32":
        np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1, kind="stable")[:, :7])
    similarities, rows = nearest(index, QUERIES, 10_000)  # more than there are
    left = (IDS != 1).sum() + 2
    assert rows.shape[1] == len(TEXTS) + 2 and (rows[:, left:] == -1).all() and (rows[:, :left] >= 0).all()
    answers = make_answers(index, QUERIES, TEXTS[:40], top_k=100, num_nearest=3)
    assert all(sorted(label for label, _, _ in answer.top_k) == sorted(index.labels) for answer in answers)


def test_similarities_are_those_of_the_nearest_rows_whichever_half_has_found_a_label(tmp_path):
    index = make_index(tmp_path)
    index = index._replace(header={**index.header, "lexical": {**index.header["lexical"], "weight": 0.5}})
    similarities = label_similarities(index, QUERIES)
    answers = make_answers(index, QUERIES, TEXTS[100:140], top_k=6)
    for row, answer in enumerate(answers):
        assert [similarity for _, _, similarity in answer.top_k] == pytest.approx(
            [similarities[row, index.labels.index(label)] for label, _, _ in answer.top_k], abs=1e-5)


def test_equal_rows_come_in_their_order_however_many_there_are():
    vectors = np.repeat(unit(np.random.default_rng(4), 1, SIZE), 50, axis=0)
    index = memory_index(new_header("x", SIZE, "texts", [("a", []), ("b", [])]), rows_of_texts(vectors, [0, 1] * 25, ["同"] * 50))
    for k in (1, 7, 50):
        assert nearest(index, vectors[:2], k)[1].tolist() == [list(range(k))] * 2
        assert lexical_nearest(index, ["同", "同"], k)[1].tolist() == [list(range(k))] * 2


def test_lexical_cosines_are_those_of_scikit_learn():
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [text + " CT  检查" for text in TEXTS]
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
    expected = (vectorizer.fit_transform(texts) @ vectorizer.transform(texts[:50]).T).toarray().T
    index = memory_index(new_header("x", SIZE, "texts", [(label, []) for label in LABELS]), rows_of_texts(VECTORS, IDS, texts))
    postings = index.segments[0].postings
    idf = idf_of_postings(postings, len(texts))
    for text, right in zip(texts, expected):
        terms, counts = count_terms([text])
        np.testing.assert_allclose(cosines(terms, weigh(terms, counts, idf), postings, len(texts)), right, atol=1e-5)


@pytest.mark.parametrize("corpus", ["texts", "labels"])
def test_votes_are_those_of_the_formula(tmp_path, corpus):
    index = make_index(tmp_path, corpus)
    found = search(index, QUERIES, TEXTS[:40])
    votes = vote(index, found.similarities, found.rows, 5, 0.1)
    for similarities, rows, shares in zip(found.similarities, found.rows, votes):
        weights = {}
        for similarity, row in list(zip(similarities, rows))[:5]:
            weights.setdefault(index.row_labels[row], []).append(np.exp(similarity / 0.1))
        sums = {label: (sum if corpus == "texts" else max)(parts) for label, parts in weights.items()}
        if corpus == "texts":  # least_rows is 20
            sums = {label: total * max(1, 20 / (IDS == label).sum()) for label, total in sums.items()}
        expected = [sums.get(label, 0) / sum(sums.values()) for label in range(len(LABELS))]
        np.testing.assert_allclose(shares, expected, rtol=1e-4, atol=1e-7)
    probs = fuse(index, found)
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)


def test_hnsw_finds_the_rows_of_exact_search_and_skips_removed_ones(tmp_path):
    pytest.importorskip("usearch")
    generator = np.random.default_rng(5)
    ids = generator.integers(0, 40, 3000)
    vectors, labels = class_vectors(generator, ids), [(f"类{number}", []) for number in range(40)]
    rows = rows_of_texts(vectors, ids, [f"文{row % 97}" for row in range(3000)])
    index = memory_index(new_header("x", SIZE, "texts", labels), rows)
    wanted = WantedType("hnsw", {"connectivity": 16, "expansion": 100})
    assert write_index(tmp_path, index, wanted._replace(beyond=3000))["hnsw"] is None
    assert write_index(tmp_path, index, wanted)["hnsw"]["recall"] > 0.97
    queries = class_vectors(generator, np.arange(40))
    for removed in (None, "类7"):
        if removed:
            remove_label(tmp_path, removed)
        opened = open_index(tmp_path)
        assert opened.approximate is not None
        exact, found = (nearest(opened, queries, 10, exact=exact)[1] for exact in (True, False))
        assert np.mean([np.isin(row, other).mean() for row, other in zip(exact, found)]) > 0.97
        assert removed is None or 7 not in ids[found]


def test_hnsw_is_left_out_where_equal_rows_hide_the_others(tmp_path, suite_log):
    generator = np.random.default_rng(6)
    vectors = unit(generator, 1200, 16)
    vectors[:600] = vectors[0]
    rows = rows_of_texts(vectors, np.arange(1200) % 5, ["文"] * 1200)
    header = new_header("x", 16, "texts", [(str(label), []) for label in range(5)])
    header = write_index(tmp_path, memory_index(header, rows), WantedType("hnsw", {"connectivity": 2, "expansion": 1}))
    index = open_index(tmp_path)
    exact, found = (nearest(index, vectors[595:640], 10, exact=exact)[0] for exact in (True, False))
    assert header["hnsw"] is None and "this index is searched exactly" in suite_log.text
    np.testing.assert_array_equal(found, exact)


def test_settings_fitted_on_dev_make_fusion_no_worse_and_keep_the_wanted_precision():
    texts, ids = [text for text, _ in DEV], np.array([LABELS.index(label) for _, label in DEV])
    vectors = class_vectors(np.random.default_rng(6), ids) + unit(np.random.default_rng(7), len(ids), SIZE)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    header = new_header("x", SIZE, "texts", [(label, []) for label in LABELS])
    index, figures = fit(memory_index(header, rows_of_texts(VECTORS, IDS, TEXTS)), vectors, texts, ids, precision=0.975)
    assert figures["fused"] >= max(figures["vote"], figures["lexical"]) and figures["known_auroc"] > 0.6
    probs = np.concatenate([label_probabilities(index, vectors[chunk], texts[chunk]) for chunk in chunks(index, len(texts))])
    is_right = probs.argmax(axis=1) == ids
    assert is_right.mean() == pytest.approx(figures["fused"])
    known = [answer.known for answer in make_answers(index, vectors[:9], texts[:9])]
    assert known == pytest.approx(probs[:9].sum(axis=1), abs=1e-5)
    assert min(index.header["known"]["weights"]) >= 0  # a text that is nearer is never less known
    decided = probs.max(axis=1) >= index.header["threshold"]["value"]
    assert precision_bound(is_right.sum(), len(ids)) < 0.975 <= precision_bound(is_right[decided].sum(), decided.sum())
    assert 0.2 < decided.mean() < 1


def test_a_label_of_few_texts_is_heard_beside_labels_of_many(tmp_path):
    texts, ids = [text for text, _ in DEV], np.array([LABELS.index(label) for _, label in DEV])
    label = int(np.bincount(IDS).argmin())
    shares = {}
    for least in (0, 50):
        index = make_index(tmp_path / str(least))
        header = {**index.header, "vote": {**index.header["vote"], "least_rows": least}}
        others = np.flatnonzero(IDS != label)
        rows = rows_of_texts(VECTORS[others], IDS[others], [TEXTS[row] for row in others])
        write_index(tmp_path / str(least), memory_index(header, rows))
        few = np.flatnonzero(IDS == label)[:3]
        add_texts(tmp_path / str(least), LABELS[label], [TEXTS[row] for row in few], VECTORS[few])
        vectors = class_vectors(np.random.default_rng(6), ids)
        answers = make_answers(open_index(tmp_path / str(least)), vectors, texts)
        shares[least] = np.mean([answer.label == LABELS[label] for answer, row in zip(answers, ids) if row == label])
    assert shares[50] > shares[0]


def test_auroc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    scores, targets = np.random.default_rng(7).integers(0, 9, 200), np.random.default_rng(8).integers(0, 2, 200)
    assert auroc(scores, targets == 1) == pytest.approx(roc_auc_score(targets, scores))


# ---- changes


def assert_centres_are_those_of_the_rows(index):
    rows = np.flatnonzero(index.row_labels >= 0)
    vectors = index.take(rows)
    np.testing.assert_allclose(index.mean, vectors.mean(axis=0), atol=1e-5)
    for label, centre in enumerate(index.centres):
        mean = vectors[index.row_labels[rows] == label].mean(axis=0) - vectors.mean(axis=0)
        np.testing.assert_allclose(centre, mean / np.linalg.norm(mean), atol=1e-4)


@pytest.mark.parametrize("corpus", ["texts", "labels", "means"])
def test_labels_are_added_described_renamed_and_removed(tmp_path, corpus):
    make_index(tmp_path, corpus)
    new = unit(np.random.default_rng(3), 3, SIZE)
    add_texts(tmp_path, "科##新类", ["新类", "打完疫苗能喝酒吗"], new[:2])
    for _ in range(2):  # what is there already is not added again
        add_texts(tmp_path, "科##新类", ["预防针"], new[2:], describes=True)
    index = open_index(tmp_path)
    answer = make_answers(index, new[1:2], ["打完疫苗能喝酒吗"], num_nearest=1)[0]
    assert answer.label == "科##新类" and answer.nearest[0][1] == "科##新类"
    assert "预防针" in index.header["labels"][-1]["texts"] and "新类" not in index.header["labels"][-1]["texts"]
    assert index.rows_per_label()[-1] == 3
    assert_centres_are_those_of_the_rows(index)
    texts = label_texts("科##疫苗", index.header["labels"][-1]["texts"]) if corpus == "labels" else []
    rename_label(tmp_path, "科##新类", "科##疫苗", unit(np.random.default_rng(4), len(texts), SIZE) if texts else None)
    index = open_index(tmp_path)
    assert index.labels == [*LABELS, "科##疫苗"]
    if corpus == "labels":
        rows = np.flatnonzero(index.row_labels == len(LABELS))
        assert {index.text(row) for row in rows} == {"疫苗", "打完疫苗能喝酒吗", "预防针"}
    assert_centres_are_those_of_the_rows(index)
    remove_label(tmp_path, "科##疫苗")
    assert_centres_are_those_of_the_rows(open_index(tmp_path))
    assert make_answers(open_index(tmp_path), new[1:2], ["打完疫苗能喝酒吗"])[0].label in LABELS


def test_more_texts_give_the_mean_of_all_texts(tmp_path):
    index = make_index(tmp_path, "means")
    new = unit(np.random.default_rng(3), 5, SIZE)
    add_texts(tmp_path, LABELS[3], ["一", "二", "三"], new[:3])
    add_texts(tmp_path, LABELS[3], ["四", "五"], new[3:])
    index = open_index(tmp_path)
    rows = np.flatnonzero(index.row_labels == 3)
    mean = np.concatenate([VECTORS[IDS == 3], new]).mean(axis=0)
    assert len(rows) == 1 and index.rows_per_label()[3] == (IDS == 3).sum() + 5
    np.testing.assert_allclose(index.take(rows)[0], mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("corpus", ["texts", "means"])
def test_many_changes_keep_all_rows_in_few_segments(tmp_path, corpus):
    make_index(tmp_path, corpus)
    new = unit(np.random.default_rng(3), 40, SIZE)
    for number in range(40):
        add_texts(tmp_path, f"类{number}", [f"问题{number}号"], new[number:number + 1])
    index = open_index(tmp_path)
    assert len(index.segments) <= 18 and len([name for name in os.listdir(tmp_path) if name.startswith("segment-")]) <= 18
    answers = make_answers(index, new, [f"问题{number}号" for number in range(40)], num_nearest=1)
    assert [answer.nearest[0][:2] for answer in answers] == [(f"问题{number}号", f"类{number}") for number in range(40)]
    assert [lexical_nearest(index, [f"问题{number}号"], 1)[1][0, 0] for number in (0, 39)] == [
        nearest(index, new[number:number + 1], 1)[1][0, 0] for number in (0, 39)]


def test_rows_of_removed_labels_go_when_segments_are_joined(tmp_path):
    make_index(tmp_path)
    new = unit(np.random.default_rng(3), 1, SIZE)
    for number in range(20):
        add_texts(tmp_path, "新", [f"问题{number}号"], new)
        if number % 2:
            remove_label(tmp_path, "新")
    index = open_index(tmp_path)
    assert len(index.segments) < 17 and (index.row_labels < 0).sum() < 6 and index.labels == LABELS


@pytest.mark.parametrize("faster", ["describe", "remove", "build"])
def test_a_change_that_another_process_overtakes_is_made_of_what_is_there_then(tmp_path, monkeypatch, faster):
    make_index(tmp_path, "labels")

    def encode(texts):
        if not done:
            done.append(faster)
            if faster == "describe":
                add_texts(tmp_path, LABELS[0], ["得了什么病"], VECTORS[:1], describes=True)
            elif faster == "remove":
                remove_label(tmp_path, LABELS[0])
            else:
                make_index(tmp_path, "labels", encoder_id="f" * 16)
        return VECTORS[:len(texts)]

    done, encoder = [], SimpleNamespace(encode=encode, encoder_id=ENCODER, dimension=SIZE)
    monkeypatch.setattr(change, "open_encoder", lambda *arguments, **options: encoder)
    process = run_here(change.main, "rename", LABELS[0], "新名", "--index_dir", tmp_path)
    index = open_index(tmp_path)
    if faster == "describe":
        assert process.returncode == 0, process.stderr
        assert {index.text(row) for row in np.flatnonzero(index.row_labels == 0)} == {"新名", "得了什么病"}
    else:
        assert_user_error(process, f"no label '{LABELS[0]}'" if faster == "remove" else "encoder")
        assert "新名" not in index.labels


def test_who_has_an_index_open_keeps_it_whatever_becomes_of_the_folder(tmp_path):
    index = make_index(tmp_path)
    before = make_answers(index, QUERIES, TEXTS[:40], 3, 2)
    remove_label(tmp_path, LABELS[0])
    make_index(tmp_path, "means")
    assert make_answers(index, QUERIES, TEXTS[:40], 3, 2) == before
    assert len(os.listdir(tmp_path)) == 3  # index.json, .lock and one segment


def test_while_a_changed_index_is_opened_the_old_one_answers(tmp_path, monkeypatch):
    make_index(tmp_path)
    started, go_on = threading.Event(), threading.Event()
    encoder = SimpleNamespace(encode_batch=lambda texts: VECTORS[:len(texts)], encoder_id=ENCODER, dimension=SIZE)
    monkeypatch.setattr(predictor, "open_encoder", lambda *arguments, **options: encoder)
    search_predictor = predictor.SearchPredictor("export", tmp_path)

    def open_slowly(*arguments):
        started.set()
        assert go_on.wait(60)
        return open_index(*arguments)

    monkeypatch.setattr(predictor, "open_index", open_slowly)
    add_texts(tmp_path, "新", ["新的"], VECTORS[:1])
    opening = threading.Thread(target=search_predictor.reload)
    opening.start()
    try:
        assert started.wait(60) and not search_predictor.reload(wait=False)
        assert len(search_predictor.batch_answer(TEXTS[:1], top_k=50)[0].top_k) == len(LABELS)
    finally:
        go_on.set()
        opening.join()
    assert len(search_predictor.batch_answer(TEXTS[:1], top_k=50)[0].top_k) == len(LABELS) + 1


def test_a_build_killed_at_any_moment_leaves_an_index_that_opens(tmp_path):
    make_index(tmp_path)
    code = """if True:
        import sys
        import numpy as np
        from textcls.retrieval.rows import *
        from textcls.retrieval.writing import *
        from textcls.retrieval.index import *
        generator = np.random.default_rng(1)
        vectors = generator.standard_normal((3000, 24)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        rows = rows_of_texts(vectors, generator.integers(0, 5, 3000), [f"文{row}" for row in range(3000)])
        index = memory_index(new_header("fedcba9876543210", 24, "texts", [(f"类{number}", []) for number in range(5)]), rows)
        print("ready", flush=True)
        while True:
            write_index(sys.argv[1], index)"""
    generator, seen = random.Random(2), set()
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        index = open_index(tmp_path)
        seen.add(index.header["encoder_id"])
        assert len(nearest(index, QUERIES, 5)[1]) == len(QUERIES)
    assert "fedcba9876543210" in seen
    index = make_index(tmp_path)
    assert len(os.listdir(tmp_path)) == 3  # what the killed ones left is gone


def test_damaged_and_foreign_indexes_are_refused(tmp_path):
    index = make_index(tmp_path / "index")
    with pytest.raises(UserError, match="made with the encoder 0123456789abcdef, this one is fedc"):
        open_index(tmp_path / "index", "fedc")
    with pytest.raises(UserError, match="vectors of 24 numbers, the encoder's have 48"):
        open_index(tmp_path / "index", index.header["encoder_id"], 48)
    with pytest.raises(UserError, match="no index here"):
        open_index(tmp_path)
    segment = index.header["segments"][0]["folder"]
    for name in sorted(os.listdir(tmp_path / "index" / segment)):
        for damage in ("missing", "cut", "pickle"):
            copy = shutil.copytree(tmp_path / "index", tmp_path / f"{name}-{damage}")
            path = copy / segment / name
            content = path.read_bytes()
            path.unlink()
            if damage == "cut":
                path.write_bytes(content[:-1])
            elif damage == "pickle":
                with open(path, "wb") as file:
                    np.save(file, np.array([{"a": 1}]), allow_pickle=True)
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                open_index(copy)
    header = json.loads((tmp_path / "index/index.json").read_text(encoding="utf-8"))
    unknown_id = {"id": 99, "name": "x", "texts": []}
    for name, value in [("format", 1), ("dtype", "float64"), ("segments", []), ("labels", [unknown_id, unknown_id]), ("vote", {}),
                        *(("lexical", {**header["lexical"], "neighbours": count}) for count in (5.0, 1e30, 10**30)),
                        ("known", {"weights": [1], "offset": 0}), ("segments", [{"folder": "../other", "rows": 1}])]:
        (tmp_path / "index/index.json").write_text(json.dumps({**header, name: value}), encoding="utf-8")
        with pytest.raises(UserError, match=f"{name}"):
            open_index(tmp_path / "index")
