#!/usr/bin/env bash
# Trains compressors that come with the package through their model, from the calibrated ones that
# examples/calibrate_bundled.sh has left in deltakv_hf/checkpoints, and puts them in their place: eight minutes on an H200.
#
#     python examples/build_corpus.py corpus && examples/calibrate_bundled.sh && examples/train_bundled.sh
#
# Made again on another machine, predictions differ from the full cache's by the same KL within its standard error.
# Ratios may be given: train_bundled.sh 8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/bundled_texts.sh

for ratio in ${*:-10 15}; do
    name="smollm2-135m-instruct-${ratio}x"
    deltakv train demo --compressor "deltakv_hf/checkpoints/$name" "${texts[@]}" \
        --num-tokens 3000000 --dtype float32 --out "corpus/trained/$name"
    rm -r "deltakv_hf/checkpoints/$name"
    mv "corpus/trained/$name" "deltakv_hf/checkpoints/$name"
done
