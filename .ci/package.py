"""Build what would be published, and use it as a stranger would: `make package`.

sdist and wheel pass `twine check --strict` and hold what they should; the wheel alone, installed in
an empty environment far from the checkout, calibrates the model that ships in it and decodes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_BYTES = 25_000_000
PACKAGES = ("bench", "calib", "cli", "graphs", "integrations", "runtime", "schemas")
MODELS = ("tiny-llada", "tiny-dream", "tiny-sdar", "tiny-llada2")
IN_WHEEL = {
    *(f"spiffy/{package}/py.typed" for package in PACKAGES),
    "spiffy/integrations/serve/page.html",
    *(f"spiffy/runtime/checkpoints/{model}/model.safetensors" for model in MODELS),
    *(f"spiffy/runtime/checkpoints/{model}/tokenizer.json" for model in MODELS),
    *(
        f"spiffy/{file.relative_to(ROOT)}"
        for package in ("bench", "integrations")
        for file in ROOT.glob(f"{package}/templates/*.*")
    ),
}
BESIDE_PACKAGES = {
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "MANIFEST.in",
    "PKG-INFO",
    "README.md",
    "pyproject.toml",
    "setup.cfg",
    "spiffy_dllm.egg-info",
}
PROMPT = "Tom has 3 apples. He buys 4 more. How many now?"


def build(folder: Path) -> tuple[Path, Path]:
    """Make sdist and wheel."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], check=True)
    return sdist, wheel


def check_content(sdist: Path, wheel: Path) -> None:
    """Raise if something is missing, large, or not for the public."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    if missing := IN_WHEEL - held:
        raise SystemExit(f"the wheel lacks {sorted(missing)}")
    if strange := {n for n in held if not n.startswith(("spiffy/", "spiffy_dllm-"))}:
        raise SystemExit(f"the wheel would put {sorted(strange)} beside the package")
    if wheel.stat().st_size >= MOST_BYTES:
        raise SystemExit(f"the wheel has {wheel.stat().st_size} bytes")
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    if tops != {*PACKAGES, *BESIDE_PACKAGES}:
        raise SystemExit(f"the sdist differs in {sorted(tops ^ {*PACKAGES, *BESIDE_PACKAGES})}")
    print(f"wheel: {wheel.stat().st_size / 1e6:.1f} MB, {len(held)} files")


def use(wheel: Path, folder: Path) -> None:
    """Install the wheel and nothing else of ours; calibrate and decode with it."""
    binaries = folder / "venv" / "bin"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"SPIFFY_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(program: str, *arguments: str | Path) -> str:
        done = subprocess.run(
            [binaries / program, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{program} exits with {done.returncode}: {done.stdout}")
        return done.stdout

    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pins = ("-c", ROOT / "constraints.txt")
    pip = ("-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check")
    run("python", *pip, *pins, wheel)
    print(f"installed in {time.monotonic() - began:.0f} s")
    place = run("python", "-c", "import spiffy.runtime; print(spiffy.runtime.__file__)")
    if not Path(place.strip()).is_relative_to(folder):
        raise SystemExit(f"this is not the installed package: {place}")
    sizes = ("--samples", "6", "--gen-length", "64", "--budget", "8")
    run("spiffy-calibrate", "--model", "tiny-llada", *sizes, "--out", "g.json")
    decode = ("--graph", "g.json", "--prompt", PROMPT, "--verify", "--json")
    output = run("spiffy-decode", *decode)
    print("decoded:", json.loads(output.splitlines()[0])["text"].splitlines()[-1])


def main() -> None:
    """Build, look inside, use."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder)
        check_content(sdist, wheel)
        use(wheel, folder)


if __name__ == "__main__":
    main()
