#!/usr/bin/env bash
# On a machine with a GPU: build for it, then correctness (tests, conformance, compute-sanitizer), then timing.
#
# Uses the python3, torch, cmake, ninja and pybind11 that are there: no virtual environment, no network, no git.
# Writes at most 8 files, flat, to ${OUT:-build/gpu-check}, and takes at most 9 minutes on 16 cores. Every part
# runs even when one before it failed; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
arch=$($python - 2>/dev/null <<'PY'
import torch
major, minor = torch.cuda.get_device_capability(0)
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))
PY
) || { echo "tranche: gpu-check needs a GPU and a CUDA build of torch, and $python found none here."; exit 1; }

out=$(mkdir -p "${OUT:-build/gpu-check}" && cd "${OUT:-build/gpu-check}" && pwd)
site=$PWD/build/gpu-site
failed=()

# part NAME SECONDS COMMAND...: its output goes to the terminal and to one log
part() {
  local name=$1 seconds=$2 started=$SECONDS
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed+=("$name (exit $status)")
  echo "== $name: exit $status after $((SECONDS - started)) s"
}

# sanitize TOOL SUMMARY: a tool that found nothing must also say that it looked
sanitize() {
  local text
  text=$(timeout 60 compute-sanitizer --tool "$1" "$python" tools/sanitizer_cases.py 2>&1)
  echo "$text"
  grep -q "$2" <<<"$text"
}
sanitize_all() {
  local status=0
  for tool in memcheck initcheck synccheck; do
    sanitize $tool "ERROR SUMMARY: 0 errors" || { echo "FAILED: $tool"; status=1; }
  done
  sanitize racecheck "RACECHECK SUMMARY: 0 hazards displayed" || { echo "FAILED: racecheck"; status=1; }
  return $status
}
export -f sanitize sanitize_all
export python

export TORCH_CUDA_ARCH_LIST=$arch TRANCHE_CUDA=1 TRANCHE_SIM=1 PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1
rm -rf "$site"
part build 200 "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$site" .
part tests 150 "$python" -m pytest tests -m "not soak" -k cuda --timeout 60 -p no:cacheprovider
part sanitizer 150 bash -c sanitize_all
part bench 150 "$python" -m benchmarks --device cuda --json "$out/bench.json" --plot "$out"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'tranche: gpu-check failed in: %s\n' "${failed[*]}" | tee "$out/summary.txt"
  exit 1
fi
echo "tranche: gpu-check passed on sm_${arch/./}" | tee "$out/summary.txt"
