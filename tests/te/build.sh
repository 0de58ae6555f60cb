#!/usr/bin/env bash
# Transformer Engine on a machine without a GPU: build.sh PYTHON FOLDER VERSION
#
# NVIDIA's library comes as a wheel; its torch extension only as sources, which need the CUDA headers of torch's own wheels.
# Nothing here runs kernels, so the extension is compiled without optimization and with one precompiled header: on one core that
# is minutes instead of an hour.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") folder=$(realpath -m "$2") version=$3
site=$folder/site
pip="$python -m pip --quiet --disable-pip-version-check"
cuda=cu$($python -c "import torch; print(torch.version.cuda.split('.')[0])")
# Headers that torch does not install, of the release of those that it does.
crt=$($python -c "import importlib.metadata as m; print(m.version('nvidia-cuda-runtime').rsplit('.', 1)[0])")
mkdir -p "$site" "$folder/source"

$pip install --no-deps --target "$site" --upgrade transformer-engine=="$version" transformer-engine-"$cuda"=="$version" \
    nvdlfw-inspect nvidia-cudnn-frontend importlib-metadata zipp onnx onnxscript onnx-ir ml-dtypes wheel "nvidia-cuda-crt==$crt.*" nvidia-curand
$pip download --no-deps --no-build-isolation --no-binary transformer-engine-torch --dest "$folder/source" \
    transformer-engine-torch=="$version"
tar xzf "$folder"/source/transformer_engine_torch-"$version".tar.gz -C "$folder/source"
cd "$folder/source/transformer_engine_torch-$version"

# Every file begins with this header; gcc takes header.h.gch where it is compiled with the same flags.
cat >"$folder/header.h" <<'HEADER'
#include <nccl.h>
#include <torch/extension.h>
#include <ATen/cuda/CUDAContext.h>
HEADER
cat >"$folder/cxx" <<CXX
#!/usr/bin/env bash
case " \$* " in
*" -c "*)
    if [ ! -e $folder/header.h.gch ]; then
        flags=()
        for word in "\$@"; do
            case \$word in -MMD | -MF | -c | -o | *.cpp | *.d | *.o) ;; *) flags+=("\$word") ;; esac
        done
        g++ "\${flags[@]}" -O0 -x c++-header $folder/header.h -o $folder/header.h.gch
    fi
    exec g++ -include $folder/header.h "\$@" -O0 ;;
*) exec g++ "\$@" ;;
esac
CXX
chmod +x "$folder/cxx"

nvidia=$($python -c "import nvidia; print(nvidia.__path__[0])")
CPATH=$(echo "$site"/nvidia/*/include "$nvidia"/*/include "$nvidia"/*/include/cccl | tr ' ' ':')
export CPATH CXX="$folder/cxx" MAX_JOBS=${MAX_JOBS:-1} PYTHONPATH="$site"
export NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0
$python -c "import torch; torch.version.cuda" # fails here and not in the middle of setup.py
$python setup.py --quiet build_ext --build-lib "$site"
