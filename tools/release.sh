#!/usr/bin/env bash
# usage: tools/release.sh VARIANT [--tag REF] [--out FOLDER] [--from WHEEL] [--full] [--no-environments]
#
# Builds the wheel of a variant, checks it, and writes checksums and an index of the wheels in FOLDER. A wheel that fails
# a check stays in FOLDER/unchecked.
#
# VARIANT            cpu, cu126, cu128, cu130, public or cu12-smoke (tools/variants.py). nvcc has to be of the variant's
#                    CUDA version (CUDA_HOME, PATH); cu12-smoke fetches its own.
# --tag REF          what is built, from a clean clone (default HEAD): changes that are not committed are left out
# --out FOLDER       where the wheel goes (default dist)
# --from WHEEL       check this wheel instead of building one
# --full             every environment of tools/check_environments.py, not its short form
# --no-environments  leave them out
#
# PYTHON             the interpreter, 3.11 or newer (default python3)
# AUDITWHEEL_PLAT    the platform tag, such as manylinux_2_28_x86_64 (default: the oldest that the libraries fit)
# RELEASE_WORK       a folder that keeps the virtual environment for the next call (default: a temporary one)
# RELEASE_URL        where FOLDER will be served, for the links of the index (default: relative links)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}

say() { echo "== release: $*" >&2; }
fail() { echo "release: $*" >&2 && exit 1; }
usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
  echo "release: $*" >&2
  exit 2
}

variant='' tag=HEAD out=$root/dist wheel='' environments=1 full=()
while [ $# -gt 0 ]; do
  case $1 in
    --tag | --out | --from)
      [ $# -gt 1 ] || usage "$1: expected a value, got none"
      case $1 in --tag) tag=$2 ;; --out) out=$2 ;; --from) wheel=$2 ;; esac
      shift
      ;;
    --full) full=(--full) ;;
    --no-environments) environments='' ;;
    -*) usage "unknown option $1" ;;
    *)
      [ -z "$variant" ] || usage "VARIANT: expected one, got $variant and $1"
      variant=$1
      ;;
  esac
  shift
done
[ -n "$variant" ] || usage "VARIANT: expected one, got none"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "PYTHON: expected Python 3.11 or newer, got $("$PYTHON" --version)"
settings=$("$PYTHON" "$root/tools/variants.py" "$variant") || exit 2
eval "export $(tr '\n' ' ' <<<"$settings")"
if [ -n "$wheel" ]; then
  [ -f "$wheel" ] || fail "--from: expected a wheel, got $wheel"
  local_version=$(basename "$wheel" | sed -n 's/^[^-]*-[^-+]*+\{0,1\}\([^-]*\)-.*/\1/p')
  [ "$local_version" = "$FASTGEN_LOCAL_VERSION" ] ||
    fail "--from: expected a wheel of $variant (local version '$FASTGEN_LOCAL_VERSION'), got $(basename "$wheel")"
  wheel=$(realpath "$wheel")
else
  git -C "$root" rev-parse --quiet --verify "$tag^{commit}" >/dev/null ||
    fail "--tag: expected a commit, got $tag"
fi

if [ -n "${RELEASE_WORK:-}" ]; then
  mkdir -p "$RELEASE_WORK"
  work=$(cd "$RELEASE_WORK" && pwd)
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)

# Python with torch, what the build requires and the extra release, of the versions in constraints.txt.
make_environment() {
  "$PYTHON" - "$root/pyproject.toml" >"$work/requirements.txt" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))
release = project["project"]["optional-dependencies"]["release"]
print("torch", "numpy", "wheel", *project["build-system"]["requires"], *release, sep="\n")
PYTHON
  cat "$root/constraints.txt" "$work/requirements.txt" | sha256sum >"$work/requirements.sha256"
  if ! cmp -s "$work/requirements.sha256" "$work/venv/complete"; then
    say "virtual environment"
    "$PYTHON" -m venv --clear "$work/venv"
    "$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet -c "$root/constraints.txt" \
      -r "$work/requirements.txt"
    cp "$work/requirements.sha256" "$work/venv/complete"
  fi
  export PATH="$work/venv/bin:$PATH"
}

find_nvcc() {
  if [ "$variant" = cu12-smoke ]; then
    export CUDA_HOME="$work/cuda12"
    [ -d "$CUDA_HOME" ] || "$root/tools/fetch_nvcc12.sh" "$CUDA_HOME"
  fi
  local nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc found
  found=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p') || fail "$variant needs nvcc $RELEASE_CUDA, $nvcc failed"
  [ "$found" = "$RELEASE_CUDA" ] || fail "$variant needs nvcc $RELEASE_CUDA, $nvcc is of CUDA $found"
}

# Sets wheel. The wheel is built from the source distribution, which is thereby known to be complete.
build() {
  rm -rf "$work/source" "$work/sdist" "$work/built" "$work/repaired"
  git clone --quiet --no-checkout "$root" "$work/source"
  git -C "$work/source" checkout --quiet --detach "$(git -C "$root" rev-parse "$tag^{commit}")"
  say "source distribution of $(git -C "$work/source" rev-parse --short HEAD)"
  (cd "$work/source" && env -u FASTGEN_LOCAL_VERSION FASTGEN_BUILD=none \
    python -m build --sdist --no-isolation --outdir "$work/sdist" . >"$work/sdist.log" 2>&1) ||
    { tail -n 30 "$work/sdist.log" >&2 && fail "the source distribution failed"; }
  python -m twine check --strict "$work"/sdist/*.tar.gz
  say "wheel of $variant: $(tr '\n' ' ' <<<"$settings")"
  # pip would take a wheel that it once built from a file of this name.
  python -m pip --disable-pip-version-check --no-cache-dir wheel -v --no-build-isolation --no-deps \
    --wheel-dir "$work/built" "$work"/sdist/*.tar.gz >"$work/build.log" 2>&1 ||
    { tail -n 50 "$work/build.log" >&2 && fail "the build failed"; }
  say "auditwheel"
  auditwheel repair --strip --plat "${AUDITWHEEL_PLAT:-auto}" --exclude 'libtorch*.so' --exclude 'libc10*.so' \
    --wheel-dir "$work/repaired" "$work"/built/*.whl
  mkdir -p "$out/unchecked"
  cp "$work"/sdist/*.tar.gz "$work"/repaired/*.whl "$out/unchecked"
  wheel=$out/unchecked/$(basename "$work"/repaired/*.whl)
}

{ # Read as a whole before it runs: the script may change meanwhile.
  if [ -z "$wheel" ] && [ -n "$RELEASE_CUDA" ]; then find_nvcc; fi
  make_environment
  if [ -z "$wheel" ]; then build; fi
  say "static gates"
  python "$root/tools/check_wheel.py" "$wheel"
  if [ -n "$environments" ]; then
    say "environments"
    python "$root/tools/check_environments.py" "$wheel" "${full[@]}"
  fi
  if [ "$(dirname "$wheel")" = "$out/unchecked" ]; then
    find "$out/unchecked" -name '*.tar.gz' -exec mv {} "$out" \;
    mv "$wheel" "$out"
    rmdir --ignore-fail-on-non-empty "$out/unchecked"
  elif [ "$(dirname "$wheel")" != "$out" ]; then
    cp "$wheel" "$out"
  fi
  say "checksums and index"
  (cd "$out" && find . -maxdepth 1 \( -name '*.whl' -o -name '*.tar.gz' \) -printf '%f\n' | sort | xargs sha256sum >SHA256SUMS)
  python "$root/tools/make_index.py" "$out" "$out" ${RELEASE_URL:+--base-url "$RELEASE_URL"}
  say "$out/$(basename "$wheel")"
  exit
}
