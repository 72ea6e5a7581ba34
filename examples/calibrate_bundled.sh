#!/usr/bin/env bash
# Calibrates the compressors that come with the package, in deltakv_hf/checkpoints: an hour on two CPU cores.
# Those at a tenth and a fifteenth are then trained: examples/train_bundled.sh.
#
#     python examples/build_corpus.py corpus && examples/calibrate_bundled.sh
#
# The text is the same everywhere, but sums of floating-point numbers are not: made again on another machine, predictions
# differ from the full cache's by the same KL within its standard error. Ratios may be given: calibrate_bundled.sh 8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/bundled_texts.sh

for ratio in ${*:-10 15.2 5}; do
    deltakv calibrate demo "${texts[@]}" --license apache-2.0 --dtype float32 \
        --ratio "$ratio" --sensitivity-windows 33 \
        --workspace corpus/calibration \
        --out "deltakv_hf/checkpoints/smollm2-135m-instruct-${ratio%.*}x"
done
