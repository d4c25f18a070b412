#!/bin/sh
# Makes the two pictures of the report page in README.md, report.png and cases.png, from the model of `make demo` (build/demo/).
#
#     sh docs/images/make.sh
#
# Needs Chromium and a Chinese font (Debian, Ubuntu: apt-get install chromium fonts-noto-cjk).
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
BROWSER=${BROWSER:-chromium}
PAGE=build/demo/page

"$PYTHON" analysis/report.py --dataset_dir data --params_path build/demo/checkpoint --report_dir $PAGE --baseline
# the same page from its wrong texts on: headless Chromium does not scroll to them
sed '/<h1>/,/<h2 id="bad-cases">/{/<h2 id="bad-cases">/!d}' $PAGE/report.html > $PAGE/cases.html

for picture in report,960 cases,750; do  # name, height in pixels
    name=${picture%,*}
    "$BROWSER" --headless --no-sandbox --hide-scrollbars --window-size="1000,${picture#*,}" \
        --screenshot="$PWD/$PAGE/$name.png" "file://$PWD/$PAGE/$name.html" 2>&1 | grep written
    "$PYTHON" -c 'import sys; from PIL import Image; Image.open(sys.argv[1]).convert("RGB").quantize(255).save(sys.argv[2])' \
        $PAGE/$name.png docs/images/$name.png
done
