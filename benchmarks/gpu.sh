#!/usr/bin/env bash
# Measure everything on a machine with a GPU, in one go:
#
#     benchmarks/gpu.sh [--wheels DIR]... [arguments of python -m benchmarks.gpu]
#
# Needs a python (PYTHON, else python3) with PyTorch, NumPy, OpenCV, Pillow, matplotlib, psutil, rich,
# Jinja2, imagesize and msgspec, and for rows of other runtimes onnx, onnx_ir and onnxscript; no package
# registry, and nothing is installed. What that python lacks can lie in
# folders given with --wheels: wheels (*.whl), shared libraries of TensorRT-RTX (*.so*.xz), an archive
# cut into parts (part.0, part.1, ... of a .tar.xz, in any folders below). They are unpacked into a
# temporary folder that is deleted at the end.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

python=${PYTHON:-python3}
folders=()
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels)
      [ -d "${2:-}" ] || { echo "error: --wheels ${2:-}: no such folder" >&2; exit 2; }
      folders+=("$2"); shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
"$python" -c 'import sys; print("python:", sys.executable, sys.version.split()[0], file=sys.stderr)' || { echo "error: no $python; set PYTHON" >&2; exit 2; }

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
mkdir "$unpacked/site" "$unpacked/lib"
for folder in ${folders[@]+"${folders[@]}"}; do
  find "$folder" -name '*.whl' -print0 | while IFS= read -r -d '' wheel; do
    echo "wheel: $wheel" >&2
    "$python" -m zipfile -e "$wheel" "$unpacked/site"
  done
  find "$folder" -name '*.so*.xz' -print0 | while IFS= read -r -d '' library; do
    echo "library: $library" >&2
    "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"), 1 << 24)' \
      "$library" "$unpacked/lib/$(basename "$library" .xz)"
  done
  if [ -n "$(find "$folder" -name 'part.*' -print -quit)" ]; then
    echo "archive: $(find "$folder" -name 'part.*' | wc -l) parts in $folder" >&2
    find "$folder" -name 'part.*' -print | awk -F/ '{print $NF "\t" $0}' | sort | cut -f2 | tr '\n' '\0' | xargs -0 cat \
      | "$python" -c 'import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1], filter="data")' "$unpacked/site"
  fi
done
if [ -d "$unpacked/site/tensorrt_rtx_bindings" ] && [ ! -d "$unpacked/site/tensorrt_rtx" ]; then
  mkdir "$unpacked/site/tensorrt_rtx" # the package of that name holds no more than this
  printf 'from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n' >"$unpacked/site/tensorrt_rtx/__init__.py"
fi
export PYTHONPATH="$unpacked/site:$root${PYTHONPATH:+:$PYTHONPATH}"
export LD_LIBRARY_PATH="$unpacked/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader >&2
else
  echo "nvidia-smi: not there" >&2
fi
"$python" - >&2 <<'EOF'
import importlib.util
for name in ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda.bindings", "pynvml", "cv2"):
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        found = False
    print(f"{name}: {'there' if found else 'not there'}")
EOF
"$python" -m benchmarks.gpu ${arguments[@]+"${arguments[@]}"}
