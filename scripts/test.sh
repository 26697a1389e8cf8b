#!/usr/bin/env bash
# Builds everything and runs every test: GoogleTest through ctest, then pytest, then scripts/lint.sh.
# All of them run even when one fails; the exit status is 0 only if all passed.
#
#   scripts/test.sh [--no-lint] [--sanitize]
#
#   --no-lint    leave lint out
#   --sanitize   instead of all that, build with AddressSanitizer and UndefinedBehaviorSanitizer (in build-asan) and
#                run the C++ tests

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

lint=true
sanitize=false
for argument in "$@"; do
  case $argument in
    --no-lint) lint=false ;;
    --sanitize) sanitize=true ;;
    -h | --help) usage && exit ;;
    *) usage >&2 && exit 2 ;;
  esac
done

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if $sanitize; then
  configure asan build-asan
  cmake --build --preset asan
  exec ctest --preset asan -j "$jobs"
fi

werror=OFF
if [[ ${CI:-} == true ]]; then werror=ON; fi
configure default build "-DGPTQ_WERROR=$werror"
cmake --build build

failed=()
ctest --preset default -j "$jobs" || failed+=(ctest)
python -m pytest -n "$jobs" --dist loadfile || failed+=(pytest) # 5, "no tests collected", is a failure too
if $lint; then scripts/lint.sh || failed+=(lint); fi

if ((${#failed[@]})); then
  echo "test.sh: failed: ${failed[*]}" >&2
  exit 1
fi
echo "test.sh: all passed"
