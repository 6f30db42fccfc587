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

settings=()
case "${1:-}" in
  "") kind=quickstart ;;
  --pretrained) kind=pretrained settings=(yamls/quickstart/pretrained.yaml) ;;
  *) echo "expected no argument or --pretrained, got: $1" >&2; exit 2 ;;
esac

bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
# Large tensors come and go in every step: without this a third of the time is the kernel's, handing out memory.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296}
# Threads that wait must not spin: on a machine that does other work, too, a step then takes several times as long.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
runs=runs/$kind
mkdir -p "$runs"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then settings+=(precision=amp_bf16); fi

# run NAME [YAML or key=value ...]: train unless it has finished with these very YAMLs, settings, data and teacher. What
# began with others, or ended before its first checkpoint, is removed: nothing resumes from it, and no curve is drawn
# twice. Every output goes to a log beside the run.
run() {
  local name=$1 mark=$runs/$1.mark key given=(yamls/quickstart/baseline.yaml "${settings[@]}" "${@:2}")
  key=$({
    echo "${given[*]}"
    for word in "${given[@]}" "data/$kind/shards/manifest.json"; do [ ! -f "$word" ] || cat "$word"; done
    [ "$name" != let ] || [ ! -f "$runs/teacher.mark" ] || cat "$runs/teacher.mark"
  } | sha256sum | cut -d " " -f 1)
  if [ "$(cat "$mark" 2>/dev/null)" = "$key done" ]; then echo "$name: done before"; return; fi
  if [ "$(cat "$mark" 2>/dev/null)" != "$key" ] || ! compgen -G "$runs/$name/checkpoints/*.pt" >/dev/null; then
    rm -rf "${runs:?}/$name"
    echo "$key" >"$mark"
  fi
  echo "$name: composer scripts/train.py ${given[*]}   (log: $runs/$name.log)"
  if ! composer -n 1 scripts/train.py "${given[@]}" >"$runs/$name.log" 2>&1; then
    if grep -q 'No training would occur' "$runs/$name.log"; then # stopped between its last checkpoint and its last output
      rm -rf "${runs:?}/$name"
      run "$@"
      return
    fi
    tail -n 30 "$runs/$name.log" >&2
    echo "the $name run failed; the whole log is $runs/$name.log" >&2
    exit 1
  fi
  echo "$key done" >"$mark"
}

teacher=()
if [ "$kind" = quickstart ]; then
  python scripts/sample_data --tier small --bpe 2048 --out data/offline
  let-composer prepare data/offline/pile --out data/quickstart/shards \
    --tokenizer data/offline/tokenizer-bpe2048 --sequence-length 128 --validation 0.02
  run teacher yamls/quickstart/teacher.yaml
  teacher=(--teacher "$runs/teacher")
  run baseline
  run let yamls/quickstart/let.yaml
else
  python scripts/sample_data --tier small --teacher --out data/offline
  let-composer prepare data/offline/pile --out data/pretrained/shards \
    --tokenizer data/offline/smollm2-135m --sequence-length 128 --validation 0.02
  run baseline
  run let yamls/quickstart/let.yaml algorithms.let.weight=1 algorithms.let.normalize_teacher=standardize
fi
let-composer compare "$runs/baseline" "LET=$runs/let" ${teacher[@]+"${teacher[@]}"} --out "$runs/comparison"
echo "Judge by tokens and compute: times are of this machine, with whatever else it did."
