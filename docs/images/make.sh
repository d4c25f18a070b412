#!/bin/sh
# Makes the pictures of the pages in the documents, from the model of `make demo` (build/demo/): report.png and cases.png of
# analysis/report.py, review.png of analysis/review.py.
#
#     sh docs/images/make.sh
#
# Needs Chromium and a Chinese font (Debian, Ubuntu: apt-get install chromium fonts-noto-cjk).
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
BROWSER=${BROWSER:-chromium}
PAGE=build/demo/page

take() {  # name, height in pixels, address
    "$BROWSER" --headless --no-sandbox --hide-scrollbars --window-size="1000,$2" --virtual-time-budget=20000 \
        --screenshot="$PWD/$PAGE/$1.png" "$3" 2>&1 | grep written
    "$PYTHON" -c 'import sys; from PIL import Image; Image.open(sys.argv[1]).convert("RGB").quantize(255).save(sys.argv[2])' \
        "$PAGE/$1.png" "docs/images/$1.png"
}

"$PYTHON" analysis/report.py --dataset_dir data --params_path build/demo/checkpoint --report_dir $PAGE --baseline
# the same page from its wrong texts on: headless Chromium does not scroll to them
sed '/<h1>/,/<h2 id="bad-cases">/{/<h2 id="bad-cases">/!d}' $PAGE/report.html > $PAGE/cases.html
take report 960 "file://$PWD/$PAGE/report.html"
take cases 750 "file://$PWD/$PAGE/cases.html"

rm -f $PAGE/review.jsonl
"$PYTHON" analysis/review.py --dataset_dir data --params_path build/demo/checkpoint --journal $PAGE/review.jsonl --port 0 \
    2> $PAGE/review.log &
server=$!
trap 'kill $server' EXIT
until address=$(grep -o "http://127[^ ]*" $PAGE/review.log); do kill -0 $server; sleep 1; done
take review 640 "$address&name=lin&language=zh"
