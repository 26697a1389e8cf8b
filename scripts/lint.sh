#!/usr/bin/env bash
# Checks the sources: clang-format, file lengths, ruff, shellcheck (where installed) and clang-tidy.
# clang-tidy skips a unit when neither its sources nor a header have changed since it last passed.
#
#   scripts/lint.sh [--fix]     --fix lets clang-format and ruff correct what they can

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

fix=false
if [[ ${1:-} == --fix ]]; then fix=true; fi
failed=()

mapfile -t cpp < <(find include csrc ops tests \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) | sort)
mapfile -t shell < <(find scripts .ci -type f \( -name '*.sh' -o -name run \))
python_sources=(setup.py scripts ops tests)

if $fix; then
  clang-format -i "${cpp[@]}"
  ruff check -q --fix "${python_sources[@]}" || true
  ruff format -q "${python_sources[@]}"
fi

clang-format --dry-run -Werror "${cpp[@]}" || failed+=(clang-format)
ruff check "${python_sources[@]}" || failed+=("ruff check")
ruff format --check "${python_sources[@]}" || failed+=("ruff format")
if command -v shellcheck >/dev/null; then shellcheck -x -P SCRIPTDIR "${shell[@]}" || failed+=(shellcheck); fi

for file in "${cpp[@]}"; do
  lines=$(wc -l <"$file")
  if ((lines >= 500)); then
    echo "$file: $lines lines; a file has fewer than 500" >&2
    failed+=("$file")
  fi
done

# Configured apart from the build: clang cannot read g++'s precompiled header. Sources are checked eight at a time, as
# unity builds join them, since nearly all of clang-tidy's time goes to torch's headers. -fopenmp is taken back because
# clang's omp.h need not be there.
mkdir -p build/tidy/passed
cmake --preset default -B build/tidy "-DGPTQ_TORCH_DIR=$(torch_dir)" -DGPTQ_BUILD_TESTS=OFF \
  -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON >build/tidy.log 2>&1 ||
  { cat build/tidy.log >&2 && failed+=("tidy's configure"); }

tidy() {
  local unit=$1 stamp log sources
  stamp="build/tidy/passed/${unit//\//.}"
  mapfile -t sources < <(sed -n 's/^#include "\(.*\.cpp\)"$/\1/p' "$unit")
  local newer=(-newer "$stamp" -print -quit)
  if [[ -f $stamp && -z $(find "$unit" "${sources[@]}" .clang-tidy requirements.txt "${newer[@]}") &&
    -z $(find include csrc ops -name '*.h' "${newer[@]}") ]]; then
    return
  fi
  touch "$stamp.started"
  if log=$(clang-tidy -p build/tidy --quiet --warnings-as-errors='*' --extra-arg=-fno-openmp \
    --extra-arg=-Wno-unknown-warning-option "$unit" 2>&1); then
    mv "$stamp.started" "$stamp"
  else
    rm -f "$stamp" "$stamp.started"
    echo "$log"
    return 1
  fi
}
export -f tidy
# shellcheck disable=SC2016 # the inner shell expands $0
sed -n 's/^ *"file": "\(.*\.\(cpp\|cxx\)\)".*/\1/p' build/tidy/compile_commands.json |
  xargs -d '\n' -r -n 1 -P "$jobs" bash -c 'tidy "$0"' || failed+=(clang-tidy)

if ((${#failed[@]})); then
  printf 'lint.sh: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "lint.sh: ${#cpp[@]} C++ files and the Python and shell sources are in order"
