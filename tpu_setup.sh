#!/usr/bin/env bash
# Without arguments: installs lm on the TPU VM that it runs on, and checks the devices.
# With arguments, on your own machine: TPUs of Google Cloud from nothing to a run (docs/tpu.md).
#
#   ./tpu_setup.sh run NAME --type=v5litepod-8 --zone=ZONE --spot -- --config=... --workdir=gs://...
#   ./tpu_setup.sh --help
set -euo pipefail
cd "$(dirname "$0")"

# Take the newest Python that lm supports.
python=
for candidate in python3.13 python3.12 python3.11 python3; do
  if command -v "$candidate" >/dev/null &&
    "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
    python=$candidate
    break
  fi
done

if [ $# -gt 0 ]; then
  [ -n "$python" ] || { echo "error: Python 3.11 to 3.13 is needed" >&2; exit 1; }
  exec "$python" -m lm.tpu "$@"
fi

# Most images of TPU VMs have an older Python: uv, from PyPI, brings its own.
if [ ! -x .venv/bin/pip ]; then
  if [ -n "$python" ] && "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv .venv
  else
    python3 -m pip install --quiet --user uv ||
      { echo "error: no Python 3.11 to 3.13 with venv here, and no pip to get one by uv" >&2; exit 1; }
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  fi
fi
.venv/bin/pip install --quiet --upgrade pip
.venv/bin/pip install --quiet -c constraints.txt -e '.[tpu,gcs]'

# On a pod, each worker waits here for the others. Run the script on all of them.
timeout 600 .venv/bin/python - lm-check <<'PY'
import importlib.metadata, logging, platform, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
packages = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu")]
print(f"versions: python {platform.python_version()}, {', '.join(packages)}", flush=True)
import jax
from lm import startup
try:
    devices = startup.start("tpu")
except ValueError as error:
    sys.exit(f"error: {error}\nIs this a TPU VM, with the --runtime of its type, and is no other "
             "process at the TPU (next: sudo lsof -w /dev/accel* /dev/vfio/*)?")
here = jax.local_devices()
total = float(jax.jit(lambda: jax.numpy.ones((1024, 1024)).sum())())
assert total == 1024 * 1024, total
print(f"ok: {len(here)} devices here ({here[0].device_kind}), {len(devices)} in all, process {jax.process_index()} of {jax.process_count()}")
PY
