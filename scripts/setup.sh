#!/usr/bin/env bash
# Prepares this checkout, or finds it prepared: the Debian packages that are missing, and the virtual environment .venv
# with what requirements.txt pins. The other scripts source this file; afterwards they are at the checkout's root, the
# environment's programs come first in PATH, and `configure` is defined.
#
#   GPTQ_PYTHON   the interpreter that .venv is made with; default python3

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*"; }
fail() {
  echo "setup: $*" >&2
  exit 1
}

venv_works() { .venv/bin/python -c '' 2>/dev/null; }

# Prints the names of the Debian packages that the build needs and that are not there.
missing_packages() {
  local package
  command -v "${CXX:-c++}" >/dev/null || echo g++
  command -v pkg-config >/dev/null || echo pkg-config
  for package in libcli11-dev libgoogle-perftools-dev libgtest-dev libpcre2-dev nlohmann-json3-dev; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package"
  done
  if ! venv_works; then
    if ! command -v "$python" >/dev/null; then
      printf '%s\n' python3 python3-venv
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      echo python3-venv
    fi
  fi
}

install_packages() {
  local by_hand="install these Debian packages first: $*"
  local as_root=(env DEBIAN_FRONTEND=noninteractive)
  command -v apt-get >/dev/null || fail "$by_hand"
  if [[ $(id -u) -ne 0 ]]; then
    command -v sudo >/dev/null || fail "$by_hand"
    if [[ -t 0 ]]; then as_root=(sudo "${as_root[@]}"); else as_root=(sudo -n "${as_root[@]}"); fi
  fi
  say "installing the missing Debian packages with apt-get: $*"
  if ! "${as_root[@]}" apt-get install -y --no-install-recommends "$@"; then
    say "bringing the package lists up to date"
    "${as_root[@]}" apt-get update || fail "$by_hand"
    "${as_root[@]}" apt-get install -y --no-install-recommends "$@" || fail "$by_hand"
  fi
}

prepare_packages() {
  if ! command -v dpkg-query >/dev/null; then
    say "not a Debian system: g++, pkg-config, CLI11, GoogleTest, PCRE2 and nlohmann-json are taken to be there"
    return
  fi
  local packages
  mapfile -t packages < <(missing_packages)
  if ((${#packages[@]})); then install_packages "${packages[@]}"; fi
}

prepare_venv() {
  local stamp=.venv/requirements.sha256 wanted
  if ! venv_works; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
      fail "Python 3.10 or newer is needed; name one with GPTQ_PYTHON ($python is $("$python" -V 2>&1))"
    say "making the virtual environment .venv with $("$python" -V)"
    "$python" -m venv --clear .venv || fail "could not make .venv; on Debian, $python needs its -venv package"
  fi
  wanted=$(sha256sum <requirements.txt)
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    say "installing what requirements.txt names into .venv (torch is large: minutes the first time)"
    local pip=(.venv/bin/python -m pip install --disable-pip-version-check -q)
    "${pip[@]}" -r <(grep -vF '[no-deps]' requirements.txt) || fail "pip could not install requirements.txt"
    if grep -qF '[no-deps]' requirements.txt; then
      "${pip[@]}" --no-deps --no-build-isolation -r <(grep -F '[no-deps]' requirements.txt) ||
        fail "pip could not install requirements.txt"
    fi
    echo "$wanted" >"$stamp"
  fi
}

# Prints the folder of the torch that everything is built against.
torch_dir() {
  .venv/bin/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])'
}

# configure PRESET FOLDER [CMAKE_ARGUMENT...]: configures the build folder unless it was configured just so before.
configure() {
  local preset=$1 folder=$2
  shift 2
  local command=(cmake --preset "$preset" -B "$folder" "-DGPTQ_TORCH_DIR=$(torch_dir)" "$@")
  local record=$folder/configured_with
  if [[ ! -f $folder/build.ninja || CMakePresets.json -nt $record || $(cat "$record") != "${command[*]}" ]]; then
    "${command[@]}"
    echo "${command[*]}" >"$record"
  fi
}

# A translation unit that includes torch takes up to 2 GB to compile.
memory_gb=$(($(getconf _PHYS_PAGES) * $(getconf PAGE_SIZE) / 1000000000))
jobs=$(nproc)
if ((jobs > memory_gb / 2)); then jobs=$((memory_gb < 4 ? 1 : memory_gb / 2)); fi

python=${GPTQ_PYTHON:-python3}
if [[ -n ${GPTQ_PYTHON:-} ]] && ! command -v "$python" >/dev/null; then fail "GPTQ_PYTHON=$python does not exist"; fi
prepare_packages
prepare_venv
PATH=$PWD/.venv/bin:$PATH
export PATH CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$jobs}
