#!/bin/sh
# From nothing to a trained, evaluated, exported classifier on the sample data; `make demo` runs it. Output: build/demo/.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=build/demo
rm -rf "$OUT"
start=$(date +%s)
run() { echo "+ python $*"; "$PYTHON" "$@"; }

run train.py --model_name_or_path data --data_dir data --output_dir $OUT/checkpoint --learning_rate 1e-3 \
    --num_train_epochs 12 --early_stopping_patience 4 --max_seq_length 128 --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 32 --do_train --do_eval --metric_for_best_model accuracy --load_best_model_at_end \
    --evaluation_strategy epoch --save_strategy epoch --save_total_limit 1
run analysis/evaluate.py --dataset_dir data --params_path $OUT/checkpoint --bad_case_file $OUT/bad_case.txt \
    --report_dir $OUT/report --baseline
run predict.py --dataset_dir data --params_path $OUT/checkpoint --output_file $OUT/output.txt
run export_model.py --params_path $OUT/checkpoint --output_path $OUT/export

seconds=$(($(date +%s) - start))
"$PYTHON" - "$OUT" "$seconds" <<'END'
import json, os, sys
out, seconds = sys.argv[1:]
with open(f"{out}/report/metrics.json", encoding="utf-8") as file:
    metrics = json.load(file)
dev, baseline = metrics["dev"], metrics["baseline"]
count = lambda path: sum(1 for _ in open(path, encoding="utf-8")) - 1
size = lambda folder: sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)
                          if os.path.isfile(os.path.join(folder, name))) / 2**20
print(f"""
made                             what it is
{out}/checkpoint            trained model, {size(f'{out}/checkpoint'):.1f} MiB
{out}/report/report.html    evaluation report: open it in a browser
{out}/bad_case.txt          {count(f'{out}/bad_case.txt')} of {dev['size']} dev texts that the model gets wrong
{out}/output.txt            labels of the {count(f'{out}/output.txt')} texts in data/data.txt
{out}/export                static graph for deployment, {size(f'{out}/export'):.1f} MiB

on dev.txt                       accuracy  macro-F1
small ERNIE, from scratch          {dev['accuracy'] * 100:5.2f} %     {dev['macro_f1'] * 100:5.2f}
TF-IDF + logistic regression       {baseline['accuracy'] * 100:5.2f} %     {baseline['macro_f1'] * 100:5.2f}
done in {seconds} s""")
END
