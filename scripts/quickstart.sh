#!/usr/bin/env bash
# Shows the method end to end: environment, data, a small teacher, the student without and with its guidance, a table and
# a picture. What is there already is reused; an interrupted call goes on where it stopped.
#
#   bash scripts/quickstart.sh                # everything is trained here: about 10 minutes on 2 CPU cores
#   bash scripts/quickstart.sh --pretrained   # a real teacher, SmolLM2-135M; its student is smaller than it, on a CPU
#
# PYTHON=python3.12 chooses the interpreter of .venv (3.10 to 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  "") kind=quickstart ;;
  --pretrained) kind=pretrained ;;
  *) echo "expected no argument or --pretrained, got: $1" >&2; exit 2 ;;
esac

bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
# Large tensors come and go in every step: without this a third of the time is the kernel's, handing out memory.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296}
runs=runs/$kind
mkdir -p "$runs"

options=()
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then options+=(precision=amp_bf16); fi

# Train one run unless it has finished; every output goes to a log beside it.
run() {
  if [ -e "$runs/$1.done" ]; then echo "$1: done before"; return; fi
  echo "$1: composer scripts/train.py yamls/${kind}_$1.yaml ${options[*]-}   (log: $runs/$1.log)"
  if ! composer -n 1 scripts/train.py "yamls/${kind}_$1.yaml" "${options[@]}" >"$runs/$1.log" 2>&1; then
    if grep -q 'No training would occur' "$runs/$1.log"; then # stopped between its last checkpoint and its last output
      rm -rf "${runs:?}/$1"
      run "$1"
      return
    fi
    tail -n 30 "$runs/$1.log" >&2
    echo "the $1 run failed; the whole log is $runs/$1.log" >&2
    exit 1
  fi
  touch "$runs/$1.done"
}

if [ "$kind" = quickstart ]; then
  python scripts/prepare_offline.py --tier small --bpe 2048 --out data/offline
  let-composer prepare data/offline/pile --out data/quickstart/shards \
    --tokenizer data/offline/tokenizer-bpe2048 --sequence-length 128 --validation 0.02
  run teacher
  teacher=(--teacher "$runs/teacher")
else
  python scripts/prepare_offline.py --tier small --teacher --out data/offline
  let-composer prepare data/offline/pile --out data/pretrained/shards \
    --tokenizer data/offline/smollm2-135m --sequence-length 128 --validation 0.02
  teacher=()
fi
run baseline
run let
let-composer compare "$runs/baseline" "$runs/let" ${teacher[@]+"${teacher[@]}"} --out "$runs/comparison"
