"""The documents: every command is run, here or by the test that ELSEWHERE names; Chinese and English agree; links lead on.

Commands stand in blocks of `bash`, or of `shell` where they need a running server. Here each document gets a fresh copy of
the repository, in which its commands run in order, as they stand but for CHANGES.
"""

import ast
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time

import pytest

from helpers import ROOT, needs_paddle_2, server_python

DOCUMENTS = {"README.md": ".",  # where a document's commands are run
             **{f"docs/{name}.md": "." for name in ("data", "training", "evaluation", "analysis", "export", "deployment",
                                                    "troubleshooting", "results", "development")},
             "analysis/README.md": ".", "few-shot/README.md": ".", "retrieval_based/README.md": ".",
             **{f"deploy/{name}/README.md": f"deploy/{name}" for name in ("predictor", "simple_serving", "triton_serving",
                                                                          "paddle_serving")},
             "deploy/spark/README.md": "."}
CHANGES = [("--use_quantize", "--use_quantize --allow_accuracy_drop"),  # of a small model, ties decide
           ("--num_train_epochs 2", "--max_steps 4")]
SKIPPED = ("make ", "pip ", "python -m venv", "python3.9 -m venv", "source ", "unset ", "nvidia-smi",  # set-up: test_demo and CI
           ".venv/bin/python -m pytest")
NEEDS_GPU = {  # run as it stands: the message that a machine without GPU gives
    'python infer.py --device "gpu" --device_id 0 --use_fp16': "--device gpu: this onnxruntime is a CPU build"}
HERE = None
ZERO_SHOT = "test_zero_shot_answers_by_the_label_words_alone test_the_quick_start_command_runs_as_published"
REPEATS = "test_repeats_make_a_table_and_pretraining_goes_first"
ELSEWHERE = {  # how a command begins -> the tests of a file that run its script with its options
    "python train.py --model_name_or_path ernie-3.0-medium-zh":
        "test_train.py::test_a_checkpoint_has_labels_length_tokenizer_and_learned_something test_two_processes_train_and_agree",
    "python train.py --teacher":
        "test_distillation.py::test_a_student_has_fewer_layers_a_smaller_vocabulary_and_learns",
    "python train.py options.json --output_dir checkpoint_balanced": "test_train.py::test_imbalance_options_reach_the_loss",
    "python train.py options.json --output_dir checkpoint_7": HERE,  # so that the file as it stands there is read
    "python train.py options.json --resume_from_checkpoint":
        "test_train.py::test_killed_while_saving_and_resumed_ends_as_if_never_interrupted",
    "python train.py options.json --output_dir checkpoint_search":
        "test_settings.py::test_a_killed_search_goes_on_and_leaves_the_model_of_the_best_command_line",
    **dict.fromkeys(("python train.py options.json --output_dir checkpoint_folds",
                     "python analysis/evaluate.py --dataset_dir data --params_path checkpoint_folds",
                     "python analysis/dirty.py --dataset_dir data --dirty_num 100 --out_of_fold"),
                    "test_settings.py::test_killed_folds_go_on_and_evaluate_and_dirty_read_what_they_say"),
    "python train.py options.json": "test_train.py::test_options_from_json_and_random_weights_are_said",
    "python -m paddle.distributed.launch --nproc_per_node 8 --backend gloo train.py":
        "test_train.py::test_two_processes_train_and_agree",
    **dict.fromkeys((f"python -m {launcher} --master 10.0.0.1:6170 --nnodes 2 --rank"
                     for launcher in ("textcls.launch", "paddle.distributed.launch")),
                    "test_hosts.py::test_a_killed_process_ends_all_and_the_training_goes_on_exactly "
                    "test_other_data_or_options_on_one_host test_what_a_launcher_refuses_at_once"),
    "python -m paddle.distributed.launch --gpus 0,1 train.py": "test_train.py::test_two_processes_train_and_agree",
    "python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo predict.py":
        "test_predict.py::test_two_processes_write_one_ordered_file",
    "python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo prune.py":
        "test_prune.py::test_two_processes_prune",
    "python analysis/evaluate.py --device": "test_evaluate.py::test_bad_cases_are_the_wrong_dev_texts",
    "python analysis/evaluate.py --dev_file test.txt --bad_case_file bad_case_test.txt --wanted_precision":
        "test_evaluate.py::test_a_threshold_is_found_saved_exported_and_taken",
    "python predict.py --dataset_dir data --threshold auto":
        "test_evaluate.py::test_a_threshold_is_found_saved_exported_and_taken",
    "python analysis/evaluate.py --dataset_dir": "test_evaluate.py::test_report_is_complete_and_self_contained",
    "python train.py --known": "test_known.py::test_predict_and_infer_agree_on_long_texts_too",
    "python analysis/evaluate.py --params_path checkpoint_known":
        "test_known.py::test_evaluation_says_how_well_unknown_texts_are_told",
    "python predict.py --params_path checkpoint_known":
        "test_known.py::test_a_model_without_known_answers_as_before_and_says_what_it_lacks",
    "python data/app.py": "test_app.py::test_few_rows_become_an_index_that_answers_and_is_not_made_again",
    "python analysis/report.py": "test_report.py::test_the_page_joins_all_parts",
    **{f"python analysis/review.py --dataset_dir data --{words}": f"test_review.py::{test}" for words, test in {
        "params_path": "test_words_are_shaded_and_a_second_model_is_compared",
        "apply": "test_two_persons_disagree_and_one_settles_it",
        "export": "test_apply_renamed_labels_changed_files_and_export"}.items()},
    "python analysis/word_interpret.py": "test_word_interpret.py::test_the_three_outputs test_wrong_input_writes_nothing",
    "python analysis/sent_interpret.py": "test_sent_interpret.py::test_other_methods_use_the_cache",
    "python analysis/sparse.py --dataset_dir data --params_path ./checkpoint --annotate":
        "test_sparse.py::test_annotate_finds_the_classes_that_train_lacks",
    "python analysis/compare.py": "test_compare.py::test_models_of_all_forms_are_compared_on_a_table_a_file_and_a_page",
    "python analysis/results_table.py": "test_results_table.py::test_the_table_is_made_once_and_goes_on_where_it_was_stopped",
    "python analysis/aug.py": "test_aug.py::test_only_rare_classes_and_no_more_than_asked",
    "python predict.py --device": "test_predict.py::test_txt_tsv_and_csv_say_the_same",
    "python predict.py --data_file -": "test_predict.py::test_reads_standard_input_and_writes_standard_output",
    "python predict.py --dataset_dir": "test_predict.py::test_threshold_marks_unsure_answers",
    "python export_model.py": "test_export.py::test_the_export_alone_gives_the_checkpoints_answers",
    "python prune.py": "test_prune.py::test_every_width_is_complete_has_its_own_shape_and_the_accuracy_of_the_table",
    "python infer.py --perf": "test_predictor.py::test_perf_prints_accuracy_and_speed",
    "python server.py --export_dir ../../export --use_quantize": "test_simple_serving.py::test_int8",
    "python server.py --export_dir ../../export --host":
        "test_simple_serving.py::test_everything_but_health_and_docs_needs_the_token test_refusals_at_the_start",
    "python server.py --export_dir ../../export --workers":
        "test_search_serving.py::test_workers_share_a_port_and_a_dead_one_is_started_again",
    "python server.py": "test_simple_serving.py::test_client_agrees_with_predict",
    "python server.py --export_dir ../../output": "test_search_serving.py::test_answers_are_those_of_the_predictor",
    "python client.py --num_nearest":
        "test_search_serving.py::test_all_labels_at_most_and_blocks_of_the_client test_below_the_threshold_is_undecided",
    """curl -X POST http://127.0.0.1:8189/predict -H "Content-Type: application/json" -d '{"data": {"text": ["头疼怎么办"]}, """
    '"parameters": {"top_k": 1, "num_nearest"': "test_search_serving.py::test_below_the_threshold_is_undecided",
    "python client.py": "test_simple_serving.py::test_client_agrees_with_predict",
    "curl -X POST http://127.0.0.1:8189/predict": "test_simple_serving.py::test_requests_at_once_share_batches",
    "python deploy/spark/spark_infer.py": "test_spark.py::test_all_rows_have_the_answers_of_infer_and_bad_rows_their_errors",
    "python start_server.py": "test_triton_serving.py::test_clients_agree_with_predict",
    "python seqcls_": "test_triton_serving.py::test_clients_agree_with_predict",
    "curl -s http://127.0.0.1:8000/v2/models/seqcls/infer": "test_triton_serving.py::test_bad_requests_by_http",
    **dict.fromkeys(("python build_repository.py --export_dir ../../output", "curl -s http://127.0.0.1:8000/v2/models/encoder/infer",
                     "python start_server.py --model_repository encoder_models",
                     "python start_server.py --model_repository models -- --model-repository"),
                    "test_triton_serving.py::test_the_encoder_gives_the_vectors_of_its_export"),
    "curl -s": "test_triton_serving.py::test_health_metadata_and_metrics",
    "python service.py": "test_paddle_serving.py::test_clients_say_what_predict_says",
    **dict.fromkeys(("python rpc_client.py", "python http_client.py"),
                    "test_paddle_serving.py::test_readme_command test_clients_say_what_predict_says"),
    "curl http://127.0.0.1:9878/": "test_paddle_serving.py::test_readme_command",
    "python few-shot/train.py --data_dir ./data/ --output_dir ./checkpoints/":
        f"test_few_shot.py::test_the_benchmark_command_runs_as_published {REPEATS}",
    "python few-shot/train.py --data_dir ./data/ --output_dir ./zero_shot/": f"test_few_shot.py::{ZERO_SHOT}",
    "python few-shot/train.py --data_dir ./data/ --output_dir ./several/":
        f"test_few_shot.py::test_several_prompts_are_distilled_into_one_model {REPEATS}",
    **{f"python few-shot/train.py --data_dir ./data/ --output_dir ./{folder}/":
        f"test_few_shot.py::{REPEATS} test_several_prompts_are_distilled_into_one_model" for folder in ("adapted", "repeated")},
    "python few-shot/train.py --model_name_or_path ./checkpoints/": f"test_few_shot.py::{ZERO_SHOT}",
    "python few-shot/train.py --model_name_or_path zh_bert": f"test_few_shot.py::{ZERO_SHOT}",
    "python few-shot/benchmark.py": "test_few_shot.py::test_the_benchmark_measures_and_does_not_measure_again",
    "python few-shot/infer.py": "test_few_shot.py::test_the_benchmark_command_runs_as_published",
    **{f"{start} retrieval_based/train.py": f"test_retrieval_train.py::{test}" for start, test in {
        "python": "test_command_of_older_editions_learns_and_its_export_agrees",
        "python -m paddle.distributed.launch --gpus 0,1": "test_command_of_older_editions_learns_and_its_export_agrees",
        "python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo": "test_two_processes_take_the_step_of_one",
    }.items()},
    "python retrieval_based/export_model.py":
        "test_retrieval_train.py::test_command_of_older_editions_learns_and_its_export_agrees",
    **{command: f"test_pretrained_encoders.py::{test}" for command, test in {
        "python retrieval_based/build_index.py --params_path ./pretrained":
            "test_an_export_has_the_vectors_and_the_identity_of_the_folder",
        "python retrieval_based/build_index.py --params_path ./pretrained --data_dir ./data --index_dir ./index --query_prefix":
            "test_the_prefixes_of_an_index_go_before_each_text"}.items()},
    "python train.py --model_name_or_path zh_bert":
        "test_train.py::test_a_checkpoint_has_labels_length_tokenizer_and_learned_something",
    **{command: f"test_retrieval_scripts.py::{test}" for command, test in {
        "python retrieval_based/build_index.py": "test_build_tries_all_corpora_and_takes_the_best",
        "python retrieval_based/build_index.py --model_dir": "test_the_earlier_options_of_feature_extraction_are_taken",
        "python retrieval_based/evaluate.py": "test_evaluation_is_that_of_the_formulas",
        "python retrieval_based/evaluate.py --similar_text_pair": "test_recalled_lines_are_written_and_evaluated",
        "python retrieval_based/recall.py": "test_recalled_lines_are_written_and_evaluated",
        "python retrieval_based/predict.py": "test_predictions_in_all_forms_agree",
        "printf '乙肝疫苗要打几针": "test_predictions_in_all_forms_agree",
        "python retrieval_based/index.py": "test_labels_change_from_the_command_line",
        "python retrieval_based/benchmark.py": "test_the_benchmark_adds_labels_that_were_left_out"}.items()},
    **{command: "test_unknown_texts.py::test_encoders_are_trained_without_a_part_of_the_labels_each" for command in (
        "python retrieval_based/leave_out.py",
        "python retrieval_based/build_index.py --params_path ./encoder --data_dir ./data --index_dir ./index --left_out_dir")},
    **{command: f"test_retraining.py::{test}" for command, test in {
        "python retrieval_based/index.py retrain": "test_what_was_added_goes_into_data_encoder_and_index",
        "python retrieval_based/build_index.py --params_path ./encoder --data_dir ./data --index_dir ./index --keep_added":
            "test_a_build_says_what_it_would_lose_and_keeps_it"}.items()},
    **{f".venv-milvus/bin/python retrieval_based/{command}": f"test_milvus.py::{test}" for command, test in {
        "milvus_index.py": "test_a_server_with_a_token_answers_while_versions_are_switched",
        "milvus_index.py --vector_path": "test_a_file_of_vectors_larger_than_a_message_and_the_words_of_labels",
        "run_system.py": "test_milvus_lite_finds_what_exact_search_finds_and_the_old_version_answers_after_a_kill "
                         "test_a_server_with_a_token_answers_while_versions_are_switched"}.items()},
    "python deploy/simple_serving/":
        "test_search_serving.py::test_answers_are_those_of_the_predictor test_below_the_threshold_is_undecided",
    "python analysis/evaluate.py --dataset_dir data --params_path ./checkpoints/":
        "test_few_shot.py::test_every_script_of_analysis_takes_a_prompt_model",
    "python analysis/report.py --dataset_dir data --params_path ./checkpoints/":
        "test_few_shot.py::test_every_script_of_analysis_takes_a_prompt_model",
    "python predict.py --dataset_dir data --params_path ./checkpoints/":
        "test_few_shot.py::test_checkpoint_predict_onnx_and_int8_agree_on_a_thousand_texts",
    "python export_model.py --params_path ./checkpoints/":
        "test_few_shot.py::test_checkpoint_predict_onnx_and_int8_agree_on_a_thousand_texts",
    "python deploy/predictor/infer.py --model_path_prefix checkpoints/export/model":
        "test_predictor.py::test_int8_quantizes_and_is_cached"}
NOT_TRIED = {"gpus",  # needs GPUs
             "data_dir", "data_file", "dataset_dir", "unlabeled_file"}  # the values here are the defaults


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def twin(document):
    return document.replace(".md", "_en.md")


def blocks(document, *languages):
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", read(document), re.DOTALL | re.MULTILINE)


def commands(document):
    """The document's commands in order, continued lines joined, blanks single; set-up left out."""
    found = []
    for language, starts in (("bash", ""), ("shell", ("python", "curl "))):  # those of `shell` may hold lines of data
        lines = "".join(blocks(document, language)).replace("\\\n", " ").split("\n")
        found += [re.sub(r"\s+", " ", line) for line in lines if line and line.startswith(starts)]
    return [command for command in found if not command.startswith(SKIPPED)]


def elsewhere(command):
    """The tests that run a command, by the longest beginning that ELSEWHERE knows; None: it is run here."""
    return ELSEWHERE.get(max((start for start in ELSEWHERE if command.startswith(start)), key=len, default=None))

RUN_HERE = [pytest.param(document, command, marks=[needs_paddle_2] if "paddle_serving" in document else [])
            for document in DOCUMENTS if document != "README.md"
            for command in dict.fromkeys(commands(document)) if not elsewhere(command)]


def adapted(text):
    for old, new in CHANGES:
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_chinese_and_english_have_the_same_commands_examples_and_headings(document):
    for language in ("bash", "csv", "json", "shell", "python"):
        assert blocks(document, language) == blocks(twin(document), language)
    headings = [re.findall(r"^(#+ [\d.]+|#) ", read(name), re.MULTILINE) for name in (document, twin(document))]
    assert headings[0] == headings[1] and len(headings[0]) > 1
    assert "TODO" not in read(document) + read(twin(document))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for name in (document, twin(document)):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", read(name)):
            path = (ROOT / name).parent / link
            assert link.startswith("http") or path.exists(), f"{name}: {link}"
            assert path.suffix != ".png" or path.stat().st_size < 200 * 1024, f"{name}: {link}"


def test_what_development_names_exists():
    """Files and names in `code` style (not what has a blank or is an option); all files of the library are there."""
    folders = (".", "textcls/*", "few-shot", "retrieval_based", "data", "analysis", "deploy/*", "tests", "tests/*", "benchmarks")
    code = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in ROOT.glob(f"{folder}/*.py"))
    for name in ("docs/development.md", "docs/development_en.md"):
        for item in re.findall(r"`([\w./-]+)`", re.sub(r"^```.*?^```", "", read(name), flags=re.DOTALL | re.MULTILINE)):
            if re.fullmatch(r"\w+", item):
                assert re.search(rf"\b{item}\b", code), f"{name}: {item}"
            elif not item.startswith(("-", "/")):
                assert (ROOT / item).exists(), f"{name}: {item}"
        for path in ROOT.glob("textcls/*/[!_]*.py"):
            assert f"`textcls/{path.parent.name}/{path.name}`" in read(name), f"{name}: {path} is missing"


def given_options(path, test):
    """The options that a test gives, with the functions, fixtures and constants that it uses: `--option` in a string, the key
    of a dictionary, or the keyword of a call. Set of str."""
    definitions = {}
    for file in (*ROOT.glob("tests/*.py"), *path.parent.glob("*.py"), path):  # later definitions win
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", [])
            definitions.update((name.id, node) for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
            if isinstance(node, ast.FunctionDef):
                definitions[node.name] = node
    assert test in definitions, f"{path}: {test} is missing"
    options, names = set(), [test]
    while names:
        for node in ast.walk(definitions.pop(names.pop(), ast.Pass())):
            if isinstance(node, ast.Name):
                names.append(node.id)
            elif isinstance(node, ast.arg):
                names.append(node.arg)
            elif isinstance(node, ast.keyword):
                options.add(node.arg)
            elif isinstance(node, ast.Dict):
                options.update(key.value for key in node.keys if isinstance(key, ast.Constant))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                options.update(re.findall(r"--(\w+)", node.value))
    return options


@pytest.mark.parametrize("command", dict.fromkeys(command for document in DOCUMENTS for command in commands(document)
                                                  if elsewhere(command)))
def test_commands_of_other_tests_are_run_there(command):
    """The tests exist, and together they give the command's options."""
    file, names = elsewhere(command).split("::")
    [path] = ROOT.glob(f"tests/*/{file}")
    given = set().union(*(given_options(path, name) for name in names.split()))
    missing = set(re.findall(r"(?<= --)\w+", command)) - given - NOT_TRIED
    assert not missing, f"{file}: {names} never give {missing}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """clone(document): the copy of the repository for the document's commands, with the files that it says to save."""
    clones = {}

    def get(document):
        if document not in clones:
            folder = clones[document] = tmp_path_factory.mktemp("clone")
            for path in ROOT.glob("*.py"):
                shutil.copy(path, folder)
            for name in ("analysis", "data", "deploy", "textcls"):
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            (folder / "my_table.csv").write_text(blocks("README.md", "csv")[0], encoding="utf-8")
            (folder / "doccano.jsonl").write_text(blocks("docs/data.md", "json")[0], encoding="utf-8")
            (folder / "options.json").write_text(blocks("docs/training.md", "json")[0], encoding="utf-8")
        return clones[document]

    return get


def run_command(command, folder):
    command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
    return subprocess.run(["sh", "-c", command], cwd=folder, encoding="utf-8", capture_output=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # the tests run two at a time


@pytest.mark.parametrize("document, command", RUN_HERE)
def test_command(clone, checkpoint, exported, document, command):
    folder = clone(document)
    for source, name in ((checkpoint, "checkpoint"), (exported, "export")):
        if not (folder / name).exists():
            shutil.copytree(source, folder / name)
    message = next((NEEDS_GPU[start] for start in NEEDS_GPU if command.startswith(start)), None)
    process = run_command(command if message else adapted(command), folder / DOCUMENTS[document])
    assert process.returncode == (2 if message else 0), process.stdout + process.stderr
    assert not message or message in process.stderr


def test_the_python_interface_and_deploy_json_are_as_shown(exported, tmp_path):
    code, = blocks("deploy/predictor/README.md", "python")
    os.symlink(exported, tmp_path / "export")
    (tmp_path / "example.py").write_text(code + "print(labels)", encoding="utf-8")
    process = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, encoding="utf-8", capture_output=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"})
    assert process.returncode == 0 and "医疗费用" in process.stdout, process.stderr
    shown = next(block for block in blocks("docs/export.md", "text") if block.startswith("{"))
    written = json.loads((exported / "deploy.json").read_text(encoding="utf-8"))
    sometimes = ("onnx_file", "threshold")
    assert list(json.loads(shown)) == [name for name in written if name not in sometimes]


def test_from_a_table_to_an_http_service(clone, request):
    """The six commands of README.md, one after the other in a fresh clone, give the answers that stand there."""
    folder = clone("README.md")
    os.symlink(server_python("simple-serving").parents[1], folder / ".venv-simple-serving")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    six = commands("README.md")
    assert len(six) == 6 and "server.py" in six[4]
    for command in six[:4]:
        process = run_command(command, folder)
        assert process.returncode == 0, process.stdout + process.stderr
    assert (folder / "my_report/report.html").exists()
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([*six[4].split(), "--port", str(port)], cwd=folder, stderr=log)
    request.addfinalizer(server.kill)
    while '"message": "listening"' not in (folder / "log").read_text(encoding="utf-8"):
        assert server.poll() is None, (folder / "log").read_text(encoding="utf-8")
        time.sleep(0.05)
    answer = run_command(f"{six[5]} --url http://127.0.0.1:{port}", folder).stdout
    shown = next(block for block in blocks("README.md", "text") if block.startswith("data: "))
    labels = re.compile(r"^(data: .*|label: \w+)", re.MULTILINE)
    assert labels.findall(answer) == labels.findall(shown) != []
    server.terminate()
    assert server.wait(60) == 0
