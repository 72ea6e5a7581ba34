#!/usr/bin/env bash
# Makes the compressors that come with the package, in deltakv_hf/checkpoints: forty minutes on two CPU cores.
#
#     python examples/build_corpus.py corpus && examples/calibrate_bundled.sh
#
# The text is the same everywhere, but sums of floating-point numbers are not: made again on another machine, predictions
# differ from the full cache's by the same KL within its standard error. Ratios may be given: calibrate_bundled.sh 8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

texts=()
for name in bible code dialogue drama fiction nonfiction techdoc wiki; do
    texts+=(--text "corpus/train/$name.txt")
done
for ratio in ${*:-10 5}; do
    deltakv calibrate demo "${texts[@]}" \
        --text-license "bible=public domain" \
        --text-license "code=PSF-2.0 (CPython), BSD-3-Clause (torch)" \
        --text-license "dialogue=MIT" \
        --text-license "drama=public domain, from Project Gutenberg" \
        --text-license "fiction=public domain" \
        --text-license "nonfiction=GPL-2.0" \
        --text-license "techdoc=PSF-2.0, GPL-1.0-or-later or Artistic, PostgreSQL, GPL-2.0" \
        --text-license "wiki=CC-BY-SA (Wikipedia)" \
        --license apache-2.0 --dtype float32 \
        --ratio "$ratio" --sensitivity-windows 33 \
        --workspace corpus/calibration \
        --out "deltakv_hf/checkpoints/smollm2-135m-instruct-${ratio}x"
done
