"""Builds the package from settings.ini: the one place where project metadata is written."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(root / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def lines(key: str) -> list[str]:
    """The non-empty lines of a multi-line value."""
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


extras = {key.removeprefix("extra_"): lines(key) for key in cfg if key.startswith("extra_")}
extras["all"] = sorted({req for name, reqs in extras.items() if name != "dev" for req in reqs})

setup(
    name=cfg["name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=cfg["license"],
    keywords=cfg["keywords"].split(),
    # The job notebooks are documentation and programs at once, so the wheel carries them.
    packages=[*find_packages(include=["rlhf_workbench", "rlhf_workbench.*"]), "rlhf_workbench._jobs"],
    package_dir={"rlhf_workbench._jobs": "nbs/jobs"},
    package_data={"rlhf_workbench": ["py.typed", "data/*", "data/mappings/*"], "rlhf_workbench._jobs": ["*.ipynb"]},
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": ["rlhf_workbench = rlhf_workbench._modidx:d"],
        "rlhf_workbench.plugins": lines("plugins"),
    },
    zip_safe=False,
)
