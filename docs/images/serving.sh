#!/bin/sh
# Makes the picture of the page of deploy/simple_serving, serving.png, with the model of `make demo` (build/demo/).
#
#     sh docs/images/serving.sh
#
# Needs the server's environment (make .venv-simple-serving/.installed), Chromium and a Chinese font (Debian, Ubuntu:
# apt-get install chromium fonts-noto-cjk).
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
BROWSER=${BROWSER:-chromium}
PAGE=$PWD/build/demo/page

mkdir -p "$PAGE"
"$PYTHON" export_model.py --params_path build/demo/checkpoint --output_path "$PAGE/export" --onnx
.venv-simple-serving/bin/python deploy/simple_serving/server.py --export_dir "$PAGE/export" --port 0 2> "$PAGE/serving.log" &
server=$!
trap 'kill $server' EXIT
until address=$(grep -o "http://127[^\"]*" "$PAGE/serving.log"); do kill -0 $server; sleep 1; done
"$BROWSER" --headless --no-sandbox --hide-scrollbars --accept-lang=zh-CN --window-size="${WIDTH:-1000},${HEIGHT:-800}" \
    --virtual-time-budget=20000 --screenshot="$PAGE/serving.png" "$address/#头疼怎么办%0A拔牙多少钱%0A青霉素过敏会有什么症状" 2>&1 | grep written
"$PYTHON" -c 'import sys; from PIL import Image; Image.open(sys.argv[1]).convert("RGB").quantize(255).save(sys.argv[2])' \
    "$PAGE/serving.png" "${PICTURE:-docs/images/serving.png}"
