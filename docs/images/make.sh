#!/bin/sh
# Makes the pictures of the pages in the documents, from the model of `make demo` (build/demo/): report.png and cases.png of
# analysis/report.py, words.png of analysis/word_interpret.py, compare.png of analysis/compare.py, review.png of
# analysis/review.py, serving.png of deploy/simple_serving.
#
#     sh docs/images/make.sh
#     MODEL=build/demo/checkpoint PICTURES=docs/images WORK=build/demo/page sh docs/images/make.sh
#
# Needs the server's environment (make .venv-simple-serving/.installed), Chromium and a Chinese font (Debian, Ubuntu:
# apt-get install chromium fonts-noto-cjk).
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
SERVER_PYTHON=${SERVER_PYTHON:-.venv-simple-serving/bin/python}
BROWSER=${BROWSER:-chromium}
MODEL=${MODEL:-build/demo/checkpoint}
PICTURES=${PICTURES:-docs/images}
WORK=${WORK:-build/demo/page}
servers=
trap 'test -z "$servers" || kill $servers' EXIT

take() {  # name, height in pixels, address
    "$BROWSER" --headless --no-sandbox --hide-scrollbars --accept-lang=zh-CN --window-size="1000,$2" \
        --virtual-time-budget=20000 --screenshot="$WORK/$1.png" "$3" 2>&1 | grep written
    "$PYTHON" -c 'import sys; from PIL import Image; Image.open(sys.argv[1]).convert("RGB").quantize(255).save(sys.argv[2])' \
        "$WORK/$1.png" "$PICTURES/$1.png"
}

serve() {  # name of its log, command; sets address
    log="$WORK/$1.log"
    shift
    "$@" 2> "$log" &
    servers="$servers $!"
    until address=$(grep -o 'http://127[^ "]*' "$log"); do kill -0 $!; sleep 1; done
}

mkdir -p "$WORK"
place=$(cd "$WORK" && pwd)
"$PYTHON" analysis/report.py --dataset_dir data --params_path "$MODEL" --report_dir "$WORK" --baseline
# the same page from its wrong texts on: headless Chromium does not scroll to them
sed '/<h1>/,/<h2 id="bad-cases">/{/<h2 id="bad-cases">/!d}' "$WORK/report.html" > "$WORK/cases.html"
take report 960 "file://$place/report.html"
take cases 750 "file://$place/cases.html"

"$PYTHON" analysis/evaluate.py --dataset_dir data --params_path "$MODEL" --bad_case_file "$WORK/bad_case.txt"
"$PYTHON" analysis/word_interpret.py --dataset_dir data --params_path "$MODEL" --interpret_input_file "$WORK/bad_case.txt" \
    --html_file "$WORK/words.html" --output_file "$WORK/words.jsonl"
take words 450 "file://$place/words.html"

"$PYTHON" train.py --do_train --teacher "$MODEL" --student_layers 1 --data_dir data --output_dir "$WORK/student" \
    --overwrite_output_dir --num_train_epochs 4 --learning_rate 1e-3 --evaluation_strategy no --save_strategy no --report_to none
"$PYTHON" analysis/compare.py "$MODEL" "$WORK/student" --dataset_dir data --difference_file "$WORK/differences.txt" \
    --report "$WORK/compare.html"
take compare 600 "file://$place/compare.html"

rm -f "$WORK/review.jsonl"
serve review "$PYTHON" analysis/review.py --dataset_dir data --params_path "$MODEL" --journal "$WORK/review.jsonl" --port 0
take review 640 "$address&name=lin&language=zh"

"$PYTHON" export_model.py --params_path "$MODEL" --output_path "$WORK/export" --onnx
serve serving "$SERVER_PYTHON" deploy/simple_serving/server.py --export_dir "$WORK/export" --port 0
take serving 800 "$address/#头疼怎么办%0A拔牙多少钱%0A青霉素过敏会有什么症状"
