#!/usr/bin/env bash
# Builds the driver, quantizes the demo GPT-2 to INT4 and prints what that costs in perplexity and saves in bytes.
# The quantized model lands in build/demo/model, the report in build/demo/report.json.
#
#   scripts/demo.sh [OPTION...]     the options go to `gptq quantize`, e.g. --group-size 64; paths in
#                                   them start at the checkout's root

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
configure default build
cmake --build build --target gptq_driver

text=build/demo/text
if [[ ! -f $text/train.txt || ! -f $text/heldout.txt ]]; then python scripts/gather_text.py "$text"; fi
rm -rf build/demo/model
exec build/bin/gptq quantize tests/data/demo_gpt2 -o build/demo/model --calibration "$text/train.txt" \
  --eval "$text/heldout.txt" --max-tokens 40000 --json build/demo/report.json "$@"
