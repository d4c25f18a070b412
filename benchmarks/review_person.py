"""Decide on rows in analysis/review.py's page as a person would, the true labels being the person: what it finds and is worth.

    python benchmarks/review_person.py --source_dir KUAKE_QIC --model_name_or_path data --output_dir build/review_person

Some labels of train are replaced at random. A model is trained on that; a browser opens the page and decides by keyboard on one
card after the other; the decisions are applied, a model is trained again, and the page compares the two on dev.

Reads   source_dir/train.txt, dev.txt, label.txt. Needs Chromium with its driver (Debian, Ubuntu: apt-get install chromium
        chromium-driver) and selenium of requirements-test.txt.
Writes  output_dir: data/ (data files, journal, new files), the checkpoints before and after, which are not trained again where
        they are there.
Prints  how long the start, the page and a decision took, how many of the wrong labels were found, the interval of those that are
        left beside their true share, and the accuracies before and after.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np

from textcls.analysis.label_errors import plant
from textcls.common.errors import Problems, UserError, needs_packages, run_script
from textcls.common.options import make_parser, positive_int, seed_number
from textcls.common.outputs import check_output_folder
from textcls.data.files import read_labelled, read_labels, write_rows

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--source_dir", required=True, help="folder of train.txt, dev.txt and label.txt, taken for true")
    parser.add_argument("--model_name_or_path", required=True, help="the model to train, as for train.py")
    parser.add_argument("--output_dir", default="build/review_person", help="folder of all data and results")
    parser.add_argument("--noise", type=float, default=0.1, help="share of the labels of train replaced at random")
    parser.add_argument("--decisions", type=positive_int, default=200)
    parser.add_argument("--seed", type=seed_number, default=3)
    parser.add_argument("--learning_rate", default="5e-4")
    parser.add_argument("--num_train_epochs", type=positive_int, default=4)
    parser.add_argument("--no_training", action="store_true", help="only decide and apply; TF-IDF suggests")
    args = parser.parse_args()
    if not 0 < args.noise < 1:
        parser.error(f"--noise {args.noise}: expected a number between 0 and 1")
    return args


def run(command, *options):
    """Run one of this project's scripts; UserError where it fails."""
    words = [command, *map(str, options)]
    print("+ python", " ".join(words), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise UserError(f"{command} failed, see its message above")


def make_data(args, folder):
    """Write the data folder with wrong labels. Returns ({text: true label}, {texts with a wrong label})."""
    problems = Problems()
    labels = read_labels(os.path.join(args.source_dir, "label.txt"), problems)
    texts, label_ids = read_labelled(os.path.join(args.source_dir, "train.txt"), labels, problems)
    problems.report()
    noisy, planted = plant(label_ids, len(labels), args.noise, args.seed)
    os.makedirs(folder)
    for name in ("dev.txt", "label.txt"):
        shutil.copy(os.path.join(args.source_dir, name), folder)
    write_rows(os.path.join(folder, "train.txt"), texts, [labels[label] for label in noisy])
    truth = {text: labels[label] for text, label in zip(texts[::-1], label_ids[::-1])}  # of equal texts the first one's
    return truth, {texts[row] for row in planted}


def train(args, folder, output, *files):
    """Train a model on the data folder."""
    if not os.path.isfile(os.path.join(output, "config.json")):
        run("train.py", "--model_name_or_path", args.model_name_or_path, "--data_dir", folder, *files, "--output_dir", output,
            "--learning_rate", args.learning_rate, "--num_train_epochs", args.num_train_epochs, "--seed", args.seed,
            "--per_device_train_batch_size", 32, "--per_device_eval_batch_size", 32, "--do_train", "--do_eval")


def start_review(args, folder, *options):
    """Start the page, with as many suspect rows as will be decided on, and print how long that took. Returns (process, its
    address)."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "analysis/review.py"), "--dataset_dir", folder, "--port", "0",
                                "--num_suspects", str(args.decisions * 9 // 10), *options], stderr=subprocess.PIPE,
                               encoding="utf-8")
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.search(r"http://127\S+", line):
            print(f"review.py listens after {time.perf_counter() - started:.1f} s", flush=True)
            return process, found.group()
    raise UserError("analysis/review.py failed, see its message above")


def ask(address, path, **content):
    """What the page's server answers to one of its requests."""
    url, token = re.fullmatch(r"(.*)/#token=([\w-]+).*", address).groups()
    request = urllib.request.Request(f"{url}/api/{path}", json.dumps({"who": "person", **content}).encode(), {
        "Content-Type": "application/json", "X-Review-Token": token})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would look for 127.0.0.1 on itself
    with opener.open(request) as response:
        return json.load(response)


def open_browser():
    """Open Chromium. UserError where there is none."""
    with needs_packages("requirements-test.txt"):
        from selenium import webdriver
    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (browser and driver):
        raise UserError("no Chromium and chromedriver found, expected apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def decide(driver, address, truth, count):
    """Open the page and decide on `count` cards by keyboard. Returns the seconds that the first card took and each decision took
    the page, list of float."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def shown(name):
        return driver.execute_script(f"return document.getElementById('{name}').textContent")

    def current():
        return driver.find_element(By.CSS_SELECTOR, "#current b").text

    started = time.perf_counter()
    driver.get(f"{address}&name=person")
    WebDriverWait(driver, 60, 0.005).until(lambda _: shown("text"))
    seconds = [time.perf_counter() - started]
    for _ in range(count):
        text = shown("text")
        label = truth[text]
        place = [name.text for name in driver.find_elements(By.CSS_SELECTOR, "#labels bdi")].index(label)
        if current() == label:
            keys = ["k"]
        else:
            keys = [Keys.ENTER] if place == 0 else [str(place + 1)] if place < 9 else ["/", label, Keys.ENTER]
        started = time.perf_counter()
        ActionChains(driver, duration=0).send_keys(*keys).perform()
        WebDriverWait(driver, 60, 0.005).until(lambda _, before=text: shown("text") != before)
        seconds.append(time.perf_counter() - started)
    return seconds


def review(args, folder, address, truth, planted):
    """Decide in the browser, and print what was found."""
    driver = open_browser()
    try:
        opened, *seconds = decide(driver, address, truth, args.decisions)
    finally:
        driver.quit()
    estimate = ask(address, "state")["estimate"]
    with open(os.path.join(folder, "review.jsonl"), encoding="utf-8") as file:
        entries = [entry for entry in map(json.loads, file) if "text" in entry]
    decided = {entry["text"]: entry for entry in entries}
    ranked = [entry for entry in decided.values() if entry["kind"] == "train"]
    left = [text for text in truth if text not in {entry["text"] for entry in ranked}]
    print(f"first card after {opened:.2f} s")
    print(f"{len(entries)} decisions; from the key to the next card: {np.median(seconds) * 1000:.0f} ms (median), "
          f"{np.quantile(seconds, 0.95) * 1000:.0f} ms (95 % quantile)")
    print(f"suspect rows: {sum(entry['text'] in planted for entry in ranked)} of {len(ranked)} had a planted label; "
          f"{sum(text in planted for text in decided)} of {len(planted)} were found in all")
    if estimate["count"]:
        print(f"random rows: {estimate['wrong']} of {estimate['count']} wrong, {estimate['share']:.1%} (95 % interval "
              f"{estimate['low']:.1%} to {estimate['high']:.1%}); the share among all rows that are not among the suspect ones "
              f"decided: {np.mean([text in planted for text in left]):.1%}")


def print_comparison(splits):
    """Print dev before and after. splits: of the page's request compare."""
    split = splits[0]
    for place in ("before", "after"):
        low, high = split[place]["intervals"]["accuracy"]
        print(f"dev {place}: accuracy {split[place]['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%})")
    change = split["difference"]
    print(f"difference: {change['value']:+.2%} ({change['low']:+.2%} to {change['high']:+.2%}); {split['gained']} mended, "
          f"{split['lost']} newly wrong")


def main():
    args = parse_arguments()
    check_output_folder(args.output_dir, "--output_dir")
    folder = os.path.abspath(os.path.join(args.output_dir, "data"))
    if os.path.exists(folder):
        raise UserError(f"{folder}: there from before, expected another --output_dir")
    before, after = (os.path.abspath(os.path.join(args.output_dir, name)) for name in ("checkpoint", "checkpoint_reviewed"))
    truth, planted = make_data(args, folder)
    options = []
    if not args.no_training:
        train(args, folder, before)
        options = ["--params_path", before]
    process, address = start_review(args, folder, *options)
    process.terminate()  # from now on all scores are there
    process.wait()
    process, address = start_review(args, folder, *options)
    try:
        review(args, folder, address, truth, planted)
    finally:
        process.terminate()
        process.wait()
    run("analysis/review.py", "--dataset_dir", folder, "--apply")
    if args.no_training:
        return
    train(args, folder, after, "--train_file", "train_reviewed.txt", "--dev_file", "dev_reviewed.txt", "--label_file",
          "label_reviewed.txt")
    process, address = start_review(args, folder, *options, "--compare_path", after)
    try:
        print_comparison(ask(address, "compare")["splits"])
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    run_script(main)
