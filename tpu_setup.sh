#!/usr/bin/env bash
# Installs lm on a Cloud TPU VM and checks the devices.
#
# On the VM itself, from the repository's root:
#   ./tpu_setup.sh
#
# From your own machine, on every worker of the TPU VM or pod slice NAME:
#   ./tpu_setup.sh NAME ZONE [PROJECT]
#
# To start a run afterwards, give every worker the same command. The workers find each other:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='cd lm && . .venv/bin/activate && \
#     python -m lm.main --config=configs/c4.py:gpt2 --workdir=gs://BUCKET/RUN --config.data.source_args.data_dir=gs://BUCKET/tfds'
set -euo pipefail
cd "$(dirname "$0")"

# With arguments: copy the repository to every worker, and run this script there.
if [ $# -ge 2 ]; then
  name=$1 zone=$2
  where=(--zone="$zone" ${3:+--project="$3"} --worker=all)
  archive=$(mktemp -d)/lm.tar.gz
  git archive --format=tar.gz --prefix=lm/ -o "$archive" HEAD  # every worker gets the same committed files
  gcloud compute tpus tpu-vm scp "$archive" "$name:lm.tar.gz" "${where[@]}"
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command='tar xzf lm.tar.gz && bash lm/tpu_setup.sh'
  exit
fi

# Take the newest Python that lm supports.
python=python3
for candidate in python3.13 python3.12 python3.11; do
  if command -v "$candidate" >/dev/null; then python=$candidate; break; fi
done
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
  echo "Python 3.11 to 3.13 is needed, $("$python" --version) is here. On Ubuntu: sudo apt-get install python3.11 python3.11-venv" >&2; exit 1; }
"$python" -m venv .venv
.venv/bin/pip install --quiet --upgrade pip
.venv/bin/pip install --quiet -c constraints.txt -e '.[tpu,gcs]'

# On a pod, each worker waits here for the others. Run the script on all of them.
.venv/bin/python - <<'PY'
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
import jax
from lm import startup
devices = startup.start("tpu")
here = jax.local_devices()
total = float(jax.jit(lambda: jax.numpy.ones((1024, 1024)).sum())())
assert total == 1024 * 1024, total
print(f"ok: {len(here)} devices here ({here[0].device_kind}), {len(devices)} in all, process {jax.process_index()} of {jax.process_count()}")
PY
