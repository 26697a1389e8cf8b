#!/usr/bin/env bash
# Runs the four studies of `gptq lab` with their default settings, group-size on correlated inputs as well, and draws
# them: build/lab/STUDY holds results.json, manifest.json and the plots, build/lab/compare.html all of it on one page.
#
#   scripts/lab.sh [--docs] [OPTION...]     --docs also brings the tables and plots of docs/studies.md up to date;
#                                           the options go to every study; all of them know --seed,
#                                           --threads, --mode, --damping and --bits

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
configure default build
cmake --build build --target gptq_driver

docs=false
if [[ ${1:-} == --docs ]]; then docs=true && shift; fi
lab=build/lab
mkdir -p $lab

build/bin/gptq lab toy -o $lab/toy "$@"
build/bin/gptq lab group-size -o $lab/group-size "$@"
build/bin/gptq lab group-size -o $lab/group-size-correlated --inputs correlated --samples 8192 "$@"
build/bin/gptq lab calibration -o $lab/calibration "$@"
build/bin/gptq lab bits -o $lab/bits "$@"

runs=("$lab"/{toy,group-size,group-size-correlated,calibration,bits})
python scripts/plot_lab.py --compare "${runs[@]}" -o $lab/compare.html
if $docs; then
  python scripts/plot_lab.py --markdown docs/studies.md "${runs[@]}"
  for run in "${runs[@]}"; do
    for plot in "$run"/*.png; do
      shown=lab_$(basename "$run")_$(basename "$plot")
      if grep -qF "($shown)" docs/studies.md; then cp "$plot" "docs/$shown"; fi
    done
  done
fi
echo "lab.sh: the page is $lab/compare.html"
