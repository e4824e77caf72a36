"""Two import packages from one install: `vlsi_fast`, the trainer, and `vlsi_kernels`, the operators alone."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["vlsi_fast", "vlsi_fast.*"]) + find_packages("kernels"),
    package_dir={"vlsi_kernels": "kernels/vlsi_kernels"},
    package_data={
        "vlsi_fast.demo": ["models/*/*", "example_run/*/*", "example_run/*/*/*"],
        "vlsi_fast.export": ["card.md"],
        "vlsi_fast.planner": ["real_configs/*"],
        "vlsi_fast.paper": ["*.json"],
        "vlsi_fast.report": ["*.j2"],
    },
)
