"""Shared by the tests of prompts: masked language models with random weights, a small task, few-shot/train.py in this process."""

import json
import shutil

import numpy as np

from helpers import ROOT, load_script, make_model, read_lines, run_here, write_binary_data, write_lines
from textcls.data.files import read_labels
from textcls.data.prompts import compile_template, parse_template
from textcls.data.tokens import pad_batch
from textcls.models.checkpoints import load_model
from textcls.models.device import select_device
from textcls.models.paddle_setup import paddle
from textcls.models.prompt_model import make_prompt_model
from textcls.models.tokenizers import load_tokenizer, make_encoder, rust_tokenizer

DATA = ROOT / "data"
WORDS = ["费用", "原因"]
TEXTS = ["头疼怎么办", "孩子咳嗽应该吃什么药呢？" * 3, "多少钱"]


script = load_script("few-shot", "train")


def make_masked_lm(folder, **changes):
    """A masked LM with random weights; those of layer norms and biases, too, so that none of them can be forgotten."""
    from paddlenlp import transformers

    make_model(folder, **changes)
    config = json.loads((folder / "config.json").read_text())
    name = "Bert" if config["model_type"] == "bert" else "Ernie"
    sizes = {key: value for key, value in config.items() if key != "architectures" and value is not None}
    paddle.seed(1)
    model = getattr(transformers, f"{name}ForMaskedLM")(getattr(transformers, f"{name}Config")(**sizes))
    for parameter in model.parameters():
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    model.save_pretrained(str(folder))
    getattr(transformers, f"{name}Tokenizer").from_pretrained(str(folder)).save_pretrained(str(folder))


def make_few(folder):
    """A task with two classes and their words: 30 training, 12 dev and 12 test rows; in unlabelled/ with data.txt, and in
    plenty/ with some 200 training rows."""
    (folder / "plenty").mkdir()
    write_binary_data(folder / "plenty")
    for name in ("train.txt", "dev.txt", "label.txt"):
        shutil.copy(folder / "plenty" / name, folder)
    for name, first, count in (("test", 30, 12), ("train", 0, 30), ("dev", 0, 12)):
        rows = read_lines(folder / ("dev.txt" if name == "dev" else "train.txt"))
        halves = [[row for row in rows if row.endswith(label)] for label in read_labels(folder / "label.txt")]
        write_lines(folder / f"{name}.txt", [row for half in halves for row in half[first:first + count // 2]])
    write_lines(folder / "label.txt", [f"{label}=={word}" for label, word in zip(read_labels(folder / "label.txt"), WORDS)])
    shutil.copy(folder / "label.txt", folder / "plenty")
    unlabelled = shutil.copytree(folder, folder / "unlabelled", ignore=shutil.ignore_patterns("unlabelled", "plenty"))
    write_lines(unlabelled / "data.txt", [line.split("\t")[0] for line in read_lines(DATA / "train.txt")[:40]])


def options(model, data, output, **changes):
    """A short training; an option set to None is left out, one set to "" is a flag, of a list each entry is given."""
    values = {"model_name_or_path": model, "data_dir": data, "output_dir": output, "prompt": "这是关于", "device": "cpu",
              "learning_rate": "1e-3", "ppt_learning_rate": "1e-3", "max_steps": 6, "per_device_train_batch_size": 8,
              "max_seq_length": 48, "do_train": "", "report_to": "none", "logging_steps": 3, **changes}
    words = []
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            words += [] if item is None else [f"--{name}"] if item == "" else [f"--{name}", str(item)]
    return words


def run_train(*arguments, **changes):
    """few-shot/train.py in this process."""
    return run_here(script.main, *options(*arguments, **changes))


def trained(*arguments, **changes):
    """The log of a training that ends well."""
    process = run_train(*arguments, **changes)
    assert process.returncode == 0, process.stderr
    return process.stderr


def words_as_ids(tokenizer, words):
    return [[tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)) for word in own] for own in words]


def build(folder, template, words, length=64):
    """(prompt model, its encoder, tokenizer, the masked LM it was made of) in eval mode."""
    select_device("cpu")
    tokenizer, masked = load_tokenizer(str(folder)), load_model(str(folder), head="MaskedLM")
    prompt, starts = compile_template(parse_template(template), words, tokenizer, masked.config.vocab_size)
    labels = [str(index) for index in range(len(words))]
    model = make_prompt_model(load_model(str(folder), head="MaskedLM"), prompt, words_as_ids(tokenizer, words), starts, labels)
    rust = rust_tokenizer(tokenizer, prompt=prompt)
    encode = make_encoder(tokenizer, rust, length, prompt)
    return model, lambda texts: [row for [row] in encode(texts)], tokenizer, masked


def guess_words(masked, rows, mask_id, words, pad_id):
    """The masked LM's logits of the words, by plain indexing: float64 [num_texts, num_classes].

    A word of as many tokens as masks has one for each; of another, all its tokens count at every mask.
    """
    batch = pad_batch(rows, pad_id)
    with paddle.no_grad():
        logits = masked(paddle.to_tensor(batch)).numpy().astype(np.float64)
    answers = []
    for row, ids in zip(logits, batch):
        places = np.flatnonzero(ids == mask_id)
        answers.append([np.mean([np.mean([row[place, tokens[number] if len(tokens) == len(places) else tokens]
                                          for number, place in enumerate(places)]) for tokens in own]) for own in words])
    return np.array(answers)
