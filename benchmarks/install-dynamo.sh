#!/bin/sh
# Installs NVIDIA Dynamo's front end, for the CPU, into a virtual environment of its own.
#
#     install-dynamo.sh DIR        then DIR/bin/python -m dynamo.frontend
#
# Workers need `coldframe[dynamo]` and nothing of this. The metadata of ai-dynamo also asks for packages that
# only simulate engines, and of which there is no build here; so it goes in without its requirements.
set -eu

dir=${1:?usage: install-dynamo.sh DIR}
python=${PYTHON:-python3}

"$python" -m venv "$dir"
pip="$dir/bin/python -m pip --quiet"
$pip install ai-dynamo-runtime==1.6.1
$pip install aiohttp certifi 'kubernetes<33' msgspec 'prometheus-client<1' pyzmq redis tqdm transformers zstandard \
  uvloop
$pip install --no-deps ai-dynamo==1.6.1
"$dir/bin/python" -c "import dynamo.frontend, dynamo.llm, dynamo.runtime"
