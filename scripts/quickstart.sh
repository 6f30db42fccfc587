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
  "") kind=quickstart text=(--bpe 2048) tokenizer=tokenizer-bpe2048 ;;
  --pretrained) kind=pretrained text=(--teacher) tokenizer=smollm2-135m ;;
  *) echo "expected no argument or --pretrained, got: $1" >&2; exit 2 ;;
esac

bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
# Large tensors come and go in every step: without this a third of the time is the kernel's, handing out memory.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296}
# Threads that wait must not spin: on a machine that does other work, too, a step then takes several times as long.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

python scripts/sample_data --tier small "${text[@]}" --out data/offline
let-composer prepare data/offline/pile --out "data/$kind/shards" \
  --tokenizer "data/offline/$tokenizer" --sequence-length 128 --validation 0.02
# As a setting of all runs, so that other data is another setting: what was trained with others is trained anew.
settings=("variables.shards=sha256:$(sha256sum <"data/$kind/shards/manifest.json" | cut -c 1-16)")
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then settings+=(precision=amp_bf16); fi
python scripts/evidence/sweep.py "yamls/quickstart/$kind.yaml" "${settings[@]}" --workers 1
echo "Judge by tokens and compute: times are of this machine, with whatever else it did."
