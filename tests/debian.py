"""Programs of Debian packages for tests and benchmarks, unpacked into the user's cache: no root, nothing installed"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finure" / "debian"


def program(package: str, path: str) -> Path | None:
    "A program of a package, such as usr/bin/promtool of prometheus; None where there is no apt to get it with."
    if found := shutil.which(Path(path).name):
        return Path(found)
    place = CACHE / package
    if not (place / path).exists() and not _unpack(package, place):
        return None
    return place / path


def _unpack(package: str, place: Path) -> bool:
    "Downloads and unpacks a package, whole or not at all."
    if not shutil.which("apt-get"):
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        os.chmod(folder, 0o755)
        download = ["apt-get", "download", "--quiet", package]
        if subprocess.run(download, cwd=folder, capture_output=True).returncode:
            subprocess.run(["apt-get", "update", "--quiet"], capture_output=True)
            if subprocess.run(download, cwd=folder, capture_output=True).returncode:
                return False
        (file,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", file, Path(folder) / "files"], check=True)
        shutil.rmtree(place, ignore_errors=True)
        (Path(folder) / "files").rename(place)
    return True
