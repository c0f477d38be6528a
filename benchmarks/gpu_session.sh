#!/usr/bin/env bash
# Builds, tests and benchmarks fastgen on a machine with a GPU and no network; optionally trains some models.
# usage: benchmarks/gpu_session.sh FOLDER [build|test|bench|train ...]     (default: build test bench)
# Results are written to FOLDER incrementally, so that an interrupted session keeps them:
#   info.txt  log.txt  tests.xml  benchmarks.json (all families)  report.md  runs/MODEL
# PYTHON selects the interpreter; nothing is installed or downloaded. TORCH_CUDA_ARCH_LIST defaults to the
# architecture of the device.
set -uo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu_session.sh FOLDER [build|test|bench|train ...]}" && cd "$1" && pwd)
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test bench)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  capability=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
  [ "$capability" = 9.0 ] && capability=9.0a
  export TORCH_CUDA_ARCH_LIST=$capability
fi
failed=0

for stage in "${stages[@]}"; do
  echo "== $stage ($SECONDS s)"
  case $stage in
    build)
      FASTGEN_BUILD=cuda $python setup.py -q build_ext --inplace >>"$out/log.txt" 2>&1 || { tail -n 30 "$out/log.txt"; exit 1; }
      { git rev-parse HEAD 2>/dev/null; $python -m fastgen info; } | tee "$out/info.txt"
      ;;
    test)
      $python -m pytest tests -q -m "not slow" -k "cuda or test_opcheck or test_compile or test_backends or test_bad_arguments" --deselect tests/packaging/test_build.py \
        --junitxml="$out/tests.xml" 2>&1 | tee -a "$out/log.txt" | tail -n 40 || failed=1
      ;;
    bench)
      : >"$out/report.md"
      part=$(mktemp -d)
      for family in attention attention_second_order projection latent image_layers transformer; do
        $python -m pytest "benchmarks/suites/bench_$family.py" -q -k cuda --benchmark-only \
          --benchmark-json="$part/$family.json" >>"$out/log.txt" 2>&1 || failed=1
        [ -s "$part/$family.json" ] || continue
        $python benchmarks/report.py "$part/$family.json" | tee -a "$out/report.md"
        $python - "$out/benchmarks.json" "$part/$family.json" <<'MERGE'
import json, pathlib, sys
whole, part = map(pathlib.Path, sys.argv[1:])
new = json.loads(part.read_text())
if whole.exists():
    old = json.loads(whole.read_text())
    new["benchmarks"] = old["benchmarks"] + new["benchmarks"]
whole.write_text(json.dumps(new))
MERGE
      done
      ;;
    train)
      # Requires fastgen[train]. Together, these models use every family of kernels (sagan: second derivatives).
      for model in conv-vae sagan stylegan transformer-lm; do
        $python -m fastgen train "$model" --device cuda --out "$out/runs/$model" --overwrite >>"$out/log.txt" 2>&1 &&
          $python -m fastgen evaluate "$out/runs/$model" --device cuda | tee -a "$out/report.md" || failed=1
      done
      ;;
    *) echo "unknown stage: $stage"; exit 2 ;;
  esac
done
echo "== done ($SECONDS s), failed=$failed"
exit $failed
