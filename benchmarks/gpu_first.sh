#!/usr/bin/env bash
# The first minutes on a GPU, in one command of at most eight minutes: device checks, speed beside timm's, and
# Fashion-MNIST-LT at the paper's length. gpu_first.py describes the steps; a second call continues where one ended.
#
#   benchmarks/gpu_first.sh --pack          # before, with a network: puts wheels and DATA= into build/gpu_wheels
#   benchmarks/gpu_first.sh                 # on the machine, which needs no network; options are those of gpu_first.py
#   SMALL=1 PYTHON=.venv/bin/python benchmarks/gpu_first.sh --minutes 20    # tries every step, without a GPU too
#
# DATA      folder of Fashion-MNIST's four IDX files; build/gpu_wheels/data if it is packed
# PYTHON    interpreter with torch and torchvision (python3); --pack takes the versions of its packages (.venv/bin/python)
# TARGET    Python version of the machine, for --pack (3.12)
# PACKAGES  names of the packages to pack, if it is known what the machine lacks
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS=build/gpu_wheels
LIMIT=60 # MiB

# What an image with PyTorch may lack or have too old. Of the other needs of setup.py, torchvision brings Pillow; NumPy,
# pandas, pyarrow and scikit-learn are too large to carry.
PACKAGES=${PACKAGES:-accelerate aiohappyeyeballs aiohttp aiosignal annotated-doc anyio attrs certifi charset-normalizer \
    click datasets dill evaluate filelock frozenlist fsspec h11 hf-xet httpcore httpcore2 httpx httpx2 huggingface_hub \
    idna markdown-it-py mdurl multidict multiprocess packaging propcache psutil pygments pyyaml regex requests rich \
    safetensors shellingham timm tokenizers tqdm transformers truststore typer urllib3 xxhash yarl}

pack() {
    local python=${PYTHON:-.venv/bin/python} target=${TARGET:-3.12} platforms=() pinned
    for glibc in 2_34 2_31 2_28 2_27 2_24 2_17 2014 1; do
        platforms+=(--platform "manylinux${glibc/#2_/_2_}_x86_64")
    done
    # shellcheck disable=SC2086 # one word for each package
    pinned=$("$python" -c 'import importlib.metadata as m, sys
print(*(f"{name}=={m.version(name)}" for name in sys.argv[1:]))' $PACKAGES)
    rm -rf "$WHEELS" && mkdir -p "$WHEELS"
    # shellcheck disable=SC2086 # one word for each package
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$target" \
        "${platforms[@]}" --dest "$WHEELS" $pinned
    if [[ -n ${DATA:-} ]]; then
        mkdir "$WHEELS/data"
        cp "$DATA"/{train,t10k}-{images-idx3,labels-idx1}-ubyte* "$WHEELS/data/"
    fi
    local size
    size=$(du -sm --apparent-size "$WHEELS" | cut -f1)
    echo "$WHEELS: $size MiB, for Python $target"
    ((size <= LIMIT)) || {
        echo "gpu_first.sh: more than $LIMIT MiB; name in PACKAGES= only what the machine lacks, or pack without DATA=." >&2
        exit 1
    }
}

# An environment on top of the image's: it sees the image's packages, and pip adds only what is missing or too old.
prepare() {
    local parent env=build/gpu_env
    parent=$(command -v "${PYTHON:-python3}")
    rm -rf "$env"
    "$parent" -m venv --without-pip "$env"
    "$parent" -c 'import site; print(*site.getsitepackages(), sep="\n")' >"$(echo "$env"/lib/python*/site-packages)/image.pth"
    local install=("$env/bin/python" -m pip install --quiet --no-compile --no-index --no-build-isolation --editable .)
    "${install[@]}" --find-links "$WHEELS" || {
        echo "gpu_first.sh: these do not fit the image's packages; all packed ones are used, without regard to these." >&2
        "${install[@]}" --no-deps "$WHEELS"/*.whl
    }
    PYTHON=$env/bin/python
}

if [[ ${1:-} == --pack ]]; then
    pack
    exit
fi
[[ -d $WHEELS ]] && prepare
[[ -d $WHEELS/data ]] && DATA=${DATA:-$WHEELS/data}
exec "${PYTHON:-python3}" benchmarks/gpu_first.py ${DATA:+--data "$DATA"} "$@"
