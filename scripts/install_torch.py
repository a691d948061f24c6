"""Install torch into this environment, but never gigabytes of GPU packages on a machine without a GPU.

    python scripts/install_torch.py [constraints.txt]

pip is asked first what it would install. Where that brings CUDA packages and there is no GPU, nothing is installed and
the remedy is printed. Needs only the standard library.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
ALLOW = "MOESTRO_ALLOW_GPU_TORCH"
REMEDY = f"""\
pip would install torch with {{number}} GPU packages ({{names}} ...), and this machine has no GPU. Do one of these:
  - let pip find a CPU build of torch (pytorch.org, 'Get started', shows the index to give): set PIP_EXTRA_INDEX_URL
    or PIP_FIND_LINKS to it and run make again
  - install torch into the environment yourself, then run make again
  - take the GPU build anyway: {ALLOW}=1 make ..."""


def has_gpu() -> bool:
    """True where an NVIDIA GPU or its driver is visible."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def gpu_packages(request: list[str]) -> list[str]:
    """Names of the GPU packages pip would install for this request."""
    asked = subprocess.run(
        [*PIP, "--dry-run", "--quiet", "--report", "-", *request], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        sys.exit(f"pip cannot resolve torch: {asked.stderr.strip().splitlines()[-1]}")
    names = [item["metadata"]["name"].lower() for item in json.loads(asked.stdout)["install"]]
    return [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def main() -> None:
    """Install, or say why not."""
    if importlib.util.find_spec("torch"):
        return
    request = ["torch", *(["-c", sys.argv[1]] if len(sys.argv) > 1 else [])]
    if not has_gpu() and os.environ.get(ALLOW) != "1":
        found = gpu_packages(request)
        if found:
            sys.exit(REMEDY.format(number=len(found), names=", ".join(found[:3])))
    sys.exit(subprocess.run([*PIP, "--quiet", *request], check=False).returncode)


if __name__ == "__main__":
    main()
